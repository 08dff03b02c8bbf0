"""Points that have no place in a device's windows, and settings that find nothing: none of them goes without a word.

Points without the device tag, and those of devices whose id cannot name an object, are set aside as line protocol.
Points of the far future wait for their window; those of a clock that was never set are set aside. A run that finds
nothing asks what there is, and fails when a setting is wrong.
"""

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from itertools import islice
from typing import TYPE_CHECKING, TypeAlias

from app.config.settings import Settings
from app.core.errors import Permanent, Rejected
from app.core.ledger import Ledger, SetAside, Tally
from app.core.pipeline import Commit, Count, Pipeline, Position
from app.core.runs import Context, Report
from app.core.sync import waiting
from app.core.windows import DAY_SECONDS, Age, Window, age_of, floor_to
from app.influx_to_s3.reader import Counted, Inventory, Points, totals
from app.influx_to_s3.set_aside import CLOCK_NOT_SET, NO_DEVICE_TAG, REFUSED_ID, Aside, values_in
from app.object_store.table_sink import EncodedFile, check_device

if TYPE_CHECKING:
    from app.influx_to_s3.source import InfluxSource

ExportPipeline: TypeAlias = "Pipeline[RowBatch, EncodedFile]"
Known = dict[tuple[str, datetime], int]

OLDEST_AT = datetime(1678, 1, 1, tzinfo=UTC)  # InfluxDB's instants are int64 nanoseconds
NEWEST_AT = datetime(2262, 4, 11, tzinfo=UTC)
CLOCKS_SET_AT = datetime(2000, 1, 1, tzinfo=UTC)
NAMED = 20
DAYS = 64  # at most so many days of unset clocks are read in one run
log = logging.getLogger(__name__)


def is_nameable(device: str) -> bool:
    """True for a device whose id can stand in a key."""
    try:
        check_device(device)
    except Rejected:
        return False
    return True


def absent_devices(
    source: "InfluxSource", settings: Settings, first_start_at: datetime
) -> Mapping[str, tuple[str, str]]:
    """Configured devices without any point, each with message and hint."""
    absent = source.absent(first_start_at) if settings.export.device_ids else ()
    if not absent:
        return {}
    influx, inventory = settings.influx, source.again(source.reader.inventory)
    if not inventory.has_points:
        return {}
    there = _named(inventory.devices) or "none"
    message = f"no point of {influx.measurement!r} has this value of the tag {influx.device_tag!r}"
    return dict.fromkeys(absent, (message, f"correct DEVICE_IDS; devices are: {there}"))


def refuse_wrong_settings(source: "InfluxSource", settings: Settings, first_start_at: datetime) -> None:
    """To be asked when nothing was found. Raises Permanent, with what there is, when a setting names something that
    does not exist while others do; an empty source, or one without points in the span asked, is no fault.
    """
    influx, wanted = settings.influx, settings.export.device_ids
    inventory = source.again(source.reader.inventory)
    exist = not wanted or bool(source.partitions(first_start_at))
    fault = _fault(inventory, measurement=influx.measurement, tag=influx.device_tag, wanted=() if exist else wanted)
    if fault:
        raise Permanent(*fault)


def _fault(there: Inventory, *, measurement: str, tag: str, wanted: Sequence[str]) -> tuple[str, str] | None:
    """Message and hint when a setting is wrong, else None. `wanted`: configured devices, when none of them exists."""
    if there.measurements and measurement not in there.measurements:
        known = _named(there.measurements)
        return f"measurement {measurement!r} does not exist", f"set INFLUXDB_MEASUREMENT to one of: {known}"
    if not there.has_points and there.policies:
        return (
            f"measurement {measurement!r} has no points in this retention policy",
            f"set INFLUXDB_RETENTION_POLICY to one that has: {_named(there.policies)}",
        )
    if there.has_points and not there.devices:
        return (
            f"no point of measurement {measurement!r} has the tag {tag!r}",
            f"set INFLUXDB_DEVICE_TAG to the tag that names the device; tags are: {_named(there.tags) or 'none'}",
        )
    if there.devices and wanted:
        return (
            f"none of the devices in DEVICE_IDS ({_named(wanted)}) has a point in {measurement!r}",
            f"correct DEVICE_IDS, or set it to *; devices are: {_named(there.devices)}",
        )
    return None


def _named(names: Sequence[str]) -> str:
    """Some names for a person; those that would not be read as one word are quoted."""
    shown = [name if name.isprintable() and not {" ", ","} & set(name) else repr(name) for name in names[:NAMED]]
    return ", ".join([*shown, *([f"and {len(names) - NAMED} more"] if len(names) > NAMED else [])])


