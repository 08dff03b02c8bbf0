"""Set aside what no object can hold, as line protocol stored with the data, so that nothing is dropped silently.

Line protocol is InfluxDB's own form of a point, so it loses nothing: all tags, the type of each value, and the
timestamp in nanoseconds. Source: the InfluxDB documentation, "Line protocol".

Points without the device tag, and those of devices whose id cannot name an object, are set aside. Points in the far
future wait for their window; those of a clock that was never set are set aside. A run that finds no points queries the
inventory, and fails when a setting is wrong.
"""

import logging
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import islice
from typing import Any, BinaryIO, cast

import pyarrow as pa

from app.config.settings import Settings
from app.core.errors import Permanent
from app.core.ledger import Ledger, SetAside, Tally
from app.core.pipeline import Commit, Count, Pipeline, Position
from app.core.runs import Context, Report
from app.core.sync import ledger_of_counts
from app.core.windows import DAY_SECONDS, Age, Window, age_of, floor_to
from app.influx_to_s3.reader import PointColumns, QueryTooLarge, partition_totals
from app.influx_to_s3.row_batch import RowBatch
from app.influx_to_s3.source import SHORTEST, InfluxSource, OpenedExport
from app.object_store.set_aside import LINES, SetAsideResult, SetAsideStore
from app.object_store.table_sink import EncodedFile

NO_DEVICE_TAG = "no device tag"
REFUSED_ID = "device id cannot name an object"
OTHER_VALUE = "another value in a point that differs only in ignored tags"
CLOCK_NOT_SET = "timestamp before the year 2000"
NAME_ESCAPES = str.maketrans({",": "\\,", "=": "\\=", " ": "\\ "})
MEASUREMENT_ESCAPES = str.maketrans({",": "\\,", " ": "\\ "})
MEMORY_BYTES = 1 << 20
NO_DEVICE = "(no device tag)"
TEXT_ESCAPES = str.maketrans({'"': '\\"', "\\": "\\\\"})

ExportPipeline = Pipeline[RowBatch, EncodedFile]

OLDEST_AT = datetime(1678, 1, 1, tzinfo=UTC)  # InfluxDB's timestamps are int64 nanoseconds
NEWEST_AT = datetime(2262, 4, 11, tzinfo=UTC)
CLOCKS_SET_AT = datetime(2000, 1, 1, tzinfo=UTC)
NAMED = 20
DAYS = 64  # of each device with an unset clock, kept in one run
log = logging.getLogger(__name__)


def line(measurement: str, tags: Mapping[str, str], fields: Mapping[str, Any], instant_ns: int) -> str:
    """One point. `fields`: bool, int, float and str values, never null."""
    series = "".join(
        f",{name.translate(NAME_ESCAPES)}={text.translate(NAME_ESCAPES)}" for name, text in sorted(tags.items())
    )
    # In a field's key InfluxDB reads `\"` as `"` alone, unlike in a tag.
    keys = {name: name.translate(NAME_ESCAPES).replace('\\"', '\\\\"') for name in fields}
    values = ",".join(f"{keys[name]}={_value(value)}" for name, value in sorted(fields.items()))
    return f"{measurement.translate(MEASUREMENT_ESCAPES)}{series} {values} {instant_ns}"


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return f"{value}i" if value < 1 << 63 else f"{value}u"
    if isinstance(value, float):
        return repr(value)
    return f'"{value.translate(TEXT_ESCAPES)}"'


def lines_of(points: PointColumns, measurement: str, own: Mapping[str, str]) -> Iterator[str]:
    """Each point of a block as a line. `own`: the device tag, which `points` omits."""
    times = points.times.cast(pa.int64()).to_pylist()
    tags = {name: texts.to_pylist() for name, texts in points.tags.items()}
    fields = [(name, values.to_pylist()) for name, values in points.fields]
    for row, instant_ns in enumerate(times):
        there = {name: texts[row] for name, texts in tags.items() if texts[row] is not None}
        values = {name: some[row] for name, some in fields if some[row] is not None}
        if values:
            yield line(measurement, {**own, **there}, values, instant_ns)


