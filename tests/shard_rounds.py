"""Kills and pauses workers that share the export of a real InfluxDB, restarts their PostgreSQL, changes the engine on
the running installation, and compares what is left with what the source holds.

`uv run python tests/shard_rounds.py [--rounds 200] [--seed 1] [--minutes 60] [--folder FOLDER]`; see `kill_rounds`.

A sitting has one installation: a state on PostgreSQL, objects in a directory or on a real S3 server, one process that
serves HTTP and has the schedule, and three workers. Windows are a minute long, so that they close all the time.
"""

import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg

from daemon import free_port
from export_world import Bucket, Fields, Folder, Objects, Row, S3Bucket, Source, differences
from influxdb1 import InfluxDB1, running_influxdb1
from kill_rounds import FAULTS, UNDISTURBED, WEDGED_AFTER_SECONDS, KilledProcess, Runner, sit, started
from postgres import PostgresServer, running_postgres
from seaweed import SERVICES, Seaweed, free_ports, running

DEVICES = tuple(f"D{number}" for number in range(12))
WORKERS = 3
TTL_SECONDS = 3.0
KILLED = {"LEASE_TTL_SECONDS": f"{TTL_SECONDS:g}", "LEASE_HEARTBEAT_SECONDS": "0.5"}
IDLE_SECONDS = 2 * TTL_SECONDS  # no device may be idle for longer
BUSY_SECONDS = 120.0  # a busy machine may take so long for a process to be there
LOOK_SECONDS = 0.1
GRACE_SECONDS = 20  # at most
ACTS = ("kill", "kill_all", "kill_scheduler", "pause", "restart_postgres", "change_engine")
WEIGHTS = (8, 2, 2, 4, 2, 2)


@dataclass(frozen=True)
class Servers:
    """The outside systems, for all sittings."""

    influx: InfluxDB1
    seaweed: Seaweed
    postgres: PostgresServer


@dataclass
class Process(KilledProcess):
    """A worker, the process with the schedule, or a command."""

    words: Sequence[str]
    began_at: float = 0.0

    def begin(self, environ: Mapping[str, str], words: Sequence[str] | None = None) -> None:
        self.pid = self.runner.begin(
            self.folder, self.words if words is None else words, {**environ, "PORT": str(free_port())}
        )
        self.began_at = time.monotonic()