class RefusedPartition:
    """Sets the points of one partition aside that cannot have objects. `known`: values set aside by this process."""

    def __init__(self, aside: Aside, known: Known) -> None:
        self._aside = aside
        self._known = known

    def sync(
        self,
        pipeline: ExportPipeline,
        source: "InfluxSource",
        context: Context,
        at: Position,
        live: Mapping[datetime, Count],
    ) -> Report:
        """One step: due windows from the cursor on, and live ones whose count moved. The cursor follows."""
        grid, device = pipeline.grid, at.partition
        windows = list(islice(grid.windows(at.cursor_at, at.now), grid.count_windows))
        due = [window for window in windows if age_of(window, at.now, grid.grace_seconds) is Age.DUE]
        counts = {start: count for (_, start), count in source.counts(device, due).items()} if due else {}
        report = Report(more=len(windows) == grid.count_windows)
        for window in windows:
            context.stop.check()
            count = counts.get(window.start) if window in due else live.get(window.start)
            if count is not None:
                report += self._set_aside(pipeline, source, context, device=device, window=window, count=count)
        if due and not context.dry_run:
            pipeline.checkpoints.commit(pipeline.name, device, Commit(cursor_at=due[-1].end), context.lease)
        return report

    def _set_aside(
        self,
        pipeline: ExportPipeline,
        source: "InfluxSource",
        context: Context,
        *,
        device: str,
        window: Window,
        count: Count,
    ) -> Report:
        reason = REFUSED_ID if device else NO_DEVICE_TAG
        sample = f"device id {device[:80]!r}" if device else ""
        if self._known.get((device, window.start)) == count.cells or context.dry_run:
            return _accounted(pipeline, count.fields, SetAside(reason, count.cells, 0, sample))
        is_known = bool(device) and self._aside.knows(device)
        kept, read = self._aside.keep_points(reason, device, window, _points(source, device, window, count))
        if kept.key:
            self._known[device, window.start] = count.cells
        log.debug("%r %s: %d values set aside: %s", device, window, kept.number, reason)
        # A device that cannot have objects is news once, and not with each of its points.
        return _accounted(
            pipeline, read, SetAside(reason, kept.number, 0 if is_known else kept.new, sample or kept.entry.sample)
        )


def _points(source: "InfluxSource", device: str, window: Window, count: Count) -> Iterator[Points]:
    """All points of a window; texts that are empty, which Flux's answer shows as absent, as points of their own."""
    read: Counter[str] = Counter()
    for block in source.reader.rows(device, window):
        read.update(values_in(block))
        yield block
    for field, values in count.fields.items():
        if read[field] < values:
            yield from source.reader.empty_texts(device, window, field)


def _accounted(pipeline: ExportPipeline, fields: Mapping[str, int], aside: SetAside) -> Report:
    tallies = {name: Tally(counted=number, read=number, set_aside=number) for name, number in fields.items()}
    return Report(ledger=Ledger(pipeline.unit, tallies, (aside,)))


class OutsidePoints:
    """Accounts for points of the future and of clocks that were never set."""

    def __init__(self, aside: Aside, known: Known) -> None:
        self._aside = aside
        self._known = known

    def account(self, pipeline: ExportPipeline, source: "InfluxSource", context: Context, now: datetime) -> Report:
        """The future waits for its windows; what is from before CLOCKS_SET_AT is kept as line protocol, by day."""
        newest = next(pipeline.grid.windows(now, now + datetime.resolution)).end
        future = totals(source.again(lambda: list(source.reader.outside(Window(newest, NEWEST_AT)))))
        report = Report(ledger=waiting(pipeline.unit, future.values()))
        unset = Window(OLDEST_AT, CLOCKS_SET_AT)
        cursors = [at for name, at in pipeline.checkpoints.cursors(pipeline.name).items() if name]
        if cursors and min(cursors) < CLOCKS_SET_AT:
            return report  # an export that begins that early exports these points
        old = totals(source.again(lambda: list(source.reader.outside(unset))))
        for (device, _), count in old.items():
            report += self._set_aside(pipeline, source, context, device, count)
        return report

    def _set_aside(
        self, pipeline: ExportPipeline, source: "InfluxSource", context: Context, device: str, count: Count
    ) -> Report:
        slot = (device, OLDEST_AT)
        if self._known.get(slot) == count.cells or context.dry_run:
            return _accounted(pipeline, count.fields, SetAside(CLOCK_NOT_SET, count.cells, 0))
        new, sample, left = 0, "", count.cells
        for day in islice(_days(source, device, Window(OLDEST_AT, CLOCKS_SET_AT)), DAYS):
            context.stop.check()
            kept, read = self._aside.keep_points(CLOCK_NOT_SET, device, day, source.reader.rows(device, day))
            new, sample, left = new + kept.new, sample or kept.entry.sample, left - sum(read.values())
        self._known[slot] = count.cells
        log.debug("%r: %d values set aside: %s", device, count.cells, CLOCK_NOT_SET)
        return _accounted(pipeline, count.fields, SetAside(CLOCK_NOT_SET, count.cells, new + max(left, 0), sample))


def _days(source: "InfluxSource", device: str, span: Window) -> Iterable[Window]:
    """The UTC days of a long span in which a device has points, found by halving it."""
    found: Sequence[Counted] = source.again(lambda: list(source.reader.outside(span)))
    if not any(each.device == device and each.values for each in found):
        return
    if span.seconds <= DAY_SECONDS:
        yield span
        return
    middle = floor_to(span.start + (span.end - span.start) / 2, DAY_SECONDS)
    if middle <= span.start:
        middle = span.start + timedelta(days=1)
    yield from _days(source, device, Window(span.start, middle))
    yield from _days(source, device, Window(middle, span.end))
