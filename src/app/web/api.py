"""The FastAPI application: routers, error responses, the documentation pages, and the streaming response of all slices.

Access is decided before a request reaches this layer, from the scopes that each route declares (`app.web.auth.needs`).
"""

import logging
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.docs import get_redoc_html, get_swagger_ui_html
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from fastapi.routing import iter_route_contexts
from starlette.exceptions import HTTPException

from app.core.errors import AppError, Permanent
from app.web.auth import OPEN, RouteScopes, needs
from app.web.errors import ERROR_SCHEMA, ErrorAnswer, Refusal, Refused, Send, faults, refusal_of

PAGE_PARTS = {
    "swagger-ui-bundle.js": "text/javascript; charset=utf-8",
    "swagger-ui.css": "text/css; charset=utf-8",
    "redoc.standalone.js": "text/javascript; charset=utf-8",
}
LOGO_ELSEWHERE = b"https://cdn.redoc.ly/redoc/logo-mini.svg"
UNREAD = 400  # FastAPI's status for a body that it cannot decode at all
SEE_DOCS = "correct the request; /docs shows its shape"
ANYWHERE = faults({422: "a parameter or the body is wrong: it is named"})
WITH_KEY = {
    401: "no key, or an unknown one",
    403: "the key lacks the scope",
    429: "too many requests with this key, or too many at once: try again after Retry-After",
    503: "a required system cannot be reached: send the same request again after Retry-After",
}
WITH_BODY = {
    408: "the body did not arrive in time",
    413: "the body is larger than allowed",
    415: "an unsupported media type",
}
KEYS = {
    "ApiKey": {"type": "apiKey", "in": "header", "name": "X-API-Key", "description": "A key of API_KEYS."},
    "Bearer": {"type": "http", "scheme": "bearer", "description": "The same key as `Authorization: Bearer`."},
}
TEXTS = {"text/csv": "device_id,voltage\nD1,230.5\n", "application/x-ndjson": '{"device_id": "D1", "voltage": 230.5}\n'}
BY_FORMAT = {
    "date-time": "2026-02-07T11:26:00Z",
    "date": "2026-02-07",
    "uuid": "0b1c6a6e-7c1d-4f2a-9d57-2f6f0a9a1b11",
    "uri": "https://example.org/",
}
BY_TYPE = {"string": "text", "integer": 1, "number": 1.5, "boolean": True, "null": None}
log = logging.getLogger(__name__)


class HeadwaterApi(FastAPI):
    """FastAPI with an OpenAPI document that also covers what is enforced in front of it (keys, scopes, limits) and has
    an example of every response.
    """

    def openapi(self) -> dict[str, Any]:
        """The OpenAPI document, built once."""
        if not self.openapi_schema:
            document = super().openapi()
            error = ErrorAnswer.model_json_schema(ref_template="#/components/schemas/{model}")
            schemas = document["components"]["schemas"] | error.pop("$defs") | {ErrorAnswer.__name__: error}
            document["components"] = {"schemas": dict(sorted(schemas.items())), "securitySchemes": KEYS}
            for methods in document["paths"].values():
                for operation in methods.values():
                    _complete(operation, schemas)
        return super().openapi()


def _complete(operation: dict[str, Any], schemas: Mapping[str, Any]) -> None:
    """Add the statuses that are sent before the route is reached, the keys that it accepts, and examples."""
    scope, answers = operation.get("x-scope", ""), operation["responses"]
    operation["security"] = [] if scope == OPEN else [{name: []} for name in KEYS]
    if scope != OPEN:
        operation["description"] = f"{operation.get('description', '')}\n\nScope: `{scope}`.".strip()
    meanings = {**(WITH_KEY if scope != OPEN else {}), **(WITH_BODY if "requestBody" in operation else {})}
    for status, meaning in meanings.items():
        answers.setdefault(str(status), faults({status: meaning})[status])
    if "parameters" not in operation and "requestBody" not in operation:
        answers.pop("422", None)
    for answer in answers.values():
        for media, content in answer.get("content", {}).items():
            if media == "application/json":
                schema = content.get("schema") or {"type": "object"}
                error = {"error": {"message": answer["description"], "hint": "what to do next"}}
                content.setdefault("example", error if schema == ERROR_SCHEMA else example_of(schema, schemas))
                content["schema"] = schema
            elif media in TEXTS:
                content.setdefault("schema", {"type": "string"})
                content.setdefault("example", TEXTS[media])
            else:
                content.setdefault("schema", {"type": "string", "format": "binary"})


