"""Querying InfluxDB: the port for both query languages, the connection, and how a span is split into queries.

Implementations of the port: `flux` (`/api/v2/query`) and `influxql` (`/query`); both return the same points for the
same data.
"""

import base64
import json
import re
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cached_property
from sys import intern
from typing import Any, NamedTuple, Protocol, TypeVar
from urllib.parse import unquote, urlsplit

import pyarrow as pa
import urllib3
import urllib3.exceptions

from app.core.errors import AppError, Permanent, Transient
from app.core.network import CA_HINT, connection_fault, is_untrusted, proxy_for
from app.core.pipeline import Count, Sums
from app.core.retry import asked_seconds
from app.core.windows import DAY_SECONDS, EPOCH, Window, floor_to
from app.object_store.port import date_of

# `schema collision`: a field has several types in the span. `max-select`: 1.x limits on series, buckets and points.
TOO_MUCH = ("memory", "resource exhausted", "schema collision", "max-select")
UNAUTHORIZED, FORBIDDEN, NOT_FOUND, TIMED_OUT, THROTTLED, CLIENT_CLOSED, SERVER_ERROR, NOT_IMPLEMENTED = (
    401,
    403,
    404,
    408,
    429,
    499,
    500,
    501,
)
INVENTORY_DEVICES = 20


class QueryTooLarge(Permanent):
    """The query was too large for the server: a retry cannot help, a shorter range can."""


class FieldCount(NamedTuple):  # made for each field of each device in each run: a dataclass takes three times as long
    """How often one field of one device occurs in a time bucket. `device` is "" for points without a device tag."""

    device: str
    start_at: datetime
    field: str
    values: int


@dataclass(frozen=True, slots=True)
class FieldSums:
    """The sums of one field in a time bucket or part of one; parts add up."""

    start_at: datetime
    field: str
    sums: Sums


@dataclass(frozen=True, slots=True)
class PointColumns:
    """Points of one or more series as columns of equal length, in any order.

    `times`: timestamp("ns", "UTC"). `tags`: tag key -> text column, null = the series lacks the tag; the device tag
    itself is left out. `fields`: (field key, column) of float64, int64, uint64, string or bool, null = absent. A key
    occurs once for each of its types, and at most one of these columns has a value in any row. `devices`: the device of
    each point, where several were queried.
    """

    times: pa.Array | pa.ChunkedArray
    tags: Mapping[str, pa.Array | pa.ChunkedArray]
    fields: Sequence[tuple[str, pa.Array | pa.ChunkedArray]]
    devices: pa.Array | pa.ChunkedArray | None = None

    def each(self, change: Callable[[Any], Any]) -> "PointColumns":
        """The points with every column changed in the same way, for example sliced."""
        return PointColumns(
            change(self.times),
            {name: change(texts) for name, texts in self.tags.items()},
            [(name, change(values)) for name, values in self.fields],
        )

    def without_empty_columns(self) -> "PointColumns":
        """The points without tags and fields that none of them has."""
        rows = len(self.times)
        return PointColumns(
            self.times,
            {name: texts for name, texts in self.tags.items() if texts.null_count < rows},
            [(name, values) for name, values in self.fields if values.null_count < rows],
        )

    @property
    def numbers(self) -> Counter[str]:
        """How many values each field has."""
        found: Counter[str] = Counter()
        for name, values in self.fields:
            found[name] += len(values) - values.null_count
        return found


@dataclass(frozen=True, slots=True)
class RawCells:
    """Raw values as columns of equal length, in any order: each is the value of one field at one timestamp.

    `times` and `tags` as for `PointColumns`; `fields`: field names, as text; `values`: one type, no nulls.
    """

    times: pa.Array | pa.ChunkedArray
    tags: Mapping[str, pa.Array | pa.ChunkedArray]
    fields: pa.Array | pa.ChunkedArray
    values: pa.Array | pa.ChunkedArray


@dataclass(frozen=True, slots=True)
class Retention:
    """How long the source keeps points: `period`, which may be UNLIMITED (see `app.core.pipeline`).

    `period` is None where it cannot be queried; then `oldest_at` is the oldest point of the measurement, None where
    there is none or it cannot be found. `told_at`: the server's clock at the response, None where it is not reported.
    """

    period: timedelta | None
    oldest_at: datetime | None = None
    told_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class SourceInventory:
    """The contents of the source, to distinguish a wrong setting from an empty source. All names are sorted.

    `has_points`: whether the configured measurement has points in the configured bucket or retention policy, at any
    time. `tags` and `fields` are those of the measurement, `devices` at most INVENTORY_DEVICES values of the device tag
    at any time. `policies`: other retention policies in which the measurement has points (InfluxQL only).
    """

    measurements: Sequence[str]
    has_points: bool
    tags: Sequence[str]
    fields: Sequence[str]
    devices: Sequence[str]
    policies: Sequence[str] = ()


