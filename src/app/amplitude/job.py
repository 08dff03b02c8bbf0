"""The pipeline: pulls every hour of each configured source, rechecks it a day later, keeps the objects of weeks; the
comparison of both ends, and the gap map.

Invariants: hours are pulled in order from the cursor on; the cursor moves past an hour that was loaded, was empty, or
is recorded as unavailable; hours before the cursor only gain events. An hour is due two and a half hours after its end,
since the service needs two; asked earlier, the service returns a part of the hour that looks complete. Memory is
bounded, whatever the size of an hour; its object holds every line as it came, including lines that are not events.
"""

import hashlib
import logging
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import replace
from datetime import UTC, datetime, time, timedelta
from functools import cached_property, lru_cache, partial
from itertools import groupby
from typing import TYPE_CHECKING, BinaryIO

from app.amplitude.archives import (
    WEEK,
    ExportArchive,
    Member,
    joined,
    joined_lines,
    monday,
    name_of,
    read_errors,
    weeks,
)
from app.amplitude.client import HourTooLarge, Project
from app.config.settings import AmplitudeSettings
from app.core.errors import AppError, Conflict, Permanent, Transient
from app.core.files import temporary_file
from app.core.ledger import Tally
from app.core.pipeline import Record
from app.core.runs import Context, Report, Stop
from app.core.verify import NOTHING, MapCell, PartitionWindow, WindowContent
from app.core.windows import DAY_SECONDS, HOUR_SECONDS, Window, floor_to, windows_between
from app.object_store.deltas import state_from_metadata
from app.object_store.port import ObjectInfo
from app.object_store.set_aside import ZIP
from app.ops.connection_checks import ConnectionCheck
from app.product_events.hours import (
    GZIP,
    HOUR,
    PartitionRun,
    PulledHour,
    PullMode,
    has_landed,
    store_rows,
)
from app.product_events.http_client import spooled
from app.product_events.pull import PullPipeline
from app.product_events.verify import Given, PullEnds, PullGapMap, pull_cells

if TYPE_CHECKING:
    from app.amplitude.events import HourLines

NAME = "amplitude"
OFF = "set AMPLITUDE_WEB_CLIENT_ID or AMPLITUDE_MOBILE_CLIENT_ID, with its secret key"
ODD_MEMBER = "member of no hour"
GZIP_HEAD = b"\x1f\x8b\x08\0\0\0\0\0\0\xff"
DUE_AFTER = timedelta(hours=2, minutes=30)
AGAIN_AFTER = timedelta(hours=24)
AGAIN_DAYS = 14
STEP_HOURS = 31 * 24
KNOWN_FOR = timedelta(days=7)
log = logging.getLogger(__name__)


