"""Closed windows: rows that came after the closing go to delta objects, and past windows are filled in on request.

Invariants: a closed object never changes, except one of an older version that lacks what tells rows apart (it is
replaced by the window's rows, and its deltas are left empty); a row is in at most one object of its window, since a
delta holds only rows whose key none of the earlier parts has; no live cursor is moved here.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from datetime import datetime
from itertools import count, islice
from typing import Any, TypeVar

from app.core.errors import Conflict, Transient
from app.core.ledger import Ledger, SetAside, Tally
from app.core.ports import Batch, Commit, Encoded, Held, Record
from app.core.runs import Context, Report
from app.core.sync import NOTHING, Pipeline, Task, already_there, settle
from app.core.window import Age, Window, age_of

B = TypeVar("B", bound=Batch)
E = TypeVar("E", bound=Encoded)

DELTAS = 8
log = logging.getLogger(__name__)


def fill(pipeline: Pipeline[B, E], context: Context, partition: str, span: Window, now: datetime) -> Report:
    """Bring every due window of `span` up to the source: what was never written is written and closed, what was closed
    gets its late rows as a delta. A closed window whose count did not move is not read.
    """
    due = (w for w in pipeline.grid.windows(span.start, span.end) if _is_due(pipeline, w, now))
    report = Report()
    while step := list(islice(due, pipeline.grid.count_windows)):
        counts = pipeline.source.counts(partition, step)
        parts = _parts(pipeline, partition, step)
        for window in step:
            context.stop.check()
            count = counts.get((partition, window.start), NOTHING)
            report += _fill_window(pipeline, context, Task(partition, window, count, None, final=True), parts)
            context.progress.advance(done=1)
    return report


def _is_due(pipeline: Pipeline[B, E], window: Window, now: datetime) -> bool:
    return age_of(window, now, pipeline.grid.grace_seconds) is Age.DUE


def _parts(pipeline: Pipeline[B, E], partition: str, windows: Sequence[Window]) -> dict[datetime, list[Record]]:
    parts: dict[datetime, list[Record]] = {}
    for record in pipeline.checkpoints.records(pipeline.name, partition, windows[0].start, windows[-1].end):
        parts.setdefault(record.window.start, []).append(record)
    return parts


def _fill_window(pipeline: Pipeline[B, E], context: Context, task: Task, known: dict[datetime, list[Record]]) -> Report:
    parts = known.get(task.window.start, [])
    base = parts[0] if parts else None
    if base is None or not base.closed:
        if base is None and task.count == NOTHING:
            return Report()
        return settle(pipeline, context, replace(task, record=base))
    if task.count.cells == base.source_cells:
        log.debug("%s %s: %d values counted, as confirmed", task.partition, task.window, task.count.cells)
        return Report(ledger=already_there(pipeline.unit, task.count))
    return append_late(pipeline, context, replace(task, record=base), parts)


def append_late(pipeline: Pipeline[B, E], context: Context, task: Task, parts: Sequence[Record]) -> Report:
    """Write what no part holds yet as the next delta. A delta that we did not know of is taken in and read as well.

    Where parts of an older version cannot be told apart from what the source has, all of the window is written again.
    """
    held = [as_written(pipeline, part) for part in parts]
    for _ in range(DELTAS):
        context.stop.check()
        key = pipeline.sink.key(task.partition, task.window, held[-1].part + 1)
        with closing(pipeline.source.read(task.partition, task.window, task.count, None)) as batch:
            late = pipeline.source.missing(batch, _rows_of(pipeline, held))
            with closing(late):
                ledger = Ledger(pipeline.unit, late.accounts, _set_aside(pipeline, context, task, batch))
                if _is_outdated(pipeline, batch, held):
                    ledger = replace(ledger, fields=_corrected(batch.accounts, late.accounts))
                    return _write_whole(pipeline, context, task, held, Report(late_rows=late.rows, ledger=ledger))
                if late.rows == 0:
                    return _note_count(pipeline, context, task, held, Report(ledger=ledger))
                if context.dry_run:
                    return Report(rows=late.rows, windows=1, late_rows=late.rows, ledger=ledger)
                delta, stored_bytes = _write_delta(pipeline, task, key, late, held[-1].part + 1)
                held.append(delta)
                if stored_bytes is not None:
                    log.info("%s: %d late rows of a closed window", key, late.rows)
                    report = Report(rows=late.rows, bytes=stored_bytes, windows=1, late_rows=late.rows, ledger=ledger)
                    return _note_count(pipeline, context, task, held, report)
    raise Transient(
        f"{task.partition} {task.window}: {DELTAS} delta objects appeared while late rows were written",
        "another writer uses the same bucket and prefix: give each Headwater its own S3_PREFIX, or one PostgreSQL",
    )


def is_ahead(pipeline: Pipeline[B, E], record: Record, there: Held) -> bool:
    """True when the object was written over one of an older version by a process that died before its commit."""
    of_older_version = pipeline.outdated is not None and record.part == 0 and not record.fields
    return of_older_version and there.version != record.version and there.tags != ""


def as_written(pipeline: Pipeline[B, E], part: Record) -> Record:
    """The record, following an object that `is_ahead` of it."""
    there = pipeline.sink.head(part.key) if pipeline.outdated and part.part == 0 else None
    if there is None or not is_ahead(pipeline, part, there):
        return part
    rows = part.rows if there.rows is None else there.rows
    return replace(part, version=there.version, digest=there.digest, rows=rows, size_bytes=there.size_bytes)


def _is_outdated(pipeline: Pipeline[B, E], batch: B, parts: Sequence[Record]) -> bool:
    if pipeline.outdated is None:
        return False
    held = (pipeline.sink.head(part.key) for part in parts)
    return any(pipeline.outdated(batch, there) for there in held if there is not None)


def _corrected(read: Mapping[str, Tally], late: Mapping[str, Tally]) -> Mapping[str, Tally]:
    """What parts hold without their tags is not already there: it is corrected."""
    return {
        name: replace(
            late[name],
            already_there=tally.already_there,
            corrected=late[name].already_there - tally.already_there,
        )
        for name, tally in read.items()
    }


def _write_whole(
    pipeline: Pipeline[B, E], context: Context, task: Task, parts: Sequence[Record], report: Report
) -> Report:
    """Put the source's rows, and those that only parts hold, into the object; then leave the deltas empty.

    A reader may see rows of a delta twice between the two; the other order could lose them. Versions are read before
    the source is. `report` says what is late; what parts held without their tags is corrected.
    """
    parts = [*parts, *_unknown_deltas(pipeline, task, parts[-1].part + 1)]
    versions = {part.key: there.version for part in parts if (there := pipeline.sink.head(part.key))}
    base, *deltas = parts
    with ExitStack() as opened:
        batch = opened.enter_context(closing(pipeline.source.read(task.partition, task.window, task.count, None)))
        accounts = batch.accounts
        for key, version in versions.items():
            batch = opened.enter_context(closing(pipeline.source.union(batch, pipeline.sink.read(key, version))))
        report += Report(rows=batch.rows, windows=1)
        if context.dry_run:
            return report
        written = _put(pipeline, task, base, batch, versions.get(base.key))
        written = replace(written, fields={name: tally.new for name, tally in accounts.items()})
        pipeline.checkpoints.commit(pipeline.name, task.partition, Commit((written,)), context.lease)
        log.info("%s: written again with all tags, %d rows", base.key, batch.rows)
        nothing = pipeline.source.missing(batch, pipeline.sink.read(base.key, written.version))
        with closing(nothing):
            emptied = [
                _put(pipeline, task, delta, nothing, versions[delta.key]) for delta in deltas if delta.key in versions
            ]
    if emptied:
        pipeline.checkpoints.commit(pipeline.name, task.partition, Commit(tuple(emptied)), context.lease)
    return report + Report(bytes=written.size_bytes)


def _unknown_deltas(pipeline: Pipeline[B, E], task: Task, first: int) -> Iterator[Record]:
    """Deltas of a process that died before it could commit them."""
    for part in count(first):
        key = pipeline.sink.key(task.partition, task.window, part)
        if pipeline.sink.head(key) is None:
            break
        yield _delta(task, key, part)


def _put(pipeline: Pipeline[B, E], task: Task, part: Record, batch: B, expected: str | None) -> Record:
    """The record of a part that now holds the batch."""
    with closing(pipeline.sink.encode(task.partition, task.window, batch)) as encoded:
        version = pipeline.sink.put(part.key, encoded, expected)
        return replace(
            part,
            version=version,
            digest=batch.digest,
            rows=batch.rows,
            size_bytes=encoded.size_bytes,
            source_cells=task.count.cells,
            min_at=batch.min_at,
            max_at=batch.max_at,
        )


def _set_aside(pipeline: Pipeline[B, E], context: Context, task: Task, batch: B) -> Sequence[SetAside]:
    if pipeline.set_aside is None or context.dry_run:
        return ()
    return pipeline.set_aside(task.partition, task.window, batch)


def _rows_of(pipeline: Pipeline[B, E], parts: Sequence[Record]) -> Iterator[Any]:
    """Rows of all parts as they are there now: a bucket that was copied gives its objects new versions."""
    for part in parts:
        there = pipeline.sink.head(part.key)
        if there is None:
            log.warning("%s is gone: its rows are taken for late ones", part.key)
        else:
            yield from pipeline.sink.read(part.key, there.version)


def _write_delta(pipeline: Pipeline[B, E], task: Task, key: str, late: B, part: int) -> tuple[Record, int | None]:
    """The delta's record, and its bytes; None when an unknown object stood under that name and has to be read first."""
    delta = replace(_delta(task, key, part), digest=late.digest, rows=late.rows, min_at=late.min_at, max_at=late.max_at)
    with closing(pipeline.sink.encode(task.partition, task.window, late)) as encoded:
        try:
            version = pipeline.sink.put(key, encoded, None)
        except Conflict:
            there = pipeline.sink.head(key)
            if there is None:
                raise
            if there.digest != late.digest:
                return replace(delta, version=there.version, digest=there.digest, rows=there.rows or 0), None
            version = there.version
        return replace(delta, version=version, size_bytes=encoded.size_bytes), encoded.size_bytes


def _delta(task: Task, key: str, part: int) -> Record:
    return Record(
        window=task.window,
        part=part,
        key=key,
        version="",
        digest="",
        rows=0,
        size_bytes=0,
        source_cells=task.count.cells,
        min_at=None,
        max_at=None,
        closed=True,
    )


def _note_count(
    pipeline: Pipeline[B, E], context: Context, task: Task, held: Sequence[Record], report: Report
) -> Report:
    """Commit the deltas and the new count together, so that the window is not read again before it moves again."""
    base = replace(held[0], source_cells=task.count.cells)
    if not context.dry_run:
        commit = Commit((base, *held[1:]))
        pipeline.checkpoints.commit(pipeline.name, task.partition, commit, context.lease)
    return report
