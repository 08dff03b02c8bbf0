"""Kills, pauses and confuses daemons that export a real InfluxDB, takes away their state and sets it back, and compares
what is left with what the source holds.

`uv run python tests/export_rounds.py [--rounds 2000] [--seed 1] [--minutes 60] [--folder FOLDER]`; see `kill_rounds`.

A sitting has one installation: a state on SQLite or PostgreSQL, objects in a directory or on a real S3 server, and up to
two daemons at once. All its clocks begin in the past, so that windows and days can pass in no time and a store's clock
is never behind.
"""

import os
import random
import shutil
import signal
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from daemon import free_port
from export_states import PostgresState, SavedState, SqliteState
from export_world import Bucket, Folder, Objects, Source, bucket_on, differences
from fake_clock import FakeClock
from influxdb1 import InfluxDB1, running_influxdb1
from kill_rounds import FAULTS, KILLED, TTL_SECONDS, UNDISTURBED, WEDGED_AFTER_SECONDS, WORLD_ROUNDS, Command, Runner, sit, started
from postgres import PostgresServer, running_postgres
from seaweed import SERVICES, Seaweed, free_ports, running

PAST = timedelta(days=30)
HOUR_SECONDS = 3600
WINDOWS_SECONDS = (900, 1800, 3600)
STEPS_SECONDS = (2, 60, 600, 3600, 90_000, 40 * 86_400)
BUSY_SECONDS = 20.0  # what a busy machine may take to start a daemon
LOOK_SECONDS = 0.1
ACTS = ("kill", "pause", "save", "set_back", "take_away", "damage", "empty", "step", "window", "reconcile")
WEIGHTS = (4, 4, 3, 3, 2, 2, 1, 3, 2, 1)


@dataclass(frozen=True)
class Servers:
    """The outside systems, for all sittings. `clock` is that of PostgreSQL."""

    influx: InfluxDB1
    seaweed: Seaweed
    postgres: PostgresServer
    clock: FakeClock


@dataclass
class Replica:
    """At most one process at a time. Its folder is its own; where its data are, the settings say."""

    runner: Runner
    clock: FakeClock
    folder: Path
    pid: int = 0
    command: Command = ()

    def begin(self, command: Command, environ: Mapping[str, str]) -> None:
        """Start a command, or the daemon."""
        given = {**environ, **self.clock.environ, "PORT": str(free_port())}
        self.pid = self.runner.begin(self.folder, command, given)
        self.port = int(given["PORT"])

    @property
    def log(self) -> str:
        return "\n".join((self.folder / name).read_text(errors="replace") for name in ("answer.log", "said.log"))

    @property
    def is_over(self) -> bool:
        """Whether the process ended by itself."""
        return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"

    def ended(self) -> int:
        """Its exit code."""
        self.pid = 0
        return self.runner.ended()

    def kill(self) -> int:
        """SIGKILL; the exit code, or minus the signal."""
        os.kill(self.pid, signal.SIGKILL)
        return self.ended()


@dataclass
class Sitting:
    """Rounds on one installation. `ahead`: the right time, against the machine's."""

    chance: random.Random
    source: Source
    objects: Objects
    state: SavedState
    replicas: tuple[Replica, Replica]
    database_clock: FakeClock
    environ: dict[str, str]
    ahead: timedelta = -PAST
    counts: Counter[str] = field(default_factory=Counter)
    recoveries: list[float] = field(default_factory=list)

    def now_ns(self) -> int:
        """The right time."""
        return time.time_ns() + self.ahead // timedelta(microseconds=1) * 1000

    def live(self, rounds: int) -> dict[str, Any]:
        """All rounds, then everything to its end; what was counted."""
        self._start(self.replicas[0])
        self._recover()
        for _ in range(rounds):
            for act in self.chance.choices(ACTS, WEIGHTS, k=self.chance.choice((1, 1, 2, 3))):
                done = getattr(self, f"_{act}")()
                self.counts[act] += done is not False
                time.sleep(self.chance.uniform(0, 0.4))
            self._calm_down()
            self._recover()
        self._finish()
        return {**self.counts, "rounds": rounds, "recovery_seconds": [round(each, 2) for each in self.recoveries]}

    # ---- what happens to it ----

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
        time.sleep(self.chance.uniform(0.3, 1.5))
        paused = self.chance.choice(self.replicas)
        os.kill(paused.pid, signal.SIGSTOP)
        time.sleep(TTL_SECONDS)
        if self.chance.random() < 0.7:
            self._pass(self.chance.choice(WINDOWS_SECONDS))
        time.sleep(self.chance.uniform(0.1, 1.5) * TTL_SECONDS)
        os.kill(paused.pid, signal.SIGCONT)

    def _save(self) -> bool:
        return self.state.save()

    def _set_back(self) -> bool:
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
        """One clock is wrong for a while: that of the database, or that of a daemon which may have just started."""
        wrong = self.ahead + timedelta(seconds=self.chance.choice((-1, 1)) * self.chance.choice(STEPS_SECONDS))
        self.chance.choice((self.database_clock, *(each.clock for each in self.replicas))).set(wrong)
        if self.chance.random() < 0.5:
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
        """Now, and not once a day."""
        for replica in self._alive():
            url = f"http://127.0.0.1:{replica.port}/ops/jobs/influx_to_s3_reconcile/run"
            with suppress(OSError), urllib.request.urlopen(urllib.request.Request(url, b"", method="POST"), timeout=3):  # noqa: S310
                return True
        return False

    # ---- what comes after ----

    def _calm_down(self) -> None:
        """All clocks are right, time goes on, and at least one daemon runs."""
        self._pass(self.chance.choice((0, 0, 60, 300, 1200, self._to_midnight_seconds())))
        alive = self._alive()
        if len(alive) == 2 and self.chance.random() < 0.6:
            self._end(self.chance.choice(alive))
        elif not alive:
            self._start(self.chance.choice(self.replicas))

    def _to_midnight_seconds(self) -> int:
        """To some minutes after the next change of day, when other window lengths take effect."""
        return 86_400 - self.now_ns() // 10**9 % 86_400 + 900

    def _pass(self, seconds: float) -> None:
        self.ahead += timedelta(seconds=seconds)
        for clock in (self.database_clock, *(each.clock for each in self.replicas)):
            clock.set(self.ahead)

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
        """Everything becomes due and is brought in: by the job, by the reconcile, and corrected values by a backfill."""
        for replica in self._alive():
            self._end(replica)
        self.source.stop()
        self._pass(2 * HOUR_SECONDS)
        runner = self.replicas[0]
        for job in ("influx_to_s3", "influx_to_s3_reconcile"):
            self._to_the_end(runner, ("run", job))
        source = self.source.rows()
        self.counts["late_corrections"] = self._compare(source)["stale"]
        span = ("--from", _hour(self.source.start_ns), "--to", _hour(self.now_ns()))
        if self.counts["late_corrections"]:
            self._to_the_end(runner, ("backfill", "influx_to_s3", *span))
        after = self._compare(source)
        self.counts.update(after)
        self.counts["rows"] = len(source)
        self._to_the_end(runner, ("verify", "influx_to_s3", *span), fault="unequal")

    def _compare(self, source: Mapping[Any, Any]) -> Counter[str]:
        objects = self.objects.rows()
        found = differences(source, objects)
        for row in [row for row in {**source, **objects} if objects.get(row) != [source.get(row)]][:10]:
            told = f"{row}: {source.get(row)} at the source, {objects.get(row)} in {self.objects.keys_of(row)}"
            sys.stderr.write(f"{self.replicas[0].folder}: {told}\n")
        return found

    def _to_the_end(self, replica: Replica, command: Command, fault: str = "wedged") -> None:
        deadline = time.monotonic() + WEDGED_AFTER_SECONDS
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

    def close(self) -> None:
        """No process is left."""
        for replica in self._alive():
            replica.kill()

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


