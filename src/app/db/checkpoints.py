"""Checkpoints in the state database: what was confirmed, per pipeline and partition; and the layouts of older versions.

Invariants: a commit is one transaction that begins by checking the lease, so a process that lost it changes nothing; a
cursor and a high watermark never move back, so repeating an older commit undoes nothing. Records of a clock that was
ahead are ignored: no cursor is ahead of the database's clock, and no window counts as closed before it has ended, or by
a commit dated in the future.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import lru_cache
from math import gcd
from sys import intern
from types import MappingProxyType
from typing import Any

from app.core.pipeline import Commit, Record, Sums
from app.core.runs import Lease
from app.core.windows import DAY_SECONDS, Window, floor_to
from app.db.database import INSTANT_SUFFIX, NamedQueries, Repository, Row, Session, storable
from app.db.leases import AHEAD, identity, lease_lost_error
from app.db.object_summaries import SqlSummaries


@dataclass(frozen=True, slots=True)
class Layout:
    """How objects of windows that start at or after `effective_at` are split, named and encoded.

    `timestamp_unit` "us" or "ns" is the unit of the timestamp column in Parquet; older versions only had nanoseconds.
    """

    effective_at: datetime
    window_seconds: int
    format: str
    date_format: str
    timestamp_unit: str = "ns"


# The columns of the query live_records, after the partition and the window.
OF_RECORD = (
    *("part", "s3_key", "version", "digest", "record_count", "size_bytes", "source_cells", "min_at", "max_at"),
    *("status", "source_fields", "source_digest", "source_sums", "trouble", "folded", "updated_at"),
)
INSTANTS = tuple(name for name in OF_RECORD if name.endswith(INSTANT_SUFFIX))
SHARED_TEXTS = 1 << 12


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The progress of one partition: what is finished, the newest event time seen, and why it is stuck if it is."""

    partition: str
    cursor_at: datetime | None
    high_watermark_at: datetime | None
    error: str
    key: str
    rows: int
    updated_at: datetime


