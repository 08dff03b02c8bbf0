"""Bodies on their way to and from S3: what is left of a stream, and a download that goes on where it broke off.

Invariant: a download ends at the size that was promised, or it raises; it never ends early in silence.
"""

import io
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

from app.core.errors import Transient
from app.stores.s3_client import REACH_HINT, READ_HINT

RESUMES = 8


class Rest:
    """What is left of a stream, as a stream of its own: the SDK rewinds to 0 before it sends a body again."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._start = stream.tell()
        self.size_bytes = stream.seek(0, io.SEEK_END) - self._start
        stream.seek(self._start)

    def read(self, count: int = -1) -> bytes:
        """The next bytes."""
        return self._stream.read(count)

    def tell(self) -> int:
        """The position in the rest."""
        return self._stream.tell() - self._start

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a position in the rest."""
        start = self._start if whence == io.SEEK_SET else 0
        return self._stream.seek(offset + start, whence) - self._start


class Resumed(io.RawIOBase):
    """A download that is asked for again from where it broke off, at most RESUMES times, and ends only at its size."""

    def __init__(self, key: str, answer: Mapping[str, Any], resume: Callable[[int], Any]) -> None:
        self._key = key
        self._body = answer["Body"]
        self._size_bytes: int = answer["ContentLength"]
        self._resume = resume
        self._position = 0
        self._resumes_left = RESUMES

    def readable(self) -> bool:
        """Always."""
        return True

    def readinto(self, buffer: Any) -> int:
        """The next bytes; 0 only at the end. Raises Transient."""
        chunk = b""
        while not chunk and self._position < self._size_bytes:
            chunk = self._read(min(len(buffer), self._size_bytes - self._position))
        if not chunk:
            self._verify()
        buffer[: len(chunk)] = chunk
        self._position += len(chunk)
        return len(chunk)

    def _read(self, count: int) -> bytes:
        """Some of the next bytes; none when the connection broke and a new one was made."""
        from botocore.exceptions import BotoCoreError
        from urllib3.exceptions import HTTPError

        cause = None
        try:
            chunk: bytes = self._body.read(count)
        except (BotoCoreError, HTTPError, OSError) as error:
            chunk, cause = b"", error
        if not chunk:
            self._body.close()
            if not self._resumes_left:
                where = f"at byte {self._position} of {self._size_bytes}"
                raise Transient(
                    f"{self._key}: the download broke off {RESUMES + 1} times, now {where}", REACH_HINT
                ) from cause
            self._resumes_left -= 1
            self._body = self._resume(self._position)
        return chunk

    def _verify(self) -> None:
        """The SDK compares the checksum, where the store sent one, when it is asked for more than there is."""
        from botocore.exceptions import FlexibleChecksumError

        try:
            self._body.read(1)
        except FlexibleChecksumError as error:
            raise Transient(f"{self._key}: what arrived is not what was stored: {error}", READ_HINT) from error

    def close(self) -> None:
        """Give the connection back."""
        if not self.closed:
            self._body.close()
        super().close()
