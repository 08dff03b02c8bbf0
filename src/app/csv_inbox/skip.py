"""The pass along the index: only rows whose key may be in the file are looked at; all others are copied as they lie.

Invariant: nothing follows from the index alone. Each row that it points to is read and must have the key that the
index says; where it has not, or where the lengths do not add up to the master, the index is Unfit and nothing is kept.
"""

import os
from collections.abc import Iterator
from typing import IO

import numpy as np

from app.csv_inbox.dialect import Malformed
from app.csv_inbox.header import Header
from app.csv_inbox.index import LENGTH, Index, Unfit, lengths_in
from app.csv_inbox.keys import Hashes, hashed
from app.csv_inbox.output import Output, cut
from app.csv_inbox.records import MASTER_RECORD_BYTES, NONE, Block, Offsets, marked
from app.csv_inbox.scan import ranges
from app.csv_inbox.tally import Tally

CHUNK_BYTES = 1 << 23
APART_BYTES = 1 << 16
"""Records that may go and lie further apart than this are read alone; what is between them is copied in long pieces."""


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
        self._chunk(header.size_bytes, NONE, NONE.view(np.uint64))

    def end(self) -> None:
        """Nothing may be left."""
        if self._at != self._size:
            raise Unfit

    def piece(self, entries: Hashes) -> None:
        """The next records."""
        ends = np.cumsum(lengths_in(entries))
        size = int(ends[-1])
        if self._at + size > self._size:
            raise Unfit
        places = self._tally.incoming.keys.candidates(entries)
        asked = lengths_in(entries[places])
        if len(places) * APART_BYTES <= size and int(asked.sum()) <= CHUNK_BYTES:
            gone = self._sparse(entries, ends, places)
        else:
            gone = self._dense(entries, ends, places)
        if self._out.indexing is not None:
            self._out.indexing.add(np.delete(entries, gone) if len(gone) else entries)

    def _sparse(self, entries: Hashes, ends: Offsets, places: Offsets) -> Offsets:
        """Read the records at these places alone, copy what lies between those that go; which these are."""
        asked, base = entries[places], self._at
        lengths, stops = lengths_in(asked), ends[places] + base
        starts = stops - lengths
        raw = b"".join([bytes(self._read(start, end - start)) for start, end in _pairs(starts, stops)])
        hits = self._met(raw, lengths, asked)
        first, last = ranges(starts[hits], stops[hits])
        for start, end in _pairs(first, last):
            self._copy(start)
            self._at = end
        self._copy(base + int(ends[-1]))
        self._out.note(lambda: _taken(raw, lengths, hits), first, last)
        return places[hits]

    def _copy(self, end: int) -> None:
        """Write the master up to there."""
        try:
            self._out.copy(self._master, self._at, end)
        except EOFError as error:
            raise Unfit from error
        self._at = end

    def _dense(self, entries: Hashes, ends: Offsets, places: Offsets) -> Offsets:
        """Read all records, some megabytes at a time or one that is longer; which of those at these places go."""
        gone = []
        first = done = 0
        while first < len(entries):
            last = max(int(np.searchsorted(ends, done + CHUNK_BYTES, "right")), first + 1)
            low, high = np.searchsorted(places, (first, last)).tolist()
            asked = places[low:high]
            gone.append(asked[self._chunk(int(ends[last - 1]) - done, ends[asked] - done, entries[asked])])
            first, done = last, int(ends[last - 1])
        return np.concatenate(gone)

    def _chunk(self, size: int, stops: Offsets, asked: Hashes) -> Offsets:
        """Write that many bytes, but not those of these records that go; which these are."""
        data, lengths = self._read(self._at, size), lengths_in(asked)
        starts = stops - lengths
        raw = cut(data, starts, stops)
        hits = self._met(raw, lengths, asked)
        first, last = ranges(starts[hits], stops[hits])
        self._out.beat(size)
        self._out.keep(data, first, last)
        self._out.note(lambda: _taken(raw, lengths, hits), first + self._at, last + self._at)
        self._at += size
        return hits

    def _read(self, at: int, size: int) -> memoryview:
        """Bytes of the master, good until the next call."""
        if size > MASTER_RECORD_BYTES:
            raise Unfit
        if size > len(self._held):
            self._held = memoryview(bytearray(size))
        data, done = self._held[:size], 0
        while done < size:
            count = os.preadv(self._master.fileno(), [data[done:]], at + done)
            if not count:
                raise Unfit
            done += count
        return data

    def _met(self, raw: bytes, lengths: Offsets, asked: Hashes) -> Offsets:
        """Which of these records have a key of the file; those are counted."""
        if not len(asked):
            return NONE
        try:
            block = Block(raw, marked(raw, self._tally.dialect), 0)
            block.check_width(self._width)
        except Malformed as error:
            raise Unfit from error
        if len(block.rows) != len(asked) or not np.array_equal(block.ends, np.cumsum(lengths)):
            raise Unfit
        cells = block.cells(self._tally.layout.key, self._tally.dialect)
        hashes = hashed(cells)
        if ((hashes ^ asked) > LENGTH).any():
            raise Unfit
        hits, rows = self._tally.hits(cells, hashes)
        self._tally.meet(rows, block, block.rows[hits])
        return hits


def _pairs(first: Offsets, last: Offsets) -> Iterator[tuple[int, int]]:
    return zip(first.tolist(), last.tolist(), strict=True)


def _taken(raw: bytes, lengths: Offsets, hits: Offsets) -> bytes:
    """The bytes of those records of `raw`."""
    ends = np.cumsum(lengths)
    return raw if len(hits) == len(lengths) else cut(raw, (ends - lengths)[hits], ends[hits])
