"""What a request to /s3 may ask for: conditions and ranges, the keys that its caller reaches, and links.

Invariants: a key that stores would rewrite is never written, and one that the caller may not touch answers the same
whether or not it exists; a link gives no more than whoever made it had: one object, by reading, until a time that is
part of what is signed.
"""

import hashlib
import hmac
import os
import re
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Protocol
from urllib.parse import quote, unquote_to_bytes, urlencode

from app.core.errors import Permanent, Rejected
from app.core.files import sync_directory, sync_file
from app.object_store.port import CONTROL, MAX_KEY_BYTES, BadKey, ObjectInfo, check_key, is_new_form, taken_for

RANGE = re.compile(r"bytes=\s*(\d{0,18})\s*-\s*(\d{0,18})\s*")
TAG = re.compile(r'(?:W/)?"[^"]*"')
HIDDEN_SEGMENT = ".headwater"
SECRET_BYTES = 32
SECRET_NAME = "link.key"  # noqa: S105 - the name of the file
CHANGED_HINT = "look at the object, then send it again"
LINK_HINT = "ask whoever sent it for a new one"


class NotServed(Rejected):
    """A request that cannot be served: `status` is the HTTP status, `fault` the field or parameter, "" for none."""

    def __init__(
        self, status: int, message: str, hint: str, *, fault: str = "", headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message, hint)
        self.status = status
        self.fault = fault
        self.headers = headers or {}


def missing(key: str) -> NotServed:
    """There is no such object."""
    return NotServed(404, f"there is no object {key!r}", "list what there is: GET /s3/objects?prefix=", fault="key")


@dataclass(frozen=True, slots=True)
class ByteSpan:
    """The bytes `[first, first + count)`; `part` False = it is the whole object."""

    first: int
    count: int
    part: bool


def span_of(fields: Mapping[str, str], held: ObjectInfo) -> ByteSpan:
    """What to send. Raises NotServed with 416 for a range that begins after the end."""
    size_bytes = held.size_bytes
    match = RANGE.fullmatch(fields.get("range", ""))
    whole = ByteSpan(0, size_bytes, part=False)
    # what cannot be read as a range is no range (RFC 9110), and a date, which has only seconds, never names a version
    if match is None or match[1] + match[2] == "" or fields.get("if-range", held.etag).strip() != held.etag:
        return whole
    if match[1]:
        first, last = int(match[1]), min(int(match[2]) if match[2] else size_bytes - 1, size_bytes - 1)
        if match[2] and int(match[2]) < first:
            return whole
    else:
        first, last = max(size_bytes - int(match[2]), 0), size_bytes - 1
    if first > last:
        raise NotServed(
            416,
            f"the object has {size_bytes} bytes, and none of them are in that range",
            "ask for a range that begins before the end",
            fault="Range",
            headers={"Content-Range": f"bytes */{size_bytes}"},
        )
    return ByteSpan(first, last - first + 1, part=True)


def unchanged(fields: Mapping[str, str], etag: str) -> bool:
    """Whether the caller has this version already: 304."""
    given = fields.get("if-none-match")
    return given is not None and _named(given, etag, weak=True)


def check_match(fields: Mapping[str, str], etag: str) -> None:
    """Raises NotServed with 412 when the caller wants another version than this."""
    given = fields.get("if-match")
    if given is not None and not _named(given, etag, weak=False):
        raise NotServed(412, f"the object has the ETag {etag}", CHANGED_HINT, fault="If-Match")


def check_unmatched(fields: Mapping[str, str]) -> None:
    """Raises NotServed with 412 when the caller wants to create what is there already."""
    if fields.get("if-none-match", "").strip() == "*":
        raise NotServed(412, "there is an object already", CHANGED_HINT, fault="If-None-Match")


def expected_of(fields: Mapping[str, str]) -> str | None:
    """`Put.expected` of an upload. Raises NotServed for conditions that no store can keep."""
    match, none = fields.get("if-match"), fields.get("if-none-match")
    if none is not None and (none.strip() != "*" or match is not None):
        raise NotServed(422, "an upload knows only `If-None-Match: *`", "send that, or If-Match", fault="If-None-Match")
    if match is not None and not re.fullmatch(r'"[^"]*"', match.strip()):
        raise NotServed(422, "an upload's If-Match takes one ETag", "send it with its quotes", fault="If-Match")
    return "" if none is not None else match.strip() if match is not None else None


def _named(given: str, etag: str, *, weak: bool) -> bool:
    if given.strip() == "*":
        return True
    tags = TAG.findall(given)
    return etag in ([tag.removeprefix("W/") for tag in tags] if weak else tags)


