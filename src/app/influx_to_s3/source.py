"""The source of this pipeline: windows of one device as complete batches, with memory bounded by `batch_rows`.

A window is read in slices of about `batch_rows` rows, planned from counts; a slice that turns out far larger is halved.
Of a large open window that this process wrote last, only the part from the first changed bucket on is re-read.
Invariant: a batch holds at least as many values of each field as the source counted before; otherwise it is an error.
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from itertools import chain, groupby
from pathlib import Path
from random import random
from typing import TypeVar

import numpy as np
import pyarrow as pa

from app.core.errors import Permanent, Transient
from app.core.ledger import Tally
from app.core.pipeline import NOTHING, Count, Pipeline, Shrink, Sums, covered_since
from app.core.retry import Pauses, RequestPacer, RetryPolicy, retry
from app.core.windows import EPOCH, Window, windows_between
from app.influx_to_s3.layout import LayoutDocument, TreeColumns
from app.influx_to_s3.point_groups import by_device, by_window, common_rows, sums_by_slot
from app.influx_to_s3.reader import FieldCount, FieldSums, PointColumns, QueryTooLarge, Reader, partition_totals
from app.influx_to_s3.row_batch import BLOCK_ROWS, RowBatch
from app.influx_to_s3.rows import (
    RowComparison,
    canonical_table,
    instants_of,
    merge_in_order,
    merge_ordered,
    nanoseconds_of,
    of_object,
    sums_of,
    union_by_identity,
    whole_instants,
)
from app.object_store.table_sink import EncodedFile, TableSink, lost_tags_in

BUCKETS = 30
OVERFLOW = 4
MAX_SLICE_BYTES = 64 << 20
SHORTEST = timedelta(milliseconds=2)
TOGETHER = 64
T = TypeVar("T")
log = logging.getLogger(__name__)


class InfluxSource:
    """`app.core.pipeline.Source` over a `Reader`.

    `devices` empty = every value of the device tag. At most about `batch_rows` rows are held at a time. `pauses` ends a
    wait for a retry when a stop is requested. `pace` limits the load that queries put on the server.
    """

    def __init__(
        self,
        reader: Reader,
        columns: TreeColumns,
        *,
        devices: Sequence[str],
        batch_rows: int,
        spool_directory: Path,
        pauses: Pauses,
        policy: RetryPolicy,
        pace: RequestPacer | None = None,
    ) -> None:
        self.reader = reader
        self._columns = columns
        self._devices = devices
        self._batch_rows = batch_rows
        self._spool_directory = spool_directory
        self._pauses = pauses
        self._policy = policy
        self._pace = pace
        self._seconds: deque[float] = deque(maxlen=256)
        self._known: dict[datetime, Sequence[str]] = {}

    def partitions(self, since: datetime) -> Sequence[str]:
        """The configured devices that exist, or all devices with points at or after `since`."""
        found, wanted = self._found(since), set(self._devices)
        if not wanted:
            return found
        # A configured device exists even if it has long been silent.
        older = self._found(EPOCH) if wanted - set(found) else ()
        return sorted(wanted & {*found, *older})

    def absent(self, since: datetime) -> Sequence[str]:
        """The configured devices that never had a point."""
        return sorted(set(self._devices) - set(self.partitions(since)))

    def _found(self, since: datetime) -> Sequence[str]:
        """Every value of the device tag, queried once in the life of this source, which is one run."""
        if since not in self._known:
            self._known[since] = self.again(lambda: self.reader.devices(since))
        return self._known[since]

    def counts(self, partition: str | None, windows: Sequence[Window]) -> Mapping[tuple[str, datetime], Count]:
        """One query per run of windows of equal length. Points without the device tag are partition ""."""
        counted: list[FieldCount] = []
        for span, every_seconds in runs_of_one_length(windows):
            counted += self._counted(partition, span, every_seconds)
        return partition_totals(counted)

    def _counted(self, partition: str | None, span: Window, every_seconds: int) -> Sequence[FieldCount]:
        """Falls back to one query per device where the server limits the number of series per query."""
        try:
            return self.again(lambda: list(self.reader.counts(partition, span, every_seconds)))
        except QueryTooLarge:
            if partition is not None:
                raise
            devices = ("", *self._found(span.start))
            return [each for device in devices for each in self._counted(device, span, every_seconds)]

    def sums(
        self, partition: str, windows: Sequence[Window], numbers: Collection[str]
    ) -> Mapping[datetime, Mapping[str, Sums]]:
        """The sums of adjacent windows, by window start and field; totals only for the fields `numbers`.

        One query per run of windows of equal length.
        """
        found: dict[datetime, dict[str, Sums]] = {}
        for span, every_seconds in runs_of_one_length(windows):
            for one in self._summed(partition, span, every_seconds, sorted(numbers)):
                fields = found.setdefault(one.start_at, {})
                fields[one.field] = fields[one.field] + one.sums if one.field in fields else one.sums
        return found

    def _summed(self, partition: str, span: Window, every_seconds: int, numbers: Sequence[str]) -> Sequence[FieldSums]:
        """Returns counts only where the server cannot sum, for example when a sum exceeds a double."""
        try:
            return self.again(lambda: list(self.reader.sums(partition, span, every_seconds, numbers)))
        except (Permanent, Transient) as error:
            log.info("%s %s: is compared by its rows, since InfluxDB cannot add it up: %s", partition, span, error)
            counted = self._counted(partition, span, every_seconds)
            return [FieldSums(one.start_at, one.field, Sums(one.values)) for one in counted]

    def read(self, partition: str, window: Window, count: Count, kept: RowBatch | None) -> RowBatch:
        """The whole window; small ones in one query, large ones slice by slice."""
        cells: Mapping[datetime, int] = {}
        with self._batch(partition) as batch:
            if count.points <= self._batch_rows:
                self._read_span(batch, window, count)
            else:
                cells = self._read_large(batch, window, kept)
                # The counts repeated for the slices may be lower by then.
                check_values(partition, window, batch.sums, count.fields)
            return batch.finish(cells, count.fields)

    def read_each(self, counted: Sequence[tuple[str, Window, Count]]) -> Iterator[RowBatch | None]:
        """Read adjacent small windows of a device, or one window of several devices, with one query.

        The parts cut out for each window are in memory together with the response.
        """
        for run in runs_of_few_rows(counted, self._batch_rows):
            batches: Iterable[RowBatch | None] = [None] * len(run)
            if len(run) > 1:
                try:
                    batches = self._read_run(run)
                except (Transient, Permanent) as error:  # a query that fails for all windows may succeed for each
                    log.debug("%d windows are read alone: %s", len(run), error)
            yield from batches

    def _read_run(self, run: Sequence[tuple[str, Window, Count]]) -> Iterable[RowBatch | None]:
        """The batches of adjacent windows of one device, or of one window of several devices."""
        devices = list(dict.fromkeys(device for device, _, _ in run))
        blocks = self._collect(devices, Window(run[0][1].start, run[-1][1].end))
        if len(devices) > 1:
            slotted = [by_device(block, devices) for block in blocks]
        else:
            slotted = [by_window(block, [window for _, window, _ in run]) for block in blocks]
        slotted = [block for block in slotted if block.bounds[-1]]
        read = sums_by_slot(slotted, len(run))
        rows = common_rows(slotted, self._columns)

        def batch_of(slot: int, device: str, window: Window, count: Count) -> RowBatch | None:
            """None for a batch with fewer values than counted, which is then read alone."""
            try:
                with self._batch(device) as batch:
                    if slot in rows and not lacking(read[slot], count.fields):
                        batch.take(rows[slot], slot, read[slot])
                    else:
                        points = [block.of(slot) for block in slotted if block.has(slot)]
                        found = self._append(batch, window, points, count)
                        check_values(device, window, found, count.fields)
                    return batch.finish({}, count.fields)
            except (Transient, Permanent) as error:
                log.debug("%s %s is read alone: %s", device, window, error)
                return None

        return (batch_of(slot, *each) for slot, each in enumerate(run))

    def union(self, batch: RowBatch, held: Sequence[Iterable[pa.Table]], shrink: Shrink | None = None) -> RowBatch:
        """See `app.core.pipeline.Source.union`; each of `held` is the ordered rows of one object."""
        columns, comparison = self._columns, RowComparison(self._columns, shrink)
        objects: list[Iterable[pa.Table]] = []
        for tables in held:
            rows = (table for table in tables if table.num_rows)
            first = next(rows, None)
            if first is not None:
                comparison.lost_tags |= lost_tags_in(first)
                objects.append(of_object(table, columns) for table in chain([first], rows))
        whole = self.spooled(
            batch.device, union_by_identity(batch.tables(), merge_in_order(objects, columns), columns, comparison)
        )

        def account(name: str, tally: Tally) -> Tally:
            there = tally.already_there + comparison.same[name]
            return replace(tally, new=comparison.new[name], already_there=there, corrected=comparison.corrected[name])

        whole.accounts = {name: account(name, tally) for name, tally in batch.accounts.items()}
        whole.sums, whole.disagreements = batch.sums, batch.disagreements
        whole.has_all_tags = batch.has_all_tags and (not comparison.lost_tags or whole.rows == batch.rows)
        whole.new_rows, whole.corrected_rows = comparison.new_rows, comparison.changed_rows
        return whole

    @contextmanager
    def _batch(self, device: str) -> Iterator[RowBatch]:
        """A batch to be filled; closed if the block raises."""
        batch = RowBatch(device, self._spool_directory, self._batch_rows, self._columns)
        with ExitStack() as undo:
            undo.callback(batch.close)
            yield batch
            undo.pop_all()

    def spooled(self, device: str, tables: Iterable[pa.Table]) -> RowBatch:
        """A batch of rows that are already in canonical order."""
        with self._batch(device) as batch:
            for table in whole_instants(tables):
                batch.append(table)
            return batch.finish({}, {})

    def _read_large(self, batch: RowBatch, window: Window, kept: RowBatch | None) -> Mapping[datetime, int]:
        """Read slices planned from fine counts, after the part of `kept` before the first changed bucket."""
        every_seconds = bucket_seconds(window)
        counted = partition_totals(self.again(lambda: list(self.reader.counts(batch.device, window, every_seconds))))
        counts = {start: count for (_, start), count in counted.items()}
        cells = {start: count.cells for start, count in counts.items()}
        start = first_change(kept.cells, cells, window, every_seconds) if kept else window.start
        if kept is not None:
            for table in whole_instants(kept.tables()):
                earlier = rows_before(table, nanoseconds_of(start))
                fields = ((name, self._columns.sources.get(name)) for name in earlier.column_names)
                batch.append(earlier, sums_of((field, earlier.column(name)) for name, field in fields if field))
        if start < window.end:
            for part, count in slices(Window(start, window.end), every_seconds, counts, self._batch_rows):
                self._read_span(batch, part, count)
        return cells

    def _read_span(self, batch: RowBatch, span: Window, count: Count) -> None:
        """Append a span, which must hold at least what was counted; halve it while it is too large for the server."""
        waiting, read = deque([span]), dict[str, Sums]()
        while waiting:
            part = waiting.popleft()
            try:
                blocks = self._collect((batch.device,), part)
            except QueryTooLarge as error:
                if part.end - part.start < SHORTEST:
                    hint = "lower EXPORT_BATCH_SIZE"
                    raise QueryTooLarge(f"{batch.device} has too many rows in {part}", hint) from error
                middle = part.start + (part.end - part.start) / 2
                waiting.extendleft([Window(middle, part.end), Window(part.start, middle)])
                continue
            for field, sums in self._append(batch, part, blocks, count, is_whole=part == span).items():
                read[field] = read[field] + sums if field in read else sums
        check_values(batch.device, span, read, count.fields)

    def _append(
        self, batch: RowBatch, span: Window, blocks: Sequence[PointColumns], count: Count, *, is_whole: bool = True
    ) -> Mapping[str, Sums]:
        """Append what was read of a span, plus empty strings, which Flux returns as absent. Returns the sums of both.

        If the counts cover more than this span, they do not show which strings are missing: each possible text field is
        queried.
        """
        read = sums_of(field for block in blocks for field in block.fields)
        if is_whole:
            asked = lacking(read, count.fields)
        else:
            others = {name for block in blocks for name, values in block.fields if values.type != pa.string()}
            asked = count.fields.keys() - others
        for name in sorted(asked):
            texts = self.again(lambda name=name: list(self.reader.empty_texts(batch.device, span, name)))  # type: ignore[misc]
            blocks = [*blocks, *texts]
        if asked:
            read = sums_of(field for block in blocks for field in block.fields)
        if tables := [canonical_table(block, self._columns) for block in blocks if len(block.times)]:
            table, disagreements, twice = merge_ordered(tables, self._columns)
            batch.append(table, read, twice, disagreements)
        return read

    def _collect(self, devices: Sequence[str], span: Window) -> Sequence[PointColumns]:
        """One response, held in memory, with a limit that holds even if the counts are outdated."""
        limit = max(self._batch_rows, BLOCK_ROWS) * OVERFLOW

        def collect() -> Sequence[PointColumns]:
            blocks: list[PointColumns] = []
            size_bytes = rows = 0
            for block in self.reader.rows_of(devices, span):
                blocks.append(block)
                rows += len(block.times)
                size_bytes += sum(
                    values.nbytes for values in (block.times, *block.tags.values(), *dict(block.fields).values())
                )
                if rows > limit or (size_bytes > MAX_SLICE_BYTES and rows > 1):
                    hint = "no action needed; a shorter range is read"
                    raise QueryTooLarge(f"{', '.join(devices)[:200]} has too many rows in {span}", hint)
            return blocks

        return self.again(collect)

    def again(self, action: Callable[[], T]) -> T:
        """Run the query `action`, retrying while it fails for a transient reason."""

        def ask() -> T:
            began = time.monotonic()
            answer = action() if self._pace is None else self._pace.ask(action)
            self._seconds.append(time.monotonic() - began)
            return answer

        return retry(ask, self._policy, self._pauses, random)

    def covered_since(self, clock: Callable[[], datetime]) -> datetime:
        """The time from which the source is complete: a point missing since then was deleted, not expired.

        Call it after reading the rows. It is queried each time, since retention may change during a run and the oldest
        point moves whenever a shard group is dropped. A clock behind the server's would mistake expired points for
        deleted ones, so the later of the two clocks counts.
        """
        found = self.again(self.reader.retention)
        now = clock()
        return covered_since(max(now, found.told_at or now), found.period, found.oldest_at)

    def latency_seconds(self) -> float | None:
        """The mean query time since the last call, None if there were no queries."""
        seconds = [self._seconds.popleft() for _ in range(len(self._seconds))]
        return sum(seconds) / len(seconds) if seconds else None


@dataclass(frozen=True, slots=True)
class OpenedExport:
    """The pipeline of one run, whose pauses end with that run. `now`: windows that start later may not be written.
    `cursors`: those of all devices when the run began.
    """

    tree: LayoutDocument
    now: datetime
    columns: TreeColumns
    source: InfluxSource
    sink: TableSink
    pipeline: Pipeline[RowBatch, EncodedFile]
    cursors: Mapping[str, datetime]


def lacking(read: Mapping[str, Sums], counted: Mapping[str, int]) -> AbstractSet[str]:
    """The fields of which fewer values arrived than were counted before."""
    return {name for name, values in counted.items() if name not in read or read[name].values < values}


def check_values(device: str, span: Window, read: Mapping[str, Sums], counted: Mapping[str, int]) -> None:
    """Raises Transient when fewer values of a field arrived than were counted before."""
    for field, values in counted.items():
        found = read[field].values if field in read else 0
        if found < values:
            raise Transient(
                f"InfluxDB sent {found} values of {field} of {device} {span} but had counted {values}",
                "no action needed; it is retried. If it stays, points were deleted meanwhile, or answers are cut",
            )


def runs_of_one_length(windows: Sequence[Window]) -> Iterator[tuple[Window, int]]:
    """Merge adjacent windows of equal length into spans, each with that length: the grid may change at a midnight."""
    for seconds, run in groupby(windows, key=lambda window: window.seconds):
        together = list(run)
        yield Window(together[0].start, together[-1].end), seconds


def runs_of_few_rows(
    counted: Iterable[tuple[str, Window, Count]], rows: int
) -> Iterator[Sequence[tuple[str, Window, Count]]]:
    """Group up to TOGETHER adjacent windows of one device and day, or one window of several devices, while they have at
    most `rows` points; anything else is alone.

    At most one day: a field may change its type between shards of the source, and one query must not span both types.
    """
    run: list[tuple[str, Window, Count]] = []
    points = 0
    for device, window, count in counted:
        if run:
            (first, _, _), (other, before, _) = run[0], run[-1]
            follows = before.end == window.start and before.start.date() == window.start.date()
            together = (first == other == device and follows) or (
                before == window and other != device and (first != other or len(run) == 1)
            )
            if not together or points + count.points > rows or len(run) == TOGETHER:
                yield run
                run, points = [], 0
        run.append((device, window, count))
        points += count.points
    if run:
        yield run


def bucket_seconds(window: Window) -> int:
    """The shortest bucket length, in whole seconds, that divides the window into at most BUCKETS buckets."""
    return next(n for n in range(max(1, window.seconds // BUCKETS), window.seconds + 1) if window.seconds % n == 0)


def first_change(
    before_cells: Mapping[datetime, int], cells: Mapping[datetime, int], window: Window, every_seconds: int
) -> datetime:
    """From where a window must be re-read: one bucket before the first whose count changed; its end if none did.

    The extra bucket covers points with the latest timestamps that were overwritten field by field.
    """
    every = timedelta(seconds=every_seconds)
    changed = [start for start in {*before_cells, *cells} if before_cells.get(start) != cells.get(start)]
    return max(window.start, min(changed) - every) if changed else window.end


def rows_before(table: pa.Table, until_ns: int) -> pa.Table:
    """The ordered rows that are older than `until_ns`."""
    return table.slice(0, int(np.searchsorted(instants_of(table), until_ns, side="left")))


def slices(
    span: Window, every_seconds: int, counts: Mapping[datetime, Count], batch_rows: int
) -> Iterator[tuple[Window, Count]]:
    """Parts that cover `span` without gaps, each of about `batch_rows` points, with their counts."""
    start, total = span.start, NOTHING
    for bucket in windows_between(span.start, span.end, every_seconds):
        here = counts.get(bucket.start, NOTHING)
        if total.points and total.points + here.points > batch_rows:
            yield Window(start, bucket.start), total
            start, total = bucket.start, NOTHING
        fields = {name: total.fields.get(name, 0) + here.fields.get(name, 0) for name in {*total.fields, *here.fields}}
        total = Count(total.cells + here.cells, total.points + here.points, fields)
    yield Window(start, span.end), total
