"""The HTTP side of the composition root: what the routes are built on, which calls are open, how all starts and ends.

Invariant: FastAPI and what only routes need are imported when the API is built, after the probes already answer.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, cast

from app.config.settings import Settings
from app.dwh.warehouse import Warehouse
from app.ops.access import Keyring
from app.ops.alerts import Alerts
from app.ops.front import Front, Hooks
from app.ops.guard import Guard
from app.ops.limits import BodyLimits
from app.ops.probes import Probes
from app.ops.readiness import Readiness
from app.ops.scheduler import Scheduler
from app.ops.service import Pipelines
from app.ops.stopping import steps_of
from app.stores.state import State

if TYPE_CHECKING:
    from fastapi import APIRouter

    from app.analytics.service import Analytics
    from app.objects.requests import Reach
    from app.ops.answers import Asgi
    from app.ops.proof_routes import Proof
    from app.ops.shapes import PartitionView
    from app.stores.objects import ObjectStore
    from app.stores.s3 import S3Store

UPLOAD_PREFIXES = ("/s3/",)
STREAM_PREFIXES = ("/dwh/",)
OPEN_CALLS = frozenset(
    {
        ("GET", "/"),
        ("GET", "/health"),
        ("GET", "/ready"),
        ("GET", "/assets/elements.js"),
        ("GET", "/assets/dashboard.js"),
        ("GET", "/assets/gaps.js"),
        ("GET", "/assets/dashboard.css"),
        ("GET", "/assets/icon.svg"),
        ("POST", "/ops/session"),
        ("DELETE", "/ops/session"),
        ("GET", "/s3/shared"),
        ("HEAD", "/s3/shared"),
        ("GET", "/analytics/explore"),
        ("GET", "/assets/explore.js"),
        ("GET", "/assets/explore.css"),
    }
)
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Inside:
    """What the HTTP side is built on."""

    settings: Settings
    state: State
    warehouse: Warehouse
    store: "ObjectStore"
    analytics: "Analytics"
    pipelines: Pipelines
    scheduler: Scheduler
    alerts: Alerts
    readiness: Readiness
    clock: Callable[[], datetime]


def front(service: Inside) -> Front:
    """The ASGI application; it starts and ends the work of `service`."""
    readiness = service.readiness
    access, limits = service.settings.access, service.settings.limits
    steps = steps_of(service.settings.service.shutdown_grace_seconds)
    probes = Probes(service.settings.service.version, service.scheduler, readiness, service.clock)
    guard = Guard(Keyring(access.api_keys, service.clock), service.clock, access.allow_anonymous, OPEN_CALLS)

    def opened() -> None:
        readiness.start()
        service.analytics.start()
        service.alerts.start()
        service.scheduler.start()

    def closed() -> None:
        readiness.close()
        service.analytics.close(steps.refresh)
        service.alerts.close()
        stuck = service.scheduler.close(steps.stuck)
        if stuck:
            log.warning("left behind in mid-run, the next start goes on from their checkpoints: %s", ", ".join(stuck))
        service.state.close()
        service.warehouse.close()

    return Front(
        {"/health": probes.health, "/ready": probes.ready},
        guard,
        BodyLimits(limits.max_body_bytes, limits.max_upload_bytes, UPLOAD_PREFIXES, STREAM_PREFIXES),
        Hooks(opened, lambda: api(service, probes, guard), closed),
    )


def api(service: Inside, probes: Probes, guard: Guard) -> "Asgi":
    """The FastAPI application. Imports it, which takes longer than everything else at the start."""
    from app.analytics import routes as report_routes
    from app.analytics.asked import Serving
    from app.ops import dashboard, proof_routes, routes
    from app.ops.api import About, build_api

    ops = routes.Operations(
        probes=probes,
        guard=guard,
        scheduler=service.scheduler,
        runs=service.state.runs,
        totals=service.state.runs.totals,
        ledger_totals=service.state.runs.ledger_totals,
        last_ended=service.state.runs.last_ended,
        stale=lambda: service.alerts.stale,
        partitions=partitions(service),
        histories=service.pipelines.histories,
        calls=service.pipelines.calls,
        clock=service.clock,
        state_clock=service.state.clocks.now,
        ahead_seconds=lambda: service.alerts.ahead_seconds,
        troubles=lambda: {**{name: {} for name in service.pipelines.listed}, **service.state.checkpoints.troubles()},
    )
    about = service.settings.service
    serving = Serving(service.analytics)
    routers = [
        dashboard.build(guard, lambda: routes.overview(ops)),
        routes.build(ops),
        proof_routes.build(proof(service)),
        warehouse_routes(service),
        object_routes(service),
        report_routes.build(serving),
        *(make() for make in service.pipelines.routers),
    ]
    return report_routes.Quick(build_api(About(about.title, about.version, about.description), routers, guard), serving)


def proof(service: Inside) -> "Proof":
    """Verification, healing and the gap map."""
    from app.ops.atlas import Atlas
    from app.ops.proof import Proofs
    from app.ops.proof_routes import Proof

    pipelines, scheduler = service.pipelines, service.scheduler
    atlas = Atlas(pipelines.charts)
    # Who has just verified a job should not see a map that was drawn before.
    proofs = Proofs(pipelines.verifications, scheduler.stop, service.clock, looked=atlas.forget)
    return Proof(scheduler, proofs, atlas, pipelines.verifications, service.clock)


def warehouse_routes(service: Inside) -> "APIRouter":
    """/dwh."""
    from app.dwh import routes
    from app.dwh.request_parsing import BatchLimits

    limits, dwh = service.settings.limits, service.settings.dwh
    batch = BatchLimits(dwh.max_rows_per_insert, dwh.max_write_batch_bytes)
    sizes = routes.Limits(limits.max_body_bytes, limits.max_upload_bytes, batch)
    return routes.build(routes.Serving(service.warehouse, sizes, service.clock))


def object_routes(service: Inside) -> "APIRouter":
    """/s3."""
    from app.objects import routes
    from app.objects.links import SignedLinks, StoreLinks
    from app.stores.local_directory import LocalDirectory

    store, settings = service.store, service.settings
    if isinstance(store, LocalDirectory):
        from app.stores.local_transfers import LocalTransfers

        local = LocalTransfers(store)
        return routes.build(
            routes.Serving(store, local, reach(settings), SignedLinks(settings.service.data_dir), service.clock)
        )
    from app.stores.s3_transfers import S3Transfers

    remote = S3Transfers(cast("S3Store", store))
    return routes.build(routes.Serving(store, remote, reach(settings), StoreLinks(remote.link), service.clock))


def reach(settings: Settings) -> "Reach":
    """Which keys /s3 may read and write."""
    from app.objects.requests import Reach

    s3 = settings.s3
    exports = f"{s3.prefix}/" if s3.prefix else ""
    return Reach(s3.allowed_prefixes, None if s3.routes_write_exports else exports, exports=exports)


def partitions(service: Inside) -> Callable[[], Sequence["PartitionView"]]:
    """How far every partition of every job is, as the checkpoints say."""
    from app.ops.shapes import PartitionView

    def views() -> Sequence[PartitionView]:
        return [
            PartitionView(job.name, at.partition, at.cursor_at, at.high_watermark_at, at.error)
            for job in service.pipelines.jobs
            if job.name in service.pipelines.backfills
            for at in service.state.checkpoints.of(job.name)
        ]

    return views
