"""Rows of an AppMetrica file: reads CSV, splits it by hour of receipt, and gives events as columns to the mapping.

Invariants: every row of the file is yielded once, good or bad, and either is in exactly one hour, by the second of its
receipt, or is refused with its bytes as in the file. A bad row never costs a good one, even when a stray quote makes it
swallow what follows. A record ends at the first line end where the number of quotes is even. Columns are found by name.
The same rows of an hour give the same uuids in any order. Memory is bounded by KEPT_LINE_BYTES: per-row state is on
disk.
"""

import csv
import gzip
import hashlib
import io
import sqlite3
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, cast
from uuid import NAMESPACE_URL, uuid5

from app.core.errors import Permanent, Rejected, Transient
from app.core.files import temporary_file
from app.core.verify import WindowContent
from app.core.windows import HOUR_SECONDS, Window, floor_to, windows_between
from app.product_events.hours import KEPT_LINE_BYTES, MAX_LINE_BYTES, REFUSED, PulledHour, RefusedLines
from app.product_events.mapping import Tables, mapping

BUFFER_BYTES = 1 << 18
BOM = b"\xef\xbb\xbf"

NOT_TEXT = "invalid UTF-8"
NOT_A_ROW = "not a row of the file"
LARGE_ROW = "row above 16 MiB"

