"""Text and numbers come back as they were sent, whatever a PostgreSQL database or role says; or they are refused."""

from contextlib import closing
from pathlib import Path

import httpx
import psycopg
import pytest

from app.core.errors import Permanent, Rejected
from app.db.postgres import PostgresDatabase
from app.db.state import open_state
from app.dwh.tables import LOCATIONS, TECHNICAL
from app.dwh.warehouse import open_warehouse
from app.ops.connection_checks import of_database
from daemon import Daemons
from postgres import PostgresServer
from warehouse import Desk, uuid_of

CITY = "Zürich"
FLOAT = 0.1 + 0.2


def made(server: PostgresServer, encoding: str, settings: str = "") -> str:
    """The URL of a new database of an encoding."""
    name = f"encoded_{encoding.lower()}{'_set' if settings else ''}"
    server.run_sql(f"CREATE DATABASE {name} TEMPLATE template0 ENCODING '{encoding}' LOCALE 'C'")
    if settings:
        server.run_sql(f"ALTER DATABASE {name} SET {settings}")
    return server.url(name)


def stored(url: str) -> object:
    """The city as another client reads it."""
    with psycopg.connect(url, client_encoding="UTF8") as connection:
        return connection.execute("SELECT city FROM user_locations").fetchall()


@pytest.mark.parametrize("encoding", ["UTF8", "LATIN1", "WIN1252"])
def test_text_is_stored_as_text_or_refused(postgres_server: PostgresServer, encoding: str, tmp_path: Path) -> None:
    url = made(postgres_server, encoding)
    with closing(open_warehouse(url, tmp_path)) as warehouse:
        desk = Desk(warehouse)
        desk.post(LOCATIONS, [{"uuid": uuid_of(1), "city": CITY}])
        assert desk.get(LOCATIONS)[0]["city"] == CITY
        assert stored(url) == [(CITY,)]
        if encoding == "UTF8":
            assert "may read, write" in of_database(warehouse.database)
            return
        with pytest.raises(Rejected) as refused:
            desk.post(LOCATIONS, [{"uuid": uuid_of(2), "city": "Рига"}])
        assert "ENCODING 'UTF8'" in refused.value.hint
        assert stored(url) == [(CITY,)]
        with pytest.raises(Permanent, match=encoding):
            of_database(warehouse.database)


def test_a_filter_that_ignores_case_finds_the_same_in_a_database_whose_locale_knows_ascii_only(
    postgres_server: PostgresServer, tmp_path: Path
) -> None:
    cities = ["ZÜRICH", "zürich", "straße", "STRAẞE", "РИГА", "a.b", "aXb", "k", "(x|y)", "l\nM", "Ω", "ω"]
    cities += ["ΟΔΟΣ", "ΟΔΟΣΑ", "οδος", "İzmir", "\u212a"]
    wanted = {"zürich": 2, "ZÜ*": 2, "*r_c*": 2, "STRAẞE": 2, "рига": 1, "A.B": 1, "K": 1, "(X|Y)": 1, "L*m": 1, "Ω": 2}
    wanted |= {"ΟΔΟΣ*": 2, "*ΟΣ": 1, "*ς": 1, "İ*": 1, "i*": 0, "\u212a": 1}
    for url in (made(postgres_server, "UTF8", "search_path = public"), ""):
        with closing(open_warehouse(url, tmp_path)) as warehouse:
            desk = Desk(warehouse)
            desk.post(LOCATIONS, [{"uuid": uuid_of(number), "city": city} for number, city in enumerate(cities)])
            found = {text: len(desk.get(LOCATIONS, city=f"ilike.{text}")) for text in wanted}
            assert found == wanted, url or "SQLite"


def test_an_encoding_of_the_url_does_not_count(postgres_server: PostgresServer, tmp_path: Path) -> None:
    url = f"{postgres_server.new_database()}?client_encoding=LATIN1"
    with closing(open_warehouse(url, tmp_path)) as warehouse:
        Desk(warehouse).post(LOCATIONS, [{"uuid": uuid_of(1), "city": CITY}])
    assert stored(url.partition("?")[0]) == [(CITY,)]


def test_a_database_that_knows_no_characters_is_refused(postgres_server: PostgresServer, tmp_path: Path) -> None:
    url = made(postgres_server, "SQL_ASCII")
    with closing(open_warehouse(url, tmp_path)) as warehouse:
        for use in (warehouse.ping, lambda: of_database(warehouse.database)):
            with pytest.raises(Permanent, match="SQL_ASCII"):
                use()
    with closing(open_state(url, tmp_path)) as state, pytest.raises(Permanent, match="SQL_ASCII"):
        state.ping()


@pytest.mark.slow
def test_a_daemon_says_that_a_database_knows_no_characters(postgres_server: PostgresServer, daemons: Daemons) -> None:
    url = made(postgres_server, "SQL_ASCII", "DateStyle = 'ISO'")
    daemon = daemons.start(DWH_DATABASE_URL=url)
    body = {"data": [{"uuid": uuid_of(1), "city": CITY}]}
    answer = httpx.post(f"{daemon.url}/dwh/user-locations", json=body)
    assert (answer.status_code, "SQL_ASCII" in answer.json()["error"]["message"]) == (502, True)
    daemon.until(lambda: "dwh_connected: PostgreSQL" in daemon.log and "SQL_ASCII" in daemon.log)
    assert not daemon.get("/ready").json["checks"]["dwh_connected"]


@pytest.mark.parametrize("settings", ["extra_float_digits = -15", "DateStyle = 'SQL, DMY'", "TimeZone = 'Asia/Tokyo'"])
def test_settings_of_a_database_change_no_value(postgres_server: PostgresServer, settings: str, tmp_path: Path) -> None:
    name = "".join(filter(str.isalpha, settings.lower()))
    postgres_server.run_sql(f"CREATE DATABASE {name} TEMPLATE template0")
    postgres_server.run_sql(f"ALTER DATABASE {name} SET {settings}")
    url = postgres_server.url(name)
    with closing(open_warehouse(url, tmp_path)) as warehouse:
        desk = Desk(warehouse)
        desk.post(LOCATIONS, [{"uuid": uuid_of(1), "location_lat": FLOAT, "location_lng": 1e-300}])
        (row,) = desk.get(LOCATIONS)
        assert (row["location_lat"], row["location_lng"]) == (FLOAT, 1e-300)
        assert desk.get(LOCATIONS, location_lat=repr(FLOAT), created_at=row["created_at"]) == [row]
    with (
        closing(PostgresDatabase(url, variables="X")) as database,
        database.transaction(read_only=True) as session,
    ):
        (found,) = session.rows("SELECT TIMESTAMPTZ '2026-02-01 00:00:00Z' AS read_at")
        assert found["read_at"].isoformat() == "2026-02-01T00:00:00+00:00"


def test_json_numbers_come_back_as_they_were_written(desk: Desk) -> None:
    numbers = "[1.10, 123456789012345678901234567890, 0.1000000000000000055511151231257827]"
    body = f'{{"data":[{{"uuid":"{uuid_of(1)}","plan_json":{numbers}}}]}}'
    desk.post_text(TECHNICAL, body.encode())
    for answer_format in ("json", "ndjson"):
        answer = desk.read(TECHNICAL, format=answer_format).body.decode()
        assert numbers.replace(" ", "") in answer.replace(" ", "")
