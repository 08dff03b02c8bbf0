"""The object store port on S3 and compatible stores; besides `dynamo_to_drive.source` the only user of boto3.

Invariants: SDK exceptions never leave this package; a conditional write is sent with its condition, so the store
decides it atomically; a read stays on the version it began with, however often it is resumed, and ends at the promised
size or raises. Facts about the protocol come from the S3 API reference or were observed on a real server.
"""

import io
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from functools import partial
from http import HTTPStatus
from typing import Any, BinaryIO
from urllib.parse import quote, urlencode

from app.core.errors import Conflict, Permanent, Rejected, Transient
from app.core.network import SharedClient
from app.core.windows import EPOCH
from app.object_store.port import (
    AGAIN_HINT,
    MAX_KEY_BYTES,
    STORAGE_CLASS,
    TAG_COUNT,
    TAGS,
    BadKey,
    ListingBatch,
    ObjectInfo,
    PutRequest,
    check_characters,
    check_key,
    date_of,
    is_new_form,
    normalized_key,
)
from app.object_store.s3_client import (
    BUSY,
    REACH_HINT,
    SSE,
    SSE_KMS_KEY,
    ListQuery,
    S3Target,
    batches,
    client_error,
    code_of,
    following,
    info_of,
    infos_of,
    make_client,
    status_of,
    take_entries,
    translate_s3_errors,
)

TOOLS_HINT = "use the store's own tools for this object"
CONDITION_ANSWERS = (HTTPStatus.PRECONDITION_FAILED, HTTPStatus.BAD_REQUEST, HTTPStatus.NOT_IMPLEMENTED)
STORED_HEADERS: Mapping[str, str] = {
    "content-encoding": "ContentEncoding",
    "cache-control": "CacheControl",
    "content-disposition": "ContentDisposition",
    "content-language": "ContentLanguage",
    "expires": "Expires",
    TAGS: "Tagging",
    STORAGE_CLASS: "StorageClass",
    SSE: "ServerSideEncryption",
    SSE_KMS_KEY: "SSEKMSKeyId",
    "x-amz-website-redirect-location": "WebsiteRedirectLocation",
}
"""What an object keeps besides its type and metadata, in S3's names and the SDK's."""
TAGS_HINT = "let the key read and write tags (s3:GetObjectTagging, s3:PutObjectTagging), or remove them from the object"
MAX_PUT_BYTES = 5 << 30
MAX_METADATA_BYTES = 2048
SMALL_BYTES = 1 << 20
READ_BYTES = 1 << 18
BUSY_ATTEMPTS = 4
RESUMES = 8
PROBE_FOLDER = ".headwater-probe"
LEFTOVER = timedelta(hours=1)
OTHER_ETAG = '"00000000000000000000000000000000"'

log = logging.getLogger(__name__)


