"""Healing in a world that can stop after each effect: whatever was done to objects, wherever it dies, rows are once."""

from collections.abc import Callable
from datetime import timedelta

import pytest

from app.core.errors import Permanent
from app.core.repair import heal_window
from app.core.windows import Window, window_at
from world import GRACE_SECONDS, SOMEBODYS, START, WINDOW_SECONDS, Killed, Process, Row, World, context

Damage = Callable[[World], None]
FIRST = window_at(START, WINDOW_SECONDS)


def closed_world() -> World:
    """Two closed windows of one partition, the first with a delta."""
    world = World()
    for minute in range(0, 20, 2):
        world.write("p", START + timedelta(minutes=minute))
    world.now = START + timedelta(seconds=3 * WINDOW_SECONDS + GRACE_SECONDS)
    Process(world).run_until_done()
    world.old_delta("p", FIRST, 1, {START + timedelta(minutes=1): "late"})
    assert sorted(key[-2:] for key in world.objects if "T220000" in key) == [".0", ".1"]
    return world


def heal(process: Process, window: Window = FIRST) -> None:
    heal_window(process.pipeline(), context(), "p", window, process.world.now)


def put(world: World, key: str, rows: tuple[Row, ...]) -> None:
    world.versions += 1
    world.objects[key] = (str(world.versions), rows, SOMEBODYS)


def gone(world: World) -> None:
    del world.objects["p/20260207T220000.0"]


def delta_gone(world: World) -> None:
    del world.objects["p/20260207T220000.1"]


def both_gone(world: World) -> None:
    gone(world)
    delta_gone(world)


def exchanged(world: World) -> None:
    put(world, "p/20260207T220000.0", world.objects["p/20260207T221000.0"][1])


def delta_doubled(world: World) -> None:
    put(world, "p/20260207T220000.1", world.objects["p/20260207T220000.0"][1])


def both_exchanged(world: World) -> None:
    exchanged(world)
    put(world, "p/20260207T220000.1", world.objects["p/20260207T221000.0"][1])


@pytest.mark.parametrize("damage", [gone, delta_gone, both_gone, exchanged, delta_doubled, both_exchanged])
def test_damage_is_mended_exactly_also_when_healing_dies_at_any_effect(damage: Damage) -> None:
    effects = 0
    while True:
        world, left = closed_world(), [effects]
        other = world.objects["p/20260207T221000.0"]
        damage(world)

        def hook(_: str, left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise Killed

        try:
            heal(Process(world, hook))
        except Killed:
            heal(Process(world))
            effects += 1
        else:
            break
        check(world, other)
    check(world, other)
    assert effects >= 3


def check(world: World, other: tuple[str, tuple[Row, ...], str]) -> None:
    assert world.exported() == world.produced(world.now)
    assert world.objects["p/20260207T221000.0"] == other
    puts = len(world.puts)
    heal(Process(world))
    assert len(world.puts) == puts, "what is whole was written again"


def test_what_the_source_has_lost_too_is_not_written_over() -> None:
    world = closed_world()
    exchanged(world)
    before = dict(world.objects)
    world.rows["p"] = {at: value for at, value in world.rows["p"].items() if at >= FIRST.end}
    with pytest.raises(Permanent, match="the source has no rows of it"):
        heal(Process(world))
    assert world.objects == before
