"""The pass over the whole master: every record is found, every key looked up, every width checked.

Invariant: it needs nothing but the master, so it is what happens when no index fits, and it writes a new one.
"""

from typing import IO

import numpy as np

from app.csv_inbox.dialect import Dialect, Malformed
from app.csv_inbox.faults import ENCODING
from app.csv_inbox.header import Header
from app.csv_inbox.index import entries_of
from app.csv_inbox.keys import BLANK, Hashes, hashed
from app.csv_inbox.output import Output, cut
from app.csv_inbox.records import Block, Offsets, blocks
from app.csv_inbox.tally import Tally

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
        _index(block, gone, hashes, tally, out)
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


def _index(block: Block, gone: Offsets, hashes: Hashes, tally: Tally, out: Output) -> None:
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
