"""The /ops API, the probes and /metrics as FastAPI routes.

Invariant: every route declares its scope; what only reads needs `ops:read`, what starts or stops work `ops:run`.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Any

from fastapi import APIRouter, Body, Query, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, SecretStr

from app.core.errors import AppError
from app.core.ledger import Ledger
from app.core.runs import LedgerTotal, Run, Runs, Total
from app.core.windows import Window
from app.ops.health import ProbeAnswer, Probes
from app.ops.json_views import (
    RUNS_ANSWER,
    Calls,
    JobRecord,
    PartitionView,
    instant_text,
    job_shown,
    lag_seconds,
    partition_shown,
    run_shown,
)
from app.ops.metrics import (
    Series,
    call_series,
    clock_series,
    exposition,
    job_series,
    lag_series,
    ledger_series,
    object_series,
    success_series,
    total_series,
)
from app.ops.scheduler import Scheduler
from app.ops.service import History
from app.web.auth import COOKIE, OPEN, SESSION, Guard, needs
from app.web.errors import Refusal, Refused, faults

READ = needs("ops:read")
RUN = needs("ops:run")
EVERYBODY = needs(OPEN)
MAX_RUNS = 500
MAX_PARTITIONS = 1000
KNOWN_JOB = faults({404: "no job has this name", 409: "the job is off: the hint names the variable"})
TEXT_FORMAT = "text/plain; version=0.0.4; charset=utf-8"


@dataclass(frozen=True, slots=True)
class Operations:
    """What the routes look at and act on."""

    probes: Probes
    guard: Guard
    scheduler: Scheduler
    runs: Runs
    totals: Callable[[], Sequence[Total]]
    ledger_totals: Callable[[], Sequence[LedgerTotal]]
    last_ended: Callable[[str], Run | None]
    stale: Callable[[], Collection[str]]
    partitions: Callable[[], Sequence[PartitionView]]
    histories: Mapping[str, History]
    calls: Mapping[str, Callable[[], Calls]]
    clock: Callable[[], datetime]
    state_clock: Callable[[], datetime]
    ahead_seconds: Callable[[], Mapping[str, float]]
    troubles: Callable[[], Mapping[str, Mapping[str, int]]]


class Span(BaseModel):
    """`[from, to)`; both with an offset from UTC."""

    model_config = ConfigDict(extra="forbid")
    from_at: AwareDatetime = Field(alias="from")
    to_at: AwareDatetime = Field(alias="to")


class SignIn(BaseModel):
    """A key, as it was shown when it was made."""

    model_config = ConfigDict(extra="forbid")
    key: SecretStr = Field(max_length=200)


def build(ops: Operations) -> APIRouter:
    """All routes of this module."""
    router = APIRouter(tags=["ops"])
    _probes(router, ops.probes)
    _session(router, ops.guard)
    _reading(router, ops)
    _acting(router, ops.scheduler)
    return router


def _probes(router: APIRouter, probes: Probes) -> None:
    """Answered by the front before they get here; these stand for the documentation."""

    @router.get("/health", openapi_extra=EVERYBODY, summary="Liveness")
    async def health() -> Response:
        return _answer(probes.health())

    @router.get("/ready", openapi_extra=EVERYBODY, summary="Readiness, check by check")
    async def ready() -> Response:
        return _answer(probes.ready())


def _answer(answer: ProbeAnswer) -> Response:
    return JSONResponse(dict(answer.body), answer.status)


def _session(router: APIRouter, guard: Guard) -> None:
    @router.post("/ops/session", openapi_extra=EVERYBODY, summary="Sign in to the dashboard", status_code=204)
    async def sign_in(request: Request, sent: SignIn) -> Response:
        grant = guard.sign_in(sent.key.get_secret_value(), request.scope)
        if not any(grant.allows(scope) for scope in ("ops:read", "analytics:read")):
            hint = "use one with the scope ops:read for the dashboard, analytics:read for /analytics/explore"
            raise Refused(Refusal(403, "this key may not see any page", hint))
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

    @router.get("/ops/session", openapi_extra=READ, summary="Who is signed in")
    async def who(request: Request) -> dict[str, Any]:
        grant = request.scope["state"]["grant"]
        return {"name": grant.name, "scopes": sorted(grant.scopes), "keys": bool(guard.keyring)}


def _reading(router: APIRouter, ops: Operations) -> None:
    @router.get("/ops/jobs", openapi_extra=READ, summary="Every job, also those that are off, with its last run")
    def jobs() -> dict[str, Any]:
        return overview(ops)

    @router.get("/ops/runs", openapi_extra=READ, summary="Recent runs, newest first", responses=RUNS_ANSWER)
    def runs(job: str | None = None, limit: Annotated[int, Query(ge=1, le=MAX_RUNS)] = 50) -> dict[str, Any]:
        found = ops.runs.recent(job, limit)
        return {"count": len(found), "runs": [run_shown(run) for run in found]}

    @router.get("/ops/partitions", openapi_extra=READ, summary="How far each partition is, largest lag first")
    def partitions(
        job: str | None = None, limit: Annotated[int, Query(ge=1, le=MAX_PARTITIONS)] = 200
    ) -> dict[str, Any]:
        now = ops.clock()
        found = [each for each in ops.partitions() if job in (None, each.job)]
        found.sort(key=lambda each: (not each.error, -(lag_seconds(each, now) or 0.0), each.partition))
        return {"total": len(found), "partitions": [partition_shown(each, now) for each in found[:limit]]}

    @router.get("/ops/history", openapi_extra=READ, summary="What jobs took in lately, file by file, newest first")
    def history(job: str | None = None, limit: Annotated[int, Query(ge=1, le=MAX_RUNS)] = 50) -> dict[str, Any]:
        wanted = {name: lines for name, lines in ops.histories.items() if job in (None, name)}
        return {"histories": [{"job": name, "entries": list(lines(limit))} for name, lines in wanted.items()]}

    @router.get("/metrics", openapi_extra=READ, summary="For Prometheus", response_class=PlainTextResponse)
    def metrics() -> Response:
        return PlainTextResponse(exposition(_series(ops)), media_type=TEXT_FORMAT)


def overview(ops: Operations) -> dict[str, Any]:
    """Every job as JSON. Raises what the state raises."""
    totals, stale, ahead = ops.totals(), ops.stale(), ops.ahead_seconds()

    def record(name: str) -> JobRecord:
        last = next(iter(ops.runs.recent(name, 1)), None)
        calls = ops.calls[name]() if name in ops.calls else None
        sums = [total for total in totals if total.job == name]
        return JobRecord(last, sums, name in stale, calls, ahead.get(name, 0.0))

    shown = [job_shown(view, record(view.job.name)) for view in ops.scheduler.views()]
    return {"now": instant_text(ops.clock()), "jobs": shown}


def _acting(router: APIRouter, scheduler: Scheduler) -> None:
    @router.post("/ops/jobs/{job}/run", openapi_extra=RUN, summary="Run now", status_code=202, responses=KNOWN_JOB)
    def run(job: str) -> dict[str, Any]:
        scheduler.run_now(known(scheduler, job))
        return accepted(scheduler, job)

    @router.post(
        "/ops/jobs/{job}/pause",
        openapi_extra=RUN,
        summary="Skip the timer until resumed",
        status_code=202,
        responses=KNOWN_JOB,
    )
    def pause(job: str, request: Request) -> dict[str, Any]:
        scheduler.pause(known(scheduler, job), request.scope["state"]["grant"].name)
        return accepted(scheduler, job)

    @router.post(
        "/ops/jobs/{job}/resume",
        openapi_extra=RUN,
        summary="Follow the timer again",
        status_code=202,
        responses=KNOWN_JOB,
    )
    def resume(job: str) -> dict[str, Any]:
        scheduler.resume(known(scheduler, job))
        return accepted(scheduler, job)

    @router.post(
        "/ops/jobs/{job}/backfill",
        openapi_extra=RUN,
        summary="Fill past windows again",
        status_code=202,
        responses=KNOWN_JOB,
    )
    def backfill(job: str, span: Annotated[Span, Body()]) -> dict[str, Any]:
        scheduler.backfill(known(scheduler, job), window_of(span))
        return accepted(scheduler, job)


def known(scheduler: Scheduler, job: str) -> str:
    """`job`, a job that can run; 404 and 409 otherwise."""
    views = {view.job.name: view.job for view in scheduler.views()}
    if job not in views:
        raise Refused(Refusal(404, f"no job is named {job[:80]!r}", f"jobs: {', '.join(views)}"))
    if views[job].off:
        raise Refused(Refusal(409, f"job {job} is off", views[job].off))
    return job


def window_of(span: Span) -> Window:
    """The window of a body. Refuses one that is empty or reversed."""
    try:
        return Window(span.from_at.astimezone(UTC), span.to_at.astimezone(UTC))
    except (ValueError, OverflowError):
        raise Refused(Refusal(422, "from is not before to", "give the older instant as from", "body.from")) from None


def accepted(scheduler: Scheduler, job: str) -> dict[str, Any]:
    """The answer to what was queued."""
    state = next(view.status.state for view in scheduler.views() if view.job.name == job)
    return {"job": job, "state": state}


def _series(ops: Operations) -> Sequence[Series]:
    views = ops.scheduler.views()
    build = [({"version": ops.probes.version}, 1.0)]
    series = [
        Series("headwater_build_info", "gauge", "Version of Headwater.", build),
        *job_series(views, ops.stale()),
        clock_series(views, ops.ahead_seconds()),
    ]
    checks = [({"check": name}, float(ok)) for name, ok in ops.probes.ready().body["checks"].items()]
    series.append(Series("headwater_check", "gauge", "1 while a system can be reached.", checks))
    try:
        now, totals, partitions = ops.state_clock(), ops.totals(), ops.partitions()
        calls = {job: of() for job, of in ops.calls.items()}
        ledgers = [*ledger_series(ops.ledger_totals(), _last_ledgers(ops))]
        troubles = ops.troubles()
    except AppError:
        return series  # the check of the store says why the counters are missing
    series += [*total_series(totals), success_series(totals, now), *ledgers, *call_series(calls)]
    series += object_series(views, troubles)
    lags = [(each.job, each.partition, lag_seconds(each, now)) for each in partitions]
    return [*series, *lag_series([(job, name, lag) for job, name, lag in lags if lag is not None])]


def _last_ledgers(ops: Operations) -> Mapping[str, Ledger]:
    """The ledger of the last ended run of each job; without those that ended before they could keep one."""
    ended = (ops.last_ended(view.job.name) for view in ops.scheduler.views() if not view.job.off)
    return {run.job: run.report.ledger for run in ended if run is not None and run.report.ledger}
