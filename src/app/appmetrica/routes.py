"""/appmetrica: is the service there, ask for an export, fetch its file when it is made.

Invariants: an export's number and question are kept before the service is first asked, so a wait survives a restart of
either side; while a caller waits, no thread does.
"""

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any

from fastapi import APIRouter, Query, Response
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool

from app.appmetrica.client import SERVICE, Service, Waiting
from app.appmetrica.export_request import (
    COLUMN,
    LOCAL,
    LONGEST_PAUSE_SECONDS,
    SLOWER,
    Asking,
    Patience,
    Wish,
    asking,
    keep_question,
    question,
    question_of,
    resources,
)
from app.appmetrica.rows import merged
from app.core.errors import AppError
from app.core.runs import Stop
from app.db.run_records import Export, SqlPulls
from app.web.auth import needs
from app.web.errors import Refusal, Refused

OWNER = "routes"
AT_ONCE = 8
MAX_COLUMNS = 200
UNCONFIGURED = Refusal(
    409, "AppMetrica is not configured", "set APPMETRICA_API_KEY and APPMETRICA_APPLICATION_ID, then start again"
)
BUSY = Refusal(429, "many callers wait for exports already", "try again later", headers={"Retry-After": "30"})
READ = needs("pull:read")


@dataclass(frozen=True, slots=True)
class Serving:
    """What the routes act on. `service` None = not configured."""

    service: Service | None
    pulls: SqlPulls
    clock: Callable[[], datetime]
    interval_seconds: float
    timeout_seconds: float
    daily_calls: int


class ExportRequest(BaseModel):
    """Rows of a resource between two instants of the application's own clock, both included."""

    model_config = ConfigDict(extra="forbid")
    resource: str = Field(max_length=40, examples=["events"])
    date_since: str = Field(max_length=19, examples=["2026-02-01", "2026-02-01 00:00:00"])
    date_until: str = Field(max_length=19, examples=["2026-02-07", "2026-02-07 23:59:59"])
    fields: list[str] = Field(default=[], max_length=MAX_COLUMNS, description="columns; none = all that are known")
    by_receipt: bool = Field(default=False, description="when the service received it, not when it happened")


def build(serving: Serving) -> APIRouter:
    """All routes of this module."""
    router = APIRouter(prefix="/appmetrica", tags=["appmetrica"])
    places = asyncio.Semaphore(AT_ONCE)

    @router.get("/ping", openapi_extra=READ, summary="Whether the service answers to the token")
    def ping() -> dict[str, Any]:
        return _ping(serving)

    @router.post(
        "/exports", openapi_extra=READ, summary="Ask for an export; the number to fetch it by", status_code=201
    )
    def ask(wanted: ExportRequest) -> dict[str, Any]:
        found = _configured(serving)
        wish = _wish(found, wanted)
        export = keep_question(serving.pulls, OWNER, question(wish), serving.clock())
        return {"export_id": export.export_id, "resource": wish.resource, "fields": list(wish.columns)}

    @router.get(
        "/fetch-export",
        openapi_extra=READ,
        summary="The file of an export: 200 with it, 202 while it is made",
        response_class=Response,
        responses={200: {"content": {"text/csv": {}}}, 202: {"description": "it is not there yet; ask again"}},
    )
    async def fetch(
        export_id: Annotated[int, Query(ge=1, le=2**53)],
        poll_interval: Annotated[float | None, Query(ge=1, le=3600)] = None,
        poll_timeout: Annotated[float | None, Query(ge=0, le=86_400)] = None,
    ) -> Response:
        service = _configured(serving)
        export = await run_in_threadpool(serving.pulls.find, SERVICE, export_id)
        if export is None or question_of(export.request).span is not None:  # a job's own
            raise Refused(Refusal(404, f"no export has the number {export_id}", "POST /appmetrica/exports gives one"))
        if places.locked():
            raise Refused(BUSY)
        async with places:
            interval = serving.interval_seconds if poll_interval is None else poll_interval
            timeout = serving.timeout_seconds if poll_timeout is None else poll_timeout
            return await _fetched(serving, service, export, (interval, timeout))

    return router


def _configured(serving: Serving) -> Service:
    if serving.service is None:
        raise Refused(UNCONFIGURED)
    return serving.service


