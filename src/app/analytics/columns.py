"""Maps the columns of any object, ours or another program's, to the documented ones, and combines the rows of many
objects into one relation.
"""

import csv
import gzip
import json
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote

from app.analytics.engine import (
    DOCUMENTED,
    INSTANT,
    NANOS,
    NUMBERS,
    PAD,
    PAD_WITH_INSTANT,
    RELATION,
    TEXTS,
    Engine,
    UnreadableObject,
    literal,
    quoted,
)
from app.core.closed_days import ReportSpan, TableFile

# Maps the columns of one object to the documented ones, from its schema and its key alone.
#
# Invariants: documented columns are matched case-insensitively; a device that only the path names is used; a column
# whose type no report can use makes the object unusable, and the error names the column; everything else can be cast
# to text, so no value silently becomes null.

PARQUET_SUFFIXES = (".parquet", ".parq", ".pq")
CSV_SUFFIXES = (".csv", ".csv.gz")
IN_PATH = re.compile(rf"(?<![^/])({'|'.join(TEXTS)})=([^/]*)(?=/)", re.IGNORECASE)
NO_PARTITION = "__HIVE_DEFAULT_PARTITION__"  # what pandas, Spark and DuckDB write for null
NUMBER = re.compile(r"(U?(TINY|SMALL|BIG|HUGE)INT|U?INTEGER|FLOAT|DOUBLE|DECIMAL\b.*)")
WHOLE = re.compile(r"U?((TINY|SMALL|BIG|HUGE)INT|INTEGER)")
NULL = '"NULL"'  # the type that pyarrow gives a column with only nulls
Format = Literal["parquet", "csv", ""]


def format_of(key: str) -> Format:
    """The format that the key's suffix implies; "" when only the first bytes can tell."""
    name = key.lower()
    if name.endswith(PARQUET_SUFFIXES):
        return "parquet"
    return "csv" if name.endswith(CSV_SUFFIXES) else ""


def suffix_of(key: str) -> str:
    """The suffix of a local copy, from which DuckDB infers its format."""
    if format_of(key) != "csv":
        return PARQUET_SUFFIXES[0]
    return ".csv.gz" if key.lower().endswith(".gz") else ".csv"


@dataclass(frozen=True)
class ColumnReading:
    """How a file's columns are read. Files with equal readings can be read by one query.

    `types`: name in DuckDB -> type; `source`: documented name -> name in DuckDB, for columns in the file; `from_path`:
    documented names that only the path gives; `problem`: why reports cannot use the file, or ""; `notes`: warnings for
    the user; `also`: documented name -> names in DuckDB of the columns where a table file keeps values of other types.
    """

    types: Mapping[str, str]
    source: Mapping[str, str]
    from_path: tuple[str, ...]
    is_csv: bool
    problem: str
    notes: tuple[str, ...]
    also: Mapping[str, Sequence[str]]

    def type_of(self, documented: str) -> str:
        """The column's type in the file; "" when it is missing."""
        return self.types.get(self.source.get(documented, ""), "")

    @cached_property
    def further(self) -> Mapping[str, str]:
        """Lower-case name -> name in DuckDB, for undocumented columns."""
        taken = {name.lower() for name in self.source.values()}
        return {name.lower(): name for name in self.types if name and name.lower() not in taken}

    @cached_property
    def lower_names(self) -> frozenset[str]:
        """All names, in lower case."""
        return frozenset(name.lower() for name in self.types)

    @cached_property
    def kind(self) -> tuple[object, ...]:
        """Equal for files that one query can read, ignoring undocumented columns."""
        renamed = tuple(sorted((name, own) for name, own in self.source.items() if name != own.lower()))
        header = tuple(self.types) if self.is_csv or self.has_unnamed else ()
        also = tuple(name for names in self.also.values() for name in names)
        return instant_kind(self.type_of(INSTANT)), renamed, self.has_bytes, self.from_path, header, also

    @property
    def has_unnamed(self) -> bool:
        """Whether a column has no name. DuckDB invents one, which may clash with another column."""
        return "" in self.types

    @property
    def has_bytes(self) -> bool:
        """Whether a documented column holds bytes: older writers store text this way."""
        return any(self.type_of(name) == "BLOB" for name in self.source)


@dataclass(frozen=True, slots=True)
class ReportFile:
    """One file to read. `name`: its path or URL for DuckDB; `reading`: how its columns are read; `where`: an SQL
    condition on its raw rows, "" = all rows.
    """

    name: str
    key: str
    reading: ColumnReading
    where: str = ""


