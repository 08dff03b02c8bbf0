"""The CSV file of one hour, and the ledger of the items read for it."""

import csv
import heapq
import io
import logging
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from decimal import Decimal, InvalidOperation
from hashlib import blake2b, md5
from itertools import groupby, islice, pairwise
from operator import itemgetter
from shutil import copyfileobj
from typing import Any, BinaryIO

from app.core.errors import Permanent
from app.core.files import temporary_file
from app.core.ledger import Ledger, SetAside, Tally, ledger_of, sampled
from app.core.pipeline import Sums
from app.core.windows import Window
from app.dynamo_to_drive.rows import Columns, Item, Row, cell, text_of, timestamp_text
from app.dynamo_to_drive.timestamps import NO_ATTRIBUTE, TimestampReader, ascend
from app.object_store.set_aside import MAX_BYTES, NDJSON, SetAsideStore

# The CSV file of one hour: takes pages of rows in any order, with any columns, and makes one file with a digest.
#
# Invariants: the same rows give the same bytes, however they are paged; memory holds one page, or the merge of the
# pages, never the whole hour. Pages are spooled as sorted segments. If these follow each other with the same columns,
# as in a query by sort key, the file is a header plus these segments, without a merge.

LINE_END = "\r\n"  # RFC 4180; also, csv.writer quotes a lone carriage return only with this line end
MEMORY_BYTES = 1 << 20
COPY_BYTES = 1 << 18
MERGE_ROWS = 1000
MAX_CELL_CHARACTERS = 1 << 24
BYTE_ORDER_MARK = "\ufeff"  # spreadsheets write one before the first name
TEXT_LIMIT = 200
FORMULA = ("=", "+", "-", "@", "\t", "\r", "'")

Order = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class FileShape:
    """The format of this table's files. `key` are the attributes that, with the timestamp, identify a row.

    `times` parses timestamps; `escape` escapes cells against spreadsheet formulas.
    """

    timestamp: str
    key: tuple[str, ...]
    times: TimestampReader
    escape: bool = False

    def orders(self, rows: Sequence[Row], places: Sequence[int]) -> list[Order]:
        """The sort key of each row: time, then key, then the timestamp's text."""
        rank = self.times.rank
        return [(*rank(row[0]), *[row[place] for place in places], row[0]) for row in rows]

    def places(self, columns: Sequence[str]) -> Sequence[int]:
        """The positions of the key's columns; key attributes that no row has are left out."""
        return [columns.index(name) for name in self.key if name in columns]

    def order_of(self, row: Mapping[str, str]) -> Order:
        """The sort key of a row of a file."""
        text = row.get(self.timestamp, "")
        return (*self.times.rank(text), *[row.get(name, "") for name in self.key], text)


@dataclass(frozen=True, slots=True)
class HourFile:
    """The finished file, both `Batch` and `Encoded`. `digest` is the MD5 of its bytes, which Drive reports too.

    `repeated` counts rows that were added more than once. `window` is the hour, if known; `elsewhere` has timestamps of
    items that look as if they were of this hour but are not.
    """

    shape: FileShape
    file: BinaryIO
    rows: int
    digest: str
    size_bytes: int
    min_at: datetime | None
    max_at: datetime | None
    repeated: int = 0
    window: Window | None = None
    elsewhere: frozenset[str] = frozenset()
    reusable: bool = False
    accounts: Mapping[str, Tally] = field(default_factory=dict)
    identities: None = None
    corrected_rows: int = 0
    write: str = ""

    @property
    def sums(self) -> Mapping[str, Sums]:
        """See `Batch.sums`; empty, since the file's digest is compared instead."""
        return {}

    @property
    def new_rows(self) -> int:
        """See `Batch.new_rows`; this pipeline's ledger is in `Accounts`."""
        return self.rows

    def holds_all(self, identities: object) -> bool:  # noqa: ARG002 - the port's word
        """See `Batch.holds_all`; False, since identities are not stored and the file itself is compared."""
        return False

    def close(self) -> None:
        """Discard the spooled bytes."""
        self.file.close()

    def landed_over(self, held: Iterable[Mapping[str, str]]) -> Tally:
        """Count this file's rows as new, unchanged or corrected compared to the rows of the file it replaces.

        Both must be sorted; rows of a file that a person reordered count as new.
        """
        before, new, same, corrected = iter(held), 0, 0, 0
        old = next(before, None)
        for row in read_file(lines_in(self.file), escaped=self.shape.escape):
            order = self.shape.order_of(row) if old is not None and row != old else None
            while order and old is not None and self.shape.order_of(old) < order:
                old = next(before, None)
            if old is None or (order and self.shape.order_of(old) != order):
                new += 1
                continue
            if not order or _filled(row) == _filled(old):
                same += 1
            else:
                corrected += 1
            old = next(before, None)
        return Tally(new=new, already_there=same, corrected=corrected)


