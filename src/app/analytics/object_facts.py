"""Facts of many objects at once: each is fetched in its listed version, and DuckDB aggregates them together.

Invariants: facts belong to the version they were read from; memory and disk stay bounded however large an object is; an
unreadable object is recorded as a fact too and does not block others.
"""

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from shutil import copyfileobj
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO
from uuid import uuid4

from app.analytics.columns import ReportFile, file_column, file_of, format_of, lost_values, relation, schemas, suffix_of
from app.analytics.engine import Engine, InvalidReport, ReportTooLarge, UnreadableObject, literal, written
from app.analytics.reports import LATEST
from app.core.errors import AppError, Conflict, Permanent, Rejected, Transient
from app.db.object_summaries import NO_DAY, PART_FIELDS, DaySummary, ObjectFacts
from app.object_store.port import ObjectInfo, ObjectStore

AT_ONCE = 16  # size of the store's connection pool
GROUP_OBJECTS = 64
GROUP_BYTES = 64 << 20
PIECE_BYTES = 1 << 20
ATTEMPTS = 3
MAGIC = b"PAR1"
OTHER = "is neither Parquet nor CSV, and is left out"
NOTE_CHARACTERS = 300


@dataclass(frozen=True, slots=True)
class FactsBatch:
    """The facts of one batch. `unread` objects could not be fetched or did not fit in memory; this is not the object's
    fault, so they are retried later.
    """

    read: Sequence[ObjectFacts]
    unread: Sequence[ObjectFacts] = ()


@dataclass(frozen=True, slots=True)
class FetchedObject:
    """One object. Without a local copy, `refused` says why the store did not return it; without either, it is neither
    Parquet nor CSV.
    """

    facts: ObjectFacts
    file: Path | None = None
    refused: AppError | None = None


def aggregated(store: ObjectStore, engine: Engine, infos: Sequence[ObjectInfo]) -> Iterator[FactsBatch]:
    """Facts of these objects, group by group; the next group is prefetched. Deleted objects are left out; for replaced
    objects the current version is read. Raises Transient when the store fails.
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
    """A local copy of the listed version, or else of the current one; None for a deleted object."""
    wanted: ObjectInfo | None = info
    for _ in range(ATTEMPTS):
        if wanted is None:
            return None
        facts = ObjectFacts(wanted.key, wanted.etag, wanted.size_bytes)
        try:
            with store.open(wanted.key, wanted.etag) as body:
                if body is None:
                    return None
                start = body.read(len(MAGIC))
                if not format_of(wanted.key) and start != MAGIC:
                    return FetchedObject(ObjectFacts(wanted.key, wanted.etag, size_bytes=0, fault=OTHER))
                return FetchedObject(facts, _copy(body, start, folder / f"{uuid4().hex}{suffix_of(wanted.key)}"))
        except Conflict:
            wanted = store.head(wanted.key)
        except (Permanent, Rejected) as error:
            return FetchedObject(replace(facts, fault=error.message), refused=error)
    raise Transient(f"{info.key} is replaced faster than it can be read", "no action needed, it is retried")


def _copy(body: BinaryIO, start: bytes, file: Path) -> Path:
    """Write `start`, already read, and the rest of the body to a new file."""
    with ExitStack() as undo:
        undo.callback(file.unlink, missing_ok=True)
        with written(), file.open("xb") as copy:
            copy.write(start)
            copyfileobj(body, copy, PIECE_BYTES)
        undo.pop_all()
    return file


def _facts(engine: Engine, futures: Sequence[Any]) -> FactsBatch:
    fetched: list[FetchedObject] = [one for future in futures if (one := future.result()) is not None]
    refused = [one for one in fetched if one.refused]
    if refused and len(refused) == len(fetched) and isinstance(refused[0].refused, Permanent):
        raise refused[0].refused
    copies = [one for one in fetched if one.file]
    others = [one.facts for one in fetched if not one.refused and not one.file]
    found = _read(engine, copies)
    group = FactsBatch([*found.read, *others], [*found.unread, *(one.facts for one in refused)])
    for one in copies:
        Path(str(one.file)).unlink()
    return group


def _read(engine: Engine, copies: Sequence[FetchedObject]) -> FactsBatch:
    """Read all in one query; if it fails, one by one, to find the unreadable ones. An object that needs more memory
    than is free now is retried later, when no report runs.
    """
    if not copies:
        return FactsBatch([])
    try:
        return FactsBatch(_together(engine, copies))
    except (UnreadableObject, InvalidReport) as error:
        if len(copies) == 1:
            return FactsBatch([_faulty(copies[0], error)])
    except ReportTooLarge as error:
        if len(copies) == 1:
            return FactsBatch([], [_faulty(copies[0], error)])
    groups = [_read(engine, [one]) for one in copies]
    return FactsBatch(
        [facts for group in groups for facts in group.read], [facts for group in groups for facts in group.unread]
    )


def _faulty(one: FetchedObject, error: AppError) -> ObjectFacts:
    """The facts of an unreadable object; the message has the object's key instead of the copy's name."""
    return replace(one.facts, fault=error.message.replace(str(one.file), one.facts.key))


def _together(engine: Engine, copies: Sequence[FetchedObject]) -> Sequence[ObjectFacts]:
    columns = schemas(engine, [(str(one.file), one.facts.key) for one in copies])
    files = [file_of(str(one.file), one.facts.key, json.dumps(columns[str(one.file)])) for one in copies]
    usable = [file for file in files if not file.reading.problem]
    parts: dict[str, list[DaySummary]] = {}
    notes = {file.name: list(file.reading.notes) for file in usable}
    if usable:
        for name, device, day, *numbers, latest in engine.rows(_aggregates(engine.folder, usable)):
            values = (json.dumps(device), NO_DAY if day is None else day, *numbers)
            newest = latest and (latest["at"], *(latest[each] for each in LATEST[1:-1]), latest["nanos"])
            part = DaySummary(**dict(zip(PART_FIELDS, values, strict=True)), latest=newest)
            parts.setdefault(name, []).append(part)
        if lost := lost_values(engine.folder, usable):
            for name, column, count, example in engine.rows(lost):
                notes[name].append(
                    f"{count} values of {column} cannot be parsed and count as null, such as {example!r}"
                )
    return [
        ObjectFacts(
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


def _aggregates(folder: Path, files: Sequence[ReportFile]) -> str:
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