def partition_totals(counted: Iterable[FieldCount]) -> Mapping[tuple[str, datetime], Count]:
    """Counts per partition and bucket: all values, and the fullest field's count as a lower bound of the points."""
    fields: dict[tuple[str, datetime], dict[str, int]] = {}
    for device, start_at, field, values in counted:
        bucket = fields.get((device, start_at))
        if bucket is None:
            bucket = fields[intern(device), start_at] = {}
        bucket[intern(field)] = bucket.get(field, 0) + values
    return {slot: Count(sum(each.values()), max(each.values()), each) for slot, each in fields.items()}


class Reader(Protocol):
    """All methods raise Transient, QueryTooLarge (query less) or Permanent. Bounds are `[start, end)`. Thread-safe.

    The device "" stands for the points without a device tag. Values keep the type in which they are stored.
    """

    def devices(self, since: datetime) -> Sequence[str]:
        """Every value of the device tag with points at or after `since`, also in the future; sorted."""

    def counts(self, device: str | None, span: Window, every_seconds: int) -> Iterable[FieldCount]:
        """Values per device, field and bucket of `every_seconds` on the epoch's grid; empty buckets are left out.

        `device` None means all devices. Counts are exact even where a field's type differs between shards: a field may
        then occur in several parts per bucket, which add up.
        """

    def sums(self, device: str, span: Window, every_seconds: int, numbers: Sequence[str]) -> Iterable[FieldSums]:
        """Like `counts` for one device, with sum, min and max of the numeric fields `numbers`, and possibly of others.

        Also raises Permanent or Transient where a sum cannot be represented, or where one of `numbers` is not numeric
        in the span.
        """

    def rows(self, device: str, span: Window) -> Iterator[PointColumns]:
        """All points of the device, complete or an error."""

    def rows_of(self, devices: Sequence[str], span: Window) -> Iterator[PointColumns]:
        """The same for several devices with one query; none of them is "". Each block names its `devices`."""

    def empty_texts(self, device: str, span: Window, field: str) -> Iterator[PointColumns]:
        """The points whose string `field` is "", with only that field, where `rows` returns null for them.

        Flux's pivoted CSV writes both as an empty cell. InfluxQL distinguishes them and yields nothing here.
        """

    def cells(self, device: str, span: Window) -> Iterator[RawCells]:
        """Every value of the device as the server has it, complete or an error; neither side joins values into rows.

        For verification: it shares only the connection and the parser with `rows`.
        """

    def outside(self, span: Window) -> Iterable[FieldCount]:
        """Values per device and field, with a long span as one bucket that starts with it: for the far future or 1970.

        A field with several types in the span may be counted under only one of them.
        """

    def retention(self) -> Retention:
        """How long points are kept; queried each time, since it may change."""

    def inventory(self) -> SourceInventory:
        """The contents of the source. Takes several queries; call it when nothing was found."""

    def ping(self) -> str:
        """Run one cheap query with the configured credentials. Returns a short description of what answered."""


def error_of_status(
    url: str, status: int, message: str, *, where: str, retry_after: str = "", advice: str = ""
) -> AppError:
    """Classify an HTTP error; the cases are InfluxDB's own (see `kit/transport/http/error_handler.go`).

    `where` names the variables to check; `advice` replaces the status code's general hint.
    """
    told = f"InfluxDB at {url} answers {status}: {message}"
    said = message.lower()
    passing = status in (TIMED_OUT, THROTTLED, CLIENT_CLOSED) or (status >= SERVER_ERROR and status != NOT_IMPLEMENTED)
    if passing or "queue length exceeded" in said:
        return Transient(told, "no action needed: it is retried", retry_after_seconds=asked_seconds(retry_after))
    if any(word in said for word in TOO_MUCH):
        return QueryTooLarge(told, "no action needed: a shorter range is tried")
    hints = {
        UNAUTHORIZED: "set INFLUXDB_TOKEN, or the user name and password, to credentials that may read the data",
        FORBIDDEN: f"give these credentials the right to read; now {where}",
        NOT_FOUND: f"check {where} and that the token may read it",
    }
    general = f"check INFLUXDB_URL, {where} and INFLUXDB_MEASUREMENT"
    return Permanent(told, advice or hints.get(status, general))


