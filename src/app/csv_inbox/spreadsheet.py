"""What spreadsheets write around the rows: records in which every cell is empty, and delimiters behind the last column.

Invariant: nothing that has a value is ever taken away, and lines keep their numbers.
"""

from collections.abc import Container
from dataclasses import replace

import numpy as np

from app.csv_inbox.dialect import Dialect
from app.csv_inbox.output import cut
from app.csv_inbox.records import Block, marked


def without_blank_records(block: Block, dialect: Dialect) -> Block:
    """The block; records of nothing but delimiters, blanks and empty quotes are no rows of it."""
    soft = np.zeros(256, np.bool_)
    soft[[ord(dialect.delimiter), ord(" "), ord("\t"), ord('"')]] = True
    positions = block.rows
    # Most rows are told by their first byte; only what is soft at both ends and in the middle is looked at as a whole.
    for part in (0.0, 1.0, 0.5):
        starts, lasts = block.starts[positions], block.stops[positions] - 1
        places = starts + ((lasts - starts) * part).astype(np.int64)
        positions = positions[soft[block.array[places]]]
    blank = [at for at in positions.tolist() if dialect.blank(block.record(at))]
    return block.without(np.array(blank, np.int64)) if blank else block


def without_surplus(block: Block, dialect: Dialect, width: int, allowed: Container[int]) -> Block:
    """Rows of an allowed number of fields cut to `width` fields, where all behind these are blank."""
    if block.is_even(width):
        return block
    widths = block.widths
    wide = np.flatnonzero(widths > width)
    if not len(wide):
        return block
    firsts, lasts = block.tails(wide, width), block.stops[block.rows][wide]
    only_delimiters = lasts - firsts == widths[wide] - width
    goes = [
        place
        for place, (first, last) in enumerate(zip(firsts.tolist(), lasts.tolist(), strict=True))
        if int(widths[wide[place]]) in allowed and (only_delimiters[place] or dialect.blank(block.data[first:last]))
    ]
    if not goes:
        return block
    stays_from, stays_to = np.append(0, lasts[goes]), np.append(firsts[goes], len(block.data))
    data = cut(block.data, stays_from, stays_to)
    marks = marked(data if data.endswith(b"\n") else data + b"\n", dialect)
    return replace(block, data=data, marks=marks)
