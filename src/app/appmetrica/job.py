"""The pipeline put together: one job that pulls every configured resource, each on its own.

Invariant: the calls of a day are counted by all processes together.
"""

import csv
import gzip
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from typing import BinaryIO
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from app.appmetrica.client import SERVICE, Exports, RequestRefused, Resource, Service, resources, service
from app.appmetrica.hours import DUE_AFTER, EVENTS, NAME, UNIT, ResourceRun, hour_key, partition_of
from app.appmetrica.rows import KEPT_ROW_BYTES, ReceiptHourFile, by_hour, tables
from app.config.settings import Settings
from app.core.errors import AppError, Conflict, Permanent, Transient
from app.core.pipeline import Checkpoints
from app.core.runs import Context, Job, Report, Stop
from app.core.verify import NOTHING, Content, Slot
from app.core.windows import HOUR_SECONDS, Window, windows_between
from app.db.state import SqlPulls
from app.object_store.port import ObjectInfo, ObjectStore
from app.product_events.mapping import Events, KnownEvents, lost
from app.product_events.pull import PartitionRun, PullContext, PullPipeline, pull_context, spool_of
from app.product_events.verify import (
    PullChart,
    covers,
    damage,
    downloaded,
    ended_hours,
    folder_of,
    object_found,
    refuse_lost,
    rest_of_day,
)

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
        name=NAME,
        interval_seconds=given.interval_seconds,
        lookback_days=given.lookback_days,
        unit=UNIT,
        due_after=DUE_AFTER,
        largest_bytes=KEPT_ROW_BYTES + 1,
        checkpoints=checkpoints,
        store=store,
        warehouse=warehouse,
        clock=clock,
    )

    def run_each(context: Context, work: Callable[[ResourceRun], Report]) -> Report:
        asked, runs = _configured(exports), {}
        for resource in (resources()[name] for name in given.resources):
            run = PartitionRun(pull, context, partition_of(asked, resource))
            runs[run.name] = ResourceRun(run, asked, resource, given.recount_days)
        return pull.run_each(context, runs, work)

    def verification(stop: Stop) -> AppMetricaEnds:
        return AppMetricaEnds(pull, _configured(exports), [resources()[name] for name in given.resources], stop)

    return PullPipeline(
        name=NAME,
        job=Job(
            NAME,
            given.interval_seconds,
            lambda context: run_each(context, ResourceRun.pull_due),
            "" if exports else OFF,
        ),
        backfill=lambda context, span: run_each(context, lambda resource: resource.fill(span)),
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
        zone=zone_of(asked, given.timezone),
    )


def zone_of(asked: Service, name: str) -> Callable[[], ZoneInfo]:
    """Finds the application's time zone: the one that is set, else what the service says, asked once. What it gives
    raises Transient and Permanent.
    """

    @lru_cache(maxsize=1)
    def find() -> ZoneInfo:
        found = name or asked.applications().get(asked.application_id)
        if found is None:
            raise Permanent(
                f"the token does not see the application {asked.application_id}",
                "check APPMETRICA_APPLICATION_ID, and who made the token",
            )
        zone = found if isinstance(found, str) else str(found.get("time_zone_name") or "UTC")
        try:
            return ZoneInfo(zone)
        except (ZoneInfoNotFoundError, ValueError) as error:
            raise Permanent(f"unknown time zone {zone[:60]!r}", "set APPMETRICA_TIMEZONE") from error

    return find


# Both ends of the pull: a file that the service makes now, and the rows of the objects.
#
# Invariants: a file is asked for once per day and resource, since the service takes minutes to make one; objects are
# listed before it is asked for, so what somebody stored since is never written over; an hour of events is whole only
# when the warehouse holds those of its object.

LATER = "verify again in some minutes: the same file is asked for; APPMETRICA_POLL_TIMEOUT_SECONDS is how long to wait"
BROKEN = (EOFError, gzip.BadGzipFile, zlib.error, csv.Error, UnicodeDecodeError, ValueError)


@dataclass(frozen=True, slots=True)
class ReceivedHours:
    """Hours as the service gives them, and the versions of their objects from before it was asked.

    `fault`: it could not be asked; that is true of all hours of the span.
    """

    partition: str
    span: Window
    hours: Mapping[Window, ReceiptHourFile] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    fault: AppError | None = None

    def hour(self, slot: Slot) -> ReceiptHourFile:
        """The hour. Raises the fault."""
        if self.fault is not None:
            raise self.fault
        return self.hours[slot.window]


