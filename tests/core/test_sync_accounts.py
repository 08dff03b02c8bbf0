"""The ledger of the loop: what became of every value that was counted."""

from datetime import timedelta

import pytest

from app.core.errors import Permanent, Rejected, Transient
from app.core.ledger import SetAside, Tally, fault_of
from app.core.runs import Job, LeaseTerms, Outcome, Run, RunServices, Stop, execute
from app.core.windows import Window
from memory import MemoryLeases, MemoryRuns
from world import (
    MINUTE,
    SETTLED,
    START,
    VALUE,
    Killed,
    Process,
    Silent,
    Tripwire,
    World,
    closed_world,
    fill_minutes,
)


def executed(process: Process) -> Run:
    """A run of the job as it is recorded."""
    services = RunServices(lambda: process.world.now, MemoryLeases(), MemoryRuns(), LeaseTerms("test"), lambda *_: None)
    run = execute(Job("test", 60, lambda _: process.run()), services, Stop(), Silent())
    assert run is not None
    return run


def test_a_value_that_is_lost_between_reading_and_writing_leaves_a_gap_and_the_run_is_partial() -> None:
    world = World()
    fill_minutes(world, 10)
    world.now = START + 10 * MINUTE
    run = executed(Process(world, loses="a3"))
    assert run.report.ledger.fields == {VALUE: Tally(counted=20, read=20, new=19)}
    assert run.report.ledger.partitions == {"a": Tally(counted=10, read=10, new=9)}
    assert (run.outcome, run.error.partition(":")[0]) == (Outcome.PARTIAL, "1 values of value are not accounted for")


def test_what_a_window_gains_is_new_and_what_it_had_is_there_already() -> None:
    world = World()
    fill_minutes(world, 5, ("a",))
    world.now = START + 5 * MINUTE
    process = Process(world)
    assert process.run().ledger.fields == {VALUE: Tally(counted=5, read=5, new=5)}
    assert process.run().ledger.fields == {VALUE: Tally(counted=5, already_there=5)}
    world.write("a", START + 30 * timedelta(seconds=1), "late")
    assert process.run().ledger.fields == {VALUE: Tally(counted=6, read=6, new=1, already_there=5)}


def test_what_a_step_does_not_reach_is_waiting() -> None:
    world = World(cursors={"a": START})
    fill_minutes(world, 80, ("a",))
    world.now = START + 80 * MINUTE
    report = Process(world).run()
    assert report.more
    assert report.ledger.fields == {VALUE: Tally(counted=80, read=40, new=40, waiting=40)}


@pytest.mark.parametrize("error", [Transient("away"), Rejected("bad id", "rename it"), Permanent("no right")])
def test_the_values_of_a_partition_that_fails_are_waiting(error: Exception) -> None:
    world = World()
    fill_minutes(world, 10, ("a", "b"))
    world.now = START + 10 * MINUTE
    ledger = Process(world, broken={"b": error}).run().ledger
    assert ledger.fields == {VALUE: Tally(counted=20, read=10, new=10, waiting=10)}
    assert ledger.partitions == {"b": Tally(counted=10, waiting=10)}


def test_late_rows_of_closed_windows_are_new_and_the_others_there_already() -> None:
    world = closed_world()
    process = Process(world)
    world.write("a", START + timedelta(seconds=90), "very late")
    span = Window(START, START + 10 * MINUTE)
    fields = process.fill(span).ledger.fields
    assert fields == {VALUE: Tally(counted=11, read=11, new=1, already_there=10)}
    fields = process.fill(span).ledger.fields
    assert fields == {VALUE: Tally(counted=11, already_there=11)}


def test_after_the_state_was_lost_the_rows_that_the_objects_hold_are_there_already() -> None:
    world = closed_world()
    world.records.clear()
    world.cursors.clear()
    assert Process(world).run_until_done().ledger.fields == {VALUE: Tally(counted=10, read=10, already_there=10)}


@pytest.mark.parametrize(("new", "outcome"), [(2, Outcome.PARTIAL), (0, Outcome.OK)])
def test_what_is_newly_set_aside_makes_a_run_partial_and_what_was_before_does_not(new: int, outcome: Outcome) -> None:
    world = World()
    fill_minutes(world, 10, ("a",))
    world.now = START + 10 * MINUTE
    run = executed(Process(world, aside=[SetAside("another value", 2, new, "v=1")]))
    assert run.outcome is outcome
    assert list(run.report.ledger.set_aside) == [SetAside("another value", 2, new, "v=1")]


def test_every_run_accounts_for_every_value_also_when_the_process_before_it_died() -> None:
    for fatal in range(1, 40, 3):
        world, process = World(), None
        for step in range(10):
            world.now = START + step * 13 * MINUTE
            for minute in range(15):
                world.write("a", world.now - minute * MINUTE, f"{step}.{minute}")
            try:
                process = process or Process(world, Tripwire(fatal), keeps=True)
                report = process.run()
            except Killed:
                process = Process(world, keeps=True)
                report = process.run()
            assert fault_of(report.ledger) is None
            assert report.ledger.total.counted >= 10


def test_rows_that_only_the_object_still_has_do_not_count_as_rows_of_the_source() -> None:
    world = World()
    fill_minutes(world, 5, ("a",))
    world.now = START + 5 * MINUTE
    process = Process(world)
    process.run()
    del world.rows["a"][START]
    world.write("a", START + timedelta(seconds=30), "new")
    world.write("a", START + timedelta(seconds=40), "newer")
    ledger = process.run().ledger
    assert len(world.exported()) == 7
    assert ledger.fields == {VALUE: Tally(counted=6, read=6, new=2, already_there=4)}
    world.now += SETTLED
    ledger = process.run_until_done().ledger
    assert ledger.gap == 0
    assert ledger.total.new == 0
