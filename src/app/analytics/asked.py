"""A request for a report, understood, and what its answer is known by; what was understood before is remembered.

Invariant: an answer is known by everything that it depends on: report, parameters, format, the state of the objects,
and what is said beside it.
"""

import time
from collections.abc import Hashable, Mapping, MutableMapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from app.analytics.flights import Flights
from app.analytics.formats import Answer
from app.analytics.reports import Report
from app.analytics.service import Analytics
from app.analytics.summaries import View
from app.core.errors import AppError

REMEMBERED = 256
WARNINGS = 20
Warnings = tuple[tuple[tuple[str, str], ...], ...]
Scope = MutableMapping[str, Any]


@dataclass(frozen=True, slots=True)
class Asked:
    """A request for a report, understood. `scan`: run it although there is a summary."""

    report: Report
    values: Mapping[str, Any]
    format: str
    scan: bool

    @property
    def from_memory(self) -> bool:
        """Whether the summaries have the answer."""
        return bool(self.report.summary) and not self.scan


@dataclass(frozen=True, slots=True)
class Serving:
    """What the routes act on. `asked`: requests that were understood before, by path and query, the newest last."""

    analytics: Analytics
    flights: Flights = field(default_factory=Flights)
    described: list[Mapping[str, Any]] = field(default_factory=list)
    asked: dict[tuple[str, bytes], Asked] = field(default_factory=dict)

    def remember(self, scope: Scope, asked: Asked) -> None:
        """Understand this request at once the next time."""
        if len(self.asked) >= REMEMBERED:
            del self.asked[next(iter(self.asked))]
        self.asked[scope["path"], scope["query_string"]] = asked

    def remembered(self, scope: Scope) -> Asked | None:
        """What this request asks for, when it was understood before."""
        return self.asked.get((scope["path"], scope["query_string"])) if scope["method"] == "GET" else None


def key_of(asked: Asked, view: View, warnings: Warnings) -> Hashable:
    """What the answer depends on."""
    return asked.report.path, asked.format, asked.scan, tuple(asked.values.items()), view.number, warnings


def headers_of(asked: Asked, view: View, answer: Answer, began: float) -> dict[str, str]:
    """What every answer carries; `began` is by the performance counter."""
    source = "summary" if asked.from_memory else "duckdb"
    headers = {
        "ETag": answer.etag,
        "X-Data-As-Of": text_of(view.as_of),
        "Server-Timing": f"{source};dur={(time.perf_counter() - began) * 1000:.2f}",
        "Cache-Control": "private, no-cache",
        "Content-Length": str(answer.size_bytes),
    }
    if warnings := len(view.faults) + answer.left_out:
        headers["X-Warnings"] = str(warnings)
    if asked.format != "json":
        headers["Content-Disposition"] = f'attachment; filename="{asked.report.name}.{asked.format}"'
    return headers


def unchanged(answer: Answer, if_none_match: str) -> bool:
    """Whether the caller has this answer already."""
    tags = [tag.strip().removeprefix("W/") for tag in if_none_match.split(",")]
    return answer.etag in tags or "*" in tags


def warnings_of(view: View, trouble: AppError | None) -> Warnings:
    """Objects that are left out or not wholly understood, and why the answer is not of now."""
    found = [(("object", key), ("message", fault)) for key, fault in view.faults[:WARNINGS]]
    if len(view.faults) > WARNINGS:
        found.append(
            (
                ("object", ""),
                ("message", f"{len(view.faults) - WARNINGS} more objects are left out or not wholly understood"),
            )
        )
    if trouble is not None:
        found.append((("object", ""), ("message", f"not up to date: {trouble}")))
    return tuple(found)


def text_of(at: datetime) -> str:
    """ISO 8601 with milliseconds and Z."""
    return at.astimezone(UTC).isoformat(timespec="milliseconds").removesuffix("+00:00") + "Z"
