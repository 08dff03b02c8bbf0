"""The export job and what it is given: which devices, and what a failing one, wrong settings or a faulty source do."""

import io
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from app.core.runs import Outcome
from app.db.state import open_state
from app.influx_to_s3.job import NAME, RECONCILE
from app.object_store.port import PutRequest
from exporter import HOUR, MINUTE, NOON, Exporter, ns
from exports import content, exported
from simulators.influx import Cut, ErrorTable, Refuse


def test_devices_whose_id_cannot_name_an_object_are_set_aside_once_and_the_others_are_exported(
    exporter: Exporter,
) -> None:
    hostile = "../../x"
    for device in ("D1", hostile, "D2"):
        exporter.write(NOON, device)
    exporter.at(minutes=1)
    run = exporter.run(DEVICE_IDS=f"D1,{hostile},D2")
    assert run.outcome is Outcome.PARTIAL
    assert (run.report.failures, run.report.ledger.closes) == ((), True)
    [aside] = run.report.ledger.set_aside
    assert (aside.number, aside.new, aside.sample) == (3, 3, "device id '../../x'")
    assert "'../../x'" in run.error
    exporter.write(NOON + timedelta(seconds=1), hostile)
    again = exporter.run()
    assert (again.outcome, again.report.ledger.set_aside[0].number) == (Outcome.OK, 6)
    [kept] = [info.key for info in exporter.store.list("telemetry/_set_aside/")]
    lines = content(exporter.store, kept).decode().splitlines()
    assert len(lines) == 2
    assert "device_id=../../x" in lines[0]
    assert sorted({device for device, *_ in exported(exporter.store)}) == ["D1", "D2"]
    assert sorted(path.name for path in exporter.folder.iterdir()) == ["data", "objects"]


def test_points_without_the_tag_that_are_too_many_for_one_query_are_set_aside_in_parts(exporter: Exporter) -> None:
    for minute in range(60):
        exporter.influx.write(f"device_telemetry,host=x voltage={minute} {ns(NOON + minute * MINUTE)}")
    exporter.write(NOON)
    exporter.at(hours=1)
    exporter.influx.faults.add(
        Refuse(400, "memory allocation limit reached"), when=lambda text: "pivot" in text and "not exists" in text
    )
    run = exporter.run()
    assert (run.report.failures, run.report.ledger.total.set_aside) == ((), 60)
    assert len(exporter.influx.faults) == 0
    [kept] = [info.key for info in exporter.store.list("telemetry/_set_aside/")]
    assert len(content(exporter.store, kept).splitlines()) == 60


def test_only_the_listed_devices_are_exported(exporter: Exporter) -> None:
    for device in ("D1", "D2", "D3"):
        exporter.write(NOON, device)
    exporter.at(minutes=1)
    exporter.well(DEVICE_IDS="D1, D3")
    assert sorted({device for device, *_ in exported(exporter.store)}) == ["D1", "D3"]


def test_points_outside_all_windows_count_only_for_the_listed_devices(exporter: Exporter) -> None:
    never = datetime(1970, 1, 1, 0, 0, 17, tzinfo=UTC)
    for device in ("D1", "D2"):
        exporter.write(NOON, device)
        exporter.write(NOON + 50 * HOUR, device, "voltage=1")
    exporter.write(never, "D2")
    exporter.at(minutes=1)
    assert exporter.well(DEVICE_IDS="D1").report.ledger.total.waiting == 1
    assert not list(exporter.store.list("telemetry/_set_aside/"))
    assert exporter.run().outcome is Outcome.PARTIAL  # all devices: what D2 wrote before its clock was set is kept
    assert list(exporter.store.list("telemetry/_set_aside/"))


def test_a_device_that_leaves_the_list_stops_and_goes_on_where_it_stopped_when_it_comes_back(
    exporter: Exporter,
) -> None:
    exporter.environ = {"EXPORT_GRACE_SECONDS": "0"}
    for device in ("D1", "D2"):
        exporter.write(NOON, device)
    exporter.at(minutes=1)
    exporter.well()
    for hours in range(1, 5):
        for device in ("D1", "D2"):
            exporter.write(NOON + hours * HOUR, device)
    exporter.at(hours=5)
    exporter.well(DEVICE_IDS="D1")
    exporter.reconcile(DEVICE_IDS="D1")
    exporter.backfill(NOON, NOON + 5 * HOUR, DEVICE_IDS="D1")
    assert Counter(device for device, *_ in exported(exporter.store)) == {"D1": 5, "D2": 1}
    assert exporter.export(DEVICE_IDS="D1").chart.partitions() == ["D1"]
    exporter.well()
    exporter.check()


