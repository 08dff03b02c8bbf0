"""HTTP as it arrives at the running daemon, byte by byte: what is no clean request is refused, bodies arrive whole."""

import socket
from collections.abc import Iterator, Sequence
from contextlib import closing
from hashlib import sha256
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from daemon import Daemon, Daemons

KEY = "hw_root_" + ("root" * 11)[:43]
HOST = b"Host: localhost\r\n"
FILLED = b"".join(b"X-%d: %s\r\n" % (number, b"v" * 1000) for number in range(70))


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with closing(Daemons(tmp_path_factory.mktemp("protocol"))) as daemons:
        yield daemons.start(key=KEY, API_KEYS=f"root:admin:{sha256(KEY.encode()).hexdigest()}")


def answers(daemon: Daemon, sent: Sequence[bytes]) -> bytes:
    """All that comes back until the daemon closes."""
    answer = b""
    with socket.create_connection(("127.0.0.1", daemon.port), timeout=10) as raw:
        for piece in sent:
            raw.sendall(piece)
        while chunk := raw.recv(1 << 16):
            answer += chunk
    return answer


@pytest.mark.parametrize(
    "head",
    {
        "a head that is too large": HOST + FILLED,
        "no host": b"Accept: */*\r\n",
        "two hosts": HOST + HOST,
        "two lengths": HOST + b"Content-Length: 1\r\nContent-Length: 2\r\n",
        "a length beside chunks": HOST + b"Content-Length: 1\r\nTransfer-Encoding: chunked\r\n",
        "a transfer coding that is not undone": HOST + b"Transfer-Encoding: gzip, chunked\r\n",
        "a control character": HOST + b"X: a\0b\r\n",
        "a folded field": HOST + b"X: a\r\n b\r\n",
        "a blank before the colon": HOST + b"X : a\r\n",
    }.items(),
    ids=lambda named: named[0],
)
def test_what_is_no_clean_request_is_refused_and_the_connection_closed(daemon: Daemon, head: tuple[str, bytes]) -> None:
    assert answers(daemon, [b"GET /health HTTP/1.1\r\n", head[1] + b"\r\n"]).startswith(b"HTTP/1.1 400 ")


def test_a_head_that_never_ends_is_cut_off(daemon: Daemon) -> None:
    with socket.create_connection(("127.0.0.1", daemon.port), timeout=10) as raw:
        raw.sendall(b"GET /health HTTP/1.1\r\nX: ")
        with pytest.raises(ConnectionError):
            raw.sendall(b"v" * (64 << 20))  # far more than the kernel holds between the two


def test_fields_behind_a_body_open_nothing(daemon: Daemon) -> None:
    head = b"POST /s3/upload?key=trailed HTTP/1.1\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n" + HOST
    ending = b"\r\n1\r\nx\r\n0\r\nX-API-Key: " + KEY.encode() + b"\r\n\r\n"
    assert answers(daemon, [head + ending]).startswith(b"HTTP/1.1 401 ")


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.lists(st.sampled_from([1, 1, 2, 500, 70_000, 300_000]), min_size=1, max_size=12),
    cuts=st.lists(st.integers(0, 1 << 20), max_size=6),
)
def test_a_body_in_chunks_of_any_size_arrives_whole_and_so_does_the_request_behind_it(
    daemon: Daemon, sizes: list[int], cuts: list[int]
) -> None:
    blocks = [bytes([65 + number % 26]) * size for number, size in enumerate(sizes)]
    body = b"".join(b"%x\r\n%s\r\n" % (len(block), block) for block in blocks) + b"0\r\n\r\n"
    key = b"X-API-Key: %s\r\n" % KEY.encode()
    put = b"POST /s3/upload?key=chunks HTTP/1.1\r\nTransfer-Encoding: chunked\r\n" + HOST + key + b"\r\n" + body
    get = b"GET /s3/download?key=chunks HTTP/1.1\r\nConnection: close\r\n" + HOST + key + b"\r\n"
    sent = put + get
    edges = [0, *sorted(cut % len(sent) for cut in cuts), len(sent)]
    answer = answers(daemon, [sent[start:end] for start, end in pairwise(edges)])
    assert answer.count(b"HTTP/1.1 200 ") == 2
    assert answer.endswith(b"\r\n\r\n" + b"".join(blocks))
