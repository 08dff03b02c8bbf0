"""Checkpoints and leases in the state database, the clock that they go by, and layouts of older versions."""

import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from app.core.errors import LeaseLost
from app.core.pipeline import Commit, Record, Sums
from app.core.runs import Lease
from app.core.windows import Window
from app.db.database import NamedQueries, Row, Session, storable

# The clock that the state goes by, and what in it lies ahead of that clock.
#
# A clock that was ahead leaves runs and cursors in the future. Invariant: nothing waits until the clock has come to
# them; they are told of until a run has set them right.

AHEAD = timedelta(seconds=60)  # clocks of machines that are in order differ by less


class StateClock:
    """The clock that jobs go by: this machine's, or the database's as the last lease told it, carried on from then by
    a clock that nobody sets. From any thread, without I/O.
    """

    def __init__(self) -> None:
        self._known: tuple[datetime, float] | None = None

    def __call__(self) -> datetime:
        """Now."""
        if self._known is None:
            return datetime.now(UTC)
        at, since = self._known
        return at + timedelta(seconds=time.monotonic() - since)

    def follow(self, at: datetime) -> None:
        """The database says that it is `at` now."""
        self._known = (at, time.monotonic())


class SqlClocks:
    """Raises what `Session` raises."""

    def __init__(self, queries: NamedQueries) -> None:
        self._queries = queries

    def now(self) -> datetime:
        """The database's clock; of SQLite, this machine's."""
        with self._queries.database.transaction(read_only=True) as session:
            return now_of(session, self._queries)

    def ahead_seconds(self) -> Mapping[str, float]:
        """Job -> how far its last run or one of its cursors lies ahead of now, for those where it is over a minute."""
        with self._queries.database.transaction(read_only=True) as session:
            now = now_of(session, self._queries)
            rows = session.rows(self._queries["ahead"], until_at=now + AHEAD)
        ahead: dict[str, float] = {}
        for row in rows:
            ahead[row["job"]] = max((row["latest_at"] - now).total_seconds(), ahead.get(row["job"], 0.0))
        return ahead

    def note(self) -> str:
        """What is wrong with clocks, for a person; "" for nothing."""
        skew = (datetime.now(UTC) - self.now()).total_seconds()
        notes = [f"{job} stands {spoken(seconds)} ahead of now" for job, seconds in self.ahead_seconds().items()]
        if abs(skew) > AHEAD.total_seconds():
            way = "ahead of" if skew > 0 else "behind"
            notes.insert(0, f"this machine's clock is {spoken(abs(skew))} {way} the database's")
        return f"check the clock: {', '.join(notes)}" if notes else ""


