"""The one loop: exactly once whatever line it dies on, nothing shrinks, nothing unchanged is written."""

import random
import threading
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta

import pytest

from app.core.errors import Permanent, Rejected, Stopped, Transient
from app.core.ledger import Tally
from app.core.partitions import sync_all
from app.core.pipeline import Record, Shrink
from app.core.repair import heal_window
from app.core.runs import Stop
from app.core.windows import Window
from world import (
    FIRST_AT,
    MINUTE,
    SETTLED,
    START,
    VALUE,
    Killed,
    Process,
    Tripwire,
    World,
    closed_world,
    context,
    fill_minutes,
)


def play(world: World, hook: Callable[[str], None] = lambda _: None, *, keeps: bool = False) -> None:
    """An hour over midnight with runs each five minutes, late points, one process that dies when the hook says so."""
    process = Process(world, hook, keeps=keeps)
    for step in range(14):
        world.now = START + 90 * MINUTE + step * 5 * MINUTE
        for device in ("a", "b"):
            world.write(device, world.now - 2 * MINUTE, f"{device}{step}")
            if step % 7 == 3:
                world.write(device, world.now - 13 * MINUTE, f"late {device}{step}")
        try:
            process.run_until_done()
        except Killed:
            process = Process(world, hook, keeps=keeps)
    world.now += SETTLED
    Process(world).run_until_done()


def undisturbed() -> World:
    world = World()
    play(world)
    return world


def count_effects() -> int:
    wire = Tripwire(-1)
    play(World(), wire)
    return wire.seen


@pytest.mark.slow
@pytest.mark.parametrize("keeps", [False, True])
def test_a_kill_at_any_effect_leaves_every_row_exactly_once(keeps: bool) -> None:  # noqa: FBT001 - pytest's parameter
    expected = undisturbed()
    assert expected.exported() == expected.produced(expected.now)
    for fatal in range(1, count_effects() + 1):
        world = World()
        play(world, Tripwire(fatal), keeps=keeps)
        assert world.exported() == expected.exported(), f"killed at effect {fatal}"
        assert world.cursors == expected.cursors
        assert not world.shrunk


def test_a_window_that_did_not_change_is_not_written_again() -> None:
    world = World()
    fill_minutes(world, 30)
    world.now = START + 30 * MINUTE
    Process(world).run_until_done()
    before = list(world.puts)
    world.now += MINUTE
    assert Process(world).run_until_done().windows == 0
    assert world.puts == before


def test_only_the_last_write_of_a_window_is_told_as_closing() -> None:
    world = World()
    fill_minutes(world, 7, ("a",))
    process, key = Process(world), f"a/{START:%Y%m%dT%H%M%S}.0"
    for minute in (3, 4, 30):
        world.now = START + minute * MINUTE
        process.run_until_done()
        assert (key in world.closing_puts) == (minute == 30)
    assert world.puts.count(key) > world.closing_puts.count(key) == 1


def test_a_late_point_lands_in_its_own_window_once() -> None:
    world = World()
    fill_minutes(world, 30, ("a",))
    world.now = START + 30 * MINUTE
    process = Process(world)
    process.run_until_done()
    late = START + 14 * MINUTE + timedelta(seconds=30)
    world.write("a", late, "late")
    before = len(world.puts)
    process.run_until_done()
    assert world.puts[before:] == [f"a/{START + 10 * MINUTE:%Y%m%dT%H%M%S}.0"]
    assert [row for row in world.exported() if row[2] == "late"] == [("a", late, "late")]


def test_what_comes_after_the_closing_goes_into_the_object_of_its_window() -> None:
    world = closed_world()
    process = Process(world)
    keys = set(world.objects)
    world.write("a", START + 90 * timedelta(seconds=1), "very late")
    puts = len(world.puts)
    process.run_until_done()
    assert len(world.puts) == puts
    report = process.fill(Window(START - 10 * MINUTE, START + 20 * MINUTE))
    assert (report.late_rows, set(world.objects)) == (1, keys)
    assert world.exported() == world.produced(world.now)
    again = process.fill(Window(START, START + 20 * MINUTE))
    assert again.windows == 0


