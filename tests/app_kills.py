"""Runs commands of `python -m app` in processes that may be killed: one `FOLDER` a line on stdin.

In the folder, `environ.json` is the environment and `command.json` the command, `run dynamo_to_drive` where it is not
there; `answer.log` and `said.log` take stdout and stderr. See `forked`.
"""

import json
import os
import sys
import threading
import time
from pathlib import Path

from forked import answer

USED_LATER = (
    "app.amplitude.job",
    "app.analytics.service",
    "app.appmetrica.job",
    "app.cli",
    "app.csv_inbox.job",
    "app.csv_inbox.after_merge",
    "app.csv_inbox.merge",
    "app.dynamo_to_drive.job",
    "app.influx_to_s3.job",
    "app.main",
    "app.objects.routes",
    "app.objects.sweeps",
    "app.ops.commands",
    "app.ops.routes",
    "app.scale.worker",
    "app.db.postgres",
    "app.object_store.s3_multipart",
    "app.db.state",
    "boto3",
    "botocore.config",
    "filelock",
    "google.oauth2.service_account",
    "google_auth_httplib2",
    "googleapiclient.discovery",
    "googleapiclient.http",
    "httplib2",
    "pydantic.plugin._loader",
)


def child(folder: Path) -> int:
    from app.cli import main

    os.chdir(folder)
    os.environ.clear()
    os.environ.update(json.loads((folder / "environ.json").read_text()))
    if "FAKETIME_TIMESTAMP_FILE" in os.environ:
        # libfaketime 0.9 refuses clock_nanosleep, which time.sleep is made of, with EINVAL.
        time.sleep = threading.Event().wait  # type: ignore[assignment]
    # What it says is no answer to whoever asks here.
    for stream, name in ((1, "answer.log"), (2, "said.log")):
        os.dup2(os.open(folder / name, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), stream)
    named = folder / "command.json"
    return main(json.loads(named.read_text()) if named.exists() else ["run", "dynamo_to_drive"])


if __name__ == "__main__":
    sys.exit(answer(USED_LATER, lambda line: child(Path(line)), until_asked=True))
