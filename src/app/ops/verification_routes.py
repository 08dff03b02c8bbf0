"""The routes of the gap map, of verification and of healing.

Invariant: what only reads what is known or listed needs `ops:read`; what reads whole windows or writes needs `ops:run`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any

from fastapi import APIRouter, Body, Query
from pydantic import AwareDatetime, Field

from app.core.gap_map import Cell
from app.core.verify import Verdict, Verification, refuse_unknown
from app.core.windows import Window
from app.ops.gap_map_cache import Atlas, MapRequest
from app.ops.json_views import instant_text
from app.ops.routes import KNOWN_JOB, Span, accepted, known, window_of
from app.ops.scheduler import Scheduler
from app.ops.verification import Healing, Proofs, Result, found, heal_job, shown
from app.web.auth import needs
from app.web.errors import Refusal, Refused

READ = needs("ops:read")
RUN = needs("ops:run")
MOST_HOURS = 31 * 24
MOST_DAYS = 366
MOST_LINES = 200


@dataclass(frozen=True, slots=True)
class Proof:
    """What the routes look at and act on."""

    scheduler: Scheduler
    proofs: Proofs
    atlas: Atlas
    verifications: Mapping[str, Verification]
    clock: Callable[[], datetime]


class Part(Span):
    """`[from, to)`, and of one partition only when it is named."""

    partition: str | None = Field(default=None, max_length=300)


def build(proof: Proof) -> APIRouter:
    """All routes of this module."""
    router = APIRouter(tags=["ops"])
    _looking(router, proof)
    _acting(router, proof)
    return router


def _looking(router: APIRouter, proof: Proof) -> None:
    @router.get(
        "/ops/gaps",
        openapi_extra=READ,
        summary="Which windows the destination holds, from its own listing",
        responses=KNOWN_JOB,
    )
    def gaps(
        job: Annotated[str, Query(max_length=100)],
        hours: Annotated[int, Query(ge=1, le=MOST_HOURS)] = 24,
        to: AwareDatetime | None = None,
        offset: Annotated[int, Query(ge=0, le=1_000_000)] = 0,
        limit: Annotated[int, Query(ge=1, le=MOST_LINES)] = 50,
    ) -> dict[str, Any]:
        now = proof.clock()
        end = _end(to, now)
        gap_map = proof.atlas.gaps(MapRequest(known(proof.scheduler, job), _back(end, hours), offset, limit))
        lines = [
            {"partition": line.partition, "error": line.error, "cells": [_cell(cell) for cell in line.cells]}
            for line in gap_map.lines
        ]
        return {"job": job, "now": instant_text(now), "total": gap_map.total, "partitions": lines}

    @router.get("/ops/verifications", openapi_extra=READ, summary="The latest verification of each job")
    def verifications() -> dict[str, Any]:
        maps = list(proof.atlas.jobs)
        return {
            "jobs": list(proof.proofs.jobs),
            "maps": maps,
            "verifications": [_result(each) for each in proof.proofs.results()],
        }


def _end(to: datetime | None, now: datetime) -> datetime:
    """The end of the map: a minute from now on, so that requests of one minute share a map."""
    return min(to or now, now).replace(second=0, microsecond=0) + timedelta(minutes=1)


def _back(end: datetime, hours: int) -> Window:
    try:
        at = end.astimezone(UTC)
        return Window(at - timedelta(hours=hours), at)
    except OverflowError:
        raise Refused(Refusal(422, "to is out of range", "give an instant of this century", "query.to")) from None


def _acting(router: APIRouter, proof: Proof) -> None:
    @router.post(
        "/ops/jobs/{job}/verify",
        openapi_extra=RUN,
        summary="Compare both ends by content",
        status_code=202,
        responses=KNOWN_JOB,
    )
    def verify(job: str, span: Annotated[Span, Body()]) -> dict[str, Any]:
        proof.proofs.start(known(proof.scheduler, job), _bounded(span))
        return {"job": job, "state": "verifying"}

    @router.post(
        "/ops/jobs/{job}/heal",
        openapi_extra=RUN,
        summary="Compare, and mend what differs",
        status_code=202,
        responses=KNOWN_JOB,
    )
    def heal(job: str, part: Annotated[Part, Body()]) -> dict[str, Any]:
        verification = found(proof.verifications, known(proof.scheduler, job))
        what = Healing(_bounded(part), part.partition)
        refuse_unknown(verification(proof.scheduler.stop), what.span, what.partition)

        def seen(verdict: Verdict) -> None:
            proof.proofs.mended(job, verdict)
            if verdict.healed:
                proof.atlas.forget(job)

        proof.scheduler.queue(job, lambda of: heal_job(of, verification, what, seen))
        proof.atlas.forget(job)
        return accepted(proof.scheduler, job)


def _bounded(span: Span) -> Window:
    window = window_of(span)
    if window.seconds > MOST_DAYS * 86_400:
        hint = "ask for a year at a time, or use `python -m app verify`"
        raise Refused(Refusal(422, f"more than {MOST_DAYS} days", hint, "body"))
    return window


def _cell(cell: Cell) -> Mapping[str, Any]:
    return {
        "start": f"{cell.window.start:%Y-%m-%dT%H:%M:%SZ}",
        "end": f"{cell.window.end:%Y-%m-%dT%H:%M:%SZ}",
        "state": cell.state.value,
        "rows": cell.rows,
        "objects": cell.objects,
    }


def _result(result: Result) -> Mapping[str, Any]:
    return {
        "job": result.job,
        "from": instant_text(result.span.start),
        "to": instant_text(result.span.end),
        "started_at": instant_text(result.started_at),
        "ended_at": instant_text(result.ended_at),
        "equal": result.equal,
        "counts": dict(result.counts),
        "windows": [shown(each) for each in result.windows],
        "error": result.error,
        "hint": result.hint,
    }
