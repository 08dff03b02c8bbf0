"""Answers a request with a file of a service, which may take minutes to make, and gives up once the caller goes away.

Invariants: a caller holds one of a few places until its response has ended, however it ends. What it has open is closed
then, in a known thread: left to the garbage collector, a generator is closed by whichever thread happens to collect it,
perhaps one that holds what the closing waits for.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack

from starlette.requests import Request
from starlette.responses import Response

from app.core.runs import Stop
from app.web.api import StreamedResponse
from app.web.errors import Receive, Refusal, Refused

LEFT = "the client disconnected"

Make = Callable[[Stop, ExitStack], Awaitable[Response]]
"""Makes a response. What it enters into the stack is closed with the response, or when there is none."""


class ServiceFile(StreamedResponse):
    """A file, sent while later pieces are still made. `stop` is asked when the caller goes away."""

    def __init__(self, pieces: Iterator[bytes], held: ExitStack, stop: Stop, *, name: str, media_type: str) -> None:
        headers = {"Content-Disposition": f'attachment; filename="{name}"'}
        super().__init__(pieces, held, headers=headers, media_type=media_type)
        self._stop = stop

    async def listen_for_disconnect(self, receive: Receive) -> None:
        """As Starlette's, which then cancels the response, but waits for the thread that makes the next piece."""
        await super().listen_for_disconnect(receive)
        self._stop.ask(LEFT)


class CallerPlaces:
    """Places for `number` callers at once. Any more are refused with `busy`."""

    def __init__(self, number: int, busy: Refusal) -> None:
        self._free, self._busy = asyncio.Semaphore(number), busy

    async def answer(self, request: Request, make: Make) -> Response:
        """The response of `make`. Raises Refused when no place is free."""
        if self._free.locked():
            raise Refused(*self._busy)
        await self._free.acquire()
        stop = Stop()
        with ExitStack() as held:
            held.callback(self._free.release)
            making = asyncio.ensure_future(make(stop, held))
            watching = asyncio.ensure_future(_watch(request, stop, making))
            try:
                return await making
            except asyncio.CancelledError:
                if not stop.asked:
                    raise
                raise Refused(400, LEFT, "send the request again") from None  # nobody reads it
            finally:
                watching.cancel()


async def _watch(request: Request, stop: Stop, making: "asyncio.Future[Response]") -> None:
    """Nothing else reports a caller who leaves before the response begins."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    stop.ask(LEFT)  # first: cancelling waits for the thread that is at work
    making.cancel()
