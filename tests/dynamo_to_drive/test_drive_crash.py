"""The real process, killed at many points of its uploads: the files are those of a world that nobody disturbed."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from app.core.windows import floor_to
from daemon import KEPT, Daemons
from kill_rounds import KILLED, UNDISTURBED, asked, is_over
from shipping import Shipping, item, shipping
from simulators.drive import DriveFault

TESTS = Path(__file__).parents[1]
STALL_SECONDS = 60.0
# Those of a run that makes a file, then the one that brings it up to date.
REQUESTS = (
    "POST /token",
    "GET /drive/v3/files/[^?]*$",
    "GET /drive/v3/files$",
    "GET .*generateIds",
    "POST /upload",
    "PATCH /upload",
)
DELAYS_SECONDS = (0.0, 0.002, 0.004, 0.007, 0.011, 0.016)


def environ(ship: Shipping, terms: Mapping[str, str] = KILLED) -> dict[str, str]:
    base = {name: os.environ[name] for name in KEPT if name in os.environ}
    return {**base, **ship.environ, "LOG_FILE": "off", **terms}


@dataclass
class Runner:
    """Real processes that run the job, forked from one that has everything imported."""

    process: "subprocess.Popen[str]"

    def begin(self, ship: Shipping, terms: Mapping[str, str]) -> int:
        """Start one; its pid."""
        ship.folder.mkdir(parents=True, exist_ok=True)
        (ship.folder / "environ.json").write_text(json.dumps(environ(ship, terms)))
        return asked(self.process, str(ship.folder))

    def ended(self) -> int:
        """Its exit code, or minus the signal."""
        return asked(self.process, "")

    def run(self, ship: Shipping) -> None:
        """To the end, as soon as the lease of one that was killed has run out."""
        said, code = ship.folder / "said.log", os.EX_TEMPFAIL
        while code == os.EX_TEMPFAIL:
            time.sleep(0.1)
            said.unlink(missing_ok=True)
            self.begin(ship, UNDISTURBED)
            code = self.ended()
        assert code == 0, said.read_text()


@pytest.fixture
def runner() -> Iterator[Runner]:
    command = [sys.executable, str(TESTS / "app_kills.py")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield Runner(process)
        assert process.stdin is not None
        process.stdin.close()


def killed(runner: Runner, ship: Shipping, fault: DriveFault | None, where: str, delay_seconds: float = 0) -> None:
    """One run that ends with SIGKILL when the request `where` has come, and suffers the fault.

    A lease of a second is lost by a machine that stands still for that long: then the run is begun anew.
    """
    ship.drive.state.asked.clear()
    if fault is not None:
        ship.drive.add_fault(fault, where)
    pid = runner.begin(ship, KILLED)
    deadline = time.monotonic() + 40
    while not any(re.search(where, what) for what in ship.drive.state.asked):
        assert time.monotonic() < deadline
        if is_over(pid):
            assert runner.ended() == 1
            assert "expired or was taken over" in (ship.folder / "said.log").read_text()
            pid = runner.begin(ship, KILLED)
        time.sleep(0.002)
    time.sleep(delay_seconds)
    os.kill(pid, signal.SIGKILL)
    assert runner.ended() in (-signal.SIGKILL, 0)
    ship.drive.state.waiting.clear()
    ship.drive.state.stale_lists = 2  # Drive's lists may lack what was made a moment ago


def before(now: datetime) -> datetime:
    """The start of the hour before."""
    return floor_to(now, 3600) - timedelta(hours=1)


def written(hour: datetime, number: int, *worlds: Shipping) -> None:
    """Ten more rows of the hour, in each world; it takes late rows for as long as this test may last."""
    for world in worlds:
        world.now = datetime.now(UTC)
        world.extra["DRIVE_GRACE_SECONDS"] = "7200"
        for second in range(10):
            world.put(item(hour + timedelta(minutes=number, seconds=second), temp=f"{number}.{second}"))


def compared(runner: Runner, ship: Shipping, quiet: Shipping) -> None:
    """After a run that nothing disturbs, the files are those of a world without kills, and no other was ever made."""
    runner.run(ship)
    quiet.run()
    assert ship.files == quiet.files
    assert not any(file.trashed for file in ship.drive.state.files.held.values())


@pytest.mark.slow
@pytest.mark.parametrize("after", [False, True], ids=["before its effect", "before its answer"])
def test_a_process_killed_in_each_request_leaves_one_file_as_if_undisturbed(
    tmp_path: Path, runner: Runner, *, after: bool
) -> None:
    hour = before(datetime.now(UTC))
    with shipping(tmp_path / "a") as ship, shipping(tmp_path / "b") as quiet:
        for number, where in enumerate(REQUESTS):
            written(hour, number, ship, quiet)
            if "PATCH" not in where:  # under another name the hour has no file yet
                ship.extra["CSV_NAME_PREFIX"] = quiet.extra["CSV_NAME_PREFIX"] = f"ship{number}"
            killed(runner, ship, DriveFault(after=after, cut=True, stall_seconds=STALL_SECONDS), where)
            compared(runner, ship, quiet)
        assert len(ship.files) == len(REQUESTS) - 1
        assert max(content.count(b"\n") for content in ship.files.values()) == 10 * len(REQUESTS) + 1


@pytest.mark.slow
@pytest.mark.parametrize("after", [False, True], ids=["before its effect", "before its answer"])
def test_healing_that_is_killed_in_each_request_is_finished_by_the_next(
    tmp_path: Path, runner: Runner, *, after: bool
) -> None:
    hour = before(datetime.now(UTC))
    with shipping(tmp_path / "a") as ship:
        written(hour, 0, ship)
        runner.run(ship)
        ((name, content),) = ship.files.items()
        span = ["--from", f"{hour:%Y-%m-%dT%H:%M:%SZ}", "--to", f"{hour + timedelta(hours=1):%Y-%m-%dT%H:%M:%SZ}"]
        (ship.folder / "command.json").write_text(json.dumps(["verify", "dynamo_to_drive", *span, "--heal"]))
        for where in REQUESTS[2:]:
            files = ship.drive.state.files
            (file,) = files.matching(lambda file: file.name == name and not file.trashed)
            lost = "POST /upload" in where or "generateIds" in where
            files.change(file.file_id, **({"trashed": True} if lost else {"content": content[:-40]}))
            killed(runner, ship, DriveFault(after=after, cut=True, stall_seconds=STALL_SECONDS), where)
            runner.run(ship)
            assert ship.files == {name: content}, where


@pytest.mark.slow
def test_a_process_killed_just_after_an_upload_was_answered_leaves_one_file_as_if_undisturbed(
    tmp_path: Path, runner: Runner
) -> None:
    hour = before(datetime.now(UTC))
    with shipping(tmp_path / "a") as ship, shipping(tmp_path / "b") as quiet:
        for number, delay_seconds in enumerate(DELAYS_SECONDS):
            written(hour, number, ship, quiet)
            ship.extra["CSV_NAME_PREFIX"] = quiet.extra["CSV_NAME_PREFIX"] = f"ship{number // 2}"
            killed(runner, ship, None, "(POST|PATCH) /upload", delay_seconds)
            compared(runner, ship, quiet)
        assert len(ship.files) == len(DELAYS_SECONDS) // 2


@pytest.mark.slow
@pytest.mark.parametrize("where", ["POST /upload", "GET .*generateIds", "POST /token"])
def test_a_daemon_told_to_end_in_mid_upload_ends_clean_and_the_next_one_finishes(tmp_path: Path, where: str) -> None:
    start = floor_to(datetime.now(UTC), 3600) - timedelta(hours=1)
    with shipping(tmp_path / "a") as ship, shipping(tmp_path / "b") as quiet, closing(Daemons(tmp_path)) as daemons:
        for world in (ship, quiet):
            world.put_rows(start, 20)
        ship.drive.add_fault(DriveFault(after=True, cut=True, stall_seconds=2), where)
        first = daemons.start("", wait=True, key="", **environ(ship))
        first.until(lambda: ship.asked(where.rsplit(maxsplit=1)[-1].removeprefix(".*")))
        time.sleep(0.2)  # into the stall
        assert first.terminate() in (143, -signal.SIGTERM), first.log
        assert "Traceback" not in first.log
        second = daemons.start("", wait=True, key="", **environ(ship))
        second.until(lambda: len(ship.files) == 1 and second.job("dynamo_to_drive")["last_run"])
        assert second.terminate() in (143, -signal.SIGTERM), second.log
        quiet.now = datetime.now(UTC)
        quiet.run()
        assert ship.files == quiet.files
