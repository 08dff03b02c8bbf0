"""Bytes between a thread that writes them and one that reads them, each at its own speed.

Invariants: what the reader has not taken yet is in memory up to a few MiB, the rest in a file without a name in TMPDIR;
bytes are read once, in their order; a reader never waits for a writer that has ended, however it ended.
"""

import tempfile
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from app.core.errors import AppError, Permanent, Transient

SPOOL_BYTES = 1 << 22
BROKEN = Permanent("the answer could not be made to its end", "the log says why: please report it")


class Abandoned(Exception):
    """Nobody reads any more."""


class Spool:
    """One writer and one reader. Up to `memory_bytes` wait in memory."""

    closed = False  # as writers of files look at it

    def __init__(self, memory_bytes: int = SPOOL_BYTES) -> None:
        self._memory_bytes = memory_bytes
        self._held: deque[bytes] = deque()
        self._held_bytes = 0
        self._file = tempfile.SpooledTemporaryFile(1)  # noqa: SIM115 - `close`. A file with the first byte
        self._file_bytes = self._file_read_bytes = 0
        self._changed = threading.Condition()
        self._shown = self._ended = self._abandoned = False
        self._error: AppError | None = None
        self.size_bytes = 0

    @contextmanager
    def written(self) -> Iterator["Spool"]:
        """Write inside the block; the bytes are whole when it ends, and end in an error when it raises one."""
        error: AppError | None = BROKEN
        try:
            yield self
            error = None
        except AppError as raised:
            error = raised
        finally:
            with self._changed:
                self._ended, self._error = True, error
                self._changed.notify_all()

    def write(self, piece: bytes) -> int:
        """Put bytes behind the others. Raises Abandoned, and Transient when the disk takes no more."""
        with self._changed:
            if self._abandoned:
                raise Abandoned
            if self._file_bytes or self._held_bytes + len(piece) > self._memory_bytes:
                self._spill(piece)
            else:
                self._held.append(piece)
                self._held_bytes += len(piece)
            self.size_bytes += len(piece)
            self._changed.notify_all()
        return len(piece)

    def _spill(self, piece: bytes) -> None:
        try:
            self._file.seek(self._file_bytes)
            self._file.write(piece)
        except OSError as error:
            raise Transient(
                f"the answer cannot be spooled: {error.strerror}", "free space in TMPDIR, or ask for fewer rows"
            ) from error
        self._file_bytes += len(piece)

    def flush(self) -> None:
        """As files have it; there is nothing to do."""

    def tell(self) -> int:
        """Where the next byte goes."""
        return self.size_bytes

    def show(self) -> None:
        """The reader may begin."""
        with self._changed:
            self._shown = True
            self._changed.notify_all()

    def wait(self, *, whole: bool) -> int | None:
        """Until the reader may begin, or all is there; the size in the latter case. Raises what the writer raised."""
        with self._changed:
            self._changed.wait_for(lambda: self._ended or (self._shown and not whole))
            if self._ended and self._error:
                raise self._error
            return self.size_bytes if self._ended else None

    def read(self, start: int, count: int) -> bytes:
        """The next bytes, `start` of which were read before: `count`, fewer or none at the end. Raises what the writer
        raised.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._ended or self._abandoned or self.size_bytes >= start + count)
            if self._abandoned:
                return b""
            if self.size_bytes == start and self._error:
                raise self._error
            return self._from_memory(count) or self._from_file(count)

    def _from_memory(self, count: int) -> bytes:
        taken: list[bytes] = []
        while self._held and count > 0:
            piece = self._held.popleft()
            if len(piece) > count:
                self._held.appendleft(piece[count:])
                piece = piece[:count]
            taken.append(piece)
            count -= len(piece)
            self._held_bytes -= len(piece)
        return b"".join(taken)

    def _from_file(self, count: int) -> bytes:
        """The file is used anew from its start when the reader has caught up."""
        self._file.seek(self._file_read_bytes)
        piece = self._file.read(min(count, self._file_bytes - self._file_read_bytes))
        self._file_read_bytes += len(piece)
        if self._file_read_bytes == self._file_bytes:
            self._file_bytes = self._file_read_bytes = 0
        return piece

    def close(self) -> None:
        """Free the bytes; the writer is told at its next write. Idempotent."""
        with self._changed:
            self._abandoned = True
            self._held.clear()
            self._file.close()
