"""The service as a value: `main` builds it, commands use it, and the daemon serves it until a signal."""

import errno
import logging
import socket
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from app.config.environment import read_dotenv
from app.config.rules import warnings
from app.config.settings import ServiceSettings, Settings
from app.core.ledger import KeptFile
from app.core.partitions import Step
from app.core.runs import Context, Job, Report, Run, RunServices, Stop
from app.core.verify import GapMapSource, Verification
from app.core.windows import Window
from app.db.checkpoints import Checkpoint
from app.db.state import State
from app.ops.alerts import Alerts
from app.ops.connection_checks import ConnectionCheck, Probes
from app.ops.delivery_map import DeliveryMaps
from app.ops.json_views import ServiceCalls
from app.ops.process import share_the_machine
from app.ops.request_costs import RequestCosts
from app.ops.scheduler import Backfill, Scheduler
from app.ops.verification import Verifications
from app.web.app import HeadwaterApp

if TYPE_CHECKING:
    from fastapi import APIRouter

# How the shutdown time is divided among its steps, which run one after another.
#
# Invariant: the sum stays below the grace period with room for the time between steps, so the process exits before the
# platform kills it, even if every step uses all of its time.

ROOM_SECONDS = 1.0
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ShutdownBudget:
    """The time limit of each step, in seconds and in this order.

    `jobs` reach their next safe point, `requests` finish, then the reports' `refresh`; `stuck` is how long to wait for
    job threads that did not react.
    """

    jobs: float
    requests: float
    refresh: float
    stuck: float


def shutdown_budget(grace_seconds: float) -> ShutdownBudget:
    """The steps of a shutdown within `grace_seconds`."""
    shared = grace_seconds - min(ROOM_SECONDS, grace_seconds / 2)
    return ShutdownBudget(jobs=shared / 2, requests=shared / 8, refresh=shared / 8, stuck=shared / 8)


# The service as a value: nothing in it has been started.

History = Callable[[int], Sequence[Mapping[str, Any]]]
"""What a job loaded lately, newest first, at most this many: table rows with the same columns."""

Replacement = Callable[[Context, Window, bool], Report]
"""Write a span again from the source; the last argument allows removing rows that the source no longer has."""

Undo = Callable[[Context, str], Report]
"""Undo a run, given its id or a prefix of it; a dry run says in `notes` what it would undo."""


class WindowedPipeline(Protocol):
    """A pipeline whose past windows can be filled again, and whose source and destination can be
    compared and mapped.
    """

    @property
    def backfill(self) -> Backfill:
        """See `Pipelines.backfills`."""

    @property
    def verification(self) -> Verification:
        """See `Pipelines.verifications`."""

    @property
    def chart(self) -> GapMapSource:
        """The gap map."""

    @property
    def checks(self) -> Sequence[ConnectionCheck]:
        """The checks of the systems that it needs."""


@dataclass(frozen=True, slots=True)
class Pipelines:
    """What the slices provide: jobs, functions to fill or re-encode past windows, and the systems that `check` tries.

    `destinations`: where a job's rows end up, in readable form.

    `histories`, `undos`, `verifications`, `charts`, `calls` and `kept` are by job name, for those jobs that have one.
    `kept` finds what a run set aside. `steps`: how a worker processes a shard of a job's plan. `listed`: jobs whose
    listings show which objects are gone. `routers` builds the routes of slices that have both jobs and routes, when the
    API is built.
    """

    jobs: Sequence[Job] = ()
    backfills: Mapping[str, Backfill] = field(default_factory=dict)
    steps: Mapping[str, Step] = field(default_factory=dict)
    replacements: Mapping[str, Replacement] = field(default_factory=dict)
    rewrites: Mapping[str, Backfill] = field(default_factory=dict)
    systems: Sequence[ConnectionCheck] = ()
    destinations: Mapping[str, str] = field(default_factory=dict)
    histories: Mapping[str, History] = field(default_factory=dict)
    undos: Mapping[str, Undo] = field(default_factory=dict)
    verifications: Mapping[str, Verification] = field(default_factory=dict)
    charts: Mapping[str, GapMapSource] = field(default_factory=dict)
    calls: Mapping[str, Callable[[], ServiceCalls]] = field(default_factory=dict)
    kept: Mapping[str, Callable[[Run], Sequence[KeptFile]]] = field(default_factory=dict)
    listed: Sequence[str] = ()
    routers: Callable[[], Sequence["APIRouter"]] = tuple


