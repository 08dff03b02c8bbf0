"""Servers and load for bench/analytics.py: a bucket of objects, plain DuckDB behind HTTP, Headwater itself."""

import asyncio
import io
import os
import random
import signal
import socket
import sqlite3
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import health
from measured import clean_environ

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))

from seaweed import Seaweed

PREFIX = "telemetry"
START = datetime(2026, 1, 1, tzinfo=UTC)
DEVICES = 20
WAIT_SECONDS = 120.0
PLAIN = r"""
import asyncio, json, os, sys
import duckdb, uvicorn
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import duckdb_extension_httpfs
port, bucket, endpoint, key, secret, cache = sys.argv[1:7]
keys = json.loads(Path(sys.argv[7]).read_text())
queries = json.loads(Path(sys.argv[8]).read_text())
extension = next(Path(next(iter(duckdb_extension_httpfs.__path__))).rglob("httpfs.duckdb_extension"))
connection = duckdb.connect()
connection.execute(f"LOAD '{extension}'")
connection.execute("SET TimeZone = 'UTC'")
connection.execute("SET GLOBAL threads = 8")
connection.execute(f"SET GLOBAL enable_external_file_cache = {cache}")
connection.execute(f"CREATE SECRET s (TYPE s3, KEY_ID '{key}', SECRET '{secret}', REGION 'us-east-1', "
    f"ENDPOINT '{endpoint}', URL_STYLE 'path', USE_SSL false)")
listed = "[" + ", ".join(f"'s3://{bucket}/{name}'" for name in keys) + "], union_by_name = true"
pool = ThreadPoolExecutor(8)
def run(name):
    sql = queries[name].replace("{{S3_PATH}}", listed)
    limits = {each: None for each in ("device_id", "from", "to") if f"${each}" in sql}
    return json.dumps(connection.cursor().execute(sql, limits or None).fetchall(), default=str).encode()
async def app(scope, receive, send):
    if scope["type"] != "http":
        return
    name = scope["path"].strip("/")
    body = b"ok" if name == "health" else await asyncio.get_running_loop().run_in_executor(pool, run, name)
    await send({"type": "http.response.start", "status": 200,
        "headers": [(b"content-length", str(len(body)).encode())]})
    await send({"type": "http.response.body", "body": body})
uvicorn.run(app, host="127.0.0.1", port=int(port), log_level="error", lifespan="off")
"""


def free_port() -> int:
    """A port of loopback that nobody listens on now."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port: int = held.getsockname()[1]
        return port


def fill(server: Seaweed, bucket: str, objects: int, rows: int, folder: Path) -> Sequence[str]:
    """Put hourly objects of some devices, and a copy of each into a folder; their keys."""
    draw = random.Random(1)
    names: list[str] = []
    with closing(server.client()) as client, ThreadPoolExecutor(8) as pool:
        for number in range(objects):
            name, content = hourly(number, rows, draw)
            names.append(name)
            (folder / f"{number}.parquet").write_bytes(content)
            pool.submit(client.put_object, Bucket=bucket, Key=name, Body=content)
    return names


def hourly(number: int, rows: int, draw: random.Random) -> tuple[str, bytes]:
    """Key and content of one object: an hour of one device."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    device, start = number % DEVICES, START + timedelta(hours=number // DEVICES)
    times = [start + timedelta(seconds=3600 * row / rows) for row in range(rows)]
    columns: dict[str, Any] = {
        "timestamp": pa.array(times, pa.timestamp("ns", "UTC")),
        "device_id": [f"D{device}"] * rows,
        **{name: [draw.random() for _ in times] for name in ("voltage", "current", "power", "temperature", "soc")},
    }
    file = io.BytesIO()
    pq.write_table(pa.table(columns), file, compression="zstd")
    return f"{PREFIX}/device_id=D{device}/date={start:%Y/%m/%d}/export_{start:%H%M%S}.parquet", file.getvalue()