# HTTP to an InfluxDB server, with one connection pool for all threads and both query languages.
#
# urllib3 only: of the vendor's library just the connection and the token would be used, and importing it costs more
# than every other part of this pipeline (docs/decisions/telemetry.md). Invariants: a body is complete or an error;
# urllib3's exceptions are converted to ours only here; redirects are not followed, so a token goes only to the
# configured host.

CHUNK_BYTES = 1 << 18
HTML = re.compile(r"\s*<(?:!doctype|html|head|body)\b", re.IGNORECASE)
REFUSAL_BYTES = 1 << 16
CONNECT_SECONDS = 5.0
OK = 200


@dataclass(frozen=True, slots=True)
class ServerAnswer:
    """A body in chunks of at most CHUNK_BYTES. `framed`: HTTP marks its end, by chunked encoding or a length.

    `version` of the server, "" where not reported; `told_at`: the server's clock, None where not reported.
    """

    chunks: Iterator[bytes]
    framed: bool
    version: str = ""
    told_at: datetime | None = None


class InfluxConnection:
    """Connects to one server on the first query.

    `url` has no credentials; `token` takes precedence over `username` and `password`; all empty = none sent.
    """

    def __init__(
        self,
        url: str,
        token: str = "",
        *,
        username: str = "",
        password: str = "",
        timeout_seconds: float = 120.0,
        connections: int = 8,
    ) -> None:
        self.url = url
        self._timeout_seconds, self._connections = timeout_seconds, connections
        self._variables = "INFLUXDB_TOKEN" if token else "INFLUXDB_USERNAME and INFLUXDB_PASSWORD" if username else ""
        # Compress responses over https, which may cross the internet; on a local network that only costs both ends CPU
        # time.
        encoding = "gzip" if url.lower().startswith("https://") else "identity"
        self._headers: dict[str, str] = urllib3.make_headers(accept_encoding=encoding)
        if token:
            self._headers["Authorization"] = f"Token {token}"
        elif username:
            # UTF-8, as Go servers expect; urllib3 would encode latin-1 and fail on other characters.
            credentials = base64.b64encode(f"{username}:{password}".encode()).decode()
            self._headers["Authorization"] = f"Basic {credentials}"

    @contextmanager
    def ask(self, path: str, body: bytes | None, headers: Mapping[str, str], where: str) -> Iterator[ServerAnswer]:
        """POST the body, or GET if there is none, and stream the response.

        The connection returns to the pool only after the response was read to its end.

        Raises Transient when the server is unreachable, slow or disconnects, and what `error_of_status` returns for any
        status but 200; `where` names the variables to check then.
        """
        with self._translated():
            response = self._pool.request(
                "GET" if body is None else "POST",
                self.url.rstrip("/") + path,
                body=body,
                headers={**self._headers, **headers},
                preload_content=False,
                retries=False,
                timeout=urllib3.Timeout(connect=CONNECT_SECONDS, read=self._timeout_seconds),
            )
        with closing(response):
            if response.status != OK:
                raise self._refused(response, path, where)
            framed = bool(response.headers.get("Transfer-Encoding") or response.headers.get("Content-Length"))
            version = response.headers.get("X-Influxdb-Version", "")
            yield ServerAnswer(self._chunks(response), framed, version, date_of(response.headers.get("Date", "")))

    def _chunks(self, response: Any) -> Iterator[bytes]:
        """Uses `read` rather than `stream`, which yields each of the server's chunks, often 4 KiB, separately."""
        while True:
            with self._translated():
                chunk = response.read(CHUNK_BYTES, decode_content=True)
            if not chunk:
                return
            yield chunk

    def _refused(self, response: Any, path: str, where: str) -> AppError:
        with self._translated():
            body = response.read(REFUSAL_BYTES, decode_content=True).decode("utf-8", "replace")
        return error_of_status(
            self.url,
            response.status,
            _message(body),
            where=where,
            retry_after=response.headers.get("Retry-After", ""),
            advice=self._advice(response, path, body),
        )

    def _advice(self, response: Any, path: str, body: str) -> str:
        """The next step that the response itself suggests, "" if none."""
        version = response.headers.get("X-Influxdb-Version", "").lstrip("v")
        if path.startswith("/api/v2") and (version.startswith("1.") or body.strip() == "404 page not found"):
            return f"set INFLUXDB_API=influxql: InfluxDB {version or '1'} does not support Flux here"
        if HTML.match(body):
            return "set INFLUXDB_URL to an InfluxDB: a web page is served there, perhaps by a proxy or a login"
        if response.status == UNAUTHORIZED and self._variables:
            return f"set {self._variables} to credentials that this server knows"
        return ""

    @contextmanager
    def _translated(self) -> Iterator[None]:
        url = self.url
        try:
            yield
        except urllib3.exceptions.LocationParseError as error:
            raise Permanent(f"INFLUXDB_URL={url!r} is not a valid URL", "correct INFLUXDB_URL") from error
        except urllib3.exceptions.SSLError as error:
            hint = CA_HINT if is_untrusted(error) else "check INFLUXDB_URL and the certificate of the server"
            raise Permanent(f"InfluxDB at {url}: no secure connection: {str(error)[:200]}", hint) from error
        except urllib3.exceptions.ReadTimeoutError as error:
            raise Transient(
                f"InfluxDB at {url} did not answer within {self._timeout_seconds:g} s",
                "raise INFLUXDB_TIMEOUT_SECONDS if it stays; it is retried",
            ) from error
        except urllib3.exceptions.HTTPError as error:
            raise Transient(
                f"InfluxDB: {connection_fault(error, url) or f'no complete response from {url}: {str(error)[:200]}'}",
                "check INFLUXDB_URL and that the server runs; it is retried",
            ) from error

    @cached_property
    def _pool(self) -> Any:
        if proxy := proxy_for(self.url):
            login = urlsplit(proxy).netloc.rpartition("@")[0]
            headers = urllib3.make_headers(proxy_basic_auth=unquote(login)) if login else None
            return urllib3.ProxyManager(proxy, maxsize=self._connections, proxy_headers=headers)
        return urllib3.PoolManager(maxsize=self._connections)


