"""Both ends of the pull: a file that the service makes now, and the rows of the objects.

Invariants: a file is asked for once per day and resource, since the service takes minutes to make one; objects are
listed before it is asked for, so what somebody stored since is never written over; an hour of events is whole only when
the warehouse holds those of its object.
"""

import csv
import gzip
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import BinaryIO

from app.appmetrica.client import RequestRefused
from app.appmetrica.export_request import Exports, Resource
from app.appmetrica.hours import EVENTS, ResourceRun, hour_key, partition_of
from app.appmetrica.rows import KEPT_ROW_BYTES, ReceiptHourFile, by_hour, tables
from app.core.errors import AppError, Conflict, Permanent, Transient
from app.core.runs import Context, Report, Stop
from app.core.verify import NOTHING, Content, Slot
from app.core.windows import Window, windows_between
from app.object_store.port import ObjectInfo
from app.object_store.row_digest import content_of
from app.product_events.mapping import KnownEvents, lost
from app.product_events.pull import HOUR_SECONDS, PartitionRun, PullContext
from app.product_events.raw_objects import folder_of, mending
from app.product_events.verify import covers, damage, downloaded, ended_hours, found_at, refuse_lost, rest_of_day

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
            raise Conflict(f"{key} was stored by somebody else meanwhile", "verify the window again")
        there = found_at(key, info, lambda found: self._content_of_object(slot.window, found))
        run = PartitionRun(self.pull, context, slot.partition)
        record = run.records(slot.window).get(slot.window.start)
        put = mending(there, _content(hour), record)
        if put is None:
            return Report()
        return ResourceRun(run, self.exports, self._resource(slot)).mend(hour, record, put)

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
    return content_of(dict(zip(hour.columns, row, strict=True)) for row in hour.read())
