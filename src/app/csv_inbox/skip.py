"""The pass along the index: only rows whose key may be in the file are looked at; all others are copied as they lie.

Invariant: nothing follows from the index alone. Each row that it points to is read and must have the key that the
index says; where it has not, or where the lengths do not add up to the master, the index is Unfit and nothing is kept.
"""

import os
from typing import IO

import numpy as np

from app.csv_inbox.dialect import Malformed
from app.csv_inbox.header import Header
from app.csv_inbox.index import LENGTH, Index, Unfit, lengths_in
from app.csv_inbox.keys import Hashes, hashed
from app.csv_inbox.output import Output
from app.csv_inbox.records import LONGEST_RECORD_BYTES, NONE, Block, Offsets, marked
from app.csv_inbox.scan import ranges
from app.csv_inbox.tally import Tally

CHUNK_BYTES = 1 << 21
MOST_BYTES = 4 * LONGEST_RECORD_BYTES


def skip(master: IO[bytes], header: Header, index: Index, tally: Tally, out: Output) -> None:
    """Write the header and every row that stays. Raises Unfit, OSError and what `out.beat` raises."""
    skipping = _Skipping(master, header, tally, out)
    for entries in index.pieces():
        skipping.piece(entries)
    skipping.end()
    tally.kept = index.rows - tally.taken


class _Skipping:
    """Where the pass is: all of the master before `_at` is done."""

    def __init__(self, master: IO[bytes], header: Header, tally: Tally, out: Output) -> None:
        self._at = 0
        self._size = os.fstat(master.fileno()).st_size
        self._master = master
        self._width = len(header.names)
        self._tally = tally
        self._out = out
        self._held = memoryview(bytearray(CHUNK_BYTES))
        self._chunk(header.size_bytes, NONE, NONE, NONE.view(np.uint64))

    def end(self) -> None:
        """Nothing may be left."""
        if self._at != self._size:
            raise Unfit

    def piece(self, entries: Hashes) -> None:
        """The next records."""
        lengths = lengths_in(entries)
        places = self._tally.incoming.keys.candidates(entries)
        if len(places):
            gone = self._looked_at(entries, np.cumsum(lengths), places)
            entries = np.delete(entries, gone) if len(gone) else entries
        else:
            self._copy(int(lengths.sum()))
        if self._out.indexing is not None:
            self._out.indexing.add(entries)

    def _copy(self, size: int) -> None:
        """Write bytes in which there is nothing to look at."""
        if self._at + size > self._size:
            raise Unfit
        try:
            self._out.copy(self._master, self._at, self._at + size)
        except EOFError as error:
            raise Unfit from error
        self._at += size

    def _looked_at(self, entries: Hashes, ends: Offsets, places: Offsets) -> Offsets:
        """Write records, some megabytes at a time or one that is longer; which of those at these places go."""
        gone = []
        first = done = 0
        while first < len(entries):
            last = max(int(np.searchsorted(ends, done + CHUNK_BYTES, "right")), first + 1)
            low, high = np.searchsorted(places, (first, last)).tolist()
            asked = places[low:high]
            chosen, stops = entries[asked], ends[asked] - done
            gone.append(asked[self._chunk(int(ends[last - 1]) - done, stops - lengths_in(chosen), stops, chosen)])
            first, done = last, int(ends[last - 1])
        return np.concatenate(gone)

    def _chunk(self, size: int, starts: Offsets, ends: Offsets, entries: Hashes) -> Offsets:
        """Write that many bytes, but not those of these records that go; which these are."""
        data = self._read(size)
        hits = self._met(data, starts, ends, entries) if len(entries) else NONE
        self._out.beat(size)
        self._out.keep(data, self._at, *ranges(starts[hits], ends[hits]))
        self._at += size
        return hits

    def _read(self, size: int) -> memoryview:
        """The next bytes of the master, good until the next call."""
        if size > MOST_BYTES:
            raise Unfit
        if size > len(self._held):
            self._held = memoryview(bytearray(size))
        data, done = self._held[:size], 0
        while done < size:
            count = os.preadv(self._master.fileno(), [data[done:]], self._at + done)
            if not count:
                raise Unfit
            done += count
        return data

    def _met(self, data: memoryview, starts: Offsets, ends: Offsets, entries: Hashes) -> Offsets:
        """Which of these records have a key of the file; those are counted."""
        raw = b"".join([data[start:end] for start, end in zip(starts.tolist(), ends.tolist(), strict=True)])
        try:
            block = Block(raw, marked(raw, self._tally.dialect), 0)
            block.check_width(self._width)
        except Malformed as error:
            raise Unfit from error
        if len(block.rows) != len(entries) or not np.array_equal(block.ends, np.cumsum(ends - starts)):
            raise Unfit
        cells = block.cells(self._tally.layout.key, self._tally.dialect)
        hashes = hashed(cells)
        if ((hashes ^ entries) > LENGTH).any():
            raise Unfit
        hits, rows = self._tally.hits(cells, hashes)
        self._tally.meet(rows, block, block.rows[hits])
        return hits
