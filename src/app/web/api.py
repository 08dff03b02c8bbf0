"""The FastAPI application: routers, the one error shape, the guard on every route, the documentation pages.

Invariant: a router that is given here cannot have an unguarded route, since the guard is a dependency of all of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.openapi.docs import get_redoc_html, get_swagger_ui_html
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse

from app.core.errors import Permanent
from app.web import errors
from app.web.auth import Guard, needs

PAGE_PARTS = {
    "swagger-ui-bundle.js": "text/javascript; charset=utf-8",
    "swagger-ui.css": "text/css; charset=utf-8",
    "redoc.standalone.js": "text/javascript; charset=utf-8",
}


@dataclass(frozen=True, slots=True)
class About:
    """What the documentation pages say the product is."""

    title: str
    version: str
    description: str


def build_api(about: About, routers: Sequence[APIRouter], guard: Guard) -> FastAPI:
    """The application. A route without `openapi_extra=needs(...)` answers 403 to everybody."""

    async def check(request: Request) -> None:
        guard.check(request.scope)

    api = FastAPI(
        title=about.title,
        version=about.version,
        description=about.description,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        dependencies=[Depends(check)],
    )
    errors.install(api)
    for router in routers:
        api.include_router(router)
    api.include_router(_documentation(api))
    return api


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

    for name, media_type in PAGE_PARTS.items():
        _serve_part(router, name, media_type)
    return router


def _serve_part(router: APIRouter, name: str, media_type: str) -> None:
    """A file of the documentation pages, out of a package of ours: they work without the internet."""
    path = _page_parts() / name

    @router.get(f"/docs/{name}", openapi_extra=needs("ops:read"))
    def part() -> FileResponse:
        return FileResponse(path, media_type=media_type)


def _page_parts() -> Path:
    """The files of fastapi-offline, found without importing it."""
    spec = find_spec("fastapi_offline")
    if spec is None or spec.origin is None:
        raise Permanent("the package fastapi-offline is missing", "install Headwater again")
    return Path(spec.origin).parent / "static"
