"""A window that cannot be brought up to date keeps no other one of its partition waiting."""

from datetime import timedelta

import pytest

from app.core.errors import AppError, Permanent, Rejected, Transient
from app.core.windows import Window
from world import MINUTE, SETTLED, START, Process, World, fill_minutes

TEN = timedelta(minutes=10)
FAULTS = [Transient("the shard cannot be read"), Permanent("no right"), Rejected("too large")]


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("place", [0, 3, 5])
def test_one_window_that_fails_at_the_start_in_the_middle_or_at_the_end_delays_no_other(
    fault: AppError, place: int
) -> None:
    world = World()
    world.write("a", START - 3 * TEN)
    Process(world).run_until_done()
    fill_minutes(world, 60, ("a",))
    world.now = START + 60 * MINUTE + SETTLED
    bad = START + place * TEN
    process = Process(world, broken_at={bad: fault})
    for _ in range(4):
        report = process.run()
        assert report.ledger.closes
        assert world.cursors["a"] <= bad
        world.now += timedelta(hours=2)  # it is tried again when it waited long enough
    assert [failure.message for failure in report.failures] == [fault.message]
    missing = set(world.produced(world.now)) - set(world.exported())
    assert missing == {("a", at, value) for at, value in world.rows["a"].items() if bad <= at < bad + TEN}
    assert all(record.closed for record in world.records.values())
    Process(world).run_until_done()
    assert world.exported() == world.produced(world.now)
    assert len(world.closing_puts) == len(set(world.closing_puts))


@pytest.mark.parametrize("fault", FAULTS)
def test_the_open_window_is_brought_up_to_date_while_older_ones_fail(fault: AppError) -> None:
    world = World()
    fill_minutes(world, 90, ("a",))
    world.now = START + 89 * MINUTE
    broken = dict.fromkeys([START + number * TEN for number in range(6)], fault)
    Process(world, broken_at=broken).run()
    assert {at for _, at, _ in world.exported()} == {START + minute * MINUTE for minute in range(60, 90)}


def test_where_every_window_fails_few_are_tried() -> None:
    world = World()
    fill_minutes(world, 600, ("a",))
    world.now = START + 600 * MINUTE
    tried: list[str] = []
    process = Process(world, tried.append, broken={"a": Permanent("no right")})
    process.run()
    assert not [point for point in tried if point.startswith(("read", "before put"))]
    assert world.cursors["a"] <= START


def test_a_backfill_and_the_reconcile_go_on_behind_a_window_that_fails() -> None:
    world = World()
    fill_minutes(world, 60, ("a",))
    world.now = START + 3 * timedelta(hours=1)
    Process(world).run_until_done()
    for minute in range(60):
        world.write("a", START + minute * MINUTE, "7")
    span, bad = Window(START, START + 60 * MINUTE), START + 2 * TEN
    process = Process(world, broken_at={bad: Transient("the shard cannot be read")})
    filled, compared = process.fill(span, by_content=True), process.reconcile(span)
    for report in (filled, compared):
        assert [failure.message for failure in report.failures] == ["the shard cannot be read"]
    old = {at for _, at, value in world.exported() if value != "7"}
    assert old == {START + minute * MINUTE for minute in range(20, 30)}
