"""Deltas of older versions that may not be deleted: each row stands once in the reports, whatever engine answers."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from app.analytics.summaries import Summaries
from app.core.runs import Stop
from app.core.verify import CellState as Cell
from app.core.verify import Verdict, verify
from app.core.windows import Window
from app.db.state import State
from app.object_store.local import LocalDirectory
from app.object_store.s3 import S3Store
from exporter import HOUR, NOON, Exporter, exporter_on
from exports import exported, stored
from lake import BUILT_IN, PREFIX, Lake, bucket_lake, local_lake
from seaweed import Seaweed

pytestmark = pytest.mark.slow

SPAN = Window(NOON - 3 * HOUR, NOON)
FIRST = Window(NOON - 3 * HOUR, NOON - 2 * HOUR)


@pytest.fixture(params=["directory", "bucket"])
def lake(
    request: pytest.FixtureRequest, new_state: Callable[[str], State], seaweed: Seaweed, tmp_path: Path
) -> Iterator[Lake]:
    facts = new_state("sqlite").summaries
    if request.param == "directory":
        made = local_lake(tmp_path / "lake", facts)
    else:
        made = bucket_lake(seaweed, tmp_path / "lake", facts)
    with closing(made):
        yield made


@pytest.fixture
def exporter(lake: Lake, tmp_path: Path) -> Iterator[Exporter]:
    """Three closed hours of two devices; the first has deltas. What was written can never be deleted."""
    assert isinstance(lake.store, LocalDirectory | S3Store)
    lake.store.probe()
    for made in exporter_on(lake.store, tmp_path):
        made.environ = {"LOOKBACK_HOURS": "3", "EXPORT_GRACE_SECONDS": "0"}
        made.store.is_locked = lambda key: "export_" in key
        for device in ("D1", "D2"):
            made.write_each(SPAN.start, SPAN.end, 600, device)
        made.well()
        for part in (1, 2, 59):
            late = FIRST.start + timedelta(seconds=10 * part + 1)
            made.write(late, "D1", f"voltage={300 + part}")
            made.old_delta("D1", FIRST, part, Window(late, late + timedelta(seconds=1)))
        yield made


def assert_once(lake: Lake, exporter: Exporter) -> None:
    """Both engines and verify say that each row of the source is there once."""
    lake.summaries.refresh()
    rows = len(stored(exporter.influx.points))
    view = lake.summaries.view
    assert view is not None
    assert view.rows == rows
    assert lake.from_summaries("overview")[0][0] == lake.from_objects("overview")[0][0] == rows
    for path in BUILT_IN:
        assert lake.from_objects(path) == lake.from_summaries(path), path
    ends = exporter.export().verification(Stop())
    assert {each.sign for each in verify(ends, SPAN, Stop())} == {Verdict.EQUAL}
    assert {cell.state for cell in exporter.export().chart.cells("D1", SPAN)} == {Cell.EQUAL}


def test_rows_of_a_delta_that_stays_are_counted_once_whatever_is_written_later(lake: Lake, exporter: Exporter) -> None:
    deltas = [key for key in exporter.keys if not key.endswith("0000.parquet")]
    assert len(deltas) == 3
    assert_once(lake, exporter)
    exporter.backfill(SPAN.start, SPAN.end)
    assert [key for key in exporter.keys if key in deltas] == deltas
    with pytest.raises(AssertionError, match="is in"):
        exported(exporter.store)
    assert_once(lake, exporter)
    writes: Sequence[Callable[[], object]] = (
        lambda: exporter.backfill(SPAN.start, SPAN.end),
        exporter.reconcile,
        lambda: exporter.rewrite(SPAN.start, SPAN.end, EXPORT_TIMESTAMP_UNIT="ns"),
    )
    for write in writes:
        exporter.write(FIRST.start + timedelta(seconds=len(exporter.store.puts) + 1000), "D1", "voltage=1")
        exporter.store.puts.clear()
        write()
        assert exporter.store.puts, write
        exporter.backfill(SPAN.start, SPAN.end)
        assert_once(lake, exporter)


class Stepping:
    """A store in which something happens just before the first object is asked about."""

    def __init__(self, inner: Any, happens: Callable[[], object]) -> None:
        self._inner = inner
        self._happens: list[Callable[[], object]] = [happens]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def head(self, key: str) -> Any:
        while self._happens:
            self._happens.pop()()
        return self._inner.head(key)


def test_a_delta_that_is_folded_while_objects_are_listed_is_counted_once(lake: Lake, exporter: Exporter) -> None:
    store = Stepping(lake.store, lambda: exporter.backfill(SPAN.start, SPAN.end))
    summaries = Summaries(store, lake.facts, lake.engine, PREFIX, lambda: NOON)
    for _ in range(2):
        assert summaries.refresh().rows == len(stored(exporter.influx.points))
