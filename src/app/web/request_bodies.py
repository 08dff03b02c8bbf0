"""Request bodies: their limits, and their way from the event loop to the thread that processes them."""

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, MutableMapping
from concurrent.futures import Executor
from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING, Any, TypeVar

from app.core.errors import Transient
from app.object_store.port import ReadableBody
from app.web.errors import Asgi, Receive, Refusal, Refused, Scope, Send

if TYPE_CHECKING:
    from starlette.requests import Request

# Limits on a body before anything is parsed: bytes actually received, seconds actually passed.
#
# Invariant: a body is counted as it arrives, whatever its Content-Length says. It is cut off when it pauses for 15 s,
# or when almost nothing arrives in 30 s of waiting for it. What all bodies hold in memory before they are processed is
# bounded too, and who has no key can make it hold little.

BUFFERED_BYTES = 64 << 20
OPEN_BYTES = 1 << 14
BODY_IDLE_SECONDS = 15.0
BODY_TOTAL_SECONDS = 900.0
RATE_SECONDS, RATE_BYTES = 30.0, 1 << 15
CLOSE = {"Connection": "close"}
LATE = Refusal(408, "the body did not arrive in time", "send it without pauses", headers=CLOSE)
CROWDED = Refusal(
    503, "too many bodies arrive at once", "send the same request again later", headers={"Retry-After": "5", **CLOSE}
)
BY_LINE = frozenset({"application/x-ndjson", "application/ndjson", "application/jsonl", "text/csv"})


class BufferedBytes:
    """What the bodies of all requests hold in memory until they are processed. Used only from the event loop."""

    def __init__(self) -> None:
        self.held = 0

    def take(self, count: int, most: int = BUFFERED_BYTES) -> bool:
        """Count these bytes, until they are taken from `held` again; False when all together are more than `most`."""
        fits = self.held + count <= most
        self.held += count if fits else 0
        return fits


BUFFERED = BufferedBytes()


@dataclass(frozen=True, slots=True)
class BodyLimits:
    """Bytes allowed in a body. Paths under one of `upload_prefixes` may send `upload_bytes`, and so may those under
    `stream_prefixes` with a media type that is read line by line. Both read a body in pieces; all others hold it whole.
    """

    body_bytes: int
    upload_bytes: int
    upload_prefixes: tuple[str, ...] = ()
    stream_prefixes: tuple[str, ...] = ()

    async def call(self, app: Asgi, path: str, scope: Scope, receive: Receive, send: Send, *, is_open: bool) -> None:
        """Call `app` with a body that cannot exceed the limits of `path`. `is_open`: the route needs no key."""
        fields = dict(reversed(scope["headers"]))  # the first header of a name wins
        media_type = fields.get(b"content-type", b"").decode("latin-1").partition(";")[0].strip().lower()
        by_line = media_type in BY_LINE and path.startswith(self.stream_prefixes)
        large = by_line or path.startswith(self.upload_prefixes)
        length = fields.get(b"content-length", b"")
        if not length and b"transfer-encoding" not in fields and scope["http_version"] in ("1.0", "1.1"):
            await app(scope, receive, send)  # there is no body
            return
        limit_bytes, hint = self.body_bytes, "send less at once; MAX_BODY_BYTES limits it"
        if large:
            limit_bytes, hint = self.upload_bytes, "send less at once; MAX_UPLOAD_BYTES limits it"
        elif is_open:
            limit_bytes, hint = min(OPEN_BYTES, limit_bytes), "send less: without a key only short bodies are read"
        too_large = Refusal(413, f"the body is larger than {limit_bytes} bytes", hint, headers=CLOSE)
        if length.isdigit() and int(length) > limit_bytes:
            raise Refused(*too_large)
        in_pieces = large or path.startswith(self.stream_prefixes)
        body = _Body(receive, send, limit_bytes, too_large, is_held=not in_pieces)
        try:
            await app(scope, body.receive, body.send)
        except _BodyTooLarge:
            pass
        finally:
            BUFFERED.held -= body.held_bytes
        if body.refusal is not None and not body.started:
            raise Refused(*body.refusal)


class _BodyTooLarge(Exception):
    """The body went over a limit."""


