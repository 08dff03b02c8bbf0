"""Files that are whole or absent after a power cut: temp, fsync, rename, fsync the directory.

Invariant: `path` always names either the old bytes or all of the new ones; a failed fsync is raised and never retried,
since the kernel may have dropped the dirty pages when it reported the first error.
"""

import hashlib
import os
import sys
from collections.abc import Iterable
from contextlib import suppress
from logging import LogRecord
from logging.handlers import RotatingFileHandler
from pathlib import Path
from tempfile import SpooledTemporaryFile, TemporaryFile
from typing import BinaryIO, cast
from uuid import uuid4

TEMPORARY_SUFFIX = ".tmp"
NAME_BYTES = 255
"""The longest file name that every common file system allows."""
EXTENSION_BYTES = 16
CONTINUATION = range(0x80, 0xC0)


class LogFile(RotatingFileHandler):
    """A log file that never stops the program: if it cannot be written, on a full disk for example, the lines are lost.
    stderr says so once, until a line can be written again.
    """

    _is_told = False

    def emit(self, record: LogRecord) -> None:
        """Write the record."""
        self._has_failed = False
        super().emit(record)
        self._is_told = self._has_failed

    def handleError(self, record: LogRecord) -> None:  # noqa: N802 - the library's word
        """Replaces the standard behaviour, a traceback for each record."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
            return
        self._has_failed = True
        if not self._is_told:
            told = f"{self.baseFilename} cannot be written: {error.strerror}; its lines are lost until it can be"
            print(told, file=sys.stderr)  # noqa: T201 - the log is what fails

    def close(self) -> None:
        """Close; discard what could not be written."""
        with suppress(OSError):
            super().close()


def bounded_name(name: str, suffix: str = "", limit_bytes: int = NAME_BYTES) -> str:
    """`name` + `suffix` in at most `limit_bytes` bytes: a longer name is cut, never inside a character.

    A hash of the whole name replaces the part cut off, so names that differ stay different; the extension is kept.
    """
    raw, tail = os.fsencode(name), os.fsencode(suffix)
    if len(raw) + len(tail) <= limit_bytes:
        return name + suffix
    extension = os.fsencode(Path(name).suffix)
    if len(extension) > EXTENSION_BYTES:
        extension = b""
    rest = b"~" + hashlib.sha256(raw).hexdigest()[:16].encode() + extension + tail
    end = limit_bytes - len(rest)
    for _ in range(3):  # a UTF-8 character has at most three bytes after its first
        end -= raw[end] in CONTINUATION
    return os.fsdecode(raw[:end] + rest)


def temporary_file(folder: Path | None = None, memory_bytes: int = 0) -> BinaryIO:
    """An unnamed file, so that a killed process leaves nothing behind; the caller closes it.

    The first `memory_bytes` stay in memory. `folder` is created if missing; None = the system's temporary directory.
    """
    if folder is not None and not folder.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
    if memory_bytes:
        return cast("BinaryIO", SpooledTemporaryFile(memory_bytes, dir=str(folder) if folder else None))
    return cast("BinaryIO", TemporaryFile(dir=folder))


def write_durably(path: Path, chunks: Iterable[bytes], folder: Path | None = None) -> None:
    """Replace the file with the chunks, keeping its mode. Raises OSError; then `path` is untouched. `folder`: for the
    temporary file, on the same disk; None = beside it.
    """
    temporary = (folder or path.parent) / bounded_name(f".{path.name}", f".{uuid4().hex}{TEMPORARY_SUFFIX}")
    try:
        with temporary.open("xb") as file:
            for chunk in chunks:
                file.write(chunk)
            file.flush()  # flush Python's buffer first: fsync does not see it
            keep_mode(path, file.fileno())
            sync_file(file.fileno())
        temporary.replace(path)
        sync_directory(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def keep_mode(path: Path, descriptor: int) -> None:
    """Give the open file the mode of `path`; do nothing when `path` does not exist yet."""
    if path.exists():
        os.fchmod(descriptor, path.stat().st_mode & 0o7777)


def sync_file(descriptor: int) -> None:
    """fsync; the data is on the disk when this returns."""
    os.fsync(descriptor)


def sync_directory(directory: Path | str) -> None:
    """fsync a directory, so that names created, renamed or removed in it survive a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