def example_of(schema: Mapping[str, Any], schemas: Mapping[str, Any]) -> Any:
    """A value that `schema` allows; `schemas` are those that it may refer to by name."""
    if "$ref" in schema:
        return example_of(schemas[schema["$ref"].rpartition("/")[2]], schemas)
    given = [schema[name] for name in ("example", "const", "default") if name in schema]
    given += [schema[name][0] for name in ("examples", "enum") if schema.get(name)]
    given += [example_of(schema[name][0], schemas) for name in ("anyOf", "oneOf", "allOf") if schema.get(name)]
    if given:
        return given[0]
    kinds = schema.get("type", "object")
    kind = kinds[0] if isinstance(kinds, list) else kinds
    if kind == "object":
        named = {name: example_of(each, schemas) for name, each in schema.get("properties", {}).items()}
        more = schema.get("additionalProperties")
        return {"name": example_of(more, schemas)} if isinstance(more, dict) and not named else named
    if kind == "array":
        return [example_of(schema["items"], schemas)] if schema.get("items") else []
    return BY_FORMAT.get(schema.get("format", ""), BY_TYPE[kind])


def build_api(title: str, version: str, description: str, routers: Sequence[APIRouter]) -> FastAPI:
    """The application. A route without `openapi_extra=needs(...)` is closed to everybody."""
    api = HeadwaterApi(
        title=title,
        version=version,
        description=description,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        responses=ANYWHERE,
    )
    for kind in (AppError, RequestValidationError, HTTPException, Exception):
        api.add_exception_handler(kind, _answer)
    for router in (*routers, _documentation(api)):
        api.include_router(router)
    return api


async def refuse_unknown_parameters(request: Request) -> None:
    """A dependency of routers. Raises Refused for a parameter that is given twice, since one value would be ignored,
    and for an undeclared one: with a misspelt `offset`, a patch would overwrite the start of the object.
    """
    route = request.scope["route"]
    declared = [each.alias for each in route.dependant.query_params]
    declared += [each["name"] for each in (route.openapi_extra or {}).get("parameters", ()) if each["in"] == "query"]
    for name, count in Counter(name for name, _ in request.query_params.multi_items()).items():
        if count > 1:
            raise Refused(422, f"the parameter {name[:80]!r} is given {count} times", "give it once", name[:80])
        if name not in declared:
            hint = f"use {', '.join(sorted(declared))}" if declared else "leave it out: this route takes none"
            raise Refused(422, f"unknown parameter {name[:80]!r}", hint, name[:80])


def route_scopes(api: FastAPI) -> RouteScopes:
    """The scopes that every route of `api` declares."""
    scopes = RouteScopes()
    for route in iter_route_contexts(api.routes):
        declared = (route.openapi_extra or {}).get("x-scope", "")
        scopes.add(route.path or "", route.path_regex, dict.fromkeys(route.methods or (), declared))
    return scopes


