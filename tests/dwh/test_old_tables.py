"""Tables of the DWH Helper, made as its ORM makes them, are recognised and brought over."""

import json
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from app.cli import main
from app.core.errors import Permanent
from app.db.database import Database
from app.db.migrations import open_database
from app.dwh.old_tables import CHUNK_ROWS, format_result, import_old_tables
from app.dwh.warehouse import open_warehouse
from warehouse import AT, Desk, uuid_of
from warehouse import BY_NAME as BY

OLD = """
CREATE TABLE events_part (
    id INTEGER PRIMARY KEY, uuid VARCHAR(36), event_type VARCHAR, event_time TIMESTAMP, user_id VARCHAR, shard INTEGER
);
CREATE TABLE tmp_user_properties (
    id INTEGER PRIMARY KEY, uuid VARCHAR(36), user_properties_json JSON, migrated BOOLEAN, session_id BIGINT
);
CREATE TABLE user_locations (id INTEGER PRIMARY KEY, uuid VARCHAR(36), location_lat FLOAT, city VARCHAR);
"""
A, B, C, D = map(uuid_of, range(4))
ROWS = f"""
INSERT INTO events_part VALUES (1, '{A}', 'say "hi"', '2026-02-01 10:20:30.5', '7', 1);
INSERT INTO events_part VALUES (2, '{B.replace("-", "").upper()}', '', NULL, NULL, 1);
INSERT INTO events_part VALUES (3, '{A}', 'twice', NULL, NULL, 1);
INSERT INTO events_part VALUES (4, 'no uuid', NULL, NULL, NULL, 1);
INSERT INTO events_part VALUES (5, NULL, NULL, NULL, NULL, 1);
INSERT INTO tmp_user_properties VALUES (1, '{C}', '{{"a": 1.10, "b": [null, "ü"]}}', TRUE, 9007199254740993);
INSERT INTO user_locations VALUES (1, '{D}', 56.949999999999996, 'Рига');
"""  # noqa: S608 - constants


def old_database(request: pytest.FixtureRequest, dialect: str, folder: Path) -> str:
    if dialect == "sqlite":
        with closing(sqlite3.connect(folder / "old.db")) as old:
            old.executescript(OLD + ROWS)
        return f"sqlite:///{folder}/old.db"
    url = str(request.getfixturevalue("postgres_server").new_database())
    request.getfixturevalue("postgres_server").run_sql(OLD + ROWS, url.rpartition("/")[2])
    return url


def opened(url: str) -> Database:
    return open_database(url, variables="x", read_only=True)


@pytest.mark.parametrize("dialect", ["sqlite", "postgres"])
def test_rows_of_the_tables_before_are_new_there_already_or_set_aside(
    request: pytest.FixtureRequest, tmp_path: Path, dialect: str
) -> None:
    url = old_database(request, dialect, tmp_path)
    with closing(open_warehouse("", tmp_path / "new")) as warehouse, closing(opened(url)) as old:
        desk = Desk(warehouse)
        counts = [
            (each.read, each.new, each.already_there) for each in import_old_tables(old, warehouse, AT, dry_run=True)
        ]
        assert (counts, desk.get(BY["events_part"])) == ([(5, 2, 1), (1, 1, 0), (1, 1, 0)], [])
        done = import_old_tables(old, warehouse, AT)
        assert [(each.read, each.new, each.already_there, each.set_aside_count) for each in done] == [
            (5, 2, 1, 2),
            (1, 1, 0, 0),
            (1, 1, 0, 0),
        ]
        assert done[0].left_columns == ["shard"]
        assert [which for which, _ in done[0].set_aside] == ["id 4", "id 5"]
        assert "uuid must be" in done[0].set_aside[0][1]
        assert any("set aside id 4" in line for line in format_result(done, dry_run=False))
        events = desk.get(BY["events_part"], sort_dir="asc", select="uuid,event_type,event_time,user_id")
        assert events == [
            {"uuid": A, "event_type": 'say "hi"', "event_time": "2026-02-01T10:20:30.500000Z", "user_id": "7"},
            {"uuid": B, "event_type": "", "event_time": None, "user_id": None},
        ]
        properties = desk.get(BY["tmp_user_properties"])[0]
        assert (properties["migrated"], properties["session_id"]) == (True, 2**53 + 1)
        assert properties["user_properties_json"] == {"a": 1.1, "b": [None, "ü"]}
        location = desk.get(BY["user_locations"])[0]
        assert (location["location_lat"], location["city"]) == (56.949999999999996, "Рига")
        again = import_old_tables(old, warehouse, AT)
        assert [(each.new, each.already_there) for each in again] == [(0, 3), (0, 1), (0, 1)]


@pytest.mark.parametrize("dialect", ["sqlite", "postgres"])
def test_a_database_of_another_program_is_told_as_such_and_left_alone(
    request: pytest.FixtureRequest, tmp_path: Path, dialect: str
) -> None:
    url = old_database(request, dialect, tmp_path)
    with closing(open_warehouse(url, tmp_path)) as warehouse:
        for _ in range(2):
            with pytest.raises(Permanent, match="another program created the table events_part") as refused:
                warehouse.ping()
            assert "python -m app import-dwh URL" in refused.value.hint
    with closing(open_warehouse("", tmp_path)) as warehouse, closing(opened(url)) as old:
        assert [each.read for each in import_old_tables(old, warehouse, AT)] == [5, 1, 1]


