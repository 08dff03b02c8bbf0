"""An InfluxDB 2 that runs inside this process: written to by line protocol, read by Flux and InfluxQL.

Invariant: it speaks contracts/influxdb.md to the byte over real HTTP on a loopback port, from points that were really
written; what it cannot answer as a server would, it refuses.
"""

import base64
import binascii
import json
import secrets
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from threading import Lock
from typing import Self
from urllib.parse import parse_qs

from simulators.annotated_csv import ANNOTATIONS, BATCH_ROWS, AnnotatedCsv, Dialect, Result
from simulators.flux import Bucket, answer_flux
from simulators.flux_parser import FluxError, FluxSyntax, parse_rfc3339
from simulators.flux_steps import Column, table
from simulators.http_server import Answer, CutHere, Piece, Request, Served, Streamed
from simulators.influx_storage import SHARD_NS, Points
from simulators.influxql import QlError, answer_influxql
from simulators.influxql_json import (
    DEFAULT_CHUNK_ROWS,
    EPOCHS,
    Shape,
    documents,
    error_document,
    failed_document,
)
from simulators.influxql_json import Result as QlResult
from simulators.influxql_text import QlSyntax, Select, Statement, parse_influxql
from simulators.line_protocol import PRECISION_NS, BadLine, parse_lines

CODES = {
    400: "invalid",
    401: "unauthorized",
    403: "forbidden",
    404: "not found",
    405: "method not allowed",
    408: "request timeout",
    413: "request too large",
    422: "unprocessable entity",
    429: "too many requests",
    500: "internal error",
    501: "not implemented",
    503: "unavailable",
}


@dataclass(frozen=True, slots=True)
class Refuse:
    """Answer with this status at once. `html`: the page of a proxy instead of the server's JSON."""

    status: int
    message: str = "An internal error has occurred - check server logs"
    code: str = ""
    retry_after_seconds: int | None = None
    html: bool = False


@dataclass(frozen=True, slots=True)
class ErrorTable:
    """Send `after_rows` rows (fewer when there are no more), then say inside the answer that the query failed."""

    after_rows: int = 0
    message: str = "engine: unexpected EOF"


@dataclass(frozen=True, slots=True)
class Cut:
    """Send `after_rows` rows, then half of the next one, then close the connection.

    `hidden`: the answer says `Connection: close` and no length, so that its early end looks like an end.
    `mid_row` False ends exactly behind a row.
    """

    after_rows: int = 0
    hidden: bool = False
    mid_row: bool = True


@dataclass(frozen=True, slots=True)
class Stall:
    """Send nothing for that long: before the status when `after_rows` is None, else after so many rows."""

    seconds: float
    after_rows: int | None = None


@dataclass(frozen=True, slots=True)
class ForceGzip:
    """Compress the answer however short it is, and also when nobody asked."""


@dataclass(frozen=True, slots=True)
class EmptyTable:
    """Put a table without rows, of this group key, before the others."""

    key: tuple[tuple[str, str], ...] = (("device_id", "D1"),)


Fault = Refuse | ErrorTable | Cut | Stall | ForceGzip | EmptyTable
Predicate = Callable[[str], bool]


