"""HTTP as it arrives: uvicorn's protocol over httptools, with the limits that it lacks, and bodies copied less often.

Invariants: a request whose head is not there within 15 s, or is larger than 64 KiB, or names no host or two, never
reaches the application; header fields that come behind a body are dropped; what waits of a body is bounded.
"""

import asyncio
from typing import Any, cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEAD_SECONDS = 15.0
HEAD_BYTES = 1 << 16
BODY_WAITS_BYTES = 1 << 18
HOST_SINCE = "1.1"


class _HeadRefused(Exception):
    """The parser makes it a 400."""


class PunctualProtocol(HttpToolsProtocol):
    """See the module."""

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self._in_head = True
        self._head_bytes = 0
        self._late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """The clock starts with the connection."""
        super().connection_made(transport)
        self._watch_head()

    def data_received(self, data: bytes) -> None:
        """It is stopped by a whole head, and starts again with the first byte of the next."""
        if self.parser is None or self.transport.is_closing():
            return
        self._head_bytes += len(data)  # a head begins from 0 with its first byte, whose block is at most 256 KiB
        super().data_received(data)
        if self._in_head and self._head_bytes > HEAD_BYTES and not self.transport.is_closing():
            self.send_400_response("The head of the request is too large.")
        self._watch_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is left to be late."""
        self._forget()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        """The first byte of a request."""
        self._in_head, self._head_bytes = True, 0
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        """Behind a body it is no header of the request any more, which may have been let in by then."""
        if self._in_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """RFC 9112 asks for one Host. What two of them mean would depend on who reads them."""
        hosts = sum(name == b"host" for name, _ in self.headers)
        head_bytes = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        if head_bytes > HEAD_BYTES or (hosts != 1 and (hosts or self.parser.get_http_version() == HOST_SINCE)):
            raise _HeadRefused
        self._in_head = False
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """As uvicorn's, but for that a block that comes alone is handed on as it is, and that more of them may wait."""
        cycle = self.cycle
        if cycle.response_complete:
            return
        if not cycle.body:
            cycle.body = cast("bytearray", body)  # `receive` makes bytes of it, which is the same object then
        elif isinstance(cycle.body, bytearray):
            cycle.body += body
        else:
            cycle.body = bytearray(cycle.body) + body
        if len(cycle.body) > BODY_WAITS_BYTES:
            self.flow.pause_reading()
        cycle.message_event.set()

    def _watch_head(self) -> None:
        if not self._in_head:
            self._forget()
        elif self._late is None:
            self._late = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def _forget(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None
