"""The fault proxy plays what it says: against a small HTTP server of the standard library and a plain TCP echo."""

import http.client
import socket
import socketserver
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from fault_proxy import (
    Fault,
    FaultProxy,
    answer,
    answer_afterwards,
    black_hole,
    cut_request,
    delay,
    lose_answer,
    reset,
    strip,
    truncate,
)


class Echo(BaseHTTPRequestHandler):
    """Answers with the request's body and names the headers that it got; `done` counts what it heard in full."""

    protocol_version = "HTTP/1.1"
    done: list[bytes]

    def do_PUT(self) -> None:
        body = self._body()
        self.done.append(body)
        self.send_response(201)
        self.send_header("X-Heard", ",".join(sorted(name.lower() for name in self.headers)))
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "12345")
        self.end_headers()

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self._whole(int(self.headers["Content-Length"]))
        pieces = []
        while size := int(self.rfile.readline(), 16):
            pieces.append(self._whole(size + 2)[:-2])
        self.rfile.readline()
        return b"".join(pieces)

    def _whole(self, size: int) -> bytes:
        data = self.rfile.read(size)
        if len(data) < size:
            raise ConnectionError("the body ended early")
        return data

    def log_message(self, *_: object) -> None:
        """Say nothing."""


class RawEcho(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        while data := self.request.recv(1 << 16):
            self.request.sendall(data)


@contextmanager
def running(server: socketserver.TCPServer) -> Iterator[int]:
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class Server(ThreadingHTTPServer):
    def handle_error(self, *_: object) -> None:
        """A connection that the proxy broke is no news."""


@pytest.fixture
def heard() -> list[bytes]:
    return []


@pytest.fixture
def proxy(heard: list[bytes]) -> Iterator[FaultProxy]:
    server = Server(("127.0.0.1", 0), type("Handler", (Echo,), {"done": heard}))
    with running(server) as port, FaultProxy("127.0.0.1", port) as proxy:
        yield proxy


@pytest.fixture
def raw() -> Iterator[FaultProxy]:
    server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), RawEcho)
    with running(server) as port, FaultProxy("127.0.0.1", port, raw=True) as proxy:
        yield proxy


def put(
    proxy: FaultProxy, body: bytes = b"hello", *, if_match: str | None = None, timeout_seconds: float = 5
) -> tuple[int, bytes, str]:
    with closing(http.client.HTTPConnection(proxy.host, proxy.port, timeout=timeout_seconds)) as connection:
        connection.request("PUT", "/thing?x=1", body, {"If-Match": if_match} if if_match else {})
        response = connection.getresponse()
        return response.status, response.read(), response.headers.get("X-Heard", "")


def test_without_a_rule_everything_passes(proxy: FaultProxy, heard: list[bytes]) -> None:
    large = b"0123456789" * 100_000
    assert put(proxy, large)[:2] == (201, large)
    assert heard == [large]
    assert [(seen.method, seen.path, seen.fault, seen.status) for seen in proxy.seen] == [
        ("PUT", "/thing?x=1", "", 201)
    ]


def test_chunked_bodies_head_and_keep_alive_pass(proxy: FaultProxy, heard: list[bytes]) -> None:
    with closing(http.client.HTTPConnection(proxy.host, proxy.port, timeout=5)) as connection:
        for _ in range(2):
            connection.request("PUT", "/c", iter([b"ab", b"c" * 70_000]), encode_chunked=True)
            assert connection.getresponse().read() == b"ab" + b"c" * 70_000
            connection.request("HEAD", "/c")
            response = connection.getresponse()
            assert (response.read(), response.headers["Content-Length"]) == (b"", "12345")
    assert len(heard) == 2


def test_a_client_that_expects_100_continue_is_told_to_go_on(proxy: FaultProxy) -> None:
    with socket.create_connection((proxy.host, proxy.port), 5) as line, line.makefile("rb") as said:
        line.sendall(b"PUT /e HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nExpect: 100-continue\r\n\r\n")
        assert said.readline() == b"HTTP/1.1 100 Continue\r\n"
        line.sendall(b"ok")
        said.readline()
        assert said.readline().startswith(b"HTTP/1.1 201")


def test_a_rule_is_used_as_often_as_it_says_and_only_where_it_fits(proxy: FaultProxy) -> None:
    proxy.add(answer(503, b"busy", {"Retry-After": "1"}), "PUT", "/thing*", times=2)
    proxy.add(answer(418), "GET")
    assert [put(proxy)[0] for _ in range(3)] == [503, 503, 201]


@pytest.mark.parametrize("fault", [reset(), lose_answer(), cut_request(2), black_hole()], ids=lambda fault: fault.name)
def test_an_answer_that_never_comes(proxy: FaultProxy, heard: list[bytes], fault: Fault) -> None:
    proxy.add(fault)
    with pytest.raises(OSError, match=r"timed out|reset|closed"):
        put(proxy, timeout_seconds=0.3)
    assert heard == ([b"hello"] if fault.lose_answer else [])
    assert put(proxy)[0] == 201


def test_the_server_does_it_and_the_client_is_told_otherwise(proxy: FaultProxy, heard: list[bytes]) -> None:
    proxy.add(answer_afterwards(500, b"oh"))
    assert put(proxy)[:2] == (500, b"oh")
    assert heard == [b"hello"]
    assert proxy.seen[0].status == 201


def test_a_truncated_answer_ends_at_the_byte(proxy: FaultProxy) -> None:
    proxy.add(truncate(3))
    with pytest.raises(http.client.IncompleteRead) as caught:
        put(proxy)
    assert caught.value.partial == b"hel"


def test_headers_are_stripped_and_answers_delayed(proxy: FaultProxy) -> None:
    proxy.add(strip("If-Match"))
    proxy.add(delay(0.05))
    assert "if-match" not in put(proxy, if_match="x")[2]
    assert "if-match" in put(proxy, if_match="x")[2]
    assert [seen.fault for seen in proxy.seen] == ["strip", "delay"]


def test_an_outage_ends_on_the_same_port(proxy: FaultProxy) -> None:
    port = proxy.port
    proxy.refuse()
    with pytest.raises(ConnectionRefusedError):
        put(proxy)
    proxy.allow()
    assert (put(proxy)[0], proxy.port) == (201, port)


def test_raw_bytes_pass_until_the_connections_are_cut(raw: FaultProxy) -> None:
    with socket.create_connection((raw.host, raw.port), 5) as line:
        line.sendall(b"ping")
        assert line.recv(10) == b"ping"
        raw.cut()
        assert ended(line)


def test_raw_connections_end_after_so_many_bytes(raw: FaultProxy) -> None:
    raw.drop_after(3)
    with socket.create_connection((raw.host, raw.port), 5) as line, line.makefile("rb") as said:
        line.sendall(b"hello")
        assert said.read() == b"hel"
    with socket.create_connection((raw.host, raw.port), 5) as line:
        line.sendall(b"hello")
        assert line.recv(10) == b"hello"


def test_the_answer_to_one_raw_message_is_lost(raw: FaultProxy) -> None:
    raw.lose_answer_to(b"COMMIT")
    with socket.create_connection((raw.host, raw.port), 5) as line:
        line.sendall(b"BEGIN")
        assert line.recv(10) == b"BEGIN"
        line.sendall(b"COMMIT")
        assert ended(line)


def ended(line: socket.socket) -> bool:
    try:
        return line.recv(10) == b""
    except ConnectionResetError:
        return True
