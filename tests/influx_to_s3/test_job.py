"""The export job end to end: names, late points, empty and future windows, outages, reconcile, backfill, dry runs."""

import io
from datetime import UTC, datetime, timedelta
from pathlib import Path

import duckdb
import pandas as pd
import pytest

from app.core.runs import Outcome
from app.core.window import next_midnight
from app.demo.devices import Device, samples
from app.demo.faults import Cut, ErrorTable
from app.influx_to_s3.job import NAME, RECONCILE
from app.stores.local_directory import LocalDirectory
from app.stores.objects import Put
from exporter import NOON, Exporter, exporter_on, ns
from exports import content, exported, rows_of, stored, table
from influxdb1 import InfluxDB1

HOUR = timedelta(hours=1)
MINUTE = timedelta(minutes=1)


def test_an_hour_of_a_device_is_one_object_under_the_documented_name(exporter: Exporter) -> None:
    exporter.write_each(NOON, NOON + HOUR)
    exporter.at(hours=1)
    exporter.well()
    assert exporter.keys == ["telemetry/device_id=D1/date=2026/02/07/export_120000.parquet"]
    exporter.check()


def test_the_date_and_the_prefix_may_be_written_otherwise(exporter: Exporter) -> None:
    exporter.write(NOON)
    exporter.at(minutes=5)
    exporter.well(EXPORT_DATE_FORMAT="%Y-%m-%d", S3_PREFIX="lake/raw/")
    keys = [info.key for info in exporter.store.list("lake/")]
    assert keys == ["lake/raw/device_id=D1/date=2026-02-07/export_120000.parquet"]


def test_the_object_says_what_it_is(exporter: Exporter) -> None:
    rows = exporter.write_each(NOON, NOON + 10 * MINUTE)
    exporter.at(minutes=10)
    exporter.well(EXPORT_WINDOW_SECONDS="900")
    [key] = exporter.keys
    info = exporter.store.head(key)
    assert info is not None
    expected = {"pipeline": NAME, "window": "2026-02-07T12:00:00Z/2026-02-07T12:15:00Z", "rows": str(rows)}
    version = info.metadata["app-version"]
    assert info.metadata == {**expected, "digest": info.metadata["digest"], "app-version": version}
    inside = {name.decode(): value.decode() for name, value in table(exporter.store, key).schema.metadata.items()}
    given = {**info.metadata, "partition": "D1"}
    assert {name: inside[f"headwater.{name}"] for name in given} == given
    assert version
    assert info.content_type == "application/vnd.apache.parquet"


def test_pandas_and_duckdb_read_the_documented_columns_and_types(exporter: Exporter) -> None:
    exporter.write(NOON, fields='voltage=230i,current=2i,power=414i,soc=80i,mode="eco"')
    exporter.write(NOON + MINUTE, fields="voltage=231i", location="")
    exporter.at(minutes=5)
    exporter.well()
    [key] = exporter.keys
    frame = pd.read_parquet(io.BytesIO(content(exporter.store, key)))
    assert [(name, str(kind)) for name, kind in frame.dtypes.items()] == [
        ("timestamp", "datetime64[ns, UTC]"),
        ("device_id", "str"),
        ("device_type", "str"),
        ("location", "str"),
        ("voltage", "float64"),
        ("current", "float64"),
        ("power", "float64"),
        ("temperature", "float64"),
        ("hour", "int32"),
        ("day_of_week", "int32"),
        ("is_weekend", "bool"),
        ("power_factor", "float64"),
        ("mode", "str"),
        ("soc", "float64"),  # an integer column with a gap, as pandas shows it
    ]
    assert frame["location"].tolist() == ["Plant-A", "unknown"]
    assert frame["power_factor"].tolist()[0] == 0.9
    path = exporter.folder / "objects" / key
    with duckdb.connect() as database:
        database.execute("SET TimeZone = 'UTC'")
        found = database.execute(
            "SELECT epoch_ns(timestamp), hour, day_of_week, is_weekend FROM read_parquet(?, hive_partitioning = false)",
            [str(path)],
        ).fetchall()
    assert found == [(at, 12, 5, True) for at in (1_770_465_600 * 10**9, 1_770_465_660 * 10**9)]


def test_nanoseconds_survive_and_are_rows_of_their_own(exporter: Exporter) -> None:
    base = 1_770_465_600 * 10**9
    for offset in (0, 1, 2, 999_999_999):
        exporter.influx.write(f"device_telemetry,device_id=D1 voltage={offset} {base + offset}")
    exporter.at(minutes=1)
    exporter.well()
    assert [row["timestamp"] - base for row in rows_of(exporter.store, exporter.keys[0])] == [0, 1, 2, 999_999_999]
    exporter.check()


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


