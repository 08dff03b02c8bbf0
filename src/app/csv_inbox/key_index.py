"""Vectorised lookup of an incoming file's keys, and the key index stored next to a large master.

Invariants: 64-bit hashes find candidates; the bytes themselves decide. Hashes are the same in every process as long as
INDEX_VERSION is the same, since the index stores them. Memory grows only with the keys.
"""

import hashlib
import json
import os
import secrets
import zlib
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from app.csv_inbox.config import InboxConfig
from app.csv_inbox.csv_tokenizer import NONE, CellSlices, Offsets, cut
from app.csv_inbox.discovery import FileIdentity

Hashes = npt.NDArray[np.uint64]
Truths = npt.NDArray[np.bool_]

INDEX_VERSION = 2
WORD_BYTES = 8
LONG_KEY_BYTES = 64
LONG_VALUE_BYTES = 512
FEW_PAIRS = 16
FIRST_BITS_LEAST, FIRST_BITS_MOST = 12, 22
"""The most is 4 MiB: the next size exceeds the processor's cache, and a look-up costs five times as much."""
BLANK = np.uint64(0)
"""Marks a record that is not a row. No key's hash begins with 32 zeros, so neither a hash nor its half equals it."""

_FACTOR, _OTHER = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xD6E8FEB86659FD93)
_HALF = np.uint64(32)
_LEAST = np.uint64(1 << 32)
_MASKS = np.array([*((1 << 8 * n) - 1 for n in range(WORD_BYTES)), (1 << 64) - 1], np.uint64)


def _words(cells: CellSlices) -> Hashes:
    """The little-endian 8-byte word at each offset; copies the data only if a value ends near its end."""
    data = cells.data
    if int((cells.starts + cells.lengths).max(initial=0)) + WORD_BYTES > len(data):
        data = np.append(data, np.zeros(WORD_BYTES, np.uint8))
    return np.ndarray((len(data) - WORD_BYTES + 1,), np.dtype("<u8"), data, 0, (1,))


def _word(words: Hashes, cells: CellSlices, at: int, shortest: int) -> Hashes:
    """Bytes `at` to `at` + 8 of each value, zero-padded past its end; no value is shorter than `shortest`."""
    found: Hashes
    if at + WORD_BYTES <= shortest:
        found = words[cells.starts + at]
    else:
        rest = np.minimum(np.maximum(cells.lengths - at, 0), WORD_BYTES)
        found = words[np.where(rest > 0, cells.starts + at, 0)] & _MASKS[rest]
    return found


def hashed(cells: CellSlices, seed: int = 0) -> Hashes:
    """One 64-bit hash per value; those of the index have no seed."""
    words = _words(cells)
    found = (cells.lengths.astype(np.uint64) + np.uint64(seed << 32)) * _OTHER
    longest = int(cells.lengths.max(initial=0))
    shortest = int(cells.lengths.min(initial=longest))
    for at in range(0, min(longest, LONG_KEY_BYTES), WORD_BYTES):
        mixed = (found ^ _word(words, cells, at, shortest)) * _FACTOR
        mixed ^= mixed >> _HALF
        # Skip values that have already ended: a hash must not depend on the neighbouring values.
        found = mixed if at < shortest else np.where(cells.lengths > at, mixed, found)
    for place in np.flatnonzero(cells.lengths > LONG_KEY_BYTES) if longest > LONG_KEY_BYTES else ():
        digest = hashlib.blake2b(
            cells.value(int(place)), digest_size=WORD_BYTES, salt=seed.to_bytes(WORD_BYTES)
        ).digest()
        found[place] = int.from_bytes(digest, "little")
    found *= _OTHER
    found[found < _LEAST] |= _LEAST
    return found


def equal_pairs(left: CellSlices, right: CellSlices) -> Truths:
    """For each pair of values, whether the bytes are equal."""
    equal: Truths = left.lengths == right.lengths
    places = np.flatnonzero(equal)
    longest = int(left.lengths[places].max(initial=0))
    left_words, right_words = _words(left), _words(right)
    for at in range(0, min(longest, LONG_VALUE_BYTES), WORD_BYTES):
        if len(places) <= FEW_PAIRS:
            break
        pair = left.taken(places), right.taken(places)
        alike = _word(left_words, pair[0], at, 0) == _word(right_words, pair[1], at, 0)
        equal[places[~alike]] = False
        places = places[alike & (pair[0].lengths > at + WORD_BYTES)]
    for place in places.tolist():
        equal[place] = left.value(place) == right.value(place)
    return equal


