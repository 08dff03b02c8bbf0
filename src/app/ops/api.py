"""The FastAPI application: routers, the one error shape, the guard on every route, the documentation pages.

Invariant: a router that is given here cannot have an unguarded route, since the guard is a dependency of all of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.openapi.docs import get_redoc_html, get_swagger_ui_html
from fastapi.responses import HTMLResponse, JSONResponse

from app.ops import answers
from app.ops.guard import Guard, needs


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
    answers.install(api)
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
        return get_swagger_ui_html(openapi_url="openapi.json", title=api.title)

    @router.get("/redoc", openapi_extra=read)
    def redoc() -> HTMLResponse:
        return get_redoc_html(openapi_url="openapi.json", title=api.title, with_google_fonts=False)

    return router
