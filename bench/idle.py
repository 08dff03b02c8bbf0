"""Start-up time and memory of the daemon before any job has run, versus the same with everything imported eagerly.

`uv run python bench/idle.py [--half-core]`. The clock starts with the process and stops at the first 200 from /health;
memory is read a moment later, when the start has settled. `--half-core` lets each process use one processor for 50 ms
of every 100 ms, the most that a container limit of half a core allows, for machines without a container engine.
"""

import argparse
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from measured import Goal, clean_environ

EAGER = (
    "pandas",
    "pyarrow.dataset",
    "pyarrow.parquet",
    "duckdb",
    "boto3",
    "googleapiclient",
    "influxdb_client",
    "psycopg",
    "fastapi",
)
SERVE = "import sys, runpy; sys.argv = ['app', 'serve']; runpy.run_module('app', run_name='__main__')"
SETTLED_SECONDS = 2.0
WAIT_SECONDS = 60.0
KIB = 1024
SHARE_SECONDS = 0.05
WAYS: Mapping[str, Sequence[str]] = {
    "headwater": ("-m", "app", "serve"),
    "everything imported at start": (
        "-c",
        f"import {', '.join(EAGER)}\n{SERVE}",
    ),
}


@dataclass(frozen=True, slots=True)
class Start:
    """One start: seconds and CPU seconds to the first answer, resident memory and its peak."""

    health_seconds: float
    cpu_seconds: float
    rss_mib: float
    peak_mib: float


def free_port() -> int:
    """A port of loopback that nobody listens on now."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port: int = held.getsockname()[1]
        return port


def answered(port: int, until: float) -> float:
    """The instant of the first 200 of /health."""
    while time.monotonic() < until:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1) as answer:
                if answer.status == 200:
                    return time.monotonic()
        except (urllib.error.URLError, OSError):
            time.sleep(0.005)
    sys.exit("the daemon does not answer")


def cpu_of(pid: int) -> float:
    """User and system time so far: tells of the start what a busy machine hides."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def memory_of(pid: int) -> tuple[float, float]:
    """Resident memory and its peak, MiB."""
    told = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    rss, peak = (int(told[name].split()[0]) / KIB for name in ("VmRSS", "VmHWM"))
    return rss, peak


@contextmanager
def half_a_core(child: "subprocess.Popen[bytes]") -> Iterator[None]:
    """Keep a child of ours on one processor and stop it for half of the time, by its pid alone."""
    os.sched_setaffinity(child.pid, {min(os.sched_getaffinity(0))})
    done = threading.Event()

    def beat() -> None:
        while not done.is_set() and child.poll() is None:
            child.send_signal(signal.SIGSTOP)
            done.wait(SHARE_SECONDS)
            child.send_signal(signal.SIGCONT)
            time.sleep(SHARE_SECONDS)

    clock = threading.Thread(target=beat, daemon=True)
    clock.start()
    try:
        yield
    finally:
        done.set()
        clock.join()


@contextmanager
def whole_machine(_: "subprocess.Popen[bytes]") -> Iterator[None]:
    """Leave a child alone."""
    yield


def start(arguments: Sequence[str], *, half_core: bool = False) -> Start:
    """Start the daemon in an empty folder, ask it, look at it, end it."""
    allowed = half_a_core if half_core else whole_machine
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="headwater-idle-") as folder:
        own = {"DATA_DIR": folder, "PORT": str(port), "HOST": "127.0.0.1", "LOG_LEVEL": "WARNING"}
        environ = {**clean_environ(), **own, "ARROW_DEFAULT_MEMORY_POOL": "system", "OPENBLAS_NUM_THREADS": "1"}
        began = time.monotonic()
        child = subprocess.Popen([sys.executable, *arguments], env=environ, cwd=folder, stdout=subprocess.DEVNULL)
        try:
            with allowed(child):
                health_seconds = answered(port, began + WAIT_SECONDS) - began
                cpu_seconds = cpu_of(child.pid)
                time.sleep(SETTLED_SECONDS)
                rss_mib, peak_mib = memory_of(child.pid)
        finally:
            child.send_signal(signal.SIGTERM)
            child.wait(WAIT_SECONDS)
    return Start(health_seconds, cpu_seconds, rss_mib, peak_mib)


def middle(starts: Sequence[Start]) -> Start:
    """The median of each figure."""
    return Start(
        statistics.median(one.health_seconds for one in starts),
        statistics.median(one.cpu_seconds for one in starts),
        statistics.median(one.rss_mib for one in starts),
        statistics.median(one.peak_mib for one in starts),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Start each way in turns and print medians; 1 when a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--half-core", action="store_true")
    given = parser.parse_args(arguments)
    for way in WAYS.values():
        start(way)
    rounds = [{name: start(way, half_core=given.half_core) for name, way in WAYS.items()} for _ in range(given.repeat)]
    print("| | to /health, s | cpu s | RSS MiB | peak MiB |\n|---|---|---|---|---|")
    medians = {name: middle([one[name] for one in rounds]) for name in WAYS}
    for name, one in medians.items():
        print(f"| {name} | {one.health_seconds:.2f} | {one.cpu_seconds:.2f} | {one.rss_mib:.0f} | {one.peak_mib:.0f} |")
    ours = medians["headwater"]
    goals = [
        Goal("to /health", ours.health_seconds, 0.6, at_least=False, unit=" s"),
        Goal("memory with no job run", ours.rss_mib, 68, at_least=False, unit=" MiB"),
    ]
    print("\n" + "\n".join(f"- {goal}" for goal in goals))
    return 0 if all(goal.met for goal in goals) else 1


if __name__ == "__main__":
    sys.exit(main())
