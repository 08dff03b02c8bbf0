"""Steps of requests let what comes in get its turn; all of them run, in order."""

import asyncio
import socket
import time
from collections.abc import Iterator
from contextlib import closing

import pytest

from app.web.protocol import LOOK_SECONDS, FairEventLoop, of_a_request

MANY = 50


@pytest.fixture
def loop() -> Iterator[FairEventLoop]:
    with closing(FairEventLoop()) as loop:
        yield loop


@pytest.mark.parametrize(("in_requests", "fewest", "most"), [(True, 1, 3), (False, MANY, MANY)])
def test_a_byte_that_comes_waits_for_few_steps_of_requests(
    loop: FairEventLoop, fewest: int, most: int, *, in_requests: bool
) -> None:
    went: list[int] = []
    seen: list[int] = []

    async def step(number: int) -> None:
        until = time.monotonic() + LOOK_SECONDS
        while time.monotonic() < until:
            pass
        went.append(number)

    async def all_at_once() -> None:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            theirs.send(b"x")
            loop.add_reader(ours, lambda: seen.append(len(went)))
            of_a_request.set(in_requests)
            await asyncio.gather(*(step(number) for number in range(MANY)))
            await asyncio.sleep(0)
            loop.remove_reader(ours)

    loop.run_until_complete(all_at_once())
    assert went == list(range(MANY))
    assert fewest <= seen[0] <= most


def test_a_step_that_was_cancelled_does_not_run_and_one_that_fails_is_told(loop: FairEventLoop) -> None:
    told: list[object] = []
    loop.set_exception_handler(lambda _, context: told.append(type(context["exception"])))

    def fails() -> None:
        raise ValueError("no")

    async def steps() -> str:
        of_a_request.set(True)
        ended = loop.create_future()
        cancelled = loop.call_soon(ended.set_result, "cancelled")
        loop.call_soon(fails)
        loop.call_soon(ended.set_result, "after it")
        cancelled.cancel()
        return str(await ended)

    assert loop.run_until_complete(steps()) == "after it"
    assert told == [ValueError]


def test_a_step_that_makes_itself_ready_again_lets_the_loop_go_on(loop: FairEventLoop) -> None:
    turns: list[int] = []

    async def again() -> None:
        of_a_request.set(True)
        while len(turns) < MANY:
            turns.append(1)
            await asyncio.sleep(0)

    async def both() -> None:
        task = asyncio.create_task(again())
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert len(turns) <= 3
        await task

    loop.run_until_complete(both())
    assert len(turns) == MANY
