"""The object store ports: whole objects replaced by compare-and-swap, and transfers of bodies and parts.

Back ends: `local.LocalDirectory` implements both; `s3.S3Store` and `s3_multipart.S3Transfers`; in the tests
`MemoryObjects`. Their methods are in the order of the ports, so that they can be compared.

Invariants of every implementation: a reader sees a whole object or none, never a part; a write either stores all bytes
with their metadata or changes nothing; an ETag is compared exactly as received and differs after each change of
content. For transfers also: memory is bounded whatever the size; a change replaces only the version that it was based
on, and `guarded` says whether the store itself checked that.
"""

import binascii
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import partial
from itertools import groupby, islice
from typing import BinaryIO, Protocol

from app.core.errors import Conflict, Rejected

MAX_KEY_BYTES = 1024
MAX_PAGE = 1000
BATCH = 1000
AGAIN_HINT = "no action needed; it is retried"
MARK = "headwater-write"
"""Metadata that identifies the write that made an object; not shown to readers."""
STORAGE_CLASS = "x-amz-storage-class"
TAGS, TAG_COUNT = "x-amz-tagging", "x-amz-tagging-count"
CONTENT_HEADERS = ("content-encoding", "cache-control", "content-disposition", "content-language", "expires")
"""An object's properties besides its type: these, TAGS (as in a URL) and how S3 stores the object."""
CONTROL = frozenset(map(chr, (*range(0x20), 0x7F)))


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """The properties of an object, without its bytes. Names in `metadata` and `headers` (see CONTENT_HEADERS) are lower
    case ASCII; listings leave both empty.
    """

    key: str
    size_bytes: int
    etag: str
    modified_at: datetime
    content_type: str = "application/octet-stream"
    metadata: Mapping[str, str] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)

    def number(self, name: str) -> int | None:
        """An integer from the metadata; None if missing or not a number, as in an object put there by a person."""
        text = self.metadata.get(name, "")
        return int(text) if text.isascii() and text.isdigit() else None


@dataclass(frozen=True, slots=True)
class ListingBatch:
    """Some objects of a listing, read on demand. Batches of one store with the same digest hold the same objects in the
    same versions; an empty digest says nothing.
    """

    digest: bytes
    infos: Callable[[], Sequence[ObjectInfo]]


@dataclass(frozen=True, slots=True)
class PutRequest:
    """What to store and under which condition.

    `expected`: an ETag that the object must still have; "" = the object must not exist; None = unconditional.
    `headers`: see CONTENT_HEADERS; a store leaves out those it does not know, as TAG_COUNT.
    """

    content_type: str
    metadata: Mapping[str, str] = field(default_factory=dict)
    expected: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)


class ObjectStore(Protocol):
    """All methods are safe to repeat and thread-safe.

    They raise Transient (retry), Permanent (credentials, missing bucket), Rejected (the key cannot be used) and
    Conflict (the condition does not hold).

    One rule for keys: `put` accepts what `check_key` accepts; case and Unicode stay unchanged. Any other key, which an
    older version or another program made, is read, queried and deleted only if a listing has exactly that key;
    otherwise BadKey, since stores may resolve such keys to others.
    """

    @property
    def conditional(self) -> bool:
        """True when `probe` found that the store honours conditions; False before it has run."""

    @property
    def segment_bytes(self) -> int:
        """The longest part of a key between slashes, in bytes of UTF-8, that the store can hold."""

    def probe(self) -> None:
        """Check that the store can be reached and written, and whether it honours conditions."""

    def head(self, key: str) -> ObjectInfo | None:
        """The object's properties; None when it does not exist."""

    def put(self, key: str, body: BinaryIO, put: PutRequest) -> str:
        """Store the rest of `body` (seekable) and return the new ETag.

        Raises Conflict when `put.expected` does not hold, possibly because of our own earlier write whose response was
        lost: compare metadata. With "" or an ETag on a store that is not `conditional`, a HEAD before the write is the
        check.
        """

    def open(self, key: str, etag: str | None = None) -> AbstractContextManager[BinaryIO | None]:
        """A stream over the bytes, None when the object does not exist; Conflict when it no longer has that ETag.

        An interrupted body is resumed or raises Transient; it never ends early without an error.
        """

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """Every object whose key starts with `prefix`, in UTF-8 order, over all pages. A failed page is an error."""

    def batches(self, prefix: str, objects: int) -> Iterator[ListingBatch]:
        """The same objects in batches, in no order; `objects` is the expected number. Cheaper than `list` for a caller
        that knows most batches by their digests, and faster over a network.
        """

    def delete(self, key: str) -> None:
        """Delete the object; does nothing when it does not exist."""


def in_batches(infos: Iterator[ObjectInfo]) -> Iterator[ListingBatch]:
    """A listing in batches without digests."""
    while some := list(islice(infos, BATCH)):
        yield ListingBatch(b"", partial(list, some))


class BadKey(Rejected):
    """A key that some store would refuse or resolve to another one."""


def check_key(key: str) -> str:
    """Returns `key` if a new object may have it. Raises BadKey for what some store rewrites, refuses or resolves: an
    empty key, over 1024 bytes of UTF-8, invalid Unicode, a backslash (SeaweedFS: a slash), an empty, `.` or `..`
    segment, thus also a slash at either end, control characters.
    """
    segments = key.split("/")
    if not key or any(segment in ("", ".", "..") for segment in segments):
        raise BadKey(f"object key {key!r} has an empty, '.' or '..' segment", "use plain names between single slashes")
    if "\\" in key:
        raise BadKey(f"object key {key!r} holds a backslash, which some stores take for a slash", "use slashes")
    check_characters(key)
    return key


