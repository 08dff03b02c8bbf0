"""Compare both ends of the export cell by cell, on a different path than the export reads; and the gap map.

A cell is one value: tags, timestamp in nanoseconds, field, value. The source is queried for raw series, not joined into
rows or widened to a column's type; the objects are split into the same cells, using the names in the layout. So faults
in the export's reader or in its processing of responses show up. Invariants: cells are hashed and summed, so memory
does not grow with a window; values that the rule for ignored tags sets aside are counted and left out.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any

import numpy as np
import pyarrow as pa

from app.core.errors import Permanent
from app.core.pipeline import Record
from app.core.repair import check_objects, heal_window
from app.core.runs import Context, Report
from app.core.verify import (
    NOTHING,
    FoundObject,
    MapCell,
    MapContext,
    PartitionWindow,
    WindowContent,
    cells_of,
    content_from,
)
from app.core.windows import DAY_SECONDS, Window, floor_to
from app.db.checkpoints import SqlCheckpoints
from app.influx_to_s3.layout import COMPUTED, DEVICE, NANOS, TAGS, TIMESTAMP, UNKNOWN, TreeColumns
from app.influx_to_s3.reader import QueryTooLarge, RawCells
from app.influx_to_s3.row_batch import computed_from
from app.influx_to_s3.rows import constant
from app.influx_to_s3.source import OpenedExport
from app.object_store.port import ObjectInfo
from app.object_store.row_digest import cell_lanes, mixed, one_array, row_lanes, seed_of, summed, value_bits
from app.object_store.table_sink import by_window, lost_tags_in

Listing = Sequence[tuple[datetime, ObjectInfo]]
NOT_LISTED: tuple[tuple[str, str], Listing] = (("", ""), ())
CELLS = 1 << 19  # per slice; each takes 40 bytes
SLICE, SHORTEST = timedelta(hours=1), timedelta(milliseconds=2)  # no shard group is shorter than an hour
# Identify rows together with the tags; no tag name starts with this.
AT, OWNER = "\0at", "\0device"


@dataclass(slots=True)
class ExportEnds:
    """`app.core.verify.Ends` over the export. Caches the listing of one partition and day.

    `opened` changes nothing beside the data. `open_to_write` opens the export as a run does: healing may write a column
    that is new, which the layout file must name before, or it may find that file gone.
    """

    opened: OpenedExport
    clock: Callable[[], datetime]
    is_exported: Callable[[str], bool]
    open_to_write: Callable[[], OpenedExport]
    is_writing: bool = False
    listed: tuple[tuple[str, str], Listing] = NOT_LISTED
    looked_at: PartitionWindow | None = None
    slice: timedelta = SLICE
    most_cells: int = CELLS

    def partitions(self, span: Window) -> Sequence[str]:
        """See `Ends.partitions`. Devices that cannot have objects are set aside and not compared."""
        known = self.opened.pipeline.checkpoints.cursors(self.opened.pipeline.name)
        return sorted(filter(self.is_exported, {*known, *self.opened.source.partitions(span.start)}))

    def slots(self, span: Window, partition: str | None) -> Iterator[PartitionWindow]:
        """See `Ends.slots`: for every device that has a checkpoint, or points since the start of the span."""
        now = self.clock()
        devices = [partition] if partition is not None else self.partitions(span)
        for device in devices:
            for window in self.opened.pipeline.grid.windows(span.start, min(span.end, now)):
                if window.end <= now:
                    yield PartitionWindow(device, window)

    def source(self, slot: PartitionWindow) -> WindowContent:
        """See `Ends.source`."""
        total, start = NOTHING, slot.window.start
        while start < slot.window.end:
            end = min(start + self.slice, slot.window.end)
            total += self._raw(slot.partition, Window(start, end))
            start = end
        return total

    def _raw(self, device: str, span: Window) -> WindowContent:
        """The source's content of a span, which is halved while it is too large."""
        influx, ignored = self.opened.source, self.opened.columns.ignored_on(span.start.date())
        as_text = self._as_text(span)

        def read() -> WindowContent:
            blocks = influx.reader.cells(device, span)
            return raw_content(blocks, device, ignored=ignored, as_text=as_text, most_cells=self.most_cells)

        try:
            return influx.again(read)
        except QueryTooLarge:
            half = (span.end - span.start) / 2
            if half < SHORTEST:
                raise
        self.slice = min(self.slice, half)
        middle = span.start + half
        return self._raw(device, Window(span.start, middle)) + self._raw(device, Window(middle, span.end))

    def destination(self, slot: PartitionWindow) -> WindowContent:
        """See `Ends.destination`: the object and deltas of older versions; neither needs a record."""
        total = NOTHING
        for info in objects_of_window(slot.window, self._listing(slot)):
            for table in self.opened.sink.read(info.key, info.etag):
                total += object_content(table, self.opened.columns, as_text=self._as_text(slot.window))
        return total

    def heal(self, context: Context, slot: PartitionWindow) -> Report:
        """See `Ends.heal`."""
        self.listed = NOT_LISTED
        if not self.is_writing:
            self.opened, self.is_writing = self.open_to_write(), True
        return heal_window(self.opened.pipeline, context, slot.partition, slot.window, self.clock())

    def cells(self, checkpoints: SqlCheckpoints, partition: str, span: Window) -> Sequence[MapCell]:
        """See `GapMapSource.cells`: one listing per day."""
        now, name = self.clock(), self.opened.pipeline.name
        windows = list(self.opened.pipeline.grid.windows(span.start, min(span.end, now)))
        if not windows:
            return ()
        retired = checkpoints.retired(name, partition, Window(windows[0].start, now))
        cursor_at = checkpoints.cursors(name, partition).get(partition)
        moment = MapContext(now, self.opened.pipeline.grid.grace_seconds, cursor_at, retired=retired)
        listed, records = list_days(self.opened, partition, windows)
        found = (
            FoundObject(window.start, info.key, info.etag)
            for window in windows
            for info in objects_of_window(window, listed)
        )
        return cells_of(windows, records, found, moment)

    def _as_text(self, window: Window) -> bool:
        return self.opened.sink.layout_at(window.start).format == "csv"

    def _listing(self, slot: PartitionWindow) -> Listing:
        """The day's listing, cached; asking twice in a row for the same window lists the day again."""
        day = (slot.partition, f"{slot.window.start:%Y%m%d}")
        if self.listed[0] != day or self.looked_at == slot:
            start = floor_to(slot.window.start, DAY_SECONDS)
            windows = list(self.opened.pipeline.grid.windows(start, start + timedelta(days=1)))
            listed, _ = list_days(self.opened, slot.partition, windows)
            self.listed = (day, listed)
        self.looked_at = slot
        return self.listed[1]