class Faults:
    """Faults that wait for a query. Safe from any thread."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._waiting: list[tuple[Fault, Predicate]] = []

    def add(self, fault: Fault, times: int = 1, when: Predicate = lambda _text: True) -> None:
        """The next `times` queries whose text `when` accepts get the fault."""
        with self._lock:
            self._waiting.extend([(fault, when)] * times)

    def take(self, text: str) -> Fault | None:
        """The fault for this query, which is then spent."""
        with self._lock:
            for number, (fault, when) in enumerate(self._waiting):
                if when(text):
                    del self._waiting[number]
                    return fault
        return None

    def clear(self) -> None:
        """Forget what still waits."""
        with self._lock:
            self._waiting.clear()

    def __len__(self) -> int:
        """How many still wait."""
        with self._lock:
            return len(self._waiting)


def disturbed(
    pieces: Iterator[Piece],
    fault: Fault | None,
    error: Callable[[str], bytes],
    wait: Callable[[float], object],
) -> Iterator[Piece]:
    """The pieces with the fault in them, struck at the first one whose rows are too many. Raises CutHere to close.

    Ask for pieces of one row each where a fault has an `after_rows`.
    """
    after_rows = getattr(fault, "after_rows", None)
    if after_rows is None:
        yield from pieces
        return
    rows = 0
    for piece in pieces:
        if piece.rows and rows + piece.rows > after_rows:
            yield from _struck(fault, piece, error, wait)
            if not isinstance(fault, Stall):
                return
            yield piece
            yield from pieces
            return
        if isinstance(fault, Cut | ErrorTable) and _ends(piece):
            break
        rows += piece.rows
        yield piece
    yield from _struck(fault, Piece(b""), error, wait)


def _ends(piece: Piece) -> bool:
    return piece.data == b"\r\n"


def _struck(
    fault: Fault | None,
    piece: Piece,
    error: Callable[[str], bytes],
    wait: Callable[[float], object],
) -> Iterator[Piece]:
    if isinstance(fault, Stall):
        wait(fault.seconds)
    elif isinstance(fault, ErrorTable):
        yield Piece(error(fault.message))
    elif isinstance(fault, Cut):
        if fault.mid_row and piece.data:
            yield Piece(piece.data[: len(piece.data) // 2])
        raise CutHere


VERSION = {"X-Influxdb-Version": "v2.7.12", "X-Influxdb-Build": "OSS"}
JSON = {"Content-Type": "application/json; charset=utf-8"}
CSV_HEADERS = {"Content-Type": "text/csv; charset=utf-8"}
QL_HEADERS = {"Content-Type": "application/json"}
STATUSES = {code: status for status, code in CODES.items()}


@dataclass(frozen=True, slots=True)
class AnsweredQuery:
    """A query on record. `sent_bytes` of body on the wire; `whole` False when the answer was cut."""

    path: str
    text: str
    status: int
    rows: int = 0
    sent_bytes: int = 0
    whole: bool = True


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What the simulator hands to its answers: credentials, clock, faults, the record, and a way to wait."""

    token: str
    org: str
    now_ns: Callable[[], int]
    faults: Faults
    record: Callable[[AnsweredQuery], None]
    wait: Callable[[float], object]
    is_starting: Callable[[], bool]


@dataclass(frozen=True, slots=True)
class _Query:
    """A query that is about to be answered."""

    path: str
    text: str
    fault: Fault | None
    headers: Mapping[str, str]


