"""The composition root: builds the whole service from the settings. All wiring is here."""

import logging
import os
import socket
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, cast
from uuid import uuid4

from pydantic import SecretStr

from app.config import DOTENV
from app.config.environment import use_network
from app.config.rules import locked
from app.config.settings import Settings
from app.core.errors import BadSettings
from app.core.partitions import Step, SyncPlan, run_in_process
from app.core.runs import Context, Job, LeaseTerms, Report, Run, RunServices, Stop
from app.db.state import State, open_state
from app.dwh.warehouse import Warehouse, open_warehouse
from app.object_store.request_counts import READ_UNIT, RequestCounter
from app.ops.alerts import Alerts
from app.ops.connection_checks import (
    ConnectionCheck,
    ProbeAnswer,
    Probes,
    Readiness,
    destinations,
    state_check,
    store_check,
    store_checks,
    webhook,
)
from app.ops.delivery_map import DeliveryMaps
from app.ops.json_views import ServiceCalls
from app.ops.logs import log_run
from app.ops.process import BAD_SETTINGS, configured, share_the_machine, tune, unsupported
from app.ops.request_costs import RequestCosts, prices_for
from app.ops.scheduler import Scheduler
from app.ops.service import BuiltService, Pipelines, WindowedPipeline, announce, shutdown_budget
from app.ops.verification import Verifications
from app.web.app import GuardedApi, HeadwaterApp
from app.web.auth import AccessGuard, KeyRates, Keyring
from app.web.request_bodies import BodyLimits

if TYPE_CHECKING:
    from fastapi import APIRouter

    from app.amplitude.client import Project
    from app.analytics.service import Analytics
    from app.appmetrica.client import Exports
    from app.object_store.port import ObjectStore
    from app.object_store.s3 import S3Store
    from app.object_store.s3_client import S3Target
    from app.object_store.set_aside import SetAsideStore
    from app.objects.requests import KeyPolicy
    from app.scale.queue import Workers

# The HTTP side of the composition root: what the routes depend on, startup and shutdown.
#
# Invariant: FastAPI and whatever only routes need are imported when the API is built, after the probes already answer.

UPLOAD_PREFIXES = ("/s3/",)
STREAM_PREFIXES = ("/dwh/",)
log = logging.getLogger(__name__)


def create_asgi_app(
    service: BuiltService, parts: "ServiceParts", analytics: "Analytics", *, own_server: bool
) -> HeadwaterApp:
    """The ASGI application; its lifespan starts and ends the work of `service`."""
    settings, probes = service.settings, service.probes
    access, limits = settings.access, settings.limits
    steps = shutdown_budget(settings.service.shutdown_grace_seconds)
    guard = AccessGuard(
        Keyring(access.api_keys, now),
        now,
        service.state.sessions,
        KeyRates(limits.key_requests_per_second),
        anonymous=access.allow_anonymous,
        locked=locked(settings, own_server=own_server),
        origins=frozenset(access.cors_origins),
    )

    def opened() -> None:
        probes.readiness.start()
        analytics.start()
        service.alerts.start()
        service.scheduler.start()

    def closed() -> None:
        probes.readiness.close()
        analytics.close(steps.refresh)
        service.alerts.close()
        # Our own server has already waited for the jobs at this point.
        stuck = service.scheduler.close(steps.stuck if own_server else steps.jobs + steps.stuck)
        if stuck:
            log.warning("left behind in mid-run, the next start goes on from their checkpoints: %s", ", ".join(stuck))
        service.state.close()
        parts.warehouse.close()

    def bare_ready() -> ProbeAnswer:
        """The readiness answer without names of systems and their errors."""
        answer = probes.ready()
        return ProbeAnswer(answer.status, {"ready": answer.body["ready"], "checks": {}})

    return HeadwaterApp(
        {"/health": probes.health, "/ready": bare_ready if guard.locked else probes.ready},
        guard,
        BodyLimits(limits.max_body_bytes, limits.max_upload_bytes, UPLOAD_PREFIXES, STREAM_PREFIXES),
        opened=opened,
        api=lambda: create_api(service, parts, analytics, guard),
        close=closed,
    )


def create_api(service: BuiltService, parts: "ServiceParts", analytics: "Analytics", guard: AccessGuard) -> GuardedApi:
    """The FastAPI application. Its import is the slowest part of startup."""
    from app.analytics import routes as report_routes
    from app.dwh import routes as warehouse_routes
    from app.ops import page_data, pages, routes
    from app.web.api import build_api, route_scopes

    settings = service.settings
    about = settings.service
    routers = [
        # FastAPI tries routes one after the other, so those with the most requests come first.
        object_routes(parts),
        warehouse_routes.build(parts.warehouse, settings.dwh, settings.limits, now),
        report_routes.build(analytics),
        pages.build(guard, lambda: routes.overview(service)),
        page_data.build(service),
        routes.build(service, guard),
        *service.pipelines.routers(),
    ]
    built = build_api(about.title, about.version, about.description, routers)
    quick = report_routes.FastPath(built, analytics)
    return GuardedApi(built, dict.fromkeys(quick.paths, quick), route_scopes(built))


