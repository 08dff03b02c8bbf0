"""Leases in the state database, timed by its own clock: the clocks of the replicas may differ as they like.

Invariants: each change is one statement; the generation of a name grows with every acquisition and is never used again;
owners are stored with the mark of this format of the state, so that a process of an older version, which writes none,
takes no lease (see migration 0006); a clock that was set back keeps no lease from being taken over.
"""

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta

from app.core.errors import LeaseLost
from app.core.runs import Lease
from app.stores.clocks import StateClock
from app.stores.sql import Database, Row

FORMAT = "v3|"
FREE = FORMAT  # the owner of a lease that was given back
LOST_HINT = "nothing to do: the process that holds it goes on; several takeovers in a row mean a stalled machine"
ROUNDING_SECONDS = 0.1
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Sighting:
    """A lease whose time lies too far ahead, as it was first seen, at a monotonic instant.

    A holder that lives renews it within its TTL.
    """

    generation: int
    expires_at: datetime
    ttl_seconds: float
    since_seconds: float


class SqlLeases:
    """See `app.core.runs.Leases`."""

    def __init__(self, database: Database, queries: Mapping[str, str], clock: StateClock) -> None:
        self._database = database
        self._queries = queries
        self._clock = clock
        self._seen: dict[str, _Sighting] = {}

    def acquire(self, name: str, owner: str, ttl_seconds: float) -> Lease | None:
        """See `Leases.acquire`."""
        seen = self._seen.get(name)
        silent = seen if seen and time.monotonic() - seen.since_seconds >= seen.ttl_seconds else None
        watched = {
            "watched_generation": silent.generation if silent else 0,
            "watched_expires_at": silent.expires_at if silent else None,
        }
        terms = {"name": name, "owner": FORMAT + owner, "free": FREE, "ttl_seconds": float(ttl_seconds)}
        with self._database.transaction() as session:
            found = _first(session.rows(self._queries["acquire"], **terms, **watched))
            held = None if found else _first(session.rows(self._queries["held"], name=name, free=FREE))
        if found is None:
            self._watch(name, held, ttl_seconds)
            return None
        self._seen.pop(name, None)
        if silent and silent.expires_at > found["now_at"]:
            log.warning("%s: its lease lay in the future and was not renewed in its time: taken over", name)
        acquired_at = found["now_at"] if self._database.dialect == "postgres" else None
        if acquired_at:
            self._clock.follow(acquired_at)
        return Lease(name, owner, found["generation"], found["expires_at"], acquired_at)

    def remaining_seconds(self, name: str) -> float:
        """See `Leases.remaining_seconds`."""
        held = self._held(name)
        return max(_remaining_seconds(held), 0.0) if held else 0.0

    def watch_seconds(self, name: str, ttl_seconds: float) -> float:
        """See `Leases.watch_seconds`."""
        held = self._held(name)
        return _unexplained_ttl_seconds(held, ttl_seconds) if held else 0.0

    def renew(self, lease: Lease, ttl_seconds: float) -> Lease:
        """See `Leases.renew`."""
        with self._database.transaction() as session:
            found = _first(session.rows(self._queries["renew"], **identity(lease), ttl_seconds=float(ttl_seconds)))
        if found is None:
            raise lost(lease)
        return Lease(lease.name, lease.owner, lease.generation, found["expires_at"], lease.acquired_at)

    def release(self, lease: Lease) -> None:
        """See `Leases.release`."""
        with self._database.transaction() as session:
            session.run(self._queries["release"], **identity(lease), free=FREE)

    def _held(self, name: str) -> Row | None:
        with self._database.transaction(read_only=True) as session:
            return _first(session.rows(self._queries["held"], name=name, free=FREE))

    def _watch(self, name: str, held: Row | None, ttl_seconds: float) -> None:
        """Remember a lease that no living holder can have, from now on if it is not the one that was seen before."""
        ttl = _unexplained_ttl_seconds(held, ttl_seconds) if held else 0.0
        if held is None or not ttl:
            self._seen.pop(name, None)
            return
        seen = self._seen.get(name)
        if seen is None or (seen.generation, seen.expires_at) != (held["generation"], held["expires_at"]):
            self._seen[name] = _Sighting(held["generation"], held["expires_at"], ttl, time.monotonic())


def _remaining_seconds(held: Row) -> float:
    remaining: timedelta = held["expires_at"] - held["now_at"]
    return remaining.total_seconds()


def _unexplained_ttl_seconds(held: Row, ttl_seconds: float) -> float:
    """The TTL of a lease that ends later than that from now; 0 when its time fits. `ttl_seconds` if not recorded."""
    ttl: float = held["ttl_seconds"] or ttl_seconds
    return ttl if _remaining_seconds(held) > ttl + ROUNDING_SECONDS else 0.0


def _first(rows: list[Row]) -> Row | None:
    return rows[0] if rows else None


def identity(lease: Lease) -> dict[str, object]:
    """What tells a lease from those before and after it. Its expiry is the database's to know."""
    return {"name": lease.name, "owner": FORMAT + lease.owner, "generation": lease.generation}


def lost(lease: Lease) -> LeaseLost:
    """The error that says which lease is gone."""
    return LeaseLost(f"the lease {lease.name} (generation {lease.generation}) expired or was taken over", LOST_HINT)
