"""Two real daemons on one PostgreSQL: each window once, take-over from a killed one, and a paused one that wakes up."""

import fcntl
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest

from app.core.runs import Outcome
from app.db.state import State, open_state
from app.object_store.local import LocalDirectory
from daemon import Daemon, Daemons
from exports import exported, stored
from postgres import PostgresServer
from simulators.influx import InfluxSimulator

SECOND_NS = 10**9
HOURS = 3
TTL_SECONDS = 3.0


@dataclass
class Pair:
    """What both daemons share: the source, the folder of objects, the state."""

    daemons: Daemons
    influx: InfluxSimulator
    state: State
    url: str
    folder: Path

    def start(self) -> Daemon:
        return self.daemons.start(
            INFLUXDB_URL=self.influx.url,
            INFLUXDB_TOKEN=self.influx.token,
            INFLUXDB_ORG=self.influx.org,
            INFLUXDB_BUCKET=self.influx.bucket,
            CHECKPOINT_DATABASE_URL=self.url,
            LOOKBACK_HOURS=str(HOURS),
            EXPORT_GRACE_SECONDS="0",
            EXPORT_WINDOW_SECONDS="300",
            EXPORT_INTERVAL_SECONDS="1",
            EXPORT_CONCURRENCY="1",
            LEASE_TTL_SECONDS=str(TTL_SECONDS),
            LEASE_HEARTBEAT_SECONDS="0.5",
        )

    @property
    def store(self) -> LocalDirectory:
        return LocalDirectory(self.folder / "data" / "objects")

    def objects(self) -> int:
        return sum(1 for _ in self.store.list("telemetry/device_id="))

    def pause(self, daemon: Daemon) -> None:
        """Stop a process at a moment at which it does not hold the folder's lock, for which all other writers wait."""
        lock = self.folder / "data" / "objects" / ".headwater" / "lock"
        while True:
            os.kill(daemon.process.pid, signal.SIGSTOP)
            daemon.until(
                lambda: Path(f"/proc/{daemon.process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
            )
            with lock.open() as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    os.kill(daemon.process.pid, signal.SIGCONT)
                    time.sleep(0.01)
                else:
                    return

    def is_whole(self) -> bool:
        """Every point of the source is in the objects, each once: `exported` fails for doubles."""
        return exported(self.store) == stored(self.influx.points)


@pytest.fixture
def pair(daemons: Daemons, postgres_server: PostgresServer, tmp_path: Path) -> Iterator[Pair]:
    url = postgres_server.new_database()
    with InfluxSimulator() as influx:
        now_s = int(time.time())
        lines = [
            f"device_telemetry,device_id=D{device} voltage={200 + place % 40},current=1,power={place} "
            f"{(now_s - HOURS * 3600 + 300 + place * 20) * SECOND_NS}"
            for device in range(6)
            for place in range((HOURS * 3600 - 900) // 20)
        ]
        influx.write("\n".join(lines))
        state = open_state(url, tmp_path / "unused")
        yield Pair(daemons, influx, state, url, tmp_path)
        state.close()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_daemons_do_each_window_once(pair: Pair) -> None:
    both = [pair.start(), pair.start()]
    both[0].until(pair.is_whole, 150)
    for daemon in both:
        assert daemon.terminate() in (143, -signal.SIGTERM)
    runs = pair.state.runs.recent("influx_to_s3", 1000)
    spans = sorted((run.started_at, run.ended_at) for run in runs if run.ended_at)
    assert all(earlier[1] <= later[0] for earlier, later in pairwise(spans))
    assert sum(run.report.windows for run in runs) >= pair.objects()
    assert {run.outcome for run in runs} <= {Outcome.OK, Outcome.STOPPED}


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_other_daemon_takes_over_from_a_killed_holder_within_the_lease_time(pair: Pair) -> None:
    first = pair.start()
    first.until(lambda: pair.objects() > 20, 90)
    second = pair.start()
    first.kill()
    left = pair.objects()
    killed_at = time.monotonic()
    second.until(lambda: pair.objects() > left, 90)
    took_seconds = time.monotonic() - killed_at
    second.until(pair.is_whole, 150)
    # the lease, the interval, and a loaded machine's share
    assert took_seconds < TTL_SECONDS + 40


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_process_that_wakes_up_after_its_lease_cannot_commit(pair: Pair) -> None:
    first = pair.start()
    first.until(lambda: pair.objects() > 20, 90)
    pair.pause(first)
    try:
        second = pair.start()
        second.until(pair.is_whole, 150)
        cursors = pair.state.checkpoints.cursors("influx_to_s3")
    finally:
        os.kill(first.process.pid, signal.SIGCONT)

    def stopped() -> bool:
        return any(run.outcome is Outcome.STOPPED for run in pair.state.runs.recent("influx_to_s3", 1000))

    first.until(stopped, 90)
    (fenced, *_) = [r for r in pair.state.runs.recent("influx_to_s3", 1000) if r.outcome is Outcome.STOPPED]
    assert "lease" in fenced.error
    after = pair.state.checkpoints.cursors("influx_to_s3")
    assert all(after[name] >= at for name, at in cursors.items())
    assert pair.is_whole()
