"""A pull and its partitions: where hours land, which are due, and what is recorded of them.

Invariants: nothing is connected before the first run; a partition that fails is noted beside its cursor and the others
go on; the cursor moves with the record of an hour, in one transaction; a dry run records nothing.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import BinaryIO, Generic, TypeVar

from app.config.settings import Settings
from app.core.errors import AppError, LeaseLost, Permanent, Rejected, Transient
from app.core.pipeline import Checkpoints, Commit, Record
from app.core.runs import Context, Failure, Job, Ledger, Report, Tally, ledger_of
from app.core.verify import Chart, Verification
from app.core.windows import Window, floor_to
from app.object_store.port import ObjectStore
from app.object_store.set_aside import LINES, ZIP, SetAsideStore, folder_of
from app.product_events.mapping import Events
from app.product_events.raw_objects import NOT_HAD, PutPolicy, RawObject

HOUR = timedelta(hours=1)
HOUR_SECONDS = 3600
GZIP = "application/gzip"
SPOOL = "spool"
SET_ASIDE_AFTER = timedelta(days=1)
ABOVE_LIMIT, KEEPS_FAILING = "hour above the service's limit", "hour that keeps failing"
log = logging.getLogger(__name__)

R = TypeVar("R")
S = TypeVar("S")


@dataclass(frozen=True, slots=True)
class PullPipeline(Generic[S]):
    """What `main` wires, and the `service` that routes ask as well."""

    name: str
    jobs: Sequence[Job]
    backfill: Callable[[Context, Window], Report]
    verification: Verification
    chart: Chart
    service: S


@dataclass(frozen=True, slots=True)
class PullContext:
    """One pull, and where its hours land. An hour is due `due_after` its end, and overdue `overdue_after` that.

    `unit`: what its ledger counts.
    """

    name: str
    unit: str
    due_after: timedelta
    overdue_after: timedelta
    lookback_days: int
    checkpoints: Checkpoints
    store: ObjectStore
    warehouse: Events
    spool: Path
    clock: Callable[[], datetime]
    set_aside: SetAsideStore

    @property
    def due_at(self) -> datetime:
        """Hours that end until then can be asked for."""
        return floor_to(self.clock() - self.due_after, HOUR_SECONDS)

    def run_each(self, context: Context, runs: Mapping[str, R], work: Callable[[R], Report]) -> Report:
        """`work` for each partition. Raises LeaseLost, Stopped, and what a store that cannot be used raises."""
        self.spool.mkdir(parents=True, exist_ok=True)
        if not self.store.conditional:
            self.store.probe()
        total = Report()
        for partition, run in runs.items():
            try:
                total += work(run)
            except LeaseLost:
                raise
            except (Transient, Permanent, Rejected) as error:
                if not context.dry_run:
                    self.checkpoints.fail(self.name, partition, str(error), context.lease)
                total += Report(failures=(Failure(partition, error.message, error.hint),))
        return total


def spool_of(settings: Settings) -> Path:
    """The folder of temporary files."""
    return settings.service.data_dir / SPOOL


def overdue_after(settings: Settings, name: str, interval_seconds: float) -> timedelta:
    """When a run should have landed what is due: as late as the job itself is told to be stale."""
    alert = settings.alert
    return timedelta(seconds=interval_seconds + dict(alert.grace_by_job).get(name, alert.grace_seconds))


def set_aside_of(settings: Settings, name: str, store: ObjectStore, largest_bytes: int) -> SetAsideStore:
    """Where a pull sets aside. A line that is too large is kept whole, whatever the limit for many small ones."""
    return SetAsideStore(store, folder_of(name), max(settings.set_aside.max_bytes, largest_bytes))


@dataclass(frozen=True, slots=True)
class PartitionRun:
    """What one run knows and records of one partition."""

    pull: PullContext
    context: Context
    name: str

    @property
    def cursor_at(self) -> datetime | None:
        """Up to where hours were pulled; None before the first run."""
        return self.pull.checkpoints.cursors(self.pull.name).get(self.name)

    def records(self, span: Window, pipeline: str = "") -> Mapping[datetime, Record]:
        """By start of window, oldest first; of the pull or of another pipeline."""
        found = self.pull.checkpoints.records(pipeline or self.pull.name, self.name, span.start, span.end)
        return {record.window.start: record for record in found}

    def commit(self, *records: Record, cursor_at: datetime | None = None, pipeline: str = "") -> None:
        """Record windows, and move the cursor when `cursor_at` is given."""
        if not self.context.dry_run:
            commit = Commit(records, cursor_at)
            self.pull.checkpoints.commit(pipeline or self.pull.name, self.name, commit, self.context.lease)

    def fill(self, span: Window, pull_again: Callable[[Window], Report]) -> Report:
        """Pull the hours of `span` up to the cursor again. The cursor does not move. Raises Rejected for no hour."""
        name, due_at = self.pull.name, self.pull.due_at
        cursor = min(self.cursor_at or due_at, due_at)
        start, end = floor_to(span.start, HOUR_SECONDS), min(_ceiling(span.end), cursor)
        if start >= end:
            raise Rejected(
                f"nothing was filled: the job has pulled {self.name} up to {cursor:%Y-%m-%dT%H:%MZ}, not {span} yet",
                f"give an earlier span, or run the job, which pulls later hours by itself: python -m app run {name}",
            )
        report = pull_again(Window(start, end))
        if report.more:
            return report
        total, hours, unit = report.ledger.total, (end - start) // HOUR, self.pull.unit
        note = (
            f"{self.name}: {hours} hours asked for again: {total.new} {unit} are new, {total.already_there} were there"
        )
        left = f"; the job itself pulls those from {cursor:%Y-%m-%dT%H:%MZ} on" if end < span.end else ""
        return report + Report(notes=(note + left,))

    def set_hour_aside(
        self,
        window: Window,
        fault: AppError,
        *,
        place: tuple[str, ...],
        is_too_large: bool,
        archive: BinaryIO | None = None,
    ) -> Ledger:
        """Set an hour aside that the service cannot give, which counts as one; `archive`: what came instead of it."""
        log.warning("%s %s is set aside: %s", self.name, window, fault)
        if archive is not None:
            archive.seek(0)
        kept = self.pull.set_aside.keep(
            place,
            archive or str(fault).encode(),
            content_type=ZIP if archive else LINES,
            reason=ABOVE_LIMIT if is_too_large else KEEPS_FAILING,
            number=1,
            sample=f"{self.name} {window}: {fault.message}",
        )
        return ledger_of(Tally(counted=1), kept.entry, unit=self.pull.unit).of_partition(self.name)


def hours_of(span: Window) -> Sequence[datetime]:
    """The start of each hour."""
    return [span.start + number * HOUR for number in range((span.end - span.start) // HOUR)]


def store_rows(
    store: ObjectStore, put: PutPolicy, file: BinaryIO, what: RawObject, *, refused: int, closed: bool
) -> Record:
    """Store the rows of an hour as its object; the record of what is there then.

    `source_cells` counts the `refused` ones too, so what it has more than `rows` are those that were set aside.
    """
    held = put(store, file, what)
    rows = what.rows if held.rows is None else held.rows
    return Record(
        window=what.window,
        part=0,
        key=what.key,
        version=held.version,
        digest=held.digest,
        rows=rows,
        size_bytes=held.size_bytes,
        source_cells=rows + refused,
        min_at=what.window.start,
        max_at=what.window.end,
        closed=closed,
    )


def record_of_nothing(
    window: Window, key: str, *, closed: bool, version: str = "", digest: str = "", min_at: datetime | None = None
) -> Record:
    """The record of a window without rows."""
    return Record(window, 0, key, version, digest, 0, 0, 0, min_at, None, closed)


def not_had(window: Window, key: str, *, closed: bool, since_at: datetime | None = None) -> Record:
    """The record of an hour that the service could not give: it waits, or it is `closed` and was set aside."""
    return record_of_nothing(window, key, closed=closed, version=NOT_HAD, min_at=since_at)


def _ceiling(instant: datetime) -> datetime:
    whole = floor_to(instant, HOUR_SECONDS)
    return whole if whole == instant else whole + HOUR
