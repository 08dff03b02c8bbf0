"""Proof of delivery of hours and weeks: what was done to objects or rows is named exactly, and mended exactly."""

import gzip
from collections.abc import Callable, Collection, Iterator
from contextlib import closing
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from app.core.errors import Transient
from app.core.verify import CellState, verify
from app.core.windows import Window
from app.object_store.s3 import S3Store
from pulling import HOUR, Landed, Pull, pulling
from seaweed import Seaweed, target
from simulators.amplitude import AmplitudeFault, AmplitudeSimulator, amplitude_event, amplitude_events

MONDAY = datetime.fromisoformat("2026-02-02T00:00:00Z")
DAY = timedelta(days=1)
SPAN = Window(MONDAY, MONDAY + 9 * DAY)
WEEK = "amplitude/web/2026_week_6.zip"
World = tuple[Landed, AmplitudeSimulator, Pull]


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    yield from worlds(tmp_path)


def worlds(folder: Path, **given: Any) -> Iterator[World]:
    with pulling(folder, **given) as (made, simulator, _):
        for number in range(0, 220, 10):
            hour = MONDAY + number * HOUR
            simulator.state.events["web", hour] = list(amplitude_events("web", hour, 5))
        pull = made.amplitude(simulator, lookback_days=4)
        pull.to_the_end()
        yield made, simulator, pull


def key(hours: int) -> str:
    at = MONDAY + hours * HOUR
    return f"amplitude/web/hours/{at:%Y-%m-%d}/{at:%H}.ndjson.gz"


def test_what_is_deleted_truncated_or_exchanged_is_named_exactly_and_mended_exactly(world: World) -> None:
    made, simulator, pull = world
    assert made.signs(pull.verification, SPAN) == {}
    assert len(simulator.state.asked) <= 9 + 10, "a day is asked for once"
    before, tables = made.objects(), made.tables()
    made.put(key(0), None)
    made.put(key(10), before[key(10)][:-9])
    made.put(key(20), before[key(30)])
    made.put(key(40), gzip.compress(b""))
    made.put(WEEK, before[WEEK][:-30])
    named = {"web 02 00": "-", "web 02 10": "!", "web 02 20": "*", "web 03 16": "-", "web:weeks 02 00": "!"}
    assert made.signs(pull.verification, SPAN) == named
    whole = {info.key: info.etag for info in made.store.list("") if info.key not in (key(10), key(20), key(40), WEEK)}
    report, told = made.mend("amplitude", pull.verification, SPAN)
    assert [each.healed for each in told] == [True] * 5
    assert (report.windows, report.failures) == (5, ())
    assert made.signs(pull.verification, SPAN) == {}
    assert (made.objects(), made.tables()) == (before, tables)
    assert whole.items() <= {info.key: info.etag for info in made.store.list("")}.items()
    assert made.mend("amplitude", pull.verification, SPAN) == (type(report)(), [])
    states = pull.chart.cells("web", Window(MONDAY, MONDAY + 50 * HOUR))
    assert {cell.state for cell in states} == {CellState.EQUAL, CellState.EMPTY}
    if not made.bucket:
        with (made.folder / "objects" / key(10)).open("rb+") as file:
            file.truncate(30)  # its metadata stays beside it
    made.put(WEEK, None)
    made.mend("amplitude", pull.verification, SPAN)
    assert made.objects() == before


def test_the_map_shows_what_the_listing_shows_also_of_weeks(world: World) -> None:
    made, _, pull = world
    chart = pull.chart
    assert chart.partitions() == ["web", "web:weeks"]
    made.put(key(0), None)
    made.put(key(10), b"other")
    cells = {f"{cell.window.start:%d %H}": cell.state for cell in chart.cells("web", Window(MONDAY, MONDAY + 11 * DAY))}
    assert [cells[name] for name in ("02 00", "02 10", "02 11", "02 20", "11 04")] == [
        CellState.MISSING,
        CellState.STALE,
        CellState.EMPTY,
        CellState.EQUAL,
        CellState.OPEN,
    ]
    weeks = [cell.state for cell in chart.cells("web:weeks", Window(MONDAY, MONDAY + 10 * DAY))]
    assert weeks == [CellState.EQUAL, CellState.OPEN]
    made.put(WEEK, None)
    assert chart.cells("web:weeks", Window(MONDAY, MONDAY + DAY))[0].state is CellState.MISSING


