"""Serving: uvicorn with our limits, and a stop that lets running work come to its next safe point.

Invariants: from the stop signal on /ready answers 503 and no run starts, while requests are still answered until
running jobs have ended or their share of the grace has passed; a second signal ends the waiting; the process then
ends with the signal's own status.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType

import uvicorn

from app.ops.answers import Asgi
from app.ops.protocol import PunctualProtocol
from app.ops.stopping import Steps

LINGER_SECONDS = 0.5
CONNECTIONS = 500


@dataclass(frozen=True, slots=True)
class Serving:
    """Where to listen, and how a stop goes: `ask_stop` must only set flags, `busy` says whether work still runs."""

    host: str
    port: int
    forwarded_allow_ips: tuple[str, ...]
    steps: Steps
    ask_stop: Callable[[str], None]
    busy: Callable[[], bool]


class DrainingServer(uvicorn.Server):
    """uvicorn's server, which goes on answering while jobs come to their end."""

    def __init__(self, config: uvicorn.Config, serving: Serving) -> None:
        super().__init__(config)
        self._serving = serving
        self._signal = 0
        self._asked_at = 0.0
        self._asked = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal begins the stop; the next one ends the waiting."""
        super().handle_exit(sig, frame)
        if not self._signal:
            self._signal = sig
            self._asked_at = time.monotonic()
            self.should_exit = False

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: True when it is time to end."""
        if self._signal:
            if not self._asked:
                self._asked = True
                self._serving.ask_stop("the process was asked to stop")
            self.should_exit = self.should_exit or self._drained()
        return await super().on_tick(counter)

    def _drained(self) -> bool:
        waited = time.monotonic() - self._asked_at
        return waited >= self._serving.steps.jobs or (waited >= LINGER_SECONDS and not self._serving.busy())


def serve(app: Asgi, serving: Serving) -> None:
    """Serve until a signal. Ends by raising that signal again, so nothing after this call can be relied on."""
    config = uvicorn.Config(
        app,
        host=listening_host(serving.host),
        port=serving.port,
        http=PunctualProtocol,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        forwarded_allow_ips=list(serving.forwarded_allow_ips),
        limit_concurrency=CONNECTIONS,
        timeout_graceful_shutdown=serving.steps.requests,  # type: ignore[arg-type]  # asyncio's, which takes fractions
    )
    DrainingServer(config, serving).run()


def listening_host(host: str) -> str:
    """The address for asyncio: without brackets, and `::` as the empty one, since asyncio binds `::` to IPv6 alone."""
    bare = host.strip("[]")
    return "" if bare == "::" else bare
