"""Fixtures that every test may use; each plugin module starts and stops one kind of real server.

Compiled modules are kept also where Python was told not to: the tests start hundreds of processes, and each of them
would compile the program and its libraries anew.
"""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

import last_version

os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

pytest_plugins = (
    "browser",
    "daemon",
    "influx",
    "influxdb1",
    "postgres",
    "seaweed",
    "objects_served",
    "shell",
    "warehouse",
)

# A shallow clone has no history to build the last version from.
collect_ignore = [] if last_version.is_available() else ["crash/test_upgrade_from_last_version.py"]


@pytest.fixture
def memory_path(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory, where the machine has one: for tests of a hundred runs, which would wait for fsync only."""
    shared = Path("/dev/shm")  # noqa: S108 - a folder of random name is made there
    if not os.access(shared, os.W_OK):
        yield tmp_path
        return
    with TemporaryDirectory(dir=shared, prefix="headwater-") as folder:
        yield Path(folder)


def pytest_report_header() -> list[str]:
    return [f"left out, commits {last_version.FENCED} are not in this clone: {name}" for name in collect_ignore]
