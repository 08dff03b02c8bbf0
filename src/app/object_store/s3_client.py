"""Access to S3: the client, the meaning of its errors, and listings.

Invariants: creating a client makes no network request while keys are given; each SDK exception becomes exactly one of
our errors, with a hint that names the setting to check.
"""

import re
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import contextmanager
from contextvars import copy_context
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from hashlib import sha256
from http import HTTPStatus
from typing import Any
from urllib.parse import unquote_plus
from xml.etree import ElementTree as ET

from app.core.errors import AppError, Conflict, Permanent, Rejected, Transient
from app.core.network import CA_HINT
from app.core.retry import asked_seconds
from app.object_store.port import AGAIN_HINT, ListingBatch, ObjectInfo
from app.object_store.request_counts import RequestCounter

STYLE_HINT = "check S3_ENDPOINT_URL, and set S3_ADDRESSING_STYLE to path or virtual as the store asks"
TEXT_LIMIT = 400
KEYS_HINT = "check S3_ACCESS_KEY_ID and S3_SECRET_ACCESS_KEY"
RIGHTS_HINT = f"{KEYS_HINT}, and that this key may list the bucket and get and put objects under S3_PREFIX"
BUCKET_HINT = "create the bucket or correct S3_BUCKET"
REGION_HINT = "set S3_REGION to the bucket's region, and S3_ENDPOINT_URL to an address that does not redirect"
REACH_HINT = "check S3_ENDPOINT_URL and the network; it is retried"

HINTS: Mapping[str, str] = {
    "InvalidAccessKeyId": KEYS_HINT,
    "SignatureDoesNotMatch": KEYS_HINT,
    "ExpiredToken": "the temporary credentials expired: renew them",
    "InvalidToken": "check AWS_SESSION_TOKEN; leave it out for keys that do not expire",
    "AccessDenied": RIGHTS_HINT,
    "403": RIGHTS_HINT,  # HEAD responses have no body: the code is the status
    "RequestTimeTooSkewed": "set this machine's clock (NTP)",
    "InvalidBucketName": BUCKET_HINT,
    "PermanentRedirect": REGION_HINT,
    "TemporaryRedirect": REGION_HINT,
    "AuthorizationHeaderMalformed": REGION_HINT,
    "IllegalLocationConstraintException": REGION_HINT,
    "301": REGION_HINT,
    "302": REGION_HINT,
    "307": REGION_HINT,
    "400": f"{REGION_HINT}; {KEYS_HINT}",
}
BUSY = frozenset({"ConditionalRequestConflict", "OperationAborted"})
PASSING = frozenset({"RequestTimeout", "IncompleteBody", "BadDigest", "InvalidDigest", "SlowDown", "Throttling"})
REFUSED = frozenset({"KeyTooLongError", "EntityTooLarge", "MetadataTooLarge", "InvalidObjectState", "InvalidURI"})
PASSING_STATUS = frozenset(
    {
        HTTPStatus.REQUEST_TIMEOUT,
        HTTPStatus.CONFLICT,
        HTTPStatus.TOO_MANY_REQUESTS,
        HTTPStatus.INTERNAL_SERVER_ERROR,
    }
)


SSE, SSE_KMS_KEY = "x-amz-server-side-encryption", "x-amz-server-side-encryption-aws-kms-key-id"


@dataclass(frozen=True, slots=True)
class S3Target:
    """The bucket, its endpoint, and timeouts. Without keys the SDK's own credential chain is used: environment,
    profile, role.
    """

    bucket: str
    region: str = "us-east-1"
    endpoint_url: str = ""
    addressing_style: str = "auto"
    access_key_id: str = ""
    secret_access_key: str = field(default="", repr=False)
    session_token: str = field(default="", repr=False)
    connect_timeout_seconds: float = 5
    read_timeout_seconds: float = 60
    attempts: int = 4
    connections: int = 16
    page_keys: int = 1000
    counter: RequestCounter = field(default_factory=RequestCounter, compare=False, repr=False)
    sse: str = ""
    sse_kms_key_id: str = ""

    @property
    def encryption(self) -> Mapping[str, str]:
        """Encryption headers of every write; empty = the bucket's default."""
        headers = {SSE: self.sse, SSE_KMS_KEY: self.sse_kms_key_id}
        return {name: value for name, value in headers.items() if value}


