"""The CSV file of one hour: takes pages of rows in any order, with any columns, and makes one file with a digest.

Invariants: the same rows give the same bytes, however they are paged; memory holds one page, or the merge of the pages,
never the whole hour. Pages are spooled as sorted segments. If these follow each other with the same columns, as in a
query by sort key, the file is a header plus these segments, without a merge.
"""

import csv
import heapq
import io
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal, InvalidOperation
from functools import partial
from hashlib import md5
from itertools import groupby, islice, pairwise
from operator import itemgetter
from shutil import copyfileobj
from typing import BinaryIO

from app.core.errors import Permanent
from app.core.files import temporary_file
from app.core.ledger import Tally
from app.core.pipeline import Shrink, Sums
from app.core.windows import Window
from app.dynamo_to_drive.rows import Columns, Row, rows_at_once
from app.dynamo_to_drive.timestamps import TimestampReader, ascend

LINE_END = "\r\n"  # RFC 4180; also, csv.writer quotes a lone carriage return only with this line end
MEMORY_BYTES = 1 << 20
COPY_BYTES = 1 << 18
MERGE_ROWS = 1000
MERGE_BYTES, LEAST_BLOCK_BYTES = 1 << 26, 1 << 13  # of all segments together, and of one
MAX_CELL_CHARACTERS = MAX_LINE_BYTES = 1 << 24
BYTE_ORDER_MARK = "\ufeff"  # spreadsheets write one before the first name
TEXT_LIMIT = 200
FORMULA = ("=", "+", "-", "@", "\t", "\r", "'")

Order = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class FileShape:
    """The format of this table's files. `key` are the attributes that, with the timestamp, identify a row.

    `times` parses timestamps; `escape` escapes cells against spreadsheet formulas. `left_out` gets no column; an
    earlier file may have one, for rows of other partitions.
    """

    timestamp: str
    key: tuple[str, ...]
    times: TimestampReader
    escape: bool = False
    left_out: str = ""

    def orders(self, rows: Sequence[Row], places: Sequence[int]) -> list[Order]:
        """The sort key of each row: time, then key, then the timestamp's text."""
        rank = self.times.rank
        return [(*rank(row[0]), *[row[place] for place in places], row[0]) for row in rows]

    def places(self, columns: Sequence[str]) -> Sequence[int]:
        """The positions of the key's columns; key attributes that no row has are left out."""
        return [columns.index(name) for name in self.key if name in columns]


@dataclass(frozen=True, slots=True)
class HourFile:
    """The finished file, both `Batch` and `Encoded`. `digest` is the MD5 of its bytes, which Drive reports too.

    `compared`: how many of the table's rows are new, already there or corrected compared with held rows; `repeated`
    counts those that were added more than once. `window` is the hour, if known; `elsewhere` has timestamps of items
    that look as if they were of this hour but are not.
    """

    shape: FileShape
    file: BinaryIO
    rows: int
    digest: str
    size_bytes: int
    min_at: datetime | None
    max_at: datetime | None
    compared: Tally
    repeated: int = 0
    window: Window | None = None
    elsewhere: frozenset[str] = frozenset()
    reusable: bool = False
    accounts: Mapping[str, Tally] = field(default_factory=dict)
    sums: Mapping[str, Sums] = field(default_factory=dict)  # the file's digest is compared instead
    identities: None = None
    write: str = ""

    @property
    def new_rows(self) -> int:
        """See `Batch.new_rows`."""
        return self.compared.new

    @property
    def corrected_rows(self) -> int:
        """See `Batch.corrected_rows`."""
        return self.compared.corrected

    def holds_all(self, identities: object) -> bool:  # noqa: ARG002 - the port's word
        """See `Batch.holds_all`; False, since identities are not stored and the file itself is compared."""
        return False

    def close(self) -> None:
        """Discard the spooled bytes."""
        self.file.close()


def _covers(other: Row, row: Row, *, is_edited: bool) -> bool:
    """True if `other` has every cell of `row` that is not empty, whatever their timestamps. An editor may have written
    numbers in another form (`is_edited`); otherwise `010` and `10` may be two devices.
    """
    return all(
        not text or text == known or (is_edited and _are_equal_numbers(text, known))
        for text, known in zip(row[1:], other[1:], strict=True)
    )


