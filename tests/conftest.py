"""Fixtures that every test may use; each plugin module starts and stops one kind of real server.

Compiled modules are kept also where Python was told not to: the tests start hundreds of processes, and each of them
would compile the program and its libraries anew. Temporary folders are in memory where the machine has enough of it:
the tests would wait for thousands of fsyncs.
"""

import os
import shutil
import sys
from pathlib import Path

import last_version

os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

MEMORY, ENOUGH_BYTES = Path("/dev/shm"), 8 << 30  # noqa: S108 - pytest makes a folder of its own there
if (
    os.access(MEMORY, os.W_OK)
    and shutil.disk_usage(MEMORY).free > ENOUGH_BYTES
    and not os.statvfs(MEMORY).f_flag & os.ST_NOEXEC  # some tests install programs
):
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))

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


def pytest_report_header() -> list[str]:
    return [f"left out, commits {last_version.FENCED} are not in this clone: {name}" for name in collect_ignore]
