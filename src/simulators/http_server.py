"""HTTP transport of every simulator: HTTP/1.1 with bodies of known length, or chunked bodies generated while sending.

A simulated system is a `Simulator` whose `respond` turns a `Request` into an `Answer`. Invariants: an answer is
recorded before the client can see its end, so a test may count right after reading. Closing ends every connection and
waits for its threads; nothing is left behind.
"""

import gzip
import logging
import socket
import sys
import time
import traceback
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Lock, Thread
from typing import Any, Self
from urllib.parse import parse_qs, urlsplit

MAX_BODY_BYTES = 64 * 1024 * 1024
GZIP_FROM_BYTES = 1400
IDLE_SECONDS = 120
POLL_SECONDS = 0.02
log = logging.getLogger(__name__)


class CutHere(Exception):
    """Close the connection now: raised by `respond`, or while generating a streamed body."""


@dataclass(frozen=True, slots=True)
class Request:
    """`parameters` are those of the URL, the first value of each; header names are lower case."""

    method: str
    path: str
    parameters: Mapping[str, str]
    headers: Mapping[str, str]
    body: bytes


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes of a streamed body with the number of data rows in them."""

    data: bytes
    rows: int = 0


@dataclass(frozen=True, slots=True)
class Streamed:
    """A body generated while it is sent. `record` gets rows, bytes and whether the answer was sent completely."""

    pieces: Iterator[Piece]
    record: Callable[[int, int, bool], None]
    until_close: bool = False
    force_gzip: bool = False


@dataclass(frozen=True, slots=True)
class Answer:
    """Status, headers and a body."""

    status: int
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes | Streamed = b""


Respond = Callable[[Request], Answer]
TOO_LARGE = Answer(413, {"Content-Type": "text/plain"}, b"request too large")


class Simulator(ABC):
    """A simulated system on a loopback port. Use it as a context manager, or `start` and `close` it.

    A closed simulator can be restarted with its state, on the same port; `port` 0 picks a free one. `too_large` answers
    a body of more than MAX_BODY_BYTES, which is not read.
    """

    too_large = TOO_LARGE

    def __init__(self, port: int = 0) -> None:
        self._port = port
        self._closing = Event()
        self._server: Server | None = None
        self._thread: Thread | None = None

    @abstractmethod
    def respond(self, request: Request) -> Answer:
        """The answer to any request; called from one thread per connection. Raises CutHere to give none."""

    def now_seconds(self) -> float:
        """The simulated system's clock, for the Date header; seconds since 1970."""
        return time.time()

    def start(self) -> Self:
        """Listen on the loopback address and serve from threads."""
        self._closing.clear()
        self._server = Server(("127.0.0.1", self._port), self.respond, self.too_large, self.now_seconds)
        self._port = self._server.server_address[1]
        name = type(self).__name__
        self._thread = Thread(target=self._server.serve_forever, args=(POLL_SECONDS,), name=name, daemon=True)
        self._thread.start()
        return self

    def close(self) -> None:
        """Stop listening and close every connection; does nothing when not running."""
        self._closing.set()
        if self._server is not None and self._thread is not None:
            self._server.shutdown()
            self._server.server_close()
            self._thread.join()
        self._server = self._thread = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_exception: object) -> None:
        self.close()

    @property
    def url(self) -> str:
        """The base URL, without a trailing slash; stays valid after closing. Raises RuntimeError before `start`."""
        if not self._port:
            raise RuntimeError("the simulator does not run; start it first")
        return f"http://127.0.0.1:{self._port}"

    def wait(self, seconds: float) -> None:
        """Wait while answering; if the simulator is closed meanwhile, the connection ends instead."""
        if seconds and self._closing.wait(seconds):
            raise CutHere


