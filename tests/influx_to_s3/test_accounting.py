"""Nothing goes without a word: wrong settings, points without a place in any window, and devices that do not exist."""

from datetime import UTC, datetime

import pytest

from app.core.runs import Outcome, Stop, execute
from app.influx_to_s3.job import NAME
from exporter import HOUR, MINUTE, NOON, Exporter, Silent, ns
from exports import content, exported, table


def test_a_source_without_anything_is_no_fault(exporter_of_either: Exporter) -> None:
    exporter = exporter_of_either
    exporter.well()
    exporter.well(DEVICE_IDS="D1")


def test_a_tag_that_no_point_has_fails_the_run_and_names_the_tags(exporter_of_either: Exporter) -> None:
    exporter = exporter_of_either
    exporter.influx.write(f"device_telemetry,host=D1,rack=2 voltage=1 {ns(NOON)}")
    exporter.at(minutes=1)
    run = exporter.run()
    assert run.outcome is Outcome.FAILED
    assert "no point of measurement 'device_telemetry' has the tag 'device_id'" in run.error
    assert "tags are: host, rack" in run.hint
    exporter.well(INFLUXDB_DEVICE_TAG="host")
    assert [device for device, *_ in exported(exporter.store)] == ["D1"]


def test_listed_devices_of_which_none_exists_fail_the_run_and_the_cursor_stays(exporter_of_either: Exporter) -> None:
    exporter = exporter_of_either
    exporter.write(NOON)
    exporter.at(hours=5)
    run = exporter.run(DEVICE_IDS="X1,X2")
    assert run.outcome is Outcome.FAILED
    assert "none of the devices in DEVICE_IDS (X1, X2)" in run.error
    assert "devices are: D1" in run.hint
    exporter.well(DEVICE_IDS="D1", EXPORT_START="2026-02-07T12:00:00Z")  # nothing was found yet, so it still counts
    assert [device for device, *_ in exported(exporter.store)] == ["D1"]


def test_a_listed_device_that_does_not_exist_is_named_and_the_others_are_exported(exporter: Exporter) -> None:
    exporter.write(NOON)
    exporter.write(NOON, "D\\,2")
    exporter.at(minutes=1)
    run = exporter.run(DEVICE_IDS='D1,"D,2",D3')
    assert run.outcome is Outcome.PARTIAL
    [failure] = run.report.failures
    assert failure.partition == "D3"
    assert "D1" in failure.hint
    assert sorted(device for device, *_ in exported(exporter.store)) == ["D,2", "D1"]


def test_points_of_the_future_wait_for_their_window(exporter_of_either: Exporter) -> None:
    exporter = exporter_of_either
    exporter.write(NOON)
    exporter.write(NOON + 50 * HOUR, fields="voltage=1,current=2")
    exporter.at(minutes=1)
    run = exporter.well()
    assert (run.report.ledger.total.new, run.report.ledger.total.waiting) == (3, 2)
    exporter.at(hours=51)
    assert exporter.well().report.ledger.total.waiting == 0
    exporter.check()


def test_points_of_a_clock_that_was_never_set_are_set_aside_with_their_day(exporter_of_either: Exporter) -> None:
    exporter = exporter_of_either
    exporter.write(NOON)
    never = datetime(1970, 1, 1, 0, 0, 17, tzinfo=UTC)
    exporter.write(never, fields="voltage=1,current=2")
    exporter.at(minutes=1)
    run = exporter.run()
    assert run.outcome is Outcome.PARTIAL
    assert "timestamp before the year 2000" in run.error
    [aside] = run.report.ledger.set_aside
    assert (aside.number, aside.new) == (2, 2)
    [kept] = [info.key for info in exporter.store.list("telemetry/_set_aside/")]
    line = "device_telemetry,device_id=D1,device_type=pump,location=Plant-A current=2.0,voltage=1.0 17000000000"
    assert content(exporter.store, kept).decode() == f"{line}\n"
    assert exporter.run().outcome is Outcome.OK
    exporter.check(since_ns=ns(NOON))


def test_points_of_many_days_of_an_unset_clock_are_all_kept_over_several_runs(exporter_of_either: Exporter) -> None:
    exporter = exporter_of_either
    exporter.keep()
    exporter.write(NOON)
    for day in range(70):
        exporter.write(datetime(1970, 1, 1, tzinfo=UTC) + day * 24 * HOUR, fields='voltage=1,note=""')
    exporter.at(minutes=1)
    first = exporter.run().report.ledger
    assert (first.total.set_aside, first.total.waiting, first.gap) == (128, 12, 0)
    second = exporter.run().report.ledger
    assert (second.total.set_aside, second.total.waiting, second.gap) == (140, 0, 0)
    assert [(one.number, one.new) for one in second.set_aside] == [(140, 12)]
    kept = [info.key for info in exporter.store.list("telemetry/_set_aside/")]
    lines = [line for key in kept for line in content(exporter.store, key).decode().splitlines()]
    assert len(kept) == 70
    assert sum('note=""' in line for line in lines) == 70
    assert sum("voltage=1" in line for line in lines) == 70
    assert exporter.run().outcome is Outcome.OK


