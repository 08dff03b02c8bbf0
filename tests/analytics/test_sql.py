"""/analytics/sql from the real daemon: one SELECT over `telemetry`, and nothing else whatever is sent."""

import hashlib
import json
import random
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from app.analytics.engine import Engine, EngineLimits
from app.analytics.sql_sandbox import check
from app.core.errors import Rejected
from daemon import Daemon, Daemons, Reply
from lake import exported, put_telemetry

START = datetime(2026, 2, 1, tzinfo=UTC)
SECRET = "hw_boss_" + "b" * 43
READER = "hw_reader_" + "r" * 43
KEYS = ",".join(
    f"{name}:{scopes}:{hashlib.sha256(secret.encode()).hexdigest()}"
    for name, scopes, secret in (("boss", "admin", SECRET), ("reader", "write", READER))
)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    folder = tmp_path_factory.mktemp("sql")
    for device in ("D1", "D2"):
        content = exported(device, START, 30, draw=random.Random(device))  # noqa: S311 - test data
        put_telemetry(folder, f"device_id={device}/date=2026/02/01/export_000000.parquet", content)
    put_telemetry(folder, "_headwater/secret.parquet", exported("hidden", START, 1, draw=random.Random(1)))  # noqa: S311
    started = Daemons(folder)
    daemon = started.start(API_KEYS=KEYS, ANALYTICS_REFRESH_SECONDS="0.2", ANALYTICS_TIMEOUT_SECONDS="2")
    daemon.headers = {"Authorization": f"Bearer {SECRET}"}
    yield daemon
    started.close()


def ask(daemon: Daemon, sql: str, query: str = "", **more: Any) -> Reply:
    """Again while the last statement is ending."""
    for _ in range(100):
        reply = daemon.post(f"/analytics/sql{query}", {"sql": sql, **more})
        if reply.status != 429:
            break
        time.sleep(0.1)
    return reply


def test_a_select_over_the_view_is_answered_in_every_format(served: Daemon) -> None:
    sql = """
        WITH hourly AS (SELECT device_id, time_bucket(INTERVAL '1 hour', timestamp) AS hour, avg(power) AS power,
            count(*) AS n FROM telemetry GROUP BY ALL)
        SELECT *, row_number() OVER (ORDER BY device_id) AS place FROM hourly WHERE n > 1 ORDER BY device_id -- all
    """
    rows = ask(served, sql).json
    assert rows["count"] == 2
    assert [(row["device_id"], row["hour"], row["n"], row["place"]) for row in rows["data"]] == [
        ("D1", "2026-02-01T00:00:00Z", 30, 1), ("D2", "2026-02-01T00:00:00Z", 30, 2),
    ]  # fmt: skip
    assert ask(served, sql, "?format=csv").text.splitlines()[1].startswith('"D1","2026-02-01T00:00:00')
    counted = "SELECT count(*) AS n, count(DISTINCT device_id) AS devices FROM telemetry"
    span = {"device_id": "D1", "from": "2026-02-01T00:10:00Z", "to": "2026-02-01T02:20:00+02:00"}
    assert ask(served, counted, **span).json["data"] == [{"n": 10, "devices": 1}]


REFUSED = (
    "SELECT * FROM '/etc/passwd'",
    'SELECT * FROM "/etc/passwd"',
    "SELECT * FROM 'telemetry/**/*.parquet'",
    "SELECT * FROM read_csv('/etc/passwd')",
    "SELECT * FROM read_text('/proc/self/environ')",
    "SELECT * FROM read_parquet('**/*.parquet')",
    "SELECT * FROM parquet_metadata('x')",
    "SELECT * FROM glob('/*')",
    "SELECT * FROM duckdb_settings()",
    "SELECT * FROM duckdb_secrets()",
    "SELECT * FROM duckdb_settings",
    "SELECT * FROM duckdb_views()",
    "SELECT * FROM information_schema.tables",
    "SELECT * FROM sqlite_master",
    "SELECT * FROM pragma_database_list",
    "SELECT * FROM query('SELECT 1')",
    "SELECT * FROM query_table('telemetry')",
    "SELECT * FROM memory.main.telemetry",
    "SELECT * FROM test_all_types()",
    'SELECT (WITH "/etc/passwd" AS (SELECT 1) SELECT 1), * FROM "/etc/passwd"',
    "SELECT (WITH sqlite_master AS (SELECT 1) SELECT 1), * FROM sqlite_master",
    "WITH x AS (SELECT * FROM glob('/*')) SELECT * FROM x",
    "SELECT getenv('HOME')",
    "SELECT current_setting('temp_directory')",
    "SELECT main.current_setting('temp_directory')",
    "SELECT getvariable('x')",
    "SELECT ('temp_directory').current_setting()",
    "SELECT list_transform(['temp_directory'], lambda x: current_setting(x))",
    "SELECT sum(voltage) FILTER (current_setting('threads') IS NOT NULL) FROM telemetry",
    "SELECT 1 ORDER BY version()",
    "SELECT nextval('x')",
    "SELECT write_log('x')",
    "SELECT sleep_ms(1000)",
    "SELECT error('x')",
    "SELECT json_serialize_sql('SELECT 1')",
    "SELECT pg_get_viewdef('telemetry')",
    "SELECT $1",
    "SELECT ?",
    "SELECT 1; SELECT 2",
    "SELECT 1; DROP VIEW telemetry",
    "COPY telemetry TO '/tmp/headwater-escaped.parquet'",
    "COPY (SELECT 1) TO '/tmp/headwater-escaped.csv'",
    "ATTACH ':memory:' AS x",
    "INSTALL httpfs",
    "LOAD httpfs",
    "SET memory_limit = '10GB'",
    "RESET lock_configuration",
    "PRAGMA version",
    "CALL pragma_version()",
    "CREATE TABLE x AS SELECT 1",
    "CREATE MACRO f() AS 1",
    "CREATE SECRET s (TYPE s3)",
    "INSERT INTO telemetry SELECT 1",
    "DROP VIEW telemetry",
    "EXPORT DATABASE '/tmp/headwater-escaped'",
    "PREPARE x AS SELECT 1",
    "EXECUTE x",
    "EXPLAIN ANALYZE SELECT 1",
    "DESCRIBE telemetry",
    "SUMMARIZE telemetry",
    "SELECT * FROM (SHOW TABLES)",
    "UNPIVOT telemetry ON voltage",
    "SELECT",
    "",
    "SELECT " + "1 + " * 600 + "1",
)


