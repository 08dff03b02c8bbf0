"""The warehouse on both databases: each row once, in order, all or nothing."""

import json
import re
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import timedelta
from itertools import count, islice
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import pyarrow.parquet as pq
import pytest

from app.core.errors import AppError
from app.db.database import sql_directory
from app.db.migrations import MigratedDatabase, open_database
from app.dwh.query import KeysetPosition, erasure, selection
from app.dwh.request_parsing import BatchLimits
from app.dwh.tables import DEVICES, EVENTS, LOCATIONS, PERMANENT, TABLES, TECHNICAL, Table
from app.dwh.warehouse import MERGE_ROWS, EraseResult, open_warehouse
from app.product_events.mapping import EventRows
from app.web.errors import Refused
from postgres import PostgresServer
from warehouse import AT, BY_NAME, SORTED, Desk, key_of, mixed, rows_of, uuid_of, walked


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
def test_what_is_posted_is_read_back_word_for_word(desk: Desk, table: Table) -> None:
    rows = rows_of(table, 25)
    done = desk.post(table, rows)
    assert (list(done.ids), done.inserted_rows, done.batches, done.rows) == (list(range(1, 26)), 25, 1, 25)
    read = desk.get(table, sort_dir="asc")
    assert [row.pop("id") for row in read] == list(range(1, 26))
    assert all(row.pop("created_at").endswith("Z") for row in read)
    assert read == rows


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
def test_posting_again_inserts_nothing_and_new_rows_only(desk: Desk, table: Table) -> None:
    desk.post(table, rows_of(table, 10))
    again = desk.post(table, rows_of(table, 10))
    assert (list(again.ids), again.rows, again.batches) == ([], 10, 1)
    more = desk.post(table, rows_of(table, 15, first=5))
    assert (len(more.ids), more.rows) == (10, 15)
    keys = [row[table.key.name] for row in desk.get(table)]
    assert len(keys) == len(set(keys)) == 20
    assert set(keys) == {key_of(table, number) for number in range(20)}


def test_it_tells_how_many_of_some_events_it_holds(desk: Desk) -> None:
    desk.post(EVENTS, rows_of(EVENTS, 30))
    assert desk.warehouse.known([]) == 0
    assert desk.warehouse.known({uuid_of(number) for number in range(20, 2000)}) == 10


def test_rows_without_values_are_null_and_defaults_hold(desk: Desk) -> None:
    for table in TABLES:
        desk.post(table, [{table.key.name: key_of(table, 1)}])
        (row,) = desk.get(table)
        expected = {column.name: column.default for column in table.columns[1:]}
        assert {name: row[name] for name in expected} == expected


def test_the_existing_row_wins_but_devices_take_what_is_not_null(desk: Desk) -> None:
    desk.post(PERMANENT, [{"ehr_id": 1, "gender": "f", "source": None}])
    desk.post(PERMANENT, [{"ehr_id": 1, "gender": "m", "source": "x"}])
    assert [(row["gender"], row["source"]) for row in desk.get(PERMANENT)] == [("f", None)]
    first = desk.post(DEVICES, [{"device_id": "d", "device_brand": "a", "device_model": "m"}])
    later = desk.post(DEVICES, [{"device_id": "d", "device_brand": "b", "device_type": "t"}])
    assert (len(first.ids), len(later.ids)) == (1, 0)
    (row,) = desk.get(DEVICES)
    assert (row["id"], row["device_brand"], row["device_model"], row["device_type"]) == (1, "b", "m", "t")


def test_a_key_twice_in_one_request_is_one_row(desk: Desk) -> None:
    done = desk.post(PERMANENT, [{"ehr_id": 1, "gender": "a"}, {"ehr_id": 2}, {"ehr_id": 1, "gender": "b"}])
    assert len(done.ids) == 2
    assert [row["gender"] for row in desk.get(PERMANENT, ehr_id=1)] == ["a"]
    devices = [{"device_id": "d", "device_brand": "a", "device_type": "t"}, {"device_id": "d", "device_brand": "b"}]
    for limits in (BatchLimits(1000, 10**7), BatchLimits(1, 10**7)):
        desk.post(DEVICES, devices, limits=limits)
        (row,) = desk.get(DEVICES)
        assert (row["device_brand"], row["device_type"]) == ("b", "t")


def test_upper_case_uuids_are_the_same_rows(desk: Desk) -> None:
    desk.post(LOCATIONS, [{"uuid": uuid_of(10)}])
    assert not desk.post(LOCATIONS, [{"uuid": uuid_of(10).upper()}]).ids


