"""Reading InfluxDB by InfluxQL over `/query`: 1.x, 2.x with a mapped database, and 3.

Answers are asked for as chunked JSON, a document per line: as CSV a failed statement would be an empty 200. Types come
from SHOW FIELD KEYS, since JSON writes 21.0 as 21; they are asked after the counts and before the rows, so a field
that is new is never counted as read. Invariants: as for `flux`; an answer that ends while saying `partial` is an error.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

from app.core.errors import AppError, Permanent, Transient
from app.core.window import EPOCH, Window
from app.influx_to_s3.connection import OK, Connection
from app.influx_to_s3.reader import Counted, Refusal, refusal
from app.influx_to_s3.rows import DEVICE, TAGS, canonical, common_type, nanoseconds_of

if TYPE_CHECKING:
    import pyarrow as pa

CHUNK_ROWS = 10_000
HEADERS = {"Content-Type": "application/x-www-form-urlencoded", "Accept": "application/json"}
TIME = "_time"


@dataclass(frozen=True, slots=True)
class InfluxQlTarget:
    """What to read."""

    database: str
    retention_policy: str
    measurement: str
    device_tag: str = "device_id"


@dataclass(frozen=True, slots=True)
class Selected:
    """One column of a SELECT: a field as one of the types that it has in some shard."""

    name: str
    kind: str


def text_literal(text: str) -> str:
    """An InfluxQL string literal."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") + "'"


def identifier(name: str) -> str:
    """A quoted InfluxQL identifier."""
    return '"' + name.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'


class InfluxQlReader:
    """`Reader` over InfluxQL."""

    def __init__(self, connection: Connection, target: InfluxQlTarget) -> None:
        self._connection = connection
        self._target = target
        policy = f"{identifier(target.retention_policy)}." if target.retention_policy else ""
        self._where = f"INFLUXDB_DATABASE={target.database!r}"
        self._from = f"FROM {policy}{identifier(target.measurement)}"

    def devices(self, since: datetime) -> Sequence[str]:  # noqa: ARG002 - the tag index of 1.x knows no time
        """See `Reader`; every value that the tag ever had."""
        query = f"SHOW TAG VALUES {self._from} WITH KEY = {identifier(DEVICE)}"
        return sorted({row[1] for series in self._ask(query) for row in series["values"] if row[1]})

    def counts(self, device: str | None, span: Window, every_seconds: int) -> Iterator[Counted]:
        """See `Reader`."""
        query = (
            f"SELECT COUNT(*) {self._from} WHERE {_where(device, span)}"
            f" GROUP BY {identifier(DEVICE)}, time({every_seconds}s) fill(none)"
        )
        for series in self._ask(query):
            fields = [column.removeprefix("count_") for column in series["columns"][1:]]
            named = series.get("tags", {}).get(DEVICE, "")
            for instant, *values in series["values"]:
                for field, value in zip(fields, values, strict=True):
                    if value:
                        yield Counted(named, _instant(instant), field, int(value))

    def rows(self, device: str, span: Window) -> "Iterator[pa.Table]":
        """See `Reader`. A field that has several types in several shards is selected once as each of them."""
        selected = self._fields()
        if not selected:
            return
        columns = [f"{identifier(one.name)}::{one.kind}" for one in selected]
        columns += [f"{identifier(tag)}::tag" for tag in TAGS]
        query = f"SELECT {', '.join(columns)} {self._from} WHERE {_where(device, span)}"
        for series in self._ask(query):
            yield canonical(_table(series["values"], selected), TIME, frozenset(TAGS))

    def measurements(self) -> Sequence[str]:
        """See `Reader`."""
        return sorted(row[0] for series in self._ask("SHOW MEASUREMENTS") for row in series["values"])

    def ping(self) -> str:
        """See `Reader`. Unlike SHOW MEASUREMENTS, this tells a database that does not exist from an empty one."""
        self._fields()
        return f"may read database {self._target.database} at {self._connection.server.url} by InfluxQL"

    def _fields(self) -> Sequence[Selected]:
        kinds: dict[str, set[str]] = {}
        for series in self._ask(f"SHOW FIELD KEYS {self._from}"):
            for name, kind in series["values"]:
                kinds.setdefault(name, set()).add(kind)
        return [Selected(name, kind) for name in sorted(kinds) for kind in sorted(_readable(kinds[name]))]

    def _ask(self, query: str) -> Iterator[Mapping[str, Any]]:
        """The series of the answer that have values, chunk by chunk."""
        form = {
            "db": self._target.database,
            "q": query,
            "epoch": "ns",
            "chunked": "true",
            "chunk_size": str(CHUNK_ROWS),
        }
        with self._connection.ask("/query", urlencode(form).encode(), HEADERS, self._where) as answer:
            yield from self._series(_lines(answer.chunks))

    def _series(self, lines: Iterator[bytes]) -> Iterator[Mapping[str, Any]]:
        partial = True
        for line in filter(bytes.strip, lines):
            document = self._document(line)
            if "error" in document:
                raise self._failed(document["error"])
            for result in document["results"]:
                if "error" in result:
                    raise self._failed(result["error"])
                partial = bool(result.get("partial"))
                yield from (series for series in result.get("series", ()) if series.get("values"))
        if partial:
            raise Transient("InfluxDB's answer ends although more was announced", "the window is read again next time")

    def _document(self, line: bytes) -> Mapping[str, Any]:
        try:
            document = json.loads(line)
        except ValueError as error:
            raise Transient("InfluxDB's answer ends inside a document", "the window is read again next time") from error
        if not isinstance(document, dict) or not {"results", "error"} & document.keys():
            raise Permanent(
                f"{self._connection.server.url} answers with something else than InfluxQL's results: {line[:100]!r}",
                "check that INFLUXDB_URL is an InfluxDB server",
            )
        return document

    def _failed(self, message: str) -> AppError:
        """A statement error, which comes with status 200."""
        if "timeout" in message or "shutdown" in message or "engine" in message:
            return Transient(f"InfluxDB reports: {message}", "it is tried again by itself")
        return refusal(Refusal(self._connection.server.url, OK, message, "", self._where))


