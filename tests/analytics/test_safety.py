"""No report and no parameter reads another path, writes, attaches, loads, reaches the network or runs for ever."""

import io
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import datetime
from pathlib import Path

import pytest

from app.analytics.engine import Engine, EngineLimits, RemoteBucket
from app.analytics.formats import AnswerShape
from app.analytics.queries import LocalObjects, Queries, ReadSet
from app.analytics.reports import load_reports, parse
from app.core.errors import AppError, Permanent, Rejected, Transient
from app.db.database import sql_directory
from app.db.state import State, open_state
from app.object_store.port import PutRequest
from lake import Lake, bucket_lake, local_lake, parquet
from seaweed import Seaweed

OWN = "FROM read_parquet({{S3_PATH}})"
FORBIDDEN = {
    "reads a file": "SELECT * FROM read_text('/etc/passwd')",
    "reads bytes": "SELECT * FROM read_blob('/etc/passwd')",
    "reads a path as a table": "SELECT * FROM '/etc/passwd.csv'",
    "reads another object": "SELECT * FROM read_parquet('s3://bucket/telemetry/x.parquet')",
    "reads what a parameter says": "SELECT * FROM read_parquet($path)",
    "leaves by dots": "SELECT * FROM 's3://bucket/telemetry/../secret/x.parquet'",
    "lists files": "SELECT * FROM glob('/etc/*')",
    "reaches the network": "SELECT * FROM read_csv('http://127.0.0.1:1/x.csv')",
    "runs text": "SELECT * FROM query('SELECT 1')",
    "names a table by text": "SELECT * FROM query_table('x')",
    "sniffs a file": "SELECT * FROM sniff_csv('/etc/passwd')",
    "looks into settings": "SELECT * FROM duckdb_settings()",
    "looks into secrets": "SELECT * FROM duckdb_secrets()",
    "looks into the catalog": "SELECT * FROM information_schema.tables",
    "hides in a subquery": f"SELECT (SELECT count(*) FROM read_text('/etc/passwd')) {OWN}",  # noqa: S608
    "hides in WITH": f"WITH x AS (SELECT * FROM glob('/*')) SELECT * FROM x, (SELECT 1 {OWN})",  # noqa: S608
    "hides in a join": f"SELECT * {OWN} AS a JOIN read_csv('/etc/passwd') AS b ON true",
    "hides in an expression": f"SELECT * {OWN} WHERE device_id IN (SELECT content FROM read_text('/etc/passwd'))",  # noqa: S608
    "describes": "DESCRIBE SELECT 1",
    "summarizes in a subquery": "SELECT * FROM (SUMMARIZE SELECT 1)",
    "writes": "COPY (SELECT 1) TO '/tmp/x.parquet'",
    "writes a table": "CREATE TABLE x AS SELECT 1",
    "attaches": "ATTACH ':memory:' AS x",
    "loads": "LOAD httpfs",
    "installs": "INSTALL json",
    "sets": "SET memory_limit = '10GB'",
    "makes a secret": "CREATE SECRET x (TYPE s3)",
    "drops a secret": "DROP SECRET objects",
    "calls": "CALL pragma_version()",
    "is two statements": "SELECT 1; SELECT 2",
    "logs": "SELECT write_log('x')",
    "exports": "EXPORT DATABASE '/tmp/x'",
    "is no SQL": "SELECT FROM WHERE",
}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    folder = tmp_path_factory.mktemp("engine")
    (folder.parent / "outside.parquet").write_bytes(b"")
    with closing(Engine(folder, EngineLimits(64, 2, 1.0))) as made:
        yield made


@pytest.fixture(scope="module")
def lake(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lake]:
    folder = tmp_path_factory.mktemp("lake")
    with closing(open_state("", folder)) as state, closing(local_lake(folder / "lake", state.summaries)) as made:
        yield made


@pytest.mark.parametrize("sql", FORBIDDEN.values(), ids=FORBIDDEN.keys())
def test_a_report_that_does_more_than_select_from_the_objects_is_refused(lake: Lake, sql: str) -> None:
    text = f"-- param path: text: x\n{sql}" if "$path" in sql else sql
    with pytest.raises(Permanent, match=r"is not allowed in reports|write one SELECT"):
        lake.queries.run(parse("report", text), {"path": "/etc/passwd"}, AnswerShape("json", "data"))


