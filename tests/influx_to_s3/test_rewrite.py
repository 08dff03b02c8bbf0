"""Objects of past days are encoded anew from themselves, in today's unit and types, without the source."""

from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from app.core.runs import Stop
from app.core.verify import NOTHING, Slot
from app.influx_to_s3.job import Export
from app.stores.local_directory import LocalDirectory
from exporter import NOON, Exporter, exporter_on
from exports import table

DAY = timedelta(days=1)
TODAY = {"EXPORT_TIMESTAMP_UNIT": "us", "EXPORT_COLUMN_TYPES": "count=double"}
SPAN = (NOON - DAY, NOON + 9 * DAY)


def encoded(exporter: Exporter) -> Sequence[tuple[str, str, dict[str, Any]]]:
    """Day, unit, and what stands in the columns of the field `count`, object by object."""
    found = []
    for key in exporter.keys:
        read = table(exporter.store, key)
        columns = {name: read.column(name).to_pylist() for name in read.column_names if name.startswith("count")}
        found.append((key.split("/date=")[1][:10], read.schema.field("timestamp").type.unit, columns))
    return found


def is_equal(export: Export, at: datetime) -> bool:
    """Source and object of a window hold the same, and not nothing."""
    ends = export.verification(Stop())
    slot = Slot("D1", next(ends.pipeline.grid.windows(at, at + datetime.resolution)))  # type: ignore[attr-defined]
    return ends.source(slot) == ends.destination(slot) != NOTHING


@pytest.fixture
def exporter(tmp_path: Path) -> Iterator[Exporter]:
    """Its source keeps a field's type for a day."""
    yield from exporter_on(LocalDirectory(tmp_path / "objects"), tmp_path, shard=DAY)


@pytest.fixture
def three_days(exporter: Exporter) -> Exporter:
    """Two days in nanoseconds and with an integer column that could not hold all; from the third on the settings of
    today hold. Everything is closed.
    """
    for day, fields in enumerate(("count=7i", "count=2.5", "count=9i")):
        exporter.at(hours=24 * day)
        exporter.write(exporter.now - timedelta(minutes=30, microseconds=day), fields=fields)
        exporter.well(**(TODAY if day else {"EXPORT_TIMESTAMP_UNIT": "ns"}))
    exporter.at(hours=24 * 4)
    exporter.well(**TODAY)
    assert encoded(exporter) == [
        ("2026/02/07", "ns", {"count": [7]}),
        ("2026/02/08", "ns", {"count_double": [2.5]}),
        ("2026/02/09", "us", {"count": [9.0]}),
    ]
    return exporter


def test_rewritten_days_have_the_unit_and_the_types_of_today(three_days: Exporter) -> None:
    three_days.rewrite(*SPAN, TODAY)
    assert encoded(three_days) == [
        ("2026/02/07", "us", {"count": [7.0]}),
        ("2026/02/08", "us", {"count": [2.5]}),
        ("2026/02/09", "us", {"count": [9.0]}),
    ]
    three_days.check()
    assert all(is_equal(three_days.export(**TODAY), NOON + day * DAY - timedelta(minutes=31)) for day in range(3))


def test_a_rewrite_that_is_repeated_finds_nothing_to_do(three_days: Exporter) -> None:
    assert three_days.rewrite(*SPAN, TODAY).report.windows == 2
    written = list(three_days.store.puts)
    assert three_days.rewrite(*SPAN, TODAY).report.windows == 0
    assert three_days.store.puts == written


def test_a_dry_run_says_how_much_there_is_to_do_and_changes_nothing(three_days: Exporter) -> None:
    before = encoded(three_days), three_days.layout
    report = three_days.rewrite(*SPAN, TODAY, dry_run=True).report
    assert (report.rows, report.windows) == (2, 2)
    assert (encoded(three_days), three_days.layout) == before


def test_other_days_keep_their_unit_and_types(three_days: Exporter) -> None:
    three_days.rewrite(NOON, NOON + timedelta(hours=1), TODAY)
    assert [(day, unit) for day, unit, _ in encoded(three_days)] == [
        ("2026/02/07", "us"),
        ("2026/02/08", "ns"),
        ("2026/02/09", "us"),
    ]
    assert all(is_equal(three_days.export(**TODAY), NOON + day * DAY - timedelta(minutes=31)) for day in range(3))


def test_late_rows_of_a_rewritten_day_are_written_as_the_day_is(three_days: Exporter) -> None:
    three_days.rewrite(*SPAN, TODAY)
    three_days.write(NOON - timedelta(minutes=10), fields="count=3i")
    three_days.backfill(NOON - timedelta(hours=1), NOON, **TODAY)
    assert encoded(three_days)[:2] == [("2026/02/07", "us", {"count": [7.0]}), ("2026/02/07", "us", {"count": [3.0]})]
    three_days.check()


def test_a_day_that_still_has_open_windows_is_left_alone(three_days: Exporter) -> None:
    three_days.at(hours=24 * 4)
    three_days.write(three_days.now - timedelta(minutes=30), fields="count=1i")
    three_days.well(**TODAY)
    before = encoded(three_days)
    assert three_days.rewrite(three_days.now - timedelta(hours=1), three_days.now + DAY, TODAY).report.windows == 0
    assert encoded(three_days) == before