class SqlCheckpoints(Repository):
    """See `app.core.pipeline.Checkpoints`; `of` is for the dashboard and the metrics."""

    def __init__(self, queries: NamedQueries) -> None:
        super().__init__(queries)
        self._summaries = SqlSummaries(queries)

    def cursors(self, pipeline: str, partition: str | None = None) -> Mapping[str, datetime]:
        """See `Checkpoints.cursors`; of one partition, or of all when it is None."""
        rows = self._known("cursors", pipeline=pipeline, partition=partition)
        return {row["device_id"]: row["cursor_at"] for row in rows}

    def starts(self, pipeline: str) -> Mapping[str, datetime]:
        """See `Checkpoints.starts`."""
        return {row["device_id"]: row["started_at"] for row in self._known("starts", pipeline=pipeline)}

    def records(self, pipeline: str, partition: str, since: datetime, until: datetime) -> Sequence[Record]:
        """See `Checkpoints.records`."""
        of = {"pipeline": pipeline, "partition": partition}
        with self._reading() as (session, now):
            rows = session.rows(self._queries["records"], **of, since_at=since, until_at=until)
        return [_record(row, Window(row["starts_at"], row["ends_at"]), now) for row in rows]

    def live_records(
        self, pipeline: str, since: datetime, partitions: Sequence[str] | None = None
    ) -> Mapping[str, Sequence[Record]]:
        """See `Checkpoints.live_records`. Streamed, since the rows of many devices would dominate a plan's memory."""
        found: dict[str, list[Record]] = {}
        windows: dict[tuple[Any, Any], Window] = {}  # devices have the same ones
        with self._reading() as (session, now):
            chosen = None if partitions is None else json.dumps(partitions)
            of = {"pipeline": pipeline, "since_at": since, "partitions": chosen}
            for device, starts_at, ends_at, *values in session.stream(self._queries["live_records"], **of):
                window = windows.get((starts_at, ends_at))
                if window is None:
                    window = windows[starts_at, ends_at] = Window(_instant(starts_at), _instant(ends_at))
                row = dict(zip(OF_RECORD, values, strict=True))
                for name in INSTANTS:
                    row[name] = _instant(row[name])
                found.setdefault(device, []).append(_record(row, window, now))
        return found

    def layouts(self, pipeline: str) -> Sequence[Layout]:
        """Layouts stored by older versions, oldest first: read once, when the layout history moves next to the data."""
        return [Layout(**row) for row in self._queries.rows("layouts", pipeline=pipeline)]

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
                last = max(commit.records, key=lambda record: (record.window.start, record.part), default=None)
                session.run(
                    self._queries["save_checkpoint"],
                    **of_now,
                    until_at=now_at + AHEAD,
                    cursor_at=commit.cursor_at,
                    high_watermark_at=max((each.max_at for each in commit.records if each.max_at), default=None),
                    key=last.key if last else None,
                    rows=last.rows if last else None,
                )
            if summaries := [each for _, commit in commits for each in commit.summaries]:
                self._summaries.add_to(session, summaries)

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
        """Pipeline -> trouble -> number of objects; see `Record.trouble`."""
        found: dict[str, dict[str, int]] = {}
        for row in self._queries.rows("troubles"):
            found.setdefault(row["pipeline"], {})[row["trouble"]] = row["objects"]
        return found

    def retire(self, pipeline: str, partition: str, before: datetime, until: datetime, lease: Lease) -> int:
        """Delete records of closed windows that start before the UTC day of `before` and end by `until`; returns how
        many. Which windows there were, which their objects do not say, is kept by day. Raises LeaseLost.
        """
        of = {"pipeline": pipeline, "partition": partition}
        with self._queries.database.transaction() as session:
            self._fence(session, lease)
            before_at = floor_to(before, DAY_SECONDS)
            gone = session.rows(self._queries["retire_records"], **of, before_at=before_at, until_at=until)
            if gone:
                retired = {row["starts_at"]: row["record_count"] for row in gone}
                days = sorted({floor_to(start, DAY_SECONDS) for start in retired})
                known = session.rows(self._queries["days"], **of, since_at=days[0], until_at=before_at)
                retired = {**_retired(known), **retired}
                session.run_many(
                    self._queries["save_day"], [{**of, "day_at": day, "windows": _day(retired, day)} for day in days]
                )
        return len(gone)

    def retired(self, pipeline: str, partition: str, span: Window) -> Mapping[datetime, int]:
        """Start -> rows of the windows retired by `retire`, for all days that `span` touches."""
        of = {"pipeline": pipeline, "partition": partition, "until_at": span.end}
        return _retired(self._queries.rows("days", **of, since_at=floor_to(span.start, DAY_SECONDS)))

    def note_undeleted(self, pipeline: str, key: str, error: str) -> None:
        """See `Checkpoints.note_undeleted`."""
        of = {"pipeline": pipeline, "key": storable(key)}
        if error:
            self._queries.run("note_undeleted", **of, error=storable(error))
        else:
            self._queries.run("forget_undeleted", **of)

    def undeleted(self, pipeline: str) -> Mapping[str, str]:
        """Key -> why the deletion failed, for objects that should be gone."""
        return {row["s3_key"]: row["error"] for row in self._queries.rows("undeleted", pipeline=pipeline)}

    def of(self, pipeline: str) -> Sequence[Checkpoint]:
        """Every partition of the pipeline, by name."""
        return [Checkpoint(**row) for row in self._queries.rows("checkpoints_of", pipeline=pipeline)]

    def _fence(self, session: Session, lease: Lease) -> datetime:
        """Lock the lease until the transaction ends; returns the database's clock. Raises LeaseLost."""
        rows = session.rows(self._queries["fence"], **identity(lease))
        if not rows:
            raise lease_lost_error(lease)
        now_at: datetime = rows[0]["now_at"]
        return now_at

    def _known(self, query: str, **of: str | None) -> list[Row]:
        """Rows of the query, which leaves out those ahead of the database's clock."""
        with self._reading() as (session, now):
            return session.rows(self._queries[query], **of, until_at=now + AHEAD)


