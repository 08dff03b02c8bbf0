"""/analytics as a client sees it, from the real daemon."""

import csv
import hashlib
import io
import json
import random
import re
import time
import urllib.request
import zipfile
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from daemon import Daemon, Daemons
from lake import exported, flat, put_telemetry

START = datetime(2026, 2, 1, tzinfo=UTC)
OWN = """-- title: How many rows, by a limit
-- param least: number = 0: only voltages above
-- param on: date: only this day
SELECT device_id, count(*) AS n, now() AS asked, [1, 2] AS list, {'a': NULL} AS nested
FROM read_parquet({{S3_PATH}})
WHERE voltage > $least AND ($on IS NULL OR CAST(timestamp AS DATE) = $on)
GROUP BY device_id ORDER BY device_id
"""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    folder = tmp_path_factory.mktemp("analytics")
    draw = random.Random(1)  # noqa: S311 - test data
    for hour in range(3):
        start = START.replace(hour=hour)
        put_telemetry(
            folder, f"device_id==D{hour}/date=2026/02/01/e.parquet", exported(f"=D{hour}", start, 30, draw=draw)
        )
    put_telemetry(folder, "day_001.parquet", flat(START.replace(tzinfo=None), 20, draw=draw))
    put_telemetry(folder, "broken.parquet", b"PAR1 no")
    (folder / "reports").mkdir()
    (folder / "reports" / "my_own.sql").write_text(OWN)
    (folder / "reports" / "cast.sql").write_text("-- param n: text = 1: a number\nSELECT CAST($n AS INTEGER) AS n")
    (folder / "reports" / "wrong.sql").write_text("SELECT * FROM read_text('/etc/passwd')")
    started = Daemons(folder)
    yield started.start(ANALYTICS_REPORTS_DIR=str(folder / "reports"), ANALYTICS_REFRESH_SECONDS="0.2")
    started.close()


def fetched(daemon: Daemon, path: str) -> bytes:
    with urllib.request.urlopen(daemon.url + path, timeout=30) as answer:  # noqa: S310 - loopback
        content: bytes = answer.read()
        return content


def test_the_four_built_in_answers_have_the_documented_shape_under_both_paths(served: Daemon) -> None:
    overview = served.get("/analytics/overview").json
    assert overview["total_rows"] == 110
    assert overview.keys() == {"total_rows", "device_count", "min_timestamp", "max_timestamp", "warnings"}
    assert overview["min_timestamp"] == "2026-02-01T00:00:00Z"
    daily = served.get("/analytics/daily-summary").json
    assert daily["count"] == len(daily["data"])
    assert daily["data"][0].keys() == {
        "device_id", "date", "avg_voltage", "max_temperature", "avg_soc", "row_count",
    }  # fmt: skip
    devices = served.get("/analytics/devices").json
    assert devices["devices"][0].keys() == {"device_id", "first_seen", "last_seen", "total_records"}
    latest = served.get("/analytics/devices/latest").json
    names = {"device_id", "timestamp", "voltage", "current", "power", "temperature", "soc"}
    assert names <= latest["data"][0].keys()
    for path in ("overview", "daily-summary", "devices", "devices/latest"):
        assert served.get(f"/{path}").json == served.get(f"/analytics/{path}").json


def test_an_object_that_cannot_be_read_is_named_in_warnings(served: Daemon) -> None:
    reply = served.get("/analytics/devices")
    (warning,) = reply.json["warnings"]
    assert warning["object"] == "telemetry/broken.parquet"
    assert reply.headers["X-Warnings"] == "1"


