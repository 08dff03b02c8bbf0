"""Reading InfluxDB 2 by Flux over `/api/v2/query`; answers are streamed into `annotated_csv`.

Invariants: every value from outside enters a query as an escaped string literal; a complete answer or an error.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING
from urllib.parse import urlencode

from app.core.errors import Transient
from app.core.window import Window
from app.influx_to_s3.annotated_csv import Block, read_blocks
from app.influx_to_s3.connection import Answer, Connection
from app.influx_to_s3.reader import Counted
from app.influx_to_s3.rows import DEVICE, canonical

if TYPE_CHECKING:
    import pyarrow as pa

HEADERS = {"Content-Type": "application/json", "Accept": "application/csv"}
DIALECT = {"header": True, "delimiter": ",", "annotations": ["datatype", "group", "default"], "commentPrefix": "#"}
ESCAPES = str.maketrans({"\\": "\\\\", '"': '\\"', "\n": "\\n", "\r": "\\r", "\t": "\\t", "\0": "\\x00"})


@dataclass(frozen=True, slots=True)
class FluxTarget:
    """What to read."""

    org: str
    bucket: str
    measurement: str
    device_tag: str = "device_id"


def literal(text: str) -> str:
    """A Flux string literal. `${` would start an interpolation, so its dollar sign is escaped too."""
    return '"' + text.translate(ESCAPES).replace("${", "\\${") + '"'


def time_literal(instant: datetime) -> str:
    """An absolute Flux time literal in UTC."""
    return f"{instant:%Y-%m-%dT%H:%M:%S.%f}".rstrip("0").rstrip(".") + "Z"


class FluxReader:
    """`Reader` over Flux."""

    def __init__(self, connection: Connection, target: FluxTarget) -> None:
        self._connection = connection
        self._target = target
        self._variables = f"INFLUXDB_BUCKET={target.bucket!r}, INFLUXDB_ORG={target.org!r}"
        self._path = f"/api/v2/query?{urlencode({'org': target.org})}"

    def devices(self, since: datetime) -> Sequence[str]:
        """See `Reader`. Without an explicit start the server would look back 30 days only."""
        query = (
            'import "influxdata/influxdb/schema"\n'
            f"schema.tagValues(bucket: {literal(self._target.bucket)}, tag: {literal(DEVICE)}, "
            f"predicate: (r) => {self._where(None)}, start: {time_literal(since)})"
        )
        return sorted({name for block in self._ask(query) for name in _texts(block.table, "_value")})

    def counts(self, device: str | None, span: Window, every_seconds: int) -> Iterator[Counted]:
        """See `Reader`. Windowed counts are pushed down to the storage engine."""
        query = (
            f"{self._from(device, span)}"
            f' |> aggregateWindow(every: {every_seconds}s, fn: count, createEmpty: false, timeSrc: "_start")'
            f' |> group(columns: ["{DEVICE}", "_field", "_time"]) |> sum()'
        )
        for block in self._ask(query):
            yield from _counted(block.table)

    def rows(self, device: str, span: Window) -> "Iterator[pa.Table]":
        """See `Reader`. The group key keeps the tags through the pivot, so each series is a table of its own."""
        query = (
            f"{self._from(device, span)}"
            ' |> drop(columns: ["_start", "_stop", "_measurement"])'
            ' |> pivot(rowKey: ["_time"], columnKey: ["_field"], valueColumn: "_value")'
        )
        for block in self._ask(query, known=frozenset({DEVICE})):
            yield canonical(block.table, "_time", block.tags)

    def measurements(self) -> Sequence[str]:
        """See `Reader`."""
        query = (
            'import "influxdata/influxdb/schema"\n'
            f"schema.measurements(bucket: {literal(self._target.bucket)}, start: 1970-01-01T00:00:00Z)"
        )
        return sorted({name for block in self._ask(query) for name in _texts(block.table, "_value")})

    def ping(self) -> str:
        """See `Reader`. A token without the right to read the bucket sees 404, which no health endpoint would tell."""
        query = f"from(bucket: {literal(self._target.bucket)}) |> range(start: -1m) |> limit(n: 1)"
        for _ in self._ask(query):
            pass
        return f"may read bucket {self._target.bucket} at {self._connection.server.url} by Flux"

    def _from(self, device: str | None, span: Window) -> str:
        return (
            f"from(bucket: {literal(self._target.bucket)})"
            f" |> range(start: {time_literal(span.start)}, stop: {time_literal(span.end)})"
            f" |> filter(fn: (r) => {self._where(device)})"
        )

    def _where(self, device: str | None) -> str:
        measurement = f"r._measurement == {literal(self._target.measurement)}"
        return measurement if device is None else f"{measurement} and r.{DEVICE} == {literal(device)}"

    def _ask(self, query: str, known: frozenset[str] = frozenset()) -> Iterator[Block]:
        """Stream the answer, without columns of the `known` tags."""
        question = json.dumps({"query": query, "dialect": DIALECT, "type": "flux"}).encode()
        with self._connection.ask(self._path, question, HEADERS, self._variables) as answer:
            yield from read_blocks(_body(answer), known=known)


def _body(answer: Answer) -> Iterator[bytes]:
    """The body's bytes, which are a blank line at least. Where neither chunks nor a length tell its end, the last blank
    line has to.
    """
    tail = b""
    for chunk in answer.chunks:
        tail = (tail + chunk[-4:])[-4:]
        yield chunk
    ended = tail in (b"\r\n", b"\n") or tail.endswith((b"\n\r\n", b"\n\n"))
    if not tail or not (answer.framed or ended):
        raise Transient(
            "InfluxDB's answer ends without its closing blank line: it was cut on the way",
            "the window is read again next time; a proxy in between closes connections early",
        )


def _texts(table: "pa.Table", column: str) -> list[str]:
    return [text for text in table.column(column).to_pylist() if text] if column in table.column_names else []


def _counted(table: "pa.Table") -> Iterator[Counted]:
    """Points without a device tag come in tables without that column."""
    import pyarrow as pa

    columns = table.column_names
    devices = table.column(DEVICE).to_pylist() if DEVICE in columns else [""] * table.num_rows
    starts = table.column("_time").cast(pa.timestamp("us", "UTC")).to_pylist()
    fields = table.column("_field").to_pylist()
    values = table.column("_value").to_pylist()
    for device, start, name, value in zip(devices, starts, fields, values, strict=True):
        yield Counted(device or "", start.astimezone(UTC), name, value)
