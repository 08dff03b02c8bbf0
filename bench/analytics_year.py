"""/analytics over a year: hourly objects of 100 devices, listed by a server that makes them up and known to the state.

    uv run python bench/analytics_year.py [--devices 100] [--hours 8760] [--latency-ms 50] [--data FOLDER]

Writing a year of real objects would take hours, so this measures what the daemon does after it has read each object
once: start, memory, refreshes, its four answers, and a new object. `--data` keeps the generated state.
"""

import argparse
import json
import random
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from analytics import first
from analytics_bucket import PREFIX, SIZE_BYTES, START, etag_of, key_of
from analytics_ways import cpu_seconds, free_port, hourly, load, peak_mib, serving
from measured import Goal

SERVER = Path(__file__).with_name("analytics_bucket.py")
ROWS = 3600
SOME = 5000
ANSWERS = ("overview", "daily-summary", "devices", "devices/latest")
WATCHED_SECONDS = 60.0
COLUMNS = {"timestamp": "TIMESTAMP WITH TIME ZONE", "device_id": "VARCHAR", "voltage": "DOUBLE", "power": "DOUBLE"}


@dataclass(frozen=True, slots=True)
class Given:
    """How large a lake."""

    devices: int
    hours: int
    latency_ms: int

    @property
    def objects(self) -> int:
        """How many."""
        return self.devices * self.hours


def main() -> int:
    """Print what was measured beside the goals; 1 when one is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=100)
    parser.add_argument("--hours", type=int, default=365 * 24)
    parser.add_argument("--latency-ms", type=int, default=50)
    parser.add_argument("--data", type=Path)
    chosen = parser.parse_args()
    given = Given(chosen.devices, chosen.hours, chosen.latency_ms)
    with tempfile.TemporaryDirectory(prefix="headwater-bench-") as folder:
        data = chosen.data or Path(folder)
        if not (data / "state.db").exists():
            fill(data, given)
        goals = measure(data, given)
    print("\n" + "\n".join(f"- {goal}" for goal in goals))
    return 0 if all(goal.met for goal in goals) else 1


def fill(data: Path, given: Given) -> None:
    """Facts of every object, as if each had been read, and packed as those of days that are over are."""
    from app.analytics.reports import merged
    from app.db.state import open_state

    data.mkdir(parents=True, exist_ok=True)
    state = open_state("", data)
    every = facts(given)
    while some := [one for _, one in zip(range(SOME), every, strict=False)]:
        state.summaries.save(some)
        while state.summaries.pack(sys.maxsize, lambda versions: [True] * len(versions), merged):
            pass
    state.summaries.note_asked()
    state.close()


def facts(given: Given) -> Iterator[Any]:
    """What one hour of one device adds up to."""
    from app.db.object_summaries import DaySummary, ObjectFacts

    draw = random.Random(1)
    for device in range(given.devices):
        name = json.dumps(f"D{device:03d}")
        for hour in range(given.hours):
            key, at = key_of(device, hour), START + timedelta(hours=hour)
            first_us = int(at.timestamp()) * 1_000_000
            last_us = first_us + (ROWS - 1) * 1_000_000
            latest = (last_us, 230.0, 1.0, 230.0, 41.5, None, 0.9, "bulb", None)
            day = (at - datetime(1970, 1, 1, tzinfo=at.tzinfo)).days
            sums = (230.0 * ROWS + draw.random(), ROWS, 41.5, None, 0)
            part = DaySummary(name, day, ROWS, first_us, last_us, *sums, latest)
            yield ObjectFacts(key, etag_of(key), SIZE_BYTES, ROWS, COLUMNS, "", (part,))


def measure(data: Path, given: Given) -> list[Goal]:
    """Start, answer, refresh, take a new object."""
    bucket_port, port = free_port(), free_port()
    command = [sys.executable, str(SERVER), *map(str, (bucket_port, given.devices, given.hours, given.latency_ms))]
    bucket = f"http://127.0.0.1:{bucket_port}"
    environ = {
        "PORT": str(port),
        "DATA_DIR": str(data),
        "LOG_LEVEL": "WARNING",
        "LOG_FILE": "off",
        "S3_BUCKET": "lake",
        "S3_PREFIX": PREFIX,
        "S3_ENDPOINT_URL": bucket,
        "S3_ACCESS_KEY_ID": "any",
        "S3_SECRET_ACCESS_KEY": "any",
    }
    with serving(command, bucket_port, {}), serving([sys.executable, "-m", "app"], port, environ) as child:
        started = cpu_seconds(child.pid)
        first_seconds = first(port, "/analytics/overview")
        start_cpu = cpu_seconds(child.pid) - started
        rows = ask(port, "overview")[0]["total_rows"]
        if rows != given.objects * ROWS:
            sys.exit(f"{rows} rows instead of {given.objects * ROWS}")
        made = {path: first(port, f"/analytics/{path}") for path in ANSWERS}
        loads = {path: load(child, port, f"/analytics/{path}", 1, 1.0) for path in ANSWERS}
        refresh_cpu, cycle_seconds, pages = watched(child.pid, port, bucket)
        seen_seconds = seen(port, bucket, given)
        lines = Path(f"/proc/{child.pid}/status").read_text().splitlines()
        resident = next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024
        peak = peak_mib(child.pid)
    print(f"{given.objects:,} objects of {given.devices} devices, {given.latency_ms} ms to the store and back\n")
    print("| answer | first s | requests/s | p50 ms | inside p50 ms | cpu ms a request | /health p99 ms |")
    print("|---|---|---|---|---|---|---|")
    for path, one in loads.items():
        figures = f"{one.p50_ms:.1f} | {one.inside_ms:.2f} | {one.cpu_ms:.2f} | {one.health_p99_ms:.0f}"
        print(f"| {path} | {made[path]:.2f} | {one.rate:,.1f} | {figures} |")
    print(f"\nfirst answer after {first_seconds:.1f} s and {start_cpu:.1f} s of CPU; resident {resident:.0f} MiB")
    print(f"a refresh: {pages} pages, {refresh_cpu:.2f} s of CPU, every {cycle_seconds:.1f} s")
    print(f"a new object is in the answers after {seen_seconds:.1f} s")
    return [
        Goal("first answer after the start", first_seconds, 60, at_least=False, unit=" s"),
        Goal("peak memory of the daemon", peak, 512, at_least=False, unit=" MiB"),
        *(
            Goal(f"{path} inside the process, p50", one.inside_ms, 2, at_least=False, unit=" ms")
            for path, one in loads.items()
        ),
    ]


def ask(port: int, path: str) -> tuple[Any, str]:
    """An answer, and of when it is."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/analytics/{path}", timeout=600) as answer:
        return json.load(answer), answer.headers["X-Data-As-Of"]


