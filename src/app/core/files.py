"""Files that are whole or absent after a power cut: temp, fsync, rename, fsync the directory.

Invariant: `path` names either the old bytes or all of the new ones at every instant; a failed fsync is raised and never
repeated, since the kernel may have dropped the dirty pages with the first report.
"""

import os
from collections.abc import Iterable
from pathlib import Path
from uuid import uuid4

TEMPORARY_SUFFIX = ".tmp"


def write_durably(path: Path, chunks: Iterable[bytes]) -> None:
    """Replace `path` by the chunks, keeping the mode of what it replaces. Raises OSError; then `path` is untouched."""
    temporary = path.with_name(f".{path.name}.{uuid4().hex}{TEMPORARY_SUFFIX}")
    try:
        with temporary.open("xb") as file:
            for chunk in chunks:
                file.write(chunk)
            keep_mode(path, file.fileno())
            sync_file(file.fileno())
        replace_durably(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def keep_mode(path: Path, descriptor: int) -> None:
    """Give the open file the mode of `path`; nothing when `path` does not exist yet."""
    if path.exists():
        os.fchmod(descriptor, path.stat().st_mode & 0o7777)


def sync_file(descriptor: int) -> None:
    """fsync; the data is on the disk when this returns."""
    os.fsync(descriptor)


def replace_durably(temporary: Path, path: Path) -> None:
    """Rename over `path` and make the rename itself durable."""
    temporary.replace(path)
    sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    """fsync a directory, so that names created, renamed or removed in it survive a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
