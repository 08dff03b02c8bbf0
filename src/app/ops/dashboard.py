"""The dashboard: one page, one script and one stylesheet, served by us and by nobody else.

Invariant: the page holds no data; the script asks /ops with the caller's own rights and sets texts, never markup.
"""

from importlib.resources import files

from fastapi import APIRouter
from fastapi.responses import Response

from app.ops.guard import OPEN, needs

ASSETS = {
    "/": ("page.html", "text/html; charset=utf-8"),
    "/assets/dashboard.js": ("dashboard.js", "text/javascript; charset=utf-8"),
    "/assets/gaps.js": ("gaps.js", "text/javascript; charset=utf-8"),
    "/assets/dashboard.css": ("dashboard.css", "text/css; charset=utf-8"),
    "/assets/icon.svg": ("icon.svg", "image/svg+xml"),
}


def build() -> APIRouter:
    """The routes of the page and its parts."""
    router = APIRouter(include_in_schema=False)
    for path, (name, media_type) in ASSETS.items():
        _serve(router, path, name, media_type)
    return router


def _serve(router: APIRouter, path: str, name: str, media_type: str) -> None:
    content = files("app.ops").joinpath("assets", name).read_bytes()

    @router.get(path, openapi_extra=needs(OPEN))
    async def asset() -> Response:
        return Response(content, media_type=media_type)
