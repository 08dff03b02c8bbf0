"""The daily reconcile: late rows, late fields and corrections of closed windows; objects that are gone or replaced."""

import io
from datetime import timedelta

import pytest

from app.core.ledger import Tally
from app.core.runs import Outcome, Stop
from app.core.verify import CellState, verify
from app.core.windows import Window
from app.influx_to_s3.job import NAME, RECONCILE
from app.object_store.port import PutRequest
from exporter import HOUR, MINUTE, NOON, Exporter
from exports import rows_of
from simulators.influx import Refuse

SPAN = Window(NOON, NOON + HOUR)


def closed(exporter: Exporter, **environ: str) -> str:
    """One closed window of 60 rows; its key."""
    exporter.write_each(NOON, NOON + HOUR)
    exporter.at(hours=1)
    exporter.well(**environ)
    exporter.at(hours=2, minutes=1)
    exporter.well(**environ)
    [key] = exporter.keys
    exporter.at(hours=3)
    exporter.store.puts.clear()
    return key


def troubles(exporter: Exporter) -> dict[str, int]:
    return dict(exporter.state.checkpoints.troubles().get(NAME, {}))


def test_a_reconcile_that_finds_nothing_reads_no_rows_and_writes_nothing(exporter: Exporter) -> None:
    closed(exporter)
    exporter.write(NOON + 26 * HOUR)
    exporter.at(hours=30)
    exporter.well()
    exporter.store.puts.clear()
    exporter.influx.forget_queries()
    run = exporter.reconcile()
    assert exporter.store.puts == []
    assert run.report.ledger.total == Tally(counted=183, read=180, already_there=183)
    assert run.report.late_rows == run.report.corrected_rows == 0
    assert sum("pivot" in query.text for query in exporter.influx.queries) == 1, "only the oldest day is read"


def test_a_corrected_value_comes_by_its_sums_and_is_counted(exporter: Exporter) -> None:
    key = closed(exporter)
    exporter.write(NOON + 30 * MINUTE, fields="voltage=777.5")
    run = exporter.reconcile(RECONCILE_DAYS="1")
    assert (run.report.corrected_rows, run.report.late_rows, exporter.store.puts) == (1, 0, [key])
    assert [row["voltage"] for row in rows_of(exporter.store, key)].count(777.5) == 1
    exporter.check()
    assert exporter.reconcile().report.corrected_rows == 0
    assert exporter.store.puts == [key]


def test_a_field_that_comes_late_for_rows_that_are_there_comes(exporter: Exporter) -> None:
    closed(exporter)
    for minute in range(60):
        exporter.write(NOON + minute * MINUTE, fields="temperature=41.5")
    run = exporter.reconcile()
    assert (run.report.corrected_rows, run.report.late_rows) == (60, 0)
    exporter.check()


def test_a_late_row_is_found_though_another_one_went_at_the_source(exporter: Exporter) -> None:
    key = closed(exporter)
    points = exporter.influx.points
    [series] = points._series.values()  # noqa: SLF001 - the simulator cannot delete
    series.times[5] += 1  # a point goes, another with the same values comes
    run = exporter.reconcile()
    assert (run.report.late_rows, exporter.store.puts) == (1, [key])
    assert len(rows_of(exporter.store, key)) == 61, "what only the object has stays"


def test_values_that_were_exchanged_come_on_the_night_on_which_their_day_is_read(exporter: Exporter) -> None:
    key = closed(exporter)
    exporter.write_each(NOON + 2 * HOUR, NOON + 3 * HOUR)
    exporter.at(hours=5)
    exporter.well()
    before = [row["voltage"] for row in rows_of(exporter.store, key)][:2]
    exporter.write(NOON, fields=f"voltage={before[1]}")
    exporter.write(NOON + MINUTE, fields=f"voltage={before[0]}")
    exporter.store.puts.clear()
    for day in range(1, 4):
        exporter.at(hours=24 * day + 3)
        run = exporter.reconcile(RECONCILE_DAYS="3")
        if run.report.corrected_rows:
            break
    assert run.report.corrected_rows == 2
    assert [put for put in exporter.store.puts if "/export_" in put] == [key]
    exporter.check()


def test_an_older_version_of_an_object_that_somebody_put_back_is_brought_up_again(exporter: Exporter) -> None:
    exporter.write_each(NOON, NOON + HOUR)
    exporter.at(hours=1)
    exporter.well()
    [key] = exporter.keys
    older = exporter.store.head(key)
    assert older is not None
    with exporter.store.open(key) as body:
        assert body is not None
        content = body.read()
    exporter.write(NOON + timedelta(seconds=1))
    exporter.at(hours=2, minutes=1)
    exporter.well()
    exporter.store.inner.put(key, io.BytesIO(content), PutRequest(older.content_type, older.metadata))
    exporter.at(hours=3)
    assert exporter.reconcile().report.windows == 1
    exporter.check()
    assert troubles(exporter) == {}, "it is one of Headwater's own"


def test_an_object_that_vanished_is_told_and_left_alone_until_it_is_healed(exporter: Exporter) -> None:
    key = closed(exporter)
    exporter.store.inner.delete(key)
    run = exporter.reconcile()
    assert (run.report.windows, exporter.keys, troubles(exporter)) == (0, [], {"missing": 1})
    said = (
        "1 objects missing at the destination: if this was not intended, run verify with --heal, "
        "or set EXPORT_HEAL=auto"
    )
    assert list(run.report.notes) == [said]
    assert run.report.ledger.total.waiting == run.report.ledger.total.counted == 180
    run = exporter.reconcile(EXPORT_HEAL="auto")
    assert (run.report.windows, exporter.keys, troubles(exporter)) == (1, [key], {})
    exporter.check()


