"""A pull as one pipeline: its job over all partitions, backfill of a span of hours, and how its hours are stored.

Invariants: nothing connects before the first run; a partition that fails is recorded with its cursor and the others
continue.
"""

import csv
import gzip
import logging
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from functools import cached_property
from pathlib import Path
from shutil import copyfileobj
from typing import BinaryIO, ClassVar

from app.config.settings import AmplitudeSettings, AppMetricaSettings, Settings
from app.core.errors import LeaseLost, Permanent, Rejected, Transient
from app.core.pipeline import NEVER_AFTER, QUIET_AFTER, USUAL_HOURS, Checkpoints
from app.core.runs import Context, Failure, Job, Report, ReportSum, Stop
from app.core.windows import HOUR_SECONDS, Window, floor_to
from app.object_store.port import ObjectStore
from app.object_store.set_aside import SetAsideStore, folder_of
from app.ops.connection_checks import ConnectionCheck
from app.product_events.hours import HOUR, KEPT_LINE_BYTES, DamagedObject, PartitionRun, PulledHour
from app.product_events.http_client import disk_fault, spooled
from app.product_events.mapping import EventWarehouse
from app.product_events.verify import Given, PullEnds, PullGapMap

BROKEN = (EOFError, gzip.BadGzipFile, zlib.error, csv.Error, ValueError)
ANOTHER_PROJECT = "check that it is the right project, in the right region, and that events reach it"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PullPipeline(ABC):
    """One service's pull, which `main` wires; see `WindowedPipeline`. The service defines how its hours are requested,
    named and read.

    `variables`: those that switch it on. An hour is due `due_after` its end. `unit`: what its ledger counts.
    """

    name: ClassVar[str]
    variables: ClassVar[str]
    unit: ClassVar[str]
    due_after: ClassVar[timedelta]

    settings: Settings
    checkpoints: Checkpoints
    store: ObjectStore
    warehouse: EventWarehouse
    clock: Callable[[], datetime]

    @property
    @abstractmethod
    def given(self) -> AmplitudeSettings | AppMetricaSettings:
        """The service's own settings."""

    @property
    @abstractmethod
    def partitions(self) -> Sequence[str]:
        """The configured ones."""

    @property
    def off(self) -> str:
        """Which variables switch it on; "" when they are set."""
        return "" if self.partitions else self.variables

    @property
    @abstractmethod
    def checks(self) -> Sequence[ConnectionCheck]:
        """See `WindowedPipeline.checks`."""

    @abstractmethod
    def run(self, context: Context, partition: str) -> PartitionRun:
        """A partition in one run."""

    @abstractmethod
    def key(self, partition: str, window: Window) -> str:
        """The object key of an hour."""

    @abstractmethod
    def place(self, partition: str, window: Window) -> tuple[str, ...]:
        """The name under which the data of an hour is set aside."""

    @abstractmethod
    def opened(self, partition: str, window: Window, file: BinaryIO, stop: Stop) -> PulledHour:
        """The hour in the file of its object."""

    @abstractmethod
    def ask(self, partition: str, span: Window, stop: Stop, held: ExitStack) -> tuple[Window, Given]:
        """What the service returns now for a span, or for the beginning of it. Its files are closed with `held`."""

    @property
    def chart(self) -> PullGapMap:
        """The gap map."""
        return PullGapMap(self)

    def verification(self, stop: Stop) -> PullEnds:
        """Both ends; see `Verification`."""
        return PullEnds(self, self.partitions, stop)

    @property
    def job(self) -> Job:
        """Pulls what is due in every partition, and notes a source that returns no rows, which may be normal."""

        def due(one: PartitionRun) -> Report:
            report = one.pull_due()
            said = "" if report.more else self.silence(one.name)
            if said:
                log.warning("%s: %s", self.name, said)
            return report + Report(notes=(f"warning: {said}",) if said else ())

        return Job(self.name, self.given.interval_seconds, lambda context: self._each(context, due), self.off)

    def backfill(self, context: Context, span: Window) -> Report:
        """Pull the hours of `span` again, in every partition, up to the cursor, which stays."""

        def filled(one: PartitionRun) -> Report:
            # If a fast clock moved the cursor ahead, do not request hours that are not complete yet.
            cursor = min(one.cursor_at or self.due_at, self.due_at)
            start, whole = floor_to(span.start, HOUR_SECONDS), floor_to(span.end, HOUR_SECONDS)
            end = min(whole if whole == span.end else whole + HOUR, cursor)
            if start >= end:
                raise Rejected(
                    f"nothing was filled: the job has pulled {one.name} up to {cursor:%Y-%m-%dT%H:%MZ}, not {span} yet",
                    f"give an earlier span, or run the job, which pulls later hours by itself: "
                    f"python -m app run {self.name}",
                )
            report = one.pull_again(Window(start, end))
            if report.more:
                return report
            total, hours = report.ledger.total, (end - start) // HOUR
            note = f"{one.name}: {hours} hours asked for again: {total.new} {self.unit} are new, "
            left = f"; the job itself pulls those from {cursor:%Y-%m-%dT%H:%MZ} on" if end < span.end else ""
            return report + Report(notes=(f"{note}{total.already_there} were there{left}",))

        return self._each(context, filled)

    def _each(self, context: Context, work: Callable[[PartitionRun], Report]) -> Report:
        """Run `work` for each partition. Raises LeaseLost, Stopped, and the error of an unusable store."""
        total = ReportSum(context.done)
        # Conditional writes keep two writers apart; probe once whether the store honours them.
        if not self.store.conditional:
            self.store.probe()
        for partition in self.partitions:
            try:
                self.spool.mkdir(parents=True, exist_ok=True)
                with closing(self.run(context, partition)) as one:
                    report = work(one)
                total(replace(report, ledger=report.ledger.of_partition(partition)))
            # After a lost lease another process runs all partitions; any other error affects this partition only.
            except LeaseLost:
                raise
            except (Transient, Permanent, Rejected, OSError) as raised:
                error = disk_fault(self.spool, raised) if isinstance(raised, OSError) else raised
                if not context.dry_run:
                    self.checkpoints.fail(self.name, partition, str(error), context.lease)
                total(Report(failures=(Failure(partition, error.message, error.hint),)))
        return total.total

    def silence(self, partition: str) -> str:
        """A warning about a source that responds but returns no rows; "" when it returns some, or is too new to tell.

        Both services return empty data for the wrong project or application, just as for one without activity.
        """
        first_at = self.checkpoints.starts(self.name).get(partition)
        cursor_at = self.checkpoints.cursors(self.name).get(partition)
        if first_at is None or cursor_at is None:
            return ""
        for since in (cursor_at - QUIET_AFTER, first_at):  # usually there is no need to read the rest
            records = self.checkpoints.records(self.name, partition, since, cursor_at)
            filled = [record.window.end for record in records if record.rows]
            if filled and cursor_at - filled[-1] < QUIET_AFTER:
                return ""
        if not filled and cursor_at - first_at >= NEVER_AFTER:
            return f"{partition} has returned no row since {first_at:%Y-%m-%d}: {ANOTHER_PROJECT}"
        if len(filled) >= USUAL_HOURS:
            return f"{partition} has returned no row since {filled[-1]:%Y-%m-%d %H:%M}Z: {ANOTHER_PROJECT}"
        return ""

    def heard(self, ping: Callable[[], str], start: str) -> Callable[[], str]:
        """`ping`, plus the `silence` warnings of the partitions whose names begin with `start`."""

        def check() -> str:
            names = sorted(name for name in self.checkpoints.cursors(self.name) if name.startswith(start))
            return "; ".join([ping(), *filter(None, map(self.silence, names))])

        return check

    @property
    def due_at(self) -> datetime:
        """Hours that end by this time can be requested."""
        return floor_to(self.clock() - self.due_after, HOUR_SECONDS)

    @property
    def overdue_seconds(self) -> float:
        """How long an hour is overdue before the job is reported as stale."""
        alert = self.settings.alert
        return self.given.interval_seconds + dict(alert.grace_by_job).get(self.name, alert.grace_seconds)

    @property
    def spool(self) -> Path:
        """The directory for temporary files."""
        return self.settings.service.data_dir / "spool"

    @cached_property
    def set_aside(self) -> SetAsideStore:
        """Where refused data is kept."""
        limit_bytes = max(self.settings.set_aside.max_bytes, KEPT_LINE_BYTES + 1)  # and its line end
        return SetAsideStore(self.store, folder_of(self.name), limit_bytes)

    @contextmanager
    def downloaded(self, key: str, etag: str | None = None) -> Iterator[BinaryIO | None]:
        """A copy of an object; None when it is gone. Raises Conflict when it has another version."""
        with spooled(self.spool, "a copy of an object") as file:
            with self.store.open(key, etag) as stream:
                if stream is not None:
                    copyfileobj(stream, file, 1 << 18)
            file.seek(0)
        with file:
            yield file if stream is not None else None

    @contextmanager
    def object_hour(
        self, partition: str, window: Window, stop: Stop, etag: str | None = None
    ) -> Iterator[PulledHour | None]:
        """The hour stored in an object, downloaded whole; None when the object is gone. Raises DamagedObject when it
        turns out to be broken while in use, and Conflict when it has another version.
        """
        key = self.key(partition, window)
        with self.downloaded(key, etag) as file, ExitStack() as held:
            try:
                yield held.enter_context(closing(self.opened(partition, window, file, stop))) if file else None
            except BROKEN as error:
                hint = "heal the window: the object is written again from what the service gives"
                raise DamagedObject(f"{key} is damaged: {error}", hint) from error
