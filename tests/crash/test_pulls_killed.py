"""The real process is killed over and over while it pulls, and its state is taken away or set back in between; tables,
objects and what was set aside end up as if it had not been.
"""

import os
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from effort import EFFORT
from pulling import Clock, landed
from simulators import amplitude, appmetrica

KILLS = 12 * EFFORT
STATE = "state.db*"
JOBS = ("amplitude", "appmetrica")
KILLED = {"LEASE_TTL_SECONDS": "1", "LEASE_HEARTBEAT_SECONDS": "0.3"}
UNDISTURBED = {"LEASE_TTL_SECONDS": "30", "LEASE_HEARTBEAT_SECONDS": "5"}  # a busy machine may not end a run


@pytest.fixture
def services() -> Iterator[Mapping[str, str]]:
    """Both services, with lines and rows that are set aside; Amplitude has hours of several members, and one that it
    does not give.
    """
    now = datetime.now(UTC)
    with ExitStack() as stack:
        web = stack.enter_context(amplitude.AmplitudeSimulator(clock=lambda: now))
        web.state.made = amplitude.generated(40)
        mobile = stack.enter_context(appmetrica.AppMetricaSimulator(clock=lambda: now))
        mobile.state.rows = appmetrica.generated(mobile.state.application_id, 60)
        mobile.state.questions = 1
        hour = now.replace(minute=0, second=0, microsecond=0) - timedelta(hours=9)
        for at in (hour - timedelta(hours=number) for number in range(0, 60, 6)):
            web.state.lines["web", at] = [b'{"city":"Z\xfcrich"}', b'{"no":"uuid"}', b"{"]
            mobile.state.lines[at] = [b"one,two", b'one,"Z\xfcrich']
        web.state.faults["web", hour - timedelta(hours=1)] = amplitude.AmplitudeFault(400, amplitude.LARGE)
        yield {**web.environment("web"), **mobile.environment(), "APPMETRICA_LOOKBACK_DAYS": "4"}


def start(job: str, services: Mapping[str, str], folder: Path, terms: Mapping[str, str]) -> "subprocess.Popen[str]":
    environ = {**os.environ, **services, **terms, "DATA_DIR": str(folder)}
    command = [sys.executable, "-m", "app", "run", job]
    return subprocess.Popen(
        command, env=environ, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def run_to_the_end(job: str, services: Mapping[str, str], folder: Path) -> None:
    """A lease of a killed process runs out by itself."""
    deadline = time.monotonic() + 90
    while True:
        process = start(job, services, folder, UNDISTURBED)
        told, _ = process.communicate(timeout=100)
        if process.returncode == 0:
            return
        # What a killed run had set aside before its commit is told once more, by the run that goes on.
        assert process.returncode == os.EX_TEMPFAIL or "set aside" in told, told
        assert time.monotonic() < deadline
        time.sleep(0.3)


def outcome(folder: Path) -> Any:
    with landed(folder, Clock(datetime.now(UTC))) as made:
        weeks = {key: body for key, body in made.objects("amplitude/").items() if key.endswith(".zip")}
        hours = made.lines("amplitude/web/hours/") | made.lines("appmetrica/events/")
        kept = made.objects("amplitude/_set_aside/") | made.objects("appmetrica/_set_aside/")
        aside = {key: sorted(body.splitlines()) for key, body in kept.items()}
        return made.tables(), weeks, hours, made.state.checkpoints.cursors("amplitude"), aside


def disturb_state(folder: Path, chance: random.Random) -> None:
    """Now and then the state is gone, or an earlier one is put in its place."""
    backup = folder.parent / "backup"
    match chance.randrange(8):
        case 0:
            for file in folder.glob(STATE):
                file.unlink()
        case 1:
            shutil.rmtree(backup, ignore_errors=True)
            backup.mkdir()
            for file in folder.glob(STATE):
                shutil.copy2(file, backup)
        case 2 if backup.exists():
            for file in folder.glob(STATE):
                file.unlink()
            for file in backup.iterdir():
                shutil.copy2(file, folder)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_kills_leave_what_one_clean_pull_leaves(services: Mapping[str, str], tmp_path: Path) -> None:
    chance = random.Random(7)  # noqa: S311 - moments to kill at, no secret
    folder, calm = tmp_path / "killed", tmp_path / "calm"
    folder.mkdir()
    calm.mkdir()
    number = killed = 0
    span_seconds = 1.1
    while killed < KILLS:
        with start(JOBS[number % 2], services, folder, KILLED) as process:
            time.sleep(chance.uniform(0.3, 1.0) * span_seconds)
            is_alive = process.poll() is None
            process.kill()
        number, killed = number + 1, killed + is_alive
        span_seconds *= 1.05 if is_alive else 0.9  # how long a run takes is the machine's affair
        disturb_state(folder, chance)
    hour = None
    while hour != (hour := datetime.now(UTC).hour):  # both have to pull the same hours
        for job in JOBS:
            run_to_the_end(job, services, folder)
            run_to_the_end(job, services, calm)
    tables, *others = outcome(calm)
    assert len(tables["events_part"]) > 3000
    assert len(others[3]) > 30
    disturbed, *after = outcome(folder)
    for name, rows in tables.items():
        surplus = Counter(map(repr, disturbed[name]))
        surplus.subtract(map(repr, rows))
        assert {row: count for row, count in surplus.items() if count} == {}, (
            f"{name}: below 0 missing, above 0 too many"
        )
    assert after == others
    assert timedelta(0) < datetime.now(UTC) - others[2]["web"] < timedelta(hours=5)