def file_of(name: str, key: str, schema: str) -> ReportFile:
    """A file with its reading. `schema`: column -> type as JSON, in the file's order."""
    return ReportFile(name, key, reading(schema, tuple(path_texts(key)), is_csv=format_of(key) == "csv"))


def table_file_of(name: str, file: TableFile, schema: str, span: ReportSpan) -> ReportFile:
    """A file of the table. Its columns are already typed, so DuckDB can skip data that the query does not use."""
    conditions = span_conditions(span, "rows.", "TIMESTAMPTZ")
    if file.without:
        windows = ", ".join(f"({literal(device)}, {first}, {last})" for device, first, last in file.without)
        conditions.append(
            f"NOT EXISTS (SELECT 1 FROM (VALUES {windows}) AS read(device, first_us, last_us) WHERE "  # noqa: S608 - own
            "read.device = rows.device_id AND epoch_us(rows.timestamp) BETWEEN read.first_us AND read.last_us)"
        )
    return ReportFile(name, file.key, reading(schema, (), of_table=True), " AND ".join(conditions))


def span_conditions(span: ReportSpan, prefix: str = "", kind: str = "TIMESTAMP") -> list[str]:
    """SQL conditions for the rows of a span. `kind`: the type of their timestamps."""
    limits = (
        ("device_id =", span.device),
        (f"timestamp >= {kind}", span.since and f"{span.since}+00"),
        (f"timestamp < {kind}", span.until and f"{span.until}+00"),
    )
    return [f"{prefix}{column} {literal(value)}" for column, value in limits if value is not None]


def path_texts(key: str) -> Mapping[str, str | None]:
    """Documented text values from Hive folders such as `device_id=D1/`; None for Hive's null."""
    return {
        found[1].lower(): None if found[2] == NO_PARTITION else unquote(found[2]) for found in IN_PATH.finditer(key)
    }


def instant_kind(kind: str) -> str:
    """How timestamps of this type are parsed; "" when there is no column, "unusable" for a type without timestamps."""
    if not kind or kind == "DATE" or kind.startswith("TIMESTAMP"):
        return kind
    if kind in ("VARCHAR", "BLOB", "JSON") or kind.startswith("ENUM"):
        return "text"
    if WHOLE.fullmatch(kind) or kind == NULL:
        return "whole"
    return "number" if NUMBER.fullmatch(kind) else "unusable"


def family(kind: str) -> str:
    """The type's family: types of one family convert to one type without loss; "" is compatible with every family."""
    if kind == NULL:
        return ""
    if NUMBER.fullmatch(kind) or kind == "BOOLEAN":
        return "number"
    return "instant" if kind == "DATE" or kind.startswith("TIMESTAMP") else kind


@lru_cache(maxsize=4096)
def reading(schema: str, in_path: tuple[str, ...], *, is_csv: bool = False, of_table: bool = False) -> ColumnReading:
    """Build the `ColumnReading` of a schema. `in_path`: documented names that the path gives."""
    columns: Mapping[str, str] = json.loads(schema)
    types = dict(zip(distinct(list(columns)), columns.values(), strict=True))
    pairs = list(zip(columns, types, strict=True))
    source: dict[str, str] = {}
    notes = []
    for name in DOCUMENTED:
        twins = sorted((pair for pair in pairs if pair[0].lower() == name), key=lambda pair: pair[0] != name)
        if twins:
            source[name] = twins[0][1]
        if len(twins) > 1:
            notes.append(f"has {' and '.join(own for own, _ in twins)}: {twins[0][0]} is read as {name}")
    if "" in columns:
        notes.append("has an unnamed column, which reports cannot read")
    from_path = tuple(name for name in in_path if name not in source)
    missing = [name for name in ("device_id", INSTANT) if name not in source and name not in from_path]
    notes += [f"has no column {name}: its rows count as those without one" for name in missing]
    problem = next(_problems(types, source, is_csv=is_csv), "")
    also = {name: [own for own in types if own.startswith(f"{name}_as_")] for name in source if of_table}
    return ColumnReading(types, source, from_path, is_csv, problem, tuple(notes), also)


