"""Reports of closed days over Spark Connect, of which Sail's server is the one that comes as a package."""

import json
import socket
import urllib.request
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pytest

from app.core.errors import Permanent, Transient
from daemon import Daemons
from lake_reports import REPORTS, SPANS, filled, odd, reports
from lake_tree import Tree, rows

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::FutureWarning:pyspark"),  # of pandas 3, which the client uses elsewhere
]


def test_every_report_of_closed_days_is_equal_on_both_engines(tmp_path: Path, sail: str) -> None:
    tree = filled(Tree(tmp_path))
    floats = pa.array([0.1, None, -0.0, 3.4e38], pa.float32())
    odds = odd(
        temperature=floats,
        location=pa.array(["", "Süd", None, "a'b"]),
        power=pa.array([2**63, 0, 1, None], pa.uint64()),
    )
    tree.put("o'b", 23, rows("o'b", 23, **odds))
    tree.run()
    spark = Tree(tmp_path, ANALYTICS_ENGINE="spark", SPARK_REMOTE=sail)
    spans = [*SPANS, {"device_id": "o'b"}, {"device_id": "nobody"}, {"from": "2026-02-07T09:00:00.000001Z"}]
    closed = [{**span, "to": "2026-02-08"} for span in spans]
    calls = [(path, {**span, **own}) for path, own in REPORTS.items() for span in closed]
    calls += [("over-time", {"minutes": minutes, "to": "2026-02-08"}) for minutes in ("1", "1440", "527040")]
    calls += [("rows", {"device_id": device}) for device in ("a", "o'b")]
    with reports(tree) as duckdb:
        asked_for = {(path, name) for path, given in calls for name in given}
        every = {(path, each.name) for path, report in duckdb.analytics.reports.items() for each in report.parameters}
        assert asked_for == every, "each parameter of each built-in report"
        as_of = datetime.now(UTC)
        expected = [duckdb.rows(path, None if "to" in given else as_of, **given) for path, given in calls]
        assert duckdb.engine == "duckdb"
    with reports(spark) as asked:
        for (path, given), wanted in zip(calls, expected, strict=True):
            found = asked.rows(path, None if "to" in given else as_of, **given)
            assert (asked.engine, found) == ("spark", wanted), (path, given)
        assert asked.rows("overview")[0]["total_rows"] == 84  # today is not in the table: DuckDB reads both
        assert asked.engine == "duckdb"


def test_spark_that_is_away_or_cannot_read_the_table_is_told_with_the_next_step(tmp_path: Path, sail: str) -> None:
    filled(Tree(tmp_path)).run()
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with (
        reports(Tree(tmp_path, ANALYTICS_ENGINE="spark", SPARK_REMOTE=f"sc://127.0.0.1:{port}")) as asked,
        pytest.raises(Transient, match="Spark cannot be reached") as away,
    ):
        asked.rows("overview", to="2026-02-08")
    assert "ANALYTICS_ENGINE=duckdb" in away.value.hint
    other = Tree(tmp_path, ANALYTICS_ENGINE="spark", SPARK_REMOTE=sail, SPARK_TABLE="no.such_table")
    with reports(other) as asked, pytest.raises(Permanent, match="Spark cannot run the report"):
        asked.rows("overview", to="2026-02-08")


def test_the_daemon_answers_over_spark_by_http(tmp_path: Path, sail: str) -> None:
    filled(Tree(tmp_path / "data")).run()
    with closing(Daemons(tmp_path)) as started:
        daemon = started.start(CATALOG="iceberg", ANALYTICS_ENGINE="spark", SPARK_REMOTE=sail)
        asked = f"{daemon.url}/analytics/overview?as_of={datetime.now(UTC):%Y-%m-%dT%H:%M:%S.%fZ}"
        with urllib.request.urlopen(asked, timeout=60) as answer:  # noqa: S310 - loopback; imports take their time
            said, headers = json.load(answer), answer.headers
    assert headers["Server-Timing"].startswith("spark;")
    assert said["total_rows"] in (44, 80)  # without the last day, which a run may have added by now
    assert datetime.fromisoformat(headers["X-Data-As-Of"]) <= datetime.now(UTC)
