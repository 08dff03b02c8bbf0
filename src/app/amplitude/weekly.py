"""A zip with one NDJSON entry per ISO week, written front to back while its events still arrive.

Invariants: an entry is the joined gzip members of its hours in order, not compressed again; every event is on a line of
its own; the same members give the same bytes. Source: PKWARE's APPNOTE.TXT 6.3.10, sections 4.3 and 4.5.3 (zip64).
"""

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta
from typing import BinaryIO

from app.amplitude.deflate import Joined, joined

WEEK = timedelta(days=7)
ZIP64_VERSION = 45
SIZES_FOLLOW = 0x0808  # and names are UTF-8
DEFLATED = 8
FULL = 0xFFFFFFFF
LOCAL, FOLLOWING, CENTRAL = b"PK\x03\x04", b"PK\x07\x08", b"PK\x01\x02"
END64, LOCATE64, END = b"PK\x06\x06", b"PK\x06\x07", b"PK\x05\x06"
ZIP64_FIELD = 1
REGULAR_FILE = 0o100644 << 16


def monday(day: date) -> date:
    """The first day of the ISO week of `day`."""
    return day - timedelta(days=day.weekday())


def name_of(day: date) -> str:
    """`{year}_week_{week}`: ISO year and ISO week, which begin together; the week without a leading zero."""
    year, week, _ = day.isocalendar()
    return f"{year}_week_{week}"


@dataclass(frozen=True, slots=True)
class _Entry:
    name: bytes
    stamp: int
    crc: int
    packed_bytes: int
    size_bytes: int
    offset: int


@dataclass(slots=True)
class WeekZip:
    """Give it members week by week: `open`, `add` for each stream, then `finish`. What they yield is the file."""

    _entries: list[_Entry] = field(default_factory=list)
    _offset: int = 0
    _packed_bytes: int = 0
    _start: int = 0
    _day: date | None = None
    _joined: Joined = field(default_factory=joined)

    def open(self, day: date) -> Iterator[bytes]:
        """Begin the entry of the week of `day`; one that is open ends before."""
        if self._day is not None:
            yield from self._close()
        self._day, self._joined = monday(day), joined()
        self._start, self._packed_bytes = self._offset, 0
        name = _entry_name(self._day)
        sizes = struct.pack("<HHQQ", ZIP64_FIELD, 16, 0, 0)
        head = struct.pack(
            "<HHHIIIIHH", ZIP64_VERSION, SIZES_FOLLOW, DEFLATED, _stamp(self._day), 0, FULL, FULL, len(name), len(sizes)
        )
        yield self._put(LOCAL + head + name + sizes)

    def add(self, stream: BinaryIO) -> Iterator[bytes]:
        """Join a gzip stream of whole lines to the open entry."""
        for piece in self._joined.add(stream):
            if piece:
                yield self._put_packed(piece)
        if self._joined.last not in (b"", b"\n"):
            yield self._put_packed(self._joined.newline())

    def finish(self) -> Iterator[bytes]:
        """The end of the file."""
        if self._day is not None:
            yield from self._close()
        start = self._offset
        for entry in self._entries:
            yield self._put(_central(entry))
        yield self._put(_end(len(self._entries), start, self._offset - start))

    def _close(self) -> Iterator[bytes]:
        if self._day is None:
            return
        yield self._put_packed(self._joined.finish())
        crc, size_bytes = self._joined.crc, self._joined.size_bytes
        name, stamp = _entry_name(self._day), _stamp(self._day)
        self._entries.append(_Entry(name, stamp, crc, self._packed_bytes, size_bytes, self._start))
        yield self._put(FOLLOWING + struct.pack("<IQQ", crc, self._packed_bytes, size_bytes))
        self._day = None

    def _put(self, piece: bytes) -> bytes:
        self._offset += len(piece)
        return piece

    def _put_packed(self, piece: bytes) -> bytes:
        self._packed_bytes += len(piece)
        return self._put(piece)


def _entry_name(day: date) -> bytes:
    return f"{name_of(day)}.ndjson".encode()


def _stamp(day: date) -> int:
    """Midnight of `day` as MS-DOS tells it: the time in the low half, the date in the high one."""
    return ((day.year - 1980) << 9 | day.month << 5 | day.day) << 16


def _central(entry: _Entry) -> bytes:
    sizes = struct.pack("<HHQQQ", ZIP64_FIELD, 24, entry.size_bytes, entry.packed_bytes, entry.offset)
    made_by_unix = 3 << 8 | ZIP64_VERSION
    head = struct.pack(
        "<HHHHIIII", made_by_unix, ZIP64_VERSION, SIZES_FOLLOW, DEFLATED, entry.stamp, entry.crc, FULL, FULL
    )
    tail = struct.pack("<HHHHHII", len(entry.name), len(sizes), 0, 0, 0, REGULAR_FILE, FULL)
    return CENTRAL + head + tail + entry.name + sizes


def _end(entries: int, start: int, size_bytes: int) -> bytes:
    end64 = struct.pack("<QHHIIQQQQ", 44, ZIP64_VERSION, ZIP64_VERSION, 0, 0, entries, entries, size_bytes, start)
    locate = struct.pack("<IQI", 0, start + size_bytes, 1)
    end = struct.pack("<HHHHIIH", 0, 0, entries, entries, FULL, FULL, 0)
    return END64 + end64 + LOCATE64 + locate + END + end


def weeks(streams: Iterable[tuple[datetime, BinaryIO]], days: Iterable[date]) -> Iterator[bytes]:
    """The whole file: an entry for each week of `days`, in order, with the streams of its hours, oldest first."""
    made = WeekZip()
    upcoming = iter(streams)
    held = next(upcoming, None)
    for week in dict.fromkeys(monday(day) for day in days):
        yield from made.open(week)
        while held is not None and monday(held[0].date()) == week:
            yield from made.add(held[1])
            held = next(upcoming, None)
    yield from made.finish()
