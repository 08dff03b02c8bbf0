"""The /ops API, the probes and /metrics as FastAPI routes.

Invariant: every route declares its scope. Reading records or listings needs `ops:read`; starting or stopping work,
reading whole windows and writing need `ops:run`.
"""

import shlex
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Body, Depends, Path, Query, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from pydantic import BaseModel, ConfigDict, Field, SecretStr

from app.core.errors import Rejected
from app.core.runs import Outcome
from app.core.verify import MapCell
from app.core.windows import EPOCH, Window, instant_text, refuse_future, whole_second
from app.db.checkpoints import Checkpoint
from app.db.page_queries import RunFilter
from app.ops.delivery_map import MOST_DAYS
from app.ops.json_views import (
    RUNS,
    answered_with,
    lag_seconds,
    run_shown,
    view_shown,
)
from app.ops.metrics import exposition, series_of
from app.ops.page_data import Instant, bounded
from app.ops.scheduler import Scheduler
from app.ops.service import BuiltService
from app.ops.verification import VerificationResult, window_json
from app.web.api import refuse_unknown_parameters
from app.web.auth import COOKIE, OPEN, SESSION, AccessGuard, needs, unauthorized
from app.web.errors import Answers, Refused, faults

READ = needs("ops:read")
RUN = needs("ops:run")
EVERYBODY = needs(OPEN)
AWAY = "the state database, which keeps sessions, is unavailable"
MAX_RUNS = 500
MAX_PARTITIONS = 1000
KNOWN_JOB = faults({404: "no job has this name", 409: "the job is off: the hint names the variable"})
ABLE_JOB = {
    **KNOWN_JOB,
    **faults({400: "the job has nothing of this kind, or no such partition: the hint names which"}),
}
JOB_NAMES = ["influx_to_s3", "csv_inbox", "s3_sweep"]
JobInPath = Annotated[str, Path(examples=JOB_NAMES)]
MOST_HOURS = 31 * 24
MOST_LINES = 200
NEWEST_CELLS = 200
ACT: dict[str, Any] = {"openapi_extra": RUN, "status_code": 202, "responses": KNOWN_JOB}
ACT_ABLE = {**ACT, "responses": ABLE_JOB}
TEXT_FORMAT = "text/plain; version=0.0.4; charset=utf-8"


class Span(BaseModel):
    """`[from, to)`; both with an offset from UTC."""

    model_config = ConfigDict(extra="forbid")
    from_at: Instant = Field(alias="from")
    to_at: Instant = Field(alias="to")


class Part(Span):
    """`[from, to)`, and of one partition only when it is named."""

    partition: str | None = Field(default=None, max_length=300)


class Liveness(BaseModel):
    """What /health answers."""

    status: Literal["healthy", "unhealthy"]
    version: str
    timestamp: datetime


class ReadyChecks(BaseModel):
    """What /ready answers: each check by name, and what those that succeed say beside that."""

    ready: bool
    checks: dict[str, bool] = Field(examples=[{"worker_running": True, "s3_accessible": True}])
    notes: dict[str, str] = {}


class SignIn(BaseModel):
    """A key, as it was shown when it was made."""

    model_config = ConfigDict(extra="forbid")
    key: SecretStr = Field(max_length=200)


def build(ops: BuiltService, guard: AccessGuard) -> APIRouter:
    """All routes of this module."""
    router = APIRouter(tags=["ops"])
    _monitored(router, ops)
    strict = APIRouter(dependencies=[Depends(refuse_unknown_parameters)])
    _session(strict, guard)
    _reading(strict, ops)
    _looking_at_both_ends(strict, ops)
    _acting(strict, ops)
    router.include_router(strict)
    return router


def _monitored(router: APIRouter, ops: BuiltService) -> None:
    """The routes for monitoring; some monitors add parameters of their own. `HeadwaterApp` answers the probes before
    they get here; these routes only document them.
    """

    @router.get("/health", openapi_extra=EVERYBODY, summary="Liveness", responses=_probed(Liveness))
    async def health() -> Response:
        answer = ops.probes.health()
        return JSONResponse(answer.body, answer.status)

    @router.get("/ready", openapi_extra=EVERYBODY, summary="Readiness, check by check", responses=_probed(ReadyChecks))
    async def ready() -> Response:
        answer = ops.probes.ready()
        return JSONResponse(answer.body, answer.status)

    @router.get("/metrics", openapi_extra=READ, summary="For Prometheus", response_class=PlainTextResponse)
    def metrics() -> Response:
        return PlainTextResponse(exposition(series_of(ops)), media_type=TEXT_FORMAT)