@dataclass(slots=True)
class _UnsetClock:
    """What a run keeps of a device whose clock was never set: values by field that still wait, the number of new ones,
    and of days. `is_full`: other days wait for the next run. `is_kept`: the store took all of it.
    """

    waiting: Counter[str]
    new: int = 0
    sample: str = ""
    days: int = 0
    is_full: bool = False
    is_kept: bool = True


class SetAsidePoints:
    """Keeps points of one measurement as line protocol, one object per reason, device and window.

    Remembers how many values of each window this process has set aside.
    """

    def __init__(self, store: SetAsideStore, *, measurement: str, device_tag: str) -> None:
        self._store = store
        self._measurement = measurement
        self._device_tag = device_tag
        self._known: dict[tuple[str, datetime], int] = {}

    def keep_values(self, device: str, window: Window, batch: RowBatch) -> Sequence[SetAside]:
        """Keep the values that conflict with others in the batch of one window, each as a separate point."""
        if not batch.disagreements:
            return ()
        own = self._own(device)
        lines = [
            line(self._measurement, {**own, **each.tags}, {each.field: each.value}, each.instant_ns)
            for each in batch.disagreements
        ]
        content = "".join(f"{each}\n" for each in lines).encode("utf-8", "surrogatepass")
        kept = self._store.keep(
            _name(device, window), content, content_type=LINES, reason=OTHER_VALUE, number=len(lines), sample=lines[0]
        )
        return (kept.entry,)

    def knows(self, device: str) -> bool:
        """True when points of this device have been set aside before."""
        return self._store.holds(_owner(device))

    def keep_points(
        self, reason: str, device: str, window: Window, blocks: Iterable[PointColumns]
    ) -> tuple[SetAsideResult, Mapping[str, int]]:
        """Keep points of one window unchanged. Returns the result and the number of values per field.

        `device` "" = the points without the device tag. Many lines are buffered in a temporary file.
        """
        read: dict[str, int] = {}
        sample = ""
        with tempfile.SpooledTemporaryFile(MEMORY_BYTES) as file:
            for block in blocks:
                for field, number in block.numbers.items():
                    read[field] = read.get(field, 0) + number
                for each in lines_of(block, self._measurement, self._own(device)):
                    sample = sample or each
                    file.write(f"{each}\n".encode("utf-8", "surrogatepass"))
            file.seek(0)
            kept = self._store.keep(
                _name(device, window),
                cast("BinaryIO", file),
                content_type=LINES,
                reason=reason,
                number=sum(read.values()),
                sample=sample,
            )
        return kept, read

    def sync_refused(
        self,
        pipeline: ExportPipeline,
        source: InfluxSource,
        context: Context,
        at: Position,
        live: Mapping[datetime, Count],
    ) -> Report:
        """One step of a partition that cannot have objects.

        Sets aside the points of its due windows from the cursor on, and of live windows whose count changed. The cursor
        follows.
        """
        grid, device = pipeline.grid, at.partition
        windows = list(islice(grid.windows(at.cursor_at, at.now), grid.count_windows))
        due = [window for window in windows if age_of(window, at.now, grid.grace_seconds) is Age.DUE]
        counts = {start: count for (_, start), count in source.counts(device, due).items()} if due else {}
        report = Report(more=len(windows) == grid.count_windows)
        reason, sample = (REFUSED_ID, f"device id {device[:80]!r}") if device else (NO_DEVICE_TAG, "")
        for window in windows:
            context.stop.check()
            is_due = bool(due) and window.start <= due[-1].start
            count = (counts if is_due else live).get(window.start)
            if count is None:
                continue
            if self._known.get((device, window.start)) == count.cells or context.dry_run:
                report += _accounted(pipeline, count.fields, SetAside(reason, count.cells, 0, sample))
                continue
            # A device that cannot have objects is reported as new once, not with every point.
            is_known = bool(device) and self.knows(device)
            kept, read = self.keep_points(reason, device, window, _points(source, device, window, count))
            if kept.key:
                self._known[device, window.start] = count.cells
            log.debug("%r %s: %d values set aside: %s", device, window, kept.number, reason)
            new = 0 if is_known else kept.new
            report += _accounted(pipeline, read, SetAside(reason, kept.number, new, sample or kept.entry.sample))
        if due and not context.dry_run:
            pipeline.checkpoints.commit(pipeline.name, device, Commit(cursor_at=due[-1].end), context.lease)
        return report

    def account_outside(self, opened: OpenedExport, context: Context) -> Report:
        """Account for points outside all windows of a run.

        Future points wait for their windows; points from before CLOCKS_SET_AT are kept as line protocol, by day.
        """
        pipeline = opened.pipeline
        future = _outside(opened, Window(pipeline.grid.window_at(opened.now).end, NEWEST_AT))
        report = Report(ledger=ledger_of_counts(pipeline.unit, future.values(), "waiting"))
        if opened.tree.first_start_at < CLOCKS_SET_AT:
            return report  # an export that starts this early includes these points
        unset = Window(OLDEST_AT, CLOCKS_SET_AT)
        found = {device: count for (device, _), count in _outside(opened, unset).items()}
        clocks = {
            device: _UnsetClock(Counter(count.fields))
            for device, count in found.items()
            if self._known.get((device, unset.end)) != count.cells and not context.dry_run
        }
        for day, counts in _days(opened, unset) if clocks else ():
            for device in sorted(counts.keys() & clocks.keys()):
                context.stop.check()
                self._keep_day(opened.source, device, day, counts[device], clocks[device])
            if all(clock.is_full for clock in clocks.values()):
                break
        for device, count in found.items():
            clock = clocks.get(device, _UnsetClock(Counter()))
            left = +clock.waiting
            if device in clocks and clock.is_kept and not left:
                self._known[device, unset.end] = count.cells
            done = Counter(count.fields) - left
            report += _accounted(pipeline, done, SetAside(CLOCK_NOT_SET, done.total(), clock.new, clock.sample))
            report += Report(ledger=ledger_of_counts(pipeline.unit, [Count(0, 0, left)], "waiting"))
        return report

    def _keep_day(self, source: InfluxSource, device: str, day: Window, count: Count, clock: "_UnsetClock") -> None:
        """Keep one day of a device whose clock was never set, unless it is kept already or DAYS others were."""
        if self._known.get((device, day.start)) != count.cells:
            clock.is_full = clock.days == DAYS
            if clock.is_full:
                return
            kept, _ = self.keep_points(CLOCK_NOT_SET, device, day, _points(source, device, day, count))
            log.debug("%r %s: %d values set aside: %s", device, day, kept.number, CLOCK_NOT_SET)
            clock.days += 1
            clock.new += kept.new
            clock.sample = clock.sample or kept.entry.sample
            if kept.key:
                self._known[device, day.start] = count.cells
            else:
                clock.is_kept = False
        clock.waiting.subtract(count.fields)

    def _own(self, device: str) -> Mapping[str, str]:
        return {self._device_tag: device} if device else {}


