"""The transfers of a local directory, and pages of any store that lists its keys in order.

Invariant: an object is replaced in the one step that the directory's `put` is, under the condition that it was begun
with; an earlier version stays readable for those who have it open.
"""

import binascii
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import groupby
from typing import BinaryIO, cast

from app.core.errors import Conflict, Rejected
from app.object_store.local import LocalDirectory
from app.object_store.port import ObjectInfo, Page, Put, Question, Readable, Stored

STEP_BYTES = 1 << 20


class LocalTransfers:
    """Transfers of `store`."""

    def __init__(self, store: LocalDirectory) -> None:
        self._store = store

    def write(self, key: str, body: Readable, put: Put) -> Stored:
        """Through the directory's own `put`, which reads its body from front to back."""
        counted = _Counted(body)
        etag = self._store.put(key, cast("BinaryIO", counted), put)
        return Stored(etag, counted.size_bytes)

    def patch(self, held: ObjectInfo, offset: int, body: Readable) -> Stored:
        """The object is written anew: its readers keep what they have."""
        with self._store.open(held.key, held.etag) as old:
            if old is None:
                raise Conflict(
                    f"{held.key}: was deleted while it was patched", "look at the object, then send it again"
                )
            spliced = _Counted(Spliced(old, held.size_bytes, offset, body))
            put = Put(held.content_type, held.metadata, held.etag)
            etag = self._store.put(held.key, cast("BinaryIO", spliced), put)
            return Stored(etag, spliced.size_bytes)

    @contextmanager
    def open_span(self, held: ObjectInfo, first: int, count: int) -> Iterator[Readable]:
        """The open file, from `first` on."""
        with self._store.open(held.key, held.etag) as stream:
            if stream is None:
                raise Conflict(f"{held.key}: was deleted", "nothing to do: it is read again")
            stream.seek(first)
            yield Limited(stream, count)

    def page(self, question: Question) -> Page:
        """The keys after the last one of the page before."""
        return page_of(self._store.list(question.prefix), question)


class _Counted:
    """A body whose bytes are counted."""

    def __init__(self, body: Readable) -> None:
        self._body = body
        self.size_bytes = 0

    def read(self, count: int = STEP_BYTES) -> bytes:
        data = self._body.read(count)
        self.size_bytes += len(data)
        return data


class Limited:
    """The next `count` bytes of a stream, as a body."""

    def __init__(self, stream: BinaryIO, count: int) -> None:
        self._stream = stream
        self._left = count

    def read(self, count: int, /) -> bytes:
        """See Readable. Raises Conflict when the stream ends before: somebody cut the file."""
        if not self._left:
            return b""
        data = self._stream.read(min(count, self._left))
        if not data:
            raise Conflict("the file became shorter while it was read", "nothing to do: it is read again")
        self._left -= len(data)
        return data


class Spliced:
    """Bytes of `old` up to `offset`, then a body, then what the body leaves of `old`."""

    def __init__(self, old: BinaryIO, size_bytes: int, offset: int, body: Readable) -> None:
        self._old, self._size_bytes, self._body = old, size_bytes, body
        self._pieces = iter((Limited(old, offset), body))
        self._now: Readable | None = next(self._pieces)
        self._end = 0

    def read(self, count: int, /) -> bytes:
        """See Readable."""
        while self._now is not None:
            data = self._now.read(count)
            if data:
                self._end += len(data)
                return data
            self._now = self._after(self._now)
        return b""

    def _after(self, ended: Readable) -> Readable | None:
        if ended is not self._body:
            return next(self._pieces, None)
        self._old.seek(min(self._end, self._size_bytes))
        return Limited(self._old, max(self._size_bytes - self._end, 0))


def page_of(found: Iterable[ObjectInfo], question: Question) -> Page:
    """The page of objects that come in UTF-8 order of their keys, all with the prefix. Raises Rejected."""
    after = _after(question)
    objects: list[ObjectInfo] = []
    prefixes: list[str] = []
    last = ""
    for rolled, group in groupby(found, lambda info: _rolled(info.key, question)):
        for info in group:
            name = rolled or info.key
            if name.encode() <= after:
                continue
            if len(objects) + len(prefixes) == question.limit:
                return Page(objects, prefixes, urlsafe_b64encode(last.encode()).decode())
            last = name
            if rolled:
                prefixes.append(rolled)
                break
            objects.append(info)
    return Page(objects, prefixes)


def _rolled(key: str, question: Question) -> str:
    """The common prefix that stands for `key`; "" when it stands for itself."""
    if not question.delimiter:
        return ""
    head, delimiter, _ = key[len(question.prefix) :].partition(question.delimiter)
    return f"{question.prefix}{head}{delimiter}" if delimiter else ""


def _after(question: Question) -> bytes:
    try:
        after = urlsafe_b64decode(question.continuation.encode())
        after.decode()
    except (binascii.Error, ValueError) as error:
        raise Rejected("the continuation is not one of a listing", "begin the listing again without it") from error
    return after
