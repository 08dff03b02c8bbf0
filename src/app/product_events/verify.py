"""Both ends of a pull: which hours are compared, how an object is read and repaired; and the gap map.

Invariants: an object is downloaded whole before it is read, so read errors are faults of the object; an hour is
complete only when the warehouse holds the events of its object; a day is requested once however many of its hours are
compared, and after its objects were listed, so that what somebody stored since is never overwritten. The gap map counts
only keys of its windows and ignores other objects. A window that could not be fetched or stored is MISSING, since its
record names a version that no object has; one from which lines were set aside is PARTIAL.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING

from app.core.errors import Conflict, Permanent, Transient
from app.core.repair import GONE_HINT
from app.core.runs import Context, Report, Stop
from app.core.verify import (
    NOTHING,
    CellState,
    FoundObject,
    MapCell,
    MapContext,
    PartitionWindow,
    WindowContent,
    cells_of,
)
from app.core.windows import DAY_SECONDS, HOUR_SECONDS, Window, floor_to, windows_between
from app.object_store.port import ObjectInfo
from app.product_events.hours import DamagedObject, PulledHour
from app.product_events.mapping import missing_events

if TYPE_CHECKING:
    from app.product_events.pull import PullPipeline

Given = Callable[[Window], PulledHour]
"""The hours that a service returned. Raises the error that prevents one."""


class PullEnds:
    """`app.core.verify.Ends` over a pull; its windows are hours."""

    def __init__(self, pull: "PullPipeline", names: Iterable[str], stop: Stop) -> None:
        self.pull, self.names, self.stop = pull, sorted(names), stop
        self._held = ExitStack()
        self._until = pull.due_at
        self._asked: PartitionWindow | None = None
        self._versions: Mapping[str, str] = {}
        self._contents: dict[PartitionWindow, WindowContent] = {}

    def partitions(self, _: Window) -> Sequence[str]:
        """See `Ends.partitions`: the configured ones."""
        return self.names

    def slots(self, span: Window, partition: str | None) -> Iterator[PartitionWindow]:
        """See `Ends.slots`: hours that can be requested."""
        self._until = floor_to(min(span.end, self.pull.due_at), HOUR_SECONDS)
        self.pull.spool.mkdir(parents=True, exist_ok=True)
        try:
            for name in self.names if partition is None else [partition]:
                yield from (
                    PartitionWindow(name, hour) for hour in windows_between(span.start, self._until, HOUR_SECONDS)
                )
        finally:
            self.let_go()

    def let_go(self) -> None:
        """Free the cached answers of the service."""
        self._held.close()
        self._asked = None

    def source(self, slot: PartitionWindow) -> WindowContent:
        """See `Ends.source`. A second read returns the same answer."""
        if slot not in self._contents:
            self._contents[slot] = self._hour(slot).content()
        return self._contents[slot]

    def destination(self, slot: PartitionWindow) -> WindowContent:
        """See `Ends.destination`. Raises Permanent for an object that is damaged or whose events are not loaded."""
        info = self.pull.store.head(self.pull.key(slot.partition, slot.window))
        return self._content(slot, info) if info else NOTHING

    def heal(self, context: Context, slot: PartitionWindow) -> Report:
        """See `Ends.heal`. Raises Conflict when the object was stored again since the service was queried, and
        Permanent when it is damaged or foreign and the service has no rows to replace it.
        """
        hour, given, key = self._hour(slot), self.source(slot), self.pull.key(slot.partition, slot.window)
        info = self.pull.store.head(key)
        version = info.etag if info else ""
        if version != self._versions.get(key, ""):
            raise Conflict(f"{key} was changed by another writer meanwhile", "verify the window again")
        run = self.pull.run(context, slot.partition)
        record = run.records(slot.window).get(slot.window.start)
        try:
            there = self._content(slot, info, load=False) if info else NOTHING
        except DamagedObject:
            there = None
        # A confirmed object with more rows dates from before the service dropped some of them.
        is_confirmed = record is not None and version != "" and version == record.version
        if is_confirmed and there is not None and there.rows > given.rows:
            return Report()
        if there != given and not given.rows:
            raise Permanent(f"{key}: was changed, and the service has no rows of it", GONE_HINT)
        return run.mend(hour, record, None if there == given else version)

    def _hour(self, slot: PartitionWindow) -> PulledHour:
        """An hour as the service returns it; requested together with the rest of its day within the span."""
        partition, window, asked = slot.partition, slot.window, self._asked
        if not asked or asked.partition != partition or not asked.window.start <= window.start < asked.window.end:
            self.let_go()
            midnight = floor_to(window.start, DAY_SECONDS) + timedelta(days=1)
            span = Window(window.start, max(window.end, min(midnight, self._until)))
            hours = windows_between(span.start, span.end, HOUR_SECONDS)
            folders = {folder_of(self.pull.key(partition, hour)) for hour in hours}
            # List before querying the service, so that what somebody stores meanwhile is never overwritten.
            self._versions = {info.key: info.etag for folder in folders for info in self.pull.store.list(folder)}
            span, self._given = self.pull.ask(partition, span, self.stop, self._held)
            self._asked = PartitionWindow(partition, span)
        return self._given(window)

    def _content(self, slot: PartitionWindow, info: ObjectInfo, *, load: bool = True) -> WindowContent:
        """Content of an object. Raises Permanent for events missing from the warehouse, unless it is only compared."""
        lacking = 0
        with self.pull.object_hour(slot.partition, slot.window, self.stop, info.etag) as hour:
            if hour is None:
                raise Transient(f"{info.key} was deleted while it was being read", "verify again")
            content = hour.content()
            if load and hour.is_loaded:
                lacking = sum(missing_events(self.pull.warehouse.known, tables) for tables in hour.tables())
        if lacking:
            hint = "heal the window: its events are loaded again"
            raise Permanent(f"{lacking} of {content.rows} events of {info.key} are not in the warehouse", hint)
        return content


def folder_of(key: str) -> str:
    """The key up to its last slash."""
    return key[: key.rfind("/") + 1]


@dataclass(frozen=True, slots=True)
class PullGapMap:
    """`app.core.verify.GapMapSource` over a pull: a row of hours for each partition."""

    pull: "PullPipeline"

    def partitions(self) -> Sequence[str]:
        """See `GapMapSource.partitions`."""
        return sorted(self.pull.checkpoints.cursors(self.pull.name))

    def cells(self, partition: str, span: Window) -> Sequence[MapCell]:
        """See `GapMapSource.cells`: one listing per day."""
        hours = windows_between(span.start, min(span.end, self.pull.clock()), HOUR_SECONDS)
        key = partial(self.pull.key, partition)
        return pull_cells(self.pull, partition, hours, key=key, folder=folder_of, by_line=True)


def pull_cells(
    pull: "PullPipeline",
    partition: str,
    windows: Iterable[Window],
    *,
    key: Callable[[Window], str],
    pipeline: str = "",
    folder: Callable[[str], str] = str,
    by_line: bool = False,
) -> Sequence[MapCell]:
    """A cell per window that has begun. `key`: the object of a window; `folder`: the prefix to list for it.

    One listing per folder. `by_line`: `source_cells` of the records counts lines, of which `rows` were loaded.
    """
    cursor_at = pull.checkpoints.cursors(pull.name).get(partition)
    at = MapContext(pull.clock(), pull.due_after.total_seconds(), cursor_at, pull.overdue_seconds)
    begun = [window for window in windows if window.start < at.now]
    if not begun:
        return ()
    keys = {key(window): window.start for window in begun}
    listed = (info for each in sorted(set(map(folder, keys))) for info in pull.store.list(each))
    found = [FoundObject(keys[info.key], info.key, info.etag) for info in listed if info.key in keys]
    records = pull.checkpoints.records(pipeline or pull.name, partition, begun[0].start, begun[-1].end)
    # Lines that were set aside are counted at the source but are in no object.
    lacking = {record.window.start for record in records if by_line and record.source_cells > record.rows}
    return [
        replace(cell, state=CellState.PARTIAL)
        if cell.state in (CellState.EQUAL, CellState.EMPTY) and cell.window.start in lacking
        else cell
        for cell in cells_of(begun, records, found, at)
    ]
