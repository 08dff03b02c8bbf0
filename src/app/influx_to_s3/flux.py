"""Read InfluxDB 2 with Flux over `/api/v2/query`; responses are streamed into `annotated_csv`.

Invariants: every external value enters a query as an escaped string literal. A response is complete or an error. No
query crosses a shard group boundary: beyond it the server would omit a field whose type differs there.
"""

import json
import re
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from functools import cached_property
from itertools import repeat
from typing import Any
from urllib.parse import urlencode

import pyarrow as pa
import pyarrow.compute as pc

from app.core.errors import Permanent, Transient
from app.core.pipeline import UNLIMITED, Sums
from app.core.windows import EPOCH, Window, floor_to
from app.influx_to_s3.annotated_csv import CsvBlock, read_blocks
from app.influx_to_s3.reader import (
    DAY,
    INVENTORY_DEVICES,
    FieldCount,
    FieldSums,
    InfluxConnection,
    PointColumns,
    RawCells,
    Retention,
    ServerAnswer,
    SourceInventory,
    counted_in_parts,
    one_type_spans,
)

HEADERS = {"Content-Type": "application/json", "Accept": "application/csv"}
DIALECT = {"header": True, "delimiter": ",", "annotations": ["datatype", "group", "default"], "commentPrefix": "#"}
ESCAPES = str.maketrans({"\\": "\\\\", '"': '\\"', "\n": "\\n", "\r": "\\r", "\t": "\\t", "\0": "\\x00", "$": "\\x24"})
KEYWORD = re.compile(
    "and|or|not|exists|if|then|else|in|empty|return|import|package|option|builtin|test|testcase"  # scanner keywords
)
DROPPED = 'drop(columns: ["_start", "_stop", "_measurement"])'
SCHEMA = 'import "influxdata/influxdb/schema"\n'
# Flux stores times as 64-bit nanoseconds; anything beyond that range would wrap around.
FIRST_TIME, LAST_TIME = "1677-09-21T00:12:43.145224194Z", "2262-04-11T23:47:16.854775806Z"
FIRST_INSTANT = datetime(1677, 9, 21, 0, 12, 44, tzinfo=UTC)
LAST_INSTANT = datetime(2262, 4, 11, 23, 47, 16, tzinfo=UTC)
PARTS: Mapping[str, Callable[[Any], Sums]] = {
    "count": Sums,
    "sum": lambda value: Sums(total=value),
    "min": lambda value: Sums(least=value),
    "max": lambda value: Sums(greatest=value),
}
AGGREGATES = tuple(PARTS)
OWN_COLUMNS = frozenset({"_start", "_stop", "_measurement", "_field", "_time", "_value"})


def literal(text: str) -> str:
    """A Flux string literal. `${` starts an interpolation, and the scanner accepts no escape right after a `$`."""
    return f'"{text.translate(ESCAPES)}"'


def time_literal(instant: datetime) -> str:
    """An absolute Flux time literal in UTC, clamped to the range of Flux."""
    if instant <= FIRST_INSTANT:
        return FIRST_TIME
    if instant >= LAST_INSTANT:
        return LAST_TIME
    return f"{instant:%Y-%m-%dT%H:%M:%S.%f}".rstrip("0").rstrip(".") + "Z"


def column_of_row(name: str) -> str:
    """The expression for a column's value in a predicate over `r`."""
    plain = name.isascii() and name.isidentifier() and not KEYWORD.fullmatch(name)
    return f"r.{name}" if plain else f"r[{literal(name)}]"


