"""The table for reports: its newest state or the one valid at a given time, and which objects it stands in for.

A slice whose name has the digest of the current objects stands in for all of them. Otherwise the objects are read
themselves, and of the slice's files only the rows of windows without any object.
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta
from threading import Lock
from time import monotonic

from app.config.settings import Settings
from app.core.closed_days import NO_TABLE, ListedVersion, ReportSpan, TableFile, TableRows, TableState
from app.core.errors import Rejected
from app.core.windows import DAY_SECONDS, EPOCH, instant_text
from app.lake.job import opened_table
from app.lake.plan import (
    LakeFile,
    Slice,
    TreeLayout,
    closed_days,
    in_slices,
    place_of,
    read_layout,
    slices_of,
)
from app.object_store.deltas import named_second
from app.object_store.port import ObjectStore

KEPT_SECONDS = 10.0
US = 1_000_000
NAIVE_EPOCH = EPOCH.replace(tzinfo=None)


@dataclass(frozen=True, slots=True)
class LoadedState:
    """A state with its slices by day, in order. `prefix` and `layout` are those of the objects.

    `fresh`: day -> its change count when it was checked, and the bounds of the slices that stand in for objects.
    """

    state: TableState
    days: Mapping[int, Sequence[Slice]]
    prefix: str
    layout: TreeLayout
    fresh: dict[int, tuple[int, frozenset[bytes]]] = field(default_factory=dict)

    def place(self, version: ListedVersion) -> tuple[str, int] | None:
        """Device and day of an object that the table can hold."""
        place = place_of(version.key, self.prefix, self.layout)
        taken = place is not None and version.key.endswith(".parquet")
        return (place[0], (place[1] - EPOCH.date()).days) if place and taken else None

    def slice_of(self, day: int, device: str) -> Slice:
        """The slice of a device."""
        slices = self.days[day]
        return slices[bisect_right([one.bound for one in slices], device.encode()) - 1]

    def within(self, span: ReportSpan) -> Iterator[tuple[int, Slice]]:
        """Days and slices that may have rows in a span, oldest first."""
        first = -math.inf if span.since is None else (span.since - NAIVE_EPOCH).days
        for day in sorted(self.days):
            start = NAIVE_EPOCH + timedelta(days=day)
            if day >= first and (span.until is None or start < span.until):
                for one in self.days[day] if span.device is None else [self.slice_of(day, span.device)]:
                    yield day, one

    def is_beside(self, version: ListedVersion) -> bool:
        """Whether an object is read directly instead of through the table.

        True for an object of another program, a CSV object, a day that is not in the table yet, and a slice that does
        not stand in for its objects.
        """
        place = self.place(version)
        if place is None or place[1] not in self.fresh:
            return True
        device, day = place
        return self.slice_of(day, device).bound not in self.fresh[day][1]

    def by_day(
        self, objects: Callable[[int, int], Sequence[ListedVersion]], days: set[int]
    ) -> Mapping[int, Sequence[ListedVersion]]:
        """The objects of these days that the table can hold, in listing order."""
        found: dict[int, list[ListedVersion]] = {}
        for one in objects(min(days), max(days)) if days else ():
            place = self.place(one)
            if place is not None and place[1] in days:
                found.setdefault(place[1], []).append(one)
        return {day: sorted(those, key=lambda one: one.key.encode()) for day, those in found.items()}

    def standing_in(self, day: int, objects: Iterable[ListedVersion]) -> frozenset[bytes]:
        """Bounds of the slices that hold all objects of their devices, none set aside, or that have no objects left."""
        slices = self.days[day]
        members = closed_days(objects, self.prefix, self.layout, date.max)
        found = zip(slices, in_slices(members, slices), strict=True)
        return frozenset(
            one.bound for one, own in found if not own or (one.is_made_from(own) and not one.objects_aside)
        )

    def windows(self, day: int, one: Slice, objects: Iterable[ListedVersion]) -> Sequence[tuple[str, int, int]]:
        """The windows covered by the objects of a slice's devices, as in `TableFile.without`."""
        seconds = self.layout.window_seconds(EPOCH.date() + timedelta(days=day))
        found = []
        for version in objects:
            place = self.place(version)
            if place and self.slice_of(day, place[0]) is one:
                first_us = (day * DAY_SECONDS + (named_second(version.key) or 0) // seconds * seconds) * US
                found.append((place[0], first_us, first_us + seconds * US - 1))
        return found


class TableReader:
    """See `app.core.closed_days.ClosedDays`. The state is checked again after KEPT_SECONDS."""

    def __init__(self, settings: Settings, store: ObjectStore, clock: Callable[[], datetime]) -> None:
        self._settings = settings
        self._store = store
        self._clock = clock
        self._lock = Lock()
        self._held: LoadedState | None = None
        self._pointer = ""
        self._is_damaged = True  # or not loaded yet
        self._until = 0.0

    def look_again(self) -> None:
        """See ClosedDays."""
        with self._lock:
            self._until, self._is_damaged = 0.0, True

    def day_counts(self) -> Mapping[int, int]:
        """See ClosedDays."""
        held = self._newest()
        days = held.days if held else {}
        return {
            day: sum(file.entry.record_count for one in slices for file in one.files) for day, slices in days.items()
        }

    def rows_at(self, instant: datetime, span: ReportSpan) -> TableRows:
        """See ClosedDays."""
        now, as_of = self._clock(), f"as_of={instant_text(instant)}"
        if instant > now:
            raise Rejected(f"{as_of} is in the future", f"send a timestamp up to {instant_text(now)}")
        with opened_table(self._settings, self._store) as table:
            table.load(now, repair=False)
            found = table.valid_at(instant)
            if found is None:
                oldest = table.oldest_at()
                raise Rejected(
                    f"{as_of}: no snapshot of the table of closed days is that old",
                    f"send {instant_text(oldest)} or later; LAKE_SNAPSHOT_DAYS says how long snapshots are kept"
                    if oldest
                    else "let the job lake_day run first",
                )
            held = self._of(*found)
        if missing := [
            file.key for slices in held.days.values() for one in slices for file in one.files if file.missing
        ]:
            raise Rejected(
                f"{as_of}: {len(missing)} files of that snapshot are gone, such as {missing[0]}",
                "send a later timestamp",
            )
        files = [file for _, one in held.within(span) for file in one.files]
        plain = [TableFile(file.key, file.entry.file_size_in_bytes) for file in files]
        return TableRows(held.state, plain, beside=lambda _: False)

    def rows(
        self,
        span: ReportSpan,
        changes: Mapping[int, int],
        objects: Callable[[int, int], Sequence[ListedVersion]],
    ) -> TableRows:
        """See ClosedDays."""
        held = self._newest()
        if held is None:
            return NO_TABLE
        chosen = list(held.within(span))
        days = {day for day, _ in chosen}
        changed = {day for day in days if held.fresh.get(day, (-1,))[0] != changes.get(day, 0)}
        there = held.by_day(objects, changed)
        for day in changed:
            held.fresh[day] = changes.get(day, 0), held.standing_in(day, there.get(day, ()))
        stale = {day for day, one in chosen if one.bound not in held.fresh[day][1]}
        there = there if stale <= changed else held.by_day(objects, stale)
        files: list[TableFile] = []
        for day, one in chosen:
            without = [] if one.bound in held.fresh[day][1] else held.windows(day, one, there.get(day, ()))
            files += [
                TableFile(file.key, file.entry.file_size_in_bytes, without) for file in one.files if not file.missing
            ]
        return TableRows(held.state, files, held.is_beside)

    def _newest(self) -> LoadedState | None:
        with self._lock:
            if monotonic() >= self._until:
                with opened_table(self._settings, self._store) as table:
                    pointer = table.pointer()
                    # Each load lists the table's folder and reads all manifests.
                    if pointer != self._pointer or self._is_damaged:
                        table.load(self._clock(), repair=False)
                        found = table.valid_at(None)
                        self._held = self._of(*found) if found else None
                        self._is_damaged = found is not None and any(file.missing for file in found[1])
                        self._pointer = pointer
                self._until = monotonic() + KEPT_SECONDS
            return self._held

    def _of(self, state: TableState, files: Iterable[LakeFile]) -> LoadedState:
        export, prefix = self._settings.export, self._settings.s3.prefix
        layout = read_layout(self._store, prefix, export.date_format, export.window_seconds)
        by_day: dict[int, list[LakeFile]] = {}
        for file in files:
            by_day.setdefault((file.day - EPOCH.date()).days, []).append(file)
        return LoadedState(state, {day: slices_of(found) for day, found in by_day.items()}, prefix, layout)