class AmplitudePull(PullPipeline):
    """See `PullPipeline`. Partitions are sources."""

    name, variables, unit, due_after = NAME, OFF, "lines", DUE_AFTER

    @property
    def given(self) -> AmplitudeSettings:
        """See `PullPipeline.given`."""
        return self.settings.amplitude

    @cached_property
    def projects(self) -> Mapping[str, Project]:
        """The project of each source that has a pair of keys."""
        given = self.given
        pairs = {
            "web": (given.web_client_id, given.web_secret_key),
            "mobile": (given.mobile_client_id, given.mobile_secret_key),
        }
        return {
            source: Project(given.base_url, client_id.get_secret_value(), secret_key.get_secret_value(), self.spool)
            for source, (client_id, secret_key) in pairs.items()
            if client_id is not None and secret_key is not None
        }

    @property
    def partitions(self) -> Sequence[str]:
        """See `PullPipeline.partitions`."""
        return list(self.projects)

    @property
    def checks(self) -> Sequence[ConnectionCheck]:
        """See `PullPipeline.checks`: one for each source."""
        return [
            ConnectionCheck(
                f"amplitude_{name}",
                f"Amplitude {name}",
                f"AMPLITUDE_{name.upper()}_CLIENT_ID",
                self.heard(partial(project.ping, self.clock), name),
            )
            for name, project in self.projects.items()
        ]

    @property
    def chart(self) -> "AmplitudeGapMap":
        """See `PullPipeline.chart`."""
        return AmplitudeGapMap(self)

    def verification(self, stop: Stop) -> "AmplitudeEnds":
        """See `PullPipeline.verification`."""
        return AmplitudeEnds(self, with_weeks(self.projects), stop)

    def run(self, context: Context, partition: str) -> "SourceRun":
        """See `PullPipeline.run`."""
        return SourceRun(self, context, partition)

    def key(self, partition: str, window: Window) -> str:
        """`amplitude/{source}/hours/{date}/{HH}.ndjson.gz`."""
        return f"{NAME}/{partition}/hours/{window.start:%Y-%m-%d}/{window.start:%H}.ndjson.gz"

    def place(self, partition: str, window: Window) -> tuple[str, ...]:
        """Below `amplitude/_set_aside/`: `{source}/{date}/{HH}`."""
        return partition, f"{window.start:%Y-%m-%d}", f"{window.start:%H}"

    def opened(self, partition: str, window: Window, file: BinaryIO | None, stop: Stop) -> "HourLines":
        """See `PullPipeline.opened`; None = the hour has no lines."""
        from app.amplitude.events import HourLines  # the decoder, which an idle daemon does not load

        return HourLines(self, partition, window, file, stop)

    def joined(self, archive: ExportArchive, source: str, window: Window, stop: Stop) -> "HourLines":
        """An hour of an archive: its members joined into one gzip file, byte-identical for the same members. Raises
        Transient and Permanent when one of them is broken.
        """
        members, joining = archive.hours[window.start], joined()
        if not members:
            return self.opened(source, window, None, stop)
        with spooled(self.spool, "the events of an hour") as file:
            file.write(GZIP_HEAD)
            file.writelines(joined_lines(joining, archive.streams(members)))
            file.write(joining.crc.to_bytes(4, "little") + (joining.size_bytes & 0xFFFFFFFF).to_bytes(4, "little"))
        return self.opened(source, window, file, stop)

    def ask(self, partition: str, span: Window, stop: Stop, held: ExitStack) -> tuple[Window, Given]:
        """See `PullPipeline.ask`."""
        fetched = held.enter_context(closing(next(self.projects[partition].fetch(span, stop))))

        def hour(window: Window) -> PulledHour:
            return held.enter_context(closing(self.joined(fetched, partition, window, stop)))

        return fetched.span, lru_cache(hour)


