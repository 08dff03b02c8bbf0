"""/analytics: a route for each report, the list of them, the schema of the data, and the page to explore them with.

Invariants: the built-in answers come from memory and touch no file; everything else runs in a thread, once for all who
ask the same; the event loop is never held. Every answer says of when it is, what it took, and under which ETag it is
known.
"""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.concurrency import run_in_threadpool

from app.analytics.builtin_reports import TABLES
from app.analytics.formats import MEDIA, AnswerShape, ReportAnswer, of_table
from app.analytics.reports import Parameter, ReportDefinition
from app.analytics.service import ReportRequest, ReportService, headers_of, key_of, text_of, unchanged, warnings_of
from app.analytics.summaries import View
from app.core.errors import AppError, Rejected, Transient
from app.ops.pages import SCRIPT, framed, serve
from app.web.auth import needs
from app.web.errors import Asgi, Receive, Refusal, Refused, Scope, Send

SCOPE = "analytics:read"
READ = needs(SCOPE)
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


def build(serving: ReportService) -> APIRouter:
    """All routes."""
    router = APIRouter(tags=["analytics"])
    page = framed("Explore", _asset("explore.html"), ("explore",), link="Explore", root="../")
    serve(router, "/analytics/explore", page.encode(), "text/html; charset=utf-8")
    serve(router, "/assets/explore.js", _asset("explore.js").encode(), SCRIPT)
    router.add_api_route(
        "/analytics",
        _listing(serving),
        methods=["GET"],
        openapi_extra=READ,
        summary="All reports, with their parameters and columns",
        name="list_reports",
    )
    router.add_api_route(
        "/analytics/schema",
        _schema(serving),
        methods=["GET"],
        openapi_extra=READ,
        summary="Columns of the data, and how much of it there is",
        name="read_schema",
    )
    for report in serving.analytics.reports.values():
        _report(router, serving, report)
    return router


def _asset(name: str) -> str:
    return files("app.analytics").joinpath("assets", name).read_text(encoding="utf-8")


def _report(router: APIRouter, serving: ReportService, report: ReportDefinition) -> None:
    answer = _answering(serving, report)
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
            responses=_answers(),
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


def _answers() -> dict[int | str, dict[str, Any]]:
    content: dict[str, Any] = {media.split(";")[0]: {} for media in MEDIA.values()}
    return {200: {"description": "the answer", "content": content}, 304: {"description": "it has not changed"}}


def _answering(serving: ReportService, report: ReportDefinition) -> Callable[[Request], Any]:
    async def answer(request: Request) -> Response:
        began = time.perf_counter()
        asked = _asked(report, request)
        view = await _view(serving)
        warnings = warnings_of(view, serving.analytics.refresher.trouble)
        key = key_of(asked, view, warnings)
        found = serving.flights.held(key)
        if found is None:
            make = _from_memory if asked.from_memory else _from_objects
            shape = AnswerShape(asked.format, report.answer, [dict(each) for each in warnings])
            keep_seconds = LONG_SECONDS if asked.from_memory else serving.analytics.refresh_seconds
            found = await serving.flights.answer(key, lambda: make(serving, asked, view, shape), keep_seconds)
        serving.remember(request.scope, asked)
        headers = headers_of(asked, view, found, began)
        if unchanged(found, request.headers.get("if-none-match", "")):
            del headers["Content-Length"]
            return Response(status_code=304, headers=headers)
        if found.size_bytes <= SMALL_BYTES:  # a stream costs a task group and threads, and many may wait for one answer
            return Response(b"".join(found.pieces()), headers=headers, media_type=MEDIA[asked.format])
        return StreamingResponse(found.pieces(), headers=headers, media_type=MEDIA[asked.format])

    return answer


class Quick:
    """The API, but for answers that are held already: those leave at once, to whom may have them.

    Most requests for reports are of this kind, and finding the route takes longer than all the rest of them.
    """

    def __init__(self, api: Asgi, serving: ReportService) -> None:
        self._api = api
        self._serving = serving

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One ASGI call."""
        began = time.perf_counter()
        found = self._held(scope) if scope["type"] == "http" else None
        if found is None:
            await self._api(scope, receive, send)
            return
        asked, view, answer = found
        sent = next((value for name, value in scope["headers"] if name == b"if-none-match"), b"").decode("latin-1")
        known = unchanged(answer, sent)
        headers = headers_of(asked, view, answer, began)
        if known:
            del headers["Content-Length"]
        else:
            headers["Content-Type"] = MEDIA[asked.format]
        raw = [(name.lower().encode(), value.encode("latin-1")) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": 304 if known else 200, "headers": raw})
        await send({"type": "http.response.body", "body": b"" if known else b"".join(answer.pieces())})

    def _held(self, scope: Scope) -> tuple[ReportRequest, View, ReportAnswer] | None:
        """What is held for this request, small enough to leave in one piece, if its caller may have it."""
        asked = self._serving.remembered(scope)
        view = self._serving.analytics.summaries.view
        grant = scope.get("state", {}).get("grant")
        if asked is None or view is None or grant is None or not grant.allows(SCOPE):
            return None
        warnings = warnings_of(view, self._serving.analytics.refresher.trouble)
        answer = self._serving.flights.held(key_of(asked, view, warnings))
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


async def _view(serving: ReportService) -> View:
    """The last listing; before the first one, wait a while for it."""
    until = time.monotonic() + FIRST_SECONDS
    if serving.analytics.summaries.view is None and serving.analytics.refresher.trouble is None:
        serving.analytics.refresher.hurry()
    while (view := serving.analytics.summaries.view) is None:
        trouble = serving.analytics.refresher.trouble
        if trouble is not None:
            raise trouble
        if time.monotonic() > until:
            raise Transient("the objects are still being looked at for the first time", "send the same request again")
        await asyncio.sleep(POLL_SECONDS)
    return view


def _from_memory(serving: ReportService, asked: ReportRequest, view: View, shape: AnswerShape) -> ReportAnswer:
    return of_table(TABLES[asked.report.summary](view.days), shape, serving.analytics.workplace.folder)


def _from_objects(serving: ReportService, asked: ReportRequest, _: View, shape: AnswerShape) -> ReportAnswer:
    return serving.analytics.queries.run(asked.report, asked.values, shape)


def _listing(serving: ReportService) -> Callable[[], Any]:
    async def listing() -> Response:
        if not serving.described:
            reports = serving.analytics.reports.values()
            serving.described[:] = await run_in_threadpool(lambda: [_described(serving, each) for each in reports])
        return JSONResponse({"count": len(serving.described), "reports": serving.described})

    return listing


def _described(serving: ReportService, report: ReportDefinition) -> Mapping[str, Any]:
    try:
        columns = [{"name": name, "type": kind} for name, kind in serving.analytics.queries.columns(report).items()]
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


def _schema(serving: ReportService) -> Callable[[], Any]:
    async def schema() -> Response:
        view = await _view(serving)
        columns = [
            {"name": name, "types": dict(types), "objects": sum(types.values())}
            for name, types in sorted(view.columns.items())
        ]
        return JSONResponse(
            {
                "as_of": text_of(view.as_of),
                "objects": view.objects,
                "rows": view.rows,
                "bytes": view.size_bytes,
                "columns": columns,
                "warnings": [dict(each) for each in warnings_of(view, serving.analytics.refresher.trouble)],
            }
        )

    return schema