@dataclass
class Sitting:
    """Rounds on one installation."""

    chance: random.Random
    source: Source
    objects: Objects
    postgres: PostgresServer
    state_url: str
    scheduler: Process
    workers: Sequence[Process]
    environ: Mapping[str, str]
    counts: Counter[str] = field(default_factory=Counter)
    recoveries: list[float] = field(default_factory=list)

    def live(self, rounds: int) -> dict[str, Any]:
        """All rounds, then everything to its end; what was counted."""
        self.counts.update(dict.fromkeys(("kills", *ACTS, *FAULTS, "idle"), 0))
        most = self.chance.choice((3, 12))  # in some sittings there is hardly any time between two faults
        self._start_all()
        self._recover()
        for _ in range(rounds):
            for act in self.chance.choices(ACTS, WEIGHTS, k=self.chance.randint(1, most)):
                time.sleep(self.chance.uniform(0, 0.8))
                self.counts[act] += 1
                getattr(self, f"_{act}")()
            began_none = all(each.pid for each in (self.scheduler, *self.workers))
            self._start_all()
            self._recover(limit_seconds=IDLE_SECONDS if began_none else None)
        self._finish()
        return {**self.counts, "rounds": rounds, "recovery_seconds": [round(each, 2) for each in self.recoveries]}

    def close(self) -> None:
        """No process is left."""
        for process in (self.scheduler, *self.workers):
            if process.pid:
                process.kill()

    # ---- what happens to it ----

    def _kill(self) -> None:
        """One worker; the others go on alone for a moment."""
        self._end(self.chance.choice(self.workers))
        time.sleep(self.chance.uniform(0, 0.5))

    def _kill_all(self) -> None:
        for worker in self.workers:
            self._end(worker)

    def _kill_scheduler(self) -> None:
        self._end(self.scheduler)

    def _pause(self) -> None:
        """One worker beyond its lease, while the others go on."""
        paused = self.chance.choice([each for each in self.workers if each.pid] or [self.scheduler])
        if paused.pid:
            os.kill(paused.pid, signal.SIGSTOP)
            time.sleep(self.chance.uniform(0.5, 2.5) * TTL_SECONDS)
            os.kill(paused.pid, signal.SIGCONT)

    def _restart_postgres(self) -> None:
        """As after a power cut; at times it is away for a while."""
        self.postgres.stop_at_once()
        time.sleep(self.chance.choice((0.0, 0.0, 1.0)))
        self.postgres.start()

    def _change_engine(self) -> None:
        """One process does everything for a while, beside the workers at times; then the workers go on."""
        self._end(self.scheduler)
        if self.chance.random() < 0.5:
            self._kill_all()
        self.scheduler.begin({**self.environ, **KILLED, "SCALE_ENGINE": "embedded"})
        time.sleep(self.chance.uniform(0.5, 3.0))
        self._end(self.scheduler)

    # ---- what comes after ----

    def _start_all(self) -> None:
        """Those that do not run; one that ended by itself is a fault."""
        for process in (self.scheduler, *self.workers):
            if process.pid and process.is_over:
                self.counts["crashes"] += 1
                sys.stderr.write(f"{process.folder} ended with {process.ended()}:\n{process.log[-6000:]}\n")
            if not process.pid:
                process.begin({**self.environ, **KILLED})

    def _recover(self, limit_seconds: float | None = None) -> None:
        """Until a point of each device that is written now has come through. Where nothing was killed, within two TTLs
        and the time of a run; after that on a busy machine it is noted as idle, and much later as wedged.
        """
        marks, began = self.source.mark(), time.monotonic()
        while missing := self.objects.missing(marks):
            if time.monotonic() - began > IDLE_SECONDS + BUSY_SECONDS:
                self.counts["wedged"] += len(missing)
                told = "\n".join(f"{each.folder}\n{each.log[-3000:]}" for each in (self.scheduler, *self.workers))
                sys.stderr.write(f"wedged: {sorted(missing)}\n{told}\n")
                break
            time.sleep(LOOK_SECONDS)
        seconds = time.monotonic() - began
        self.counts["idle"] += limit_seconds is not None and seconds > limit_seconds
        self.recoveries.append(seconds)

    def _finish(self) -> None:
        """Everything comes in by one process, corrected values at last by a backfill; every ledger has closed."""
        for process in (self.scheduler, *self.workers):
            self._end(process)
        self.source.stop()
        began_ns = time.time_ns()
        for job in ("influx_to_s3", "influx_to_s3_reconcile"):
            self._to_the_end(("run", job))
        now = datetime.now(UTC)
        due = {row: fields for row, fields in self.source.rows().items() if row[-1] < began_ns}  # others lie ahead
        found = self._compare(due)
        # A corrected value that no count tells of comes with the pass that closes its window, or by a backfill.
        closed_ns = (time.time_ns() // 10**9 - GRACE_SECONDS) // 60 * 60 * 10**9
        closed = {row: fields for row, fields in due.items() if row[-1] < closed_ns}
        found["stale"] = self._compare(closed)["stale"]
        span = ("--from", f"{now - timedelta(hours=3):%Y-%m-%dT%H:00:00Z}", "--to", f"{now:%Y-%m-%dT%H:%M:00Z}")
        if found["stale"]:
            self._to_the_end(("backfill", "influx_to_s3", *span))
            found["corrected_by_backfill"] = found["stale"]
            found["stale"] = self._compare(closed)["stale"]
        self.counts.update(rows=len(due), **found)
        with psycopg.connect(self.state_url) as connection:
            query = "SELECT outcome, ledger, error FROM runs WHERE job = 'influx_to_s3'"
            for outcome, ledger, error in connection.execute(query).fetchall():
                self.counts[f"runs_{outcome}"] += 1
                if not json.loads(ledger or "{}").get("closes", True):
                    self.counts["open_ledgers"] += 1
                    sys.stderr.write(f"{self.scheduler.folder}: {error}: {ledger}\n")

    def _compare(self, source: Mapping[Row, Fields]) -> Counter[str]:
        objects, newest = self.objects.rows(), max((row[-1] for row in source), default=0)
        there = {row: found for row, found in objects.items() if row[-1] <= newest}
        for row in [row for row in source if objects.get(row) != [source[row]]][:10]:
            told = f"{row}: {source[row]} at the source, {objects.get(row)} in {self.objects.keys_of(row)}"
            sys.stderr.write(f"{self.scheduler.folder}: {told}\n")
        return differences(source, there)

    def _to_the_end(self, words: Sequence[str]) -> None:
        deadline = time.monotonic() + WEDGED_AFTER_SECONDS
        while True:
            self.scheduler.begin({**self.environ, **UNDISTURBED, "SCALE_ENGINE": "embedded"}, words)
            code = self.scheduler.ended()
            self._look_at(self.scheduler)
            if code == 0:
                return
            if time.monotonic() > deadline:
                self.counts["wedged"] += 1
                sys.stderr.write(f"{' '.join(words)} ended with {code}:\n{self.scheduler.log[-6000:]}\n")
                return
            time.sleep(0.3)

    def _end(self, process: Process) -> None:
        if process.pid:
            self.counts["kills"] += process.kill() == -signal.SIGKILL
            self._look_at(process)

    def _look_at(self, process: Process) -> None:
        if "Traceback" in process.log:
            self.counts["crashes"] += 1
            sys.stderr.write(f"{process.folder}:\n{process.log[-6000:]}\n")


@contextmanager
def serving(folder: Path) -> Iterator[tuple[Servers, Sequence[Runner]]]:
    """The outside systems, and what forks one process for the schedule and one for each worker."""
    with ExitStack() as stack:
        for name in ("influx", "seaweed"):
            (folder / name).mkdir(parents=True)
        servers = Servers(
            stack.enter_context(running_influxdb1(folder / "influx")),
            stack.enter_context(running(folder / "seaweed", free_ports(2 * len(SERVICES)), checks_keys=False)),
            stack.enter_context(running_postgres()),
        )
        yield servers, [stack.enter_context(started()) for _ in range(WORKERS + 1)]


def lived(servers: Servers, runners: Sequence[Runner], folder: Path, seed: str, rounds: int) -> dict[str, Any]:
    """One sitting in a new folder; what was counted."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    chance = random.Random(seed)  # noqa: S311 - moments and choices, no secret
    database, state_url = servers.influx.new_database(), servers.postgres.new_database()
    with ExitStack() as stack:
        bucket: Bucket = Folder(folder / "data" / "objects")
        if chance.random() < 0.5:
            client = stack.enter_context(closing(servers.seaweed.client()))
            bucket = S3Bucket(client, servers.seaweed)
        environ = {
            **bucket.environ,
            "DATA_DIR": str(folder / "data"),
            "CHECKPOINT_DATABASE_URL": state_url,
            "SCALE_ENGINE": "procrastinate",
            "EXPORT_SHARDS": "6",
            "INFLUXDB_URL": servers.influx.url,
            "INFLUXDB_DATABASE": database,
            "INFLUXDB_TOKEN": "none",
            "INFLUXDB_API": "influxql",
            "EXPORT_INTERVAL_SECONDS": "1",
            "EXPORT_WINDOW_SECONDS": "60",
            "EXPORT_GRACE_SECONDS": chance.choice(("0", str(GRACE_SECONDS))),
            "EXPORT_CONCURRENCY": "2",
            "LOOKBACK_HOURS": "1",
        }
        points = random.Random(f"points {seed}")  # noqa: S311
        source = stack.enter_context(Source(servers.influx, database, time.time_ns, points, DEVICES))
        scheduler, *workers = (
            Process(runner, folder / f"{number}", ("worker",) if number else ())
            for number, runner in enumerate(runners)
        )
        sitting = Sitting(chance, source, Objects(bucket), servers.postgres, state_url, scheduler, workers, environ)
        stack.callback(sitting.close)
        found = sitting.live(rounds)
    return {"store": "directory" if isinstance(bucket, Folder) else "s3", **found}


def main() -> int:
    """See the module."""
    with tempfile.TemporaryDirectory(prefix="shard-rounds-") as folder, serving(Path(folder)) as (servers, runners):
        return sit(lambda place, seed, rounds: lived(servers, runners, place, seed, rounds), str(__doc__))


if __name__ == "__main__":
    sys.exit(main())
