"""The new master while it is written, and the metadata file beside it."""

import itertools
import json
import os
from array import array
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import IO

import numpy as np

from app.core.files import sync_file
from app.csv_inbox.csv_tokenizer import Offsets
from app.csv_inbox.key_index import Indexing

# The metadata file beside the master: when, how many rows, which columns.
#
# Invariant: it has exactly the documented keys, and it is replaced in the same committed step as the master.


def write_metadata(temporary: Path, columns: Sequence[str], rows: int, at: datetime) -> None:
    """Write the metadata durably to a temporary file. `last_updated`: UTC, as documented, without an offset."""
    content = {
        "last_updated": at.replace(tzinfo=None).isoformat(timespec="microseconds"),
        "row_count": rows,
        "column_count": len(columns),
        "columns": list(columns),
    }
    with temporary.open("x", encoding="utf-8") as file:
        json.dump(content, file, indent=2, ensure_ascii=False)
        file.write("\n")
        file.flush()
        sync_file(file.fileno())


# The new master being written, with what was taken out of the old one and with its index.
#
# Invariant: what is kept is written as the bytes that it was, in its order; all of it, or an OSError.

COPY_BYTES = 1 << 20
JOIN_BYTES = 1 << 19
HELD_BYTES = 1 << 18
"""What is copied is written in pieces of this size, aligned to it: the kernel looks for as much memory in one piece as
an aligned write is long, and above half a megabyte that can cost ten times the write itself.
"""
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
        self._held = memoryview(bytearray(HELD_BYTES))
        self._filled = self._written = 0

    def write(self, data: bytes | memoryview) -> None:
        """Append bytes, all of them."""
        self._flush()
        self._put(memoryview(data))

    def keep(self, data: bytes | memoryview, first: Offsets, last: Offsets) -> None:
        """Append what lay in the old master, without the ranges from each of `first` to that of `last`."""
        self.kept_bytes += len(data) - int((last - first).sum())
        if not len(first):
            self.write(data)
            return
        # Joined before they are written: the kernel takes many short pieces at half the speed of one long one.
        held, done = memoryview(data), 0
        for starts, ends in _together(first, last):
            stays = zip([done, *ends[:-1]], starts, strict=True)
            self.write(b"".join([held[start:end] for start, end in stays]))
            done = ends[-1]
        self.write(held[done:])

    def note(self, removed: Callable[[], bytes], first: Offsets, last: Offsets) -> None:
        """Remember what was taken out of the old master, if anybody wants it, and which ranges of it that was."""
        if self._removed is not None and len(first):
            self._removed.write(removed())
            self.ranges.frombytes(np.stack((first, last - first), axis=1).astype(np.int64).tobytes())

    def copy(self, master: IO[bytes], start: int, end: int) -> None:
        """Append a span of the old master. Raises EOFError when it ends before."""
        self.kept_bytes += end - start
        while start < end:
            room = HELD_BYTES - (self._written + self._filled) % HELD_BYTES
            count = os.preadv(master.fileno(), [self._held[self._filled :][: min(room, end - start)]], start)
            if not count:
                raise EOFError
            start += count
            self._filled += count
            self.beat(count)
            if count == room:
                self._flush()

    def _flush(self) -> None:
        """Write what `copy` held back: it writes whole, aligned pieces, which cost the kernel least."""
        held, self._filled = self._held[: self._filled], 0
        self._put(held)

    def _put(self, rest: memoryview) -> None:
        self._written += len(rest)
        while rest:  # the system may take less at once, before it says that the disk is full
            rest = rest[self.file.write(rest) :]

    def restart(self) -> None:
        """Forget everything that was written."""
        for file in (self.file, self._removed):
            if file is not None:
                file.seek(0)
                file.truncate()
        if self.indexing is not None:
            self.indexing.restart()
        self.kept_bytes = self._filled = self._written = 0
        self.ranges = array("q")

    def finish(self) -> None:
        """Write what is left, and make what it takes to come back durable: the ranges follow the removed bytes."""
        self._flush()
        if self._removed is not None:
            self._removed.write(self.ranges.tobytes())
            self._removed.flush()
            sync_file(self._removed.fileno())


def cut(data: bytes | memoryview, first: Offsets, last: Offsets) -> bytes:
    """The ranges from each of `first` to that of `last`, joined."""
    held = memoryview(data)
    return b"".join([held[start:end] for start, end in zip(first.tolist(), last.tolist(), strict=True)])


def _together(first: Offsets, last: Offsets) -> Iterator[tuple[list[int], list[int]]]:
    """The ranges, as many at a time as end within some bytes: what is joined should stay in the processor's cache."""
    edges = np.searchsorted(last, np.arange(JOIN_BYTES, int(last[-1]), JOIN_BYTES)).tolist()
    for low, high in itertools.pairwise([0, *edges, len(last)]):
        if low < high:
            yield first[low:high].tolist(), last[low:high].tolist()
