"""How the columns of one object become the documented ones, decided from its schema and its key alone.

Invariants: a documented column is found whatever its case; a device that only the path names is known; a column of a
kind that no report can use makes its object unusable, by name; everything else has a text, so nothing is null in
silence.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal
from urllib.parse import unquote

TEXTS = ("device_id", "device_type", "location")
NUMBERS = ("voltage", "current", "power", "temperature", "soc", "power_factor")
INSTANT = "timestamp"
NANOS = "timestamp_nanos"
DOCUMENTED = (*TEXTS, *NUMBERS, INSTANT, NANOS)
PARQUET_SUFFIXES = (".parquet", ".parq", ".pq")
CSV_SUFFIXES = (".csv", ".csv.gz")
IN_PATH = re.compile(rf"(?<![^/])({'|'.join(TEXTS)})=([^/]*)(?=/)", re.IGNORECASE)
NO_PARTITION = "__HIVE_DEFAULT_PARTITION__"  # what pandas, Spark and DuckDB write for null
NUMBER = re.compile(r"(U?(TINY|SMALL|BIG|HUGE)INT|U?INTEGER|FLOAT|DOUBLE|DECIMAL\b.*)")
WHOLE = re.compile(r"U?((TINY|SMALL|BIG|HUGE)INT|INTEGER)")
NULL = '"NULL"'  # the type that pyarrow gives a column without any value
Format = Literal["parquet", "csv", ""]


def format_of(key: str) -> Format:
    """What the name says; "" where only the first bytes can tell."""
    name = key.lower()
    if name.endswith(PARQUET_SUFFIXES):
        return "parquet"
    return "csv" if name.endswith(CSV_SUFFIXES) else ""


def suffix_of(key: str) -> str:
    """A suffix by which DuckDB takes a copy for what it is."""
    if format_of(key) != "csv":
        return PARQUET_SUFFIXES[0]
    return ".csv.gz" if key.lower().endswith(".gz") else ".csv"


@dataclass(frozen=True)
class Reading:
    """Files with equal readings can be read by one query.

    `types`: name in DuckDB -> type; `source`: documented name -> name in DuckDB, of those that are there; `from_path`:
    documented names that are only in the path; `problem`: why reports cannot use it, ""; `notes`: what a person should
    know of it.
    """

    types: Mapping[str, str]
    source: Mapping[str, str]
    from_path: tuple[str, ...]
    is_csv: bool
    problem: str
    notes: tuple[str, ...]

    def type_of(self, documented: str) -> str:
        """The type in the file; "" when the column is missing."""
        return self.types.get(self.source.get(documented, ""), "")

    @cached_property
    def further(self) -> Mapping[str, str]:
        """Lower case -> name in DuckDB, of the columns that are not documented."""
        taken = {name.lower() for name in self.source.values()}
        return {name.lower(): name for name in self.types if name and name.lower() not in taken}

    @cached_property
    def lower_names(self) -> frozenset[str]:
        """All names, in lower case."""
        return frozenset(name.lower() for name in self.types)

    @cached_property
    def kind(self) -> tuple[object, ...]:
        """Equal for files that one query can read, but for columns that are not documented."""
        renamed = tuple(sorted((name, own) for name, own in self.source.items() if name != own.lower()))
        header = tuple(self.types) if self.is_csv or self.has_unnamed else ()
        return instant_kind(self.type_of(INSTANT)), renamed, self.has_bytes, self.from_path, header

    @property
    def has_unnamed(self) -> bool:
        """Whether a column has no name; DuckDB makes one up, which may be that of another column."""
        return "" in self.types

    @property
    def has_bytes(self) -> bool:
        """Whether a documented column holds bytes, as older writers leave text."""
        return any(self.type_of(name) == "BLOB" for name in self.source)


@dataclass(frozen=True, slots=True)
class File:
    """One object that is read. `name`: as DuckDB reaches it; `reading`: how its columns are read."""

    name: str
    key: str
    reading: Reading


def file_of(name: str, key: str, schema: str) -> File:
    """`schema`: column -> type as JSON, in the file's order."""
    return File(name, key, reading(schema, tuple(path_texts(key)), is_csv=format_of(key) == "csv"))


def path_texts(key: str) -> Mapping[str, str | None]:
    """Documented texts that folders such as `device_id=D1/` name; None for the null of Hive."""
    return {
        found[1].lower(): None if found[2] == NO_PARTITION else unquote(found[2]) for found in IN_PATH.finditer(key)
    }


def instant_kind(kind: str) -> str:
    """How instants of this type are understood; "" for no column at all, "unusable" for a type that holds none."""
    if not kind or kind == "DATE" or kind.startswith("TIMESTAMP"):
        return kind
    if kind in ("VARCHAR", "BLOB", "JSON") or kind.startswith("ENUM"):
        return "text"
    if WHOLE.fullmatch(kind) or kind == NULL:
        return "whole"
    return "number" if NUMBER.fullmatch(kind) else "unusable"


def family(kind: str) -> str:
    """Types of one family become one type without loss; "" fits every other."""
    if kind == NULL:
        return ""
    if NUMBER.fullmatch(kind) or kind == "BOOLEAN":
        return "number"
    return "instant" if kind == "DATE" or kind.startswith("TIMESTAMP") else kind


@lru_cache(maxsize=4096)
def reading(schema: str, in_path: tuple[str, ...], *, is_csv: bool = False) -> Reading:
    """See `Reading`; `in_path` are the documented names that the path gives."""
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
        notes.append("has a column without a name, which no report can read")
    from_path = tuple(name for name in in_path if name not in source)
    missing = [name for name in ("device_id", INSTANT) if name not in source and name not in from_path]
    notes += [f"has no column {name}: its rows count as those without one" for name in missing]
    problem = next(_problems(types, source, is_csv=is_csv), "")
    return Reading(types, source, from_path, is_csv, problem, tuple(notes))


def _problems(types: Mapping[str, str], source: Mapping[str, str], *, is_csv: bool) -> Iterator[str]:
    if is_csv and INSTANT not in source:
        yield f"is CSV without a column timestamp; its first line is {', '.join(types)[:100]!r}"
    for name, own in source.items():
        kind = types[own]
        if name == INSTANT:
            usable = instant_kind(kind) != "unusable"
        elif name in TEXTS:
            usable = not is_nested(kind)
        else:
            usable = family(kind) in ("number", "VARCHAR", "BLOB", "JSON", "") or kind.startswith("ENUM")
        if not usable:
            yield f"its column {own} is of type {kind}, which reports cannot use as {name}"


def is_nested(kind: str) -> bool:
    """Whether values hold other values."""
    return kind.endswith("]") or kind.startswith(("STRUCT", "MAP", "VARIANT", "UNION"))


def distinct(names: Sequence[str]) -> Sequence[str]:
    """The names by which DuckDB knows columns: one that differs from an earlier one in case only gets a number."""
    collisions: dict[str, int] = {}
    found = []
    for name in names:
        while (low := _lower(name)) in collisions:
            collisions[low] += 1
            name = f"{name}_{collisions[low]}"  # noqa: PLW2901 - the next try, as DuckDB's reader does it
        collisions[low] = 0
        found.append(name)
    return found


def _lower(name: str) -> str:
    """As DuckDB does: ASCII only."""
    return name.encode().lower().decode()
