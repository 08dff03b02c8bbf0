"""Both ends of the pull read anew: a file that the service makes now, and the rows of the objects; and the gap map.

Invariants: a file is asked for once per day and resource, since the service takes minutes to make one; objects are
listed before it is asked for, so what somebody stored since is never written over; an hour of events is whole only when
the warehouse holds those of its object.
"""

import csv
import gzip
import random
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import timedelta
from shutil import copyfileobj
from tempfile import TemporaryFile
from typing import BinaryIO, cast

from app.appmetrica.client import Refused, Service
from app.appmetrica.export_request import Patience, Resource, asking, keep_question
from app.appmetrica.hours import DUE_AFTER, EVENTS, NAME, Places, ResourceRun, due_at, hour_key, leave_out, question_for
from app.appmetrica.rows import HOUR_SECONDS, KEPT_ROW_BYTES, HourFile, by_hour, tables
from app.core.errors import AppError, Conflict, Permanent, Transient
from app.core.gap_map import Cell
from app.core.runs import Context, Report, Stop
from app.core.verify import NOTHING, Content, Slot, content_of
from app.core.windows import DAY_SECONDS, Window, floor_to, windows_between
from app.product_events.mapping import Known, lost
from app.product_events.raw_objects import RawLine, RawMap, There, folder_of, mending

DAMAGED = "heal the window: the object is written again from what the service gives"
LOST = "heal the window: its events are loaded again"
LATER = "verify again in some minutes: the same file is asked for; APPMETRICA_POLL_TIMEOUT_SECONDS is how long to wait"
BROKEN = (EOFError, gzip.BadGzipFile, zlib.error, csv.Error, UnicodeDecodeError, ValueError)


@dataclass(frozen=True, slots=True)
class Given:
    """Hours as the service gives them, and the versions of their objects from before it was asked.

    `fault`: it could not be asked; that is true of all hours of the span.
    """

    partition: str
    span: Window
    hours: Mapping[Window, HourFile] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    fault: AppError | None = None

    def has(self, slot: Slot) -> bool:
        """Whether it is the answer for this hour."""
        return slot.partition == self.partition and self.span.start <= slot.window.start < self.span.end

    def hour(self, slot: Slot) -> HourFile:
        """The hour. Raises the fault."""
        if self.fault is not None:
            raise self.fault
        return self.hours[slot.window]


