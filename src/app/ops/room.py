"""Room for connections: when nine tenths are used, those that have asked for nothing for longest are closed.

Invariants: a connection whose request is whole is never closed for another; while there is no room, probes are still
answered. Nothing is counted by address: behind a proxy, or in a private network, many callers share one.
"""

import logging
from collections.abc import Iterable
from typing import Protocol

USED = 0.9
SPARE = 80  # descriptors for connections that are accepted before the first of them enters
AT_WORK = 2
CLOSED_SHARE, CLOSED_LEAST = 20, 32  # at once: one of so many, since to look at all of them takes a while
log = logging.getLogger(__name__)


class Waiting(Protocol):
    """A connection."""

    @property
    def asked_at(self) -> float:
        """When its last whole request had come, or it was made; monotonic seconds."""

    @property
    def rank(self) -> int:
        """0 = no request is in work, 1 = the body of one is on its way, 2 = one is in work."""

    def drop(self) -> None:
        """Close it now, whatever it was about to send."""


class Room:
    """For so many `connections`, and as many as `descriptors` let in, which the process needs for other things too."""

    def __init__(self, connections: int, descriptors: int) -> None:
        self._connections = int(connections * USED)
        self._descriptors = min(int(descriptors * USED), descriptors - SPARE)
        self._leaving: set[Waiting] = set()

    def enter(self, newest: Waiting, descriptor: int, all_of: Iterable[Waiting], count: int) -> bool:
        """Whether `newest`, one of `all_of`, may ask for more than probes; makes room for it where it can.

        `descriptor` is its own. The kernel gives the lowest that is free, so it tells how many are used.
        """
        if count < self._connections and descriptor < self._descriptors:
            return True
        return self.make(each for each in all_of if each is not newest)

    def make(self, all_of: Iterable[Waiting]) -> bool:
        """Close some connections; whether any could be. Also for when not one more descriptor is to be had."""
        if self._leaving:  # they are about to be free, in the next turn of the event loop
            return True
        idle = [each for each in all_of if each.rank < AT_WORK]
        idle.sort(key=lambda each: (each.rank, each.asked_at))
        victims = idle[: max(self._connections // CLOSED_SHARE, CLOSED_LEAST)]
        self._leaving.update(victims)
        for victim in victims:
            victim.drop()
        if victims:
            log.warning("nine tenths of all connections are used: %d without a request were closed", len(victims))
        else:
            log.warning("all connections are at work: new ones are answered 503")
        return bool(victims)

    def left(self, connection: Waiting) -> None:
        """It is closed."""
        self._leaving.discard(connection)
