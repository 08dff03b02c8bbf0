"""/analytics: a route per report, the list of reports, the schema of the data, and a page to explore them.

Invariants: built-in answers come from memory and touch no file; everything else runs in a thread, and identical
concurrent requests share one run; the event loop is never blocked. Every answer carries the time of the listing, its
duration and its ETag.
"""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.resources import files
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool

from app.analytics.formats import MEDIA, AnswerShape, ReportAnswer, of_table
from app.analytics.reports import TABLES, BadParameter, QueryParameter, ReportDefinition, parts_within
from app.analytics.service import UNCHANGED, Analytics, ReportRequest, key_of, response_head, warnings_of
from app.analytics.sql_sandbox import MAX_ROWS, SqlBusy
from app.analytics.summaries import ListingView
from app.core.closed_days import ReportSpan
from app.core.errors import AppError, Transient
from app.ops.pages import SCRIPT, framed, serve
from app.web.api import refuse_unknown_parameters
from app.web.auth import needs
from app.web.errors import Answers, Asgi, Receive, Refused, Scope, Send, faults
from app.web.text_values import instant

READ = needs("analytics:read")
FIRST_SECONDS = 20.0
POLL_SECONDS = 0.05
LONG_SECONDS = 86_400.0
SUMMARY = "summary"
ALIASES = frozenset({"overview", "daily-summary", "devices", "devices/latest"})
TYPES: Mapping[str, Mapping[str, Any]] = {
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
    strict = APIRouter(dependencies=[Depends(refuse_unknown_parameters)])

    @strict.get(
        "/analytics",
        openapi_extra=READ,
        summary="All reports, with their parameters and columns",
        name="list_reports",
        responses={200: {"model": ReportListing, "description": "the reports"}},
    )
    async def listing() -> Response:
        described = analytics.described
        for name, report in analytics.reports.items():
            if "fault" in described.get(name, {"fault": {}}):  # not described yet, or a column has come since
                described[name] = await run_in_threadpool(_described, analytics, report)
        return JSONResponse({"count": len(described), "reports": list(described.values())})

    @strict.get(
        "/analytics/schema",
        openapi_extra=READ,
        summary="Columns of the data, and how much of it there is",
        name="read_schema",
        responses={200: {"model": DataSummary, "description": "the columns"}},
    )
    async def schema() -> Response:
        return JSONResponse(_schema(analytics, await current_view(analytics)))

    strict.add_api_route(
        "/analytics/sql",
        _statement(analytics),
        methods=["POST"],
        openapi_extra=needs("analytics:sql"),
        name="run_sql",
        summary="One SELECT over all rows, as the view telemetry",
        responses=_answers(
            {422: "the statement was refused, or needs too much memory or time", 429: "another statement is running"}
        ),
        response_class=Response,
    )
    for report in analytics.reports.values():
        _report(strict, analytics, report)
    router.include_router(strict)
    return router


def _asset(name: str) -> str:
    return files("app.analytics").joinpath("assets", name).read_text(encoding="utf-8")


def _report(router: APIRouter, analytics: Analytics, report: ReportDefinition) -> None:
    answer, extra = _answering(analytics, report), {**READ, "parameters": _parameters(report)}
    paths = [f"/analytics/{report.path}", *([f"/{report.path}"] if report.path in ALIASES else [])]
    if report.path == report.name.replace("_", "-") and report.name not in analytics.reports:
        paths.append(f"/analytics/{report.name}")  # the file name
    for path in paths:
        router.add_api_route(
            path,
            answer,
            methods=["GET"],
            name=f"report_{report.name}",
            summary=report.title,
            description=report.description,
            openapi_extra=extra,
            responses={
                **_answers({400: "more rows than the format allows"}, report.answer),
                304: {"description": "unchanged"},
            },
            response_class=Response,
            include_in_schema=path == paths[0],
        )
        router.add_api_route(path, answer, methods=["HEAD"], openapi_extra=extra, include_in_schema=False)


def _parameters(report: ReportDefinition) -> Sequence[Mapping[str, Any]]:
    formats = {"type": "string", "enum": list(MEDIA), "default": report.format}
    flag = {"type": "boolean", "default": False}
    meaning = "put an apostrophe before texts in CSV that a spreadsheet would run as a formula"
    own = [
        *(_parameter(each) for each in report.parameters),
        {"name": "format", "in": "query", "schema": formats, "description": "format of the answer"},
        {"name": "formula_safe", "in": "query", "schema": flag, "description": meaning},
    ]
    if "as_of" not in {each.name for each in report.parameters}:
        meaning = (
            "over closed days alone, from the snapshot of their table that was current then; needs CATALOG=iceberg"
        )
        own.append({"name": "as_of", "in": "query", "schema": dict(TYPES["timestamp"]), "description": meaning})
    if report.summary:
        meaning = "read all objects instead of the summaries: slow, with the same answer"
        own.append({"name": "scan", "in": "query", "schema": flag, "description": meaning})
    return own


def _parameter(parameter: QueryParameter) -> Mapping[str, Any]:
    schema = dict(TYPES[parameter.kind])
    if parameter.default:
        is_text = schema["type"] == "string"
        schema["default"] = parameter.default if is_text else parameter.read(None)
    if parameter.limits:
        schema["minimum"], schema["maximum"] = parameter.limits
    required = {"required": True} if parameter.required else {}
    return {"name": parameter.name, "in": "query", "schema": schema, "description": parameter.meaning, **required}


def _answers(others: Mapping[int, str], rows_name: str = "data") -> Answers:
    row = {"type": "object", "additionalProperties": True, "example": {"device_id": "D1"}}
    listed = {
        "type": "object",
        "required": ["count", rows_name],
        "properties": {"count": {"type": "integer", "minimum": 0}, rows_name: {"type": "array", "items": row}},
    }
    content: dict[str, Any] = {media.split(";")[0]: {} for media in MEDIA.values()}
    content[MEDIA["json"]] = {"schema": row if rows_name == "object" else listed}
    unread = {502: "the objects cannot be read", 503: "the objects are not listed yet, or the query took too long"}
    return {200: {"description": "the answer", "content": content}, **faults({**others, **unread})}


def _answering(analytics: Analytics, report: ReportDefinition) -> Callable[[Request], Any]:
    async def answer(request: Request) -> Response:
        began = time.perf_counter()
        asked = _asked(report, request)
        view = await current_view(analytics)
        warnings = warnings_of(view, analytics.refresher.trouble)
        key = key_of(asked, view, warnings)
        found = analytics.cache.held(key)
        if found is None:
            said = [dict(each) for each in warnings]
            shape = AnswerShape(asked.format, report.answer, said, asked.formula_safe)

            def keep_seconds(made: ReportAnswer) -> float:
                """Only the summaries depend on nothing but the key."""
                return LONG_SECONDS if made.engine == SUMMARY else analytics.refresh_seconds

            def make() -> ReportAnswer:
                if asked.from_memory and not analytics.queries.has_older_rows(view):
                    days = parts_within(view.days, report.span(asked.values))
                    answer = of_table(TABLES[report.summary](days), shape, analytics.workplace.folder)
                    answer.engine = SUMMARY
                    return answer
                return analytics.queries.run(report, asked.values, shape, asked.as_of)

            try:
                found = await analytics.cache.answer(key, make, keep_seconds)
            except BadParameter as error:
                raise Refused(422, error.message, error.hint, "query") from error
        analytics.remember(request.scope, asked)
        tags = ",".join(request.headers.getlist("if-none-match"))
        status, headers = response_head(asked, view, found, if_none_match=tags, began=began)
        if status == UNCHANGED:
            return Response(status_code=status, headers=headers)
        if found.body is not None:  # a stream costs a task group and threads, and many may share one answer
            return Response(found.body, headers=headers)
        return StreamingResponse(found.pieces(), headers=headers)

    return answer


class FastPath:
    """ASGI wrapper of the API that sends cached report answers at once.

    Most requests for reports hit the cache, and routing would take longer than the rest of such a request.
    """

    def __init__(self, api: Asgi, analytics: Analytics) -> None:
        self._api = api
        self._analytics = analytics
        reports = analytics.reports.values()
        self.paths = [f"{start}/{report.path}" for report in reports for start in ("", "/analytics")]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI call."""
        began = time.perf_counter()
        asked = self._analytics.parsed.get((scope["path"], scope["query_string"]))
        view, answer = self._analytics.summaries.view, None
        if asked is not None and view is not None and scope["method"] == "GET":
            warnings = warnings_of(view, self._analytics.refresher.trouble)
            answer = self._analytics.cache.held(key_of(asked, view, warnings))
        if asked is None or view is None or answer is None or answer.body is None:
            await self._api(scope, receive, send)
            return
        sent = b",".join(value for name, value in scope["headers"] if name == b"if-none-match").decode("latin-1")
        status, headers = response_head(asked, view, answer, if_none_match=sent, began=began)
        raw = [(name.lower().encode(), value.encode("latin-1")) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": status, "headers": raw})
        await send({"type": "http.response.body", "body": b"" if status == UNCHANGED else answer.body})


def _asked(report: ReportDefinition, request: Request) -> ReportRequest:
    scan = {"scan": "false"} if report.summary else {}
    options = {"format": report.format, "as_of": "", "formula_safe": "false", **scan}
    for parameter in report.parameters:
        options.pop(parameter.name, None)
    given = request.query_params.multi_items()
    options |= {name: text for name, text in given if name in options}
    rest = [(name, text) for name, text in given if name not in options]
    written = options.pop("format")
    if written not in MEDIA:
        allowed = f"formats: {', '.join(MEDIA)}"
        raise Refused(422, f"format={written[:80]!r} is not known", allowed, "query.format")
    as_of = _instant(options.pop("as_of", None))
    for name, text in options.items():
        if text not in ("true", "false"):
            raise Refused(422, f"{name}={text[:80]!r} is neither", "send true or false", f"query.{name}")
    try:
        values = report.values(rest)
    except BadParameter as error:
        raise Refused(422, error.message, error.hint, "query") from error
    flags = {name: text == "true" for name, text in options.items()}
    return ReportRequest(report, values, written, **flags, as_of=as_of)


def _instant(text: str | None) -> datetime | None:
    try:
        return instant(text) if text else None
    except (ValueError, OverflowError):
        allowed = "send a timestamp such as 2026-02-07T12:00:00Z; UTC when it has no offset"
        raise Refused(422, f"as_of={str(text)[:80]!r} is not a timestamp", allowed, "query.as_of") from None


async def current_view(analytics: Analytics) -> ListingView:
    """The last listing; wait a while for the first one."""
    until = time.monotonic() + FIRST_SECONDS
    if analytics.summaries.view is None and analytics.refresher.trouble is None:
        analytics.refresher.hurry()
    while (view := analytics.summaries.view) is None:
        trouble = analytics.refresher.trouble
        if trouble is not None:
            raise trouble.with_traceback(None)  # a shared error would collect the frames of every request
        if time.monotonic() > until:
            raise Transient("the objects are still being read for the first time", "send the same request again")
        await asyncio.sleep(POLL_SECONDS)
    return view


def _described(analytics: Analytics, report: ReportDefinition) -> Mapping[str, Any]:
    try:
        columns = [{"name": name, "type": kind} for name, kind in analytics.queries.columns(report).items()]
        fault = {}
    except AppError as error:
        columns, fault = [], {"fault": {"message": error.message, "hint": error.hint}}
    parameters = [
        {
            "name": each.name,
            "type": each.kind,
            "default": each.default or None,
            "meaning": each.meaning,
            "required": each.required,
        }
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


SqlFormat = Literal["json", "ndjson", "csv", "parquet", "xlsx"]


class SqlStatement(BaseModel):
    """`device_id`, `from` and `to` limit the view, and the objects that are opened for it."""

    model_config = ConfigDict(extra="forbid")
    sql: str = Field(examples=["SELECT device_id, avg(power) AS power FROM telemetry GROUP BY device_id"])
    device_id: str | None = None
    since: datetime | None = Field(None, alias="from")
    until: datetime | None = Field(None, alias="to")


def _statement(analytics: Analytics) -> Callable[..., Any]:
    async def statement(
        body: SqlStatement, *, form: Annotated[SqlFormat, Query(alias="format")] = "json", formula_safe: bool = False
    ) -> Response:
        view = await current_view(analytics)
        span = ReportSpan(body.device_id, _naive(body.since), _naive(body.until))
        shape = AnswerShape(form, "data", (), formula_safe, MAX_ROWS)
        try:
            answer = await asyncio.to_thread(analytics.sandbox.run, body.sql, span, shape)
        except BadParameter as error:
            raise Refused(422, error.message, error.hint, "body.sql") from error
        except SqlBusy as error:
            raise Refused(429, error.message, error.hint, headers={"Retry-After": "5"}) from error
        headers = {"X-Data-As-Of": view.as_of, "Content-Length": str(answer.size_bytes)}
        if form != "json":
            headers["Content-Disposition"] = f'attachment; filename="sql.{form}"'
        return StreamingResponse(answer.pieces(), headers=headers, media_type=MEDIA[form])

    return statement


def _naive(at: datetime | None) -> datetime | None:
    """Naive UTC, as queries use it."""
    try:
        return at.astimezone(UTC).replace(tzinfo=None) if at and at.tzinfo else at
    except OverflowError:
        message = f"{at} is outside the years 1 to 9999 in UTC"
        raise Refused(422, message, "send a timestamp within them", "body") from None


def _schema(analytics: Analytics, view: ListingView) -> Mapping[str, Any]:
    columns = [
        {"name": name, "types": dict(types), "objects": sum(types.values())}
        for name, types in sorted(view.columns.items())
    ]
    return {
        "as_of": view.as_of,
        "objects": view.objects,
        "rows": view.rows,
        "bytes": view.size_bytes,
        "columns": columns,
        "warnings": [dict(each) for each in warnings_of(view, analytics.refresher.trouble)],
    }
