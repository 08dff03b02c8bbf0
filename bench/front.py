"""Runs 1,000 connections that are idle, send slowly or do not read, alongside 64 working clients.

`uv run python bench/front.py [--minutes 3] [--bad 1000] [--clients 64]`. The daemon runs as a user would run it; a bare
uvicorn application answers the same probe on the same machine in the same run. Exits with 1 when a goal is missed:
/health within three times the bare application's latency, no client errors, flat memory and descriptors, a short log.
Other load on the machine disturbs the busy daemon more than the idle application.
"""

import argparse
import asyncio
import hashlib
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from uuid import uuid4

from health import Waits, waits
from idle import WAIT_SECONDS, answered, free_port
from measured import Goal, clean_environ

KEY = "hw_bench_" + ("bench" * 9)[:43]
BARE = """
import sys, uvicorn
async def app(scope, receive, send):
    if scope["type"] == "http":
        head = [(b"content-type", b"application/json"), (b"content-length", b"20")]
        await send({"type": "http.response.start", "status": 200, "headers": head})
        await send({"type": "http.response.body", "body": b'{"status":"healthy"}'})
uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), lifespan="off", log_level="warning", access_log=False)
"""
BIG_BYTES = 60 << 20
LOG_BYTES = 100_000
RENEW_SECONDS = 0.5
SAMPLE_SECONDS = 1.0
SIGNED = f"X-API-Key: {KEY}"
COMMON = "Host: localhost\r\n"
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@dataclass
class Seen:
    """What came of it. `statuses` of the clients that work, by what they asked; samples of the daemon."""

    statuses: Counter[str] = field(default_factory=Counter)
    renewed: int = 0
    memory_mib: list[float] = field(default_factory=list)
    descriptors: list[int] = field(default_factory=list)


async def bad(number: int, port: int, until: float, seen: Seen) -> None:
    """One connection that is of no use, opened again whenever the daemon closes it."""
    while time.monotonic() < until:
        with suppress(OSError, TimeoutError):
            reader, writer = (
                await unread_socket(port) if number % 5 == 4 else await asyncio.open_connection("127.0.0.1", port)
            )
            try:
                await KINDS[number % 5](reader, writer, until)
            finally:
                writer.transport.abort()
        seen.renewed += 1
        await asyncio.sleep(RENEW_SECONDS)


async def unread_socket(port: int) -> Streams:
    """A connection with little room in its kernel, so that an answer stays with the daemon."""
    raw = socket.socket()
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    raw.settimeout(0)
    await asyncio.get_running_loop().sock_connect(raw, ("127.0.0.1", port))
    return await asyncio.open_connection(sock=raw, limit=1024)


async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, until: float) -> None:
    """Says nothing."""
    del writer
    async with asyncio.timeout(until - time.monotonic()):
        await reader.read(1)


async def trickled(writer: asyncio.StreamWriter, head: str, rest: str, until: float) -> None:
    """Send `head` at once and `rest` a byte a second."""
    writer.write(head.encode())
    for byte in rest.encode():
        if time.monotonic() > until or writer.is_closing():
            return
        writer.write(bytes([byte]))
        await writer.drain()
        await asyncio.sleep(1)


async def slow_head(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, until: float) -> None:
    """A head that does not end."""
    del reader
    await trickled(writer, "GET /health HTTP/1.1\r\n", f"{COMMON}X-Slow: {'x' * 600}", until)


async def slow_body(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, until: float) -> None:
    """A body that does not end, of somebody who may post."""
    del reader
    head = f"POST /dwh/events-part HTTP/1.1\r\n{COMMON}{SIGNED}\r\nContent-Length: 100000\r\n\r\n"
    await trickled(writer, head, '{"data":[' + " " * 600, until)


async def refused_body(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, until: float) -> None:
    """A body that does not end, of somebody without a key."""
    del reader
    head = f"POST /s3/upload?key=x HTTP/1.1\r\n{COMMON}Content-Length: 100000\r\n\r\n"
    await trickled(writer, head, "x" * 600, until)


async def unread(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, until: float) -> None:
    """Asks for much and reads next to nothing."""
    what = random.choice(("/s3/download?key=bench/big", "/dwh/events-part?limit=10000"))
    writer.write(f"GET {what} HTTP/1.1\r\n{COMMON}{SIGNED}\r\n\r\n".encode())
    await reader.read(1)
    writer.transport.pause_reading()  # type: ignore[attr-defined]
    await asyncio.sleep(min(60, max(until - time.monotonic(), 0)))


KINDS: Sequence[Callable[[asyncio.StreamReader, asyncio.StreamWriter, float], Awaitable[None]]] = (
    silent,
    slow_head,
    slow_body,
    refused_body,
    unread,
)


async def client(port: int, until: float, seen: Seen) -> None:
    """One client that works: posts a row, reads it, uploads, downloads, asks for a report. A new connection each time,
    as most programs do, but for requests in a row.
    """
    while time.monotonic() < until:
        row = {"uuid": str(uuid4()), "event_type": "bench"}
        for method, path, body in (
            ("POST", "/dwh/events-part", json.dumps({"data": [row]})),
            ("GET", f"/dwh/events-part?uuid={row['uuid']}", ""),
            ("POST", f"/s3/upload?key=bench/{row['uuid'][:2]}", "x" * 2000),
            ("GET", f"/s3/download?key=bench/{row['uuid'][:2]}", ""),
            ("GET", "/analytics/overview", ""),
        ):
            seen.statuses[f"{await asked(port, method, path, body)} {method} {path.partition('?')[0]}"] += 1
            await asyncio.sleep(random.uniform(0.5, 1.5))


