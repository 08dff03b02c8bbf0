"""Kills, pauses and confuses daemons that export a real InfluxDB, takes away their state and sets it back, and compares
what is left with what the source holds.

`uv run python tests/export_rounds.py [--rounds 2000] [--seed 1] [--minutes 60] [--folder FOLDER]`; see `kill_rounds`.

A sitting has one installation: a state on SQLite or PostgreSQL, objects in a directory or on a real S3 server, and up
to two daemons at once. Its time begins 30 days ago, so that windows and days can pass at once and the store's clock,
which is the machine's, is never behind.
"""

import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx

from daemon import free_port
from export_states import PostgresState, SavedState, SqliteState
from export_world import Bucket, Fields, Folder, Objects, Row, S3Bucket, Source, differences
from fake_clock import FakeClock, RightTime
from influxdb1 import InfluxDB1, running_influxdb1
from kill_rounds import (
    FAULTS,
    KILLED,
    TTL_SECONDS,
    UNDISTURBED,
    WEDGED_AFTER_SECONDS,
    WORLD_ROUNDS,
    Command,
    KilledProcess,
    Runner,
    sit,
    started,
)
from postgres import PostgresServer, running_postgres
from seaweed import SERVICES, Seaweed, free_ports, running

PAST = timedelta(days=30)
HOUR_SECONDS = 3600
WINDOWS_SECONDS = (900, 1800, 3600)
STEPS_SECONDS = (2, 60, 600, 3600, 90_000, 40 * 86_400)
BUSY_SECONDS = 45.0  # a busy machine may take so long for a daemon; no device may wait a minute
LOOK_SECONDS = 0.1
ACTS = ("kill", "pause", "save", "set_back", "take_away", "damage", "empty", "step", "window", "reconcile")
WEIGHTS = (4, 4, 2, 4, 2, 2, 1, 3, 2, 3)


@dataclass(frozen=True)
class Servers:
    """The outside systems, for all sittings. `clock` is that of PostgreSQL."""

    influx: InfluxDB1
    seaweed: Seaweed
    postgres: PostgresServer
    clock: FakeClock


@dataclass
class Replica(KilledProcess):
    """With a clock of its own."""

    clock: FakeClock
    port: int = 0

    def begin(self, command: Command, environ: Mapping[str, str]) -> None:
        """Start a command, or the daemon."""
        self.port = free_port()
        given = {**environ, **self.clock.environ, "PORT": str(self.port)}
        self.pid = self.runner.begin(self.folder, command, given)


