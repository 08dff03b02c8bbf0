"""Facts of many objects at once: their columns, and their sums by device and day."""

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from shutil import copyfileobj
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO
from uuid import uuid4

from app.analytics.builtin_reports import LATEST
from app.analytics.columns import File, file_column, file_of, format_of, literal, lost_values, relation, suffix_of
from app.analytics.engine import Engine
from app.analytics.errors import TooLarge, UnreadableObject, Wrong, written
from app.core.errors import AppError, Conflict, Permanent, Rejected, Transient
from app.db.object_summaries import NO_DAY, PART_FIELDS, DaySummary, Facts
from app.object_store.port import ObjectInfo, ObjectStore

# The columns of files, as they stand in them: of Parquet from the footer, of CSV from the first line.

NESTED = "NESTED"
HEADER_CHARACTERS = 1 << 20
HINT = "save it as UTF-8 with commas and a first line of column names"
SCHEMA = "SELECT file_name, name, duckdb_type, num_children FROM parquet_schema({})"
Columns = Mapping[str, str]
"""Column -> type, in the file's order."""


def schemas(engine: Engine, files: Sequence[tuple[str, str]]) -> Mapping[str, Columns]:
    """File -> its columns, for pairs of file and key. Raises UnreadableObject when one of them cannot be read."""
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
        raise UnreadableObject(f"{file}: its first line is not CSV in UTF-8: {error}", HINT) from error
    if not any(header):
        raise UnreadableObject(f"{file}: its first line has no names", HINT)
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


# Facts of many objects at once: each is fetched in the very version that was listed, and DuckDB aggregates them
# together.
#
# Invariants: facts are never ascribed to another version than the one they were read from; memory and disk stay
# bounded however large an object is; an object that cannot be read is a fact too, and hinders no other.

AT_ONCE = 16  # as many connections as the store keeps
GROUP_OBJECTS = 64
GROUP_BYTES = 64 << 20
PIECE_BYTES = 1 << 20
ATTEMPTS = 3
MAGIC = b"PAR1"
OTHER = "is neither Parquet nor CSV, and is left out"
NOTE_CHARACTERS = 300


@dataclass(frozen=True, slots=True)
class Group:
    """What was found. `unread` could not be fetched or held, which is no fact of the object: it is tried again another
    time.
    """

    read: Sequence[Facts]
    unread: Sequence[Facts] = ()


@dataclass(frozen=True, slots=True)
class FetchedObject:
    """One object on its way. Without a local copy, `refused` says why the store did not hand it out; without that too,
    it is no data.
    """

    facts: Facts
    file: Path | None = None
    refused: AppError | None = None


def aggregated(store: ObjectStore, engine: Engine, infos: Sequence[ObjectInfo]) -> Iterator[Group]:
    """Facts of these objects, group by group, the next one fetched meanwhile. Objects that are gone are left out; those
    that were replaced since have the version that is there now. Raises Transient when the store fails.
    """
    if not infos:
        return
    with (
        TemporaryDirectory(dir=engine.folder, prefix="copies-") as folder,
        ThreadPoolExecutor(AT_ONCE, thread_name_prefix="analytics-fetch") as pool,
    ):
        waiting: list[Any] | None = None
        for group in _groups(infos):
            ahead = [pool.submit(_fetch, store, Path(folder), info) for info in group]
            if waiting is not None:
                yield _facts(engine, waiting)
            waiting = ahead
        if waiting is not None:
            yield _facts(engine, waiting)


def _groups(infos: Sequence[ObjectInfo]) -> Iterator[Sequence[ObjectInfo]]:
    group: list[ObjectInfo] = []
    size_bytes = 0
    for info in infos:
        if group and (len(group) == GROUP_OBJECTS or size_bytes + info.size_bytes > GROUP_BYTES):
            yield group
            group, size_bytes = [], 0
        group.append(info)
        size_bytes += info.size_bytes
    if group:
        yield group


def _fetch(store: ObjectStore, folder: Path, info: ObjectInfo) -> FetchedObject | None:
    """A local copy of the version that was listed, or of the one that is there now; None for an object that is gone."""
    wanted: ObjectInfo | None = info
    for _ in range(ATTEMPTS):
        if wanted is None:
            return None
        facts = Facts(wanted.key, wanted.etag, wanted.size_bytes)
        try:
            with store.open(wanted.key, wanted.etag) as body:
                if body is None:
                    return None
                start = body.read(len(MAGIC))
                if not format_of(wanted.key) and start != MAGIC:
                    return FetchedObject(Facts(wanted.key, wanted.etag, size_bytes=0, fault=OTHER))
                return FetchedObject(facts, _copy(body, start, folder / f"{uuid4().hex}{suffix_of(wanted.key)}"))
        except Conflict:
            wanted = store.head(wanted.key)
        except (Permanent, Rejected) as error:
            return FetchedObject(_faulty(facts, error.message), refused=error)
    raise Transient(f"{info.key}: is replaced faster than it can be read", "nothing to do: it is read again")


