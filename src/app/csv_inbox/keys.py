"""The keys of a file, looked up by the thousand: hashes of 64 bits find candidates, the bytes themselves decide.

Invariants: hashes are the same in every process and version of INDEX_VERSION, since the index keeps them; two keys
are one only when their bytes are, whatever their hashes; memory grows with the number of keys only.
"""

import hashlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from app.csv_inbox.records import NONE, Cells, Offsets

Hashes = npt.NDArray[np.uint64]
Truths = npt.NDArray[np.bool_]

INDEX_VERSION = 1
WORD_BYTES = 8
LONG_KEY_BYTES = 64
SIEVE_BITS_LEAST, SIEVE_BITS_MOST = 12, 23
BLANK = np.uint64(0)
"""Stands for a record that is no row; no key has this hash."""

_FACTOR, _OTHER = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xD6E8FEB86659FD93)
_HALF = np.uint64(32)
_MASKS = np.array([*((1 << 8 * n) - 1 for n in range(WORD_BYTES)), (1 << 64) - 1], np.uint64)


def _words(cells: Cells) -> Hashes:
    """The little-endian number of 8 bytes at each offset; copies the data only when a value ends near its end."""
    data = cells.data
    if int((cells.starts + cells.lengths).max(initial=0)) + WORD_BYTES > len(data):
        data = np.append(data, np.zeros(WORD_BYTES, np.uint8))
    return np.ndarray((len(data) - WORD_BYTES + 1,), np.dtype("<u8"), data, 0, (1,))


def _word(words: Hashes, cells: Cells, at: int, shortest: int) -> Hashes:
    """Bytes `at` to `at` + 8 of each value, 0 behind its end; none is shorter than `shortest`."""
    found: Hashes
    if at + WORD_BYTES <= shortest:
        found = words[cells.starts + at]
    else:
        rest = np.minimum(np.maximum(cells.lengths - at, 0), WORD_BYTES)
        found = words[np.where(rest > 0, cells.starts + at, 0)] & _MASKS[rest]
    return found


def hashed(cells: Cells) -> Hashes:
    """One hash for each value."""
    words = _words(cells)
    found = cells.lengths.astype(np.uint64) * _OTHER
    longest = int(cells.lengths.max(initial=0))
    shortest = int(cells.lengths.min(initial=longest))
    for at in range(0, min(longest, LONG_KEY_BYTES), WORD_BYTES):
        mixed = (found ^ _word(words, cells, at, shortest)) * _FACTOR
        mixed ^= mixed >> _HALF
        # A value that ended before is left as it is: its hash must not depend on its neighbours.
        found = mixed if at < shortest else np.where(cells.lengths > at, mixed, found)
    for place in np.flatnonzero(cells.lengths > LONG_KEY_BYTES) if longest > LONG_KEY_BYTES else ():
        digest = hashlib.blake2b(cells.value(int(place)), digest_size=WORD_BYTES).digest()
        found[place] = int.from_bytes(digest, "little")
    found *= _OTHER
    found[found == BLANK] = 1
    return found


def same(left: Cells, right: Cells) -> Truths:
    """Which pairs of values are the same bytes."""
    equal: Truths = left.lengths == right.lengths
    longest = int(left.lengths.max(initial=0))
    left_words, right_words = _words(left), _words(right)
    for at in range(0, min(longest, LONG_KEY_BYTES), WORD_BYTES):
        equal &= _word(left_words, left, at, 0) == _word(right_words, right, at, 0)
    for place in np.flatnonzero(equal & (left.lengths > LONG_KEY_BYTES)) if longest > LONG_KEY_BYTES else ():
        equal[place] = left.value(int(place)) == right.value(int(place))
    return equal


