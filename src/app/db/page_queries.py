"""Queries of the pages on the state database: faults, groups of partitions, pages of runs, new rows by time.

Invariant: no query reads a row for each window of a pipeline; a query over many partitions is one index lookup for
each, or a sum made by the database.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from app.core.ledger import from_json
from app.core.runs import Failure, Outcome, Report, Run
from app.core.windows import DAY_SECONDS, EPOCH, floor_to
from app.db.database import NamedQueries, Repository, Row, Session, now_of
from app.db.leases import AHEAD

FAULTS = 200
FAULTY_WINDOWS = 20_000
NUMBERS = ("rows", "bytes", "windows", "late_rows", "corrected_rows")  # report fields stored as columns
WRITTEN = 500
PARTIAL_RUNS = 200
SHORT_ID_CHARACTERS = 8


@dataclass(frozen=True, slots=True)
class RunFilter:
    """A filter for runs: `[since, until)` by start time; "" and None match all. `news`: only those that found
    something.
    """

    since: datetime
    until: datetime
    job: str = ""
    outcome: Outcome | None = None
    news: bool = False


class SqlPages(Repository):
    """The queries of the pages. Raises what `Session` raises. Thread-safe."""

    @contextmanager
    def look(self) -> "Iterator[PageQuerySession]":
        """Several queries in one transaction."""
        with self._queries.database.transaction(read_only=True) as session:
            yield PageQuerySession(session, self._queries)

    def dismiss(self, problem_id: str, at: datetime, by: str) -> None:
        """Record that a person has dismissed a problem that otherwise ends only with time. Idempotent."""
        with self._queries.database.transaction() as session:
            session.run(self._queries["forget_dismissed"], before_at=at - timedelta(days=60))
            session.run(self._queries["dismiss"], problem_id=problem_id, at=at, by=by)


class PageQuerySession:
    """One transaction of `SqlPages`. Used by the thread that opened it."""

    def __init__(self, session: Session, queries: NamedQueries) -> None:
        self._session = session
        self._queries = queries

    def rows(self, query: str, **params: Any) -> list[Row]:
        """The rows of a query of `sql/state`."""
        return self._session.rows(self._queries[query], **params)

    def now(self) -> datetime:
        """The database's clock."""
        return now_of(self._session, self._queries)

    def failures_in_a_row(self, job: str) -> tuple[int, datetime | None]:
        """How often a job failed since its last good run, and when the failures began."""
        (row,) = self.rows("failures_in_a_row", job=job, epoch_at=EPOCH)
        return row["runs"], row["since_at"]

    def runs(self, choice: RunFilter, limit: int, before: datetime) -> tuple[Sequence[Run], int, int]:
        """The newest matching runs that began before `before`, the number of matching runs, and how many of those found
        something.
        """
        outcome = choice.outcome.value if choice.outcome else ""
        of = {"job": choice.job, "outcome": outcome, "since_at": choice.since, "until_at": choice.until}
        page = {**of, "until_at": min(choice.until, before)}
        found = self.rows("chosen_runs", **page, news=int(choice.news), limit=limit)
        (count,) = self.rows("count_runs", **of)
        return [run_of(row) for row in found], count["runs"], count["with_news"] or 0

    def run(self, run_id: str) -> Run | None:
        """One run, by its id or a prefix of it, as `runs` prints them; None when no or several runs match."""
        found = self.rows("run_by_id", run_id=run_id)
        if not found and len(run_id) >= SHORT_ID_CHARACTERS:
            found = self.rows("runs_that_begin_with", start=run_id)
        return run_of(found[0]) if len(found) == 1 else None

    def beside(self, run: Run) -> tuple[Run | None, Run | None]:
        """The previous and the next run of the same job."""
        of = {"job": run.job, "at": run.started_at}
        before, after = (self.rows(query, **of) for query in ("run_before", "run_after"))
        return next(map(run_of, before), None), next(map(run_of, after), None)

    def partial_runs(self, since: datetime) -> Sequence[Run]:
        """The latest runs with a partial outcome."""
        return [run_of(row) for row in self.rows("partial_runs", since_at=since, limit=PARTIAL_RUNS)]

    def last_runs(self, job: str) -> tuple[Run | None, Run | None]:
        """The newest run of a job, and its newest ended run."""
        until = self.now() + AHEAD
        newest = self.rows("recent_runs_of_job", job=job, limit=1, until_at=until)
        ended = self.rows("last_ended", job=job, limit=1, until_at=until)
        return next(map(run_of, newest), None), next(map(run_of, ended), None)

    def written_by(self, run: Run, pipeline: str) -> Sequence[Row]:
        """What a run wrote and no later run has replaced."""
        until = run.ended_at or self.now()
        since = run.started_at - timedelta(days=1)
        of = {"from_at": run.started_at, "to_at": until, "since_at": since, "limit": WRITTEN}
        return self.rows("windows_written", pipeline=pipeline, **of)

    def groups(self, pipeline: str, names: "NameFilter", *, size: int, limit: int, offset: int = 0) -> Sequence[Row]:
        """Groups of `size` partitions by name: first_name, last_name, partitions, slowest_at, oldest_at, error."""
        of = {"pipeline": pipeline, **names.params, "size": size}
        return self.rows("partition_groups", **of, limit=limit, offset=offset)

    def partitions(self, pipeline: str, names: "NameFilter") -> int:
        """The number of partitions that match."""
        found: int = self.rows("count_partitions", pipeline=pipeline, **names.params)[0]["partitions"]
        return found

    def any_rows(self, pipeline: str, since: datetime, until: datetime, between: tuple[str, str] | None = None) -> bool:
        """Whether there is an object in that span: of any partition, or of one from first to last. For old windows only
        the day is known.
        """
        day = floor_to(since, DAY_SECONDS)
        of: dict[str, Any] = {"pipeline": pipeline, "since_at": since, "until_at": until, "since_day_at": day}
        if between is None:
            return bool(self.rows("any_rows", **of))
        return bool(self.rows("any_rows_between", **of, first=between[0], last=between[1]))

    def faulty_windows(self, pipeline: str, since: datetime, until: datetime) -> Sequence[Row]:
        """device_id, starts_at, ends_at and trouble of the windows that have a problem."""
        found = self.rows("trouble_windows", pipeline=pipeline, limit=FAULTY_WINDOWS)
        return [row for row in found if row["ends_at"] > since and row["starts_at"] < until]


