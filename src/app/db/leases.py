"""Leases in the state database, and the clock that they and everything else in it use.

Leases are timed by the database's own clock, so the clocks of the replicas may differ. Invariants: each change is one
statement; the generation of a name grows with every acquisition and is never reused; owners are stored with a mark of
this state format, so that a process of an older version, which writes none, cannot take a lease (see migration 0006); a
clock that was set back does not prevent a takeover. A clock that was ahead leaves runs and cursors in the future:
nothing waits for the clock to reach them, and they are reported until a run has corrected them.
"""

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from app.core.errors import LeaseLost
from app.core.runs import Lease
from app.db.database import NamedQueries, Repository, Row

AHEAD = timedelta(seconds=60)  # clocks of healthy machines differ by less


class StateClock:
    """The clock that jobs use: the database's as of the last lease, advanced by a monotonic clock; this machine's
    before the first lease or with SQLite. Thread-safe, no I/O.
    """

    def __init__(self) -> None:
        self._known: tuple[datetime, float] | None = None

    def __call__(self) -> datetime:
        """The current time."""
        if self._known is None:
            return datetime.now(UTC)
        at, since = self._known
        return at + timedelta(seconds=time.monotonic() - since)

    def follow(self, at: datetime) -> None:
        """Set the clock: the database reports `at` as the current time."""
        self._known = (at, time.monotonic())


class SqlClocks(Repository):
    """Raises what `Session` raises."""

    def now(self) -> datetime:
        """The database's clock; for SQLite, this machine's."""
        with self._reading() as (_, now):
            return now

    def ahead_seconds(self) -> Mapping[str, float]:
        """Job -> how far its last run or one of its cursors is in the future, if more than a minute."""
        with self._reading() as (session, now):
            rows = session.rows(self._queries["ahead"], until_at=now + AHEAD)
        ahead: dict[str, float] = {}
        for row in rows:
            ahead[row["job"]] = max((row["latest_at"] - now).total_seconds(), ahead.get(row["job"], 0.0))
        return ahead

    def note(self) -> str:
        """What is wrong with clocks, as text for people; "" for nothing."""
        skew = (datetime.now(UTC) - self.now()).total_seconds()
        notes = [f"{job} stands {duration_text(seconds)} ahead of now" for job, seconds in self.ahead_seconds().items()]
        if abs(skew) > AHEAD.total_seconds():
            way = "ahead of" if skew > 0 else "behind"
            notes.insert(0, f"this machine's clock is {duration_text(abs(skew))} {way} the database's")
        return f"check the clock: {', '.join(notes)}" if notes else ""


def duration_text(seconds: float) -> str:
    """A duration in the largest unit of which it has at least two."""
    for unit, length in (("days", 86_400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} seconds"


FORMAT = "v4|"
FREE = FORMAT  # the owner of a released lease
LOST_HINT = "no action needed: the process that holds it goes on; several takeovers in a row mean a stalled machine"
ROUNDING_SECONDS = 0.1
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Sighting:
    """A lease whose expiry is too far in the future, and the monotonic time when it was first seen.

    A live holder would renew it within its TTL.
    """

    generation: int
    expires_at: datetime
    ttl_seconds: float
    since_seconds: float


class SqlLeases(Repository):
    """See `app.core.runs.Leases`."""

    def __init__(self, queries: NamedQueries, clock: StateClock) -> None:
        super().__init__(queries)
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
        with self._queries.database.transaction() as session:
            found = next(iter(session.rows(self._queries["acquire"], **terms, **watched)), None)
            held = None if found else next(iter(session.rows(self._queries["held"], name=name, free=FREE)), None)
        if found is None:
            self._watch(name, held, ttl_seconds)
            return None
        self._seen.pop(name, None)
        if silent and silent.expires_at > found["now_at"]:
            log.warning("%s: lease expiry was in the future and not renewed within its TTL; taken over", name)
        acquired_at = found["now_at"] if self._queries.database.dialect == "postgres" else None
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
        with self._queries.database.transaction() as session:
            rows = session.rows(self._queries["renew"], **identity(lease), ttl_seconds=float(ttl_seconds))
        if not rows:
            raise lease_lost_error(lease)
        return Lease(lease.name, lease.owner, lease.generation, rows[0]["expires_at"], lease.acquired_at)

    def release(self, lease: Lease) -> None:
        """See `Leases.release`."""
        self._queries.run("release", **identity(lease), free=FREE)

    def _held(self, name: str) -> Row | None:
        return next(iter(self._queries.rows("held", name=name, free=FREE)), None)

    def _watch(self, name: str, held: Row | None, ttl_seconds: float) -> None:
        """Start watching a lease that no live holder can have, unless exactly this one is already being watched."""
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
    """The TTL of a lease that expires later than its TTL allows; 0 when its expiry fits. `ttl_seconds` if none is
    recorded.
    """
    ttl: float = held["ttl_seconds"] or ttl_seconds
    return ttl if _remaining_seconds(held) > ttl + ROUNDING_SECONDS else 0.0


def identity(lease: Lease) -> dict[str, object]:
    """The parameters that identify a lease among its predecessors and successors. The database tracks its expiry."""
    return {"name": lease.name, "owner": FORMAT + lease.owner, "generation": lease.generation}


def lease_lost_error(lease: Lease) -> LeaseLost:
    """The error for a lost lease."""
    return LeaseLost(f"the lease {lease.name} (generation {lease.generation}) expired or was taken over", LOST_HINT)
