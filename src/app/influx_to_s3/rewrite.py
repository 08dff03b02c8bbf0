"""`python -m app rewrite influx_to_s3`: objects re-encoded from themselves, in today's unit, names and types.

The source is not asked, since it may have forgotten these rows. Invariants: each object is replaced by compare-and-swap
on the version that was read, and its record follows; a rewrite that was interrupted goes on where it stopped, since an
object that is as it should be is left alone. Deltas of older versions are folded into the object of their window.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from datetime import datetime
from typing import TYPE_CHECKING

from app.core.pipeline import ALL_TAGS, Commit, Held, Record
from app.core.runs import Context, Report
from app.core.sync import Done, delete_deltas
from app.core.windows import DAY_SECONDS, Age, Window, age_of, windows_between
from app.influx_to_s3.layout import Columns
from app.influx_to_s3.layout_recovery import KEY
from app.influx_to_s3.row_batch import RowBatch
from app.influx_to_s3.rows import of_object, ordered
from app.influx_to_s3.source import InfluxSource
from app.influx_to_s3.unions import in_order

if TYPE_CHECKING:
    import pyarrow as pa

    from app.core.pipeline import Pipeline
    from app.object_store.table_sink import EncodedFile, TableSink

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
        records = {record.window.start: record for record in found if not record.part}
        windows: dict[Window, dict[int, str]] = {}
        for named_at, info in sink.listed(device, day):
            window = next(pipeline.grid.windows(named_at, named_at + datetime.resolution))
            windows.setdefault(window, {})[round((named_at - window.start).total_seconds())] = info.key
        for window, keys in sorted(windows.items()):
            context.stop.check()
            if span.start <= window.start < span.end and age_of(window, now, pipeline.grid.grace_seconds) is Age.DUE:
                held = {part: there for part in sorted(keys) if (there := _own(sink, keys[part]))}
                record = records.get(window.start)
                with closing(_rows(source, sink, columns, device=device, keys=keys, held=held)) as batch:
                    done(
                        _replace(
                            pipeline, sink, context, window=window, keys=keys, held=held, batch=batch, record=record
                        )
                    )
                context.progress.advance(done=1)


def _own(sink: "TableSink", key: str) -> Held | None:
    """What Headwater wrote under this key; what another program put there is left as it is."""
    held = sink.head(key)
    if held is not None and not held.digest:
        log.warning("%s: was not written by Headwater, left as it is: run verify with --heal first", key)
        return None
    return held


def _unit(sink: "TableSink", key: str) -> str:
    """Unit of the object's timestamps; older versions noted none and wrote nanoseconds."""
    info = sink.store.head(key)
    return info.metadata.get("timestamp-unit", "ns") if info else ""


def _unfolded(held: Mapping[int, Held]) -> Sequence[int]:
    """The parts whose rows are not in the window's object, that object first."""
    folded = held[0].folded if 0 in held else 0
    return [part for part in held if not part or part > folded]


def _rows(
    source: InfluxSource,
    sink: "TableSink",
    columns: Columns,
    *,
    device: str,
    keys: Mapping[int, str],
    held: Mapping[int, Held],
) -> RowBatch:
    """The rows of a window's object and of its deltas. What lost tags once has lost them still."""

    def rows(part: int) -> "Iterator[pa.Table]":
        tables = (of_object(table, columns) for table in sink.read(keys[part], held[part].version) if table.num_rows)
        return (ordered([table], columns)[0] for table in tables)

    parts = _unfolded(held)
    batch = source.spooled(device, in_order([rows(part) for part in parts], columns))
    return replace(batch, has_all_tags=all(held[part].tags == ALL_TAGS for part in parts))


def _replace(
    pipeline: "Pipeline[RowBatch, EncodedFile]",
    sink: "TableSink",
    context: Context,
    *,
    window: Window,
    keys: Mapping[int, str],
    held: Mapping[int, Held],
    batch: RowBatch,
    record: Record | None,
) -> Report:
    """Put the re-encoded object, unless it is so already; its record follows, and the deltas go."""
    if not held or (0 in keys and 0 not in held):
        return Report()
    base, key = held.get(0), keys.get(0) or sink.key(batch.device, window, 0)
    is_done = (
        base is not None
        and base.digest == batch.digest
        and len(_unfolded(held)) == 1
        and (key.endswith(".csv") or _unit(sink, key) == sink.layout_at(window.start).timestamp_unit)
    )
    report = Report() if is_done else Report(rows=batch.rows, windows=1)
    if context.dry_run:
        return report
    version, size_bytes = (base.version, base.size_bytes) if base is not None and is_done else ("", 0)
    folded = max(base.folded if base is not None else 0, *held)
    if not is_done:
        with closing(sink.noted(sink.encode(batch.device, window, batch), folded)) as encoded:
            version = sink.put(key, encoded, base.version if base else None, closing=True)
            size_bytes = encoded.size_bytes
        log.info("%s: rewritten, %d rows", key, batch.rows)
    deltas = [keys[part] for part in held if part]
    if record is not None and (record.version, record.digest) != (version, batch.digest):
        # A rewrite that was killed between the two finds the object done and the record behind.
        is_confirmed = base is not None and record.version == base.version
        after = replace(
            record,
            version=version,
            digest=batch.digest,
            rows=batch.rows,
            size_bytes=size_bytes,
            source_digest=record.source_digest if is_confirmed else "",
            folded=folded,
        )
        commit = Commit((after,), folded=(window,) if deltas else ())
        pipeline.checkpoints.commit(pipeline.name, batch.device, commit, context.lease)
    delete_deltas(pipeline, deltas)
    return report + Report(bytes=0 if is_done else size_bytes)
