"""/appmetrica: check the service, request an export, download its file when it is ready.

Invariants: an export's number and request are saved before the service is first asked, so a wait survives a restart of
either side; a waiting caller does not block a thread.
"""

import asyncio
from collections.abc import Generator
from contextlib import ExitStack, closing
from datetime import datetime
from functools import partial
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool

from app.appmetrica.client import (
    COLUMN,
    LOCAL,
    SERVICE,
    ExportInProgress,
    Exports,
    LogsRequest,
    logs_request,
    next_pause,
    request_of,
    resources,
)
from app.appmetrica.rows import merged
from app.core.errors import AppError
from app.core.runs import Stop
from app.db.state import PendingExport
from app.product_events.routes import CallerPlaces, ServiceFile
from app.web.api import refuse_unknown_parameters
from app.web.auth import needs
from app.web.errors import Answers, Refusal, Refused, faults

OWNER = "routes"
AT_ONCE = 8
MAX_COLUMNS = 200
YEARS = range(2000, 2100)
UNCONFIGURED = Refusal(
    409, "AppMetrica is not configured", "set APPMETRICA_API_KEY and APPMETRICA_APPLICATION_ID, then start again"
)
BUSY = Refusal(429, "too many clients are waiting for exports", "try again later", headers={"Retry-After": "30"})
READ = needs("pull:read")
NOT_SET = faults({409: "AppMetrica is not configured"})


class ExportRequest(BaseModel):
    """Rows of a resource between two instants of the application's own clock, both included."""

    model_config = ConfigDict(extra="forbid")
    resource: str = Field(max_length=40, examples=["events"])
    date_since: str = Field(max_length=19, examples=["2026-02-01", "2026-02-01 00:00:00"])
    date_until: str = Field(max_length=19, examples=["2026-02-07", "2026-02-07 23:59:59"])
    fields: list[str] = Field(default=[], max_length=MAX_COLUMNS, description="columns; none = all that are known")
    by_receipt: bool = Field(default=False, description="when the service received it, not when it happened")


class ExportWaiting(BaseModel):
    """An export that is not there yet."""

    export_id: int
    status: Literal["waiting"]
    progress: int | None = Field(description="percent, where the service says so")
    message: str


FETCHED: Answers = {
    200: {"content": {"text/csv": {}}, "description": "the file"},
    202: {"model": ExportWaiting, "description": "it is not there yet; ask again after Retry-After"},
    **NOT_SET,
    **faults(
        {
            404: "no export has this number",
            429: "too many clients are waiting",
            502: "AppMetrica refused; its message is included",
            503: "AppMetrica cannot be reached: send the same request again",
        }
    ),
}


def build(exports: Exports | None) -> APIRouter:
    """All routes of this module; None = not configured."""
    strict = [Depends(refuse_unknown_parameters)]
    router = APIRouter(prefix="/appmetrica", tags=["appmetrica"], dependencies=strict)
    places = CallerPlaces(AT_ONCE, BUSY)

    @router.get("/ping", openapi_extra=READ, summary="Whether the service accepts the token")
    def ping() -> dict[str, Any]:
        return {"module": SERVICE, **_ping(exports)}

    @router.post(
        "/exports",
        openapi_extra=READ,
        summary="Request an export; the id to fetch it with",
        status_code=201,
        responses=NOT_SET,
    )
    def ask(wanted: ExportRequest) -> dict[str, Any]:
        known = _configured(exports)
        request = _request(known.application_id, wanted)
        export = known.keep(OWNER, request)
        return {"export_id": export.export_id, "resource": request.resource, "fields": request.columns}

    @router.get(
        "/fetch-export",
        openapi_extra=READ,
        summary="The file of an export: 200 when it is ready, 202 while it is being prepared",
        response_class=Response,
        responses=FETCHED,
    )
    async def fetch(
        request: Request,
        export_id: Annotated[int, Query(ge=1, le=2**53)],
        poll_interval: Annotated[float | None, Query(ge=1, le=3600)] = None,
        poll_timeout: Annotated[float | None, Query(ge=0, le=86_400)] = None,
    ) -> Response:
        known = _configured(exports)
        export = await run_in_threadpool(known.pulls.find, SERVICE, export_id)
        if export is None or request_of(export).span is not None:  # a job's export
            raise Refused(
                404, f"no export has the number {export_id}", "use the id that POST /appmetrica/exports returned"
            )
        made = partial(
            _fetched,
            known,
            export,
            interval_seconds=known.given.poll_interval_seconds if poll_interval is None else poll_interval,
            timeout_seconds=known.given.poll_timeout_seconds if poll_timeout is None else poll_timeout,
        )
        return await places.answer(request, made)

    return router


