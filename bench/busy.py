"""Memory of the daemon after every job has run on the demo, and its peak while every job and route is busy.

`UV_PROJECT_ENVIRONMENT=$(mktemp -d) uv run --no-dev python bench/busy.py [--seconds 30] [--half-core]`, without the
development packages, some of which are imported if present. The simulated systems run in another process, so only
Headwater is measured: resident memory as the kernel counts it, which is at least what a container limit counts.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

from idle import WAIT_SECONDS, answered, cpu_of, free_port, half_a_core, memory_of, whole_machine
from measured import Goal, clean_environ

SIMULATORS = "--simulators"
QUIET_SECONDS = 15.0
ROWS = 10_000
UPLOAD_BYTES = 64 << 20
DAY = timedelta(days=1)
PROVEN = ("influx_to_s3", "dynamo_to_drive", "amplitude", "appmetrica")


def simulate(folder: Path) -> None:
    """The simulated systems alone: print the environment that points at them, and live until stdin ends."""
    from simulators.demo import simulated

    with simulated({"DATA_DIR": str(folder), "LOG_LEVEL": "WARNING"}, live=True) as environ:
        sys.stdout.write(json.dumps(dict(environ)) + "\n")
        sys.stdout.flush()
        sys.stdin.read()


@contextmanager
def simulators(folder: Path) -> Iterator[Mapping[str, str]]:
    """`simulate` in a child; the environment."""
    command = [sys.executable, __file__, SIMULATORS, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=clean_environ()) as child:
        assert child.stdout is not None  # noqa: S101 - it is a pipe
        assert child.stdin is not None  # noqa: S101 - it is a pipe
        yield json.loads(child.stdout.readline())
        child.stdin.close()


@dataclass
class Daemon:
    """The daemon under measurement. `answers` counts statuses by call."""

    port: int
    pid: int
    answers: Counter[str] = field(default_factory=Counter)

    def call(self, what: str, body: bytes | None = None, kind: str = "application/json") -> bytes:
        """`METHOD /path`; what it answers is read to the end and counted."""
        method, path = what.split(" ", 1)
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", body, {"Content-Type": kind}, method=method
        )
        try:
            with urllib.request.urlopen(request, timeout=WAIT_SECONDS) as answer:  # noqa: S310 - loopback
                status, told = answer.status, b""
                while piece := answer.read(1 << 20):
                    told = piece if len(told) + len(piece) > 1 << 22 else told + piece
        except urllib.error.HTTPError as error:
            status, told = error.code, error.read()
        except OSError as error:
            status, told = type(error).__name__, b""
        self.answers[f"{status} {method} {path.partition('?')[0]}"] += 1
        return told

    def jobs(self) -> Sequence[Mapping[str, Any]]:
        """Every job that is on."""
        found: list[Mapping[str, Any]] = json.loads(self.call("GET /ops/jobs"))["jobs"]
        return [job for job in found if job["state"] != "off"]

    def until_all_ran(self) -> None:
        """Wait for the first whole run of every job."""
        deadline = time.monotonic() + 3 * WAIT_SECONDS
        while any(not (job["last_run"] or {}).get("ended_at") for job in self.jobs()):
            if time.monotonic() > deadline:
                sys.exit("not every job has run")
            time.sleep(0.5)


@contextmanager
def daemon(environ: Mapping[str, str], *, half_core: bool) -> Iterator[Daemon]:
    """The daemon on a port of its own."""
    port = free_port()
    own = {"PORT": str(port), "HOST": "127.0.0.1", "LOG_LEVEL": "WARNING", "ARROW_DEFAULT_MEMORY_POOL": "system"}
    given = {**clean_environ(), **environ, **own, "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "app", "serve"]
    child = subprocess.Popen(command, env=given, cwd=environ["DATA_DIR"], stdout=subprocess.DEVNULL)
    try:
        with (half_a_core if half_core else whole_machine)(child):
            answered(port, time.monotonic() + WAIT_SECONDS)
            yield Daemon(port, child.pid)
    finally:
        child.send_signal(signal.SIGTERM)
        child.wait(WAIT_SECONDS)


@dataclass(frozen=True, slots=True)
class Work:
    """Every kind of thing that may be asked at once, each as one turn of a loop."""

    to: Daemon
    now: datetime
    jobs: Sequence[str]
    file: bytes

    @property
    def turns(self) -> Sequence[Callable[[], None]]:
        """What threads do, some twice."""
        twice = (self.insert, self.objects, self.reports)
        return [*twice, *twice, self.export, self.ask, self.look, self.run]

    def insert(self) -> None:
        """Ten thousand rows into the warehouse and out of it."""
        rows = [{"uuid": str(uuid4()), "event_type": "bench", "device_id": f"d{n}"} for n in range(ROWS)]
        self.to.call("POST /dwh/events-part", json.dumps({"data": rows}).encode())
        self.to.call(f"GET /dwh/events-part?limit={ROWS}")

    def objects(self) -> None:
        """A large object up, down, and patched."""
        self.to.call("POST /s3/upload?key=bench/file", self.file, "application/octet-stream")
        self.to.call("GET /s3/download?key=bench/file")
        self.to.call("PATCH /s3/patch?key=bench/file&offset=5", b"changed", "application/octet-stream")

    def reports(self) -> None:
        """Every report, one of them also as Parquet."""
        for name in ("overview", "daily-summary", "devices", "devices/latest", "daily-summary?format=parquet"):
            self.to.call(f"GET /analytics/{name}")

    def export(self) -> None:
        """A day of Amplitude as a zip."""
        day = f"{self.now - DAY:%Y%m%d}"
        self.to.call(f"GET /amplitude/export?start={day}&end={day}&source=web")

    def ask(self) -> None:
        """A day of AppMetrica."""
        since, until = f"{self.now - DAY:%Y-%m-%d}", f"{self.now:%Y-%m-%d}"
        wanted = json.dumps({"resource": "events", "date_since": since, "date_until": until}).encode()
        number = json.loads(self.to.call("POST /appmetrica/exports", wanted)).get("export_id", 1)
        self.to.call(f"GET /appmetrica/fetch-export?export_id={number}&poll_interval=1&poll_timeout=20")

    def look(self) -> None:
        """What the dashboard and Prometheus ask for."""
        for path in ("/", "/metrics", "/ops/jobs", "/ops/runs", "/ops/partitions", "/ops/history", "/openapi.json"):
            self.to.call(f"GET {path}")
        for name in PROVEN:
            self.to.call(f"GET /ops/gaps?job={name}&hours=24")

    def run(self) -> None:
        """Every job at once, and both ends of a day compared."""
        span = json.dumps({"from": (self.now - DAY).isoformat(), "to": self.now.isoformat()}).encode()
        for name in self.jobs:
            self.to.call(f"POST /ops/jobs/{name}/run")
        for name in PROVEN:
            self.to.call(f"POST /ops/jobs/{name}/verify", span)
            self.to.call(f"POST /ops/jobs/{name}/backfill", span)
        time.sleep(3)


def busy(to: Daemon, seconds: float) -> float:
    """Everything at once for so long; the most memory that was seen."""
    until = time.monotonic() + seconds

    def over(turn: Callable[[], object]) -> None:
        while time.monotonic() < until:
            turn()

    file = os.urandom(1 << 20) * (UPLOAD_BYTES >> 20)
    work = Work(to, datetime.now(UTC), [job["name"] for job in to.jobs()], file)
    threads = [threading.Thread(target=over, args=(turn,)) for turn in work.turns]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return memory_of(to.pid)[1]


def measure(seconds: float, *, half_core: bool) -> int:
    """Run it all and print; 1 when a goal is missed."""
    with (
        tempfile.TemporaryDirectory(prefix="headwater-busy-") as folder,
        simulators(Path(folder)) as environ,
        daemon(environ, half_core=half_core) as to,
    ):
        before = memory_of(to.pid)[0]
        to.until_all_ran()
        time.sleep(QUIET_SECONDS)
        after, first_peak = memory_of(to.pid)
        peak = busy(to, seconds)
        cpu_seconds = cpu_of(to.pid)
        time.sleep(QUIET_SECONDS)
        rest = memory_of(to.pid)[0]
    print("| daemon alone | RSS MiB |\n|---|---|")
    rows = {"at its start": before, "after every job ran": after, "peak of the first runs": first_peak}
    rows |= {"peak, every job and route busy": peak, "fifteen seconds later": rest}
    print("\n".join(f"| {name} | {value:.0f} |" for name, value in rows.items()))
    print(f"\n{cpu_seconds:.0f} CPU seconds, {sum(to.answers.values())} answers:")
    print("\n".join(f"- {count} x {what}" for what, count in sorted(to.answers.items())))
    goals = [
        Goal("memory after every job ran", after, 200, at_least=False, unit=" MiB"),
        Goal("memory with everything busy", peak, 512, at_least=False, unit=" MiB"),
    ]
    print("\n" + "\n".join(f"- {goal}" for goal in goals))
    return 0 if all(goal.met for goal in goals) else 1


def main(arguments: Sequence[str] | None = None) -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--half-core", action="store_true")
    parser.add_argument(SIMULATORS, type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.simulators is not None:
        simulate(given.simulators)
        return 0
    return measure(given.seconds, half_core=given.half_core)


if __name__ == "__main__":
    sys.exit(main())
