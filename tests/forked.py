"""Runs something in processes that may be killed: a question a line on stdin, the pid is answered, then the exit code.

Each process is forked after all imports, so that many runs do not take minutes.
"""

import importlib
import os
import sys
from collections.abc import Callable, Sequence


def answer(used_later: Sequence[str], child: Callable[[str], int], *, until_asked: bool) -> int:
    """Until stdin ends. `until_asked`: the pid stays that process's until an empty line asks for the exit code."""
    for name in used_later:
        importlib.import_module(name)
    _say("ready")
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            os._exit(child(line.strip()))
        _say(pid)
        if until_asked:
            sys.stdin.readline()
        _say(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    return 0


def _say(told: object) -> None:
    sys.stdout.write(f"{told}\n")
    sys.stdout.flush()
