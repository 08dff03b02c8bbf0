"""Transfers of an S3 bucket: bodies in parts, patches from copied parts, pages, links; cleanup of abandoned uploads.

Why not boto3's own `upload_fileobj`: it completes without a condition, and cannot copy parts of the old version.
Measured (docs/benchmarks.md, /s3): 0.9 to 1.7 of the SDK's speed with 40 MiB of memory instead of 80, and a patch of
one byte in a third of the time of get, splice, put, with 10 MiB instead of twice the object.

Invariants: an object is replaced in one operation of the store, a PutObject or a Complete, under the condition it was
begun with; no upload outlives its `with` block; parts in flight, and uploads that hold one, are bounded over all
uploads together, and so is memory; a failure of the last operation counts only if the object that is there afterwards
is not ours.
"""

import io
import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from contextvars import copy_context
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from http import HTTPStatus
from typing import Any
from uuid import uuid4

from app.core.errors import AppError, Conflict, Permanent, Rejected, Transient
from app.object_store.port import (
    AGAIN_HINT,
    MARK,
    TAG_COUNT,
    TAGS,
    ListingPage,
    ListingRequest,
    ObjectInfo,
    PutRequest,
    ReadableBody,
    StoredObject,
    check_characters,
    check_key,
)
from app.object_store.s3 import OTHER_ETAG, S3Store, check_headers, check_unicode, condition_of, put_arguments
from app.object_store.s3_client import client_error, code_of, following, infos_of, status_of

MIB = 1 << 20
MOST_PARTS = 10_000
# Up to 31 GiB all parts but the last have the same size, which some stores require; then they grow, up to 171 GiB.
GROWTH = ((4_000, 8 * MIB), (7_000, 16 * MIB), (MOST_PARTS, 32 * MIB))
PARTS_OF_OLD = 4_000
LARGE_BYTES = MIB
STEP_BYTES = MIB
AT_ONCE = 4
LARGE_AT_ONCE = 6
COMPLETING = 64
WAIT_SECONDS = 30.0
NO_COPIES = (HTTPStatus.METHOD_NOT_ALLOWED, HTTPStatus.NOT_IMPLEMENTED)

log = logging.getLogger(__name__)