class InfluxApi:
    """Turns requests into answers."""

    def __init__(self, bucket: Bucket, surroundings: Surroundings) -> None:
        self._bucket = bucket
        self._around = surroundings
        self._routes: Mapping[str, tuple[frozenset[str], Callable[[Request], Answer]]] = {
            "/api/v2/query": (frozenset({"POST"}), self._flux),
            "/api/v2/write": (frozenset({"POST"}), self._write),
            "/api/v2/buckets": (frozenset({"GET"}), self._buckets),
            "/query": (frozenset({"GET", "POST"}), self._influxql),
            "/ping": (frozenset({"GET", "HEAD"}), lambda _request: Answer(204, VERSION)),
            "/health": (frozenset({"GET"}), self._health),
            "/ready": (frozenset({"GET"}), self._ready),
        }

    def respond(self, request: Request) -> Answer:
        """The answer to any request."""
        methods, answer = self._routes.get(request.path, (frozenset(), None))
        if answer is None:
            return refused(404, "path not found")
        if request.method not in methods:
            return refused(405, f"{request.method} is not allowed here")
        if self._around.is_starting() and request.path in ("/api/v2/query", "/api/v2/write", "/query"):
            return Answer(503, JSON, b'{"status":"starting"}')
        if request.path.startswith("/api/v2/") and not self._has_token(request):
            return refused(401, "unauthorized access")
        return answer(request)

    def _health(self, _request: Request) -> Answer:
        starting = self._around.is_starting()
        body: dict[str, object] = {
            "name": "influxdb",
            "message": "starting" if starting else "ready for queries and writes",
            "status": "fail" if starting else "pass",
            "checks": [],
            "version": VERSION["X-Influxdb-Version"],
            "commit": "",
        }
        return Answer(503 if starting else 200, JSON, _json(body))

    def _ready(self, _request: Request) -> Answer:
        if self._around.is_starting():
            return Answer(503, JSON, b'{"status":"starting","checks":[]}')
        return Answer(200, JSON, b'{"status":"ready","started":"2026-01-01T00:00:00Z","up":"1h2m3s"}')

    def _has_token(self, request: Request) -> bool:
        kind, _, token = request.headers.get("authorization", "").partition(" ")
        return kind in ("Token", "Bearer") and secrets.compare_digest(token.encode(), self._around.token.encode())

    def _knows_org(self, request: Request) -> bool:
        org = request.parameters.get("org", request.parameters.get("orgID", ""))
        return org in (self._around.org, self._bucket.org_id)

    def _buckets(self, request: Request) -> Answer:
        name = request.parameters.get("name", self._bucket.name)
        bucket = {
            "id": self._bucket.bucket_id,
            "orgID": self._bucket.org_id,
            "type": "user",
            "name": self._bucket.name,
            "retentionRules": [
                {
                    "type": "expire",
                    "everySeconds": 0,
                    "shardGroupDurationSeconds": self._bucket.points.shard_ns // 10**9,
                }
            ],
            "labels": [],
        }
        return Answer(200, JSON, _json({"buckets": [bucket] if name == self._bucket.name else []}))

    def _write(self, request: Request) -> Answer:
        bucket, precision = request.parameters.get("bucket", ""), request.parameters.get("precision", "ns")
        if not self._knows_org(request):
            return refused(404, f'organization name "{request.parameters.get("org", "")}" not found')
        if bucket not in (self._bucket.name, self._bucket.bucket_id):
            return refused(404, f'bucket "{bucket}" not found')
        if precision not in PRECISION_NS:
            return refused(400, "invalid precision; valid precision units are ns, us, ms, and s")
        try:
            points = list(parse_lines(request.body.decode(), self._around.now_ns(), precision))
        except (BadLine, UnicodeDecodeError) as error:
            return refused(400, str(error))
        dropped = self._bucket.points.write(points)
        if dropped:
            reason = f"partial write: {dropped[0]} dropped={len(dropped)}"
            return refused(422, f"failure writing points to database: {reason}")
        return Answer(204, VERSION)

    def _flux(self, request: Request) -> Answer:
        try:
            text, dialect, now_ns = self._decoded(request)
        except ValueError as error:
            return refused(400, f"failed to decode request body: {error}")
        if not self._knows_org(request):
            return refused(400, "failed to decode request body: organization not found")
        fault = self._around.faults.take(text)
        writer = AnnotatedCsv(dialect, BATCH_ROWS if getattr(fault, "after_rows", None) is None else 1)

        def results() -> Iterator[Result]:
            made = answer_flux(text, self._bucket, now_ns)
            return _with_empty_table(made, fault) if isinstance(fault, EmptyTable) else made

        return self._answered(
            _Query(request.path, text, fault, CSV_HEADERS), lambda: writer.pieces(results()), writer.error
        )

    def _decoded(self, request: Request) -> tuple[str, Dialect, int]:
        """Query text, dialect and instant of `now()`. Raises ValueError."""
        if request.headers.get("content-type", "").startswith("application/vnd.flux"):
            return request.body.decode(), Dialect(), self._around.now_ns()
        payload = json.loads(request.body)
        if not isinstance(payload, dict) or not isinstance(payload.get("query"), str) or not payload["query"]:
            raise ValueError("request body requires either query or AST")
        if payload.get("type", "flux") != "flux":
            raise ValueError(f"unknown query type: {payload['type']}")
        now_ns = parse_rfc3339(payload["now"]) if payload.get("now") else self._around.now_ns()
        return payload["query"], _dialect(payload.get("dialect") or {}), now_ns

    def _answered(
        self, query: "_Query", pieces: Callable[[], Iterator[Piece]], error: Callable[[str], bytes]
    ) -> Answer:
        """The pieces as they come; what fails before the first of them is a status."""
        fault = query.fault
        if isinstance(fault, Refuse):
            self._around.record(AnsweredQuery(query.path, query.text, fault.status, whole=False))
            return _refusal(fault)
        if isinstance(fault, Stall) and fault.after_rows is None:
            self._around.wait(fault.seconds)
        try:
            made = pieces()
            first = next(made)
        except (FluxError, FluxSyntax) as failure:
            status = STATUSES[failure.code] if isinstance(failure, FluxError) else 400
            self._around.record(AnsweredQuery(query.path, query.text, status, whole=False))
            return refused(status, str(failure))
        stream = disturbed(_guarded(first, made, error), fault, error, self._around.wait)

        def record(rows: int, sent_bytes: int, whole: bool) -> None:  # noqa: FBT001 - a callback
            self._around.record(AnsweredQuery(query.path, query.text, 200, rows, sent_bytes, whole=whole))

        hidden = isinstance(fault, Cut) and fault.hidden
        body = Streamed(stream, record, until_close=hidden, force_gzip=isinstance(fault, ForceGzip))
        return Answer(200, {**query.headers, **VERSION}, body)

    def _influxql(self, request: Request) -> Answer:
        form = {}
        if request.headers.get("content-type", "").startswith("application/x-www-form-urlencoded"):
            form = {name: values[0] for name, values in parse_qs(request.body.decode()).items()}
        parameters = {**form, **request.parameters}
        if not self._may_query(request, parameters):
            return Answer(401, {"Content-Type": "application/json"}, error_document("authorization failed"))
        if not parameters.get("q"):
            return _bad_query('missing required parameter "q"')
        try:
            statements = parse_influxql(parameters["q"])
            shape = _shape(parameters)
        except QlSyntax as error:
            return _bad_query(f"error parsing query: {error}")
        except ValueError as error:
            return _bad_query(str(error))
        query = _Query(request.path, parameters["q"], self._around.faults.take(parameters["q"]), QL_HEADERS)
        results = (self._statement(one, parameters) for one in statements)
        return self._answered(query, lambda: documents(results, shape), failed_document)

    def _may_query(self, request: Request, parameters: Mapping[str, str]) -> bool:
        if self._has_token(request):
            return True
        kind, _, encoded = request.headers.get("authorization", "").partition(" ")
        password = parameters.get("p", "")
        if kind == "Basic":
            try:
                password = base64.b64decode(encoded, validate=True).decode().partition(":")[2]
            except (binascii.Error, UnicodeDecodeError):
                return False
        return secrets.compare_digest(password.encode(), self._around.token.encode())

    def _statement(self, statement: Statement, parameters: Mapping[str, str]) -> QlResult:
        error = self._unknown_database(statement, parameters)
        if error:
            return QlResult(error=error)
        try:
            series = answer_influxql(statement, self._bucket.points, parameters.get("db", self._bucket.name))
            first = next(series, None)
        except QlError as failure:
            return QlResult(error=str(failure))
        return QlResult() if first is None else QlResult(chain([first], series))

    def _unknown_database(self, statement: Statement, parameters: Mapping[str, str]) -> str:
        """Why the statement has nothing to read from, "" when the bucket is meant: `db`, or `db/rp`."""
        database, policy = parameters.get("db", ""), parameters.get("rp", "")
        if isinstance(statement, Select):
            named = ("", "", *statement.source)[-3:-1]
            database, policy = named[0] or database, named[1] or policy
        elif statement.what == "DATABASES":
            return ""
        if not database:
            return "database name required"
        if self._bucket.name in (f"{database}/{policy or 'autogen'}", database if policy in ("", "autogen") else ""):
            return ""
        known = self._bucket.name.partition("/")[0] == database
        return f"retention policy not found: {policy}" if known and policy else f"database not found: {database}"


