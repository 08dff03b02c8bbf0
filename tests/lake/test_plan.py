"""What a run of the lake day has to do, from two listings alone."""

import io
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.analytics.spark import spark_texts
from app.core.errors import Permanent
from app.db.database import sql_directory
from app.lake.plan import (
    LAYOUT,
    DeviceDay,
    LakeFile,
    TreeLayout,
    closed_days,
    file_name,
    plan,
    read_layout,
    separator,
)
from app.object_store.port import ObjectInfo, PutRequest
from given_settings import faults, loaded
from memory_objects import MemoryObjects

DAY = date(2026, 2, 7)
LAYOUT_OF_TREE = TreeLayout(("%Y/%m/%d", "%Y-%m-%d"), [(date.min, 3600)])


def member(device: str, digest: bytes = b"1", size_bytes: int = 10, day: date = DAY) -> DeviceDay:
    return DeviceDay(device, day, f"telemetry/device_id={device}/date={day}/", 24, size_bytes, digest)


def written(members: Sequence[DeviceDay], max_bytes: int, *before: LakeFile) -> list[LakeFile]:
    """The files after a run that writes what the plan says."""
    made = plan(members, before, max_bytes)
    gone = {file.key for rewrite in made.rewrites for file in rewrite.replaced}
    new = [LakeFile(f"lake/data/{file_name(each, 0, 0, 'ab')}", each.day, None) for each in made.rewrites]
    return [*(file for file in before if file.key not in gone), *new]


devices = st.lists(st.text("aäb-0/ ".replace("/", ""), min_size=1, max_size=4), min_size=1, max_size=12, unique=True)


@given(devices, devices, st.integers(5, 60))
@settings(max_examples=60)
def test_after_a_run_every_device_is_in_one_slice_and_nothing_is_left_to_do(
    first: list[str], then: list[str], max_bytes: int
) -> None:
    files = written([member(device) for device in first], max_bytes)
    grown = [member(device, b"2" if device in then else b"1") for device in {*first, *then}]
    made = plan(grown, files, max_bytes)
    after = written(grown, max_bytes, *files)
    assert not plan(grown, after, max_bytes).rewrites
    assert plan(grown, after, max_bytes).kept == 24 * len(grown)
    assert made.kept + sum(each.objects for each in made.rewrites) == 24 * len(grown)
    replaced = [file.key for each in made.rewrites for file in each.replaced]
    assert len(replaced) == len(set(replaced))


def test_only_the_slice_of_a_changed_device_is_written_again() -> None:
    before = [member(device) for device in "abcdef"]
    files = written(before, 20)
    assert len(files) == 3
    made = plan([member(one.device, b"2" if one.device == "d" else b"1") for one in before], files, 20)
    assert [[one.device for one in each.members] for each in made.rewrites] == [["c", "d"]]
    assert [len(each.replaced) for each in made.rewrites] == [1]


def test_a_file_that_is_gone_or_another_programs_has_its_day_written_again() -> None:
    members = [member("a"), member("b")]
    (file,) = written(members, 100)
    gone = LakeFile(file.key, DAY, None, missing=True)
    assert plan(members, [gone], 100).rewrites[0].replaced == [gone]
    foreign = LakeFile("lake/data/00000-compacted.parquet", DAY, None)
    (rewrite,) = plan(members, [file, foreign], 100).rewrites
    assert set(rewrite.replaced) == {file, foreign}


def test_a_slice_without_any_object_stays_as_it_is() -> None:
    files = written([member("a"), member("b")], 10)
    made = plan([member("b")], files, 10)
    assert (made.rewrites, made.kept) == ([], 24)
    assert not plan([], files, 10).rewrites


@pytest.mark.parametrize(
    ("before", "device", "shortest"),
    [("a", "b", b"b"), ("abc", "abd", b"abd"), ("a", "ab", b"ab"), ("x" * 70, "x" * 71, b"")],
)
def test_the_bound_between_two_devices_is_short(before: str, device: str, shortest: bytes) -> None:
    assert separator(before, device) == shortest


def info(key: str, etag: str = "1") -> ObjectInfo:
    return ObjectInfo(key, 5, etag, datetime(2026, 2, 7, tzinfo=UTC))