def test_the_days_of_unset_clocks_are_looked_for_once_and_not_for_each_device(exporter: Exporter) -> None:
    exporter.keep()
    for number in range(20):
        exporter.write(datetime(1970, 1, 1 + number % 2, tzinfo=UTC), f"D{number}", "voltage=1")
    exporter.at(minutes=1)
    assert exporter.run(dry_run=True).report.ledger.total.set_aside == 20
    assert not list(exporter.store.list("telemetry/_set_aside/"))
    exporter.influx.forget_queries()
    assert exporter.run().report.ledger.total.set_aside == 20
    assert len(list(exporter.store.list("telemetry/_set_aside/"))) == 20
    assert sum("count()" in query.text for query in exporter.influx.queries) < 50
    exporter.influx.forget_queries()
    assert exporter.run().outcome is Outcome.OK
    assert sum("count()" in query.text for query in exporter.influx.queries) == 2


def test_an_export_that_begins_before_2000_exports_old_points_and_sets_none_of_them_aside(exporter: Exporter) -> None:
    exporter.environ = {"EXPORT_START": "1999-12-30T00:00:00Z", "EXPORT_WINDOW_SECONDS": "86400"}
    exporter.write(datetime(1999, 12, 31, 12, tzinfo=UTC))
    exporter.write(datetime(2000, 1, 5, 12, tzinfo=UTC))
    exporter.now = datetime(2000, 1, 20, tzinfo=UTC)
    total = exporter.well().report.ledger.total  # which passes the year 2000
    assert (total.new, total.set_aside) == (6, 0)
    assert exporter.well().report.ledger.total.set_aside == 0


def test_a_device_that_failed_before_is_said_again_while_it_waits_and_delays_nobody(exporter: Exporter) -> None:
    exporter.keep()
    for device in ("D1", "D2"):
        exporter.write_each(NOON, NOON + 10 * MINUTE, device=device)
    exporter.at(minutes=10)
    (exporter.folder / "objects" / "telemetry").mkdir(parents=True)
    blocked = exporter.folder / "objects" / "telemetry" / "device_id=D1"
    blocked.write_text("a file in the way of the folder")
    first = exporter.run()
    assert (first.outcome, first.report.failures[0].partition) == (Outcome.PARTIAL, "D1")
    again = exporter.run()
    assert [failure.partition for failure in again.report.failures] == ["D1"]
    assert again.report.ledger.partitions["D1"].waiting > 0
    blocked.unlink()
    exporter.at(minutes=12)
    exporter.well()
    exporter.check()


def test_a_run_that_is_stopped_in_the_middle_records_what_it_wrote(exporter: Exporter) -> None:
    for device in ("D1", "D2", "D3"):
        exporter.write_each(NOON - 2 * HOUR, NOON, 600, device=device)
    exporter.environ = {"LOOKBACK_HOURS": "12"}
    exporter.at(hours=2)
    stop = Stop()

    def ask(key: str) -> None:
        """While the first window of the second device is written."""
        if "device_id=D2" in key:
            stop.ask("a deployment")

    exporter.store.before_put = ask
    job = next(job for job in exporter.export(EXPORT_CONCURRENCY="1").jobs if job.name == NAME)
    run = execute(job, exporter._services(), stop, Silent())  # noqa: SLF001 - the exporter's own services
    assert run is not None
    written = exported(exporter.store)
    assert (run.outcome, run.report.ledger.closes) == (Outcome.STOPPED, True)
    assert run.report.rows == len(written) > 0
    exporter.store.before_put = lambda _key: None
    rest = exporter.well()
    assert run.report.rows + rest.report.rows == len(exported(exporter.store)) == 36


def test_the_unit_and_the_type_of_a_column_change_from_the_next_day_on(exporter: Exporter) -> None:
    exporter.write(NOON, fields="count=1i")
    exporter.at(minutes=1)
    exporter.well()
    wanted = {"EXPORT_COLUMN_TYPES": "count=double", "EXPORT_TIMESTAMP_UNIT": "ns"}
    exporter.at(minutes=2)
    exporter.well(**wanted)
    types = exporter.layout["columns"][0]["types"]
    assert types == [{"from": "1970-01-01", "type": "integer"}, {"from": "2026-02-08", "type": "double"}]
    assert [each["timestamp_unit"] for each in exporter.layout["layouts"]] == ["us", "ns"]
    exporter.write(NOON + 13 * HOUR, fields="count=2i")
    exporter.at(hours=14)
    exporter.well(**wanted)
    today, tomorrow = (table(exporter.store, key).schema for key in exporter.keys)
    assert [str(each.field("count").type) for each in (today, tomorrow)] == ["int64", "double"]
    assert [str(each.field("timestamp").type) for each in (today, tomorrow)] == [
        "timestamp[us, tz=UTC]",
        "timestamp[ns, tz=UTC]",
    ]


def test_a_start_that_is_set_earlier_later_on_is_told_to_have_no_effect(
    exporter: Exporter, caplog: pytest.LogCaptureFixture
) -> None:
    exporter.write(NOON - 10 * HOUR)
    exporter.write(NOON)
    exporter.at(minutes=1)
    exporter.well()
    exporter.well(EXPORT_START="2026-02-07T00:00:00Z")
    assert "EXPORT_START=2026-02-07T00:00:00Z is earlier than the first start of this installation" in caplog.text
    assert len(exporter.keys) == 1