def test_an_hour_that_the_next_run_brings_is_waiting_and_missing_only_once_it_is_overdue(world: World) -> None:
    made, _, pull = world
    due = pull.pipeline.due_at
    hour = Window(due, due + HOUR)

    def state_after(minutes: int) -> CellState:
        """So long after the hour is due, which is two and a half hours after its end."""
        made.clock.now = hour.end + timedelta(hours=2, minutes=30 + minutes)
        return pull.chart.cells("web", hour)[0].state

    assert [state_after(minutes) for minutes in (-1, 0, 60, 74, 75)] == [
        CellState.OPEN,
        CellState.WAITING,
        CellState.WAITING,
        CellState.WAITING,
        CellState.MISSING,
    ]
    pull.to_the_end()
    assert state_after(75) is CellState.EMPTY


def test_an_object_is_not_called_damaged_when_the_warehouse_cannot_be_asked(world: World) -> None:
    made, simulator, _ = world

    def away(_: Collection[str]) -> int:
        raise Transient("the warehouse is away", "start it")

    made.warehouse.known = away  # type: ignore[method-assign,assignment]  # the port itself, not a patch of a module
    ends = made.amplitude(simulator).verification(made.clock)
    (verdict,) = verify(ends, Window(MONDAY, MONDAY + HOUR), made.clock, "web")
    assert (verdict.sign.value, verdict.error) == ("!", "the warehouse is away")


def test_what_only_the_objects_have_stays_and_what_the_service_added_lands(world: World) -> None:
    made, simulator, pull = world
    before = made.objects()
    dropped = simulator.state.events["web", MONDAY + 10 * HOUR]
    simulator.state.events["web", MONDAY + 10 * HOUR] = dropped[:2]
    del simulator.state.events["web", MONDAY + 20 * HOUR]
    simulator.state.events["web", MONDAY + 30 * HOUR].append(amplitude_event("web", MONDAY, 901))
    changed = {**simulator.state.events["web", MONDAY + 40 * HOUR][0], "event_type": "renamed"}
    simulator.state.events["web", MONDAY + 40 * HOUR][0] = changed
    named = {"web 02 10": "*", "web 02 20": "+", "web 03 06": "*", "web 03 16": "*", "web:weeks 02 00": "*"}
    assert made.signs(pull.verification, SPAN) == named
    _, told = made.mend("amplitude", pull.verification, SPAN)
    assert [each.healed for each in told] == [False, False, True, True, False]
    after = made.objects()
    assert {each for each in before if before[each] != after[each]} == {key(30), key(40), WEEK}
    assert len(made.rows("events_part")) == 5 * 22 + 1
    made.put(key(20), b"half of it")
    assert made.mend("amplitude", pull.verification, SPAN)[1][1].hint.startswith("restore an earlier version")
    assert made.objects()[key(20)] == b"half of it", "what is lost at both ends is not written over"


def test_a_service_that_cannot_be_asked_is_an_error_of_those_hours_alone(tmp_path: Path) -> None:
    with pulling(tmp_path) as (made, simulator, _):
        pull = made.amplitude(simulator)
        span = Window(MONDAY, MONDAY + 3 * HOUR)
        simulator.add_fault(AmplitudeFault(403, b"no"), times=2)
        assert made.signs(pull.verification, span) == {"web 02 00": "!"}
        simulator.state.events["web", MONDAY + HOUR] = list(amplitude_events("web", MONDAY + HOUR, 20))
        simulator.state.faults["web", MONDAY + HOUR] = AmplitudeFault(spoilt=True)
        assert made.signs(pull.verification, span) == {"web 02 01": "!"}
        assert "a member of the archive" in made.mend("amplitude", pull.verification, span)[1][0].error
        assert made.signs(pull.verification, Window(made.clock.now, made.clock.now + HOUR)) == {}


ON_A_SERVER = (
    test_what_is_deleted_truncated_or_exchanged_is_named_exactly_and_mended_exactly,
    test_what_only_the_objects_have_stays_and_what_the_service_added_lands,
)


@pytest.mark.slow
@pytest.mark.parametrize("check", ON_A_SERVER, ids=lambda check: check.__name__.removeprefix("test_"))
def test_on_an_s3_server(check: Callable[[World], None], seaweed: Seaweed, tmp_path: Path) -> None:
    with closing(S3Store(target(seaweed, seaweed.new_bucket()), "probe")) as bucket:
        for made in worlds(tmp_path, bucket=bucket):
            check(made)