def refused(status: int, message: str, code: str = "", retry_after_seconds: int | None = None) -> Answer:
    """The platform's JSON error."""
    code = code or CODES.get(status, "internal error")
    headers = {**JSON, "X-Platform-Error-Code": code}
    if retry_after_seconds is not None:
        headers["Retry-After"] = str(retry_after_seconds)
    return Answer(status, headers, _json({"code": code, "message": message}))


def _refusal(fault: Refuse) -> Answer:
    if fault.html:
        page = f"<html><body><h1>{fault.status}</h1><p>{fault.message}</p></body></html>"
        return Answer(fault.status, {"Content-Type": "text/html"}, page.encode())
    return refused(fault.status, fault.message, fault.code, fault.retry_after_seconds)


def _bad_query(message: str) -> Answer:
    return Answer(400, {"Content-Type": "application/json", "X-Influxdb-Error": message}, error_document(message))


def _guarded(first: Piece, rest: Iterator[Piece], error: Callable[[str], bytes]) -> Iterator[Piece]:
    """The pieces; a failure after the first one is said inside the answer."""
    yield first
    try:
        yield from rest
    except FluxError as failure:
        yield Piece(error(failure.message))


def _with_empty_table(results: Iterator[Result], fault: EmptyTable) -> Iterator[Result]:
    """The results, each with a table without rows before its others."""
    columns = [*(Column(name, "string", group=True) for name, _ in fault.key), Column("_value", "double")]
    empty = table(columns, [[] for _ in columns], [value for _, value in fault.key])
    return ((name, chain([empty], tables)) for name, tables in results)