def object_routes(parts: "ServiceParts") -> "APIRouter":
    """/s3."""
    from app.object_store.local import LocalDirectory
    from app.objects import routes
    from app.objects.requests import SignedLinks

    store, settings = parts.store, parts.settings
    largest = settings.limits.max_upload_bytes
    if isinstance(store, LocalDirectory):
        links = SignedLinks(settings.service.data_dir, now)
        return routes.build(routes.ObjectRoutes(store, store, key_policy(settings), links, now, largest))
    from app.object_store.s3_multipart import S3Transfers

    remote = S3Transfers(cast("S3Store", store))
    return routes.build(routes.ObjectRoutes(store, remote, key_policy(settings), remote, now, largest))


def key_policy(settings: Settings) -> "KeyPolicy":
    """Which keys /s3 may read and write."""
    from app.objects.requests import KeyPolicy

    s3 = settings.s3
    exports = f"{s3.prefix}/" if s3.prefix else ""
    table = None if settings.lake.catalog == "none" else f"{settings.lake.prefix}/"
    return KeyPolicy(s3.allowed_prefixes, None if s3.routes_write_exports else exports, exports=exports, table=table)


# Invariant: building connects to nothing and imports no SDK, so the service starts and reports its state even when
# outside systems are down.


@dataclass(frozen=True, slots=True)
class ServiceParts:
    """The dependencies of the slices."""

    settings: Settings
    state: State
    store: "ObjectStore"
    clock: Callable[[], datetime]
    warehouse: Warehouse
    counter: RequestCounter
    costs: RequestCosts
    steps: Callable[[Context, SyncPlan, Step], Report] = run_in_process


Wiring = Callable[[ServiceParts], Pipelines]


def now() -> datetime:
    """The clock of the service: aware UTC."""
    return datetime.now(UTC)


def wire(parts: ServiceParts) -> Pipelines:
    """All pipelines."""
    from app.amplitude.job import AmplitudePull
    from app.analytics.object_facts import TableSums
    from app.appmetrica.job import AppMetricaPull
    from app.csv_inbox import job as inbox_job
    from app.dynamo_to_drive import job as dynamo_job
    from app.influx_to_s3 import job as influx_job
    from app.lake import job as lake_job

    settings, state = parts.settings, parts.state
    influx = influx_job.build(
        settings,
        state.checkpoints,
        parts.store,
        set_aside=set_aside(parts, settings.s3.prefix),
        clock=parts.clock,
        rewrite_seconds=parts.costs.rewrite_seconds if settings.request_costs.max_monthly else None,
        steps=parts.steps,
        sums=influx_job.ObjectSums(TableSums, state.summaries),
    )
    dynamo = dynamo_job.HourFileExport(
        settings,
        state.checkpoints,
        set_aside(parts, dynamo_job.NAME),
        parts.clock,
        spend=partial(parts.counter.add, READ_UNIT),
    )
    inbox = inbox_job.build(settings, parts.clock)
    lake = lake_job.build(settings, parts.store)
    pulled = (settings, state.checkpoints, parts.store, parts.warehouse, parts.clock)
    amplitude, appmetrica = AmplitudePull(*pulled), AppMetricaPull(*pulled, state.pulls)
    windowed: Mapping[str, WindowedPipeline] = {
        influx_job.NAME: influx,
        dynamo_job.NAME: dynamo,
        amplitude.name: amplitude,
        appmetrica.name: appmetrica,
    }
    return Pipelines(
        jobs=(*influx.jobs, lake, *dynamo.jobs, inbox.job, amplitude.job, appmetrica.job, *sweeps(parts)),
        backfills={name: each.backfill for name, each in windowed.items()},
        steps={influx_job.NAME: influx.step},
        replacements={influx_job.NAME: influx.replace},
        rewrites={influx_job.NAME: influx.rewrite},
        systems=[system for each in windowed.values() for system in each.checks],
        destinations={**destinations(settings), inbox_job.NAME: inbox.destination},
        histories={inbox_job.NAME: inbox.history},
        undos={inbox_job.NAME: inbox.undo},
        verifications={name: each.verification for name, each in windowed.items()},
        charts={name: each.chart for name, each in windowed.items()},
        kept={
            inbox_job.NAME: inbox.rejected,
            **{name: set_aside(parts, start).kept_by for name, start in set_aside_starts(settings)},
        },
        listed=(influx_job.NAME,),
        calls={appmetrica.name: lambda: calls_of(parts, appmetrica.name)} if appmetrica.exports else {},
        routers=lambda: pull_routes(amplitude.projects, appmetrica.exports),
    )


