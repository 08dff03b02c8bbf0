"""The commands of the product as a person calls them, each a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from daemon import KEPT, TESTS

Done = subprocess.CompletedProcess[str]


class Shell:
    """Runs commands in a folder of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def command(self, jobs: str, *arguments: str) -> list[str]:
        return [sys.executable, *([str(TESTS / "daemon_jobs.py"), jobs] if jobs else ["-m", "app"]), *arguments]

    def environ(self, **extra: str) -> dict[str, str]:
        base = {name: os.environ[name] for name in KEPT if name in os.environ}
        return {**base, "DATA_DIR": str(self.folder / "data"), **extra}

    def run(self, jobs: str, *arguments: str, **environ: str) -> Done:
        (self.folder / "data").mkdir(exist_ok=True)
        return subprocess.run(
            self.command(jobs, *arguments),
            env=self.environ(**environ),
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    return Shell(tmp_path)