@pytest.mark.parametrize(
    ("dialect", "made", "told"),
    [
        ("sqlite", "CREATE TABLE EVENTS_PART (id INTEGER)", "import-dwh"),
        ("sqlite", "CREATE VIEW events_part AS SELECT 1 AS id", "import-dwh"),
        ("sqlite", "CREATE TABLE x (a); CREATE INDEX events_part ON x (a)", "empty database"),
        ("sqlite", "CREATE TABLE dwh_requests (a)", "empty database"),
        ("postgres", "CREATE VIEW events_part AS SELECT 1 AS id", "import-dwh"),
        ("postgres", "CREATE MATERIALIZED VIEW events_part AS SELECT 1 AS id", "import-dwh"),
        ("postgres", "CREATE SEQUENCE events_part", "empty database"),
        ("postgres", "CREATE DOMAIN events_part AS integer", "empty database"),
        ("postgres", "CREATE TABLE dwh_deleted (a integer)", "empty database"),
    ],
)
def test_whatever_another_program_made_under_our_names_is_told_as_such(
    request: pytest.FixtureRequest, tmp_path: Path, dialect: str, made: str, told: str
) -> None:
    url = f"sqlite:///{tmp_path}/old.db"
    if dialect == "sqlite":
        with closing(sqlite3.connect(tmp_path / "old.db")) as old:
            old.executescript(made)
    else:
        server = request.getfixturevalue("postgres_server")
        url = str(server.new_database())
        server.run_sql(made, url.rpartition("/")[2])
    with closing(open_warehouse(url, tmp_path)) as warehouse, pytest.raises(Permanent) as refused:
        warehouse.ping()
    assert told in refused.value.hint


@pytest.mark.parametrize("dialect", ["sqlite", "postgres"])
def test_columns_of_another_case_and_timestamps_with_a_time_zone_are_brought_over(
    request: pytest.FixtureRequest, tmp_path: Path, dialect: str
) -> None:
    filled = f"""
    CREATE TABLE events_part ("ID" INTEGER, "UUID" VARCHAR(36), event_time {{}}, "Event_Type" {{}}, "so""me" INTEGER);
    INSERT INTO events_part VALUES (1, '{A}', '2026-02-01 10:20:30+00', NULL, 1);
    INSERT INTO events_part VALUES (2, '{B}', '2026-02-01 10:20:30.25+05', NULL, 1);
    INSERT INTO events_part VALUES (3, '{C}', '2026-02-01 10:20:30.5+05:30', NULL, 1);
    UPDATE events_part SET "Event_Type" = {{}};
    """  # noqa: S608 - constants
    url = f"sqlite:///{tmp_path}/old.db"
    if dialect == "sqlite":
        with closing(sqlite3.connect(tmp_path / "old.db")) as old:
            old.executescript(filled.format("TEXT", "BLOB", "X'C3BC'"))
    else:
        server = request.getfixturevalue("postgres_server")
        url = str(server.new_database())
        server.run_sql(filled.format("TIMESTAMPTZ", "TEXT", "'ü'"), url.rpartition("/")[2])
    with closing(open_warehouse("", tmp_path / "new")) as warehouse, closing(opened(url)) as old:
        (done,) = import_old_tables(old, warehouse, AT)
        assert (done.new, done.set_aside, done.left_columns) == (3, [], ['so"me'])
        events = Desk(warehouse).get(BY["events_part"], sort_dir="asc", select="event_time,event_type")
    assert [each["event_time"] for each in events] == [
        "2026-02-01T10:20:30.000000Z",
        "2026-02-01T05:20:30.250000Z",
        "2026-02-01T04:50:30.500000Z",
    ]
    assert [each["event_type"] for each in events] == ["ü"] * 3


def test_a_row_without_an_id_is_named_by_its_place_in_the_table(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "old.db")) as old:
        old.execute("CREATE TABLE user_locations (uuid TEXT)")
        old.executemany("INSERT INTO user_locations VALUES (?)", ((uuid_of(n),) for n in range(CHUNK_ROWS)))
        old.execute("INSERT INTO user_locations VALUES ('none')")
        old.commit()
    with (
        closing(open_warehouse("", tmp_path / "new")) as warehouse,
        closing(opened(f"sqlite:///{tmp_path}/old.db")) as source,
    ):
        (done,) = import_old_tables(source, warehouse, AT)
    assert (done.new, [which for which, _ in done.set_aside]) == (CHUNK_ROWS, [f"row {CHUNK_ROWS + 1}"])


def test_the_command_brings_them_over(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    url = old_database(request, "sqlite", tmp_path)
    monkeypatch.setenv("DATA_DIR", str(tmp_path / "data"))
    before = (tmp_path / "old.db").read_bytes()
    assert main(["import-dwh", url, "--json"]) == 1  # some rows are set aside
    assert [each["new"] for each in json.loads(capsys.readouterr().out)["tables"]] == [2, 1, 1]
    assert main(["import-dwh", f"sqlite:///{tmp_path}/none.db"]) == 1
    assert "there is no such file" in capsys.readouterr().err
    assert (tmp_path / "old.db").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "old.db"]