def calls_of(parts: ServiceParts, service: str) -> ServiceCalls:
    """How many calls were made to a service that limits them."""
    today, ever = parts.state.pulls.calls_ever(service, parts.clock())
    return ServiceCalls(today, parts.settings.appmetrica.daily_calls, ever)


def build(
    settings: Settings, wiring: Wiring = wire, *, own_server: bool = True, is_worker: bool = False
) -> BuiltService:
    """The service for these settings. Raises Permanent for an invalid checkpoint URL.

    `own_server` False: another ASGI server will serve it, at an address that is unknown here. `is_worker`: its plans
    are sharded over all workers.
    """
    use_network(settings)
    checkpoint = settings.checkpoint
    state = open_state(checkpoint.url.get_secret_value(), settings.service.data_dir, run_records=checkpoint.run_records)
    warehouse = open_warehouse(settings.dwh.database_url.get_secret_value(), settings.service.data_dir)
    counter = RequestCounter()
    store = open_store(settings, counter)
    costs = RequestCosts(counter, state.requests, prices_for(settings), state.clock, settings.request_costs.max_monthly)
    workers = workers_of(settings, state, counter)
    steps = workers.steps if workers and is_worker else run_in_process
    parts = ServiceParts(settings, state, store, state.clock, warehouse, counter, costs, steps)
    pipelines = wiring(parts)
    alerts = Alerts(settings, pipelines.jobs, state, now)

    def ended(run: Run, cause: BaseException | None) -> None:
        log_run(run, cause)
        alerts.ended(run)
        costs.save()

    stop = Stop()
    services = RunServices(state.clock, state.leases, state.runs, lease_terms(settings), ended, counter.take_run)
    scheduler = Scheduler(pipelines.jobs, services, stop, pipelines.backfills, state.pauses, elsewhere=workers)
    stores = {
        "checkpoint_store_connected": state_check(state),
        "s3_accessible": store_check(store),
        "dwh_connected": warehouse.ping,
    }
    systems = [
        *store_checks(settings, state, warehouse.database, store, pipelines.listed),
        *pipelines.systems,
        *webhook(settings),
        ConnectionCheck(
            "request_costs", "requests a month", "MAX_MONTHLY_REQUEST_COST", lambda: costs.estimate().text()
        ),
    ]
    maps = DeliveryMaps(pipelines.charts, state.pages, now)
    service = BuiltService(
        settings,
        state,
        pipelines,
        systems,
        services,
        stop,
        scheduler,
        alerts,
        Probes(settings.service.version, scheduler, Readiness(stores), now),
        costs,
        maps,
        Verifications(pipelines.verifications, stop, now, maps),
        now,
    )
    service.app = create_asgi_app(service, parts, open_analytics(settings, state, store), own_server=own_server)
    return service


def workers_of(settings: Settings, state: State, counter: RequestCounter) -> "Workers | None":
    """The worker processes that run jobs; None where this process does. Raises BadSettings when the queue is not
    installed.
    """
    if settings.lease.engine == "embedded":
        return None
    try:
        from app.scale.queue import Workers
    except ModuleNotFoundError as error:
        missing = f"SCALE_ENGINE={settings.lease.engine!r}: the package {error.name} is not installed"
        raise BadSettings([f"{missing}; install headwater with its extra: pip install 'headwater[scale]'"]) from error
    return Workers(settings, state, counter.add_elsewhere)


def open_store(settings: Settings, counter: RequestCounter) -> "ObjectStore":
    """The bucket, or a directory below DATA_DIR when no bucket is set."""
    s3 = settings.s3
    if not s3.bucket:
        from app.object_store.local import LocalDirectory

        return LocalDirectory(settings.service.data_dir / "objects")
    from app.object_store.s3 import PROBE_FOLDER, S3Store

    return S3Store(
        replace(s3_target(settings), counter=counter), f"{s3.prefix}/{PROBE_FOLDER}/{uuid4().hex}".lstrip("/")
    )


def s3_target(settings: Settings) -> "S3Target":
    """How to connect to the bucket."""
    from app.object_store.s3_client import S3Target

    s3 = settings.s3
    return S3Target(
        bucket=s3.bucket,
        region=s3.region,
        endpoint_url=s3.endpoint_url,
        addressing_style=s3.addressing_style,
        access_key_id=secret_text(s3.access_key_id),
        secret_access_key=secret_text(s3.secret_access_key),
        session_token=secret_text(s3.session_token),
        sse=s3.sse.upper() if s3.sse == "aes256" else s3.sse,
        sse_kms_key_id=s3.sse_kms_key_id,
    )