def _configured(exports: Exports | None) -> Exports:
    if exports is None:
        raise Refused(*UNCONFIGURED)
    return exports


def _ping(exports: Exports | None) -> dict[str, Any]:
    """Never an error response: the check reports problems in its body."""
    if exports is None:
        return {"status": "unconfigured", "message": UNCONFIGURED.hint}
    said = {"status": "ok"}
    try:
        exports.application()
    except AppError as error:
        said = {"status": "error", "message": error.message, "hint": error.hint}
    return {**said, "calls_today": exports.calls_today, "calls_a_day": exports.given.daily_calls}


def _request(application_id: int, wanted: ExportRequest) -> LogsRequest:
    """Build the request to the service. Raises Refused with 422."""
    resource = resources().get(wanted.resource)
    if resource is None:
        known = ", ".join(resources())
        raise Refused(422, f"no resource {wanted.resource!r}", f"resources: {known}", "body.resource")
    columns = list(dict.fromkeys(wanted.fields)) or list(resource.columns)
    for column in columns:
        if not COLUMN.fullmatch(column):
            raise Refused(
                422, f"{column[:60]!r} is not a column name", "use small letters, digits and _", "body.fields"
            )
    since = _instant(wanted.date_since, " 00:00:00", "date_since")
    until = _instant(wanted.date_until, " 23:59:59", "date_until")
    if since > until:
        raise Refused(422, "date_since is after date_until", "give the earlier one first", "body.date_since")
    return logs_request(
        application_id, resource.name, since=since, until=until, columns=columns, by_receipt=wanted.by_receipt
    )


def _instant(text: str, rest: str, name: str) -> str:
    full = text + rest if len(text) == len("YYYY-MM-DD") else text
    try:
        at = datetime.strptime(full, LOCAL)  # noqa: DTZ007 - of the application's own clock
    except ValueError:
        hint = "write it as YYYY-MM-DD or YYYY-MM-DD hh:mm:ss"
        raise Refused(422, f"{name} {text!r} is not a timestamp", hint, f"body.{name}") from None
    if at.year not in YEARS:  # other years overflow in another time zone or are not written with four digits
        hint = f"give one from {YEARS.start} to {YEARS.stop - 1}"
        raise Refused(422, f"{name} {text!r} is out of range", hint, f"body.{name}")
    return at.strftime(LOCAL)


async def _fetched(
    exports: Exports,
    export: PendingExport,
    stop: Stop,
    held: ExitStack,
    *,
    interval_seconds: float,
    timeout_seconds: float,
) -> Response:
    """Poll until the file is ready or the time is up."""
    under_way = await run_in_threadpool(held.enter_context, exports.resumed(export, fresh=False))
    while (answer := await run_in_threadpool(under_way.step, stop)) is not None:
        pause_seconds = max(interval_seconds, answer.at_least_seconds)
        if pause_seconds > timeout_seconds:
            waits = ExportWaiting(
                export_id=export.export_id, status="waiting", progress=answer.percent, message=answer.text
            )
            return JSONResponse(waits.model_dump(), 202, headers={"Retry-After": str(round(pause_seconds + 0.5))})
        await asyncio.sleep(pause_seconds)
        timeout_seconds -= pause_seconds
        interval_seconds = next_pause(interval_seconds)
    name = f"appmetrica_{under_way.request.resource}_{export.export_id}.csv"
    pieces = held.enter_context(closing(_body(under_way)))
    return ServiceFile(pieces, held.pop_all(), stop, name=name, media_type="text/csv; charset=utf-8")


def _body(under_way: ExportInProgress) -> Generator[bytes]:
    yield from merged(under_way.files)
    under_way.finish()
