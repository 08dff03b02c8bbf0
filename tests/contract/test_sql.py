"""The SQL surface over SQLite and PostgreSQL: one behaviour, and no exception of a driver gets out."""

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from uuid import uuid4

import pytest

from app.core.errors import AppError, Permanent, Rejected
from app.db.database import NAMED, Database, load_queries, sql_directory
from app.db.migrations import MigratedDatabase, open_database
from app.db.state import State, open_state
from postgres import WITH_PASSWORD, PostgresServer

AT = datetime(2026, 2, 7, 23, 59, 59, 5, tzinfo=UTC)
TABLE = "CREATE TABLE things (id BIGINT PRIMARY KEY, name TEXT NOT NULL, seen_at TIMESTAMPTZ)"
CANARY = "canary-8d1f"


@pytest.fixture(params=["sqlite", "postgres"])
def new_url(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], str]:
    if request.param == "sqlite":
        return lambda: f"sqlite:///{tmp_path}/{uuid4()}/folder/test.db"
    server: PostgresServer = request.getfixturevalue("postgres_server")
    return server.new_database


@pytest.fixture
def url(new_url: Callable[[], str]) -> str:
    return new_url()


@pytest.fixture
def database(url: str) -> Iterator[Database]:
    with closing(open_database(url, variables="TEST_DATABASE_URL")) as database:
        with database.transaction() as session:
            session.run(TABLE)
        yield database


def insert(database: Database, number: int, name: str = "x", at: datetime | None = None) -> int:
    with database.transaction() as session:
        return session.run("INSERT INTO things VALUES (:id, :name, :at)", id=number, name=name, at=at)


def names(database: Database) -> list[str]:
    with database.transaction(read_only=True) as session:
        return [row["name"] for row in session.rows("SELECT name FROM things ORDER BY id")]


def test_rows_come_as_written_and_instants_in_utc(database: Database) -> None:
    east = AT.astimezone(timezone(timedelta(hours=5, minutes=30)))
    assert insert(database, 1, "ünï'", east) == 1
    with database.transaction() as session:
        rows = session.rows("SELECT id, name, seen_at, seen_at AS again_at FROM things WHERE seen_at = :at", at=AT)
    assert rows == [{"id": 1, "name": "ünï'", "seen_at": AT, "again_at": AT}]
    assert rows[0]["seen_at"].utcoffset() == timedelta(0)


AWKWARD = ["", "\\N", "\\.", "a\tb", "a\nb", "\r", "\\", "\\t", "'\"", "ü😀", " x ", "NULL", None]


def test_appended_rows_are_the_very_rows_in_their_order(database: Database) -> None:
    with database.transaction() as session:
        session.run("CREATE TABLE kinds (n BIGINT, t TEXT, d DOUBLE PRECISION, b BOOLEAN, empty TEXT)")
        rows = [(n, text, n / 3, None if text is None else n % 2 == 0, None) for n, text in enumerate(AWKWARD)]
        assert session.append("kinds", ("n", "t", "d", "b", "empty"), iter(rows)) == len(rows)
        assert session.append("kinds", ("n", "t"), [(2**63 - 1, "last")]) == 1
        assert list(session.stream("SELECT n, t, d, b, empty FROM kinds ORDER BY n")) == [
            *rows,
            (2**63 - 1, "last", None, None, None),
        ]


def test_many_rows_are_appended_and_streamed(database: Database) -> None:
    with database.transaction() as session:
        session.append("things", ("id", "name"), ((n, f"name {n}") for n in range(5000)))
    with database.transaction(read_only=True) as session:
        streamed = session.stream("SELECT id, name FROM things WHERE id >= :first ORDER BY id", first=10)
        assert list(streamed) == [(n, f"name {n}") for n in range(10, 5000)]


def test_rows_that_are_large_come_in_blocks_that_are_small(database: Database) -> None:
    with database.transaction() as session:
        session.append("things", ("id", "name"), ((n, "x" * (10 if n < 2000 else 1 << 20)) for n in range(2050)))

    def sizes(sql: str) -> list[list[int]]:
        with database.transaction(read_only=True) as session:
            return [[len(name) for (name,) in rows] for rows in session.blocks(sql)]

    small, large = sizes("SELECT name FROM things WHERE id < 2000"), sizes("SELECT name FROM things WHERE id >= 2000")
    assert (sum(map(len, small)), max(map(len, small))) == (2000, 1000)
    assert (sum(map(sum, large)), max(map(sum, large[1:]))) == (50 << 20, 4 << 20)