@pytest.mark.parametrize(("rows", "size_bytes", "batches"), [(1000, 10**7, 2), (400, 10**7, 4), (1000, 200, 1500)])
def test_batches_are_counted_truly(desk: Desk, rows: int, size_bytes: int, batches: int) -> None:
    done = desk.post(LOCATIONS, rows_of(LOCATIONS, 1500), limits=BatchLimits(rows, size_bytes))
    assert (done.batches, list(done.ids)) == (batches, list(range(1, 1501)))


def test_ids_follow_the_order_of_the_rows_over_many_merges(desk: Desk) -> None:
    count = 2 * MERGE_ROWS + 500
    done = desk.post(LOCATIONS, [{"uuid": uuid_of(count - n)} for n in range(count)])
    assert len(done.ids) == count
    assert list(done.ids) == sorted(done.ids)
    newest = desk.get(LOCATIONS, limit=2)
    assert [row["uuid"] for row in newest] == [uuid_of(1), uuid_of(2)]


@pytest.mark.parametrize(
    ("count", "known"),
    [
        (60, 0),
        (60, 31),
        (60, 59),
        pytest.param(2 * MERGE_ROWS + 500, 30, marks=pytest.mark.slow),
        pytest.param(2 * MERGE_ROWS + 500, 2 * MERGE_ROWS, marks=pytest.mark.slow),
    ],
)
def test_a_row_that_is_there_anywhere_in_a_request_is_left_out_alone(desk: Desk, count: int, known: int) -> None:
    desk.post(LOCATIONS, [{"uuid": uuid_of(known), "city": "first"}])
    done = desk.post(LOCATIONS, [{"uuid": uuid_of(n)} for n in range(count)])
    assert (done.inserted_rows, done.rows) == (count - 1, count)
    rows = desk.read(LOCATIONS, format="csv", limit=count, sort_dir="asc").body.decode().splitlines()[1:]
    order = [row.split(",")[:2] for row in rows]
    assert order[0] == ["1", uuid_of(known)]
    assert [uuid for _, uuid in order[1:]] == [uuid_of(n) for n in range(count) if n != known]
    assert [int(id_) for id_, _ in order[1:]] == list(done.ids)


def test_ids_are_told_truly_when_rows_come_from_elsewhere_meanwhile(desk: Desk) -> None:
    desk.post(PERMANENT, rows_of(PERMANENT, 3))
    with desk.warehouse._writing() as session:  # noqa: SLF001 - somebody else's statements
        session.run("DELETE FROM permanent_user_properties")
        session.run("INSERT INTO permanent_user_properties (ehr_id) VALUES (-1)")
    assert list(desk.post(PERMANENT, rows_of(PERMANENT, 2)).ids) == [5, 6]


@pytest.mark.parametrize("table", [EVENTS, PERMANENT], ids=lambda table: table.name)
def test_lines_are_the_same_bytes_in_whatever_order_they_are_read(desk: Desk, table: Table) -> None:
    texts = ["", "\x01\x1f\x7f", '"\\/', "\n\r\t\b\f", "\u2028", None]
    rows = [{table.key.name: key_of(table, n), table.names[1]: text} for n, text in enumerate(texts)]
    desk.post(table, rows + rows_of(table, 4, first=len(texts)))
    by_id, by_key = (
        sorted(desk.read(table, format="ndjson", sort_by=name).body.splitlines()) for name in ("id", table.key.name)
    )
    assert by_id == by_key
    assert len(by_id) == len(texts) + 4


def test_a_dry_run_says_what_would_happen_and_stores_nothing(desk: Desk) -> None:
    desk.post(EVENTS, rows_of(EVENTS, 3))
    done = desk.post(EVENTS, rows_of(EVENTS, 5), dry_run=True, key="k")
    assert (list(done.ids), done.inserted_rows, done.rows, done.dry_run) == ([], 2, 5, True)
    assert len(desk.get(EVENTS)) == 3
    assert desk.post(EVENTS, rows_of(EVENTS, 5), key="k").inserted_rows == 2