def _ping(serving: Serving) -> dict[str, Any]:
    """Never an error answer: what is wrong is what is asked for."""
    if serving.service is None:
        return {"module": SERVICE, "status": "unconfigured", "message": UNCONFIGURED.hint}
    try:
        applications = serving.service.applications()
    except AppError as error:
        return {"module": SERVICE, "status": "error", "message": error.message, "hint": error.hint}
    calls = {"calls_today": serving.pulls.calls(SERVICE, serving.clock()), "calls_a_day": serving.daily_calls}
    if serving.service.application_id not in applications:
        hint = "check APPMETRICA_APPLICATION_ID, and who made the token"
        return {
            "module": SERVICE,
            "status": "error",
            "message": "the token does not see the application",
            "hint": hint,
            **calls,
        }
    return {"module": SERVICE, "status": "ok", **calls}


def _wish(service: Service, wanted: ExportRequest) -> Wish:
    """The wish of a request. Raises Refused with 422."""
    resource = resources().get(wanted.resource)
    if resource is None:
        known = ", ".join(resources())
        raise Refused(Refusal(422, f"no resource {wanted.resource!r}", f"resources: {known}", "body.resource"))
    columns = list(dict.fromkeys(wanted.fields)) or list(resource.columns)
    for column in columns:
        if not COLUMN.fullmatch(column):
            raise Refused(Refusal(422, f"{column[:60]!r} is no column", "small letters, digits and _", "body.fields"))
    since = _instant(wanted.date_since, " 00:00:00", "date_since")
    until = _instant(wanted.date_until, " 23:59:59", "date_until")
    if since > until:
        raise Refused(Refusal(422, "date_since is after date_until", "give the older one first", "body.date_since"))
    return Wish(service.application_id, resource.name, since, until, columns, wanted.by_receipt)


def _instant(text: str, rest: str, name: str) -> str:
    full = text + rest if len(text) == len("YYYY-MM-DD") else text
    try:
        return datetime.strptime(full, LOCAL).strftime(LOCAL)  # noqa: DTZ007 - of the application's own clock
    except ValueError:
        hint = "write it as YYYY-MM-DD or YYYY-MM-DD hh:mm:ss"
        raise Refused(Refusal(422, f"{name} {text!r} is no instant", hint, f"body.{name}")) from None


async def _fetched(serving: Serving, service: Service, export: Export, waiting: tuple[float, float]) -> Response:
    """Ask until the file is there or the time is over. The pause grows, since a day has so many calls only."""
    stop = Stop()
    # Jitter is no secret: any source of numbers serves.
    patience = Patience(stop, random.random)
    interval_seconds, left_seconds = waiting
    held = ExitStack()
    try:
        under_way = await run_in_threadpool(
            held.enter_context, asking(service, serving.pulls, serving.clock, export, fresh=False)
        )
        while (told := await run_in_threadpool(under_way.step, patience)) is not None:
            pause_seconds = max(interval_seconds, told.at_least_seconds)
            if pause_seconds > left_seconds:
                return _not_yet(export, told, interval_seconds)
            await asyncio.sleep(pause_seconds)
            left_seconds -= pause_seconds
            interval_seconds = min(interval_seconds * SLOWER, max(LONGEST_PAUSE_SECONDS, interval_seconds))
        name = f"appmetrica_{under_way.question.resource}_{export.export_id}.csv"
        headers = {"Content-Disposition": f'attachment; filename="{name}"'}
        body = _body(under_way, held.pop_all())
        return StreamingResponse(body, headers=headers, media_type="text/csv; charset=utf-8")
    finally:
        stop.ask("the caller went away")
        held.close()


def _not_yet(export: Export, told: Waiting, seconds: float) -> Response:
    wait = round(max(seconds, told.at_least_seconds) + 0.5)
    body = {"export_id": export.export_id, "status": "waiting", "progress": told.percent, "message": told.text}
    return JSONResponse(body, 202, headers={"Retry-After": str(wait)})


async def _body(under_way: Asking, held: ExitStack) -> AsyncIterator[bytes]:
    pieces: Iterator[bytes] = merged(under_way.files)
    with held:
        while piece := await run_in_threadpool(next, pieces, b""):
            yield piece
        await run_in_threadpool(under_way.finish)
