"""One run for all who ask the same at once, and its answer kept while it holds.

Invariants: an answer is kept for one state of the objects only, and when it may depend on the clock for a short time
only; what is over is given back with the next question at the latest; large answers, which lie on disk, are not kept;
few reports run at once, the others wait for their turn within limits. For the event loop's thread alone.
"""

import asyncio
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass

from app.analytics.formats import Answer
from app.core.errors import Transient

PLACES = 2
KEPT_ANSWERS = 64
KEPT_BYTES = 16 << 20
WAIT_SECONDS = 30.0
WAITING = 200


@dataclass(frozen=True, slots=True)
class Held:
    """An answer and until when it may be given, by the monotonic clock."""

    answer: Answer
    until: float


class Flights:
    """See the module."""

    def __init__(self) -> None:
        self._kept: OrderedDict[Hashable, Held] = OrderedDict()
        self._soonest = math.inf  # no answer that is kept is over before
        self._running: dict[Hashable, asyncio.Task[Answer]] = {}
        self._places = asyncio.Semaphore(PLACES)

    def held(self, key: Hashable) -> Answer | None:
        """The answer that is kept under `key` and still holds."""
        self._drop_what_is_over()
        held = self._kept.get(key)
        if held is None:
            return None
        self._kept.move_to_end(key)
        return held.answer

    async def answer(self, key: Hashable, make: Callable[[], Answer], keep_seconds: float) -> Answer:
        """The answer of `make`, run in a thread, once for all who wait for `key`. Raises what it raises, and Transient
        when too many reports are waiting.
        """
        running = self._running.get(key)
        if running is None:
            if len(self._running) >= WAITING:
                raise busy()
            running = asyncio.create_task(self._run(make))
            self._running[key] = running
            running.add_done_callback(lambda task: self._landed(key, task, keep_seconds))
        return await asyncio.shield(running)

    async def _run(self, make: Callable[[], Answer]) -> Answer:
        try:
            async with asyncio.timeout(WAIT_SECONDS):
                await self._places.acquire()
        except TimeoutError:
            raise busy() from None
        try:
            return await asyncio.to_thread(make)
        finally:
            self._places.release()

    def _landed(self, key: Hashable, task: "asyncio.Task[Answer]", keep_seconds: float) -> None:
        self._running.pop(key, None)
        self._drop_what_is_over()
        if task.cancelled() or task.exception() is not None or task.result().size_bytes > KEPT_BYTES:
            return
        until = time.monotonic() + keep_seconds
        self._kept[key] = Held(task.result(), until)
        self._kept.move_to_end(key)
        self._soonest = min(self._soonest, until)
        while len(self._kept) > KEPT_ANSWERS:
            self._kept.popitem(last=False)

    def _drop_what_is_over(self) -> None:
        now = time.monotonic()
        if now >= self._soonest:
            for key in [key for key, held in self._kept.items() if held.until <= now]:
                del self._kept[key]
            self._soonest = min((held.until for held in self._kept.values()), default=math.inf)


def busy() -> Transient:
    """Too many at once."""
    return Transient("too many reports are waiting", "send the same request again later", retry_after_seconds=5)