def _message(body: str) -> str:
    """The server's own message: `error` in 1.x, `message` in 2.x and 3, otherwise the start of the body."""
    try:
        parsed = json.loads(body)
    except ValueError:
        if HTML.match(body):
            title = re.search(r"<title[^>]*>(.*?)</title>", body, re.IGNORECASE | re.DOTALL)
            return " ".join(f"an HTML page, {title[1] if title else 'without a title'}".split())[:200]
        return " ".join(body.split())[:200]
    if not isinstance(parsed, dict):
        return body[:200]
    return str(parsed.get("error") or parsed.get("message") or body)[:300]


# Time spans that fit one query: inside one shard group, and small enough for the server's limits.
#
# A field has one type per shard. A query over two shards in which the types differ loses one of them: InfluxQL's
# `COUNT(*)` counts one type, Flux returns the first shard's part. So no query crosses a shard group boundary, or
# midnight UTC, which is such a boundary wherever shard groups last whole days.

T = TypeVar("T")

DAY = timedelta(seconds=DAY_SECONDS)
SHARDS_FROM = datetime(1, 1, 1, tzinfo=UTC)  # Go truncates times to multiples since then; weeks start on Mondays


def one_type_spans(span: Window, shard: timedelta) -> Iterator[Window]:
    """The parts of `span` that cross neither midnight UTC nor a boundary of shard groups of duration `shard`."""
    start = span.start
    while start < span.end:
        midnight = EPOCH + ((start - EPOCH) // DAY + 1) * DAY
        shard_end = SHARDS_FROM + ((start - SHARDS_FROM) // shard + 1) * shard
        end = min(span.end, midnight, shard_end)
        yield Window(start, end)
        start = end


def counted_in_parts(
    spans: Iterable[Window],
    every_seconds: int,
    ask: Callable[[Sequence[Window]], Iterator[T | None]],
    spans_per_question: int = 1,
) -> Iterator[T]:
    """What `ask` counts over the spans; spans that are too large for the server are split, down to one bucket.

    `ask` yields the counts of its spans in order, and None after each. Raises QueryTooLarge when a single bucket is
    still too large, or when the server gave up on a span after returning some of its counts.
    """
    waiting = deque(spans)
    while waiting:
        asked = [waiting.popleft() for _ in range(min(spans_per_question, len(waiting)))]
        ended, is_inside = 0, False
        try:
            for counted in ask(asked):
                is_inside = counted is not None
                if counted is None:
                    ended += 1
                else:
                    yield counted
        except QueryTooLarge:
            buckets = len(list(_pieces(asked[ended], every_seconds))) // 2 if ended < len(asked) else 0
            if is_inside or not buckets:
                raise
            waiting = deque(
                piece for span in (*asked[ended:], *waiting) for piece in _pieces(span, every_seconds * buckets)
            )


def _pieces(span: Window, seconds: int) -> Iterator[Window]:
    """The span cut at every multiple of `seconds` since the epoch."""
    start = span.start
    while start < span.end:
        end = min(span.end, floor_to(start, seconds) + timedelta(seconds=seconds))
        yield Window(start, end)
        start = end
