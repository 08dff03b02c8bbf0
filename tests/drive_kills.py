"""Runs `python -m app run dynamo_to_drive` in processes that may be killed: one `FOLDER` a line on stdin.

`command.json` in the folder may name another command.

The pid is answered; it stays that process's until an empty line asks for the exit code. Each is forked after all
imports, so that many runs do not take minutes; `environ.json` in the folder is its environment.
"""

import importlib
import json
import os
import sys
from pathlib import Path

USED_LATER = (
    "boto3",
    "botocore.config",
    "google.oauth2.service_account",
    "google_auth_httplib2",
    "googleapiclient.discovery",
    "googleapiclient.http",
    "httplib2",
    "app.main",
    "app.ops.commands",
    "app.stores.state",
)


def child(folder: Path) -> int:
    from app.__main__ import main

    os.chdir(folder)
    os.environ.clear()
    os.environ.update(json.loads((folder / "environ.json").read_text()))
    # What it says is no answer to whoever asks here.
    quiet = os.open(folder / "said.log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(quiet, stream)
    named = folder / "command.json"
    return main(json.loads(named.read_text()) if named.exists() else ["run", "dynamo_to_drive"])


def say(answer: object) -> None:
    sys.stdout.write(f"{answer}\n")
    sys.stdout.flush()


def main() -> int:
    for name in USED_LATER:
        importlib.import_module(name)
    say("ready")
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            os._exit(child(Path(line.strip())))
        say(pid)
        sys.stdin.readline()
        say(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
