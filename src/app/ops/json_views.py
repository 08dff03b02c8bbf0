"""Jobs, runs and partitions as JSON: the same in the API and in the output of commands."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from app.core.runs import TALLY_NAMES, Outcome, Report, Run, Total, summary_of, to_json
from app.ops.scheduler import JobView

# What jobs, runs and partitions look like as JSON: the same in the API and in the output of commands.
#
# Invariant: instants are UTC with `Z`, durations are seconds, and a field is never left out.


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


# A run as the OpenAPI document describes it.
#
# Invariant: it says what `shapes.run_shown` gives, which a test compares.

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
WHOLE: Schema = {"type": "integer"}
INSTANT: Schema = {"type": "string", "format": "date-time"}


def _object(properties: Mapping[str, Schema], description: str = "") -> Schema:
    schema: Schema = {"type": "object", "required": list(properties), "properties": dict(properties)}
    return {**schema, "description": description} if description else schema


def _named(description: str) -> Schema:
    return {"type": "object", "additionalProperties": TALLY, "description": description}


TALLY = _object(dict.fromkeys(TALLY_NAMES, WHOLE))
REASON = _object({"reason": TEXT, "number": WHOLE, "new": WHOLE, "sample": TEXT})
LEDGER = _object(
    {
        "unit": TEXT,
        "closes": {"type": "boolean"},
        **dict.fromkeys(TALLY_NAMES, WHOLE),
        "reasons": {
            "type": "array",
            "items": REASON,
            "description": "What was set aside, and why; `new`: by this run.",
        },
        "fields": _named("By field, where the unit is values of fields; at most 100."),
        "partitions": _named("The partitions that are worth naming, at most 20."),
    },
    "What became of all that was counted at the source. It closes when in each field counted = new + already_there + "
    "corrected + set_aside + waiting. All 0 for a run that kept no ledger.",
)
FAILURE = _object(dict.fromkeys(("partition", "message", "hint"), TEXT))
RUN = _object(
    {
        "run_id": TEXT,
        "job": TEXT,
        "started_at": INSTANT,
        "ended_at": {"anyOf": [INSTANT, {"type": "null"}]},
        "outcome": {"type": "string", "enum": [outcome.value for outcome in Outcome]},
        **dict.fromkeys(("rows", "bytes", "windows", "late_rows", "corrected_rows"), WHOLE),
        "ledger": LEDGER,
        "ledger_text": {**TEXT, "description": "The same in one line; empty for a run that kept no ledger."},
        "failures": {"type": "array", "items": FAILURE, "description": "At most 20."},
        "error": TEXT,
        "hint": TEXT,
    }
)
RUNS = _object({"count": WHOLE, "runs": {"type": "array", "items": RUN}})
RUNS_ANSWER: dict[int | str, dict[str, Any]] = {
    200: {"description": "runs, newest first", "content": {"application/json": {"schema": RUNS}}}
}