class S3Transfers:
    """Transfers of `store`'s bucket."""

    def __init__(self, store: S3Store) -> None:
        self._store = store
        self._services = UploadPool()
        self._turn = threading.Lock()
        self._guards_parts: bool | None = None

    def close(self) -> None:
        """Stop the threads. Idempotent."""
        self._services.close()

    def properties(self, key: str) -> ObjectInfo | None:
        """HeadObject, and GetObjectTagging if there are tags."""
        info = self._store.head(key)
        if info is None or TAG_COUNT not in info.headers:
            return info
        return replace(info, headers={**info.headers, TAGS: self._store.tags(key)})

    def write(self, key: str, body: ReadableBody, put: PutRequest) -> StoredObject:
        """PutObject for a body that fits into one part, otherwise a multipart upload."""
        return self._sent(key, put, lambda upload: upload.take(body))

    def patch(self, held: ObjectInfo, offset: int, body: ReadableBody) -> StoredObject:
        """Large unchanged ranges are copied by the store itself; the rest is read and sent again."""
        metadata = {name: value for name, value in held.metadata.items() if name != MARK}
        put = PutRequest(held.content_type, metadata, held.etag, held.headers)

        def fill(upload: S3Upload) -> None:
            upload.least_part_bytes = -(-held.size_bytes // PARTS_OF_OLD // MIB) * MIB
            upload.keep(held, 0, offset)
            end = offset + upload.take(body)
            upload.keep(held, end, held.size_bytes - end, last=True)

        return self._sent(held.key, put, fill)

    def open_span(self, held: ObjectInfo, first: int, count: int) -> AbstractContextManager[ReadableBody]:
        """GetObject with a range."""
        return self._store.open_span(held, first, count) if count > 0 else nullcontext(io.BytesIO())

    def page(self, question: ListingRequest) -> ListingPage:
        """ListObjectsV2. The continuation is the store's own token."""
        check_unicode(question.prefix)
        given = {"Delimiter": question.delimiter, "ContinuationToken": question.continuation}
        query: dict[str, Any] = {name: value for name, value in given.items() if value}
        query |= {"Prefix": question.prefix, "MaxKeys": question.limit}
        try:
            found = self._store.page(query)
        except Permanent as error:
            refused = error.__cause__
            is_answer = question.continuation and isinstance(refused, client_error())
            if not is_answer or status_of(refused) != HTTPStatus.BAD_REQUEST:
                raise
            hint = "start the listing again without it"
            raise Rejected(f"invalid continuation: {code_of(refused)}", hint) from error
        prefixes = [entry["Prefix"] for entry in found.get("CommonPrefixes", ())]
        # SeaweedFS treats `a//` as `a/`
        prefixes = [prefix for prefix in prefixes if prefix.startswith(question.prefix)]
        more = following(found, query)
        return ListingPage(infos_of(found, question.prefix), prefixes, more["ContinuationToken"] if more else "")

    def link(self, key: str, seconds: int, disposition: str) -> str:
        """A presigned GetObject. If made with temporary credentials, it expires with them."""
        check_characters(key)
        place = {"Bucket": self._store.target.bucket, "Key": key, "ResponseContentDisposition": disposition}
        with self._store.translated(key):
            return str(self._store.client().generate_presigned_url("get_object", Params=place, ExpiresIn=seconds))

    def form(self, key: str, content_type: str, sizes: range, seconds: int) -> tuple[str, Mapping[str, str]]:
        """A presigned POST of one file with exactly this key and type and a size in `sizes`: URL and form fields."""
        fields = {"Content-Type": content_type, **self._store.target.encryption}
        conditions = [*({name: value} for name, value in fields.items()), ["content-length-range", sizes[0], sizes[-1]]]
        with self._store.translated(key):
            made = self._store.client().generate_presigned_post(
                self._store.target.bucket, check_key(key), fields, conditions, seconds
            )
        return str(made["url"]), made["fields"]

    def _sent(self, key: str, put: PutRequest, fill: "Callable[[S3Upload], Any]") -> StoredObject:
        """Write the object that `fill` assembles, with a mark that identifies this write."""
        check_key(key)
        # If the response of the last operation is lost, the mark on the current object tells whether it succeeded.
        put = replace(put, metadata={**put.metadata, MARK: uuid4().hex})
        check_headers(key, put)
        with ExitStack() as stack:
            upload = S3Upload(self._store, self._services, key, put, stack)
            fill(upload)
            if not upload.has_parts:
                return self._put(key, upload.rest(), put)
            guarded = put.expected is not None and self._guards()
            return replace(upload.complete(guarded=guarded), guarded=guarded or put.expected is None)

    def _put(self, key: str, data: bytearray, put: PutRequest) -> StoredObject:
        guarded = put.expected is None or self._store.conditional
        try:
            etag, version_id = self._store.put_version(key, data, put)
        except AppError as error:
            return StoredObject(confirm_lost_answer(self._store, key, put, error).etag, len(data), None, guarded)
        return StoredObject(etag, len(data), version_id, guarded)

    def _guards(self) -> bool:
        """Whether the store checks conditions at a Complete; some only do at a PutObject. Tested once."""
        with self._turn:
            if self._guards_parts is None:
                self._guards_parts = self._store.conditional and honours_conditions(self._store, self._store.probe_key)
            return self._guards_parts


def confirm_lost_answer(store: S3Store, key: str, put: PutRequest, error: AppError) -> ObjectInfo:
    """The object, if it is from this write, whose response was lost; otherwise raises `error`."""
    with suppress(AppError):
        found = store.head(key)
        if found is not None and found.metadata.get(MARK) == put.metadata[MARK]:
            return found
    raise error


def honours_conditions(store: S3Store, key: str) -> bool:
    """Whether a Complete with a wrong condition is refused, tested on an object of our own at `key`."""
    put = PutRequest("text/plain", {MARK: uuid4().hex}, OTHER_ETAG)
    services = UploadPool(1, 1)
    store.put(key, io.BytesIO(b"probe"), PutRequest("text/plain"))
    try:
        with ExitStack() as stack:
            upload = S3Upload(store, services, key, put, stack)
            upload.take(io.BytesIO(b"probe"))
            upload.complete(guarded=True)
    except Conflict:
        return True
    finally:
        services.close()
        with suppress(AppError):  # without the right to delete, the object is left to the probes
            store.delete(key)
    return False


def part_bytes(number: int) -> int:
    """The size of part `number`, counted from 1. Raises Rejected when there can be no such part."""
    for last, size_bytes in GROWTH:
        if number <= last:
            return size_bytes
    raise Rejected("the object would have more than 10,000 parts", "send it with the store's own tools")


class UploadPool:
    """Threads and memory shared by all uploads to one store."""

    def __init__(
        self, at_once: int = AT_ONCE, large_at_once: int = LARGE_AT_ONCE, wait_seconds: float = WAIT_SECONDS
    ) -> None:
        self._wait_seconds = wait_seconds
        self._parts = threading.BoundedSemaphore(at_once)
        self._large = threading.BoundedSemaphore(large_at_once)
        self._threads = ThreadPoolExecutor(at_once, "s3-part")
        self._completing = [threading.Lock() for _ in range(COMPLETING)]
        self.copies: bool | None = None
        """Whether the store copies parts itself; None before the first one."""

    @contextmanager
    def place(self) -> Iterator[None]:
        """A permit to hold a part in memory. Raises Transient when none becomes free in time."""
        if not self._large.acquire(timeout=self._wait_seconds):
            raise Transient("too many large uploads at once", "send the same request again later")
        try:
            yield
        finally:
            self._large.release()

    def completing(self, key: str) -> threading.Lock:
        """A lock for each key: SeaweedFS checks the version and creates the object in two steps."""
        return self._completing[hash(key) % COMPLETING]

    def start(self, call: Callable[[], Any]) -> "Future[Any]":
        """Run `call` in a thread as soon as there is room for one more part."""
        self._parts.acquire()
        with ExitStack() as undo:
            undo.callback(self._parts.release)
            future = self._threads.submit(copy_context().run, call)
            undo.pop_all()
        future.add_done_callback(lambda _: self._parts.release())
        return future

    def close(self) -> None:
        """Stop the threads. Idempotent."""
        self._threads.shutdown(wait=False, cancel_futures=True)


class S3Upload:
    """An object sent from front to back: a multipart upload once it outgrows a part, which is aborted when the block of
    `stack` raises. Not thread-safe.
    """

    def __init__(self, store: S3Store, services: UploadPool, key: str, put: PutRequest, stack: ExitStack) -> None:
        self._store, self._services, self._key, self._put, self._stack = store, services, key, put, stack
        self._held = bytearray()  # allocated for a whole part once the object is large
        self._held_bytes = 0
        self._size_bytes = 0
        self._large = False
        self._place: Mapping[str, str] = {}  # of the multipart upload, once it has begun
        self._sent: list[Future[Any]] = []
        self._under_way: list[Future[Any]] = []
        self.least_part_bytes = 0

    @property
    def has_parts(self) -> bool:
        """Whether it has become a multipart upload."""
        return bool(self._place)

    def take(self, body: ReadableBody) -> int:
        """Append all of `body`; returns its size in bytes."""
        before = self._size_bytes
        while data := body.read(min(STEP_BYTES, self._room_bytes())):
            self._add(data)
        return self._size_bytes - before

    def keep(self, held: ObjectInfo, first: int, count: int, *, last: bool = False) -> None:
        """Append the bytes `[first, first + count)` of the version to be replaced; nothing unless `count` is positive.

        Whole parts are copied. Bytes that share a part with others are read, since all parts but the `last` have the
        same size.
        """
        started = min(self._room_bytes(), count) if self._held_bytes else 0
        self._read(held, first, started)
        copied = self._copy_parts(held, first + started, count - started, last=last) if count > 0 else 0
        self._read(held, first + started + copied, count - started - copied)

    def _read(self, held: ObjectInfo, first: int, count: int) -> None:
        if count > 0:
            with self._store.open_span(held, first, count) as stream:
                self.take(stream)

    def _copy_parts(self, held: ObjectInfo, first: int, count: int, *, last: bool) -> int:
        """The number of bytes that the store copied; fewer than `count` if they do not fill a part, or if it cannot
        copy.
        """
        copied = 0
        while (size_bytes := self._room_bytes()) <= count - copied or (copied and last and copied < count):
            size_bytes = min(size_bytes, count - copied)
            if not self._copy_part(held, first + copied, size_bytes):
                break
            copied += size_bytes
            self._size_bytes += size_bytes
        return copied

    def _room_bytes(self) -> int:
        return max(part_bytes(len(self._sent) + 1), self.least_part_bytes) - self._held_bytes

    def _add(self, data: bytes) -> None:
        end = self._held_bytes + len(data)
        if end > LARGE_BYTES and not self._large:
            self._stack.enter_context(self._services.place())
            self._large = True
        if self._large and end > len(self._held):
            held, self._held = self._held, bytearray(self._held_bytes + self._room_bytes())
            self._held[: len(held)] = held
        self._held[self._held_bytes : end] = data
        self._held_bytes = end
        self._size_bytes += len(data)
        if not self._room_bytes():
            self._start("upload_part", {"Body": self.rest()})

    def rest(self) -> bytearray:
        """Take the bytes that were not sent yet."""
        held, count = self._held, self._held_bytes
        self._held, self._held_bytes = bytearray(), 0
        if count < len(held):
            del held[count:]  # shrinks without a copy
        return held

    def _copy_part(self, held: ObjectInfo, first: int, count: int) -> bool:
        """Have the store copy the next part from the version `held`; False when it does not support that."""
        if self._services.copies is False:
            return False
        source = {
            "CopySource": {"Bucket": self._store.target.bucket, "Key": held.key},
            "CopySourceRange": f"bytes={first}-{first + count - 1}",
            "CopySourceIfMatch": held.etag,
        }
        self._start("upload_part_copy", source)
        # Wait for the first copy, which tells whether the store supports it.
        if self._services.copies is None:
            self._services.copies = self._sent[-1].result() is not None
            if not self._services.copies:
                self._sent.pop()
        return self._services.copies

    def _start(self, operation: str, given: Mapping[str, Any]) -> None:
        """Send the next part in another thread; the first one begins the multipart upload."""
        number = len(self._sent) + 1
        part_bytes(number)  # raises for an invalid number
        if not self._place:
            place = {"Bucket": self._store.target.bucket, "Key": self._key}
            with self._store.translated(self._key):
                begun = self._store.client().create_multipart_upload(
                    **place, **put_arguments(self._put, self._store.target)
                )
                self._place = {**place, "UploadId": begun["UploadId"]}
            self._stack.push(lambda kind, *_: self._abort() if kind else None)
        for future in self._under_way:
            if future.done():
                future.result()  # raise the error of a finished part early
        self._under_way = [future for future in self._under_way if not future.done()]
        self._sent.append(self._services.start(partial(self._part, operation, number, given)))
        self._under_way.append(self._sent[-1])

    def _part(self, operation: str, number: int, given: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """The part's entry for Complete; None when the store does not support the operation."""
        copies = "CopySource" in given
        with self._store.translated(self._key, replaces=copies):
            try:
                answer = getattr(self._store.client(), operation)(**self._place, PartNumber=number, **given)
            except client_error() as error:
                if copies and self._services.copies is None and status_of(error) in NO_COPIES:
                    return None
                raise
            told = answer.get("CopyPartResult", answer)
            sums = {name: told[name] for name in told if name.startswith("Checksum") and name != "ChecksumType"}
            return {"PartNumber": number, "ETag": told["ETag"], **sums}

    def complete(self, *, guarded: bool) -> StoredObject:
        """Send the rest and turn the parts into the object. `guarded`: the store is known to check the version."""
        if self._held_bytes or not self._place:
            self._start("upload_part", {"Body": self.rest()})
        # The error of any part is raised here, before anything is replaced.
        parts = [future.result() for future in self._sent]
        expected = self._put.expected
        with nullcontext() if expected is None else self._services.completing(self._key):
            if expected is not None and not guarded:
                self._store.compare(self._key, expected)
            try:
                answer = self._complete(parts, condition_of(expected) if guarded else {})
            except AppError as error:
                found = confirm_lost_answer(self._store, self._key, self._put, error)
                return StoredObject(found.etag, self._size_bytes, None, guarded)
        return StoredObject(answer["ETag"], self._size_bytes, answer.get("VersionId"), guarded)

    def _complete(self, parts: list[Mapping[str, Any]], condition: Mapping[str, str]) -> Any:
        """The SDK retries a Complete whose response was lost, but the store has dropped the upload by then."""
        with self._store.translated(self._key, replaces=bool(condition)):
            try:
                return self._store.client().complete_multipart_upload(
                    **self._place, MultipartUpload={"Parts": parts}, **condition
                )
            except client_error() as error:
                if code_of(error) == "NoSuchUpload":
                    raise Transient(f"{self._key}: another program ended the upload", AGAIN_HINT) from error
                raise

    def _abort(self) -> None:
        """Waits for parts in flight, since they would outlive the upload."""
        for future in [each for each in self._sent if not each.cancel()]:
            with suppress(AppError):
                future.result()
        try:
            abort_upload(self._store, self._key, self._place["UploadId"])
        except AppError as error:
            log.warning("parts of an upload stay behind until they are swept: %s", error)


def abort_upload(store: S3Store, key: str, upload_id: str) -> bool:
    """Abort an upload; False when it has already ended."""
    with store.translated(key):
        try:
            store.client().abort_multipart_upload(Bucket=store.target.bucket, Key=key, UploadId=upload_id)
        except client_error() as error:
            if code_of(error) not in ("NoSuchUpload", "404"):
                raise
            return False
    return True


# Parts that killed uploads left in a bucket: invisible, but charged.

SWEEP_HINT = (
    "let the key list and abort multipart uploads (s3:ListBucketMultipartUploads, s3:AbortMultipartUpload), "
    "or set S3_SWEEP_HOURS=0"
)


def abort_stale_uploads(store: S3Store, before: datetime, ours: Callable[[str], bool]) -> int:
    """Abort multipart uploads begun before `before` under keys that are `ours`; returns how many. Uploads that end
    meanwhile are not counted.
    """
    try:
        old = [
            (upload["Key"], upload["UploadId"])
            for upload in _uploads(store)
            if upload["Initiated"].astimezone(UTC) < before and ours(upload["Key"])
        ]
        return sum(abort_upload(store, key, upload_id) for key, upload_id in old)
    except Permanent as error:
        raise Permanent(error.message, SWEEP_HINT) from error


def _uploads(store: S3Store) -> Iterator[Any]:
    with store.translated("listing of multipart uploads"):
        for page in store.client().get_paginator("list_multipart_uploads").paginate(Bucket=store.target.bucket):
            yield from page.get("Uploads", ())


# Whether a bucket keeps old versions of its objects forever: then every replacement of an object adds cost.
#
# Source: the S3 API reference, GetBucketVersioning and GetBucketLifecycleConfiguration.

NO_RIGHT = "whether old versions are kept cannot be seen: allow s3:GetBucketVersioning and s3:GetLifecycleConfiguration"
KEPT = "old versions are kept for ever: add a lifecycle rule with NoncurrentVersionExpiration"


def note_of_versions(store: S3Store, prefix: str) -> str:
    """A warning for a bucket with versions that no lifecycle rule removes below `prefix`; "" when all is well.

    Raises Transient. A store without versioning support has no versions.
    """
    try:
        versions = _answer(store, "get_bucket_versioning", HTTPStatus.NOT_IMPLEMENTED)
        if versions.get("Status") != "Enabled":
            return ""
        rules = _answer(store, "get_bucket_lifecycle_configuration", HTTPStatus.NOT_FOUND).get("Rules", ())
        return "" if removes_old_versions(rules, prefix) else KEPT
    except Permanent:
        return NO_RIGHT


def removes_old_versions(rules: Sequence[Mapping[str, Any]], prefix: str) -> bool:
    """True when one of the lifecycle rules removes old versions of everything below `prefix`."""
    for rule in rules:
        only = rule.get("Filter") or {"Prefix": rule.get("Prefix", "")}
        is_for_all = set(only) <= {"Prefix"} and f"{prefix}/".lstrip("/").startswith(only.get("Prefix", ""))
        if rule.get("Status") == "Enabled" and is_for_all and "NoncurrentVersionExpiration" in rule:
            return True
    return False


def _answer(store: S3Store, method: str, nothing: HTTPStatus) -> Mapping[str, Any]:
    """The store's response about its bucket; empty if it responds with the status `nothing`."""
    with store.translated(f"bucket {store.target.bucket!r}"):
        try:
            found: Mapping[str, Any] = getattr(store.client(), method)(Bucket=store.target.bucket)
        except client_error() as error:
            if status_of(error) != nothing or code_of(error) == "NoSuchBucket":
                raise
            return {}
    return found
