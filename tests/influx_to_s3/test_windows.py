"""Which windows are exported and when: midnights, first starts, outages, empty spans, clocks that jump, new layouts."""

from datetime import UTC, datetime, timedelta

import pytest

from app.core.runs import Outcome
from app.influx_to_s3.job import NAME
from exporter import HOUR, MINUTE, NOON, Exporter
from exports import rows_of


def test_no_window_crosses_midnight_and_names_are_right_on_both_sides(exporter: Exporter) -> None:
    exporter.at(hours=10)
    exporter.well()
    exporter.write_each(NOON + timedelta(hours=10), NOON + timedelta(hours=14), every_seconds=120)
    exporter.at(hours=14)
    exporter.well()
    days = [("02/07", "220000"), ("02/07", "230000"), ("02/08", "000000"), ("02/08", "010000")]
    assert exporter.keys == [f"telemetry/device_id=D1/date=2026/{day}/export_{name}.parquet" for day, name in days]
    exporter.check()


@pytest.mark.parametrize("start", [datetime(2020, 12, 31, 22, tzinfo=UTC), datetime(2026, 3, 29, 0, tzinfo=UTC)])
def test_year_ends_week_53_and_clock_changes_are_days_like_others(exporter: Exporter, start: datetime) -> None:
    exporter.now = start
    exporter.write_each(start, start + timedelta(hours=5), every_seconds=600)
    exporter.well()
    exporter.now = start + timedelta(hours=5)
    exporter.well()
    hours = [start + n * HOUR for n in range(5)]
    assert exporter.keys == [f"telemetry/device_id=D1/date={at:%Y/%m/%d}/export_{at:%H%M%S}.parquet" for at in hours]
    exporter.check()


def test_an_unchanged_window_is_written_once_more_when_it_closes_and_never_else(exporter: Exporter) -> None:
    exporter.write_each(NOON, NOON + HOUR)
    exporter.at(minutes=59)
    exporter.well()
    exporter.store.puts.clear()
    exporter.influx.forget_queries()
    for _ in range(3):
        run = exporter.well()
        assert (run.report.rows, run.report.windows) == (0, 0)
    exporter.at(hours=1, minutes=30)
    exporter.well()
    assert exporter.store.puts == []
    before = rows_of(exporter.store, exporter.keys[0])
    for minutes in (121, 122):
        exporter.at(minutes=minutes)
        exporter.well()
        assert exporter.store.puts == exporter.keys  # who read the version before this one is refused from now on
    assert rows_of(exporter.store, exporter.keys[0]) == before
    exporter.reconcile()
    assert exporter.store.puts == exporter.keys
    assert exporter.cursor == NOON + HOUR
    [record] = exporter.state.checkpoints.records(NAME, "D1", NOON, NOON + HOUR)
    assert record.closed


def test_a_first_start_goes_back_by_the_lookback_and_no_further(exporter: Exporter) -> None:
    exporter.write_each(NOON - 6 * HOUR, NOON, every_seconds=600)
    exporter.at(minutes=20)
    exporter.well(LOOKBACK_HOURS="3")
    # 12:20 less three hours is in the window of nine
    assert exporter.keys[0].endswith("export_090000.parquet")
    assert len(exporter.keys) == 3


def test_a_first_start_may_be_set(exporter: Exporter) -> None:
    exporter.write_each(NOON - 6 * HOUR, NOON, every_seconds=600)
    exporter.well(EXPORT_START="2026-02-07T07:30:00Z")
    assert exporter.keys[0].endswith("export_070000.parquet")
    assert len(exporter.keys) == 5


def test_a_start_in_the_future_waits_for_it(exporter: Exporter) -> None:
    exporter.environ["EXPORT_START"] = "2026-02-07T14:00:00Z"
    exporter.write_each(NOON, NOON + 3 * HOUR, every_seconds=600)
    exporter.at(hours=1)
    exporter.well()
    assert exporter.keys == []
    exporter.at(hours=2, minutes=30)
    exporter.well()
    assert [key[-14:-8] for key in exporter.keys] == ["140000"]


def test_a_device_that_appears_later_is_exported_from_its_first_row(exporter: Exporter) -> None:
    exporter.write(NOON)
    exporter.at(minutes=1)
    exporter.well()
    exporter.write_each(NOON + 10 * MINUTE, NOON + 30 * MINUTE, device="D2")
    exporter.at(hours=1)
    exporter.well()
    exporter.check()
    exporter.at(hours=5)
    exporter.well()
    exporter.write_each(NOON + 4 * HOUR + 10 * MINUTE, NOON + 5 * HOUR, device="D3")
    exporter.well()
    exporter.check()


