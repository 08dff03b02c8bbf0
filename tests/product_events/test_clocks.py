"""Both pulls on a machine whose clock was ahead of the service's for a while."""

from collections.abc import Iterator
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path

import pytest

from app.core.windows import Window
from pulling import HOUR, START, Clock, Pull, landed
from simulators.amplitude import AmplitudeSimulator, amplitude_events
from simulators.appmetrica import AppMetricaSimulator, appmetrica_rows

AHEAD = timedelta(days=5)
ROWS = 2
World = tuple[Pull, Clock, Clock]


@pytest.fixture(params=["amplitude", "appmetrica"])
def world(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[World]:
    """A service that has ROWS rows of every hour that has begun, its clock, and the one of the machine."""
    true, ours = Clock(START + timedelta(minutes=20)), Clock(START + timedelta(minutes=20))
    with ExitStack() as stack:
        made = stack.enter_context(landed(tmp_path, ours))
        if request.param == "amplitude":
            web = stack.enter_context(AmplitudeSimulator(clock=true))
            for at in (START + number * HOUR for number in range(-30, 170)):
                web.state.events["web", at] = list(amplitude_events("web", at, ROWS))
            yield made.amplitude(web), true, ours
        else:
            mobile = stack.enter_context(AppMetricaSimulator(clock=true))
            mobile.state.questions = 0
            mobile.state.rows = lambda at: appmetrica_rows(1234567, at, ROWS - 1) if at <= true.now else ()
            yield made.appmetrica(mobile, recount_days=0), true, ours


@pytest.mark.parametrize("ahead", [timedelta(hours=3), AHEAD], ids=["hours", "days"])
def test_hours_that_the_service_calls_too_early_are_not_recorded_but_requested_again(
    world: World, ahead: timedelta
) -> None:
    pull, true, ours = world
    pull.to_the_end()
    ours.now = true.now + ahead
    (failure,) = pull.run().failures
    assert "by the service's clock, too early for" in failure.message
    assert "set the clock of this machine" in failure.hint
    for _ in range(24):
        true.now += 6 * HOUR
        ours.now = true.now
        assert not pull.to_the_end().failures
    due_at = pull.pipeline.due_at
    rows = {str(row["uuid"]) for row in pull.landed.rows("events_part")}
    name = next(iter(pull.landed.state.checkpoints.cursors(pull.pipeline.name)))
    first = pull.landed.state.checkpoints.starts(pull.pipeline.name)[name]
    assert len(rows) >= ROWS * ((due_at - START) // HOUR)
    assert pull.landed.signs(pull.verification, Window(max(first, START - 24 * HOUR), due_at)) == {}


def test_a_day_that_was_pulled_by_a_clock_that_was_ahead_is_still_rechecked(tmp_path: Path) -> None:
    true, ours = Clock(START), Clock(START)
    with landed(tmp_path, ours) as made, AmplitudeSimulator(clock=true) as web:
        at = START + 4 * HOUR
        pull = made.amplitude(web)
        pull.run()
        web.state.events["web", at] = list(amplitude_events("web", at, ROWS))
        true.now += 22 * HOUR
        ours.now = true.now + AHEAD
        assert pull.run().failures
        assert len(made.rows("events_part")) == ROWS
        web.state.events["web", at] = list(amplitude_events("web", at, ROWS + 1))
        true.now += timedelta(days=2)
        ours.now = true.now
        pull.to_the_end()
        assert len(made.rows("events_part")) == ROWS + 1


def test_a_clock_that_is_minutes_ahead_stops_nothing(world: World) -> None:
    pull, true, ours = world
    ours.now = true.now + timedelta(minutes=10)
    assert not pull.to_the_end().failures
