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
from datetime import timedelta
from functools import partial
from http import HTTPStatus
from typing import Any, BinaryIO

from app.core.errors import Conflict, Permanent, Rejected, Transient
from app.object_store.port import (
    BadKey,
    ListingBatch,
    ObjectInfo,
    Put,
    check_characters,
    check_key,
    is_new_form,
    taken_for,
)
from app.object_store.s3_client import (
    BUSY,
    REACH_HINT,
    READ_HINT,
    Rest,
    Resumed,
    S3Target,
    code_of,
    make_client,
    status_of,
    translated,
)
from app.object_store.s3_listing import Question, batches, info_of, infos_of, listed, take_entries

MAX_PUT_BYTES = 5 << 30
MAX_METADATA_BYTES = 2048
READ_BYTES = 1 << 18
BUSY_ATTEMPTS = 4
CONDITION_ANSWERS = (HTTPStatus.PRECONDITION_FAILED, HTTPStatus.BAD_REQUEST, HTTPStatus.NOT_IMPLEMENTED)
PROBE_FOLDER = ".headwater-probe"
LEFTOVER = timedelta(hours=1)
OWN_TOOLS = "use the store's own tools for this object"
OTHER_ETAG = '"00000000000000000000000000000000"'

log = logging.getLogger(__name__)