def lived(servers: Servers, runners: tuple[Runner, Runner], folder: Path, seed: str, rounds: int) -> dict[str, Any]:
    """One sitting in a new folder; what was counted."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    chance = random.Random(seed)  # noqa: S311 - moments and choices, no secret
    # By the number of its first round, so that sittings in a row have every pair.
    number = int(seed.rpartition("-")[2]) // WORLD_ROUNDS
    on_postgres, on_s3 = number % 2 == 1, number // 2 % 2 == 1
    with ExitStack() as stack:
        environ = {
            "DATA_DIR": str(folder / "data"),
            "INFLUXDB_URL": servers.influx.url,
            "INFLUXDB_TOKEN": "none",
            "INFLUXDB_API": "influxql",
            "INFLUXDB_DATABASE": servers.influx.new_database(),
            "EXPORT_INTERVAL_SECONDS": "1",
            "EXPORT_WINDOW_SECONDS": str(chance.choice(WINDOWS_SECONDS)),
            "EXPORT_GRACE_SECONDS": chance.choice(("0", "300", "1200")),
            "EXPORT_TIMESTAMP_UNIT": chance.choice(("us", "ns")),
            "LOOKBACK_HOURS": "1",
            "RECONCILE_DAYS": "60",
        }
        bucket: Bucket = Folder(folder / "data" / "objects")
        if on_s3:
            bucket = stack.enter_context(contextmanager(bucket_on)(servers.seaweed))
            environ |= {
                "S3_BUCKET": bucket.name,
                "S3_ENDPOINT_URL": servers.seaweed.endpoint_url,
                "S3_ADDRESSING_STYLE": "path",
                "S3_ACCESS_KEY_ID": servers.seaweed.access_key,
                "S3_SECRET_ACCESS_KEY": servers.seaweed.secret_key,
            }
        state: SavedState
        if on_postgres:
            state = PostgresState(servers.postgres, servers.postgres.new_database())
        else:
            state = SqliteState(folder / "data", folder / "backup.db", {})
        replicas = tuple(
            Replica(runner, FakeClock(folder / f"clock-{name}"), folder / name)
            for runner, name in zip(runners, ("a", "b"), strict=True)
        )
        counts = Counter(dict.fromkeys((*ACTS, "rows", "late_corrections", *FAULTS), 0))
        source = Source(servers.influx, environ["INFLUXDB_DATABASE"], time.time_ns, chance=random.Random(f"{seed}-points"))  # noqa: S311
        sitting = Sitting(chance, source, Objects(bucket), state, replicas, servers.clock, environ, counts=counts)  # type: ignore[arg-type]
        source.now_ns = sitting.now_ns
        stack.callback(sitting.close)
        sitting._pass(0)
        stack.enter_context(source)
        found = sitting.live(rounds)
    return {"state": "postgresql" if on_postgres else "sqlite", "store": "s3" if on_s3 else "directory", **found}


def main() -> int:
    """See the module."""
    with tempfile.TemporaryDirectory(prefix="export-rounds-") as folder, serving(Path(folder)) as (servers, *runners):
        a, b = runners
        return sit(lambda place, seed, rounds: lived(servers, (a, b), place, seed, rounds), str(__doc__))


if __name__ == "__main__":
    sys.exit(main())
