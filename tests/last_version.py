"""Older versions as they were installed: the wheel of each, built once from git history, in an environment of its own.

Kept in HEADWATER_LAST_VERSION, else in ~/.cache, so that only the first run of the tests builds them.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import pytest

from needs import needs

COMMIT = "3315a57"
BEFORE_SHORT_RECORDS = "fd5802c"  # before migration 0026, whose fence is the newest
FENCED = (COMMIT, BEFORE_SHORT_RECORDS)
REPOSITORY = Path(__file__).parent.parent
FOLDER = Path(os.environ.get("HEADWATER_LAST_VERSION") or Path.home() / ".cache")
BUILD_SECONDS = 300


def folder_of(commit: str) -> Path:
    return FOLDER / f"headwater-{commit}"


def is_available() -> bool:
    """Whether both versions are built already or can be."""
    return all((folder_of(commit) / "bin" / "python").exists() or is_known(commit) for commit in FENCED)


def is_known(commit: str) -> bool:
    git = shutil.which("git")
    command = [str(git), "cat-file", "-e", f"{commit}^{{commit}}"]
    return git is not None and not subprocess.run(command, cwd=REPOSITORY, capture_output=True, check=False).returncode


@pytest.fixture(scope="session")
def last_version() -> Path:
    """The Python of an environment in which `-m app` is the last version."""
    return installed(COMMIT)


def installed(commit: str) -> Path:
    """The Python of an environment in which `-m app` is the version of that commit."""
    folder = folder_of(commit)
    python = folder / "bin" / "python"
    if python.exists():
        return python
    uv, git = needs("uv"), needs("git")
    FOLDER.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=FOLDER) as made:
        build(uv, git, commit, Path(made))
        with suppress(OSError):  # another process was quicker, which serves as well
            (Path(made) / "venv").rename(folder)
    assert python.exists()
    return python


def build(uv: Path, git: Path, commit: str, folder: Path) -> None:
    """The sources as they were committed, their wheel, and an environment with that and its pinned requirements."""
    source, wheels, venv = folder / "source", folder / "wheels", folder / "venv"
    source.mkdir()
    archive = folder / "source.tar"
    run(git, "archive", f"--output={archive}", commit, folder=REPOSITORY)
    run(Path("tar"), "-xf", str(archive), "-C", str(source), folder=folder)
    run(uv, "build", "--quiet", "--wheel", "--out-dir", str(wheels), folder=source)
    run(
        uv,
        "venv",
        "--quiet",
        "--relocatable",
        "--python",
        f"{sys.version_info[0]}.{sys.version_info[1]}",
        str(venv),
        folder=folder,
    )
    [wheel] = wheels.glob("headwater-*.whl")
    requirements = str(source / "requirements.txt")
    install = ("pip", "install", "--quiet", "--python", str(venv / "bin" / "python"))
    run(uv, *install, "-r", requirements, folder=folder)
    run(uv, *install, "--no-deps", str(wheel), folder=folder)


def run(program: Path, *arguments: str, folder: Path) -> None:
    """A command that has to succeed."""
    done = subprocess.run(
        [str(program), *arguments], cwd=folder, capture_output=True, text=True, timeout=BUILD_SECONDS, check=False
    )
    assert done.returncode == 0, f"{program} {' '.join(arguments)}:\n{done.stdout}{done.stderr}"
