"""The export split among workers: three versus one, and the cost of planning many devices.

`uv run python bench/shards.py [--devices 10000] [--query-ms 15] [--put-ms 30] [--concurrency 2]`: the ratio.
`uv run python bench/shards.py --plan 100000 [--changed 0.1]`: size, CPU and memory of one plan.

Workers are real processes on a real PostgreSQL; source and store are fakes with a latency.
"""

import argparse
import json
import os
import resource
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from cost_per_device import FIELDS, Counted, Devices, Silent, serve
from measured import Goal
from postgres import PostgresServer, running_postgres

MINUTES = 30
WORKERS = (1, 3)
LEAST_RATIO = 2.5
MOST_MIB = 512
GIVE_UP_SECONDS = 1800
PLAN_SECONDS = 10  # a run that left work sends itself again sooner


def environ_of(folder: str, source: str, state: str, concurrency: int) -> dict[str, str]:
    """The settings of all processes."""
    return {
        "DATA_DIR": folder,
        "LOG_FILE": "off",
        "INFLUXDB_URL": source,
        "INFLUXDB_TOKEN": "t",
        "INFLUXDB_ORG": "o",
        "INFLUXDB_BUCKET": "b",
        "INFLUXDB_TIMEOUT_SECONDS": "600",
        "CHECKPOINT_DATABASE_URL": state,
        "SCALE_ENGINE": "procrastinate",
        "EXPORT_CONCURRENCY": str(concurrency),
        "EXPORT_WINDOW_SECONDS": "86400",
    }


def work(put_ms: float) -> None:
    """A worker whose store is slow, until a signal."""
    from app.main import build, wire
    from app.ops.process import configured, tune
    from app.scale.worker import run_worker

    tune()
    settings = configured(os.environ, None, daemon=True)
    run_worker(build(settings, lambda parts: wire(replace(parts, store=slow(parts.store, put_ms))), is_worker=True))


def slow(store: Any, put_ms: float) -> Any:
    """A store that waits before each write."""
    return Counted(store, put_ms)


@contextmanager
def source_of(devices: int, query_ms: float) -> Iterator[tuple[str, Any]]:
    """Its address, and the process that plays it."""
    command = [sys.executable, __file__, "--serve", str(devices), "--query-ms", str(query_ms)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        if child.stdout is None or child.stdin is None:
            raise AssertionError
        yield child.stdout.readline().strip(), child
        child.stdin.close()


def seconds_of(workers: int, given: argparse.Namespace, postgres: PostgresServer, source: str) -> float:
    """From the first plan to the last object."""
    from app.config.environment import load_settings
    from app.db.state import open_state
    from app.scale.queue import Workers

    url = postgres.new_database()
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="headwater-bench-"))
        state = stack.enter_context(closing(open_state(url, Path(folder))))
        environ = {**os.environ, **environ_of(folder, source, url, given.concurrency)}
        queue = stack.enter_context(closing(Workers(load_settings(environ, None), state, lambda _: None)))
        queue.prepare()
        for _ in range(workers):
            command = [sys.executable, __file__, "--work", "--put-ms", str(given.put_ms)]
            process = subprocess.Popen(command, env={**environ, "PORT": str(free_port())}, stdout=subprocess.DEVNULL)
            stack.callback(process.wait)
            stack.callback(process.kill)
        began = time.monotonic()
        while state.workers.alive(30) < workers:
            give_up(began)
        time.sleep(2)  # each asks the queue by now
        began = time.monotonic()
        sent_at = 0.0
        while written(state) < given.devices:
            if time.monotonic() - sent_at > PLAN_SECONDS:
                queue.send("influx_to_s3", "schedule")
                sent_at = time.monotonic()
            give_up(began)
        return time.monotonic() - began


def written(state: Any) -> int:
    """How many devices have a confirmed object."""
    with state.database.transaction(read_only=True) as session:
        return int(session.rows("SELECT count(DISTINCT device_id) AS number FROM export_windows")[0]["number"])


def give_up(began: float) -> None:
    """A moment later, or the end of the bench."""
    time.sleep(0.5)
    if time.monotonic() - began > GIVE_UP_SECONDS:
        sys.exit("it does not come to its end")


