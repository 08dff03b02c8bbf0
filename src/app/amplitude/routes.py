"""/amplitude: the events of some days as a zip, one NDJSON entry per ISO week.

Invariants: the zip is sent while later days are still fetched, and never held in memory beyond one chunk; an error
before its first byte is an error response, a later one closes the connection, so that no client takes a partial file
for a complete one.
"""

import asyncio
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from datetime import UTC, date, datetime, time, timedelta
from itertools import chain
from typing import Annotated, BinaryIO, Literal

from fastapi import APIRouter, Depends, Query, Response
from starlette.concurrency import run_in_threadpool

from app.amplitude.archives import name_of, opened, weeks
from app.amplitude.client import FetchedArchive, Project
from app.core.runs import Stop
from app.core.windows import Window
from app.web.api import StreamedResponse, refuse_unknown_parameters
from app.web.auth import needs
from app.web.errors import Answers, Refusal, Refused, faults

MAX_DAYS = 365
AT_ONCE = 2
FIRST_DAY, LAST_DAY = date(1980, 1, 7), date(2107, 12, 31)  # a zip cannot store dates of other weeks
DAY = r"^\d{8}$"
Day = Annotated[str, Query(pattern=DAY, description="YYYYMMDD, UTC", examples=["20240201"])]
BUSY = Refusal(429, "two exports of Amplitude run already", "try again when one is done", headers={"Retry-After": "30"})

ANSWERS: Answers = {
    200: {"content": {"application/zip": {}}, "description": "`{year}_week_{week}.zip`"},
    **faults(
        {
            409: "this source is not configured",
            429: "two exports run already",
            502: "Amplitude refuses, with what it says",
            503: "Amplitude cannot be reached: send the same request again",
        }
    ),
}


def build(projects: Mapping[str, Project]) -> APIRouter:
    """The routes for the configured projects."""
    strict = [Depends(refuse_unknown_parameters)]
    router = APIRouter(prefix="/amplitude", tags=["amplitude"], dependencies=strict)
    places = asyncio.Semaphore(AT_ONCE)

    @router.get(
        "/export",
        openapi_extra=needs("pull:read"),
        summary="Events of whole days as a zip with one NDJSON file per ISO week",
        response_class=Response,
        responses=ANSWERS,
    )
    async def export(start: Day, end: Day, source: Literal["web", "mobile"]) -> Response:
        first, last = _days(start, end)
        project = projects.get(source)
        if project is None:
            name = f"AMPLITUDE_{source.upper()}_CLIENT_ID"
            raise Refused(409, f"the source {source} is not configured", f"set {name} and its secret key")
        if places.locked():
            raise Refused(*BUSY)
        await places.acquire()
        with ExitStack() as held:
            held.callback(places.release)
            stop = Stop()
            held.callback(stop.ask, "the caller went away")
            pieces = week_zip(project, first, last, stop)
            head = await run_in_threadpool(next, pieces, b"")
            headers = {"Content-Disposition": f'attachment; filename="{name_of(first)}.zip"'}
            return StreamedResponse(
                chain((head,), pieces), held.pop_all(), headers=headers, media_type="application/zip"
            )

    return router


def _days(start: str, end: str) -> tuple[date, date]:
    """Parse both days. Raises Refused with 422."""
    first, last = _day(start, "start"), _day(end, "end")
    if first < FIRST_DAY or last > LAST_DAY:
        said, hint = f"no export from {start} to {end}", f"days go from {FIRST_DAY:%Y%m%d} to {LAST_DAY:%Y%m%d}"
        raise Refused(422, said, hint, "query.start" if first < FIRST_DAY else "query.end")
    if first > last:
        raise Refused(422, f"start {start} is after end {end}", "give the older day as start", "query.start")
    if (last - first).days >= MAX_DAYS:
        raise Refused(422, f"more than {MAX_DAYS} days", "ask for fewer at once", "query.end")
    return first, last


def _day(text: str, name: str) -> date:
    try:
        return datetime.strptime(text + "+0000", "%Y%m%d%z").date()
    except ValueError:
        hint = "write it as YYYYMMDD, such as 20240201"
        raise Refused(422, f"{name}={text} is not a valid day", hint, f"query.{name}") from None


def week_zip(project: Project, first: date, last: date, stop: Stop) -> Iterator[bytes]:
    """The zip of the events of all days from `first` to `last`. Raises the errors of fetching."""
    start = datetime.combine(first, time(), UTC)
    days = [first + timedelta(days=number) for number in range((last - first).days + 1)]
    span = Window(start, start + timedelta(days=len(days)))
    fetched = project.fetch(span, stop)
    return _joined(weeks(_streams(_ahead(fetched) if len(days) > 1 else fetched), days))


def _ahead(pieces: Iterator[FetchedArchive]) -> Iterator[FetchedArchive]:
    """Prefetch one archive in a separate thread."""

    def close_unused(done: Future[FetchedArchive | None]) -> None:
        if not done.exception() and (fetched := done.result()) is not None:
            fetched.close()

    with ThreadPoolExecutor(1, thread_name_prefix="amplitude-ahead") as pool:
        upcoming = pool.submit(next, pieces, None)
        try:
            while (fetched := upcoming.result()) is not None:
                upcoming = pool.submit(next, pieces, None)
                yield fetched
        finally:
            upcoming.add_done_callback(close_unused)


def _joined(pieces: Iterator[bytes], size_bytes: int = 1 << 16) -> Iterator[bytes]:
    """The same bytes in chunks large enough to be worth a thread switch. The first one waits for the first day."""
    held = bytearray()
    for piece in pieces:
        held += piece
        if len(held) >= size_bytes:
            yield bytes(held)
            held.clear()
    if held:
        yield bytes(held)


def _streams(fetched: Iterator[FetchedArchive]) -> Iterator[tuple[datetime, BinaryIO]]:
    """Every member of every archive, by hour."""
    for each in fetched:
        with closing(each):
            if each.file is None:
                continue
            with opened(each.file) as archive:
                for hour_at, members in archive.hours(each.span).items():
                    for stream in archive.streams(members):
                        yield hour_at, stream
