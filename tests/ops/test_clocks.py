"""Clocks that jump, and a state that is damaged, as the daemon and the commands show them."""

import time
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from app.core.pipeline import Commit
from app.core.runs import Outcome, Run
from app.db.state import FILE, open_state
from daemon import Daemon, Daemons
from fake_clock import FakeClock
from shell import Shell

DECADES = timedelta(days=20_000)


def runs_of(daemon: Daemon, job: str) -> list[datetime]:
    runs = daemon.get(f"/ops/runs?job={job}&limit=500").json["runs"]
    return [datetime.fromisoformat(run["started_at"]) for run in runs]


@pytest.mark.slow
@pytest.mark.parametrize("ahead", [-DECADES, DECADES], ids=["behind", "ahead"])
def test_a_clock_that_is_set_right_after_decades_costs_one_run_of_each_job(
    daemons: Daemons, tmp_path: Path, ahead: timedelta
) -> None:
    clock = FakeClock(tmp_path / "clock")
    clock.set(ahead)
    daemon = daemons.start("quick_jobs", wait=True, key="", **clock.environ)
    daemon.until(lambda: daemon.job("quick")["last_run"])
    clock.set(timedelta())
    set_at = time.monotonic()
    longest = 0.0
    while time.monotonic() - set_at < 12:
        asked_at = time.monotonic()
        assert daemon.get("/health").status == 200
        longest = max(longest, time.monotonic() - asked_at)
        time.sleep(0.2)
    assert longest < 2
    now = datetime.now(UTC)
    right = [at for at in runs_of(daemon, "quick") if abs(at - now) < timedelta(minutes=5)]
    assert 1 <= len(right) <= 12 / daemon.job("quick")["interval_seconds"] + 2
    assert "the clock was set" in daemon.log
    next_at = datetime.fromisoformat(daemon.job("quick")["next_run_at"])
    assert abs(next_at - now) < timedelta(minutes=5)


@pytest.mark.slow
def test_a_clock_that_went_ahead_and_back_between_two_looks_leaves_no_timer_there(
    daemons: Daemons, tmp_path: Path
) -> None:
    clock = FakeClock(tmp_path / "clock")
    clock.set(timedelta())
    daemon = daemons.start("quick_jobs", wait=True, key="", **clock.environ)
    daemon.until(lambda: daemon.job("quick")["last_run"])

    def next_in() -> timedelta:
        return datetime.fromisoformat(daemon.job("quick")["next_run_at"]) - datetime.now(UTC)

    clock.set(timedelta(hours=25))
    daemon.until(lambda: next_in() > timedelta(hours=24), 30)
    clock.set(timedelta())
    daemon.until(lambda: next_in() < timedelta(minutes=1), 30)


@pytest.mark.slow
def test_what_lies_ahead_of_now_is_shown_and_makes_nothing_unready(daemons: Daemons, tmp_path: Path) -> None:
    ahead_at = datetime.now(UTC) + timedelta(days=40)
    with closing(open_state("", tmp_path / "data")) as state:
        state.runs.save(Run("ahead", "quick", ahead_at, ahead_at, Outcome.OK))
        lease = state.leases.acquire("quick", "one", 30)
        assert lease
        state.checkpoints.commit("quick", "d", Commit((), ahead_at), lease)
        state.leases.release(lease)
    daemon = daemons.start("quick_jobs", LOG_LEVEL="INFO")
    ready = daemon.until(lambda: (answer := daemon.get("/ready")).status == 200 and answer.json)
    assert "quick stands 40 days ahead of now" in ready["notes"]["checkpoint_store_connected"]
    daemon.until(lambda: daemon.job("quick")["clock_ahead_seconds"] > 39 * 86_400, 30)
    assert 'headwater_clock_ahead_seconds{job="quick"} 345' in daemon.get("/metrics").text
    assert daemon.log.count("ahead of now (check the clocks") == 1
    assert runs_of(daemon, "quick")[0] < datetime.now(UTC) + timedelta(minutes=1)


@pytest.mark.slow
def test_a_damaged_state_is_said_in_the_log_in_ready_and_by_check(
    daemons: Daemons, shell: Shell, tmp_path: Path
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / FILE).write_bytes(b"rubbish" * 1000)
    daemon = daemons.start("quick_jobs")
    ready = daemon.until(lambda: (answer := daemon.get("/ready")).status == 200 and answer.json)
    (moved,) = (tmp_path / "data").glob(f"{FILE}.damaged-*")
    assert moved.name in ready["notes"]["checkpoint_store_connected"]
    assert daemon.log.count(f"moved to {moved.name} and re-created") == 1
    daemon.until(lambda: daemon.job("quick")["last_run"])
    done = shell.run("quick_jobs", "check")
    assert done.returncode == 0, done.stdout + done.stderr
    assert moved.name in done.stdout
    moved.unlink()
    assert moved.name not in shell.run("quick_jobs", "check").stdout
