"""The pass along the index: only rows whose key may be in the file are read, all between them is copied as it lies.

Invariant: nothing follows from the index alone. Each row that it points to is read and must have the key that the
index says; where it has not, or where the lengths do not add up to the master, the index is Unfit and nothing is kept.
"""

import os
from typing import IO

import numpy as np

from app.csv_inbox.dialect import Malformed
from app.csv_inbox.header import Header
from app.csv_inbox.index import Index, Unfit
from app.csv_inbox.keys import Hashes, hashed
from app.csv_inbox.output import COPY_BYTES, Output
from app.csv_inbox.records import Block, Offsets, marked
from app.csv_inbox.scan import ranges
from app.csv_inbox.tally import Tally


def skip(master: IO[bytes], header: Header, index: Index, tally: Tally, out: Output) -> None:
    """Write the header and every row that stays. Raises Unfit, OSError and what `out.beat` raises."""
    skipping = _Skipping(master, header, tally, out)
    size = os.fstat(master.fileno()).st_size
    for hashes, lengths in index.pieces():
        if skipping.end + int(lengths.sum()) > size:
            raise Unfit
        first = 0
        while first < len(hashes):
            ends = np.cumsum(lengths[first:])
            count = max(int(np.searchsorted(ends, COPY_BYTES, "right")), 1)
            skipping.chunk(hashes[first : first + count], lengths[first : first + count])
            first += count
    if skipping.end != size:
        raise Unfit
    skipping.copy()
    tally.kept = index.rows - tally.taken


class _Skipping:
    """Where the pass is: `[start, end)` of the master was looked at and is to be copied."""

    def __init__(self, master: IO[bytes], header: Header, tally: Tally, out: Output) -> None:
        self.start = 0
        self.end = header.size_bytes
        self._master = master
        self._width = len(header.names)
        self._tally = tally
        self._out = out

    def copy(self) -> None:
        """Write what is to be copied."""
        try:
            self._out.copy(self._master, self.start, self.end)
        except EOFError as error:
            raise Unfit from error
        self.start = self.end

    def chunk(self, hashes: Hashes, lengths: Offsets) -> None:
        """The next records: a megabyte or so, or one that is longer."""
        size = int(lengths.sum())
        gone = self._gone(hashes, lengths, size)
        if len(gone):
            stays = np.ones(len(hashes), np.bool_)
            stays[gone] = False
            hashes, lengths = hashes[stays], lengths[stays]
        if self._out.indexing is not None:
            self._out.indexing.add(hashes, lengths)

    def _gone(self, hashes: Hashes, lengths: Offsets, size: int) -> Offsets:
        """Read the records that may go and write the others, if any does; the places of those that go."""
        places = self._tally.incoming.keys.candidates(hashes)
        if not len(places):
            self.end += size
            return places
        data = os.pread(self._master.fileno(), size, self.end)
        if len(data) != size:
            raise Unfit
        ends = np.cumsum(lengths)
        starts = ends - lengths
        hits = self._met(data, starts[places], ends[places], hashes[places])
        gone = places[hits]
        self.copy()
        self._out.beat(size)
        first, last = ranges(starts, ends, gone)
        self._out.keep(data, self.end, first, last)
        self.start = self.end = self.end + size
        return gone

    def _met(self, data: bytes, starts: Offsets, ends: Offsets, hashes: Hashes) -> Offsets:
        """Which of these records have a key of the file; those are counted."""
        raw = b"".join([data[start:end] for start, end in zip(starts.tolist(), ends.tolist(), strict=True)])
        try:
            block = Block(raw, marked(raw, self._tally.dialect), 0)
            block.check_width(self._width)
        except Malformed as error:
            raise Unfit from error
        if len(block.rows) != len(hashes) or not np.array_equal(block.ends, np.cumsum(ends - starts)):
            raise Unfit
        cells = block.cells(self._tally.layout.key, self._tally.dialect)
        if not np.array_equal(hashed(cells), hashes):
            raise Unfit
        hits, rows = self._tally.hits(cells, hashes)
        self._tally.meet(rows, block, block.rows[hits])
        return hits
