"""SIGKILL at 200 points over merges of several files: afterwards everything agrees with an undisturbed run."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from app.csv_inbox.places import Places
from inbox_world import World, model, parsed, world

HERE = Path(__file__).parents[1]
FILES = {
    "1.csv": "k,a\n" + "".join(f"{n},one\n" for n in range(0, 300, 2)),
    "2.csv": "k,a,b\n" + "".join(f"{n},two,b{n}\n" for n in range(0, 300, 5)),
    "3.csv": 'b,k\n"3\nlines",7\n,8\n',
    "4.csv": "k,a\nbroken\n",
    "5.csv": "k,a\n9,last\n",
}
MASTER = "k,a,old\n" + "".join(f"{n},zero,\n" for n in range(300))


class Killed:
    """A process that forks a run of an inbox for each question."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process

    def run(self, folder: Path, *, event: int = 0, seconds: float | None = None) -> int:
        """One run, killed before its `event`th event or after `seconds`; how it ended."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{folder} {event}\n")
        self._process.stdin.flush()
        pid = int(self._process.stdout.readline())
        if seconds is not None:
            time.sleep(seconds)
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return int(self._process.stdout.readline())


@contextmanager
def started() -> Iterator[Killed]:
    paths = os.pathsep.join([str(HERE), str(HERE.parent / "src")])
    command = [sys.executable, str(HERE / "inbox_kills.py")]
    with subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": paths}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield Killed(process)
        assert process.stdin is not None
        process.stdin.close()


def filled(folder: Path) -> World:
    here = world(folder)
    folder.mkdir(parents=True)
    here.config.merged_file.write_text(MASTER)
    for number, (name, content) in enumerate(FILES.items()):
        os.utime(here.drop(name, content), (number, number))
    return here


def check(here: World, undisturbed: bytes) -> None:
    """Master, metadata, archive, quarantine and history agree; nothing is left over."""
    assert here.master == undisturbed
    names, rows = parsed(here.master)
    assert (here.metadata["columns"], here.metadata["row_count"]) == (names, len(rows))
    assert here.waiting == []
    archived = {name.split(".csv.")[0] + ".csv": (here.config.archive_dir / name).read_text() for name in here.archived}
    assert archived == {name: content for name, content in FILES.items() if name != "4.csv"}
    assert len(here.archived) == 4
    assert here.rejected == ["4.csv", "4.csv.bad_rows.csv", "4.csv.reason.json"]
    loads = sorted((load.file, load.outcome) for load in here.loads)
    assert loads == [(name, "rejected" if name == "4.csv" else "merged") for name in sorted(FILES)]
    assert not [name for name in here.names(here.folder) if "tmp" in name or "journal" in name]
    # What is left of the index is right for one more merge, or not used.
    assert not here.take("6.csv", "k,a,b\n9,after,\nnew,after,1\n").failures
    assert here.master == b"".join(undisturbed.partition(b"9,last,\n")[::2]) + b"9,after,\nnew,after,1\n"


def undisturbed_master(folder: Path) -> bytes:
    here = filled(folder)
    here.run()
    expected = parsed(MASTER.encode())
    for name, content in FILES.items():
        if name != "4.csv":
            expected = model(expected, parsed(content.encode()), "k")
    undisturbed = here.master
    assert parsed(undisturbed) == expected
    assert Places(here.config).index.exists()
    check(here, undisturbed)
    return undisturbed


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_killed_at_200_points_the_result_is_that_of_an_undisturbed_run(tmp_path: Path) -> None:
    undisturbed = undisturbed_master(tmp_path / "undisturbed")
    kills = 0
    with started() as killed:
        event = 0
        while True:  # once before each event of a whole run
            event += 1
            here = filled(tmp_path / f"event-{event}")
            if killed.run(here.folder, event=event) == 0:
                break
            kills += 1
            assert killed.run(here.folder) == 0
            check(here, undisturbed)
        assert event > 40
        chance = random.Random(4)  # noqa: S311 - a fixed seed
        number = 0
        while kills < 200:  # and at random instants, several times in a row
            number += 1
            here = filled(tmp_path / f"random-{number}")
            while killed.run(here.folder, seconds=chance.uniform(0, 0.12)) != 0:
                kills += 1
            check(here, undisturbed)
    assert kills >= 200


@pytest.mark.slow
def test_a_restart_that_is_killed_as_well_changes_nothing(tmp_path: Path) -> None:
    undisturbed = undisturbed_master(tmp_path / "undisturbed")
    with started() as killed:
        for first in range(9, 70, 6):
            here = filled(tmp_path / f"twice-{first}")
            for event in (first, 3, 5, 8, 12, 17):
                killed.run(here.folder, event=event)
            assert killed.run(here.folder) == 0
            check(here, undisturbed)
