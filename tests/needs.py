"""What a test needs from the machine: absent, it is skipped here and a failure in CI, where everything is installed."""

import os
import shutil
from pathlib import Path
from typing import NoReturn

import pytest


def needs(command: str) -> Path:
    """Where `command` is. Skips the test when it is missing; fails it when CI is set, so that CI skips nothing."""
    found = shutil.which(command)
    if found is None:
        absent(f"{command} is not installed: apt-get install {PACKAGES.get(command, command)}")
    return Path(found)


def faketime_library() -> Path:
    """The library that gives a process another wall clock, for `LD_PRELOAD`."""
    needs("faketime")
    found = sorted(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))
    return found[0] if found else absent("libfaketimeMT.so.1 is not below /usr/lib: apt-get install faketime")


def needs_node_package(name: str) -> Path:
    """The folder of an npm package below NODE_PACKAGES, where `.ci/run` installs it; else as `needs`."""
    folder = NODE_PACKAGES / "node_modules" / name
    if not folder.is_dir():
        absent(f"npm package {name} is not in {NODE_PACKAGES}: bash .ci/run installs it")
    return folder


def absent(reason: str) -> NoReturn:
    """End the test because something is not there: skipped with the reason, failed when CI is set."""
    if os.environ.get("CI"):
        pytest.fail(f"{reason} (CI must not skip this)", pytrace=False)
    pytest.skip(reason)


PACKAGES = {"influxd": "influxdb", "node": "nodejs"}
NODE_PACKAGES = Path(os.environ.get("HEADWATER_NODE_PACKAGES") or Path.home() / ".cache" / "headwater-node")
