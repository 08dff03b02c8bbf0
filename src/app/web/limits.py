"""Limits on what a client may use: bytes, seconds and connections."""

import asyncio
import logging
from collections.abc import Iterable, MutableMapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

from app.web.errors import Asgi, Receive, Refusal, Refused, Scope, Send

# Limits on a body before anything is parsed: bytes actually received, seconds actually passed.
#
# Invariant: a body is counted as it arrives, whatever its Content-Length says. It is cut off when it pauses for 15 s,
# or when almost nothing arrives in 30 s of waiting for it.

BODY_IDLE_SECONDS = 15.0
BODY_TOTAL_SECONDS = 900.0
RATE_SECONDS, RATE_BYTES = 30.0, 1 << 15
CLOSE = {"Connection": "close"}
LATE = Refusal(408, "the body did not arrive in time", "send it without pauses", headers=CLOSE)
BY_LINE = frozenset({"application/x-ndjson", "application/ndjson", "application/jsonl", "text/csv"})


@dataclass(frozen=True, slots=True)
class BodyLimits:
    """Bytes allowed in a body. Paths under one of `upload_prefixes` may send `upload_bytes`, and so may those under
    `stream_prefixes` with a media type that is read line by line.
    """

    body_bytes: int
    upload_bytes: int
    upload_prefixes: tuple[str, ...] = ()
    stream_prefixes: tuple[str, ...] = ()

    async def call(self, app: Asgi, scope: Scope, receive: Receive, send: Send) -> None:
        """Call `app` with a body that cannot exceed its limits."""
        fields = dict(reversed(scope["headers"]))  # the first header of a name wins
        media_type = fields.get(b"content-type", b"").decode("latin-1").partition(";")[0].strip().lower()
        by_line = media_type in BY_LINE and scope["path"].startswith(self.stream_prefixes)
        large = by_line or scope["path"].startswith(self.upload_prefixes)
        limit_bytes = self.upload_bytes if large else self.body_bytes
        length = fields.get(b"content-length", b"")
        if not length and b"transfer-encoding" not in fields and scope["http_version"] in ("1.0", "1.1"):
            await app(scope, receive, send)  # there is no body
            return
        if length.isdigit() and int(length) > limit_bytes:
            raise Refused(*too_large(limit_bytes))
        body = _Body(receive, send, limit_bytes)
        with suppress(_BodyTooLarge):
            await app(scope, body.receive, body.send)
        if body.refusal is not None and not body.started:
            raise Refused(*body.refusal)


class _BodyTooLarge(Exception):
    """The body went over a limit."""


class _Body:
    """Wraps `receive` and `send` of one request. Once the body is cut off, the application's response is dropped."""

    def __init__(self, receive: Receive, send: Send, limit_bytes: int) -> None:
        self._receive, self._send = receive, send
        self._limit_bytes = limit_bytes
        self._received_bytes = 0
        self._until = asyncio.get_running_loop().time() + BODY_TOTAL_SECONDS
        self._waited_seconds, self._waited_bytes = 0.0, 0
        self._whole = False
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
        self._received_bytes += len(message.get("body", b""))
        if self._received_bytes > self._limit_bytes:
            self._cut(too_large(self._limit_bytes))
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


def too_large(limit_bytes: int) -> Refusal:
    """The response to a body over its limit."""
    message = f"the body is larger than {limit_bytes} bytes"
    return Refusal(413, message, "send less at once; MAX_BODY_BYTES limits it", headers=CLOSE)


# Room for connections: at 90 % use, the connections that have been idle longest are closed.
#
# Invariants: a connection whose request is complete is never closed to make room; while there is no room, probes are
# still answered. There is no limit by address: behind a proxy or in a private network many callers share one.

USED = 0.9
SPARE = 80  # descriptors for connections that are accepted before the first of them is counted
AT_WORK = 2
CLOSED_SHARE, CLOSED_LEAST = 20, 32  # closed at once: 1 in 20, at least 32; each scan takes a while
log = logging.getLogger(__name__)


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
        idle = [each for each in all_of if each.rank < AT_WORK]
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
