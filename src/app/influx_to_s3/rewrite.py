"""`python -m app rewrite influx_to_s3`: objects re-encoded from themselves, in today's unit, names and types.

The source is not asked, since it may have forgotten these rows. Invariants: each object is replaced by compare-and-swap
on the version that was read, and its record follows; a rewrite that was interrupted goes on where it stopped, since an
object that is as it should be is left alone.
"""

import logging
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from datetime import datetime
from typing import TYPE_CHECKING

from app.core.errors import Conflict
from app.core.late import is_ahead
from app.core.ports import ALL_TAGS, Commit, Record
from app.core.runs import Context, Report
from app.core.sync import Done
from app.core.window import DAY_SECONDS, Age, Window, age_of, windows_between
from app.influx_to_s3.columns import Columns
from app.influx_to_s3.recovery import KEY
from app.influx_to_s3.rows import of_object, ordered
from app.influx_to_s3.source import InfluxSource
from app.influx_to_s3.spool import RowBatch
from app.stores.parquet import held_of

if TYPE_CHECKING:
    from app.core.sync import Pipeline
    from app.stores.objects import ObjectInfo
    from app.stores.parquet import EncodedFile, TableSink

UNIT = "timestamp-unit"
log = logging.getLogger(__name__)


def devices_in(sink: "TableSink") -> Sequence[str]:
    """Every device that has objects, from one listing."""
    start = f"{sink.prefix}/" if sink.prefix else ""
    found = (KEY.fullmatch(info.key.removeprefix(start)) for info in sink.store.list(f"{start}device_id="))
    return sorted({named["device"] for named in found if named})


def rewrite(
    pipeline: "Pipeline[RowBatch, EncodedFile]",
    source: InfluxSource,
    sink: "TableSink",
    columns: Columns,
    context: Context,
    *,
    device: str,
    span: Window,
    now: datetime,
    done: Done,
) -> None:
    """Re-encode the objects of one device whose windows start in `span` and are due."""
    for day in windows_between(span.start, span.end, DAY_SECONDS):
        found = pipeline.checkpoints.records(pipeline.name, device, day.start, day.end)
        records = {record.key: record for record in found}
        for named_at, info in list(sink.listed(device, day)):
            context.stop.check()
            window = next(pipeline.grid.windows(named_at, named_at + datetime.resolution))
            is_due = age_of(window, now, pipeline.grid.grace_seconds) is Age.DUE
            if not span.start <= window.start < span.end or not is_due:
                continue
            there = sink.store.head(info.key)
            if there is None or there.etag != info.etag:
                raise Conflict(f"{info.key}: changed while it was rewritten", "run the rewrite again")
            rows = (of_object(table, columns) for table in sink.read(info.key, info.etag) if table.num_rows)
            spooled = source.spooled(device, (ordered([table], columns)[0] for table in rows))
            # What lost tags once has lost them still.
            with closing(replace(spooled, has_all_tags=held_of(there).tags == ALL_TAGS)) as batch:
                done(
                    _replace(
                        pipeline, sink, context, window=window, there=there, batch=batch, record=records.get(info.key)
                    )
                )
            context.progress.advance(done=1)


def _replace(
    pipeline: "Pipeline[RowBatch, EncodedFile]",
    sink: "TableSink",
    context: Context,
    *,
    window: Window,
    there: "ObjectInfo",
    batch: RowBatch,
    record: Record | None,
) -> Report:
    """Put the re-encoded object, unless it is so already, and let its record follow."""
    unit = sink.layout_at(window.start).timestamp_unit if there.key.endswith(".parquet") else None
    is_done = there.metadata.get("digest") == batch.digest and unit in (None, there.metadata.get(UNIT, "ns"))
    is_known = record is None or record.version == there.etag or is_ahead(pipeline, record, held_of(there))
    if not (is_known or is_done):
        log.warning("%s: is not the version that was confirmed, left as it is: run verify with --heal first", there.key)
        return Report()
    if context.dry_run:
        return Report() if is_done else Report(rows=batch.rows, windows=1)
    version, size_bytes = there.etag, 0
    if not is_done:
        with closing(sink.encode(batch.device, window, batch)) as encoded:
            version, size_bytes = sink.put(there.key, encoded, there.etag), encoded.size_bytes
        log.info("%s: rewritten, %d rows", there.key, batch.rows)
    if record is not None and (record.version, record.digest) != (version, batch.digest):
        # A rewrite that was killed between the two finds the object done and the record behind.
        after = replace(record, version=version, digest=batch.digest, size_bytes=size_bytes or there.size_bytes)
        pipeline.checkpoints.commit(pipeline.name, batch.device, Commit((after,)), context.lease)
    return Report() if is_done else Report(rows=batch.rows, bytes=size_bytes, windows=1)
