"""/dwh: writing and reading rows, one set of routes per declared table.

Invariant: semaphores bound the number of working routes, so that many clients wait instead of filling memory and the
connection pool; a slow reader does not hold a semaphore.
"""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from datetime import datetime
from functools import partial

import msgspec
from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.concurrency import run_in_threadpool

from app.config.settings import DwhSettings, LimitSettings
from app.dwh import openapi
from app.dwh.query import Selection, erasure, selection
from app.dwh.request_parsing import BatchLimits, ReceivedBody, options, receive
from app.dwh.responses import MEDIA, MEMORY_BYTES, AnswerPage, gzipped
from app.dwh.rows import RowFault
from app.dwh.tables import TABLES, Table
from app.dwh.warehouse import InsertResult, Warehouse
from app.object_store.port import ReadableBody
from app.web.api import StreamedResponse, accepts_gzip
from app.web.auth import needs
from app.web.errors import Refusal
from app.web.request_bodies import acquire_place, read_in_thread

READERS = {"postgres": 4, "sqlite": 2}  # SQLite reads in this process: more threads only block each other
WRITERS = 6
BUSY = Refusal(
    429, "too many requests to /dwh at once", "send the same request again later", headers={"Retry-After": "5"}
)
PIECE_IDS = 10_000
SMALL_IDS = 1000  # an answer to POST with fewer ids is small


def build(warehouse: Warehouse, dwh: DwhSettings, limits: LimitSettings, clock: Callable[[], datetime]) -> APIRouter:
    """The routes of all tables."""
    router = APIRouter(prefix="/dwh", tags=["dwh"])
    readers, writers = asyncio.Semaphore(READERS[warehouse.database.dialect]), asyncio.Semaphore(WRITERS)
    threads = ThreadPoolExecutor(WRITERS, "dwh-write")
    for table in TABLES:
        TableRoutes(table, warehouse, dwh, limits, clock, readers, writers, threads).add_to(router)
    return router


