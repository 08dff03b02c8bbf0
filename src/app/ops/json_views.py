"""Jobs, runs and partitions as JSON: the same in the API, in command output and in the OpenAPI schema.

Invariant: timestamps are UTC with `Z`, durations are seconds, and a field is never left out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from app.core.ledger import TALLY_NAMES, summary_of, to_json
from app.core.runs import Outcome, Report, Run
from app.core.windows import instant_text
from app.db.checkpoints import Checkpoint
from app.ops.scheduler import JobView


def lag_seconds(partition: Checkpoint, now: datetime) -> float | None:
    """Age of the newest event, negative when it lies in the future; None before the first."""
    newest_at = partition.high_watermark_at
    return None if newest_at is None else (now - newest_at).total_seconds()


@dataclass(frozen=True, slots=True)
class ServiceCalls:
    """Calls to the service of a job: today's (UTC), the limit per day, and all calls ever."""

    today: int
    a_day: int
    ever: int


def view_shown(view: JobView) -> dict[str, Any]:
    """A job and its current state."""
    return {
        "name": view.job.name,
        "helper_of": view.job.helper_of or None,
        "interval_seconds": view.job.interval_seconds,
        "state": view.state,
        "next_run_at": instant_text(view.next_run_at),
        "can_backfill": view.can_backfill,
        "queued_backfills": view.queued_backfills,
        "progress": view.progress and asdict(view.progress),
    }


RUN_NUMBERS = ("rows", "new_rows", "bytes", "windows", "late_rows", "corrected_rows")


def failures_shown(report: Report) -> Sequence[Mapping[str, str]]:
    """The first twenty partitions that could not be completed."""
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
        **{name: getattr(report, name) for name in RUN_NUMBERS},
        "ledger": to_json(report.ledger),
        "ledger_text": summary_of(report.ledger),
        "failures": failures_shown(report),
        "error": run.error,
        "hint": run.hint,
    }


# The same as OpenAPI schemas; a test compares them with the actual output.

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
WHOLE: Schema = {"type": "integer"}
INSTANT: Schema = {"type": "string", "format": "date-time"}
MAYBE_INSTANT: Schema = {"anyOf": [INSTANT, {"type": "null"}]}


def _object(properties: Mapping[str, Schema], description: str = "") -> Schema:
    schema: Schema = {"type": "object", "required": list(properties), "properties": dict(properties)}
    return {**schema, "description": description} if description else schema


