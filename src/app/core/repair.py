"""Past windows: late and corrected rows, windows that were never written, objects that were removed or damaged later,
and the daily reconcile of records with both ends.

All of it uses the protocol of `sync`, with the destination queried for what it holds. Live cursors do not move here.
"""

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from itertools import islice
from typing import TypeVar

from app.core.errors import Permanent, Rejected
from app.core.pipeline import (
    FOREIGN,
    MISSING,
    NOTHING,
    Batch,
    Count,
    Encoded,
    Objects,
    Pipeline,
    Record,
    Sums,
    WindowTask,
)
from app.core.runs import Context, Done, Failure, Report
from app.core.sync import delete_deltas, ledger_of_counts, sync_window
from app.core.windows import Age, FailedWindows, Window, age_of

B = TypeVar("B", bound=Batch)
E = TypeVar("E", bound=Encoded)

GONE_HINT = "restore an earlier version of the object, or a backup: the source no longer has these rows"
log = logging.getLogger(__name__)


def fill(
    pipeline: Pipeline[B, E],
    context: Context,
    partition: str,
    span: Window,
    now: datetime,
    *,
    done: Done,
    by_content: bool = False,
    always_writes: bool = False,
) -> None:
    """Bring every due window of `span` up to date: missing windows are written and closed, late rows are merged into
    the object of their window.

    `by_content`: also windows whose count is confirmed, since values may have changed. `always_writes`: also rewrites
    objects that are right; rows that only an object has are listed in the notes, and stay unless the pipeline's
    `shrink` removes them. `done` has received what was done also when a failure of several windows in a row is raised.
    """
    failed = FailedWindows()
    for step in _steps(pipeline, span, now):
        counts = pipeline.source.counts(partition, step)
        found = pipeline.checkpoints.records(pipeline.name, partition, step[0].start, step[-1].end)
        with_deltas = {record.window.start for record in found if record.part}
        records = {record.window.start: record for record in found if not record.part}
        for window in step:
            context.stop.check()
            count = counts.get((partition, window.start), NOTHING)
            record = records.get(window.start)
            # An unchanged count means that no row was added or removed; values may still have changed.
            confirmed = record is not None and record.closed and record.source_cells == count.cells
            is_new = record is None
            if always_writes and count == NOTHING:
                is_new = pipeline.sink.head(pipeline.sink.key(partition, window, 0)) is None
            if confirmed and not (by_content or always_writes or window.start in with_deltas):
                log.debug("%s %s: %d values counted, as confirmed", partition, window, count.cells)
                done(Report(ledger=ledger_of_counts(pipeline.unit, [count], "already_there")))
            elif count != NOTHING or not is_new:
                task = WindowTask(partition, window, count, record, final=True, asks=True, always_writes=always_writes)
                with failed.one():
                    done(sync_window(pipeline, context, task))
                failed.check_outage()
            context.progress.advance(done=1)
    done(_failures(partition, failed))


def _failures(partition: str, failed: FailedWindows) -> Report:
    first = failed.first
    return Report(failures=(Failure(partition, first.message, first.hint),)) if first else Report()


def _steps(pipeline: Pipeline[B, E], span: Window, now: datetime) -> Iterator[Sequence[Window]]:
    """The due windows of `span`, in groups as large as the source counts at once."""
    due = (window for window in pipeline.grid.windows(span.start, span.end) if _is_due(pipeline, window, now))
    while step := list(islice(due, pipeline.grid.count_windows)):
        yield step


def _is_due(pipeline: Pipeline[B, E], window: Window, now: datetime) -> bool:
    return age_of(window, now, pipeline.grid.grace_seconds) is Age.DUE


def heal_window(pipeline: Pipeline[B, E], context: Context, partition: str, window: Window, now: datetime) -> Report:
    """Make the window's object hold what the source returns plus what only the object still has, without duplicate
    rows.

    An object that cannot be read, or that another program wrote, is replaced. Idempotent. Raises Permanent when rows
    are lost at both ends, and what the ports raise.
    """
    count = pipeline.source.counts(partition, [window]).get((partition, window.start), NOTHING)
    found = pipeline.checkpoints.records(pipeline.name, partition, window.start, window.end)
    record = next((each for each in found if not each.part), None)
    task = WindowTask(partition, window, count, record, final=_is_due(pipeline, window, now), asks=True, mends=True)
    there = pipeline.sink.head(pipeline.sink.key(partition, window, 0))
    # Only Headwater notes a digest. Without one, another program wrote the object and its rows are not ours.
    if record is not None and there is not None and there.version != record.version and not there.digest:
        return _replace(pipeline, context, task)
    try:
        return sync_window(pipeline, context, task)
    except Permanent as error:
        log.warning("%s", error)
        return _replace(pipeline, context, task)


