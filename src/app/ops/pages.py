"""The pages: overview, runs, one run. One frame, one stylesheet and a few scripts, all served from here.

Invariants: a page contains data only for callers who may see it, and data is escaped; after that the scripts call /ops
with the caller's own permissions and set text, never markup.
"""

import gzip
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, PlainTextResponse, Response
from starlette.concurrency import run_in_threadpool

from app.core.errors import AppError
from app.web.api import accepts_gzip
from app.web.auth import OPEN, AccessGuard, needs
from app.web.errors import Refused

SCOPE = "ops:read"
SCRIPT, STYLE, ICON = "text/javascript; charset=utf-8", "text/css; charset=utf-8", "image/svg+xml"
ASSETS = {
    **dict.fromkeys(("common.js", "overview.js", "map.js", "runs.js", "run.js"), SCRIPT),
    "pages.css": STYLE,
    **dict.fromkeys(("icon.svg", "icon-ok.svg", "icon-bad.svg", "icon-away.svg"), ICON),
}
LINKS = (("Overview", "."), ("Runs", "runs"), ("Explore", "analytics/explore"), ("API", "docs"))
# The guides for jobs that have no guide named after them.
GUIDES = {"s3_sweep": "s3", "set_aside_sweep": "operations", "lake_day": "lake"}
MARKS = {"running": "run", "backfill": "run", "waiting": "off", "stopped": "off", "partial": "warn", "failed": "bad"}
WORDS = {"ok": "OK", "partial": "Partly delivered", "backfill": "Backfilling", "waiting": "No run yet"}

Overview = Callable[[], Mapping[str, Any]]


def build(guard: AccessGuard, overview: Overview) -> APIRouter:
    """The routes of the pages and their parts."""
    router = APIRouter(include_in_schema=False)
    _overview(router, guard, overview)
    for path, title, script in (("/runs", "Runs", "runs"), ("/run", "Run", "run")):
        scripts = ("runs", "run") if script == "run" else ("runs",)
        page = framed(title, _asset(f"{script}.html"), scripts, link="Runs")
        serve(router, path, page.encode(), "text/html; charset=utf-8")
    for name, media_type in ASSETS.items():
        serve(router, f"/assets/{name}", _asset(name).encode(), media_type)
    _guides(router)
    return router


def framed(
    title: str, main: str, scripts: Sequence[str], *, link: str, root: str = "", dialogs: str = "", shown: bool = False
) -> str:
    """A whole page: `main` in the common frame, with scripts of /assets by name; `link` is the current navigation link.

    `root` is the path from the page to the overview; `shown`: the page has content before a script has run.
    """
    links = "".join(
        f'<a href="{root}{href}"{" aria-current=" + chr(34) + "page" + chr(34) if name == link else ""}>{name}</a>'
        for name, href in LINKS
    )
    return filled(
        _asset("layout.html"),
        title=f"{title} \N{EN DASH} Headwater",
        links=links,
        scripts="\n".join(f'<script src="{root}assets/{name}.js" defer></script>' for name in ("common", *scripts)),
        board="" if shown else " hidden",
        dialogs=dialogs,
        root=root,
        main=main,
    )


def filled(template: str, **texts: str) -> str:
    """`template` with each `{name}` replaced by its text. The texts are not searched: they may contain braces."""
    return re.sub(rf"\{{({'|'.join(texts)})\}}", lambda match: texts[match[1]], template)


def serve(router: APIRouter, path: str, content: bytes, media_type: str) -> None:
    """Serve a static file of the pages to everybody, since it holds no data; gzipped for clients that accept it."""

    @router.get(path, openapi_extra=needs(OPEN), include_in_schema=False)
    async def asset(request: Request) -> Response:
        headers = {"Vary": "Accept-Encoding"}
        if accepts_gzip(request.headers.get("accept-encoding", "")):
            packed = _gzipped(content)
            return Response(packed, headers={**headers, "Content-Encoding": "gzip"}, media_type=media_type)
        return Response(content, headers=headers, media_type=media_type)


@lru_cache
def _gzipped(content: bytes) -> bytes:
    """Compressed on first use, so that startup does not wait for it."""
    return gzip.compress(content, mtime=0)