def test_an_idempotency_key_gives_the_first_answer_again(desk: Desk) -> None:
    first = desk.post(EVENTS, rows_of(EVENTS, 3), caller="a", key="k")
    again = desk.post(EVENTS, rows_of(EVENTS, 3), caller="a", key="k")
    assert (list(again.ids), again.batches, again.rows, again.replayed) == (list(first.ids), 1, 3, True)
    with pytest.raises(Refused, match="another request") as refused:
        desk.post(EVENTS, rows_of(EVENTS, 4), caller="a", key="k")
    assert refused.value.refusal.status == 409
    with pytest.raises(Refused):
        desk.post(LOCATIONS, rows_of(LOCATIONS, 3), caller="a", key="k")
    assert not desk.post(EVENTS, rows_of(EVENTS, 3), caller="b", key="k").replayed
    assert len(desk.get(EVENTS)) == 3


def test_a_key_is_forgotten_after_a_week(desk: Desk) -> None:
    desk.post(EVENTS, rows_of(EVENTS, 1), key="k")
    with pytest.raises(Refused):
        desk.post(EVENTS, rows_of(EVENTS, 2), key="k")
    desk.at = AT + timedelta(days=8)
    assert not desk.post(EVENTS, rows_of(EVENTS, 2), key="k").replayed


@pytest.mark.parametrize("table", [EVENTS, DEVICES], ids=lambda table: table.name)
def test_sixteen_clients_at_once_store_each_row_once(desk: Desk, table: Table) -> None:
    """Overlapping rows in different orders: what deadlocks where writers do not take turns."""
    start = threading.Barrier(16)

    def client(number: int) -> list[int]:
        ids: list[int] = []
        start.wait()
        for step in range(3):
            rows = rows_of(table, 120, first=(number * 37 + step * 50) % 400)
            ids += desk.post(table, rows[:: -1 if number % 2 else 1], limits=BatchLimits(50, 10**7)).ids
        return ids

    with ThreadPoolExecutor(16) as pool:
        ids = [each for found in pool.map(client, range(16)) for each in found]
    read = desk.get(table, limit=10_000)
    assert len(ids) == len(set(ids)) == len(read)
    assert set(ids) == {row["id"] for row in read}
    assert len({row[table.key.name] for row in read}) == len(read)


def test_one_key_from_many_clients_at_once_is_one_request(desk: Desk) -> None:
    with ThreadPoolExecutor(8) as pool:
        done = list(pool.map(lambda _: desk.post(EVENTS, rows_of(EVENTS, 50), key="same"), range(8)))
    assert {tuple(each.ids) for each in done} == {tuple(done[0].ids)}
    assert sum(each.replayed for each in done) == 7


def test_readers_do_not_wait_for_a_writer(desk: Desk) -> None:
    desk.post(EVENTS, rows_of(EVENTS, 3))
    with desk.warehouse._writing() as session:  # noqa: SLF001 - a writer that takes its time
        session.run("DELETE FROM events_part")
        assert len(desk.get(EVENTS)) == 3


def pages(desk: Desk, table: Table, **params: Any) -> list[dict[str, Any]]:
    """Follow the links to the end."""
    rows: list[dict[str, Any]] = []
    given = [(name, str(value)) for name, value in params.items()]
    while True:
        chosen = selection(table, given)
        page = desk.read(table, **dict(given))
        rows += json.loads(page.body)["rows"]
        if page.last is None:
            return rows
        given = parse_qsl(chosen.next_page("/dwh/x", page.last).partition("?")[2], keep_blank_values=True)


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"sort_dir": "asc"},
        {"sort_by": "cohort_week"},
        {"sort_by": "gender", "sort_dir": "asc"},
        {"gender": "f"},
        {"gender": "in.(f)", "sort_by": "created_at", "format": "json"},
    ],
)
def test_pages_follow_each_other_without_gap_or_overlap(desk: Desk, params: dict[str, str]) -> None:
    rows = [{"ehr_id": n, "gender": [None, "f", "m", "Z"][n % 4], "cohort_week": n % 5 or None} for n in range(53)]
    desk.post(PERMANENT, rows)
    whole = desk.get(PERMANENT, limit=1000, **params)
    assert pages(desk, PERMANENT, limit=7, **params) == whole
    assert len(whole) == (13 if "gender" in params else 53)


def test_a_text_that_is_too_long_for_a_link_is_looked_up_in_its_row(desk: Desk) -> None:
    cities = ["x" * 5000 + end for end in ("b", "a", "a", "")] + ["x" * 10, None]
    desk.post(LOCATIONS, [{"uuid": uuid_of(number), "city": city} for number, city in enumerate(cities)])
    order = {"sort_by": "city", "sort_dir": "asc", "select": "id"}
    whole = [row["id"] for row in desk.get(LOCATIONS, **order)]
    assert walked(desk, LOCATIONS, 1, lambda: None, **order) == whole
    place = desk.read(LOCATIONS, **order, limit=2).last
    assert place is not None
    token = place.token("city")
    assert len(token) < 100
    erase(desk, LOCATIONS, id=place.id)
    with pytest.raises(AppError, match="was deleted"):
        desk.get(LOCATIONS, **order, after=token)