Row = Sequence[str]


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be read, with one of a few reasons. `cells` are the values that can be recovered, by the file's
    own columns, or empty. `detail` says what is wrong, without values.
    """

    reason: str
    raw: bytes
    detail: str
    cells: Row = ()


class CsvRows:
    """The rows of one gzip file. `header` is empty for a file without one; `raw` and `number` belong to the last row
    yielded. Use it once.
    """

    def __init__(self, file: BinaryIO) -> None:
        csv.field_size_limit(KEPT_LINE_BYTES)  # the default is too small for one crash stack trace
        file.seek(0)
        packed = cast("io.RawIOBase", gzip.open(file, "rb"))  # noqa: SIM115 - it holds nothing but `file`
        self._stream = io.BufferedReader(packed, BUFFER_BYTES)  # finds lines in compiled code
        self._back = deque[bytes]()
        self.number, self.raw = 0, b""
        first = self._line()
        try:
            self.header: Row = _cells(first.removeprefix(BOM).decode()) if first.strip() else ()
        except (UnicodeDecodeError, csv.Error) as error:
            raise Permanent(
                f"the header of AppMetrica's file cannot be read: {error}",
                "check APPMETRICA_BASE_URL: the response does not match the request",
            ) from error

    def __iter__(self) -> Iterator[Row | BadRow]:
        while line := self._line():
            if line.strip():
                self.number += 1
                yield self._row(line)

    def _row(self, line: bytes) -> Row | BadRow:
        """The record that starts with `line`. If it cannot be read, only this line is bad, and the rest is re-read."""
        lines, size_bytes, is_open = [line], len(line), line.count(b'"') % 2 == 1
        while is_open and size_bytes < KEPT_LINE_BYTES and (more := self._line()):
            lines.append(more)
            size_bytes += len(more)
            is_open ^= more.count(b'"') % 2 == 1
        found = self._read(b"".join(lines))
        if len(lines) > 1 and isinstance(found, BadRow) and not found.cells:
            self._back.extendleft(reversed(lines[1:]))
            return self._read(line)
        return found

    def _read(self, raw: bytes) -> Row | BadRow:
        self.raw = raw
        unreadable = LARGE_ROW if len(raw) > MAX_LINE_BYTES else NOT_A_ROW
        try:
            row = _cells(raw.decode())
        except UnicodeDecodeError as error:
            detail = f"row {self.number}: invalid UTF-8 byte 0x{raw[error.start]:02X} at byte {error.start + 1}"
            return BadRow(NOT_TEXT, raw, detail, self._told(raw))
        except csv.Error as error:
            return BadRow(unreadable, raw, f"row {self.number}: {error}")
        if len(row) != len(self.header):
            return BadRow(unreadable, raw, f"row {self.number}: {len(row)} of {len(self.header)} cells")
        if len(raw) > MAX_LINE_BYTES:
            return BadRow(LARGE_ROW, raw, f"row {self.number}: {len(raw)} bytes", row)
        return row

    def _told(self, raw: bytes) -> Row:
        """The cells of a row with invalid UTF-8, as far as they can be decoded; empty when it is not a row either."""
        try:
            row = _cells(raw.decode("utf-8", "replace"))
        except csv.Error:
            return ()
        return row if len(row) == len(self.header) else ()

    def _line(self) -> bytes:
        """The next line, truncated to KEPT_LINE_BYTES. b"" at the end."""
        if self._back:
            return self._back.popleft()
        line = self._stream.readline(KEPT_LINE_BYTES)
        rest = line
        while len(rest) >= KEPT_LINE_BYTES and not rest.endswith(b"\n"):
            rest = self._stream.readline(KEPT_LINE_BYTES)
        return line


def _cells(text: str) -> Row:
    return next(csv.reader((text,), strict=True))


SERVICE, EVENTS = "appmetrica", "events"
BESIDE = timedelta(hours=2)
CHUNK_ROWS = 2000
LEVEL = 1
IDENTITY = (
    "application_id",
    "appmetrica_device_id",
    "installation_id",
    "session_id",
    "event_timestamp",
    "event_name",
)
JSON_COLUMN = "event_json"
NEEDED = frozenset({*IDENTITY, JSON_COLUMN})
MODULUS = 1 << 128
NO_RECEIPT = "no time of receipt"
ANOTHER_TIME = "received at another time"


def place_of(partition: str, hour_at: datetime | None) -> tuple[str, ...]:
    """Where an hour is kept, in parts; None = the rows that have no hour."""
    application_id, _, resource = partition.partition(":")
    if hour_at is None:
        return resource, f"{application_id}_of_no_hour"
    return resource, f"date={hour_at:%Y-%m-%d}", f"{application_id}_{hour_at:%H%M%S}"


class ReceiptHourFile(PulledHour):
    """The rows that were received in one hour, as a gzip file of CSV.

    `refused`: number of invalid rows of the hour, which are not in the file and are refused by `SortedRows`.
    `stands_for`: the digest of the object that must not be replaced by these rows, since they lack columns.
    """

    file: BinaryIO

    def __init__(self, partition: str, window: Window, columns: Sequence[str], file: BinaryIO, spool: Path) -> None:
        super().__init__(window, file, spool)
        self.body = None  # until it has a row
        self.columns, self.stands_for = columns, ""
        self._partition, self.is_loaded = partition, partition.endswith(f":{EVENTS}")
        self._sum = 0
        self._text: io.TextIOWrapper | None = None
        self._writer: Any = None

    @property
    def counted(self) -> int:
        """See `PulledHour.counted`."""
        return self.rows

    @property
    def digest(self) -> str:
        """See `PulledHour.digest`."""
        columns = ",".join(self.columns)
        return self.stands_for or hashlib.sha256(f"{columns}:{self.rows}:{self._sum}".encode()).hexdigest()

    def add(self, row: Row) -> None:
        """Append a row."""
        if self._text is None:
            self.body = self.file
            packed = gzip.GzipFile("", "wb", LEVEL, self.file, mtime=0)
            self._text = io.TextIOWrapper(packed, encoding="utf-8", newline="")
            self._writer = csv.writer(self._text, lineterminator="\n")
            self._writer.writerow(self.columns)
        self._writer.writerow(row)
        self.rows += 1
        number = int.from_bytes(hashlib.sha256("\x1f".join(row).encode()).digest()[:16])
        self._sum = (self._sum + number) % MODULUS

    def close_text(self) -> None:
        """Finish writing; no rows may be added afterwards."""
        if self._text is not None:
            self._text.close()

    def read(self) -> Iterator[Row]:
        """Its rows, without the header."""
        if self.body is None:
            return
        csv.field_size_limit(KEPT_LINE_BYTES)
        self.file.seek(0)
        with gzip.open(self.file, "rt", encoding="utf-8", newline="") as text:
            yield from islice(csv.reader(text), 1, None)

    def tables(self) -> Iterator[Tables]:
        """See `PulledHour.tables`."""
        with closing(_Ordinals()) as ordinals:
            rows = self.read()
            while chunk := list(islice(rows, CHUNK_ROWS)):
                yield self._tables(chunk, ordinals)

    def load_each(self, load: Callable[[Tables], None]) -> None:
        """See `PulledHour.load_each`."""
        place = place_of(self._partition, self.window.start)
        with closing(_Ordinals()) as ordinals:
            for row in self.read():
                try:
                    load(self._tables([row], ordinals))
                except Rejected as error:
                    text = io.StringIO()
                    csv.writer(text, lineterminator="\n").writerow(row)
                    what = f"{self._partition} {self.window} {error.message}"
                    self.refused_lines.add(place, REFUSED, text.getvalue().encode(), what)

    def content(self) -> WindowContent:
        """See `PulledHour.content`."""
        from app.object_store.row_digest import content_of  # imports numpy and pyarrow, which a pull does not need

        return content_of(dict(zip(self.columns, row, strict=True)) for row in self.read())

    def _tables(self, rows: Sequence[Row], ordinals: "_Ordinals") -> Tables:
        """Rows by table: an empty cell is None, a missing column all None. Uuids are made of the columns that identify
        events, since the service gives no id; equal events get different ordinals.
        """
        what, given = mapping(SERVICE), dict(zip(self.columns, zip(*rows, strict=True), strict=True))
        nothing = ("",) * len(rows)
        columns: dict[str, Sequence[str | None]] = {
            name: [cell or None for cell in given.get(name, nothing)] for name in {*what.words, *NEEDED}
        }
        columns["application_id"] = [self._partition.partition(":")[0]] * len(rows)
        columns["uuid"] = uuids = []
        for event, *identity in zip(*(columns[name] for name in (JSON_COLUMN, *IDENTITY)), strict=True):
            digest = hashlib.sha256((event or "").encode()).hexdigest()
            name = "\x1f".join([*(cell or "" for cell in identity), digest])
            uuids.append(str(uuid5(NAMESPACE_URL, f"{name}\x1f{ordinals.next(name)}")))
        return what.tables(columns, len(rows))


def read_hour(partition: str, window: Window, file: BinaryIO, spool: Path) -> ReceiptHourFile:
    """The hour in the file of its object; its rows are not counted. Raises ValueError when the header is missing."""
    csv.field_size_limit(KEPT_LINE_BYTES)
    with gzip.open(file, "rt", encoding="utf-8", newline="") as text:
        header = next(csv.reader(text), None)
    if not header:
        raise ValueError("it has no header")
    hour = ReceiptHourFile(partition, window, header, file, spool)
    hour.body = file
    return hour


class SortedRows:
    """The rows of all parts of a file, sorted into one file per hour of receipt in the span; rows that cannot be read
    or belong to no hour go to `refused_lines`. Close it after use.

    `left_out`: rows of hours just outside the span, which the service includes because two hours have the same local
    time when clocks go back; `lacking`: requested columns that are missing. Raises Permanent when a part lacks a column
    that is needed.
    """

    def __init__(
        self,
        files: Sequence[BinaryIO],
        columns: Sequence[str],
        received: str,
        span: Window,
        spool: Path,
        *,
        partition: str,
    ) -> None:
        self.left_out, self.lacking = 0, set[str]()
        self.refused_lines = RefusedLines(spool)
        self._partition, self._received, self._span = partition, received, span
        headers = [CsvRows(file).header for file in files]
        self._names = [*columns, *dict.fromkeys(name for each in headers for name in each if name not in columns)]
        self.hours = [
            ReceiptHourFile(partition, window, self._names, temporary_file(spool), spool)
            for window in windows_between(span.start, span.end, HOUR_SECONDS)
        ]
        needed = {received, *(NEEDED if self.hours[0].is_loaded else ())}
        with ExitStack() as undo:
            undo.callback(self.close)
            for file, header in zip(files, headers, strict=True):
                self.lacking |= set(columns) - set(header) if header else set()
                check_columns(header, needed)
                self._sort(CsvRows(file))
            undo.pop_all()
        for hour in self.hours:
            hour.close_text()

    def close(self) -> None:
        """Free all files. Idempotent."""
        self.refused_lines.close()
        for hour in self.hours:
            hour.close()

    def _sort(self, part: CsvRows) -> None:
        """Write each row of a part to the file of its hour, or refuse it."""
        as_given = list(part.header) == self._names
        known = {name: at for at, name in reversed(list(enumerate(part.header)))}
        places = [known.get(name) for name in self._names]
        received, span = self._received, self._span
        hours = {hour.window.start: hour for hour in self.hours}
        for found in part:
            cells = found.cells if isinstance(found, BadRow) else found
            at = hour_of(cells[known[received]]) if cells else None
            if at is not None and at not in hours and span.start - BESIDE <= at < span.end + BESIDE:
                self.left_out += 1
            elif not isinstance(found, BadRow) and at is not None and at in hours:
                hours[at].add(found if as_given else [found[place] if place is not None else "" for place in places])
            else:
                detail = f"row {part.number}: {received} is outside the requested hours"
                reason = NO_RECEIPT if at is None else ANOTHER_TIME
                bad = found if isinstance(found, BadRow) else BadRow(reason, part.raw, detail, cells)
                # A gap has to show somewhere: a row without an hour of the span counts in the last hour.
                gap = hours[at] if at is not None and at in hours else self.hours[-1]
                gap.refused += 1
                # File it under any hour that its timestamps give, so that the row is recognized when it comes again.
                named = zip(part.header, cells, strict=False)
                told = (hour_of(cell) for name, cell in named if name.endswith("_timestamp"))
                place = place_of(self._partition, at if at is not None else next(filter(None, told), None))
                self.refused_lines.add(place, bad.reason, bad.raw, f"{self._partition} {span} {bad.detail}")


def check_columns(header: Row, needed: Collection[str]) -> None:
    """Raise Permanent when a file with rows lacks a needed column."""
    lacking = sorted(set(needed) - set(header)) if header else []
    if lacking:
        raise Permanent(
            f"AppMetrica's file lacks {', '.join(lacking)}, without which its rows cannot be told apart",
            "check whether the service still has these columns; the pull continues once they are back",
        )


def hour_of(text: str) -> datetime | None:
    """The hour of a timestamp in seconds since 1970; None for an invalid one, and for 0, which means none."""
    try:
        seconds = int(text)
        return floor_to(datetime.fromtimestamp(seconds, UTC), HOUR_SECONDS) if seconds > 0 else None
    except (ValueError, OverflowError, OSError):
        return None


class _Ordinals:
    """Counts occurrences on disk: an hour may have millions of rows."""

    def __init__(self) -> None:
        self._database = sqlite3.connect("", isolation_level=None, check_same_thread=False)  # an unnamed temporary file
        self._database.execute("CREATE TABLE seen (id BLOB PRIMARY KEY, n INTEGER NOT NULL) WITHOUT ROWID")
        self._database.execute("BEGIN")

    def next(self, name: str) -> int:
        """0 for the first call with a name, then one more each time. Raises Transient when the disk is full."""
        identity = hashlib.sha256(name.encode()).digest()[:16]
        try:
            (found,) = self._database.execute(
                "INSERT INTO seen VALUES (?, 0) ON CONFLICT (id) DO UPDATE SET n = n + 1 RETURNING n", (identity,)
            ).fetchall()
        except sqlite3.OperationalError as error:
            said = f"rows that are equal cannot be counted: {error}"
            raise Transient(said, "free space in the system's temporary directory (TMPDIR)") from error
        return int(found[0])

    def close(self) -> None:
        self._database.close()


def merged(files: Sequence[BinaryIO]) -> Iterator[bytes]:
    """The parts of one file as one: each row copied byte for byte, on its own lines, under the first part's header.

    A header has no quotes, so it ends with its line.
    """
    last = b"\n"
    for number, file in enumerate(files):
        file.seek(0)
        with gzip.open(file, "rb") as stream:
            if number:
                stream.readline()
                if last != b"\n":
                    yield b"\n"
                    last = b"\n"
            while piece := stream.read(BUFFER_BYTES):
                yield piece
                last = piece[-1:]