async def _answer(_: Request, error: Exception) -> JSONResponse:
    """Every error in the one shape. A body that FastAPI did not read as JSON has the wrong media type, not a wrong
    shape.
    """
    if isinstance(error, RequestValidationError):
        errors = error.errors()
        first = next(iter(errors), {"loc": (), "msg": "the request cannot be read"})
        where = ".".join(str(part) for part in first["loc"])
        others = f" (and {len(errors) - 1} more faults)" if len(errors) > 1 else ""
        refusal = Refusal(422, f"{where}: {first['msg']}{others}", SEE_DOCS, where)
        if refusal.fault == "body" and isinstance(error.body, bytes) and error.body:
            refusal = Refusal(415, "unsupported media type", "send application/json")
    elif isinstance(error, HTTPException):
        refusal = Refusal(error.status_code, str(error.detail), SEE_DOCS, headers=error.headers or {})
        if refusal.status == UNREAD:
            refusal = Refusal(422, "the body is not JSON in UTF-8, or nests too deep", SEE_DOCS, "body")
    else:
        refusal = refusal_of(error)
    return JSONResponse(refusal.body, refusal.status, headers=dict(refusal.headers))


def _documentation(api: FastAPI) -> APIRouter:
    router = APIRouter(include_in_schema=False)
    read = needs("ops:read")

    @router.get("/openapi.json", openapi_extra=read)
    def document() -> JSONResponse:
        return JSONResponse(api.openapi())

    @router.get("/docs", openapi_extra=read)
    def docs() -> HTMLResponse:
        return get_swagger_ui_html(
            openapi_url="openapi.json",
            title=api.title,
            swagger_js_url="docs/swagger-ui-bundle.js",
            swagger_css_url="docs/swagger-ui.css",
            swagger_favicon_url="assets/icon.svg",
            swagger_ui_parameters={"validatorUrl": None},  # otherwise Swagger UI calls a third-party validator
        )

    @router.get("/redoc", openapi_extra=read)
    def redoc() -> HTMLResponse:
        return get_redoc_html(
            openapi_url="openapi.json",
            title=api.title,
            redoc_js_url="docs/redoc.standalone.js",
            redoc_favicon_url="assets/icon.svg",
            with_google_fonts=False,
        )

    # The files of fastapi-offline, located without importing it: the pages work without internet access.
    spec = find_spec("fastapi_offline")
    if spec is None or spec.origin is None:
        raise Permanent("the package fastapi-offline is missing", "install Headwater again")
    folder = Path(spec.origin).parent / "static"

    @router.get("/docs/{name}", openapi_extra=read)
    def part(name: str) -> Response:
        if name not in PAGE_PARTS:
            raise Refused(404, "Not Found", "see /docs for what there is")
        content = (folder / name).read_bytes().replace(LOGO_ELSEWHERE, b"assets/icon.svg")
        return Response(content, media_type=PAGE_PARTS[name])

    return router


class StreamedResponse(StreamingResponse):
    """A response sent in chunks, from a thread when they come from a plain iterator.

    Whatever is `held` (a stream, a semaphore slot, a lock) is released however the response ends, also when the client
    disconnects before the first byte. An error in the middle is logged and the connection is closed without the end of
    the response, so that no client takes a part for the whole.
    """

    def __init__(
        self,
        pieces: Iterator[bytes] | AsyncIterator[bytes],
        held: ExitStack,
        *,
        status: int = 200,
        headers: Mapping[str, str] | None = None,
        media_type: str | None = None,
    ) -> None:
        super().__init__(pieces, status, headers, media_type)
        self._held = held

    async def __call__(self, scope: Any, receive: Any, send: Send) -> None:
        """Send it."""
        with self._held:
            await super().__call__(scope, receive, send)

    async def stream_response(self, send: Any) -> None:
        """See the class."""
        try:
            await super().stream_response(send)
        except AppError as error:
            log.error("a response was cut off: %s", error)  # noqa: TRY400 - the message is enough


def accepts_gzip(header: str) -> bool:
    """Whether an Accept-Encoding allows gzip, see RFC 9110."""
    allowed: dict[str, bool] = {}
    for each in header.lower().split(","):
        name, _, weight = each.partition(";")
        allowed[name.strip()] = weight.replace(" ", "").removeprefix("q=").strip("0.") != "" or not weight
    return allowed.get("gzip", allowed.get("*", False))