def _outside(opened: OpenedExport, span: Window) -> Mapping[tuple[str, datetime], Count]:
    """Counts of a long span by device, without devices that the settings leave out."""
    found = opened.source.again(lambda: list(opened.source.reader.outside(span)))
    is_wanted = opened.pipeline.is_wanted
    return partition_totals(each for each in found if not each.device or is_wanted(each.device))


def _owner(device: str) -> str:
    return f"device_id={device}" if device else NO_DEVICE


def _name(device: str, window: Window) -> tuple[str, ...]:
    return _owner(device), f"{window.start:%Y-%m-%d}", f"{window.start:%H%M%S}"


def absent_devices(opened: OpenedExport, settings: Settings) -> Mapping[str, tuple[str, str]]:
    """Configured devices without any points, each with message and hint."""
    source = opened.source
    absent = source.absent(opened.tree.first_start_at)
    influx, inventory = settings.influx, source.again(source.reader.inventory) if absent else None
    if inventory is None or not inventory.has_points:
        return {}
    there = _named(inventory.devices) or "none"
    message = f"no point of {influx.measurement!r} has this value of the tag {influx.device_tag!r}"
    return dict.fromkeys(absent, (message, f"correct DEVICE_IDS; devices are: {there}"))


def refuse_wrong_settings(opened: OpenedExport, settings: Settings) -> None:
    """Check the settings when nothing was found.

    Raises Permanent, listing what exists, when a setting names something that does not exist while others do. An empty
    source, or one without points in the queried span, is not an error.
    """
    measurement, tag = settings.influx.measurement, settings.influx.device_tag
    wanted = settings.export.device_ids
    there = opened.source.again(opened.source.reader.inventory)
    if there.measurements and measurement not in there.measurements:
        known = _named(there.measurements)
        raise Permanent(f"measurement {measurement!r} does not exist", f"set INFLUXDB_MEASUREMENT to one of: {known}")
    if not there.has_points and there.policies:
        raise Permanent(
            f"measurement {measurement!r} has no points in this retention policy",
            f"set INFLUXDB_RETENTION_POLICY to one that has: {_named(there.policies)}",
        )
    if there.has_points and not there.devices:
        raise Permanent(
            f"no point of measurement {measurement!r} has the tag {tag!r}",
            f"set INFLUXDB_DEVICE_TAG to the tag that names the device; tags are: {_named(there.tags) or 'none'}",
        )
    if there.devices and wanted and not opened.source.partitions(opened.tree.first_start_at):
        raise Permanent(
            f"none of the devices in DEVICE_IDS ({_named(wanted)}) has a point in {measurement!r}",
            f"correct DEVICE_IDS, or set it to *; devices are: {_named(there.devices)}",
        )


