"""Reads export archives, and joins gzip members into one zip with an entry per week."""

import ctypes
import gzip
import io
import re
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, date, datetime, timedelta
from functools import lru_cache
from itertools import groupby
from typing import Any, BinaryIO, TypeAlias, cast

from app.core.errors import AppError, Permanent, Transient
from app.core.windows import HOUR_SECONDS, Window, windows_between

# An export is a zip of gzip files of NDJSON: several for an hour, none for an hour without events.
#
# Invariants: members are ordered by hour numerically, however their names sort; a member's name is never used as a
# path; any defect of the file is reported as one of our errors.

NAME = re.compile(r"_(\d{4})-(\d\d)-(\d\d)_(\d{1,2})#(\d+)\.json\.gz$")
AGAIN = "no action needed: the export is fetched again"
ODD_HINT = "check AMPLITUDE_BASE_URL, and ask for days from 2014-11-12 on; otherwise please report it"

NO_HOUR = datetime.min.replace(tzinfo=UTC)

Member: TypeAlias = zipfile.ZipInfo  # not its name: two members may have the same one


class ExportArchive:
    """The answer for `span`: a zip in `file`. None = the span has no events, or `fault` says why it is unavailable. A
    file that is not such a zip has a fault as well.

    `hours` has every hour of the span, oldest first, with its members in order; `odd` the members of none of them, each
    with the error that it means for a reader who cannot go on without them. The receiver closes it.
    """

    def __init__(self, span: Window, file: BinaryIO | None, fault: AppError | None = None) -> None:
        self.span, self.file, self.fault = span, file, fault
        self.hours: dict[datetime, list[Member]] = {
            hour.start: [] for hour in windows_between(span.start, span.end, HOUR_SECONDS)
        }
        self.odd: list[tuple[Permanent, Member]] = []
        if file is not None:
            try:
                with read_errors():
                    self._archive = zipfile.ZipFile(file)
            except (Transient, Permanent) as error:
                self.fault = error
            else:
                self._sort(self._archive.infolist())

    def _sort(self, found: Iterable[Member]) -> None:
        members = [info for info in found if not info.is_dir()]
        placed = sorted((*_placed(info.filename), at) for at, info in enumerate(members))
        for hour_at, _, at in placed:
            if hour_at in self.hours:
                self.hours[hour_at].append(members[at])
            else:
                what = "names no hour" if hour_at == NO_HOUR else "is from another time"
                name = members[at].filename[:120]
                said = f"a member of the export of {self.span} is named {name!r}, which {what}"
                self.odd.append((Permanent(said, ODD_HINT), members[at]))
        if self.odd and len(self.odd) == len(members):
            self.fault = self.odd[0][0]

    def streams(self, members: Iterable[Member]) -> Iterator[BinaryIO]:
        """The bytes of each of these members in turn. A stream is valid until the next one is requested. Read it inside
        `read_errors`: its checksum is compared at its end.
        """
        for member in members:
            with read_errors(), self._archive.open(member) as stream:
                yield cast("BinaryIO", stream)

    def close(self) -> None:
        """Close the file. Idempotent."""
        if self.file is not None:
            self.file.close()


