"""What goes wrong between a client, the daemon and its database: everything or nothing, 503 with a hint, then on."""

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import httpx
import pytest

from app.dwh.tables import EVENTS, LOCATIONS
from daemon import Daemon, Daemons
from effort import EFFORT
from fault_proxy import FaultProxy
from postgres import PostgresServer
from warehouse import ndjson, packed, rows_of, uuid_of

pytestmark = pytest.mark.slow

LINES = {"Content-Type": "application/x-ndjson"}


@pytest.fixture
def proxy(postgres_server: PostgresServer) -> Iterator[FaultProxy]:
    with FaultProxy(postgres_server.host, postgres_server.port, raw=True) as proxy:
        yield proxy


@pytest.fixture
def behind(daemons: Daemons, proxy: FaultProxy, postgres_server: PostgresServer) -> Daemon:
    """A daemon whose warehouse is reached through the proxy, warm."""
    name = postgres_server.new_database().rsplit("/", 1)[1]
    daemon = daemons.start(DWH_DATABASE_URL=f"postgresql://app@{proxy.host}:{proxy.port}/{name}")
    assert post(daemon, []).status_code == 400
    assert get(daemon)["count"] == 0
    return daemon


def post(daemon: Daemon, rows: list[dict[str, Any]], **how: Any) -> httpx.Response:
    return httpx.post(f"{daemon.url}/dwh/events-part", json={"data": rows}, timeout=60, **how)


def get(daemon: Daemon, **params: Any) -> dict[str, Any]:
    answer = httpx.get(f"{daemon.url}/dwh/events-part", params={"limit": 10_000, **params}, timeout=60)
    return dict(answer.json())