def _probed(model: type[BaseModel]) -> Answers:
    return {200: {"model": model, "description": "yes"}, 503: {"model": model, "description": "no"}}


def _session(router: APIRouter, guard: AccessGuard) -> None:
    refused = {401: "the key is not known", 403: "the key may see no page", 429: "too many failed sign-ins"}

    @router.post(
        "/ops/session",
        openapi_extra=EVERYBODY,
        summary="Sign in to the dashboard",
        status_code=204,
        responses=faults({**refused, 503: AWAY}),
    )
    async def sign_in(request: Request, sent: SignIn) -> Response:
        grant = guard.sign_in(sent.key.get_secret_value(), request.scope)
        if grant.scopes.isdisjoint(("ops:read", "analytics:read")):
            hint = "use one with the scope ops:read for the dashboard, analytics:read for /analytics/explore"
            raise Refused(403, "this key may not see any page", hint)
        response = Response(status_code=204)
        response.set_cookie(
            COOKIE,
            await guard.begin_session(grant),
            max_age=int(SESSION.total_seconds()),
            httponly=True,
            samesite="strict",
            secure=request.url.scheme == "https",
        )
        return response

    @router.delete("/ops/session", openapi_extra=EVERYBODY, summary="Sign out", status_code=204)
    async def sign_out(request: Request) -> Response:
        await guard.end_session(request.scope)
        response = Response(status_code=204)
        response.delete_cookie(COOKIE, path="/", httponly=True, samesite="strict")
        return response

    @router.get(
        "/ops/session",
        openapi_extra=EVERYBODY,
        summary="Who is signed in, and what the key may do",
        responses=faults({401: "nobody is signed in", 503: AWAY}),
    )
    async def who(request: Request) -> dict[str, Any]:
        grant = await guard.grant(request.scope)
        if grant is None:
            raise Refused(*unauthorized("nobody is signed in"))
        return {"name": grant.name, "scopes": sorted(grant.scopes), "keys": bool(guard.keyring.by_name)}


def _reading(router: APIRouter, ops: BuiltService) -> None:
    @router.get("/ops/jobs", openapi_extra=READ, summary="Every job, also those that are off, with its last run")
    def jobs() -> dict[str, Any]:
        return overview(ops)

    @router.get(
        "/ops/runs",
        openapi_extra=READ,
        summary="Runs by job, outcome and time, newest first",
        responses=answered_with(RUNS, "runs, newest first"),
    )
    def runs(
        job: str | None = None,
        outcome: Outcome | None = None,
        start: Annotated[Instant | None, Query(alias="from")] = None,
        end: Annotated[Instant | None, Query(alias="to")] = None,
        *,
        news: Annotated[bool, Query(description="Only runs that found something, or did not end well.")] = False,
        before: Annotated[Instant | None, Query(description="The next page: runs that began earlier.")] = None,
        limit: Annotated[int, Query(ge=1, le=MAX_RUNS)] = 50,
    ) -> dict[str, Any]:
        until = end or ops.clock() + timedelta(days=1)
        choice = RunFilter(start or EPOCH, until, job or "", outcome, news)
        with ops.state.pages.look() as look:
            found, total, with_news = look.runs(choice, limit + 1, before or until)
        if not (outcome or start or end or news or before):
            found = ops.state.runs.recent(job, limit + 1)
        page = found[:limit]
        # to the microsecond: of runs that begin in one millisecond the next page would miss some
        more = f"{page[-1].started_at.astimezone(UTC):%Y-%m-%dT%H:%M:%S.%fZ}" if len(found) > limit else None
        return {
            "count": len(page),
            "total": total,
            "with_news": with_news,
            "before": more,
            "runs": [run_shown(run) for run in page],
        }

    @router.get("/ops/partitions", openapi_extra=READ, summary="How far each partition is, largest lag first")
    def partitions(
        job: str | None = None, limit: Annotated[int, Query(ge=1, le=MAX_PARTITIONS)] = 200
    ) -> dict[str, Any]:
        now = ops.clock()
        found = [(name, each) for name, each in ops.partitions() if job in (None, name)]
        found.sort(key=lambda one: (not one[1].error, -(lag_seconds(one[1], now) or 0.0), one[1].partition))
        return {"total": len(found), "partitions": [_partition(*each, now) for each in found[:limit]]}

    @router.get("/ops/history", openapi_extra=READ, summary="What jobs ingested lately, file by file, newest first")
    def history(job: str | None = None, limit: Annotated[int, Query(ge=1, le=MAX_RUNS)] = 50) -> dict[str, Any]:
        wanted = {name: lines for name, lines in ops.pipelines.histories.items() if job in (None, name)}
        return {"histories": [{"job": name, "entries": list(lines(limit))} for name, lines in wanted.items()]}


