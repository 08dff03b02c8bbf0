"""A front that stays up: probes before any limit, clients that do not read or write, refusals that arrive."""

import http.client
import json
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

import pytest

from app.web.protocol import ConnectionLimits
from daemon import Daemon, Daemons, free_port

KEY = "hw_root_" + ("root" * 11)[:43]
MIB = 1 << 20


@dataclass(eq=False)
class Peer:
    asked_at: float
    rank: int = 0
    dropped: list["Peer"] = field(default_factory=list)

    def drop(self) -> None:
        self.dropped.append(self)


class TestRoom:
    def test_the_longest_without_a_request_go_first_and_those_at_work_never(self) -> None:
        dropped: list[Peer] = []
        peers = [Peer(float(number), number % 3, dropped) for number in range(60)]
        room = ConnectionLimits(60, 1000)
        assert room.enter(peers[-1], 10, peers, 53)
        assert dropped == []
        assert room.enter(peers[-1], 10, peers, 60)
        assert [peer.asked_at for peer in dropped[:20]] == [float(number) for number in range(0, 60, 3)]
        assert {peer.rank for peer in dropped[20:]} == {1}

    def test_while_those_are_leaving_no_others_go(self) -> None:
        dropped: list[Peer] = []
        peers = [Peer(float(number), 0, dropped) for number in range(90)]
        room = ConnectionLimits(1000, 170)
        for _ in range(5):
            assert room.enter(peers[-1], 90, peers, 90)
        assert len(dropped) == 45
        for peer in dropped:
            room.left(peer)
        assert room.enter(peers[-1], 90, [peer for peer in peers if peer not in dropped], 45)
        assert len(dropped) == 45 + 44

    def test_bodies_on_their_way_go_when_nothing_else_can_and_then_only_probes_are_left(self) -> None:
        dropped: list[Peer] = []
        working = [Peer(0.0, 2, dropped) for _ in range(9)]
        sending = Peer(5.0, 1, dropped)
        newest = Peer(9.0, 0, dropped)
        room = ConnectionLimits(10, 1000)
        assert room.enter(newest, 5, [*working, sending, newest], 11)
        assert dropped == [sending]
        room.left(sending)
        assert not room.enter(newest, 5, [*working, newest], 10)


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    folder = tmp_path_factory.mktemp("front")
    with closing(Daemons(folder)) as daemons:
        environ = {"API_KEYS": f"root:admin:{sha256(KEY.encode()).hexdigest()}", "MAX_BODY_BYTES": str(MIB)}
        daemon = daemons.start(
            "",
            wait=True,
            key=KEY,
            descriptors="",
            HEALTH_PORT=str(free_port()),
            DATA_DIR=str(folder / "data"),
            **environ,
        )
        daemon.until(lambda: daemon.get("/ready").status == 200)
        (folder / "data" / "objects" / "x").mkdir(parents=True)
        (folder / "data" / "objects" / "x" / "small").write_bytes(b"hello")
        with (folder / "data" / "objects" / "x" / "big").open("wb") as big:
            big.truncate(60 * MIB)
        yield daemon


def connected(daemon: Daemon, *, receives_bytes: int = 0) -> socket.socket:
    raw = socket.socket()
    raw.settimeout(20)
    if receives_bytes:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receives_bytes)
    raw.connect(("127.0.0.1", daemon.port))
    return raw


def head(method: str, path: str, *fields: str) -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: localhost", *fields, "", ""]).encode()


def rest_of(raw: socket.socket) -> bytes:
    answer = b""
    while piece := raw.recv(1 << 16):
        answer += piece
    return answer


@contextmanager
def many(count: int, make: Callable[[], socket.socket]) -> Iterator[list[socket.socket]]:
    with ExitStack() as stack:
        yield [stack.enter_context(make()) for _ in range(count)]


