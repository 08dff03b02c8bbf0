"""Rows that the service delivers late, under the time at which it received them: the daily recount finds them."""

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from app.core.ledger import fault_of
from pulling import HOUR, START, Landed, pulling
from simulators.appmetrica import AppMetricaFault, AppMetricaSimulator, appmetrica_rows

DAY = timedelta(days=1)
World = tuple[Landed, AppMetricaSimulator]
KEYS_ONLY = "&fields=event_receive_timestamp"


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with pulling(tmp_path) as (made, _, simulator):
        held = {START + n * HOUR: list(appmetrica_rows(1234567, START + n * HOUR, 5)) for n in range(-80, 80)}
        simulator.state.rows = lambda hour: held.get(hour, ())
        made.clock.now += timedelta(minutes=20)
        yield made, simulator


def late(simulator: AppMetricaSimulator, hours: int, rows: int) -> None:
    """So many rows more of the hour that began so many hours before START."""
    simulator.state.rows(START - hours * HOUR).extend(  # type: ignore[attr-defined]  # lists, made above
        appmetrica_rows(1234567, START - hours * HOUR, 5 + rows)[5 : 5 + rows]
    )


def counted_days(simulator: AppMetricaSimulator) -> int:
    """How many files with the one key column were handed out."""
    return sum(url.replace("%2C", ",").endswith(KEYS_ONLY) for url, status in simulator.state.asked if status == 200)


def test_rows_that_arrive_days_late_under_their_old_time_land_the_next_day(world: World) -> None:
    made, simulator = world
    pull = made.appmetrica(simulator, lookback_days=3, recount_days=15)
    pull.to_the_end()
    assert counted_days(simulator) == 3, "the days that were pulled, the first one in part"
    rows = len(made.rows("events_part"))
    late(simulator, 60, 2)
    late(simulator, 59, 1)
    late(simulator, 30, 1)
    made.clock.now += HOUR
    assert pull.run().late_rows == 0
    assert counted_days(simulator) == 3, "each day is counted once a day"
    made.clock.now += DAY
    simulator.state.builds.clear()
    report = pull.run()
    assert (report.late_rows, report.failures, fault_of(report.ledger)) == (4, (), None)
    assert len(made.rows("events_part")) == rows + 4 + 6 * 25
    made.clock.now += DAY
    assert pull.run().late_rows == 0
    assert made.state.checkpoints.cursors("appmetrica")["1234567:events"] == START + 2 * DAY + HOUR


def test_no_day_is_counted_when_half_of_the_calls_are_used_or_it_is_off(world: World) -> None:
    made, simulator = world
    made.appmetrica(simulator, lookback_days=3, recount_days=0).to_the_end()
    used = made.state.pulls.calls("appmetrica", made.clock())
    made.appmetrica(simulator, lookback_days=3, recount_days=15, daily_calls=2 * used).to_the_end()
    assert counted_days(simulator) == 0
    made.appmetrica(simulator, lookback_days=3, recount_days=15, daily_calls=2 * used + 2).to_the_end()
    assert counted_days(simulator) == 1
    assert made.state.pulls.calls("appmetrica", made.clock()) < 2 * used


def test_a_day_that_cannot_be_counted_is_said_once_a_day_and_holds_up_no_other(world: World) -> None:
    made, simulator = world
    pull = made.appmetrica(simulator, lookback_days=3, recount_days=0)
    pull.to_the_end()
    pull = made.appmetrica(simulator, recount_days=15)
    simulator.state.faults[START - 40 * HOUR] = AppMetricaFault(500, b"internal error")
    assert [failure.partition for failure in pull.run().failures] == [
        "1234567:events 2026-02-09T00:00:00Z/2026-02-10T00:00:00Z"
    ]
    assert counted_days(simulator) == 2
    assert not pull.run().failures


def test_a_file_that_takes_long_is_gone_on_with_by_the_next_run(world: World) -> None:
    made, simulator = world
    pull = made.appmetrica(simulator, lookback_days=1, recount_days=0)
    pull.to_the_end()
    late(simulator, 20, 1)
    simulator.state.questions = 30
    pull = made.appmetrica(simulator, recount_days=15)
    runs, rows = 0, 0
    while rows == 0:
        runs += 1
        assert runs < 20
        report = pull.run()
        assert (report.failures, fault_of(report.ledger), report.more) == ((), None, False)
        rows += report.late_rows
    assert runs > 2
    assert counted_days(simulator) >= 1