def free_port() -> int:
    """One that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Discarding:
    """A queue that keeps how large what is sent is, and workers that say that all of it is done."""

    def __init__(self) -> None:
        self.bytes = self.steps = 0
        self._done: list[Any] = []

    def send_step(self, step: str, plan_id: str, plan: Mapping[str, Any]) -> bool:
        """See `Shards`."""
        from app.core.runs import Report
        from app.db.workers import StepReport

        self.bytes += len(json.dumps(plan))
        self.steps += 1
        self._done.append(StepReport(plan_id, step, Report()))
        return True

    def take_reports(self, _: str) -> list[Any]:
        """See `Shards`."""
        done, self._done = self._done, []
        return done


def plan(devices: int, changed: float) -> None:
    """One plan in this process: the records of all devices are there, some have a new point."""
    with (
        tempfile.TemporaryDirectory(prefix="headwater-bench-") as folder,
        running_postgres() as postgres,
        source_of(devices, 0.0) as (url, child),
    ):
        given = environ_of(folder, url, postgres.new_database(), 2)
        child.stdin.write(f"{changed}\n")
        child.stdin.flush()
        child.stdout.readline()
        print(subprocess.run(
            [sys.executable, __file__, "--plan-here", str(devices)],
            env={**os.environ, **given}, check=True, stdout=subprocess.PIPE, text=True,
        ).stdout)  # fmt: skip


def plan_here(devices: int) -> None:
    """The process that is measured; what is recorded of the devices is made first by one that is forked."""
    from app.config.environment import load_settings
    from app.core.runs import LeaseTerms, RunServices, Stop, execute
    from app.db.state import open_state
    from app.influx_to_s3.job import NAME, build
    from app.object_store.local import LocalDirectory
    from app.object_store.request_counts import RequestCounter
    from app.object_store.set_aside import SetAsideStore, folder_of
    from app.scale.shards import Shards

    settings = load_settings(os.environ, None)
    if (pid := os.fork()) == 0:
        record(settings.checkpoint.url.get_secret_value(), devices)
        os._exit(0)
    os.waitpid(pid, 0)
    with closing(open_state(settings.checkpoint.url.get_secret_value(), settings.service.data_dir)) as state:
        store, queue = LocalDirectory(settings.service.data_dir / "objects"), Discarding()
        aside = SetAsideStore(store, folder_of("telemetry"), 1 << 20)
        requests = RequestCounter().add_elsewhere
        shards = Shards(
            queue.send_step, queue.take_reports, requests, shards=settings.export.shards, patience_seconds=30
        )
        export = build(settings, state.checkpoints, store, set_aside=aside, clock=state.clock, steps=shards)
        job = next(job for job in export.jobs if job.name == NAME)
        services = RunServices(state.clock, state.leases, state.runs, LeaseTerms("bench"), lambda *_: None)
        before, used, began = peak_mib(), time.process_time(), time.monotonic()
        run = execute(job, services, Stop(), Silent())
        told = {
            "devices": devices,
            "steps": queue.steps,
            "sent_bytes": queue.bytes,
            "cpu_seconds": round(time.process_time() - used, 2),
            "wall_seconds": round(time.monotonic() - began, 2),
            "peak_mib_before": before,
            "peak_mib": peak_mib(),
            "outcome": run.outcome.value if run else "",
            "error": run.error if run else "",
            "already_there": run.report.ledger.total.already_there if run else 0,
        }
    print(json.dumps(told))
    print(Goal("peak memory of a plan", peak_mib(), MOST_MIB, at_least=False, unit=" MiB"))


def record(url: str, devices: int) -> None:
    """All devices have an object of the open window with MINUTES points."""
    from app.core.pipeline import Commit, Record
    from app.core.windows import Window
    from app.db.state import open_state

    start = start_of_day()
    window = Window(start, start + timedelta(days=1))
    fields = dict.fromkeys(FIELDS, MINUTES)
    at = start + timedelta(minutes=1)
    held = Record(window, 0, "k" * 80, "v" * 34, "d" * 64, MINUTES, 4096, 4 * MINUTES, at, at, False, fields, "s" * 64)  # noqa: FBT003
    with closing(open_state(url, Path(tempfile.gettempdir()))) as state:
        lease = state.leases.acquire("influx_to_s3", "bench", 3600)
        if lease is None:
            raise AssertionError
        for first in range(0, devices, 2000):
            commits = [
                (f"D{number:06d}", Commit((held,), start)) for number in range(first, min(first + 2000, devices))
            ]
            state.checkpoints.commit_all("influx_to_s3", commits, lease)
        state.leases.release(lease)


def peak_mib() -> int:
    """The most memory that this process ever had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def children_seconds() -> float:
    """CPU of processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def start_of_day() -> datetime:
    """The window that is open."""
    return datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=10_000)
    parser.add_argument("--query-ms", type=float, default=15.0)
    parser.add_argument("--put-ms", type=float, default=30.0)
    parser.add_argument("--concurrency", type=int, default=2)
    parser.add_argument("--plan", type=int, default=0)
    parser.add_argument("--changed", type=float, default=0.1)
    for hidden in ("--serve", "--plan-here"):
        parser.add_argument(hidden, type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        serve(Devices([MINUTES] * given.serve, start_of_day()), given.query_ms)
    elif given.work:
        work(given.put_ms)
    elif given.plan_here:
        plan_here(given.plan_here)
    elif given.plan:
        plan(given.plan, given.changed)
    else:
        with running_postgres() as postgres, source_of(given.devices, given.query_ms) as (source, _):
            seconds, cpu_seconds = {}, {}
            for number in WORKERS:
                before = children_seconds()
                seconds[number] = seconds_of(number, given, postgres, source)
                cpu_seconds[number] = round(children_seconds() - before, 1)
        told = {
            "devices": given.devices,
            "seconds": {number: round(each, 1) for number, each in seconds.items()},
            "cpu_seconds_of_workers": cpu_seconds,
            "load": os.getloadavg()[0],
        }
        print(json.dumps(told))
        print(Goal("three workers against one", seconds[1] / seconds[3], LEAST_RATIO))


if __name__ == "__main__":
    main()