class S3Store:
    """Objects of one bucket. `probe_key` names the object that `probe` writes and removes; each process has its own.

    Before `probe` has run, a condition is both sent and checked by a HEAD; where `probe` saw it ignored, only checked.
    """

    def __init__(self, target: S3Target, probe_key: str) -> None:
        self.target = target
        self.probe_key = check_key(probe_key)
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
        self._see_bucket(self.probe_key.rpartition("/")[0])
        etag, _ = self._send(self.probe_key, Rest(io.BytesIO(b"probe")), Put("text/plain"), {})
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
        entry = self._entry(key)
        found = self._unless_missing(key, lambda: self.client().head_object(Bucket=self.target.bucket, Key=key))
        if found is None:
            return None
        with self.translated(key):
            info = replace(
                info_of(key, found["ContentLength"], found),
                content_type=found.get("ContentType", "application/octet-stream"),
                metadata={name.lower(): value for name, value in found.get("Metadata", {}).items()},
            )
        if entry is not None and (entry.etag, entry.size_bytes) != (info.etag, info.size_bytes):
            raise BadKey(f"object key {key!r}: the store takes it for another object's", OWN_TOOLS)
        return info

    def put(self, key: str, body: BinaryIO, put: Put) -> str:
        """One PutObject, up to 5 GiB. Metadata: printable ASCII without outer spaces, 2 KB in all, else Rejected."""
        return self.put_version(key, body, put)[0]

    def put_version(self, key: str, body: BinaryIO, put: Put) -> tuple[str, str | None]:
        """As `put`; the new ETag and version id, None where the bucket keeps no versions."""
        check_key(key)
        check_headers(key, put)
        rest = Rest(body)
        if rest.size_bytes > MAX_PUT_BYTES:
            raise Rejected(
                f"{key}: {rest.size_bytes} bytes are more than the 5 GiB that one upload may have",
                "set EXPORT_WINDOW_SECONDS to a shorter window",
            )
        if put.expected is not None and not self.conditional:
            self.compare(key, put.expected)
        return self._send(key, rest, put, {} if self._honours is False else condition_of(put.expected))

    @contextmanager
    def open(self, key: str, etag: str | None = None) -> Iterator[BinaryIO | None]:
        """GetObject. A body that breaks off is asked for from there on, under the condition of the same ETag."""
        entry = self._entry(key)
        version = entry.etag if entry is not None and etag is None else etag
        answer = self._get(key, {} if version is None else {"IfMatch": version})
        if answer is None:
            yield None
            return
        with self.translated(key):
            raw = Resumed(key, answer, partial(self._get_rest, key, answer["ETag"], ""))
        with io.BufferedReader(raw, READ_BYTES) as stream:
            yield stream

    @contextmanager
    def open_span(self, held: ObjectInfo, first: int, count: int) -> Iterator[BinaryIO]:
        """The bytes `[first, first + count)`, `count` > 0, of exactly this version, resumed like a whole object."""
        last = first + count - 1
        body = self._get_rest(held.key, held.etag, str(last), first)
        raw = Resumed(
            held.key,
            {"Body": body, "ContentLength": count},
            lambda position: self._get_rest(held.key, held.etag, str(last), first + position),
        )
        with io.BufferedReader(raw, READ_BYTES) as stream:
            yield stream

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """ListObjectsV2, in the order of the store: S3's is UTF-8; SeaweedFS sorts a slash before all else."""
        check_unicode(prefix)
        return listed(self.page, prefix)

    def batches(self, prefix: str, objects: int) -> Iterator[ListingBatch]:
        """A page is a batch; the folders of a large listing are asked for side by side."""
        check_unicode(prefix)
        return batches(self.page, prefix, objects // self.target.page_keys)

    def page(self, question: Question) -> Mapping[str, Any]:
        """One ListObjectsV2. Its entries are read by `infos_of`."""
        with self.translated(f"listing of {question['Prefix']!r}"):
            page: Mapping[str, Any] = self.client().list_objects_v2(
                **{"Bucket": self.target.bucket, "MaxKeys": self.target.page_keys, **question}
            )
        return page

    def delete(self, key: str) -> None:
        """DeleteObject; S3 answers the same whether or not there was one."""
        if not is_new_form(key) and self._has_twin(key):
            raise BadKey(f"object key {key!r}: an equal object has the key {taken_for(key)!r}", OWN_TOOLS)
        self._unless_missing(key, lambda: self.client().delete_object(Bucket=self.target.bucket, Key=key))

    def _entry(self, key: str) -> ObjectInfo | None:
        """What a listing says of a key that no new object may have; None for every other key. Raises BadKey when it
        does not hold exactly that key, which comes before all others that begin with it.
        """
        if is_new_form(key):
            return None
        check_characters(key)
        page = self.page({"Prefix": key}) if key else {}
        entry = next((info for info in infos_of(page) if info.key == key), None)
        if entry is None:
            check_key(key)
        return entry

    def _has_twin(self, key: str) -> bool:
        """Whether the key that a store could take this one for has the same bytes, so that nothing tells them apart."""
        held, other = self.head(key), taken_for(key)
        twin = self.head(other) if other != key and is_new_form(other) else None
        return held is not None and twin is not None and twin.etag == held.etag

    def _get(self, key: str, conditions: Mapping[str, str]) -> Any:
        def call() -> Any:
            return self.client().get_object(Bucket=self.target.bucket, Key=key, **conditions)

        return self._unless_missing(key, call)

    def _get_rest(self, key: str, etag: str, last: str, position: int) -> Any:
        answer = self._get(key, {"IfMatch": etag, "Range": f"bytes={position}-{last}"})
        if answer is None:
            raise Conflict(f"{key}: was deleted while it was read", READ_HINT)
        if answer["ResponseMetadata"]["HTTPStatusCode"] != HTTPStatus.PARTIAL_CONTENT:
            answer["Body"].close()
            raise Transient(f"{key}: the store does not give the part of an object that it is asked for", REACH_HINT)
        return answer["Body"]

    def _unless_missing(self, key: str, call: Callable[[], Any]) -> Any:
        """The answer, None for a missing key. A 404 may mean the bucket or a wrong endpoint too: asked once."""
        from botocore.exceptions import ClientError

        with self.translated(key):
            try:
                return call()
            except ClientError as error:
                if status_of(error) != HTTPStatus.NOT_FOUND or code_of(error) == "NoSuchBucket":
                    raise
        self._see_bucket(key)
        return None

    def _see_bucket(self, prefix: str) -> None:
        if not self._bucket_seen:
            with self.translated(f"bucket {self.target.bucket!r}"):
                self.client().list_objects_v2(Bucket=self.target.bucket, Prefix=prefix, MaxKeys=1)
            self._bucket_seen = True

    def compare(self, key: str, expected: str) -> None:
        """What a store without conditions cannot do itself: Conflict when the object has another version."""
        held = self.head(key)
        found = "" if held is None else held.etag
        if found != expected:
            raise Conflict(f"{key}: expected {expected or 'no object'}, found {found or 'none'}", READ_HINT)

    def _send(self, key: str, body: "Rest", put: Put, condition: Mapping[str, str]) -> tuple[str, str | None]:
        """PutObject. Where it met another write under way, S3 asks to repeat it; before a replacement is repeated, its
        ETag would have to be read again, so that is a Conflict.
        """
        from botocore.exceptions import ClientError

        attempts_left = 1 if "IfMatch" in condition else BUSY_ATTEMPTS
        with self.translated(key, replaces="IfMatch" in condition):
            while True:
                attempts_left -= 1
                try:
                    answer = self._put_object(key, body, put, condition)
                    return str(answer["ETag"]), answer.get("VersionId")
                except ClientError as error:
                    if code_of(error) not in BUSY or not attempts_left:
                        raise

    def _put_object(self, key: str, body: "Rest", put: Put, condition: Mapping[str, str]) -> Any:
        body.seek(0)
        return self.client().put_object(
            Bucket=self.target.bucket,
            Key=key,
            Body=body,
            ContentType=put.content_type,
            Metadata=dict(put.metadata),
            **condition,
        )

    def _status_of(self, condition: Mapping[str, str]) -> int:
        """How the store answers a write of the probe object: 200, 412, or 400 and 501 where it knows no conditions."""
        from botocore.exceptions import ClientError

        with self.translated(self.probe_key):
            try:
                self._put_object(self.probe_key, Rest(io.BytesIO(b"probe")), Put("text/plain"), condition)
            except ClientError as error:
                if status_of(error) not in CONDITION_ANSWERS:
                    raise
                return status_of(error)
        return HTTPStatus.OK

    def _remove_probes(self) -> None:
        """Ours, and in PROBE_FOLDER, which holds nothing else, those of processes that were killed in mid-probe."""
        folder = self.probe_key.rpartition("/")[0] + "/"
        try:
            if folder.endswith(f"{PROBE_FOLDER}/"):
                for key in old_probes(list(self.list(folder))):
                    self.delete(key)
            self.delete(self.probe_key)
        except Permanent as error:
            log.warning("the probe object stays in the bucket: %s", error)

    def client(self) -> Any:
        """The SDK's client, made on first use and shared by all threads."""
        with self._lock:
            if self._made is None:
                self._made = make_client(self.target)
                # In this form it comes before the SDK's own handler, which parses the whole body to look for an error.
                self._made.meta.events.register_first("before-parse.*.ListObjectsV2", take_entries)
            return self._made

    def translated(self, what: str, *, replaces: bool = False) -> AbstractContextManager[None]:
        """See `s3_client.translated`."""
        return translated(what, self.target, replaces=replaces)


def old_probes(probes: Sequence[ObjectInfo]) -> Sequence[str]:
    """Keys of probes that no process is still at; the newest of them tells the store's own time."""
    now_at = max((probe.modified_at for probe in probes), default=None)
    return [probe.key for probe in probes if now_at is not None and now_at - probe.modified_at > LEFTOVER]


def check_unicode(text: str) -> None:
    """Raises Rejected for text that has no UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise Rejected(f"object key {text!r} is not valid Unicode", "use UTF-8 text") from error


def check_headers(key: str, put: Put) -> None:
    """Metadata travels as HTTP headers, where other characters are lost, changed or refused, depending on the store."""
    for text in (put.content_type, *put.metadata, *put.metadata.values()):
        if not (text.isascii() and text.isprintable() and text == text.strip()):
            raise Rejected(f"{key}: {text!r} cannot be object metadata", "use printable ASCII without outer spaces")
    if sum(len(name) + len(value) for name, value in put.metadata.items()) > MAX_METADATA_BYTES:
        raise Rejected(f"{key}: its metadata is longer than {MAX_METADATA_BYTES} bytes", "shorten it")


def condition_of(expected: str | None) -> Mapping[str, str]:
    """The SDK's arguments for `Put.expected`."""
    if expected is None:
        return {}
    return {"IfMatch": expected} if expected else {"IfNoneMatch": "*"}