FAR = "infinity,-infinity,0044-03-15 BC,12026-01-01 00:00:00.5"


@pytest.mark.parametrize("table", [EVENTS, PERMANENT, LOCATIONS], ids=lambda table: table.name)
def test_whoever_follows_links_meets_each_row_of_the_start_once_while_rows_are_inserted(
    desk: Desk, table: Table
) -> None:
    desk.post(table, mixed(table, range(40)))
    foreign = {LOCATIONS.name: ("location_lat", "NaN,-Infinity"), EVENTS.name: ("event_time", FAR)}
    if desk.warehouse.database.dialect == "postgres" and table.name in foreign:  # what another program may have stored
        column, values = foreign[table.name]
        with desk.warehouse.database.transaction() as session:
            for number, value in enumerate(values.split(","), 7):
                session.run(f"UPDATE {table.name} SET {column} = '{value}' WHERE id % {number} = 0")  # noqa: S608
    numbers = count(1000)
    for sort_by in SORTED[table.name]:
        for sort_dir in ("asc", "desc"):
            start = {row["id"] for row in desk.get(table, limit=10_000)}
            order = {"sort_by": sort_by, "sort_dir": sort_dir}
            select = {"select": "uuid,id" if table is EVENTS else "id"}
            ids = walked(desk, table, 23, lambda: desk.post(table, mixed(table, islice(numbers, 1))), **order, **select)
            assert len(ids) == len(set(ids)), (sort_by, sort_dir)
            assert start <= set(ids), (sort_by, sort_dir)


def test_timestamps_outside_the_years_of_four_digits_are_shown_as_they_are_and_refused_for_parquet(
    postgres_server: PostgresServer, tmp_path: Path
) -> None:
    with closing(open_warehouse(postgres_server.new_database(), tmp_path)) as warehouse:
        desk = Desk(warehouse)
        desk.post(EVENTS, [{"uuid": uuid_of(number)} for number in range(2)])
        for far in FAR.split(","):
            with warehouse.database.transaction() as session:
                session.run("UPDATE events_part SET event_time = CAST(:far AS timestamptz) WHERE id = 1", far=far)
            shown = desk.get(EVENTS, pk=1)[0]["event_time"]
            assert (shown.partition(" ")[0], "BC" in shown) == (far.partition(" ")[0], "BC" in far)
            with pytest.raises(Refused, match="Parquet cannot hold"):
                desk.read(EVENTS, format="parquet")
        assert desk.read(EVENTS, format="parquet", select="uuid").body


def test_the_caller_decides_what_becomes_of_a_row_that_is_there(desk: Desk) -> None:
    desk.post(LOCATIONS, [{"uuid": uuid_of(1), "city": "Riga", "country": "LV"}])
    more: list[dict[str, Any]] = [{"uuid": uuid_of(1), "city": "Liepāja", "country": None}, {"uuid": uuid_of(2)}]
    assert desk.post(LOCATIONS, more, dry_run=True, resolution="merge-duplicates").inserted_rows == 1
    for resolution, city in (("ignore-duplicates", "Riga"), ("merge-duplicates", "Liepāja")):
        done = desk.post(LOCATIONS, more, resolution=resolution, key=resolution)
        assert (len(done.ids), done.rows) == (int(resolution == "ignore-duplicates"), 2)
        row = desk.get(LOCATIONS, pk=1)[0]
        assert (row["city"], row["country"]) == (city, "LV")
        with pytest.raises(Refused, match="another request"):
            desk.post(LOCATIONS, more, key=resolution)
    desk.post(DEVICES, [{"device_id": "d", "device_type": "old"}])
    desk.post(DEVICES, [{"device_id": "d", "device_type": "new"}], resolution="ignore-duplicates")
    assert desk.get(DEVICES)[0]["device_type"] == "old"


