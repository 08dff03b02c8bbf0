"""Assembles a pull: its partitions run by run, backfill of a span of hours, and lines that are set aside.

Invariants: nothing connects before the first run; a partition that fails is recorded with its cursor and the others
continue.
"""

import hashlib
import logging
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Generic, TypeVar

from app.core.errors import LeaseLost, Permanent, Rejected, Transient
from app.core.files import temporary_file
from app.core.ledger import SetAside
from app.core.pipeline import NEVER_AFTER, QUIET_AFTER, USUAL_HOURS
from app.core.runs import Context, Failure, Job, Report, ReportSum
from app.core.verify import GapMapSource, Verification
from app.core.windows import HOUR_SECONDS, Window, floor_to
from app.object_store.set_aside import LINES, SetAsideStore
from app.ops.connection_checks import ConnectionCheck
from app.product_events.hours import HOUR, PartitionRun, PullContext

LARGE_BYTES = 1 << 20
ANOTHER_PROJECT = "check that it is the right project, in the right region, and that events reach it"
log = logging.getLogger(__name__)

S = TypeVar("S")


@dataclass(frozen=True, slots=True)
class PullPipeline(Generic[S]):
    """What `main` wires, see `WindowedPipeline`, plus the `service` that routes also query. `runs` gives the partitions
    of a run.
    """

    pull: PullContext
    off: str
    runs: Callable[[Context], Sequence[PartitionRun]]
    verification: Verification
    chart: GapMapSource
    service: S
    checks: Sequence[ConnectionCheck] = ()

    @property
    def name(self) -> str:
        """The job's name."""
        return self.pull.name

    @property
    def job(self) -> Job:
        """Pulls what is due in every partition, and notes a source that returns no rows, which may be normal."""

        def due(one: PartitionRun) -> Report:
            report = one.pull_due()
            said = "" if report.more else silence(self.pull, one.name)
            if said:
                log.warning("%s: %s", self.name, said)
            return report + Report(notes=(f"warning: {said}",) if said else ())

        return Job(self.name, self.pull.given.interval_seconds, lambda context: self._each(context, due), self.off)

    def backfill(self, context: Context, span: Window) -> Report:
        """Pull the hours of `span` again, in every partition."""
        return self._each(context, lambda one: _filled(one, span))

    def _each(self, context: Context, work: Callable[[PartitionRun], Report]) -> Report:
        """Run `work` for each partition. Raises LeaseLost, Stopped, and the error of an unusable store."""
        pull, total = self.pull, ReportSum(context.done)
        pull.spool.mkdir(parents=True, exist_ok=True)
        # Conditional writes keep two writers apart; probe once whether the store honours them.
        if not pull.store.conditional:
            pull.store.probe()
        for one in self.runs(context):
            try:
                with closing(one):
                    total(work(one))
            # After a lost lease another process runs all partitions; any other error affects this partition only.
            except LeaseLost:
                raise
            except (Transient, Permanent, Rejected) as error:
                if not context.dry_run:
                    pull.checkpoints.fail(pull.name, one.name, str(error), context.lease)
                total(Report(failures=(Failure(one.name, error.message, error.hint),)))
        return total.total


def _filled(one: PartitionRun, span: Window) -> Report:
    """Pull the hours of `span` up to the cursor again; the cursor stays. Raises Rejected when no hour is left."""
    due_at = one.pull.due_at
    # If a fast clock moved the cursor ahead, do not request hours that are not complete yet.
    cursor = min(one.cursor_at or due_at, due_at)
    start, whole = floor_to(span.start, HOUR_SECONDS), floor_to(span.end, HOUR_SECONDS)
    end = min(whole if whole == span.end else whole + HOUR, cursor)
    if start >= end:
        raise Rejected(
            f"nothing was filled: the job has pulled {one.name} up to {cursor:%Y-%m-%dT%H:%MZ}, not {span} yet",
            f"give an earlier span, or run the job, which pulls later hours by itself: "
            f"python -m app run {one.pull.name}",
        )
    report = one.pull_again(Window(start, end))
    if report.more:
        return report
    total, hours, unit = report.ledger.total, (end - start) // HOUR, one.pull.unit
    note = f"{one.name}: {hours} hours asked for again: {total.new} {unit} are new, {total.already_there} were there"
    left = f"; the job itself pulls those from {cursor:%Y-%m-%dT%H:%MZ} on" if end < span.end else ""
    return report + Report(notes=(note + left,))


def silence(pull: PullContext, partition: str) -> str:
    """A warning about a source that responds but returns no rows; "" when it returns some, or is too new to tell.

    Both services return empty data for the wrong project or application, just as for one without activity.
    """
    first_at = pull.checkpoints.starts(pull.name).get(partition)
    cursor_at = pull.checkpoints.cursors(pull.name).get(partition)
    if first_at is None or cursor_at is None:
        return ""
    if any(
        record.rows for record in pull.checkpoints.records(pull.name, partition, cursor_at - QUIET_AFTER, cursor_at)
    ):
        return ""  # the usual case: no need to read the rest
    records = pull.checkpoints.records(pull.name, partition, first_at, cursor_at)
    filled = [record.window.end for record in records if record.rows]
    if not filled and cursor_at - first_at >= NEVER_AFTER:
        return f"{partition} has returned no row since {first_at:%Y-%m-%d}: {ANOTHER_PROJECT}"
    if len(filled) >= USUAL_HOURS and cursor_at - filled[-1] >= QUIET_AFTER:
        return f"{partition} has returned no row since {filled[-1]:%Y-%m-%d %H:%M}Z: {ANOTHER_PROJECT}"
    return ""


def heard(pull: PullContext, ping: Callable[[], str], start: str) -> Callable[[], str]:
    """`ping`, plus the `silence` warnings of its partitions whose names begin with `start`."""

    def check() -> str:
        names = sorted(name for name in pull.checkpoints.cursors(pull.name) if name.startswith(start))
        return "; ".join([ping(), *filter(None, (silence(pull, name) for name in names))])

    return check


@dataclass(slots=True)
class _RefusedWindow:
    file: BinaryIO
    sample: str
    number: int = 0


class RefusedLines:
    """Lines of a service's files that are not valid events, spooled until they are set aside.

    Invariants: the bytes stay unchanged; memory is bounded by one line, since refused lines are on disk until they are
    kept; a line is kept under its window, so pulling a window again adds nothing. Close it after use. Not thread-safe.
    """

    def __init__(self, spool: Path) -> None:
        self._spool = spool
        self._found: dict[tuple[tuple[str, ...], str], _RefusedWindow] = {}
        self.not_kept = 0

    def add(self, name: tuple[str, ...], reason: str, line: bytes, sample: str) -> None:
        """Add a line of the window `name`. A large line gets its own object, so that it is not truncated."""
        if len(line) > LARGE_BYTES:
            # A set-aside object has a size limit, which could truncate such a line.
            name = (*name, hashlib.sha256(line).hexdigest()[:16])
        found = self._found.get((name, reason))
        if found is None:
            found = self._found[name, reason] = _RefusedWindow(temporary_file(self._spool), sample)
        found.file.write(line.rstrip(b"\r\n") + b"\n")
        found.number += 1

    def keep(self, store: SetAsideStore) -> list[SetAside]:
        """Set aside all lines; returns ledger entries. `not_kept` counts lines that the store could not take."""
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
        """Free the spool. Idempotent."""
        while self._found:
            self._found.popitem()[1].file.close()
