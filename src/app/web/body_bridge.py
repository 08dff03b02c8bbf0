"""Passes a request body from the event loop to the thread that processes it.

Invariants: the two sides are decoupled by a bounded buffer; the thread sees the end of the body only when all of it
arrived, and an error otherwise. A body takes one of a few slots only once its first bytes have arrived, so a slow
client blocks nobody else.
"""

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor
from io import BytesIO
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request

from app.core.errors import Transient
from app.object_store.port import ReadableBody
from app.web.errors import Refusal, Refused

FIRST_BYTES = 1 << 16
WAIT_SECONDS = 30.0
WAKE_BYTES = 1 << 19
HIGH_BYTES = 1 << 20
GONE = Refusal(400, "the client disconnected before the end of the body", "send it again")  # nobody reads it
T = TypeVar("T")


async def read_in_thread(
    request: Request, places: asyncio.Semaphore, busy: Refusal, threads: Executor, work: Callable[[ReadableBody], T]
) -> T:
    """The result of `work` on the body, run in a thread that holds one of the `places`. Raises Refused: with `busy`
    when no place becomes free in time, and when the client disconnects.
    """
    blocks, first, whole = request.stream(), bytearray(), True

    async def all_blocks() -> AsyncIterator[bytes]:
        yield bytes(first)
        async for block in blocks:
            yield block

    try:
        async for block in blocks:
            first += block
            if len(first) >= FIRST_BYTES:
                whole = False
                break
        await acquire_place(places, busy)
        try:
            if whole:
                return await asyncio.get_running_loop().run_in_executor(threads, work, BytesIO(first))
            return await run_with_body(all_blocks(), threads, work)
        finally:
            places.release()
    except ClientDisconnect:
        raise Refused(*GONE) from None


async def acquire_place(places: asyncio.Semaphore, busy: Refusal) -> None:
    """Take one of the places. Raises Refused with `busy` when none becomes free in time."""
    try:
        async with asyncio.timeout(WAIT_SECONDS):
            await places.acquire()
    except TimeoutError:
        raise Refused(*busy) from None


async def run_with_body(blocks: AsyncIterator[bytes], threads: Executor, work: Callable[[ReadableBody], T]) -> T:
    """The result of `work` on the body. When it raises, the rest of the body is left unread."""
    loop = asyncio.get_running_loop()
    feed = BodyFeed(loop)
    future = loop.run_in_executor(threads, work, feed)
    future.add_done_callback(feed.left)
    try:
        async for block in blocks:
            if not await feed.offer(block):
                break
        else:
            feed.end()
        return await asyncio.shield(future)
    finally:
        feed.lose()


class BodyFeed:
    """The buffered bytes. The loop calls `offer`, `end`, `lose` and `left`; the thread calls `read`."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._turn = threading.Condition()
        self._held: list[bytes] = []
        self._held_bytes = 0
        self._ended = False
        self._lost = False
        self._closed = False
        self._room = asyncio.Event()
        self._room.set()
        self._taken: deque[bytes] = deque()

    async def offer(self, block: bytes) -> bool:
        """Pass on `block`, then wait for room in the buffer. False when the reader has finished."""
        with self._turn:  # both sides hold it only for a moment
            self._held.append(block)
            self._held_bytes += len(block)
            if self._held_bytes >= WAKE_BYTES:
                self._turn.notify()
            if self._held_bytes >= HIGH_BYTES and not self._closed:
                self._room.clear()
        await self._room.wait()
        return not self._closed

    def end(self) -> None:
        """The whole body has arrived."""
        with self._turn:
            self._ended = True
            self._turn.notify()

    def lose(self) -> None:
        """The rest of the body will not come. No effect after `end`."""
        with self._turn:
            self._lost = not self._ended
            self._turn.notify()

    def left(self, work: "asyncio.Future[Any]") -> None:
        """The thread is done with the body. Retrieves its exception, in case nobody awaits it."""
        self._closed = True
        self._room.set()
        if not work.cancelled():
            work.exception()

    def read(self, count: int, /) -> bytes:
        """See Readable: blocks as they came, uncut where they fit. Raises Transient when the body is incomplete."""
        if not self._taken:
            self._take()
        block = self._taken.popleft() if self._taken else b""
        if len(block) > count:
            self._taken.appendleft(block[count:])
            block = block[:count]
        return block

    def _take(self) -> None:
        with self._turn:
            self._turn.wait_for(lambda: self._held_bytes >= WAKE_BYTES or self._ended or self._lost)
            if self._lost:
                raise Transient("the client disconnected before the end of the body", "send it again")
            self._taken.extend(self._held)
            self._held, self._held_bytes = [], 0
        self._loop.call_soon_threadsafe(self._room.set)