def test_every_answer_says_of_when_it_is_what_it_took_and_how_it_is_known(served: Daemon) -> None:
    for path in ("/analytics/overview", "/analytics/over-time", "/analytics/devices?scan=true"):
        reply = served.get(path)
        assert datetime.fromisoformat(reply.headers["X-Data-As-Of"]) <= datetime.now(UTC)
        assert "dur=" in reply.headers["Server-Timing"]
        again = served.get(path, {"If-None-Match": reply.headers["ETag"]})
        assert (again.status, again.text) == (304, "")
        assert again.headers["ETag"] == reply.headers["ETag"]
        assert served.get(path, {"If-None-Match": '"other"'}).status == 200
        head = served.call("HEAD", path)
        assert (head.status, head.text, head.headers["ETag"]) == (200, "", reply.headers["ETag"])
        assert head.headers["Content-Length"] == reply.headers["Content-Length"]


def test_summaries_and_scans_say_the_same(served: Daemon) -> None:
    for path in ("overview", "devices", "devices/latest"):
        assert served.get(f"/analytics/{path}").json == served.get(f"/analytics/{path}?scan=true").json


def test_all_formats_hold_the_same_rows(served: Daemon) -> None:
    for path in ("/analytics/devices", "/analytics/over-time"):
        rows: Any = served.get(path).json
        listed = rows.get("devices") or rows["data"]
        csv_rows = list(csv.DictReader(io.StringIO(fetched(served, f"{path}?format=csv").decode())))
        parquet = pq.read_table(io.BytesIO(fetched(served, f"{path}?format=parquet"))).to_pylist()
        with zipfile.ZipFile(io.BytesIO(fetched(served, f"{path}?format=xlsx"))) as sheet:
            cells = sheet.read("xl/worksheets/sheet1.xml").decode()
        texts = re.findall(r"<t[^>]*>([^<]*)</t>", cells)
        ids = [row["device_id"] for row in listed]
        assert [row["device_id"] for row in csv_rows] == ids
        assert [row["device_id"] for row in parquet] == ids
        assert texts[: len(listed[0])] == list(listed[0])
        assert [text for text in texts[len(listed[0]) :] if text in ids] == ids
        assert "<f>" not in cells, "what looks like a formula is text"


def test_a_file_in_the_folder_is_a_report_with_typed_parameters(served: Daemon) -> None:
    reply = served.get("/analytics/my-own?least=200&on=2026-02-01")
    assert reply.status == 200, reply.text
    assert reply.json["data"][0]["nested"] == {"a": None}
    assert reply.json["data"][0]["asked"].endswith("Z")
    assert served.get("/analytics/my-own?least=1000").json["count"] == 0
    assert served.get("/analytics/my_own?least=1000").json["count"] == 0
    for wrong in ("least=many", "on=2026-02-31", "other=1", "least=1&least=2", "format=doc", "scan=true"):
        refused = served.get(f"/analytics/my-own?{wrong}")
        assert refused.status == 422, wrong
        assert refused.json["error"]["hint"]
    for how in ("csv", "parquet", "xlsx"):
        assert fetched(served, f"/analytics/my-own?format={how}")


def test_the_list_names_parameters_and_columns_and_what_is_wrong_with_a_report(served: Daemon) -> None:
    listed = {each["name"]: each for each in served.get("/analytics").json["reports"]}
    assert listed.keys() == {
        "overview", "daily_summary", "rows_by_day", "devices", "device_latest", "over_time", "rows", "my_own", "cast",
        "wrong",
    }  # fmt: skip
    assert [each["name"] for each in listed["my_own"]["parameters"]] == ["least", "on"]
    assert listed["daily_summary"]["columns"][1] == {"name": "date", "type": "DATE"}
    assert "read_text" in listed["wrong"]["fault"]["message"]
    refused = served.get("/analytics/wrong")
    assert refused.status == 502
    assert "read_text" in refused.json["error"]["message"]


def test_the_schema_names_every_column_with_its_types_and_how_many_objects_have_it(served: Daemon) -> None:
    schema = served.get("/analytics/schema").json
    columns = {each["name"]: each for each in schema["columns"]}
    assert columns["voltage"]["types"] == {"DOUBLE": 3, "INTEGER": 1}
    assert columns["soc"]["objects"] == 1
    assert (schema["objects"], schema["rows"]) == (5, 110)