def make_client(target: S3Target) -> Any:
    """A client with a session of its own: clients are thread-safe, sessions are not."""
    import boto3
    from botocore.config import Config

    # Compatible stores may not support the SDK's newer checksums, and some store their framing as data.
    needed = "when_required" if target.endpoint_url else "when_supported"
    config = Config(
        retries={"mode": "standard", "total_max_attempts": target.attempts},
        connect_timeout=target.connect_timeout_seconds,
        read_timeout=target.read_timeout_seconds,
        max_pool_connections=target.connections,
        request_checksum_calculation=needed,
        response_checksum_validation=needed,
        signature_version="s3v4",  # for links too: the older signature is refused for keys that are escaped
        s3={"addressing_style": target.addressing_style},
        # Both are a twentieth of a small put: the types are checked by mypy (the bucket's name still by the SDK), and
        # the SDK builds its own text anew for each request.
        parameter_validation=False,
        user_agent="headwater",
    )
    try:
        client = boto3.session.Session().client(
            "s3",
            region_name=target.region,
            endpoint_url=target.endpoint_url or None,
            aws_access_key_id=target.access_key_id or None,
            aws_secret_access_key=target.secret_access_key or None,
            aws_session_token=target.session_token or None,
            config=config,
        )
    except ValueError as error:
        raise Permanent(f"the S3 client cannot be created: {error}", "correct S3_ENDPOINT_URL or S3_REGION") from error

    def redirect_no_further(context: Mapping[str, Any], **_: Any) -> None:
        # On a redirect the SDK calls HeadBucket for the region; if that is redirected, it calls HeadBucket again, and
        # so on: an endpoint that redirects everything (http to https, say) would cost hundreds of requests. Nothing
        # else here calls HeadBucket.
        context.get("s3_redirect", {})["redirected"] = True

    client.meta.events.register("before-call.s3.HeadBucket", redirect_no_further)
    client.meta.events.register("before-send.s3", target.counter.count_sent)  # each attempt is charged
    return client


def key_source(target: S3Target) -> Callable[[], tuple[str, str, str]]:
    """Returns a function that gives the current access key, secret key and session token: those of the target,
    otherwise from the SDK's own chain, which may change from hour to hour. The call raises Permanent when there are
    none.
    """
    found: list[Any] = []

    def keys() -> tuple[str, str, str]:
        if target.access_key_id:
            return target.access_key_id, target.secret_access_key, target.session_token
        import boto3

        with translate_s3_errors(f"keys of bucket {target.bucket!r}", target):
            if not found:
                found.append(boto3.session.Session().get_credentials())
            frozen = found[0].get_frozen_credentials() if found[0] else None
        if frozen is None:
            raise Permanent(f"there are no keys for bucket {target.bucket!r}", KEYS_HINT)
        return frozen.access_key, frozen.secret_key, frozen.token or ""

    return keys


# The meaning of the SDK's exceptions.


def client_error() -> type[Exception]:
    """The SDK's exception for an error response. Imported here, so that startup loads no SDK."""
    from botocore.exceptions import ClientError

    return ClientError  # type: ignore[no-any-return]


def code_of(error: Any) -> str:
    """S3's error code in a ClientError; for HEAD, whose response has no body, the status as text."""
    return str(error.response.get("Error", {}).get("Code", ""))


def status_of(error: Any) -> int:
    """The HTTP status in a ClientError."""
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


