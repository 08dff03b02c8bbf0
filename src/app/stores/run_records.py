"""The record of runs in the state database.

Invariants: a job's newest runs are kept and older ones go when a run is saved, so the table cannot grow for ever; each
run that ends is added to the totals once, in the transaction that says so.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from app.core.ledger import from_json, to_json
from app.core.runs import Failure, LedgerTotal, Outcome, Report, Run, Total
from app.stores.clocks import AHEAD, now_of
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
                session.run(self._queries["correct_totals"], job=run.job, ended_at=run.ended_at)
                session.run(self._queries["add_total"], **_sums(run))
                session.run_many(self._queries["add_ledger_total"], list(_ledger_sums(run)))
            prune = {"job": run.job, "until_at": run.started_at, "kept_before": self._kept - 1}
            session.run(self._queries["prune_runs"], **prune)

    def recent(self, job: str | None, limit: int) -> Sequence[Run]:
        """See `Runs.recent`."""
        if job is None:
            return self._runs("recent_runs", limit=limit)
        return self._runs("recent_runs_of_job", job=job, limit=limit)

    def last_ended(self, job: str) -> Run | None:
        """The newest run that has ended, whatever its outcome; None when none has."""
        return next(iter(self._runs("last_ended", job=job, limit=1)), None)

    def since_done_seconds(self, job: str) -> float | None:
        """See `Runs.since_done_seconds`."""
        with self._database.transaction(read_only=True) as session:
            now = now_of(session, self._queries)
            rows = session.rows(self._queries["last_done"], job=job, until_at=now + AHEAD)
        return max((now - rows[0]["started_at"]).total_seconds(), 0.0) if rows else None

    def totals(self) -> Sequence[Total]:
        """The sums over all runs that ever ended, by job and outcome. They never fall."""
        with self._database.transaction(read_only=True) as session:
            return [_total(row) for row in session.rows(self._queries["totals"])]

    def ledger_totals(self) -> Sequence[LedgerTotal]:
        """The sums of the ledgers of all runs that ever ended, by job, entry and reason. They never fall."""
        with self._database.transaction(read_only=True) as session:
            return [LedgerTotal(**row) for row in session.rows(self._queries["ledger_totals"])]

    def _runs(self, query: str, **params: Any) -> Sequence[Run]:
        with self._database.transaction(read_only=True) as session:
            until_at = now_of(session, self._queries) + AHEAD
            return [_run(row) for row in session.rows(self._queries[query], **params, until_at=until_at)]


def _sums(run: Run) -> dict[str, Any]:
    names = ("job", "outcome", "rows", "bytes", "windows", "late_rows", "corrected_rows", "ended_at")
    columns = _columns(run)
    return {name: columns[name] for name in names}


def _ledger_sums(run: Run) -> Iterator[dict[str, Any]]:
    """What a run adds to the sums. A job whose run kept a ledger has its entries also while they are 0."""
    ledger = run.report.ledger
    if ledger:
        of = {"job": run.job, "reason": ""}
        yield {**of, "entry": "new", "number": ledger.total.new}
        yield {**of, "entry": "corrected", "number": ledger.total.corrected}
    for one in ledger.set_aside:
        yield {"job": run.job, "entry": "set_aside", "reason": storable(one.reason), "number": one.new}


def _total(row: Row) -> Total:
    report = Report(**{name: row[name] for name in ("rows", "bytes", "windows", "late_rows", "corrected_rows")})
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
        "corrected_rows": run.report.corrected_rows,
        "failures": json.dumps([asdict(failure) for failure in run.report.failures]),
        "more": run.report.more,
        "error": storable(run.error),
        "hint": storable(run.hint),
        "ledger": json.dumps(to_json(run.report.ledger) if run.report.ledger else {}),
    }


def _run(row: Row) -> Run:
    report = Report(
        rows=row["rows"],
        bytes=row["bytes"],
        windows=row["windows"],
        late_rows=row["late_rows"],
        corrected_rows=row["corrected_rows"],
        failures=tuple(Failure(**failure) for failure in json.loads(row["failures"])),
        more=bool(row["more"]),
        ledger=from_json(json.loads(row["ledger"])),
    )
    outcome = Outcome(row["outcome"])
    return Run(
        row["run_id"], row["job"], row["started_at"], row["ended_at"], outcome, report, row["error"], row["hint"]
    )