def test_what_is_absent_in_a_merge_stays_and_a_default_replaces_nothing(desk: Desk) -> None:
    properties = BY_NAME["tmp_user_properties"]
    desk.post(properties, [{"uuid": uuid_of(1), "migrated": True, "language": "lv"}])
    with pytest.raises(Refused, match="migrated: is required"):
        desk.post(properties, [{"uuid": uuid_of(1), "language": "de"}], resolution="merge-duplicates")
    desk.post(properties, [{"uuid": uuid_of(1), "migrated": False}], resolution="merge-duplicates")
    assert [(row["language"], row["migrated"]) for row in desk.get(properties)] == [("lv", False)]


def erase(desk: Desk, table: Table, **params: Any) -> EraseResult:
    given = [(name, str(value)) for name, value in params.items()]
    return desk.warehouse.erase(erasure(table, given), at=AT)


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
def test_deleted_rows_do_not_come_back_by_posts_or_pulls(desk: Desk, table: Table) -> None:
    desk.post(table, rows_of(table, 60))
    assert erase(desk, table, id="lte.0") == EraseResult(0)
    assert erase(desk, table, id="lte.50", dry_run=True) == EraseResult(50, 50)
    assert erase(desk, table, id="lte.50") == EraseResult(50, 50)
    again = desk.post(table, rows_of(table, 70))
    assert (again.rows, list(again.ids)) == (70, list(again.ids)[:10])
    assert desk.post(table, rows_of(table, 50), resolution="merge-duplicates").inserted_rows == 0
    assert {row[table.key.name] for row in desk.get(table)} == {key_of(table, n) for n in range(50, 70)}
    names = [column.name for column in table.columns if column.required or column.default is not None]
    pulled = EventRows(names, [[key_of(table, n), False][: len(names)] for n in range(40, 80)])
    desk.warehouse.load(iter([{table.name: pulled}]))
    assert {row[table.key.name] for row in desk.get(table)} == {key_of(table, n) for n in range(50, 80)}
    lifted = erase(desk, table, **{table.key.name: key_of(table, 3)}, forget=True)
    assert lifted == EraseResult(0, 0, 1)
    assert desk.post(table, rows_of(table, 60)).inserted_rows == 1
    if table is EVENTS:  # what a verification of the pulls asks for: what was deleted is accounted for
        assert desk.warehouse.known({uuid_of(number) for number in range(100)}) == 80