def _named(names: Sequence[str]) -> str:
    """Names for display; those that would not be read as one word are quoted."""
    shown = [name if name.isprintable() and not {" ", ","} & set(name) else repr(name) for name in names[:NAMED]]
    return ", ".join([*shown, *([f"and {len(names) - NAMED} more"] if len(names) > NAMED else [])])


def _points(source: InfluxSource, device: str, window: Window, count: Count) -> Iterator[PointColumns]:
    """All points of a window; empty strings, which Flux returns as absent, as separate points."""
    read: Counter[str] = Counter()
    for block in _blocks(source, device, window):
        read.update(block.numbers)
        yield block
    for field, values in count.fields.items():
        if read[field] < values:
            yield from source.reader.empty_texts(device, window, field)


def _blocks(source: InfluxSource, device: str, span: Window) -> Iterator[PointColumns]:
    """The points of a span, which is halved while it is too large for the server."""
    is_begun = False
    try:
        for block in source.reader.rows(device, span):
            is_begun = True
            yield block
    except QueryTooLarge:
        if is_begun or span.end - span.start < SHORTEST:
            raise
        middle = span.start + (span.end - span.start) / 2
        yield from _blocks(source, device, Window(span.start, middle))
        yield from _blocks(source, device, Window(middle, span.end))


def _accounted(pipeline: ExportPipeline, fields: Mapping[str, int], aside: SetAside) -> Report:
    tallies = {name: Tally(counted=number, read=number, set_aside=number) for name, number in fields.items()}
    return Report(ledger=Ledger(pipeline.unit, tallies, (aside,)))


def _days(opened: OpenedExport, span: Window) -> Iterator[tuple[Window, Mapping[str, Count]]]:
    """The UTC days of a long span that have points, with the counts by device; found by bisection."""
    found = {device: count for (device, _), count in _outside(opened, span).items()}
    if not found:
        return
    if span.seconds <= DAY_SECONDS:
        yield span, found
        return
    middle = floor_to(span.start + (span.end - span.start) / 2, DAY_SECONDS)
    if middle <= span.start:
        middle = span.start + timedelta(days=1)
    yield from _days(opened, Window(span.start, middle))
    yield from _days(opened, Window(middle, span.end))