def _dialect(given: Mapping[str, object]) -> Dialect:
    """Annotations in the order asked for; comment prefix and time format are accepted and ignored."""
    annotations = given.get("annotations") or []
    if not isinstance(annotations, list):
        raise ValueError("annotations must be an array")  # noqa: TRY004 - the caller answers ValueError
    for name in annotations:
        if name not in ANNOTATIONS:
            raise ValueError(f"unknown dialect annotation type: {name}")
    delimiter = given.get("delimiter") or ","
    if not isinstance(delimiter, str) or len(delimiter) != 1:
        raise ValueError("invalid dialect delimiter: must be a single character")
    return Dialect(tuple(annotations), delimiter, header=given.get("header") is not False)


def _shape(parameters: Mapping[str, str]) -> Shape:
    epoch = parameters.get("epoch", "")
    chunk_rows = int(parameters.get("chunk_size") or DEFAULT_CHUNK_ROWS)
    return Shape(epoch if epoch in EPOCHS else "", chunk_rows if parameters.get("chunked") == "true" else 0)


def _json(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


ORG_ID = "0a1b2c3d4e5f6071"
BUCKET_ID = "1f2e3d4c5b6a7080"
REMEMBERED_QUERIES = 10_000


class InfluxSimulator:
    """One organisation with one bucket. Use it as a context manager, or `start` and `close` it.

    `faults`: what the next queries shall suffer. `points`: what is stored. `starting`: set it to answer as a server
    that has not come up yet. `now_ns` is the clock behind `now()` and behind points written without a time. `shard_ns`
    is the duration of a shard group, inside which a field has one type.
    """

    def __init__(
        self,
        port: int = 0,
        *,
        token: str = "demo-token",  # noqa: S107 - a simulator on loopback
        org: str = "demo",
        bucket: str = "telemetry",
        now_ns: Callable[[], int] = time.time_ns,
        shard_ns: int = SHARD_NS,
    ) -> None:
        self.token = token
        self.org = org
        self.bucket = bucket
        self.points = Points(shard_ns)
        self.faults = Faults()
        self.starting = False
        self._now_ns = now_ns
        self._queries: deque[AnsweredQuery] = deque(maxlen=REMEMBERED_QUERIES)
        self._lock = Lock()
        too_large = refused(413, "unable to read data: points batch is too large")
        self._served = Served("influx", port, too_large=too_large)

    def start(self) -> Self:
        """Listen and serve from a thread; a closed simulator may be started again with its points, on the same port."""
        around = Surroundings(
            self.token,
            self.org,
            self._now_ns,
            self.faults,
            self._record,
            self._served.wait,
            lambda: self.starting,
        )
        self._served.start(InfluxApi(Bucket(self.bucket, self.points, BUCKET_ID, ORG_ID), around).respond)
        return self

    def close(self) -> None:
        """Stop listening and end every connection; nothing when it does not run."""
        self._served.close()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_exception: object) -> None:
        self.close()

    @property
    def url(self) -> str:
        """Where it listens, without a trailing slash."""
        return self._served.url

    def write(self, lines: str, precision: str = "ns") -> None:
        """Store line protocol without HTTP. Raises BadLine, and ValueError when a point was dropped."""
        dropped = self.points.write(parse_lines(lines, self._now_ns(), precision))
        if dropped:
            raise ValueError(f"{len(dropped)} points dropped: {dropped[0]}")

    @property
    def queries(self) -> tuple[AnsweredQuery, ...]:
        """Every query that was answered, oldest first; the last 10,000 are kept."""
        with self._lock:
            return tuple(self._queries)

    @property
    def rows_sent(self) -> int:
        """Rows over all queries on record."""
        return sum(query.rows for query in self.queries)

    def forget_queries(self) -> None:
        """Begin a new record."""
        with self._lock:
            self._queries.clear()

    def _record(self, query: AnsweredQuery) -> None:
        with self._lock:
            self._queries.append(query)
