"""Partitions that fail: they wait longer each time, come after all others, stay named, and never hide an outage."""

import threading
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta

import pytest

from app.core.errors import LeaseLost, Permanent, Rejected, Stopped, Transient
from app.core.ledger import Tally
from app.core.partitions import (
    AdaptiveConcurrency,
    Backoff,
    PassOptions,
    SettlingSchedule,
    live_windows,
    run_each_partition,
)
from app.core.pipeline import Count
from app.core.runs import Done, Failure, Report
from app.core.sync import ReadTogether
from app.core.windows import Window
from world import FIRST_AT, START, VALUE, Process, Rows, World, context

MINUTE = timedelta(minutes=1)
NOON = datetime(2026, 2, 7, 12, tzinfo=UTC)
WHY = Failure("b", "broken", "mend it")
ABC = ("a", "b", "c")


def waits(backoff: Backoff, now: datetime) -> bool:
    """True while partition b is not tried."""
    well, again, still = backoff.turns(ABC, now)
    assert list(well) == ["a", "c"]
    assert [*again, *still] == ["b"]
    return list(still) == ["b"]


def test_a_partition_that_fails_waits_twice_as_long_each_time_up_to_an_hour() -> None:
    backoff, now = Backoff(), NOON
    for minutes in (1, 2, 4, 8, 16, 32, 60, 60, 60):
        backoff.failed(WHY, now)
        assert waits(backoff, now)
        assert waits(backoff, now + minutes * MINUTE - timedelta(microseconds=1))
        now += minutes * MINUTE
        assert not waits(backoff, now)


def test_a_partition_that_is_well_again_begins_anew() -> None:
    backoff = Backoff()
    for _ in range(5):
        backoff.failed(WHY, NOON)
    backoff.well("b")
    assert backoff.turns(ABC, NOON) == (list(ABC), [], [])
    backoff.failed(WHY, NOON)
    assert not waits(backoff, NOON + MINUTE)


def test_a_partition_that_failed_a_thousand_times_waits_an_hour() -> None:
    backoff = Backoff()
    for _ in range(1000):
        backoff.failed(WHY, NOON)
    assert waits(backoff, NOON + 59 * MINUTE)
    assert not waits(backoff, NOON + 60 * MINUTE)


def test_a_clock_that_was_set_back_makes_nobody_wait() -> None:
    backoff = Backoff()
    backoff.failed(WHY, NOON + timedelta(days=4000))
    assert not waits(backoff, NOON)
    backoff.failed(WHY, NOON)
    assert waits(backoff, NOON + MINUTE)


def test_of_those_that_are_due_again_the_longest_waiting_comes_first() -> None:
    backoff = Backoff()
    for minutes, name in enumerate(("c", "a", "b")):
        backoff.failed(Failure(name, "broken", ""), NOON + minutes * MINUTE)
    well, again, still = backoff.turns(["a", "b", "c", "d"], NOON + timedelta(minutes=2, seconds=30))
    assert (list(well), list(again), list(still)) == (["d"], ["c", "a"], ["b"])


def test_what_failed_and_is_no_partition_any_more_is_not_tried() -> None:
    backoff = Backoff()
    backoff.failed(WHY, NOON)
    assert backoff.turns(["a"], NOON + timedelta(hours=2)) == (["a"], [], [])


class Tries:
    """Partitions in the order in which they were tried, some of which fail."""

    def __init__(self, **broken: Exception) -> None:
        self.world = World()
        self.process = Process(self.world)
        self.broken = broken
        self.tried: list[str] = []
        self.probes = 0
        self.away: Exception | None = None

    def probe(self) -> None:
        self.probes += 1
        if self.away:
            raise self.away

    def run(self, partitions: Sequence[str] = ABC, *, minutes: float = 0, retry_seconds: float = 20) -> Report:
        """A pass so many minutes after noon; who was tried is in `tried`."""
        self.tried.clear()
        how = PassOptions(
            now=NOON + minutes * MINUTE,
            first_at=FIRST_AT,
            probe=self.probe,
            nothing_found=lambda: None,
            backoff=self.process.backoff,
            concurrency=1,
            retry_seconds=retry_seconds,
        )
        return run_each_partition(self.process.pipeline(), context(), partitions, self.one, how=how, left=self.left)

    def one(self, partition: str, done: Done) -> None:
        self.tried.append(partition)
        done(Report(rows=1))
        if partition in self.broken:
            raise self.broken[partition]
        done(Report(rows=10))

    def left(self, partition: str) -> Report:
        return Report(windows=100)