def test_a_statement_runs_once_per_row(database: Database) -> None:
    insert(database, 2)
    with database.transaction() as session:
        rows = ((n, f"%s ? {n}") for n in range(5))
        session.run_rows("INSERT INTO things (id, name) VALUES (?, ?) ON CONFLICT (id) DO NOTHING", rows)
        found = {id_: name for id_, name in session.stream("SELECT id, name FROM things")}  # noqa: C416 - typed
    assert found.pop(2) != "%s ? 2"
    assert found == {n: f"%s ? {n}" for n in (0, 1, 3, 4)}


def test_a_row_that_cannot_be_appended_leaves_nothing_of_its_transaction(database: Database) -> None:
    insert(database, 7)
    with pytest.raises(AppError), database.transaction() as session:
        session.append("things", ("id", "name"), [(8, "x"), (7, "again")])
    with database.transaction(read_only=True) as session:
        assert list(session.stream("SELECT id FROM things")) == [(7,)]


def test_new_rows_are_appended_by_column_and_none_of_them_beside_a_key_that_is_there(database: Database) -> None:
    insert(database, 7)
    with database.transaction() as session:
        blocks = [([n, n + 10], [text, None]) for n, text in enumerate(AWKWARD, 100)]
        assert session.append_new("things", ("id", "name"), [([1, 2], ["a", "b"])]) == 2
        assert session.append_new("things", ("id", "name"), iter([([3], ["c"]), ([4, 7], ["d", "again"])])) is None
        assert session.append_new("things", ("id", "name"), iter([([5, 5], ["e", "e"])])) is None
        session.run("CREATE TABLE texts (n BIGINT, t TEXT)")
        assert session.append_new("texts", ("n", "t"), iter(blocks)) == 2 * len(blocks)
    with database.transaction(read_only=True) as session:
        assert [id_ for (id_,) in session.stream("SELECT id FROM things ORDER BY id")] == [1, 2, 7]
        found = [text for (text,) in session.stream("SELECT t FROM texts WHERE n < 113 AND t IS NOT NULL")]
        assert set(found) == set(AWKWARD) - {None}


def test_what_else_fails_while_new_rows_are_appended_is_an_error(database: Database) -> None:
    with pytest.raises(AppError), database.transaction() as session:
        session.append_new("things", ("id", "no_such_column"), [([1], ["a"])])
    insert(database, 1)


def test_a_source_of_rows_that_fails_leaves_nothing(database: Database) -> None:
    def failing() -> Iterator[tuple[int, str]]:
        yield 1, "x"
        raise KeyError

    with pytest.raises(KeyError), database.transaction() as session:
        session.append("things", ("id", "name"), failing())
    assert names(database) == []
    insert(database, 1)


def test_instants_sort_by_time_whatever_their_fraction(database: Database) -> None:
    instants = [AT.replace(microsecond=0), AT.replace(microsecond=1), AT.replace(microsecond=500_000)]
    for number, at in enumerate([instants[2], instants[0], instants[1]]):
        insert(database, number, at=at)
    with database.transaction() as session:
        assert [row["seen_at"] for row in session.rows("SELECT seen_at FROM things ORDER BY seen_at")] == instants


def test_a_block_that_raises_changes_nothing(database: Database) -> None:
    def half_done() -> None:
        with database.transaction() as session:
            session.run("INSERT INTO things (id, name) VALUES (1, 'x')")
            raise KeyError

    with pytest.raises(KeyError):
        half_done()
    assert names(database) == []
    insert(database, 1)


def test_many_rows_are_written_by_one_call_and_counted(database: Database) -> None:
    with database.transaction() as session:
        sql = "INSERT INTO things (id, name) VALUES (:id, :name)"
        assert session.run_many(sql, ({"id": number, "name": str(number)} for number in range(3))) == 3
        assert session.run("UPDATE things SET name = :name WHERE id > :id", id=0, name="new") == 2
    assert names(database) == ["0", "new", "new"]