def firsts(values: npt.NDArray[Any]) -> Offsets:
    """Where each distinct value is first, in the order of the values. np.unique imports far more of numpy."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    found: Offsets = order[np.append(ordered[:1] == ordered[:1], ordered[1:] != ordered[:-1])]
    return found


@dataclass(frozen=True, slots=True)
class Keys:
    """The keys of a file. `hashes` are sorted and distinct; `rows` the last row with it, whose key is that of `cells`.

    `shared` has the last row of each key that shares its hash with another key; `by_row` the hash of each row.
    """

    hashes: Hashes
    rows: Offsets
    cells: Cells
    shared: dict[bytes, int]
    by_row: Hashes
    sieve: Truths
    shift: np.uint64
    count: int

    def candidates(self, hashes: Hashes) -> Offsets:
        """The places of the hashes that are those of a key here; few others are looked at closely."""
        passed = np.flatnonzero(self.sieve[hashes >> self.shift])
        if not len(passed):
            return passed
        wanted = hashes[passed]
        found: Offsets = passed[self.hashes[self._places(wanted)] == wanted]
        return found

    def last_rows(self, cells: Cells, hashes: Hashes) -> Offsets:
        """The last row here with the key of each candidate, -1 where it only looked alike."""
        places = self._places(hashes)
        found = np.where(same(cells, self.cells.taken(places)), self.rows[places], -1)
        for place in np.flatnonzero(found < 0) if self.shared else ():
            found[place] = self.shared.get(cells.value(int(place)), -1)
        return found

    def kept_rows(self) -> Offsets:
        """The last row of each key, in the order of the file."""
        rows = np.concatenate((self.rows, np.fromiter(self.shared.values(), np.int64, len(self.shared))))
        return rows[firsts(rows)]

    def _places(self, hashes: Hashes) -> Offsets:
        return np.minimum(np.searchsorted(self.hashes, hashes), len(self.hashes) - 1)


@dataclass(slots=True)
class Gathering:
    """Keys being read, row by row."""

    rows: int = 0
    _data: bytearray = field(default_factory=bytearray)
    _lengths: list[Offsets] = field(default_factory=list)
    _hashes: list[Hashes] = field(default_factory=list)

    def add(self, cells: Cells) -> None:
        """The keys of the next rows."""
        ends = np.cumsum(cells.lengths)
        inner = np.arange(int(ends[-1]) if len(ends) else 0) - np.repeat(ends - cells.lengths, cells.lengths)
        self._data += cells.data[np.repeat(cells.starts, cells.lengths) + inner].tobytes()
        self._lengths.append(cells.lengths)
        self._hashes.append(hashed(cells))
        self.rows += len(cells.lengths)

    def keys(self) -> Keys:
        """All of them; there is at least one."""
        lengths = np.concatenate([NONE, *self._lengths])
        by_row = np.concatenate(self._hashes)
        cells = Cells(np.frombuffer(self._data + bytes(WORD_BYTES), np.uint8), np.cumsum(lengths) - lengths, lengths)
        order = np.argsort(by_row, kind="stable")
        ordered = by_row[order]
        is_last = np.append(ordered[1:] != ordered[:-1], True)
        rows, hashes = order[is_last], ordered[is_last]
        shared = _shared(cells, order, is_last)
        bits = int(np.clip((16 * len(hashes)).bit_length(), SIEVE_BITS_LEAST, SIEVE_BITS_MOST))
        sieve = np.zeros(1 << bits, np.bool_)
        shift = np.uint64(64 - bits)
        sieve[hashes >> shift] = True
        groups = len(firsts(by_row[np.fromiter(shared.values(), np.int64, len(shared))]))
        return Keys(hashes, rows, cells.taken(rows), shared, by_row, sieve, shift, len(rows) - groups + len(shared))


def _shared(cells: Cells, order: Offsets, is_last: Truths) -> dict[bytes, int]:
    """The last row of each key whose hash other keys have too. Keys that merely come again are none of these."""
    others = np.flatnonzero(~is_last)
    if not len(others):
        return {}
    group = np.concatenate(([0], np.cumsum(is_last)[:-1]))
    lasts = order[is_last]
    differs = others[~same(cells.taken(order[others]), cells.taken(lasts[group[others]]))]
    if not len(differs):
        return {}
    apart = np.zeros(len(lasts), np.bool_)
    apart[group[differs]] = True
    members = order[apart[group]]
    return {cells.value(int(row)): int(row) for row in np.sort(members)}