class S3Store:
    """Objects of one bucket. `probe_key` names the object that `probe` writes and removes; each process has its own.

    Before `probe` has run, a condition is both sent and checked by a HEAD; if `probe` found it ignored, only checked.
    `translate_s3_errors(what)`: translates SDK exceptions raised in a block to ours.
    """

    def __init__(self, target: S3Target, probe_key: str) -> None:
        self.target = target
        self.translated = partial(translate_s3_errors, target=target)
        self.probe_key = check_key(probe_key)
        self.segment_bytes = MAX_KEY_BYTES
        self._honours: bool | None = None
        self._bucket_seen = False
        self.client = SharedClient(self._make)

    @property
    def conditional(self) -> bool:
        """True when `probe` saw wrong conditions refused and a right one accepted."""
        return self._honours is True

    def close(self) -> None:
        """Close idle connections. The store may be used again afterwards."""
        self.client.close()

    def probe(self) -> None:
        """List, write, and try each condition on the probe object.

        The listing replaces HeadBucket: it needs no right outside the prefix, and its errors say what is wrong.
        """
        self._bucket_seen = False
        self._see_bucket(self.probe_key.rpartition("/")[0])
        _, etag = self._probed({})
        try:
            # A store that ignores conditions accepts the wrong ones; one without support refuses the right one as well.
            self._honours = (
                self._probed({"IfNoneMatch": "*"})[0] == HTTPStatus.PRECONDITION_FAILED
                and self._probed({"IfMatch": OTHER_ETAG})[0] == HTTPStatus.PRECONDITION_FAILED
                and self._probed({"IfMatch": etag})[0] == HTTPStatus.OK
            )
        finally:
            self._remove_probes()

    def head(self, key: str) -> ObjectInfo | None:
        """HeadObject."""
        entry = self._entry(key)
        found = self._asked("head_object", key)
        if found is None:
            return None
        with self.translated(key):
            info = replace(
                info_of(key, found["ContentLength"], found),
                content_type=found.get("ContentType", "application/octet-stream"),
                metadata={name.lower(): value for name, value in found.get("Metadata", {}).items()},
                headers=headers_of(found),
            )
        if entry is not None and (entry.etag, entry.size_bytes) != (info.etag, info.size_bytes):
            raise BadKey(f"object key {key!r}: the store treats it as another object's", TOOLS_HINT)
        return info

    def put(self, key: str, body: BinaryIO, put: PutRequest) -> str:
        """One PutObject, up to 5 GiB. Metadata: printable ASCII without outer spaces, 2 KB in total, else Rejected."""
        rest = RemainingStream(body)
        if rest.size_bytes > MAX_PUT_BYTES:
            raise Rejected(
                f"{key}: {rest.size_bytes} bytes exceed the 5 GiB limit of one upload",
                "set EXPORT_WINDOW_SECONDS to a shorter window",
            )
        return self.put_version(key, bytearray(rest.read()) if rest.size_bytes <= SMALL_BYTES else rest, put)[0]

    def put_version(self, key: str, body: "bytearray | RemainingStream", put: PutRequest) -> tuple[str, str | None]:
        """As `put`; returns the new ETag and version id, None if the bucket keeps no versions.

        A bytearray is sent at once. For a stream, and for bytes too, the SDK first asks the store whether it would take
        the body (`Expect: 100-continue`): one more round trip, and thirty system calls.

        On a concurrent write S3 asks to retry. A replacement would have to re-read its ETag first, so there it is a
        Conflict.
        """
        check_key(key)
        check_headers(key, put)
        if put.expected is not None and not self.conditional:
            self.compare(key, put.expected)
        condition = {} if self._honours is False else condition_of(put.expected)
        attempts_left = 1 if "IfMatch" in condition else BUSY_ATTEMPTS
        with self.translated(key, replaces="IfMatch" in condition):
            while True:
                attempts_left -= 1
                try:
                    answer = self._send(key, body, put, condition)
                    return str(answer["ETag"]), answer.get("VersionId")
                except client_error() as error:
                    if code_of(error) not in BUSY or not attempts_left:
                        raise

    @contextmanager
    def open(self, key: str, etag: str | None = None) -> Iterator[BinaryIO | None]:
        """GetObject. An interrupted body is resumed from that position, on condition of the same ETag."""
        entry = self._entry(key)
        # For a key not in the new form, require the listed version: the store may resolve the key to another one.
        version = entry.etag if entry is not None and etag is None else etag
        answer = self._asked("get_object", key, **({} if version is None else {"IfMatch": version}))
        if answer is None:
            yield None
            return
        with self.translated(key):
            raw = ResumingDownload(key, answer, partial(self._get_rest, key, answer["ETag"], ""))
        with io.BufferedReader(raw, READ_BYTES) as stream:
            yield stream

    @contextmanager
    def open_span(self, held: ObjectInfo, first: int, count: int) -> Iterator[BinaryIO]:
        """The bytes `[first, first + count)`, `count` > 0, of exactly this version, resumed like a whole object."""
        rest = partial(self._get_rest, held.key, held.etag, str(first + count - 1))
        answer = {"Body": rest(first), "ContentLength": count}
        raw = ResumingDownload(held.key, answer, lambda position: rest(first + position))
        with io.BufferedReader(raw, READ_BYTES) as stream:
            yield stream

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """ListObjectsV2, in the order of the store: UTF-8 on S3; SeaweedFS sorts a slash before all else."""
        check_unicode(prefix)
        query: ListQuery | None = {"Prefix": prefix}
        while query is not None:
            page = self.page(query)
            yield from infos_of(page, prefix)
            query = following(page, query)

    def batches(self, prefix: str, objects: int) -> Iterator[ListingBatch]:
        """A page is a batch; the folders of a large listing are requested in parallel."""
        check_unicode(prefix)
        return batches(self.page, prefix, objects // self.target.page_keys)

    def page(self, query: ListQuery) -> Mapping[str, Any]:
        """One ListObjectsV2. `infos_of` parses its entries."""
        with self.translated(f"listing of {query['Prefix']!r}"):
            page: Mapping[str, Any] = self.client().list_objects_v2(
                **{"Bucket": self.target.bucket, "MaxKeys": self.target.page_keys, **query}
            )
        return page

    def delete(self, key: str) -> None:
        """DeleteObject; S3 responds the same whether or not the object existed. Refused if the key is not in the new
        form and an object with the same bytes has the key that a store could resolve it to: which one is deleted would
        be unknown.
        """
        if not is_new_form(key):
            held, other = self.head(key), normalized_key(key)
            twin = self.head(other) if other != key and is_new_form(other) else None
            if held is not None and twin is not None and twin.etag == held.etag:
                raise BadKey(f"object key {key!r}: an equal object has the key {other!r}", TOOLS_HINT)
        self._asked("delete_object", key)

    def tags(self, key: str) -> str:
        """GetObjectTagging, encoded as in a URL; "" when the object is gone. Raises Permanent."""
        try:
            found = self._asked("get_object_tagging", key)
        except Permanent as error:
            raise Permanent(error.message, TAGS_HINT) from error
        pairs = [(tag["Key"], tag["Value"]) for tag in (found or {}).get("TagSet", ())]
        return urlencode(pairs, quote_via=quote)

    def compare(self, key: str, expected: str) -> None:
        """The check that a store without conditions cannot do itself: Conflict when the object has another version."""
        held = self.head(key)
        found = "" if held is None else held.etag
        if found != expected:
            raise Conflict(f"{key}: expected {expected or 'no object'}, found {found or 'none'}", AGAIN_HINT)

    def _make(self) -> Any:
        client = make_client(self.target)
        # Register first: the SDK's own handler parses the whole body to look for an error.
        client.meta.events.register_first("before-parse.*.ListObjectsV2", take_entries)
        return client

    def _entry(self, key: str) -> ObjectInfo | None:
        """The listing's entry of a key that no new object may have; None for every other key. Raises BadKey when the
        listing does not have exactly that key, which comes before all others that begin with it.
        """
        if is_new_form(key):
            return None
        check_characters(key)
        page = self.page({"Prefix": key}) if key else {}
        entry = next((info for info in infos_of(page) if info.key == key), None)
        if entry is None:
            check_key(key)
        return entry

    def _get_rest(self, key: str, etag: str, last: str, position: int) -> Any:
        answer = self._asked("get_object", key, IfMatch=etag, Range=f"bytes={position}-{last}")
        if answer is None:
            raise Conflict(f"{key}: was deleted while it was read", AGAIN_HINT)
        # A whole body instead of the rest would duplicate what was already read.
        if answer["ResponseMetadata"]["HTTPStatusCode"] != HTTPStatus.PARTIAL_CONTENT:
            answer["Body"].close()
            raise Transient(f"{key}: the store ignores Range", REACH_HINT)
        return answer["Body"]

    def _asked(self, operation: str, key: str, **given: str) -> Any:
        """The response, None for a missing key. A 404 may mean a missing bucket or wrong endpoint too: checked once."""
        with self.translated(key):
            try:
                return getattr(self.client(), operation)(Bucket=self.target.bucket, Key=key, **given)
            except client_error() as error:
                if status_of(error) != HTTPStatus.NOT_FOUND or code_of(error) == "NoSuchBucket":
                    raise
        self._see_bucket(key)
        return None

    def _see_bucket(self, prefix: str) -> None:
        if not self._bucket_seen:
            with self.translated(f"bucket {self.target.bucket!r}"):
                self.client().list_objects_v2(Bucket=self.target.bucket, Prefix=prefix, MaxKeys=1)
            self._bucket_seen = True

    def _send(
        self, key: str, body: "bytearray | RemainingStream", put: PutRequest, condition: Mapping[str, str]
    ) -> Any:
        """PutObject, with the SDK's own exceptions."""
        if isinstance(body, RemainingStream):
            body.seek(0)
        return self.client().put_object(
            Bucket=self.target.bucket,
            Key=key,
            Body=body,
            **put_arguments(put, self.target),
            **condition,
        )

    def _probed(self, condition: Mapping[str, str]) -> tuple[int, str]:
        """The store's status for a write of the probe object (200, 412, or 400 and 501 if it does not support
        conditions) and its ETag.
        """
        with self.translated(self.probe_key):
            try:
                answer = self._send(self.probe_key, bytearray(b"probe"), PutRequest("text/plain"), condition)
            except client_error() as error:
                if not condition or status_of(error) not in CONDITION_ANSWERS:
                    raise
                return status_of(error), ""
            return HTTPStatus.OK, str(answer["ETag"])

    def _remove_probes(self) -> None:
        """Delete our probe, and in PROBE_FOLDER, which holds nothing else, those of processes killed in mid-probe."""
        folder = self.probe_key.rpartition("/")[0] + "/"
        try:
            if folder.endswith(f"{PROBE_FOLDER}/"):
                for key in stale_probes(list(self.list(folder))):
                    self.delete(key)
            self.delete(self.probe_key)
        except Permanent as error:
            log.warning("the probe object stays in the bucket: %s", error)


def stale_probes(probes: Sequence[ObjectInfo]) -> Sequence[str]:
    """Keys of probes that no process uses any more; the newest of them gives the store's time."""
    now_at = max((probe.modified_at for probe in probes), default=None)
    return [probe.key for probe in probes if now_at is not None and now_at - probe.modified_at > LEFTOVER]


def check_unicode(text: str) -> None:
    """Raises Rejected for text that cannot be encoded in UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise Rejected(f"object key {text!r} is not valid Unicode", "use UTF-8 text") from error


def check_headers(key: str, put: PutRequest) -> None:
    """Metadata is sent as HTTP headers, where other characters are lost, changed or refused, depending on the store."""
    for text in (put.content_type, *put.metadata, *put.metadata.values(), *put.headers.values()):
        if not (text.isascii() and text.isprintable() and text == text.strip()):
            raise Rejected(f"{key}: {text!r} cannot be object metadata", "use printable ASCII without outer spaces")
    if sum(len(name) + len(value) for name, value in put.metadata.items()) > MAX_METADATA_BYTES:
        raise Rejected(f"{key}: its metadata is longer than {MAX_METADATA_BYTES} bytes", "shorten it")


def put_arguments(put: PutRequest, target: S3Target) -> Mapping[str, Any]:
    """The SDK's arguments for everything an object keeps besides its bytes. S3_SSE overrides what the object had."""
    given = dict(put.headers)
    if target.sse:
        given = {**given, SSE_KMS_KEY: "", **target.encryption}
    headers: dict[str, Any] = {STORED_HEADERS[name]: given[name] for name in STORED_HEADERS if given.get(name)}
    if "Expires" in headers:  # the SDK only sends dates; any other text means that the object has already expired
        headers["Expires"] = date_of(headers["Expires"]) or EPOCH
    return {"ContentType": put.content_type, "Metadata": dict(put.metadata), **headers}


def headers_of(found: Mapping[str, Any]) -> Mapping[str, str]:
    """The content headers in a HeadObject response, and the number of tags.

    Encryption with the bucket's own key is left to the bucket, whose default may have changed since.
    """
    said = {**found, "Expires": found.get("ExpiresString")}
    if not str(said.get("ServerSideEncryption", "")).startswith("aws:kms"):
        said |= {"ServerSideEncryption": None, "SSEKMSKeyId": None}
    headers = {name: str(said[known]) for name, known in STORED_HEADERS.items() if said.get(known)}
    return {**headers, TAG_COUNT: str(found["TagCount"])} if found.get("TagCount") else headers


def condition_of(expected: str | None) -> Mapping[str, str]:
    """The SDK's arguments for `PutRequest.expected`."""
    if expected is None:
        return {}
    return {"IfMatch": expected} if expected else {"IfNoneMatch": "*"}


# Bodies sent to and received from S3.


class RemainingStream:
    """The rest of a stream as a separate stream: the SDK rewinds to 0 before it resends a body."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._start = stream.tell()
        self.size_bytes = stream.seek(0, io.SEEK_END) - self._start
        stream.seek(self._start)

    def read(self, count: int = -1) -> bytes:
        """The next bytes."""
        return self._stream.read(count)

    def tell(self) -> int:
        """The position within the rest."""
        return self._stream.tell() - self._start

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Seek within the rest."""
        start = self._start if whence == io.SEEK_SET else 0
        return self._stream.seek(offset + start, whence) - self._start


class ResumingDownload(io.RawIOBase):
    """A download that is resumed where it was interrupted, at most RESUMES times, and ends only at its size.

    botocore does not retry a request once its headers have arrived: `contracts` of S3, GetObject.
    """

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
        """Some of the next bytes; empty when the connection broke and a new one was made."""
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
                    f"{self._key}: the download was interrupted {RESUMES + 1} times, now {where}", REACH_HINT
                ) from cause
            self._resumes_left -= 1
            self._body = self._resume(self._position)
        return chunk

    def _verify(self) -> None:
        """Read past the end, which makes the SDK compare the checksum if the store sent one."""
        from botocore.exceptions import FlexibleChecksumError

        try:
            self._body.read(1)
        except FlexibleChecksumError as error:
            raise Transient(f"{self._key}: the bytes received are not those stored: {error}", AGAIN_HINT) from error

    def close(self) -> None:
        """Close the connection."""
        if not self.closed:
            self._body.close()
        super().close()