def test_colons_and_percent_signs_in_quoted_text_and_comments_are_left_alone(database: Database) -> None:
    sql = """
        SELECT ':no %s 100%' AS a, 'it''s :no' AS ":no %", :yes AS b -- the user's :no %
        /* ':no' % */ WHERE 5 % 3 = 2 AND 'a' LIKE '%'
    """
    with database.transaction() as session:
        assert session.rows(sql, yes="ok") == [{"a": ":no %s 100%", ":no %": "it's :no", "b": "ok"}]


def test_casts_and_dollar_quotes_of_postgresql_are_left_alone(postgres_server: PostgresServer) -> None:
    with (
        closing(open_database(postgres_server.new_database(), variables="X")) as database,
        database.transaction() as session,
    ):
        found = session.rows("SELECT :number::text AS a, '7'::int AS b, $$:no '%$$ AS c, $t$:no$t$ AS d", number=5)
    assert found == [{"a": "5", "b": 7, "c": ":no '%", "d": ":no"}]


def test_many_threads_share_a_database(database: Database) -> None:
    insert(database, 0)

    def count(number: int) -> None:
        for _ in range(5):
            with database.transaction() as session:
                session.run("UPDATE things SET name = name || 'x' WHERE id = 0")
            assert len(names(database)) == 1, number

    with ThreadPoolExecutor(24) as pool:
        list(pool.map(count, range(24)))
    assert names(database) == ["x" * 121]


@pytest.mark.parametrize(
    ("sql", "params", "kind"),
    [
        ("INSERT INTO things (id, name) VALUES (1, 'again')", {}, Permanent),
        ("INSERT INTO things (id) VALUES (2)", {}, Permanent),
        ("SELECT * FROM missing", {}, Permanent),
        ("SELEKT", {}, Permanent),
        ("SELECT :absent", {}, Permanent),
        ("SELECT :odd", {"odd": object()}, Permanent),
        ("INSERT INTO things (id, name) VALUES (:id, 'x')", {"id": 2**64}, Rejected),
        ("INSERT INTO things (id, name) VALUES (2, :name)", {"name": "a\x00"}, Rejected),
        ("INSERT INTO things (id, name) VALUES (2, :name)", {"name": "\udfff"}, Rejected),
    ],
)
def test_a_failing_statement_raises_an_error_of_ours_and_the_next_one_works(
    database: Database, sql: str, params: dict[str, object], kind: type[AppError]
) -> None:
    insert(database, 1)
    with pytest.raises(kind) as caught, database.transaction() as session:
        session.run(sql, **params)
    assert caught.value.hint
    assert "\n" not in caught.value.message
    assert names(database) == ["x"]


def test_a_write_in_a_read_only_transaction_of_postgresql_is_refused(postgres_server: PostgresServer) -> None:
    with closing(open_database(postgres_server.new_database(), variables="X")) as database:
        with pytest.raises(AppError), database.transaction(read_only=True) as session:
            session.run(TABLE)
        with database.transaction() as session:
            session.run(TABLE)


def test_a_naive_datetime_is_a_fault_of_the_caller(database: Database) -> None:
    with pytest.raises(ValueError, match="aware"):
        insert(database, 1, at=datetime(2026, 1, 1))  # noqa: DTZ001 - the fault itself
    assert names(database) == []


def test_a_closed_database_says_so_and_closing_twice_is_allowed(database: Database) -> None:
    database.close()
    database.close()
    with pytest.raises(Permanent, match="closed"):
        names(database)


@pytest.mark.parametrize("url", ["", "mysql://u:canary-8d1f@h/d", "sqlite://", "sqlite:///", CANARY, "postgresql"])
def test_an_unknown_url_is_refused_without_being_repeated(url: str) -> None:
    with pytest.raises(Permanent) as caught:
        open_database(url, variables="DWH_DATABASE_URL")
    assert "DWH_DATABASE_URL" in caught.value.hint
    assert CANARY not in str(caught.value)


