"""What jobs, runs and partitions look like as JSON: the same in the API and in the output of commands.

Invariant: instants are UTC with `Z`, durations are seconds, and a field is never left out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from app.core.ledger import summary_of, to_json
from app.core.runs import Report, Run, Total
from app.ops.scheduler import JobView


@dataclass(frozen=True, slots=True)
class PartitionView:
    """How far one partition is. `error` is empty when it is well."""

    job: str
    partition: str
    cursor_at: datetime | None
    high_watermark_at: datetime | None
    error: str


def lag_seconds(partition: PartitionView, now: datetime) -> float | None:
    """Age of the newest event seen, below 0 when it lies ahead of now; None before the first."""
    newest_at = partition.high_watermark_at
    return None if newest_at is None else (now - newest_at).total_seconds()


def instant_text(at: datetime | None) -> str | None:
    """`YYYY-MM-DDTHH:MM:SS.mmmZ`, None for none."""
    return None if at is None else at.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


@dataclass(frozen=True, slots=True)
class Calls:
    """What a job's service was asked: calls of this day UTC, how many a day may have, and calls of all days."""

    today: int
    a_day: int
    ever: int


@dataclass(frozen=True, slots=True)
class JobRecord:
    """What is known of a job beside where it stands: its last run, the sums of all runs, whether it fell silent, the
    calls of a service that allows only so many, and how far its last run or a cursor lies ahead of now.
    """

    last: Run | None
    totals: Sequence[Total] = ()
    stale: bool = False
    calls: Calls | None = None
    clock_ahead_seconds: float = 0.0


def job_shown(view: JobView, record: JobRecord) -> Mapping[str, Any]:
    """A job, where it stands and how its last run went."""
    progress = view.status.progress
    return {
        "name": view.job.name,
        "interval_seconds": view.job.interval_seconds,
        "state": view.status.state,
        "off": view.job.off,
        "stale": record.stale,
        "clock_ahead_seconds": record.clock_ahead_seconds,
        "next_run_at": instant_text(view.next_run_at),
        "can_backfill": view.can_backfill,
        "queued_backfills": view.status.queued_backfills,
        "progress": progress and {"done": progress.done, "total": progress.total, "rows": progress.rows},
        "runs_total": sum(total.runs for total in record.totals),
        "rows_total": sum(total.report.rows for total in record.totals),
        "late_rows_total": sum(total.report.late_rows for total in record.totals),
        "corrected_rows_total": sum(total.report.corrected_rows for total in record.totals),
        "calls": record.calls and {"today": record.calls.today, "a_day": record.calls.a_day},
        "last_run": record.last and run_shown(record.last),
    }


def failures_shown(report: Report) -> Sequence[Mapping[str, str]]:
    """The first twenty partitions that could not be finished."""
    return [{"partition": f.partition, "message": f.message, "hint": f.hint} for f in report.failures[:20]]


def run_shown(run: Run) -> Mapping[str, Any]:
    """One run, with at most twenty of its failures."""
    report = run.report
    return {
        "run_id": run.run_id,
        "job": run.job,
        "started_at": instant_text(run.started_at),
        "ended_at": instant_text(run.ended_at),
        "outcome": run.outcome.value,
        "rows": report.rows,
        "bytes": report.bytes,
        "windows": report.windows,
        "late_rows": report.late_rows,
        "corrected_rows": report.corrected_rows,
        "ledger": to_json(report.ledger),
        "ledger_text": summary_of(report.ledger),
        "failures": failures_shown(report),
        "error": run.error,
        "hint": run.hint,
    }


def partition_shown(partition: PartitionView, now: datetime) -> Mapping[str, Any]:
    """How far a partition is."""
    return {
        "job": partition.job,
        "partition": partition.partition,
        "status": "error" if partition.error else "ok",
        "cursor_at": instant_text(partition.cursor_at),
        "high_watermark_at": instant_text(partition.high_watermark_at),
        "lag_seconds": lag_seconds(partition, now),
        "error": partition.error,
    }
