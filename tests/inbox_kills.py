"""Runs the inbox in processes that are killed: `python inbox_kills.py`, one question `FOLDER N` a line on stdin.

The run ends with SIGKILL just before its Nth event on a file of the folder; 0 leaves the killing to whoever reads the
pid that is answered first. See `forked`.
"""

import os
import signal
import sys
from pathlib import Path

from forked import answer
from inbox_world import world

WATCHED = frozenset({"open", "os.rename", "os.link", "os.remove", "os.mkdir", "os.scandir", "os.listdir", "os.utime"})

USED_LATER = (
    "filelock",
    "numpy",
    "app.csv_inbox.after_merge",
    "app.csv_inbox.merge",
)


def killing(folder: Path, at: int) -> None:
    """From now on, the `at`th event on a file of `folder` is the last thing that this process sees."""
    left = at

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal left
        if event in WATCHED and any(str(folder) in str(each) for each in arguments):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def child(line: str) -> int:
    where, _, number = line.rpartition(" ")
    folder, at = Path(where), max(int(number), 0)
    if at:
        killing(folder, at)
    world(folder, key_column="k").run()
    return 0


if __name__ == "__main__":
    sys.exit(answer(USED_LATER, child, until_asked=False))