def test_everything_else_is_refused_before_it_runs(tmp_path: Path) -> None:
    with closing(Engine(tmp_path, EngineLimits(64, 1, 10))) as engine:
        for sql in REFUSED:
            with pytest.raises(Rejected) as raised:
                check(engine, sql)
            assert raised.value.hint, sql


@pytest.mark.slow
def test_what_is_refused_has_a_status_and_the_next_step(served: Daemon) -> None:
    for sql, said in {
        "SELECT * FROM read_csv('/etc/passwd')": "the table function read_csv() is not allowed",
        "SELECT nothing FROM telemetry": 'column "nothing" not found',
        "SELECT CAST('x' AS INTEGER)": "Could not convert string 'x'",
        "SELECT '\0'": "NUL",
        "SELECT '\ud800'": "half of a surrogate pair",
    }.items():
        reply = ask(served, sql)
        assert reply.status == 422, (sql, reply.text)
        assert said in reply.json["error"]["message"]
        assert reply.json["error"]["hint"]


HEAVY = {
    "WITH RECURSIVE t(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM t) SELECT max(n) FROM t": "longer than 2 s",
    "SELECT sum(a.range * b.range) FROM range(10000000) AS a, range(10000000) AS b": "longer than 2 s",
    "SELECT range FROM range(1000000)": "more than 100000 rows",
    "SELECT repeat('x', 1000000) AS x FROM range(100)": "larger than 64 MiB",
    "SELECT len(repeat('x', 4000000000))": "memory",
    "SELECT len(list_resize([1], 2000000000))": "memory",
    "SELECT len(list(a.range)) FROM range(300000000) AS a": "memory",
    "SELECT '" + "x" * 20_000 + "'": "20000 characters",
}


@pytest.mark.slow
def test_a_statement_that_takes_too_much_ends_alone(served: Daemon) -> None:
    for sql, said in HEAVY.items():
        began = time.monotonic()
        reply = ask(served, sql)
        assert reply.status == 422, (sql[:80], reply.text)
        assert said in reply.json["error"]["message"], (sql[:80], reply.text)
        assert time.monotonic() - began < 20
        assert served.get("/health").status == 200
    assert ask(served, "SELECT 1 AS one").json == {"data": [{"one": 1}], "count": 1}


@pytest.mark.slow
def test_statements_run_one_at_a_time_and_only_for_administrators(served: Daemon) -> None:
    replies: list[Reply] = []
    slow = "SELECT sum(a.range * b.range) FROM range(10000000) AS a, range(10000000) AS b"
    first = threading.Thread(target=lambda: replies.append(ask(served, slow)))
    first.start()
    time.sleep(0.5)
    second = served.post("/analytics/sql", {"sql": "SELECT 1"})
    assert (second.status, second.headers["Retry-After"]) == (429, "5")
    first.join()
    assert replies[0].status == 422
    assert served.post("/analytics/sql", {"sql": "SELECT 1"}, {"Authorization": f"Bearer {READER}"}).status == 403
    for wrong in ({"other": 1}, {"from": "0001-01-01T00:00:00+14:00"}, {"from": "2026-02-02", "to": "2026-02-01"}):
        assert served.post("/analytics/sql", {"sql": "SELECT 1", **wrong}).status == 422, wrong
    assert ask(served, "SELECT 1 FROM telemetry", device_id="' OR true --").json["count"] == 0
    assert json.loads(ask(served, "SELECT count(*) AS n FROM telemetry").text)["data"] == [{"n": 60}]
