"""A pull and its partitions: where hours land, which are due, how their rows are stored, and what is recorded of them.

Invariants: nothing is connected before the first run; a partition that fails is noted beside its cursor and the others
go on; the cursor moves with the record of an hour, in one transaction; a dry run records nothing. One object per
window: the same rows are not stored twice, however their order or their bytes differ; an object is replaced only while
it is the version that was looked at, and one that is whole never by one with fewer rows.
"""

import hashlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import BinaryIO, Generic, TypeVar

from app.config.settings import Settings
from app.core.errors import AppError, LeaseLost, Permanent, Rejected, Transient
from app.core.files import temporary_file
from app.core.ledger import Ledger, SetAside, Tally, ledger_of
from app.core.pipeline import Checkpoints, Commit, Held, Record
from app.core.runs import Context, Failure, Job, Report
from app.core.verify import Chart, Verification
from app.core.windows import HOUR_SECONDS, Window, floor_to
from app.object_store.deltas import held_of
from app.object_store.port import ObjectStore, Put
from app.object_store.set_aside import LINES, ZIP, SetAsideStore, folder_of
from app.product_events.mapping import Events

HOUR = timedelta(hours=1)
GZIP = "application/gzip"
SET_ASIDE_AFTER = timedelta(days=1)
ABOVE_LIMIT, KEEPS_FAILING = "hour above the service's limit", "hour that keeps failing"
NOT_HAD = "not had"
"""The version in the record of a window that the service could not give; `closed` says that it was set aside."""
LARGE_BYTES = 1 << 20
log = logging.getLogger(__name__)

R = TypeVar("R")
S = TypeVar("S")


@dataclass(frozen=True, slots=True)
class PullPipeline(Generic[S]):
    """What `main` wires, and the `service` that routes ask as well."""

    name: str
    job: Job
    backfill: Callable[[Context, Window], Report]
    verification: Verification
    chart: Chart
    service: S


def spool_of(settings: Settings) -> Path:
    """The folder of temporary files."""
    return settings.service.data_dir / "spool"


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
        # Conditions are what keeps two writers apart; a store is tried once whether it honours them.
        if not self.store.conditional:
            self.store.probe()
        total = Report()
        for partition, run in runs.items():
            try:
                total += work(run)
            # Another process goes on with all partitions; anything else is the fault of one of them.
            except LeaseLost:
                raise
            except (Transient, Permanent, Rejected) as error:
                if not context.dry_run:
                    self.checkpoints.fail(self.name, partition, str(error), context.lease)
                total += Report(failures=(Failure(partition, error.message, error.hint),))
        return total


def pull_context(
    settings: Settings,
    *,
    name: str,
    interval_seconds: float,
    lookback_days: int,
    unit: str,
    due_after: timedelta,
    largest_bytes: int,
    checkpoints: Checkpoints,
    store: ObjectStore,
    warehouse: Events,
    clock: Callable[[], datetime],
) -> PullContext:
    """A pull as it is configured. A line of up to `largest_bytes` is set aside whole, whatever the limit for many
    small ones; an hour is overdue when the job itself is reported as stale.
    """
    grace_seconds = dict(settings.alert.grace_by_job).get(name, settings.alert.grace_seconds)
    return PullContext(
        name=name,
        unit=unit,
        due_after=due_after,
        overdue_after=timedelta(seconds=interval_seconds + grace_seconds),
        lookback_days=lookback_days,
        checkpoints=checkpoints,
        store=store,
        warehouse=warehouse,
        spool=spool_of(settings),
        clock=clock,
        set_aside=SetAsideStore(store, folder_of(name), max(settings.set_aside.max_bytes, largest_bytes)),
    )


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

    def begin(self, start: datetime) -> datetime:
        """Where the first run starts, which is recorded as the cursor."""
        self.commit(cursor_at=start)
        return start

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
        # A cursor that a clock ahead of time has moved must not have hours asked for that are not complete yet.
        cursor = min(self.cursor_at or due_at, due_at)
        whole = floor_to(span.end, HOUR_SECONDS)
        start = floor_to(span.start, HOUR_SECONDS)
        end = min(whole if whole == span.end else whole + HOUR, cursor)
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


