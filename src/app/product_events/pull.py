"""A pull and its partitions: where hours land, which are due, how their rows are stored, and what is recorded of them.

Invariants: nothing is connected before the first run; a partition that fails is noted beside its cursor and the others
go on; the cursor moves with the record of an hour, in one transaction; a dry run records nothing.
"""

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import BinaryIO, Generic, Protocol, TypeVar

from app.config.settings import Settings
from app.core.errors import LeaseLost, Permanent, Rejected, Transient
from app.core.files import temporary_file
from app.core.ledger import SetAside
from app.core.pipeline import Checkpoints, Commit, Record
from app.core.runs import Context, Failure, Job, Report, ReportSum
from app.core.verify import Chart, Verification
from app.core.windows import HOUR_SECONDS, Window, floor_to
from app.object_store.port import ObjectStore
from app.object_store.set_aside import LINES, SetAsideStore, folder_of
from app.ops.connection_checks import System
from app.product_events.mapping import Events

HOUR = timedelta(hours=1)
LARGE_BYTES = 1 << 20
log = logging.getLogger(__name__)

S = TypeVar("S")


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


def pull_context(
    settings: Settings,
    interval_seconds: float,
    lookback_days: int,
    *,
    name: str,
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
    def waiting(self) -> str:
        """The pipeline whose records are hours that wait to be tried again: `min_at` is when they failed first."""
        return f"{self.pull.name}_waiting"

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


class PartitionPull(Protocol):
    """One partition in one run. Methods raise what the ports and the service raise; what was committed stays."""

    run: PartitionRun

    def pull_due(self) -> Report:
        """Pull what is due. `more`: more is due."""

    def pull_again(self, hours: Window) -> Report:
        """Pull hours again, whatever is recorded. The cursor does not move."""

    def close(self) -> None:
        """Free what it holds. Idempotent."""


@dataclass(frozen=True, slots=True)
class PullPipeline(Generic[S]):
    """What `main` wires, see `WindowedPipeline`, and the `service` that routes ask as well. `runs` gives the partitions
    of a run.
    """

    pull: PullContext
    interval_seconds: int
    off: str
    runs: Callable[[Context], Sequence[PartitionPull]]
    verification: Verification
    chart: Chart
    service: S
    checks: Sequence[System] = ()

    @property
    def name(self) -> str:
        """That of the job."""
        return self.pull.name

    @property
    def job(self) -> Job:
        """Pulls what is due of every partition."""

        def work(context: Context) -> Report:
            return self._each(context, lambda one: one.pull_due())

        return Job(self.name, self.interval_seconds, work, self.off)

    def backfill(self, context: Context, span: Window) -> Report:
        """Pull the hours of `span` again, in every partition."""
        return self._each(context, lambda one: one.run.fill(span, one.pull_again))

    def _each(self, context: Context, work: Callable[[PartitionPull], Report]) -> Report:
        """`work` for each partition. Raises LeaseLost, Stopped, and what a store that cannot be used raises."""
        pull, total = self.pull, ReportSum(context.done)
        pull.spool.mkdir(parents=True, exist_ok=True)
        # Conditions are what keeps two writers apart; a store is tried once whether it honours them.
        if not pull.store.conditional:
            pull.store.probe()
        for one in self.runs(context):
            partition = one.run.name
            try:
                with closing(one):
                    total(work(one))
            # Another process goes on with all partitions; anything else is the fault of one of them.
            except LeaseLost:
                raise
            except (Transient, Permanent, Rejected) as error:
                if not context.dry_run:
                    pull.checkpoints.fail(pull.name, partition, str(error), context.lease)
                total(Report(failures=(Failure(partition, error.message, error.hint),)))
        return total.total


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