@dataclass(frozen=True, slots=True)
class NameFilter:
    """Partitions from `first` to `last` ("" = unbounded) whose name contains `find`, case-insensitive."""

    first: str = ""
    last: str = ""
    find: str = ""

    @property
    def params(self) -> Mapping[str, str]:
        """As query parameters."""
        escaped = self.find.lower().replace("!", "!!").replace("%", "!%").replace("_", "!_")
        return {"first": self.first, "last": self.last, "pattern": f"%{escaped}%"}


def numbers_of(row: Row) -> dict[str, Any]:
    """The numbers of a report in a row."""
    return {name: row[name] for name in NUMBERS} | {"written_new_rows": row["new_rows"]}


def run_of(row: Row) -> Run:
    """The run in a row."""
    document = json.loads(row["ledger"])
    report = Report(
        **numbers_of(row),
        failures=tuple(Failure(**failure) for failure in json.loads(row["failures"])),
        more=bool(row["more"]),
        ledger=from_json(document if document.get("is_kept", True) else {}),
    )
    return Run(
        row["run_id"],
        row["job"],
        row["started_at"],
        row["ended_at"],
        Outcome(row["outcome"]),
        report,
        row["error"],
        row["hint"],
        document.get("started_by", ""),
        document.get("requests", {}),
    )