def _list(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def _named(description: str) -> Schema:
    return {"type": "object", "additionalProperties": TALLY, "description": description}


TALLY = _object(dict.fromkeys(TALLY_NAMES, WHOLE))
REASON = _object({"reason": TEXT, "number": WHOLE, "new": WHOLE, "sample": TEXT})
LEDGER = _object(
    {
        "unit": TEXT,
        "closes": {"type": "boolean"},
        **dict.fromkeys(TALLY_NAMES, WHOLE),
        "reasons": {**_list(REASON), "description": "What was set aside, and why; `new`: by this run."},
        "fields": _named("By field, where the unit is values of fields; at most 100."),
        "partitions": _named("The partitions that are worth naming, at most 20."),
    },
    "What became of everything counted at the source. It closes when in each field counted = new + already_there + "
    "corrected + set_aside + waiting. All 0 for a run that kept no ledger.",
)
FAILURE = _object(dict.fromkeys(("partition", "message", "hint"), TEXT))
RUN = _object(
    {
        "run_id": TEXT,
        "job": TEXT,
        "started_at": INSTANT,
        "ended_at": MAYBE_INSTANT,
        "outcome": {"type": "string", "enum": [outcome.value for outcome in Outcome]},
        **dict.fromkeys(RUN_NUMBERS, WHOLE),
        "ledger": LEDGER,
        "ledger_text": {**TEXT, "description": "The same in one line; empty for a run that kept no ledger."},
        "failures": {**_list(FAILURE), "description": "At most 20."},
        "error": TEXT,
        "hint": TEXT,
    }
)
MAYBE_TEXT: Schema = {"anyOf": [TEXT, {"type": "null"}]}
MAYBE_NUMBER: Schema = {"anyOf": [{"type": "number"}, {"type": "null"}]}
ANYTHING: Schema = {"type": "object"}
NUMBERS: Schema = {"type": "object", "additionalProperties": {"type": "number"}}
RUNS = _object(
    {
        "count": WHOLE,
        "total": {**WHOLE, "description": "How many runs the job, outcome and time have, whatever they found."},
        "with_news": {**WHOLE, "description": "How many of these found something."},
        "before": {**MAYBE_INSTANT, "description": "Send it as `before` for the next page."},
        "runs": _list(RUN),
    }
)
WRITTEN = _object(
    {
        **dict.fromkeys(("partition", "from", "to"), TEXT),
        "state": {**TEXT, "description": "OK, still filling, missing, or changed at the destination."},
        **dict.fromkeys(("rows", "bytes"), WHOLE),
        "object": TEXT,
        "written_at": INSTANT,
        "gone_since": {**MAYBE_INSTANT, "description": "When a listing first showed that it is missing or changed."},
    }
)
KEPT = _object(
    {"files": _list(_object({"name": TEXT, "bytes": WHOLE, "href": TEXT, "needs": TEXT})), "total": WHOLE},
    "At most 100 files; `needs` is the scope that may read at `href`.",
)
NEIGHBOUR = {"anyOf": [_object({"run_id": TEXT, "started_at": INSTANT, "outcome": TEXT}), {"type": "null"}]}
RUN_DETAIL = _object(
    {
        **RUN["properties"],
        "helper_of": MAYBE_TEXT,
        "interval_seconds": {"anyOf": [WHOLE, {"type": "null"}]},
        "started_by": {**TEXT, "description": "schedule, command line, or who asked for it."},
        "requests": {**NUMBERS, "description": "Requests that are charged for, by kind: put, list, get, read_unit."},
        "written": {**_list(WRITTEN), "description": "Windows that no later run wrote again; at most 500."},
        "seen_in_runs": {**WHOLE, "description": "Kept runs of the job with the same error."},
        "progress": {"anyOf": [ANYTHING, {"type": "null"}]},
        "previous": NEIGHBOUR,
        "next": NEIGHBOUR,
    }
)
LOG = _object(
    {
        "lines": _list(_object(dict.fromkeys(("time", "level", "message"), TEXT))),
        "left_out": {**WHOLE, "description": "Earlier lines beyond the limit."},
        "note": {**TEXT, "description": "Why there are none, if it can be said."},
    }
)
PROBLEM = _object(
    {
        **dict.fromkeys(("id", "kind", "mark", "job", "partition", "title"), TEXT),
        "count": WHOLE,
        **dict.fromkeys(("from", "to", "since"), MAYBE_INSTANT),
        **dict.fromkeys(("message", "next"), TEXT),
        "actions": _list(ANYTHING),
    }
)
SUMMARY = _object(
    {
        "now": INSTANT,
        "verdict": _object(
            {"state": TEXT, "title": TEXT, "parts": _list(_object({"text": TEXT, "href": TEXT})), "more": TEXT},
            "One sentence in parts, each with its place on the page; `state`: ok, warn, bad or off.",
        ),
        "complete_up_to": {**MAYBE_INSTANT, "description": "Up to where every partition is finished."},
        "checked_at": {**MAYBE_INSTANT, "description": "When both ends were compared last."},
        "problems": {**_list(PROBLEM), "description": "The worst first, at most 50."},
        "problems_total": WHOLE,
        "bill": {**MAYBE_TEXT, "description": "What requests cost a month at the rate of the last days."},
        **dict.fromkeys(("day_starts_at", "hours_start_at"), INSTANT),
        "jobs": {**_list(ANYTHING), "description": "State, lag, new rows, and the last day in one letter an hour."},
    },
    "With SCALE_ENGINE=procrastinate also `scale`: workers, what waits for one by queue, shards and those that go on.",
)
MAP_ROW = _object({"name": TEXT, "cells": TEXT, "lag_seconds": MAYBE_NUMBER, "error": TEXT})
MAP_GROUP = _object({**dict.fromkeys(("first", "last", "cells"), TEXT), **dict.fromkeys(("count", "problems"), WHOLE)})
MAP = _object(
    {
        **dict.fromkeys(("job", "span"), TEXT),
        **dict.fromkeys(("now", "start", "end"), INSTANT),
        "cell_seconds": {**WHOLE, "description": "As a rule; days and weeks begin at midnight in the time zone."},
        "starts": {**_list(TEXT), "description": "ISO 8601 to the minute: 2026-02-07T11:00Z."},
        "source": {"type": "string", "enum": ["listing", "records"]},
        **dict.fromkeys(("total", "problems", "rows_total"), WHOLE),
        "rows": {**_list(MAP_ROW), "description": "Of single partitions."},
        "groups": {**_list(MAP_GROUP), "description": "In place of rows above 200 partitions."},
    },
    "One letter a cell, the worst state in it: m missing, p partly missing, c changed, "
    "l late, s rows set aside, u not known, o still filling, k OK, n no data.",
)
MAP_WINDOW = _object(
    {
        **dict.fromkeys(("from", "to"), INSTANT),
        **dict.fromkeys(("letter", "state"), TEXT),
        **dict.fromkeys(("rows", "objects", "bytes"), WHOLE),
        "object": TEXT,
        "delivered_at": MAYBE_INSTANT,
        "run_id": MAYBE_TEXT,
        "gone_since": MAYBE_INSTANT,
    }
)
MAP_WINDOWS = _object({"job": TEXT, "partition": TEXT, "windows": _list(MAP_WINDOW)})


def answered_with(schema: Schema, description: str) -> dict[int | str, dict[str, Any]]:
    """The 200 response of a route with this schema."""
    return {200: {"description": description, "content": {"application/json": {"schema": schema}}}}