class _Body:
    """Wraps `receive` and `send` of one request. Once the body is cut off, the application's response is dropped.

    `is_held`: the application holds the body whole. `held_bytes`: what is counted for it.
    """

    def __init__(self, receive: Receive, send: Send, limit_bytes: int, too_large: Refusal, *, is_held: bool) -> None:
        self._receive, self._send = receive, send
        self._limit_bytes, self._too_large = limit_bytes, too_large
        self._received_bytes = 0
        self._until = asyncio.get_running_loop().time() + BODY_TOTAL_SECONDS
        self._waited_seconds, self._waited_bytes = 0.0, 0
        self._whole = False
        self._is_held, self.held_bytes = is_held, 0
        self.started = False
        self.refusal: Refusal | None = None

    async def receive(self) -> MutableMapping[str, Any]:
        if self._whole:
            return await self._receive()
        began = asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout(min(BODY_IDLE_SECONDS, self._until - began)):
                message = await self._receive()
        except TimeoutError:
            self._cut(LATE)
        size_bytes = len(message.get("body", b""))
        self._received_bytes += size_bytes
        if self._is_held:
            if not BUFFERED.take(size_bytes, max(BUFFERED_BYTES, self._limit_bytes)):
                self._cut(CROWDED)
            self.held_bytes += size_bytes
        if self._received_bytes > self._limit_bytes:
            self._cut(self._too_large)
        self._whole = not message.get("more_body", False)
        self._waited_seconds += asyncio.get_running_loop().time() - began
        if self._waited_seconds >= RATE_SECONDS:
            if self._received_bytes - self._waited_bytes < RATE_BYTES and not self._whole:
                self._cut(LATE)
            self._waited_seconds, self._waited_bytes = 0.0, self._received_bytes
        return message

    def _cut(self, refusal: Refusal) -> None:
        self.refusal = refusal
        raise _BodyTooLarge

    async def send(self, message: MutableMapping[str, Any]) -> None:
        if self.refusal is None:
            self.started = True
            await self._send(message)


# Passes a body to the thread that processes it.
#
# Invariants: the two sides are decoupled by a bounded buffer; the thread sees the end of the body only when all of it
# arrived, and an error otherwise. A body takes one of a few slots only once its first bytes have arrived, so a slow
# client blocks nobody else.

FIRST_BYTES = 1 << 16
NEXT_BYTES = 1 << 19  # what the server reads of a body while it waits
WAIT_SECONDS = 30.0
WAKE_BYTES = 1 << 19
HIGH_BYTES = 1 << 20
GONE = Refusal(400, "the client disconnected before the end of the body", "send it again")  # nobody reads it
T = TypeVar("T")


async def read_in_thread(
    request: "Request", places: asyncio.Semaphore, busy: Refusal, threads: Executor, work: Callable[[ReadableBody], T]
) -> T:
    """The result of `work` on the body, run in a thread that holds one of the `places`. Raises Refused: with `busy`
    when no place becomes free in time or too many wait for one, and when the client disconnects.
    """
    from starlette.requests import ClientDisconnect

    blocks, first, whole = request.stream(), bytearray(), True
    try:
        async for block in blocks:
            first += block
            if len(first) >= FIRST_BYTES:
                whole = False
                break
        waiting_bytes = len(first) + (0 if whole else NEXT_BYTES)
        if not BUFFERED.take(waiting_bytes):
            raise Refused(*busy)
        try:
            await acquire_place(places, busy)
        finally:
            BUFFERED.held -= waiting_bytes
        try:
            if whole:
                return await asyncio.get_running_loop().run_in_executor(threads, work, BytesIO(first))
            return await run_with_body(blocks, threads, work, bytes(first))
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


async def run_with_body(
    blocks: AsyncIterator[bytes], threads: Executor, work: Callable[[ReadableBody], T], first: bytes = b""
) -> T:
    """The result of `work` on the body: `first`, then `blocks`. When it raises, the rest of the body is left unread."""
    loop = asyncio.get_running_loop()
    feed = BodyFeed(loop, first)
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

    def __init__(self, loop: asyncio.AbstractEventLoop, first: bytes) -> None:
        self._loop = loop
        self._turn = threading.Condition()
        self._held: list[bytes] = []
        self._held_bytes = 0
        self._ended = False
        self._lost = False
        self._closed = False
        self._room = asyncio.Event()
        self._room.set()
        self._taken = deque([first] if first else ())

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