def raw_content(
    blocks: Iterable[RawCells], device: str, *, ignored: frozenset[str], as_text: bool, most_cells: int = CELLS
) -> WindowContent:
    """The cells that the objects of a span must hold. Raises QueryTooLarge for more than `most_cells` of them.

    Where values differ only in ignored tags, the one with the first tag set in byte order counts. Conflicting values
    are set aside, and repeated values count once.
    """
    found, number, numbered = list[Sequence[Any]](), 0, dict[bytes, int]()
    for block in blocks:
        number += len(block.times)
        if number > most_cells:
            raise QueryTooLarge(
                f"{device} has more than {most_cells} values in a span", "no action needed: it is halved"
            )
        if len(block.times):
            tags = {**block.tags, **{name: _or_unknown(block.tags.get(name), len(block.times)) for name in TAGS}}
            own = [(name, texts) for name, texts in tags.items() if name not in ignored]
            own += [(name, constant(UNKNOWN, len(block.times))) for name in TAGS if name in ignored]
            rows = row_lanes([(AT, block.times), (OWNER, constant(device, len(block.times))), *own])
            found += _cells(block, rows, _numbered(tags, numbered), as_text=as_text)
    if not number:
        return NOTHING
    ranks = np.empty(len(numbered), np.int64)  # the rank of each series in byte order
    ranks[[numbered[key] for key in sorted(numbered)]] = np.arange(len(numbered))
    identities, keys, *lanes, series = (np.concatenate(each) for each in zip(*found, strict=True))
    order = np.lexsort((ranks[series], keys))
    first = np.concatenate(([True], np.diff(keys[order]) != 0))
    lanes = [each[order] for each in lanes]
    stands = [each[first] for each in lanes]
    groups = np.cumsum(first) - 1
    others = np.any([each != stood[groups] for each, stood in zip(lanes, stands, strict=True)], axis=0)
    return replace(summed(stands, len(np.unique(identities))), set_aside=int(others.sum()))


