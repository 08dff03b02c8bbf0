"""Imports the rows of another program's seven tables, such as those of the DWH Helper that Headwater replaces.

Invariants: the other database is only read; each row is inserted, already present, or set aside with a reason; the
import can be repeated, since rows whose natural key exists are left unchanged.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from datetime import datetime
from io import BytesIO
from itertools import chain, islice
from typing import Any
from uuid import UUID

import msgspec

from app.core.errors import Permanent
from app.db.database import Database, Dialect, Session
from app.dwh.request_parsing import NUMBER, BatchLimits, WriteOptions, receive, with_minutes
from app.dwh.rows import UNREADABLE
from app.dwh.tables import TABLES, Table, TableColumn
from app.dwh.warehouse import Warehouse, other_tables

CHUNK_ROWS = 10_000
ROW_BYTES = 1 << 26
LIMITS = BatchLimits(1000, 10_000_000)
FLAGS = {"1": "true", "0": "false", "true": "true", "false": "false", "t": "true", "f": "false"}
COLUMNS: dict[Dialect, str] = {
    "sqlite": "SELECT name FROM pragma_table_info(:table)",
    "postgres": "SELECT attname AS name FROM pg_attribute WHERE attrelid = to_regclass(:table) AND attnum > 0"
    " AND NOT attisdropped",
}


@dataclass(slots=True)
class ImportedTable:
    """The import result of one table. `set_aside`: id and reason; `left_columns` do not exist in the warehouse."""

    table: str
    read: int = 0
    new: int = 0
    already_there: int = 0
    set_aside_count: int = 0
    set_aside: list[tuple[str, str]] = field(default_factory=list)
    left_columns: Sequence[str] = ()


def import_old_tables(
    source: Database, warehouse: Warehouse, at: datetime, *, dry_run: bool = False
) -> list[ImportedTable]:
    """Import each source table that has the name of one of ours. Raises Permanent when there is none."""
    with source.transaction(read_only=True) as session:
        names = other_tables(session, source.dialect)
        if not names:
            raise Permanent(f"{source.place} has none of the tables of /dwh", "give the URL of the other database")
        return [
            _bring(session, source.dialect, table, warehouse, at=at, dry_run=dry_run)
            for table in TABLES
            if table.name in names
        ]


def _bring(
    session: Session, dialect: Dialect, table: Table, warehouse: Warehouse, *, at: datetime, dry_run: bool
) -> ImportedTable:
    there = [row["name"] for row in session.rows(COLUMNS[dialect], table=table.name)]
    found = {name.lower(): name for name in there} | {name: name for name in there}  # the exact spelling first
    columns = [column for column in table.columns if column.name in found]
    ours = {"id", "created_at", *table.names}
    done = ImportedTable(table.name, left_columns=[name for name in there if name.lower() not in ours])
    as_text = "::text" if dialect == "postgres" else ""
    quoted = {name: '"{}"'.format(found[name].replace('"', '""')) for name in ours & found.keys()}
    read = [f"{quoted.get(name, 'NULL')}{as_text}" for name in ("id", *(column.name for column in columns))]
    order = f"ORDER BY {quoted['id']}" if "id" in quoted else ""
    rows = session.stream(f"SELECT {', '.join(read)} FROM {table.name} {order}")  # noqa: S608 - declared names
    for first in rows:
        chunk = [first, *islice(rows, CHUNK_ROWS - 1)]
        _store(chunk, columns, table, warehouse, done, at=at, dry_run=dry_run)
    return done


def _store(
    chunk: Sequence[Sequence[Any]],
    columns: Sequence[TableColumn],
    table: Table,
    warehouse: Warehouse,
    done: ImportedTable,
    *,
    at: datetime,
    dry_run: bool,
) -> None:
    lines = BytesIO(b"".join(_line(columns, row[1:]) for row in chunk))
    how = WriteOptions("ndjson", skip=True)
    with closing(receive(lines, table, how, LIMITS, body_bytes=ROW_BYTES, stream_bytes=ROW_BYTES)) as received:
        stored = warehouse.insert(table, received, at=at, dry_run=dry_run)
        done.new += stored.inserted_rows
        done.already_there += stored.rows - stored.inserted_rows
        done.set_aside_count += received.fault_count
        for fault in received.faults:
            id_ = chunk[fault.index][0]
            named = f"{fault.field} {fault.message}".strip()
            number = done.read + fault.index + 1
            done.set_aside.append((f"id {id_}" if id_ is not None else f"row {number}", named))
        done.read += len(chunk)


def _line(columns: Sequence[TableColumn], values: Sequence[Any]) -> bytes:
    """A line of NDJSON. A value that does not fit its column is written as text, so that the row parser refuses it."""
    pairs = [f"{json.dumps(column.name)}:{_json(column, value)}" for column, value in zip(columns, values, strict=True)]
    return f"{{{','.join(pairs)}}}\n".encode("utf-8", "surrogatepass")


def _json(column: TableColumn, value: Any) -> str:
    if value is None:
        return "null"
    if column.kind == "uuid":  # SQLAlchemy stores 32 digits or 16 bytes
        with suppress(ValueError):
            return json.dumps(str(UUID(bytes=value) if isinstance(value, bytes) else UUID(str(value))))
    text = value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else str(value)
    if column.kind == "bool":
        return FLAGS.get(text.lower(), json.dumps(text))
    if column.kind in ("integer", "bigint", "float") and NUMBER.fullmatch(text):
        return text
    if column.kind == "json":
        with suppress(*UNREADABLE):
            msgspec.json.decode(text)
            return text.replace("\n", " ")
    return json.dumps(with_minutes(text) if column.kind == "instant" else text, ensure_ascii=False)


def format_result(done: Sequence[ImportedTable], *, dry_run: bool) -> Iterator[str]:
    """The result as lines of text for a person."""
    for each in done:
        new = "would be new" if dry_run else "new"
        yield (
            f"{each.table}: {each.read} read = {each.new} {new} + {each.already_there} already there "
            f"+ {each.set_aside_count} set aside"
        )
        if each.left_columns:
            yield f"  columns without a place here: {', '.join(each.left_columns)}"
        yield from chain(f"  set aside {which}: {reason}" for which, reason in each.set_aside[:20])
