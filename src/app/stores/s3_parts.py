"""One object in parts: sent in parallel, completed in one step or aborted.

Invariants: no upload outlives its `with` block; parts that are under way, and uploads that hold one, are bounded over
all uploads together, so memory is as well; a failure of the last step is a failure only when the object that stands
there afterwards is not ours.
"""

import io
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from http import HTTPStatus
from typing import Any
from uuid import uuid4

from app.core.errors import AppError, Conflict, Rejected, Transient
from app.stores.objects import ObjectInfo, Put
from app.stores.s3 import S3Store, condition_of
from app.stores.s3_client import AGAIN_HINT, code_of, status_of
from app.stores.transfers import MARK, Stored

MIB = 1 << 20
MOST_PARTS = 10_000
# Up to 31 GiB all parts but the last are alike, which some stores ask for; then they grow, and 171 GiB fit.
GROWTH = ((4_000, 8 * MIB), (7_000, 16 * MIB), (MOST_PARTS, 32 * MIB))
AT_ONCE = 4
LARGE_AT_ONCE = 6
COMPLETING = 64
WAIT_SECONDS = 30.0
NO_COPIES = (HTTPStatus.METHOD_NOT_ALLOWED, HTTPStatus.NOT_IMPLEMENTED)

log = logging.getLogger(__name__)


def part_bytes(number: int) -> int:
    """How large part `number`, from 1, should be. Raises Rejected when there can be no such part."""
    for last, size_bytes in GROWTH:
        if number <= last:
            return size_bytes
    raise Rejected("the object would have more than 10,000 parts", "send it with the store's own tools")


def marked(put: Put) -> Put:
    """With a mark that tells the object of this very write from any other."""
    return replace(put, metadata={**put.metadata, MARK: uuid4().hex})


def settled(store: S3Store, key: str, put: Put, error: AppError) -> ObjectInfo:
    """The object, if it is that of this write, whose answer was lost; else raises `error`."""
    with suppress(AppError):
        found = store.head(key)
        if found is not None and found.metadata.get(MARK) == put.metadata[MARK]:
            return found
    raise error


class PartDesk:
    """What all uploads to one store share: threads and memory."""

    def __init__(
        self, at_once: int = AT_ONCE, large_at_once: int = LARGE_AT_ONCE, wait_seconds: float = WAIT_SECONDS
    ) -> None:
        self._wait_seconds = wait_seconds
        self._parts = threading.BoundedSemaphore(at_once)
        self._large = threading.BoundedSemaphore(large_at_once)
        self._threads = ThreadPoolExecutor(at_once, "s3-part")
        self._turn = threading.Lock()
        self._completing = [threading.Lock() for _ in range(COMPLETING)]
        self._places_taken = 0
        self._spare: list[bytearray] = []
        self.copies: bool | None = None
        """Whether the store copies parts itself; None before the first one."""

    @contextmanager
    def place(self) -> Iterator[None]:
        """The right to hold a part in memory. Raises Transient when none becomes free in time."""
        if not self._large.acquire(timeout=self._wait_seconds):
            raise Transient("too many large uploads at once", "send the same request again later")
        with self._turn:
            self._places_taken += 1
        try:
            yield
        finally:
            with self._turn:
                self._places_taken -= 1
                if not self._places_taken:
                    self._spare.clear()
            self._large.release()

    def buffer(self, size_bytes: int) -> bytearray:
        """Room for a part, used before if possible: fresh memory costs more than what is put into it."""
        with self._turn:
            while self._spare:
                if len(spare := self._spare.pop()) == size_bytes:
                    return spare
        return bytearray(size_bytes)

    def give_back(self, buffer: bytearray) -> None:
        """Let another part use `buffer`; kept only while somebody holds a place."""
        with self._turn:
            if self._places_taken:
                self._spare.append(buffer)

    def completing(self, key: str) -> threading.Lock:
        """One at a time for each key: SeaweedFS looks at the version and makes the object in two steps."""
        return self._completing[hash(key) % COMPLETING]

    def start(self, call: Callable[[], Any]) -> "Future[Any]":
        """Run `call` in a thread as soon as there is room for one more part."""
        self._parts.acquire()
        started = False
        try:
            future = self._threads.submit(call)
            started = True
        finally:
            if not started:
                self._parts.release()
        future.add_done_callback(lambda _: self._parts.release())
        return future

    def close(self) -> None:
        """End the threads. Idempotent."""
        self._threads.shutdown(wait=False, cancel_futures=True)


