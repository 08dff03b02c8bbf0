"""/analytics: a route for each report, the list of them, the schema of the data, and the page to explore them with.

Invariants: the built-in answers come from memory and touch no file; everything else runs in a thread, once for all who
ask for the same; the event loop is never held. Every answer carries when the objects were listed, how long it took and
its ETag.
"""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from importlib.resources import files
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool

from app.analytics.formats import MEDIA, AnswerShape, ReportAnswer, of_table
from app.analytics.reports import TABLES, Parameter, ReportDefinition
from app.analytics.service import UNCHANGED, Analytics, ReportRequest, key_of, reply_of, text_of, warnings_of
from app.analytics.summaries import View
from app.core.errors import AppError, Rejected, Transient
from app.ops.pages import SCRIPT, framed, serve
from app.web.auth import needs
from app.web.errors import Answers, Asgi, Receive, Refusal, Refused, Scope, Send, faults

READ = needs("analytics:read")
FIRST_SECONDS = 20.0
POLL_SECONDS = 0.05
LONG_SECONDS = 86_400.0
SMALL_BYTES = 1 << 18
ALIASES = frozenset({"overview", "daily-summary", "devices", "devices/latest"})
TYPES: Mapping[str, Mapping[str, str]] = {
    "text": {"type": "string"},
    "integer": {"type": "integer"},
    "number": {"type": "number"},
    "boolean": {"type": "boolean"},
    "date": {"type": "string", "format": "date"},
    "timestamp": {"type": "string", "format": "date-time"},
}


class ReportParameter(BaseModel):
    """A parameter of a report."""

    name: str
    type: str
    default: str | None
    meaning: str


class ReportColumn(BaseModel):
    """A column of a report's answer, with DuckDB's name of its type."""

    name: str
    type: str


class DescribedReport(BaseModel):
    """A report; `fault` says why it cannot be run."""

    name: str
    path: str
    title: str
    description: str
    parameters: list[ReportParameter]
    columns: list[ReportColumn]
    formats: list[str]
    from_summaries: bool
    fault: dict[str, str] = {}


class ReportListing(BaseModel):
    """All reports."""

    count: int
    reports: list[DescribedReport]


class DataColumn(BaseModel):
    """A column of the data: how many objects hold it, and by type."""

    name: str
    types: dict[str, int]
    objects: int


class DataSummary(BaseModel):
    """What the reports read."""

    as_of: datetime
    objects: int
    rows: int
    bytes: int
    columns: list[DataColumn]
    warnings: list[dict[str, str]]


def build(analytics: Analytics) -> APIRouter:
    """All routes."""
    router = APIRouter(tags=["analytics"])
    page = framed("Explore", _asset("explore.html"), ("explore",), link="Explore", root="../")
    serve(router, "/analytics/explore", page.encode(), "text/html; charset=utf-8")
    serve(router, "/assets/explore.js", _asset("explore.js").encode(), SCRIPT)

    @router.get(
        "/analytics",
        openapi_extra=READ,
        summary="All reports, with their parameters and columns",
        name="list_reports",
        responses={200: {"model": ReportListing, "description": "the reports"}},
    )
    async def listing() -> Response:
        if not analytics.described:
            reports = analytics.reports.values()
            analytics.described[:] = await run_in_threadpool(lambda: [_described(analytics, each) for each in reports])
        return JSONResponse({"count": len(analytics.described), "reports": analytics.described})

    @router.get(
        "/analytics/schema",
        openapi_extra=READ,
        summary="Columns of the data, and how much of it there is",
        name="read_schema",
        responses={200: {"model": DataSummary, "description": "the columns"}},
    )
    async def schema() -> Response:
        return JSONResponse(_schema(analytics, await _view(analytics)))

    for report in analytics.reports.values():
        _report(router, analytics, report)
    return router


def _asset(name: str) -> str:
    return files("app.analytics").joinpath("assets", name).read_text(encoding="utf-8")