def _day(retired: Mapping[datetime, int], day: datetime) -> str:
    """The seconds between windows, then the rows of each from midnight on; null where there was none."""
    seconds = {int((start - day).total_seconds()): rows for start, rows in retired.items()}
    of_day = {at: rows for at, rows in seconds.items() if 0 <= at < DAY_SECONDS}
    step = gcd(*of_day) or DAY_SECONDS
    return json.dumps([step, *(of_day.get(at) for at in range(0, max(of_day) + 1, step))], separators=(",", ":"))


def _retired(rows: Sequence[Row]) -> dict[datetime, int]:
    retired: dict[datetime, int] = {}
    for row in rows:
        match json.loads(row["windows"]):
            case [step, *numbers]:
                found = {at * step: number for at, number in enumerate(numbers) if number is not None}
            case of_older_version:  # second of the day -> rows
                found = {int(second): number for second, number in of_older_version.items()}
        retired |= {row["day_at"] + timedelta(seconds=second): number for second, number in found.items()}
    return retired


# A thousand devices have 360,000 records, so they are stored without repetitions. `Sums` is a list of its values in
# order: only the count if the values are not numbers, and no magnitude if it equals the total, as it does while no
# value is negative. SAME stands for fields that equal the counts in the sums, and for the digest of a source whose rows
# are those of the object. Older versions, which migration 0026 keeps from writing, stored all of it: their records are
# read here too.
SAME = "="


def _listed(sums: Sums) -> Sequence[Any]:
    # Not `astuple`, whose deep copies were half the CPU time of a commit.
    if sums.total is None:
        return (sums.values,)
    values = (sums.values, sums.total, sums.least, sums.greatest)
    return values if sums.magnitude == sums.total else (*values, sums.magnitude)


def _sums(listed: Sequence[Any]) -> Sums:
    match listed:
        case [values, total, least, greatest]:
            return Sums(values, total, least, greatest, total)
    return Sums(*listed)


def _values(sums: Mapping[str, Sums]) -> Mapping[str, int]:
    return {name: each.values for name, each in sums.items()}


def _columns(record: Record) -> dict[str, Any]:
    sums = {name: _listed(each) for name, each in record.sums.items()}
    fields = SAME if record.fields == _values(record.sums) else json.dumps(dict(record.fields), separators=(",", ":"))
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
        "source_digest": SAME if record.source_digest == record.digest else record.source_digest,
        "folded": record.folded,
        "fields": fields if record.fields else "",
        "sums": json.dumps(sums, separators=(",", ":")) if sums else "",
    }


@lru_cache(SHARED_TEXTS)
def _counts(text: str) -> Mapping[str, int]:
    """Devices that write alike have equal counts; the same object for all of them saves memory as well."""
    return MappingProxyType({intern(name): number for name, number in json.loads(text or "{}").items()})


def _instant(stored: Any) -> Any:
    """A streamed timestamp or None; SQLite has no type for instants."""
    return datetime.fromisoformat(stored) if isinstance(stored, str) else stored


def _record(row: Row, window: Window, now: datetime) -> Record:
    given = row["source_sums"]
    sums = {intern(name): _sums(listed) for name, listed in json.loads(given).items()} if given else {}
    fields, source_digest = row["source_fields"], row["source_digest"]
    return Record(
        window=window,
        part=row["part"],
        key=row["s3_key"],
        version=row["version"],
        digest=row["digest"],
        rows=row["record_count"],
        size_bytes=row["size_bytes"],
        source_cells=row["source_cells"],
        min_at=row["min_at"],
        max_at=row["max_at"],
        closed=row["status"] == "closed" and max(window.end, row["updated_at"]) <= now + AHEAD,
        fields=_values(sums) if fields == SAME else _counts(fields),
        source_digest=row["digest"] if source_digest == SAME else source_digest,
        sums=sums,
        trouble=row["trouble"],
        folded=row["folded"],
        written_at=row["updated_at"],
    )
