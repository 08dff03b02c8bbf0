"""Large bodies, slow clients, clients and processes that vanish: flat memory, nothing half done, nothing left."""

import hashlib
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from daemon import Daemon, Daemons
from objects_served import MIB, bucket_environ, held_parts, peak_mib
from seaweed import Seaweed

BLOCK = os.urandom(MIB)


@pytest.fixture
def bucket(seaweed: Seaweed) -> str:
    return seaweed.new_bucket()


@pytest.fixture
def daemon(daemons: Daemons, seaweed: Seaweed, bucket: str) -> Daemon:
    environ = bucket_environ(seaweed, bucket)
    started = daemons.start("", wait=True, key="", **environ)
    started.until(lambda: started.get("/ready").json["checks"]["s3_accessible"], 60)
    started.get("/s3/objects")
    return started


def blocks(count: int) -> Iterator[bytes]:
    for number in range(count):
        yield number.to_bytes(8) + BLOCK[8:]


def begun(daemon: Daemon, key: str, sent: bytes, promised_bytes: int) -> socket.socket:
    """An upload that has sent only a part of what it promised."""
    connection = socket.create_connection(("127.0.0.1", daemon.port))
    head = f"POST /s3/upload?key={key} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {promised_bytes}\r\n\r\n"
    connection.sendall(head.encode() + sent)
    return connection


@pytest.mark.slow
def test_a_large_body_goes_through_with_flat_memory_both_ways(daemon: Daemon) -> None:
    count = 300
    wanted = hashlib.blake2b()
    for block in blocks(count):
        wanted.update(block)
    idle_mib = daemon.rss_mib
    with httpx.Client(base_url=f"{daemon.url}/s3", timeout=120) as client:
        sent = client.post("/upload", params={"key": "large"}, content=blocks(count))
        assert sent.json()["size"] == count * MIB
        assert peak_mib(daemon) - idle_mib <= 64
        Path(f"/proc/{daemon.process.pid}/clear_refs").write_text("5")
        between_mib = daemon.rss_mib
        got = hashlib.blake2b()
        with client.stream("GET", "/download", params={"key": "large"}) as answer:
            for piece in answer.iter_bytes():
                got.update(piece)
        assert got.digest() == wanted.digest()
        assert peak_mib(daemon) - between_mib <= 16
        Path(f"/proc/{daemon.process.pid}/clear_refs").write_text("5")
        patched = client.patch("/patch", params={"key": "large", "offset": 150 * MIB}, content=b"x")
        assert patched.json()["guarded"]
        assert peak_mib(daemon) - idle_mib <= 48  # what the upload left in the heap included
        around = client.get("/download", params={"key": "large"}, headers={"Range": "bytes=157286399-157286401"})
        assert around.content == (BLOCK[-1:] + b"x" + (150).to_bytes(8)[1:2])


@pytest.mark.slow
def test_a_client_that_vanishes_leaves_no_parts_behind(daemon: Daemon, seaweed: Seaweed, bucket: str) -> None:
    httpx.post(f"{daemon.url}/s3/upload", params={"key": "k"}, content=b"old")
    connection = begun(daemon, "k", BLOCK * 20, 100 * MIB)
    daemon.until(lambda: held_parts(seaweed, bucket), 30)
    connection.close()
    daemon.until(lambda: not held_parts(seaweed, bucket), 30)
    assert httpx.get(f"{daemon.url}/s3/download", params={"key": "k"}).content == b"old"


@pytest.mark.slow
def test_a_killed_daemon_leaves_the_old_object_and_parts_that_the_sweep_can_see(
    daemon: Daemon, daemons: Daemons, seaweed: Seaweed, bucket: str
) -> None:
    httpx.post(f"{daemon.url}/s3/upload", params={"key": "k"}, content=b"old")
    with begun(daemon, "k", BLOCK * 20, 100 * MIB):
        daemon.until(lambda: held_parts(seaweed, bucket), 30)
        daemon.kill()
    environ = bucket_environ(seaweed, bucket)
    again = daemons.start("", wait=True, key="", **environ)
    assert httpx.get(f"{again.url}/s3/download", params={"key": "k"}, timeout=30).content == b"old"
    again.until(lambda: [each["outcome"] for each in again.get("/ops/runs?job=s3_sweep").json["runs"]] == ["ok"], 30)
    assert held_parts(seaweed, bucket) == ["k"]  # too young to be swept


@pytest.mark.slow
def test_fifty_slow_clients_cost_little_and_keep_nobody_waiting(daemon: Daemon) -> None:
    idle_mib = daemon.rss_mib
    with ExitStack() as stack:
        for number in range(50):
            stack.enter_context(begun(daemon, f"slow{number}", BLOCK[: 900 * 1024], 100 * MIB))
        for number in range(20):
            assert daemon.get("/health").status == 200
            sent = httpx.post(f"{daemon.url}/s3/upload", params={"key": f"quick{number}"}, content=BLOCK, timeout=10)
            assert sent.status_code == 200
        assert daemon.rss_mib - idle_mib <= 150
    found = daemon.until(lambda: daemon.get("/s3/objects?prefix=quick").json)
    assert found["count"] == 20
    assert daemon.get("/s3/objects?prefix=slow").json["count"] == 0
