"""What comes late goes into the object of its own window, also after that closed; old deltas, dry runs, lost state."""

from datetime import timedelta

from app.core.runs import Outcome
from app.core.windows import Window
from app.influx_to_s3.job import NAME, RECONCILE
from exporter import HOUR, MINUTE, NOON, Exporter
from exports import rows_of


def test_a_point_ten_minutes_late_is_in_the_object_of_its_own_window_once(exporter: Exporter) -> None:
    exporter.write_each(NOON, NOON + HOUR)
    exporter.at(hours=1, minutes=5)
    exporter.well()
    late = NOON + timedelta(minutes=55, seconds=30)
    exporter.write(late, fields="voltage=1.5")
    exporter.write_each(NOON + HOUR, NOON + HOUR + 5 * MINUTE)
    exporter.well()
    assert exporter.keys == [f"telemetry/device_id=D1/date=2026/02/07/export_{hour}0000.parquet" for hour in (12, 13)]
    rows = rows_of(exporter.store, exporter.keys[0])
    assert [row["voltage"] for row in rows].count(1.5) == 1
    exporter.check()


def test_what_comes_after_the_closing_goes_into_the_object_of_its_window_once_and_is_counted(
    exporter: Exporter,
) -> None:
    exporter.write_each(NOON, NOON + HOUR)
    exporter.at(hours=1)
    exporter.well()
    exporter.at(hours=2, minutes=1)
    exporter.well()
    [closed] = exporter.keys
    for number in (1, 2):
        before = exporter.store.head(closed)
        exporter.write(NOON + timedelta(seconds=number), fields="voltage=7.5")
        exporter.at(hours=3)
        exporter.well()
        assert exporter.store.head(closed) == before
        run = exporter.reconcile()
        assert run.report.late_rows == 1
        assert exporter.keys == [closed]
        exporter.check()
        after = exporter.store.head(closed)
        assert exporter.reconcile().report.late_rows == 0
        assert exporter.store.head(closed) == after != before


def test_deltas_that_an_older_version_wrote_go_into_the_object_of_their_window(exporter: Exporter) -> None:
    exporter.write_each(NOON, NOON + HOUR)
    exporter.at(hours=1)
    exporter.well()
    exporter.at(hours=2, minutes=1)
    exporter.well()
    [closed] = exporter.keys
    for part in (1, 2):
        late = NOON + timedelta(minutes=part, seconds=part)
        exporter.write(late, fields="voltage=7.5")
        key = exporter.old_delta("D1", Window(NOON, NOON + HOUR), part, Window(late, late + timedelta(seconds=1)))
        assert key == closed.replace("120000", f"12000{part}")
    exporter.check()
    assert len(exporter.keys) == 3
    run = exporter.reconcile()
    assert (run.report.windows, exporter.keys) == (1, [closed])
    exporter.check()
    held = exporter.store.head(closed)
    assert held is not None
    assert held.metadata["folded"] == "2"
    [record] = exporter.state.checkpoints.records(NAME, "D1", NOON, NOON + HOUR)
    assert (record.part, record.version, record.rows) == (0, held.etag, 62)
    exporter.store.puts.clear()
    exporter.reconcile()
    assert exporter.store.puts == []


def test_a_delta_that_may_not_be_deleted_stays_and_is_not_taken_in_again(exporter: Exporter) -> None:
    exporter.write_each(NOON, NOON + HOUR)
    exporter.at(hours=1)
    exporter.well()
    exporter.at(hours=2, minutes=1)
    exporter.well()
    [closed] = exporter.keys
    exporter.write(NOON + timedelta(seconds=1))
    exporter.write(NOON + 6 * HOUR, device="D1")
    delta = exporter.old_delta("D1", Window(NOON, NOON + HOUR), 1, Window(NOON, NOON + timedelta(seconds=2)))
    exporter.at(hours=9)
    exporter.well()
    exporter.store.is_locked = lambda key: key == delta
    for _ in range(2):
        run = exporter.backfill(NOON, NOON + 8 * HOUR)
        assert exporter.keys == [closed, delta, closed.replace("120000", "180000")]
        assert len(rows_of(exporter.store, closed)) == 61
    assert run.report.windows == 0
    exporter.store.is_locked = lambda _: False
    exporter.backfill(NOON, NOON + 8 * HOUR)
    assert len(exporter.keys) == 2
    exporter.check()


