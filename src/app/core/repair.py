"""Past windows: late and corrected rows, what was never written, and what was taken away or damaged since.

All of it is the one protocol of `sync`, with the destination asked what it holds. No live cursor is moved here.
"""

import logging
from dataclasses import replace
from datetime import datetime
from itertools import islice
from typing import TypeVar

from app.core.errors import Permanent
from app.core.pipeline import NOTHING, Batch, Encoded, Pipeline, Task
from app.core.runs import Context, Report
from app.core.sync import already_there, settle
from app.core.windows import Age, Window, age_of

B = TypeVar("B", bound=Batch)
E = TypeVar("E", bound=Encoded)

GONE_HINT = "restore an earlier version of the object, or a backup: the source cannot give these rows again"
log = logging.getLogger(__name__)


def fill(
    pipeline: Pipeline[B, E], context: Context, partition: str, span: Window, now: datetime, *, by_content: bool = False
) -> Report:
    """Bring every due window of `span` up to the source: what was never written is written and closed, and late rows go
    into the object of their window. `by_content`: also where the count is as confirmed, since values may have changed.
    """
    due = (window for window in pipeline.grid.windows(span.start, span.end) if _is_due(pipeline, window, now))
    report = Report()
    while step := list(islice(due, pipeline.grid.count_windows)):
        counts = pipeline.source.counts(partition, step)
        found = pipeline.checkpoints.records(pipeline.name, partition, step[0].start, step[-1].end)
        with_deltas = {record.window.start for record in found if record.part}
        records = {record.window.start: record for record in found if not record.part}
        for window in step:
            context.stop.check()
            count = counts.get((partition, window.start), NOTHING)
            record = records.get(window.start)
            confirmed = record is not None and record.closed and record.source_cells == count.cells
            if record is None and count == NOTHING:
                continue
            if confirmed and not by_content and window.start not in with_deltas:
                log.debug("%s %s: %d values counted, as confirmed", partition, window, count.cells)
                report += Report(ledger=already_there(pipeline.unit, count))
            else:
                report += settle(pipeline, context, Task(partition, window, count, record, final=True, asks=True))
            context.progress.advance(done=1)
    return report


def write_again(pipeline: Pipeline[B, E], context: Context, partition: str, span: Window, now: datetime) -> Report:
    """Write every due window of `span` again, also what is right. Rows that only an object has are told in the notes;
    they stay unless the pipeline's `shrink` takes them out.
    """
    due = (window for window in pipeline.grid.windows(span.start, span.end) if _is_due(pipeline, window, now))
    report = Report()
    while step := list(islice(due, pipeline.grid.count_windows)):
        counts = pipeline.source.counts(partition, step)
        found = pipeline.checkpoints.records(pipeline.name, partition, step[0].start, step[-1].end)
        records = {record.window.start: record for record in found if not record.part}
        for window in step:
            context.stop.check()
            count = counts.get((partition, window.start), NOTHING)
            if count != NOTHING or pipeline.sink.head(pipeline.sink.key(partition, window, 0)) is not None:
                record = records.get(window.start)
                task = Task(partition, window, count, record, final=True, asks=True, always_writes=True)
                report += settle(pipeline, context, task)
            context.progress.advance(done=1)
    return report


def _is_due(pipeline: Pipeline[B, E], window: Window, now: datetime) -> bool:
    return age_of(window, now, pipeline.grid.grace_seconds) is Age.DUE


def heal_window(pipeline: Pipeline[B, E], context: Context, partition: str, window: Window, now: datetime) -> Report:
    """Make the window's object hold what the source returns and what only it still has; take out what is there twice.

    An object that cannot be read, or that another program put there, is replaced. Idempotent. Raises Permanent when
    rows are lost at both ends, and what the ports raise.
    """
    count = pipeline.source.counts(partition, [window]).get((partition, window.start), NOTHING)
    found = pipeline.checkpoints.records(pipeline.name, partition, window.start, window.end)
    record = next((each for each in found if not each.part), None)
    task = Task(partition, window, count, record, final=_is_due(pipeline, window, now), asks=True, mends=True)
    there = pipeline.sink.head(pipeline.sink.key(partition, window, 0))
    if record is not None and there is not None and there.version != record.version and not there.digest:
        return _replace(pipeline, context, task)
    try:
        return settle(pipeline, context, task)
    except Permanent as error:
        log.warning("%s", error)
        return _replace(pipeline, context, task)


def _replace(pipeline: Pipeline[B, E], context: Context, task: Task) -> Report:
    """Write the source's rows over an object whose own are none of ours."""
    if task.count == NOTHING:
        raise Permanent(f"{task.partition} {task.window}: is damaged, and the source has no rows of it", GONE_HINT)
    return settle(pipeline, context, replace(task, replaces=True))