def _partition(job: str, at: Checkpoint, now: datetime) -> Mapping[str, Any]:
    return {
        "job": job,
        "partition": at.partition,
        "status": "error" if at.error else "ok",
        "cursor_at": instant_text(at.cursor_at),
        "high_watermark_at": instant_text(at.high_watermark_at),
        "lag_seconds": lag_seconds(at, now),
        "error": at.error,
    }


def overview(ops: BuiltService) -> dict[str, Any]:
    """Every job as JSON, with its state, totals and last run. Raises the errors of the state."""
    totals = ops.state.runs.totals()
    shown = []
    for view in ops.scheduler.views():
        name = view.job.name
        own = [total for total in totals if total.job == name]
        calls = ops.pipelines.calls[name]() if name in ops.pipelines.calls else None
        last = next(iter(ops.state.runs.recent(name, 1)), None)
        shown.append(
            {
                **view_shown(view),
                "off": view.job.off,
                "stale": name in ops.alerts.stale,
                "clock_ahead_seconds": ops.alerts.ahead_seconds.get(name, 0.0),
                "runs_total": sum(total.runs for total in own),
                "rows_total": sum(total.report.new_rows for total in own),
                "rows_written_total": sum(total.report.rows for total in own),
                "late_rows_total": sum(total.report.late_rows for total in own),
                "corrected_rows_total": sum(total.report.corrected_rows for total in own),
                "calls": calls and {"today": calls.today, "a_day": calls.a_day},
                "last_run": last and run_shown(last),
            }
        )
    return {"now": instant_text(ops.clock()), "jobs": shown}


def _looking_at_both_ends(router: APIRouter, ops: BuiltService) -> None:
    @router.get(
        "/ops/gaps",
        openapi_extra=READ,
        summary="Which windows the destination holds, from its own listing",
        responses={**ABLE_JOB, **faults({502: "the destination refused the request; somebody must correct its cause"})},
    )
    def gaps(
        job: Annotated[str, Query(max_length=100, examples=JOB_NAMES)],
        hours: Annotated[int, Query(ge=1, le=MOST_HOURS)] = 24,
        to: Instant | None = None,
        offset: Annotated[int, Query(ge=0, le=1_000_000)] = 0,
        limit: Annotated[int, Query(ge=1, le=MOST_LINES)] = 50,
    ) -> dict[str, Any]:
        now = ops.clock()
        # rounded up to the minute, so that requests within a minute share a listing
        end = min(to or now, now).replace(second=0, microsecond=0) + timedelta(minutes=1)
        total, lines = ops.maps.windows(known(ops.scheduler, job), _back(end, hours), offset, limit)
        shown_lines = [
            {
                "partition": line.partition,
                "error": line.error,
                "cells": [_cell(cell) for cell in line.cells[-NEWEST_CELLS:]],
                "left_out": max(len(line.cells) - NEWEST_CELLS, 0),
            }
            for line in lines
        ]
        left_out = any(line["left_out"] for line in shown_lines)
        note = f"only the newest {NEWEST_CELLS} windows of each partition; /ops/map shows the whole span"
        return {
            "job": job,
            "now": instant_text(now),
            "total": total,
            "note": note if left_out else "",
            "partitions": shown_lines,
        }

    @router.get("/ops/verifications", openapi_extra=READ, summary="The latest verification and healing of each job")
    def verifications() -> dict[str, Any]:
        return {
            "jobs": list(ops.proofs.jobs),
            "maps": list(ops.maps.jobs),
            "verifications": [_result(each) for each in ops.proofs.results()],
            "heals": [_result(each) for each in ops.proofs.heals()],
        }