@dataclass(slots=True)
class PullEnds:
    """`app.core.verify.Ends` over the pull. Partitions are `{application}:{resource}`, windows hours of receipt."""

    places: Places
    service: Service
    resources: Sequence[Resource]
    known: Known
    stop: Stop
    _until: Window | None = None
    _given: Given | None = None
    _held: ExitStack = field(default_factory=ExitStack)

    def partitions(self, _: Window) -> Sequence[str]:
        """See `Ends.partitions`: those that are configured."""
        return sorted(self._name(resource) for resource in self.resources)

    def slots(self, span: Window, partition: str | None) -> Iterator[Slot]:
        """See `Ends.slots`: hours that can be asked for."""
        end = floor_to(min(span.end, due_at(self.places.clock())), HOUR_SECONDS)
        self.places.spool.mkdir(parents=True, exist_ok=True)
        if span.start >= end:
            return
        self._until = Window(span.start, end)
        with self._held:
            for name in (self._name(resource) for resource in self.resources):
                if partition in (None, name):
                    yield from (Slot(name, hour) for hour in windows_between(span.start, end, HOUR_SECONDS))

    def source(self, slot: Slot) -> Content:
        """See `Ends.source`. A second look sees the same file."""
        return _content(self._asked(slot).hour(slot))

    def destination(self, slot: Slot) -> Content:
        """See `Ends.destination`. Raises Permanent for an object that is damaged, or whose events are not loaded."""
        info = self.places.store.head(self._key(slot))
        return self._read(slot, info.key, info.etag, self._known_of(slot)) if info else NOTHING

    def heal(self, context: Context, slot: Slot) -> Report:
        """See `Ends.heal`. Raises Conflict when the object was stored anew since the service was asked."""
        given = self._asked(slot)
        hour, key = given.hour(slot), self._key(slot)
        there = self._there(slot, key, given.versions.get(key, ""))
        records = self.places.checkpoints.records(NAME, slot.partition, slot.window.start, slot.window.end)
        record = next(iter(records), None)
        how = mending(there, _content(hour), record)
        if how is None:
            return Report()
        return ResourceRun(self.places, context, self.service, self._resource(slot)).mend(hour, record, how)

    def _name(self, resource: Resource) -> str:
        return f"{self.service.application_id}:{resource.name}"

    def _resource(self, slot: Slot) -> Resource:
        return next(each for each in self.resources if self._name(each) == slot.partition)

    def _key(self, slot: Slot) -> str:
        return hour_key(self._resource(slot).name, self.service.application_id, slot.window)

    def _known_of(self, slot: Slot) -> Known | None:
        return self.known if self._resource(slot).name == EVENTS else None

    def _there(self, slot: Slot, key: str, version: str) -> There:
        info = self.places.store.head(key)
        if (info.etag if info else "") != version:
            raise Conflict(f"{key} was stored by somebody else meanwhile", "verify the window again")
        if info is None:
            return There(key, "", NOTHING)
        try:
            return There(key, version, self._read(slot, key, version, None))
        except Permanent:
            return There(key, version, None)

    def _read(self, slot: Slot, key: str, version: str, known: Known | None) -> Content:
        """What an object holds. Raises Permanent when it is damaged, or when `known` lacks an event of it."""
        with TemporaryFile(dir=self.places.spool) as spooled:
            file = cast("BinaryIO", spooled)
            with self.places.store.open(key, version) as stream:
                if stream is None:
                    raise Transient(f"{key} went away while it was read", "verify again")
                copyfileobj(stream, file)
            try:
                hour = _opened(file, slot.window)
                content = _content(hour)
            except BROKEN as error:
                raise Permanent(f"{key} is damaged: {error}", DAMAGED) from error
            hour.rows = content.rows
            self._check_loaded(key, hour, known)
        return content

    def _check_loaded(self, key: str, hour: HourFile, known: Known | None) -> None:
        if known is None or not hour.rows:
            return
        lacking = sum(lost(known, chunk) for chunk in tables(hour, self.service.application_id))
        if lacking:
            raise Permanent(f"{lacking} of {hour.rows} events of {key} are not in the warehouse", LOST)

    def _asked(self, slot: Slot) -> Given:
        """The answer for an hour; it is asked for together with what is left of its day and of the span."""
        if self._given is None or not self._given.has(slot):
            self._held.close()
            midnight = floor_to(slot.window.start, DAY_SECONDS) + timedelta(days=1)
            until = self._until.end if self._until else slot.window.end
            span = Window(slot.window.start, max(slot.window.end, min(midnight, until)))
            self._given = self._ask(self._resource(slot), span)
        return self._given

    def _ask(self, resource: Resource, span: Window) -> Given:
        name = self._name(resource)
        hours = windows_between(span.start, span.end, HOUR_SECONDS)
        folders = {folder_of(hour_key(resource.name, self.service.application_id, hour)) for hour in hours}
        versions = {info.key: info.etag for folder in folders for info in self.places.store.list(folder)}
        try:
            files = self._fetched(name, resource, span)
        except (Transient, Permanent) as error:
            return Given(name, span, fault=error)
        return Given(name, span, {hour.window: hour for hour in files}, versions)

    def _fetched(self, name: str, resource: Resource, span: Window) -> Sequence[HourFile]:
        """The hours of a span, in files that `_held` closes."""
        places = self.places
        # Jitter is no secret: any source of numbers serves.
        patience = Patience(self.stop, random.random)
        while True:
            question = question_for(places, self.service.application_id, resource, span)
            export = keep_question(places.pulls, f"{name}:verify", question, places.clock())
            try:
                with asking(self.service, places.pulls, places.clock, export, fresh=True) as under_way:
                    told = under_way.wait(patience, places.polling)
                    if told is not None:
                        raise Transient(f"AppMetrica is still making the file of {span}: {told.text}", LATER)
                    made = by_hour(under_way.files, question.columns, resource.received, span, places.spool)
                    reading = self._held.enter_context(made)
                    under_way.finish()
                    return reading.hours
            except Refused as error:
                leave_out(places, resource, error)


def _opened(file: BinaryIO, window: Window) -> HourFile:
    """An object as an hour whose rows were not counted yet."""
    csv.field_size_limit(KEPT_ROW_BYTES)
    file.seek(0)
    with gzip.open(file, "rt", encoding="utf-8", newline="") as text:
        header = next(csv.reader(text), None)
    if not header:
        raise ValueError("it has no header")
    return HourFile(window, header, file, rows=1)


def _content(hour: HourFile) -> Content:
    return content_of(dict(zip(hour.columns, row, strict=True)) for row in hour.read())


@dataclass(frozen=True, slots=True)
class PullChart:
    """`app.core.gap_map.Chart` over the pull."""

    places: Places

    def partitions(self) -> Sequence[str]:
        """See `Chart.partitions`."""
        return sorted(self.places.checkpoints.cursors(NAME))

    def cells(self, partition: str, span: Window) -> Sequence[Cell]:
        """See `Chart.cells`: one listing per day."""
        places, now = self.places, self.places.clock()
        application_id, _, resource = partition.partition(":")
        made = RawMap(places.checkpoints, places.store, DUE_AFTER.total_seconds())
        line = RawLine(
            NAME,
            partition,
            (NAME, partition),
            lambda hour: hour_key(resource, int(application_id), hour),
            folder_of,
            by_line=True,
        )
        return made.cells(line, windows_between(span.start, min(span.end, now), HOUR_SECONDS), now)
