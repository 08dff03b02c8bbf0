"""The facts of objects: read from the objects, or computed from the rows while an object is written."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from shutil import copyfileobj
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, BinaryIO
from uuid import uuid4

from app.analytics.columns import ReportFile, file_column, file_of, format_of, lost_values, relation, schemas, suffix_of
from app.analytics.engine import (
    DOCUMENTED,
    INSTANT,
    NANOS,
    NUMBERS,
    TEXTS,
    Engine,
    InvalidReport,
    ReportTooLarge,
    UnreadableObject,
    literal,
    written,
)
from app.analytics.reports import LATEST, rank
from app.core.errors import AppError, Conflict, Permanent, Rejected, Transient
from app.db.object_summaries import NO_DAY, PART_FIELDS, DaySummary, ObjectFacts
from app.object_store.port import ObjectInfo, ObjectStore

if TYPE_CHECKING:
    import pyarrow as pa

# Reads the facts of many objects at once: each is fetched in its listed version, and DuckDB aggregates them together.
#
# Invariants: facts belong to the version they were read from; memory and disk stay bounded however large an object is;
# an unreadable object is recorded as a fact too and does not block others.

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

    read: list[ObjectFacts]
    unread: list[ObjectFacts]


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
        waiting: list[Any] = []
        for group in [*_groups(infos), ()]:
            ahead = [pool.submit(_fetch, store, Path(folder), info) for info in group]
            if waiting:
                yield _facts(engine, waiting)
            waiting = ahead


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
    others = [one.facts for one in fetched if not one.refused and not one.file]
    batch = FactsBatch(others, [one.facts for one in refused])
    copies = [one for one in fetched if one.file]
    if copies:
        _read(engine, copies, batch)
    for one in copies:
        Path(str(one.file)).unlink()
    return batch


def _read(engine: Engine, copies: Sequence[FetchedObject], batch: FactsBatch) -> None:
    """Read all in one query; if it fails, one by one, to find the unreadable ones. An object that needs more memory
    than is free now is retried later, when no report runs.
    """
    try:
        batch.read.extend(_together(engine, copies))
    except (UnreadableObject, InvalidReport, ReportTooLarge) as error:
        for one in copies if len(copies) > 1 else ():
            _read(engine, [one], batch)
        if len(copies) == 1:
            one = copies[0]  # its fault names the object instead of the copy
            unreadable = replace(one.facts, fault=error.message.replace(str(one.file), one.facts.key))
            (batch.unread if isinstance(error, ReportTooLarge) else batch.read).append(unreadable)


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


# Computes an object's facts from its rows while they are written, so that it need not be read back.
#
# Invariant: the facts equal those from reading the object. If that is not certain, there are none, and the object is
# read like any other.

DAY_US = 86_400_000_000
TYPES = {
    "string": "VARCHAR",
    "double": "DOUBLE",
    "int64": "BIGINT",
    "int32": "INTEGER",
    "int16": "SMALLINT",
    "uint64": "UBIGINT",
    "bool": "BOOLEAN",
    "timestamp[us, tz=UTC]": "TIMESTAMP WITH TIME ZONE",
}


class TableSums:
    """Facts of one object with one device and day. `schema`: the object's schema; `form`: parquet or csv."""

    def __init__(self, schema: "pa.Schema", form: str) -> None:
        self._is_csv = form == "csv"
        self._columns = _columns(schema, is_csv=self._is_csv)
        self._rows = 0
        self._first_ns: int | None = None
        self._last_ns: int | None = None
        self._numbers: dict[str, list[Any]] = {"voltage": [], "temperature": [], "soc": []}
        self._device: str | None = None
        self._latest: tuple[Any, ...] | None = None

    def add(self, table: "pa.Table") -> None:
        """Add rows as they are written, sorted by their timestamps."""
        import numpy as np
        import pyarrow as pa

        if not self._columns or not table.num_rows:
            return
        times = table.column(INSTANT)
        instants = (times.chunk(0) if times.num_chunks == 1 else times.combine_chunks()).view(pa.int64()).to_numpy()
        if times.type.unit == "us":
            instants = instants * 1000
            if NANOS in table.column_names:
                instants += table.column(NANOS).to_numpy()
        if self._is_csv and (instants % 1000).any():
            self._columns = {}  # DuckDB rounds text timestamps to microseconds
            return
        self._rows += table.num_rows
        self._first_ns = int(instants[0]) if self._first_ns is None else self._first_ns
        before_ns, self._last_ns = self._last_ns, int(instants[-1])
        self._device = table.column("device_id")[0].as_py() or None
        for name, sums in self._numbers.items():
            if name in self._columns and (values := _finite(table.column(name))).size:
                total = float(np.add.reduce(values, dtype=np.longdouble))
                sums.append((total, values.size, float(values.max())))
        last = range(
            int(np.searchsorted(instants, instants[-1])), table.num_rows
        )  # several rows can share the last timestamp
        columns = [table.column(name) if name in self._columns else None for name in LATEST[1:-1]]
        readings = [_reading(columns, row, self._last_ns) for row in last]
        if self._latest is not None and before_ns == self._last_ns:
            readings.append(self._latest)
        self._latest = readings[0] if len(readings) == 1 else max(readings, key=rank)

    def facts(self, key: str, etag: str, size_bytes: int) -> ObjectFacts | None:
        """The facts of the object in the version just written; None if only reading it can give them."""
        if not self._columns or self._first_ns is None or self._last_ns is None:
            return None
        first_us, last_us = self._first_ns // 1000, self._last_ns // 1000
        if first_us < 0 or first_us // DAY_US != last_us // DAY_US:
            return None
        voltage, temperature, soc = (self._numbers[name] for name in ("voltage", "temperature", "soc"))
        part = DaySummary(
            device=json.dumps(self._device),
            day=first_us // DAY_US,
            rows=self._rows,
            min_us=first_us,
            max_us=last_us,
            voltage_sum=sum(total for total, _, _ in voltage) if voltage else None,
            voltage_count=sum(count for _, count, _ in voltage),
            temperature_max=max((greatest for _, _, greatest in temperature), default=None),
            soc_sum=sum(total for total, _, _ in soc) if soc else None,
            soc_count=sum(count for _, count, _ in soc),
            latest=self._latest,
        )
        return ObjectFacts(key, etag, size_bytes, self._rows, self._columns, "", (part,))


