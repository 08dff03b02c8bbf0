"""Which file a name leads to, and in which state it is.

Invariant: nothing but a regular file is ever opened for good, and no link is followed.
"""

import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from app.csv_inbox.faults import Fault, Unmergeable, Unsteady


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
        raise Unsteady(f"{path.name} is gone", "nothing to do: whoever put it there took it away") from error
    except OSError as error:
        raise Unmergeable([Fault(f"it cannot be opened: {error.strerror}")], "put a readable, regular file") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise Unmergeable(
            [Fault("it is no regular file")], "put the file itself into the inbox, not a pipe or a device"
        )
    return os.fdopen(descriptor, "rb", buffering=0)
