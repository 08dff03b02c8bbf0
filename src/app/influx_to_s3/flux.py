"""Reading InfluxDB 2 by Flux over `/api/v2/query`; the home of influxdb_client.

The client library connects and authenticates; answers are streamed raw into `annotated_csv`, since the library's own
parser cuts nanoseconds and holds everything in memory. Invariants: every value from outside enters a query as an
escaped string literal; a complete answer or an error; one pool of connections for all threads.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any

from app.core.errors import AppError, Permanent, Transient
from app.core.window import Window
from app.influx_to_s3.annotated_csv import Block, read_blocks
from app.influx_to_s3.reader import Counted, Refusal, refusal
from app.influx_to_s3.rows import DEVICE, canonical

if TYPE_CHECKING:
    import pyarrow as pa

CHUNK_BYTES = 1 << 16
CONNECT_MILLISECONDS = 5_000
ESCAPES = str.maketrans({"\\": "\\\\", '"': '\\"', "\n": "\\n", "\r": "\\r", "\t": "\\t", "\0": "\\x00"})


@dataclass(frozen=True, slots=True)
class FluxTarget:
    """Where to read. `url` without credentials; `token` is secret."""

    url: str
    token: str
    org: str
    bucket: str
    measurement: str
    timeout_seconds: float = 120.0
    connections: int = 8


def literal(text: str) -> str:
    """A Flux string literal. `${` would start an interpolation, so its dollar sign is escaped too."""
    return '"' + text.translate(ESCAPES).replace("${", "\\${") + '"'


def time_literal(instant: datetime) -> str:
    """An absolute Flux time literal in UTC."""
    return f"{instant:%Y-%m-%dT%H:%M:%S.%f}".rstrip("0").rstrip(".") + "Z"


class FluxReader:
    """`Reader` over Flux."""

    def __init__(self, target: FluxTarget) -> None:
        self._target = target

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
        for block in self._ask(query):
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
        return f"may read bucket {self._target.bucket} at {self._target.url} by Flux"

    def _from(self, device: str | None, span: Window) -> str:
        return (
            f"from(bucket: {literal(self._target.bucket)})"
            f" |> range(start: {time_literal(span.start)}, stop: {time_literal(span.end)})"
            f" |> filter(fn: (r) => {self._where(device)})"
        )

    def _where(self, device: str | None) -> str:
        measurement = f"r._measurement == {literal(self._target.measurement)}"
        return measurement if device is None else f"{measurement} and r.{DEVICE} == {literal(device)}"

    def _ask(self, query: str) -> Iterator[Block]:
        """Stream the answer. Its connection goes back to the pool only when the answer was read to its end."""
        with self._translated():
            response = self._queries.query_raw(query, dialect=self._dialect)
            with closing(response):
                yield from read_blocks(_body(response))

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """The one place where this library's exceptions become ours."""
        import urllib3.exceptions
        from influxdb_client.rest import ApiException

        try:
            yield
        except ApiException as error:
            raise _refused(self._target, error) from error
        except urllib3.exceptions.LocationParseError as error:
            raise Permanent(f"INFLUXDB_URL={self._target.url!r} is no address", "correct INFLUXDB_URL") from error
        except urllib3.exceptions.ReadTimeoutError as error:
            raise Transient(
                f"InfluxDB at {self._target.url} did not answer within {self._target.timeout_seconds:g} s",
                "it is tried again by itself; raise INFLUXDB_TIMEOUT_SECONDS if it stays",
            ) from error
        except urllib3.exceptions.HTTPError as error:
            raise Transient(
                f"InfluxDB at {self._target.url} cannot be reached or broke off: {type(error).__name__}",
                "check INFLUXDB_URL and that the server runs; it is tried again by itself",
            ) from error

    @cached_property
    def _queries(self) -> Any:
        from influxdb_client.client.influxdb_client import InfluxDBClient

        client = InfluxDBClient(
            url=self._target.url,
            token=self._target.token,
            org=self._target.org,
            timeout=(CONNECT_MILLISECONDS, int(self._target.timeout_seconds * 1000)),
            enable_gzip=True,
            connection_pool_maxsize=self._target.connections,
        )
        return client.query_api()

    @cached_property
    def _dialect(self) -> Any:
        from influxdb_client.domain.dialect import Dialect

        return Dialect(header=True, delimiter=",", annotations=["datatype", "group", "default"], comment_prefix="#")


def _body(response: Any) -> Iterator[bytes]:
    """The body's bytes, which are a blank line at least. Where neither chunks nor a length tell its end, the last blank
    line has to.
    """
    framed = response.headers.get("Transfer-Encoding") or response.headers.get("Content-Length")
    tail = b""
    for chunk in response.stream(CHUNK_BYTES, decode_content=True):
        tail = (tail + chunk)[-4:]
        yield chunk
    ended = tail in (b"\r\n", b"\n") or tail.endswith((b"\n\r\n", b"\n\n"))
    if not tail or not (framed or ended):
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


def _refused(target: FluxTarget, error: Any) -> AppError:
    """An HTTP error of the library as ours."""
    where = f"INFLUXDB_BUCKET={target.bucket!r}, INFLUXDB_ORG={target.org!r}"
    retry_after = (error.headers or {}).get("Retry-After", "")
    return refusal(Refusal(target.url, error.status or 0, _message(error), retry_after, where))


def _message(error: Any) -> str:
    body = error.body.decode("utf-8", "replace") if isinstance(error.body, bytes) else str(error.body or error.reason)
    try:
        parsed = json.loads(body)
    except ValueError:
        return body[:200]
    return str(parsed.get("message", body))[:300] if isinstance(parsed, dict) else body[:200]