@contextmanager
def translate_s3_errors(what: str, target: S3Target, *, replaces: bool = False) -> Iterator[None]:
    """Translate every SDK exception to ours. `replaces`: a missing object is a Conflict."""
    from botocore.exceptions import BotoCoreError, ClientError
    from botocore.parsers import ResponseParserError

    try:
        yield
    except ClientError as error:
        if replaces and (code_of(error) == "NoSuchKey" or code_of(error) in BUSY):
            raise Conflict(f"{what}: {code_of(error)}", AGAIN_HINT) from error
        raise _answered(what, error, target) from error
    except (ResponseParserError, KeyError) as error:
        raise Transient(f"{what}: not an S3 response: {error}"[:TEXT_LIMIT], STYLE_HINT) from error
    except BotoCoreError as error:
        raise _failed(f"{what}: {error}"[:TEXT_LIMIT], error) from error


def _answered(what: str, error: Any, target: S3Target) -> AppError:
    """The error for a response that is an error. Quotes the store's message, never the secret."""
    code, status = code_of(error), status_of(error)
    text = f"{what}: {code}: {error.response.get('Error', {}).get('Message', '')}"[:TEXT_LIMIT]
    headers = error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    if status == HTTPStatus.PRECONDITION_FAILED:
        return Conflict(text, AGAIN_HINT)
    if code == "NoSuchBucket":
        return Permanent(f"bucket {target.bucket!r} does not exist at {target.endpoint_url or 'AWS'}", BUCKET_HINT)
    if code in REFUSED:
        return Rejected(text, "change the key or the object; an archived object has to be restored first")
    # 502, 503 and 504 also come from proxies and say nothing about the object.
    if code in PASSING or status in PASSING_STATUS or status > HTTPStatus.NOT_IMPLEMENTED:
        return Transient(text, AGAIN_HINT, retry_after_seconds=asked_seconds(headers.get("retry-after", "")))
    region = headers.get("x-amz-bucket-region", target.region)
    if region != target.region:
        return Permanent(f"{text}; bucket {target.bucket!r} is in {region}", f"set S3_REGION to {region}")
    return Permanent(text, HINTS.get(code, STYLE_HINT))


def _failed(text: str, error: Exception) -> AppError:
    """The error for a call that got no response."""
    from botocore import exceptions as sdk

    if isinstance(error, sdk.SSLError) and "CERTIFICATE_VERIFY_FAILED" in text:
        return Permanent(text, CA_HINT)
    if isinstance(error, (sdk.CredentialRetrievalError, sdk.MetadataRetrievalError)):
        return Transient(text, f"check the role of this machine, or set the keys: {KEYS_HINT}")
    unreachable = (sdk.HTTPClientError, sdk.ConnectionError, sdk.IncompleteReadError, sdk.FlexibleChecksumError)
    if isinstance(error, unreachable):
        return Transient(text, REACH_HINT)
    return Permanent(text, BUCKET_HINT if isinstance(error, sdk.ParamValidationError) else KEYS_HINT)


# Listings of a bucket: entries parsed without the SDK, pages compared by digest, and several folders in parallel.
#
# Why (docs/benchmarks.md, /analytics): 12 µs of CPU an object where the SDK's parser takes 220, and 6 µs an object in a
# refresh of known pages, which determines how soon /analytics sees a new object. Without `take_entries` the SDK parses
# every page, and everything else here works the same.
#
# Invariants: only the entries of a page are extracted, as bytes; tokens, folders, errors and anything unusual are left
# to the SDK, with its retries; an unreadable page is an error and never fewer objects. Nothing here relies on the order
# in which a store lists.

TAKEN = "HeadwaterEntries"
FIRST, LAST = b"<Contents>", b"</Contents>"
ROOT = re.compile(rb"<ListBucketResult\b[^>]*>")
ENCODED = b"<EncodingType>url</EncodingType>"
OTHERS = (b"<!--", b"<![CDATA[", b"IsTruncated", b"ContinuationToken", b"CommonPrefixes", b"EncodingType")
TEXT = r"[^<&\x00-\x1f]*"
MORE = "".join(f"(?:<{name}>[A-Z0-9_]*</{name}>)*" for name in ("ChecksumAlgorithm", "ChecksumType", "StorageClass"))
PLAIN = re.compile(
    f"<Contents><Key>({TEXT})</Key><LastModified>({TEXT})</LastModified><ETag>({TEXT})</ETag>"
    rf"{MORE}<Size>(\d+)</Size>{MORE}"
)
AT_ONCE = 8
WIDE_PAGES = 8
FOLDERS_A_PAGE = 2
PARTS = 4096