def _back(end: datetime, hours: int) -> Window:
    try:
        return Window(end - timedelta(hours=hours), end)
    except OverflowError:
        raise Refused(422, "to is out of range", "give a timestamp of this century", "query.to") from None


def _cell(cell: MapCell) -> Mapping[str, Any]:
    return {
        "start": whole_second(cell.window.start),
        "end": whole_second(cell.window.end),
        "state": cell.state.value,
        "rows": cell.rows,
        "objects": cell.objects,
    }


def _result(result: VerificationResult) -> Mapping[str, Any]:
    return {
        "job": result.job,
        "partition": result.partition,
        "from": instant_text(result.span.start),
        "to": instant_text(result.span.end),
        "by": result.by,
        "started_at": instant_text(result.started_at),
        "ended_at": instant_text(result.ended_at),
        "equal": result.equal,
        "done": sum(result.counts.values()),
        "total": result.total,
        "healed": result.healed,
        "counts": dict(result.counts),
        "windows": [window_json(each) for each in result.windows],
        "error": result.error,
        "hint": result.hint,
    }


def _acting(router: APIRouter, ops: BuiltService) -> None:
    scheduler = ops.scheduler

    @router.post("/ops/jobs/{job}/run", summary="Run now", **ACT)
    def run(job: JobInPath, request: Request) -> dict[str, Any]:
        scheduler.run_now(known(scheduler, job), _caller(request))
        return accepted(scheduler, job)

    @router.post("/ops/jobs/{job}/pause", summary="Skip the timer until resumed", **ACT)
    def pause(job: JobInPath, request: Request) -> dict[str, Any]:
        scheduler.pause(known(scheduler, job), _caller(request))
        return accepted(scheduler, job)

    @router.post("/ops/jobs/{job}/resume", summary="Follow the timer again", **ACT)
    def resume(job: JobInPath) -> dict[str, Any]:
        scheduler.resume(known(scheduler, job))
        return accepted(scheduler, job)

    @router.post("/ops/jobs/{job}/backfill", summary="Fill past windows again", **ACT_ABLE)
    def backfill(job: JobInPath, span: Annotated[Span, Body()], request: Request) -> dict[str, Any]:
        known(scheduler, job)
        window = bounded(span.from_at, span.to_at, "body")
        try:
            refuse_future(window, ops.clock())
        except Rejected as error:
            raise Refused(422, error.message, error.hint, "body.to") from error
        scheduler.backfill(job, window, _caller(request))
        return accepted(scheduler, job)

    @router.post("/ops/jobs/{job}/verify", summary="Compare both ends by content", **ACT_ABLE)
    def verify(job: JobInPath, part: Annotated[Part, Body()], request: Request) -> dict[str, Any]:
        ops.proofs.start(known(scheduler, job), _a_year(job, part), part.partition, _caller(request))
        return {"job": job, "state": "verifying"}

    @router.post("/ops/jobs/{job}/heal", summary="Compare, and repair what differs", **ACT_ABLE)
    def heal(job: JobInPath, part: Annotated[Part, Body()], request: Request) -> dict[str, Any]:
        window, by = _a_year(known(scheduler, job), part, " --heal"), _caller(request)
        ops.proofs.heal(job, window, part.partition, by, lambda work: scheduler.queue(job, work, by))
        return accepted(scheduler, job)


def _caller(request: Request) -> str:
    name: str = request.scope["state"]["grant"].name
    return name


def _a_year(job: str, part: Part, option: str = "") -> Window:
    command = f"python -m app verify {job} --from {whole_second(part.from_at)} --to {whole_second(part.to_at)}"
    command += f" --partition {shlex.quote(part.partition)}" if part.partition else ""
    hint = f"ask for a year at a time, or run `{command}{option}`"
    return bounded(part.from_at, part.to_at, "body", MOST_DAYS, hint)


def known(scheduler: Scheduler, job: str) -> str:
    """`job`, if it can run; 404 and 409 otherwise."""
    views = {view.job.name: view.job for view in scheduler.views()}
    if job not in views:
        raise Refused(404, f"no job is named {job[:80]!r}", f"jobs: {', '.join(views)}")
    if views[job].off:
        raise Refused(409, f"job {job} is off", views[job].off)
    return job


def accepted(scheduler: Scheduler, job: str) -> dict[str, Any]:
    """The response for a queued job."""
    state = next(view.state for view in scheduler.views() if view.job.name == job)
    return {"job": job, "state": state}
