"""HTTP/1.1: uvicorn's httptools protocol with additional limits, and an event loop that keeps probes responsive.

Invariants: a request never reaches the application if its head takes longer than 15 s, is larger than 64 KiB, or has no
Host or two; trailers after a body are dropped; the buffered part of a body is bounded. A client that reads almost
nothing of its response for 30 s is disconnected. A response sent before the whole body has arrived still reaches the
client, since the rest of the body is read and discarded for a while.

What the two optimisations gain (docs/benchmarks.md, "The front" and "/s3"):
- FairEventLoop, and probes answered in the iteration in which they arrive: with 64 busy clients the p99 of /health
  fell from 50-61 to 12-20 ms, on a quiet machine from 5.8 to 2.1 times that of a bare application.
- `on_body` passes blocks on without a copy: an upload of 2 GiB takes 5.8 to 8 s of CPU instead of 12.7.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Iterable, MutableMapping
from contextlib import suppress
from contextvars import Context, ContextVar
from typing import Any, Protocol, cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from app.ops.connection_checks import PATHS
from app.web.errors import Asgi, Receive, Refusal, Scope, Send, send_refusal

HEAD_SECONDS = 15.0
HEAD_BYTES = 1 << 16
BODY_WAITS_BYTES = 1 << 18
HOST_SINCE = "1.1"
SEND_SECONDS, SEND_BYTES = 30.0, 1 << 15
LINGER_SECONDS, LINGER_IDLE_SECONDS = 30.0, 5.0
LINGER_HEAD_BYTES = 1 << 20  # discarded at most after an unreadable request
PROBE_METHODS = ("GET", "HEAD")
FULL = Refusal(
    503,
    "all connections are at work",
    "send the same request again later",
    headers={"Retry-After": "5", "Connection": "close"},
)
LOOK_SECONDS = 0.001
log = logging.getLogger(__name__)
of_a_request = ContextVar("of_a_request", default=False)
"""True in the context of a request, and of everything it starts."""


class FairEventLoop(asyncio.SelectorEventLoop):
    """An event loop that limits how long request steps run between two polls of its sockets, so that a probe waits for
    few of them.

    asyncio runs every ready callback before it polls again, which takes a while with a hundred requests at once. Here
    request steps run for one millisecond per poll, in the order in which they became ready and at least one each time.
    Everything else, accepting and reading above all, is not delayed.
    """

    def __init__(self) -> None:
        super().__init__()
        self._steps: deque[asyncio.Handle] = deque()

    def call_soon(  # type: ignore[override]
        self, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.Handle:
        """As asyncio's. Every step of a task or future passes through here."""
        if not (of_a_request.get() if context is None else context.get(of_a_request, False)):
            return super().call_soon(callback, *args, context=context)
        if not self._steps:
            super().call_soon(self._go_on, context=Context())
        step = asyncio.Handle(callback, args, self, context)
        self._steps.append(step)
        return step

    def _go_on(self) -> None:
        until = self.time() + LOOK_SECONDS
        for _ in range(len(self._steps)):  # what these steps make ready waits for the next poll, as in asyncio
            step = self._steps.popleft()
            if not step.cancelled():
                step._run()  # noqa: SLF001 - as asyncio's own loops do it
            if self.time() >= until:
                break
        if self._steps:
            super().call_soon(self._go_on, context=Context())


class _HeadRefused(Exception):
    """The parser turns it into a 400."""


class LingeringTransport:
    """The transport of a connection. If it is closed while the client is still sending, it first flushes its buffer and
    discards incoming data: closing a socket with unread data resets it, and the client gets a broken pipe and no
    response.
    """

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._until = 0.0
        self._came = False
        self._timer: asyncio.TimerHandle | None = None
        self.still_coming = False
        self.most_bytes = 1 << 62
        self.lingers = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def is_closing(self) -> bool:
        """True also while it lingers."""
        return self.lingers or self._transport.is_closing()

    def close(self) -> None:
        """See the class; at most `most_bytes` are discarded."""
        if not self.still_coming or self._transport.is_closing():
            self._transport.close()
        elif not self.lingers:
            self.lingers = True
            self._until = self._loop.time() + LINGER_SECONDS
            self._transport.write_eof()
            self._transport.resume_reading()
            self._timer = self._loop.call_later(LINGER_IDLE_SECONDS, self._look)

    def take(self, size_bytes: int) -> None:
        """Count discarded bytes."""
        self._came = True
        self.most_bytes -= size_bytes
        if self.most_bytes < 0:
            self._transport.abort()

    def _look(self) -> None:
        if not self._came or self._loop.time() >= self._until:
            self._transport.abort()
        else:
            self._came = False
            self._timer = self._loop.call_later(LINGER_IDLE_SECONDS, self._look)

    def forget(self) -> None:
        """The connection is closed."""
        if self._timer is not None:
            self._timer.cancel()