def _overview(router: APIRouter, guard: AccessGuard, overview: Overview) -> None:
    main, dialogs = _asset("overview.html"), _asset("dialogs.html")

    def page(jobs: str, off: str, *, shown: bool) -> Response:
        content, scripts = filled(main, jobs=jobs, off=off), ("runs", "map", "overview")
        return HTMLResponse(framed("Overview", content, scripts, link="Overview", dialogs=dialogs, shown=shown))

    @router.get("/", openapi_extra=needs(OPEN))
    async def dashboard(request: Request) -> Response:
        if not await _may_see(guard, request):
            return page("", "", shown=False)
        try:
            known = await run_in_threadpool(overview)
        except AppError:
            return page("", "", shown=False)  # the script shows the error
        return page(job_rows(known), off_rows(known), shown=True)


async def _may_see(guard: AccessGuard, request: Request) -> bool:
    """Whether the caller may see jobs. A wrong key counts as a failed sign-in and gets the page without data."""
    try:
        grant = await guard.grant(request.scope)
    except AppError:
        return False
    return grant is not None and SCOPE in grant.scopes


def _guides(router: APIRouter) -> None:
    """The guides of docs/: from the checkout, or else from inside the package."""
    package = Path(__file__).resolve().parent.parent
    folder = package / "docs" if (package / "docs").is_dir() else package.parent.parent / "docs"

    @router.get("/guides/{name}", openapi_extra=needs(SCOPE))
    def guide(name: str) -> Response:
        guides = {"README": folder.parent / "README.md", **{path.stem: path for path in sorted(folder.glob("*.md"))}}
        path = guides.get(GUIDES.get(name) or re.sub("_(late|reconcile)$", "", name))
        if path is None or not path.is_file():
            raise Refused(404, f"there is no guide {name[:40]!r}", f"guides: {', '.join(guides)}")
        return PlainTextResponse(path.read_text(encoding="utf-8"))


# ---- jobs as markup: what the page shows before its script has loaded data, or without JavaScript


def job_rows(overview: Mapping[str, Any]) -> str:
    """A row per job of `routes.overview` that is on."""
    return "".join("".join(_job_row(job)) for job in overview["jobs"] if job["state"] != "off")


def off_rows(overview: Mapping[str, Any]) -> str:
    """A line per job that is off."""
    return "".join(
        f'<li data-key="p-{escape(job["name"])}"><span class="mark off" aria-hidden="true"></span>'
        f"<span>{escape(job['name'])}</span>"
        f'<span class="why">Off. {escape(job["off"][:1].upper() + job["off"][1:])} to enable.</span></li>'
        for job in overview["jobs"]
        if job["state"] == "off"
    )


def _job_row(job: Mapping[str, Any]) -> Iterator[str]:
    last = job["last_run"]
    state = last["outcome"] if job["state"] == "waiting" and last else job["state"]
    state = "late" if job["stale"] else state
    words = WORDS.get(state, state.capitalize())
    name = escape(job["name"])
    yield f'<tr data-key="p-{name}" id="p-{name}"><td class="id"><span class="name">{name}</span>'
    yield f'<span class="sub">{"helper of " + escape(job["helper_of"]) if job["helper_of"] else ""}</span></td>'
    yield f'<td class="state"><span class="mark {MARKS.get(state, state)}" aria-hidden="true"></span> '
    yield f"<strong>{escape(words)}</strong>"
    yield from (f'<span class="sub">{escape(text)}</span>' for text in _facts(job))
    yield f'</td><td class="number"></td><td class="number">{job["rows_total"]:,}<span class="sub">in all</span></td>'
    yield '<td class="spark"></td><td class="wide"></td>'
    next_run = _clock(job["next_run_at"]) if job["next_run_at"] else "when resumed"
    yield f'<td class="when-next">{next_run}</td><td></td></tr>'


def _facts(job: Mapping[str, Any]) -> Iterator[str]:
    last, calls = job["last_run"], job["calls"]
    yield f"last run {_clock(last['started_at'])}, {last['new_rows']:,} new rows" if last else "no run yet"
    if last and last["error"]:
        yield f"{last['error']}{'. Next: ' + last['hint'] if last['hint'] else ''}"
    if last and last["ledger_text"]:
        yield f"Ledger: {last['ledger_text']}"
    if job["clock_ahead_seconds"]:
        yield f"Clock: its records lie {job['clock_ahead_seconds']:,.0f} s ahead of now"
    if calls:
        yield f"Calls: {calls['today']:,} of {calls['a_day']:,} today"


def _clock(text: str) -> str:
    """An API timestamp as `2026-02-07 12:00:00Z`."""
    return f"{text[:10]} {text[11:19]}Z"


def _asset(name: str) -> str:
    return files("app.ops").joinpath("assets", name).read_text(encoding="utf-8")
