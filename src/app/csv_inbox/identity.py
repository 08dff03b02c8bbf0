"""Which file a name leads to, and in which state it is.

Invariant: nothing but a regular file is ever opened for good, and no link is followed.
"""

import hashlib
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from app.csv_inbox.faults import NO_ACCESS, NOT_REGULAR, Fault, Stuck, Unmergeable, Unsteady

PIECE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Identity:
    """Which file this is, and in which state. Equal identities: nothing was written to it in between."""

    device: int
    inode: int
    size: int
    mtime_ns: int


def identity_of(found: os.stat_result) -> Identity:
    """The identity in an answer of stat."""
    return Identity(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


def open_regular(path: Path) -> IO[bytes]:
    """The file, if it is one: links are not followed, devices and pipes not opened for good. Raises Unmergeable."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise Unsteady(f"{path.name} is gone", "no action needed; whoever put it there took it away") from error
    except OSError as error:
        fault = Fault(f"it cannot be opened: {error.strerror}")
        raise Unmergeable([fault], "put a readable, regular file", kind=NO_ACCESS) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        hint = "put the file itself into the inbox, not a pipe or a device"
        raise Unmergeable([Fault("it is no regular file")], hint, kind=NOT_REGULAR)
    return os.fdopen(descriptor, "rb", buffering=0)


def read_some(file: IO[bytes], size: int) -> bytes:
    """What the file has next. Raises Stuck where its device does not give it: other files are none the worse."""
    try:
        return file.read(size)
    except OSError as error:
        told = f"it cannot be read: {error.strerror}"
        raise Stuck(told, "look at the disk that it lies on; it stays in the inbox, and others go on") from error


def md5_of(file: IO[bytes], size_bytes: int) -> str:
    """The MD5 of the first bytes of the file, which is read up to there; "" when it is shorter. Raises Stuck."""
    digest = hashlib.md5(usedforsecurity=False)
    file.seek(0)
    while size_bytes > 0 and (piece := read_some(file, min(size_bytes, PIECE_BYTES))):
        digest.update(piece)
        size_bytes -= len(piece)
    return digest.hexdigest() if not size_bytes else ""
