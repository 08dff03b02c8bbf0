"""Mending one window: what was taken away, damaged or put in its place is written again, what is whole is not touched.

Invariants: an object that still has its confirmed version and can be read is whole and stays as it is, so a closed
object changes here only as `late` says; each write is a compare-and-swap on the version that stood there when its rows
were read; nothing is written over when the source has no rows to write.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from datetime import datetime
from typing import Any, TypeVar

from app.core.errors import Permanent
from app.core.late import append_late, as_written
from app.core.ports import Batch, Commit, Encoded, Record
from app.core.runs import Context, Report
from app.core.sync import NOTHING, Pipeline, Task, settle
from app.core.window import Age, Window, age_of

B = TypeVar("B", bound=Batch)
E = TypeVar("E", bound=Encoded)

GONE_HINT = "restore an earlier version of the object, or a backup: the source cannot give these rows again"
log = logging.getLogger(__name__)


def heal_window(pipeline: Pipeline[B, E], context: Context, partition: str, window: Window, now: datetime) -> Report:
    """Write what is missing or damaged of the window's objects, and commit it. Idempotent.

    Raises Permanent when rows are lost at both ends, and what the ports raise.
    """
    count = pipeline.source.counts(partition, [window]).get((partition, window.start), NOTHING)
    found = pipeline.checkpoints.records(pipeline.name, partition, window.start, window.end)
    records = [as_written(pipeline, record) for record in found]
    final = age_of(window, now, pipeline.grid.grace_seconds) is Age.DUE
    task = Task(partition, window, count, records[0] if records else None, final=final)
    if not records:
        return settle(pipeline, context, task)
    whole = [record for record in records if _is_whole(pipeline, record)]
    broken = [record for record in records if record not in whole]
    if broken:
        return _replace(pipeline, context, task, (whole, broken))
    return append_late(pipeline, context, task, records) if records[0].closed else settle(pipeline, context, task)


def _is_whole(pipeline: Pipeline[B, E], record: Record) -> bool:
    there = pipeline.sink.head(record.key)
    if there is None or there.version != record.version:
        return False
    try:
        rows = sum(_size(each) for each in pipeline.sink.read(record.key, there.version))
    except Permanent as error:
        log.warning("%s", error)
        return False
    return rows == record.rows


def _size(part: Any) -> int:
    """Rows of a table, or one of a row."""
    return int(getattr(part, "num_rows", 1))


def _replace(
    pipeline: Pipeline[B, E], context: Context, task: Task, parts: tuple[Sequence[Record], Sequence[Record]]
) -> Report:
    """What the whole parts lack goes into the first broken one; the others of these are left empty."""
    whole, broken = parts
    versions = [there.version if (there := pipeline.sink.head(record.key)) else None for record in broken]
    with closing(pipeline.source.read(task.partition, task.window, task.count, None)) as batch:
        if batch.rows == 0 and any(record.rows for record in broken):
            raise Permanent(f"{task.partition} {task.window}: is damaged, and the source has no rows of it", GONE_HINT)
        report, healed = Report(), list[Record]()
        held = list(whole)
        for record, version in zip(broken, versions, strict=True):
            with closing(pipeline.source.missing(batch, _rows(pipeline, held))) as rest:
                mended = _write(pipeline, context, task, (record, version, rest))
            held.append(mended)
            healed.append(mended)
            report += Report(rows=mended.rows, bytes=mended.size_bytes, windows=1)
            if context.dry_run:
                return report
    lost = sum(record.rows for record in broken) - report.rows
    if lost > 0:
        log.warning("%s %s: %d rows are at neither end any more", task.partition, task.window, lost)
    pipeline.checkpoints.commit(pipeline.name, task.partition, Commit(tuple(healed)), context.lease)
    return report


def _write(pipeline: Pipeline[B, E], context: Context, task: Task, part: tuple[Record, str | None, B]) -> Record:
    record, version, rest = part
    with closing(pipeline.sink.encode(task.partition, task.window, rest)) as encoded:
        put = "" if context.dry_run else pipeline.sink.put(record.key, encoded, version)
        log.info("%s: written again, %d rows", record.key, rest.rows)
        return replace(
            record,
            version=put,
            digest=rest.digest,
            rows=rest.rows,
            size_bytes=encoded.size_bytes,
            source_cells=task.count.cells,
            min_at=rest.min_at,
            max_at=rest.max_at,
        )


def _rows(pipeline: Pipeline[B, E], parts: Sequence[Record]) -> Iterator[Any]:
    for part in parts:
        yield from pipeline.sink.read(part.key, part.version)