def _cells(block: RawCells, rows: Sequence[Any], series: Any, *, as_text: bool) -> Iterator[Sequence[Any]]:
    """The cells of a block, field by field, as arrays.

    Each is: hash of the row, hash of row and field, two hashes of the cell, and number of the series.
    """
    fields = one_array(block.fields)
    encoded = fields.dictionary_encode()
    places = encoded.indices.to_numpy()
    for at, name in enumerate(encoded.dictionary.to_pylist()):
        here = places == at
        own = [each[here] for each in rows]
        lanes = cell_lanes(own, name, block.values.filter(pa.array(here)), as_text=as_text)
        yield own[0], mixed(own[0] ^ seed_of(b"key", name)), *lanes, series[here]


def _numbered(tags: "dict[str, Any]", series: dict[bytes, int]) -> Any:
    """The number of each row's tag set in `series`, keyed as InfluxDB writes it; new ones are added."""
    hashes = row_lanes(sorted(tags.items()))[0]
    _, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    numbers = []
    for at in first.tolist():
        texts = ((name, tags[name][at].as_py()) for name in sorted(tags))
        key = ",".join(f"{name}={text}" for name, text in texts if text is not None)
        numbers.append(series.setdefault(key.encode("utf-8", "surrogatepass"), len(series)))
    return np.array(numbers)[inverse.reshape(-1)]


def object_content(table: pa.Table, columns: TreeColumns, *, as_text: bool) -> WindowContent:
    """The cells of an object's rows, under the names that tags and fields have at the source.

    Computed columns are not cells; they are checked, and a row with a wrong one makes the content differ.
    """
    try:
        is_owned = DEVICE in table.column_names
        owner = table.column(DEVICE).cast(pa.string()) if is_owned else pa.nulls(table.num_rows, pa.string())
        names = [name for name in table.column_names if name in columns.tags and name not in TAGS]
        own = [(columns.tag_names[name], table.column(name)) for name in names]
        documented = [
            (name, _or_unknown(table.column(name) if name in table.column_names else None, table.num_rows))
            for name in TAGS
        ]
        rows = row_lanes([(AT, table.column(TIMESTAMP)), (OWNER, owner), *own, *documented])
        total = content_from(table.num_rows, *[0] * len(rows))
        for name in table.column_names:
            if name not in (TIMESTAMP, NANOS, DEVICE, *TAGS, *COMPUTED, *names):
                source = columns.sources.get(name) or name
                total += summed(cell_lanes(rows, source, table.column(name), as_text=as_text), 0)
        wrong = 0 if lost_tags_in(table) else int(np.sum(_wrongly_computed(table)))
    except pa.ArrowException as error:
        raise Permanent(
            f"the rows of an object cannot be compared: {str(error)[:150]}",
            "run verify with --heal, or move the object away: another program wrote it",
        ) from error
    return total + content_from(0, *[wrong] * len(rows))


def _wrongly_computed(table: pa.Table) -> Any:
    """For each row, true when a computed column differs from what the current rule gives; a numpy array."""
    wrong = np.zeros(table.num_rows, bool)
    for name, expected in computed_from(table).items():
        if name not in table.column_names:
            return ~wrong
        held = table.column(name)
        held = held.cast(expected.type) if pa.types.is_string(held.type) else held
        (bits, valid), (due, is_due) = value_bits(held), value_bits(expected)
        wrong |= (valid != is_due) | (valid & (bits != due))
    return wrong


def _or_unknown(texts: pa.Array | pa.ChunkedArray | None, rows: int) -> Any:
    """A documented tag; in an object every row has it."""
    return constant(UNKNOWN, rows) if texts is None else texts.fill_null(UNKNOWN)


def list_days(opened: OpenedExport, partition: str, windows: Sequence[Window]) -> tuple[Listing, Sequence[Record]]:
    """A listing of each day of these windows, and their records, in which missing objects are marked."""
    pipeline = opened.pipeline
    records = pipeline.checkpoints.records(pipeline.name, partition, windows[0].start, windows[-1].end)
    days = {window.start.date(): window for window in windows}.values()
    listed = tuple(each for day in days for each in opened.sink.unfolded(partition, day))
    check_objects(pipeline, partition, records, by_window(listed, windows))
    return listed, records


def objects_of_window(window: Window, listed: Listing) -> Sequence[ObjectInfo]:
    """The objects of one window from its day's listing: its own, and deltas of older versions."""
    return [info for named_at, info in listed if window.start <= named_at < window.end]