RAW = {
    "another file": "SELECT * FROM read_text('/etc/passwd')",
    "a file outside by dots": "SELECT * FROM read_text('{folder}/../outside.parquet')",
    "another bucket": "SELECT * FROM read_parquet('s3://other/telemetry/x.parquet')",
    "another prefix": "SELECT * FROM read_parquet('s3://{bucket}/secret/x.parquet')",
    "the network": "SELECT * FROM read_csv('http://127.0.0.1:1/x.csv')",
    "write elsewhere": "COPY (SELECT 1) TO '/tmp/headwater-escaped.parquet'",
    "attach elsewhere": "ATTACH '/tmp/headwater-escaped.db'",
    "install": "INSTALL spatial",
    "set": "SET memory_limit = '10GB'",
    "open up": "SET enable_external_access = true",
    "unlock": "SET lock_configuration = false",
}


@pytest.mark.parametrize("sql", RAW.values(), ids=RAW.keys())
def test_duckdb_itself_refuses_what_the_check_of_reports_might_miss(engine: Engine, sql: str) -> None:
    remote = RemoteBucket("bucket", "telemetry", "127.0.0.1:1", "us-east-1", True, False, "key", "secret")  # noqa: FBT003
    with closing(Engine(engine.folder, engine.limits, remote)) as locked:
        locked.rows("SELECT 1")
        with pytest.raises(AppError, match=r"disabled by configuration|has been locked|cannot be changed|Cannot"):
            locked.rows(sql.format(folder=engine.folder, bucket="bucket"))


def test_keys_are_never_shown_by_the_engine(engine: Engine) -> None:
    place = ("bucket", "telemetry", "127.0.0.1:1", "us-east-1", True, False)
    remote = RemoteBucket(*place, "key", "canary-secret", "canary-t")
    assert "canary" not in repr(remote)
    with closing(Engine(engine.folder, engine.limits, remote)) as locked:
        assert "canary" not in str(locked.rows("SELECT * FROM duckdb_secrets()"))
        assert "canary" not in str(locked.rows("SELECT * FROM duckdb_settings()"))
        with pytest.raises(AppError) as raised:
            locked.rows("SELECT * FROM read_parquet('s3://bucket/telemetry/x.parquet')")
        assert "canary" not in str(raised.value)


ENDLESS = {
    "recursion": "WITH RECURSIVE t(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM t) SELECT max(n) FROM t",
    "a product": "SELECT sum(a.range * b.range) FROM range(10000000) AS a, range(10000000) AS b",
    "an answer without end": "SELECT a.range + b.range AS x FROM range(10000000) AS a, range(10000000) AS b",
}


@pytest.mark.parametrize("sql", ENDLESS.values(), ids=ENDLESS.keys())
def test_a_report_that_would_run_for_ever_is_ended(engine: Engine, lake: Lake, sql: str) -> None:
    queries = Queries(lake.summaries, LocalObjects(engine, lambda *_: None), engine)
    began = time.monotonic()
    with pytest.raises((Transient, Rejected), match=r"longer than 1 s|too many for parquet"):
        queries.run(parse("report", sql), {}, AnswerShape("parquet", "data"))
    assert time.monotonic() - began < 30
    assert engine.rows("SELECT 1") == [(1,)]


def test_a_report_that_needs_more_memory_and_disk_than_there_is_ends_with_the_next_step(engine: Engine) -> None:
    with pytest.raises(AppError) as raised, closing(Engine(engine.folder, EngineLimits(32, 2, 20))) as small:
        small.rows("SELECT list(range), list(range + 1) FROM range(100000000)")
    assert "ANALYTICS_MEMORY_MB" in raised.value.hint


def test_parameters_are_values_whatever_they_hold(lake: Lake) -> None:
    lake.summaries.refresh()
    for text in ("'; DROP TABLE x; --", "/etc/passwd", "{{S3_PATH}}", "$from", "\\", "\U0001f600"):
        assert lake.from_objects("over-time", device_id=text) == []


