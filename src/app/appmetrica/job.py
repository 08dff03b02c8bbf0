"""The pipeline put together: one job that pulls every configured resource, each on its own.

Invariant: the calls of a day are counted by all processes together.
"""

from collections.abc import Callable, Sequence
from datetime import datetime
from threading import Lock
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from app.appmetrica.client import SERVICE, Service, service
from app.appmetrica.export_request import Exports, resources
from app.appmetrica.hours import DUE_AFTER, NAME, UNIT, ResourceRun, hour_key, partition_of
from app.appmetrica.rows import KEPT_ROW_BYTES
from app.appmetrica.verify import AppMetricaEnds
from app.config.settings import Settings
from app.core.errors import Permanent
from app.core.pipeline import Checkpoints
from app.core.runs import Context, Job, Report, Stop
from app.core.windows import Window
from app.db.state import SqlPulls
from app.object_store.port import ObjectStore
from app.product_events.mapping import Events
from app.product_events.pull import PartitionRun, PullContext, PullPipeline, overdue_after, set_aside_of, spool_of
from app.product_events.verify import PullChart

OFF = "set APPMETRICA_API_KEY and APPMETRICA_APPLICATION_ID"


def build(
    settings: Settings,
    checkpoints: Checkpoints,
    pulls: SqlPulls,
    store: ObjectStore,
    warehouse: Events,
    *,
    clock: Callable[[], datetime],
) -> PullPipeline[Exports | None]:
    """The pipeline as it is configured; its job is `off` without a token."""
    given, exports = settings.appmetrica, exports_of(settings, pulls, clock)
    pull = PullContext(
        name=NAME,
        unit=UNIT,
        due_after=DUE_AFTER,
        overdue_after=overdue_after(settings, NAME, given.interval_seconds),
        lookback_days=given.lookback_days,
        checkpoints=checkpoints,
        store=store,
        warehouse=warehouse,
        spool=spool_of(settings),
        clock=clock,
        set_aside=set_aside_of(settings, NAME, store, KEPT_ROW_BYTES + 1),
    )

    def run_each(context: Context, work: Callable[[ResourceRun], Report]) -> Report:
        asked = _configured(exports)
        return every_resource(pull, asked, given.resources, context, work, recount_days=given.recount_days)

    def run(context: Context) -> Report:
        return run_each(context, ResourceRun.pull_due)

    def backfill(context: Context, span: Window) -> Report:
        return run_each(context, lambda resource: resource.fill(span))

    def verification(stop: Stop) -> AppMetricaEnds:
        return AppMetricaEnds(pull, _configured(exports), [resources()[name] for name in given.resources], stop)

    return PullPipeline(
        name=NAME,
        jobs=(Job(NAME, given.interval_seconds, run, "" if exports else OFF),),
        backfill=backfill,
        verification=verification,
        chart=PullChart(pull, hour_key),
        service=exports,
    )


def _configured(exports: Exports | None) -> Exports:
    if exports is None:
        raise Permanent("AppMetrica is not configured", OFF)
    return exports


def exports_of(settings: Settings, pulls: SqlPulls, clock: Callable[[], datetime]) -> Exports | None:
    """The exports of the configured application; None without a token."""
    given = settings.appmetrica
    if given.api_key is None or given.application_id is None:
        return None

    def count() -> None:
        pulls.count_call(SERVICE, given.daily_calls, clock())

    token = given.api_key.get_secret_value()
    asked = service(given.base_url, token, given.application_id, spool_of(settings), count)
    return Exports(
        service=asked,
        pulls=pulls,
        clock=clock,
        interval_seconds=given.poll_interval_seconds,
        timeout_seconds=given.poll_timeout_seconds,
        daily_calls=given.daily_calls,
        zone=Zone(asked, given.timezone).find,
    )


class Zone:
    """The application's time zone: what is set, else what the service says, asked once."""

    def __init__(self, asked: Service, name: str) -> None:
        self._service, self._name = asked, name
        self._lock = Lock()

    def find(self) -> ZoneInfo:
        """Raises Transient and Permanent."""
        with self._lock:
            if not self._name:
                found = self._service.applications().get(self._service.application_id)
                if found is None:
                    raise Permanent(
                        f"the token does not see the application {self._service.application_id}",
                        "check APPMETRICA_APPLICATION_ID, and who made the token",
                    )
                self._name = str(found.get("time_zone_name") or "UTC")
        try:
            return ZoneInfo(self._name)
        except (ZoneInfoNotFoundError, ValueError) as error:
            raise Permanent(f"unknown time zone {self._name[:60]!r}", "set APPMETRICA_TIMEZONE") from error


def every_resource(
    pull: PullContext,
    exports: Exports,
    names: Sequence[str],
    context: Context,
    work: Callable[[ResourceRun], Report],
    *,
    recount_days: int,
) -> Report:
    """`work` for each resource."""
    runs = {}
    for resource in (resources()[name] for name in names):
        partition = partition_of(exports, resource)
        runs[partition] = ResourceRun(PartitionRun(pull, context, partition), exports, resource, recount_days)
    return pull.run_each(context, runs, work)