def test_reconcile_looks_back_as_far_as_it_is_told(exporter: Exporter) -> None:
    exporter.write(NOON)
    exporter.at(minutes=1)
    exporter.well()
    exporter.at(hours=2, minutes=1)
    exporter.well()
    exporter.write(NOON + MINUTE)
    exporter.at(hours=3 * 24)
    assert exporter.reconcile(RECONCILE_DAYS="2").report.late_rows == 0
    assert exporter.reconcile(RECONCILE_DAYS="4").report.late_rows == 1
    exporter.check()


def test_a_whole_window_that_came_late_is_found_by_reconcile(exporter: Exporter) -> None:
    exporter.write(NOON)
    exporter.at(minutes=1)
    exporter.well()
    exporter.at(hours=6)
    exporter.well()
    rows = exporter.write_each(NOON + 2 * HOUR, NOON + 2 * HOUR + 10 * MINUTE)
    exporter.well()
    assert len(exporter.keys) == 1
    run = exporter.reconcile()
    assert (run.report.rows, len(exporter.keys)) == (rows, 2)
    exporter.check()


def test_two_processes_that_both_take_in_late_rows_write_them_once(exporter: Exporter) -> None:
    exporter.write(NOON)
    exporter.at(minutes=1)
    exporter.well()
    exporter.at(hours=2, minutes=1)
    exporter.well()
    exporter.write(NOON + MINUTE)
    done: list[str] = []

    def other_process(key: str) -> None:
        if not done:
            done.append(key)
            exporter.reconcile()

    exporter.store.before_put = other_process
    exporter.store.puts.clear()
    assert exporter.run(RECONCILE).outcome is Outcome.STOPPED  # the other one took the lease
    assert done == exporter.store.puts[:1] == exporter.keys
    exporter.reconcile()
    assert len(exporter.keys) == 1
    exporter.check()


def test_backfill_fills_the_past_and_leaves_the_cursor(exporter: Exporter) -> None:
    exporter.write_each(NOON - 30 * HOUR, NOON - 26 * HOUR, every_seconds=300)
    exporter.write(NOON)
    exporter.at(minutes=1)
    exporter.well()
    cursor = exporter.cursor
    assert len(exporter.keys) == 1
    run = exporter.backfill(NOON - 40 * HOUR, NOON)
    assert (run.report.windows, len(exporter.keys)) == (4, 5)
    assert exporter.cursor == cursor
    exporter.store.puts.clear()
    exporter.backfill(NOON - 40 * HOUR, NOON)
    assert exporter.store.puts == []
    exporter.check()


def test_a_dry_run_counts_and_changes_nothing(exporter: Exporter) -> None:
    rows = exporter.write_each(NOON, NOON + HOUR)
    exporter.at(hours=1)
    run = exporter.run(dry_run=True)
    assert (run.outcome, run.report.rows, run.report.windows) == (Outcome.OK, rows, 1)
    assert (exporter.keys, exporter.store.puts) == ([], [])
    assert exporter.state.checkpoints.cursors(NAME) == {}
    assert list(exporter.state.checkpoints.layouts(NAME)) == []
    exporter.well()
    exporter.write(NOON + timedelta(seconds=1))
    exporter.at(hours=5)
    held = exporter.state.checkpoints.records(NAME, "D1", NOON, NOON + HOUR)
    exporter.store.puts.clear()
    assert exporter.run(dry_run=True).report.rows == rows + 1
    assert exporter.run(RECONCILE, dry_run=True).outcome is Outcome.OK
    assert exporter.store.puts == []
    assert exporter.state.checkpoints.records(NAME, "D1", NOON, NOON + HOUR) == held


def test_lost_state_finds_its_objects_again_without_doubling_a_row(exporter: Exporter) -> None:
    exporter.write_each(NOON, NOON + HOUR)
    exporter.at(hours=1)
    exporter.well()
    exporter.at(hours=2, minutes=1)
    exporter.well()
    exporter.write(NOON + timedelta(seconds=5))
    exporter.reconcile()
    keys = exporter.keys
    with exporter.state.database.transaction() as session:
        for name in ("export_windows", "export_checkpoints"):
            session.run(f"DELETE FROM {name}")  # noqa: S608 - two constants
    exporter.well(LOOKBACK_HOURS="12", EXPORT_GRACE_SECONDS="3600")
    assert exporter.keys == keys
    exporter.check()
