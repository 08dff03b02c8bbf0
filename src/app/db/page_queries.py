"""What the pages ask of the state database: faults, groups of partitions, pages of runs, new rows by time.

Invariant: no question reads a row for each window of a pipeline; what is asked of many partitions is one look into an
index for each, or a sum that the database makes.
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
from app.db.database import NamedQueries, Row, Session
from app.db.leases import AHEAD, now_of

FAULTS = 200
FAULTY_WINDOWS = 20_000
NUMBERS = ("rows", "bytes", "windows", "late_rows", "corrected_rows")  # of a report, as columns of runs and totals
WRITTEN = 500
PARTIAL_RUNS = 200
SHORT_ID_CHARACTERS = 8


@dataclass(frozen=True, slots=True)
class RunFilter:
    """Which runs: `[since, until)` by their start; "" and None stand for all. `news`: those that found something."""

    since: datetime
    until: datetime
    job: str = ""
    outcome: Outcome | None = None
    news: bool = False


class SqlPages:
    """Questions of the pages. Raises what `Session` raises. From any thread."""

    def __init__(self, queries: NamedQueries) -> None:
        self._queries = queries

    @contextmanager
    def look(self) -> "Iterator[PageQuerySession]":
        """Several questions in one transaction."""
        with self._queries.database.transaction(read_only=True) as session:
            yield PageQuerySession(session, self._queries)

    def dismiss(self, problem_id: str, at: datetime, by: str) -> None:
        """A person has seen a problem that only time ends. Idempotent."""
        with self._queries.database.transaction() as session:
            session.run(self._queries["forget_dismissed"], before_at=at - timedelta(days=60))
            session.run(self._queries["dismiss"], problem_id=problem_id, at=at, by=by)


class PageQuerySession:
    """One transaction of `SqlPages`. For the thread that opened it."""

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
        """How often a job failed since its last good run, and when that began."""
        (row,) = self.rows("failures_in_a_row", job=job, epoch_at=EPOCH)
        return row["runs"], row["since_at"]

    def runs(self, choice: RunFilter, limit: int, before: datetime) -> tuple[Sequence[Run], int, int]:
        """The newest runs of that choice that began before an instant, how many it has in all, and how many of these
        found something.
        """
        outcome = choice.outcome.value if choice.outcome else ""
        of = {"job": choice.job, "outcome": outcome, "since_at": choice.since, "until_at": choice.until}
        page = {**of, "until_at": min(choice.until, before)}
        found = self.rows("chosen_runs", **page, news=int(choice.news), limit=limit)
        (count,) = self.rows("count_runs", **of)
        return [run_of(row) for row in found], count["runs"], count["with_news"] or 0

    def run(self, run_id: str) -> Run | None:
        """One run, by its id or its first characters, as `runs` prints them; None where none or several begin so."""
        found = self.rows("run_by_id", run_id=run_id)
        if not found and len(run_id) >= SHORT_ID_CHARACTERS:
            found = self.rows("runs_that_begin_with", start=run_id)
        return run_of(found[0]) if len(found) == 1 else None

    def beside(self, run: Run) -> tuple[Run | None, Run | None]:
        """The runs of the same job before and after."""
        of = {"job": run.job, "at": run.started_at}
        before, after = (self.rows(query, **of) for query in ("run_before", "run_after"))
        return next(map(run_of, before), None), next(map(run_of, after), None)

    def partial_runs(self, since: datetime) -> Sequence[Run]:
        """The latest runs that were partly delivered."""
        return [run_of(row) for row in self.rows("partial_runs", since_at=since, limit=PARTIAL_RUNS)]

    def last_runs(self, job: str) -> tuple[Run | None, Run | None]:
        """The newest run of a job, and the newest that has ended."""
        until = self.now() + AHEAD
        newest = self.rows("recent_runs_of_job", job=job, limit=1, until_at=until)
        ended = self.rows("last_ended", job=job, limit=1, until_at=until)
        return next(map(run_of, newest), None), next(map(run_of, ended), None)

    def written_by(self, run: Run, pipeline: str) -> Sequence[Row]:
        """What a run wrote and no later one has replaced."""
        until = run.ended_at or self.now()
        since = run.started_at - timedelta(days=1)
        of = {"from_at": run.started_at, "to_at": until, "since_at": since, "limit": WRITTEN}
        return self.rows("windows_written", pipeline=pipeline, **of)

    def groups(self, pipeline: str, names: "NameFilter", *, size: int, limit: int, offset: int = 0) -> Sequence[Row]:
        """Groups of `size` partitions by name: first_name, last_name, partitions, slowest_at, oldest_at, error."""
        of = {"pipeline": pipeline, **names.params, "size": size}
        return self.rows("partition_groups", **of, limit=limit, offset=offset)

    def partitions(self, pipeline: str, names: "NameFilter") -> int:
        """How many partitions have such names."""
        found: int = self.rows("count_partitions", pipeline=pipeline, **names.params)[0]["partitions"]
        return found

    def any_rows(self, pipeline: str, since: datetime, until: datetime, between: tuple[str, str] | None = None) -> bool:
        """Whether there is an object of that span: of any partition, or of one of those from first to last. Of old days
        only the day is known.
        """
        day = floor_to(since, DAY_SECONDS)
        of: dict[str, Any] = {"pipeline": pipeline, "since_at": since, "until_at": until, "since_day_at": day}
        if between is None:
            return bool(self.rows("any_rows", **of))
        return bool(self.rows("any_rows_between", **of, first=between[0], last=between[1]))

    def faulty_windows(self, pipeline: str, since: datetime, until: datetime) -> Sequence[Row]:
        """device_id, starts_at, ends_at and trouble of the windows with which something is wrong."""
        found = self.rows("trouble_windows", pipeline=pipeline, limit=FAULTY_WINDOWS)
        return [row for row in found if row["ends_at"] > since and row["starts_at"] < until]


@dataclass(frozen=True, slots=True)
class NameFilter:
    """Partitions from `first` to `last` ("" = no end) whose name holds `find`, whatever its case."""

    first: str = ""
    last: str = ""
    find: str = ""

    @property
    def params(self) -> Mapping[str, str]:
        """As the queries take them."""
        escaped = self.find.lower().replace("!", "!!").replace("%", "!%").replace("_", "!_")
        return {"first": self.first, "last": self.last, "pattern": f"%{escaped}%"}


def numbers_of(row: Row) -> dict[str, Any]:
    """What a report adds up to, as its row records it."""
    return {name: row[name] for name in NUMBERS} | {"written_new_rows": row["new_rows"]}


def run_of(row: Row) -> Run:
    """A run as its row records it."""
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
