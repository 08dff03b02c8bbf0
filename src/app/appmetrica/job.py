"""Wires the pipeline: one job that pulls every configured resource independently.

Invariant: daily calls are counted across all processes.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from datetime import datetime

from app.appmetrica.client import Exports, LogResource, RequestRefused, resources
from app.appmetrica.hours import AppMetricaPull, ResourceRun, loaded_for, partition_of
from app.appmetrica.rows import ReceiptHourFile, SortedRows
from app.config.settings import Settings
from app.core.errors import Permanent, Transient
from app.core.pipeline import Checkpoints
from app.core.runs import Context, Stop
from app.core.windows import Window
from app.db.state import SqlPulls
from app.object_store.port import ObjectStore
from app.ops.connection_checks import ConnectionCheck
from app.product_events.hours import PullContext, PulledHour, spool_of
from app.product_events.mapping import EventWarehouse
from app.product_events.pull import PullPipeline, heard
from app.product_events.verify import Given, PullEnds, PullGapMap

OFF = "set APPMETRICA_API_KEY and APPMETRICA_APPLICATION_ID"


def build(
    settings: Settings,
    checkpoints: Checkpoints,
    pulls: SqlPulls,
    store: ObjectStore,
    warehouse: EventWarehouse,
    *,
    clock: Callable[[], datetime],
) -> PullPipeline[Exports | None]:
    """The configured pipeline; its job is `off` without a token."""
    given = settings.appmetrica
    exports = None
    if given.api_key is not None and given.application_id is not None:
        token = given.api_key.get_secret_value()
        exports = Exports(given, token, given.application_id, spool=spool_of(settings), pulls=pulls, clock=clock)
    pull = AppMetricaPull(settings, checkpoints, store, warehouse, clock)
    known = [resources()[name] for name in given.resources]

    def runs(context: Context) -> Sequence[ResourceRun]:
        return [ResourceRun(pull, context, exports, each) for each in known] if exports else ()

    def verification(stop: Stop) -> AppMetricaEnds:
        if exports is None:
            raise Permanent("AppMetrica is not configured", OFF)
        return AppMetricaEnds(pull, exports, known, stop)

    check = exports and ConnectionCheck(
        "appmetrica", "AppMetrica", "APPMETRICA_APPLICATION_ID", heard(pull, exports.ping, f"{given.application_id}:")
    )
    return PullPipeline(
        pull=pull,
        off="" if exports else OFF,
        runs=runs,
        verification=verification,
        chart=PullGapMap(pull),
        service=exports,
        checks=[check] if check else (),
    )


# Both ends of the pull: a file that the service makes now, and the rows of the objects. The file is requested once
# per day and resource, since the service takes minutes to make one.

LATER = (
    "verify again in a few minutes: the same file is requested; APPMETRICA_POLL_TIMEOUT_SECONDS sets how long to wait"
)


class AppMetricaEnds(PullEnds):
    """`app.core.verify.Ends` over the pull. Partitions are `{application}:{resource}`, windows hours of receipt."""

    def __init__(self, pull: PullContext, exports: Exports, resources: Iterable[LogResource], stop: Stop) -> None:
        self.exports, self.resources = exports, {partition_of(exports, each): each for each in resources}
        super().__init__(pull, self.resources, stop)

    def run(self, context: Context, partition: str) -> ResourceRun:
        """See `PullEnds.run`."""
        return ResourceRun(self.pull, context, self.exports, self.resources[partition])

    def ask(self, partition: str, span: Window) -> tuple[Window, Given]:
        """See `PullEnds.ask`. A fault applies to all hours of the span: the first one waits for all."""
        try:
            hours = {hour.window: hour for hour in self._fetched(partition, span)}
        except (Transient, Permanent) as error:
            fault = error

            def lacking(_: Window) -> PulledHour:
                raise fault

            return span, lacking
        return span, hours.__getitem__

    def _fetched(self, name: str, span: Window) -> Sequence[ReceiptHourFile]:
        exports, resource = self.exports, self.resources[name]
        while True:
            request = exports.request_received(resource, span)
            try:
                with exports.resumed(exports.keep(f"{name}:verify", request)) as under_way:
                    answer = under_way.wait(self.stop)
                    if answer is not None:
                        raise Transient(f"AppMetrica is still preparing the file of {span}: {answer.text}", LATER)
                    made = SortedRows(
                        under_way.files,
                        request.columns,
                        resource.received,
                        span,
                        self.pull.spool,
                        application_id=loaded_for(name),
                    )
                    reading = self.held.enter_context(closing(made))
                    under_way.finish()
                    return reading.hours
            except RequestRefused as error:
                if not exports.leaves_out(resource, error):
                    raise