def _where(device: str | None, span: Window) -> str:
    bounds = f"time >= {_nanoseconds(span.start)} AND time < {_nanoseconds(span.end)}"
    return bounds if device is None else f"{bounds} AND {identifier(DEVICE)} = {text_literal(device)}"


def _nanoseconds(instant: datetime) -> int:
    """A plain integer in a time condition means nanoseconds since the epoch."""
    return nanoseconds_of(instant)


def _instant(nanoseconds: int) -> datetime:
    return EPOCH + timedelta(microseconds=nanoseconds // 1000)


def _readable(kinds: set[str]) -> set[str]:
    """`::float` reads integer shards too; other types are each read as what they are."""
    return kinds - {"integer", "unsigned"} if "float" in kinds else kinds


def _lines(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """The documents of a chunked answer, which end in newlines."""
    rest = b""
    for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        yield from lines
    yield rest


def _table(values: Sequence[Sequence[Any]], selected: Sequence[Selected]) -> "pa.Table":
    """Rows of a chunk as columns; the several types of one field meet in one column."""
    import pyarrow as pa

    instants, *columns = zip(*values, strict=True)
    table = {TIME: pa.array(instants, pa.int64()).cast(pa.timestamp("ns", "UTC"))}
    for one, column in zip(selected, columns, strict=False):
        name = f"{one.name}_field" if one.name in TAGS else one.name  # the tags come under these names themselves
        array = _array(column, one.kind)
        table[name] = _either(table[name], array) if name in table else array
    for tag, column in zip(TAGS, columns[len(selected) :], strict=True):
        table[tag] = pa.array([text or None for text in column], pa.string())
    present = [name for name, array in table.items() if name in (TIME, *TAGS) or array.null_count < len(array)]
    return pa.table({name: table[name] for name in present})


def _array(column: Sequence[Any], kind: str) -> Any:
    import pyarrow as pa

    if kind == "float":
        return pa.array([None if value is None else float(value) for value in column], pa.float64())
    if kind == "string":
        # Over Flux an empty text cannot be told from a missing one; both languages give null.
        return pa.array([text or None for text in column], pa.string())
    types = {"integer": pa.int64(), "unsigned": pa.uint64(), "boolean": pa.bool_()}
    return pa.array(column, types[kind])


def _either(first: Any, second: Any) -> Any:
    import pyarrow.compute as pc

    common = common_type(first.type, second.type)
    return pc.coalesce(first.cast(common), second.cast(common))
