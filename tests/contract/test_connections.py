"""The pool of connections: how many, who has them, and when they go."""

from concurrent.futures import ThreadPoolExecutor
from itertools import count

import pytest

from app.core.errors import Permanent, Transient
from app.db.database import Connections


class Wire:
    """A connection that only knows its number and whether it is open."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.open = True

    def close(self) -> None:
        self.open = False


def pool_of(limit: int = 2) -> Connections[Wire]:
    numbers = count()
    return Connections("a store", lambda: Wire(next(numbers)), Wire.close, alive=lambda wire: wire.open, limit=limit)


def test_a_connection_that_was_given_back_is_used_again() -> None:
    pool = pool_of()
    first = pool.borrow()
    pool.give_back(first)
    assert pool.borrow() is first


def test_no_more_than_the_limit_are_open_and_waiting_ends_as_transient() -> None:
    pool = pool_of(limit=1)
    held = pool.borrow()
    with pytest.raises(Transient, match="a store: all 1 connections were busy"):
        pool.borrow(timeout_seconds=0.01)
    with ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(pool.borrow, 10.0)
        pool.give_back(held)
        assert waiting.result(10) is held


def test_a_connect_that_fails_does_not_use_up_a_place() -> None:
    def refused() -> Wire:
        raise Transient("away")

    pool = Connections("a store", refused, Wire.close, limit=1)
    for _ in range(3):
        with pytest.raises(Transient, match="away"):
            pool.borrow(timeout_seconds=0.01)


def test_an_idle_connection_that_died_is_replaced() -> None:
    pool = pool_of()
    first = pool.borrow()
    pool.give_back(first)
    first.close()
    assert pool.borrow().number == 1


def test_with_a_lost_connection_all_idle_ones_go() -> None:
    pool = pool_of()
    lost, idle = pool.borrow(), pool.borrow()
    pool.give_back(idle)
    pool.drop(lost)
    assert not lost.open
    assert not idle.open
    assert pool.borrow().number == 2


def test_closing_closes_idle_ones_at_once_and_borrowed_ones_when_they_come_back() -> None:
    pool = pool_of()
    borrowed, idle = pool.borrow(), pool.borrow()
    pool.give_back(idle)
    pool.close()
    assert (borrowed.open, idle.open) == (True, False)
    pool.give_back(borrowed)
    assert not borrowed.open
    with pytest.raises(Permanent, match="closed"):
        pool.borrow()