def _filled(row: Mapping[str, str]) -> Mapping[str, str]:
    """The row without empty cells, so that a new column does not change earlier rows."""
    return {name: text for name, text in row.items() if text}


def _is_rewritten(row: Row, other: Row) -> bool:
    """True if the rows differ only in the format of the timestamp and numbers, as after saving in a spreadsheet."""
    return all(map(_is_alike, row[1:], other[1:]))


def _is_alike(text: str, other: str) -> bool:
    with suppress(InvalidOperation):
        return text == other or Decimal(text) == Decimal(other)
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
        self._repeated = 0
        self.rewritten: list[str] = []  # timestamps of held rows that the table has in another format

    def close(self) -> None:
        """Discard the spool."""
        self._spool.close()

    def add(self, columns: Columns, rows: Sequence[Row], *, held: bool = False) -> None:
        """Add the rows of a page. `columns` are the timestamp, then sorted names, including those of earlier pages."""
        self._columns = columns
        if not rows:
            return
        rows, first, last = self._in_order(rows, self._shape.places(columns), held=held)
        begin = self._spool.seek(0, io.SEEK_END)
        _write(self._spool, rows, escape=self._shape.escape)
        self._segments.append(_Segment(columns, held, begin, self._spool.tell(), len(rows), first, last))

    def add_rows(self, rows: Iterable[Mapping[str, str]], *, held: bool = False) -> None:
        """Add rows as mappings. `held`: from the file that is replaced. Held rows are never merged with each other,
        even with equal keys, since the table may have had another key when they were written.
        """
        given = iter(rows)
        while some := list(islice(given, MERGE_ROWS)):
            names = set().union(*some) - {self._shape.timestamp}
            columns = (self._shape.timestamp, *sorted(names.union(self._columns[1:])))
            self.add(columns, [[row.get(name, "") for name in columns] for row in some], held=held)

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

    def finish(self) -> HourFile:
        """The file of all pages so far. Without rows the file is empty, without even a header."""
        segments, columns, escape = self._segments, self._columns, self._shape.escape
        whole, rows = temporary_file(memory_bytes=MEMORY_BYTES), 0
        if not segments:
            return self._finished(whole, 0, ())
        _write(whole, [columns], escape=escape)
        if all(segment.columns == columns for segment in segments) and all(
            earlier.last[:-1] < later.first[:-1] for earlier, later in pairwise(segments)
        ):  # the segments in sequence already are the file
            self._spool.seek(0)
            copyfileobj(self._spool, whole, COPY_BYTES)
            ends = [segments[0].first, segments[-1].last]
            return self._finished(whole, sum(segment.rows for segment in segments), ends)
        merged, ends = self._merged(columns), []
        while batch := list(islice(merged, MERGE_ROWS)):
            rows += len(batch)
            ends = [*ends[:1], *(order for order, _ in batch)]
            _write(whole, [row for _, row in batch], escape=escape)
        return self._finished(whole, rows, ends)

    def _finished(self, file: BinaryIO, rows: int, orders: Sequence[Order]) -> HourFile:
        """Compute digest and size. `orders` begins with the first row's sort key and ends with the last row's."""
        digest = md5(usedforsecurity=False)
        file.seek(0)
        while block := file.read(COPY_BYTES):
            digest.update(block)
        size_bytes = file.tell()
        file.seek(0)
        min_at, max_at = (self._shape.times.read(orders[at][-1]).at if orders else None for at in (0, -1))
        return HourFile(
            self._shape, file, rows, digest.hexdigest(), size_bytes, min_at, max_at, repeated=self._repeated
        )

    def _merged(self, columns: Columns) -> Iterator[tuple[Order, Row]]:
        """All rows in order. Of rows with the same key the last added one wins, but several held rows are all kept."""
        streams = [self._read(number, segment, columns) for number, segment in enumerate(self._segments)]
        for _, near in groupby(heapq.merge(*streams, key=lambda each: each[:2]), key=lambda each: each[0][:-1]):
            found: list[tuple[Order, bool, Row]] = []  # of one time and key
            for order, group in groupby(near, key=itemgetter(0)):
                rows = [(self._segments[number].held, row) for _, number, row in group]
                kept = [row for place, (is_held, row) in enumerate(rows) if is_held and (True, row) not in rows[:place]]
                new = [row for is_held, row in rows if not is_held][-1:]
                if len(kept) > 1:
                    new = [*kept, *(row for row in new if row not in kept)]
                chosen = new or kept
                self._repeated += len(rows) - len(chosen)
                found += [(order, not new, row) for row in chosen]
            tables = [row for _, is_held, row in found if not is_held]
            for order, is_held, row in found:
                if is_held and any(_is_rewritten(row, other) for other in tables):
                    self.rewritten.append(order[-1])
                else:
                    yield order, row

    def _read(self, number: int, segment: _Segment, columns: Columns) -> Iterator[tuple[Order, int, Row]]:
        source = [segment.columns.index(name) if name in segment.columns else -1 for name in columns]
        places = self._shape.places(columns)
        for row in _rows(_lines(self._spool, segment.begin, segment.end)):
            plain = list(map(_plain, row)) if self._shape.escape else row
            wide = [plain[at] if at >= 0 else "" for at in source]
            yield self._shape.orders([wide], places)[0], number, wide


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


