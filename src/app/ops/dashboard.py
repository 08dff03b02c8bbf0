"""The dashboard: one page, one script and one stylesheet, and the jobs as markup for who has no script."""

from collections.abc import Callable, Iterator, Mapping
from html import escape
from importlib.resources import files
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, Response
from starlette.concurrency import run_in_threadpool

from app.core.errors import AppError
from app.web.auth import OPEN, Guard, needs
from app.web.errors import Refused

# Jobs as markup: what the page shows before its script has asked, and all that it shows without one.
#
# Invariant: whatever comes from data is escaped; the classes are those that the script gives its own cards.

WORDS = {"backfill": "backfilling"}


def cards(overview: Mapping[str, Any]) -> str:
    """A card per job of `routes.overview`, as it is at that moment."""
    return "".join("".join(_card(job)) for job in overview["jobs"])


def _card(job: Mapping[str, Any]) -> Iterator[str]:
    last = job["last_run"]
    state = last["outcome"] if job["state"] == "waiting" and last else job["state"]
    badge = "stale" if job["stale"] else state
    yield f'<article class="card job"><div class="head"><h3>{escape(job["name"])}</h3>'
    yield f'<span class="badge {escape(badge)}">{escape(WORDS.get(badge, badge))}</span></div>'
    if job["state"] == "off":
        yield f'<p class="quiet">Off: {escape(job["off"])}</p></article>'
        return
    yield "<dl>"
    yield from (f"<dt>{name}</dt><dd>{escape(text)}</dd>" for name, text in _facts(job))
    yield "</dl>"
    if last and last["error"]:
        hint = f'<p class="hint quiet">{escape(last["hint"])}</p>' if last["hint"] else ""
        mild = "" if last["outcome"] == "failed" else " mild"
        yield f'<div class="trouble{mild}"><p>{escape(last["error"])}</p>{hint}</div>'
    yield "</article>"


def _facts(job: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    last, calls = job["last_run"], job["calls"]
    yield "Every", f"{job['interval_seconds']:,} s"
    yield "Last run", f"{_clock(last['started_at'])}, {last['rows']:,} rows" if last else "none yet"
    if last and last["ledger_text"]:
        yield "Ledger", last["ledger_text"]
    yield "Next run", _clock(job["next_run_at"]) if job["next_run_at"] else "when resumed"
    if job["clock_ahead_seconds"]:
        yield "Clock", f"records lie {job['clock_ahead_seconds']:,.0f} s ahead of now"
    if job["rows_total"]:
        yield "Moved", f"{job['rows_total']:,} rows in {job['runs_total']:,} runs"
    if calls:
        yield "Calls", f"{calls['today']:,} of {calls['a_day']:,} today"


def _clock(text: str) -> str:
    """`2026-02-07 12:00:00Z` of an instant as the API writes it."""
    return f"{text[:10]} {text[11:19]}Z"


# The dashboard: one page, one script and one stylesheet, served by us and by nobody else.
#
# Invariants: the page holds the jobs as they are when it is asked for, for callers who may see them, and no data
# for others; from then on the script asks /ops with the caller's own rights and sets texts, never markup.

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
        if not await _may_see(guard, request):
            return HTMLResponse(page)
        try:
            painted = cards(await run_in_threadpool(overview))
        except AppError:
            return HTMLResponse(page)  # the script tells what is wrong
        shown = page.replace(BOARD, BOARD.replace(" hidden", ""), 1).replace(JOBS, JOBS + painted, 1)
        return HTMLResponse(shown)


async def _may_see(guard: Guard, request: Request) -> bool:
    """Whether the caller may see jobs. A wrong key counts as everywhere and sees the page without them."""
    try:
        grant = await guard.grant(request.scope)
    except (Refused, AppError):
        return False
    return grant is not None and grant.allows(SCOPE)


def _serve(router: APIRouter, path: str, content: bytes, media_type: str) -> None:
    @router.get(path, openapi_extra=needs(OPEN))
    async def asset() -> Response:
        return Response(content, media_type=media_type)


def _asset(name: str) -> bytes:
    return files("app.ops").joinpath("assets", name).read_bytes()
