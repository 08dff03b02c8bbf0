"""Hours and lines that cannot be had or read: they are set aside and named, all others land, and nothing stops."""

import json
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from app.amplitude.job import ODD_MEMBER
from app.core.ledger import fault_of
from app.core.verify import CellState
from app.core.windows import Window
from app.product_events.hours import ABOVE_LIMIT, KEEPS_FAILING
from pulling import HOUR, START, Landed, Pull, pulling
from simulators.amplitude import LARGE, AmplitudeFault, AmplitudeSimulator, amplitude_event, amplitude_events

MONDAY = datetime.fromisoformat("2026-02-02T00:00:00Z")
HOURS = 219  # up to two and a half hours before START
SPAN = Window(MONDAY, MONDAY + HOURS * HOUR)
EVENTS = 3

NEVER = {
    20: AmplitudeFault(400, LARGE),
    40: AmplitudeFault(504),
    60: AmplitudeFault(500, b"internal error"),
    61: AmplitudeFault(400, b"something else"),
    80: AmplitudeFault(html=True),
    100: AmplitudeFault(cut_bytes=200),
    140: AmplitudeFault(named="a/name/without/an/hour"),
    150: AmplitudeFault(spoilt=True),  # of another day than the last one: the simulator has one fault an answer
    218: AmplitudeFault(502, html=True),  # the newest one that is due
}
BAD_LINES = {
    30: (b'{"uuid":"0b1c6a6e-7c1d-4f2a-9d57-2f6f0a9a1b11","city":"Z\xfcrich"}', "invalid UTF-8"),
    50: (b'{"uuid":"0b1c6a6e-7c1d-4f2a-9d57-2f6f0a9a1b12","city":', "not a JSON object"),
    70: (b'{"event_type":"nobody"}', "no valid uuid"),
    90: (b'{"uuid":"0b1c6a6e-7c1d-4f2a-9d57-2f6f0a9a1b13","x":"' + b"y" * (20 << 20) + b'"}', "line above 16 MiB"),
}
World = tuple[Landed, AmplitudeSimulator, Pull]


