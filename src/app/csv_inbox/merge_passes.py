"""The two ways through a master: the pass over all of it, and the pass along its index."""

import os
from collections.abc import Iterator
from typing import IO

import numpy as np

from app.csv_inbox.config import ENCODING
from app.csv_inbox.csv_tokenizer import (
    MASTER_RECORD_BYTES,
    NONE,
    Block,
    Cells,
    Dialect,
    Malformed,
    Octets,
    Offsets,
    blocks,
    marked,
)
from app.csv_inbox.header import Header
from app.csv_inbox.incoming import Incoming
from app.csv_inbox.key_index import (
    BLANK,
    LENGTH,
    Hashes,
    Index,
    Truths,
    Unfit,
    entries_of,
    firsts,
    hashed,
    lengths_in,
    same,
)
from app.csv_inbox.master_output import Output, cut

# Which rows of the master go because the file has their key, and what the file does to them.
#
# Invariant: each row of the master is asked about once, and each key of the file counts once, however often the
# master has it: as replaced, or as unchanged when its first row there comes again to the byte.

READ_BYTES = 1 << 20


class Tally:
    """The counts of one merge. `doubtful`: columns in which no row that stays had a value so far."""

    def __init__(self, incoming: Incoming, dialect: Dialect, spool: IO[bytes]) -> None:
        self.incoming = incoming
        self.layout = incoming.layout
        self.dialect = dialect
        self.padding = dialect.delimiter.encode() * len(incoming.layout.added)
        self.spool = spool
        self.offsets: Offsets = np.frombuffer(incoming.offsets, np.int64)
        self.restart()

    def restart(self) -> None:
        """Count from the beginning."""
        self.doubtful: list[int] = list(self.layout.doubtful)
        self.kept = self.taken = self.unchanged = 0
        self._met: Truths = np.zeros(self.incoming.rows, np.bool_)

    @property
    def met(self) -> int:
        """How many keys of the file the master had."""
        return int(np.count_nonzero(self._met))

    def hits(self, cells: Cells, hashes: Hashes) -> tuple[Offsets, Offsets]:
        """The places of the keys that the file has, and its last row with each."""
        places = self.incoming.keys.candidates(hashes)
        if not len(places):
            return places, places
        rows = self.incoming.keys.last_rows(cells.taken(places), hashes[places])
        return places[rows >= 0], rows[rows >= 0]

    def meet(self, rows: Offsets, block: Block, positions: Offsets) -> None:
        """Count records of the master that go, with the row of the file that has the key of each."""
        self.taken += len(rows)
        first = firsts(rows)
        fresh = first[~self._met[rows[first]]]
        self._met[rows] = True
        starts, stops = block.starts[positions[fresh]], block.stops[positions[fresh]]
        there = self.offsets[rows[fresh]]
        lengths = self.offsets[rows[fresh] + 1] - there - len(self.layout.eol)
        alike = np.flatnonzero(lengths == stops - starts + len(self.padding))
        if len(alike):
            records = Cells(block.array, starts[alike], (stops - starts)[alike])
            self.unchanged += self._same(records, there[alike])

    def _same(self, records: Cells, starts: Offsets) -> int:
        """How many of the records the file has, padded, each where it starts; there is at least one."""
        held, places = self._spooled(starts, records.lengths + len(self.padding))
        alike = same(records, Cells(held, places, records.lengths))
        if self.padding:
            sizes = np.full(len(places), len(self.padding))
            padding = Cells(np.frombuffer(self.padding, np.uint8), np.zeros(len(places), np.int64), sizes)
            alike &= same(Cells(held, places + records.lengths, sizes), padding)
        return int(np.count_nonzero(alike))

    def _spooled(self, starts: Offsets, lengths: Offsets) -> tuple[Octets, Offsets]:
        """What the spool has there, and where in it each begins: all between them, unless that is too much."""
        base, end = int(starts.min()), int((starts + lengths).max())
        if end - base <= READ_BYTES:
            return np.frombuffer(os.pread(self.spool.fileno(), end - base, base), np.uint8), starts - base
        pairs = zip(starts.tolist(), lengths.tolist(), strict=True)
        pieces = b"".join([os.pread(self.spool.fileno(), length, start) for start, length in pairs])
        return np.frombuffer(pieces, np.uint8), np.cumsum(lengths) - lengths

    def doubt(self, block: Block, hits: Offsets) -> None:
        """A column with a value in any row that stays is not obsolete."""
        stays = np.ones(len(block.rows), np.bool_)
        stays[hits] = False
        self.doubtful = [
            place for place in self.doubtful if not bool((block.cells(place, self.dialect).lengths[stays] > 0).any())
        ]


# The pass over the whole master: every record is found, every key looked up, every width checked.
#
# Invariant: it needs nothing but the master, so it is what happens when no index fits, and it writes a new one.

