"""The pool of connections: how many, who has them, and when they go."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import count

import pytest

from app.core.errors import Permanent, Transient
from app.db.database import Connections


class Wire:
    """A connection that only knows its number and whether it is open."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.open = True
        self.lost = False

    def close(self) -> None:
        self.open = False

    def rolled_back(self) -> bool:
        return not self.lost


def pool_of(limit: int = 2) -> Connections[Wire]:
    numbers = count()
    return Connections(
        "a store",
        lambda: Wire(next(numbers)),
        Wire.close,
        alive=lambda wire: wire.open,
        rolled_back=Wire.rolled_back,
        limit=limit,
    )


def test_a_connection_that_was_given_back_is_used_again_also_after_a_block_that_raised() -> None:
    pool = pool_of()
    with pool.lent() as first:
        pass
    with suppress(ValueError), pool.lent() as second:
        raise ValueError
    with pool.lent() as third:
        assert first is second is third


def test_no_more_than_the_limit_are_open_and_waiting_ends_as_transient() -> None:
    pool = pool_of(limit=1)

    def wait() -> Wire:
        with pool.lent(10.0) as wire:
            return wire

    with ThreadPoolExecutor(1) as thread:
        with pool.lent() as held:
            with pytest.raises(Transient, match="a store: all 1 connections were busy"), pool.lent(0.01):
                pass
            waiting = thread.submit(wait)
        assert waiting.result(10) is held


def test_a_connect_that_fails_does_not_use_up_a_place() -> None:
    def refused() -> Wire:
        raise Transient("away")

    pool = Connections("a store", refused, Wire.close, limit=1)
    for _ in range(3):
        with pytest.raises(Transient, match="away"), pool.lent(0.01):
            pass


def test_an_idle_connection_that_died_is_replaced() -> None:
    pool = pool_of()
    with pool.lent() as first:
        pass
    first.close()
    with pool.lent() as second:
        assert second.number == 1


def test_with_a_lost_connection_all_idle_ones_go() -> None:
    pool = pool_of()
    with suppress(ValueError), pool.lent() as lost:
        with pool.lent() as idle:
            pass
        lost.lost = True
        raise ValueError
    assert not lost.open
    assert not idle.open
    with pool.lent() as new:
        assert new.number == 2


def test_closing_closes_idle_ones_at_once_and_borrowed_ones_when_they_come_back() -> None:
    pool = pool_of()
    with pool.lent() as borrowed:
        with pool.lent() as idle:
            pass
        pool.close()
        assert (borrowed.open, idle.open) == (True, False)
    assert not borrowed.open
    with pytest.raises(Permanent, match="closed"), pool.lent():
        pass