@dataclass(frozen=True, slots=True)
class Reach:
    """`allowed` prefixes of the routes and `own` of the caller, "" and none = all; under `read_only` nobody writes, and
    under `exports`, which is the same place also where the routes may write it, no key of an odd form is deleted.

    Each holds for every key that a store could take the given one for: a backslash must not lead out of a prefix, or
    into one.
    """

    allowed: tuple[str, ...] = ()
    read_only: str | None = None
    own: str = ""
    exports: str | None = None

    def reads(self, key: str) -> str:
        """`key`, of whatever form: the store looks whether it has exactly that one. Raises NotServed."""
        for form in {key, taken_for(key)}:
            if form.split("/", 1)[0].startswith(HIDDEN_SEGMENT):
                hint = "choose another first segment"
                raise NotServed(422, f"keys below {HIDDEN_SEGMENT} are the service's own", hint, fault="key")
            self._within(form, "key")
        return key

    def writes(self, key: str) -> str:
        """`key`, which a new object may have. Raises NotServed."""
        try:
            check_key(key)
        except BadKey as error:
            raise NotServed(422, error.message, error.hint, fault="key") from error
        return self._changes(key)

    def deletes(self, key: str) -> str:
        """`key`, of whatever form. Raises NotServed."""
        if not is_new_form(key) and self.exports is not None and _is_below(self.exports, key):
            raise NotServed(
                403,
                f"{key!r} can be taken for a key of the export, and is only read here",
                "delete it with the store's own tools",
                fault="key",
            )
        return self._changes(key)

    def _changes(self, key: str) -> str:
        self.reads(key)
        if self.read_only is not None and _is_below(self.read_only, key):
            raise NotServed(
                403,
                f"{self.read_only or 'the whole bucket'} is where the export writes, and read-only here",
                "choose another key, or set S3_ROUTES_WRITE_EXPORTS=true",
                fault="key",
            )
        return key

    def lists(self, prefix: str) -> str:
        """`prefix`. Raises NotServed."""
        if not CONTROL.isdisjoint(prefix) or len(prefix.encode("utf-8", "surrogatepass")) > MAX_KEY_BYTES:
            raise NotServed(422, "no key begins like this prefix", "leave out control characters", fault="prefix")
        self._within(prefix, "prefix")
        return prefix

    def sweeps(self, key: str) -> bool:
        """Whether an upload to `key` can have come through /s3."""
        return (not self.allowed or key.startswith(self.allowed)) and not (
            self.read_only is not None and key.startswith(self.read_only)
        )

    def _within(self, text: str, fault: str) -> None:
        if not text.startswith(self.own):
            raise NotServed(403, f"your key reaches only {self.own}", f"begin with {self.own}", fault=fault)
        if self.allowed and not text.startswith(self.allowed):
            places = ", ".join(self.allowed)
            raise NotServed(403, f"/s3 is confined to {places}", f"begin with one of {places}", fault=fault)


def _is_below(prefix: str, key: str) -> bool:
    return key.startswith(prefix) or taken_for(key).startswith(prefix)


def check_query(query: bytes) -> None:
    """Raises NotServed for a query string that is not UTF-8: it would be read as another key."""
    try:
        unquote_to_bytes(query).decode()
    except UnicodeDecodeError as error:
        raise NotServed(422, "the query is not UTF-8", "percent-encode the key's UTF-8 bytes") from error


class Links(Protocol):
    """How links are made and opened."""

    def make(self, key: str, now: datetime, seconds: int) -> str:
        """A URL, or a path of this service. Does not check that the object exists."""

    def check(self, key: str, now: datetime, expires: int, signature: str) -> None:
        """Raises NotServed unless this service made the link and it has not expired."""


class StoreLinks:
    """Links to the store itself. `presign` takes key, seconds and Content-Disposition."""

    def __init__(self, presign: Callable[[str, int, str], str]) -> None:
        self._presign = presign

    def make(self, key: str, now: datetime, seconds: int) -> str:  # noqa: ARG002 - the store has its own clock
        """See Links."""
        return self._presign(key, seconds, disposition(key))

    def check(self, key: str, now: datetime, expires: int, signature: str) -> None:  # noqa: ARG002 - the port's
        """See Links."""
        raise NotServed(404, "links of this store do not lead here", LINK_HINT)


class SignedLinks:
    """Links to this service, signed with a secret of its own in `folder`. Removing that file revokes every link."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / SECRET_NAME

    def make(self, key: str, now: datetime, seconds: int) -> str:
        """See Links."""
        expires = int((now + timedelta(seconds=seconds)).timestamp())
        return "/s3/shared?" + urlencode({"key": key, "expires": expires, "signature": self._sign(key, expires)})

    def check(self, key: str, now: datetime, expires: int, signature: str) -> None:
        """See Links. Both failures cost the same and look the same."""
        right = hmac.compare_digest(self._sign(key, expires).encode(), signature.encode("utf-8", "replace"))
        if not right or now.timestamp() >= expires:
            raise NotServed(403, "the link has expired or was changed", LINK_HINT, fault="signature")

    def _sign(self, key: str, expires: int) -> str:
        return hmac.new(self._secret(), f"{expires}\n{key}".encode("utf-8", "replace"), hashlib.sha256).hexdigest()

    def _secret(self) -> bytes:
        """Read each time, so that processes that share a folder agree, and that removing it works at once."""
        try:
            if not self._path.exists():
                self._create()
            return self._path.read_bytes()
        except OSError as error:
            raise Permanent(f"{self._path}: {error.strerror}", "let the service's user write to DATA_DIR") from error

    def _create(self) -> None:
        """Whole or not at all, and never over one that another process made meanwhile."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self._path.with_name(f".{SECRET_NAME}.{secrets.token_hex(8)}")
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            os.write(descriptor, secrets.token_bytes(SECRET_BYTES))
            sync_file(descriptor)
            os.link(temporary, self._path)
            sync_directory(self._path.parent)
        except FileExistsError:
            pass
        finally:
            os.close(descriptor)
            temporary.unlink()


def disposition(key: str) -> str:
    """Content-Disposition of a download: never shown as a page, named as the last segment of its key."""
    name = key.rpartition("/")[2]
    plain = "".join(each if each.isascii() and each.isprintable() and each not in '"\\' else "_" for each in name)
    extended = f"; filename*=UTF-8''{quote(name, safe='')}" if plain != name else ""
    return f'attachment; filename="{plain}"{extended}'
