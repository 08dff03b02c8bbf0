"""Objects re-encoded from themselves: today's unit and types for days that are over, whatever the source still has."""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from app.core.runs import Stop
from app.core.verify import Verdict, verify
from app.core.windows import Window
from app.influx_to_s3.job import NAME
from app.object_store.local import LocalDirectory
from exporter import HOUR, MINUTE, NOON, Exporter, exporter_on
from exports import exported, rows_of, table

DAY = timedelta(days=1)
MIDNIGHT = NOON.replace(hour=0)
OLD = {"EXPORT_TIMESTAMP_UNIT": "ns"}
NEW = {"EXPORT_TIMESTAMP_UNIT": "us", "EXPORT_COLUMN_TYPES": "count=double"}


class Killed(BaseException):
    """The process died here."""


def versions(exporter: Exporter) -> Mapping[str, Any]:
    return {key: info.etag for key in exporter.keys if (info := exporter.store.head(key))}


def signs(exporter: Exporter) -> set[Verdict]:
    return {each.sign for each in verify(exporter.export(**NEW).verification(Stop()), span(), Stop())}


def span() -> Window:
    return Window(MIDNIGHT, MIDNIGHT + DAY)


@pytest.fixture
def exporter(tmp_path: Path) -> Iterator[Exporter]:
    """The type of a field may change from shard to shard, that is from hour to hour."""
    yield from exporter_on(LocalDirectory(tmp_path / "objects"), tmp_path, shard=HOUR)


@pytest.fixture
def two_days_later(exporter: Exporter) -> Exporter:
    """Objects in nanoseconds whose field `count` is an integer and had a fraction twice; then unit and type changed."""
    for hour in range(3):
        exporter.write_each(NOON + hour * HOUR, NOON + hour * HOUR + 10 * MINUTE)
    exporter.write(NOON + timedelta(microseconds=1), fields="count=3i")
    exporter.at(minutes=30)
    exporter.well(**OLD)
    exporter.at(hours=10)
    exporter.influx.write(f"device_telemetry,device_id=D2,device_type=pump,location=Plant-A count=0.5 {at(1)}")
    exporter.influx.write(f"device_telemetry,device_id=D2,device_type=pump,location=Plant-A count=7.0 {at(2)}")
    exporter.well(**OLD)
    exporter.at(hours=24)
    exporter.well(**NEW)
    exporter.at(hours=48)
    exporter.well(**NEW)
    return exporter


def at(hours: int) -> int:
    return int((NOON + hours * HOUR).timestamp()) * 10**9 + 1_001


def test_past_days_get_the_unit_and_the_types_of_today_and_the_same_rows(two_days_later: Exporter) -> None:
    exporter = two_days_later
    before = exported(exporter.store)
    assert signs(exporter) == {Verdict.EQUAL}
    assert any("count_double" in fields for fields in before.values())
    shown = exporter.rewrite(MIDNIGHT, MIDNIGHT + DAY, dry_run=True, **NEW)
    written = exporter.rewrite(MIDNIGHT, MIDNIGHT + DAY, dry_run=False, **NEW)
    assert shown.report.rows == written.report.rows == len(before)
    for key in exporter.keys:
        schema = table(exporter.store, key).schema
        assert str(schema.field("timestamp").type) == "timestamp[us, tz=UTC]"
        assert "count_double" not in schema.names
        assert "count" not in schema.names or str(schema.field("count").type) == "double"
    after = exported(exporter.store)
    assert after == {
        row: {{"count_double": "count"}.get(name, name): value for name, value in fields.items()}
        for row, fields in before.items()
    }
    assert signs(exporter) == {Verdict.EQUAL}
    left = versions(exporter)
    assert exporter.rewrite(MIDNIGHT, MIDNIGHT + DAY, dry_run=False, **NEW).report.rows == 0
    assert versions(exporter) == left


def test_what_comes_late_is_written_like_the_day_that_was_rewritten(two_days_later: Exporter) -> None:
    exporter = two_days_later
    exporter.rewrite(MIDNIGHT, MIDNIGHT + DAY, dry_run=False, **NEW)
    exporter.write(NOON + HOUR + 7 * MINUTE, "D2", "count=0.25")
    assert exporter.reconcile(**NEW).report.late_rows == 1
    *_, late = [key for key in exporter.keys if "D2" in key and "export_1300" in key]
    assert [row["count"] for row in rows_of(exporter.store, late)] == [0.5, 0.25]
    assert str(table(exporter.store, late).schema.field("timestamp").type) == "timestamp[us, tz=UTC]"
    assert signs(exporter) == {Verdict.EQUAL}


def test_a_rewrite_of_a_part_of_a_day_leaves_its_unit_and_types(two_days_later: Exporter) -> None:
    exporter = two_days_later
    before, layout = versions(exporter), exporter.layout
    assert exporter.rewrite(MIDNIGHT + HOUR, MIDNIGHT + DAY, dry_run=False, **NEW).report.rows == 0
    assert (versions(exporter), exporter.layout) == (before, layout)


def test_a_rewrite_that_dies_at_any_write_goes_on_where_it_stopped(two_days_later: Exporter) -> None:
    exporter = two_days_later
    rows = len(exported(exporter.store))
    written, deaths = 0, 0

    def die(key: str) -> None:
        if key.endswith(".parquet"):
            exporter.store.before_put = lambda _key: die_now()

    def die_now() -> None:
        raise Killed

    while True:
        exporter.store.before_put = die
        before = versions(exporter)
        with suppress(Killed):
            exporter.rewrite(MIDNIGHT, MIDNIGHT + DAY, dry_run=False, **NEW, EXPORT_CONCURRENCY="1")
        changed = sum(before[key] != version for key, version in versions(exporter).items())
        exporter.store.before_put = lambda _key: None
        if not changed:
            break
        assert changed == 1
        written, deaths = written + changed, deaths + 1
    assert written == len(exporter.keys)
    assert len(exported(exporter.store)) == rows
    records = exporter.state.checkpoints.records(NAME, "D1", MIDNIGHT, MIDNIGHT + DAY)
    assert {record.key: record.version for record in records}.items() <= versions(exporter).items()
    assert signs(exporter) == {Verdict.EQUAL}
