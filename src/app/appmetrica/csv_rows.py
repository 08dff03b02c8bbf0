"""Rows of a CSV file of AppMetrica, by the names of its header; rows that cannot be read come with their bytes.

Invariants: every row of the file comes once, good or bad; a bad row never takes a good one with it, also when a quote
too many makes it swallow what follows; the bytes of a bad row are those of the file; memory is bounded by
KEPT_ROW_BYTES. A record ends with the first line end up to which its quotes are even in number.
"""

import csv
import gzip
import io
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO, cast

from app.core.errors import Permanent

MAX_ROW_BYTES = 1 << 24
KEPT_ROW_BYTES = 2 * MAX_ROW_BYTES
BUFFER_BYTES = 1 << 18
BOM = b"\xef\xbb\xbf"

NOT_TEXT = "invalid UTF-8"
NOT_A_ROW = "not a row of the file"
LARGE_ROW = "row above 16 MiB"

Row = Sequence[str]


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be read, for one of few reasons. `cells` are what can be told of it, by the file's own columns,
    or nothing. `detail` says what is wrong, without values.
    """

    reason: str
    raw: bytes
    detail: str
    cells: Row = ()


class CsvRows:
    """The rows of one gzip file. `header` is empty for a file without one; `raw` and `number` are of the row that came
    last. Use it once.
    """

    def __init__(self, file: BinaryIO) -> None:
        csv.field_size_limit(KEPT_ROW_BYTES)  # the default is below one stack trace of a crash
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
                "check APPMETRICA_BASE_URL: the service does not answer what was asked",
            ) from error

    def __iter__(self) -> Iterator[Row | BadRow]:
        while line := self._line():
            if line.strip():
                self.number += 1
                yield self._row(line)

    def _row(self, line: bytes) -> Row | BadRow:
        """The record that begins with `line`. Where it is none, the line alone is bad; what follows is read anew."""
        lines, size_bytes, is_open = [line], len(line), line.count(b'"') % 2 == 1
        while is_open and size_bytes < KEPT_ROW_BYTES and (more := self._line()):
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
        unreadable = LARGE_ROW if len(raw) > MAX_ROW_BYTES else NOT_A_ROW
        try:
            row = _cells(raw.decode())
        except UnicodeDecodeError as error:
            detail = f"row {self.number}: invalid UTF-8 byte 0x{raw[error.start]:02X} at byte {error.start + 1}"
            return BadRow(NOT_TEXT, raw, detail, self._told(raw))
        except csv.Error as error:
            return BadRow(unreadable, raw, f"row {self.number}: {error}")
        if len(row) != len(self.header):
            return BadRow(unreadable, raw, f"row {self.number}: {len(row)} of {len(self.header)} cells")
        if len(raw) > MAX_ROW_BYTES:
            return BadRow(LARGE_ROW, raw, f"row {self.number}: {len(raw)} bytes", row)
        return row

    def _told(self, raw: bytes) -> Row:
        """The cells of a row that is not text, as far as they are; nothing when it is no row either."""
        try:
            row = _cells(raw.decode("utf-8", "replace"))
        except csv.Error:
            return ()
        return row if len(row) == len(self.header) else ()

    def _line(self) -> bytes:
        """The next line; of one above KEPT_ROW_BYTES the beginning. b"" at the end."""
        if self._back:
            return self._back.popleft()
        line = self._stream.readline(KEPT_ROW_BYTES)
        rest = line
        while len(rest) >= KEPT_ROW_BYTES and not rest.endswith(b"\n"):
            rest = self._stream.readline(KEPT_ROW_BYTES)
        return line


def _cells(text: str) -> Row:
    return next(csv.reader((text,), strict=True))
