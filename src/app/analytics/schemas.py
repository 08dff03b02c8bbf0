"""The columns of files, as they stand in them: of Parquet from the footer, of CSV from the first line."""

import csv
import gzip
import io
import zlib
from collections.abc import Mapping, Sequence

from app.analytics.engine import Engine
from app.analytics.faults import Unreadable
from app.analytics.object_columns import format_of
from app.analytics.relation import literal

NESTED = "NESTED"
HEADER_CHARACTERS = 1 << 20
HINT = "save it as UTF-8 with commas and a first line of column names"
SCHEMA = "SELECT file_name, name, duckdb_type, num_children FROM parquet_schema({})"
Columns = Mapping[str, str]
"""Column -> type, in the file's order."""


def schemas(engine: Engine, files: Sequence[tuple[str, str]]) -> Mapping[str, Columns]:
    """File -> its columns, for pairs of file and key. Raises Unreadable when one of them cannot be read."""
    found: dict[str, Columns] = {file: _of_csv(file) for file, key in files if format_of(key) == "csv"}
    if names := [file for file, _ in files if file not in found]:
        for file, columns in _of_parquet(engine.rows(SCHEMA.format(literal(names)))).items():
            found[file] = _with_nested(engine, file, columns) if NESTED in columns.values() else columns
    return found


def _of_csv(file: str) -> Columns:
    """All are text; a column without a name gets one, as the index that pandas writes first."""
    opened = gzip.open if file.endswith(".gz") else open
    try:
        with opened(file, "rt", encoding="utf-8-sig", newline="") as text:
            header = next(csv.reader(io.StringIO(_first_record(text), newline=""), strict=True), [])
    except (UnicodeDecodeError, csv.Error, OSError, EOFError, zlib.error) as error:
        raise Unreadable(f"{file}: its first line is not CSV in UTF-8: {error}", HINT) from error
    if not any(header):
        raise Unreadable(f"{file}: its first line has no names", HINT)
    columns: dict[str, str] = {}
    for place, name in enumerate(header):
        columns[_free(columns, name or f"column{place}")] = "VARCHAR"
    return columns


def _free(columns: Columns, name: str) -> str:
    """The name, with a number when it is there already."""
    number, own = 0, name
    while own in columns:
        number += 1
        own = f"{name}_{number}"
    return own


def _first_record(text: io.TextIOBase) -> str:
    """The header, which ends at the first newline outside of quotes."""
    record = text.readline(HEADER_CHARACTERS)
    while record.count('"') % 2 and len(record) < HEADER_CHARACTERS and (line := text.readline(HEADER_CHARACTERS)):
        record += line
    return record


def _of_parquet(rows: Sequence[tuple[str, str, str | None, int | None]]) -> Mapping[str, dict[str, str]]:
    """File -> top-level column -> type, from the elements of each file's schema, depth first, the root first."""
    found: dict[str, dict[str, str]] = {}
    awaited: list[int] = []  # children still to come, of each element on the way down
    for file, name, kind, children in rows:
        if file not in found:
            found[file], awaited = {}, [children or 0]
            continue
        if len(awaited) == 1:
            found[file][_free(found[file], name)] = kind or NESTED
        awaited[-1] -= 1
        if children:
            awaited.append(children)
        while len(awaited) > 1 and awaited[-1] == 0:
            awaited.pop()
    return found


def _with_nested(engine: Engine, file: str, columns: Columns) -> Columns:
    """The columns with the types of nested ones, which a footer spells out in pieces."""
    described = engine.columns(f"SELECT * FROM read_parquet({literal([file])}, hive_partitioning = false)", {})  # noqa: S608 - our own copy
    types = list(described.values())
    return {name: types[place] if kind == NESTED else kind for place, (name, kind) in enumerate(columns.items())}