def test_an_object_that_somebody_brings_back_is_missing_no_more(exporter: Exporter) -> None:
    key = closed(exporter)
    held = exporter.store.head(key)
    assert held is not None
    with exporter.store.open(key) as body:
        assert body is not None
        content = body.read()
    exporter.store.inner.delete(key)
    exporter.reconcile()
    assert troubles(exporter) == {"missing": 1}
    exporter.store.inner.put(key, io.BytesIO(content), PutRequest(held.content_type, held.metadata))
    exporter.reconcile()
    assert troubles(exporter) == {}


def test_the_gap_map_and_verify_tell_of_it_too(exporter: Exporter) -> None:
    key = closed(exporter)
    held = exporter.store.head(key)
    assert held is not None
    with exporter.store.open(key) as body:
        assert body is not None
        content = body.read()
    exporter.store.inner.delete(key)
    [cell] = exporter.export().chart.cells("D1", SPAN)
    assert (cell.state, troubles(exporter)) == (CellState.MISSING, {"missing": 1})
    exporter.store.inner.put(key, io.BytesIO(content), PutRequest(held.content_type, held.metadata))
    list(verify(exporter.export().verification(Stop()), SPAN, Stop()))
    assert troubles(exporter) == {}
    exporter.store.inner.delete(key)
    list(verify(exporter.export().verification(Stop()), SPAN, Stop()))
    assert troubles(exporter) == {"missing": 1}


def test_an_object_that_another_program_replaced_is_told_and_left_alone_until_it_is_healed(exporter: Exporter) -> None:
    key = closed(exporter)
    exporter.store.inner.put(key, io.BytesIO(b"a,b\n1,2\n"), PutRequest("text/csv"))
    exporter.write(NOON + timedelta(seconds=1))
    for _ in range(2):
        run = exporter.reconcile()
        assert (run.report.windows, troubles(exporter)) == (0, {"foreign": 1})
    run = exporter.reconcile(EXPORT_HEAL="auto")
    assert (run.report.windows, troubles(exporter)) == (1, {})
    exporter.check()


def test_a_window_that_cannot_be_mended_stops_no_other_window_of_its_device(exporter: Exporter) -> None:
    first = closed(exporter)
    exporter.write_each(NOON + 3 * HOUR, NOON + 4 * HOUR)
    exporter.at(hours=6)
    exporter.well()
    etag = exporter.store.inner.put(first, io.BytesIO(b"PAR1 and then nothing"), PutRequest("x"))
    with exporter.state.database.transaction() as session:
        session.run(
            "UPDATE export_windows SET version = :etag WHERE window_start < :until", etag=etag, until=NOON + HOUR
        )
    for hour in (0, 3):
        exporter.write(NOON + hour * HOUR + timedelta(seconds=1))
    run = exporter.run(RECONCILE)
    assert run.outcome is Outcome.PARTIAL
    assert run.report.late_rows == 1
    [failure] = run.report.failures
    assert failure.partition == "D1"
    assert first in failure.message


def test_deltas_that_the_state_does_not_know_are_taken_in(exporter: Exporter) -> None:
    key = closed(exporter)
    late = NOON + timedelta(seconds=1)
    exporter.write(late)
    exporter.old_delta("D1", SPAN, 1, Window(late, late + timedelta(seconds=1)))
    with exporter.state.database.transaction() as session:
        session.run("DELETE FROM export_windows WHERE part > 0")
    assert len(exporter.keys) == 2
    exporter.reconcile()
    assert exporter.keys == [key]
    exporter.check()


def test_a_delta_that_cannot_be_deleted_is_remembered_until_it_is(exporter: Exporter) -> None:
    key = closed(exporter)
    late = NOON + timedelta(seconds=1)
    exporter.write(late)
    delta = exporter.old_delta("D1", SPAN, 1, Window(late, late + timedelta(seconds=1)))
    exporter.store.is_locked = lambda each: each == delta
    for _ in range(2):
        exporter.reconcile()
        assert exporter.keys == [key, delta]
        assert list(exporter.state.checkpoints.undeleted(NAME)) == [delta]
        assert len(rows_of(exporter.store, key)) == 61
    exporter.store.is_locked = lambda _: False
    exporter.reconcile()
    assert (exporter.keys, exporter.state.checkpoints.undeleted(NAME)) == ([key], {})


def test_a_source_that_cannot_add_up_is_compared_by_its_rows(exporter: Exporter) -> None:
    closed(exporter)
    exporter.write(NOON + MINUTE, fields="voltage=777.5")
    exporter.influx.faults.add(Refuse(400, "runtime error: cannot add up"), when=lambda text: "fn: sum" in text)
    run = exporter.reconcile()
    assert run.report.corrected_rows == 1
    exporter.check()


@pytest.mark.parametrize("days", ["0", "1"])
def test_nothing_before_the_days_of_the_reconcile_is_asked_for(exporter: Exporter, days: str) -> None:
    closed(exporter)
    exporter.write(NOON + timedelta(seconds=1))
    exporter.at(hours=30)
    assert exporter.reconcile(RECONCILE_DAYS=days).report.late_rows == 0