def _problems(types: Mapping[str, str], source: Mapping[str, str], *, is_csv: bool) -> Iterator[str]:
    if is_csv and INSTANT not in source:
        yield f"is CSV without a column timestamp; its first line is {', '.join(types)[:100]!r}"
    for name, own in source.items():
        kind = types[own]
        if name == INSTANT:
            usable = instant_kind(kind) != "unusable"
        elif name in TEXTS:
            usable = not (kind.endswith("]") or kind.startswith(("STRUCT", "MAP", "VARIANT", "UNION")))
        else:
            usable = family(kind) in ("number", "VARCHAR", "BLOB", "JSON", "") or kind.startswith("ENUM")
        if not usable:
            yield f"its column {own} is of type {kind}, which reports cannot use as {name}"


def distinct(names: Sequence[str]) -> Sequence[str]:
    """Column names as DuckDB makes them unique: a name that differs from an earlier one only in case gets a number."""
    collisions: dict[str, int] = {}
    found = []
    for name in names:
        while (low := name.encode().lower().decode()) in collisions:  # DuckDB lowers ASCII letters only
            collisions[low] += 1
            name = f"{name}_{collisions[low]}"  # noqa: PLW2901 - next attempt, as DuckDB's reader does
        collisions[low] = 0
        found.append(name)
    return found


# The raw columns of files: for Parquet from the footer, for CSV from the header line.

NESTED = "NESTED"
HEADER_CHARACTERS = 1 << 20
GZIP_BYTES = 1 << 20
HINT = "save it as UTF-8 with commas and a first line of column names"
SCHEMA = "SELECT file_name, name, duckdb_type, num_children FROM parquet_schema({})"
Columns = Mapping[str, str]
"""Column -> type, in the file's order."""


def schemas(engine: Engine, files: Sequence[tuple[str, str]]) -> Mapping[str, Columns]:
    """File -> its columns, for pairs of file and key. Raises UnreadableObject when one of them cannot be read."""
    found: dict[str, Columns] = {file: _of_csv(file) for file, key in files if format_of(key) == "csv"}
    if names := [file for file, _ in files if file not in found]:
        for file, columns in _of_parquet(engine.rows(SCHEMA.format(literal(names)))).items():
            found[file] = columns
            if NESTED in columns.values():  # a footer lists nested types only as separate elements
                source = f"read_parquet({literal([file])}, hive_partitioning = false)"
                types = engine.columns(f"SELECT * FROM {source}", {}).values()  # noqa: S608 - our own copy
                found[file] = {
                    name: known if kind == NESTED else kind
                    for (name, kind), known in zip(columns.items(), types, strict=True)
                }
    return found


def _of_csv(file: str) -> Columns:
    """All columns are text. An unnamed column, such as the index that pandas writes first, gets a name."""
    opened = gzip.open if file.endswith(".gz") else open
    try:
        with opened(file, "rt", encoding="utf-8-sig", newline="") as text:
            lines = iter(partial(text.readline, HEADER_CHARACTERS), "")
            header = next(csv.reader(lines, strict=True), [])
            while file.endswith(".gz") and text.buffer.read(GZIP_BYTES):
                pass  # to its end: DuckDB takes a file that was cut off for a shorter one
    except (UnicodeDecodeError, csv.Error, OSError, EOFError, zlib.error) as error:
        raise UnreadableObject(f"{file}: is not CSV in UTF-8: {error}", HINT) from error
    if not any(header):
        raise UnreadableObject(f"{file}: its first line has no names", HINT)
    columns: dict[str, str] = {}
    for place, name in enumerate(header):
        columns[_free(columns, name or f"column{place}")] = "VARCHAR"
    return columns


def _free(columns: Columns, name: str) -> str:
    """The name, with a number appended if it is taken."""
    number, own = 0, name
    while own in columns:
        number += 1
        own = f"{name}_{number}"
    return own


def _of_parquet(rows: Sequence[tuple[str, str, str | None, int | None]]) -> Mapping[str, dict[str, str]]:
    """File -> top-level column -> type. `rows`: the schema elements of each file in depth-first order, root first."""
    found: dict[str, dict[str, str]] = {}
    awaited: list[int] = []  # children still expected, per open element
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


# The rows of many objects as one DuckDB table expression, in which every documented column has its documented type.
#
# Invariants: files that one query can read share one query, so a lake with one writer costs one scan; undocumented
# columns never keep objects from being read together; timestamps are naive UTC in whole microseconds, years 1 to 9999;
# numbers are finite; any other value is null.

