"""A bounded pool of connections that threads borrow one at a time.

Invariants: a connection is in one thread's hands or idle, never both; one that failed is closed, never given back;
after one was found lost, all idle ones are dropped too, so that one outage is one error and not one per connection.
"""

import threading
from collections.abc import Callable
from contextlib import ExitStack
from typing import Generic, TypeVar

from app.core.errors import Permanent, Transient

C = TypeVar("C")


class Connections(Generic[C]):
    """`connect` opens one, `disconnect` closes one and does not raise, `alive` says cheaply if an idle one still is."""

    def __init__(
        self,
        place: str,
        connect: Callable[[], C],
        disconnect: Callable[[C], None],
        *,
        alive: Callable[[C], bool] = lambda _: True,
        limit: int = 12,
    ) -> None:
        self._place = place
        self._connect, self._disconnect, self._alive = connect, disconnect, alive
        self._idle: list[C] = []
        self._lock = threading.Lock()
        self._places = threading.BoundedSemaphore(limit)
        self._limit = limit
        self._closed = False

    def borrow(self, timeout_seconds: float = 10.0) -> C:
        """An idle connection or a new one. Raises Transient when all are busy for too long, and what `connect` does."""
        if not self._places.acquire(timeout=timeout_seconds):
            raise Transient(
                f"{self._place}: all {self._limit} connections were busy for {timeout_seconds:g} s",
                "look for slow statements or a slow disk; the next attempt may succeed",
            )
        with ExitStack() as undo:
            undo.callback(self._places.release)
            connection = self._idle_one() or self._connect()
            undo.pop_all()
        return connection

    def _idle_one(self) -> C | None:
        while True:
            with self._lock:
                if self._closed:
                    raise Permanent(f"{self._place}: used after it was closed", "start the program again")
                if not self._idle:
                    return None
                connection = self._idle.pop()
            if self._alive(connection):
                return connection
            self._disconnect(connection)

    def give_back(self, connection: C) -> None:
        """It is in order and outside a transaction."""
        with self._lock:
            closed = self._closed
            if not closed:
                self._idle.append(connection)
        if closed:
            self._disconnect(connection)
        self._places.release()

    def drop(self, connection: C) -> None:
        """It is lost; the idle ones are dropped with it."""
        self._disconnect(connection)
        self._drop_idle()
        self._places.release()

    def close(self) -> None:
        """Close the idle ones; borrowed ones are closed when they come back."""
        with self._lock:
            self._closed = True
        self._drop_idle()

    def _drop_idle(self) -> None:
        with self._lock:
            idle, self._idle = self._idle, []
        for connection in idle:
            self._disconnect(connection)