HEADS = {
    "-- param x: colour\nSELECT $x": "kinds: text",
    "-- param format: text\nSELECT $format": "kinds: text",
    "-- param n: integer = many\nSELECT $n": "default",
    "-- path: ../x\nSELECT 1": "other words",
    "-- path: schema\nSELECT 1": "other words",
    "-- reads: power > $x\nSELECT 1": "declared parameters",
    "-- param n: integer = 1\n-- reads: device_id = $n\nSELECT $n": "declare `param n: text`",
    "-- param d: date\n-- reads: timestamp >= $d\nSELECT $d": "declare `param d: timestamp`",
    "-- param t: text\n-- reads: timestamp < $t\nSELECT $t": "`reads: timestamp < $t` with t, which is text",
    "SELECT * FROM read_parquet('{{S3_PATH}}/x')": "read_parquet",
    "SELECT '{{OTHER}}'": "read_parquet",
    "-- answer: count\nSELECT 1": "answer: count",
}


@pytest.mark.parametrize("text", HEADS)
def test_a_head_that_cannot_be_understood_stops_the_start_and_says_what_is_allowed(text: str) -> None:
    with pytest.raises(Permanent) as raised:
        parse("report", text)
    assert HEADS[text] in str(raised.value)


def test_a_head_is_read_as_people_write_it(tmp_path: Path) -> None:
    prose = "-- summary of the week\n-- path to success\n-- answer to all\n-- reads everything\n-- title\n"
    report = parse("mine", f"{prose}SELECT 1 AS x")
    assert (report.title, report.path, report.answer, report.summary) == ("mine", "mine", "data", "")
    assert report.description == "summary of the week path to success answer to all reads everything title"
    assert parse("mine", "--\ttitle:\tA\n-- answer:\nSELECT 1 AS x").title == "A"
    for default in ("2026-02-07T12:30:00Z", "'2026-02-07T12:30:00Z'", "2026-02-07 12:30:00+00:00"):
        (given,) = parse("mine", f"-- param at: timestamp = {default}: since: x\nSELECT $at AS x").parameters
        assert (given.read(None), given.meaning) == (datetime(2026, 2, 7, 12, 30), "since: x"), default  # noqa: DTZ001
    (tmp_path / "own.sql").write_bytes(b"\xef\xbb\xbf-- title: Own\n-- summary: overview\nSELECT 1 AS x")
    own = load_reports([sql_directory() / "analytics", tmp_path])["own"]
    assert (own.title, own.summary) == ("Own", ""), "its own SQL answers it"


def test_an_own_report_replaces_a_shipped_one_that_has_no_summary(tmp_path: Path) -> None:
    (tmp_path / "rows.sql").write_text("-- title: mine\nSELECT 1 AS x")
    shipped = sql_directory() / "analytics"
    assert load_reports([shipped, tmp_path])["rows"].title == "mine"
    (tmp_path / "devices.sql").write_text("SELECT 1 AS x")
    with pytest.raises(Permanent, match="used by another report"):
        load_reports([shipped, tmp_path])


def test_two_reports_of_one_path_stop_the_start(tmp_path: Path) -> None:
    (tmp_path / "a_b.sql").write_text("SELECT 1")
    (tmp_path / "c.sql").write_text("-- path: a-b\nSELECT 1")
    with pytest.raises(Permanent, match="used by another report"):
        load_reports([tmp_path])


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("-- param n: integer: unused\nSELECT 1 AS x", "declare"),
        ("SELECT $n AS x", "declare"),
    ],
)
def test_a_parameter_is_declared_once_and_used(lake: Lake, text: str, fault: str) -> None:
    with pytest.raises(Permanent, match=fault):
        lake.queries.columns(parse("report", text))


def test_a_bucket_engine_cannot_leave_its_prefix_by_dots(
    seaweed: Seaweed, new_state: Callable[[str], State], tmp_path: Path
) -> None:
    with closing(bucket_lake(seaweed, tmp_path / "lake", new_state("sqlite").summaries)) as lake:
        content = parquet({"device_id": ["D1"]})
        lake.store.put("secret/x.parquet", io.BytesIO(content), PutRequest("x"))
        lake.put("a.parquet", content)
        lake.summaries.refresh()
        wanted = ReadSet(lake.summaries.sources(None, None, None))
        with lake.objects(lake.engine).opened(wanted) as (remote, files):
            name = files[0].name
            assert remote.rows(f"SELECT count(*) FROM read_parquet('{name}')") == [(1,)]  # noqa: S608 - its own
            for path in ("../secret/x.parquet", "%2e%2e/secret/x.parquet", "../../secret/x.parquet"):
                with pytest.raises(AppError):
                    remote.rows(f"SELECT * FROM read_parquet('{name.rpartition('/')[0]}/{path}')")  # noqa: S608