def test_days_are_found_in_every_form_that_dates_had_and_other_objects_are_passed_over() -> None:
    listing = [
        info("telemetry/_headwater/layout.json"),
        info("telemetry/device_id=a/date=2026-02-06/export_000000.parquet"),
        info("telemetry/device_id=a/date=2026/02/07/export_000000.csv"),
        info("telemetry/device_id=a/date=2026/02/07/export_010000.parquet"),
        info("telemetry/device_id=a/date=2026/02/07/notes.parquet"),
        info("telemetry/device_id=a/date=2026/02/08/export_000000.parquet"),
        info("telemetry/device_id=a/date=nonsense/export_000000.parquet"),
    ]
    found = list(closed_days(listing, "telemetry", LAYOUT_OF_TREE, date(2026, 2, 8)))
    assert [(one.day.day, one.objects, one.csv) for one in found] == [(6, 1, 0), (7, 1, 1)]


def test_the_layout_says_how_days_are_named_and_cut() -> None:
    store = MemoryObjects()
    assert read_layout(store, "t", "%Y", 60).window_seconds(DAY) == 60
    put(store, b'{"layouts": [{"from": "1970-01-01T00:00:00Z", "date_format": "%Y/%j", "window_seconds": 900},'
               b' {"from": "2026-02-07T00:00:00Z", "date_format": "%Y-%m-%d", "window_seconds": 3600}]}')  # fmt: skip
    layout = read_layout(store, "t", "%Y", 60)
    assert (layout.date_formats, layout.window_seconds(date(2026, 2, 6)), layout.window_seconds(DAY)) == (
        ("%Y/%j", "%Y-%m-%d"), 900, 3600)  # fmt: skip
    put(store, b"{}")
    with pytest.raises(Permanent, match=LAYOUT):
        read_layout(store, "t", "%Y", 60)


def put(store: Any, content: bytes) -> None:
    store.put(f"t/{LAYOUT}", io.BytesIO(content), PutRequest("application/json"))


IMPORTED = """
import sys
from app.config.environment import load_settings
from app.main import build
build(load_settings({"DATA_DIR": sys.argv[1], "LOG_FILE": "off"}, None))
print([name for name in ("pyiceberg", "sqlalchemy", "pyarrow", "app.lake.table") if name in sys.modules])
"""


def test_a_service_without_the_table_imports_nothing_of_it(tmp_path: Path) -> None:
    command = [sys.executable, "-c", IMPORTED, str(tmp_path)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize(
    "given",
    [
        {"S3_LAKE_PREFIX": "telemetry/lake"},
        {"S3_LAKE_PREFIX": "telemetry"},
        {"S3_LAKE_PREFIX": "a", "S3_PREFIX": "a/b"},
    ],
)
def test_the_table_lies_outside_the_tree(given: dict[str, str]) -> None:
    assert "outside S3_PREFIX" in " ".join(faults({"CATALOG": "iceberg", **given}))
    assert loaded(given).lake.catalog == "none"
    assert loaded({"CATALOG": "iceberg", "S3_LAKE_PREFIX": "telemetry-lake"}).lake.prefix == "telemetry-lake"


SPARK = {"ANALYTICS_ENGINE": "spark", "CATALOG": "iceberg", "SPARK_REMOTE": "sc://spark:15002"}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({**SPARK, "CATALOG": "none"}, "Spark reads the table of closed days; set CATALOG=iceberg"),
        ({**SPARK, "SPARK_REMOTE": ""}, "SPARK_REMOTE='': ANALYTICS_ENGINE=spark needs it"),
        ({**SPARK, "SPARK_REMOTE": "http://spark:secret"}, "SPARK_REMOTE='***': allowed: sc://host:port"),
        ({**SPARK, "ANALYTICS_ENGINE": "trino"}, "ANALYTICS_ENGINE='trino'"),
    ],
)
def test_an_engine_that_cannot_be_stops_the_start(given: dict[str, str], said: str) -> None:
    assert said in "\n".join(faults(given))
    assert loaded({}, **{**SPARK, "SPARK_REMOTE": "sc://spark/;token=x;use_ssl=true"}).analytics.engine == "spark"


def test_a_report_in_the_place_of_a_built_in_one_is_not_run_by_the_text_of_that(tmp_path: Path) -> None:
    built_in = sql_directory() / "analytics"
    (tmp_path / "spark").mkdir()
    for name in ("over_time.sql", "rows.sql", "spark/rows.sql"):
        (tmp_path / name).write_text("SELECT 1")
    names = {file.stem for file in built_in.glob("*.sql")}
    assert set(spark_texts([built_in])) == names
    own = spark_texts([built_in, tmp_path])
    assert (set(own), own["rows"]) == (names - {"over_time"}, "SELECT 1")