@pytest.mark.parametrize("error", [Rejected("bad id", "rename it"), Permanent("no right")])
def test_a_partition_that_failed_is_left_out_while_it_waits_and_stays_named(error: Exception) -> None:
    tries = Tries(a=error)
    first = tries.run()
    assert (tries.tried, first.rows) == (["a", "b", "c"], 1 + 11 + 11)  # what it did before it failed counts
    second = tries.run(minutes=0.5)
    assert (tries.tried, second.rows, second.windows) == (["b", "c"], 22, 100)
    assert second.failures == first.failures
    assert [failure.partition for failure in second.failures] == ["a"]
    assert second.failures[0].message in str(error)


def test_a_partition_that_failed_once_for_a_cause_that_may_pass_is_tried_again_by_the_next_run() -> None:
    tries = Tries(a=Transient("the state was away for a moment"))
    tries.run()
    tries.run(minutes=0.01)
    assert tries.tried == ["b", "c", "a"]
    tries.run(minutes=0.5)
    assert tries.tried == ["b", "c"]  # it failed twice in a row
    tries.run(minutes=1.5)
    assert tries.tried == ["b", "c", "a"]


def test_a_partition_that_failed_is_tried_after_all_others() -> None:
    tries = Tries(a=Permanent("broken"))
    tries.run()
    tries.run(minutes=1)
    assert tries.tried == ["b", "c", "a"]
    tries.run(minutes=2)
    assert tries.tried == ["b", "c"]  # two minutes this time
    tries.broken.clear()
    assert not tries.run(minutes=3).failures
    assert tries.tried == ["b", "c", "a"]
    tries.run(minutes=3)
    assert tries.tried == ["a", "b", "c"]


def test_partitions_that_failed_get_a_bounded_time_and_rotate() -> None:
    names = [f"p{number}" for number in range(6)]
    tries = Tries(**{name: Permanent("broken") for name in names})
    tries.run(names)
    report = tries.run([*names, "well"], minutes=1, retry_seconds=0)
    assert tries.tried == ["well"]
    assert sorted(failure.partition for failure in report.failures) == names
    assert report.windows == 600
    tries.run(names[2:], minutes=1)
    tries.run(names, minutes=1.5)
    assert tries.tried == names[:2]


def test_however_many_fail_the_others_are_done_in_each_run() -> None:
    world = World()
    broken = {f"a{number:02}": Permanent("no right") for number in range(30)}
    for name in (*broken, "z"):
        world.write(name, START)
    world.now = START + MINUTE
    process = Process(world, broken=broken)
    for step in range(4):
        world.now += MINUTE
        world.write("z", world.now - MINUTE, str(step))
        report = process.run()
        assert {failure.partition for failure in report.failures} == set(broken)
        assert len([row for row in world.exported() if row[0] == "z"]) == 2 + step
        assert report.ledger.gap == 0
        assert report.ledger.fields[VALUE].waiting == 30


def test_an_outage_is_probed_once_and_ends_the_run() -> None:
    names = [f"p{number:02}" for number in range(20)]
    tries = Tries(**{name: Transient("timed out") for name in names})
    tries.away = Transient("the source is away")
    with pytest.raises(Transient, match="the source is away"):
        tries.run(names)
    assert (len(tries.tried), tries.probes) == (5, 1)


def test_many_that_time_out_in_a_row_while_source_and_sink_answer_are_no_outage() -> None:
    names = [f"p{number:02}" for number in range(20)]
    tries = Tries(**{name: Transient("timed out") for name in names})
    report = tries.run([*names, "z"])
    assert (tries.tried, tries.probes) == ([*names, "z"], 1)
    assert len(report.failures) == 20
    assert report.rows == 20 + 11


def test_faults_that_are_the_partitions_own_are_never_probed() -> None:
    names = [f"p{number:02}" for number in range(20)]
    tries = Tries(**{name: Permanent("broken") for name in names})
    tries.away = Transient("the source is away")
    assert len(tries.run(names).failures) == 20
    assert tries.probes == 0


@pytest.mark.parametrize("error", [LeaseLost("taken over"), Stopped("stopped")])
def test_a_lost_lease_or_a_stop_ends_the_run_and_is_no_failure_of_the_partition(error: Exception) -> None:
    tries = Tries(a=error)
    with pytest.raises(type(error)):
        tries.run()
    assert tries.process.backoff.turns(["a"], NOON)[0] == ["a"]
    assert not tries.world.failures


