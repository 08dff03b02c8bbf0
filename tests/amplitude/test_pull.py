"""Hours of Amplitude, from the simulator to objects and the warehouse: complete, once, whatever goes wrong between."""

import gzip
import io
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from app.amplitude.job import AmplitudePull
from app.config.environment import load_settings
from app.core.errors import Stopped
from app.core.pipeline import Commit
from pulling import HOUR, START, Landed, landed, pulling
from simulators.amplitude import AmplitudeFault, AmplitudeSimulator, amplitude_event, amplitude_events, generated

MONDAY = datetime.fromisoformat("2026-02-09T00:00:00Z")
TUESDAY = MONDAY + timedelta(days=1)
WEEK = "amplitude/web/2026_week_7.zip"


@pytest.fixture
def world(tmp_path: Path) -> Iterator[tuple[Landed, AmplitudeSimulator]]:
    with pulling(tmp_path) as (made, simulator, _):
        for number in range(0, 60, 4):
            hour = MONDAY + number * HOUR
            simulator.state.events["web", hour] = list(amplitude_events("web", hour, 9))
        yield made, simulator


def expected(simulator: AmplitudeSimulator, until: datetime) -> list[str]:
    held = simulator.state.events.items()
    return sorted(event["uuid"] for (_, hour), events in held if hour + HOUR <= until for event in events)


def uuids(world: Landed) -> list[str]:
    return [str(row["uuid"]) for row in world.rows("events_part")]


def week(world: Landed, key: str = WEEK) -> list[bytes]:
    with zipfile.ZipFile(io.BytesIO(world.objects("amplitude/")[key])) as archive:
        (name,) = archive.namelist()
        return archive.read(name).splitlines()


DUE = START - timedelta(hours=3)  # 06:00 less two and a half hours, in whole hours


def test_closed_hours_land_once_and_the_week_holds_its_whole_days(world: tuple[Landed, AmplitudeSimulator]) -> None:
    made, simulator = world
    pull = made.amplitude(simulator)
    report = pull.to_the_end()
    assert uuids(made) == expected(simulator, DUE)
    assert report.rows == len(uuids(made))
    assert len(week(made)) == 2 * 6 * 9
    assert made.state.checkpoints.cursors("amplitude") == {"web": DUE}
    before, tables = made.objects(), made.tables()
    assert pull.run().rows == 0
    pull.fill(MONDAY, START)
    assert (made.objects(), made.tables()) == (before, tables)
    assert {name: len(rows) > 0 for name, rows in tables.items()} == dict.fromkeys(tables, True)


def test_events_that_the_service_adds_later_are_found_a_day_later(world: tuple[Landed, AmplitudeSimulator]) -> None:
    made, simulator = world
    pull = made.amplitude(simulator)
    pull.to_the_end()
    late = amplitude_event("web", TUESDAY + HOUR, 900)
    simulator.state.events["web", TUESDAY + HOUR] = [late]
    simulator.state.events["web", TUESDAY + 4 * HOUR].append(amplitude_event("web", MONDAY, 901))
    assert pull.run().late_rows == 0
    made.clock.now += timedelta(days=1)
    assert pull.run().late_rows == 2
    assert uuids(made) == expected(simulator, made.clock.now - timedelta(hours=3))
    assert len([line for line in week(made) if late["uuid"].encode() in line]) == 1
    calls = len(simulator.state.asked)
    pull.run()
    assert len(simulator.state.asked) == calls, "a day is looked at again once"


def test_a_week_is_made_from_its_hours_as_they_are_also_after_the_state_was_set_back(
    world: tuple[Landed, AmplitudeSimulator],
) -> None:
    made, simulator = world
    pull = made.amplitude(simulator)
    pull.to_the_end()
    hour, checkpoints = MONDAY + 4 * HOUR, made.state.checkpoints
    before = checkpoints.records("amplitude", "web", hour, hour + HOUR)
    simulator.state.events["web", hour] = list(amplitude_events("web", hour, 30))
    pull.fill(hour, hour + HOUR)
    checkpoints.commit("amplitude", "web", Commit(before), made.context("amplitude").lease)
    made.clock.now += timedelta(days=1)
    assert pull.run().failures == ()
    held = [
        event
        for (_, at), events in simulator.state.events.items()
        if at < TUESDAY + timedelta(days=2)
        for event in events
    ]
    assert len(week(made)) == len(held)
    (after,) = checkpoints.records("amplitude", "web", hour, hour + HOUR)
    assert after.rows == 30


def test_what_the_service_no_longer_has_stays_where_it_landed(world: tuple[Landed, AmplitudeSimulator]) -> None:
    made, simulator = world
    pull = made.amplitude(simulator)
    pull.to_the_end()
    before = week(made), uuids(made)
    simulator.state.events["web", TUESDAY] = simulator.state.events["web", TUESDAY][:3]
    del simulator.state.events["web", TUESDAY + 4 * HOUR]
    pull.fill(MONDAY, START)
    made.clock.now += timedelta(days=1)
    pull.run()
    assert set(before[1]) <= set(uuids(made))
    assert set(before[0]) <= set(week(made))