def was_had(record: Record | None) -> bool:
    """False for a window that has no record, or one that says that the service could not give it."""
    return record is not None and record.version != NOT_HAD


def record_of_nothing(
    window: Window, key: str, *, closed: bool, version: str = "", digest: str = "", min_at: datetime | None = None
) -> Record:
    """The record of a window without rows, or with NOT_HAD of one that waits (since `min_at`) or was set aside."""
    return Record(window, 0, key, version, digest, 0, 0, 0, min_at, None, closed)


def store_rows(
    store: ObjectStore,
    file: BinaryIO,
    *,
    pipeline: str,
    key: str,
    window: Window,
    rows: int,
    digest: str,
    closed: bool,
    refused: int = 0,
    content_type: str = GZIP,
    over: str | None = None,
) -> Record:
    """Store `file` from its beginning as the object of a window; the record of what is there then.

    `digest` tells these rows from others. `over`: the version to replace, whatever it holds ("" = nothing is there);
    None = an object with these rows, or with more, stays. `source_cells` of the record counts the `refused` rows too,
    so what it has more than `rows` are those that were set aside. Raises Conflict when somebody else writes the same
    object at this moment: read the service again, then repeat.
    """
    held = None
    if over is None and (there := store.head(key)) is not None:
        held, over = held_of(there), there.etag
        # Services forget, and give fewer rows of an old hour: what was stored then is worth more.
        if held.digest != digest and (held.rows or 0) > rows:
            log.warning("%s holds %s rows, the service now gives %d: it stays", key, held.rows, rows)
        elif held.digest != digest:
            held = None
    if held is None:
        size_bytes = file.seek(0, 2)
        file.seek(0)
        metadata = {"pipeline": pipeline, "window": str(window), "rows": str(rows), "digest": digest}
        held = Held(store.put(key, file, Put(content_type, metadata, over or "")), digest, rows, size_bytes=size_bytes)
    there_rows = rows if held.rows is None else held.rows
    return Record(
        window=window,
        part=0,
        key=key,
        version=held.version,
        digest=held.digest,
        rows=there_rows,
        size_bytes=held.size_bytes,
        source_cells=there_rows + refused,
        min_at=window.start,
        max_at=window.end,
        closed=closed,
    )


@dataclass(slots=True)
class _RefusedWindow:
    file: BinaryIO
    sample: str
    number: int = 0


class RefusedLines:
    """Lines of a service's files that no event could be made of, on their way to where they are set aside.

    Invariants: the bytes stay as they came; memory is bounded by one line, since what is refused lies on disk until it
    is kept; a line is kept under the window that it belongs to, so that a window that is pulled again adds nothing.
    Close it when it is done with. For one thread.
    """

    def __init__(self, spool: Path) -> None:
        self._spool = spool
        self._found: dict[tuple[tuple[str, ...], str], _RefusedWindow] = {}
        self.not_kept = 0

    def add(self, name: tuple[str, ...], reason: str, line: bytes, sample: str) -> None:
        """Take in a line of the window `name`. A large one gets an object of its own, so that none is cut."""
        if len(line) > LARGE_BYTES:
            # A set aside object has a limit, within which one such line might be cut.
            name = (*name, hashlib.sha256(line).hexdigest()[:16])
        found = self._found.get((name, reason))
        if found is None:
            found = self._found[name, reason] = _RefusedWindow(temporary_file(self._spool), sample)
        found.file.write(line.rstrip(b"\r\n") + b"\n")
        found.number += 1

    def keep(self, store: SetAsideStore) -> list[SetAside]:
        """Keep all, as lines of a ledger. `not_kept` is then how many the store could not be given."""
        entries = []
        for (name, reason), found in self._found.items():
            found.file.seek(0)
            kept = store.keep(
                name, found.file, content_type=LINES, reason=reason, number=found.number, sample=found.sample
            )
            self.not_kept += 0 if kept.key else kept.number
            entries.append(kept.entry)
        return entries

    def close(self) -> None:
        """Free what is spooled. Idempotent."""
        while self._found:
            self._found.popitem()[1].file.close()
