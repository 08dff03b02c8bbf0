"""Bodies as they arrive, cut into the JSON of single rows: a JSON document, NDJSON, or CSV; gzip around any of them.

Invariants: bytes are counted before they are parsed, also those that gzip makes; NDJSON and CSV hold no more than one
row and one block in memory. A body is fed in blocks of any size, and cut the same way whatever the blocks are.
"""

import re
import zlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

from app.dwh.faults import SHAPE_HINT, BadRequest

if TYPE_CHECKING:
    from msgspec import Raw

GROUP_ROWS = 1000
PIECE_BYTES = 1 << 18
MAX_RATIO = 200
RATIO_FREE_BYTES = 1 << 24
BLANKS = b" \t\r\n"
OPENING = re.compile(rb'[ \t\r\n]*\{[ \t\r\n]*"data"[ \t\r\n]*:[ \t\r\n]*(?=\[)')
ENVELOPE = 'the body is {"data": [...]}, an array of rows and nothing else'
EMPTY = BadRequest(400, "there are no rows in the body", "send at least one row", "data")


class Body(Protocol):
    """One body. Raises BadRequest."""

    def feed(self, block: bytes) -> Iterator[Sequence["bytes | Raw"]]:
        """Take the next bytes; the rows that are whole now, in groups."""

    def finish(self) -> Iterator[Sequence["bytes | Raw"]]:
        """The body has ended; the rows that were left."""


class JsonBody:
    """`{"data": [...]}`, held whole: a row can be told only when its end is there."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._held = bytearray()

    def feed(self, block: bytes) -> Iterator[Sequence["bytes | Raw"]]:
        """See `Body.feed`; nothing is whole before the end."""
        self._held += block
        if len(self._held) > self._limit_bytes:
            raise too_large(self._limit_bytes, "send it as NDJSON, which may be larger, or less at once")
        yield from ()

    def finish(self) -> Iterator[Sequence["bytes | Raw"]]:
        """See `Body.finish`."""
        rows = self._rows()
        if not rows:
            raise EMPTY
        for start in range(0, len(rows), GROUP_ROWS):
            yield rows[start : start + GROUP_ROWS]

    def _rows(self) -> Sequence["Raw"]:
        """The rows as views of the body. Cut out of their envelope here, so that a second `data` is no JSON."""
        import msgspec

        opening = OPENING.match(self._held)
        end = _last(self._held, len(self._held))
        array_end = _last(self._held, end - 1)
        enveloped = opening and self._held[end - 1 : end] == b"}" and self._held[array_end - 1 : array_end] == b"]"
        if not opening or not enveloped:
            raise self._misshapen()
        try:
            array = memoryview(self._held)[opening.end() : array_end]
            return msgspec.json.decode(array, type=list[msgspec.Raw])
        except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
            raise self._misshapen() from None

    def _misshapen(self) -> BadRequest:
        """Why this is not the envelope: no JSON at all, or another shape."""
        import msgspec

        try:
            msgspec.json.decode(self._held, type=dict[str, msgspec.Raw] | list[msgspec.Raw])
        except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
            return BadRequest(400, "the body is not JSON", "check its syntax, also that it is complete")
        return BadRequest(422, ENVELOPE, SHAPE_HINT, "data")


def _last(held: bytearray, end: int) -> int:
    """The end of `held[:end]` without blanks."""
    while end > 0 and held[end - 1] in BLANKS:
        end -= 1
    return end


class NdjsonBody:
    """One object a line; blank lines count for nothing."""

    def __init__(self, row_bytes: int) -> None:
        self._row_bytes = row_bytes
        self._rest = b""

    def feed(self, block: bytes) -> Iterator[Sequence[bytes]]:
        """See `Body.feed`."""
        *lines, self._rest = (self._rest + block).split(b"\n")
        if len(self._rest) > self._row_bytes or any(len(line) > self._row_bytes for line in lines):
            raise row_too_large(self._row_bytes)
        yield from _grouped(lines)

    def finish(self) -> Iterator[Sequence[bytes]]:
        """See `Body.finish`."""
        yield from _grouped([self._rest])


def _grouped(lines: Sequence[bytes]) -> Iterator[Sequence[bytes]]:
    rows = [line for line in lines if line.strip(BLANKS)]
    for start in range(0, len(rows), GROUP_ROWS):
        yield rows[start : start + GROUP_ROWS]


class Gzip:
    """What a gzip body holds, member by member, in pieces of bounded size."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._inflater = zlib.decompressobj(wbits=31)
        self._taken_bytes = self._made_bytes = 0

    def feed(self, block: bytes) -> Iterator[bytes]:
        """The next bytes, inflated. Raises BadRequest for what is no gzip, and for too much of it."""
        self._taken_bytes += len(block)
        while block:
            if self._inflater.eof:
                self._inflater = zlib.decompressobj(wbits=31)
            try:
                piece = self._inflater.decompress(block, PIECE_BYTES)
            except zlib.error:
                raise BadRequest(400, "the body is not gzip, or damaged", "send it again, or without gzip") from None
            block = self._inflater.unconsumed_tail or self._inflater.unused_data
            self._count(len(piece))
            yield piece

    def _count(self, piece_bytes: int) -> None:
        self._made_bytes += piece_bytes
        if self._made_bytes > self._limit_bytes:
            raise too_large(self._limit_bytes, "send less at once")
        if self._made_bytes > RATIO_FREE_BYTES and self._made_bytes > MAX_RATIO * self._taken_bytes:
            raise BadRequest(413, f"the body unpacks to more than {MAX_RATIO} times its size", "send it without gzip")

    def finish(self) -> None:
        """Raises BadRequest when the end is missing."""
        if not self._inflater.eof:
            raise BadRequest(400, "the gzip body is cut off", "send it again, whole")


def too_large(limit_bytes: int, hint: str) -> BadRequest:
    """The answer to a body over its limit."""
    return BadRequest(413, f"the body is larger than {limit_bytes} bytes", hint)


def row_too_large(row_bytes: int) -> BadRequest:
    """The answer to a row without an end."""
    return BadRequest(413, f"a row is larger than {row_bytes} bytes", "is a newline or a closing quote missing?")