def test_a_value_that_was_corrected_after_the_closing_comes_by_content_and_is_counted() -> None:
    world = World()
    fill_minutes(world, 10, ("a",))
    world.now = START + 10 * MINUTE + SETTLED
    process, span = Process(world), Window(START, START + 10 * MINUTE)
    process.run_until_done()
    world.write("a", START, "corrected")
    assert process.fill(span).windows == 0
    report = process.fill(span, by_content=True)
    assert report.ledger.fields == {VALUE: Tally(counted=10, read=10, already_there=9, corrected=1)}
    assert (report.windows, report.late_rows) == (1, 0)
    assert world.exported() == world.produced(world.now)
    assert process.fill(span, by_content=True).windows == 0


def test_a_row_that_the_source_lost_stays_though_counts_and_bounds_do_not_tell() -> None:
    world = World()
    fill_minutes(world, 10, ("a",))
    world.now = START + 10 * MINUTE
    Process(world).run_until_done()
    del world.rows["a"][START + 5 * MINUTE]
    for second in (30, 40):
        world.write("a", START + timedelta(seconds=second), "new")
    before = world.exported()
    Process(world).run_until_done()
    assert set(before) < set(world.exported())
    assert len(world.exported()) == 12


def test_who_read_a_version_before_the_window_was_closed_cannot_write_over_it() -> None:
    world = World()
    fill_minutes(world, 10, ("a",))
    world.now = START + 10 * MINUTE
    Process(world).run_until_done()
    world.write("a", START, "corrected for a while")
    world.write("a", START + timedelta(seconds=30), "late")
    closed: list[dict[str, object]] = []

    def sleep(point: str) -> None:
        """The process is paused between reading and writing; meanwhile the correction is taken back and another process
        closes the window, whose rows are those that the object has already.
        """
        if point.startswith("before put") and not closed:
            closed.append({})
            world.write("a", START, "a0")
            del world.rows["a"][START + timedelta(seconds=30)]
            world.now += SETTLED
            Process(world).run_until_done()
            closed.append(dict(world.objects))

    Process(world, sleep).run_until_done()
    key = f"a/{START:%Y%m%dT%H%M%S}.0"
    assert closed[1][key] == world.objects[key]
    assert world.exported() == world.produced(world.now)


def test_deltas_of_an_older_version_are_folded_into_their_object_and_go_wherever_it_dies() -> None:
    for fatal in range(1, 9):
        world = closed_world()
        span = Window(START, START + 10 * MINUTE)
        for part, second in enumerate((30, 90), 1):
            world.old_delta("a", span, part, {START + timedelta(seconds=second): f"late{second}"})
        assert len(world.objects) == 3
        try:
            Process(world, Tripwire(fatal)).fill(span)
        except Killed:
            Process(world).fill(span, by_content=True)
        assert len(world.objects) == 1
        assert world.exported() == world.produced(world.now)
        assert {part for _, _, part in world.records} == {0}


def test_a_delta_that_may_not_be_deleted_is_skipped_for_good_whatever_writes_its_object_later() -> None:
    world = World(refuses_deletes=True)
    fill_minutes(world, 10, ("a",))
    world.now = START + 10 * MINUTE + SETTLED
    Process(world).run_until_done()
    span = Window(START, START + 10 * MINUTE)
    for part, second in enumerate((30, 90), 1):
        world.old_delta("a", span, part, {START + timedelta(seconds=second): f"late{second}"})
    Process(world).fill(span)
    assert len(world.objects) == 3
    assert world.shown() == world.produced(world.now)
    closed = world.records["a", START, 0]
    for second, passed in (
        (100, lambda: Process(world).fill(span)),
        (101, lambda: heal_window(Process(world).pipeline(), context(), "a", span, world.now)),
        (102, lambda: run_again(world, replace(world.records["a", START, 0], closed=False))),  # looks for no deltas
        (103, lambda: run_again(world, replace(closed, closed=False))),  # a state that is older than the object
        (104, lambda: run_again(world, None)),
    ):
        world.write("a", START + timedelta(seconds=second), f"late{second}")
        passed()
        assert world.shown() == world.produced(world.now), second
        assert (len(world.objects), world.records["a", START, 0].folded) == (3, 2)