def _are_equal_numbers(text: str, other: str) -> bool:
    with suppress(InvalidOperation):
        return Decimal(text) == Decimal(other)
    return False


@dataclass(frozen=True, slots=True)
class _Segment:
    """Sorted rows of one page, encoded as in the file, between two offsets of the spool. `held`: from an old file."""

    columns: Columns
    held: bool
    begin: int
    end: int
    rows: int
    first: Order
    last: Order


class HourWriter:
    """Takes pages, then makes the file. Must always be closed."""

    def __init__(self, shape: FileShape) -> None:
        self._shape = shape
        self._spool = temporary_file(memory_bytes=MEMORY_BYTES)
        self._segments: list[_Segment] = []
        self._columns: Columns = (shape.timestamp,)
        self._lacks_key = False  # some held row has no value of a key attribute: the table had another key
        self._repeated = self._table_rows = self._same = self._corrected = 0
        self.rewritten: list[str] = []  # timestamps of held rows that the table has in another format

    def close(self) -> None:
        """Discard the spool."""
        self._spool.close()

    def add(self, columns: Columns, rows: Sequence[Row], *, held: bool = False) -> None:
        """Add the rows of a page. `columns` are the timestamp, then sorted names, including those of earlier pages."""
        self._columns = columns
        if not rows:
            return
        places = self._shape.places(columns)
        if held and not self._lacks_key:
            needed = [
                columns.index(name) if name in columns else -1
                for name in self._shape.key
                if name != self._shape.left_out
            ]
            self._lacks_key = -1 in needed or not all(row[at] for row in rows for at in needed)
        rows, first, last = self._in_order(rows, places, held=held)
        begin = self._spool.seek(0, io.SEEK_END)
        _write(self._spool, rows, escape=self._shape.escape)
        self._segments.append(_Segment(columns, held, begin, self._spool.tell(), len(rows), first, last))

    def add_rows(self, rows: Iterable[Mapping[str, str]], *, held: bool = False) -> None:
        """Add rows as mappings. `held`: from the file that is replaced."""
        given, number = iter(rows), 1  # the first row shows how wide they are
        while some := list(islice(given, number)):
            names = set().union(*some) - {self._shape.timestamp}
            columns = (self._shape.timestamp, *sorted(names.union(self._columns[1:])))
            self.add(columns, [[row.get(name, "") for name in columns] for row in some], held=held)
            number = rows_at_once(columns, MERGE_ROWS)

    def _in_order(
        self, rows: Sequence[Row], places: Sequence[int], *, held: bool
    ) -> tuple[Sequence[Row], Order, Order]:
        """The sorted rows, the later one of equal keys (unless `held`), and the sort keys of the first and the last."""
        if ascend(list(map(itemgetter(0), rows))):
            first, last = self._shape.orders((rows[0], rows[-1]), places)
            return rows, first, last
        orders = self._shape.orders(rows, places)
        if held:
            found = sorted(zip(orders, rows, strict=True), key=itemgetter(0))
            return [row for _, row in found], found[0][0], found[-1][0]
        if any(later <= earlier for earlier, later in pairwise(orders)):
            both = dict(zip(orders, rows, strict=True))
            self._repeated += len(orders) - len(both)
            orders = sorted(both)
            rows = [both[order] for order in orders]
        return rows, orders[0], orders[-1]

    def finish(self, *, is_edited: bool = False, shrink: Shrink | None = None) -> HourFile:
        """The file of all pages so far. Without rows the file is empty, without even a header.

        `is_edited`: somebody else wrote the held rows' file, and may have changed how timestamps are written. `shrink`:
        see `Source.union`.
        """
        segments, columns, escape = self._segments, self._columns, self._shape.escape
        whole, rows = temporary_file(memory_bytes=MEMORY_BYTES), 0
        if not segments:
            return self._finished(whole, 0, ())
        _write(whole, [columns], escape=escape)
        if all(segment.columns == columns and not segment.held for segment in segments) and all(
            earlier.last[:-1] < later.first[:-1] for earlier, later in pairwise(segments)
        ):  # the segments in sequence already are the file
            self._spool.seek(0)
            copyfileobj(self._spool, whole, COPY_BYTES)
            ends = [segments[0].first, segments[-1].last]
            self._table_rows = sum(segment.rows for segment in segments)
            return self._finished(whole, self._table_rows, ends)
        merged, ends = self._merged(columns, is_edited=is_edited, shrink=shrink), []
        while batch := list(islice(merged, rows_at_once(columns, MERGE_ROWS))):
            rows += len(batch)
            ends = [*ends[:1], *(order for order, _ in batch)]
            _write(whole, [row for _, row in batch], escape=escape)
        return self._finished(whole, rows, ends)

    def _finished(self, file: BinaryIO, rows: int, orders: Sequence[Order]) -> HourFile:
        """Compute digest and size. `orders` begins with the first row's sort key and ends with the last row's."""
        digest, size_bytes = md5_of(file), file.tell()
        file.seek(0)
        min_at, max_at = (self._shape.times.read(orders[at][-1]).at if orders else None for at in (0, -1))
        new = self._table_rows - self._same - self._corrected
        compared = Tally(new=new, already_there=self._same, corrected=self._corrected)
        return HourFile(self._shape, file, rows, digest, size_bytes, min_at, max_at, compared, self._repeated)

    def _merged(self, columns: Columns, *, is_edited: bool, shrink: Shrink | None) -> Iterator[tuple[Order, Row]]:
        """All rows in order: the table's, of equal sort keys the one added last, and what only held rows say."""
        streams = [self._read(number, segment, columns) for number, segment in enumerate(self._segments)]
        # A held row is found by time and key. One without a key may be any row of its time, so these are few at most.
        same = 2 if self._lacks_key else -1
        for _, group in groupby(heapq.merge(*streams, key=lambda each: each[:2]), key=lambda each: each[0][:same]):
            table: dict[Order, Row] = {}
            held: dict[tuple[Order, tuple[str, ...]], None] = {}  # once each; their order is that of the files
            for order, number, row in group:
                if self._segments[number].held:
                    held[order, tuple(row)] = None
                else:
                    self._repeated += order in table
                    table[order] = row
            self._table_rows += len(table)
            kept = self._only_held(table, list(held), is_edited=is_edited, shrink=shrink) if held else ()
            yield from sorted((*kept, *table.items()), key=itemgetter(0)) if kept else table.items()

    def _only_held(
        self,
        table: Mapping[Order, Row],
        held: Sequence[tuple[Order, Row]],
        *,
        is_edited: bool,
        shrink: Shrink | None,
    ) -> Sequence[tuple[Order, Row]]:
        """The held rows of one time and key that the table's rows do not replace.

        A row of the table replaces the only held row of its sort key, whatever that says: it was corrected. Several
        held rows of one sort key were written when the table had another key. Of these, and of rows whose timestamp an
        editor wrote in another form, it replaces those that say nothing else.
        """
        of_order = Counter(order for order, _ in held)
        found: dict[Order, bool] = {}  # the table's rows that were there -> whether they are unchanged
        kept = []
        for order, row in held:
            if order in table and of_order[order] == 1:
                found[order] = found.get(order, False) or list(row) == table[order]
                continue
            at = next(
                (
                    at
                    for at, other in table.items()
                    if (is_edited or at[-1] == order[-1]) and _covers(other, row, is_edited=is_edited)
                ),
                None,
            )
            if at is not None:
                found[at] = True
                self.rewritten += [order[-1]] if at[-1] != order[-1] else []
                continue
            if shrink:
                shrink.note(1, [order[-1]])
            if not (shrink and shrink.removes):
                kept.append((order, row))
        self._same += sum(found.values())
        self._corrected += len(found) - sum(found.values())
        return kept

    def _read(self, number: int, segment: _Segment, columns: Columns) -> Iterator[tuple[Order, int, Row]]:
        source = [segment.columns.index(name) if name in segment.columns else -1 for name in columns]
        places = self._shape.places(columns)
        block_bytes = max(LEAST_BLOCK_BYTES, min(COPY_BYTES, MERGE_BYTES // len(self._segments)))
        for row in _rows(_lines(self._spool, segment.begin, segment.end, block_bytes)):
            plain = list(map(_plain, row)) if self._shape.escape else row
            wide = [plain[at] if at >= 0 else "" for at in source]
            yield self._shape.orders([wide], places)[0], number, wide


def md5_of(file: BinaryIO) -> str:
    """The digest of a whole stream, as Drive reports it."""
    digest = md5(usedforsecurity=False)
    file.seek(0)
    for block in iter(partial(file.read, COPY_BYTES), b""):
        digest.update(block)
    return digest.hexdigest()


def read_file(lines: Iterable[str], *, escaped: bool) -> Iterator[dict[str, str]]:
    """The rows of a file, by column. `lines` keep their line ends. For files that others may have edited, use within
    `readable`.
    """
    rows = _rows(lines)
    columns = next(rows, [])
    if columns:
        columns = [columns[0].removeprefix(BYTE_ORDER_MARK), *columns[1:]]
    if escaped:
        columns = [_plain(name) for name in columns]
    for row in rows:
        yield dict(zip(columns, map(_plain, row) if escaped else row, strict=False))


class UnreadableFile(Permanent):
    """A file that Headwater did not write, or that was damaged since."""


@contextmanager
def readable(name: str) -> Iterator[None]:
    """Translate parse errors of the block to UnreadableFile."""
    try:
        yield
    except (csv.Error, UnicodeDecodeError) as error:
        raise UnreadableFile(
            f"{name} is not a CSV file of ours: {str(error)[:TEXT_LIMIT]}",
            "restore an earlier revision of the file, move it away, or heal its window",
        ) from error


def lines_in(file: BinaryIO) -> Iterator[str]:
    """The text lines of a whole stream, with their line ends."""
    return _lines(file, 0, file.seek(0, io.SEEK_END))


def _plain(text: str) -> str:
    return text.removeprefix("'")


def _escaped(text: str) -> str:
    """Escape a cell that a spreadsheet would take for a formula; negative numbers are left as they are."""
    if not text.startswith(FORMULA):
        return text
    try:
        float(text)
    except ValueError:
        return f"'{text}"
    return text


def _write(file: BinaryIO, rows: Sequence[Row], *, escape: bool) -> None:
    """Write as csv.writer does; rows with nothing to quote are just joined, in a third of the time."""
    if escape:
        rows = [list(map(_escaped, row)) for row in rows]
    plain = LINE_END.join(map(",".join, rows))
    if (
        '"' not in plain
        and plain.count(",") == len(rows) * (len(rows[0]) - 1) > 0
        and plain.count("\n") == plain.count("\r") == len(rows) - 1
    ):
        file.write((plain + LINE_END).encode())
        return
    text = io.StringIO()
    csv.writer(text, lineterminator=LINE_END).writerows(rows)
    file.write(text.getvalue().encode())


def _rows(lines: Iterable[str]) -> Iterator[Row]:
    csv.field_size_limit(MAX_CELL_CHARACTERS)  # the default is smaller than a DynamoDB item
    return csv.reader(lines)


def _lines(file: BinaryIO, begin: int, end: int, block_bytes: int = COPY_BYTES) -> Iterator[str]:
    """The lines of a part of the spool; seeks before each read, since several readers share the file."""
    while begin < end:
        file.seek(begin)
        block = file.read(min(block_bytes, end - begin))
        cut = block.rfind(b"\n") + 1
        while not cut and begin + len(block) < end:
            if len(block) > MAX_LINE_BYTES:  # many times an item's limit; the line may be as long as the file
                raise csv.Error("a line is too long")
            block += file.read(min(block_bytes, end - begin - len(block)))
            cut = block.rfind(b"\n") + 1
        cut = cut or len(block)  # a last line without a line end
        begin += cut
        yield from io.StringIO(block[:cut].decode(), newline="")