def test_the_page_and_its_parts_come_from_here_and_nowhere_else(served: Daemon) -> None:
    page = served.get("/analytics/explore")
    assert "default-src 'self'" in page.headers["Content-Security-Policy"]
    for path in ("/assets/common.js", "/assets/explore.js", "/assets/pages.css"):
        assert served.get(path).status == 200
    for text in (page.text, served.get("/assets/explore.js").text, served.get("/assets/pages.css").text):
        assert "https://" not in text
    assert 'href="analytics/explore"' in served.get("/").text


SPANS = (
    "device_id=D1",
    "device_id=%3DD1",
    "device_id=nobody",
    "from=2026-02-01T00:00:00Z&to=2026-02-02T00:00:00Z",
    "from=2026-02-02",
    "to=2026-02-02",
    "to=2026-02-01T02:00:00%2B02:00",
    "from=2026-02-01T01:00:00Z&to=2026-02-01T01:10:00Z",
    "device_id=D2&from=2026-02-01T03:30:00Z",
)


@pytest.mark.parametrize("path", ["overview", "daily-summary", "rows-by-day", "devices", "devices/latest"])
def test_a_device_and_a_span_narrow_every_built_in_report_as_a_scan_would(served: Daemon, path: str) -> None:
    def rounded(text: str) -> Any:
        """Sums by day and by row may differ in the last digit."""
        return json.loads(text, parse_float=lambda digits: round(float(digits), 9))

    for span in SPANS:
        narrow = served.get(f"/analytics/{path}?{span}")
        assert rounded(narrow.text) == rounded(served.get(f"/analytics/{path}?{span}&scan=true").text), span
        is_days = "T01" not in span and "T03" not in span
        assert narrow.headers["Server-Timing"].startswith("summary" if is_days else "duckdb"), span


def test_rows_of_one_device_come_as_parquet_and_as_lines(served: Daemon) -> None:
    path = "/analytics/rows?device_id=%3DD1&from=2026-02-01T01:05:00Z&to=2026-02-01T02:00:00Z"
    rows = pq.read_table(io.BytesIO(fetched(served, path)))
    assert rows.num_rows == 25
    assert rows.schema.field("timestamp").type == pa.timestamp("us", "UTC")
    assert set(rows.column("device_id").to_pylist()) == {"=D1"}
    lines = [json.loads(line) for line in fetched(served, f"{path}&format=ndjson").splitlines()]
    assert [line["timestamp"] for line in lines] == [f"2026-02-01T01:{minute:02}:00Z" for minute in range(5, 30)]
    text = fetched(served, f"{path}&format=csv&formula_safe=true").decode()
    assert {row["device_id"] for row in csv.DictReader(io.StringIO(text))} == {"'=D1"}


WRONG = {
    "over-time?minutes=0": "from 1 to 527040",
    "over-time?minutes=-1": "from 1 to 527040",
    "over-time?minutes=999999999999": "from 1 to 527040",
    "over-time?minutes=": "a whole number",
    "over-time?minutes=1.5": "a whole number",
    "overview?from=yesterday": "2026-02-07T12:00:00Z",
    "devices?from=2026-02-02&to=2026-02-01": "earlier timestamp as from",
    "daily-summary?device=D1": "use as_of, device_id, format, formula_safe, from, scan, to",
    "overview?as_of=yesterday": "2026-02-07T12:00:00Z",
    "over-time?as_of=2026-02-07": "CATALOG=iceberg",
    "devices/latest?device_id=D1&device_id=D2": "once",
    "devices?formula_safe=yes": "true or false",
    "devices?format=csv&format=json": "once",
    "over-time?minutes=1_0": "a whole number",
    "rows": "send device_id",
    "rows?device_id=": "text",
    "my-own?least=nan": "a number",
    "cast?n=many": "other values",
}