def _report(router: APIRouter, analytics: Analytics, report: ReportDefinition) -> None:
    answer = _answering(analytics, report)
    paths = [f"/analytics/{report.path}", *([f"/{report.path}"] if report.path in ALIASES else [])]
    for path in paths:
        router.add_api_route(
            path,
            answer,
            methods=["GET"],
            name=f"report_{report.name}",
            summary=report.title,
            description=report.description,
            openapi_extra={**READ, "parameters": _parameters(report)},
            responses=_answers(report),
            response_class=Response,
            include_in_schema=path == paths[0],
        )


def _parameters(report: ReportDefinition) -> Sequence[Mapping[str, Any]]:
    formats = {"type": "string", "enum": list(MEDIA), "default": "json"}
    scan = {"type": "boolean", "default": False}
    own = [_parameter(each) for each in report.parameters]
    own.append({"name": "format", "in": "query", "schema": formats, "description": "how the answer is written"})
    if report.summary:
        meaning = "read all objects instead of the summaries; the answer is the same, and slow"
        own.append({"name": "scan", "in": "query", "schema": scan, "description": meaning})
    return own


def _parameter(parameter: Parameter) -> Mapping[str, Any]:
    schema = {**TYPES[parameter.kind], **({"default": parameter.default} if parameter.default else {})}
    return {"name": parameter.name, "in": "query", "schema": schema, "description": parameter.meaning}


def _answers(report: ReportDefinition) -> Answers:
    row = {"type": "object", "additionalProperties": True, "example": {"device_id": "D1"}}
    rows = {"type": "array", "items": row}
    shape = {"type": "object", "required": ["count", report.answer]}
    listed = {**shape, "properties": {"count": {"type": "integer", "minimum": 0}, report.answer: rows}}
    content: dict[str, Any] = {media.split(";")[0]: {} for media in MEDIA.values()}
    content[MEDIA["json"]] = {"schema": row if report.answer == "object" else listed}
    return {
        200: {"description": "the answer", "content": content},
        304: {"description": "it has not changed"},
        **faults(
            {502: "the objects cannot be read", 503: "the objects are not listed yet, or the query took too long"}
        ),
    }


def _answering(analytics: Analytics, report: ReportDefinition) -> Callable[[Request], Any]:
    async def answer(request: Request) -> Response:
        began = time.perf_counter()
        asked = _asked(report, request)
        view = await _view(analytics)
        warnings = warnings_of(view, analytics.refresher.trouble)
        key = key_of(asked, view, warnings)
        found = analytics.cache.held(key)
        if found is None:
            shape = AnswerShape(asked.format, report.answer, [dict(each) for each in warnings])
            keep_seconds = LONG_SECONDS if asked.from_memory else analytics.refresh_seconds

            def make() -> ReportAnswer:
                if asked.from_memory:
                    return of_table(TABLES[report.summary](view.days), shape, analytics.workplace.folder)
                return analytics.queries.run(report, asked.values, shape)

            found = await analytics.cache.answer(key, make, keep_seconds)
        analytics.remember(request.scope, asked)
        tags = request.headers.get("if-none-match", "")
        status, headers = reply_of(asked, view, found, if_none_match=tags, began=began)
        if status == UNCHANGED:
            return Response(status_code=status, headers=headers)
        if found.size_bytes <= SMALL_BYTES:  # a stream costs a task group and threads, and many may wait for one answer
            return Response(b"".join(found.pieces()), headers=headers)
        return StreamingResponse(found.pieces(), headers=headers)

    return answer