class S3Parts:
    """A multipart upload under way; see `begun`. Used from one thread."""

    def __init__(self, store: S3Store, desk: PartDesk, key: str, put: Put) -> None:
        self._store, self._desk, self._key, self._put = store, desk, key, put
        self._sent: list[Future[Any]] = []
        self._under_way: list[Future[Any]] = []
        self._upload_id = ""

    @property
    def number(self) -> int:
        """The number of the next part."""
        return len(self._sent) + 1

    def send(self, data: bytearray) -> None:
        """The next part. `data` is used again once it was sent."""
        self._start("upload_part", {"Body": data})

    def copy(self, held: ObjectInfo, first: int, count: int) -> bool:
        """The next part, which the store copies itself from the version `held`; False when it does not know how."""
        if self._desk.copies is False:
            return False
        source = {
            "CopySource": {"Bucket": self._store.target.bucket, "Key": held.key},
            "CopySourceRange": f"bytes={first}-{first + count - 1}",
            "CopySourceIfMatch": held.etag,
        }
        self._start("upload_part_copy", source)
        if self._desk.copies is None:
            self._desk.copies = self._sent[-1].result() is not None
            if not self._desk.copies:
                self._sent.pop()
        return self._desk.copies

    def _start(self, operation: str, given: Mapping[str, Any]) -> None:
        part_bytes(self.number)  # refuses a number that cannot be
        for future in self._under_way:
            if future.done():
                future.result()  # raises early what one of them met
        self._under_way = [future for future in self._under_way if not future.done()]
        place = self._place | {"PartNumber": self.number}
        self._sent.append(self._desk.start(lambda: self._sent_part(operation, place, given)))
        self._under_way.append(self._sent[-1])

    def _sent_part(self, operation: str, place: Mapping[str, Any], given: Mapping[str, Any]) -> Any:
        try:
            return self._part(operation, place, given)
        finally:
            if "Body" in given:
                self._desk.give_back(given["Body"])

    def _part(self, operation: str, place: Mapping[str, Any], given: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """What Complete has to know of the part; None when the store does not know the operation."""
        from botocore.exceptions import ClientError

        copies = "CopySource" in given
        with self._store.translated(self._key, replaces=copies):
            try:
                answer = getattr(self._store.client(), operation)(**place, **given)
            except ClientError as error:
                if copies and self._desk.copies is None and status_of(error) in NO_COPIES:
                    return None
                raise
            told = answer.get("CopyPartResult", answer)
            sums = {name: told[name] for name in told if name.startswith("Checksum") and name != "ChecksumType"}
            return {"PartNumber": place["PartNumber"], "ETag": told["ETag"], **sums}

    @property
    def _place(self) -> dict[str, Any]:
        return {"Bucket": self._store.target.bucket, "Key": self._key, "UploadId": self._upload_id}

    def begin(self) -> None:
        """CreateMultipartUpload."""
        with self._store.translated(self._key):
            answer = self._store.client().create_multipart_upload(
                Bucket=self._store.target.bucket,
                Key=self._key,
                ContentType=self._put.content_type,
                Metadata=dict(self._put.metadata),
            )
            self._upload_id = answer["UploadId"]

    def complete(self, size_bytes: int, *, guarded: bool) -> Stored:
        """Make the parts the object. `guarded`: the store is known to compare the version by itself."""
        parts = [future.result() for future in self._sent]
        expected = self._put.expected
        with nullcontext() if expected is None else self._desk.completing(self._key):
            if expected is not None and not guarded:
                self._store.compare(self._key, expected)
            try:
                answer = self._complete(parts, condition_of(expected) if guarded else {})
            except AppError as error:
                found = settled(self._store, self._key, self._put, error)
                return Stored(found.etag, size_bytes, None, guarded)
        return Stored(answer["ETag"], size_bytes, answer.get("VersionId"), guarded)

    def _complete(self, parts: list[Mapping[str, Any]], condition: Mapping[str, str]) -> Any:
        """The SDK repeats a Complete whose answer was lost, and the store has forgotten the upload by then."""
        from botocore.exceptions import ClientError

        with self._store.translated(self._key, replaces=bool(condition)):
            try:
                return self._store.client().complete_multipart_upload(
                    **self._place, MultipartUpload={"Parts": parts}, **condition
                )
            except ClientError as error:
                if code_of(error) == "NoSuchUpload":
                    raise Transient(f"{self._key}: the upload was ended by somebody else", AGAIN_HINT) from error
                raise

    def abort(self) -> None:
        """Give the parts back. Those under way are waited for, since they would outlive it."""
        for future in [each for each in self._sent if not each.cancel()]:
            with suppress(AppError):
                future.result()
        try:
            abort_upload(self._store, self._key, self._upload_id)
        except AppError as error:
            log.warning("parts of an upload stay behind until they are swept: %s", error)


@contextmanager
def begun(store: S3Store, desk: PartDesk, key: str, put: Put) -> Iterator[S3Parts]:
    """An upload that is aborted unless the block comes to its end."""
    parts = S3Parts(store, desk, key, put)
    parts.begin()
    complete = False
    try:
        yield parts
        complete = True
    finally:
        if not complete:
            parts.abort()


def abort_upload(store: S3Store, key: str, upload_id: str) -> bool:
    """False when it has ended meanwhile."""
    from botocore.exceptions import ClientError

    with store.translated(key):
        try:
            store.client().abort_multipart_upload(Bucket=store.target.bucket, Key=key, UploadId=upload_id)
        except ClientError as error:
            if code_of(error) not in ("NoSuchUpload", "404"):
                raise
            return False
    return True


def honours_conditions(store: S3Store, key: str) -> bool:
    """Whether a Complete under a wrong condition is refused, tried on an object of our own at `key`."""
    put = Put("text/plain", expected='"00000000000000000000000000000000"')
    desk = PartDesk(1, 1)
    store.put(key, io.BytesIO(b"probe"), Put("text/plain"))
    try:
        with begun(store, desk, key, marked(put)) as parts:
            parts.send(bytearray(b"probe"))
            parts.complete(5, guarded=True)
    except Conflict:
        return True
    finally:
        desk.close()
        with suppress(AppError):  # a key that may not delete leaves it to the probes
            store.delete(key)
    return False
