"""A run as the OpenAPI document describes it.

Invariant: it says what `shapes.run_shown` gives, which a test compares.
"""

from collections.abc import Mapping
from typing import Any

from app.core.ledger import TALLY_NAMES
from app.core.runs import Outcome

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