@pytest.mark.slow
def test_after_an_outage_of_three_times_the_lookback_everything_is_exported(exporter: Exporter) -> None:
    exporter.write_each(NOON - HOUR, NOON, every_seconds=600)
    exporter.write_each(NOON - HOUR, NOON, every_seconds=600, device="D2")
    exporter.well()
    exporter.influx.close()
    for minutes in (60, 120, 180):
        exporter.at(minutes=minutes)
        run = exporter.run()
        assert run.outcome is Outcome.FAILED
        assert "cannot connect to" in run.error
        assert "INFLUXDB_URL" in run.hint
    for device in ("D1", "D2"):
        exporter.write_each(NOON, NOON + 3 * HOUR, every_seconds=300, device=device)
    exporter.influx.start()
    exporter.well()
    exporter.check()


def test_a_long_outage_is_caught_up_in_bounded_steps(exporter: Exporter) -> None:
    exporter.write(NOON)
    exporter.at(minutes=1)
    exporter.well()
    exporter.write_each(NOON, NOON + 40 * HOUR, every_seconds=1800)
    exporter.at(hours=40)
    run = exporter.run()
    assert (run.report.windows, run.report.more) == (24, True)
    exporter.well()
    exporter.check()


def test_empty_windows_move_the_cursor_and_leave_no_objects(exporter: Exporter) -> None:
    exporter.write(NOON)
    exporter.at(minutes=1)
    exporter.well()
    exporter.at(hours=30)
    exporter.store.puts.clear()
    run = exporter.well()
    written = [key for key in exporter.store.puts if "/_headwater/" not in key]
    assert (run.report.windows, written) == (1, exporter.keys)  # noon's own window, which closes
    assert exporter.cursor == NOON + 29 * HOUR
    exporter.at(hours=60)
    assert exporter.well().report.windows == 0
    assert exporter.cursor == NOON + 59 * HOUR
    assert len(exporter.keys) == 1


def test_nothing_at_all_is_no_error(exporter: Exporter) -> None:
    exporter.well()
    exporter.reconcile()
    assert exporter.keys == []


def test_points_from_the_future_wait_for_their_window(exporter: Exporter) -> None:
    exporter.write(NOON)
    exporter.write(NOON + 5 * HOUR)
    exporter.at(minutes=1)
    exporter.well()
    assert len(exporter.keys) == 1
    exporter.at(hours=5, minutes=1)
    exporter.well()
    assert len(exporter.keys) == 2
    exporter.check()


def test_a_clock_that_jumps_ahead_and_back_loses_and_doubles_nothing(exporter: Exporter) -> None:
    exporter.write_each(NOON, NOON + 30 * MINUTE)
    exporter.at(minutes=30)
    exporter.well()
    exporter.at(hours=9)
    exporter.well()
    exporter.at(minutes=45)
    exporter.write_each(NOON + 30 * MINUTE, NOON + 45 * MINUTE)
    exporter.well()
    exporter.at(hours=10)
    exporter.well()
    exporter.reconcile()
    exporter.check()


def test_a_change_of_window_length_and_format_holds_from_the_next_utc_day(exporter: Exporter) -> None:
    exporter.write_each(NOON, NOON + 16 * HOUR, every_seconds=600)
    exporter.at(minutes=30)
    exporter.well()
    changed = {"EXPORT_WINDOW_SECONDS": "7200", "EXPORT_FORMAT": "csv", "EXPORT_DATE_FORMAT": "%Y-%m-%d"}
    for hours in (2, 9, 12.5, 16):
        exporter.at(hours=hours)
        exporter.well(**changed)
    day = [f"telemetry/device_id=D1/date=2026/02/07/export_{hour}0000.parquet" for hour in range(12, 24)]
    next_day = [f"telemetry/device_id=D1/date=2026-02-08/export_{hour}0000.csv" for hour in ("00", "02")]
    assert exporter.keys == sorted(day + next_day)
    exporter.check()
    assert [each["window_seconds"] for each in exporter.layout["layouts"]] == [3600, 7200]


def test_a_change_that_is_taken_back_before_midnight_never_holds(exporter: Exporter) -> None:
    exporter.write(NOON)
    exporter.at(minutes=1)
    exporter.well()
    exporter.well(EXPORT_WINDOW_SECONDS="900")
    assert [each["window_seconds"] for each in exporter.layout["layouts"]] == [3600, 900]
    exporter.well()
    exporter.write_each(NOON + 12 * HOUR, NOON + 13 * HOUR, every_seconds=600)
    exporter.at(hours=13)
    exporter.well()
    assert len(exporter.keys) == 2
    assert [each["window_seconds"] for each in exporter.layout["layouts"]] == [3600]