class Server(ThreadingHTTPServer):
    """Serves `respond` from one thread per connection."""

    daemon_threads = False
    allow_reuse_address = True
    request_queue_size = 128

    def __init__(
        self,
        address: tuple[str, int],
        respond: Respond,
        too_large: Answer = TOO_LARGE,
        now_seconds: Callable[[], float] = time.time,
    ) -> None:
        self.respond = respond
        self.now_seconds = now_seconds
        self.too_large = too_large
        self._open: set[socket.socket] = set()
        self._lock = Lock()
        super().__init__(address, Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Remember the connection, so that `server_close` can end it."""
        with self._lock:
            self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """Forget a closed connection."""
        with self._lock:
            self._open.discard(request)
        super().shutdown_request(request)

    def server_close(self) -> None:
        """Stop listening, close all connections, wait for their threads."""
        with self._lock:
            for connection in self._open:
                try:
                    connection.shutdown(socket.SHUT_RDWR)
                except OSError:
                    log.debug("a connection of the simulator had ended already")
        super().server_close()

    def handle_error(self, request: object, client_address: object) -> None:  # noqa: ARG002
        """A client disconnect is not an error; anything else is logged with its traceback."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError | ValueError):
            log.error("the simulator failed to answer %s: %s", client_address, traceback.format_exc())


class Handler(BaseHTTPRequestHandler):
    """Reads requests and writes answers; `Server.respond` decides what to answer."""

    server: Server
    protocol_version = "HTTP/1.1"
    server_version = "headwater-demo"
    sys_version = ""
    timeout = IDLE_SECONDS
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        """Handles every method: the answer decides which ones are allowed."""
        body = self._body()
        if body is None:
            return
        url = urlsplit(self.path)
        parameters = {name: values[0] for name, values in parse_qs(url.query, keep_blank_values=True).items()}
        headers = {name.lower(): value for name, value in self.headers.items()}
        try:
            answer = self.server.respond(Request(self.command, url.path, parameters, headers, body))
        except CutHere:
            self.close_connection = True
            return
        self._answer(answer)

    do_POST = do_HEAD = do_PUT = do_DELETE = do_PATCH = do_GET  # noqa: N815 - named by http.server

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - named by http.server
        """Do not log to the terminal; requests are kept as query records."""
        log.debug(format, *args)

    def _body(self) -> bytes | None:
        """The request's body, decompressed; None when it was refused here."""
        length = int(self.headers.get("Content-Length") or 0)
        if length > MAX_BODY_BYTES:
            self.close_connection = True
            self._answer(self.server.too_large)
            return None
        body = self.rfile.read(length)
        return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body

    def _answer(self, answer: Answer) -> None:
        if isinstance(answer.body, Streamed):
            self._stream(answer, answer.body)
        else:
            self._send_whole(answer, answer.body)

    def _send_whole(self, answer: Answer, body: bytes) -> None:
        self._head(answer, None if answer.status in (204, 304) else {"Content-Length": str(len(body))})
        if self.command != "HEAD":
            self.wfile.write(body)

    def _head(self, answer: Answer, more: Mapping[str, str] | None) -> None:
        self.send_response_only(answer.status)
        self.send_header("Server", self.version_string())
        if "Date" not in answer.headers:
            self.send_header("Date", self.date_time_string(self.server.now_seconds()))
        for name, value in {**answer.headers, **(more or {})}.items():
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()

    def _stream(self, answer: Answer, body: Streamed) -> None:
        pieces, compressed = self._with_encoding(body)
        self.close_connection = self.close_connection or body.until_close
        more = {"Content-Encoding": "gzip"} if compressed else {}
        self._head(answer, more if body.until_close else {**more, "Transfer-Encoding": "chunked"})
        rows = sent = 0
        whole = False
        compressor = zlib.compressobj(wbits=31) if compressed else None
        try:
            for piece in pieces:
                sent += self._send_piece(piece.data, compressor, chunked=not body.until_close)
                rows += piece.rows
            whole = True
        except CutHere:
            self.close_connection = True
        finally:
            body.record(rows, sent, whole)
        if whole:
            end = compressor.flush() if compressor else b""
            self._send_bytes(end, chunked=not body.until_close)
            if not body.until_close:
                self.wfile.write(b"0\r\n\r\n")

    def _with_encoding(self, body: Streamed) -> tuple[Iterator[Piece], bool]:
        """The pieces, and whether to compress: when forced, or when requested and the answer is not tiny."""
        if body.force_gzip:
            return body.pieces, True
        if "gzip" not in self.headers.get("Accept-Encoding", ""):
            return body.pieces, False
        held: list[Piece] = []
        ends: list[CutHere] = []
        try:
            while sum(len(piece.data) for piece in held) <= GZIP_FROM_BYTES:
                held.append(next(body.pieces))
        except StopIteration:
            return iter(held), False
        except CutHere as cut:
            ends.append(cut)
        return _resumed(held, ends, body.pieces), not ends

    def _send_piece(self, data: bytes, compressor: "zlib._Compress | None", *, chunked: bool) -> int:
        """Send the encoded piece at once; returns its length on the wire."""
        if compressor is not None:
            data = compressor.compress(data) + compressor.flush(zlib.Z_SYNC_FLUSH)
        self._send_bytes(data, chunked=chunked)
        return len(data)

    def _send_bytes(self, data: bytes, *, chunked: bool) -> None:
        if data:
            self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data) if chunked else data)


def _resumed(held: list[Piece], ends: list[CutHere], rest: Iterator[Piece]) -> Iterator[Piece]:
    yield from held
    for end in ends:
        raise end
    yield from rest