SIGNED = f"X-API-Key: {KEY}"
REFUSED_EARLY = {
    "no key": ("POST", "/dwh/events-part", [], 401),
    "too large": ("POST", "/dwh/events-part", [SIGNED], 413),
    "no such path": ("POST", "/nothing", [SIGNED], 0),
    "no place for it": ("POST", "/s3/upload?key=telemetry/x", [SIGNED], 403),
    "a key that cannot be": ("POST", "/s3/upload?key=a%5Cb", [SIGNED], 422),
    "nothing to update": ("PUT", "/s3/update?key=never", [SIGNED], 404),
    "another media type": ("POST", "/dwh/events-part", [SIGNED, "Content-Type: text/csv; charset=x"], 0),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", REFUSED_EARLY.values(), ids=REFUSED_EARLY)
@pytest.mark.parametrize("chunked", [False, True])
def test_a_refusal_before_the_end_of_a_body_arrives_as_an_answer(
    daemon: Daemon, case: tuple[str, str, list[str], int], *, chunked: bool
) -> None:
    method, path, fields, status = case
    size = 20 * MIB
    length = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {size}"
    block = b"x" * MIB
    piece = b"%x\r\n%s\r\n" % (len(block), block) if chunked else block
    with connected(daemon) as raw:
        raw.sendall(head(method, path, length, *fields))
        for _ in range(20):
            raw.sendall(piece)
        if chunked:
            raw.sendall(b"0\r\n\r\n")
        answer = rest_of(raw)
    assert answer.startswith(b"HTTP/1.1 %d " % status if status else b"HTTP/1.1 4"), answer[:200]
    assert b"\r\nconnection: close\r\n" in answer.lower()
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["hint"]


def test_who_waits_for_a_word_before_the_body_gets_the_refusal_and_a_closed_connection(daemon: Daemon) -> None:
    with connected(daemon) as raw:
        raw.sendall(head("POST", "/dwh/events-part", "Content-Length: 1000", "Expect: 100-continue"))
        assert rest_of(raw).startswith(b"HTTP/1.1 401 ")


def test_a_refusal_of_a_whole_request_leaves_the_connection_open(daemon: Daemon) -> None:
    with closing(http.client.HTTPConnection("127.0.0.1", daemon.port, timeout=10)) as connection:
        for _ in range(2):
            connection.request("DELETE", "/s3/delete?key=x")
            answer = connection.getresponse()
            assert (answer.status, answer.headers["Connection"], answer.read()[:9]) == (401, None, b'{"error":')


def test_probes_answer_behind_one_another_and_with_a_body(daemon: Daemon) -> None:
    probe = head("GET", "/health")
    with connected(daemon) as raw:
        raw.sendall(probe * 50 + head("HEAD", "/ready") + head("GET", "/ready", "Connection: close"))
        answer = rest_of(raw)
    assert answer.count(b"HTTP/1.1 200 OK") == 52
    assert answer.count(b'"status": "healthy"') == 50
    with connected(daemon) as raw:
        raw.sendall(head("GET", "/health", "Content-Length: 3", "Connection: close") + b"abc")
        assert rest_of(raw).startswith(b"HTTP/1.1 200 OK")
    with connected(daemon) as raw:
        raw.sendall(b"GET /health HTTP/1.0\r\nConnection: close\r\n\r\n")
        began = time.monotonic()
        assert b"nosniff" in rest_of(raw)
    assert time.monotonic() - began < 3


def test_a_port_of_their_own_answers_probes_and_nothing_else(daemons: Daemons) -> None:
    port = free_port()
    daemon = daemons.start(HEALTH_PORT=str(port))
    own = Daemon(port, daemon.process, daemon.log_path)
    assert own.get("/health").json["status"] == "healthy"
    assert set(own.get("/ready").json) >= {"ready", "checks"}
    for path in ("/", "/ops/jobs", "/docs"):
        assert (own.get(path).status, "/health" in own.get(path).json["error"]["hint"]) == (404, True)
    assert daemon.terminate() == 143


def test_a_port_of_their_own_that_is_taken_is_told(daemons: Daemons) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        daemon = daemons.start(wait=False, HEALTH_PORT=str(taken.getsockname()[1]))
        assert daemon.process.wait(30) == 3
    assert "HEALTH_PORT=" in daemon.log


def test_clients_that_do_not_read_take_no_download_from_others(daemon: Daemon) -> None:
    def unread() -> socket.socket:
        raw = connected(daemon, receives_bytes=4096)
        raw.sendall(head("GET", "/s3/download?key=x/big", SIGNED))
        return raw

    with many(150, unread):
        time.sleep(1)
        for _ in range(3):
            began = time.monotonic()
            assert daemon.get("/s3/download?key=x/small").text == "hello"
            assert time.monotonic() - began < 5
        assert daemon.get("/health").status == 200
        assert daemon.rss_mib < 400


@pytest.mark.parametrize("path", ["/dwh/user-locations", "/s3/upload?key=x/slow"])
def test_clients_that_send_slowly_take_no_place_from_others(daemon: Daemon, path: str) -> None:
    def slow() -> socket.socket:
        raw = connected(daemon)
        raw.sendall(head("POST", path, SIGNED, "Content-Type: application/json", "Content-Length: 1000") + b'{"data"')
        return raw

    with many(80, slow):
        began = time.monotonic()
        if path.startswith("/dwh"):
            assert daemon.post(path, {"data": [{"uuid": "0b1c6a6e-7c1d-4f2a-9d57-2f6f0a9a1b11"}]}).status == 200
        else:
            assert daemon.post(path + "2", {"a": 1}).status == 200
        assert time.monotonic() - began < 5


@pytest.mark.slow
def test_a_client_that_takes_nothing_of_its_answer_is_cut_off_and_a_slow_one_is_not(daemon: Daemon) -> None:
    asked = head("GET", "/s3/download?key=x/big", SIGNED)
    with connected(daemon, receives_bytes=4096) as unread, connected(daemon, receives_bytes=1 << 16) as slow:
        unread.sendall(asked)
        slow.sendall(asked)
        until = time.monotonic() + 45
        while time.monotonic() < until:
            assert slow.recv(1 << 14)
            time.sleep(0.2)
        with suppress(ConnectionError):
            assert len(rest_of(unread)) < 30 * MIB
        assert len(slow.recv(1 << 14)) > 0


@pytest.mark.slow
def test_a_body_that_brings_next_to_nothing_is_cut_off(daemon: Daemon) -> None:
    with connected(daemon) as raw:
        raw.sendall(head("POST", "/dwh/events-part", SIGNED, "Content-Length: 1000"))
        answered = False
        until = time.monotonic() + 60
        while time.monotonic() < until and not answered:
            raw.sendall(b" ")
            raw.settimeout(2)
            with suppress(TimeoutError):
                answered = raw.recv(1 << 16).startswith(b"HTTP/1.1 408 ")
        assert answered


@pytest.mark.slow
@pytest.mark.slow
def test_few_descriptors_and_many_idle_connections_leave_health_and_the_log_alone(tmp_path: Path) -> None:
    """Own start: with 256 descriptors, and with connections that are renewed as soon as they are closed."""
    with closing(Daemons(tmp_path)) as daemons:
        daemon = daemons.start(descriptors="256")
        pool: list[socket.socket] = []
        until = time.monotonic() + 6
        try:
            while time.monotonic() < until:
                pool.append(connected(daemon))
                if len(pool) % 50 == 0:
                    assert daemon.get("/health").status == 200
                if len(pool) > 600:
                    break
        finally:
            for each in pool:
                each.close()
        assert daemon.get("/ops/jobs").status == 200
        assert len(daemon.log) < 20_000
        assert "Traceback" not in daemon.log