class SourceRun(PartitionRun):
    """One source in one run."""

    pull: AmplitudePull

    @property
    def project(self) -> Project:
        """The project of the source."""
        return self.pull.projects[self.name]

    def pull_due(self) -> Report:
        """See `PartitionRun.pull_due`; also recheck what is old enough, and re-create weeks."""
        pull = self.pull
        now, due = pull.clock(), pull.due_at
        # Start on the Monday of the week in which the lookback begins, so that every week object covers a whole week.
        start = self.begun_at(next(weeks_between(now - timedelta(days=pull.given.lookback_days), now + WEEK)).start)
        end = min(due, start + STEP_HOURS * HOUR)
        report = self.bring_back()
        waiting = self.waiting_hours()
        report += self._pull(Window(start, end), PullMode.LIVE) if start < end else Report()
        for hour in waiting:
            report += self._pull(hour, PullMode.ONCE_MORE)
        report += self._look_again()
        report += refresh_weeks(self, Window(min(start, now - timedelta(days=AGAIN_DAYS)), now))
        return report + Report(more=start < end < due and not self.context.dry_run)

    def pull_again(self, hours: Window) -> Report:
        """See `PartitionRun.pull_again`."""
        return self._pull(hours, PullMode.AGAIN) + refresh_weeks(self, hours)

    def mend(self, hour: PulledHour, record: Record | None, over: str | None) -> Report:
        """See `PartitionRun.mend`."""
        final = hour.window.start < self.settled_at
        report = self.land(hour, record, PullMode.AGAIN, final=final, over=over)
        return replace(report, windows=1) + refresh_weeks(self, hour.window)

    def _look_again(self) -> Report:
        """Recheck each day once, a day after its last hour was due: loads what the service added since."""
        until = self.settled_at
        records = self.records(Window(until - timedelta(days=AGAIN_DAYS), until)).values()
        report = Report()
        for hours in _by_day(record for record in records if not record.closed and has_landed(record)):
            report += self._pull(Window(hours[0].window.start, hours[-1].window.end), PullMode.ONCE_MORE)
        return report

    def _pull(self, span: Window, mode: PullMode) -> Report:
        """Fetch the hours of `span`, then load and store each."""
        known, report = self.records(span), Report()
        self.context.progress.advance(total=(span.end - span.start) // HOUR)
        for fetched in self.project.fetch(span, self.context.stop, past_faults=True):
            with closing(fetched):
                report += self._land(fetched, known, mode)
        return report + self.settle()

    def _land(self, fetched: ExportArchive, known: Mapping[datetime, Record], mode: PullMode) -> Report:
        """Load and store the hours of an archive."""
        stop, span, report = self.context.stop, fetched.span, Report()
        if early := self.clock_fault(span, self.project.upstream.answered_at):
            raise early
        if fetched.fault is not None:
            return self._not_had(span, known.get(span.start), fetched.fault, mode, evidence=fetched.file)
        final = span.start < self.settled_at  # a span is part of one day

        def is_nothing(window: Window) -> bool:
            return window.start not in known and not fetched.hours[window.start]

        for is_empty, windows in groupby(windows_between(span.start, span.end, HOUR_SECONDS), is_nothing):
            if is_empty:
                report += self.record_empty(list(windows), mode, final=final)
                continue
            for window in windows:
                stop.check()
                record = known.get(window.start)
                try:
                    hour = self.pull.joined(fetched, self.name, window, stop)
                except (Transient, Permanent) as error:
                    evidence = fetched.file if span == window else None
                    report += self._not_had(window, record, error, mode, came=True, evidence=evidence)
                else:
                    report += self.take(hour, record, mode, final=final)
        for odd, member in fetched.odd:
            report += self.alone(f" {odd.message}", partial(self._set_aside_odd, fetched, odd.message, member))
        return report

    def _set_aside_odd(self, archive: ExportArchive, what: str, member: Member) -> Report:
        """Set aside a member that belongs to no hour: nobody knows where its events go. The others are not affected."""
        log.warning("%s: %s", self.name, what)
        if self.context.dry_run:
            return Report()
        name, report = (self.name, "of_no_hour", member.filename), Report()
        with read_errors():
            for stream in archive.streams([member]):
                kept = self.pull.set_aside.keep(
                    name, stream, content_type=GZIP, reason=ODD_MEMBER, number=1, sample=what
                )
                report = self.ledger(Tally(1), kept.entry)
        return report

    def _not_had(
        self,
        window: Window,
        record: Record | None,
        fault: AppError,
        mode: PullMode,
        *,
        came: bool = False,
        evidence: BinaryIO | None = None,
    ) -> Report:
        """Record an hour as unavailable. Raises `fault` when the service returns no other hour either.

        `came`: the service returned the hour, in an archive with other hours. `evidence`: an archive of this hour
        alone.
        """
        is_too_large = isinstance(fault, HourTooLarge)
        if not came and not is_too_large and not self._service_answers(window):
            raise fault
        number = 0 if has_landed(record) else 1
        return self.not_had(
            window,
            record,
            fault,
            mode,
            counted=number,
            number=number,
            body=evidence,
            content_type=ZIP,
            is_too_large=is_too_large,
        )

    def _service_answers(self, window: Window) -> bool:
        """Whether the service responds for another hour than this: the one it returned last, or the newest."""
        start, due = window.start, self.pull.due_at
        records = self.records(Window(start - KNOWN_FOR, start)).values()
        before = next(
            (each.window for each in reversed(list(records)) if has_landed(each)), Window(start - HOUR, start)
        )
        for other in (before, Window(due - HOUR, due)):
            if other == window:
                continue
            with suppress(Transient, Permanent):
                self.project.try_hour(other, self.context.stop)
                return True
        return False

    @property
    def settled_at(self) -> datetime:
        """Days that end by this time are checked for the last time, even if it is the first check. By the service's
        clock if that is behind: a day that is settled too early by ours would never be rechecked.
        """
        now, answered_at = self.pull.clock(), self.project.upstream.answered_at
        return floor_to(min(now, answered_at or now) - DUE_AFTER - AGAIN_AFTER, DAY_SECONDS)


# The object of a week: a zip with one NDJSON entry, joined from the objects of its hours.
#
# Invariant: it depends only on the records of its hours, so no crash recovery is needed: it is re-created when, and
# only when, a day of it is complete or one of its hours changed.

WEEKS_PIPELINE = "amplitude_weeks"
DAY_HOURS = 24
MAX_BYTES = 5 << 30


def refresh_weeks(run: SourceRun, span: Window) -> Report:
    """Bring the week objects of `span` up to date; one that cannot be stored is a failure of that week only."""
    report = Report()
    for window in weeks_between(span.start, span.end) if not run.context.dry_run else ():
        hours = hours_of_week(run.pull, run.name, window)
        held = run.records(window, WEEKS_PIPELINE).get(window.start)
        if hours and (held is None or held.digest != _digest(hours)):
            report += run.alone(f":weeks {window}", partial(_refresh_week, run, window, hours))
    return report


def _refresh_week(run: SourceRun, window: Window, hours: Sequence[Record]) -> Report:
    """Store a week. Where the object of an hour is another than recorded, the state was set back: the object tells."""
    try:
        return _store_week(run, window, hours)
    except Conflict as error:
        log.warning("%s: %s: the records of its hours are taken from their objects", week_key(run.name, window), error)
        return _store_week(run, window, [_as_stored(run, hour) for hour in hours])


def _as_stored(run: SourceRun, hour: Record) -> Record:
    """The record of an hour as its object says it, which is also recorded."""
    there = run.pull.store.head(hour.key) if hour.version and has_landed(hour) else None
    if there is None or there.etag == hour.version:
        return hour
    held = state_from_metadata(there)
    rows = hour.rows if held.rows is None else held.rows
    cells = rows + hour.source_cells - hour.rows
    stored = replace(
        hour, version=held.version, digest=held.digest, rows=rows, size_bytes=held.size_bytes, source_cells=cells
    )
    run.commit(stored)
    return stored


def hours_of_week(pull: AmplitudePull, source: str, window: Window) -> Sequence[Record]:
    """The hours that a week object should hold: those of days that were pulled completely.

    A day with a waiting hour is incomplete; an hour that was set aside does not count as waiting.
    """
    records = pull.checkpoints.records(pull.name, source, window.start, window.end)
    days = _by_day(record for record in records if has_landed(record) or record.closed)
    return [record for day in days if len(day) == DAY_HOURS for record in day]


def _by_day(records: Iterable[Record]) -> Sequence[Sequence[Record]]:
    """Records of hours, oldest first, grouped by day."""
    return [list(day) for _, day in groupby(records, lambda record: record.window.start.date())]


def _store_week(run: SourceRun, window: Window, hours: Sequence[Record], over: str | None = None) -> Report:
    key, rows, digest = week_key(run.name, window), sum(hour.rows for hour in hours), _digest(hours)
    min_at, max_at = hours[0].window.start, hours[-1].window.end
    closed = all(hour.closed for hour in hours) and max_at == window.end
    wanted = Record(window, 0, key, "", digest, rows, 0, len(hours), min_at, max_at, closed)
    # Nothing is compressed again, so the zip is as large as the objects of its hours.
    if (size_bytes := sum(hour.size_bytes for hour in hours)) > MAX_BYTES:
        raise Permanent(
            f"{key}: {size_bytes} bytes exceed the 5 GiB limit of one upload",
            "use the objects of its hours, which are complete",
        )
    with temporary_file(run.pull.spool) as file:
        file.writelines(weeks(_streams(run, hours), [window.start.date()]))
        stored = store_rows(
            run.pull.store, file, wanted, pipeline=WEEKS_PIPELINE, content_type="application/zip", over=over
        )
    run.commit(replace(wanted, version=stored.version, size_bytes=stored.size_bytes), pipeline=WEEKS_PIPELINE)
    return Report(bytes=stored.size_bytes)


def _streams(run: SourceRun, hours: Sequence[Record]) -> Iterator[tuple[datetime, BinaryIO]]:
    for hour in hours:
        run.context.stop.check()
        if not hour.version or not has_landed(hour):
            continue  # an hour without events has no object, nor has one that was set aside
        with run.pull.store.open(hour.key, hour.version) as stream:
            if stream is None:
                raise Permanent(
                    f"{hour.key} is gone, so the week cannot be re-created",
                    f"python -m app verify amplitude --from {hour.window.start:%Y-%m-%dT%H} "
                    f"--to {hour.window.end:%Y-%m-%dT%H} --heal",
                )
            yield hour.window.start, stream


def weeks_between(start: datetime, end: datetime) -> Iterator[Window]:
    """Every ISO week that overlaps `[start, end)`, oldest first."""
    at = datetime.combine(monday(start.date()), time(), UTC)
    while at < end:
        yield Window(at, at + WEEK)
        at += WEEK


def week_key(source: str, window: Window) -> str:
    """`amplitude/{source}/{year}_week_{week}.zip`."""
    return f"amplitude/{source}/{name_of(window.start.date())}.zip"


def _digest(hours: Sequence[Record]) -> str:
    return hashlib.sha256("".join(f"{hour.window}{hour.digest}" for hour in hours).encode()).hexdigest()


# Both ends of the pull: events as the service returns them now, and events in the objects; and the gap map.
#
# Invariants: the object of a week is compared with what the service returns for the hours that it should hold. An event
# is compared by its full content, regardless of the order of its members; a line that is not an event by its bytes.

WEEKS = ":weeks"


def with_weeks(sources: Iterable[str]) -> Sequence[str]:
    """Each source, and its weeks."""
    return [each for source in sources for each in (source, source + WEEKS)]


class AmplitudeEnds(PullEnds):
    """`app.core.verify.Ends` over the pull. Partitions are sources, with hours as windows, and `{source}:weeks`."""

    pull: AmplitudePull

    def slots(self, span: Window, partition: str | None) -> Iterator[PartitionWindow]:
        """See `Ends.slots`: hours that can be requested, and weeks that lie entirely in the span."""
        end = min(span.end, self.pull.due_at)
        for name in self.names if partition is None else [partition]:
            if not name.endswith(WEEKS):
                yield from super().slots(span, name)
                continue
            weeks = (week for week in weeks_between(span.start, end) if span.start <= week.start)
            yield from (PartitionWindow(name, week) for week in weeks if week.end <= end)
            self.let_go()

    def source(self, slot: PartitionWindow) -> WindowContent:
        """See `Ends.source`. A week is the sum of its hours, which are cached."""
        source = slot.partition.removesuffix(WEEKS)
        if source == slot.partition:
            return super().source(slot)
        hours = (hour.window for hour in hours_of_week(self.pull, source, slot.window) if has_landed(hour))
        return sum((self.source(PartitionWindow(source, hour)) for hour in hours), NOTHING)

    def destination(self, slot: PartitionWindow) -> WindowContent:
        """See `Ends.destination`."""
        if not slot.partition.endswith(WEEKS):
            return super().destination(slot)
        week = self.pull.store.head(week_key(slot.partition.removesuffix(WEEKS), slot.window))
        return self._content_of_week(week) if week else NOTHING

    def heal(self, context: Context, slot: PartitionWindow) -> Report:
        """See `Ends.heal`."""
        if not slot.partition.endswith(WEEKS):
            return super().heal(context, slot)
        run = self.pull.run(context, slot.partition.removesuffix(WEEKS))
        week, hours = (
            self.pull.store.head(week_key(run.name, slot.window)),
            hours_of_week(self.pull, run.name, slot.window),
        )
        if not hours:
            span = f"--from {slot.window.start:%Y-%m-%d} --to {slot.window.end:%Y-%m-%d}"
            raise Permanent(f"no day of {run.name} {slot.window} is known", f"python -m app backfill amplitude {span}")
        return _store_week(run, slot.window, hours, week.etag if week else "") + Report(windows=1)

    def _content_of_week(self, info: ObjectInfo) -> WindowContent:
        from app.amplitude.events import blocks, content_of_block  # the decoder, which an idle daemon does not load

        total = NOTHING
        with self.pull.downloaded(info.key, info.etag) as file:
            if file is None:
                raise Transient(f"{info.key} was deleted while it was being read", "verify again")
            try:
                with read_errors(), zipfile.ZipFile(file) as week:
                    for member in week.infolist():
                        with week.open(member) as entry:
                            for block in blocks(entry):
                                self.stop.check()
                                total += content_of_block(block)
            except Transient as error:
                hint = "heal the window: the object is written again from those of its hours"
                raise Permanent(f"{info.key} is damaged: {error.message}", hint) from error
        return total


class AmplitudeGapMap(PullGapMap):
    """See `PullGapMap`: a row of hours and a row of weeks for each source."""

    def partitions(self) -> Sequence[str]:
        """See `GapMapSource.partitions`."""
        return sorted(with_weeks(super().partitions()))

    def cells(self, partition: str, span: Window) -> Sequence[MapCell]:
        """See `GapMapSource.cells`: one listing per day, and one per week."""
        source = partition.removesuffix(WEEKS)
        if source == partition:
            return super().cells(partition, span)
        weeks = weeks_between(span.start, min(span.end, self.pull.clock()))
        return pull_cells(self.pull, source, weeks, key=lambda week: week_key(source, week), pipeline=WEEKS_PIPELINE)