def check_characters(key: str) -> None:
    """Raises BadKey for text that no listing contains, whatever its segments are."""
    if not CONTROL.isdisjoint(key):
        raise BadKey(f"object key {key!r} holds a control character", "remove it")
    try:
        size_bytes = len(key.encode())
    except UnicodeEncodeError as error:
        raise BadKey(f"object key {key!r} is not valid Unicode", "use UTF-8 text") from error
    if size_bytes > MAX_KEY_BYTES:
        raise BadKey(f"object key {key[:60]!r}... is longer than {MAX_KEY_BYTES} bytes", "shorten it")


def date_of(text: str) -> datetime | None:
    """A date of an HTTP header in UTC; None for an invalid one."""
    try:
        at = parsedate_to_datetime(text)
        return at.astimezone(UTC) if at.tzinfo else at.replace(tzinfo=UTC)
    except (ValueError, OverflowError):
        return None


def is_new_form(key: str) -> bool:
    """Whether `check_key` accepts it."""
    try:
        check_key(key)
    except BadKey:
        return False
    return True


def normalized_key(key: str) -> str:
    """The key that the least careful store could resolve `key` to: backslashes become slashes, empty and `.` segments
    are dropped, `..` goes up. Keys of the form that new ones have are unchanged.
    """
    segments = key.replace("\\", "/").split("/")
    kept: list[str] = []
    for segment in segments:
        if segment == "..":
            del kept[-1:]
        elif segment not in ("", "."):
            kept.append(segment)
    folder = "/" if kept and segments[-1] in ("", ".", "..") else ""
    return "/".join(kept) + folder


class ReadableBody(Protocol):
    """A body. It need not be seekable, and blocks until data is available."""

    def read(self, count: int, /) -> bytes:
        """At most `count` bytes, `count` > 0; empty only at the end. An exception ends the transfer."""


@dataclass(frozen=True, slots=True)
class StoredObject:
    """The result of a write. `version_id` None = the store keeps no versions.

    `guarded` False: the store ignores conditions, so the version was only checked before it was replaced.
    """

    etag: str
    size_bytes: int
    version_id: str | None = None
    guarded: bool = True


@dataclass(frozen=True, slots=True)
class ListingRequest:
    """What to list. Keys with `delimiter` after the prefix are grouped into the part up to and including it; "" = none.

    `continuation` comes from the previous page; "" = the first page. `limit` counts keys and grouped prefixes.
    """

    prefix: str = ""
    delimiter: str = ""
    limit: int = MAX_PAGE
    continuation: str = ""


@dataclass(frozen=True, slots=True)
class ListingPage:
    """One page of a listing. `continuation` "" = the last one."""

    objects: Sequence[ObjectInfo]
    prefixes: Sequence[str] = ()
    continuation: str = ""


class Transfers(Protocol):
    """Raises what the object store raises; thread-safe."""

    def properties(self, key: str) -> ObjectInfo | None:
        """As the store's `head`, and its tags."""

    def write(self, key: str, body: ReadableBody, put: PutRequest) -> StoredObject:
        """Store a whole body under the condition of `put`. Raises Conflict, but not for our own write whose response
        was lost.
        """

    def patch(self, held: ObjectInfo, offset: int, body: ReadableBody) -> StoredObject:
        """Overwrite from `offset` on, at most the size of `held`; the other bytes stay, and so do type, headers and
        metadata.

        `held` comes from `properties`. Raises Conflict when that version is no longer there.
        """

    def open_span(self, held: ObjectInfo, first: int, count: int) -> AbstractContextManager[ReadableBody]:
        """The bytes `[first, first + count)` of exactly this version; Conflict when it is gone, never fewer bytes."""

    def page(self, question: ListingRequest) -> ListingPage:
        """One page. Raises Rejected for an invalid continuation."""


# Shared by back ends: a part of a file, and pages of a store that lists its keys in order.


class LimitedBody:
    """The next `count` bytes of a stream, as a body."""

    def __init__(self, stream: BinaryIO, count: int) -> None:
        self._stream = stream
        self._left = count

    def read(self, count: int, /) -> bytes:
        """See `ReadableBody`. Raises Conflict when the stream ends early because somebody truncated the file."""
        if not self._left:
            return b""
        data = self._stream.read(min(count, self._left))
        if not data:
            raise Conflict("the file became shorter while it was read", AGAIN_HINT)
        self._left -= len(data)
        return data


def page_of(found: Iterable[ObjectInfo], question: ListingRequest) -> ListingPage:
    """One page of objects in UTF-8 order of their keys, all with the prefix. Raises Rejected."""
    try:
        after = urlsafe_b64decode(question.continuation.encode())
        after.decode()
    except (binascii.Error, ValueError) as error:
        raise Rejected("invalid continuation", "start the listing again without it") from error
    objects: list[ObjectInfo] = []
    prefixes: list[str] = []
    last = ""
    for rolled, group in groupby(found, lambda info: _rolled(info.key, question)):
        for info in group:
            name = rolled or info.key
            # compare bytes, the order of the listing
            if name.encode() <= after:
                continue
            if len(objects) + len(prefixes) == question.limit:
                return ListingPage(objects, prefixes, urlsafe_b64encode(last.encode()).decode())
            last = name
            if rolled:
                prefixes.append(rolled)
                break
            objects.append(info)
    return ListingPage(objects, prefixes)


def _rolled(key: str, question: ListingRequest) -> str:
    """The common prefix that groups `key`; "" when it is listed itself."""
    if not question.delimiter:
        return ""
    head, delimiter, _ = key[len(question.prefix) :].partition(question.delimiter)
    return f"{question.prefix}{head}{delimiter}" if delimiter else ""