def _replace(pipeline: Pipeline[B, E], context: Context, task: WindowTask) -> Report:
    """Write the source's rows over an object that Headwater did not write, or that cannot be read."""
    if task.count == NOTHING:
        raise Permanent(f"{task.partition} {task.window}: is damaged, and the source has no rows of it", GONE_HINT)
    return sync_window(pipeline, context, replace(task, replaces=True))


# The reconcile: past windows in a listing of the destination and in sums of the source, compared with their records.
#
# Invariants: the state alone is never trusted; differences go through the protocol of `sync`. An object that vanished,
# or that another program replaced, is reported and left alone unless healing is on: a lifecycle rule may have removed
# it on purpose.


ROUNDING = 2.0**-53  # maximum relative rounding error of one addition
HEAL_HINT = "if this was not intended, run verify with --heal, or set EXPORT_HEAL=auto"

Asked = Callable[[str, Sequence[Window], Collection[str]], Mapping[datetime, Mapping[str, Sums]]]
"""Partition, adjacent windows, numeric fields -> the source's sums by window start and field."""


def same_sums(asked: Mapping[str, Sums], known: Mapping[str, Sums]) -> bool:
    """True when these may be sums of the same values. Swapped values have the same sums."""
    return asked.keys() == known.keys() and all(_same(each, known[name]) for name, each in asked.items())


def _same(asked: Sums, known: Sums) -> bool:
    if (asked.values, asked.least, asked.greatest) != (known.values, known.least, known.greatest):
        return False
    if asked.total is None or known.total is None:
        return asked.total is known.total
    return abs(asked.total - known.total) <= 2 * known.values * ROUNDING * known.magnitude


def describe_trouble(troubles: Mapping[str, int]) -> Sequence[str]:
    """Describe for people what is wrong with how many objects."""
    words = {MISSING: "missing at the destination", FOREIGN: "replaced by another program"}
    return [f"{troubles[trouble]} objects {said}" for trouble, said in words.items() if troubles.get(trouble)]


def check_objects(
    pipeline: Pipeline[B, E],
    partition: str,
    records: Sequence[Record],
    listed: Mapping[datetime, Objects],
    *,
    dry_run: bool = False,
) -> Mapping[datetime, str]:
    """The trouble of each recorded window, stored in its record: an object that is gone, replaced by another program,
    or back. Works with any listing made after `records` were read.
    """
    found = troubles_of(pipeline, records, listed)
    changed = [(record, trouble) for record, trouble in found if trouble != record.trouble]
    for record, trouble in changed:
        if trouble:
            said = "is missing at the destination" if trouble == MISSING else "was not written by Headwater"
            log.warning("%s: %s (%s)", record.key, said, HEAL_HINT)
        else:
            log.info("%s: is as it was confirmed again", record.key)
    if changed and not dry_run:
        pipeline.checkpoints.mark(pipeline.name, partition, changed)
    return {record.window.start: trouble for record, trouble in found}


def troubles_of(
    pipeline: Pipeline[B, E], records: Sequence[Record], listed: Mapping[datetime, Objects]
) -> Sequence[tuple[Record, str]]:
    """The record of each window's own object, and its trouble. Only objects with another version need a request."""

    def trouble(record: Record) -> str:
        objects = listed.get(record.window.start, {})
        if 0 not in objects:
            return MISSING
        key, version = objects[0]
        if version == record.version:
            return ""
        there = pipeline.sink.head(key)
        return FOREIGN if there is not None and not there.digest else ""

    return [(record, trouble(record)) for record in records if not record.part and record.version]


