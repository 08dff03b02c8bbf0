"""Runs the inbox in processes that are killed: `python inbox_kills.py`, one question `FOLDER N` a line on stdin.

The run ends with SIGKILL just before its Nth event on a file of the folder; 0 leaves the killing to whoever reads the
pid that is answered first. Forked after all imports, so that 200 runs do not take minutes; Arrow itself is used in the
forks only, since threads do not come along.
"""

import importlib
import os
import signal
import sys
from pathlib import Path

from inbox_world import world

WATCHED = frozenset({"open", "os.rename", "os.link", "os.remove", "os.mkdir", "os.scandir", "os.listdir", "os.utime"})

USED_LATER = (
    "filelock",
    "numpy",
    *(
        f"app.csv_inbox.{name}"
        for name in ("faults", "identity", "incoming", "merge", "journal", "metadata", "quarantine", "step")
    ),
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


def child(folder: Path, at: int) -> int:
    if at:
        killing(folder, at)
    world(folder, key_column="k").run()
    return 0


def say(answer: object) -> None:
    sys.stdout.write(f"{answer}\n")
    sys.stdout.flush()


def main() -> int:
    for name in USED_LATER:
        importlib.import_module(name)
    say("ready")
    for line in sys.stdin:
        where, _, number = line.strip().rpartition(" ")
        pid = os.fork()
        if pid == 0:
            os._exit(child(Path(where), max(int(number), 0)))
        say(pid)
        say(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