async def asked(port: int, method: str, path: str, body: str) -> str:
    """The status of one request, or the name of what went wrong."""
    kind = "application/json" if path.startswith("/dwh") else "application/octet-stream"
    fields = f"{COMMON}{SIGNED}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n"
    head = f"{method} {path} HTTP/1.1\r\n{fields}\r\n"
    try:
        async with asyncio.timeout(WAIT_SECONDS):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                writer.write((head + body).encode())
                answer = await reader.read()
            finally:
                writer.close()
    except (OSError, TimeoutError) as error:
        return type(error).__name__
    return answer[9:12].decode() or "nothing"


async def watched(pid: int, until: float, seen: Seen) -> None:
    """Look at the daemon once a second."""
    while time.monotonic() < until:
        memory_mib, descriptors = looked(pid)
        seen.memory_mib.append(memory_mib)
        seen.descriptors.append(descriptors)
        await asyncio.sleep(SAMPLE_SECONDS)


def looked(pid: int) -> tuple[float, int]:
    """Resident MiB and open descriptors of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / (1 << 20), len(list(Path(f"/proc/{pid}/fd").iterdir()))


async def loaded(ports: tuple[int, int], pid: int, given: argparse.Namespace) -> tuple[Seen, Waits, Waits]:
    """All of it at once; what was seen, and what /health took of the daemon and of the bare application."""
    port, bare_port = ports
    seconds = given.minutes * 60
    until = time.monotonic() + seconds
    seen = Seen()
    work = [
        *(bad(number, port, until, seen) for number in range(given.bad)),
        *(client(port, until, seen) for _ in range(given.clients)),
        watched(pid, until, seen),
    ]
    both = asyncio.gather(waits(port, seconds), waits(bare_port, seconds))
    await asyncio.gather(*work)
    ours, bare = await both
    return seen, ours, bare


def goals(seen: Seen, ours: Waits, bare: Waits, log_bytes: int) -> Sequence[Goal]:
    """What must hold. Memory and descriptors: the last third of the samples against the middle one."""
    third = max(len(seen.memory_mib) // 3, 1)
    middle, last = slice(third, 2 * third), slice(-third, None)
    errors = sum(count for status, count in seen.statuses.items() if not status.startswith("2"))
    grown_mib = max(seen.memory_mib[last]) - max(seen.memory_mib[middle])
    grown_descriptors = max(seen.descriptors[last]) - max(seen.descriptors[middle])
    return [
        Goal("p99 of /health against a bare application", ours.p99_ms / max(bare.p99_ms, 1.0), 3, at_least=False),
        Goal("errors of clients that work", errors, 0, at_least=False),
        Goal("answers to them", sum(seen.statuses.values()), 1),
        Goal("growth of memory in the last third", grown_mib, 32, at_least=False, unit=" MiB"),
        Goal("growth of descriptors in the last third", grown_descriptors, 64, at_least=False),
        Goal("log", log_bytes, LOG_BYTES, at_least=False, unit=" bytes"),
    ]


def measure(given: argparse.Namespace) -> int:
    """Run it all and print; 1 when a goal is missed."""
    with tempfile.TemporaryDirectory(prefix="headwater-front-") as folder:
        data = Path(folder) / "data"
        (data / "objects" / "bench").mkdir(parents=True)
        with (data / "objects" / "bench" / "big").open("wb") as big:
            big.truncate(BIG_BYTES)
        port, bare_port, log_path = free_port(), free_port(), Path(folder) / "log"
        own = {
            "PORT": str(port),
            "DATA_DIR": str(data),
            "LOG_FILE": "off",
            "API_KEYS": f"bench:admin:{hashlib.sha256(KEY.encode()).hexdigest()}",
        }
        with log_path.open("wb") as log:
            daemon = subprocess.Popen(
                [sys.executable, "-m", "app"], env={**clean_environ(), **own}, cwd=folder, stdout=log, stderr=log
            )
            bare = subprocess.Popen([sys.executable, "-c", BARE, str(bare_port)], cwd=folder, stdout=log, stderr=log)
        try:
            for each in (port, bare_port):
                answered(each, time.monotonic() + WAIT_SECONDS)
            filled(port)
            seen, ours, theirs = asyncio.run(loaded((port, bare_port), daemon.pid, given))
        finally:
            for process in (daemon, bare):
                process.terminate()
                process.wait(WAIT_SECONDS)
        found = goals(seen, ours, theirs, log_path.stat().st_size)
    print("| /health | p50 ms | p99 ms |\n|---|---|---|")
    print(f"| daemon | {ours.p50_ms:.1f} | {ours.p99_ms:.1f} |\n| bare | {theirs.p50_ms:.1f} | {theirs.p99_ms:.1f} |\n")
    print(
        f"{seen.renewed} bad connections were opened again; memory at most {max(seen.memory_mib):.0f} MiB, "
        f"{max(seen.descriptors)} descriptors\n"
    )
    print("\n".join(f"- {count} x {status}" for status, count in sorted(seen.statuses.items())))
    print("\n" + "\n".join(f"- {goal}" for goal in found))
    return 0 if all(goal.met for goal in found) else 1


def filled(port: int) -> None:
    """Rows enough that an answer does not fit into the kernel's buffers."""
    rows = [{"uuid": str(uuid4()), "event_type": "bench", "language": "x" * 100} for _ in range(10_000)]
    status = asyncio.run(asked(port, "POST", "/dwh/events-part", json.dumps({"data": rows})))
    if status != "200":
        sys.exit(f"the rows were not stored: {status}")


def main(arguments: Sequence[str] | None = None) -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--bad", type=int, default=1000)
    parser.add_argument("--clients", type=int, default=64)
    return measure(parser.parse_args(arguments))


if __name__ == "__main__":
    sys.exit(main())