STRANGE = ['D"1', "D\\", "${x}", "a b,c=d", "é€😀", "'; DROP", "%2F", "x" * 200, "..", "a/b"]
REFUSED = {"D\\", "..", "a/b"}


def test_strange_device_ids_are_bound_and_named_one_to_one(exporter: Exporter) -> None:
    for number, device in enumerate(STRANGE):
        exporter.influx.points.extend(
            ("device_telemetry", (("device_id", device),)),
            [1_770_465_600 * 10**9 + number],
            {"voltage": [float(number)]},
        )
    exporter.at(minutes=1)
    run = exporter.run()
    assert (run.outcome, run.report.failures) == (Outcome.PARTIAL, ())
    assert [(aside.number, aside.new) for aside in run.report.ledger.set_aside] == [(len(REFUSED), len(REFUSED))]
    found = {device: fields["voltage"] for (device, *_), fields in exported(exporter.store).items()}
    assert found == {device: float(n) for n, device in enumerate(STRANGE) if device not in REFUSED}


def test_a_damaged_object_fails_its_device_alone_and_is_named(exporter: Exporter) -> None:
    for device in ("D1", "D2"):
        exporter.write_each(NOON, NOON + 10 * MINUTE, device=device)
    exporter.at(minutes=10)
    exporter.well()
    exporter.at(hours=2, minutes=1)
    exporter.well()
    exporter.store.put = exporter.store.inner.put  # type: ignore[method-assign]
    damaged = exporter.keys[0]
    etag = exporter.store.put(damaged, io.BytesIO(b"PAR1 and then nothing"), PutRequest("x"))
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
    assert [job.off for job in exporter.export(INFLUXDB_URL="").jobs] == ["set INFLUXDB_URL"] * 2


def test_points_without_a_device_are_set_aside_as_they_are(exporter: Exporter) -> None:
    exporter.write(NOON)
    point = f"device_telemetry,location=A power=2.0,voltage=1.0 {1_770_465_600 * 10**9}"
    exporter.influx.write(point)
    exporter.at(minutes=1)
    run = exporter.run()
    assert run.outcome is Outcome.PARTIAL
    assert run.error == f"2 values set aside: no device tag, for example {point}"
    [kept] = [info.key for info in exporter.store.list("telemetry/_set_aside/")]
    assert content(exporter.store, kept).decode() == f"{point}\n"
    exporter.check()
    again = exporter.well()
    assert [(aside.number, aside.new) for aside in again.report.ledger.set_aside] == [(2, 0)]
    exporter.influx.write(f"device_telemetry power=3 {1_770_465_601 * 10**9}")
    [aside] = exporter.run().report.ledger.set_aside
    assert (aside.number, aside.new) == (3, 1)


@pytest.mark.parametrize("fault", [ErrorTable(3), Cut(3, hidden=True)], ids=str)
def test_a_window_whose_answer_fails_is_not_exported_and_made_up_for(
    exporter_of_either: Exporter, fault: ErrorTable | Cut
) -> None:
    exporter = exporter_of_either
    for device in ("D1", "D2"):
        exporter.write_each(NOON, NOON + 10 * MINUTE, device=device)
    exporter.at(minutes=10)
    exporter.influx.faults.add(
        fault, times=8, when=lambda text: "D1" in text and ("pivot" in text or "::tag = " in text)
    )
    run = exporter.run()
    assert run.outcome is Outcome.PARTIAL
    assert [failure.partition for failure in run.report.failures] == ["D1"]
    assert {device for device, *_ in exported(exporter.store)} == {"D2"}
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