def test_an_unchanged_window_is_not_written_again(exporter: Exporter) -> None:
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
    exporter.at(hours=2, minutes=1)
    exporter.well()
    assert exporter.store.puts == []
    assert exporter.cursor == NOON + HOUR
    [record] = exporter.state.checkpoints.records(NAME, "D1", NOON, NOON + HOUR)
    assert record.closed


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


def test_hostile_device_ids_fail_alone_and_the_others_are_exported(exporter: Exporter) -> None:
    hostile = "../../x"
    for device in ("D1", hostile, "D2"):
        exporter.write(NOON, device)
    exporter.at(minutes=1)
    for devices in (f"D1,{hostile},D2", "*"):
        run = exporter.run(DEVICE_IDS=devices)
        assert run.outcome is Outcome.PARTIAL
        [failure] = run.report.failures
        assert failure.partition == hostile
        assert "../../x" in run.error
        assert failure.hint
    assert sorted({device for device, _ in exported(exporter.store)}) == ["D1", "D2"]
    assert sorted(path.name for path in exporter.folder.iterdir()) == ["data", "objects"]


def test_only_the_listed_devices_are_exported(exporter: Exporter) -> None:
    for device in ("D1", "D2", "D3"):
        exporter.write(NOON, device)
    exporter.at(minutes=1)
    exporter.well(DEVICE_IDS="D1, D3")
    assert sorted({device for device, _ in exported(exporter.store)}) == ["D1", "D3"]


STRANGE = ['D"1', "D\\", "${x}", "a b,c=d", "é€😀", "'; DROP", "%2F", "x" * 200, "..", "a/b"]


def test_strange_device_ids_are_bound_and_named_one_to_one(exporter: Exporter) -> None:
    for number, device in enumerate(STRANGE):
        exporter.influx.points.extend(
            ("device_telemetry", (("device_id", device),)),
            [1_770_465_600 * 10**9 + number],
            {"voltage": [float(number)]},
        )
    exporter.at(minutes=1)
    run = exporter.run()
    assert {failure.partition for failure in run.report.failures} == {"..", "a/b"}
    found = {device: fields["voltage"] for (device, _), fields in exported(exporter.store).items()}
    assert found == {device: float(n) for n, device in enumerate(STRANGE) if device not in ("..", "a/b")}


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
        assert "cannot be reached" in run.error
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
    run = exporter.well()
    assert run.report.windows == 0
    assert exporter.cursor == NOON + 29 * HOUR
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


def test_rows_that_the_source_forgot_stay_in_the_object(exporter: Exporter) -> None:
    exporter.write_each(NOON, NOON + 30 * MINUTE)
    exporter.at(minutes=30)
    exporter.well()
    before = stored(exporter.influx.points)
    exporter.influx.points._series.clear()  # noqa: SLF001 - the simulator knows no retention
    exporter.write_each(NOON + 20 * MINUTE, NOON + 40 * MINUTE)
    exporter.at(minutes=40)
    exporter.well()
    assert exported(exporter.store) == {**before, **stored(exporter.influx.points)}
    exporter.at(hours=3)
    exporter.well()
    assert exported(exporter.store) == {**before, **stored(exporter.influx.points)}


def test_objects_may_shrink_when_that_is_allowed(exporter: Exporter) -> None:
    exporter.environ["EXPORT_ALLOW_SHRINK"] = "true"
    exporter.write_each(NOON, NOON + 30 * MINUTE)
    exporter.at(minutes=30)
    exporter.well()
    exporter.influx.points._series.clear()  # noqa: SLF001 - the simulator knows no retention
    exporter.write(NOON + 20 * MINUTE)
    exporter.well()
    exporter.check()
    exporter.influx.points._series.clear()  # noqa: SLF001 - as above
    exporter.write(NOON + 2 * HOUR)
    exporter.at(hours=4)
    exporter.well()
    exporter.check()


def test_csv_objects_hold_the_same_rows_and_keep_what_the_source_forgot(exporter: Exporter) -> None:
    exporter.environ["EXPORT_FORMAT"] = "csv"
    text = 'voltage=230,note="a,\\"b\\"\nc",count=7i,on=true,name="007"'
    exporter.write(NOON, fields=text)
    exporter.write_each(NOON + MINUTE, NOON + 30 * MINUTE)
    exporter.at(minutes=30)
    exporter.well()
    [key] = exporter.keys
    assert key.endswith("export_120000.csv")
    [first, *_] = content(exporter.store, key).decode().splitlines()
    assert first == (
        "timestamp,device_id,device_type,location,voltage,current,power,temperature,"
        "hour,day_of_week,is_weekend,power_factor,count,name,note,on"
    )
    assert b"2026-02-07T12:00:00.000000000Z" in content(exporter.store, key)
    held = rows_of(exporter.store, key)
    exporter.influx.points._series.clear()  # noqa: SLF001 - the simulator knows no retention
    exporter.write(NOON + 31 * MINUTE)
    exporter.at(minutes=32)
    exporter.well()
    assert rows_of(exporter.store, key)[:-1] == held
    assert b'"007"' in content(exporter.store, key)


