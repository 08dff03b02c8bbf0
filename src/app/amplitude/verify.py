"""Both ends of the pull read anew: events as the service gives them now, and events of the objects; and the gap map.

Invariants: a day is asked for once however many of its hours are compared, and an hour that differs once more by
itself; an hour is whole only when the warehouse holds the events of its object; the object of a week is compared with
what the service gives for the hours that it should hold.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from app.amplitude.archives import WEEK, Archive, opened
from app.amplitude.client import Patience, Project
from app.amplitude.events import Objects, content_of_hour
from app.amplitude.hours import DUE_AFTER, HOUR_SECONDS, PIPELINE, Places, SourceRun, Weeks, due_at, week_key, week_of
from app.amplitude.load_hour import NAME, hour_key
from app.core.errors import Permanent
from app.core.gap_map import Cell
from app.core.runs import Context, Report, Stop
from app.core.verify import NOTHING, Content, Slot
from app.core.windows import DAY_SECONDS, Window, floor_to, windows_between
from app.product_events.mapping import Known
from app.product_events.raw_objects import RawLine, RawMap, There, folder_of, mending, was_had

WEEKS = ":weeks"


@dataclass(frozen=True, slots=True)
class Given:
    """An answer of the service that is at hand; `archive` None = it has no events."""

    source: str
    span: Window
    archive: Archive | None

    def has(self, slot: Slot) -> bool:
        """Whether it is the answer for this hour."""
        return slot.partition == self.source and self.span.start <= slot.window.start < self.span.end


@dataclass(slots=True)
class PullEnds:
    """`app.core.verify.Ends` over the pull. Partitions are sources, whose windows are hours, and `{source}:weeks`."""

    places: Places
    projects: Mapping[str, Project]
    known: Known
    stop: Stop
    _contents: dict[Slot, Content] = field(default_factory=dict)
    _day: Given | None = None
    _held: ExitStack = field(default_factory=ExitStack)

    def partitions(self, _: Window) -> Sequence[str]:
        """See `Ends.partitions`: those that are configured."""
        return sorted(each for source in self.projects for each in (source, source + WEEKS))

    def slots(self, span: Window, partition: str | None) -> Iterator[Slot]:
        """See `Ends.slots`: hours that can be asked for, and weeks that lie in the span whole."""
        end = min(span.end, due_at(self.places.clock()))
        self.places.spool.mkdir(parents=True, exist_ok=True)
        with self._held:
            for source in self.projects:
                if partition in (None, source):
                    hours = windows_between(span.start, end, HOUR_SECONDS)
                    yield from (Slot(source, hour) for hour in hours if hour.end <= end)
                if partition in (None, source + WEEKS):
                    weeks = (week for week in weeks_between(span.start, end) if span.start <= week.start)
                    yield from (Slot(source + WEEKS, week) for week in weeks if week.end <= end)

    def source(self, slot: Slot) -> Content:
        """See `Ends.source`. An hour is remembered, since its week asks for it again; a second look asks anew."""
        source = slot.partition.removesuffix(WEEKS)
        if source != slot.partition:
            hours = self._weeks.hours(source, slot.window)
            return sum((self._remembered(Slot(source, hour.window)) for hour in hours if was_had(hour)), NOTHING)
        if slot not in self._contents:
            return self._remembered(slot)
        with self._asked(source, slot.window) as given:
            return self._took(slot, given)

    def destination(self, slot: Slot) -> Content:
        """See `Ends.destination`. Raises Permanent for an object that is damaged, or whose events are not loaded."""
        source = slot.partition.removesuffix(WEEKS)
        if source != slot.partition:
            week = self.places.store.head(week_key(source, slot.window))
            return self._objects.week(week) if week else NOTHING
        hour = self.places.store.head(hour_key(source, slot.window))
        return self._objects.hour(hour, self.known) if hour else NOTHING

    def heal(self, context: Context, slot: Slot) -> Report:
        """See `Ends.heal`. The service is asked once more, after the object was looked at."""
        source = slot.partition.removesuffix(WEEKS)
        if source == slot.partition:
            return self._heal_hour(context, slot)
        there = self.places.store.head(week_key(source, slot.window))
        return Report(0, self._weeks.mend(context, source, slot.window, there.etag if there else ""), 1)

    def _heal_hour(self, context: Context, slot: Slot) -> Report:
        there = self._there(hour_key(slot.partition, slot.window))
        records = self.places.checkpoints.records(NAME, slot.partition, slot.window.start, slot.window.end)
        with self._asked(slot.partition, slot.window) as given:
            how = mending(there, self._took(slot, given), next(iter(records), None))
            if how is None or given.archive is None:
                return Report()
            run = SourceRun(self.places, context, slot.partition, self.projects[slot.partition])
            return run.mend(given.archive, how)

    def _there(self, key: str) -> There:
        info = self.places.store.head(key)
        if info is None:
            return There(key, "", NOTHING)
        try:
            return There(key, info.etag, self._objects.hour(info))
        except Permanent:
            return There(key, info.etag, None)

    @property
    def _weeks(self) -> Weeks:
        return Weeks(self.places.store, self.places.checkpoints, self.places.spool)

    @property
    def _objects(self) -> Objects:
        return Objects(self.places.store, self.places.spool, self.stop.check)

    def _took(self, slot: Slot, given: Given) -> Content:
        self._contents[slot] = content_of_hour(given.archive, slot.window.start, self.stop.check)
        return self._contents[slot]

    def _remembered(self, slot: Slot) -> Content:
        """What is known of an hour; else it is asked for, together with what is left of its day."""
        if slot in self._contents:
            return self._contents[slot]
        if self._day is None or not self._day.has(slot):
            self._held.close()
            self._day = None
            midnight = floor_to(slot.window.start, DAY_SECONDS) + timedelta(days=1)
            span = Window(slot.window.start, max(slot.window.end, min(midnight, due_at(self.places.clock()))))
            self._day = self._held.enter_context(self._asked(slot.partition, span))
        return self._took(slot, self._day)

    @contextmanager
    def _asked(self, source: str, span: Window) -> Iterator[Given]:
        """What the service gives for a span, or for the beginning of it when it cannot give all at once."""
        # Jitter is no secret: any source of numbers serves.
        patience = Patience(self.places.policy, self.stop, random.random)
        fetched = next(self.projects[source].fetch_all(span, patience))
        with ExitStack() as held:
            held.callback(fetched.close)
            archive = held.enter_context(opened(fetched.file, fetched.span)) if fetched.file else None
            yield Given(source, fetched.span, archive)


@dataclass(frozen=True, slots=True)
class PullChart:
    """`app.core.gap_map.Chart` over the pull: a line of hours and one of weeks for each source."""

    places: Places

    def partitions(self) -> Sequence[str]:
        """See `Chart.partitions`."""
        sources = self.places.checkpoints.cursors(NAME)
        return sorted([*sources, *(source + WEEKS for source in sources)])

    def cells(self, partition: str, span: Window) -> Sequence[Cell]:
        """See `Chart.cells`: one listing per day, and one per week."""
        places = self.places
        source, now = partition.removesuffix(WEEKS), places.clock()
        made = RawMap(places.checkpoints, places.store, DUE_AFTER.total_seconds())
        if source != partition:
            line = RawLine(PIPELINE, source, (NAME, source), lambda week: week_key(source, week), str)
            return made.cells(line, weeks_between(span.start, min(span.end, now)), now)
        line = RawLine(NAME, source, (NAME, source), lambda hour: hour_key(source, hour), folder_of, by_line=True)
        return made.cells(line, windows_between(span.start, min(span.end, now), HOUR_SECONDS), now)


def weeks_between(start: datetime, end: datetime) -> Iterator[Window]:
    """Every ISO week that overlaps `[start, end)`, oldest first."""
    week = week_of(start.date())
    while week.start < end:
        yield week
        week = Window(week.end, week.end + WEEK)
