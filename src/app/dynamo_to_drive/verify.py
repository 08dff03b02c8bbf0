"""Both ends of the hourly files, re-read: the table's rows, and the rows of the file as Drive has it; and the gap map.

Invariants: looking puts nothing into the trash and makes no file; a file that was changed by somebody else is mended
from the table alone, any other keeps the rows that the table no longer returns.
"""

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Protocol

from app.core.errors import Permanent
from app.core.pipeline import UNCOUNTED, Held, Pipeline, Record, Shrink, Sink, Task
from app.core.repair import GONE_HINT
from app.core.runs import Context, Report
from app.core.sync import settle
from app.core.verify import NOTHING, Cell, Content, Found, Moment, Slot, cells_of
from app.core.windows import DAY_SECONDS, Window, window_at
from app.dynamo_to_drive.hour_file import Accounts, HourFile, lines_of, read_file
from app.object_store.row_digest import content_of

HourPipeline = Pipeline[HourFile, HourFile]


class HourSink(Sink[HourFile, HourFile], Protocol):
    """What is asked of a sink here beside its port."""

    def peek(self, key: str) -> Held | None:
        """As `head`, without reading the file: version and MD5."""

    def listed(self, hour: Window) -> Iterator[tuple[str, str]]:
        """Names and MD5 of every file on the day of `hour`."""


@dataclass(frozen=True, slots=True)
class OpenedHourFiles:
    """A pipeline with its sink under the wider port, and the accounts that both write into.

    `escaped` says whether cells are guarded against formulas.
    """

    pipeline: HourPipeline
    sink: HourSink
    partition: str
    escaped: bool
    accounts: Accounts


@dataclass(frozen=True, slots=True)
class HourEnds:
    """`app.core.verify.Ends` over table and files. `acting` opens the pipeline for writing under a run's lease.

    `turn` is held while a file is mended: late hours and reconcile may be at work on the same one.
    """

    at: OpenedHourFiles
    acting: Callable[[Context], OpenedHourFiles]
    clock: Callable[[], "Moment"]
    turn: threading.Lock

    def partitions(self, _: Window) -> Sequence[str]:
        """The one."""
        return [self.at.partition]

    def slots(self, span: Window, partition: str | None) -> Iterator[Slot]:
        """See `Ends.slots`; there is the one partition."""
        now = self.clock().now
        for window in self.at.pipeline.grid.windows(span.start, min(span.end, now)):
            if window.end <= now and partition in (None, self.at.partition):
                yield Slot(self.at.partition, window)

    def source(self, slot: Slot) -> Content:
        """See `Ends.source`."""
        with closing(self.at.pipeline.source.read(slot.partition, slot.window, UNCOUNTED, None)) as hour:
            return content_of(read_file(lines_of(hour), escaped=self.at.escaped))

    def destination(self, slot: Slot) -> Content:
        """See `Ends.destination`."""
        key = self.at.sink.key(slot.partition, slot.window, 0)
        there = self.at.sink.peek(key)
        return content_of(self.at.sink.read(key, there.version)) if there else NOTHING

    def heal(self, context: Context, slot: Slot) -> Report:
        """See `Ends.heal`. Raises Permanent when the file is damaged and the table has no rows of its hour."""
        at, moment = self.acting(context), self.clock()
        records = at.pipeline.checkpoints.records(at.pipeline.name, slot.partition, slot.window.start, slot.window.end)
        record = next(iter(records), None)
        final = slot.window.end <= moment.now - timedelta(seconds=moment.grace_seconds)
        task = Task(slot.partition, slot.window, UNCOUNTED, record, final=final)
        with self.turn:
            if not _is_damaged(at, slot, record):
                return settle(at.pipeline, context, task)
            if not self.source(slot).rows:
                raise Permanent(f"{slot}: the file was changed, and the table has no rows of it", GONE_HINT)
            return settle(replace(at.pipeline, sink=_Unread(at.sink), shrink=Shrink), context, task)


def _is_damaged(at: OpenedHourFiles, slot: Slot, record: Record | None) -> bool:
    """True when the file is not the one that was confirmed."""
    there = at.sink.peek(at.sink.key(slot.partition, slot.window, 0))
    return bool(there and record and record.digest and record.digest != there.digest)


@dataclass(frozen=True, slots=True)
class _Unread:
    """A sink whose files are taken for what they are by version alone, since their rows are not to be kept."""

    sink: HourSink

    def key(self, partition: str, window: Window, part: int) -> str:
        return self.sink.key(partition, window, part)

    def head(self, key: str) -> Held | None:
        return self.sink.peek(key)

    def read(self, key: str, version: str) -> Iterable[Mapping[str, str]]:
        return self.sink.read(key, version)

    def encode(self, partition: str, window: Window, batch: HourFile) -> HourFile:
        return self.sink.encode(partition, window, batch)

    def put(self, key: str, encoded: HourFile, expected: str | None, *, closing: bool = False) -> str:
        return self.sink.put(key, encoded, expected, closing=closing)


@dataclass(frozen=True, slots=True)
class HourChart:
    """`app.core.verify.Chart` over the files; one listing a day."""

    opened: Callable[[], OpenedHourFiles]
    clock: Callable[[], "Moment"]

    def partitions(self) -> Sequence[str]:
        """The one."""
        return [self.opened().partition]

    def cells(self, partition: str, span: Window) -> Sequence[Cell]:
        """See `Chart.cells`. A file's version is its MD5 here."""
        at, moment = self.opened(), self.clock()
        hours = list(at.pipeline.grid.windows(span.start, min(span.end, moment.now)))
        if not hours:
            return ()
        records = at.pipeline.checkpoints.records(at.pipeline.name, partition, hours[0].start, hours[-1].end)
        moment = replace(moment, cursor_at=at.pipeline.checkpoints.cursors(at.pipeline.name).get(partition))
        starts = {at.sink.key(partition, hour, 0): hour.start for hour in hours}
        days = {window_at(hour.start, DAY_SECONDS).start: hour for hour in hours}.values()
        found = [
            Found(starts[name], name, digest) for day in days for name, digest in at.sink.listed(day) if name in starts
        ]
        return cells_of(hours, [replace(record, version=record.digest) for record in records], found, moment)