FIRST_US, LAST_US = -62_135_596_800_000_000, 253_402_300_799_999_999  # the years 1 to 9999
CSV = "header = true, auto_detect = false, delim = ',', quote = '\"', escape = '\"', nullstr = ''"

# Rewrites the variants of ISO 8601, and 07.02.2026, to the one form DuckDB reads. 01/02/2026 is ambiguous: unchanged.
REWRITTEN = (
    (r"^(\d{1,2})\.(\d{1,2})\.(\d{4})", r"\3-\2-\1"),
    (r"^(\d{4})[./](\d{1,2})[./](\d{1,2})", r"\1-\2-\3"),
    (r"^(\d{4})(\d\d)(\d\d)([Tt ]|$)", r"\1-\2-\3\4"),
    (r"^([\d-]+)t", r"\1T"),
    (r"z$", "Z"),
    (r"([T ])(\d\d)(\d\d)(\d\d)", r"\1\2:\3:\4"),
    (r"([T ])(\d\d)(\d\d)(Z|[+-]|$)", r"\1\2:\3\4"),
    (r"([T ])(\d\d)(Z|[+-]|$)", r"\1\2:00\3"),
    (r"([T ]\d\d?:\d\d)(Z|[+-]|$)", r"\1:00\2"),
    (r"(:\d\d),(\d)", r"\1.\2"),
)
ISO = r"^\d{4}-\d{1,2}-\d{1,2}([T ]|$)"


def relation(folder: Path, files: Sequence[ReportFile], *, file_name: str = "") -> str:
    """The rows of all files; `folder` holds the empty pad files. `file_name`: name of an added column with the file."""
    casts = _casts(files)
    selects = [_rows(folder, group, casts, file_name) for group in _grouped(files, casts) or [[]]]
    if len(selects) == 1:
        return f"{selects[0]} AS {RELATION}"
    together = " UNION ALL BY NAME ".join(f"SELECT * FROM {each}" for each in selects)  # noqa: S608 - our own
    return f"({together}) AS {RELATION}"


def file_column(files: Sequence[ReportFile]) -> str:
    """A name for the file column that no file's own column has."""
    name = "file_of_row"
    while any(name in some[0].reading.lower_names for some in _by_reading(files)):
        name += "_"
    return name


def _by_reading(files: Sequence[ReportFile]) -> Sequence[Sequence[ReportFile]]:
    """Groups files with the same reading."""
    found: dict[int, list[ReportFile]] = {}
    for file in files:
        found.setdefault(id(file.reading), []).append(file)
    return list(found.values())


def _grouped(files: Sequence[ReportFile], casts: Mapping[str, str]) -> Sequence[Sequence[ReportFile]]:
    """Groups files that one query can read."""
    groups: dict[Any, list[ReportFile]] = {}
    for some in _by_reading(files):
        own = some[0].reading
        types = tuple(own.types[own.further[name]] if name in own.further else "" for name in casts)
        for file in some:
            groups.setdefault((own.kind, types, file.where), []).append(file)
    return list(groups.values())


def _casts(files: Sequence[ReportFile]) -> Mapping[str, str]:
    """Undocumented columns whose types DuckDB cannot unify by itself -> the type to cast to; text if nothing else fits.
    CSV columns are text and take the type that the column has in other files.
    """
    types: dict[str, set[str]] = {}
    in_csv: set[str] = set()
    for own in (some[0].reading for some in _by_reading(files)):
        for name, known in own.further.items():
            if own.is_csv:
                in_csv.add(name)
            else:
                types.setdefault(name, set()).add(own.types[known])
    found: dict[str, str] = {}
    for name, kinds in types.items():
        families = {family(kind) for kind in kinds} - {""}
        if len(families) > 1:
            found[name] = "VARCHAR"
        elif len(families) == 1 and (NULL in kinds or name in in_csv) and families != {"VARCHAR"}:
            values = kinds - {NULL}
            found[name] = values.pop() if len(values) == 1 else "DOUBLE" if families == {"number"} else "TIMESTAMPTZ"
    return found


