"""The server: uvicorn with our limits, and a shutdown that lets running jobs reach their next safe point.

Invariants: from the stop signal on, /ready answers 503 and no run starts; requests are still answered until running
jobs have ended or their share of the grace period is over. A second signal ends the waiting. The process then ends with
the signal's own status.
"""

import asyncio
import errno
import logging
import resource
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import FrameType
from typing import Any, cast

import uvicorn

from app.ops.connection_checks import PATHS
from app.ops.service import ShutdownBudget
from app.web.errors import Asgi, Receive, Refusal, Scope, Send, send_refusal
from app.web.protocol import ConnectionLimits, PunctualProtocol

LINGER_SECONDS = 0.5
CONNECTIONS = 2000
# asyncio accepts up to this many in one loop iteration: few, so that room is made before descriptors run out.
ACCEPTED_AT_ONCE = 16
BACKLOG = 2048
TICKS_A_SECOND = 10
OUT_OF = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
CANNOT_LISTEN = 3  # uvicorn's own exit status
log = logging.getLogger(__name__)


class DrainingServer(uvicorn.Server):
    """uvicorn's server, which keeps answering requests while jobs finish. See `serve`."""

    def __init__(
        self,
        config: uvicorn.Config,
        room: ConnectionLimits,
        *,
        health_port: int | None,
        jobs_seconds: float,
        ask_stop: Callable[[str], None],
        busy: Callable[[], bool],
    ) -> None:
        super().__init__(config)
        self._room = room
        self._health_port = health_port
        self._jobs_seconds = jobs_seconds
        self._ask_stop = ask_stop
        self._busy = busy
        self._signal = 0
        self._asked_at = 0.0
        self._asked = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal starts the shutdown; the next one ends the waiting."""
        super().handle_exit(sig, frame)
        if not self._signal:
            self._signal = sig
            self._asked_at = time.monotonic()
            self.should_exit = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's, plus the port of the probes and the longest listen queue that the kernel allows."""
        asyncio.get_running_loop().set_exception_handler(self._told)
        await super().startup(sockets)
        if self._health_port is not None:
            await self._listen_for_probes(self._health_port)
        for each in (each for server in self.servers for each in server.sockets):
            with each.dup() as same:
                same.listen(BACKLOG)

    async def _listen_for_probes(self, port: int) -> None:
        app: Any = self.config.app

        async def probes(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["path"] in PATHS:
                await app(scope, receive, send)
            else:
                await send_refusal(send, Refusal(404, "this port answers probes only", f"ask {' or '.join(PATHS)}"))

        config = uvicorn_config(probes, http=self.config.http)
        config.load()

        def protocol() -> asyncio.Protocol:
            return config.http_protocol_class(config=config, server_state=self.server_state, app_state={})  # type: ignore[call-arg]

        loop = asyncio.get_running_loop()
        try:
            server = await loop.create_server(protocol, self.config.host, port, backlog=ACCEPTED_AT_ONCE)
        except OSError as error:
            log.error("HEALTH_PORT=%d cannot be listened on: %s", port, error.strerror)  # noqa: TRY400 - enough
            await self.lifespan.shutdown()
            sys.exit(CANNOT_LISTEN)
        self.servers.append(server)

    def _told(self, loop: asyncio.AbstractEventLoop, context: Mapping[str, Any]) -> None:
        """asyncio reports each connection that it cannot accept with a traceback: thousands a second. Log one line
        instead.
        """
        error = context.get("exception")
        if isinstance(error, OSError) and error.errno in OUT_OF:
            log.warning("no connection can be accepted: %s", error.strerror)
            self._room.make(cast("set[PunctualProtocol]", self.server_state.connections))
        else:
            loop.default_exception_handler(dict(context))

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second; True when it is time to end. Each call checks a tenth of all connections."""
        now = asyncio.get_running_loop().time()
        for connection in cast("list[PunctualProtocol]", list(self.server_state.connections)):
            if (connection.descriptor - counter) % TICKS_A_SECOND == 0:
                connection.watch_sending(now)
        if self._signal:
            if not self._asked:
                self._asked = True
                self._ask_stop("the process was asked to stop")
            waited_seconds = time.monotonic() - self._asked_at
            drained = waited_seconds >= LINGER_SECONDS and not self._busy()
            self.should_exit = self.should_exit or drained or waited_seconds >= self._jobs_seconds
        return await super().on_tick(counter)


def uvicorn_config(app: Asgi, **options: Any) -> uvicorn.Config:
    """uvicorn without its own logs and without WebSockets."""
    return uvicorn.Config(app, ws="none", log_config=None, access_log=False, server_header=False, **options)


def serve(
    app: Asgi,
    *,
    host: str,
    port: int,
    health_port: int | None,
    forwarded_allow_ips: Sequence[str],
    steps: ShutdownBudget,
    ask_stop: Callable[[str], None],
    busy: Callable[[], bool],
) -> None:
    """Serve until a signal. Ends by raising that signal again, so code after this call may never run.

    On `health_port` (None = none) only probes are answered. `ask_stop` must only set flags; `busy` says whether jobs
    are still running.
    """
    room = ConnectionLimits(CONNECTIONS, raised_descriptors())
    config = uvicorn_config(
        app,
        host="" if host.strip("[]") == "::" else host.strip("[]"),  # asyncio binds `::` to IPv6 only
        port=port,
        http=partial(PunctualProtocol, room),
        loop="app.web.protocol:FairEventLoop",
        lifespan="on",
        forwarded_allow_ips=list(forwarded_allow_ips),
        backlog=ACCEPTED_AT_ONCE,
        timeout_graceful_shutdown=steps.requests,  # passed to asyncio, which accepts fractions
    )
    DrainingServer(config, room, health_port=health_port, jobs_seconds=steps.jobs, ask_stop=ask_stop, busy=busy).run()


def raised_descriptors() -> int:
    """Raise the soft limit of open files and connections to cover all connections, as far as the system allows; the
    limit.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * CONNECTIONS
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return wanted if soft == resource.RLIM_INFINITY else soft
    raised = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))
    return raised
