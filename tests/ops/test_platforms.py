"""What only Linux has is taken away; and what Windows is told."""

import re
import subprocess
import sys

import pytest

from shell import Shell

AS_ON_MACOS = """
import os, sys
import urllib.request  # on macOS it needs a module that only macOS has
import app.main
from app.cli import main
sys.platform = "darwin"
for name in ("setxattr", "getxattr", "listxattr", "copy_file_range", "sched_getaffinity"):
    if hasattr(os, name):
        delattr(os, name)
"""
DIRECTORY_AND_INBOX = """
from io import BytesIO
from pathlib import Path
from app.object_store.local import LocalDirectory
from app.object_store.port import PutRequest
store = LocalDirectory(Path("data/objects"))
store.probe()
store.put("a/b", BytesIO(b"bytes"), PutRequest(content_type="text/x", metadata={"m": "1"}))
info = store.head("a/b")
assert (info.size_bytes, info.content_type, dict(info.metadata)) == (5, "text/x", {"m": "1"}), info
sys.exit(main(["run", "csv_inbox"]))
"""
AS_ON_WINDOWS = """
import os, sys
for name in ("fcntl", "grp", "pwd", "resource", "termios"):
    sys.modules[name] = None
for name in [each for each in vars(os) if each.startswith("EX_")]:
    delattr(os, name)
import app.cli, app.main
os.name = "nt"
try:
    app.main.app
except SystemExit as end:
    assert end.code == 78
sys.exit(app.cli.main([]))
"""


def run(shell: Shell, program: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", program],
        env=shell.environ(),
        cwd=shell.folder,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_the_directory_and_the_inbox_work_with_what_only_linux_has_taken_away(shell: Shell) -> None:
    inbox = shell.folder / "data" / "csv_inbox"
    inbox.mkdir(parents=True)
    (inbox / "one.csv").write_text("cluster_name,id\na,1\n")
    (shell.folder / "config.json").write_text('{"checksum_wait_seconds": 0, "watch_dir": "data/csv_inbox"}')
    done = run(shell, AS_ON_MACOS + DIRECTORY_AND_INBOX)
    assert done.returncode == 0, done.stderr
    assert "csv_inbox ok: 1 rows" in done.stdout
    assert (shell.folder / "final_clusters_data.csv").read_text() == "cluster_name,id\na,1\n"


@pytest.mark.slow
def test_the_demo_runs_with_what_only_linux_has_taken_away(shell: Shell) -> None:
    done = run(shell, AS_ON_MACOS + 'sys.exit(main(["demo", "--once"]))')
    assert done.returncode == 0, done.stdout + done.stderr
    for job in ("influx_to_s3", "dynamo_to_drive", "csv_inbox", "amplitude", "appmetrica"):
        assert re.search(rf"^{job} +ok +\d+ +[1-9]", done.stdout, re.MULTILINE), done.stdout
    assert list(shell.folder.glob("data/demo/objects/telemetry/**/*.parquet"))


def test_windows_is_told_in_one_line_what_to_do_whoever_serves(shell: Shell) -> None:
    done = run(shell, AS_ON_WINDOWS)
    assert done.returncode == 78
    by_uvicorn, by_us = done.stderr.splitlines()
    assert by_uvicorn == by_us
    assert "WSL 2" in by_us
    assert "Docker" in by_us
