"""Gzip members joined to one deflate stream without compressing anything anew.

A member is inflated block by block only to learn where its blocks end; its compressed bytes are copied, the mark of its
last block is taken off, and an empty stored block fills the last byte. That is the way of zlib's own examples/gzjoin.c.
Invariants: what comes out inflates to what was in the members, whose checksums zlib itself compared; memory is bounded.
Where no zlib can be called, members are compressed again, which gives the same content at several times the work.
"""

import ctypes
import zlib
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, BinaryIO, Protocol

from app.core.errors import Permanent, Transient

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
CUT = "nothing to do: the hours are fetched again"


class Joined(Protocol):
    """One deflate stream that grows. `crc` and `size_bytes` are of what it inflates to, `last` is its last byte."""

    crc: int
    size_bytes: int
    last: bytes

    def add(self, stream: BinaryIO) -> Iterator[bytes]:
        """Join all members of a gzip stream. Raises Transient when it is cut or broken, Permanent for a bomb."""

    def newline(self) -> bytes:
        """Join a line end."""

    def finish(self) -> bytes:
        """The end of the stream."""


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
    """zlib with its functions declared; None when there is none that can be called."""
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


def joined() -> Joined:
    """A new stream."""
    found = library()
    return _Copied(found) if found is not None else _Compressed()