def run_again(world: World, record: Record | None) -> None:
    """A run before the window is due, with this record of it."""
    world.cursors["a"] = START
    world.records.pop(("a", START, 0))
    if record is not None:
        world.records["a", START, 0] = record
    now, world.now = world.now, START + 10 * MINUTE
    Process(world).run_until_done()
    world.now = now


def test_late_rows_are_found_also_when_the_bucket_was_copied() -> None:
    world = closed_world()
    process = Process(world)
    world.objects = {key: (f"copy {held[0]}", held[1], held[2]) for key, held in world.objects.items()}
    world.write("a", START + timedelta(seconds=90), "very late")
    span = Window(START, START + 10 * MINUTE)
    assert process.fill(span).late_rows == 1
    assert world.exported() == world.produced(world.now)


def test_late_rows_survive_a_kill_at_any_effect() -> None:
    for fatal in range(1, 12):
        world = closed_world()
        span = Window(START, START + 10 * MINUTE)
        for second in (30, 90):
            world.write("a", START + timedelta(seconds=second), f"late{second}")
            wire = Tripwire(fatal)
            try:
                Process(world, wire).fill(span)
            except Killed:
                Process(world).fill(span)
        assert world.exported() == world.produced(world.now)


def test_a_source_that_lost_rows_does_not_take_them_from_the_object() -> None:
    world = World()
    fill_minutes(world, 10, ("a",))
    world.now = START + 10 * MINUTE
    process = Process(world)
    process.run_until_done()
    before = world.exported()
    del world.rows["a"][START]
    world.write("a", START + timedelta(seconds=30), "new")
    process.run_until_done()
    world.write("a", START + timedelta(seconds=40), "newer")
    process.run_until_done()
    assert not world.shrunk
    assert set(before) < set(world.exported())


def test_shrinking_is_possible_when_it_is_allowed() -> None:
    world = World()
    fill_minutes(world, 10, ("a",))
    world.now = START + 10 * MINUTE
    Process(world).run_until_done()
    del world.rows["a"][START]
    Process(world, shrink=Shrink).run_until_done()
    assert world.exported() == world.produced(world.now)


def test_an_object_that_a_person_deleted_comes_back_while_its_window_is_not_closed() -> None:
    world = World()
    fill_minutes(world, 10, ("a",))
    world.now = START + 5 * MINUTE
    process = Process(world)
    process.run_until_done()
    world.objects.clear()
    world.now = START + 10 * MINUTE + SETTLED
    process.run_until_done()
    assert world.exported() == world.produced(world.now)


def test_lost_checkpoints_cost_no_row_and_double_none() -> None:
    world = World()
    fill_minutes(world, 30)
    world.now = START + 30 * MINUTE
    Process(world).run_until_done()
    world.cursors.clear()
    world.records.clear()
    world.now += SETTLED
    Process(world).run_until_done()
    assert world.exported() == world.produced(world.now)


def test_lost_checkpoints_do_not_double_rows_of_delta_objects() -> None:
    world = World()
    Process(world).run()
    fill_minutes(world, 10, ("a",))
    world.now = START + 10 * MINUTE + SETTLED
    Process(world).run_until_done()
    window = Window(START, START + 10 * MINUTE)
    for part, second in enumerate((30, 90), 1):
        world.old_delta("a", window, part, {START + timedelta(seconds=second): f"late{second}"})
    world.cursors = dict.fromkeys(world.cursors, START)
    world.records.clear()
    Process(world).run_until_done()
    assert world.exported() == world.produced(world.now)


def test_a_state_that_is_older_than_the_bucket_doubles_no_late_row() -> None:
    world = closed_world()
    process = Process(world)
    backup = dict(world.cursors), dict(world.records)
    world.write("a", START + timedelta(seconds=90), "very late")
    span = Window(START, START + 10 * MINUTE)
    process.fill(span)
    for cursors, records in (backup, ({}, {})):
        world.cursors, world.records = dict(cursors), dict(records)
        Process(world).run_until_done()
        Process(world).fill(span)
        assert world.exported() == world.produced(world.now)