class FluxReader:
    """`Reader` over Flux.

    Columns are prefixed with an unguessable token: before the pivot every column except `_field` and `_value`, after
    the pivot every column. So time and tags carry the token twice, fields once. This allows a field with the name of a
    tag, which the pivot would otherwise refuse, and a tag or field with the name of one of the response's own columns.
    """

    def __init__(
        self, connection: InfluxConnection, *, org: str, bucket: str, measurement: str, device_tag: str = "device_id"
    ) -> None:
        self._connection = connection
        self._org, self._bucket, self._measurement, self._device_tag = org, bucket, measurement, device_tag
        self._variables = f"INFLUXDB_BUCKET={bucket!r}, INFLUXDB_ORG={org!r}"
        self._path = f"/api/v2/query?{urlencode({'org': org})}"
        self._token = f"h{secrets.token_hex(6)}_"
        # The column name of the device tag, on servers that rename columns and on servers that do not.
        self._device_columns = frozenset({self._token * 2 + device_tag, device_tag})

    def devices(self, since: datetime) -> Sequence[str]:
        """See `Reader`. Without explicit bounds the server looks back 30 days and ignores the future."""
        return self._schema("tagValues", since, tag=self._device_tag)

    def counts(self, device: str | None, span: Window, every_seconds: int) -> Iterator[FieldCount]:
        """See `Reader`. Windowed counts are pushed down to the storage engine."""

        def ask(spans: Sequence[Window]) -> Iterator[FieldCount | None]:
            for one in spans:
                query = (
                    f"{self._from(one, device)}"
                    f' |> aggregateWindow(every: {every_seconds}s, fn: count, createEmpty: false, timeSrc: "_start")'
                    f' |> group(columns: [{literal(self._device_tag)}, "_field", "_time"]) |> sum()'
                )
                for block in self._ask(query):
                    yield from self._counted(block, _starts(block, every_seconds))
                yield None

        return counted_in_parts(one_type_spans(span, self._shard), every_seconds, ask)

    def sums(self, device: str, span: Window, every_seconds: int, numbers: Sequence[str]) -> Iterator[FieldSums]:
        """See `Reader`. Four aggregates in one query, each pushed down; Flux can sum numbers only."""
        tag = literal(self._device_tag)
        are_numbers = " or ".join(f"r._field == {literal(name)}" for name in numbers)

        def aggregated(one: Window, name: str) -> str:
            fields = "" if name == "count" else f" and ({are_numbers})"
            over_series = "sum" if name == "count" else name
            named = f'if column == "_value" then {literal(self._token + name)} else column'
            return (
                f"{self._from(one, device, fields)}"
                f' |> aggregateWindow(every: {every_seconds}s, fn: {name}, createEmpty: false, timeSrc: "_start")'
                f' |> group(columns: [{tag}, "_field", "_time"]) |> {over_series}()'
                f' |> keep(columns: ["_field", "_time", "_value"]) |> rename(fn: (column) => {named})'
                f" |> yield(name: {literal(name)})"
            )

        def ask(spans: Sequence[Window]) -> Iterator[FieldSums | None]:
            for one in spans:
                names = AGGREGATES if numbers else AGGREGATES[:1]
                for block in self._ask("\n".join(aggregated(one, name) for name in names)):
                    yield from self._summed(block, every_seconds)
                yield None

        return counted_in_parts(one_type_spans(span, self._shard), every_seconds, ask)

    def rows(self, device: str, span: Window) -> Iterator[PointColumns]:
        """See `Reader`."""
        return self.rows_of((device,), span)

    def rows_of(self, devices: Sequence[str], span: Window) -> Iterator[PointColumns]:
        """See `Reader`. The group key keeps the tags through the pivot, so each series is a separate table."""
        token = self._token
        keep_key = f'if column == "_field" or column == "_value" then column else {literal(token)} + column'
        return self._series(
            devices,
            span,
            DROPPED,
            f"rename(fn: (column) => {keep_key})",
            f'pivot(rowKey: [{literal(token + "_time")}], columnKey: ["_field"], valueColumn: "_value")',
            f"rename(fn: (column) => {literal(token)} + column)",
        )

    def empty_texts(self, device: str, span: Window, field: str) -> Iterator[PointColumns]:
        """See `Reader`. Without a pivot no value is null, so an empty cell of a string column is an empty string."""
        token = literal(self._token)
        named = f'if column == "_value" then {token} + column else {literal(self._token * 2)} + column'
        steps = ('drop(columns: ["_start", "_stop", "_measurement", "_field"])', f"rename(fn: (column) => {named})")
        for points in self._series((device,), span, *steps, also=f" and r._field == {literal(field)}"):
            values = dict(points.fields)["_value"]
            empty = pc.is_null(values)
            if values.type == pa.string() and pc.any(empty).as_py():
                tags = {name: column.filter(empty) for name, column in points.tags.items()}
                texts = values.filter(empty).fill_null("")
                yield PointColumns(points.times.filter(empty), tags, [(field, texts)])

    def cells(self, device: str, span: Window) -> Iterator[RawCells]:
        """See `Reader`. Without a pivot each table is one series of one field, and an empty cell is an empty string."""
        token = literal(self._token)
        named = (
            f'if column == "_value" or column == "_field" then {token} + column'
            f" else {literal(self._token * 2)} + column"
        )
        for points in self._series((device,), span, DROPPED, f"rename(fn: (column) => {named})"):
            # `_field` is part of the group key: a server that does not rename columns returns it among the tags
            columns = {"_field": points.tags.get("_field"), **dict(points.fields)}
            values = columns["_value"]
            values = values.fill_null("") if values.type == pa.string() else values
            tags = {name: texts for name, texts in points.tags.items() if name != "_field"}
            yield RawCells(points.times, tags, columns["_field"], values)

    def outside(self, span: Window) -> Iterator[FieldCount]:
        """See `Reader`."""
        if time_literal(span.start) == time_literal(span.end):
            return  # beyond what InfluxDB can hold
        query = (
            f'{self._from(span, None)} |> count() |> group(columns: [{literal(self._device_tag)}, "_field"]) |> sum()'
        )
        for block in self._ask(query):
            yield from self._counted(block, repeat(span.start))

    def retention(self) -> Retention:
        """See `Reader`."""
        rules, told_at = self._rules()
        if rules is None:
            return Retention(None, self._oldest_at(), told_at)
        kept_seconds = min((seconds for seconds, _ in rules if seconds > 0), default=0)
        return Retention(timedelta(seconds=kept_seconds) if kept_seconds else UNLIMITED, told_at=told_at)

    def _oldest_at(self) -> datetime | None:
        """`first()` of each series is pushed down to the storage engine."""
        try:
            times = [
                at for block in self._ask(self._first()) for at in _column(block, "_time").cast(pa.int64()).to_pylist()
            ]
        except Permanent:
            return None  # for example too many series
        return EPOCH + timedelta(microseconds=-(-min(times) // 1000)) if times else None

    def inventory(self) -> SourceInventory:
        """See `Reader`."""
        fields = self._schema("fieldKeys", FIRST_INSTANT)
        return SourceInventory(
            measurements=self._schema("measurements", FIRST_INSTANT),
            has_points=bool(fields) and self._has_points(),
            tags=[name for name in self._schema("tagKeys", FIRST_INSTANT) if name not in OWN_COLUMNS],
            fields=fields,
            devices=self._schema("tagValues", FIRST_INSTANT, INVENTORY_DEVICES, tag=self._device_tag),
        )

    def ping(self) -> str:
        """See `Reader`. A token without read permission on the bucket gets 404, which no health endpoint would show."""
        query = f"from(bucket: {literal(self._bucket)}) |> range(start: -1m) |> limit(n: 1)"
        for _ in self._ask(query):
            pass
        return f"may read bucket {self._bucket} at {self._connection.url} by Flux"

    def _has_points(self) -> bool:
        """The schema also lists deleted data, so check for an actual first point."""
        blocks = self._ask(f"{self._first()} |> limit(n: 1)")
        return any(len(column) for block in blocks for column in block.columns)

    def _first(self) -> str:
        return f'{self._from(Window(FIRST_INSTANT, LAST_INSTANT), None)} |> first() |> keep(columns: ["_time"])'

    def _schema(self, function: str, since: datetime, most: int = 0, **arguments: str) -> Sequence[str]:
        """Sorted names from the bucket's index, at most `most` of them; 0 means no limit."""
        given = "".join(f"{name}: {literal(value)}, " for name, value in arguments.items())
        predicate = "" if function == "measurements" else f"predicate: (r) => {self._where(None)}, "
        query = (
            f"{SCHEMA}schema.{function}(bucket: {literal(self._bucket)}, {given}{predicate}"
            f"start: {time_literal(since)}, stop: {LAST_TIME})"
            f"{f' |> limit(n: {most})' if most else ''}"
        )
        blocks = (block for block in self._ask(query) if "_value" in block.names)
        return sorted({text for block in blocks for text in _column(block, "_value").to_pylist() if text})

    def _from(self, span: Window, device: str | Sequence[str] | None, also: str = "") -> str:
        return (
            f"from(bucket: {literal(self._bucket)})"
            f" |> range(start: {time_literal(span.start)}, stop: {time_literal(span.end)})"
            f" |> filter(fn: (r) => {self._where(device)}{also})"
        )

    def _where(self, device: str | Sequence[str] | None) -> str:
        measurement = f"r._measurement == {literal(self._measurement)}"
        if device is None:
            return measurement
        tag = column_of_row(self._device_tag)
        devices = (device,) if isinstance(device, str) else device
        own = " or ".join(f"{tag} == {literal(one)}" if one else f"not exists {tag}" for one in devices)
        return f"{measurement} and {own if len(devices) == 1 else f'({own})'}"

    @cached_property
    def _shard(self) -> timedelta:
        """Duration of the bucket's shard groups; one day where the token may not read buckets."""
        rules, _ = self._rules()
        seconds = min((seconds for _, seconds in rules or ()), default=0)
        return timedelta(seconds=seconds) if seconds > 0 else DAY

    def _rules(self) -> tuple[Sequence[tuple[int, int]] | None, datetime | None]:
        """The bucket's retention rules as (retention seconds, shard group seconds), and the server's clock.

        0 retention seconds means forever, as does an empty list. The rules are None where the token may not read
        buckets or the server has no such route, as in 1.x.
        """
        where = urlencode({"org": self._org, "name": self._bucket})
        try:
            with self._connection.ask(f"/api/v2/buckets?{where}", None, {}, self._variables) as answer:
                told_at = answer.told_at
                [bucket] = json.loads(b"".join(answer.chunks))["buckets"]
            rules = [
                (int(rule.get("everySeconds") or 0), int(rule.get("shardGroupDurationSeconds") or 0))
                for rule in bucket.get("retentionRules") or ()
            ]
        except (Permanent, ValueError, TypeError, KeyError, AttributeError):
            return None, None
        return rules, told_at

    def _ask(self, query: str, known: frozenset[str] = frozenset()) -> Iterator[CsvBlock]:
        """Stream the response, leaving out columns of the `known` tags."""
        question = json.dumps({"query": query, "dialect": DIALECT, "type": "flux"}).encode()
        with self._connection.ask(self._path, question, HEADERS, self._variables) as answer:
            yield from read_blocks(_body(answer), known=known)

    def _series(self, devices: Sequence[str], span: Window, *steps: str, also: str = "") -> Iterator[PointColumns]:
        """Apply `steps` to the points of devices and sort the resulting columns into time, tags and fields.

        Where the server does not rename columns, the group key identifies the tags.
        """
        token = self._token
        known = self._device_columns if len(devices) == 1 else frozenset()
        for one in one_type_spans(span, self._shard):
            query = " |> ".join((self._from(one, devices, also), *steps))
            for block in self._ask(query, known=known):
                if any(name.startswith(token) for name in block.names):
                    names = [name.removeprefix(token).removeprefix(token) for name in block.names]
                    keyed = [name.startswith(token * 2) for name in block.names]
                    time_at = _place(block, f"{token * 2}_time")
                else:
                    names, keyed, time_at = list(block.names), list(block.grouped), _place(block, "_time")
                columns = [
                    (name, is_tag, column)
                    for at, (name, is_tag, column) in enumerate(zip(names, keyed, block.columns, strict=True))
                    if at != time_at
                ]
                tags = {name: column for name, is_tag, column in columns if is_tag}
                yield PointColumns(
                    block.columns[time_at],
                    tags,
                    [(name, column) for name, is_tag, column in columns if not is_tag],
                    None if known else tags.pop(self._device_tag, None),
                )

    def _summed(self, block: CsvBlock, every_seconds: int) -> Iterator[FieldSums]:
        name = next((each for each in AGGREGATES if self._token + each in block.names), AGGREGATES[0])
        fields, values = (_column(block, each).to_pylist() for each in ("_field", self._token + name))
        for start_at, field, value in zip(_starts(block, every_seconds), fields, values, strict=True):
            yield FieldSums(start_at, field, PARTS[name](value))

    def _counted(self, block: CsvBlock, starts: Iterable[datetime]) -> Iterator[FieldCount]:
        """Points without the device tag arrive in tables without that column."""
        is_named = self._device_tag in block.names
        devices = _texts(block, self._device_tag) if is_named else repeat("")
        numbers = _column(block, "_value").to_pylist()
        for device, start_at, field, values in zip(devices, starts, _texts(block, "_field"), numbers, strict=False):
            yield FieldCount(device or "", start_at, field or "", values)


def _starts(block: CsvBlock, every_seconds: int) -> Iterator[datetime]:
    """The start of each row's bucket. The server reports a bucket that began before the span with the span's start.

    Times are handled as integers: for datetimes Arrow would load a time zone database.
    """
    instants = _column(block, "_time").cast(pa.int64()).to_pylist()
    starts = {each: floor_to(EPOCH + timedelta(microseconds=each // 1000), every_seconds) for each in set(instants)}
    return map(starts.__getitem__, instants)


def _texts(block: CsvBlock, name: str) -> list[str | None]:
    """Convert through numpy: Arrow takes a microsecond per dictionary value, and counts have ten values per device."""
    found: list[str | None] = _column(block, name).cast(pa.string()).to_numpy().tolist()
    return found


def _column(block: CsvBlock, name: str) -> pa.ChunkedArray:
    return block.columns[_place(block, name)]


def _place(block: CsvBlock, name: str) -> int:
    if name not in block.names:
        raise Permanent(
            f"InfluxDB's response lacks the column {name}: it has {', '.join(block.names)}",
            "check that INFLUXDB_URL is an InfluxDB 2 server, or set INFLUXDB_API=influxql",
        )
    return block.names.index(name)


def _body(answer: ServerAnswer) -> Iterator[bytes]:
    """The body's bytes, which hold at least a blank line.

    Without chunked encoding or a length, the closing blank line is the only sign that the response is complete.
    """
    tail = b""
    for chunk in answer.chunks:
        tail = (tail + chunk[-4:])[-4:]
        yield chunk
    ended = tail in (b"\r\n", b"\n") or tail.endswith((b"\n\r\n", b"\n\n"))
    if not tail or not (answer.framed or ended):
        raise Transient(
            "InfluxDB's response ends without its closing blank line: it was cut on the way",
            "check the proxy in between, which closes connections early; the window is read again"
            if tail and not answer.framed
            else "no action needed: the window is read again",
        )
