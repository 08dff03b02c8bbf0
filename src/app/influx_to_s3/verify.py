"""Both ends of the export read anew: points as they would be written, and objects as they are; and the gap map.

Invariant: what is compared is every column of every row, those that were computed included, so an object is equal only
when it is what would be written today.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import datetime, timedelta

from app.core.gap_map import Cell, Found, Moment, cells_of
from app.core.pipeline import Checkpoints, Pipeline, Record
from app.core.reconcile import look
from app.core.repair import heal_window
from app.core.runs import Context, Report, Stop
from app.core.verify import NOTHING, Content, Slot
from app.core.windows import DAY_SECONDS, Window, floor_to
from app.influx_to_s3.layout import Columns
from app.influx_to_s3.outside_points import is_nameable
from app.influx_to_s3.row_batch import RowBatch
from app.influx_to_s3.rows import as_now_typed
from app.object_store.port import ObjectInfo
from app.object_store.row_digest import content_of_tables
from app.object_store.table_sink import EncodedFile, TableSink, by_window

ExportPipeline = Pipeline[RowBatch, EncodedFile]
Listing = Sequence[tuple[datetime, ObjectInfo]]
NOT_LISTED: tuple[tuple[str, str], Listing] = (("", ""), ())


@dataclass(slots=True)
class ExportEnds:
    """`app.core.verify.Ends` over the export. Holds the listing of one partition and day."""

    pipeline: ExportPipeline
    sink: TableSink
    columns: Columns
    clock: Callable[[], datetime]
    listed: tuple[tuple[str, str], Listing] = NOT_LISTED
    looked_at: Slot | None = None

    def partitions(self, span: Window) -> Sequence[str]:
        """See `Ends.partitions`. Devices that cannot have objects are set aside and not compared."""
        known = self.pipeline.checkpoints.cursors(self.pipeline.name)
        return sorted(filter(is_nameable, {*known, *self.pipeline.source.partitions(span.start)}))

    def slots(self, span: Window, partition: str | None) -> Iterator[Slot]:
        """See `Ends.slots`: of every device that has a checkpoint or has points since the start of the span."""
        now = self.clock()
        devices = [partition] if partition is not None else self.partitions(span)
        for device in devices:
            for window in self.pipeline.grid.windows(span.start, min(span.end, now)):
                if window.end <= now:
                    yield Slot(device, window)

    def source(self, slot: Slot) -> Content:
        """See `Ends.source`."""
        source = self.pipeline.source
        count = source.counts(slot.partition, [slot.window]).get((slot.partition, slot.window.start))
        if count is None:
            return NOTHING
        with closing(source.read(slot.partition, slot.window, count, None)) as batch:
            return content_of_tables(batch.output(), as_text=self._as_text(slot.window))

    def destination(self, slot: Slot) -> Content:
        """See `Ends.destination`: the object and deltas of older versions, none of which need a record."""
        total = NOTHING
        for info in named_in(slot.window, self._listing(slot)):
            tables = (as_now_typed(each, self.columns) for each in self.sink.read(info.key, info.etag))
            total += content_of_tables(tables, as_text=self._as_text(slot.window))
        return total

    def heal(self, context: Context, slot: Slot) -> Report:
        """See `Ends.heal`."""
        self.listed = NOT_LISTED
        return heal_window(self.pipeline, context, slot.partition, slot.window, self.clock())

    def _as_text(self, window: Window) -> bool:
        return self.sink.layout_at(window.start).format == "csv"

    def _listing(self, slot: Slot) -> Listing:
        """The day's listing, made once; a second look at the same window makes it anew."""
        day = (slot.partition, f"{slot.window.start:%Y%m%d}")
        if self.listed[0] != day or self.looked_at == slot:
            start = floor_to(slot.window.start, DAY_SECONDS)
            windows = list(self.pipeline.grid.windows(start, start + timedelta(days=1)))
            listed, _ = looked(self.pipeline, self.sink, slot.partition, windows)
            self.listed = (day, listed)
        self.looked_at = slot
        return self.listed[1]


@dataclass(frozen=True, slots=True)
class ExportChart:
    """`app.core.gap_map.Chart` over the export; `opened` gives its ends as they are now."""

    name: str
    opened: Callable[[Stop], ExportEnds]
    checkpoints: Checkpoints
    grace_seconds: float

    def partitions(self) -> Sequence[str]:
        """See `Chart.partitions`."""
        return sorted(filter(is_nameable, self.checkpoints.cursors(self.name)))

    def cells(self, partition: str, span: Window) -> Sequence[Cell]:
        """See `Chart.cells`: one listing per day."""
        ends = self.opened(Stop())
        now = ends.clock()
        windows = list(ends.pipeline.grid.windows(span.start, min(span.end, now)))
        if not windows:
            return ()
        moment = Moment(now, self.grace_seconds, self.checkpoints.cursors(self.name).get(partition))
        listed, records = looked(ends.pipeline, ends.sink, partition, windows)
        found = (Found(window.start, info.key, info.etag) for window in windows for info in named_in(window, listed))
        return cells_of(windows, records, found, moment)


def looked(
    pipeline: ExportPipeline, sink: TableSink, partition: str, windows: Sequence[Window]
) -> tuple[Listing, Sequence[Record]]:
    """A listing of each day of these windows, and their records, in which is noted what is gone."""
    records = pipeline.checkpoints.records(pipeline.name, partition, windows[0].start, windows[-1].end)
    days = {window.start.date(): window for window in windows}.values()
    listed = tuple(each for day in days for each in sink.unfolded(partition, day))
    look(pipeline, partition, records, by_window(listed, windows))
    return listed, records


def named_in(window: Window, listed: Listing) -> Sequence[ObjectInfo]:
    """The objects of one window out of its day's listing: its own, and deltas of older versions."""
    return [info for named_at, info in listed if window.start <= named_at < window.end]
