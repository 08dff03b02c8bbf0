"""The new master being written, with what was taken out of the old one and with its index.

Invariant: what is kept is written as the bytes that it was, in its order; all of it, or an OSError.
"""

import errno
import os
from array import array
from collections.abc import Callable
from typing import IO, Any

import numpy as np

from app.csv_inbox.index import Indexing
from app.csv_inbox.records import Offsets

COPY_BYTES = 1 << 20
SPAN_BYTES = 1 << 25
NO_COPY_RANGE = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)
Beat = Callable[[int], None]


class Output:
    """`removed` and `indexing` are None where nobody wants them. `ranges`: offset and length, in the old master."""

    def __init__(self, file: IO[bytes], removed: IO[bytes] | None, indexing: Indexing | None, beat: Beat) -> None:
        self.file = file
        self.indexing = indexing
        self.kept_bytes = 0
        self.ranges = array("q")
        self._removed = removed
        self.beat = beat

    def write(self, data: Any) -> None:
        """Append bytes, all of them: the system may take less at once, before it says that the disk is full."""
        rest = memoryview(data)
        while rest:
            rest = rest[self.file.write(rest) :]

    def keep(self, data: bytes | memoryview, at: int, first: Offsets, last: Offsets) -> None:
        """Append what lies at `at` in the old master, without the ranges from each of `first` to that of `last`."""
        self.kept_bytes += len(data) - int((last - first).sum())
        if not len(first):
            self.write(data)
            return
        held, starts, ends = memoryview(data), first.tolist(), last.tolist()
        # Joined before they are written: the kernel takes many short pieces at half the speed of one long one.
        self.write(b"".join([held[start:end] for start, end in zip([0, *ends], [*starts, len(held)], strict=True)]))
        if self._removed is not None:
            self._removed.write(b"".join([held[start:end] for start, end in zip(starts, ends, strict=True)]))
            self.ranges.frombytes(np.stack((first + at, last - first), axis=1).astype(np.int64).tobytes())

    def copy(self, master: IO[bytes], start: int, end: int) -> None:
        """Append a span of the old master. Raises EOFError when it ends before."""
        self.kept_bytes += end - start
        while start < end:
            copied = copied_span(master, self.file, start, min(end - start, SPAN_BYTES))
            start += copied
            self.beat(copied)

    def restart(self) -> None:
        """Forget everything that was written."""
        for file in (self.file, self._removed):
            if file is not None:
                file.seek(0)
                file.truncate()
        if self.indexing is not None:
            self.indexing.restart()
        self.kept_bytes = 0
        self.ranges = array("q")

    def finish(self) -> None:
        """Make what it takes to come back durable: the ranges follow the removed bytes."""
        if self._removed is not None:
            self._removed.write(self.ranges.tobytes())
            self._removed.flush()
            os.fsync(self._removed.fileno())


def copied_span(source: IO[bytes], out: IO[bytes], start: int, size: int) -> int:
    """How many bytes from `start` were appended to `out`, 1 to `size`; in the kernel, where file systems let it.

    Raises EOFError behind the end of the source, and OSError.
    """
    if hasattr(os, "copy_file_range"):
        try:
            copied = os.copy_file_range(source.fileno(), out.fileno(), size, offset_src=start)
        except OSError as error:
            if error.errno not in NO_COPY_RANGE:
                raise
            copied = 0
        if copied:
            return copied
    data = os.pread(source.fileno(), min(size, COPY_BYTES), start)
    if not data:
        raise EOFError
    return out.write(data)
