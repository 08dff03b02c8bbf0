"""What comes late: into its window while it is open, into deltas by reconcile and backfill; dry runs, lost state."""

from datetime import timedelta

from app.core.runs import Outcome
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


def test_a_closed_object_never_changes_and_what_comes_later_goes_to_deltas_and_is_counted(exporter: Exporter) -> None:
    exporter.write_each(NOON, NOON + HOUR)
    exporter.at(hours=1)
    exporter.well()
    exporter.at(hours=2, minutes=1)
    exporter.well()
    [closed] = exporter.keys
    before = exporter.store.head(closed)
    for number in (1, 2):
        exporter.write(NOON + timedelta(seconds=number), fields="voltage=7.5")
        exporter.at(hours=3)
        exporter.well()
        assert len(exporter.keys) == number
        run = exporter.reconcile()
        assert run.report.late_rows == 1
        assert exporter.keys[number] == closed.replace("120000", f"12000{number}")
        assert exporter.reconcile().report.late_rows == 0
    assert exporter.store.head(closed) == before
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


def test_two_processes_that_both_close_late_rows_write_them_once(exporter: Exporter) -> None:
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
    assert exporter.run(RECONCILE).outcome is Outcome.STOPPED  # the other one took the lease
    assert done == [exporter.keys[1]]
    exporter.reconcile()
    assert len(exporter.keys) == 2
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
    assert list(exporter.state.layouts.layouts(NAME)) == []
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
