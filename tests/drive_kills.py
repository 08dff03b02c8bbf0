"""Runs `python -m app run dynamo_to_drive` in processes that may be killed: one `FOLDER` a line on stdin.

`command.json` in the folder may name another command.

See `forked`; `environ.json` in the folder is the environment.
"""

import json
import os
import sys
from pathlib import Path

from forked import answer

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


if __name__ == "__main__":
    sys.exit(answer(USED_LATER, lambda line: child(Path(line)), until_asked=True))
