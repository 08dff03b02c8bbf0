"""Read InfluxDB with InfluxQL over `/query`: 1.x, 2.x with a mapped database, and 3.

Responses are requested as chunked JSON, one document per line: in CSV a failed statement would be an empty 200. Types
come from SHOW FIELD KEYS, since JSON writes 21.0 as 21. They are queried after the counts and before the rows, so a new
field is never counted as read. Every column states whether it is a tag or a field, since both may have the same name.
Invariants: as for `flux`; a response whose last part is marked `partial` is an error.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from decimal import Decimal
from functools import cached_property
from typing import Any, TypeVar
from urllib.parse import urlencode

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from app.core.errors import AppError, Permanent, Transient
from app.core.pipeline import UNLIMITED, Sums
from app.core.windows import EPOCH, Window
from app.influx_to_s3.reader import (
    DAY,
    INVENTORY_DEVICES,
    OK,
    FieldCount,
    FieldSums,
    InfluxConnection,
    PointColumns,
    QueryTooLarge,
    RawCells,
    Retention,
    ServerAnswer,
    SourceInventory,
    counted_in_parts,
    error_of_status,
    one_type_spans,
)

CHUNK_ROWS = 10_000
STATEMENTS = 31  # per request: the days of a month
HEADERS = {"Content-Type": "application/x-www-form-urlencoded", "Accept": "application/json"}
FIRST_NS, LAST_NS = -(2**63) + 2, 2**63 - 2
NUMERIC = ("float", "integer", "unsigned")
UNWRITABLE = re.compile("[\0\r]")  # the server treats these as the end of the text or line, even inside quotes
NEGATIVE_ZERO = re.compile(rb"[,\[]-0[,\]]")
PASSING = ("timeout", "shutdown", "engine", "max-concurrent-queries")
DURATION = re.compile(r"(\d+(?:\.\d+)?)(ns|us|µs|ms|s|m|h|d|w)")
AGGREGATES = "COUNT(*), SUM(*), MIN(*), MAX(*)"
CANNOT_HINT = "no action needed: rows are read instead. JSON has no number for what these values add up to"
T = TypeVar("T")
UNIT_SECONDS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}


@dataclass(frozen=True, slots=True)
class SelectedField:
    """A field with one of the types that it has in some shard. `heading`: its column in the response."""

    name: str
    kind: str
    heading: str


def text_literal(text: str) -> str:
    """An InfluxQL string literal."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") + "'"


def identifier(name: str) -> str:
    """A quoted InfluxQL identifier."""
    return '"' + name.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'


def exact_pattern(text: str) -> str:
    """A regular expression that matches only this text: the way to name what no literal can hold."""
    return "/^" + re.sub(r"[^A-Za-z0-9_ ]", lambda found: f"\\x{{{ord(found.group()):x}}}", text) + "$/"


