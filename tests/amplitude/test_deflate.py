"""Gzip members joined to one deflate stream: whatever they are made of, it inflates to what was in them."""

import gzip
import io
import os
import random
import zlib
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.amplitude import archives
from app.amplitude.archives import Joined
from app.core.errors import Permanent, Transient

WAYS: dict[str, Callable[[], Joined]] = {
    "copied": lambda: archives._CopiedStream(archives.library()),  # noqa: SLF001 - both ways are tested, whatever this machine has
    "compressed": archives._CompressedStream,  # noqa: SLF001
}
STRATEGIES = (zlib.Z_DEFAULT_STRATEGY, zlib.Z_FIXED, zlib.Z_HUFFMAN_ONLY, zlib.Z_RLE)
FLUSHES = (zlib.Z_SYNC_FLUSH, zlib.Z_FULL_FLUSH, zlib.Z_PARTIAL_FLUSH)


class Choppy(io.BytesIO):
    """Gives a few bytes at a time, so that every boundary of a buffer is met."""

    def __init__(self, data: bytes, step: int) -> None:
        super().__init__(data)
        self._step = step

    def read(self, size: int | None = -1) -> bytes:
        return super().read(min(self._step, size) if size and size > 0 else self._step)


def member(content: bytes, chance: random.Random) -> bytes:
    """A gzip stream with blocks of any kind, ended in any way that zlib knows."""
    packer = zlib.compressobj(
        chance.randrange(10), zlib.DEFLATED, 31, chance.randrange(1, 10), chance.choice(STRATEGIES)
    )
    out = b""
    step = max(1, len(content) // 3)
    for at in range(0, len(content), step):
        out += packer.compress(content[at : at + step])
        if chance.random() < 0.4:
            out += packer.flush(chance.choice(FLUSHES))
    return out + packer.flush()


@pytest.mark.parametrize("way", WAYS)
@settings(max_examples=60, deadline=None)
@given(
    contents=st.lists(st.lists(st.binary(max_size=300), max_size=3), max_size=4),
    seed=st.integers(0, 2**32),
    step=st.sampled_from([1, 2, 7, 100_000]),
)
def test_what_is_joined_inflates_to_what_was_in_the_members(
    way: str, contents: list[list[bytes]], seed: int, step: int
) -> None:
    chance = random.Random(seed)  # noqa: S311 - no secret
    stream = WAYS[way]()
    out, wanted = b"", b""
    for members in contents:
        packed = b"".join(member(content, chance) for content in members) + bytes(
            chance.choice((0, 9)) if members else 0
        )
        out += b"".join(stream.add(Choppy(packed, step)))
        wanted += b"".join(members)
        if chance.random() < 0.5:
            out += stream.newline()
            wanted += b"\n"
    out += stream.finish()
    assert zlib.decompress(out, -15) == wanted
    assert (stream.crc, stream.size_bytes) == (zlib.crc32(wanted), len(wanted))
    assert stream.last == wanted[-1:]


def test_joining_does_not_compress_anew() -> None:
    content = b"".join(b'{"a":%d,"b":"%x"}\n' % (n, n * 7919) for n in range(60_000))
    packed = gzip.compress(content, 9)
    stream = archives.joined()
    out = b"".join(stream.add(io.BytesIO(packed))) + stream.finish()
    assert zlib.decompress(out, -15) == content
    assert abs(len(out) - len(packed)) < 64


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("cut", [1, 9, 10, 15, 700, -9, -8, -1])
def test_a_cut_member_is_an_error(way: str, cut: int) -> None:
    packed = gzip.compress(os.urandom(1500))[:cut]
    with pytest.raises(Transient):
        list(WAYS[way]().add(io.BytesIO(packed)))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("at", [0, 20, -6, -2])
def test_a_changed_byte_is_an_error(way: str, at: int) -> None:
    packed = bytearray(gzip.compress(b"some events\n" * 50))
    packed[at] ^= 0xFF
    with pytest.raises(Transient):
        list(WAYS[way]().add(io.BytesIO(bytes(packed))))


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_a_bomb_is_stopped(way: str) -> None:
    packer = zlib.compressobj(9, wbits=31)
    zeros = bytes(1 << 20)
    packed = b"".join(packer.compress(zeros) for _ in range(80)) + packer.flush()
    with pytest.raises(Permanent, match="500 times"):
        list(WAYS[way]().add(io.BytesIO(packed)))