def test_a_postgresql_url_that_cannot_be_read_is_refused_without_its_password() -> None:
    with pytest.raises(Permanent) as caught:
        open_database(f"postgresql://u:{CANARY}%zz@h/d", variables="DWH_DATABASE_URL")
    assert CANARY not in str(caught.value)
    assert caught.value.__cause__ is None


def test_refused_access_is_for_a_person_names_the_settings_and_never_the_password(
    postgres_server: PostgresServer, tmp_path: Path
) -> None:
    at = f"{postgres_server.host}:{postgres_server.port}"
    name = postgres_server.new_database().rpartition("/")[2]
    postgres_server.run_sql(f"CREATE USER {WITH_PASSWORD} PASSWORD 'right'")
    refused = {
        f"{WITH_PASSWORD}:{CANARY}@{at}/{name}": "password authentication failed",
        f"{WITH_PASSWORD}@{at}/{name}": "no password supplied",
        f"nobody:{CANARY}@{at}/{name}": 'role "nobody" does not exist',
        f"app:{CANARY}@{at}/missing": 'database "missing" does not exist',
        f"{WITH_PASSWORD}:right@{at}/{name}": "permission denied for schema public",
    }
    for rest, reason in refused.items():
        with closing(open_state(f"postgresql://{rest}", tmp_path)) as state, pytest.raises(Permanent) as caught:
            state.ping()
        assert reason in caught.value.message
        assert f"PostgreSQL at {at}/" in caught.value.message
        assert "CHECKPOINT_DB_HOST" in caught.value.hint
        assert CANARY not in f"{caught.value!s} {caught.value.__cause__!r}"


def test_a_file_that_is_no_database_and_a_folder_that_cannot_be_made_are_for_a_person(tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("no database " * 100)
    for path in (file, file / "below.db"):
        with (
            closing(open_database(f"sqlite:///{path}", variables="X")) as database,
            pytest.raises(Permanent, match=r"notes\.txt"),
        ):
            names(database)


@pytest.mark.parametrize("dialect", ["sqlite", "postgres"])
def test_migrations_are_applied_once_and_in_order(new_state: Callable[[str], State], dialect: str) -> None:
    state = new_state(dialect)
    state.ping()
    again = MigratedDatabase(state.database, sql_directory() / "state")
    again.prepare()
    with state.database.transaction() as session:
        applied = session.rows("SELECT name FROM headwater_migrations ORDER BY name")
    numbered = (
        *("0001_state", "0002_operations", "0003_pulls", "0004_summaries", "0005_alerts", "0006_ledger"),
        *("0008_foreign_objects", "0009_window_fields", "0010_lease_terms", "0011_one_object", "0012_reconcile"),
        *("0013_folded", "0014_live_records", "0016_new_rows", "0018_request_counts", "0020_sessions", "0022_workers"),
        *("0023_window_days", "0024_analytics_asked", "0025_analytics_days", "0026_short_records"),
    )
    names = [f"state/{each}" for each in numbered]
    assert [row["name"] for row in applied] == names


def folder_of(tmp_path: Path, **files: str) -> Path:
    folder = tmp_path / "things" / "migrations"
    folder.mkdir(parents=True, exist_ok=True)
    for name, sql in files.items():
        (folder / f"{name.replace('__', '.')}.sql").write_text(sql)
    return folder.parent


def test_an_applied_migration_whose_text_changed_stops_the_start(url: str, tmp_path: Path) -> None:
    with closing(open_database(url, variables="X")) as database:
        MigratedDatabase(database, folder_of(tmp_path, **{"0001_a": TABLE})).prepare()
        changed = MigratedDatabase(database, folder_of(tmp_path, **{"0001_a": f"{TABLE} -- changed"}))
        with pytest.raises(Permanent, match="things/0001_a was applied with different contents"):
            changed.prepare()


def test_a_migration_that_fails_half_way_leaves_nothing_and_is_tried_again(url: str, tmp_path: Path) -> None:
    with closing(open_database(url, variables="X")) as database:
        migrated = MigratedDatabase(database, folder_of(tmp_path, **{"0001_a": f"{TABLE};\nSELEKT ';';"}))
        with pytest.raises(Permanent):
            migrated.prepare()
        folder_of(tmp_path, **{"0001_a": f"{TABLE};\nINSERT INTO things VALUES (1, 'a;b', NULL);"})
        migrated.prepare()
        assert names(database) == ["a;b"]


def test_a_migration_may_differ_by_dialect_but_must_exist_for_each(url: str, tmp_path: Path) -> None:
    folder = folder_of(tmp_path, **{"0001_a__sqlite": TABLE, "0001_a__postgres": TABLE})
    with closing(open_database(url, variables="X")) as database:
        MigratedDatabase(database, folder).prepare()
        assert names(database) == []
        folder_of(tmp_path, **{f"0002_b__{database.dialect}": TABLE})
        (folder / "migrations" / f"0002_b.{database.dialect}.sql").rename(folder / "migrations" / "0002_b.oracle.sql")
        with pytest.raises(Permanent, match="0002_b"):
            MigratedDatabase(database, folder).prepare()


def test_processes_that_start_at_once_migrate_a_new_database_once(url: str) -> None:
    program = "import sys, pathlib; from app.db.state import open_state as o; o(sys.argv[1], pathlib.Path()).ping()"
    started = [subprocess.Popen([sys.executable, "-c", program, url], stderr=subprocess.PIPE) for _ in range(4)]
    ended = [(process.communicate(timeout=60)[1], process.returncode) for process in started]
    assert ended == [(b"", 0)] * 4


def test_eight_that_first_use_a_new_database_at_the_same_instant_migrate_it_once(
    new_url: Callable[[], str], tmp_path: Path
) -> None:
    together = threading.Barrier(8)

    def first_use(url: str) -> None:
        with closing(open_state(url, tmp_path)) as state:
            together.wait(10)
            state.ping()

    for _ in range(4):
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(first_use, [new_url()] * 8))