@dataclass(slots=True)
class BuiltService:
    """The service, built but not started. `app` is the ASGI application; its lifespan starts and ends the work.

    `systems` are what `python -m app check` tries; readiness checks only the stores, and less thoroughly. `clock` is
    this machine's.
    """

    settings: Settings
    state: State
    pipelines: Pipelines
    systems: Sequence[ConnectionCheck]
    services: RunServices
    stop: Stop
    scheduler: Scheduler
    alerts: Alerts
    probes: Probes
    costs: RequestCosts
    maps: DeliveryMaps
    proofs: Verifications
    clock: Callable[[], datetime]
    app: HeadwaterApp = field(init=False)

    def partitions(self) -> Iterator[tuple[str, Checkpoint]]:
        """Each job that has partitions, with the checkpoint of each of them."""
        for name in (job.name for job in self.pipelines.jobs if job.name in self.pipelines.backfills):
            yield from ((name, at) for at in self.state.checkpoints.of(name))


# The daemon: a built service, served until a signal and then shut down in order.

CANNOT_LISTEN = 3


def dashboard_url(settings: Settings) -> str:
    """The dashboard's URL for a browser on this machine; 0.0.0.0 and :: are not addresses to connect to."""
    host, port = settings.service.host, settings.service.port
    if host in ("0.0.0.0", "::"):  # noqa: S104 - compared with, not bound
        return f"http://localhost:{port} (listening on all addresses)"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def refuse_taken_ports(settings: ServiceSettings) -> None:
    """Before any job runs: report each port that cannot be bound, one line each, and end the process.

    The exit code is uvicorn's own and not 78: the port may belong to a daemon that is about to end.
    """
    faults, bare = [], settings.host.strip("[]")
    host = None if bare == "::" else bare
    for name, port in (("PORT", settings.port), ("HEALTH_PORT", settings.health_port)):
        try:
            tried_at = (
                [] if port is None else socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            )
            for family, kind, *_, address in tried_at:
                with socket.socket(family, kind) as tried:
                    tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    if family == socket.AF_INET6:
                        tried.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                    tried.bind(address)
                    tried.listen(1)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                free = "another port" + (", or serve --port" if name == "PORT" else "")
                faults.append(f"{name}='{port}': another program listens there; set {name} to {free}")
            elif error.errno == errno.EACCES:
                faults.append(f"{name}='{port}': not permitted; set {name} to a port above 1023")
            else:
                faults.append(f"HOST='{settings.host}': {error.strerror}; set HOST to an address of this machine")
    for fault in dict.fromkeys(faults):
        log.error("%s", fault)
    if faults:
        sys.exit(CANNOT_LISTEN)


def run_daemon(service: BuiltService, environ: Mapping[str, str], dotenv: Path | None = None) -> None:
    """Serve `service`, configured from `environ` and `dotenv`. Ends by raising the stop signal again."""
    from app.web.server import serve

    settings = service.settings
    refuse_taken_ports(settings.service)
    announce(service, environ, dotenv)
    log.info("%s %s on %s", settings.service.title, settings.service.version, dashboard_url(settings))
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    share_the_machine()
    serve(
        service.app,
        host=settings.service.host,
        port=settings.service.port,
        health_port=settings.service.health_port,
        forwarded_allow_ips=settings.access.forwarded_allow_ips,
        steps=shutdown_budget(settings.service.shutdown_grace_seconds),
        ask_stop=service.scheduler.ask_stop,
        busy=lambda: service.scheduler.busy,
    )


def announce(
    service: BuiltService, environ: Mapping[str, str], dotenv: Path | None, *, own_server: bool = True
) -> None:
    """Log configuration warnings and which jobs are off."""
    for warning in warnings(service.settings, environ, read_dotenv(dotenv)[0], own_server=own_server):
        log.warning("%s", warning)
    for job in service.pipelines.jobs:
        if job.off:
            log.info("job %s is off: %s", job.name, job.off)
