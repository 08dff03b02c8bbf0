"""Which rows of the master go because the file has their key, and what the file does to them.

Invariant: each row of the master is asked about once, and each key of the file counts once, however often the master
has it: as replaced, or as unchanged when its first row there comes again to the byte.
"""

import os
from typing import IO

import numpy as np

from app.csv_inbox.dialect import Dialect
from app.csv_inbox.incoming import Incoming
from app.csv_inbox.keys import Hashes, Truths, firsts, same
from app.csv_inbox.records import Block, Cells, Octets, Offsets

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
