"""The index beside a large master: for each of its records half the hash of the key and the length, 8 bytes.

Invariants: it is a cache and no part of the commit: it is used only for the very file it was made for (inode, size and
modification time), and what it says about a row is checked against the row before anything follows from it. It is not
synced: what a power cut leaves of it is told by its checksum. Without one that fits, the master is read whole.
"""

import json
import os
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import IO, Any

import numpy as np

from app.csv_inbox.keys import INDEX_VERSION, Hashes
from app.csv_inbox.records import Offsets

ENTRY = np.dtype("<u8")
"""The upper half is that of the hash, BLANK for a record that is no row; the lower half is the length."""
LENGTH = np.uint64((1 << 32) - 1)
HEAD_BYTES = 4096
PIECE_RECORDS = 1 << 16


class Unfit(Exception):
    """The index is not that of the master, or was damaged."""


@dataclass(frozen=True, slots=True)
class Subject:
    """What hashes depend on: how the master is read, and which of its columns is the key."""

    key_column: str
    delimiter: str
    encoding: str


@dataclass(frozen=True, slots=True)
class Index:
    """An open index that fits its master."""

    file: BufferedReader
    records: int
    rows: int
    crc32: int

    def pieces(self) -> Iterator[Hashes]:
        """The entries, many at a time, each piece good until the next. Raises Unfit at the latest behind the last."""
        crc, left = 0, self.records
        held = np.empty(min(left, PIECE_RECORDS), ENTRY)
        self.file.seek(HEAD_BYTES)
        while left:
            entries: Hashes = held[:left]
            data = entries.data.cast("B")
            if self.file.readinto(data) != len(data):
                raise Unfit
            crc = zlib.crc32(data, crc)
            left -= len(entries)
            yield entries
        if crc != self.crc32:
            raise Unfit


def entries_of(hashes: Hashes, lengths: Offsets) -> Hashes:
    """The entries of records with these hashes of keys, which may be BLANK, and these lengths."""
    return (hashes & ~LENGTH) | lengths.view(np.uint64)


def lengths_in(entries: Hashes) -> Offsets:
    """The lengths in these entries."""
    return (entries & LENGTH).view(np.int64)


def _identity(found: os.stat_result) -> list[int]:
    return [found.st_ino, found.st_size, found.st_mtime_ns]


def fitting(file: BufferedReader, master: os.stat_result, subject: Subject) -> Index | None:
    """The index in this open file, if it is that of the master as it is now. Raises OSError."""
    head = _head(file.read(HEAD_BYTES))
    wanted = {"version": INDEX_VERSION, "master": _identity(master), "subject": _told(subject)}
    numbers = [head.get(name) for name in ("records", "rows", "crc32")]
    fits = {name: head.get(name) for name in wanted} == wanted and all(isinstance(each, int) for each in numbers)
    if not fits or os.fstat(file.fileno()).st_size != HEAD_BYTES + int(head["records"]) * ENTRY.itemsize:
        return None
    return Index(file, head["records"], head["rows"], head["crc32"])


def _head(data: bytes) -> Mapping[str, Any]:
    try:
        head = json.loads(data)
    except ValueError:
        return {}
    return head if isinstance(head, dict) else {}


def _told(subject: Subject) -> list[str]:
    return [subject.key_column, subject.delimiter, subject.encoding]


class Indexing:
    """An index being written. It is none before `seal`: its head is empty until then."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._crc = self._records = self._rows = 0
        file.write(bytes(HEAD_BYTES))

    def add(self, entries: Hashes) -> None:
        """The next records."""
        data = entries.astype(ENTRY, copy=False).data.cast("B")
        self._crc = zlib.crc32(data, self._crc)
        self._records += len(entries)
        self._rows += int(np.count_nonzero(entries > LENGTH))
        self._file.write(data)

    def restart(self) -> None:
        """Forget all records."""
        self._file.seek(HEAD_BYTES)
        self._file.truncate()
        self._crc = self._records = self._rows = 0

    def seal(self, master: os.stat_result, subject: Subject) -> None:
        """From now on it is the index of this master, which is complete. A name too long for the head gets none."""
        head = {
            "version": INDEX_VERSION,
            "master": _identity(master),
            "subject": _told(subject),
            "records": self._records,
            "rows": self._rows,
            "crc32": self._crc,
        }
        text = json.dumps(head).encode("ascii")
        if len(text) <= HEAD_BYTES:
            self._file.seek(0)
            self._file.write(text.ljust(HEAD_BYTES))
            self._file.flush()


def settle(made: Path, index: Path) -> None:
    """The finished index takes its name, once its master has; nothing when none was made. Raises OSError."""
    if made.exists():
        made.replace(index)
