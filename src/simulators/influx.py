"""In-process InfluxDB 2 simulator: written to by line protocol, read by Flux, with faults on demand.

Invariants: it implements contracts/influxdb.md byte for byte over real HTTP on a loopback port, from points that were
really written; it refuses what it cannot answer as a server would. An error is a status only before the first byte,
afterwards it is part of the answer. Faults affect queries only, and each affects exactly one.
"""

import json
import secrets
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from email.utils import formatdate
from functools import partial
from itertools import chain
from threading import Lock

from simulators.annotated_csv import ANNOTATIONS, BATCH_ROWS, AnnotatedCsv, Result
from simulators.flux import answer_flux
from simulators.flux_parser import FluxError, FluxSyntax, parse_rfc3339
from simulators.flux_steps import Column, table
from simulators.http_server import Answer, CutHere, Piece, Request, Simulator, Streamed
from simulators.influx_storage import SHARD_NS, Points
from simulators.line_protocol import PRECISION_NS, BadLine, parse_lines

ORG_ID = "0a1b2c3d4e5f6071"
BUCKET_ID = "1f2e3d4c5b6a7080"
AUTHORIZATION_ID = "0f1e2d3c4b5a6978"
REMEMBERED_QUERIES = 10_000
VERSION = {"X-Influxdb-Version": "v2.7.12", "X-Influxdb-Build": "OSS"}
JSON = {"Content-Type": "application/json; charset=utf-8"}
CSV_HEADERS = {"Content-Type": "text/csv; charset=utf-8"}
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
STATUSES = {code: status for status, code in CODES.items()}


@dataclass(frozen=True, slots=True)
class Refuse:
    """Answer with this status at once. `html`: a proxy's error page instead of the server's JSON."""

    status: int
    message: str = "An internal error has occurred - check server logs"
    code: str = ""
    retry_after_seconds: int | None = None
    html: bool = False


@dataclass(frozen=True, slots=True)
class ErrorTable:
    """Send `after_rows` rows (fewer when there are no more), then an error inside the answer that the query failed."""

    after_rows: int = 0
    message: str = "engine: unexpected EOF"


@dataclass(frozen=True, slots=True)
class Cut:
    """Send `after_rows` rows, then half of the next one, then close the connection.

    `hidden`: the answer has `Connection: close` and no length, so that the truncation looks like a normal end.
    `mid_row` False cuts exactly after a row.
    """

    after_rows: int = 0
    hidden: bool = False
    mid_row: bool = True


@dataclass(frozen=True, slots=True)
class Stall:
    """Send nothing for this long: before the status when `after_rows` is None, else after that many rows."""

    seconds: float
    after_rows: int | None = None


@dataclass(frozen=True, slots=True)
class ForceGzip:
    """Compress the answer even if it is short or compression was not requested."""


@dataclass(frozen=True, slots=True)
class EmptyTable:
    """Put a table without rows, with this group key, before the others."""

    key: tuple[tuple[str, str], ...] = (("device_id", "D1"),)


Fault = Refuse | ErrorTable | Cut | Stall | ForceGzip | EmptyTable
Predicate = Callable[[str], bool]