@pytest.mark.parametrize("status", [400, 504])
def test_what_is_too_large_is_halved_until_it_fits(world: tuple[Landed, AmplitudeSimulator], status: int) -> None:
    made, simulator = world
    simulator.state.limit_hours, simulator.state.limit_status = 5, status
    made.amplitude(simulator).to_the_end()
    assert uuids(made) == expected(simulator, DUE)
    answered = [
        (datetime.strptime(end, "%Y%m%dT%H") - datetime.strptime(start, "%Y%m%dT%H")) // HOUR + 1  # noqa: DTZ007 - a length
        for _, start, end in simulator.state.asked
    ]
    assert [hours for hours in answered if hours <= 5]
    assert max(answered) == 24


def test_a_service_that_gives_nothing_sets_no_hour_aside_and_holds_up_no_other_source(
    world: tuple[Landed, AmplitudeSimulator],
) -> None:
    made, simulator = world
    simulator.state.made = generated(3)
    simulator.state.events.clear()
    simulator.state.faults = {
        ("web", MONDAY + number * HOUR): AmplitudeFault(500, b"down") for number in range(-99, 99)
    }
    pull = made.amplitude(simulator, "web", "mobile")
    for _ in range(3):
        report = pull.run()
        made.clock.now += timedelta(hours=12)
        assert [failure.partition for failure in report.failures] == ["web"]
        assert report.failures[0].message.startswith("Amplitude answered 500")
    assert made.state.checkpoints.cursors("amplitude")["web"] == MONDAY
    assert {str(row["device_id"]).split("-")[0] for row in made.rows("events_part")} == {"mobile"}
    assert not made.objects("amplitude/_set_aside/")
    simulator.state.faults.clear()
    assert not pull.to_the_end().failures
    assert made.state.checkpoints.cursors("amplitude")["web"] == pull.pipeline.due_at


PASSING = [
    AmplitudeFault(429, b"Too Many Requests"),
    AmplitudeFault(429, b"", retry_after_seconds=7),
    AmplitudeFault(502, html=True),
    AmplitudeFault(html=True),
    AmplitudeFault(cut_bytes=300),
    AmplitudeFault(cut_bytes=0),
]


@pytest.mark.parametrize("fault", PASSING)
def test_what_passes_is_waited_for(world: tuple[Landed, AmplitudeSimulator], fault: AmplitudeFault) -> None:
    made, simulator = world
    simulator.add_fault(fault, times=2)
    assert not made.amplitude(simulator).to_the_end().failures
    assert uuids(made) == expected(simulator, DUE)
    if fault.status == 429:
        assert min(made.clock.paused) >= (fault.retry_after_seconds or 60)


def test_a_wrong_pair_of_keys_is_said_and_not_tried_again(world: tuple[Landed, AmplitudeSimulator]) -> None:
    made, simulator = world
    pull = made.amplitude(simulator)
    simulator.state.keys = {"web": ("web-key", "another")}
    report = pull.run()
    assert "region" in report.failures[0].hint
    assert not made.clock.paused
    assert "web-secret" not in str(report)


def test_hours_that_the_service_has_not_settled_are_not_asked_for(world: tuple[Landed, AmplitudeSimulator]) -> None:
    made, simulator = world
    pull = made.amplitude(simulator)
    pull.to_the_end()
    assert max(end for _, _, end in simulator.state.asked) == f"{DUE - HOUR:%Y%m%dT%H}"
    made.clock.now += timedelta(minutes=30)
    pull.run()
    assert made.state.checkpoints.cursors("amplitude") == {"web": DUE + HOUR}


@pytest.mark.parametrize(("days", "weeks"), [(0, 0), (2, 0), (3, 1), (9, 1), (10, 2)])
def test_the_first_pull_begins_on_the_monday_of_the_week_that_lies_its_lookback_behind(
    world: tuple[Landed, AmplitudeSimulator], days: int, weeks: int
) -> None:
    made, simulator = world
    pull = made.amplitude(simulator, lookback_days=days)
    simulator.state.keys = {}  # the service refuses, so that nothing but the beginning is there
    pull.run()
    assert made.state.checkpoints.starts("amplitude") == {"web": MONDAY - timedelta(weeks=weeks)}


def test_a_stop_in_the_middle_keeps_what_landed_and_the_next_run_goes_on(
    world: tuple[Landed, AmplitudeSimulator],
) -> None:
    made, simulator = world
    load, calls = made.warehouse.load, 0

    def stopping(chunks: Any, *, past: bool) -> int:
        nonlocal calls
        calls += 1
        if calls == 5:
            made.clock.ask("the test wants it")
        return load(chunks, past=past)

    made.warehouse.load = stopping  # type: ignore[method-assign,assignment]  # the port itself, not a patch of a module
    with pytest.raises(Stopped):
        made.amplitude(simulator).run()
    landed_until = made.state.checkpoints.cursors("amplitude")["web"]
    assert MONDAY < landed_until < DUE
    made.clock = type(made.clock)(made.clock.now)
    made.warehouse.load = load  # type: ignore[method-assign]
    made.amplitude(simulator).to_the_end()
    assert uuids(made) == expected(simulator, DUE)


