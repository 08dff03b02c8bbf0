"""The reconcile of one window: what it reads, writes, heals and only tells, by record, object and source."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from datetime import datetime

from app.core.errors import Permanent
from app.core.pipeline import FOREIGN, MISSING, Shrink, Sums
from app.core.repair import heal_window, same_sums
from app.core.runs import Report
from app.core.windows import Window, window_at
from world import MINUTE, SOMEBODYS, START, WINDOW_SECONDS, Process, World, closed_world, context, key_of

FIRST = window_at(START, WINDOW_SECONDS)
KEY = key_of("a", START, 0)


def reconciled(world: World, *, heals: bool = False, shrink: bool = False) -> Report:
    process = Process(world, shrink=Shrink if shrink else None)
    world.reads.clear()
    return process.reconcile(FIRST, heals=heals)


def test_what_is_as_confirmed_at_both_ends_is_not_read() -> None:
    world = closed_world()
    assert reconciled(world).ledger.total.already_there == 10
    assert reconciled(world, shrink=True).ledger.total.already_there == 10
    assert world.reads == []


def test_a_window_that_neither_end_has_is_not_read() -> None:
    world = World(now=closed_world().now)
    assert reconciled(world) == Report()
    assert world.reads == []


def test_sums_are_asked_of_the_fields_that_are_numbers() -> None:
    world = World(now=closed_world().now)
    for minute in range(3):
        world.write("n", START + minute * MINUTE, str(minute))
        world.write("t", START + minute * MINUTE, "text")
    process = Process(world)
    process.run_until_done()
    asked: dict[str, Collection[str]] = {}

    def sums(
        partition: str, spans: Sequence[Window], numbers: Collection[str]
    ) -> Mapping[datetime, Mapping[str, Sums]]:
        asked[partition] = set(numbers)
        return process.asked(partition, spans, numbers)

    for name in ("n", "t"):
        process.reconcile(FIRST, name, asked=sums)
    assert asked == {"n": {"value"}, "t": set()}


def test_an_object_that_is_gone_is_told_and_written_again_only_where_damage_is_healed() -> None:
    world = closed_world()
    del world.objects[KEY]
    assert reconciled(world).ledger.total.waiting == 10
    assert world.records["a", START, 0].trouble == MISSING
    assert world.objects == {}
    assert reconciled(world, heals=True).failures == ()
    assert world.exported() == world.produced(world.now)


def test_an_object_of_another_program_is_told() -> None:
    world = closed_world()
    world.objects[KEY] = ("mine", (), SOMEBODYS)
    reconciled(world)
    assert world.records["a", START, 0].trouble == FOREIGN


def test_a_window_that_cannot_be_read_is_a_failure_of_its_own() -> None:
    world = closed_world()
    world.write("a", START + MINUTE / 2, "late")
    process = Process(world, broken_at={START: Permanent("it is broken", "mend it")})
    report = process.reconcile(FIRST)
    assert [(failure.message, failure.hint) for failure in report.failures] == [("it is broken", "mend it")]
    assert report.ledger.total.waiting == 11


def test_what_is_gone_at_both_ends_is_told() -> None:
    world = closed_world()
    world.objects.clear()
    world.rows["a"].clear()
    assert reconciled(world).ledger.total.counted == 0
    assert world.records["a", START, 0].trouble == MISSING


def test_an_object_that_is_gone_before_its_window_was_closed_is_written_again() -> None:
    world = closed_world()
    world.objects.clear()
    world.records["a", START, 0] = replace(world.records["a", START, 0], closed=False)
    reconciled(world)
    assert world.exported() == world.produced(world.now)


def test_a_record_without_an_object_misses_none() -> None:
    world = closed_world()
    world.objects.clear()
    world.records["a", START, 0] = replace(world.records["a", START, 0], version="")
    reconciled(world)
    assert world.records["a", START, 0].trouble == ""


def test_rows_that_only_the_object_has_go_where_shrinking_is_allowed() -> None:
    world = closed_world()
    del world.rows["a"][START]
    reconciled(world)
    assert len(world.exported()) == 10
    assert reconciled(world, shrink=True).removed_rows == 1
    assert world.exported() == world.produced(world.now)


def test_a_delta_that_may_not_be_deleted_is_read_no_more() -> None:
    world = closed_world()
    world.old_delta("a", FIRST, 1, {START + MINUTE / 2: "late"})
    world.refuses_deletes = True
    reconciled(world)
    assert world.undeleted.keys() == {key_of("a", START, 1)}
    assert reconciled(world).ledger.total.already_there == 11
    assert world.reads == []
    assert world.shown() == world.produced(world.now)
    world.refuses_deletes = False
    reconciled(world)
    assert list(world.objects) == [KEY]


def test_a_delta_whose_object_is_gone_keeps_its_rows() -> None:
    world = closed_world()
    world.old_delta("a", FIRST, 1, {START + MINUTE / 2: "late"})
    del world.objects[KEY]
    reconciled(world, heals=True)
    assert world.exported() == world.produced(world.now)


def test_healing_keeps_rows_of_a_version_that_an_older_state_does_not_know() -> None:
    world = closed_world()
    older = dict(world.records)
    world.write("a", START + MINUTE / 2, "late")
    reconciled(world)
    del world.rows["a"][START + MINUTE / 2]
    world.records = older
    heal_window(Process(world).pipeline(), context(), "a", FIRST, world.now)
    assert len(world.exported()) == 11


def test_a_backfill_writes_what_was_never_written() -> None:
    world = World(now=closed_world().now)
    world.write("a", START)
    Process(world).fill(FIRST)
    assert world.exported() == world.produced(world.now)
    assert world.records["a", START, 0].closed


def test_sums_are_the_same_within_what_adding_up_in_another_order_may_lose() -> None:
    zeros, tenths = Sums(3, 0.0, 0.0, 0.0, 0.0), Sums(3, 0.1 + 0.2 + 0.3, 0.1, 0.3, 0.6)
    assert same_sums({"zeros": zeros, "tenths": tenths}, {"zeros": zeros, "tenths": replace(tenths, total=0.6)})
    assert not same_sums({"tenths": tenths}, {"tenths": replace(tenths, total=0.6 + 1e-14)})
    assert not same_sums({"tenths": tenths}, {"tenths": Sums(3)})