def into_sqlite(files: Sequence[Path], database: Path) -> None:
    """The rows of all files in one table, along the index that the reports need."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with closing(sqlite3.connect(database)) as connection, connection:
        connection.execute(
            "CREATE TABLE telemetry (timestamp TEXT, device_id TEXT, voltage, current, power, temperature, soc)"
        )
        for file in files:
            table = pq.read_table(file)
            seconds = table["timestamp"].cast(pa.timestamp("us")).to_pylist()
            rows = zip(
                (at.isoformat() for at in seconds), *(column.to_pylist() for column in table.columns[1:]), strict=True
            )
            connection.executemany("INSERT INTO telemetry VALUES (?, ?, ?, ?, ?, ?, ?)", rows)
        connection.execute("CREATE INDEX by_device ON telemetry (device_id, timestamp)")


@contextmanager
def serving(command: Sequence[str], port: int, environ: Mapping[str, str]) -> Iterator["subprocess.Popen[bytes]"]:
    """A server until the block ends."""
    child = subprocess.Popen(command, env={**clean_environ(), **environ}, stdout=subprocess.DEVNULL)
    try:
        until = time.monotonic() + WAIT_SECONDS
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except urllib.error.HTTPError as error:
                error.close()
                break  # it answers, if not to this
            except (urllib.error.URLError, OSError):
                if time.monotonic() > until or child.poll() is not None:
                    sys.exit(f"{command[0]} does not answer")
                time.sleep(0.02)
        yield child
    finally:
        child.send_signal(signal.SIGTERM)
        try:
            child.wait(30)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def cpu_seconds(pid: int) -> float:
    """User and system time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def peak_mib(pid: int) -> float:
    """Peak resident memory of a process."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


@dataclass(frozen=True, slots=True)
class Load:
    """What clients saw. `inside_ms` is the median of what the server itself measured, where it says so."""

    requests: int
    seconds: float
    p50_ms: float
    cpu_ms: float
    inside_ms: float
    health_p99_ms: float

    @property
    def rate(self) -> float:
        """Requests per second."""
        return self.requests / self.seconds


def load(child: "subprocess.Popen[bytes]", port: int, path: str, clients: int, seconds: float) -> Load:
    """So many clients, each asking again as soon as it was answered, and one that asks /health meanwhile.

    `path` is asked for; with a line behind it, that is sent as the body of a POST.
    """
    pid = child.pid
    before = cpu_seconds(pid)
    began = time.monotonic()
    taken, inside, health_p99_ms = asyncio.run(_load(port, path, clients, seconds))
    used = cpu_seconds(pid) - before
    return Load(
        requests=len(taken),
        seconds=time.monotonic() - began,
        p50_ms=statistics.median(taken) * 1000,
        cpu_ms=used / len(taken) * 1000,
        inside_ms=statistics.median(inside) if inside else 0.0,
        health_p99_ms=health_p99_ms,
    )


async def _load(port: int, path: str, clients: int, seconds: float) -> tuple[list[float], list[float], float]:
    until = time.monotonic() + seconds
    taken: list[float] = []
    inside: list[float] = []
    asking = [_client(port, path, until, (taken, inside)) for _ in range(clients)]
    waiting = asyncio.ensure_future(health.waits(port, seconds))
    await asyncio.gather(*asking)
    return taken, inside, (await waiting).p99_ms


async def _client(port: int, path: str, until: float, into: tuple[list[float], list[float]]) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 24)
    taken, inside = into
    where, _, body = path.partition("\n")
    line = f"POST {where} HTTP/1.1\r\nContent-Length: {len(body)}" if body else f"GET {where} HTTP/1.1"
    request = f"{line}\r\nHost: 127.0.0.1\r\n\r\n{body}".encode()
    while True:
        began = time.monotonic()
        writer.write(request)
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        fields = dict(line.split(": ", 1) for line in head.split("\r\n")[1:] if ": " in line)
        await _body(reader, fields)
        if " 200 " not in head.split("\r\n")[0] + " ":
            sys.exit(f"{path}: {head}")
        taken.append(time.monotonic() - began)
        if "server-timing" in fields:
            inside.append(float(fields["server-timing"].rpartition("=")[2]))
        if time.monotonic() > until:
            break
    writer.close()


async def _body(reader: asyncio.StreamReader, fields: Mapping[str, str]) -> None:
    if "content-length" in fields:
        await reader.readexactly(int(fields["content-length"]))
        return
    while size := int(await reader.readuntil(b"\r\n"), 16):
        await reader.readexactly(size + 2)
    await reader.readuntil(b"\r\n")