def readable_prefix(rows: Iterable[Mapping[str, str]]) -> Iterator[Mapping[str, str]]:
    """The rows up to the first unreadable one, for comparison with a file that is replaced anyway."""
    with suppress(UnreadableFile):
        yield from rows


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


def _lines(file: BinaryIO, begin: int, end: int) -> Iterator[str]:
    """The lines of a part of the spool; seeks before each read, since several readers share the file."""
    while begin < end:
        file.seek(begin)
        block = file.read(min(COPY_BYTES, end - begin))
        cut = block.rfind(b"\n") + 1
        while not cut and begin + len(block) < end:
            block += file.read(min(COPY_BYTES, end - begin - len(block)))
            cut = block.rfind(b"\n") + 1
        cut = cut or len(block)  # a last line without a line end
        begin += cut
        yield from io.StringIO(block[:cut].decode(), newline="")


# The ledger of one run: accounts for each item read for an hour, and for each item without an hour.
#
# Invariant: items are counted where pages are read, and outcomes where the sink reports what it has or writes, so an
# item lost in between shows up as a gap. Items of other hours belong to those hours' ledgers.

UNIT = "items"
NAMED_ATTRIBUTES = 20
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Hour:
    """The counts of one hour: `counted` items in the table, `read` items (some of them twice), `held` rows in the sink,
    `only_held` those of them that the table no longer returns, `waiting` rows that a dry run would write.
    """

    counted: int = 0
    read: int = 0
    only_held: int = 0
    held: int = 0
    landed: Tally | None = None
    waiting: int | None = None

    def tally(self, *, is_whole: bool) -> Tally:
        """`is_whole`: no hour failed. Otherwise items of an hour that was not written wait for the next run."""
        landed = self.landed or Tally(already_there=self.held)
        if self.waiting is not None:
            return Tally(self.counted, self.read, waiting=self.waiting - self.only_held)
        # Rows of a reordered file were counted as new.
        there, ahead = max(landed.already_there - self.only_held, 0), max(self.only_held - landed.already_there, 0)
        if self.landed is None and not is_whole:
            there = min(there, self.counted)
            return Tally(self.counted, self.read, already_there=there, waiting=self.counted - there)
        return Tally(self.counted, self.read, landed.new - ahead, there, landed.corrected)


@dataclass(slots=True)
class _Reason:
    """Items set aside for one reason: all are counted, but only the text of the first ones is kept."""

    sample: str
    number: int = 0
    size_bytes: int = 0
    lines: list[bytes] = field(default_factory=list)