class _Input:
    """Compressed bytes in one buffer. The byte before `position`, up to where they were read, is always kept.

    `start` is the first byte that was not handed out; it may be one ahead of what was read.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._buffer = bytearray(PIECE_BYTES + 1)
        self._shared = (ctypes.c_char * len(self._buffer)).from_buffer(self._buffer)
        self._address = ctypes.addressof(self._shared)
        self._end = self.start = self.position = 0

    @property
    def left(self) -> int:
        """Bytes that wait to be read."""
        return self._end - self.position

    @property
    def next(self) -> int:
        """The address of the next one."""
        return self._address + self.position

    def refill(self) -> bytes:
        """Read on once nothing is left; what goes out of the buffer. Raises Transient at the end of the stream."""
        piece = self._stream.read(PIECE_BYTES)
        if not piece:
            raise Transient("a member of the archive ends in the middle", CUT)
        kept = min(self.position, 1)
        gone = self.position - kept
        out = bytes(self._buffer[self.start : max(self.start, gone)])
        self._buffer[:kept] = self._buffer[gone : gone + kept]
        self._buffer[kept : kept + len(piece)] = piece
        self.start = max(0, self.start - gone)
        self.position, self._end = kept, kept + len(piece)
        return out

    def more(self) -> bool:
        """True when another member follows. What fills up the last sector of a tape is none."""
        while True:
            while self.left and not self._buffer[self.position]:
                self.position += 1
            if self.left:
                return True
            piece = self._stream.read(PIECE_BYTES)
            if not piece:
                return False
            self._buffer[: len(piece)] = piece
            self.start = self.position = 0
            self._end = len(piece)

    def clear_last_read(self, mask: int) -> bool:
        """Take a bit out of the last byte that was read; whether it was set."""
        byte = self._buffer[self.position - 1]
        self._buffer[self.position - 1] = byte & ~mask & 0xFF
        return bool(byte & mask)

    def take_next_cleared(self) -> bytes:
        """When the next byte has its lowest bit set: all up to it and itself without that bit; else nothing.

        It stays as it is for whoever reads it.
        """
        byte = self._buffer[self.position]
        if not byte & 1:
            return b""
        out = self.take() + bytes([byte & ~1])
        self.start = self.position + 1
        return out

    def take(self) -> bytes:
        """What was read and not handed out."""
        out = bytes(self._buffer[self.start : self.position])
        self.start = self.position
        return out


class _Copied:
    """See the module."""

    def __init__(self, zlib_library: Any) -> None:
        self._zlib = zlib_library
        self._scrap = ctypes.create_string_buffer(PIECE_BYTES)
        self._scrap_address = ctypes.addressof(self._scrap)
        self.crc = self.size_bytes = 0
        self.last = b""

    def add(self, stream: BinaryIO) -> Iterator[bytes]:
        """See `Joined.add`."""
        source, state = _Input(stream), _Stream()
        size = ctypes.sizeof(state)
        if self._zlib.inflateInit2_(ctypes.byref(state), GZIP_BITS, self._zlib.zlibVersion(), size) != OK:
            raise Permanent("the zlib of this system cannot be used", "install it again")
        try:
            while source.more():
                yield from self._member(source, state)
                self._zlib.inflateReset(ctypes.byref(state))
        finally:
            self._zlib.inflateEnd(ctypes.byref(state))

    def newline(self) -> bytes:
        """See `Joined.newline`."""
        self._count(zlib.crc32(b"\n"), 1)
        self.last = b"\n"
        return STORED_NEWLINE

    def finish(self) -> bytes:
        """See `Joined.finish`."""
        return LAST_BLOCK

    def _count(self, crc: int, size_bytes: int) -> None:
        self.crc = self._zlib.crc32_combine(self.crc, crc, size_bytes)
        self.size_bytes += size_bytes

    def _member(self, source: _Input, state: _Stream) -> Iterator[bytes]:
        for _ in self._to_boundary(source, state):
            pass  # its header
        source.take()
        last = False
        while not last:
            unused = state.data_type & UNUSED_BITS
            if unused:
                last = source.clear_last_read(0x100 >> unused)
            else:
                if not source.left:
                    yield source.refill()
                cleared = source.take_next_cleared()
                last = bool(cleared)
                yield cleared
            yield from self._to_boundary(source, state)
        yield _aligned(source.take(), state.data_type & UNUSED_BITS)
        while self._inflate(source, state) != STREAM_END:  # its trailer
            if not source.left:
                source.refill()
        source.take()
        self._count(state.adler, state.total_out)

    def _to_boundary(self, source: _Input, state: _Stream) -> Iterator[bytes]:
        """Read up to the end of the header or of a block; what goes out of the buffer meanwhile."""
        while True:
            self._inflate(source, state)
            if state.data_type & AT_BOUNDARY:
                return
            if state.avail_out and not source.left:
                yield source.refill()

    def _inflate(self, source: _Input, state: _Stream) -> int:
        state.next_in, state.avail_in = source.next, source.left
        state.next_out, state.avail_out = self._scrap_address, PIECE_BYTES
        told: int = self._zlib.inflate(ctypes.byref(state), BLOCK)
        source.position += source.left - state.avail_in
        if state.avail_out < PIECE_BYTES:
            self.last = self._scrap[PIECE_BYTES - state.avail_out - 1]
        if told not in (OK, STREAM_END, BUF_ERROR):
            raise Transient(f"a member of the archive is broken (zlib says {told})", CUT)
        check_ratio(state.total_in, state.total_out)
        return told


def _aligned(body: bytes, unused: int) -> bytes:
    """Blocks filled up to a whole byte by an empty one, whose head takes three of the unused bits or another byte."""
    if not unused:
        return body
    whole = body[:-1] + bytes([body[-1] & ((0x100 >> unused) - 1)])
    return whole + (b"" if unused >= STORED_HEAD_BITS else b"\0") + STORED_EMPTY


def check_ratio(packed_bytes: int, size_bytes: int) -> None:
    """Raise Permanent for what grows as no events do."""
    if size_bytes > RATIO_FREE_BYTES and size_bytes > MAX_RATIO * packed_bytes:
        raise Permanent(
            f"a member of the archive grows to more than {MAX_RATIO} times its size",
            "it is no export of events: look at it in the service before it is fetched again",
        )


class _Compressed:
    """The same by compressing again."""

    def __init__(self) -> None:
        self._compressor = zlib.compressobj(1, wbits=-15)
        self.crc = self.size_bytes = 0
        self.last = b""

    def add(self, stream: BinaryIO) -> Iterator[bytes]:
        """See `Joined.add`."""
        for piece in inflated(stream):
            yield self._taken(piece)

    def newline(self) -> bytes:
        """See `Joined.newline`."""
        return self._taken(b"\n")

    def finish(self) -> bytes:
        """See `Joined.finish`."""
        return self._compressor.flush()

    def _taken(self, piece: bytes) -> bytes:
        self.crc = zlib.crc32(piece, self.crc)
        self.size_bytes += len(piece)
        self.last = piece[-1:]
        return self._compressor.compress(piece)


def inflated(stream: BinaryIO) -> Iterator[bytes]:
    """What the members of a gzip stream hold, in pieces. Raises Transient when it is cut, Permanent for a bomb."""
    packed, size_bytes = 0, 0
    inflater: zlib._Decompress | None = None
    while block := stream.read(PIECE_BYTES):
        packed += len(block)
        while block:
            if inflater is None:
                block = block.lstrip(b"\0")
                inflater = zlib.decompressobj(GZIP_BITS) if block else None
                continue
            try:
                piece = inflater.decompress(block, PIECE_BYTES)
            except zlib.error as error:
                raise Transient(f"a member of the archive is broken: {error}", CUT) from error
            block = inflater.unused_data if inflater.eof else inflater.unconsumed_tail
            size_bytes += len(piece)
            check_ratio(packed, size_bytes)
            if piece:
                yield piece
            if inflater.eof:
                inflater = None
    if inflater is not None:
        raise Transient("a member of the archive ends in the middle", CUT)
