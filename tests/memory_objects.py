"""An object store in memory, both halves of its port: the plainest thing that keeps the contract."""

import io
import itertools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import BinaryIO

from app.core.errors import Conflict
from app.object_store.port import (
    MAX_KEY_BYTES,
    ListingBatch,
    ListingPage,
    ListingRequest,
    ObjectInfo,
    PutRequest,
    ReadableBody,
    StoredObject,
    check_key,
    in_batches,
    page_of,
)


class MemoryObjects:
    segment_bytes = MAX_KEY_BYTES

    def __init__(self) -> None:
        self._turn = threading.Lock()
        self._numbers = itertools.count(1)
        self._held: dict[str, tuple[ObjectInfo, bytes]] = {}

    @property
    def conditional(self) -> bool:
        return True

    def probe(self) -> None:
        pass

    def clear(self) -> None:
        self._held.clear()

    def head(self, key: str) -> ObjectInfo | None:
        found = self._found(key)
        return found and found[0]

    def put(self, key: str, body: BinaryIO, put: PutRequest) -> str:
        return self.write(key, body, put).etag

    @contextmanager
    def open(self, key: str, etag: str | None = None) -> Iterator[BinaryIO | None]:
        found = self._found(key)
        if found and etag not in (None, found[0].etag):
            raise Conflict(f"{key}: is no longer {etag}")
        yield found and io.BytesIO(found[1])

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        for key in sorted(self._held):
            if key.startswith(prefix):
                yield self._held[key][0]

    def batches(self, prefix: str, objects: int) -> Iterator[ListingBatch]:
        del objects
        return in_batches(self.list(prefix))

    def delete(self, key: str) -> None:
        with self._turn:
            self._held.pop(key if self._found(key) else check_key(key), None)

    def _found(self, key: str) -> tuple[ObjectInfo, bytes] | None:
        found = self._held.get(key)
        if found is None:
            check_key(key)
        return found

    def properties(self, key: str) -> ObjectInfo | None:
        return self.head(key)

    def write(self, key: str, body: ReadableBody, put: PutRequest) -> StoredObject:
        check_key(key)
        data = b"".join(iter(lambda: body.read(1 << 16), b""))
        with self._turn:
            held = self._held.get(key)
            if put.expected not in (None, held[0].etag if held else ""):
                raise Conflict(f"{key}: is not {put.expected}")
            metadata = {name.lower(): value for name, value in put.metadata.items()}
            etag = f'"{next(self._numbers)}"'
            info = ObjectInfo(key, len(data), etag, datetime.now(UTC), put.content_type, metadata, dict(put.headers))
            self._held[key] = (info, data)
        return StoredObject(etag, len(data))

    def patch(self, held: ObjectInfo, offset: int, body: ReadableBody) -> StoredObject:
        with self.open(held.key, held.etag) as old:
            if old is None:
                raise Conflict(f"{held.key}: is gone")
            whole = bytearray(old.read())
        new = b"".join(iter(lambda: body.read(1 << 16), b""))
        whole[offset : offset + len(new)] = new
        return self.write(
            held.key, io.BytesIO(bytes(whole)), PutRequest(held.content_type, held.metadata, held.etag, held.headers)
        )

    @contextmanager
    def open_span(self, held: ObjectInfo, first: int, count: int) -> Iterator[ReadableBody]:
        with self.open(held.key, held.etag) as stream:
            if stream is None:
                raise Conflict(f"{held.key}: is gone")
            yield io.BytesIO(stream.read()[first : first + count])

    def page(self, question: ListingRequest) -> ListingPage:
        return page_of(self.list(question.prefix), question)
