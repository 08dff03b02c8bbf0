"""A lost cursor under every interleaving: where a partition may go on so that it passes no window without its rows.

Windows are one slot long. A row of slot t comes while now is t or t + 1, the grace, so its window is due from t + 2 on.
An object carries a stamp: the cursor that its writer knew to be committed. A reconcile, a backfill or a heal may write
any due window, wherever the cursor is. The product goes on at the smaller of the stamp and the start of the newest
object's window, and without an object at the installation's first start, which lies beside the data. Nothing else is
safe.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import pytest

SLOTS = 3


@dataclass(frozen=True)
class Rules:
    """`goes_on`: where, after the cursor was lost. `fills`: whether others write windows. `ahead`: by how many slots a
    clock may be.
    """

    goes_on: str
    fills: bool = True
    losses: int = 1
    runs: int = 2
    ahead: int = 0


class Run(NamedTuple):
    """A run: what it does next, its clock, the cursor that it knew, and its next window."""

    step: str
    now: int
    known: int
    window: int


class World(NamedTuple):
    """`objects`: (window, stamp), by window. `past`: cursors that a restored state may have."""

    now: int = 0
    rows: frozenset[int] = frozenset()
    objects: tuple[tuple[int, int], ...] = ()
    cursor: int | None = None
    first: int | None = None
    past: frozenset[int | None] = frozenset()
    losses: int = 0
    begins: int = 0
    runs: tuple[Run, ...] = ()

    def with_object(self, window: int, stamp: int) -> "World":
        """The window's rows were written, if there are any."""
        if window not in self.rows:
            return self
        return self._replace(objects=tuple(sorted({**dict(self.objects), window: stamp}.items())))


def lost_cursor(rules: Rules, world: World, now: int) -> int:
    lookback, (newest, stamp) = max(0, now - 2), (world.objects[-1] if world.objects else (None, 0))
    first = lookback if world.first is None else world.first
    if rules.goes_on == "now - lookback":
        return lookback
    if rules.goes_on == "first start" or newest is None:
        return lookback if rules.goes_on == "stamp, else now - lookback" else first
    return {"end of the newest object": newest + 1, "start of the newest object": newest}.get(
        rules.goes_on, min(newest, stamp)
    )


def moves(rules: Rules, world: World) -> Iterator[World]:
    if world.now < SLOTS + 2:
        yield world._replace(now=world.now + 1)
    for slot in {world.now, world.now - 1} & set(range(SLOTS)) - world.rows:
        yield world._replace(rows=world.rows | {slot})
    for old in ({None, *world.past} - {world.cursor}) if world.losses else ():
        yield world._replace(cursor=old, past=frozenset(), losses=world.losses - 1)
    if world.begins:
        yield with_run(world._replace(begins=world.begins - 1), Run("start", 0, 0, 0))
    for window in range(min(world.now - 1, SLOTS)) if rules.fills and world.first is not None else ():
        if window not in dict(world.objects):
            yield world.with_object(window, world.cursor or 0)
    for at, run in enumerate(world.runs):
        yield from steps(rules, world._replace(runs=(*world.runs[:at], *world.runs[at + 1 :])), run)


def steps(rules: Rules, world: World, run: Run) -> Iterator[World]:
    """The next effect of a run, which is none of `world.runs`."""
    if run.step == "start":
        for now in {world.now, world.now + rules.ahead}:
            lost = world.cursor is None
            at = lost_cursor(rules, world, now) if world.cursor is None else min(world.cursor, max(0, now - 1))
            first = at if world.first is None else world.first
            begun = moved(world, at) if lost else world._replace(cursor=at)
            yield with_run(begun._replace(first=first), Run("put", now, at, at))
    elif run.step == "commit":
        yield with_run(moved(world, run.window), run._replace(step="put", known=run.window))
    elif run.window > run.now or run.window >= SLOTS:
        yield world
    else:
        step = "commit" if run.window + 1 <= run.now - 1 else "put"
        yield with_run(world.with_object(run.window, run.known), run._replace(step=step, window=run.window + 1))


def moved(world: World, cursor: int) -> World:
    past = world.past | {world.cursor} if world.losses and world.cursor not in (None, cursor) else world.past
    return world._replace(cursor=cursor, past=past)


def with_run(world: World, run: Run) -> World:
    return world._replace(runs=tuple(sorted((*world.runs, run))))


def passes_a_window(rules: Rules) -> tuple[bool, int]:
    """Whether the cursor can come to pass a window whose rows are not there, and how many states were looked at."""
    first = World(losses=rules.losses, begins=rules.runs)
    seen, todo = {first}, [first]
    while todo:
        world = todo.pop()
        if world.cursor is not None and world.first is not None:
            due = {window for window in world.rows if world.first <= window < world.cursor}
            if due - dict(world.objects).keys():
                return True, len(seen)
        for after in moves(rules, world):
            if after not in seen:
                seen.add(after)
                todo.append(after)
    return False, len(seen)


@pytest.mark.slow
@pytest.mark.slow  # it looks at the rule alone and not at the product, so that no change of that can break it
@pytest.mark.parametrize("goes_on", ["first start", "stamp"])
def test_a_lost_cursor_passes_no_window_whose_rows_are_not_there(goes_on: str) -> None:
    passes, states = passes_a_window(Rules(goes_on))
    assert not passes
    assert states > 10_000, "the model does not move"


@pytest.mark.parametrize(
    "rules",
    [
        Rules("now - lookback", fills=False),
        Rules("end of the newest object", fills=False),
        Rules("start of the newest object", fills=False),
        Rules("start of the newest object"),
        Rules("stamp, else now - lookback", fills=False),
        Rules("stamp", ahead=2, fills=False, runs=1, losses=0),
    ],
    ids=lambda rules: f"{rules.goes_on}{' with a clock that is ahead' * bool(rules.ahead)}{' fills' * rules.fills}",
)
def test_what_seems_nearer_passes_windows_and_a_clock_that_is_ahead_leaves_them_to_the_reconcile(rules: Rules) -> None:
    passes, _ = passes_a_window(rules)
    assert passes
