"""/dwh: rows in and rows out, one pair of routes per declared table.

Invariants: bodies are streamed into a thread block by block; a route holds one of few places while it works, so that
many clients wait instead of filling memory and the pool of connections.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect

from app.dwh import answers, document, pages
from app.dwh.faults import BadRequest
from app.dwh.intake import BatchLimits, Intake
from app.dwh.options import Options, options
from app.dwh.query import selection
from app.dwh.store import Request as Storing
from app.dwh.store import Warehouse
from app.dwh.tables import TABLES, Table
from app.ops.answers import Refusal, Refused
from app.ops.guard import needs

BLOCK_BYTES = 1 << 18
READERS, WRITERS = 4, 6
WAIT_SECONDS = 30.0
BUSY = Refusal(
    429, "too many requests to /dwh at once", "send the same request again later", headers={"Retry-After": "5"}
)
OTHERS = ["DELETE", "HEAD", "OPTIONS", "PATCH", "PUT", "TRACE"]
GONE = Response(status_code=400)  # nobody is there to read it


@dataclass(frozen=True, slots=True)
class Limits:
    """Bytes of a JSON body and of a row; of a streamed body; and what a batch may hold."""

    body_bytes: int
    stream_bytes: int
    batch: BatchLimits


@dataclass(frozen=True, slots=True)
class Serving:
    """What the routes act on."""

    warehouse: Warehouse
    limits: Limits
    clock: Callable[[], datetime]
    readers: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(READERS))
    writers: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(WRITERS))


def build(serving: Serving) -> APIRouter:
    """The routes of all tables."""
    router = APIRouter(prefix="/dwh", tags=["dwh"])
    for table in TABLES:
        # First, since the first route of a path answers for its other methods, and knows only its own.
        router.add_api_route(
            f"/{table.path}", _other, methods=OTHERS, include_in_schema=False, openapi_extra=needs("dwh:read")
        )
        router.add_api_route(
            f"/{table.path}",
            _reading(serving, table),
            methods=["GET"],
            name=f"read_{table.name}",
            summary=f"Rows of {table.name}, newest first",
            openapi_extra={**needs("dwh:read"), **document.reading(table)},
            responses=document.read_answers(table),
            response_class=Response,
        )
        router.add_api_route(
            f"/{table.path}",
            _writing(serving, table),
            methods=["POST"],
            name=f"write_{table.name}",
            summary=f"Store rows in {table.name}, each once",
            openapi_extra={**needs("dwh:write"), **document.writing(table)},
            responses=document.write_answers(),
            response_class=Response,
        )
    return router


async def _other() -> Response:
    raise Refused(Refusal(405, "this path knows GET and POST", "see /docs", headers={"Allow": "GET, POST"}))


@asynccontextmanager
async def _place(places: asyncio.Semaphore) -> AsyncIterator[None]:
    """One of the places; 429 when none becomes free in time."""
    try:
        async with asyncio.timeout(WAIT_SECONDS):
            await places.acquire()
    except TimeoutError:
        raise Refused(BUSY) from None
    try:
        yield
    except BadRequest as error:
        raise Refused(Refusal(error.status, error.message, error.hint, error.fault)) from error
    finally:
        places.release()


def _reading(serving: Serving, table: Table) -> Callable[[Request], Any]:
    async def read(request: Request) -> Response:
        async with _place(serving.readers):
            chosen = selection(table, request.query_params.multi_items())
            page = await run_in_threadpool(pages.page, serving.warehouse, chosen)
        headers = {"Content-Length": str(page.size_bytes)}
        if page.last_id is not None:
            headers["Link"] = f'<{chosen.next_page(request.url.path, page.last_id)}>; rel="next"'
        if chosen.format != "json":
            headers["Content-Disposition"] = f'attachment; filename="{table.name}.{chosen.format}"'
        return StreamingResponse(page.pieces(), headers=headers, media_type=pages.MEDIA[chosen.format])

    return read


def _writing(serving: Serving, table: Table) -> Callable[[Request], Any]:
    async def write(request: Request) -> Response:
        async with _place(serving.writers):
            chosen = options(request.query_params.multi_items(), request.headers)
            intake = await run_in_threadpool(_intake, serving, table, chosen)
            try:
                return await _stored(serving, table, request, (chosen, intake))
            except ClientDisconnect:
                return GONE
            finally:
                intake.received.close()

    return write


def _intake(serving: Serving, table: Table, chosen: Options) -> Intake:
    """Imports the decoder, which an idle daemon does without."""
    from app.dwh.rows import reader

    limits = serving.limits
    body, gzip = chosen.body(table, limits.body_bytes, limits.stream_bytes)
    return Intake(body, reader(table.name), limits.batch, gzip=gzip, skip=chosen.skip)


async def _stored(serving: Serving, table: Table, request: Request, given: tuple[Options, Intake]) -> Response:
    chosen, intake = given
    async for block in _blocks(request):
        await run_in_threadpool(intake.feed, block)
    received = await run_in_threadpool(intake.finish)
    caller = request.scope["state"]["grant"].name
    storing = Storing(serving.clock(), caller, chosen.key, chosen.dry_run)
    done = await run_in_threadpool(serving.warehouse.insert, table, received, storing)
    faults = received.faults if chosen.skip else None
    headers = {"Idempotency-Replayed": "true"} if done.replayed else {}
    content = answers.body(done, faults, received.fault_count)
    return StreamingResponse(content, headers=headers, media_type="application/json")


async def _blocks(request: Request) -> AsyncIterator[bytes]:
    """The body in blocks that are worth a trip to a thread."""
    held: list[bytes] = []
    held_bytes = 0
    async for piece in request.stream():
        held.append(piece)
        held_bytes += len(piece)
        if held_bytes >= BLOCK_BYTES:
            yield b"".join(held)
            held, held_bytes = [], 0
    if held_bytes:
        yield b"".join(held)
