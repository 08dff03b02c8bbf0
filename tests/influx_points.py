"""Points as a reader gives them, columns of a tree in memory, and what was made of both, for tests of the rows."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa

from app.core.retry import Pauses, RetryPolicy
from app.core.runs import Stop
from app.core.windows import EPOCH
from app.db.checkpoints import Layout
from app.influx_to_s3.layout import EVER, Column, LayoutDocument, LayoutFile, TreeColumns, new_layout
from app.influx_to_s3.reader import PointColumns, Reader
from app.influx_to_s3.row_batch import RowBatch
from app.influx_to_s3.rows import ConflictingValue, canonical_table, merge_ordered
from app.influx_to_s3.source import InfluxSource

NOON = datetime(2026, 2, 7, 12, tzinfo=UTC)
NOON_NS = (NOON - EPOCH) // timedelta(microseconds=1) * 1000
TIMES = pa.timestamp("ns", "UTC")
LAYOUT = Layout(EPOCH, 3600, "parquet", "%Y/%m/%d", "us")
IGNORED = ("schema_version", "enrichment_status")


def tree_of(*columns: Column) -> LayoutDocument:
    """A tree that began at noon."""
    tree = new_layout(LAYOUT, NOON)
    return LayoutDocument(tree.first_start_at, tree.sealed_day, tree.layouts, columns)


def columns_of(
    *columns: Column,
    tree: LayoutDocument | None = None,
    device_tag: str = "device_id",
    ignored: Iterable[str] = IGNORED,
    types: Mapping[str, str] | None = None,
    file: LayoutFile | None = None,
) -> TreeColumns:
    """The columns of a new tree, or of one that has these."""
    given = tree or tree_of(*columns)
    given = replace(given, ignored_tags=given.ignored_tags or ((EVER, tuple(ignored)),))
    return TreeColumns(given, device_tag=device_tag, types=types or {}, file=file)


def points(*instants: int, tags: Mapping[str, str | None] | None = None, **fields: Sequence[Any]) -> PointColumns:
    """Points of one series at nanoseconds after noon; a field of several types has them in one part for each."""
    number = len(instants)
    times = pa.array([NOON_NS + at for at in instants], pa.int64()).cast(TIMES)
    named = {name: pa.array([text] * number, pa.string()) for name, text in (tags or {}).items()}
    parts = [
        (name, part)
        for name, values in fields.items()
        for part in (values if _is_parts(values) else [pa.array(values)])
    ]
    return PointColumns(times, named, parts)


def _is_parts(values: Sequence[Any]) -> bool:
    return isinstance(values, list) and bool(values) and isinstance(values[0], pa.Array)


def in_order(
    blocks: Iterable[PointColumns], columns: TreeColumns
) -> tuple[pa.Table, Sequence[ConflictingValue], Mapping[str, int]]:
    """What becomes of some blocks of one window."""
    return merge_ordered([canonical_table(block, columns) for block in blocks], columns)


def rows_in(tables: Iterable[pa.Table]) -> list[dict[str, Any]]:
    """Rows without what is null; `timestamp` in nanoseconds after noon."""
    found: list[dict[str, Any]] = []
    for table in tables:
        at = table.schema.get_field_index("timestamp")
        plain = table.set_column(at, "timestamp", table.column(at).cast(pa.int64()))
        found += [
            {
                name: value - NOON_NS if name == "timestamp" else value
                for name, value in row.items()
                if value is not None
            }
            for row in plain.to_pylist()
        ]
    return found


def batch_rows(batch: RowBatch) -> list[dict[str, Any]]:
    """The rows of a batch, without what is null."""
    return rows_in(batch.tables())


def source_of(
    reader: Reader,
    folder: Path,
    *,
    batch_rows: int = 1000,
    pauses: Pauses | None = None,
    attempts: int = 4,
    columns: TreeColumns | None = None,
) -> InfluxSource:
    """A source over a reader, with columns of its own unless it shares those of another one."""
    return InfluxSource(
        reader,
        columns or columns_of(),
        devices=(),
        batch_rows=batch_rows,
        spool_directory=folder,
        pauses=pauses or Stop(),
        policy=RetryPolicy(attempts=attempts),
    )


COLUMNS = columns_of()  # nothing is added: the rows of most tests are in canonical form already


UNKNOWN = {"device_type": "unknown", "location": "unknown"}


def rows(*instants: int, **columns: Sequence[Any]) -> pa.Table:
    """Canonical rows at nanoseconds after noon."""
    times = pa.array([NOON_NS + at for at in instants], pa.int64()).cast(TIMES)
    return pa.table({"timestamp": times, **columns})


def spooled(tables: Sequence[pa.Table], folder: Path, memory_rows: int = 0, columns: TreeColumns = COLUMNS) -> RowBatch:
    batch = RowBatch("D1", folder, memory_rows, columns)
    for table in tables:
        batch.append(table)
    return batch.finish({}, {})


def listed(batch: RowBatch) -> list[dict[str, Any]]:
    """The rows of a batch; `timestamp` in nanoseconds after noon."""
    found: list[dict[str, Any]] = []
    for table in batch.tables():
        plain = table.set_column(0, "timestamp", table.column(0).cast(pa.int64()))
        found += [{**row, "timestamp": row["timestamp"] - NOON_NS} for row in plain.to_pylist()]
    return found


def source(folder: Path) -> InfluxSource:
    """A source whose reader is never asked."""
    return source_of(None, folder, columns=COLUMNS)  # type: ignore[arg-type]