def test_an_outage_of_three_times_the_lookback_is_caught_up_in_bounded_steps() -> None:
    world = World()
    fill_minutes(world, 5)
    world.now = START + 5 * MINUTE
    process = Process(world)
    process.run_until_done()
    fill_minutes(world, 240)
    world.now = START + 240 * MINUTE
    first = process.run()
    assert first.more
    assert first.windows <= 2 * 5
    process.run_until_done()
    assert world.exported() == world.produced(world.now)


def test_a_new_partition_starts_at_the_first_start_of_the_installation() -> None:
    world = World()
    fill_minutes(world, 5, ("a",))
    world.now = START + 5 * MINUTE
    Process(world).run_until_done()
    fill_minutes(world, 180, ("a", "b"))
    world.write("b", FIRST_AT, "older than what the last run looked at")
    world.now = START + 180 * MINUTE
    Process(world).run_until_done()
    assert world.exported() == world.produced(world.now)


def test_empty_windows_move_the_cursor_without_reads() -> None:
    world = World()
    fill_minutes(world, 5, ("a",))
    world.now = START + 5 * MINUTE
    process = Process(world)
    process.run_until_done()
    reads = len(world.reads)
    world.now = START + 24 * 60 * MINUTE
    process.run_until_done()
    assert len(world.reads) == reads + 1
    assert world.cursors["a"] >= world.now - SETTLED


@pytest.mark.parametrize("error", [Transient("away"), Rejected("bad id", "rename it"), Permanent("no right")])
def test_one_partition_that_fails_does_not_stop_the_others(error: Exception) -> None:
    world = World()
    fill_minutes(world, 10, ("a", "b", "c"))
    world.now = START + 10 * MINUTE
    report = Process(world, broken={"b": error}).run()
    assert [failure.partition for failure in report.failures] == ["b"]
    assert {name for name, _, _ in world.exported()} == {"a", "c"}
    assert "b" in world.failures
    world.now += SETTLED
    Process(world).run_until_done()
    assert world.exported() == world.produced(world.now)


def test_a_cause_that_hits_every_partition_ends_the_run_early() -> None:
    world = World()
    devices = tuple(f"d{number:02}" for number in range(40))
    fill_minutes(world, 2, devices)
    world.now = START + 2 * MINUTE
    process = Process(world, broken=dict.fromkeys(devices, Transient("away")), away=Transient("no source"))
    with pytest.raises(Transient, match="no source"):
        process.run()
    assert len(world.failures) < len(devices)
    assert process.probes == 1


def test_a_stop_ends_the_run_at_a_safe_point_and_the_next_run_goes_on() -> None:
    world = World()
    Process(world).run()
    fill_minutes(world, 120)
    world.now = START + 120 * MINUTE
    stop = Stop()

    def stop_soon(_: str) -> None:
        if len(world.puts) == 3:
            stop.ask("test")

    with pytest.raises(Stopped):
        Process(world, stop_soon).run(stop)
    world.now += SETTLED
    Process(world).run_until_done()
    assert world.exported() == world.produced(world.now)


def test_a_dry_run_changes_nothing_and_counts_what_would_be_written() -> None:
    world = World()
    fill_minutes(world, 10)
    world.now = START + 10 * MINUTE
    report = Process(world).run(dry_run=True)
    assert (report.rows, report.windows) == (20, 2)
    assert not world.objects
    assert not world.cursors
    assert not world.records


def test_every_batch_is_closed_unless_it_is_kept_for_the_next_read() -> None:
    world = World()
    process = Process(world, keeps=True)
    for step in range(20):
        world.now = START + step * 5 * MINUTE
        world.write("a", world.now, str(step))
        process.run_until_done()
    assert all(batch.is_closed != process.written.owns(batch) for batch in process.batches)
    assert any(map(process.written.owns, process.batches))


def test_the_rows_of_a_window_that_another_process_closed_are_dropped() -> None:
    world = World()
    process = Process(world, keeps=True)
    world.now = START + MINUTE
    world.write("a", START)
    process.run_until_done()
    [kept] = process.batches
    assert not kept.is_closed
    world.now += SETTLED
    Process(world).run_until_done()
    world.write("a", world.now - MINUTE)
    process.run_until_done()
    assert kept.is_closed
    assert [batch.is_closed for batch in process.batches] == [True, False]


