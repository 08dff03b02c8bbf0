"""The pipeline put together: one job that pulls every configured source; both ends of it compared; its gap map."""

import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING

from app.amplitude.archives import Archive, inflated, opened, read_errors, readable
from app.amplitude.client import Project, project
from app.amplitude.hours import (
    DUE_AFTER,
    NAME,
    UNIT,
    SourceRun,
    hour_key,
    hours_of_week,
    mend_week,
    week_key,
    weeks_between,
)
from app.amplitude.hours import WEEKS as WEEKS_PIPELINE
from app.config.settings import Settings
from app.core.errors import Transient
from app.core.pipeline import Checkpoints
from app.core.runs import Context, Job, Report, Stop
from app.core.verify import NOTHING, Cell, Content, Slot
from app.core.windows import Window
from app.object_store.port import ObjectInfo, ObjectStore
from app.product_events.mapping import Events, KnownEvents, lost
from app.product_events.pull import PartitionRun, PullContext, PullPipeline, pull_context, spool_of, was_had
from app.product_events.verify import (
    PullChart,
    covers,
    damage,
    downloaded,
    ended_hours,
    object_found,
    pull_cells,
    refuse_lost,
    rest_of_day,
)

if TYPE_CHECKING:
    from pydantic import SecretStr

    from app.amplitude.events import Block

KEPT_LINE_BYTES = 1 << 25  # of a line that is too large
OFF = "set AMPLITUDE_WEB_CLIENT_ID or AMPLITUDE_MOBILE_CLIENT_ID, with its secret key"


def build(
    settings: Settings, checkpoints: Checkpoints, store: ObjectStore, warehouse: Events, clock: Callable[[], datetime]
) -> PullPipeline[Mapping[str, Project]]:
    """The pipeline as it is configured; its job is `off` while no source has its keys."""
    given, spool = settings.amplitude, spool_of(settings)
    pairs: Mapping[str, tuple[SecretStr | None, SecretStr | None]] = {
        "web": (given.web_client_id, given.web_secret_key),
        "mobile": (given.mobile_client_id, given.mobile_secret_key),
    }
    known = {
        source: project(given.base_url, client_id.get_secret_value(), secret_key.get_secret_value(), spool)
        for source, (client_id, secret_key) in pairs.items()
        if client_id is not None and secret_key is not None
    }
    pull = pull_context(
        settings,
        name=NAME,
        interval_seconds=given.interval_seconds,
        lookback_days=given.lookback_days,
        unit=UNIT,
        due_after=DUE_AFTER,
        largest_bytes=KEPT_LINE_BYTES,
        checkpoints=checkpoints,
        store=store,
        warehouse=warehouse,
        clock=clock,
    )

    def run_each(context: Context, work: Callable[[SourceRun], Report]) -> Report:
        runs = {source: SourceRun(PartitionRun(pull, context, source), of) for source, of in known.items()}
        return pull.run_each(context, runs, work)

    return PullPipeline(
        name=NAME,
        job=Job(
            NAME, given.interval_seconds, lambda context: run_each(context, SourceRun.pull_due), "" if known else OFF
        ),
        backfill=lambda context, span: run_each(context, lambda source: source.fill(span)),
        verification=lambda stop: AmplitudeEnds(pull, known, stop),
        chart=AmplitudeChart(pull),
        service=known,
    )


# Both ends of the pull: events as the service gives them now, and events of the objects; and the gap map.
#
# Invariants: a day is asked for once however many of its hours are compared, and an hour that differs once more by
# itself; an hour is whole only when the warehouse holds the events of its object; the object of a week is compared with
# what the service gives for the hours that it should hold. An event counts by all that it holds, in whatever order its
# members are written; a line that is not an event counts by its bytes.

WEEKS = ":weeks"
PIECE_BYTES = 1 << 18


@dataclass(frozen=True, slots=True)
class ExportAnswer:
    """An answer of the service that is at hand; `archive` None = it has no events."""

    source: str
    span: Window
    archive: Archive | None


