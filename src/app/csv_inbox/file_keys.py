"""The keys of an incoming file, looked up block by block with numpy.

Invariants: 64-bit hashes find candidates; the bytes themselves decide. Memory grows only with the keys.
"""

import hashlib
import secrets
from typing import Any

import numpy as np
import numpy.typing as npt

from app.csv_inbox.csv_tokenizer import NONE, CellSlices, Offsets, cut

Hashes = npt.NDArray[np.uint64]
Truths = npt.NDArray[np.bool_]

WORD_BYTES = 8
LONG_KEY_BYTES = 64
LONG_VALUE_BYTES = 512
FEW_PAIRS = 16
FIRST_BITS_LEAST, FIRST_BITS_MOST = 12, 22
"""The most is 4 MiB: the next size exceeds the processor's cache, and a look-up costs five times as much."""

_FACTOR, _OTHER = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xD6E8FEB86659FD93)
_HALF = np.uint64(32)
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
    """One 64-bit hash per value."""
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

    `kept_rows` are the last rows of each key, in file order; `count` is their number.
    """

    kept_rows: Offsets
    count: int

    def __init__(self) -> None:
        self._data = bytearray()
        self._lengths: list[Offsets] = [NONE]
        self._added: list[Hashes] = []
        self._seed = 0

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
            self._seed = secrets.randbits(32)
            hashes = hashed(cells, self._seed)
        self.kept_rows = np.sort(self._rows)
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

    def find(self, cells: CellSlices) -> tuple[Offsets, Offsets]:
        """The positions of the values that are keys of the file, and the last row of the file with each of them."""
        hashes = hashed(cells, self._seed)
        passed = np.flatnonzero(self._begins[self._first_bits(hashes)])
        # The next greater hash where a hash is absent, or the last one.
        places = np.minimum(np.searchsorted(self._hashes, hashes[passed]), self.count - 1)
        is_there = self._hashes[places] == hashes[passed]
        passed, places = passed[is_there], places[is_there]
        is_key = equal_pairs(cells.taken(passed), self._cells.taken(places))
        return passed[is_key], self._rows[places[is_key]]