class Accounts:
    """The accounts of one run. Thread-safe.

    `attributes` and `text` are attribute names and one timestamp of items without an hour. `ahead` is the furthest
    timestamp more than a day ahead of `now`, `empty` the partition values without items; "" for none. `removed` has
    notes on file rows that were left out or removed by a person.
    """

    def __init__(self, attribute: str, now: datetime | None = None) -> None:
        self.attribute = attribute
        self._ahead_at = now + timedelta(days=1) if now else None
        self.ahead = ""
        self.empty = ""
        self.removed: list[str] = []
        self.attributes: set[str] = set()
        self.text = ""
        self._hours: dict[Window, _Hour] = {}
        self._reasons: dict[str, _Reason] = {}
        self._known: set[bytes] = set()
        self._lock = threading.Lock()

    def placed(self, at: datetime, text: str) -> None:
        """Check a timestamp that was read. One far ahead of now may be in another unit or format, and would silently
        wait for its hour.
        """
        if self._ahead_at is not None and at > self._ahead_at:
            with self._lock:
                self._ahead_at, self.ahead = at, text

    def note(self, hour: Window, **told: Any) -> None:
        """Set counts of an hour, by the field names of `_Hour`; replaces earlier values."""
        with self._lock:
            self._hours[hour] = replace(self._hours.get(hour, _Hour()), **told)

    def unplaced(self, item: Item, reason: str) -> None:
        """Set aside an item without an hour: it lacks the attribute, or its timestamp is unusable for `reason`. Repeats
        within a run count once.
        """
        reason = reason if self.attribute in item else NO_ATTRIBUTE
        line = text_of(item) + b"\n"
        known = blake2b(line, digest_size=16).digest()
        value = item.get(self.attribute)
        with self._lock:
            if known in self._known:
                return
            self._known.add(known)
            if len(self.attributes) < NAMED_ATTRIBUTES:
                self.attributes |= item.keys()
            self.text = self.text or timestamp_text(item, self.attribute) or ""
            if reason not in self._reasons:
                shown = f"{self.attribute} = {cell(value)!r}" if value else f"attributes {', '.join(sorted(item))}"
                self._reasons[reason] = _Reason(sampled(shown))
            told = self._reasons[reason]
            told.number += 1
            if told.size_bytes < MAX_BYTES:
                told.lines.append(line)
                told.size_bytes += len(line)
        log.debug("an item is set aside: %s, %d characters, %d attributes", reason, len(cell(value)), len(item))

    @property
    def set_aside(self) -> int:
        """The number of items without an hour."""
        return len(self._known)

    @property
    def sample(self) -> str:
        """An example of an unreadable timestamp, else of an item without one."""
        found = sorted(self._reasons.items(), key=lambda each: each[0] == NO_ATTRIBUTE)
        return found[0][1].sample if found else ""

    @property
    def all_lack_the_attribute(self) -> bool:
        """True if every item set aside lacks the timestamp attribute."""
        return set(self._reasons) == {NO_ATTRIBUTE}

    def closed(self, partition: str, store: SetAsideStore | None, *, is_whole: bool = True) -> Ledger:
        """Store the items set aside in `store` (None: do not store them) and return the ledger.

        See `_Hour.tally` for `is_whole`.
        """
        entries = [self._entry(reason, partition, store) for reason in sorted(self._reasons)]
        total = sum(
            (hour.tally(is_whole=is_whole) for hour in self._hours.values()), Tally(self.set_aside, self.set_aside)
        )
        return ledger_of(total, *entries, unit=UNIT).of_partition(partition)

    def _entry(self, reason: str, partition: str, store: SetAsideStore | None) -> SetAside:
        told = self._reasons[reason]
        if store is None:
            return SetAside(reason, told.number, 0, told.sample)
        kept = store.keep(
            partition,
            b"".join(sorted(told.lines)),  # threads add them in any order; the same items must give the same bytes
            content_type=NDJSON,
            reason=reason,
            number=told.number,
            sample=told.sample,
        )
        if kept.new:
            log.warning(
                "%s: %d items set aside: %s, for example %s; kept in %s",
                *(partition, kept.new, reason, told.sample, kept.key or "no object"),
            )
        return kept.entry

    def notes(self) -> Iterator[str]:
        """Notes on timestamps far ahead of now, on rows removed from files, and on partition values without items."""
        if self.ahead:
            found = f"{self.attribute} {self.ahead} lies ahead of now: such an item is exported when its hour has come"
            yield f"{found}; if that date is wrong, set DYNAMODB_TIMESTAMP_UNIT or DYNAMODB_TIMESTAMP_ATTRIBUTE"
        yield from self.removed
        if self.empty:
            yield f"no item has {self.empty}: check DYNAMODB_PARTITION_VALUES"