@dataclass(slots=True)
class AmplitudeEnds:
    """`app.core.verify.Ends` over the pull. Partitions are sources, whose windows are hours, and `{source}:weeks`."""

    pull: PullContext
    projects: Mapping[str, Project]
    stop: Stop
    _contents: dict[Slot, Content] = field(default_factory=dict)
    _day: ExportAnswer | None = None
    _held: ExitStack = field(default_factory=ExitStack)

    def partitions(self, _: Window) -> Sequence[str]:
        """See `Ends.partitions`: those that are configured."""
        return sorted(each for source in self.projects for each in (source, source + WEEKS))

    def slots(self, span: Window, partition: str | None) -> Iterator[Slot]:
        """See `Ends.slots`: hours that can be asked for, and weeks that lie in the span whole."""
        end = min(span.end, self.pull.due_at)
        self.pull.spool.mkdir(parents=True, exist_ok=True)
        with self._held:
            for source in self.projects:
                if partition in (None, source):
                    yield from (Slot(source, hour) for hour in ended_hours(self.pull, span))
                if partition in (None, source + WEEKS):
                    weeks = (week for week in weeks_between(span.start, end) if span.start <= week.start)
                    yield from (Slot(source + WEEKS, week) for week in weeks if week.end <= end)

    def source(self, slot: Slot) -> Content:
        """See `Ends.source`. An hour is remembered, since its week asks for it again; a second look asks again."""
        source = slot.partition.removesuffix(WEEKS)
        if source != slot.partition:
            hours = hours_of_week(self.pull, source, slot.window)
            return sum((self._remembered(Slot(source, hour.window)) for hour in hours if was_had(hour)), NOTHING)
        if slot not in self._contents:
            return self._remembered(slot)
        with self._ask(source, slot.window) as answer:
            return self._count(slot, answer)

    def destination(self, slot: Slot) -> Content:
        """See `Ends.destination`. Raises Permanent for an object that is damaged, or whose events are not loaded."""
        source = slot.partition.removesuffix(WEEKS)
        if source != slot.partition:
            week = self.pull.store.head(week_key(source, slot.window))
            return self._content_of_week(week) if week else NOTHING
        hour = self.pull.store.head(hour_key(source, slot.window))
        return self._content_of_object(hour, self.pull.warehouse.known) if hour else NOTHING

    def heal(self, context: Context, slot: Slot) -> Report:
        """See `Ends.heal`. The service is asked once more, after the object was looked at."""
        source = slot.partition.removesuffix(WEEKS)
        run = PartitionRun(self.pull, context, source)
        if source != slot.partition:
            week = self.pull.store.head(week_key(source, slot.window))
            return Report(bytes=mend_week(run, slot.window, week.etag if week else ""), windows=1)
        key = hour_key(source, slot.window)
        there = object_found(key, self.pull.store.head(key), self._content_of_object)
        with self._ask(source, slot.window) as answer:
            given = self._count(slot, answer)
            stays = there.stays(given, run.records(slot.window).get(slot.window.start))
            if stays or answer.archive is None:
                return Report()
            return SourceRun(run, self.projects[source]).mend(answer.archive, there.over(given))

    def _count(self, slot: Slot, answer: ExportAnswer) -> Content:
        """What the service gives for an hour."""
        total = NOTHING
        if answer.archive is not None:
            for packed in answer.archive.streams(answer.archive.hours().get(slot.window.start, ())):
                total += sum(map(content_of_block, self._blocks(inflated(packed))), NOTHING)
        self._contents[slot] = total
        return total

    def _remembered(self, slot: Slot) -> Content:
        """What is known of an hour; else it is asked for, together with what is left of its day."""
        if slot in self._contents:
            return self._contents[slot]
        if self._day is None or not covers(self._day.source, self._day.span, slot):
            self._held.close()
            self._day = None
            span = rest_of_day(slot.window, self.pull.due_at)
            self._day = self._held.enter_context(self._ask(slot.partition, span))
        return self._count(slot, self._day)

    @contextmanager
    def _ask(self, source: str, span: Window) -> Iterator[ExportAnswer]:
        """What the service gives for a span, or for the beginning of it when it cannot give all at once."""
        fetched = next(self.projects[source].fetch_all(span, self.stop))
        with ExitStack() as held:
            held.callback(fetched.close)
            archive = held.enter_context(opened(fetched.file, fetched.span)) if fetched.file else None
            yield ExportAnswer(source, fetched.span, archive)

    def _content_of_object(self, info: ObjectInfo, known: KnownEvents | None = None) -> Content:
        """What the object of an hour holds. Raises Permanent when `known` is given and lacks an event of it."""
        from app.amplitude.events import HourStats, reader

        total, seen, lacking = NOTHING, HourStats(), 0
        with downloaded(self.pull, info) as file:
            found = self._blocks(inflated(file))
            while True:
                with damage(info.key, (Transient,)):
                    block = next(found, None)
                if block is None:
                    break
                total += content_of_block(block)
                if known is not None:
                    lacking += lost(known, reader().tables(block, seen))
        refuse_lost(info.key, lacking, seen.rows)
        return total

    def _content_of_week(self, info: ObjectInfo) -> Content:
        total = NOTHING
        with (
            downloaded(self.pull, info) as file,
            damage(info.key, (Transient,)),
            read_errors(),
            readable(lambda: zipfile.ZipFile(file)) as archive,
        ):
            for name in archive.namelist():
                with readable(lambda name=name: archive.open(name)) as entry:  # type: ignore[misc]  # bound now
                    pieces = iter(lambda entry=entry: entry.read(PIECE_BYTES), b"")  # type: ignore[misc]  # bound now
                    total += sum(map(content_of_block, self._blocks(pieces)), NOTHING)
        return total

    def _blocks(self, pieces: Iterator[bytes]) -> "Iterator[Block]":
        from app.amplitude.events import blocks  # the decoder, which an idle daemon does not load

        for block in blocks(pieces):
            self.stop.check()
            yield block


def content_of_block(block: "Block") -> Content:
    """The content of whole lines: the same for the same events, wherever they lie."""
    from app.object_store.row_digest import content_of  # numpy and pyarrow, which an idle daemon does not load

    if not isinstance(block, bytes):
        return content_of([{"event": f"{block.size_bytes} bytes, {block.sha256}"}])
    return content_of({"event": _canonical(line)} for line in block.split(b"\n") if line.strip())


def _canonical(line: bytes) -> str:
    import msgspec

    try:
        return msgspec.json.encode(msgspec.json.decode(line), order="sorted").decode()
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return line.strip().decode("utf-8", "backslashreplace")


@dataclass(frozen=True, slots=True)
class AmplitudeChart:
    """`app.core.verify.Chart` over the pull: a line of hours and one of weeks for each source."""

    pull: PullContext

    def partitions(self) -> Sequence[str]:
        """See `Chart.partitions`."""
        return sorted(each for source in self._hours.partitions() for each in (source, source + WEEKS))

    def cells(self, partition: str, span: Window) -> Sequence[Cell]:
        """See `Chart.cells`: one listing per day, and one per week."""
        source = partition.removesuffix(WEEKS)
        if source == partition:
            return self._hours.cells(partition, span)
        weeks = weeks_between(span.start, min(span.end, self.pull.clock()))
        return pull_cells(self.pull, source, weeks, key=lambda week: week_key(source, week), pipeline=WEEKS_PIPELINE)

    @property
    def _hours(self) -> PullChart:
        return PullChart(self.pull, hour_key)
