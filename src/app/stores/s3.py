"""The object store port on S3 and on stores that speak its protocol.

Invariants: no exception of the SDK leaves this module; a conditional write is sent with its condition, so the store
decides it atomically; a read stays on the version it began with, however often it has to be resumed.
Where a fact about the protocol is used, it comes from the S3 API reference or was seen on a real server.
"""

import io
import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from datetime import UTC, timedelta
from functools import partial
from http import HTTPStatus
from typing import Any, BinaryIO

from app.core.errors import Conflict, Permanent, Rejected, Transient
from app.stores.objects import ObjectInfo, Put, check_key
from app.stores.s3_client import (
    BUSY,
    REACH_HINT,
    READ_HINT,
    STYLE_HINT,
    S3Target,
    code_of,
    make_client,
    status_of,
    translated,
)

MAX_PUT_BYTES = 5 << 30
MAX_METADATA_BYTES = 2048
RESUMES = 8
READ_BYTES = 1 << 18
BUSY_ATTEMPTS = 4
CONDITION_ANSWERS = (HTTPStatus.PRECONDITION_FAILED, HTTPStatus.BAD_REQUEST, HTTPStatus.NOT_IMPLEMENTED)
PROBE_FOLDER = ".headwater-probe"
LEFTOVER = timedelta(hours=1)
OTHER_ETAG = '"00000000000000000000000000000000"'

log = logging.getLogger(__name__)


