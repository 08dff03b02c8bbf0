"""The FastAPI application: routers, error answers, the documentation pages, and the streaming answer of all slices.

Who may call a route is decided in front of this, from what the route itself declares (`app.web.auth.needs`).
"""

import logging
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.docs import get_redoc_html, get_swagger_ui_html
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse, StreamingResponse
from fastapi.routing import iter_route_contexts
from starlette.exceptions import HTTPException

from app.core.errors import AppError, Permanent
from app.web.auth import OPEN, RouteScopes, needs
from app.web.errors import ErrorAnswer, Refusal, Refused, Send, faults, refusal_of

PAGE_PARTS = {
    "swagger-ui-bundle.js": "text/javascript; charset=utf-8",
    "swagger-ui.css": "text/css; charset=utf-8",
    "redoc.standalone.js": "text/javascript; charset=utf-8",
}
SEE_DOCS = "correct the request; /docs shows its shape"
ANYWHERE = faults({422: "a parameter or the body is wrong: it is named"})
WITH_KEY = {401: "no key, or one that is not known", 403: "the key lacks the scope"}
log = logging.getLogger(__name__)


class HeadwaterApi(FastAPI):
    """FastAPI, whose document also names what is decided in front of it: keys and scopes."""

    def openapi(self) -> dict[str, Any]:
        """The document, made once."""
        if not self.openapi_schema:
            reference = {"application/json": {"schema": {"$ref": f"#/components/schemas/{ErrorAnswer.__name__}"}}}
            for methods in super().openapi()["paths"].values():
                for operation in methods.values():
                    answers = operation["responses"]
                    if operation.get("x-scope") != OPEN:
                        for status, meaning in WITH_KEY.items():
                            answers.setdefault(str(status), {"description": meaning, "content": reference})
                    if "parameters" not in operation and "requestBody" not in operation:
                        answers.pop("422", None)
        return super().openapi()


def build_api(title: str, version: str, description: str, routers: Sequence[APIRouter]) -> FastAPI:
    """The application. A route without `openapi_extra=needs(...)` is refused to everybody."""
    api = HeadwaterApi(
        title=title,
        version=version,
        description=description,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        responses=ANYWHERE,
    )
    for kind in (Refused, AppError, RequestValidationError, HTTPException, Exception):
        api.add_exception_handler(kind, _answer)
    for router in (*routers, _documentation(api)):
        api.include_router(router)
    return api


def route_scopes(api: FastAPI) -> RouteScopes:
    """What every route of `api` declares."""
    scopes = RouteScopes()
    for route in iter_route_contexts(api.routes):
        declared = (route.openapi_extra or {}).get("x-scope", "")
        scopes.add(route.path or "", route.path_regex, dict.fromkeys(route.methods or (), declared))
    return scopes


async def _answer(_: Request, error: Exception) -> JSONResponse:
    """Every error in the one shape."""
    if isinstance(error, RequestValidationError):
        refusal = _invalid(error.errors())
    elif isinstance(error, HTTPException):
        refusal = Refusal(error.status_code, str(error.detail), SEE_DOCS, headers=error.headers or {})
    else:
        refusal = refusal_of(error)
    return JSONResponse(refusal.body, refusal.status, headers=dict(refusal.headers))


def _invalid(errors: Sequence[Any]) -> Refusal:
    first = next(iter(errors), {"loc": (), "msg": "the request cannot be read"})
    where = ".".join(str(part) for part in first["loc"])
    others = f" (and {len(errors) - 1} more faults)" if len(errors) > 1 else ""
    return Refusal(422, f"{where}: {first['msg']}{others}", SEE_DOCS, where)


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

    # The files of fastapi-offline, found without importing it: the pages work without the internet.
    spec = find_spec("fastapi_offline")
    if spec is None or spec.origin is None:
        raise Permanent("the package fastapi-offline is missing", "install Headwater again")
    folder = Path(spec.origin).parent / "static"

    @router.get("/docs/{name}", openapi_extra=read)
    def part(name: str) -> FileResponse:
        if name not in PAGE_PARTS:
            raise Refused(Refusal(404, "Not Found", "see /docs for what there is"))
        return FileResponse(folder / name, media_type=PAGE_PARTS[name])

    return router


class Streamed(StreamingResponse):
    """An answer in pieces, from a thread when they are an iterator.

    What is `held` (a stream, a place, a lock) is let go however the answer ends, also when the client left before its
    first byte. What fails in the middle is logged and the connection ends without the answer's end, so that no client
    takes a part for the whole.
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
            log.error("an answer was cut off: %s", error)  # noqa: TRY400 - the message says it all