class Faults:
    """Faults waiting for a query. Thread-safe."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._waiting: list[tuple[Fault, Predicate]] = []

    def add(self, fault: Fault, times: int = 1, when: Predicate = lambda _text: True) -> None:
        """Give the fault to the next `times` queries whose text `when` accepts."""
        with self._lock:
            self._waiting.extend([(fault, when)] * times)

    def take(self, text: str) -> Fault | None:
        """Remove and return the fault for this query."""
        with self._lock:
            for number, (fault, when) in enumerate(self._waiting):
                if when(text):
                    del self._waiting[number]
                    return fault
        return None

    def __len__(self) -> int:
        """Number of pending faults."""
        with self._lock:
            return len(self._waiting)


@dataclass(frozen=True, slots=True)
class AnsweredQuery:
    """A recorded query. `sent_bytes`: body bytes on the wire; `whole` False when the answer was truncated."""

    path: str
    text: str
    status: int
    rows: int = 0
    sent_bytes: int = 0
    whole: bool = True


class InfluxSimulator(Simulator):
    """One organisation with one bucket.

    `faults`: faults of the next queries. `points`: the stored points. `starting`: set it to answer like a server that
    is still starting up. `now_ns`: the clock for relative times and for points written without a time. `shard_ns`: the
    duration of a shard group, within which a field has one type.
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
        super().__init__(port)
        self.token = token
        self.org = org
        self.bucket = bucket
        self.points = Points(shard_ns)
        self.faults = Faults()
        self.starting = False
        self.shows_rights = True
        self.too_large = refused(413, "unable to read data: points batch is too large")
        self._now_ns = now_ns
        self._queries: deque[AnsweredQuery] = deque(maxlen=REMEMBERED_QUERIES)
        self._lock = Lock()
        self._routes: Mapping[str, tuple[frozenset[str], Callable[[Request], Answer]]] = {
            "/api/v2/query": (frozenset({"POST"}), self._query),
            "/api/v2/write": (frozenset({"POST"}), self._write),
            "/api/v2/buckets": (frozenset({"GET"}), self._buckets),
            "/api/v2/orgs": (frozenset({"GET"}), self._orgs),
            "/api/v2/authorizations": (frozenset({"GET"}), self._authorizations),
            "/ping": (frozenset({"GET", "HEAD"}), lambda _request: Answer(204, VERSION)),
            "/health": (frozenset({"GET"}), self._health),
            "/ready": (frozenset({"GET"}), self._ready),
        }

    def write(self, lines: str, precision: str = "ns") -> None:
        """Store line protocol without HTTP. Raises BadLine, and ValueError when a point was dropped."""
        dropped = self.points.write(parse_lines(lines, self._now_ns(), precision))
        if dropped:
            raise ValueError(f"{len(dropped)} points dropped: {dropped[0]}")

    @property
    def queries(self) -> tuple[AnsweredQuery, ...]:
        """Every answered query, oldest first; the last 10,000 are kept."""
        with self._lock:
            return tuple(self._queries)

    @property
    def rows_sent(self) -> int:
        """Rows over all recorded queries."""
        return sum(query.rows for query in self.queries)

    def forget_queries(self) -> None:
        """Clear the record."""
        with self._lock:
            self._queries.clear()

    def respond(self, request: Request) -> Answer:
        """The answer to any request."""
        methods, answer = self._routes.get(request.path, (frozenset(), None))
        if answer is None:
            return refused(404, "path not found")
        if request.method not in methods:
            return refused(405, f"{request.method} is not allowed here")
        if self.starting and request.path in ("/api/v2/query", "/api/v2/write"):
            return Answer(503, JSON, b'{"status":"starting"}')
        if request.path.startswith("/api/v2/") and not self._has_token(request):
            return refused(401, "unauthorized access")
        return answer(request)

    def _health(self, _request: Request) -> Answer:
        body: dict[str, object] = {
            "name": "influxdb",
            "message": "starting" if self.starting else "ready for queries and writes",
            "status": "fail" if self.starting else "pass",
            "checks": [],
            "version": VERSION["X-Influxdb-Version"],
            "commit": "",
        }
        return Answer(503 if self.starting else 200, JSON, _json(body))

    def _ready(self, _request: Request) -> Answer:
        if self.starting:
            return Answer(503, JSON, b'{"status":"starting","checks":[]}')
        return Answer(200, JSON, b'{"status":"ready","started":"2026-01-01T00:00:00Z","up":"1h2m3s"}')

    def _has_token(self, request: Request) -> bool:
        kind, _, token = request.headers.get("authorization", "").partition(" ")
        return kind in ("Token", "Bearer") and secrets.compare_digest(token.encode(), self.token.encode())

    def _knows_org(self, request: Request) -> bool:
        return request.parameters.get("org", request.parameters.get("orgID", "")) in (self.org, ORG_ID)

    def _buckets(self, request: Request) -> Answer:
        rule = {
            "type": "expire",
            "everySeconds": self.points.retention_seconds,
            "shardGroupDurationSeconds": self.points.shard_ns // 10**9,
        }
        bucket = {
            "id": BUCKET_ID,
            "orgID": ORG_ID,
            "type": "user",
            "name": self.bucket,
            "retentionRules": [rule],
            "labels": [],
        }
        is_named = request.parameters.get("name", self.bucket) == self.bucket
        is_shown = is_named and self.points.retention_seconds is not None
        date = {"Date": formatdate(self._now_ns() / 10**9, usegmt=True)}
        return Answer(200, {**JSON, **date}, _json({"buckets": [bucket] if is_shown else []}))

    def _orgs(self, _request: Request) -> Answer:
        return Answer(200, JSON, _json({"orgs": [{"id": ORG_ID, "name": self.org}]}))

    def _authorizations(self, _request: Request) -> Answer:
        """The one token and its permissions. A token without `read:authorizations` gets an empty list."""
        resource = {"type": "buckets", "id": BUCKET_ID, "name": self.bucket, "orgID": ORG_ID, "org": self.org}
        rights = [{"action": action, "resource": resource} for action in ("read", "write")]
        own = {"id": AUTHORIZATION_ID, "token": self.token, "status": "active", "orgID": ORG_ID, "permissions": rights}
        return Answer(200, JSON, _json({"authorizations": [own] if self.shows_rights else []}))

    def _write(self, request: Request) -> Answer:
        bucket, precision = request.parameters.get("bucket", ""), request.parameters.get("precision", "ns")
        if not self._knows_org(request):
            return refused(404, f'organization name "{request.parameters.get("org", "")}" not found')
        if bucket not in (self.bucket, BUCKET_ID):
            return refused(404, f'bucket "{bucket}" not found')
        if precision not in PRECISION_NS:
            return refused(400, "invalid precision; valid precision units are ns, us, ms, and s")
        try:
            points = list(parse_lines(request.body.decode(), self._now_ns(), precision))
        except (BadLine, UnicodeDecodeError) as error:
            return refused(400, str(error))
        dropped = self.points.write(points)
        if dropped:
            reason = f"partial write: {dropped[0]} dropped={len(dropped)}"
            return refused(422, f"failure writing points to database: {reason}")
        return Answer(204, VERSION)

    def _query(self, request: Request) -> Answer:
        """Stream the pieces of the result; an error before the first piece becomes a status."""
        try:
            text, annotations, now_ns = self._decoded(request)
        except ValueError as error:
            return refused(400, f"failed to decode request body: {error}")
        if not self._knows_org(request):
            return refused(400, "failed to decode request body: organization not found")
        fault = self.faults.take(text)
        writer = AnnotatedCsv(annotations, BATCH_ROWS if getattr(fault, "after_rows", None) is None else 1)

        def record(status: int, rows: int, sent_bytes: int, whole: bool) -> None:  # noqa: FBT001 - a callback
            with self._lock:
                self._queries.append(AnsweredQuery(request.path, text, status, rows, sent_bytes, whole))

        try:
            results = answer_flux(text, self.points, self.bucket, now_ns)
            rest = writer.pieces(_with_empty_table(results, fault) if isinstance(fault, EmptyTable) else results)
            first = next(rest)
        except (FluxError, FluxSyntax) as failure:
            status = STATUSES[failure.code] if isinstance(failure, FluxError) else 400
            record(status, 0, 0, False)  # noqa: FBT003 - a callback
            return refused(status, str(failure))
        pieces = _guarded(first, rest, writer.error)
        return answer_with(
            fault, pieces, headers={**CSV_HEADERS, **VERSION}, error=writer.error, wait=self.wait, record=record
        )

    def _decoded(self, request: Request) -> tuple[str, Sequence[str], int]:
        """Query text, annotations, and the time that relative times refer to. Raises ValueError."""
        if request.headers.get("content-type", "").startswith("application/vnd.flux"):
            return request.body.decode(), (), self._now_ns()
        payload = json.loads(request.body)
        if not isinstance(payload, dict) or not isinstance(payload.get("query"), str) or not payload["query"]:
            raise ValueError("request body requires either query or AST")
        if payload.get("type", "flux") != "flux":
            raise ValueError(f"unknown query type: {payload['type']}")
        now_ns = parse_rfc3339(payload["now"]) if payload.get("now") else self._now_ns()
        return payload["query"], _annotations(payload.get("dialect") or {}), now_ns