@pytest.fixture
def world(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[World]:
    """Events in every hour, or for a fast test in every tenth."""
    with pulling(tmp_path) as (made, simulator, _):
        for number in range(0, HOURS, 1 if request.node.get_closest_marker("slow") else 10):
            at = MONDAY + number * HOUR
            simulator.state.events["web", at] = list(amplitude_events("web", at, EVENTS))
        yield made, simulator, made.amplitude(simulator, lookback_days=4)


def uuids(made: Landed) -> set[str]:
    return {str(row["uuid"]) for row in made.rows("events_part")}


def given(simulator: AmplitudeSimulator, without: tuple[int, ...] = ()) -> set[str]:
    left_out = {MONDAY + number * HOUR for number in without}
    held = simulator.state.events.items()
    return {event["uuid"] for (_, at), events in held for event in events if at not in left_out}


def gaps(pull: Pull, span: Window = SPAN) -> dict[int, CellState]:
    cells, fine = pull.chart.cells("web", span), (CellState.EQUAL, CellState.EMPTY)
    return {(cell.window.start - MONDAY) // HOUR: cell.state for cell in cells if cell.state not in fine}


@pytest.mark.slow
def test_one_hour_of_each_fault_among_200_good_ones(world: World) -> None:
    made, simulator, pull = world
    simulator.state.faults = {("web", MONDAY + number * HOUR): fault for number, fault in NEVER.items()}
    simulator.state.lines = {("web", MONDAY + number * HOUR): [line] for number, (line, _) in BAD_LINES.items()}
    waiting = sorted(NEVER.keys() - {20})

    report = pull.run()
    assert not report.more
    assert uuids(made) == given(simulator, tuple(NEVER))
    assert made.state.checkpoints.cursors("amplitude") == {"web": SPAN.end}
    assert [failure.partition for failure in report.failures] == [
        f"web {Window(MONDAY + number * HOUR, MONDAY + (number + 1) * HOUR)}" for number in waiting
    ]
    ledger = report.ledger
    assert (ledger.unit, ledger.closes) == ("lines", True)
    good = EVENTS * (HOURS - len(NEVER))
    assert (ledger.total.new, ledger.total.set_aside, ledger.total.waiting) == (good, 5, len(waiting))
    reasons = {ABOVE_LIMIT, *(reason for _, reason in BAD_LINES.values())}
    assert {one.reason for one in ledger.newly_set_aside} == reasons
    assert gaps(pull) == dict.fromkeys(NEVER, CellState.MISSING) | dict.fromkeys(BAD_LINES, CellState.PARTIAL)

    kept = made.objects("amplitude/_set_aside/")
    for number, (line, reason) in BAD_LINES.items():
        at = MONDAY + number * HOUR
        start = f"amplitude/_set_aside/web/{at:%Y-%m-%d}/{at:%H}"
        assert [body for key, body in kept.items() if key.startswith(start)] == [line + b"\n"], reason
        assert line in b"".join(made.lines(f"amplitude/web/hours/{at:%Y-%m-%d}/{at:%H}").popitem()[1])
    assert b"4GB" in kept["amplitude/_set_aside/web/2026-02-02/20.hour-above-the-service-s-limit.txt"]

    report = pull.run()
    assert len(report.failures) == len(waiting), "they are tried again, and no other is"
    assert not report.ledger.newly_set_aside

    made.clock.now += timedelta(hours=25)
    del simulator.state.faults["web", MONDAY + 40 * HOUR]
    report = pull.run()
    assert not report.failures
    (newly,) = report.ledger.newly_set_aside
    assert (newly.reason, newly.new) == (KEEPS_FAILING, len(waiting) - 1)
    assert uuids(made) == given(simulator, tuple(NEVER.keys() - {40}))
    archive = made.objects("amplitude/_set_aside/")[
        "amplitude/_set_aside/web/2026-02-07/20.hour-that-keeps-failing.zip"
    ]
    assert archive[:2] == b"PK", "what could not be read is kept as it came"

    report = pull.run()
    assert (report.failures, fault_of(report.ledger)) == ((), None), "what was set aside is told once"

    for number in NEVER.keys() - {40}:
        at = MONDAY + number * HOUR
        assert len(pull.fill(at, at + HOUR).failures) == 1, "a backfill that brings nothing does not say ok"
    simulator.state.faults.clear()
    for number, (line, _) in BAD_LINES.items():
        event = amplitude_event("web", MONDAY + number * HOUR, 99)
        simulator.state.lines["web", MONDAY + number * HOUR] = [json.dumps(event).encode()]
        assert line
    report = pull.fill(SPAN.start, SPAN.end)
    assert (report.failures, fault_of(report.ledger)) == ((), None)
    later = {amplitude_event("web", MONDAY + number * HOUR, 99)["uuid"] for number in BAD_LINES}
    assert uuids(made) == given(simulator) | later
    assert gaps(pull) == {}
    assert made.signs(pull.verification, SPAN) == {}
    assert pull.run().windows == 0


def test_a_backfill_of_hours_that_were_not_pulled_yet_says_that_it_did_nothing(world: World) -> None:
    made, _, pull = world
    pull.to_the_end()
    report = pull.fill(START - HOUR, START)
    assert report.failures[0].message.startswith("nothing was filled: the job has pulled web up to 2026-02-11T03:00Z")
    assert report.windows == 0
    made.clock.now += 5 * HOUR
    assert pull.fill(SPAN.end, SPAN.end + HOUR).failures, "it is due, and the job pulls it"
    assert made.state.checkpoints.cursors("amplitude") == {"web": SPAN.end}


def test_an_hour_that_fails_for_a_moment_lands_with_the_next_run(world: World) -> None:
    made, simulator, pull = world
    at = MONDAY + 150 * HOUR
    simulator.state.faults["web", at] = AmplitudeFault(500)
    assert len(pull.run().failures) == 1
    simulator.state.faults.clear()
    report = pull.run()
    assert (report.failures, report.rows, report.ledger.total.new) == ((), EVENTS, EVENTS)
    assert uuids(made) == given(simulator)
    assert gaps(pull) == {}
    calls = len(simulator.state.asked)
    pull.run()
    assert len(simulator.state.asked) == calls, "it waits no more"


def test_an_hour_whose_archive_cannot_be_read_is_found_by_halving_its_day(world: World) -> None:
    _, simulator, pull = world
    pull.to_the_end()
    at, calls = MONDAY + 200 * HOUR, len(simulator.state.asked)
    simulator.state.faults["web", at] = AmplitudeFault(named="a/name/without/an/hour")
    assert len(pull.fill(at - 8 * HOUR, at + 16 * HOUR).failures) == 1
    assert len(simulator.state.asked) - calls < 15
    assert 200 not in gaps(pull), "it was loaded before"


def test_an_hour_that_failed_while_the_clock_was_ahead_waits_no_longer_than_others(world: World) -> None:
    made, simulator, _ = world
    pull = made.amplitude(simulator)
    simulator.state.faults["web", MONDAY + 200 * HOUR] = AmplitudeFault(500)
    made.clock.now += timedelta(days=2)
    assert len(pull.run().failures) == 1
    made.clock.now -= timedelta(days=2)
    assert len(pull.run().failures) == 1
    made.clock.now += timedelta(hours=25)
    (newly,) = pull.run().ledger.newly_set_aside
    assert newly.reason == KEEPS_FAILING


def test_an_hour_that_landed_is_not_lost_when_its_second_look_fails(world: World) -> None:
    made, simulator, pull = world
    pull.to_the_end()
    at = MONDAY + 200 * HOUR
    simulator.state.faults["web", at] = AmplitudeFault(500)
    made.clock.now += timedelta(days=2)
    assert len(pull.run().failures) == 1
    assert 200 not in gaps(pull)
    made.clock.now += timedelta(days=4)
    assert not pull.run().failures
    assert 200 not in gaps(pull)
    assert uuids(made) == given(simulator)


def test_members_of_an_archive_that_belong_to_no_hour_are_set_aside_and_keep_no_hour_out(world: World) -> None:
    made, simulator, pull = world
    simulator.state.odd = {"README.txt": b"read me", "187520/187520_2020-01-01_3#0.json.gz": b"of another year"}
    report = pull.to_the_end()
    assert (report.failures, uuids(made), gaps(pull)) == ((), given(simulator), {})
    assert report.ledger.closes
    assert {entry.reason for entry in report.ledger.newly_set_aside} == {ODD_MEMBER}
    kept = made.objects("amplitude/_set_aside/web/of_no_hour/")
    assert sorted(kept.values()) == sorted(simulator.state.odd.values())
    assert made.signs(pull.verification, SPAN) == {}


def test_a_file_full_of_bad_lines_is_set_aside_whole_and_counted(world: World) -> None:
    made, simulator, pull = world
    lines = [b'{"n":%d}' % number for number in range(2000)]
    simulator.state.lines["web", MONDAY] = lines
    report = pull.run()
    (found,) = report.ledger.newly_set_aside
    assert (found.number, found.new) == (2000, 2000)
    assert report.ledger.closes
    (body,) = made.objects("amplitude/_set_aside/").values()
    assert body.splitlines() == lines
