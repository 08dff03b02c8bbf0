"""The real process, killed at many points while rows arrive: the files are those of a run that nobody disturbed."""

import random
import signal
import subprocess
import sys
import time
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from app.core.window import floor_to
from app.demo.drive_api import DriveFault
from daemon import KEPT, Daemons
from shipping import Shipping, item, shipping

KILLS = 6


def environ(ship: Shipping) -> dict[str, str]:
    import os

    base = {name: os.environ[name] for name in KEPT if name in os.environ}
    return {**base, **ship.environ, "LOG_FILE": "off", "LEASE_TTL_SECONDS": "1", "LEASE_HEARTBEAT_SECONDS": "0.3"}


@pytest.mark.slow
def test_a_process_killed_at_many_points_leaves_one_file_per_hour_and_every_row(tmp_path: Path) -> None:
    draw = random.Random(3)  # noqa: S311 - a fixed course of events
    start = floor_to(datetime.now(UTC), 3600) - timedelta(hours=2)
    with shipping(tmp_path / "a") as ship, shipping(tmp_path / "b") as quiet:
        for kill in range(KILLS):
            for number in range(10):
                at = start + timedelta(seconds=600 * kill + 7 * number)
                for world in (ship, quiet):
                    world.put(item(at, temp=f"{kill}.{number}"))
            ship.drive.add_fault(DriveFault(after=True, cut=True, stall_seconds=draw.random() / 2), "upload")
            command = [sys.executable, "-m", "app", "run", "dynamo_to_drive"]
            with subprocess.Popen(command, env=environ(ship), cwd=tmp_path, stderr=subprocess.DEVNULL) as process:
                time.sleep(0.8 + 1.4 * draw.random())
                process.kill()
            ship.drive.contents()
            time.sleep(1.1)  # the lease of the killed one runs out
        ship.drive.state.waiting.clear()
        done = [
            subprocess.run(
                [sys.executable, "-m", "app", "run", "dynamo_to_drive"],
                env=environ(world),
                cwd=tmp_path,
                capture_output=True,
                text=True,
                check=False,
            )
            for world in (ship, quiet)
        ]
        assert [each.returncode for each in done] == [0, 0], done
        assert ship.files == quiet.files
        assert sum(content.count(b"\n") - 1 for content in ship.files.values()) == 10 * KILLS


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
