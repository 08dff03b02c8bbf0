"""The source of this pipeline: windows of one device as complete batches, with memory bounded by `batch_rows`.

A window is read in slices of about `batch_rows` rows, planned from counts; one that turns out far larger is halved.
Of a large open window that this very process last wrote, only the part from the first changed bucket on is read again.
Invariant: a batch holds at least as many points as the source counted before, or it is an error.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from app.core.errors import Permanent, Transient
from app.core.ports import Count
from app.core.retry import Pauses, RetryPolicy, retry
from app.core.sync import NOTHING
from app.core.window import Window, windows_between
from app.influx_to_s3.reader import Counted, QueryTooLarge, Reader
from app.influx_to_s3.rows import instants_of, lacking, nanoseconds_of, of_object, ordered, united
from app.influx_to_s3.spool import BLOCK_ROWS, RowBatch, Spool

if TYPE_CHECKING:
    import pyarrow as pa

BUCKETS = 30
OVERFLOW = 4
MAX_SLICE_BYTES = 64 << 20
SHORTEST = timedelta(milliseconds=2)
T = TypeVar("T")
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Reading:
    """How the source is read. `devices` empty = all that the tag knows."""

    measurement: str
    devices: Sequence[str]
    batch_rows: int
    spool_directory: Path


@dataclass(frozen=True, slots=True)
class Patience:
    """How failures that may pass are met."""

    policy: RetryPolicy
    pauses: Pauses
    draw: Callable[[], float]


class InfluxSource:
    """`app.core.ports.Source` over a `Reader`."""

    def __init__(self, reader: Reader, reading: Reading, patience: Patience) -> None:
        self._reader = reader
        self._reading = reading
        self._patience = patience

    def partitions(self, since: datetime) -> Sequence[str]:
        """The configured devices, or every one that the source knows. Raises Permanent for an unknown measurement."""
        if self._reading.devices:
            return sorted(set(self._reading.devices))
        devices = self._again(lambda: self._reader.devices(since))
        if not devices:
            self._check_measurement()
        return devices

    def counts(self, partition: str | None, windows: Sequence[Window]) -> Mapping[tuple[str, datetime], Count]:
        """One question per run of windows of one length. Raises Permanent for an unknown measurement."""
        counted: list[Counted] = []
        for span in runs_of_one_length(windows):
            every_seconds = next(window.seconds for window in windows if window.start == span.start)
            counted += self._again(lambda s=span, n=every_seconds: list(self._reader.counts(partition, s, n)))  # type: ignore[misc]
        found = totals(counted)
        if partition is None and not found:
            self._check_measurement()
        nameless = sum(count.points for (device, _), count in found.items() if not device)
        if nameless:
            log.warning("%d points of %s have no device_id and cannot be exported", nameless, self._reading.measurement)
        return {slot: count for slot, count in found.items() if slot[0]}

    def read(self, partition: str, window: Window, count: Count, kept: RowBatch | None) -> RowBatch:
        """The whole window; small ones in one question, large ones slice by slice."""
        cells: Mapping[datetime, int] = {}
        with self._spool(partition) as spool:
            if count.points <= self._reading.batch_rows:
                self._read_whole(spool, window, count.points)
            else:
                cells = self._read_large(spool, window, kept)
            return spool.finish(cells)

    def read_each(self, partition: str, counted: Sequence[tuple[Window, Count]]) -> Iterator[RowBatch]:
        """Adjacent small windows in one question of a batch at most; what is cut out is held beside the answer."""
        for run in runs_of_few_rows(counted, self._reading.batch_rows):
            tables = self._collect_run(partition, Window(run[0][0].start, run[-1][0].end)) if len(run) > 1 else None
            for window, count in run:
                yield (
                    self.read(partition, window, count, None)
                    if tables is None
                    else self._cut_out(partition, window, count, tables)
                )

    def union(self, batch: RowBatch, held: "Iterable[pa.Table]") -> RowBatch:
        """`batch` with the held rows whose timestamp it lacks."""
        return self._spooled(batch.device, united(batch.tables(), map(of_object, held)))

    def missing(self, batch: RowBatch, held: "Iterable[pa.Table]") -> RowBatch:
        """The rows of `batch` whose timestamp no held row has. Holds 8 bytes per held row."""
        import numpy as np

        known = [instants_of(of_object(table)) for table in held]
        instants = np.concatenate(known) if known else np.empty(0, np.int64)
        return self._spooled(batch.device, (lacking(table, instants) for table in batch.tables()))

    @contextmanager
    def _spool(self, device: str) -> Iterator[Spool]:
        """What is not finished inside the block is removed."""
        spool = Spool(device, self._reading.spool_directory, self._reading.batch_rows)
        with ExitStack() as undo:
            undo.callback(spool.abandon)
            yield spool
            undo.pop_all()

    def _spooled(self, device: str, tables: "Iterable[pa.Table]") -> RowBatch:
        with self._spool(device) as spool:
            for table in tables:
                spool.append(table)
            return spool.finish({})

    def _read_large(self, spool: Spool, window: Window, kept: RowBatch | None) -> Mapping[datetime, int]:
        """Slices planned from fine counts, on top of what is kept before the first bucket that changed."""
        every_seconds = bucket_seconds(window)
        counts = self._fine_counts(spool.device, window, every_seconds)
        cells = {start: count.cells for start, count in counts.items()}
        start = first_change(kept.cells, cells, window, every_seconds) if kept else window.start
        if kept is not None:
            for table in kept.tables():
                spool.append(before(table, nanoseconds_of(start)))
        if start < window.end:
            for part, points in slices(Window(start, window.end), every_seconds, counts, self._reading.batch_rows):
                self._read_whole(spool, part, points)
        return cells

    def _fine_counts(self, device: str, window: Window, every_seconds: int) -> Mapping[datetime, Count]:
        counted = self._again(lambda: list(self._reader.counts(device, window, every_seconds)))
        return {start: count for (_, start), count in totals(counted).items()}

    def _collect_run(self, device: str, span: Window) -> "list[pa.Table] | None":
        """None when the windows have to be asked for one by one: what fails for all may do for each."""
        try:
            return self._again(lambda: self._collect(device, span))
        except Permanent:
            return None

    def _cut_out(self, device: str, window: Window, count: Count, tables: "Sequence[pa.Table]") -> RowBatch:
        """The batch of one window out of an answer over several."""
        parts = [part for table in tables if (part := within(table, window)).num_rows]
        check_points(device, window, sum(part.num_rows for part in parts), count.points)
        return self._spooled(device, [ordered(parts)] if parts else [])

    def _read_whole(self, spool: Spool, span: Window, expected_points: int) -> None:
        """Append a span, which must hold at least what was counted; halved while the server finds it too large."""
        check_points(spool.device, span, self._read_halving(spool, span), expected_points)

    def _read_halving(self, spool: Spool, span: Window) -> int:
        """The number of points that were appended."""
        try:
            tables = self._again(lambda: self._collect(spool.device, span))
        except QueryTooLarge:
            if span.end - span.start < SHORTEST:
                raise
            middle = span.start + (span.end - span.start) / 2
            points = self._read_halving(spool, Window(span.start, middle))
            return points + self._read_halving(spool, Window(middle, span.end))
        if tables:
            spool.append(ordered(tables))
        return sum(table.num_rows for table in tables)

    def _collect(self, device: str, span: Window) -> "list[pa.Table]":
        """One answer, held in memory, within a limit that counts taken too early cannot break."""
        tables: list[pa.Table] = []
        size_bytes = 0
        limit = max(self._reading.batch_rows, BLOCK_ROWS) * OVERFLOW
        rows = 0
        for table in self._reader.rows(device, span):
            tables.append(table)
            rows += table.num_rows
            size_bytes += table.nbytes
            if rows > limit or (size_bytes > MAX_SLICE_BYTES and rows > 1):
                raise QueryTooLarge(f"{device} has too many rows in {span}", "a shorter range is tried by itself")
        return [table for table in tables if table.num_rows]

    def _check_measurement(self) -> None:
        known = self._again(self._reader.measurements)
        if known and self._reading.measurement not in known:
            raise Permanent(
                f"measurement {self._reading.measurement!r} does not exist",
                f"set INFLUXDB_MEASUREMENT to one of: {', '.join(known[:20])}",
            )

    def _again(self, action: Callable[[], T]) -> T:
        return retry(action, self._patience.policy, self._patience.pauses, self._patience.draw)


def check_points(device: str, span: Window, points: int, expected_points: int) -> None:
    """Raises Transient when fewer points came than were counted before."""
    if points < expected_points:
        raise Transient(
            f"InfluxDB sent {points} rows of {device} {span} but had counted {expected_points}",
            "the window is read again next time; if it stays, a proxy in between cuts answers",
        )


def totals(counted: Iterable[Counted]) -> Mapping[tuple[str, datetime], Count]:
    """Counts per device and bucket: all values, and as a lower bound of the points the values of the fullest field."""
    fields: dict[tuple[str, datetime], dict[str, int]] = {}
    for one in counted:
        bucket = fields.setdefault((one.device, one.start_at), {})
        bucket[one.field] = bucket.get(one.field, 0) + one.values
    return {slot: Count(sum(values.values()), max(values.values())) for slot, values in fields.items()}


def runs_of_one_length(windows: Sequence[Window]) -> Iterator[Window]:
    """Adjacent windows of one length as one span each, with that length: a grid may change at a midnight."""
    for _, run in groupby(windows, key=lambda window: window.seconds):
        together = list(run)
        yield Window(together[0].start, together[-1].end)


def runs_of_few_rows(counted: Iterable[tuple[Window, Count]], rows: int) -> Iterator[Sequence[tuple[Window, Count]]]:
    """Adjacent windows of one day together while they have at most `rows` points, any other window alone.

    A day at most: a field may change its type only between shards of the source, and one question must not meet both.
    """
    run: list[tuple[Window, Count]] = []
    points = 0
    for window, count in counted:
        together = run and run[-1][0].end == window.start and run[-1][0].start.date() == window.start.date()
        if run and (not together or points + count.points > rows):
            yield run
            run, points = [], 0
        run.append((window, count))
        points += count.points
    if run:
        yield run


def within(table: "pa.Table", window: Window) -> "pa.Table":
    """The rows inside the window, in the order in which they are."""
    import numpy as np
    import pyarrow as pa

    instants = instants_of(table)
    bounds = [nanoseconds_of(window.start), nanoseconds_of(window.end)]
    if np.all(instants[1:] >= instants[:-1]):
        first, last = np.searchsorted(instants, bounds).tolist()
        return table.slice(first, last - first)
    return table.filter(pa.array((instants >= bounds[0]) & (instants < bounds[1])))


def bucket_seconds(window: Window) -> int:
    """The finest length, in whole seconds, of at most BUCKETS buckets that divide the window."""
    return next(n for n in range(max(1, window.seconds // BUCKETS), window.seconds + 1) if window.seconds % n == 0)


def first_change(
    before_cells: Mapping[datetime, int], cells: Mapping[datetime, int], window: Window, every_seconds: int
) -> datetime:
    """From where a window must be read again: one bucket before the first whose count moved, its end if none did.

    The bucket of overlap is for points of the newest instants that were overwritten field by field.
    """
    every = timedelta(seconds=every_seconds)
    changed = [start for start in {*before_cells, *cells} if before_cells.get(start) != cells.get(start)]
    return max(window.start, min(changed) - every) if changed else window.end


def before(table: "pa.Table", until_ns: int) -> "pa.Table":
    """The ordered rows that are older than `until_ns`."""
    import numpy as np

    return table.slice(0, int(np.searchsorted(instants_of(table), until_ns, side="left")))


def slices(
    span: Window, every_seconds: int, counts: Mapping[datetime, Count], batch_rows: int
) -> Iterator[tuple[Window, int]]:
    """Parts that cover `span` without a gap, each of about `batch_rows` points, and how many were counted in it."""
    start, points = span.start, 0
    for bucket in windows_between(span.start, span.end, every_seconds):
        here = counts.get(bucket.start, NOTHING).points
        if points and points + here > batch_rows:
            yield Window(start, bucket.start), points
            start, points = bucket.start, 0
        points += here
    yield Window(start, span.end), points