@pytest.mark.slow
def test_large_csv_objects_with_sparse_columns_are_united_too(exporter: Exporter) -> None:
    exporter.environ |= {"EXPORT_FORMAT": "csv", "EXPORT_BATCH_SIZE": "100000"}
    rows = 30_000  # more than one block of the CSV reader
    base = 1_770_465_600 * 10**9
    key = ("device_telemetry", (("device_id", "D1"),))
    exporter.influx.points.extend(
        key, [base + n * 10**8 for n in range(rows)], {"voltage": [n / 7 for n in range(rows)]}
    )
    exporter.influx.write(f'device_telemetry,device_id=D1 note="x",level=1.5 {base + rows * 10**8}')
    exporter.influx.write(f"device_telemetry,device_id=D1 level=2 {base + 5}")
    exporter.at(hours=1)
    exporter.well()
    before = stored(exporter.influx.points)
    exporter.influx.points._series.clear()  # noqa: SLF001 - the simulator knows no retention
    exporter.write(NOON + 59 * MINUTE)
    exporter.well()
    assert exported(exporter.store) == {**before, **stored(exporter.influx.points)}


def test_a_damaged_object_fails_its_device_alone_and_is_named(exporter: Exporter) -> None:
    for device in ("D1", "D2"):
        exporter.write_each(NOON, NOON + 10 * MINUTE, device=device)
    exporter.at(minutes=10)
    exporter.well()
    exporter.at(hours=2, minutes=1)
    exporter.well()
    exporter.store.put = exporter.store.inner.put  # type: ignore[method-assign]
    damaged = exporter.keys[0]
    etag = exporter.store.put(damaged, io.BytesIO(b"PAR1 and then nothing"), Put("x"))
    records = exporter.state.checkpoints.records(NAME, "D1", NOON, NOON + HOUR)
    with exporter.state.database.transaction() as session:
        session.run("UPDATE export_windows SET version = :etag WHERE device_id = 'D1'", etag=etag)
    assert len(records) == 1
    for device in ("D1", "D2"):
        exporter.write(NOON + timedelta(seconds=1), device)
    run = exporter.run(RECONCILE)
    assert run.outcome is Outcome.PARTIAL
    assert (run.report.failures[0].partition, run.report.late_rows) == ("D1", 1)
    assert damaged in run.error


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
    assert [one.window_seconds for one in exporter.state.layouts.layouts(NAME)] == [3600, 7200]


def test_a_change_that_is_taken_back_before_midnight_never_holds(exporter: Exporter) -> None:
    exporter.now = datetime.now(UTC)  # what is still to come is for the state database to say, by its own clock
    exporter.write(exporter.now - MINUTE)
    exporter.well()
    exporter.well(EXPORT_WINDOW_SECONDS="900")
    exporter.well()
    midnight = next_midnight(exporter.now)
    exporter.write_each(midnight, midnight + HOUR, every_seconds=600)
    exporter.now = midnight + HOUR
    exporter.well()
    assert len(exporter.keys) == 2
    assert exporter.state.layouts.layouts(NAME)[-1].window_seconds == 3600


def test_an_unknown_measurement_is_an_error_that_names_the_known_ones(exporter: Exporter) -> None:
    exporter.write(NOON)
    exporter.at(minutes=1)
    run = exporter.run(INFLUXDB_MEASUREMENT="telemetri")
    assert run.outcome is Outcome.FAILED
    assert "'telemetri'" in run.error
    assert "device_telemetry" in run.hint


def test_an_unknown_measurement_is_an_error_for_listed_devices_too(exporter: Exporter) -> None:
    exporter.write(NOON)
    exporter.at(minutes=1)
    run = exporter.run(INFLUXDB_MEASUREMENT="telemetri", DEVICE_IDS="D1")
    assert run.outcome is Outcome.FAILED
    assert "device_telemetry" in run.hint


def test_without_a_source_the_jobs_say_what_to_set(exporter: Exporter) -> None:
    assert [job.off for job in exporter.export(INFLUXDB_URL="").jobs] == ["off: set INFLUXDB_URL"] * 2


