"""Both ends of the export read anew: points as they would be written, and objects as they are; and the gap map.

Invariant: what is compared is every column of every row, those that were computed included, so an object is equal only
when it is what would be written today.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import datetime, timedelta

from app.core.gaps import Cell, Found, Moment, cells_of
from app.core.ports import Checkpoints
from app.core.repair import heal_window
from app.core.runs import Context, Report, Stop
from app.core.sync import Pipeline
from app.core.verify import NOTHING, Content, Slot
from app.core.window import Window
from app.influx_to_s3.accounting import is_nameable
from app.influx_to_s3.columns import Columns
from app.influx_to_s3.rows import as_now_typed
from app.influx_to_s3.spool import RowBatch
from app.stores.objects import ObjectInfo
from app.stores.parquet import EncodedFile, TableSink
from app.stores.row_sums import content_of_tables

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
        for _, info in unfolded(self.sink, slot.partition, slot.window, self._listing(slot)):
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
            self.listed = (day, tuple(self.sink.listed(slot.partition, slot.window)))
        self.looked_at = slot
        return self.listed[1]


@dataclass(frozen=True, slots=True)
class ExportChart:
    """`app.core.gaps.Chart` over the export; `opened` gives its ends as they are now."""

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
        records = self.checkpoints.records(self.name, partition, windows[0].start, windows[-1].end)
        moment = Moment(now, self.grace_seconds, self.checkpoints.cursors(self.name).get(partition))
        days = {window.start.date(): window for window in windows}.values()
        listed = {day.start.date(): tuple(ends.sink.listed(partition, day)) for day in days}
        found = (
            Found(window.start, info.key, info.etag)
            for window in windows
            for _, info in unfolded(ends.sink, partition, window, listed[window.start.date()])
        )
        return cells_of(windows, records, found, moment)


def unfolded(sink: TableSink, partition: str, window: Window, listed: Listing) -> Listing:
    """The objects of a window out of its day's listing, without deltas whose rows the window's object holds: it says
    itself which these are, and is asked only where there are deltas.
    """
    named = [(named_at, info) for named_at, info in listed if window.start <= named_at < window.end]
    if all(named_at == window.start for named_at, _ in named):
        return named
    held = sink.head(sink.key(partition, window, 0))
    folded_until = window.start + timedelta(seconds=held.folded if held else 0)
    return [each for each in named if each[0] == window.start or each[0] > folded_until]
