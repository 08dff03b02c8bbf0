"""The pipeline put together: one job that pulls every configured resource, each on its own.

Invariant: the calls of a day are counted by all processes together.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from functools import lru_cache, partial
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from app.appmetrica.client import SERVICE, Exports, RequestRefused, Resource, Service, resources
from app.appmetrica.hours import DUE_AFTER, NAME, UNIT, ResourceRun, hour_key, loaded_for, partition_of
from app.appmetrica.rows import KEPT_ROW_BYTES, ReceiptHourFile, by_hour, opened_hour
from app.config.settings import Settings
from app.core.errors import Permanent, Transient
from app.core.pipeline import Checkpoints, Record
from app.core.runs import Context, Report, Stop
from app.core.windows import Window
from app.db.state import SqlPulls
from app.object_store.port import ObjectStore
from app.ops.connection_checks import System
from app.product_events.hours import Mode, Opened, PulledHour, heard
from app.product_events.http_client import Upstream
from app.product_events.mapping import Events
from app.product_events.pull import PartitionRun, PullContext, PullPipeline, pull_context, spool_of
from app.product_events.verify import GivenHours, PullChart, PullEnds

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
    pull = pull_context(
        settings,
        given.interval_seconds,
        given.lookback_days,
        name=NAME,
        unit=UNIT,
        due_after=DUE_AFTER,
        largest_bytes=KEPT_ROW_BYTES + 1,
        checkpoints=checkpoints,
        store=store,
        warehouse=warehouse,
        clock=clock,
    )

    def runs(context: Context) -> Sequence[ResourceRun]:
        asked = _configured(exports)
        return [
            ResourceRun(PartitionRun(pull, context, partition_of(asked, resource)), asked, resource, given.recount_days)
            for resource in (resources()[name] for name in given.resources)
        ]

    def verification(stop: Stop) -> AppMetricaEnds:
        return AppMetricaEnds(pull, _configured(exports), [resources()[name] for name in given.resources], stop)

    return PullPipeline(
        pull=pull,
        interval_seconds=given.interval_seconds,
        off="" if exports else OFF,
        runs=runs,
        verification=verification,
        chart=PullChart(pull, hour_key),
        service=exports,
        checks=[
            System(
                "appmetrica",
                "AppMetrica",
                "APPMETRICA_APPLICATION_ID",
                heard(pull, exports.ping, f"{given.application_id}:"),
            )
        ]
        if exports
        else (),
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

    headers = {"Authorization": f"OAuth {given.api_key.get_secret_value()}"}
    upstream = Upstream("AppMetrica", given.base_url, "APPMETRICA_BASE_URL", headers)
    asked = Service(upstream, given.application_id, spool_of(settings), count)

    @lru_cache(maxsize=1)
    def zone() -> ZoneInfo:
        """The application's time zone: the one that is set, else what the service says, asked once."""
        found = {"time_zone_name": given.timezone} if given.timezone else asked.application()
        name = str(found.get("time_zone_name") or "UTC")
        try:
            return ZoneInfo(name)
        except (ZoneInfoNotFoundError, ValueError) as error:
            raise Permanent(f"unknown time zone {name[:60]!r}", "set APPMETRICA_TIMEZONE") from error

    return Exports(
        service=asked,
        pulls=pulls,
        clock=clock,
        interval_seconds=given.poll_interval_seconds,
        timeout_seconds=given.poll_timeout_seconds,
        daily_calls=given.daily_calls,
        zone=zone,
    )


# Both ends of the pull: a file that the service makes now, and the rows of the objects. It is asked for once per day
# and resource, since the service takes minutes to make one.

LATER = "verify again in some minutes: the same file is asked for; APPMETRICA_POLL_TIMEOUT_SECONDS is how long to wait"


class AppMetricaEnds(PullEnds):
    """`app.core.verify.Ends` over the pull. Partitions are `{application}:{resource}`, windows hours of receipt."""

    def __init__(self, pull: PullContext, exports: Exports, resources: Iterable[Resource], stop: Stop) -> None:
        self.exports, self.resources = exports, {partition_of(exports, each): each for each in resources}
        super().__init__(pull, self.resources, stop, hour_key)

    def opened(self, _partition: str) -> Opened:
        """See `PullEnds.opened`."""
        return partial(opened_hour, loaded_for(self.exports, self.resources[_partition]))

    def mend(self, run: PartitionRun, hour: PulledHour, record: Record | None, over: str | None) -> Report:
        """See `PullEnds.mend`."""
        landing = ResourceRun(run, self.exports, self.resources[run.name]).landing
        return replace(landing.land(hour, record, Mode.AGAIN, over=over)[0], windows=1)

    def ask(self, partition: str, span: Window, versions: Mapping[str, str]) -> GivenHours:
        """See `PullEnds.ask`. A fault is that of all hours of the span: the first one waits for all."""
        hours: dict[Window, ReceiptHourFile] = {}
        fault = None
        try:
            hours |= {hour.window: hour for hour in self._fetched(partition, span)}
        except (Transient, Permanent) as error:
            fault = error
        return GivenHours(partition, span, hours.__getitem__, versions, fault)

    def _fetched(self, name: str, span: Window) -> Sequence[ReceiptHourFile]:
        exports, resource = self.exports, self.resources[name]
        while True:
            request = exports.request_received(resource, span)
            try:
                with exports.resumed(exports.keep(f"{name}:verify", request)) as under_way:
                    answer = under_way.wait(self.stop)
                    if answer is not None:
                        raise Transient(f"AppMetrica is still making the file of {span}: {answer.text}", LATER)
                    made = by_hour(
                        under_way.files,
                        request.columns,
                        resource.received,
                        span,
                        self.pull.spool,
                        application_id=loaded_for(exports, resource),
                    )
                    reading = self.held.enter_context(made)
                    under_way.finish()
                    return reading.hours
            except RequestRefused as error:
                if not exports.leaves_out(resource, error):
                    raise