@dataclass
class Sitting:
    """Rounds on one installation."""

    chance: random.Random
    source: Source
    objects: Objects
    state: SavedState
    replicas: tuple[Replica, Replica]
    right: RightTime
    environ: dict[str, str]
    counts: Counter[str] = field(default_factory=Counter)
    recoveries: list[float] = field(default_factory=list)

    def live(self, rounds: int) -> dict[str, Any]:
        """All rounds, then everything to its end; what was counted."""
        self.counts.update(dict.fromkeys((*ACTS, *FAULTS), 0))
        self._start(self.replicas[0])
        self._recover()
        for _ in range(rounds):
            for act in self.chance.choices(ACTS, WEIGHTS, k=self.chance.choice((1, 1, 2, 3))):
                self._wait_for_work()
                self.counts[act] += getattr(self, f"_{act}")() is not False
            self._calm_down()
            self._recover()
        self._finish()
        return {**self.counts, "rounds": rounds, "recovery_seconds": [round(each, 2) for each in self.recoveries]}

    def close(self) -> None:
        """No process is left."""
        for replica in self._alive():
            replica.kill()

    # ---- what happens to it ----

    def _wait_for_work(self) -> None:
        """Daemons do most when windows fall due: let it happen in the midst of that."""
        if self.chance.random() < 0.5:
            self.right.go_on(self.chance.choice(WINDOWS_SECONDS))
        time.sleep(self.chance.uniform(0, 0.8))

    def _kill(self) -> bool:
        """One daemon, or all of them."""
        alive = self._alive()
        for replica in alive if self.chance.random() < 0.3 else alive[:1]:
            self._end(replica)
        return bool(alive)

    def _pause(self) -> None:
        """One daemon beyond its lease, while the other goes on, and windows may close."""
        for replica in self.replicas:
            if not replica.pid:
                self._start(replica)
                time.sleep(self.chance.uniform(0.3, 0.9))
        paused = self.chance.choice(self.replicas)
        os.kill(paused.pid, signal.SIGSTOP)
        time.sleep(TTL_SECONDS)
        if self.chance.random() < 0.7:
            self.right.go_on(self.chance.choice(WINDOWS_SECONDS))
        time.sleep(self.chance.uniform(0.1, 1.5) * TTL_SECONDS)
        os.kill(paused.pid, signal.SIGCONT)

    def _save(self) -> bool:
        """Half of the times of windows that get no more points before they are closed, but late ones after."""
        if self.chance.random() < 0.5:
            return self.state.save()
        with self.source.quiet:
            time.sleep(1.5)
            saved = self.state.save()
            self.right.go_on(WINDOWS_SECONDS[-1] + 1200)
        return saved

    def _set_back(self) -> bool:
        """It knows nothing then of what the reconcile has just brought."""
        if self.chance.random() < 0.5:
            self._reconcile()
        self._perhaps_kill_all()
        return self.state.set_back()

    def _take_away(self) -> bool:
        self._perhaps_kill_all()
        return self.state.take_away()

    def _damage(self) -> bool:
        self._perhaps_kill_all()
        return self.state.damage(self.chance)

    def _empty(self) -> bool:
        self._perhaps_kill_all()
        return self.state.empty(self.chance)

    def _step(self) -> None:
        """One clock is wrong for a while: a daemon's, which may have just started, or that of the database."""
        seconds = self.chance.choice((-1, 1)) * self.chance.choice(STEPS_SECONDS)
        self.chance.choice(self.right.clocks).set(self.right.ahead + timedelta(seconds=seconds))
        self._perhaps_kill_all()
        if not self._alive():
            self._start(self.replicas[0])
        time.sleep(self.chance.uniform(0.5, 2.5))

    def _window(self) -> None:
        """Daemons that start from now on have another window length; those that run keep theirs."""
        self.environ["EXPORT_WINDOW_SECONDS"] = str(self.chance.choice(WINDOWS_SECONDS))
        if self.chance.random() < 0.7:
            self._kill()

    def _reconcile(self) -> bool:
        """Now, and not once a day; to its end if that comes soon."""
        for replica in self._alive():
            url, name = f"http://127.0.0.1:{replica.port}/ops/jobs", "influx_to_s3_reconcile"
            with suppress(httpx.HTTPError):
                httpx.post(f"{url}/{name}/run", timeout=3).raise_for_status()
                until = time.monotonic() + 5
                while time.monotonic() < until:
                    time.sleep(0.2)
                    jobs = httpx.get(url, timeout=3).raise_for_status().json()["jobs"]
                    if not any(job["name"] == name and job["state"] == "running" for job in jobs):
                        return True
        return False

    # ---- what comes after ----

    def _calm_down(self) -> None:
        """All clocks are right, time goes on, and at least one daemon runs."""
        # When a day begins, other window lengths take effect.
        to_next_day = 86_400 - self.right.now_ns() // 10**9 % 86_400
        self.right.go_on(self.chance.choice((0, 0, 60, 300, 1200, to_next_day + 900)))
        alive = self._alive()
        if len(alive) == 2 and self.chance.random() < 0.6:
            self._end(alive[0])
        elif not alive:
            self._start(self.chance.choice(self.replicas))

    def _recover(self) -> None:
        """Until a point of each device that is written now has come through; otherwise all start anew."""
        marks, began = self.source.mark(), time.monotonic()
        limit = began + 2 * TTL_SECONDS + BUSY_SECONDS
        while missing := self.objects.missing(marks):
            if time.monotonic() > limit:
                self.counts["wedged"] += len(missing)
                told = "\n".join(f"{each.folder}\n{each.log[-6000:]}" for each in self._alive())
                sys.stderr.write(f"wedged: {sorted(missing)}\n{told}\n")
                for replica in self._alive():
                    self._end(replica)
                self._start(self.replicas[0])
                return
            time.sleep(LOOK_SECONDS)
        self.recoveries.append(time.monotonic() - began)

    def _finish(self) -> None:
        """Everything becomes due, and comes in by the job and the reconcile; corrected values at last by a backfill."""
        for replica in self._alive():
            self._end(replica)
        self.source.stop()
        self.right.go_on(2 * HOUR_SECONDS)
        for job in ("influx_to_s3", "influx_to_s3_reconcile"):
            self._to_the_end(("run", job))
        source = self.source.rows()
        found = self._compare(source)
        span = ("--from", _hour(self.source.start_ns), "--to", _hour(self.right.now_ns()))
        if found["stale"]:
            self._to_the_end(("backfill", "influx_to_s3", *span))
            found["corrected_by_backfill"] = found["stale"]
            found["stale"] = self._compare(source)["stale"]
        self.counts.update(rows=len(source), **found)
        self._to_the_end(("verify", "influx_to_s3", *span), fault="unequal")

    def _compare(self, source: Mapping[Row, Fields]) -> Counter[str]:
        objects = self.objects.rows()
        for row in [row for row in {**source, **objects} if objects.get(row) != [source.get(row)]][:10]:
            told = f"{row}: {source.get(row)} at the source, {objects.get(row)} in {self.objects.keys_of(row)}"
            sys.stderr.write(f"{self.replicas[0].folder}: {told}\n")
        return differences(source, objects)

    def _to_the_end(self, command: Command, fault: str = "wedged") -> None:
        replica, deadline = self.replicas[0], time.monotonic() + WEDGED_AFTER_SECONDS
        while True:
            replica.begin(command, {**self.environ, **self.state.environ, **UNDISTURBED})
            code = replica.ended()
            self._look_at(replica)
            if code == 0:
                return
            if time.monotonic() > deadline or fault == "unequal":
                self.counts[fault] += 1
                sys.stderr.write(f"{' '.join(command)} ended with {code}:\n{replica.log[-6000:]}\n")
                return
            time.sleep(0.3)

    # ---- processes ----

    def _alive(self) -> list[Replica]:
        """Those that run, in an order by chance."""
        alive = [each for each in self.replicas if each.pid]
        for replica in [each for each in alive if each.is_over]:
            self.counts["crashes"] += 1
            sys.stderr.write(f"{replica.folder} ended with {replica.ended()}:\n{replica.log[-6000:]}\n")
            alive.remove(replica)
        return self.chance.sample(alive, len(alive))

    def _start(self, replica: Replica) -> None:
        replica.begin((), {**self.environ, **self.state.environ, **KILLED})

    def _end(self, replica: Replica) -> None:
        replica.kill()
        self._look_at(replica)

    def _look_at(self, replica: Replica) -> None:
        if "Traceback" in replica.log:
            self.counts["crashes"] += 1
            sys.stderr.write(f"{replica.folder}:\n{replica.log[-6000:]}\n")

    def _perhaps_kill_all(self) -> None:
        if self.chance.random() < 0.6:
            for replica in self._alive():
                self._end(replica)