@dataclass(slots=True)
class AppMetricaEnds:
    """`app.core.verify.Ends` over the pull. Partitions are `{application}:{resource}`, windows hours of receipt."""

    pull: PullContext
    exports: Exports
    resources: Sequence[Resource]
    stop: Stop
    _until: Window | None = None
    _received: ReceivedHours | None = None
    _held: ExitStack = field(default_factory=ExitStack)

    def partitions(self, _: Window) -> Sequence[str]:
        """See `Ends.partitions`: those that are configured."""
        return sorted(partition_of(self.exports, resource) for resource in self.resources)

    def slots(self, span: Window, partition: str | None) -> Iterator[Slot]:
        """See `Ends.slots`: hours that can be asked for."""
        hours = ended_hours(self.pull, span)
        self.pull.spool.mkdir(parents=True, exist_ok=True)
        if not hours:
            return
        self._until = hours[-1]
        with self._held:
            for name in (partition_of(self.exports, resource) for resource in self.resources):
                if partition in (None, name):
                    yield from (Slot(name, hour) for hour in hours)

    def source(self, slot: Slot) -> Content:
        """See `Ends.source`. A second look sees the same file."""
        return _content(self._asked(slot).hour(slot))

    def destination(self, slot: Slot) -> Content:
        """See `Ends.destination`. Raises Permanent for an object that is damaged, or whose events are not loaded."""
        info = self.pull.store.head(hour_key(slot.partition, slot.window))
        known = self.pull.warehouse.known if self._resource(slot).name == EVENTS else None
        return self._content_of_object(slot.window, info, known) if info else NOTHING

    def heal(self, context: Context, slot: Slot) -> Report:
        """See `Ends.heal`. Raises Conflict when the object was stored again since the service was asked."""
        received, key = self._asked(slot), hour_key(slot.partition, slot.window)
        hour, info = received.hour(slot), self.pull.store.head(key)
        if (info.etag if info else "") != received.versions.get(key, ""):
            raise Conflict(f"{key} was changed by another writer meanwhile", "verify the window again")
        there = object_found(key, info, lambda found: self._content_of_object(slot.window, found))
        run, given = PartitionRun(self.pull, context, slot.partition), _content(hour)
        record = run.records(slot.window).get(slot.window.start)
        if there.stays(given, record):
            return Report()
        return ResourceRun(run, self.exports, self._resource(slot)).mend(hour, record, there.over(given))

    def _resource(self, slot: Slot) -> Resource:
        return next(each for each in self.resources if partition_of(self.exports, each) == slot.partition)

    def _content_of_object(self, window: Window, info: ObjectInfo, known: KnownEvents | None = None) -> Content:
        """What an object holds. Raises Permanent when it is damaged, or when `known` lacks an event of it."""
        with downloaded(self.pull, info) as file:
            with damage(info.key, BROKEN):
                hour = _opened(file, window)
                content = _content(hour)
            hour.rows = content.rows
            if known is not None and hour.rows:
                chunks = tables(hour, self.exports.service.application_id)
                refuse_lost(info.key, sum(lost(known, chunk) for chunk in chunks), hour.rows)
        return content

    def _asked(self, slot: Slot) -> ReceivedHours:
        """The answer for an hour; it is asked for together with what is left of its day and of the span."""
        if self._received is None or not covers(self._received.partition, self._received.span, slot):
            self._held.close()
            until = (self._until or slot.window).end
            self._received = self._ask(slot.partition, self._resource(slot), rest_of_day(slot.window, until))
        return self._received

    def _ask(self, name: str, resource: Resource, span: Window) -> ReceivedHours:
        hours = windows_between(span.start, span.end, HOUR_SECONDS)
        folders = {folder_of(hour_key(name, hour)) for hour in hours}
        versions = {info.key: info.etag for folder in folders for info in self.pull.store.list(folder)}
        try:
            files = self._fetched(name, resource, span)
        except (Transient, Permanent) as error:
            return ReceivedHours(name, span, fault=error)
        return ReceivedHours(name, span, {hour.window: hour for hour in files}, versions)

    def _fetched(self, name: str, resource: Resource, span: Window) -> Sequence[ReceiptHourFile]:
        """The hours of a span, in files that `_held` closes."""
        exports = self.exports
        while True:
            request = exports.request_received(resource, span)
            try:
                with exports.resumed(exports.keep(f"{name}:verify", request)) as under_way:
                    answer = under_way.wait(self.stop)
                    if answer is not None:
                        raise Transient(f"AppMetrica is still making the file of {span}: {answer.text}", LATER)
                    made = by_hour(under_way.files, request.columns, resource.received, span, self.pull.spool)
                    reading = self._held.enter_context(made)
                    under_way.finish()
                    return reading.hours
            except RequestRefused as error:
                exports.leave_out(resource, error)


def _opened(file: BinaryIO, window: Window) -> ReceiptHourFile:
    """An object as an hour whose rows were not counted yet."""
    csv.field_size_limit(KEPT_ROW_BYTES)
    with gzip.open(file, "rt", encoding="utf-8", newline="") as text:
        header = next(csv.reader(text), None)
    if not header:
        raise ValueError("it has no header")
    return ReceiptHourFile(window, header, file, rows=1)


def _content(hour: ReceiptHourFile) -> Content:
    from app.object_store.row_digest import content_of  # numpy and pyarrow, which an idle daemon does not load

    return content_of(dict(zip(hour.columns, row, strict=True)) for row in hour.read())