@lru_cache(maxsize=64)
def _columns(schema: "pa.Schema", *, is_csv: bool) -> Mapping[str, str]:
    """Name -> DuckDB type; empty if DuckDB would read a column differently than its name and type suggest."""
    found: dict[str, str] = {}
    for each in schema:
        arrow = str(getattr(each.type, "value_type", each.type))
        kind, low = TYPES.get(arrow, ""), each.name.lower()
        wanted = DOCUMENTED.get(low)
        is_odd = not each.name or (wanted is not None and each.name != low)
        is_other = wanted in ("DOUBLE", "SMALLINT") and arrow not in ("double", "int64", "int32", "int16", "uint64")
        if is_odd or is_other or (low in TEXTS and kind != "VARCHAR") or not (kind or is_csv):
            return {}
        found[each.name] = "VARCHAR" if is_csv else kind
    return found


def _finite(column: Any) -> Any:
    """The finite values of a numeric column as a float64 numpy array."""
    import numpy as np

    values = column.to_numpy().astype(np.float64, copy=False)
    return values[np.isfinite(values)]


def _reading(columns: Sequence[Any], row: int, instant_ns: int) -> tuple[Any, ...]:
    """The values of LATEST in a row, as reading the object would give them."""
    values = [None if column is None else column[row].as_py() for column in columns]
    numbers, texts = values[: len(NUMBERS)], values[len(NUMBERS) :]
    finite = (None if value is None or not math.isfinite(value) else float(value) for value in numbers)
    return (instant_ns // 1000, *finite, *(text or None for text in texts), instant_ns % 1000)
