"""How S3 is reached, what its refusals mean, and how bodies are read from it."""

import io
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, BinaryIO

from app.core.errors import AppError, Conflict, Permanent, Rejected, Transient

# How S3 is reached and what its refusals mean; with `dynamo_to_drive.source` the home of boto3.
#
# Invariants: making a client asks nobody on the network while keys are given; each exception of the SDK becomes
# exactly one of the errors that say what the caller should do, with a hint that names the setting to look at.

KEYS_HINT = "check S3_ACCESS_KEY_ID and S3_SECRET_ACCESS_KEY"
RIGHTS_HINT = f"{KEYS_HINT}, and that this key may list the bucket and get and put objects under S3_PREFIX"
BUCKET_HINT = "create the bucket or correct S3_BUCKET"
REGION_HINT = "set S3_REGION to the bucket's region, and S3_ENDPOINT_URL to an address that does not redirect"
STYLE_HINT = "check S3_ENDPOINT_URL, and set S3_ADDRESSING_STYLE to path or virtual as the store asks"
REACH_HINT = "check S3_ENDPOINT_URL and the network; it is tried again"
AGAIN_HINT = "nothing to do: it is tried again"
READ_HINT = "nothing to do: it is read again"

HINTS: Mapping[str, str] = {
    "InvalidAccessKeyId": KEYS_HINT,
    "SignatureDoesNotMatch": KEYS_HINT,
    "ExpiredToken": "the temporary credentials ended: renew them",
    "InvalidToken": "check AWS_SESSION_TOKEN; leave it out for keys that do not end",
    "AccessDenied": RIGHTS_HINT,
    "403": RIGHTS_HINT,  # the codes of HEAD, which has no body, are its status
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
TEXT_LIMIT = 400


@dataclass(frozen=True, slots=True)
class S3Target:
    """Which bucket, where, and how patiently. Without keys the SDK's own chain is asked: environment, profile, role."""

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


def make_client(target: S3Target) -> Any:
    """A client of its own session: sessions are not safe to share between threads, clients are."""
    import boto3
    from botocore.config import Config

    # Compatible stores may not know the SDK's newer checksums, and some keep their framing as data.
    needed = "when_required" if target.endpoint_url else "when_supported"
    config = Config(
        retries={"mode": "standard", "total_max_attempts": target.attempts},
        connect_timeout=target.connect_timeout_seconds,
        read_timeout=target.read_timeout_seconds,
        max_pool_connections=target.connections,
        request_checksum_calculation=needed,
        response_checksum_validation=needed,
        signature_version="s3v4",  # links too: the older way of signing them is refused for keys that are escaped
        s3={"addressing_style": target.addressing_style},
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
        raise Permanent(f"the S3 client cannot be made: {error}", "correct S3_ENDPOINT_URL or S3_REGION") from error
    client.meta.events.register("before-call.s3.HeadBucket", _redirect_no_further)
    return client


def key_source(target: S3Target) -> Callable[[], tuple[str, str, str]]:
    """Access key, secret key and session token as they are at each call: those of the target, else of the SDK's own
    chain, which may change from hour to hour. The call raises Permanent when there are none.
    """
    found: list[Any] = []

    def keys() -> tuple[str, str, str]:
        if target.access_key_id:
            return target.access_key_id, target.secret_access_key, target.session_token
        import boto3

        with translated(f"keys of bucket {target.bucket!r}", target):
            if not found:
                found.append(boto3.session.Session().get_credentials())
            frozen = found[0].get_frozen_credentials() if found[0] else None
        if frozen is None:
            raise Permanent(f"there are no keys for bucket {target.bucket!r}", KEYS_HINT)
        return frozen.access_key, frozen.secret_key, frozen.token or ""

    return keys


def _redirect_no_further(context: Mapping[str, Any], **_: Any) -> None:
    """On a redirect the SDK asks HeadBucket for the region, on whose redirect it asks HeadBucket, and so on: an address
    that redirects everything (http to https, say) would cost hundreds of requests. Nothing else here calls HeadBucket.
    """
    context.get("s3_redirect", {})["redirected"] = True


@contextmanager
def translated(what: str, target: S3Target, *, replaces: bool = False) -> Iterator[None]:
    """Every exception of the SDK as what the caller should do. `replaces`: a missing object is a Conflict."""
    from botocore.exceptions import BotoCoreError, ClientError
    from botocore.parsers import ResponseParserError

    try:
        yield
    except ClientError as error:
        if replaces and (code_of(error) == "NoSuchKey" or code_of(error) in BUSY):
            raise Conflict(f"{what}: {code_of(error)}", READ_HINT) from error
        raise _answered(what, error, target) from error
    except (ResponseParserError, KeyError) as error:
        raise Transient(f"{what}: the answer is not S3's: {error}"[:TEXT_LIMIT], STYLE_HINT) from error
    except BotoCoreError as error:
        raise _failed(what, error) from error


def code_of(error: Any) -> str:
    """S3's name for the error in a ClientError; of HEAD, whose answer has no body, the status as text."""
    return str(error.response.get("Error", {}).get("Code", ""))


def status_of(error: Any) -> int:
    """The HTTP status in a ClientError."""
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _answered(what: str, error: Any, target: S3Target) -> AppError:
    """The store's refusal as what the caller should do. Its message is quoted; it never repeats the secret."""
    code, status = code_of(error), status_of(error)
    text = f"{what}: {code}: {error.response.get('Error', {}).get('Message', '')}"[:TEXT_LIMIT]
    headers = error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    if status == HTTPStatus.PRECONDITION_FAILED:
        return Conflict(text, READ_HINT)
    if code == "NoSuchBucket":
        return Permanent(f"bucket {target.bucket!r} does not exist at {target.endpoint_url or 'AWS'}", BUCKET_HINT)
    if code in REFUSED:
        return Rejected(text, "change the key or the object; an archived object has to be restored first")
    if code in PASSING or status in PASSING_STATUS or status > HTTPStatus.NOT_IMPLEMENTED:
        return Transient(text, AGAIN_HINT, retry_after_seconds=_seconds(headers.get("retry-after", "")))
    region = headers.get("x-amz-bucket-region", target.region)
    if region != target.region:
        return Permanent(f"{text}; bucket {target.bucket!r} is in {region}", f"set S3_REGION to {region}")
    return Permanent(text, HINTS.get(code, STYLE_HINT))


def _seconds(text: str) -> float | None:
    return float(text) if text.isdecimal() else None


def _failed(what: str, error: Exception) -> AppError:
    """A call that got no answer as what the caller should do."""
    from botocore import exceptions as sdk

    text = f"{what}: {error}"[:TEXT_LIMIT]
    if isinstance(error, sdk.SSLError) and "CERTIFICATE_VERIFY_FAILED" in text:
        return Permanent(text, "install the certificate authority of the store, or set AWS_CA_BUNDLE to its file")
    if isinstance(error, (sdk.CredentialRetrievalError, sdk.MetadataRetrievalError)):
        return Transient(text, f"check the role of this machine, or set the keys: {KEYS_HINT}")
    if isinstance(
        error, (sdk.HTTPClientError, sdk.ConnectionError, sdk.IncompleteReadError, sdk.FlexibleChecksumError)
    ):
        return Transient(text, REACH_HINT)
    if isinstance(error, sdk.ParamValidationError):
        return Permanent(text, BUCKET_HINT)
    return Permanent(text, KEYS_HINT)


# Bodies on their way to and from S3: what is left of a stream, and a download that goes on where it broke off.
#
# Invariant: a download ends at the size that was promised, or it raises; it never ends early in silence.

RESUMES = 8


class Rest:
    """What is left of a stream, as a stream of its own: the SDK rewinds to 0 before it sends a body again."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._start = stream.tell()
        self.size_bytes = stream.seek(0, io.SEEK_END) - self._start
        stream.seek(self._start)

    def read(self, count: int = -1) -> bytes:
        """The next bytes."""
        return self._stream.read(count)

    def tell(self) -> int:
        """The position in the rest."""
        return self._stream.tell() - self._start

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a position in the rest."""
        start = self._start if whence == io.SEEK_SET else 0
        return self._stream.seek(offset + start, whence) - self._start


class Resumed(io.RawIOBase):
    """A download that is asked for again from where it broke off, at most RESUMES times, and ends only at its size."""

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
        """Give the connection back."""
        if not self.closed:
            self._body.close()
        super().close()
