"""The transfers of an S3 bucket: bodies in parts, patches from copied parts, pages, links, a sweep of leftovers.

Invariant: an object is replaced in one step of the store, a PutObject or a Complete, under the condition that it was
begun with.
"""

import io
import threading
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from app.core.errors import AppError, Rejected, Transient
from app.stores.objects import ObjectInfo, Put, check_characters, check_key
from app.stores.s3 import S3Store, check_headers, check_unicode
from app.stores.s3_client import STYLE_HINT, code_of, status_of
from app.stores.s3_listing import infos_of
from app.stores.s3_parts import (
    MIB,
    PartDesk,
    S3Parts,
    begun,
    honours_conditions,
    marked,
    part_bytes,
    settled,
)
from app.stores.transfers import MARK, Page, Question, Readable, Stored

if TYPE_CHECKING:
    from collections.abc import Callable

LARGE_BYTES = MIB
STEP_BYTES = MIB
PARTS_OF_OLD = 4_000


class S3Transfers:
    """Transfers of `store`'s bucket."""

    def __init__(self, store: S3Store) -> None:
        self._store = store
        self._desk = PartDesk()
        self._turn = threading.Lock()
        self._guards_parts: bool | None = None

    def close(self) -> None:
        """End the threads. Idempotent."""
        self._desk.close()

    def write(self, key: str, body: Readable, put: Put) -> Stored:
        """PutObject for what fits into one part, otherwise a multipart upload."""

        def fill(assembly: "_Assembly") -> None:
            assembly.take(body)

        return self._assembled(key, put, fill)

    def patch(self, held: ObjectInfo, offset: int, body: Readable) -> Stored:
        """What is large and stays is copied by the store itself; the rest is read and sent again."""
        metadata = {name: value for name, value in held.metadata.items() if name != MARK}
        put = Put(held.content_type, metadata, held.etag)

        def fill(assembly: "_Assembly") -> None:
            assembly.least_part_bytes = -(-held.size_bytes // PARTS_OF_OLD // MIB) * MIB
            assembly.keep(held, 0, offset)
            end = offset + assembly.take(body)
            assembly.keep(held, end, held.size_bytes - end, last=True)

        return self._assembled(held.key, put, fill)

    def open_span(self, held: ObjectInfo, first: int, count: int) -> AbstractContextManager[Readable]:
        """GetObject with a range."""
        return self._store.open_span(held, first, count) if count > 0 else nullcontext(io.BytesIO())

    def page(self, question: Question) -> Page:
        """ListObjectsV2. The continuation is the store's own token."""
        check_unicode(question.prefix)
        asked = {"Delimiter": question.delimiter, "ContinuationToken": question.continuation}
        with self._store.translated(f"listing of {question.prefix!r}"):
            found = self._listed(question, {name: value for name, value in asked.items() if value})
            objects = infos_of(found)
            prefixes = [entry["Prefix"] for entry in found.get("CommonPrefixes", ())]
            more = found["NextContinuationToken"] if found["IsTruncated"] else ""
        if more and more == question.continuation:
            raise Transient(f"listing of {question.prefix!r}: the store gives the same page again", STYLE_HINT)
        # SeaweedFS takes `a//` for `a/`
        return Page(
            [info for info in objects if info.key.startswith(question.prefix)],
            [prefix for prefix in prefixes if prefix.startswith(question.prefix)],
            more,
        )

    def _listed(self, question: Question, asked: dict[str, str]) -> Any:
        from botocore.exceptions import ClientError

        try:
            return self._store.client().list_objects_v2(
                Bucket=self._store.target.bucket, Prefix=question.prefix, MaxKeys=question.limit, **asked
            )
        except ClientError as error:
            if not question.continuation or status_of(error) != HTTPStatus.BAD_REQUEST:
                raise
            raise Rejected(
                f"the continuation is not one of a listing: {code_of(error)}", "begin the listing again without it"
            ) from error

    def link(self, key: str, seconds: int, disposition: str) -> str:
        """A presigned GetObject. It ends with temporary credentials, if those are what it was made with."""
        check_characters(key)
        place = {"Bucket": self._store.target.bucket, "Key": key, "ResponseContentDisposition": disposition}
        with self._store.translated(key):
            return str(self._store.client().generate_presigned_url("get_object", Params=place, ExpiresIn=seconds))

    def _assembled(self, key: str, put: Put, fill: "Callable[[_Assembly], None]") -> Stored:
        check_key(key)
        put = marked(put)
        check_headers(key, put)
        with ExitStack() as stack:
            assembly = _Assembly(self._store, self._desk, (key, put), stack)
            fill(assembly)
            if assembly.parts is None:
                return self._put(key, assembly.rest(), put)
            guarded = put.expected is not None and self._guards()
            return replace(assembly.complete(guarded=guarded), guarded=guarded or put.expected is None)

    def _put(self, key: str, data: bytearray, put: Put) -> Stored:
        guarded = put.expected is None or self._store.conditional
        try:
            etag, version_id = self._store.put_version(key, io.BytesIO(data), put)
        except AppError as error:
            return Stored(settled(self._store, key, put, error).etag, len(data), None, guarded)
        return Stored(etag, len(data), version_id, guarded)

    def _guards(self) -> bool:
        """Whether the store compares versions at a Complete; some do so only at a PutObject. Asked once."""
        with self._turn:
            if self._guards_parts is None:
                self._guards_parts = self._store.conditional and honours_conditions(self._store, self._store.probe_key)
            return self._guards_parts


class _Assembly:
    """An object put together from front to back. It becomes a multipart upload when it outgrows a part."""

    def __init__(self, store: S3Store, desk: PartDesk, what: tuple[str, Put], stack: ExitStack) -> None:
        self._store, self._desk, self._stack = store, desk, stack
        self._key, self._put = what
        self._held = bytearray()  # room for a whole part once the object is large
        self._held_bytes = 0
        self._size_bytes = 0
        self._large = False
        self.least_part_bytes = 0
        self.parts: S3Parts | None = None

    def take(self, body: Readable) -> int:
        """All of `body`; how many bytes it had."""
        before = self._size_bytes
        while data := body.read(min(STEP_BYTES, self._room_bytes())):
            self._add(data)
        return self._size_bytes - before

    def keep(self, held: ObjectInfo, first: int, count: int, *, last: bool = False) -> None:
        """The bytes `[first, first + count)` of the version that is replaced; nothing when `count` is not positive.

        What fills a part is copied; what shares one with other bytes is read, since all parts but the `last` are alike.
        """
        started = min(self._room_bytes(), count) if self._held_bytes else 0
        self._read(held, first, started)
        copied = self._copy(held, first + started, count - started, last=last) if count > 0 else 0
        self._read(held, first + started + copied, count - started - copied)

    def _read(self, held: ObjectInfo, first: int, count: int) -> None:
        if count > 0:
            with self._store.open_span(held, first, count) as stream:
                self.take(stream)

    def _copy(self, held: ObjectInfo, first: int, count: int, *, last: bool) -> int:
        """How many of the bytes the store copied; fewer when they fill no part, or when it cannot copy at all."""
        copied = 0
        while (size_bytes := self._room_bytes()) <= count - copied or (copied and last and copied < count):
            size_bytes = min(size_bytes, count - copied)
            if not self._begin().copy(held, first + copied, size_bytes):
                break
            copied += size_bytes
            self._size_bytes += size_bytes
        return copied

    def _room_bytes(self) -> int:
        return max(part_bytes(self.parts.number if self.parts else 1), self.least_part_bytes) - self._held_bytes

    def _add(self, data: bytes) -> None:
        end = self._held_bytes + len(data)
        if end > LARGE_BYTES and not self._large:
            self._stack.enter_context(self._desk.place())
            self._large = True
        if self._large and end > len(self._held):
            held, self._held = self._held, self._desk.buffer(self._held_bytes + self._room_bytes())
            self._held[: len(held)] = held
        self._held[self._held_bytes : end] = data
        self._held_bytes = end
        self._size_bytes += len(data)
        if not self._room_bytes():
            self._flush(self._begin())

    def _begin(self) -> S3Parts:
        if self.parts is None:
            self.parts = self._stack.enter_context(begun(self._store, self._desk, self._key, self._put))
        return self.parts

    def _flush(self, parts: S3Parts) -> None:
        parts.send(self.rest())

    def rest(self) -> bytearray:
        """What is held and was not sent; it is not held any more."""
        held, count = self._held, self._held_bytes
        self._held, self._held_bytes = bytearray(), 0
        if count < len(held):
            del held[count:]  # gives the memory back without a copy
        return held

    def complete(self, *, guarded: bool) -> Stored:
        """Send the rest and make the object."""
        parts = self._begin()
        if self._held_bytes:
            self._flush(parts)
        return parts.complete(self._size_bytes, guarded=guarded)