def first_positions(values: npt.NDArray[Any]) -> Offsets:
    """The first position of each distinct value, in order of the values. np.unique would import far more of numpy."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    found: Offsets = order[np.append(ordered[:1] == ordered[:1], ordered[1:] != ordered[:-1])]
    return found


class FileKeys:
    """The keys of a file: added row by row, sorted once, then looked up in bulk.

    `kept_rows` are the last rows of each key, in file order; `kept_hashes` are their hashes, and `count` is their
    number. `seed` is 0, unless two keys of the file would have the same hash then; an index, which has the hashes
    without a seed, can neither be used nor be written with another one.
    """

    kept_rows: Offsets
    kept_hashes: Hashes
    count: int

    def __init__(self) -> None:
        self.seed = 0
        self._data = bytearray()
        self._lengths: list[Offsets] = [NONE]
        self._added: list[Hashes] = []

    def add(self, cells: CellSlices) -> None:
        """Add the keys of the next rows."""
        self._data += cut(cells.data.data, cells.starts, cells.starts + cells.lengths)
        self._lengths.append(cells.lengths)
        self._added.append(hashed(cells))

    def sort(self) -> None:
        """Prepare for lookups. Requires at least one key; no keys may be added afterwards."""
        lengths, hashes = np.concatenate(self._lengths), np.concatenate(self._added)
        self._lengths, self._added = [], []
        # So that the last key can be read in whole words too.
        self._data += bytes(WORD_BYTES)
        cells = CellSlices(np.frombuffer(self._data, np.uint8), np.cumsum(lengths) - lengths, lengths)
        while not self._sorted(cells, hashes):
            # Two keys have the same hash. A seed that nobody could foresee tells them apart.
            self.seed = 1 + secrets.randbelow((1 << 32) - 1)
            hashes = hashed(cells, self.seed)
        self.kept_rows = np.sort(self._rows)
        self.kept_hashes = hashes[self.kept_rows]
        self.count = len(self._rows)
        # A table of the leading bits that occur; it filters out most lookups.
        bits = int(np.clip((8 * self.count).bit_length(), FIRST_BITS_LEAST, FIRST_BITS_MOST))
        self._shift = np.uint64(64 - bits)
        self._begins = np.zeros(1 << bits, np.bool_)
        self._begins[self._first_bits(self._hashes)] = True

    def _sorted(self, cells: CellSlices, hashes: Hashes) -> bool:
        """Sort by the hashes; False if two different keys have the same one."""
        order = np.argsort(hashes)
        ordered = hashes[order]
        if not (ordered[1:] != ordered[:-1]).all():  # the faster sort is not stable
            order = np.argsort(hashes, kind="stable")
            ordered = hashes[order]
        is_last = np.append(ordered[1:] != ordered[:-1], True)
        # Sorted distinct hashes, the last row with each, and that row's key.
        self._hashes, self._rows = ordered[is_last], order[is_last]
        self._cells = cells.taken(self._rows)
        earlier = np.flatnonzero(~is_last)
        groups = np.cumsum(is_last)[earlier]  # an earlier row's group is that of the next last row
        return bool(equal_pairs(cells.taken(order[earlier]), self._cells.taken(groups)).all())

    def _first_bits(self, hashes: Hashes) -> Offsets:
        """Signed, because numpy converts unsigned indices one by one, which takes twice as long."""
        return (hashes >> self._shift).view(np.int64)

    def _places(self, hashes: Hashes) -> Offsets:
        """The position of each hash; if absent, that of the next greater one, or the last."""
        return np.minimum(np.searchsorted(self._hashes, hashes), self.count - 1)

    def find(self, cells: CellSlices, hashes: Hashes) -> tuple[Offsets, Offsets]:
        """The positions of the values that are keys of the file, and the last row of the file with each of them.

        `hashes` are those of the values, with the seed of these keys.
        """
        passed = np.flatnonzero(self._begins[self._first_bits(hashes)])
        places = self._places(hashes[passed])
        is_there = self._hashes[places] == hashes[passed]
        passed, places = passed[is_there], places[is_there]
        is_key = equal_pairs(cells.taken(passed), self._cells.taken(places))
        return passed[is_key], self._rows[places[is_key]]

    def candidates(self, entries: Hashes) -> Offsets:
        """The positions of the index entries whose half of a hash is that of a key of the file."""
        passed = np.flatnonzero(self._begins[self._first_bits(entries)])
        halves = entries[passed] >> _HALF
        found: Offsets = passed[self._hashes[self._places(halves << _HALF)] >> _HALF == halves]
        return found


# The key index of a large master has 8 bytes per record: half of the key's hash, and the record's length. It is a
# cache, not part of the commit: it is used only for the exact file it was built for (inode, size, modification time),
# and the reader checks each row that it points to. It is not synced: its checksum detects damage from a power cut.

ENTRY = np.dtype("<u8")
"""Upper half: the upper half of the hash, or BLANK for a record that is not a row. Lower half: the length."""
LENGTH = np.uint64((1 << 32) - 1)
HEAD_BYTES = 4096
PIECE_RECORDS = 1 << 16


class IndexMismatch(Exception):
    """The index does not match the master, or is damaged."""


@dataclass(frozen=True, slots=True)
class KeyIndex:
    """An open index that matches its master."""

    file: BufferedReader
    records: int
    rows: int
    crc32: int

    def pieces(self) -> Iterator[Hashes]:
        """The entries in pieces, each valid until the next. Raises IndexMismatch; a bad checksum only at the end."""
        crc, left = 0, self.records
        held = np.empty(min(left, PIECE_RECORDS), ENTRY)
        self.file.seek(HEAD_BYTES)
        while left:
            entries: Hashes = held[:left]
            data = entries.data.cast("B")
            if self.file.readinto(data) != len(data):
                raise IndexMismatch
            crc = zlib.crc32(data, crc)
            left -= len(entries)
            yield entries
        if crc != self.crc32:
            raise IndexMismatch


def entries_of(hashes: Hashes, lengths: Offsets) -> Hashes:
    """Index entries for records with these key hashes (BLANK for a record that is not a row) and lengths."""
    return (hashes & ~LENGTH) | lengths.view(np.uint64)


def lengths_in(entries: Hashes) -> Offsets:
    """The record lengths in these entries."""
    return (entries & LENGTH).view(np.int64)


def _made_for(master: FileIdentity, config: InboxConfig) -> dict[str, Any]:
    """What an index depends on: the master, its dialect and its key column."""
    return {
        "version": INDEX_VERSION,
        "master": [master.inode, master.size, master.mtime_ns],
        "subject": [config.key_column, config.csv_delimiter, config.csv_encoding],
    }


def open_matching_index(files: ExitStack, path: Path, master: FileIdentity, config: InboxConfig) -> KeyIndex | None:
    """Open the index if it matches the master's current state, else None; `files` closes it. Raises OSError."""
    try:
        file = files.enter_context(path.open("rb"))
        head = json.loads(file.read(HEAD_BYTES))
        numbers: list[Any] = [int(head.pop(name)) for name in ("records", "rows", "crc32")]
        is_whole = os.fstat(file.fileno()).st_size == HEAD_BYTES + numbers[0] * ENTRY.itemsize
    except (FileNotFoundError, ValueError, TypeError, LookupError, AttributeError):  # none, or its head is damaged
        return None
    return KeyIndex(file, *numbers) if head == _made_for(master, config) and is_whole else None


class IndexWriter:
    """Writes an index. It is not valid before `seal`: its head is empty until then."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._crc = self._records = self._rows = 0
        file.write(bytes(HEAD_BYTES))

    def add(self, entries: Hashes) -> None:
        """Add the entries of the next records."""
        data = entries.astype(ENTRY, copy=False).data.cast("B")
        self._crc = zlib.crc32(data, self._crc)
        self._records += len(entries)
        self._rows += int(np.count_nonzero(entries > LENGTH))
        self._file.write(data)

    def seal(self, master: FileIdentity, config: InboxConfig) -> None:
        """Make this the valid index of the finished master. If the head does not fit, it stays invalid."""
        head = _made_for(master, config) | {"records": self._records, "rows": self._rows, "crc32": self._crc}
        text = json.dumps(head).encode("ascii")
        if len(text) <= HEAD_BYTES:
            self._file.seek(0)
            self._file.write(text.ljust(HEAD_BYTES))
            self._file.flush()
