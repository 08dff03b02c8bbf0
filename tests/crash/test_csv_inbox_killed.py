"""SIGKILL at many points over merges of several files, some with long names, some with rows that come late: afterwards
everything agrees with an undisturbed run.
"""

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from app.csv_inbox.discovery import InboxPaths
from effort import EFFORT
from inbox_world import World, model, parsed, world

HERE = Path(__file__).parents[1]
KILLS = 100 * EFFORT
LONG, LONG_BAD = "中" * 83 + ".csv", "b" * 251 + ".csv"
FILES = {
    "1.csv": "k,a\n" + "".join(f"{n},one\n" for n in range(0, 300, 2)),
    "2.csv": "k,a,b\n" + "".join(f"{n},two,b{n}\n" for n in range(0, 300, 5)),
    LONG: 'b,k\n"3\nlines",7\n,8\n',
    LONG_BAD: "k,a\nbroken\n",
    "5.csv": "k,a\n9,last\n",
}
GOOD = [content for name, content in FILES.items() if name != LONG_BAD]
MASTER = "k,a,old\n" + "".join(f"{n},zero,\n" for n in range(300))
SLOW, LATE = "k,a\n1,slow\n2,slow\n", "2,late\n30,late\n31,late\n"
ORDER = [SLOW, *GOOD[:2], f"k,a\n{LATE}", *GOOD[2:]]


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
    """An inbox with files, and with rows that were written to one that is merged already."""
    here = world(folder)
    folder.mkdir(parents=True)
    here.config.merged_file.write_text(MASTER)
    here.take("slow.csv", SLOW)
    slow = here.config.archive_dir / here.archived[0]
    with slow.open("a") as file:
        file.write(LATE)
    os.utime(slow, (1.5, 1.5))
    for number, (name, content) in enumerate(FILES.items()):
        os.utime(here.drop(name, content), (number, number))
    return here


def check(here: World, undisturbed: bytes) -> None:
    """Master, metadata, archive, quarantine and history agree; nothing is left over."""
    assert here.master == undisturbed
    names, rows = parsed(here.master)
    assert (here.metadata["columns"], here.metadata["row_count"]) == (names, len(rows))
    assert here.waiting == []
    archived = sorted((here.config.archive_dir / name).read_text() for name in here.archived)
    assert archived == sorted([SLOW + LATE, f"k,a\n{LATE}", *GOOD])
    assert [name.partition(".csv.")[2] for name in here.rejected] == ["", "bad_rows.csv", "reason.json"]
    loads = sorted((re.sub(r"\.\d{8}T\d{6}\.\d{3}", "", load.file), load.outcome) for load in here.loads)
    merged = ["slow.csv", f"slow.csv.late-{len(SLOW)}.csv", *FILES]
    assert loads == sorted((name, "rejected" if name == LONG_BAD else "merged") for name in merged)
    left = [name for folder in (here.folder, here.config.watch_dir) for name in here.names(folder)]
    assert not [name for name in left if "tmp" in name or "journal" in name]
    # What is left of the index is right for one more merge, or not used.
    assert not here.take("6.csv", "k,a,b\n9,after,\nnew,after,1\n").failures
    assert here.master == b"".join(undisturbed.partition(b"9,last,\n")[::2]) + b"9,after,\nnew,after,1\n"


def undisturbed_master(folder: Path) -> bytes:
    here = filled(folder)
    here.run()
    expected = parsed(MASTER.encode())
    for content in ORDER:
        expected = model(expected, parsed(content.encode()), "k")
    undisturbed = here.master
    assert parsed(undisturbed) == expected
    assert InboxPaths(here.config).index.exists()
    check(here, undisturbed)
    return undisturbed


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_killed_at_many_points_the_result_is_that_of_an_undisturbed_run(tmp_path: Path) -> None:
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
        while kills < KILLS:  # and at random instants, several times in a row
            number += 1
            here = filled(tmp_path / f"random-{number}")
            while killed.run(here.folder, seconds=chance.uniform(0, 0.12)) != 0:
                kills += 1
            check(here, undisturbed)
    assert kills >= KILLS


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


@pytest.mark.slow
def test_rows_that_a_writer_adds_between_kills_all_come_in_once(tmp_path: Path) -> None:
    chance = random.Random(5)  # noqa: S311 - a fixed seed
    kills = 0
    with started() as killed:
        for number in range(6):
            here = world(tmp_path / str(number))
            written = ["x0"]
            with here.drop("中" * 83 + ".csv", "k,a\nx0,0\n").open("a", 1) as writer:
                while len(written) < 12:
                    # A run that takes rows in has some 60 events, and one more for each record of the history.
                    kills += killed.run(here.folder, event=chance.randint(5, 60 + 4 * len(written))) != 0
                    written.append(f"x{len(written)}")
                    writer.write(f"{written[-1]},{len(written)}\n")
                    if len(written) % 5 == 0:
                        here.drop(f"{len(written)}.csv", f"k,a\nx1,{len(written)}\n")
            assert killed.run(here.folder) == 0
            names, rows = parsed(here.master)
            assert (names, sorted(row[0] for row in rows)) == (["k", "a"], sorted(written))
            assert here.waiting == []
            assert here.metadata["row_count"] == len(written)
    assert kills > 40