Record = Callable[[int, int, int, bool], None]  # status, rows, bytes on the wire, whether it was sent completely


def answer_with(
    fault: Fault | None,
    pieces: Iterator[Piece],
    *,
    headers: Mapping[str, str],
    error: Callable[[str], bytes],
    wait: Callable[[float], object],
    record: Record,
) -> Answer:
    """The answer with these pieces and the fault applied. `error` formats a failure inside the answer."""
    if isinstance(fault, Refuse):
        record(fault.status, 0, 0, False)  # noqa: FBT003 - a callback
        if fault.html:
            page = f"<html><body><h1>{fault.status}</h1><p>{fault.message}</p></body></html>"
            return Answer(fault.status, {"Content-Type": "text/html"}, page.encode())
        return refused(fault.status, fault.message, fault.code, fault.retry_after_seconds)
    if isinstance(fault, Stall) and fault.after_rows is None:
        wait(fault.seconds)
    stream = _disturbed(pieces, fault, error, wait)
    hidden = isinstance(fault, Cut) and fault.hidden
    sent = Streamed(stream, partial(record, 200), until_close=hidden, force_gzip=isinstance(fault, ForceGzip))
    return Answer(200, headers, sent)


def _disturbed(
    pieces: Iterator[Piece],
    fault: Fault | None,
    error: Callable[[str], bytes],
    wait: Callable[[float], object],
) -> Iterator[Piece]:
    """The pieces with the fault applied at the first piece that exceeds the fault's rows. Raises CutHere to close.

    For a fault with `after_rows`, pass pieces of one row each.
    """
    rows, struck = 0, Piece(b"")
    if isinstance(fault, Stall | ErrorTable | Cut) and fault.after_rows is not None:
        for piece in pieces:
            if piece.rows and rows + piece.rows > fault.after_rows:
                struck = piece
                break
            if not isinstance(fault, Stall) and piece.data == b"\r\n":  # the end of the result
                break
            rows += piece.rows
            yield piece
        if isinstance(fault, ErrorTable):
            yield Piece(error(fault.message))
            return
        if isinstance(fault, Cut):
            if fault.mid_row and struck.data:
                yield Piece(struck.data[: len(struck.data) // 2])
            raise CutHere
        wait(fault.seconds)
        yield struck
    yield from pieces


def refused(status: int, message: str, code: str = "", retry_after_seconds: int | None = None) -> Answer:
    """The platform's JSON error."""
    code = code or CODES.get(status, "internal error")
    headers = {**JSON, "X-Platform-Error-Code": code}
    if retry_after_seconds is not None:
        headers["Retry-After"] = str(retry_after_seconds)
    return Answer(status, headers, _json({"code": code, "message": message}))


def _guarded(first: Piece, rest: Iterator[Piece], error: Callable[[str], bytes]) -> Iterator[Piece]:
    """The pieces; a failure after the first one is reported inside the answer."""
    yield first
    try:
        yield from rest
    except FluxError as failure:
        yield Piece(error(failure.message))


def _with_empty_table(results: Iterator[Result], fault: EmptyTable) -> Iterator[Result]:
    """The results, each with an additional table without rows in front."""
    columns = [*(Column(name, "string", group=True) for name, _ in fault.key), Column("_value", "double")]
    empty = table(columns, [[] for _ in columns], [value for _, value in fault.key])
    return ((name, chain([empty], tables)) for name, tables in results)


def _annotations(dialect: Mapping[str, object]) -> Sequence[str]:
    """The annotations that a dialect asks for; comment prefix and time format are ignored."""
    if dialect.get("delimiter", ",") != "," or dialect.get("header", True) is not True:
        raise ValueError("this simulator writes commas and a header only")
    annotations = dialect.get("annotations") or []
    if not isinstance(annotations, list) or not ANNOTATIONS.issuperset(annotations):
        raise ValueError(f"unknown dialect annotation type: {annotations}")
    return annotations


def _json(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()