class Quick:
    """The API, but for cached answers of reports: those are sent at once.

    Most requests for reports are of this kind, and routing would take longer than the rest of such a request.
    """

    def __init__(self, api: Asgi, analytics: Analytics) -> None:
        self._api = api
        self._analytics = analytics
        reports = analytics.reports.values()
        self._paths = {f"{start}/{report.path}" for report in reports for start in ("", "/analytics")}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One ASGI call."""
        began = time.perf_counter()
        found = self._held(scope) if scope["path"] in self._paths else None
        if found is None:
            await self._api(scope, receive, send)
            return
        asked, view, answer = found
        sent = next((value for name, value in scope["headers"] if name == b"if-none-match"), b"").decode("latin-1")
        status, headers = reply_of(asked, view, answer, if_none_match=sent, began=began)
        raw = [(name.lower().encode(), value.encode("latin-1")) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": status, "headers": raw})
        await send({"type": "http.response.body", "body": b"" if status == UNCHANGED else b"".join(answer.pieces())})

    def _held(self, scope: Scope) -> tuple[ReportRequest, View, ReportAnswer] | None:
        """The cached answer of this request, small enough to be sent in one piece."""
        asked = self._analytics.parsed.get((scope["path"], scope["query_string"]))
        view = self._analytics.summaries.view
        if scope["method"] != "GET" or asked is None or view is None:
            return None
        warnings = warnings_of(view, self._analytics.refresher.trouble)
        answer = self._analytics.cache.held(key_of(asked, view, warnings))
        return (asked, view, answer) if answer is not None and answer.size_bytes <= SMALL_BYTES else None


def _asked(report: ReportDefinition, request: Request) -> ReportRequest:
    query = request.query_params.multi_items()
    own = {"format": "json", "scan": "false"}
    rest = []
    for name, text in query:
        if name in own and not (name == "scan" and not report.summary):
            own[name] = text
        else:
            rest.append((name, text))
    if own["format"] not in MEDIA:
        allowed = f"formats: {', '.join(MEDIA)}"
        raise Refused(Refusal(422, f"format={own['format'][:80]!r} is not known", allowed, "query.format"))
    if own["scan"] not in ("true", "false"):
        raise Refused(Refusal(422, f"scan={own['scan'][:80]!r} is neither", "send true or false", "query.scan"))
    try:
        values = report.values(rest)
    except Rejected as error:
        raise Refused(Refusal(422, error.message, error.hint, "query")) from error
    return ReportRequest(report, values, own["format"], own["scan"] == "true")


async def _view(analytics: Analytics) -> View:
    """The last listing; before the first one, wait a while for it."""
    until = time.monotonic() + FIRST_SECONDS
    if analytics.summaries.view is None and analytics.refresher.trouble is None:
        analytics.refresher.hurry()
    while (view := analytics.summaries.view) is None:
        trouble = analytics.refresher.trouble
        if trouble is not None:
            raise trouble
        if time.monotonic() > until:
            raise Transient("the objects are still being looked at for the first time", "send the same request again")
        await asyncio.sleep(POLL_SECONDS)
    return view


def _described(analytics: Analytics, report: ReportDefinition) -> Mapping[str, Any]:
    try:
        columns = [{"name": name, "type": kind} for name, kind in analytics.queries.columns(report).items()]
        fault = {}
    except AppError as error:
        columns, fault = [], {"fault": {"message": error.message, "hint": error.hint}}
    parameters = [
        {"name": each.name, "type": each.kind, "default": each.default or None, "meaning": each.meaning}
        for each in report.parameters
    ]
    return {
        "name": report.name,
        "path": f"/analytics/{report.path}",
        "title": report.title,
        "description": report.description,
        "parameters": parameters,
        "columns": columns,
        "formats": list(MEDIA),
        "from_summaries": bool(report.summary),
        **fault,
    }


def _schema(analytics: Analytics, view: View) -> Mapping[str, Any]:
    columns = [
        {"name": name, "types": dict(types), "objects": sum(types.values())}
        for name, types in sorted(view.columns.items())
    ]
    return {
        "as_of": text_of(view.as_of),
        "objects": view.objects,
        "rows": view.rows,
        "bytes": view.size_bytes,
        "columns": columns,
        "warnings": [dict(each) for each in warnings_of(view, analytics.refresher.trouble)],
    }
