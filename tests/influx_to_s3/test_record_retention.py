"""Records of closed windows go after WINDOW_RECORD_DAYS, and nothing that delivery needs goes with them."""

import io
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta

import pytest

from app.core.runs import Stop
from app.core.verify import CellState, ComparedWindow, Verdict, heal, verify
from app.core.windows import Window
from app.influx_to_s3.job import NAME
from app.object_store.port import PutRequest
from exporter import HOUR, MINUTE, NOON, Exporter
from exports import rows_of

SPAN = Window(NOON, NOON + 2 * HOUR)
DAY = timedelta(days=1)
LATER = 12  # days


def records(exporter: Exporter) -> int:
    return len(exporter.state.checkpoints.records(NAME, "D1", NOON - 99 * DAY, NOON + 99 * DAY))


def cells(exporter: Exporter) -> Sequence[CellState]:
    return [cell.state for cell in exporter.export().chart.cells("D1", Window(NOON - HOUR, NOON + 3 * HOUR))]


@pytest.fixture
def retired(exporter: Exporter) -> Exporter:
    """Two closed windows whose records are gone, and a newer one that is recorded."""
    exporter.write_each(NOON, NOON + 2 * HOUR)
    exporter.at(hours=1)
    exporter.well()
    exporter.at(hours=3, minutes=1)
    exporter.well()
    exporter.write(NOON + LATER * DAY)
    exporter.at(hours=24 * LATER + 3)
    for _ in range(3):
        exporter.well()
    assert (records(exporter), len(exporter.keys)) == (3, 3)
    exporter.reconcile(WINDOW_RECORD_DAYS="1")  # RECONCILE_DAYS and two more
    assert records(exporter) == 1
    exporter.store.puts.clear()
    return exporter


def verdicts(exporter: Exporter) -> Sequence[ComparedWindow]:
    return list(verify(exporter.export().verification(Stop()), SPAN, Stop(), "D1"))


def healed(exporter: Exporter) -> Sequence[bool]:
    told: list[ComparedWindow] = []
    export = exporter.export()
    exporter.built = replace(
        export, backfill=lambda context, span: heal(export.verification(context.stop), span, context, told.append, "D1")
    )
    exporter.backfill(SPAN.start, SPAN.end)
    exporter.built = None
    return [each.healed for each in told]


def test_a_run_and_a_reconcile_after_the_records_went_write_nothing(retired: Exporter) -> None:
    retired.well()
    assert retired.reconcile(WINDOW_RECORD_DAYS="1").report.windows == 0
    assert retired.store.puts == []
    retired.check()


def test_the_gap_map_still_tells_ok_empty_and_missing_apart(retired: Exporter) -> None:
    assert cells(retired) == [CellState.EMPTY, CellState.EQUAL, CellState.EQUAL, CellState.EMPTY]
    retired.store.inner.delete(retired.keys[0])
    assert cells(retired) == [CellState.EMPTY, CellState.MISSING, CellState.EQUAL, CellState.EMPTY]


@pytest.mark.parametrize("days", [str(LATER + 2), "400"])
def test_a_late_row_and_a_correction_go_into_the_one_object_when_reconcile_days_grow(
    retired: Exporter, days: str
) -> None:
    retired.write(NOON + timedelta(seconds=30))
    retired.write(NOON + HOUR + MINUTE, fields="voltage=777.5")
    retired.reconcile(RECONCILE_DAYS=days)
    first, second, _ = retired.keys
    assert len(rows_of(retired.store, first)) == 61
    assert [row["voltage"] for row in rows_of(retired.store, second)].count(777.5) == 1
    assert records(retired) == 3
    retired.check()


def test_a_backfill_takes_late_rows_in_and_keeps_what_only_the_object_has(retired: Exporter) -> None:
    points = retired.influx.points
    [series] = points._series.values()  # noqa: SLF001 - the simulator cannot delete
    series.times[5] += 1
    retired.backfill(SPAN.start, SPAN.end)
    first, _, _ = retired.keys
    assert len(rows_of(retired.store, first)) == 61
    assert [each.sign for each in verdicts(retired)] == [Verdict.DIFFERS, Verdict.EQUAL]


def test_verify_is_equal_without_records_and_heals_what_is_gone_late_or_cannot_be_read(retired: Exporter) -> None:
    assert [each.sign for each in verdicts(retired)] == [Verdict.EQUAL, Verdict.EQUAL]
    first, second, _ = retired.keys
    held = retired.store.head(second)
    assert held is not None
    retired.store.inner.delete(first)
    retired.store.inner.put(second, io.BytesIO(b"PAR1 and no more"), PutRequest(held.content_type, {}, held.etag))
    assert [each.sign for each in verdicts(retired)] == [Verdict.MISSING, Verdict.ERROR]
    assert healed(retired) == [True, True]
    retired.write(NOON + timedelta(seconds=30))
    assert healed(retired) == [True, False]
    retired.check()


def test_records_with_trouble_with_deltas_or_after_the_cursor_stay(exporter: Exporter) -> None:
    exporter.write_each(NOON, NOON + HOUR)
    exporter.write_each(NOON + HOUR, NOON + 2 * HOUR)
    exporter.at(hours=1)
    exporter.well()
    exporter.at(hours=3, minutes=1)
    exporter.well()
    exporter.write(NOON + timedelta(seconds=30))
    exporter.old_delta("D1", Window(NOON, NOON + HOUR), 1, Window(NOON, NOON + MINUTE))
    [_, gone] = [each for each in exporter.keys if "_120001" not in each]
    exporter.store.inner.delete(gone)
    exporter.at(hours=4)
    exporter.export().chart.cells("D1", SPAN)
    assert exporter.state.checkpoints.troubles()[NAME] == {"missing": 1}
    exporter.at(hours=24 * LATER)
    exporter.reconcile(WINDOW_RECORD_DAYS="1", RECONCILE_DAYS="0")
    assert records(exporter) == 3


def test_zero_keeps_every_record(exporter: Exporter) -> None:
    exporter.write_each(NOON, NOON + HOUR)
    exporter.at(hours=1)
    exporter.well()
    exporter.at(hours=2, minutes=1)
    exporter.well()
    exporter.at(hours=24 * 300)
    exporter.reconcile(WINDOW_RECORD_DAYS="0")
    assert records(exporter) == 1