def _rows(folder: Path, files: Sequence[ReportFile], casts: Mapping[str, str], given_column: str) -> str:
    """A table expression over files that one query can read."""
    own = files[0].reading if files else None
    replaced = dict(documented(own))
    hidden: list[str] = []
    file_name, joined = given_column, ""
    if own is not None:
        hidden += [own_name for name, own_name in own.source.items() if own_name.lower() != name]
        for name, kind in casts.items():
            if known := own.further.get(name):
                replaced[known] = f"TRY_CAST(rows.{quoted(known)} AS {kind})"
        if own.from_path:
            file_name = given_column or file_column(files)
            hidden += [] if given_column else [file_name]
            lines = [[file.name, *map(path_texts(file.key).get, own.from_path)] for file in files]
            values = ", ".join(f"({', '.join(map(literal, line))})" for line in lines)
            names = ", ".join(["file", *own.from_path])
            joined = f" INNER JOIN (VALUES {values}) AS path({names}) ON path.file = rows.{quoted(file_name)}"
    typed = ", ".join(f"{expression} AS {quoted(name)}" for name, expression in replaced.items())
    source = raw_rows(folder, files, file_name)
    if own is not None and own.has_unnamed:
        named = [*(each for each in own.further.values() if each not in replaced), *filter(None, [given_column])]
        columns = ", ".join([f"rows.{quoted(each)}" for each in named] + [typed])
    else:
        without = f"EXCLUDE ({', '.join(map(quoted, hidden))}) " if hidden else ""
        columns = f"rows.* {without}REPLACE ({typed})"
    where = f" WHERE {files[0].where}" if files and files[0].where else ""
    return f"(SELECT {columns} FROM {source}{joined}{where})"  # noqa: S608 - own names, files as literals


def raw_rows(folder: Path, files: Sequence[ReportFile], file_name: str = "") -> str:
    """Raw rows of files that one query can read, plus missing documented columns. `file_name`: a column to add."""
    own = files[0].reading if files else None
    has_instant = own is not None and bool(own.type_of(INSTANT))
    pad = str(folder / (PAD if has_instant else PAD_WITH_INSTANT))
    names = [file.name for file in files]
    extra = f", filename = {literal(file_name)}" if file_name else ""
    bytes_too = ", binary_as_string = true" if own is not None and own.has_bytes else ""
    options = f"union_by_name = true, hive_partitioning = false{bytes_too}{extra}"
    if own is None or not own.is_csv:
        return f"read_parquet({literal([pad, *names])}, {options}) AS rows"
    columns = ", ".join(f"{literal(name)}: 'VARCHAR'" for name in own.types)
    return (
        f"(SELECT * FROM read_parquet({literal([pad])}, {options}) UNION ALL BY NAME SELECT * FROM "  # noqa: S608 - own
        f"read_csv({literal(names)}, {CSV}, columns = {{{columns}}}, hive_partitioning = false{extra})) AS rows"
    )


def documented(own: ColumnReading | None) -> Mapping[str, str]:
    """Documented column -> SQL expression for its value, over the columns of `rows`."""
    values: dict[str, str] = {}
    for name in TEXTS:
        text = f"nullif({_cast(own, name, 'VARCHAR')}, '')"
        values[name] = f"coalesce({text}, nullif(path.{name}, ''))" if own and name in own.from_path else text
    for name in NUMBERS:
        number = _cast(own, name, "DOUBLE")
        values[name] = f"CASE WHEN isfinite({number}) THEN {number} END"
    kind = instant_kind(own.type_of(INSTANT)) if own else ""
    instant = _column(own, INSTANT)
    microseconds = microseconds_of(kind, instant)
    values[INSTANT] = (
        f"CASE WHEN {microseconds} BETWEEN {FIRST_US} AND {LAST_US} THEN make_timestamp({microseconds}) END"
    )
    given = f"TRY_CAST({_column(own, NANOS)} AS SMALLINT)"
    below = f"CASE WHEN {given} BETWEEN 0 AND 999 THEN {given} END"
    derived = _nanos_of(kind, instant)
    values[NANOS] = f"coalesce({below}, {derived})" if derived else below
    return values


def _cast(own: ColumnReading | None, name: str, kind: str) -> str:
    """A documented column cast to this type; for a table file also the values kept in columns of other types."""
    columns = [_column(own, name), *(f"rows.{quoted(each)}" for each in (own.also.get(name, ()) if own else ()))]
    casts = [f"TRY_CAST({column} AS {kind})" for column in columns]
    return casts[0] if len(casts) == 1 else f"coalesce({', '.join(casts)})"


def _column(own: ColumnReading | None, name: str) -> str:
    source = own.source.get(name, name) if own else name
    return f"rows.{quoted(source if source.lower() != name else name)}"