def reconcile(
    pipeline: Pipeline[B, E],
    context: Context,
    partition: str,
    span: Window,
    now: datetime,
    *,
    done: Done,
    asked: Asked,
    by_content: Window | None,
    heals: bool,
) -> None:
    """Compare every due window of `span` with its record, and bring it up to date where they differ.

    `by_content`: windows that start in it are re-read at the source even if their sums match. `heals`: objects that are
    gone or foreign are rewritten. `done`: see `fill`.
    """
    failed = FailedWindows()
    for step in _steps(pipeline, span, now):
        context.progress.advance(total=len(step))
        records = pipeline.checkpoints.records(pipeline.name, partition, step[0].start, step[-1].end)
        listed = pipeline.deltas.objects(partition, step) if pipeline.deltas else {}
        numbers = {name for record in records for name, sums in record.sums.items() if sums.total is not None}
        sums = asked(partition, step, numbers)
        troubles = check_objects(pipeline, partition, records, listed, dry_run=context.dry_run)
        recorded: dict[datetime, list[Record]] = {}
        for record in records:
            recorded.setdefault(record.window.start, []).append(record)
        for window in step:
            context.stop.check()
            with failed.one():
                report = _reconciled(
                    pipeline,
                    context,
                    partition,
                    window,
                    now,
                    records=recorded.get(window.start, ()),
                    objects=_unfolded(pipeline, context, listed.get(window.start, {})),
                    sums=sums.get(window.start, {}),
                    trouble=troubles.get(window.start, ""),
                    reads=by_content is not None and by_content.start <= window.start < by_content.end,
                    heals=heals,
                )
                done(report)
            failed.check_outage()
            context.progress.advance(done=1)
    done(_failures(partition, failed))


def _reconciled(
    pipeline: Pipeline[B, E],
    context: Context,
    partition: str,
    window: Window,
    now: datetime,
    *,
    records: Sequence[Record],
    objects: Objects,
    sums: Mapping[str, Sums],
    trouble: str,
    reads: bool,
    heals: bool,
) -> Report:
    """Do whatever one window needs; a window that cannot be repaired is a failure of its own.

    `records`, `objects`: those of the window; `sums`: of the source; `trouble`: see `Record.trouble`.
    """
    record = next((each for each in records if not each.part), None)
    fields = {name: each.values for name, each in sums.items()}
    count = Count(sum(fields.values()), max(fields.values(), default=0), fields)
    # The destination holds exactly the confirmed, closed version and no delta, so it need not be queried again.
    versions = {part: version for part, (_, version) in objects.items()}
    is_as_recorded = (
        record is not None
        and record.closed
        and bool(record.source_digest)
        and len(records) == 1
        and versions == {0: record.version}
    )
    is_in_trouble = bool(trouble) and record is not None and record.closed
    is_confirmed = record is not None and is_as_recorded and same_sums(sums, record.sums)
    said = "in trouble" if is_in_trouble else "as confirmed" if is_confirmed else "differs"
    log.debug("%s %s: %d values counted, %s", partition, window, count.cells, said)
    if record is None and not objects and not sums:
        return Report()
    has_more = record is not None and record.digest != record.source_digest
    if is_confirmed and not reads and not (has_more and pipeline.shrink):
        return Report(ledger=ledger_of_counts(pipeline.unit, [count], "already_there"))
    left = ledger_of_counts(pipeline.unit, [count], "waiting")
    if is_in_trouble and not heals:
        return Report(ledger=left)
    try:
        if is_in_trouble:
            return heal_window(pipeline, context, partition, window, now)
        return sync_window(
            pipeline, context, WindowTask(partition, window, count, record, final=True, asks=not is_as_recorded)
        )
    except (Permanent, Rejected) as error:
        return Report(failures=(Failure(partition, error.message, error.hint),), ledger=left)


def _unfolded(pipeline: Pipeline[B, E], context: Context, objects: Objects) -> Objects:
    """`objects` without deltas whose rows the object holds and whose deletion failed; the deletion is retried here."""
    parts = [part for part in objects if part]
    held = pipeline.sink.head(objects[0][0]) if parts and 0 in objects else None
    folded = [part for part in parts if held is not None and part <= held.folded]
    if folded and not context.dry_run:
        delete_deltas(pipeline, [objects[part][0] for part in folded])
    return {part: found for part, found in objects.items() if part not in folded}