@dataclass(frozen=True, slots=True)
class TableRoutes:
    """The routes of one table, and the semaphores that all tables share."""

    table: Table
    warehouse: Warehouse
    dwh: DwhSettings
    limits: LimitSettings
    clock: Callable[[], datetime]
    readers: asyncio.Semaphore
    writers: asyncio.Semaphore
    threads: Executor

    def add_to(self, router: APIRouter) -> None:
        """GET, HEAD, POST and DELETE."""
        table, add = self.table, partial(router.add_api_route, f"/{self.table.path}")
        may_read = needs("dwh:read")
        add(self._read, methods=["HEAD"], include_in_schema=False, openapi_extra=may_read)
        add(
            self._read,
            methods=["GET"],
            name=f"read_{table.name}",
            summary=f"Rows of {table.name}, newest first",
            openapi_extra={**may_read, **openapi.reading(table)},
            responses=openapi.read_answers(table),
            response_class=Response,
        )
        add(
            self._write,
            methods=["POST"],
            name=f"write_{table.name}",
            summary=f"Store rows in {table.name}, each once",
            openapi_extra={**needs("dwh:write"), **openapi.writing(table)},
            responses=openapi.WRITE_ANSWERS,
            response_class=Response,
        )
        add(
            self._erase,
            methods=["DELETE"],
            name=f"erase_{table.name}",
            summary=f"Delete rows of {table.name} for good",
            openapi_extra={**needs("dwh:delete"), **openapi.erasing(table)},
            responses=openapi.ERASE_ANSWERS,
        )

    async def _read(self, request: Request) -> Response:
        chosen = selection(self.table, request.query_params.multi_items())
        count = "count=exact" in _preferred(request)
        with ExitStack() as stack:
            gzip = accepts_gzip(request.headers.get("accept-encoding", ""))
            page = AnswerPage(self.warehouse, chosen, count=count, gzip=gzip)
            stack.callback(page.close)
            await acquire_place(self.readers, BUSY)
            if request.method == "HEAD":
                with ExitStack() as place:
                    place.callback(self.readers.release)
                    await run_in_threadpool(page.look)
                head = Response(headers=_headers(chosen, request.url.path, page), media_type=MEDIA[chosen.format])
                del head.headers["content-length"]  # unknown, since no rows were read
                return head
            producing = asyncio.ensure_future(run_in_threadpool(page.produce))
            # The semaphore covers only the database read, however slowly the client takes the answer.
            producing.add_done_callback(lambda _: self.readers.release())
            # In HTTP/1.0 the end of the connection ends the answer, so a truncated one would go unnoticed.
            whole = request.scope["http_version"] == "1.0"
            size_bytes = await run_in_threadpool(page.wait, whole=whole)
            headers, media_type = _headers(chosen, request.url.path, page), MEDIA[chosen.format]
            if size_bytes is not None:
                if size_bytes <= MEMORY_BYTES:  # streaming costs more than such an answer
                    return Response(page.read(size_bytes), headers=headers, media_type=media_type)
                headers["Content-Length"] = str(size_bytes)
            return StreamedResponse(page.pieces(), stack.pop_all(), headers=headers, media_type=media_type)

    async def _write(self, request: Request) -> Response:
        chosen = options(request.query_params.multi_items(), request.headers, _preferred(request))
        caller = request.scope["state"]["grant"].name
        batch = BatchLimits(self.dwh.max_rows_per_insert, self.dwh.max_write_batch_bytes)
        sizes = {"body_bytes": self.limits.max_body_bytes, "stream_bytes": self.limits.max_upload_bytes}

        def store(body: ReadableBody) -> tuple[InsertResult, ReceivedBody]:
            with closing(receive(body, self.table, chosen, batch, **sizes)) as received:
                done = self.warehouse.insert(
                    self.table,
                    received,
                    at=self.clock(),
                    caller=caller,
                    key=chosen.key,
                    dry_run=chosen.dry_run,
                    resolution=chosen.resolution,
                )
                return done, received

        done, received = await read_in_thread(request, self.writers, BUSY, self.threads, store)
        content = _answer_to_post(done, received.faults if chosen.skip else None, received.fault_count)
        headers = {"Idempotency-Replayed": "true"} if done.replayed else {}
        if chosen.resolution:
            headers["Preference-Applied"] = f"resolution={chosen.resolution}"
        if len(done.ids) <= SMALL_IDS:
            return Response(b"".join(content), headers=headers, media_type=MEDIA["json"])
        if accepts_gzip(request.headers.get("accept-encoding", "")):
            content, headers["Content-Encoding"] = gzipped(content), "gzip"
        return StreamingResponse(content, headers=headers, media_type=MEDIA["json"])

    async def _erase(self, request: Request) -> Response:
        chosen = erasure(self.table, request.query_params.multi_items())
        await acquire_place(self.writers, BUSY)
        with ExitStack() as place:
            place.callback(self.writers.release)
            done = await run_in_threadpool(self.warehouse.erase, chosen, at=self.clock())
        return JSONResponse(asdict(done) | ({"dry_run": True} if chosen.dry_run else {}))


def _answer_to_post(done: InsertResult, faults: Sequence[RowFault] | None, fault_count: int) -> Iterator[bytes]:
    """The body, in pieces, since there may be millions of ids. `faults`: None unless the caller asked to skip them."""
    yield b'{"inserted_ids":['
    for start in range(0, len(done.ids), PIECE_IDS):
        ids = msgspec.json.encode(done.ids[start : start + PIECE_IDS].tolist())
        yield (b"," if start else b"") + ids[1:-1]
    inserted = done.inserted_rows
    yield f'],"count":{inserted},"batches":{done.batches},"skipped":{done.rows - inserted}'.encode()
    if done.dry_run:
        yield b',"dry_run":true'
    if faults is not None:
        yield b',"errors":%b,"error_count":%d' % (msgspec.json.encode(faults), fault_count)
    yield b"}"


def _preferred(request: Request) -> Sequence[str]:
    """The preferences of `Prefer`, see RFC 7240: a value may be quoted and have parameters; unknown ones are ignored,
    as it requires.
    """
    asked = ",".join(request.headers.getlist("prefer")).lower().split(",")
    return ["".join(each.partition(";")[0].split()).replace('"', "") for each in asked]


def _headers(chosen: Selection, path: str, page: AnswerPage) -> dict[str, str]:
    headers = {"Vary": "Accept-Encoding"}
    if page.compressed:
        headers["Content-Encoding"] = "gzip"
    if page.last is not None:
        headers["Link"] = f'<{chosen.next_page(path, page.last)}>; rel="next"'
    if page.total is not None:
        headers["Content-Range"] = chosen.content_range(page.total)
        headers["Preference-Applied"] = "count=exact"
    if chosen.format != "json":
        headers["Content-Disposition"] = f'attachment; filename="{chosen.table.name}.{chosen.format}"'
    return headers