@contextmanager
def read_errors() -> Iterator[None]:
    """Convert read errors to ours: Transient for a broken zip, Permanent for a zip feature that zipfile lacks."""
    try:
        yield
    except (zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise Transient(f"the export is not a complete zip: {error or type(error).__name__}", AGAIN) from error
    except RuntimeError as error:  # zipfile: encryption, unsupported versions and compression methods
        raise Permanent(f"the export is a zip in a format that cannot be read: {error}", "please report it") from error


def _placed(name: str) -> tuple[datetime, int]:
    """The hour and the part number in a member's name."""
    found = NAME.search(name)
    try:
        year, month, day, hour, part = map(int, found.groups() if found else ())
        return datetime(year, month, day, hour, tzinfo=UTC), part
    except ValueError:
        return NO_HOUR, 0


# Joins gzip members into one deflate stream without recompressing.
#
# A member is inflated only to find where its blocks end. Its compressed bytes are copied, the last-block bit is
# cleared, and an empty stored block fills the last byte, as in zlib's own examples/gzjoin.c. Invariants: the output
# inflates to the content of the members, whose checksums zlib compared; memory is bounded. If no zlib can be called,
# members are recompressed: the same content at several times the work.

PIECE_BYTES = 1 << 18
OK, STREAM_END, BUF_ERROR = 0, 1, -5
BLOCK = 5
GZIP_BITS = 31
AT_BOUNDARY, UNUSED_BITS = 128, 7
STORED_EMPTY = b"\0\0\xff\xff"
STORED_NEWLINE = b"\0\x01\0\xfe\xff\n"
LAST_BLOCK = b"\x03\0"
STORED_HEAD_BITS = 3
MAX_RATIO, RATIO_FREE_BYTES = 500, 1 << 26
NAMES = ("libz.so.1", "libz.so", "libz.dylib", "libz.1.dylib", "zlib1.dll")
CUT = "no action needed: the hours are fetched again"


class _Stream(ctypes.Structure):
    """`z_stream` of zlib.h."""

    _fields_ = (
        ("next_in", ctypes.c_void_p),
        ("avail_in", ctypes.c_uint),
        ("total_in", ctypes.c_ulong),
        ("next_out", ctypes.c_void_p),
        ("avail_out", ctypes.c_uint),
        ("total_out", ctypes.c_ulong),
        ("msg", ctypes.c_char_p),
        ("state", ctypes.c_void_p),
        ("zalloc", ctypes.c_void_p),
        ("zfree", ctypes.c_void_p),
        ("opaque", ctypes.c_void_p),
        ("data_type", ctypes.c_int),
        ("adler", ctypes.c_ulong),
        ("reserved", ctypes.c_ulong),
    )


@lru_cache(maxsize=1)
def library() -> Any:
    """zlib with its functions declared; None when no zlib can be called."""
    for name in NAMES:
        try:
            found = ctypes.CDLL(name)
            found.zlibVersion.restype = ctypes.c_char_p
            found.crc32_combine.restype = ctypes.c_ulong
            found.crc32_combine.argtypes = (ctypes.c_ulong, ctypes.c_ulong, ctypes.c_long)
            for call in (found.inflate, found.inflateReset, found.inflateEnd, found.inflateInit2_):
                call.restype = ctypes.c_int
        except (OSError, AttributeError):
            continue
        return found
    return None


class _CopiedStream:
    """A growing deflate stream. `crc` and `size_bytes` are those of the inflated data; `last` is its last byte.

    `add` joins all members of a gzip stream. It raises Transient when the stream is truncated or broken, and Permanent
    for a decompression bomb.
    """

    def __init__(self, zlib_library: Any) -> None:
        self._zlib, self._state = zlib_library, _Stream()
        self._scrap = ctypes.create_string_buffer(PIECE_BYTES)
        self._scrap_address = ctypes.addressof(self._scrap)
        self._stream: BinaryIO = io.BytesIO()
        # The piece that zlib reads, and the bytes that go out, in which bits are cleared: from `_start` on, those that
        # did not go out yet. The byte before the one that is read next is always among them.
        self._piece, self._copy, self._start = b"", bytearray(), 0
        self.crc = self.size_bytes = 0
        self.last = b""

    def add(self, stream: BinaryIO) -> Iterator[bytes]:
        self._stream, state, version = stream, ctypes.byref(self._state), self._zlib.zlibVersion()
        if self._zlib.inflateInit2_(state, GZIP_BITS, version, ctypes.sizeof(self._state)) != OK:
            raise Permanent("this system's zlib cannot be used", "install it again")
        try:
            while self._begins():
                yield from self._member()
                self._zlib.inflateReset(state)
        finally:
            self._zlib.inflateEnd(state)

    def newline(self) -> bytes:
        self._count(zlib.crc32(b"\n"), 1)
        self.last = b"\n"
        return STORED_NEWLINE

    def finish(self) -> bytes:
        return LAST_BLOCK

    def _count(self, crc: int, size_bytes: int) -> None:
        self.crc = self._zlib.crc32_combine(self.crc, crc, size_bytes)
        self.size_bytes += size_bytes

    def _begins(self) -> bool:
        """Whether another member follows. Skips zeros that pad the last sector of a tape."""
        state = self._state
        while state.avail_in or self._read():
            if self._piece[-state.avail_in]:
                return True
            state.next_in += 1
            state.avail_in -= 1
        return False

    def _member(self) -> Iterator[bytes]:
        state, copy = self._state, self._copy
        for _ in self._to_boundary():
            pass  # the header of the member
        self._start, is_last = len(copy) - state.avail_in, False
        while not is_last:
            unused = state.data_type & UNUSED_BITS  # the head of a block begins in them, or in the next byte
            if not unused and not state.avail_in:
                yield self._refill()
            at, bit = len(copy) - state.avail_in - bool(unused), 0x100 >> unused if unused else 1
            is_last = bool(copy[at] & bit)
            copy[at] &= 0xFF ^ bit
            yield from self._to_boundary()
        yield _aligned(bytes(copy[self._start : len(copy) - state.avail_in]), state.data_type & UNUSED_BITS)
        while self._inflate() != STREAM_END:  # the trailer of the member
            if not state.avail_in:
                self._refill()
        self._count(state.adler, state.total_out)

    def _to_boundary(self) -> Iterator[bytes]:
        """Read up to the end of the header or of a block; yields bytes that nothing changes any more."""
        while True:
            self._inflate()
            if self._state.data_type & AT_BOUNDARY:
                return
            if self._state.avail_out and not self._state.avail_in:
                yield self._refill()

    def _refill(self) -> bytes:
        """Read on, once all was read; returns the bytes that nothing changes any more. Raises Transient at the end."""
        out = bytes(self._copy[self._start : -1])
        self._start = max(0, self._start - len(self._copy) + 1)
        if not self._read():
            raise Transient("a member of the archive is truncated", CUT)
        return out

    def _read(self) -> bool:
        """Read the next piece; False at the end of the stream."""
        self._piece = self._stream.read(PIECE_BYTES)
        self._copy[:-1] = b""
        self._copy += self._piece
        self._state.next_in = ctypes.cast(ctypes.c_char_p(self._piece), ctypes.c_void_p).value
        self._state.avail_in = len(self._piece)
        return bool(self._piece)

    def _inflate(self) -> int:
        state = self._state
        state.next_out, state.avail_out = self._scrap_address, PIECE_BYTES
        told: int = self._zlib.inflate(ctypes.byref(state), BLOCK)
        if state.avail_out < PIECE_BYTES:
            self.last = self._scrap[PIECE_BYTES - state.avail_out - 1]
        if told not in (OK, STREAM_END, BUF_ERROR):
            raise Transient(f"a member of the archive is corrupt (zlib: {told})", CUT)
        check_ratio(state.total_in, state.total_out)
        return told


def _aligned(body: bytes, unused: int) -> bytes:
    """Pad blocks to a whole byte with an empty one, whose header takes three of the unused bits or another byte."""
    if not unused:
        return body
    whole = body[:-1] + bytes([body[-1] & ((0x100 >> unused) - 1)])
    return whole + (b"" if unused >= STORED_HEAD_BITS else b"\0") + STORED_EMPTY


def check_ratio(packed_bytes: int, size_bytes: int) -> None:
    """Raise Permanent for a compression ratio that no events have."""
    if size_bytes > RATIO_FREE_BYTES and size_bytes > MAX_RATIO * packed_bytes:
        raise Permanent(
            f"a member of the archive grows to more than {MAX_RATIO} times its size",
            "check the data in the service first: this is not an export of events",
        )


class _CompressedStream:
    """Same interface as `_CopiedStream`, but recompresses."""

    def __init__(self) -> None:
        self._compressor = zlib.compressobj(1, wbits=-15)
        self.crc = self.size_bytes = 0
        self.last = b""

    def add(self, stream: BinaryIO) -> Iterator[bytes]:
        whole_pieces = io.BufferedReader(cast("io.RawIOBase", stream))  # gzip asks for exact sizes
        with read_errors(), gzip.open(whole_pieces) as whole:
            while piece := whole.read(PIECE_BYTES):
                check_ratio(stream.tell(), self.size_bytes + len(piece))
                yield self._taken(piece)

    def newline(self) -> bytes:
        return self._taken(b"\n")

    def finish(self) -> bytes:
        return self._compressor.flush()

    def _taken(self, piece: bytes) -> bytes:
        self.crc = zlib.crc32(piece, self.crc)
        self.size_bytes += len(piece)
        self.last = piece[-1:]
        return self._compressor.compress(piece)


Joined: TypeAlias = _CopiedStream | _CompressedStream


def joined() -> Joined:
    """A new stream."""
    found = library()
    return _CopiedStream(found) if found is not None else _CompressedStream()


def joined_lines(joining: Joined, streams: Iterable[BinaryIO]) -> Iterator[bytes]:
    """Join gzip streams, each event on its own line, up to the end of the deflate stream."""
    for stream in streams:
        with read_errors():
            yield from filter(None, joining.add(stream))
        if joining.last not in (b"", b"\n"):
            yield joining.newline()
    yield joining.finish()


# A zip with one NDJSON entry per ISO week, written front to back while its events still arrive.
#
# Invariants: an entry consists of the gzip members of its hours, joined in order and not recompressed; each event is on
# its own line; the same members give the same bytes. Source: PKWARE's APPNOTE.TXT 6.3.10, sections 4.3 and 4.5.3
# (zip64).

WEEK = timedelta(days=7)
ZIP64_VERSION = 45
SIZES_FOLLOW = 0x0808  # sizes follow the data, and names are UTF-8
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
    """`{year}_week_{week}`: ISO year and ISO week, which start together; no leading zero in the week."""
    year, week, _ = day.isocalendar()
    return f"{year}_week_{week}"


def weeks(streams: Iterable[tuple[datetime, BinaryIO]], days: Iterable[date]) -> Iterator[bytes]:
    """The whole file: an entry for each week of `days`, in order, from the streams of its hours, oldest first."""
    by_week = groupby(streams, lambda each: monday(each[0].date()))
    upcoming = next(by_week, None)
    offset, central = 0, list[bytes]()
    for day in dict.fromkeys(monday(day) for day in days):
        joining, packed_bytes = joined(), 0
        head = _local(day)
        yield head
        hours = upcoming[1] if upcoming and upcoming[0] == day else iter(())
        for piece in joined_lines(joining, (stream for _, stream in hours)):
            packed_bytes += len(piece)
            yield piece
        upcoming = next(by_week, None) if upcoming and upcoming[0] == day else upcoming
        following = FOLLOWING + struct.pack("<IQQ", joining.crc, packed_bytes, joining.size_bytes)
        yield following
        central.append(_central(day, joining, packed_bytes, offset))
        offset += len(head) + packed_bytes + len(following)
    yield from central
    yield _end(len(central), offset, sum(map(len, central)))


def _entry(day: date) -> tuple[bytes, int]:
    """The name of a week's entry, and its Monday as an MS-DOS timestamp: time in the low half, date in the high."""
    return f"{name_of(day)}.ndjson".encode(), ((day.year - 1980) << 9 | day.month << 5 | day.day) << 16


def _local(day: date) -> bytes:
    name, stamp = _entry(day)
    sizes = struct.pack("<HHQQ", ZIP64_FIELD, 16, 0, 0)
    head = struct.pack("<HHHIIIIHH", ZIP64_VERSION, SIZES_FOLLOW, DEFLATED, stamp, 0, FULL, FULL, len(name), len(sizes))
    return LOCAL + head + name + sizes


def _central(day: date, joining: Joined, packed_bytes: int, offset: int) -> bytes:
    name, stamp = _entry(day)
    sizes = struct.pack("<HHQQQ", ZIP64_FIELD, 24, joining.size_bytes, packed_bytes, offset)
    made_by_unix = 3 << 8 | ZIP64_VERSION
    head = struct.pack("<HHHHIIII", made_by_unix, ZIP64_VERSION, SIZES_FOLLOW, DEFLATED, stamp, joining.crc, FULL, FULL)
    tail = struct.pack("<HHHHHII", len(name), len(sizes), 0, 0, 0, REGULAR_FILE, FULL)
    return CENTRAL + head + tail + name + sizes


def _end(entries: int, start: int, size_bytes: int) -> bytes:
    end64 = struct.pack("<QHHIIQQQQ", 44, ZIP64_VERSION, ZIP64_VERSION, 0, 0, entries, entries, size_bytes, start)
    locate = struct.pack("<IQI", 0, start + size_bytes, 1)
    end = struct.pack("<HHHHIIH", 0, 0, entries, entries, FULL, FULL, 0)
    return END64 + end64 + LOCATE64 + locate + END + end