class Turns:
    """Lets one of several threads take one step at a time, in an order that a seed decides."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)  # noqa: S311 - an order to try, no secret
        self.condition = threading.Condition()
        self.waiting: set[int] = set()
        self.turn = -1

    def hook(self, number: int) -> Callable[[str], None]:
        def wait(_: str) -> None:
            with self.condition:
                self.waiting.add(number)
                self.condition.notify_all()
                self.condition.wait_for(lambda: self.turn == number)
                self.turn = -1
                self.waiting.discard(number)

        return wait

    def drive(self, threads: list[threading.Thread]) -> None:
        while any(thread.is_alive() for thread in threads):
            with self.condition:
                ready = lambda: len(self.waiting) == sum(t.is_alive() for t in threads) or self.turn == -1  # noqa: E731
                self.condition.wait_for(ready, timeout=0.01)
                if self.waiting and self.turn == -1:
                    self.turn = self.random.choice(sorted(self.waiting))
                    self.condition.notify_all()


@pytest.mark.parametrize("seed", range(6))
def test_two_processes_at_once_without_any_lease_lose_and_double_nothing(seed: int) -> None:
    world = World()
    turns = Turns(seed)
    for step in range(12):
        world.now = START + step * 7 * MINUTE
        for minute in range(7):
            world.write("a", world.now - minute * MINUTE, f"{step}.{minute}")
        threads = [
            threading.Thread(target=Process(world, turns.hook(number), keeps=True).run_until_done)
            for number in range(2)
        ]
        for thread in threads:
            thread.start()
        turns.drive(threads)
        for thread in threads:
            thread.join()
    world.now += SETTLED
    Process(world).run_until_done()
    assert world.exported() == world.produced(world.now)
    assert not world.shrunk


def test_an_open_window_is_written_as_seldom_as_is_asked_and_closed_in_time_with_every_row() -> None:
    world = World()
    asked = list[int]()

    def five_minutes(partitions: int) -> float:
        asked.append(partitions)
        return 300.0

    process = Process(world, rewrite_seconds=five_minutes)
    written, waiting = [], []
    for minute in range(1, 10):
        world.now = START + minute * MINUTE
        world.write("a", world.now - MINUTE / 2)
        report = process.run_until_done()
        written.append(report.windows)
        assert report.ledger.gap == 0
        waiting.append(report.ledger.total.waiting)
    assert written == [1, 0, 0, 0, 0, 1, 0, 0, 0]
    assert waiting == [0, 1, 2, 3, 4, 0, 1, 2, 3]
    assert set(asked) == {1}
    world.now += SETTLED
    process.run_until_done()
    assert world.exported() == world.produced(world.now)
    assert all(record.closed for record in world.records.values())


def test_only_partitions_that_the_settings_name_count_for_how_seldom_objects_are_written() -> None:
    world = World()
    for name in ("a", "b", "c"):
        world.write(name, START)
    world.now = START + MINUTE
    asked = list[int]()

    def at_once(partitions: int) -> float:
        asked.append(partitions)
        return 0.0

    Process(world, wanted=("b",), rewrite_seconds=at_once).run_until_done()
    assert asked == [1]


def test_a_run_stops_while_it_looks_for_the_lost_cursors_of_many_partitions() -> None:
    world = World()
    fill_minutes(world, 1, ("a", "b", "c"))
    process, stop = Process(world), Stop()
    looked: list[str] = []

    def look(partition: str) -> None:
        looked.append(partition)
        stop.ask("the process ends")

    with pytest.raises(Stopped):
        sync_all(replace(process.pipeline(), lost_cursor=look), context(stop), process.how())
    assert looked == ["a"]


def test_an_object_that_a_clock_of_the_future_wrote_is_not_waited_for() -> None:
    world = World()
    world.write("a", START)
    world.now = START + MINUTE
    process = Process(world, rewrite_seconds=lambda _: 300.0)
    process.run_until_done()
    slot = ("a", START, 0)
    world.records[slot] = replace(world.records[slot], written_at=START + timedelta(days=40))
    world.write("a", START + MINUTE)
    world.now = START + 2 * MINUTE
    assert process.run_until_done().windows == 1