def test_a_dry_run_counts_and_changes_nothing(world: tuple[Landed, AmplitudeSimulator]) -> None:
    made, simulator = world
    assert made.amplitude(simulator).run(dry_run=True).rows == len(expected(simulator, DUE))
    assert not made.objects()
    assert not made.rows("events_part")
    assert not made.state.checkpoints.cursors("amplitude")


def test_the_values_of_a_device_are_those_that_came_last_also_after_a_second_look(
    world: tuple[Landed, AmplitudeSimulator],
) -> None:
    made, simulator = world
    simulator.state.events.clear()
    for number, carrier in ((0, "first"), (1, None), (2, "last")):
        event = {**amplitude_event("web", MONDAY, number), "device_id": "one", "device_carrier": carrier}
        simulator.state.events["web", MONDAY + number * HOUR] = [event]
    pull = made.amplitude(simulator)
    pull.to_the_end()
    simulator.state.events["web", MONDAY].append(
        {**amplitude_event("web", MONDAY, 9), "device_id": "one", "device_carrier": "older"}
    )
    pull.fill(MONDAY, MONDAY + HOUR)
    assert [row["device_carrier"] for row in made.rows("mobile_devices")] == ["last"]
    assert len(uuids(made)) == 4


@pytest.mark.parametrize("database", ["sqlite", "postgres"])
def test_a_value_that_only_the_database_refuses_does_not_hold_up_the_hour(
    tmp_path: Path, database: str, request: pytest.FixtureRequest
) -> None:
    url = "" if database == "sqlite" else request.getfixturevalue("postgres_server").new_database()
    with pulling(tmp_path) as (other, simulator, _), landed(tmp_path / "own", other.clock, url) as made:
        event = amplitude_event("web", MONDAY, 0)
        huge = gzip.compress(b'{"uuid":"%s","event_properties":{"n":1%s}}\n' % (event["uuid"].encode(), b"0" * 140_000))
        fine = amplitude_event("web", MONDAY, 1)
        simulator.state.made = lambda _source, hour: (huge,) if hour == MONDAY else ()
        simulator.state.events["web", MONDAY + HOUR] = [fine]
        assert not made.amplitude(simulator).to_the_end().failures
        assert UUID(fine["uuid"]) in {UUID(str(row["uuid"])) for row in made.rows("events_part")}
        assert made.state.checkpoints.cursors("amplitude") == {"web": DUE}


def test_an_hour_is_overdue_when_the_job_is_reported_as_stale_and_a_large_line_is_set_aside_whole(
    world: tuple[Landed, AmplitudeSimulator],
) -> None:
    made, _ = world
    environ = {"AMPLITUDE_INTERVAL_SECONDS": "600", "ALERT_GRACE_SECONDS": "60", "SET_ASIDE_MAX_BYTES": "1048576"}
    settings = load_settings(environ, None)
    pull = AmplitudePull(settings, made.state.checkpoints, made.store, made.warehouse, made.clock)
    assert pull.overdue_seconds == 660
    large = b"x" * (20 << 20)
    kept = pull.set_aside.keep(("web",), large, content_type="text/plain", reason="r", number=1, sample="")
    assert made.objects()[kept.key] == large


def test_an_object_that_another_program_put_in_the_place_of_an_hour_is_replaced_when_the_hour_is_pulled(
    world: tuple[Landed, AmplitudeSimulator],
) -> None:
    made, simulator = world
    key = "amplitude/web/hours/2026-02-09/00.ndjson.gz"
    made.put(key, b"theirs")
    made.amplitude(simulator).run()
    assert len(gzip.decompress(made.objects()[key]).splitlines()) == 9


def test_a_week_above_the_limit_of_an_upload_is_told_before_it_is_made(
    world: tuple[Landed, AmplitudeSimulator],
) -> None:
    made, simulator = world
    pull = made.amplitude(simulator)
    pull.to_the_end()
    before, checkpoints = made.objects(), made.state.checkpoints
    hours = checkpoints.records("amplitude", "web", MONDAY, TUESDAY)
    grown = [replace(hour, size_bytes=1 << 30, digest="another") for hour in hours if hour.rows]
    checkpoints.commit("amplitude", "web", Commit(grown), made.context("amplitude").lease)
    (failure,) = pull.run().failures
    assert failure.message.startswith(f"{WEEK}: ")
    assert failure.message.endswith(" bytes exceed the 5 GiB limit of one upload")
    assert made.objects() == before