def test_a_device_id_too_long_for_a_directory_name_is_set_aside_and_no_job_fails_on_it(exporter: Exporter) -> None:
    """A directory's name has at most 255 bytes, of which `device_id=` takes ten."""
    longest = "x" * 245
    for device in ("D1", longest, longest + "x", "€" * 85):
        exporter.write(NOON, device)
    exporter.at(minutes=1)
    run = exporter.run()
    assert (run.report.failures, run.report.ledger.closes) == ((), True)
    assert [(aside.number, aside.new) for aside in run.report.ledger.set_aside] == [(6, 6)]
    assert sorted({device for device, *_ in exported(exporter.store)}) == ["D1", longest]
    exporter.at(hours=3)
    exporter.well()
    exporter.reconcile()
    exporter.backfill(NOON, NOON + HOUR)


def test_an_object_store_that_is_full_or_away_fails_the_run_with_a_hint(exporter: Exporter) -> None:
    exporter.write(NOON)
    exporter.at(minutes=1)
    (exporter.folder / "objects").write_text("a file where the folder should be")
    run = exporter.run()
    assert run.outcome is Outcome.FAILED
    assert run.hint


DAY = timedelta(days=1)
WEEKS = {"EXPORT_WINDOW_SECONDS": "900", "LOOKBACK_HOURS": "480", "EXPORT_GRACE_SECONDS": "300"}  # 1,920 windows


def test_after_a_clock_was_weeks_ahead_the_next_run_brings_what_comes_now(exporter: Exporter) -> None:
    exporter.environ = WEEKS
    exporter.write(NOON - 19 * DAY)
    exporter.write(NOON - HOUR)
    exporter.keep()  # one process, as a daemon that nobody restarts
    exporter.well()
    exporter.at(hours=40 * 24)
    exporter.well()
    exporter.at(minutes=30)
    exporter.write(NOON + timedelta(minutes=20))
    run = exporter.run()
    assert (run.outcome, run.report.rows, run.report.ledger.total.waiting) == (Outcome.OK, 1, 0)
    exporter.check()


def test_a_clock_that_was_ahead_at_the_first_start_delays_nothing(exporter: Exporter) -> None:
    exporter.write(NOON)
    exporter.at(hours=40 * 24)
    exporter.run()
    assert exporter.layout["first_start"] > f"{NOON:%Y-%m-%d}"
    exporter.at(minutes=1)
    exporter.well()
    exporter.check()
    first_start = exporter.layout["first_start"]
    exporter.at(hours=-24)  # and one that is behind later moves nothing
    exporter.run()
    assert exporter.layout["first_start"] == first_start


def test_a_run_takes_over_the_part_of_a_process_that_was_killed_while_its_clock_was_ahead(exporter: Exporter) -> None:
    exporter.write(NOON)
    exporter.at(minutes=1)
    held = exporter.state.leases.acquire(f"{NAME}/0", "killed", 0.3)
    assert held
    with exporter.state.database.transaction() as session:
        session.run("UPDATE leases SET expires_at = :at", at=held.expires_at + timedelta(days=40))
    exporter.well()
    exporter.check()


def test_a_lost_state_goes_on_where_the_objects_say_and_reads_nothing_again(exporter: Exporter, tmp_path: Path) -> None:
    exporter.environ = WEEKS
    for days in range(19, 0, -1):
        exporter.write(NOON - days * DAY)
    exporter.well()
    exporter.at(minutes=1)
    exporter.write(NOON - HOUR)
    exporter.well()
    exporter.state = open_state("", tmp_path / "another")
    exporter.store.puts.clear()
    exporter.write(NOON)
    run = exporter.well()
    exporter.state.close()
    assert run.report.rows <= 2
    assert not [key for key in exporter.store.puts if "export_120000" not in key and "export_110000" not in key]
    exporter.check()


def test_a_device_whose_count_did_not_move_is_not_looked_at_and_late_points_come_within_ten_minutes(
    exporter: Exporter,
) -> None:
    exporter.environ = {"LOOKBACK_HOURS": "6"}
    for device in ("D1", "D2"):
        exporter.write(NOON - 3 * HOUR, device)
        exporter.write(NOON - MINUTE, device)
    exporter.keep()
    exporter.well()
    again = exporter.well()
    assert (again.report.rows, again.report.ledger.total.already_there) == (0, 6)
    exporter.at(minutes=5)
    exporter.write(NOON - 3 * HOUR + MINUTE)
    exporter.write(NOON + MINUTE)
    assert exporter.well().report.rows == 1  # the open window is counted each time
    exporter.at(minutes=11)
    assert exporter.well().report.rows == 2
    exporter.check()
