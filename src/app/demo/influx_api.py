"""What the InfluxDB simulator answers: /api/v2/query, /api/v2/write, /query and the probes.

Invariant: statuses, codes and bodies are those of contracts/influxdb.md sections 1, 3, 6 and 7; an error is a status
only before the first byte, afterwards it stands inside the answer. Faults touch queries only.
"""

import base64
import binascii
import json
import secrets
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from email.utils import formatdate
from itertools import chain
from urllib.parse import parse_qs

from app.demo.annotated_csv import ANNOTATIONS, BATCH_ROWS, AnnotatedCsv, Dialect, Result
from app.demo.faults import CODES, Cut, EmptyTable, Fault, Faults, ForceGzip, Refuse, Stall, disturbed
from app.demo.flux import Bucket, answer_flux
from app.demo.flux_tables import Column, FluxError, table
from app.demo.flux_text import FluxSyntax
from app.demo.http import Answer, Piece, Request, Streamed
from app.demo.influxql import QlError, answer_influxql
from app.demo.influxql_json import (
    DEFAULT_CHUNK_ROWS,
    EPOCHS,
    Shape,
    documents,
    error_document,
    failed_document,
)
from app.demo.influxql_json import Result as QlResult
from app.demo.influxql_text import QlSyntax, Select, Statement, parse_influxql
from app.demo.instants import parse_rfc3339
from app.demo.line_protocol import PRECISION_NS, BadLine, parse_lines

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
                    "everySeconds": self._bucket.points.retention_seconds,
                    "shardGroupDurationSeconds": self._bucket.points.shard_ns // 10**9,
                }
            ],
            "labels": [],
        }
        date = {"Date": formatdate(self._around.now_ns() / 10**9, usegmt=True)}
        return Answer(200, {**JSON, **date}, _json({"buckets": [bucket] if name == self._bucket.name else []}))

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