# Room for connections: at 90 % use, the connections that have been idle longest are closed.
#
# Invariants: a connection whose request is complete is never closed to make room; while there is no room, probes are
# still answered. There is no limit by address: behind a proxy or in a private network many callers share one.

USED = 0.9
SPARE = 80  # descriptors for connections that are accepted before the first of them is counted
IDLE, SENDING, WORKING = range(3)  # see WaitingConnection.rank
CLOSED_SHARE, CLOSED_LEAST = 20, 32  # closed at once: 1 in 20, at least 32; each scan takes a while


class WaitingConnection(Protocol):
    """A connection that may be closed to make room."""

    @property
    def asked_at(self) -> float:
        """When its last complete request arrived, or else when it was opened; monotonic seconds."""

    @property
    def rank(self) -> int:
        """0 = idle, 1 = a request body is arriving, 2 = a request is being processed."""

    def drop(self) -> None:
        """Close it now; unsent data is lost."""


class ConnectionLimits:
    """Caps the number of `connections`, and the file `descriptors` in use, which the process needs for other things
    too.
    """

    def __init__(self, connections: int, descriptors: int) -> None:
        self._connections = int(connections * USED)
        self._descriptors = min(int(descriptors * USED), descriptors - SPARE)
        self._leaving: set[WaitingConnection] = set()

    def enter(
        self, newest: WaitingConnection, descriptor: int, all_of: Iterable[WaitingConnection], count: int
    ) -> bool:
        """Whether `newest`, one of `all_of`, may ask for more than probes; makes room for it if possible.

        `descriptor` is its own. The kernel assigns the lowest free number, so it shows how many are in use.
        """
        if count < self._connections and descriptor < self._descriptors:
            return True
        return self.make(each for each in all_of if each is not newest)

    def make(self, all_of: Iterable[WaitingConnection]) -> bool:
        """Close some connections; whether any could be closed. Also called when the process is out of descriptors."""
        if self._leaving:  # they are freed in the next iteration of the event loop
            return True
        idle = [each for each in all_of if each.rank < WORKING]
        idle.sort(key=lambda each: (each.rank, each.asked_at))
        victims = idle[: max(self._connections // CLOSED_SHARE, CLOSED_LEAST)]
        self._leaving.update(victims)
        for victim in victims:
            victim.drop()
        if victims:
            log.warning("nine tenths of all connections are used: %d without a request were closed", len(victims))
        else:
            log.warning("all connections are at work: new ones are answered 503")
        return bool(victims)

    def left(self, connection: WaitingConnection) -> None:
        """The connection is closed."""
        self._leaving.discard(connection)


class PunctualProtocol(HttpToolsProtocol):
    """See the module. `room` decides which connections may ask for more than probes."""

    def __init__(self, room: ConnectionLimits, **named: Any) -> None:
        super().__init__(**named)
        self._room = room
        self._admitted = True
        self._in_head = True
        self._head_bytes = 0
        self._late: asyncio.TimerHandle | None = None
        self._probe: tuple[Any, Asgi] | None = None
        self._outgoing: LingeringTransport
        self._unsent = (0.0, 0)  # since when, and the number of bytes then
        self.asked_at = self.loop.time()
        self.descriptor = -1

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Starts the head timeout."""
        self._outgoing = LingeringTransport(transport, self.loop)
        super().connection_made(cast("asyncio.Transport", self._outgoing))
        connections = cast("set[PunctualProtocol]", self.connections)
        self.descriptor = transport.get_extra_info("socket").fileno()
        self._admitted = self._room.enter(self, self.descriptor, connections, len(connections))
        self._watch_head()

    def data_received(self, data: bytes) -> None:
        """A complete head stops the timeout; the first byte of the next one starts it again."""
        if self._outgoing.lingers:
            self._outgoing.take(len(data))
            return
        if self.parser is None or self.transport.is_closing():
            return
        self._head_bytes += len(data)  # a head counts from 0 at its first byte, whose block is at most 256 KiB
        super().data_received(data)
        if self._in_head and self._head_bytes > HEAD_BYTES and not self.transport.is_closing():
            self.send_400_response("The head of the request is too large.")
        self._watch_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stops the timeouts."""
        self._forget()
        self._outgoing.forget()
        self._room.left(self)
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """The rest of an unreadable request may keep coming for a while."""
        self._outgoing.still_coming = True
        self._outgoing.most_bytes = LINGER_HEAD_BYTES
        super().send_400_response(msg)

    def on_message_begin(self) -> None:
        """The first byte of a request."""
        self._in_head, self._head_bytes = True, 0
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        """Drop trailers: the request may already have been authorized by its headers."""
        if self._in_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """RFC 9112 requires exactly one Host. With two, each reader might pick a different one. The parser undoes the
        transfer coding `chunked` only: a body in any other one would be stored as it came.
        """
        hosts = sum(name == b"host" for name, _ in self.headers)
        coded = any(name == b"transfer-encoding" and value.lower() != b"chunked" for name, value in self.headers)
        head_bytes = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        if coded or head_bytes > HEAD_BYTES or (hosts != 1 and (hosts or self.parser.get_http_version() == HOST_SINCE)):
            raise _HeadRefused
        self._in_head = False
        self._outgoing.still_coming = True
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """As uvicorn's, but a block that arrives alone is passed on without a copy, and the buffer is larger."""
        cycle = self.cycle
        if cycle.response_complete:
            return
        if not cycle.body:
            cycle.body = cast("bytearray", body)  # `receive` calls bytes() on it, which returns the same object
        elif isinstance(cycle.body, bytearray):
            cycle.body += body
        else:
            cycle.body = bytearray(cycle.body) + body
        if len(cycle.body) > BODY_WAITS_BYTES:
            self.flow.pause_reading()
        cycle.message_event.set()

    def on_message_complete(self) -> None:
        """The request is complete. Answers a probe that waited for this."""
        self.asked_at = self.loop.time()
        self._outgoing.still_coming = False
        super().on_message_complete()
        if self._probe is not None:
            (cycle, app), self._probe = self._probe, None
            # It awaits nothing, so it finishes here; a task would start after all other tasks.
            with suppress(StopIteration):
                cycle.run_asgi(app).send(None)

    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        scope = cycle.scope
        probe = scope["path"] in PATHS and scope["method"] in PROBE_METHODS
        if probe and cycle.more_body and not self.transport.get_write_buffer_size():
            self._probe = (cycle, app)
        else:
            before = of_a_request.set(not probe)
            super()._start_asgi_task(cycle, self._careful(cycle, app if probe or self._admitted else _full))
            of_a_request.reset(before)

    def _careful(self, cycle: Any, app: Asgi) -> Any:
        """`app`, with three changes: a response that starts before the end of the body closes the connection; after it
        the rest of the body is dropped; and after each send it waits until the client has read enough, so that one
        block is buffered for a slow client and not three.
        """

        async def called(scope: Scope, receive: Receive, send: Send) -> None:
            async def sent(message: MutableMapping[str, Any]) -> None:
                if message["type"] == "http.response.start" and cycle.more_body:
                    cycle.keep_alive = False
                await send(message)
                if cycle.response_complete:
                    cycle.body = b""  # what came of a body that nobody reads any more
                if self.flow.write_paused:
                    await self.flow.drain()

            await app(scope, receive, sent)

        return called

    @property
    def rank(self) -> int:
        """See WaitingConnection."""
        if self.cycle is None or self.cycle.response_complete:
            return IDLE
        return SENDING if self.cycle.more_body else WORKING

    def drop(self) -> None:
        """See WaitingConnection."""
        self.transport.abort()

    def shutdown(self) -> None:
        """As uvicorn's, but a connection that only lingers, its response sent, is closed at once."""
        if self._outgoing.lingers:
            self.transport.abort()
        else:
            super().shutdown()

    def watch_sending(self, now: float) -> None:
        """Called once a second: disconnect a client that does not read its response."""
        unsent_bytes = self.transport.get_write_buffer_size()
        since, then_bytes = self._unsent
        moved = not unsent_bytes or unsent_bytes > then_bytes or then_bytes - unsent_bytes >= SEND_BYTES
        if moved:  # more than before: the application was resumed, which happens when nearly all was sent
            self._unsent = (now, unsent_bytes)
        elif now - since > SEND_SECONDS:
            self.transport.abort()

    def _watch_head(self) -> None:
        if not self._in_head:
            self._forget()
        elif self._late is None:
            self._late = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def _forget(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None


async def _full(scope: Scope, receive: Receive, send: Send) -> None:
    """The application for connections that found no room."""
    del scope, receive
    await send_refusal(send, FULL)
