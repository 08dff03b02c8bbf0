"""/amplitude: the events of some days as a zip, one NDJSON entry per ISO week.

Invariants: the zip is sent while later days are still fetched, and never held in memory beyond one chunk; an error
before its first byte is an error response, a later one closes the connection, so that no client takes a partial file
for a complete one.
"""

from collections.abc import Generator, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, closing
from datetime import UTC, date, datetime, time, timedelta
from itertools import chain
from typing import Annotated, BinaryIO, Literal

from fastapi import APIRouter, Depends, Query, Request, Response
from starlette.concurrency import run_in_threadpool

from app.amplitude.archives import ExportArchive, name_of, weeks
from app.amplitude.client import Project
from app.core.runs import Stop
from app.core.windows import Window
from app.product_events.routes import CallerPlaces, ServiceFile
from app.web.api import refuse_unknown_parameters
from app.web.auth import needs
from app.web.errors import Answers, Refusal, Refused, faults

MAX_DAYS = 365
AT_ONCE = 2
LOOK_SECONDS = 0.5
FIRST_DAY, LAST_DAY = date(1980, 1, 7), date(2107, 12, 31)  # a zip cannot store dates of other weeks
DAY = r"^\d{8}$"
Day = Annotated[str, Query(pattern=DAY, description="YYYYMMDD, UTC", examples=["20240201"])]
BUSY = Refusal(
    429, "two Amplitude exports are already running", "try again when one has finished", headers={"Retry-After": "30"}
)

ANSWERS: Answers = {
    200: {"content": {"application/zip": {}}, "description": "`{year}_week_{week}.zip`"},
    **faults(
        {
            409: "this source is not configured",
            429: "two exports are already running",
            502: "Amplitude refused; its message is included",
            503: "Amplitude cannot be reached: send the same request again",
        }
    ),
}


def build(projects: Mapping[str, Project]) -> APIRouter:
    """The routes for the configured projects."""
    strict = [Depends(refuse_unknown_parameters)]
    router = APIRouter(prefix="/amplitude", tags=["amplitude"], dependencies=strict)
    places = CallerPlaces(AT_ONCE, BUSY)

    @router.get(
        "/export",
        openapi_extra=needs("pull:read"),
        summary="Events of whole days as a zip with one NDJSON file per ISO week",
        response_class=Response,
        responses=ANSWERS,
    )
    async def export(request: Request, start: Day, end: Day, source: Literal["web", "mobile"]) -> Response:
        first, last = _days(start, end)
        project = projects.get(source)
        if project is None:
            name = f"AMPLITUDE_{source.upper()}_CLIENT_ID"
            raise Refused(409, f"the source {source} is not configured", f"set {name} and its secret key")

        async def make(stop: Stop, held: ExitStack) -> Response:
            pieces = held.enter_context(closing(week_zip(project, first, last, stop)))
            head = await run_in_threadpool(next, pieces, b"")
            name, whole = f"{name_of(first)}.zip", chain((head,), pieces)
            return ServiceFile(whole, held.pop_all(), stop, name=name, media_type="application/zip")

        return await places.answer(request, make)

    return router


def _days(start: str, end: str) -> tuple[date, date]:
    """Parse both days. Raises Refused with 422."""
    first, last = _day(start, "start"), _day(end, "end")
    if first < FIRST_DAY or last > LAST_DAY:
        said, hint = f"no export from {start} to {end}", f"days range from {FIRST_DAY:%Y%m%d} to {LAST_DAY:%Y%m%d}"
        raise Refused(422, said, hint, "query.start" if first < FIRST_DAY else "query.end")
    if first > last:
        raise Refused(422, f"start {start} is after end {end}", "give the earlier day as start", "query.start")
    if (last - first).days >= MAX_DAYS:
        raise Refused(422, f"more than {MAX_DAYS} days", "ask for fewer days at once", "query.end")
    return first, last


def _day(text: str, name: str) -> date:
    try:
        return datetime.strptime(text + "+0000", "%Y%m%d%z").date()
    except ValueError:
        hint = "write it as YYYYMMDD, such as 20240201"
        raise Refused(422, f"{name}={text} is not a valid day", hint, f"query.{name}") from None


def week_zip(project: Project, first: date, last: date, stop: Stop) -> Generator[bytes]:
    """The zip of the events of all days from `first` to `last`. Raises the errors of fetching."""
    start = datetime.combine(first, time(), UTC)
    days = [first + timedelta(days=number) for number in range((last - first).days + 1)]
    span = Window(start, start + timedelta(days=len(days)))
    return _joined(weeks(_streams(_ahead(project.fetch(span, stop), stop)), days))


def _ahead(pieces: Iterator[ExportArchive], stop: Stop) -> Iterator[ExportArchive]:
    """Prefetch one archive in a separate thread. Neither a stop nor closing this waits for that thread: the service may
    take minutes to answer, and the thread may be waiting for its turn behind the one that closes this.
    """

    def close_unused(done: Future[ExportArchive | None]) -> None:
        if not done.exception() and (fetched := done.result()) is not None:
            fetched.close()

    pool = ThreadPoolExecutor(1, thread_name_prefix="amplitude-ahead")
    upcoming = pool.submit(next, pieces, None)
    try:
        while True:
            while not wait([upcoming], LOOK_SECONDS).done:
                stop.check()
            if (fetched := upcoming.result()) is None:
                return
            upcoming = pool.submit(next, pieces, None)
            yield fetched
    finally:
        upcoming.add_done_callback(close_unused)
        pool.shutdown(wait=False)


def _joined(pieces: Iterator[bytes], size_bytes: int = 1 << 16) -> Generator[bytes]:
    """The same bytes in chunks large enough to be worth a thread switch. The first one waits for the first day."""
    held = bytearray()
    for piece in pieces:
        held += piece
        if len(held) >= size_bytes:
            yield bytes(held)
            held.clear()
    if held:
        yield bytes(held)


def _streams(fetched: Iterator[ExportArchive]) -> Iterator[tuple[datetime, BinaryIO]]:
    """Every member of every archive, by hour. Raises Permanent when one belongs to no hour."""
    for each in fetched:
        with closing(each):
            for error, _ in each.odd:
                raise error
            for hour_at, members in each.hours.items():
                for stream in each.streams(members):
                    yield hour_at, stream
