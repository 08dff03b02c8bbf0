"""The record of runs in the state database.

Invariants: a job's newest runs are kept and older ones go when a run is saved, so the table cannot grow for ever; each
run that ends is added to the totals once, in the transaction that says so.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from app.core.runs import Failure, Outcome, Report, Run, Total
from app.stores.sql import Database, Row
from app.stores.sql_values import storable

KEPT_RUNS = 1000


class SqlRuns:
    """See `app.core.runs.Runs`."""

    def __init__(self, database: Database, queries: Mapping[str, str], *, kept: int = KEPT_RUNS) -> None:
        self._database = database
        self._queries = queries
        self._kept = kept

    def save(self, run: Run) -> None:
        """See `Runs.save`; the job's oldest runs beyond the kept number go."""
        with self._database.transaction() as session:
            ends = run.ended_at is not None and not session.rows(self._queries["is_counted"], run_id=run.run_id)
            session.run(self._queries["save_run"], **_columns(run))
            if ends:
                session.run(self._queries["add_total"], **_sums(run))
            session.run(self._queries["prune_runs"], job=run.job, kept_before=self._kept - 1)

    def recent(self, job: str | None, limit: int) -> Sequence[Run]:
        """See `Runs.recent`."""
        if job is None:
            return self._runs("recent_runs", limit=limit)
        return self._runs("recent_runs_of_job", job=job, limit=limit)

    def last_ended(self, job: str) -> Run | None:
        """The newest run that has ended, whatever its outcome; None when none has."""
        return next(iter(self._runs("last_ended", job=job)), None)

    def totals(self) -> Sequence[Total]:
        """The sums over all runs that ever ended, by job and outcome. They never fall."""
        with self._database.transaction(read_only=True) as session:
            return [_total(row) for row in session.rows(self._queries["totals"])]

    def _runs(self, query: str, **params: Any) -> Sequence[Run]:
        with self._database.transaction(read_only=True) as session:
            return [_run(row) for row in session.rows(self._queries[query], **params)]


def _sums(run: Run) -> dict[str, Any]:
    names = ("job", "outcome", "rows", "bytes", "windows", "late_rows", "ended_at")
    columns = _columns(run)
    return {name: columns[name] for name in names}


def _total(row: Row) -> Total:
    report = Report(rows=row["rows"], bytes=row["bytes"], windows=row["windows"], late_rows=row["late_rows"])
    return Total(row["job"], Outcome(row["outcome"]), row["runs"], report, row["ended_at"])


def _columns(run: Run) -> dict[str, Any]:
    return {
        "run_id": run.run_id,
        "job": run.job,
        "started_at": run.started_at,
        "ended_at": run.ended_at,
        "outcome": run.outcome.value,
        "rows": run.report.rows,
        "bytes": run.report.bytes,
        "windows": run.report.windows,
        "late_rows": run.report.late_rows,
        "failures": json.dumps([asdict(failure) for failure in run.report.failures]),
        "more": run.report.more,
        "error": storable(run.error),
        "hint": storable(run.hint),
    }


def _run(row: Row) -> Run:
    report = Report(
        rows=row["rows"],
        bytes=row["bytes"],
        windows=row["windows"],
        late_rows=row["late_rows"],
        failures=tuple(Failure(**failure) for failure in json.loads(row["failures"])),
        more=bool(row["more"]),
    )
    outcome = Outcome(row["outcome"])
    return Run(
        row["run_id"], row["job"], row["started_at"], row["ended_at"], outcome, report, row["error"], row["hint"]
    )