def _copy(body: BinaryIO, start: bytes, file: Path) -> Path:
    """What was read already and the rest, in a new file."""
    with ExitStack() as undo:
        undo.callback(file.unlink, missing_ok=True)
        with written(), file.open("xb") as copy:
            copy.write(start)
            copyfileobj(body, copy, PIECE_BYTES)
        undo.pop_all()
    return file


def _facts(engine: Engine, futures: Sequence[Any]) -> Group:
    fetched: list[FetchedObject] = [one for future in futures if (one := future.result()) is not None]
    refused = [one for one in fetched if one.refused]
    if refused and len(refused) == len(fetched) and isinstance(refused[0].refused, Permanent):
        raise refused[0].refused
    copies = [one for one in fetched if one.file]
    others = [one.facts for one in fetched if not one.refused and not one.file]
    found = _read(engine, copies)
    group = Group([*found.read, *others], [*found.unread, *(one.facts for one in refused)])
    for one in copies:
        Path(str(one.file)).unlink()
    return group


def _read(engine: Engine, copies: Sequence[FetchedObject]) -> Group:
    """All in one query; one by one when that fails, to find which cannot be read. One that needs more memory than there
    is may find more another time, when no report runs.
    """
    if not copies:
        return Group([])
    try:
        return Group(_together(engine, copies))
    except (UnreadableObject, Wrong) as error:
        if len(copies) == 1:
            return Group([_named(copies[0], error)])
    except TooLarge as error:
        if len(copies) == 1:
            return Group([], [_named(copies[0], error)])
    groups = [_read(engine, [one]) for one in copies]
    return Group(
        [facts for group in groups for facts in group.read], [facts for group in groups for facts in group.unread]
    )


def _named(one: FetchedObject, error: AppError) -> Facts:
    """What is wrong with it, by its key and not by that of the copy."""
    return _faulty(one.facts, error.message.replace(str(one.file), one.facts.key))


def _faulty(facts: Facts, message: str) -> Facts:
    return Facts(facts.key, facts.etag, facts.size_bytes, fault=message)


def _together(engine: Engine, copies: Sequence[FetchedObject]) -> Sequence[Facts]:
    columns = schemas(engine, [(str(one.file), one.facts.key) for one in copies])
    files = [file_of(str(one.file), one.facts.key, json.dumps(columns[str(one.file)])) for one in copies]
    usable = [file for file in files if not file.reading.problem]
    parts: dict[str, list[DaySummary]] = {}
    notes = {file.name: list(file.reading.notes) for file in usable}
    if usable:
        for name, *values in engine.rows(_aggregates(engine.folder, usable)):
            parts.setdefault(name, []).append(_part(values))
        if lost := lost_values(engine.folder, usable):
            for name, column, count, example in engine.rows(lost):
                notes[name].append(
                    f"{count} values of {column} are not understood and count as null, such as {example!r}"
                )
    return [
        Facts(
            one.facts.key,
            one.facts.etag,
            one.facts.size_bytes,
            rows=sum(part.rows for part in parts.get(file.name, ())),
            columns=columns[file.name],
            fault=file.reading.problem or "; ".join(notes[file.name])[:NOTE_CHARACTERS],
            parts=sorted(parts.get(file.name, ()), key=lambda part: (part.device, part.day)),
        )
        for one, file in zip(copies, files, strict=True)
    ]


def _aggregates(folder: Path, files: Sequence[File]) -> str:
    name = file_column(files)
    instant = "'at': epoch_us(timestamp), 'nanos': coalesce(timestamp_nanos, 0)"
    values = ", ".join(f'{literal(each)}: "{each}"' for each in LATEST[1:-1])
    return f"""
        SELECT
            {name}, device_id, CAST(timestamp AS DATE) - DATE '1970-01-01' AS day, count(*),
            epoch_us(min(timestamp)), epoch_us(max(timestamp)),
            fsum(voltage), count(voltage), max(temperature), fsum(soc), count(soc),
            max({{{instant}, {values}}}) FILTER (timestamp IS NOT NULL)
        FROM {relation(folder, files, file_name=name)}
        GROUP BY {name}, device_id, day
    """  # noqa: S608 - names of columns, and files of our own


def _part(values: Sequence[Any]) -> DaySummary:
    device, day, *numbers, latest = values
    newest = None if latest is None else (latest["at"], *(latest[name] for name in LATEST[1:-1]), latest["nanos"])
    named = zip(PART_FIELDS, (json.dumps(device), NO_DAY if day is None else day, *numbers), strict=True)
    return DaySummary(**dict(named), latest=newest)
