"""The one way of a request's body from the event loop to the thread that takes it in.

Invariants: neither side waits for the other beyond the bytes in between, and these are bounded; the thread sees the end
of the body only when all of it came, and an error in every other case. A body takes one of few places when its first
bytes are there: who sends slowly keeps nobody else waiting.
"""

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor
from io import BytesIO
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from app.core.errors import Transient
from app.object_store.port import ReadableBody
from app.web.errors import Refusal, Refused

FIRST_BYTES = 1 << 16
WAIT_SECONDS = 30.0
WAKE_BYTES = 1 << 19
HIGH_BYTES = 1 << 20
GONE = Response(status_code=400)  # client disconnected
T = TypeVar("T")


async def read_in_thread(
    request: Request, places: asyncio.Semaphore, busy: Refusal, threads: Executor, work: Callable[[ReadableBody], T]
) -> T | None:
    """What `work` makes of the body in a thread, at one of the `places`; None when the client disconnected. Raises
    Refused with `busy` when no place becomes free in time.
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
        return None


async def acquire_place(places: asyncio.Semaphore, busy: Refusal) -> None:
    """Take one of the places. Raises Refused with `busy` when none becomes free in time."""
    try:
        async with asyncio.timeout(WAIT_SECONDS):
            await places.acquire()
    except TimeoutError:
        raise Refused(*busy) from None


async def run_with_body(blocks: AsyncIterator[bytes], threads: Executor, work: Callable[[ReadableBody], T]) -> T:
    """What `work` makes of the body. When it raises, the rest of the body is left unread."""
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
    """Bytes in between. `offer`, `end`, `lose` and `left` belong to the loop, `read` to the thread."""

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
        """Hand on `block`, then wait for room. False when nobody reads any more."""
        with self._turn:  # held for a moment only, also by the thread
            self._held.append(block)
            self._held_bytes += len(block)
            if self._held_bytes >= WAKE_BYTES:
                self._turn.notify()
            if self._held_bytes >= HIGH_BYTES and not self._closed:
                self._room.clear()
        await self._room.wait()
        return not self._closed

    def end(self) -> None:
        """All of the body came."""
        with self._turn:
            self._ended = True
            self._turn.notify()

    def lose(self) -> None:
        """The rest of the body does not come; nothing after `end`."""
        with self._turn:
            self._lost = not self._ended
            self._turn.notify()

    def left(self, work: "asyncio.Future[Any]") -> None:
        """The thread is done with the body; what it failed with is looked at here, also when nobody waits for it."""
        self._closed = True
        self._room.set()
        if not work.cancelled():
            work.exception()

    def read(self, count: int, /) -> bytes:
        """See Readable: blocks as they came, uncut where they fit. Raises Transient when the rest does not come."""
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