def test_failures_are_noted_from_several_threads_at_once() -> None:
    backoff = Backoff()
    names = [f"p{number}" for number in range(8)]

    def fail(name: str) -> None:
        for step in range(200):
            backoff.failed(Failure(name, str(step), ""), NOON)
            backoff.turns(names, NOON)

    threads = [threading.Thread(target=fail, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {backoff.last_failure(name).message for name in names} == {"199"}
    assert list(backoff.turns(names, NOON)[2]) == names


def test_the_cursor_of_a_partition_that_waits_stays() -> None:
    world = World()
    for name in ("a", "b"):
        world.write(name, START)
    world.now = START + MINUTE
    process = Process(world, broken={"b": Permanent("no right")})
    process.run()
    cursor = world.cursors["b"]
    world.now += timedelta(hours=3)
    process.run_until_done()
    assert world.cursors["b"] == cursor
    assert "no right" in world.failures["b"]
    assert world.cursors["a"] > cursor
    process.broken = {}
    world.now += timedelta(hours=1)
    process.run_until_done()
    assert world.exported() == world.produced(world.now)
    assert live_windows(process.pipeline(), world.now)[0].start == world.cursors["b"]


def test_what_a_waiting_partition_has_is_counted_as_waiting() -> None:
    world = World()
    world.write("a", START)
    world.write("b", START)
    world.now = START + MINUTE
    process = Process(world, broken={"b": Permanent("no right")})
    process.run()
    world.now += timedelta(seconds=10)
    ledger = process.run().ledger
    assert ledger.partitions == {"b": Tally(counted=1, waiting=1)}
    assert ledger.fields == {VALUE: Tally(counted=2, already_there=1, waiting=1)}


def hours_before_noon(number: int) -> list[Window]:
    """So many hours up to the one that begins at noon, oldest first."""
    starts = [NOON - timedelta(hours=back) for back in range(number, -1, -1)]
    return [Window(start, start + timedelta(hours=1)) for start in starts]


def test_windows_that_ended_long_ago_are_counted_every_ten_minutes_and_after_a_clock_was_set_back() -> None:
    settling, windows, now = SettlingSchedule(), hours_before_noon(5), NOON + 5 * MINUTE
    assert settling.counted(windows, now) == windows
    settling.done(now)
    assert settling.counted(windows, now) == windows[-2:]  # that which ended five minutes ago and the open one
    assert settling.counted(windows, now + 9 * MINUTE) == windows[-1:]
    assert settling.counted(windows, now + 10 * MINUTE) == windows
    assert settling.counted(windows, now - MINUTE) == windows


def test_more_partitions_are_worked_on_while_the_source_answers_as_fast_and_fewer_when_it_does_not() -> None:
    seconds, cores = 0.015, 0.5
    rising = AdaptiveConcurrency(16, lambda: seconds, lambda: cores)

    def work(times: int) -> int:
        for _ in range(times):
            with rising:
                pass
        return rising.limit

    assert rising.limit == 2
    assert work(4) == 4
    assert work(8 + 16) == 16
    assert work(320) == 16
    seconds = 0.2
    assert work(32) == 8
    assert work(320) == 2
    seconds, cores = 0.01, 0.9
    assert work(320) == 2
    cores = 0.5
    assert work(320) == 16
    cores = 1.1
    assert work(32) == 8
    assert AdaptiveConcurrency(1, lambda: seconds, lambda: cores).limit == 1


class PartlyReadable(Process):
    """A source that reads b alone only, and fails as a whole at d; `taken` is how far it has read."""

    taken = ""

    def read_each(self, counted: Sequence[tuple[str, Window, Count]]) -> Iterator[Rows | None]:
        for name, window, count in counted:
            if name == "d":
                raise Transient("cut off")
            self.taken = name
            yield None if name == "b" else self.read(name, window, count, None)


def test_what_is_read_together_is_handed_out_by_name_and_only_as_far_as_it_is_needed() -> None:
    window = Window(NOON, NOON + timedelta(hours=1))
    process = PartlyReadable(World(rows={name: {NOON: name} for name in "abcde"}))
    together = ReadTogether(process, [(name, window, Count(1, 1)) for name in "abcde"])

    def held(name: str) -> object:
        batch = next(together.batches(name), None)
        return batch and [value for _, value in batch.held]

    assert held("a") == ["a"]
    assert process.taken == "a"
    assert held("c") == ["c"]
    assert held("b") is None
    with pytest.raises(Transient, match="cut off"):
        held("d")
    assert [held("d"), held("e"), held("z"), held("a")] == [None] * 4
