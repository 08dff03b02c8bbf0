"""The dashboard: one page, one script and one stylesheet, served by us and by nobody else.

Invariants: the page holds the jobs as they are when it is asked for, for callers who may see them, and no data for
others; from then on the script asks /ops with the caller's own rights and sets texts, never markup.
"""

from collections.abc import Callable, Mapping
from importlib.resources import files
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, Response
from starlette.concurrency import run_in_threadpool

from app.core.errors import AppError
from app.ops.answers import Refused
from app.ops.cards import cards
from app.ops.guard import OPEN, Guard, needs

ASSETS = {
    "/assets/elements.js": ("elements.js", "text/javascript; charset=utf-8"),
    "/assets/dashboard.js": ("dashboard.js", "text/javascript; charset=utf-8"),
    "/assets/gaps.js": ("gaps.js", "text/javascript; charset=utf-8"),
    "/assets/dashboard.css": ("dashboard.css", "text/css; charset=utf-8"),
    "/assets/icon.svg": ("icon.svg", "image/svg+xml"),
}
BOARD = '<div id="board" hidden>'
JOBS = '<div id="jobs" class="jobs">'
SCOPE = "ops:read"

Overview = Callable[[], Mapping[str, Any]]


def build(guard: Guard, overview: Overview) -> APIRouter:
    """The routes of the page and its parts."""
    router = APIRouter(include_in_schema=False)
    _page(router, guard, overview)
    for path, (name, media_type) in ASSETS.items():
        _serve(router, path, _asset(name), media_type)
    return router


def _page(router: APIRouter, guard: Guard, overview: Overview) -> None:
    page = _asset("page.html").decode()

    @router.get("/", openapi_extra=needs(OPEN))
    async def dashboard(request: Request) -> Response:
        if not _may_see(guard, request):
            return HTMLResponse(page)
        try:
            painted = cards(await run_in_threadpool(overview))
        except AppError:
            return HTMLResponse(page)  # the script tells what is wrong
        shown = page.replace(BOARD, BOARD.replace(" hidden", ""), 1).replace(JOBS, JOBS + painted, 1)
        return HTMLResponse(shown)


def _may_see(guard: Guard, request: Request) -> bool:
    """Whether the caller may see jobs. A wrong key counts as everywhere and sees the page without them."""
    try:
        grant = guard.grant(request.scope)
    except Refused:
        return False
    return grant is not None and grant.allows(SCOPE)


def _serve(router: APIRouter, path: str, content: bytes, media_type: str) -> None:
    @router.get(path, openapi_extra=needs(OPEN))
    async def asset() -> Response:
        return Response(content, media_type=media_type)


def _asset(name: str) -> bytes:
    return files("app.ops").joinpath("assets", name).read_bytes()
