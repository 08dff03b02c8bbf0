"""An object on its way out: read in threads, one piece ahead of what is being sent where there is memory for that.

Invariant: every byte comes from the one version that was looked at; what cannot be read any more breaks the answer off
before its promised length, which every client notices.
"""

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import Executor
from contextlib import ExitStack

from app.core.errors import Transient
from app.objects.conditions import Span
from app.stores.objects import ObjectInfo
from app.stores.transfers import Readable, Transfers

PIECE_BYTES, LEAN_BYTES = 1 << 19, 1 << 16


class Outgoing:
    """A span that is open; `close` it. A `lean` one holds one small piece at a time."""

    def __init__(self, threads: Executor, opened: ExitStack, stream: Readable, count: int, *, lean: bool) -> None:
        self._threads, self._opened, self._stream = threads, opened, stream
        self._left = count
        self._lean = lean
        self._ahead: asyncio.Future[bytes] | None = None

    async def pieces(self) -> AsyncIterator[bytes]:
        """All of it. Raises what reading raises."""
        self._read_ahead()
        while self._ahead is not None:
            data = await asyncio.shield(self._ahead)
            if not data:
                raise Transient("the object ended before its end", "ask for it again")
            self._left -= len(data)
            if self._lean:
                self._ahead = None
                yield data
                self._read_ahead()
            else:
                self._read_ahead()
                yield data

    def close(self) -> None:
        """Let go of the stream as soon as no thread reads it. Waits for nobody."""
        if self._ahead is None or self._ahead.done():
            self._threads.submit(self._opened.close)
        else:
            self._ahead.add_done_callback(self._closed_after)

    def _closed_after(self, reading: "asyncio.Future[bytes]") -> None:
        if not reading.cancelled():
            reading.exception()  # looked at: nobody waits for it any more
        self._threads.submit(self._opened.close)

    def _read_ahead(self) -> None:
        self._ahead = None
        if self._left:
            count = min(LEAN_BYTES if self._lean else PIECE_BYTES, self._left)
            self._ahead = asyncio.get_running_loop().run_in_executor(self._threads, self._stream.read, count)


async def opened(threads: Executor, transfers: Transfers, held: ObjectInfo, span: Span, *, lean: bool) -> Outgoing:
    """Open a span in a thread. Raises Conflict when the version is gone."""

    def work() -> tuple[ExitStack, Readable]:
        with ExitStack() as stack:
            stream = stack.enter_context(transfers.open_span(held, span.first, span.count))
            return stack.pop_all(), stream

    stack, stream = await asyncio.get_running_loop().run_in_executor(threads, work)
    return Outgoing(threads, stack, stream, span.count, lean=lean)