Fields = Sequence[str]
"""Key, modification time, ETag and size of an entry, as text."""

ListQuery = Mapping[str, Any]
Ask = Callable[[ListQuery], Mapping[str, Any]]
"""One ListObjectsV2 call through the SDK, with its exceptions translated."""


@dataclass(frozen=True, slots=True)
class ListingEntries:
    """The raw entries of one page. `head`: everything up to the root element's first tag; `encoded`: as in a URL."""

    head: bytes
    entries: bytes
    encoded: bool

    @property
    def digest(self) -> bytes:
        """Equal for equal entries."""
        return sha256(b"%s%d%s" % (self.head, self.encoded, self.entries)).digest()

    def infos(self) -> Sequence[ObjectInfo]:
        """The objects. Raises Transient for a page that is not in S3's format."""
        read = _unquoted if self.encoded else str
        with _readable():
            fields = self._plain() or self._parsed()
            return [ObjectInfo(read(key), int(size), etag, _instant(modified)) for key, modified, etag, size in fields]

    def _plain(self) -> Sequence[Fields]:
        """Fast path at a tenth of the parser's cost: empty unless everything is in the exact form that S3 itself
        writes.
        """
        if not self.entries.isascii():
            return ()
        *entries, rest = self.entries.decode("ascii").replace("&quot;", '"').split(LAST.decode())
        matches = [match.groups() for match in map(PLAIN.fullmatch, entries) if match]
        return matches if len(matches) == len(entries) and not rest else ()

    def _parsed(self) -> Sequence[Fields]:
        root = ET.fromstring(self.head + self.entries + b"</ListBucketResult>")  # noqa: S314 - holds no DTD
        space = root.tag.removesuffix("ListBucketResult")
        entry_tag = f"{space}Contents"
        tags = [space + name for name in ("Key", "LastModified", "ETag", "Size")]
        found = []
        for entry in root:
            if entry.tag != entry_tag:
                raise ValueError(entry.tag)
            fields = {field.tag: field.text or "" for field in entry}
            found.append(tuple(fields[tag] for tag in tags))
        return found


def take_entries(response_dict: dict[str, Any], customized_response_dict: dict[str, Any], **_: Any) -> None:
    """A handler for botocore's `before-parse`: extracts the entries as bytes and leaves the rest to the SDK.

    A response in another form is left unchanged, so that the SDK reads it or reports what is wrong with it.
    """
    body = response_dict["body"]
    begin, end = body.find(FIRST), body.rfind(LAST) + len(LAST)
    if response_dict["status_code"] != HTTPStatus.OK or not 0 <= begin < end:
        return
    head, entries, tail = body[:begin], body[begin:end], body[end:]
    root = ROOT.search(head)
    if root is None or b"<!" in head or any(other in entries for other in OTHERS):
        return
    encoded = ENCODED in head or ENCODED in tail
    customized_response_dict[TAKEN] = ListingEntries(head[: root.end()], entries, encoded)
    response_dict["body"] = head + tail


def infos_of(page: Mapping[str, Any], prefix: str = "") -> Sequence[ObjectInfo]:
    """The objects of a page, whether its entries were extracted or parsed by the SDK.

    Two things that SeaweedFS lists are left out: objects without the prefix, since it treats `a//` as `a/`, and with a
    delimiter the empty folders that deleted objects leave, which have no ETag and cannot be read.
    """
    taken = page.get(TAKEN)
    with _readable():
        read = [info_of(entry["Key"], entry["Size"], entry) for entry in page.get("Contents", ())]
    infos = (*(taken.infos() if taken else ()), *read)
    return [info for info in infos if info.key.startswith(prefix) and (info.etag.strip('"') or info.key[-1:] != "/")]


