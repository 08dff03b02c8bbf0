"""The pipeline put together: one job that pulls every configured resource, each on its own.

Invariants: nothing is connected before the first run; a resource that fails is noted beside its cursor, and others go
on; the calls of a day are counted by all processes together.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from threading import Lock
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from app.appmetrica.client import SERVICE, Service, service
from app.appmetrica.export_request import Polling, resources
from app.appmetrica.hours import NAME, Places, ResourceRun
from app.appmetrica.rows import KEPT_ROW_BYTES
from app.appmetrica.verify import PullChart, PullEnds
from app.config.settings import Settings
from app.core.errors import LeaseLost, Permanent, Rejected, Transient
from app.core.pipeline import Checkpoints
from app.core.runs import Context, Failure, Job, Report, Stop
from app.core.windows import Window
from app.db.run_records import SqlPulls
from app.object_store.port import ObjectStore
from app.object_store.set_aside import SetAsideStore, folder_of
from app.product_events.mapping import Events

SPOOL = "spool"
OFF = "off: set APPMETRICA_API_KEY and APPMETRICA_APPLICATION_ID"

Work = Callable[[ResourceRun], Report]


@dataclass(frozen=True, slots=True)
class Remembered:
    """What is known of past windows and of exports."""

    checkpoints: Checkpoints
    pulls: SqlPulls


@dataclass(frozen=True, slots=True)
class Pull:
    """What `main` wires: the job, its backfill and proof, and the service (None = off), which routes ask as well."""

    name: str
    jobs: Sequence[Job]
    backfill: Callable[[Context, Window], Report]
    service: Service | None
    verification: Callable[[Stop], PullEnds]
    chart: PullChart


def build(
    settings: Settings, remembered: Remembered, store: ObjectStore, warehouse: Events, clock: Callable[[], datetime]
) -> Pull:
    """The pipeline as it is configured; its job is `off` without a token."""
    given = settings.appmetrica
    asked = _service(settings, remembered.pulls, clock)
    places = Places(
        checkpoints=remembered.checkpoints,
        pulls=remembered.pulls,
        store=store,
        load=warehouse.load,
        spool=settings.service.data_dir / SPOOL,
        clock=clock,
        polling=Polling(given.poll_interval_seconds, given.poll_timeout_seconds),
        lookback_days=given.lookback_days,
        zone=Zone(asked, given.timezone).find,
        refused=set(),
        recount_days=given.recount_days,
        daily_calls=given.daily_calls,
        # A row that is too large is kept whole, whatever the limit for many small ones.
        set_aside=SetAsideStore(store, folder_of(NAME), max(settings.set_aside.max_bytes, KEPT_ROW_BYTES + 1)),
    )
    each = partial(every_resource, places, asked, given.resources)
    job = Job(NAME, given.interval_seconds, lambda context: each(context, ResourceRun.bring), "" if asked else OFF)

    def verification(stop: Stop) -> PullEnds:
        if asked is None:
            raise Permanent("AppMetrica is not configured", OFF)
        return PullEnds(places, asked, [resources()[name] for name in given.resources], warehouse.known, stop)

    return Pull(
        name=NAME,
        jobs=(job,),
        backfill=lambda context, span: each(context, lambda run: run.fill(span)),
        service=asked,
        verification=verification,
        chart=PullChart(places),
    )


def _service(settings: Settings, pulls: SqlPulls, clock: Callable[[], datetime]) -> Service | None:
    given = settings.appmetrica
    if given.api_key is None or given.application_id is None:
        return None

    def count() -> None:
        pulls.count_call(SERVICE, given.daily_calls, clock())

    spool = settings.service.data_dir / SPOOL
    return service(given.base_url, given.api_key.get_secret_value(), given.application_id, spool, count)


class Zone:
    """The application's time zone: what is set, else what the service says, asked once."""

    def __init__(self, asked: Service | None, name: str) -> None:
        self._service, self._name = asked, name
        self._lock = Lock()

    def find(self) -> ZoneInfo:
        """Raises Transient and Permanent."""
        with self._lock:
            if not self._name and self._service is not None:
                self._name = self._asked(self._service)
        try:
            return ZoneInfo(self._name)
        except (ZoneInfoNotFoundError, ValueError) as error:
            raise Permanent(f"the time zone {self._name[:60]!r} is not known", "set APPMETRICA_TIMEZONE") from error

    @staticmethod
    def _asked(asked: Service) -> str:
        found = asked.applications().get(asked.application_id)
        if found is None:
            raise Permanent(
                f"the token does not see the application {asked.application_id}",
                "check APPMETRICA_APPLICATION_ID, and who made the token",
            )
        return str(found.get("time_zone_name") or "UTC")


def every_resource(places: Places, asked: Service | None, names: Sequence[str], context: Context, work: Work) -> Report:
    """`work` for each resource."""
    if asked is None:
        raise Permanent("AppMetrica is not configured", OFF)
    places.spool.mkdir(parents=True, exist_ok=True)
    if not places.store.conditional:
        places.store.probe()
    total = Report()
    known: Mapping[str, ResourceRun] = {name: ResourceRun(places, context, asked, resources()[name]) for name in names}
    for run in known.values():
        try:
            total += work(run)
        except LeaseLost:
            raise
        except (Transient, Permanent, Rejected) as error:
            if not context.dry_run:
                places.checkpoints.fail(NAME, run.partition, str(error), context.lease)
            total += Report(failures=(Failure(run.partition, error.message, error.hint),))
    return total