@pytest.mark.parametrize("dialect", ["sqlite", "postgres"])
def test_an_upgrade_keeps_hashes_in_place_of_deleted_keys(
    dialect: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    url = request.getfixturevalue("postgres_server").new_database() if dialect == "postgres" else ""
    before = tmp_path / "sql" / "dwh"
    shutil.copytree(sql_directory() / "dwh", before)
    for newer in before.glob("migrations/0004_*"):
        newer.unlink()
    plain = open_database(url, variables="", default=tmp_path / "dwh.db")
    keys = {EVENTS: uuid_of(1), PERMANENT: "7", DEVICES: "дом/1"}
    with closing(MigratedDatabase(plain, before)) as old, old.transaction() as session:
        for table, key in keys.items():
            insert = "INSERT INTO dwh_deleted (table_name, key, deleted_at) VALUES (:name, :key, :at)"
            session.run(insert, name=table.name, key=key, at=AT)
    with closing(open_warehouse(url, tmp_path)) as warehouse:
        desk = Desk(warehouse)
        for table, key in keys.items():
            rows = [{table.key.name: int(key) if table is PERMANENT else key}]
            assert desk.post(table, rows).inserted_rows == 0
            assert erase(desk, table, **{table.key.name: key}, forget=True) == EraseResult(0, 0, 1)
            assert desk.post(table, rows).inserted_rows == 1
            assert erase(desk, table, id="gt.0") == EraseResult(1, 1)
        with warehouse.database.transaction() as session:
            kept = [row["key_hash"] for row in session.rows("SELECT key_hash FROM dwh_deleted")]
            with pytest.raises(AppError):  # as a process of the earlier version looks for keys
                session.rows("SELECT key FROM dwh_deleted")
        assert all(re.fullmatch("[0-9a-f]{64}", each) for each in kept)
        assert len(set(kept)) == 3


def test_a_row_that_is_deleted_while_it_is_posted_again_stays_deleted(desk: Desk) -> None:
    desk.post(EVENTS, rows_of(EVENTS, 3000))
    with ThreadPoolExecutor(4) as pool:
        posts = [pool.submit(desk.post, EVENTS, rows_of(EVENTS, 3000)) for _ in range(3)]
        erased = pool.submit(erase, desk, EVENTS, id="gt.0")
        assert erased.result().deleted == 3000
        assert [post.result().inserted_rows for post in posts] == [0, 0, 0]
    assert desk.get(EVENTS) == []


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
def test_every_format_holds_the_same_rows(desk: Desk, table: Table, tmp_path: Any) -> None:
    desk.post(table, rows_of(table, 30))
    rows = desk.get(table, limit=30)
    lines = desk.read(table, format="ndjson").body
    assert [json.loads(line) for line in lines.splitlines()] == rows
    path = tmp_path / "rows.parquet"
    path.write_bytes(desk.read(table, format="parquet").body)
    columnar = pq.ParquetFile(path).read().to_pylist()
    assert [row["id"] for row in columnar] == [row["id"] for row in rows]
    for column in table.columns:
        values = [row[column.name] for row in columnar]
        if column.kind == "json":
            values = [json.loads(value) for value in values]
        if column.kind == "instant":
            values = [f"{value:%Y-%m-%dT%H:%M:%S.%fZ}" for value in values]
        assert values == [row[column.name] for row in rows]


def test_csv_that_was_read_can_be_posted(desk: Desk, tmp_path: Any) -> None:
    import csv

    desk.post(TECHNICAL, rows_of(TECHNICAL, 5))
    text = desk.read(TECHNICAL, format="csv").body.decode()
    (tmp_path / "rows.csv").write_text(text, newline="")
    with (tmp_path / "rows.csv").open(newline="") as file:
        read = list(csv.DictReader(file))
    rows = desk.get(TECHNICAL)
    assert [json.loads(row["plan_json"]) for row in read] == [row["plan_json"] for row in rows]
    assert [row["is_attribution_event"] for row in read] == [str(row["is_attribution_event"]).lower() for row in rows]
    assert [row["library"] for row in read] == [row["library"] for row in rows]


def test_csv_for_spreadsheets_has_a_byte_order_mark_and_no_formulas(desk: Desk) -> None:
    cities = ["=1+1", "+7", "-7", "@SUM(A1)", "\tx", "\rx", "\uff1d1", "Riga -7", "'=1", None, ""]
    desk.post(LOCATIONS, [{"uuid": uuid_of(n), "city": c, "location_lat": -7.5} for n, c in enumerate(cities)])
    desk.post(TECHNICAL, [{"uuid": uuid_of(1), "plan_json": -1, "amplitude_id": -2}])
    how = {"format": "csv", "sort_dir": "asc", "select": "city,location_lat"}
    plain = desk.read(LOCATIONS, **how).body.decode()
    assert plain.startswith("city,location_lat\n=1+1,-7.5\n")
    safe = desk.read(LOCATIONS, **how, formula_safe="true", bom="true").body.decode("utf-8")
    assert safe.startswith("\ufeffcity,location_lat\n'=1+1,-7.5\n'+7,-7.5\n'-7,-7.5\n'@SUM(A1),-7.5\n'\tx,-7.5\n")
    assert '"\'\rx",-7.5\n' in safe
    assert safe.endswith("'\uff1d1,-7.5\nRiga -7,-7.5\n'=1,-7.5\n,-7.5\n,-7.5\n")
    cells = desk.read(TECHNICAL, format="csv", select="plan_json,amplitude_id", formula_safe="1").body
    assert cells == b"plan_json,amplitude_id\n'-1,-2\n"


def test_many_rows_come_as_a_file_with_a_link_to_the_rest(desk: Desk) -> None:
    desk.post(LOCATIONS, [{"uuid": uuid_of(n)} for n in range(30_000)])
    page = desk.read(LOCATIONS, format="ndjson", limit=25_000)
    assert page.last == KeysetPosition(5001)
    assert page.body.count(b"\n") == 25_000
    rest = desk.read(LOCATIONS, format="ndjson", limit=25_000, after_id=5001)
    assert (rest.last, rest.body.count(b"\n")) == (None, 5000)


def test_a_merge_that_fails_leaves_nothing(desk: Desk) -> None:
    with desk.warehouse._writing() as session:  # noqa: SLF001 - a table that somebody changed
        session.run("ALTER TABLE user_locations RENAME COLUMN region TO area")
    with pytest.raises(AppError):
        desk.post(LOCATIONS, rows_of(LOCATIONS, 3), key="k")
    with desk.warehouse._writing() as session:  # noqa: SLF001
        session.run("ALTER TABLE user_locations RENAME COLUMN area TO region")
    assert desk.get(LOCATIONS) == []
    assert not desk.post(LOCATIONS, rows_of(LOCATIONS, 3), key="k").replayed