@pytest.mark.parametrize("path", WRONG)
def test_a_wrong_parameter_is_422_with_its_name_and_what_to_send(served: Daemon, path: str) -> None:
    refused = served.get(f"/analytics/{path}")
    assert refused.status == 422, refused.text
    named = re.search(r"\?(\w+)", path)
    error = refused.json["error"]
    assert (named[1] if named else "device_id") in error["message"]
    assert WRONG[path] in error["hint"]


def test_the_api_document_has_defaults_and_limits_of_the_right_type(served: Daemon) -> None:
    paths = served.get("/openapi.json").json["paths"]
    found = {each["name"]: each for each in paths["/analytics/over-time"]["get"]["parameters"]}
    assert found["minutes"]["schema"] == {"type": "integer", "default": 60, "minimum": 1, "maximum": 527040}
    (device,) = [each for each in paths["/analytics/rows"]["get"]["parameters"] if each["name"] == "device_id"]
    assert device["required"] is True


def maps_of(daemon: Daemon) -> str:
    """The files that its process has in memory."""
    return Path(f"/proc/{daemon.process.pid}/maps").read_text()


@pytest.mark.slow
def test_nothing_is_read_before_somebody_asks(daemons: Daemons, tmp_path: Path) -> None:
    put_telemetry(tmp_path, "day_001.parquet", exported("D1", START, 30, draw=random.Random(2)))  # noqa: S311 - test data
    daemon = daemons.start(ANALYTICS_REFRESH_SECONDS="0.2")
    time.sleep(3)
    assert "duckdb" not in maps_of(daemon)
    assert daemon.get("/overview").json["total_rows"] == 30
    put_telemetry(tmp_path, "day_002.parquet", exported("D2", START, 5, draw=random.Random(3)))  # noqa: S311 - test data
    daemon.until(lambda: daemon.get("/overview").json["total_rows"] == 35)


@pytest.mark.slow
def test_changes_are_seen_within_the_refresh_and_a_killed_daemon_goes_on(daemons: Daemons, tmp_path: Path) -> None:
    draw = random.Random(2)  # noqa: S311 - test data
    daemon = daemons.start(ANALYTICS_REFRESH_SECONDS="0.2")
    assert daemon.get("/overview").json == {
        "total_rows": 0, "device_count": 0, "min_timestamp": None, "max_timestamp": None,
    }  # fmt: skip
    assert "duckdb" not in maps_of(daemon), "an empty prefix needs no DuckDB"
    put_telemetry(tmp_path, "day_001.parquet", exported("D1", START, 30, draw=draw))
    daemon.until(lambda: daemon.get("/overview").json["total_rows"] == 30)
    daemon.kill()
    put_telemetry(tmp_path, "day_001.parquet", exported("D1", START, 40, draw=draw))
    put_telemetry(tmp_path, "day_002.parquet", exported("D2", START, 5, draw=draw))
    again = daemons.start(ANALYTICS_REFRESH_SECONDS="0.2")
    again.until(lambda: "duckdb" in maps_of(again))  # it goes on by itself, since there were requests before
    assert again.get("/overview").json["total_rows"] == 45
    assert len([each for each in (tmp_path / "data" / "analytics").iterdir() if each.is_dir()]) == 1
    again.terminate()
    third = daemons.start()
    assert third.get("/devices").json["count"] == 2
    assert "duckdb" not in maps_of(third), "nothing is read twice"


def test_a_key_for_reports_opens_the_page_and_nothing_else(daemons: Daemons) -> None:
    secret = "hw_reader_" + "r" * 43
    entry = f"reader:analytics:read:{hashlib.sha256(secret.encode()).hexdigest()}"
    daemon = daemons.start(API_KEYS=entry)
    assert daemon.get("/analytics/explore").status == 200
    assert daemon.get("/analytics").status == 401
    session = daemon.post("/ops/session", {"key": secret})
    assert session.status == 204
    cookie = {"Cookie": session.headers["Set-Cookie"].split(";")[0]}
    assert daemon.get("/analytics/devices", cookie).status == 200
    assert daemon.get("/ops/jobs", cookie).status == 403