class InfluxQlReader:
    """`Reader` over InfluxQL."""

    def __init__(
        self,
        connection: InfluxConnection,
        *,
        database: str,
        retention_policy: str,
        measurement: str,
        device_tag: str = "device_id",
    ) -> None:
        self._connection = connection
        self._database, self._retention_policy = database, retention_policy
        self._measurement, self._device_tag = measurement, device_tag
        policy = f", INFLUXDB_RETENTION_POLICY={retention_policy!r}" if retention_policy else ""
        self._variables = f"INFLUXDB_DATABASE={database!r}{policy}"
        self._tag = identifier(device_tag)

    def devices(self, since: datetime) -> Sequence[str]:
        """See `Reader`. Without a condition InfluxDB 3 looks back one day.

        1.x knows the time of a tag value at shard precision at best. With its in-memory index it returns every value as
        soon as the database has a shard in the range.
        """
        query = f"SHOW TAG VALUES {self._from()} WITH KEY = {self._tag} WHERE time >= {_nanoseconds(since)}"
        return sorted({row[1] for series in self._ask(query) for row in series["values"] if row[1]})

    def counts(self, device: str | None, span: Window, every_seconds: int) -> Iterator[FieldCount]:
        """See `Reader`."""
        return self._in_buckets("COUNT(*)", device, span, every_seconds, lambda series: self._counted(series, None))

    def sums(
        self,
        device: str,
        span: Window,
        every_seconds: int,
        numbers: Sequence[str],  # noqa: ARG002 - InfluxQL's wildcards select the numeric fields
    ) -> Iterator[FieldSums]:
        """See `Reader`."""
        return self._in_buckets(AGGREGATES, device, span, every_seconds, summed)

    def _in_buckets(
        self,
        selected: str,
        device: str | None,
        span: Window,
        every_seconds: int,
        taken: Callable[[Mapping[str, Any]], Iterator[T]],
    ) -> Iterator[T]:
        """Yield what `taken` extracts from each series of a response that has one row per bucket."""

        def ask(spans: Sequence[Window]) -> Iterator[T | None]:
            statements = "; ".join(
                f"SELECT {selected} {self._from()} WHERE {self._where(device, one)}"
                f" GROUP BY {self._tag}::tag, time({every_seconds}s) fill(none)"
                for one in spans
            )
            for series in self._answers(statements, len(spans)):
                if series is None:
                    yield None
                else:
                    yield from taken(series)

        return counted_in_parts(one_type_spans(span, self._shard), every_seconds, ask, STATEMENTS)

    def rows(self, device: str, span: Window) -> Iterator[PointColumns]:
        """See `Reader`."""
        return self.rows_of((device,), span)

    def rows_of(self, devices: Sequence[str], span: Window) -> Iterator[PointColumns]:
        """See `Reader`. A field with different types in different shards is selected once per type."""
        selected = self._fields()
        named = [one for one in selected if not UNWRITABLE.search(one.name)]
        patterned = [one for one in selected if UNWRITABLE.search(one.name)]
        columns = [f"{identifier(one.name)}::{one.kind} AS {identifier(one.heading)}" for one in named]
        columns += sorted({exact_pattern(one.name) for one in patterned})
        if not columns:
            return
        # Columns selected by a pattern cannot be cast: they are read as one type, so a query must not span several.
        for one in one_type_spans(span, self._shard) if patterned else (span,):
            query = f"SELECT {', '.join(columns)} {self._from()} WHERE {self._where(devices, one)} GROUP BY *"
            batch = _Batch(self._device_tag, named, patterned, names_devices=len(devices) > 1)
            for series in self._ask(query):
                yield from batch.add(series)
            yield from batch.finish()

    def empty_texts(self, device: str, span: Window, field: str) -> Iterator[PointColumns]:  # noqa: ARG002 - always empty
        """See `Reader`: JSON distinguishes an empty string from a missing value."""
        return iter(())

    def cells(self, device: str, span: Window) -> Iterator[RawCells]:
        """See `Reader`. One statement per field, without a cast: within one shard a field has one type."""
        kinds: dict[str, set[str]] = {}
        for one in self._fields():
            kinds.setdefault(one.name, set()).add(one.kind)
        asked = [
            (name, f"SELECT {column} {self._from()} WHERE {self._where(device, part)} GROUP BY *")
            for part in one_type_spans(span, self._shard)
            for name in kinds
            for column in [exact_pattern(name) if UNWRITABLE.search(name) else f"{identifier(name)}::field"]
        ]
        for start in range(0, len(asked), STATEMENTS):
            step = asked[start : start + STATEMENTS]
            names = (name for name, _ in step)
            name = next(names)
            for series in self._answers("; ".join(query for _, query in step), len(step)):
                if series is None:
                    name = next(names, "")
                else:
                    yield from self._cells(name, kinds[name], series)

    def _cells(self, name: str, kinds: set[str], series: Mapping[str, Any]) -> Iterator[RawCells]:
        """The values of one series or part of it, grouped by type: JSON does not say which type a number has."""
        times, column = zip(*series["values"], strict=True)
        tags = {tag: text for tag, text in (series.get("tags") or {}).items() if text and tag != self._device_tag}
        for _, values in _untyped(name, [_read_as(kinds, value) for value in column], kinds):
            there = values.is_valid()
            number = len(values) - values.null_count
            yield RawCells(
                pa.array(times, pa.int64()).filter(there).cast(pa.timestamp("ns", "UTC")),
                {tag: pa.repeat(pa.scalar(text), number) for tag, text in tags.items()},
                pa.repeat(pa.scalar(name), number),
                values.drop_null(),
            )

    def outside(self, span: Window) -> Iterator[FieldCount]:
        """See `Reader`."""
        query = f"SELECT COUNT(*) {self._from()} WHERE {self._where(None, span)} GROUP BY {self._tag}::tag"
        for series in self._ask(query):
            yield from self._counted(series, span.start)

    def retention(self) -> Retention:
        """See `Reader`. Only 1.x reports it: 2.x answers `0s` for every bucket, whatever its retention is."""
        policies, told_at, version = self._policies()
        own = next((row for row in policies if self._is_own(row)), None)
        if own is None or not version.startswith("1."):
            return Retention(None, self._oldest_at(), told_at)
        text = str(own.get("duration", ""))
        seconds = _seconds(text)
        # An unreadable duration guarantees nothing.
        period = timedelta(seconds=seconds) if seconds or re.search("[1-9]", text) else UNLIMITED
        return Retention(period, told_at=told_at)

    def _oldest_at(self) -> datetime | None:
        """The rows of all series are returned in time order."""
        try:
            times = [row[0] for series in self._ask(f"SELECT * {self._from()} LIMIT 1") for row in series["values"]]
        except Permanent:
            return None  # for example too many series
        return EPOCH + timedelta(microseconds=-(-min(times) // 1000)) if times else None

    def inventory(self) -> SourceInventory:
        """See `Reader`."""
        values = f"SHOW TAG VALUES {self._from()} WITH KEY = {self._tag}"
        return SourceInventory(
            measurements=self._names("SHOW MEASUREMENTS"),
            has_points=self._has_points(self._retention_policy),
            tags=self._names(f"SHOW TAG KEYS {self._from()}"),
            fields=sorted({one.name for one in self._fields()}),
            devices=self._names(f"{values} WHERE time >= {FIRST_NS} LIMIT {INVENTORY_DEVICES}"),
            policies=tuple(
                row["name"] for row in self._policies()[0] if not self._is_own(row) and self._has_points(row["name"])
            ),
        )

    def ping(self) -> str:
        """See `Reader`. Unlike SHOW MEASUREMENTS, this distinguishes a missing database from an empty one."""
        self._fields()
        return f"may read database {self._database} at {self._connection.url} by InfluxQL"

    def _has_points(self, policy: str) -> bool:
        try:
            return any(True for _ in self._ask(f"SELECT * {self._from(policy)} LIMIT 1"))
        except QueryTooLarge:  # more series than the server may read at once
            return True

    def _names(self, query: str) -> Sequence[str]:
        """The last column of a SHOW statement, sorted."""
        return sorted({row[-1] for series in self._ask(query) for row in series["values"] if row[-1]})

    def _from(self, policy: str | None = None) -> str:
        policy = self._retention_policy if policy is None else policy
        prefix = f"{identifier(policy)}." if policy else ""
        name = self._measurement
        return f"FROM {prefix}{exact_pattern(name) if UNWRITABLE.search(name) else identifier(name)}"

    def _where(self, device: str | Sequence[str] | None, span: Window) -> str:
        bounds = f"time >= {_nanoseconds(span.start)} AND time < {_nanoseconds(span.end)}"
        if device is None:
            return bounds
        devices = (device,) if isinstance(device, str) else device
        equals = (f"=~ {exact_pattern(one)}" if UNWRITABLE.search(one) else f"= {text_literal(one)}" for one in devices)
        own = " OR ".join(f"{self._tag}::tag {each}" for each in equals)
        return f"{bounds} AND {own if len(devices) == 1 else f'({own})'}"

    def _policies(self) -> tuple[Sequence[Mapping[str, Any]], datetime | None, str]:
        """The retention policies by column name, empty without permission; the server's clock and version."""
        found: list[Mapping[str, Any]] = []
        try:
            with self._question(f"SHOW RETENTION POLICIES ON {identifier(self._database)}") as answer:
                for result in self._results(_lines(answer.chunks)):
                    for series in result.get("series") or ():
                        found += (dict(zip(series["columns"], row, strict=True)) for row in series.get("values", ()))
                return found, answer.told_at, answer.version
        except Permanent:
            return (), None, ""

    def _is_own(self, policy: Mapping[str, Any]) -> bool:
        """Whether this is the policy that is read: the configured one, or else the default."""
        return policy["name"] == self._retention_policy if self._retention_policy else bool(policy.get("default"))

    @cached_property
    def _shard(self) -> timedelta:
        """Duration of the shard groups; one day where it cannot be queried or parsed."""
        own = next((row for row in self._policies()[0] if self._is_own(row)), {})
        seconds = _seconds(str(own.get("shardGroupDuration", "")))
        return timedelta(seconds=seconds) if seconds >= 1 else DAY

    def _fields(self) -> Sequence[SelectedField]:
        kinds: dict[str, set[str]] = {}
        for series in self._ask(f"SHOW FIELD KEYS {self._from()}"):
            for name, kind in series["values"]:
                kinds.setdefault(name, set()).add(kind)
        for some in kinds.values():
            if len(some & set(NUMERIC)) > 1:
                some.add("float")  # needed to tell apart values that are read as several integer types
        columns = [(name, kind) for name in sorted(kinds) for kind in sorted(kinds[name])]
        return [SelectedField(name, kind, f"c{number}") for number, (name, kind) in enumerate(columns)]

    def _counted(self, series: Mapping[str, Any], start_at: datetime | None) -> Iterator[FieldCount]:
        """The counts of a series, all at `start_at` if given, otherwise at the start of their buckets."""
        fields = [column.removeprefix("count_") for column in series["columns"][1:]]
        device = (series.get("tags") or {}).get(self._device_tag, "")
        for nanoseconds, *values in series["values"]:
            at = start_at or EPOCH + timedelta(microseconds=nanoseconds // 1000)
            for name, value in zip(fields, values, strict=True):
                if value:
                    yield FieldCount(device, at, name, int(value))

    def _ask(self, query: str) -> Iterator[Mapping[str, Any]]:
        """The series with values in the response to one statement, chunk by chunk."""
        return (series for series in self._answers(query, 1) if series is not None)

    def _answers(self, statements: str, number: int) -> Iterator[Mapping[str, Any] | None]:
        """The series with values, statement by statement, with None after each statement."""
        ended = 0
        with self._question(statements) as answer:
            for result in self._results(_lines(answer.chunks)):
                yield from (series for series in result.get("series") or () if series.get("values"))
                if not result.get("partial"):
                    ended += 1
                    yield None
        if ended < number:
            raise Transient(
                "InfluxDB's response ends although more was announced", "no action needed: it is read again"
            )

    def _question(self, statements: str) -> AbstractContextManager[ServerAnswer]:
        form = {
            "db": self._database,
            "q": statements,
            "epoch": "ns",
            "chunked": "true",
            "chunk_size": str(CHUNK_ROWS),
        }
        return self._connection.ask("/query", urlencode(form).encode(), HEADERS, self._variables)

    def _results(self, lines: Iterator[bytes]) -> Iterator[Mapping[str, Any]]:
        """The result of each statement, in parts where it is marked `partial`."""
        for line in filter(bytes.strip, lines):
            document = self._document(line)
            if "error" in document:
                raise self._failed(document["error"])
            for result in document["results"]:
                if "error" in result:
                    raise self._failed(result["error"])
                yield result

    def _document(self, line: bytes) -> Mapping[str, Any]:
        if line.startswith(b"json: "):
            raise Permanent(f"InfluxDB cannot write its response: {line[:200].decode(errors='replace')}", CANNOT_HINT)
        other = f"{self._connection.url} does not respond with InfluxQL results: {line[:100]!r}"
        hint = "check that INFLUXDB_URL is an InfluxDB server and not, for example, a proxy's login page"
        try:
            # Python parses JSON's -0 as an integer, but only a float can be negative zero.
            document = json.loads(line, parse_int=_integer if NEGATIVE_ZERO.search(line) else None)
        except ValueError as error:
            if not line.startswith(b"{"):
                raise Transient(other, f"{hint}; it is retried") from error
            raise Transient(
                "InfluxDB's response ends inside a document", "no action needed: it is read again"
            ) from error
        results = document.get("results") if isinstance(document, dict) else None
        is_answer = isinstance(results, list) and all(isinstance(each, dict) for each in results)
        if not isinstance(document, dict) or not (is_answer or "error" in document):
            raise Permanent(other, hint)
        return document

    def _failed(self, message: str) -> AppError:
        """A statement error, which arrives with status 200."""
        if any(word in message for word in PASSING):
            return Transient(f"InfluxDB reports: {message}", "no action needed: it is retried")
        return error_of_status(self._connection.url, OK, message, where=self._variables)


def summed(series: Mapping[str, Any]) -> Iterator[FieldSums]:
    """The aggregates of a series: each cell is one part of a field's sums. MIN and MAX also return booleans."""
    for nanoseconds, *values in series["values"]:
        at = EPOCH + timedelta(microseconds=nanoseconds // 1000)
        for column, value in zip(series["columns"][1:], values, strict=True):
            aggregate, _, name = column.partition("_")
            if value is None or isinstance(value, bool):
                continue
            if aggregate == "count":
                yield FieldSums(at, name, Sums(int(value)))
            elif aggregate == "sum":
                yield FieldSums(at, name, Sums(total=value))
            else:
                yield FieldSums(at, name, Sums(least=value) if aggregate == "min" else Sums(greatest=value))


@dataclass(slots=True)
class _Batch:
    """Collects the rows of many series, so that short series do not each produce columns of their own.

    Invariant: every added row is returned exactly once, by `add` or by `finish`.
    """

    device_tag: str
    selected: Sequence[SelectedField]
    patterned: Sequence[SelectedField]
    names_devices: bool
    values: list[Sequence[Any]] = field(default_factory=list)
    tags: list[tuple[Mapping[str, str], int]] = field(default_factory=list)
    columns: Sequence[str] = ()

    def add(self, series: Mapping[str, Any]) -> Iterator[PointColumns]:
        """Add the rows of one series or part of it."""
        if self.values and (series["columns"] != self.columns or len(self.values) >= CHUNK_ROWS):
            yield from self.finish()
        self.columns = series["columns"]
        self.values += series["values"]
        self.tags.append((series.get("tags") or {}, len(series["values"])))

    def finish(self) -> Iterator[PointColumns]:
        """Yield what has not been returned yet."""
        if self.values:
            import pyarrow as pa

            times, *cells = zip(*self.values, strict=True)
            at = dict(zip(self.columns[1:], cells, strict=True))
            fields = list(_numeric_and_other(self.selected, at))
            for name in sorted({one.name for one in self.patterned} & at.keys()):
                fields += _untyped(name, at[name], {one.kind for one in self.patterned if one.name == name})
            instants = pa.array(times, pa.int64()).cast(pa.timestamp("ns", "UTC"))
            tags = dict(self._tag_columns())
            devices = tags.pop(self.device_tag, None)
            yield PointColumns(instants, tags, fields, devices if self.names_devices else None)
        self.values, self.tags = [], []

    def _tag_columns(self) -> Mapping[str, pa.Array]:
        """An empty tag value means that the series lacks the tag."""
        names = sorted({name for tags, _ in self.tags for name, value in tags.items() if value})
        numbers = pa.array(np.repeat(np.arange(len(self.tags)), [rows for _, rows in self.tags]))
        return {
            name: pa.array([tags.get(name) or None for tags, _ in self.tags], pa.string()).take(numbers)
            for name in names
        }


def _numeric_and_other(
    selected: Sequence[SelectedField], cells: Mapping[str, Sequence[Any]]
) -> Iterator[tuple[str, pa.Array]]:
    """Each field's columns, by type. A number that was read as several types is yielded once, as the exact one."""
    by_name: dict[str, dict[str, pa.Array]] = {}
    for one in selected:
        if one.heading in cells:
            by_name.setdefault(one.name, {})[one.kind] = _array(cells[one.heading], one.kind)
    for name, arrays in by_name.items():
        for array in _exact(arrays):
            if array.null_count < len(array):
                yield name, array


def _exact(arrays: dict[str, pa.Array]) -> Iterator[pa.Array]:
    """For a number that was read as several types: the integer if it is whole, otherwise the float.

    Every numeric cast reads all numeric shards: `::integer` truncates 1.5 to 1, `::float` rounds integers from 2**53.
    """
    numeric = {kind: arrays[kind] for kind in NUMERIC if kind in arrays}
    yield from (array for kind, array in arrays.items() if kind not in NUMERIC)
    if len(numeric) <= 1:
        yield from numeric.values()
        return
    floats = numeric.pop("float")
    is_negative_zero = pc.and_(pc.equal(floats, 0.0), pc.less(pc.divide(1.0, floats), 0.0))
    rest = pc.invert(pc.fill_null(is_negative_zero, fill_value=False))
    for array in numeric.values():
        is_whole = pc.and_(rest, pc.fill_null(pc.equal(array.cast(pa.float64(), safe=False), floats), fill_value=False))
        yield pc.if_else(is_whole, array, None)
        rest = pc.and_not(rest, is_whole)
    known = [pc.fill_null(is_negative_zero, fill_value=False), rest]
    yield pc.if_else(pc.or_(*known), floats, None)


def _array(column: Sequence[Any], kind: str) -> pa.Array:
    if kind == "float":
        return pa.array([None if value is None else float(value) for value in column], pa.float64())
    types = {"integer": pa.int64(), "unsigned": pa.uint64(), "boolean": pa.bool_(), "string": pa.string()}
    return pa.array(column, types[kind])


def _untyped(name: str, column: Sequence[Any], kinds: set[str]) -> Iterator[tuple[str, pa.Array]]:
    """The column of an uncast field, split by the type of its cells; JSON writes the float 21.0 as 21."""
    whole = next((kind for kind in ("integer", "unsigned") if kind in kinds), "float")
    words: dict[type, str] = {bool: "boolean", str: "string", int: whole, float: "float"}
    for word in dict.fromkeys(words.values()):
        cells = [value if words.get(type(value)) == word else None for value in column]
        if any(value is not None for value in cells):
            yield name, _array(cells, word)


def _read_as(kinds: set[str], value: Any) -> Any:
    """An integer in JSON may be a float: Go writes large floats without an exponent, padded with zeros."""
    if not isinstance(value, int) or isinstance(value, bool) or "float" not in kinds:
        return value
    is_float = len(kinds & set(NUMERIC)) == 1 or value == int(Decimal(repr(float(value))))
    return float(value) if is_float else value


def _nanoseconds(instant: datetime) -> int:
    """Nanoseconds since the epoch, as a plain integer in a time condition means, clamped to the server's range."""
    return min(max((instant - EPOCH) // timedelta(microseconds=1) * 1000, FIRST_NS), LAST_NS)


def _seconds(text: str) -> float:
    """Seconds of a duration such as `168h0m0s`; 0 if it cannot be parsed."""
    return sum(float(number) * UNIT_SECONDS[unit] for number, unit in DURATION.findall(text))


def _integer(digits: str) -> int | float:
    return -0.0 if digits == "-0" else int(digits)


def _lines(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """The newline-terminated documents of a chunked response."""
    rest = b""
    for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        yield from lines
    yield rest