def test_points_without_a_device_are_counted_in_a_warning(exporter: Exporter, caplog: pytest.LogCaptureFixture) -> None:
    exporter.write(NOON)
    exporter.influx.write(f"device_telemetry,location=A voltage=1,power=2 {1_770_465_600 * 10**9}")
    exporter.at(minutes=1)
    exporter.well()
    assert "1 points of device_telemetry have no device_id" in caplog.text
    exporter.check()


def test_tag_sets_of_one_device_make_one_object_and_one_row_an_instant(exporter: Exporter) -> None:
    exporter.write(NOON, fields="voltage=1", firmware="1")
    exporter.write(NOON, fields="power=2", firmware="2")
    exporter.write(NOON + MINUTE, fields="voltage=3", firmware="2")
    exporter.at(minutes=5)
    exporter.well()
    rows = rows_of(exporter.store, exporter.keys[0])
    assert [(row["voltage"], row["power"]) for row in rows] == [(1.0, 2.0), (3.0, None)]


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


def test_flux_influxql_and_a_real_influxdb_1_write_the_same_objects(
    exporter: Exporter, influxdb1: InfluxDB1, tmp_path: Path
) -> None:
    device = Device(3, seed=1)
    lines = "\n".join(sample.line(device.series) for sample in samples(device, ns(NOON), ns(NOON + HOUR)))
    exporter.influx.write(lines)
    database = influxdb1.new_database()
    influxdb1.write(database, lines)
    exporter.at(hours=3)
    written = []
    for number, environ in enumerate(
        (
            {},
            {"INFLUXDB_API": "influxql", "INFLUXDB_DATABASE": exporter.influx.bucket},
            {"INFLUXDB_API": "influxql", "INFLUXDB_DATABASE": database, "INFLUXDB_URL": influxdb1.url},
        )
    ):
        for one in exporter_on(LocalDirectory(tmp_path / f"objects{number}"), tmp_path / f"{number}"):
            one.url, one.environ = exporter.url, environ
            one.at(hours=1)
            one.well()
            one.at(hours=3)
            one.well()
            written.append({key: content(one.store, key) for key in one.keys})
    assert list(written[0]) == ["telemetry/device_id=D3/date=2026/02/07/export_120000.parquet"]
    assert written[1:] == [written[0], written[0]]


@pytest.mark.parametrize("fault", [ErrorTable(3), Cut(3, hidden=True)], ids=str)
@pytest.mark.parametrize("api", ["flux", "influxql"])
def test_a_window_whose_answer_fails_is_not_exported_and_made_up_for(
    exporter: Exporter, fault: ErrorTable | Cut, api: str
) -> None:
    exporter.environ |= {"INFLUXDB_API": api, "INFLUXDB_DATABASE": exporter.influx.bucket}
    for device in ("D1", "D2"):
        exporter.write_each(NOON, NOON + 10 * MINUTE, device=device)
    exporter.at(minutes=10)
    rows = "pivot" if api == "flux" else "::tag"
    exporter.influx.faults.add(fault, times=4, when=lambda text: "D1" in text and rows in text)
    run = exporter.run()
    assert run.outcome is Outcome.PARTIAL
    assert [failure.partition for failure in run.report.failures] == ["D1"]
    assert {device for device, _ in exported(exporter.store)} == {"D2"}
    exporter.well()
    exporter.check()
    assert list((exporter.folder / "data" / "spool").iterdir()) == []


def test_a_failing_count_fails_the_run_and_moves_nothing(exporter: Exporter) -> None:
    exporter.write_each(NOON, NOON + 10 * MINUTE)
    exporter.at(minutes=10)
    exporter.well()
    exporter.at(hours=5)
    exporter.influx.faults.add(Cut(0, hidden=True, mid_row=False), times=4, when=lambda text: "count" in text)
    assert exporter.run().outcome is Outcome.FAILED
    assert exporter.cursor == NOON - HOUR
    exporter.well()
    exporter.check()


def test_the_longest_device_id_is_exported_or_fails_alone(exporter: Exporter) -> None:
    """A directory takes names of 255 bytes, of which `device_id=` is a part."""
    longest, fits = "x" * 255, "y" * 245
    for device in (longest, fits, "D1"):
        exporter.write(NOON, device)
    exporter.at(minutes=1)
    run = exporter.run()
    assert [failure.partition for failure in run.report.failures] == [longest]
    assert {device for device, _ in exported(exporter.store)} == {fits, "D1"}


def test_an_object_store_that_is_full_or_away_fails_the_run_with_a_hint(exporter: Exporter) -> None:
    exporter.write(NOON)
    exporter.at(minutes=1)
    (exporter.folder / "objects").write_text("a file where the folder should be")
    run = exporter.run()
    assert run.outcome is Outcome.FAILED
    assert run.hint