def microseconds_of(kind: str, column: str) -> str:
    """An SQL expression for microseconds since 1970, null where the value cannot be parsed.

    Casting between timestamps with and without a time zone costs 30 times as much as converting through microseconds.
    """
    match kind:
        case "DATE":
            return f"epoch_us(CAST({column} AS TIMESTAMP))"
        case "whole":
            return _of_epoch(f"TRY_CAST({column} AS BIGINT)")
        case "number":
            return _of_epoch(f"TRY_CAST({column} AS DOUBLE)", whole=False)
        case "text":
            text = f"trim({column})"
            iso = f"epoch_us(TRY_CAST({_rewritten(text)} AS TIMESTAMPTZ))"
            return f"""CASE
                WHEN regexp_full_match({text}, '\\d{{9,19}}') THEN {_of_epoch(f"TRY_CAST({text} AS BIGINT)")}
                WHEN regexp_full_match({text}, '\\d+\\.?\\d*([eE][+]?\\d+)?')
                    AND NOT regexp_full_match({text}, '\\d{{8}}')
                    THEN {_of_epoch(f"TRY_CAST({text} AS DOUBLE)", whole=False)}
                WHEN regexp_matches({_rewritten(text)}, {literal(ISO)}) THEN {iso}
            END"""
        case _:
            return f"epoch_us({column})"


def _of_epoch(number: str, *, whole: bool = True) -> str:
    """Seconds, milliseconds, microseconds or nanoseconds, distinguished by magnitude: works from 1973 on."""
    seconds, millis = f"{number} * 1000000", f"{number} * 1000"
    nanos = f"{number} // 1000" if whole else f"{number} / 1000"
    steps = ((10**8, 10**11, seconds), (10**11, 10**14, millis), (10**14, 10**17, number), (10**17, 93 * 10**17, nanos))
    cases = " ".join(
        f"WHEN {number} >= {low} AND {number} < {high} THEN "
        + (value if whole else f"TRY_CAST(round({value}) AS BIGINT)")
        for low, high, value in steps
    )
    return f"CASE {cases} END"


def _rewritten(text: str) -> str:
    for pattern, by in REWRITTEN:
        text = f"regexp_replace({text}, {literal(pattern)}, {literal(by)})"
    return text


def _nanos_of(kind: str, column: str) -> str:
    """An SQL expression for the digits below the microsecond; "" if this kind has none."""
    match kind:
        case "TIMESTAMP_NS":
            number = f"epoch_ns({column})"
        case "whole":
            number = f"TRY_CAST({column} AS BIGINT)"
        case "text":
            digits = f"rpad(regexp_extract({column}, '[.,]\\d{{6}}(\\d{{1,3}})', 1), 3, '0')"
            epoch = f"TRY_CAST(regexp_extract({column}, '^\\s*(\\d{{18,19}})\\s*$', 1) AS BIGINT)"
            return f"CAST(coalesce({epoch} % 1000, TRY_CAST({digits} AS BIGINT)) AS SMALLINT)"
        case _:
            return ""
    return f"CASE WHEN {number} >= {10**17} THEN CAST({number} % 1000 AS SMALLINT) END"


def lost_values(folder: Path, files: Sequence[ReportFile]) -> str:
    """A query for (file, column, rows, example) of values that are present but cannot be parsed; "" when the column
    types rule this out.
    """
    name = file_column(files)
    checks = []
    for group in _grouped(files, {}):
        for column, lost in _lost(group[0].reading):
            checks.append(
                f"SELECT rows.{name} AS file, {literal(column)} AS name, count(*) AS lost, "  # noqa: S608 - own names
                f"min(CAST({_column(group[0].reading, column)} AS VARCHAR)) AS example "
                f"FROM {raw_rows(folder, group, name)} WHERE {lost} GROUP BY rows.{name}"
            )
    return " UNION ALL ".join(checks)


def _lost(own: ColumnReading) -> Iterator[tuple[str, str]]:
    for name in NUMBERS:
        if family(own.type_of(name)) in ("VARCHAR", "BLOB", "JSON"):
            column = _column(own, name)
            yield name, f"trim({column}) <> '' AND TRY_CAST({column} AS DOUBLE) IS NULL"
    kind = instant_kind(own.type_of(INSTANT))
    if kind in ("text", "whole", "number"):
        column = _column(own, INSTANT)
        given = f"trim({column}) <> ''" if kind == "text" else f"{column} IS NOT NULL"
        yield INSTANT, f"{given} AND ({microseconds_of(kind, column)}) IS NULL"
