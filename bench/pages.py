"""Cost of the first view of the overview with many partitions: bytes, and server CPU.

`uv run python bench/pages.py [--partitions 1000 100000]`. Runs Headwater's daemon with paused jobs on an SQLite state
of 30 days: hourly objects below 10,000 partitions, daily objects from there on. Requests what the page requests when it
opens on 30 days; gzip is not counted, since the daemon sends none.
"""

import argparse
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from measured import Goal, clean_environ

DAYS = 30
BIG = 10_000
JOB = "influx_to_s3"
WAIT_SECONDS = 120.0
VIEW = (
    "/ops/session",
    "/ops/summary?tz=Europe/Berlin",
    "/ops/verifications",
    f"/ops/map?job={JOB}&span=30d&tz=Europe/Berlin",
    "/ops/history?limit=50",
    "/ops/runs?limit=12&news=true",
    "/ready",
    "/health",
)
LIMITS = {False: (100, 0.2), True: (200, 1.0)}  # kB and CPU seconds, by whether it is big
ENVIRON = {
    "INFLUXDB_URL": "http://127.0.0.1:9",
    "INFLUXDB_TOKEN": "token",
    "INFLUXDB_ORG": "org",
    "INFLUXDB_BUCKET": "bucket",
    "LOG_FILE": "off",
}


def text_of(at: datetime) -> str:
    """As the state keeps instants."""
    return at.isoformat(timespec="microseconds").removesuffix("+00:00") + "Z"


class Daemon:
    """A daemon on a data directory, ended by its pid."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as held:
            held.bind(("127.0.0.1", 0))
            self.port: int = held.getsockname()[1]
        environ = {**clean_environ(), **ENVIRON, "PORT": str(self.port), "DATA_DIR": str(folder)}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "app", "serve"],
            env=environ,
            cwd=folder,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        until = time.monotonic() + WAIT_SECONDS
        while not self.answers():
            if time.monotonic() > until:
                sys.exit("the daemon does not answer")
            time.sleep(0.1)

    def answers(self) -> bool:
        """Whether it is ready."""
        try:
            return bool(self.get("/ready"))
        except (urllib.error.URLError, OSError):
            return False

    def get(self, path: str) -> bytes:
        """The body of an answer."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=60) as answer:
            body: bytes = answer.read()
            return body

    def cpu_seconds(self) -> float:
        """Of the process and its threads so far."""
        threads = Path(f"/proc/{self._process.pid}/task").iterdir()
        return sum(int((thread / "schedstat").read_text().split()[0]) for thread in threads) / 1e9

    def close(self) -> None:
        """End it."""
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(60)


def filled(path: Path, partitions: int) -> None:
    """Partitions that are finished up to an hour ago, and a fault in every hundredth of the first thousand."""
    now = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
    step = timedelta(days=1) if partitions >= BIG else timedelta(hours=1)
    starts = [now - timedelta(days=DAYS) + step * number for number in range(timedelta(days=DAYS) // step)]
    spans = [(text_of(start), text_of(start + step)) for start in starts]
    width = len(str(partitions))
    names = [f"D{number:0{width}d}" for number in range(1, partitions + 1)]
    done, seen = text_of(now - timedelta(hours=1)), text_of(now - timedelta(minutes=50))

    def windows() -> Iterator[Sequence[object]]:
        for number, name in enumerate(names):
            for place, (start, end) in enumerate(spans):
                trouble = "missing" if number < 1000 and number % 100 == 17 and place == len(spans) // 2 else ""
                yield JOB, name, start, 0, end, "key", "v", "", 60, 4000, 360, "closed", end, trouble

    with sqlite3.connect(path) as state:
        state.execute("PRAGMA synchronous = OFF")
        state.executemany(
            "INSERT INTO export_checkpoints (pipeline, device_id, started_at, last_exported_at, high_watermark_at, "
            "status, created_at, updated_at) VALUES (?, ?, ?, ?, ?, 'ok', ?, ?)",
            [(JOB, name, spans[0][0], done, seen, done, done) for name in names],
        )
        columns = (
            "pipeline, device_id, window_start, part, window_end, s3_key, version, digest, record_count, size_bytes, "
            "source_cells, status, updated_at, trouble"
        )
        state.executemany(f"INSERT INTO export_windows ({columns}) VALUES ({', '.join('?' * 14)})", windows())  # noqa: S608
    state.close()


def pause(daemon: Daemon) -> None:
    """No job runs while it is measured."""
    for job in json.loads(daemon.get("/ops/jobs"))["jobs"]:
        if job["state"] != "off":
            path = f"http://127.0.0.1:{daemon.port}/ops/jobs/{job['name']}/pause"
            urllib.request.urlopen(urllib.request.Request(path, method="POST"), timeout=60).close()


def measured(partitions: int) -> Sequence[Goal]:
    """Bytes and CPU of the first view."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        daemon = Daemon(folder)
        try:
            daemon.get("/ops/jobs")
            pause(daemon)
        finally:
            daemon.close()
        filled(folder / "state.db", partitions)
        daemon = Daemon(folder)
        try:
            daemon.get("/openapi.json")  # the API is built with the first call
            time.sleep(3)
            before, began = daemon.cpu_seconds(), time.monotonic()
            sizes = {path: len(daemon.get(path)) for path in VIEW}
            cpu, wall = daemon.cpu_seconds() - before, time.monotonic() - began
            map_ = json.loads(daemon.get(VIEW[3]))
        finally:
            daemon.close()
    print(f"{partitions:,} partitions: {cpu:.3f} s of CPU, {wall:.2f} s, {map_['problems']} with problems")
    print("\n".join(f"  {size:>8,} bytes  {path}" for path, size in sizes.items()))
    kilobytes, seconds = LIMITS[partitions >= BIG]
    return [
        Goal(
            f"{partitions:,} partitions, first view", sum(sizes.values()) / 1000, kilobytes, at_least=False, unit=" kB"
        ),
        Goal(f"{partitions:,} partitions, CPU of the server", cpu, seconds, at_least=False, unit=" s"),
    ]


def main() -> int:
    """Measure, and say which goals were kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--partitions", type=int, nargs="+", default=[1000, 100_000])
    given = parser.parse_args()
    goals = [goal for number in given.partitions for goal in measured(number)]
    print("\n".join(map(str, goals)))
    return int(not all(goal.met for goal in goals))


if __name__ == "__main__":
    os.environ.pop("API_KEYS", None)
    sys.exit(main())
