"""Answers to GET: rows are read in one thread at the speed of the database, and sent in another at that of the client.

Invariants: what fails before the first byte is sent is an error, what fails later cuts the answer, so that no client
takes it for whole; memory is bounded, and a slow reader holds no connection.
"""

from collections.abc import Iterator
from contextlib import suppress

from app.dwh.formats import writer
from app.dwh.query import Selection
from app.dwh.spool import SPOOL_BYTES, Abandoned, Spool
from app.dwh.store import Warehouse

HEAD_BYTES, PIECE_BYTES, LEAN_BYTES = 1 << 18, 1 << 19, 1 << 16


class Page:
    """One answer: `produce` in one thread, the rest in another. The reader closes it. A `lean` one waits in a file."""

    def __init__(self, warehouse: Warehouse, selection: Selection, *, lean: bool = False) -> None:
        self._warehouse = warehouse
        self._selection = selection
        self._spool = Spool(LEAN_BYTES if lean else SPOOL_BYTES)
        self.last_id: int | None = None  # set when more rows follow; for who has begun

    def produce(self) -> None:
        """Read the rows to their end, or until nobody wants them. What goes wrong is the reader's to know."""
        with suppress(Abandoned), self._spool.written() as spool:
            self._fill(spool)

    def _fill(self, spool: Spool) -> None:
        """Write the rows; `last_id` is known when the reader may begin."""
        chosen = self._selection
        out = writer(chosen, spool, made=chosen.is_made(self._warehouse.database.dialect))
        left, last_id, shown = chosen.limit, 0, False
        with self._warehouse.selected(chosen) as found:
            for block in found.blocks:
                if asked := block[:left]:
                    out.write(asked)
                    left, last_id = left - len(asked), asked[-1][0]
                if len(asked) < len(block) and not shown:
                    self.last_id = last_id
                if not shown and spool.size_bytes >= HEAD_BYTES:
                    self.last_id, shown = found.last_id(), True
                    spool.show()
        out.close()

    def begin(self, *, whole: bool = False) -> int | None:
        """Wait for the first bytes, or for all; the size when all are there. Raises what the database raised."""
        return self._spool.wait(whole=whole)

    def pieces(self) -> Iterator[bytes]:
        """The bytes. Raises what the database raised in the middle of it."""
        sent_bytes = 0
        while piece := self._spool.read(sent_bytes, PIECE_BYTES):
            sent_bytes += len(piece)
            yield piece

    def close(self) -> None:
        """Nobody reads it any more: reading from the database ends with the next block. Idempotent."""
        self._spool.close()