def watched(pid: int, port: int, bucket: str) -> tuple[float, float, int]:
    """CPU of one refresh, seconds from one to the next, and pages of one, while nobody asks for anything else."""
    _, as_of = ask(port, "overview")
    turns: list[tuple[float, float, int]] = []
    until = time.monotonic() + WATCHED_SECONDS
    while len(turns) < 2 or time.monotonic() < until:
        _, now = ask(port, "overview")
        if now != as_of:
            as_of = now
            with urllib.request.urlopen(f"{bucket}/lake?listed=1", timeout=60) as answer:  # noqa: S310 - own server
                turns.append((time.monotonic(), cpu_seconds(pid), int(answer.read())))
        time.sleep(0.2)
    (began, cpu, listed), (ended, cpu_then, listed_then) = turns[0], turns[-1]
    count = len(turns) - 1
    return (cpu_then - cpu) / count, (ended - began) / count, (listed_then - listed) // count


def seen(port: int, bucket: str, given: Given) -> float:
    """Seconds until a new object counts."""
    before = ask(port, "overview")[0]["total_rows"]
    content = hourly(0, ROWS, random.Random(time.time_ns()))[1]
    key = key_of(given.devices // 2, given.hours)
    began = time.monotonic()
    urllib.request.urlopen(urllib.request.Request(f"{bucket}/lake/{key}", content, method="PUT"), timeout=60).close()  # noqa: S310 - own server
    while ask(port, "overview")[0]["total_rows"] == before:
        time.sleep(0.1)
    return time.monotonic() - began


if __name__ == "__main__":
    sys.exit(main())