def spoken(seconds: float) -> str:
    """A length of time in the largest unit that it has two of."""
    for unit, length in (("days", 86_400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} seconds"


def now_of(session: Session, queries: NamedQueries) -> datetime:
    """The clock of the session's database."""
    now: datetime = session.rows(queries["now"])[0]["now_at"]
    return now


# Leases in the state database, timed by its own clock: the clocks of the replicas may differ as they like.
#
# Invariants: each change is one statement; the generation of a name grows with every acquisition and is never used
# again; owners are stored with the mark of this format of the state, so that a process of an older version, which
# writes none, takes no lease (see migration 0006); a clock that was set back keeps no lease from being taken over.

FORMAT = "v3|"
FREE = FORMAT  # the owner of a lease that was given back
LOST_HINT = "no action needed: the process that holds it goes on; several takeovers in a row mean a stalled machine"
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

    def __init__(self, queries: NamedQueries, clock: StateClock) -> None:
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
        with self._queries.database.transaction() as session:
            found = _first(session.rows(self._queries["acquire"], **terms, **watched))
            held = None if found else _first(session.rows(self._queries["held"], name=name, free=FREE))
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
            found = _first(session.rows(self._queries["renew"], **identity(lease), ttl_seconds=float(ttl_seconds)))
        if found is None:
            raise lost(lease)
        return Lease(lease.name, lease.owner, lease.generation, found["expires_at"], lease.acquired_at)

    def release(self, lease: Lease) -> None:
        """See `Leases.release`."""
        self._queries.run("release", **identity(lease), free=FREE)

    def _held(self, name: str) -> Row | None:
        return _first(self._queries.rows("held", name=name, free=FREE))

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


# Layouts as older versions kept them, in the state database: read once, when the layout moves beside the data.


@dataclass(frozen=True, slots=True)
class Layout:
    """How objects of windows that start at or after `effective_at` are cut, named and encoded.

    `timestamp_unit` "us" or "ns" is that of the column timestamp in Parquet; older versions knew nanoseconds only.
    """

    effective_at: datetime
    window_seconds: int
    format: str
    date_format: str
    timestamp_unit: str = "ns"


class SqlLayouts:
    """The layouts of all pipelines. Raises what `Session` raises."""

    def __init__(self, queries: NamedQueries) -> None:
        self._queries = queries

    def layouts(self, pipeline: str) -> Sequence[Layout]:
        """Oldest first; empty before the first one was added."""
        return [Layout(**row) for row in self._queries.rows("layouts", pipeline=pipeline)]


# Checkpoints in the state database: what was confirmed, per pipeline and partition.
#
# Invariants: a commit is one transaction that starts with the lease, so a process that lost it changes nothing; a
# cursor and a high watermark never move back, so a repeated older commit undoes nothing. What a clock recorded that
# was ahead is not believed: no cursor lies ahead of the database's clock, and no window is closed before it has
# ended.


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """How far one partition is: what is finished, the newest event time seen, and why it stands still if it does."""

    partition: str
    cursor_at: datetime | None
    high_watermark_at: datetime | None
    error: str
    key: str
    rows: int
    updated_at: datetime


class SqlCheckpoints:
    """See `app.core.pipeline.Checkpoints`; `of` is for the dashboard and the metrics."""

    def __init__(self, queries: NamedQueries) -> None:
        self._queries = queries

    def cursors(self, pipeline: str) -> Mapping[str, datetime]:
        """See `Checkpoints.cursors`."""
        return {row["device_id"]: row["cursor_at"] for row in self._known("cursors", pipeline)}

    def starts(self, pipeline: str) -> Mapping[str, datetime]:
        """See `Checkpoints.starts`."""
        return {row["device_id"]: row["started_at"] for row in self._known("starts", pipeline)}

    def records(self, pipeline: str, partition: str, since: datetime, until: datetime) -> Sequence[Record]:
        """See `Checkpoints.records`."""
        of = {"pipeline": pipeline, "partition": partition}
        with self._queries.database.transaction(read_only=True) as session:
            now = now_of(session, self._queries)
            rows = session.rows(self._queries["records"], **of, since_at=since, until_at=until)
        return [_record(row, now) for row in rows]

    def live_records(self, pipeline: str, since: datetime) -> Mapping[str, Sequence[Record]]:
        """See `Checkpoints.live_records`."""
        with self._queries.database.transaction(read_only=True) as session:
            now = now_of(session, self._queries)
            rows = session.rows(self._queries["live_records"], pipeline=pipeline, since_at=since)
        found: dict[str, list[Record]] = {}
        for row in rows:
            found.setdefault(row["device_id"], []).append(_record(row, now))
        return found

    def commit(self, pipeline: str, partition: str, commit: Commit, lease: Lease) -> None:
        """See `Checkpoints.commit`."""
        self.commit_all(pipeline, [(partition, commit)], lease)

    def commit_all(self, pipeline: str, commits: Sequence[tuple[str, Commit]], lease: Lease) -> None:
        """See `Checkpoints.commit_all`."""
        with self._queries.database.transaction() as session:
            now_at = self._fence(session, lease)
            for partition, commit in commits:
                of_now = {"pipeline": pipeline, "partition": partition, "now_at": now_at}
                if commit.records:
                    records = [{**of_now, **_columns(record)} for record in commit.records]
                    session.run_many(self._queries["save_record"], records)
                for window in commit.folded:
                    session.run(self._queries["forget_deltas"], **of_now, starts_at=window.start)
                summary = {**_summary(commit), "until_at": now_at + AHEAD}
                session.run(self._queries["save_checkpoint"], **of_now, **summary)

    def fail(self, pipeline: str, partition: str, message: str, lease: Lease) -> None:
        """See `Checkpoints.fail`."""
        with self._queries.database.transaction() as session:
            now_at = self._fence(session, lease)
            params = {"pipeline": pipeline, "partition": partition, "message": storable(message), "now_at": now_at}
            session.run(self._queries["save_failure"], **params)

    def mark(self, pipeline: str, partition: str, troubles: Sequence[tuple[Record, str]]) -> None:
        """See `Checkpoints.mark`."""
        of = {"pipeline": pipeline, "partition": partition}
        marks = [
            {**of, "starts_at": each.window.start, "part": each.part, "version": each.version, "trouble": trouble}
            for each, trouble in troubles
        ]
        with self._queries.database.transaction() as session:
            session.run_many(self._queries["mark"], marks)

    def troubles(self) -> Mapping[str, Mapping[str, int]]:
        """Pipeline -> trouble -> how many objects it is with; see `Record.trouble`."""
        found: dict[str, dict[str, int]] = {}
        for row in self._queries.rows("troubles"):
            found.setdefault(row["pipeline"], {})[row["trouble"]] = row["objects"]
        return found

    def note_undeleted(self, pipeline: str, key: str, error: str) -> None:
        """See `Checkpoints.note_undeleted`."""
        of = {"pipeline": pipeline, "key": storable(key)}
        if error:
            self._queries.run("note_undeleted", **of, error=storable(error))
        else:
            self._queries.run("forget_undeleted", **of)

    def undeleted(self, pipeline: str) -> Mapping[str, str]:
        """Key -> why it could not be deleted, of objects that should be gone."""
        return {row["s3_key"]: row["error"] for row in self._queries.rows("undeleted", pipeline=pipeline)}

    def of(self, pipeline: str) -> Sequence[Checkpoint]:
        """Every partition of the pipeline, by name."""
        return [
            Checkpoint(
                partition=row["device_id"],
                cursor_at=row["last_exported_at"],
                high_watermark_at=row["high_watermark_at"],
                error=row["error_message"] or "",
                key=row["s3_key"] or "",
                rows=row["record_count"] or 0,
                updated_at=row["updated_at"],
            )
            for row in self._queries.rows("checkpoints_of", pipeline=pipeline)
        ]

    def _fence(self, session: Session, lease: Lease) -> datetime:
        """The database's clock; the lease is ours until the transaction ends. Raises LeaseLost."""
        rows = session.rows(self._queries["fence"], **identity(lease))
        if not rows:
            raise lost(lease)
        now_at: datetime = rows[0]["now_at"]
        return now_at

    def _known(self, query: str, pipeline: str) -> list[Row]:
        """What lies ahead of the database's clock is left out by the query."""
        with self._queries.database.transaction(read_only=True) as session:
            until_at = now_of(session, self._queries) + AHEAD
            return session.rows(self._queries[query], pipeline=pipeline, until_at=until_at)


def _columns(record: Record) -> dict[str, Any]:
    return {
        "starts_at": record.window.start,
        "ends_at": record.window.end,
        "part": record.part,
        "key": record.key,
        "version": record.version,
        "digest": record.digest,
        "rows": record.rows,
        "size_bytes": record.size_bytes,
        "source_cells": record.source_cells,
        "min_at": record.min_at,
        "max_at": record.max_at,
        "status": "closed" if record.closed else "open",
        "source_digest": record.source_digest,
        "folded": record.folded,
        "fields": json.dumps(record.fields, separators=(",", ":")) if record.fields else "",
        "sums": json.dumps(_sums_shown(record.sums), separators=(",", ":")) if record.sums else "",
    }


def _record(row: Row, now: datetime) -> Record:
    return Record(
        window=Window(row["starts_at"], row["ends_at"]),
        part=row["part"],
        key=row["s3_key"],
        version=row["version"],
        digest=row["digest"],
        rows=row["record_count"],
        size_bytes=row["size_bytes"],
        source_cells=row["source_cells"],
        min_at=row["min_at"],
        max_at=row["max_at"],
        closed=row["status"] == "closed" and row["ends_at"] <= now + AHEAD,
        fields=json.loads(row["source_fields"]) if row["source_fields"] else {},
        source_digest=row["source_digest"],
        sums={name: Sums(*some) for name, some in json.loads(row["source_sums"] or "{}").items()},
        trouble=row["trouble"],
        folded=row["folded"],
        written_at=row["updated_at"],
    )


def _sums_shown(sums: Mapping[str, Sums]) -> Mapping[str, Sequence[float | None]]:
    """As a list of `Sums`' own order, without what says nothing of values that are no numbers."""
    return {name: [each.values] if each.total is None else list(astuple(each)) for name, each in sums.items()}


def _summary(commit: Commit) -> dict[str, Any]:
    """What a commit says of its partition as a whole: cursor, newest event time, last object."""
    last = max(commit.records, key=lambda record: (record.window.start, record.part), default=None)
    return {
        "cursor_at": commit.cursor_at,
        "high_watermark_at": max((record.max_at for record in commit.records if record.max_at), default=None),
        "key": last.key if last else None,
        "rows": last.rows if last else None,
    }