def retried(daemon: Daemon, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """As a client does that was told to come again."""
    for _ in range(200):
        answer = post(daemon, rows)
        if answer.status_code == 200:
            return dict(answer.json())
        assert answer.status_code == 503
        time.sleep(0.05)
    pytest.fail("never stored")


def test_a_connection_that_is_cut_in_mid_request_is_503_and_the_next_request_works(
    behind: Daemon, proxy: FaultProxy
) -> None:
    """The server's answers are cut after ever more bytes: at the sign-in, in the COPY, in the upsert, at the commit."""
    stored: set[str] = set()
    refused = 0
    for step, count_bytes in enumerate([0, 100, 400, 430, 450, 480, 500, 520, 560, 600, 640, 700, 800, 1000]):
        rows = rows_of(EVENTS, 20, first=step * 100)
        proxy.cut()
        proxy.drop_after(count_bytes)
        answer = post(behind, rows)
        keys = {row["uuid"] for row in rows}
        held = {row["uuid"] for row in get(behind)["rows"]}
        assert held & keys in (set(), keys)
        if answer.status_code == 503:
            refused += 1
            assert answer.json()["error"]["hint"]
            assert answer.headers["retry-after"]
            assert post(behind, rows).status_code == 200
        else:
            assert answer.status_code == 200
            assert held & keys == keys
        stored |= keys
    assert refused > 3
    read = [row["uuid"] for row in get(behind)["rows"]]
    assert len(read) == len(set(read))
    assert set(read) == stored


def test_a_commit_whose_answer_is_lost_is_not_stored_twice(behind: Daemon, proxy: FaultProxy) -> None:
    rows = rows_of(EVENTS, 20)
    key = {"Idempotency-Key": "lost"}
    proxy.lose_answer_to(b"COMMIT")
    assert post(behind, rows, headers=key).status_code == 503
    again = post(behind, rows, headers=key)
    assert again.status_code == 200
    assert again.json()["count"] == 20
    assert [row["id"] for row in get(behind)["rows"]][::-1] == again.json()["inserted_ids"]


def test_a_connection_that_is_cut_in_mid_answer_cuts_the_answer(behind: Daemon, proxy: FaultProxy) -> None:
    """Its first bytes have left by then, so that no status can tell; before them it is a 503."""
    for start in range(0, 30_000, 5000):
        assert post(behind, rows_of(EVENTS, 5000, first=start)).status_code == 200
    url = f"{behind.url}/dwh/events-part?format=ndjson&limit=100000"
    for count_bytes, cut in ((1000, False), (3_000_000, True)):
        proxy.cut()
        proxy.drop_after(count_bytes)
        with httpx.stream("GET", url, timeout=60) as answer:
            assert (answer.status_code, answer.headers.get("transfer-encoding")) == (
                (200, "chunked") if cut else (503, None)
            )
            with pytest.raises(httpx.RemoteProtocolError) if cut else nullcontext():
                answer.read()
    whole = httpx.get(url, timeout=60)
    assert (whole.content.count(b"\n"), whole.headers.get("link")) == (30_000, None)
    half = httpx.get(url.replace("100000", "15000"), timeout=60)
    assert (half.content.count(b"\n"), "after_id=15001" in half.headers["link"]) == (15_000, True)
    with socket.create_connection(("127.0.0.1", behind.port)) as client:
        client.sendall(b"GET /dwh/events-part?format=ndjson&limit=15000 HTTP/1.0\r\nHost: 127.0.0.1\r\n\r\n")
        assert b"content-length: %d\r\n" % len(half.content) in client.recv(4096).lower()


def test_while_the_database_is_away_requests_are_503_and_readiness_says_so(behind: Daemon, proxy: FaultProxy) -> None:
    proxy.refuse()
    refused = post(behind, rows_of(EVENTS, 2))
    assert (refused.status_code, "DWH_DATABASE_URL" in refused.json()["error"]["hint"]) == (503, True)
    assert httpx.get(f"{behind.url}/dwh/events-part").status_code == 503
    assert httpx.get(f"{behind.url}/health").status_code == 200
    behind.until(lambda: not behind.get("/ready").json["checks"]["dwh_connected"])
    proxy.allow()
    assert post(behind, rows_of(EVENTS, 2)).status_code == 200


def test_restarts_of_the_server_in_mid_request_lose_and_double_nothing(
    behind: Daemon, postgres_server: PostgresServer
) -> None:
    done = threading.Event()
    stored: list[int] = []

    def client(number: int) -> None:
        step = 0
        while not done.is_set():
            rows = rows_of(EVENTS, 300, first=number * 100_000 + step * 200)
            stored.extend(retried(behind, rows)["inserted_ids"])
            step += 1

    with ThreadPoolExecutor(4) as pool:
        clients = [pool.submit(client, number) for number in range(4)]
        for _ in range(3):
            time.sleep(0.4)
            postgres_server.restart_immediately()
        time.sleep(0.3)
        done.set()
        for each in clients:
            each.result(60)
    read: list[dict[str, Any]] = []
    while page := get(behind, **({"after_id": read[-1]["id"]} if read else {}))["rows"]:
        read += page
    keys = [row["uuid"] for row in read]
    assert len(keys) == len(set(keys))
    assert set(stored) <= {row["id"] for row in read}
    assert len(read) % 100 == 0


@pytest.mark.slow
@pytest.mark.parametrize("dialect", ["sqlite", "postgres"])
def test_a_daemon_that_is_killed_has_stored_whole_requests_only(
    daemons: Daemons, dialect: str, request: pytest.FixtureRequest
) -> None:
    environ = {}
    if dialect == "postgres":
        environ["DWH_DATABASE_URL"] = request.getfixturevalue("postgres_server").new_database()
    for step in range(3 * EFFORT):
        daemon = daemons.start("", wait=True, key="", **environ)
        rows = rows_of(EVENTS, 400, first=step * 1000)
        killer = threading.Timer(0.02 + step * 0.05, os.kill, (daemon.process.pid, signal.SIGKILL))
        post_in_parts = [rows[start : start + 100] for start in range(0, 400, 100)]
        killer.start()
        try:
            for part in post_in_parts:
                post(daemon, part)
        except httpx.TransportError:
            pass
        killer.join()
        daemon.process.wait(10)
        again = daemons.start("", wait=True, key="", **environ)
        keys = [row["uuid"] for row in get(again)["rows"]]
        assert len(keys) == len(set(keys))
        for part in post_in_parts:
            assert {row["uuid"] for row in part} & set(keys) in (set(), {row["uuid"] for row in part})
        assert sum(post(again, part).json()["count"] for part in post_in_parts) == 400 * (step + 1) - len(keys)
        again.kill()


def test_a_client_that_leaves_in_mid_body_stores_nothing(served: httpx.Client) -> None:
    rows = [{"uuid": uuid_of(77_000_000 + n)} for n in range(50)]
    body = ndjson(rows)
    host, port = served.base_url.host, served.base_url.port
    with socket.create_connection((host, port or 80)) as client:
        head = f"POST /dwh/user-locations HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/x-ndjson\r\n"
        client.sendall(f"{head}Content-Length: {len(body) + 1}\r\n\r\n".encode() + body)
        time.sleep(0.2)
    for _ in range(5):
        found = served.get("/dwh/user-locations", params={"uuid": rows[0]["uuid"]}).json()
        assert found["count"] == 0
    assert served.post("/dwh/user-locations", content=body, headers=LINES).json()["count"] == 50


@pytest.mark.slow
def test_bodies_that_are_far_too_large_are_refused_with_little_memory(daemons: Daemons) -> None:
    """A gigabyte, said and not said beforehand, packed and not, in one row and in many; then what is no JSON."""
    daemon = daemons.start()
    assert post(daemon, rows_of(EVENTS, 10)).status_code == 200
    before = daemon.rss_mib
    piece = b" " * (1 << 20)
    url = f"{daemon.url}/dwh/events-part"

    def endless() -> Iterator[bytes]:
        yield b'{"data":['
        yield from (piece for _ in range(1024))

    def refused(content: Any, **headers: str) -> int:
        try:
            return httpx.post(url, content=content, headers=headers, timeout=60).status_code
        except (httpx.WriteError, httpx.ReadError):
            return 413  # it was answered and closed while we were still sending

    started = time.monotonic()
    assert refused(endless(), **{"Content-Type": "application/json"}) == 413
    assert refused(endless(), **{"Content-Type": "application/json", "Content-Length": str((1 << 30) + 9)}) == 413
    assert refused(endless(), **LINES) == 413
    assert refused(b'uuid\n"' + b"x" * (17 << 20), **{"Content-Type": "text/csv"}) == 413
    bomb = packed(b" " * (1 << 27))
    for media in ("application/json", "application/x-ndjson"):
        assert refused(bomb, **{"Content-Type": media, "Content-Encoding": "gzip"}) == 413
    hostile = [
        b'{"data":' + b"[" * 9_000_000,
        b'{"data":[{"a":' + b'{"a":' * 1_500_000,
        b'{"data":[{"event_id":' + b"9" * 9_000_000 + b"}]}",
        b'{"data":[{"event_id":NaN}]}',
        b'{"data":[{"uuid":"\xff\xfe"}]}',
        '{"data":[{}]}'.encode("utf-16"),
    ]
    assert {refused(body, **{"Content-Type": "application/json"}) for body in hostile} <= {400, 422}
    assert time.monotonic() - started < 60
    assert daemon.rss_mib - before < 64
    assert peak_mib(daemon) - before < 96  # all of them in turn; each row or body may have 10 MiB


@pytest.mark.slow
@pytest.mark.parametrize("dialect", ["sqlite", "postgres"])
def test_memory_does_not_grow_with_a_streamed_body(
    daemons: Daemons, dialect: str, request: pytest.FixtureRequest
) -> None:
    environ = {}
    if dialect == "postgres":
        environ["DWH_DATABASE_URL"] = request.getfixturevalue("postgres_server").new_database()
    daemon = daemons.start("", wait=True, key="", **environ)
    url = f"{daemon.url}/dwh/user-locations"
    peaks = []
    for first, count in ((0, 20_000), (1_000_000, 20_000), (2_000_000, 100_000)):

        def lines(first: int = first, count: int = count) -> Iterator[bytes]:
            for start in range(first, first + count, 1000):
                yield ndjson(rows_of(LOCATIONS, 1000, first=start))

        answer = httpx.post(url, content=lines(), headers=LINES, timeout=120).json()
        assert (answer["count"], answer["batches"]) == (count, count // 1000)
        peaks.append(peak_mib(daemon))
    assert peaks[2] - peaks[1] < 16
    got = httpx.get(url, params={"format": "ndjson", "limit": 250_000}, timeout=120).content
    assert got.count(b"\n") == 140_000
    assert peak_mib(daemon) - peaks[2] < 16
    assert json.loads(got.split(b"\n", 1)[0])["uuid"] == uuid_of(2_099_999)


def peak_mib(daemon: Daemon) -> float:
    with open(f"/proc/{daemon.process.pid}/status", encoding="ascii") as status:  # noqa: PTH123
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmHWM"))