def info_of(key: str, size_bytes: int, found: Mapping[str, Any]) -> ObjectInfo:
    """An entry of a listing or the head of an object, as parsed by the SDK."""
    return ObjectInfo(key, size_bytes, found["ETag"], found["LastModified"].astimezone(UTC))


def batches(ask: Ask, prefix: str, pages: int) -> Iterator[ListingBatch]:
    """Every object below `prefix`, one page at a time, in no order. `pages` is the expected number; if it is large and
    there are not many more folders, the folders are listed in parallel.
    """
    queries: Sequence[ListQuery] = [{"Prefix": prefix}]
    if pages >= WIDE_PAGES:
        top = ask({"Prefix": prefix, "Delimiter": "/"})
        folders = [one["Prefix"] for one in top.get("CommonPrefixes", ()) if one["Prefix"].startswith(prefix)]
        if not _truncated(top) and 1 < len(folders) <= FOLDERS_A_PAGE * pages:
            yield _batch(prefix, top)
            queries = [{"Prefix": folder} for folder in folders]
    for query, page in _side_by_side(ask, queries):
        yield _batch(query["Prefix"], page)


def following(page: Mapping[str, Any], query: ListQuery) -> ListQuery | None:
    """The query for the next page; None after the last. Raises Transient when the store gives no usable token."""
    if not _truncated(page):
        return None
    token = page.get("NextContinuationToken")
    if not token or token == query.get("ContinuationToken"):
        what = f"listing of {query['Prefix']!r}"
        raise Transient(f"{what}: the store announces more entries without a continuation token", STYLE_HINT)
    return {**query, "ContinuationToken": token}


def _truncated(page: Mapping[str, Any]) -> bool:
    with _readable():
        return bool(page["IsTruncated"])


@contextmanager
def _readable() -> Iterator[None]:
    try:
        yield
    except (ET.ParseError, KeyError, ValueError, OverflowError) as error:
        raise Transient(f"a page of a listing is not valid S3: {error!r}"[:TEXT_LIMIT], STYLE_HINT) from error


def _side_by_side(ask: Ask, queries: Sequence[ListQuery]) -> Iterator[tuple[ListQuery, Mapping[str, Any]]]:
    """All pages of all queries in order of arrival; further pages are requested while the caller processes one."""
    waiting = deque(queries)
    with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="listing") as pool:
        running: dict[Any, ListQuery] = {}
        while waiting or running:
            # Bounded: each page in flight holds up to a thousand entries.
            while waiting and len(running) < AT_ONCE:
                query = waiting.popleft()
                running[pool.submit(copy_context().run, ask, query)] = query
            done = wait(running, return_when=FIRST_COMPLETED).done.pop()
            query, page = running.pop(done), done.result()
            further = following(page, query)
            if further is not None:
                running[pool.submit(ask, further)] = further
            yield query, page


def _batch(prefix: str, page: Mapping[str, Any]) -> ListingBatch:
    """A batch, without a digest if the SDK parsed the entries."""
    taken = page.get(TAKEN)
    digest = b"" if taken is None or page.get("Contents") else taken.digest
    return ListingBatch(digest, lambda: infos_of(page, prefix))


def _unquoted(key: str) -> str:
    """Unquote folder and name separately, since both repeat often and are cached."""
    folder, slash, name = key.rpartition("/")
    return f"{_part(folder)}{slash}{_part(name)}"


@lru_cache(PARTS)
def _part(text: str) -> str:
    return unquote_plus(text)


def _instant(text: str) -> datetime:
    """Parse S3's form directly, others as the SDK does."""
    try:
        at = datetime.fromisoformat(text)
    except ValueError:
        from botocore.utils import parse_timestamp

        at = parse_timestamp(text)
    return at if at.tzinfo is UTC else at.astimezone(UTC)
