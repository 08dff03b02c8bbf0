"""One POST, from its bytes to rows that can be stored: checked, cut into batches, spooled.

Invariants: memory is bounded by the first rows, which are held as they are, a group of rows and the spool's part of it,
however large the body; nothing of a body reaches the database before the last byte was checked.
"""

import hashlib
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, groupby, pairwise
from typing import TYPE_CHECKING, Any

from app.dwh.bodies import EMPTY, Body, Gzip
from app.dwh.faults import RowFault

if TYPE_CHECKING:
    from msgspec import Raw

    from app.dwh.rows import RowReader
    from app.dwh.values import Values

SPOOL_BYTES = HELD_BYTES = 1 << 22
HELD_ROWS = 10_000
MAX_FAULTS = 1000
LENGTH_BYTES = 8
Frame = tuple[int, Sequence[Sequence[Any]]]  # the number of a batch, and rows of it, by column


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """Rows of one batch, and then the bytes of its rows as they came, with their commas and brackets."""

    rows: int
    size_bytes: int


class Batches:
    """Deals rows out to batches: first by number, then by size; a larger single row goes alone."""

    def __init__(self, limits: BatchLimits) -> None:
        self._limits = limits
        self.count = 0
        self._chunk_rows = self._size_bytes = 0

    def deal(self, sizes: Sequence[int]) -> Sequence[int]:
        """How many of the next rows go to each batch: to the current one first, then to new ones."""
        ends = [0]
        for position, size_bytes in enumerate(sizes):
            if not self._fits(size_bytes):
                self.count += 1
                ends.append(position)
                self._size_bytes = 1
            self._chunk_rows += 1
            self._size_bytes += size_bytes + 1
        ends.append(len(sizes))
        return [end - start for start, end in pairwise(ends)]

    def _fits(self, size_bytes: int) -> bool:
        if self._chunk_rows == self._limits.rows:
            self._chunk_rows = 0
            return False
        return self.count > 0 and self._size_bytes + size_bytes + 1 <= self._limits.size_bytes


@dataclass(slots=True)
class Received:
    """What a body came to. `digest` is of its bytes, hex; `size_bytes` of its good rows. The caller closes it."""

    rows: int = 0
    batches: int = 0
    faults: list[RowFault] = field(default_factory=list)
    fault_count: int = 0
    digest: str = ""
    size_bytes: int = 0
    held: list[Frame] = field(default_factory=list)
    spool: Any = field(default_factory=lambda: tempfile.SpooledTemporaryFile(SPOOL_BYTES))  # noqa: SIM115 - `close`

    def read(self) -> Iterator[Iterator["Values"]]:
        """The batches, each as an iterator of its rows; read one to its end before the next."""
        for _, frames in groupby(self._frames(), key=lambda frame: frame[0]):
            yield chain.from_iterable(zip(*columns, strict=True) for _, columns in frames)

    def blocks(self) -> Iterator[Sequence["Values"]]:
        """All rows, some at a time, by column."""
        return (columns for _, columns in self._frames())

    def put(self, frame: Frame, size_bytes: int) -> None:
        """The next rows; `size_bytes` as they came."""
        self.rows += len(frame[1][0])
        self.size_bytes += size_bytes
        if self.rows <= HELD_ROWS and self.size_bytes <= HELD_BYTES:
            self.held.append(frame)
            return
        import msgspec

        packed = msgspec.msgpack.encode(frame)
        self.spool.write(len(packed).to_bytes(LENGTH_BYTES) + packed)

    def _frames(self) -> Iterator[Frame]:
        import msgspec

        yield from self.held
        self.spool.seek(0)
        while head := self.spool.read(LENGTH_BYTES):
            yield msgspec.msgpack.decode(self.spool.read(int.from_bytes(head)))

    def close(self) -> None:
        """Free the rows. Idempotent."""
        self.held.clear()
        self.spool.close()


class Intake:
    """Takes one body. `skip`: bad rows are noted and left out; else the first one refuses the body."""

    def __init__(
        self, body: Body, rows: "RowReader", limits: BatchLimits, *, gzip: Gzip | None = None, skip: bool = False
    ) -> None:
        self._body, self._rows, self._gzip, self._skip = body, rows, gzip, skip
        self._batches = Batches(limits)
        self._digest = hashlib.sha256()
        self._seen_rows = 0
        self.received = Received()

    def feed(self, block: bytes) -> None:
        """The next bytes. Raises BadRequest."""
        for piece in self._gzip.feed(block) if self._gzip else (block,):
            self._digest.update(piece)
            for group in self._body.feed(piece):
                self._take(group)

    def finish(self) -> Received:
        """The body has ended. Raises BadRequest."""
        if self._gzip:
            self._gzip.finish()
        for group in self._body.finish():
            self._take(group)
        if not self._seen_rows:
            raise EMPTY
        self.received.batches = self._batches.count
        self.received.digest = self._digest.hexdigest()
        return self.received

    def _take(self, group: "Sequence[bytes | Raw]") -> None:
        checked = self._rows.read(group, self._seen_rows)
        self._seen_rows += len(group)
        if checked.faults and not self._skip:
            raise checked.faults[0].refusal()
        received = self.received
        received.fault_count += len(checked.faults)
        received.faults += checked.faults[: MAX_FAULTS - len(received.faults)]
        self._put(checked.columns, checked.sizes)

    def _put(self, columns: "Sequence[Values]", sizes: Sequence[int]) -> None:
        batch, start = self._batches.count, 0
        for number, length in enumerate(self._batches.deal(sizes)):
            end = start + length
            if length:
                part = columns if length == len(sizes) else [column[start:end] for column in columns]
                self.received.put((batch + number, part), sum(sizes[start:end]))
            start = end