def queries_of(tmp_path: Path, text: str) -> Path:
    (tmp_path / "queries.sql").write_text(text)
    return tmp_path


def test_a_query_is_found_by_name_in_the_version_of_the_dialect(tmp_path: Path) -> None:
    text = "-- head\n-- name: a\n-- what it does\nSELECT 1;\n-- name: b (sqlite)\nSELECT 2\n"
    folder = queries_of(tmp_path, f"{text}-- name: b (postgres)\nSELECT 3")
    assert load_queries(folder, "sqlite") == {"a": "SELECT 1", "b": "SELECT 2"}
    assert load_queries(folder, "postgres") == {"a": "SELECT 1", "b": "SELECT 3"}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("-- name: a (postgres)\nSELECT 1", "no sqlite version of a"),
        ("-- name: a\nSELECT 1\n-- name: a (sqlite)\nSELECT 2", "defined twice"),
        ("-- name: a (oracle)\nSELECT 1", "no known dialect"),
        ("-- name: a\n-- only a comment", "empty"),
        ("SELECT 1", "no SQL queries"),
    ],
)
def test_a_faulty_file_of_queries_is_an_error_when_it_is_loaded(tmp_path: Path, text: str, reason: str) -> None:
    with pytest.raises(Permanent, match=reason):
        load_queries(queries_of(tmp_path, text), "sqlite")


def test_every_query_of_the_product_is_described(subtests: pytest.Subtests) -> None:
    for path in sorted(sql_directory().glob("*/*.sql")):
        text = path.read_text()
        for head in NAMED.finditer(text):
            with subtests.test(path=path.name, query=head["name"]):
                assert text[head.end() :].lstrip().startswith("-- ")


def test_sqlite_files_are_for_their_owner_alone_also_those_of_an_earlier_version(tmp_path: Path) -> None:
    path = tmp_path / "test.db"
    for _ in range(2):
        with closing(open_database(f"sqlite:///{path}", variables="X")) as database:
            with database.transaction() as session:
                session.script("CREATE TABLE IF NOT EXISTS things (id)")
            modes = {each.name: each.stat().st_mode & 0o777 for each in tmp_path.iterdir()}
            assert modes == dict.fromkeys(("test.db", "test.db-wal", "test.db-shm"), 0o600)
        path.chmod(0o644)