def _hour(ns: int) -> str:
    return f"{datetime.fromtimestamp(ns // 10**9 // HOUR_SECONDS * HOUR_SECONDS, UTC):%Y-%m-%dT%H:%M:%SZ}"


@contextmanager
def serving(folder: Path) -> Iterator[tuple[Servers, Runner, Runner]]:
    """The outside systems, and two that fork processes with a clock of their own."""
    with ExitStack() as stack:
        clock = FakeClock(Path(stack.enter_context(_readable_folder())) / "clock")
        clock.set(-PAST)
        for name in ("influx", "seaweed"):
            (folder / name).mkdir(parents=True)
        servers = Servers(
            stack.enter_context(running_influxdb1(folder / "influx")),
            stack.enter_context(running(folder / "seaweed", free_ports(2 * len(SERVICES)), checks_keys=False)),
            stack.enter_context(running_postgres(clock.environ)),
            clock,
        )
        yield servers, stack.enter_context(started(clock.environ)), stack.enter_context(started(clock.environ))


@contextmanager
def _readable_folder() -> Iterator[str]:
    """PostgreSQL runs as another user."""
    with tempfile.TemporaryDirectory(prefix="clock-") as folder:
        Path(folder).chmod(0o755)
        yield folder


def lived(servers: Servers, runners: Sequence[Runner], folder: Path, seed: str, rounds: int) -> dict[str, Any]:
    """One sitting in a new folder; what was counted. Sittings in a row have every pair of state and store."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    number = int(seed.rpartition("-")[2]) // WORLD_ROUNDS
    on_postgres, on_s3 = number % 2 == 1, number // 2 % 2 == 1
    chance = random.Random(seed)  # noqa: S311 - moments and choices, no secret
    a, b = (Replica(runner, folder / f"{n}", FakeClock(folder / f"clock-{n}")) for n, runner in enumerate(runners))
    right = RightTime(-PAST, (servers.clock, a.clock, b.clock) if on_postgres else (a.clock, b.clock))
    database = servers.influx.new_database()
    state: SavedState = SqliteState(folder / "data", folder / "backup.db")
    if on_postgres:
        state = PostgresState(servers.postgres, servers.postgres.new_database())
    with ExitStack() as stack:
        bucket: Bucket = Folder(folder / "data" / "objects")
        if on_s3:
            client = stack.enter_context(closing(servers.seaweed.client()))
            bucket = S3Bucket(client, servers.seaweed)
        environ = {**settings(chance), **bucket.environ, "DATA_DIR": str(folder / "data")}
        environ |= {"INFLUXDB_URL": servers.influx.url, "INFLUXDB_DATABASE": database}
        source = stack.enter_context(Source(servers.influx, database, right.now_ns, random.Random(f"points {seed}")))  # noqa: S311
        sitting = Sitting(chance, source, Objects(bucket), state, (a, b), right, environ)
        stack.callback(sitting.close)
        found = sitting.live(rounds)
    return {"state": "postgresql" if on_postgres else "sqlite", "store": "s3" if on_s3 else "directory", **found}


def settings(chance: random.Random) -> dict[str, str]:
    """Of one installation, without where its systems are."""
    return {
        "INFLUXDB_TOKEN": "none",
        "INFLUXDB_API": "influxql",
        "EXPORT_INTERVAL_SECONDS": "1",
        "EXPORT_WINDOW_SECONDS": str(chance.choice(WINDOWS_SECONDS)),
        "EXPORT_GRACE_SECONDS": chance.choice(("0", "300", "1200")),
        "EXPORT_TIMESTAMP_UNIT": chance.choice(("us", "ns")),
        "LOOKBACK_HOURS": "1",
        "RECONCILE_DAYS": "60",
    }


def main() -> int:
    """See the module."""
    with tempfile.TemporaryDirectory(prefix="export-rounds-") as folder, serving(Path(folder)) as (servers, *runners):
        return sit(lambda place, seed, rounds: lived(servers, runners, place, seed, rounds), str(__doc__))


if __name__ == "__main__":
    sys.exit(main())