def open_analytics(settings: Settings, state: State, store: "ObjectStore") -> "Analytics":
    """/analytics over the objects."""
    from app.analytics import service
    from app.lake import job as lake_job

    table = lake_job.table_for_reports(settings, store, now)
    if not settings.s3.bucket:
        return service.build(settings, store, state.summaries, lambda: ("", "", ""), now, table=table)
    from app.object_store.s3_client import key_source

    return service.build(settings, store, state.summaries, key_source(s3_target(settings)), now, table=table)


def sweeps(parts: ServiceParts) -> Sequence[Job]:
    """The jobs that delete old set-aside rows, and abort multipart uploads that killed processes left in a bucket (a
    directory cleans up by itself).
    """
    from app.objects import sweeps

    store, settings = parts.store, parts.settings
    folders = {name: set_aside(parts, start) for name, start in set_aside_starts(settings)}
    kept = sweeps.build_set_aside(folders, settings.set_aside.days, parts.clock)
    if not settings.s3.bucket:
        return (kept,)

    def sweep(before: datetime, ours: Callable[[str], bool]) -> int:
        from app.object_store.s3_multipart import abort_stale_uploads as abort

        return abort(cast("S3Store", store), before, ours)

    return (kept, sweeps.build(sweep, settings.s3.sweep_hours, key_policy(settings).sweeps, parts.clock))


def set_aside_starts(settings: Settings) -> Iterator[tuple[str, str]]:
    """Each enabled pipeline that sets rows aside in the object store, and the prefix of its folder."""
    if settings.influx.url:
        yield "influx_to_s3", settings.s3.prefix
    if settings.dynamo.table_name:
        yield "dynamo_to_drive", "dynamo_to_drive"
    if settings.amplitude.web_client_id or settings.amplitude.mobile_client_id:
        yield "amplitude", "amplitude"
    if settings.appmetrica.api_key:
        yield "appmetrica", "appmetrica"


def set_aside(parts: ServiceParts, start: str) -> "SetAsideStore":
    """The set-aside store of the pipeline whose objects are below `start`."""
    from app.object_store.set_aside import SetAsideStore, folder_of

    return SetAsideStore(parts.store, folder_of(start), parts.settings.set_aside.max_bytes)


def secret_text(secret: SecretStr | None) -> str:
    """The text of a secret; "" for none."""
    return secret.get_secret_value() if secret else ""


def lease_terms(settings: Settings) -> LeaseTerms:
    """The identity of this process as a lease owner; unique per process, also on one host and across restarts."""
    owner = f"{socket.gethostname()}:{os.getpid()}:{uuid4().hex[:8]}"
    return LeaseTerms(owner, settings.lease.ttl_seconds, settings.lease.heartbeat_seconds)


def pull_routes(projects: Mapping[str, "Project"], exports: "Exports | None") -> "Sequence[APIRouter]":
    """/amplitude and /appmetrica."""
    from app.amplitude import routes as amplitude_routes
    from app.appmetrica import routes as appmetrica_routes

    return amplitude_routes.build(projects), appmetrica_routes.build(exports)


# `uvicorn app.main:app`: the service under another ASGI server.

NOT_ENFORCED = (
    "another ASGI server serves this: it does not enforce the 15 s and 64 KiB of a request's head, the 30 s for a "
    "client that does not read its answer and the limit of connections, and it has no HEALTH_PORT and no LOG_FILE; "
    "run `python -m app` to have them"
)


def create_app_for_server() -> HeadwaterApp:
    """The application for this environment and `.env`, built on first access. Exits with 78 on invalid settings or an
    unsupported platform.
    """
    if refusal := unsupported(os.name):
        sys.stderr.write(f"{refusal}\n")
        raise SystemExit(BAD_SETTINGS)
    tune()
    try:
        settings = configured(daemon=True, file=False)  # several server workers would write to one file
    except BadSettings as error:
        sys.stderr.write("".join(f"{fault}\n" for fault in error.faults))
        raise SystemExit(BAD_SETTINGS) from None
    service = build(settings, own_server=False)
    announce(service, os.environ, DOTENV, own_server=False)
    log.warning("%s", NOT_ENFORCED)
    share_the_machine()
    return service.app


if TYPE_CHECKING:
    app: HeadwaterApp
else:

    def __getattr__(name: str) -> HeadwaterApp:
        """`app`, the name that document 002 uses."""
        if name != "app":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = found = create_app_for_server()
        return found