class S3Store:
    """Objects of one bucket. `probe_key` names the object that `probe` writes and removes; each process has its own.

    Before `probe` has run, a condition is both sent and checked by a HEAD; where `probe` saw it ignored, only checked.
    """

    def __init__(self, target: S3Target, probe_key: str) -> None:
        self._target = target
        self._probe_key = check_key(probe_key)
        self._honours: bool | None = None
        self._bucket_seen = False
        self._lock = threading.Lock()
        self._made: Any = None

    @property
    def conditional(self) -> bool:
        """True when `probe` saw wrong conditions refused and a right one taken."""
        return self._honours is True

    def close(self) -> None:
        """Close idle connections. The store may be used again afterwards."""
        with self._lock:
            client, self._made = self._made, None
        if client is not None:
            client.close()

    def probe(self) -> None:
        """Look into the bucket, write, and try each condition on the probe object.

        A listing stands for HeadBucket: it needs no right outside the prefix, and its errors say what is wrong.
        """
        self._bucket_seen = False
        self._see_bucket(self._probe_key.rpartition("/")[0])
        etag = self._send(self._probe_key, _Rest(io.BytesIO(b"probe")), Put("text/plain"), {})
        try:
            self._honours = (
                self._status_of({"IfNoneMatch": "*"}) == HTTPStatus.PRECONDITION_FAILED
                and self._status_of({"IfMatch": OTHER_ETAG}) == HTTPStatus.PRECONDITION_FAILED
                and self._status_of({"IfMatch": etag}) == HTTPStatus.OK
            )
        finally:
            self._remove_probes()

    def head(self, key: str) -> ObjectInfo | None:
        """HeadObject."""
        _check(key)
        found = self._unless_missing(key, lambda: self._client().head_object(Bucket=self._target.bucket, Key=key))
        if found is None:
            return None
        with self._translated(key):
            return replace(
                _info(key, found["ContentLength"], found),
                content_type=found.get("ContentType", "application/octet-stream"),
                metadata={name.lower(): value for name, value in found.get("Metadata", {}).items()},
            )

    def put(self, key: str, body: BinaryIO, put: Put) -> str:
        """One PutObject, up to 5 GiB. Metadata: printable ASCII without outer spaces, 2 KB in all, else Rejected."""
        _check(key)
        _check_headers(key, put)
        rest = _Rest(body)
        if rest.size_bytes > MAX_PUT_BYTES:
            raise Rejected(
                f"{key}: {rest.size_bytes} bytes are more than the 5 GiB that one upload may have",
                "set EXPORT_WINDOW_SECONDS to a shorter window",
            )
        if put.expected is not None and not self.conditional:
            self._compare(key, put.expected)
        return self._send(key, rest, put, {} if self._honours is False else _condition(put.expected))

    @contextmanager
    def open(self, key: str, etag: str | None = None) -> Iterator[BinaryIO | None]:
        """GetObject. A body that breaks off is asked for from there on, under the condition of the same ETag."""
        _check(key)
        answer = self._get(key, {} if etag is None else {"IfMatch": etag})
        if answer is None:
            yield None
            return
        with self._translated(key):
            raw = _Resumed(key, answer, partial(self._get_rest, key, answer["ETag"]))
        with io.BufferedReader(raw, READ_BYTES) as stream:
            yield stream

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """ListObjectsV2, in the order of the store: S3's is UTF-8; SeaweedFS sorts a slash before all else."""
        _check_unicode(prefix)
        what = f"listing of {prefix!r}"
        question: dict[str, Any] = {"Bucket": self._target.bucket, "Prefix": prefix, "MaxKeys": self._target.page_keys}
        while True:
            with self._translated(what):
                page = self._client().list_objects_v2(**question)
                found = [_info(entry["Key"], entry["Size"], entry) for entry in page.get("Contents", ())]
                more = page["IsTruncated"]
            yield from (info for info in found if info.key.startswith(prefix))  # SeaweedFS takes `a//` for `a/`
            if not more:
                return
            token = page.get("NextContinuationToken")
            if not token or token == question.get("ContinuationToken"):
                raise Transient(f"{what}: the store says that there is more, and not how to get it", STYLE_HINT)
            question["ContinuationToken"] = token

    def delete(self, key: str) -> None:
        """DeleteObject; S3 answers the same whether or not there was one."""
        _check(key)
        self._unless_missing(key, lambda: self._client().delete_object(Bucket=self._target.bucket, Key=key))

    def _get(self, key: str, conditions: Mapping[str, str]) -> Any:
        def call() -> Any:
            return self._client().get_object(Bucket=self._target.bucket, Key=key, **conditions)

        return self._unless_missing(key, call)

    def _get_rest(self, key: str, etag: str, position: int) -> Any:
        answer = self._get(key, {"IfMatch": etag, "Range": f"bytes={position}-"})
        if answer is None:
            raise Conflict(f"{key}: was deleted while it was read", READ_HINT)
        if answer["ResponseMetadata"]["HTTPStatusCode"] != HTTPStatus.PARTIAL_CONTENT:
            answer["Body"].close()
            raise Transient(f"{key}: the store does not continue a download that broke off", REACH_HINT)
        return answer["Body"]

    def _unless_missing(self, key: str, call: Callable[[], Any]) -> Any:
        """The answer, None for a missing key. A 404 may mean the bucket or a wrong endpoint too: asked once."""
        from botocore.exceptions import ClientError

        with self._translated(key):
            try:
                return call()
            except ClientError as error:
                if status_of(error) != HTTPStatus.NOT_FOUND or code_of(error) == "NoSuchBucket":
                    raise
        self._see_bucket(key)
        return None

    def _see_bucket(self, prefix: str) -> None:
        if not self._bucket_seen:
            with self._translated(f"bucket {self._target.bucket!r}"):
                self._client().list_objects_v2(Bucket=self._target.bucket, Prefix=prefix, MaxKeys=1)
            self._bucket_seen = True

    def _compare(self, key: str, expected: str) -> None:
        held = self.head(key)
        found = "" if held is None else held.etag
        if found != expected:
            raise Conflict(f"{key}: expected {expected or 'no object'}, found {found or 'none'}", READ_HINT)

    def _send(self, key: str, body: "_Rest", put: Put, condition: Mapping[str, str]) -> str:
        """PutObject. Where it met another write under way, S3 asks to repeat it; before a replacement is repeated, its
        ETag would have to be read again, so that is a Conflict.
        """
        from botocore.exceptions import ClientError

        attempts_left = 1 if "IfMatch" in condition else BUSY_ATTEMPTS
        with self._translated(key, replaces="IfMatch" in condition):
            while True:
                attempts_left -= 1
                try:
                    return str(self._put_object(key, body, put, condition)["ETag"])
                except ClientError as error:
                    if code_of(error) not in BUSY or not attempts_left:
                        raise

    def _put_object(self, key: str, body: "_Rest", put: Put, condition: Mapping[str, str]) -> Any:
        body.seek(0)
        return self._client().put_object(
            Bucket=self._target.bucket,
            Key=key,
            Body=body,
            ContentType=put.content_type,
            Metadata=dict(put.metadata),
            **condition,
        )

    def _status_of(self, condition: Mapping[str, str]) -> int:
        """How the store answers a write of the probe object: 200, 412, or 400 and 501 where it knows no conditions."""
        from botocore.exceptions import ClientError

        with self._translated(self._probe_key):
            try:
                self._put_object(self._probe_key, _Rest(io.BytesIO(b"probe")), Put("text/plain"), condition)
            except ClientError as error:
                if status_of(error) not in CONDITION_ANSWERS:
                    raise
                return status_of(error)
        return HTTPStatus.OK

    def _remove_probes(self) -> None:
        """Ours, and in PROBE_FOLDER, which holds nothing else, those of processes that were killed in mid-probe."""
        folder = self._probe_key.rpartition("/")[0] + "/"
        try:
            if folder.endswith(f"{PROBE_FOLDER}/"):
                for key in old_probes(list(self.list(folder))):
                    self.delete(key)
            self.delete(self._probe_key)
        except Permanent as error:
            log.warning("the probe object stays in the bucket: %s", error)

    def _client(self) -> Any:
        with self._lock:
            if self._made is None:
                self._made = make_client(self._target)
            return self._made

    def _translated(self, what: str, *, replaces: bool = False) -> AbstractContextManager[None]:
        return translated(what, self._target, replaces=replaces)


