"""An event loop in which the steps of requests let what comes in get its turn, so that a probe waits for few of them.

asyncio runs whatever is ready before it looks at its sockets again, and a hundred requests at once are ready for a
while. Here the steps of requests run for a millisecond between two looks; the rest, accepting and reading above all, is
not held back. Invariant: the steps of requests run in the order in which they became ready, one at least per look.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from contextvars import Context, ContextVar
from typing import Any

LOOK_SECONDS = 0.001
of_a_request = ContextVar("of_a_request", default=False)
"""True in the context of whatever a request does, and of all that it begins."""


class PoliteLoop(asyncio.SelectorEventLoop):
    """See the module."""

    def __init__(self) -> None:
        super().__init__()
        self._steps: deque[asyncio.Handle] = deque()

    def call_soon(  # type: ignore[override]
        self, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.Handle:
        """As asyncio's. Tasks and futures come through here with each step."""
        if not (of_a_request.get() if context is None else context.get(of_a_request, False)):
            return super().call_soon(callback, *args, context=context)
        if not self._steps:
            super().call_soon(self._go_on, context=Context())
        step = asyncio.Handle(callback, args, self, context)
        self._steps.append(step)
        return step

    def _go_on(self) -> None:
        until = self.time() + LOOK_SECONDS
        for _ in range(len(self._steps)):  # what these make ready waits for the next look, as in asyncio
            step = self._steps.popleft()
            if not step.cancelled():
                step._run()  # noqa: SLF001 - as asyncio's own loops do it
            if self.time() >= until:
                break
        if self._steps:
            super().call_soon(self._go_on, context=Context())