SCAN_BYTES = 1 << 21
DOUBT_BLOCKS = 4


def scan(master: IO[bytes], header: Header, tally: Tally, out: Output) -> None:
    """Write the header and every row that stays. Raises Malformed, OSError and what `out.beat` raises."""
    _start(master, header, tally, out)
    at = header.size_bytes
    for block in blocks(master.read, tally.dialect, 1 + header.lines, SCAN_BYTES):
        out.beat(len(block.data))
        hashes, hits, rows = _looked_up(block, header, tally)
        tally.kept += len(block.rows) - len(hits)
        if tally.doubtful:
            tally.doubt(block, hits)
        gone = block.rows[hits]
        if len(hits):
            tally.meet(rows, block, gone)
        _write(block, at, gone, tally, out)
        _index_of(block, gone, hashes, tally, out)
        at += len(block.data)


def settled(master: IO[bytes], header: Header, tally: Tally) -> bool:
    """Whether the first rows alone tell that no column is obsolete. Nothing is counted."""
    if not tally.doubtful:
        return True
    master.seek(header.size_bytes)
    for number, block in enumerate(blocks(master.read, tally.dialect, 1 + header.lines)):
        _, hits, _ = _looked_up(block, header, tally)
        tally.doubt(block, hits)
        if not tally.doubtful or number == DOUBT_BLOCKS:
            break
    return not tally.doubtful


def _looked_up(block: Block, header: Header, tally: Tally) -> tuple[Hashes, Offsets, Offsets]:
    """The hash of each row's key, the places of those that the file has, and its row for each."""
    _check_decodes(block, tally.dialect)
    block.check_width(len(header.names))
    cells = block.cells(tally.layout.key, tally.dialect)
    hashes = hashed(cells)
    hits, rows = tally.hits(cells, hashes)
    return hashes, hits, rows


def _start(master: IO[bytes], header: Header, tally: Tally, out: Output) -> None:
    master.seek(0)
    raw = master.read(header.size_bytes)
    out.write(tally.layout.header(tally.dialect) if tally.padding or not header.eol else raw)
    out.kept_bytes = header.size_bytes


def _write(block: Block, at: int, gone: Offsets, tally: Tally, out: Output) -> None:
    """The block without the records that go, every other byte as it is but for fields put behind."""
    first, last = ranges(block.starts[gone], block.ends[gone])
    data = block.data
    if tally.padding:
        size, stops = len(tally.padding), block.stops[block.rows]
        data = np.insert(block.array, np.repeat(stops, size), tally.padding[0]).tobytes()
        first, last = (place + size * np.searchsorted(stops, place, "right") for place in (first, last))
    out.keep(data, first, last)
    out.note(lambda: cut(data, first, last), first + at, last + at)
    if not block.data.endswith(b"\n") and not _last_goes(block, gone):
        out.write(tally.layout.eol)  # the last record of the master may lack its line end, and rows follow now


def ranges(starts: Offsets, ends: Offsets) -> tuple[Offsets, Offsets]:
    """The bounds of what goes, records in their order; neighbours make one range."""
    apart = starts[1:] != ends[:-1]
    return np.concatenate((starts[:1], starts[1:][apart])), np.concatenate((ends[:-1][apart], ends[-1:]))


def _last_goes(block: Block, gone: Offsets) -> bool:
    return bool(len(gone)) and int(gone[-1]) == len(block.ends) - 1


def _index_of(block: Block, gone: Offsets, hashes: Hashes, tally: Tally, out: Output) -> None:
    if out.indexing is None:
        return
    lengths = block.ends - block.starts
    lengths[block.rows] += len(tally.padding)
    if not block.data.endswith(b"\n"):
        lengths[-1] += len(tally.layout.eol)
    if len(hashes) < len(lengths):  # some records are no rows
        hashes, found = np.full(len(lengths), BLANK), hashes
        hashes[block.rows] = found
    entries = entries_of(hashes, lengths)
    out.indexing.add(np.delete(entries, gone) if len(gone) else entries)


def _check_decodes(block: Block, dialect: Dialect) -> None:
    if not block.data.isascii():
        try:
            block.data.decode(dialect.encoding)
        except UnicodeDecodeError as error:
            line = block.line + block.data.count(b"\n", 0, error.start)
            told = f"invalid {dialect.encoding.upper()} byte 0x{block.data[error.start]:02X}"
            raise Malformed(told, line, kind=ENCODING) from error


# The pass along the index: only rows whose key may be in the file are looked at; all others are copied as they lie.
#
# Invariant: nothing follows from the index alone. Each row that it points to is read and must have the key that the
# index says; where it has not, or where the lengths do not add up to the master, the index is Unfit and nothing is
# kept.

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