class _Rest:
    """What is left of a stream, as a stream of its own: the SDK rewinds to 0 before it sends a body again."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._start = stream.tell()
        self.size_bytes = stream.seek(0, io.SEEK_END) - self._start
        stream.seek(self._start)

    def read(self, count: int = -1) -> bytes:
        return self._stream.read(count)

    def tell(self) -> int:
        return self._stream.tell() - self._start

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = self._start if whence == io.SEEK_SET else 0
        return self._stream.seek(offset + start, whence) - self._start


class _Resumed(io.RawIOBase):
    """A download that is asked for again from where it broke off, at most RESUMES times, and ends only at its size."""

    def __init__(self, key: str, answer: Mapping[str, Any], resume: Callable[[int], Any]) -> None:
        self._key = key
        self._body = answer["Body"]
        self._size_bytes: int = answer["ContentLength"]
        self._resume = resume
        self._position = 0
        self._resumes_left = RESUMES

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
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
        if not self.closed:
            self._body.close()
        super().close()


def _info(key: str, size_bytes: int, found: Mapping[str, Any]) -> ObjectInfo:
    return ObjectInfo(key, size_bytes, found["ETag"], found["LastModified"].astimezone(UTC))


def old_probes(probes: Sequence[ObjectInfo]) -> Sequence[str]:
    """Keys of probes that no process is still at; the newest of them tells the store's own time."""
    now_at = max((probe.modified_at for probe in probes), default=None)
    return [probe.key for probe in probes if now_at is not None and now_at - probe.modified_at > LEFTOVER]


def _check(key: str) -> None:
    check_key(key)
    _check_unicode(key)


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise Rejected(f"object key {text!r} is not valid Unicode", "use UTF-8 text") from error


def _check_headers(key: str, put: Put) -> None:
    """They travel as HTTP headers, where other characters are lost, changed or refused, depending on the store."""
    for text in (put.content_type, *put.metadata, *put.metadata.values()):
        if not (text.isascii() and text.isprintable() and text == text.strip()):
            raise Rejected(f"{key}: {text!r} cannot be object metadata", "use printable ASCII without outer spaces")
    if sum(len(name) + len(value) for name, value in put.metadata.items()) > MAX_METADATA_BYTES:
        raise Rejected(f"{key}: its metadata is longer than {MAX_METADATA_BYTES} bytes", "shorten it")


def _condition(expected: str | None) -> Mapping[str, str]:
    if expected is None:
        return {}
    return {"IfMatch": expected} if expected else {"IfNoneMatch": "*"}
