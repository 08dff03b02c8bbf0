"""Validates requests to /s3: conditions and ranges, the keys that the caller may access, links, stored headers.

Invariants: a key that a store would rewrite is never written; a forbidden key gets the same answer whether or not it
exists; a link grants no more than its creator had: reading one object, until a time that is part of the signed text.
"""

import base64
import hashlib
import hmac
import json
import os
import re
import secrets
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from urllib.parse import parse_qsl, quote, urlencode

from app.core.errors import Permanent
from app.core.files import sync_directory, sync_file
from app.object_store.port import (
    CONTENT_HEADERS,
    CONTROL,
    MARK,
    MAX_KEY_BYTES,
    TAG_COUNT,
    TAGS,
    BadKey,
    ObjectInfo,
    check_key,
    date_of,
    is_new_form,
    normalized_key,
)
from app.web.errors import Refused

RANGE = re.compile(r"bytes=\s*([0-9]{0,1000})\s*-\s*([0-9]{0,1000})\s*", re.IGNORECASE)
TAG = re.compile(r'(?:W/)?"[^"]*"')
HIDDEN_SEGMENT = ".headwater"
SECRET_BYTES = 32
SECRET_NAME = "link.key"  # noqa: S105 - the name of the file
CHANGED_HINT = "look at the object, then send it again"
POLICY = "POST\n"  # prefix of a form's signed text; that of a link begins with a timestamp
LINK_HINT = "ask the sender for a new one"


def not_found(key: str) -> Refused:
    """The error for a missing object."""
    return Refused(404, f"there is no object {key!r}", "list what there is: GET /s3/objects?prefix=", fault="key")


@dataclass(frozen=True, slots=True)
class ByteSpan:
    """The bytes `[first, first + count)`; `part` is False for the whole object."""

    first: int
    count: int
    part: bool


def span_of(fields: Mapping[str, str], held: ObjectInfo) -> ByteSpan:
    """The span to send. Raises Refused with 416 for a range that begins after the end."""
    size_bytes = held.size_bytes
    match = RANGE.fullmatch(fields.get("range", ""))
    whole = ByteSpan(0, size_bytes, part=False)
    # an invalid range is ignored (RFC 9110); a date never identifies a version, since it has only whole seconds
    if match is None or match[1] + match[2] == "" or fields.get("if-range", held.etag).strip() != held.etag:
        return whole
    if match[1]:
        first, last = int(match[1]), min(int(match[2]) if match[2] else size_bytes - 1, size_bytes - 1)
        if match[2] and int(match[2]) < first:
            return whole
    else:
        first, last = max(size_bytes - int(match[2]), 0), size_bytes - 1
    if first > last:
        raise Refused(
            416,
            f"the object has {size_bytes} bytes, and none of them are in that range",
            "request a range that starts before the end",
            fault="Range",
            headers={"Content-Range": f"bytes */{size_bytes}"},
        )
    return ByteSpan(first, last - first + 1, part=True)


def check_conditions(fields: Mapping[str, str], held: ObjectInfo | None, *, reads: bool = False) -> bool:
    """Evaluate the request's conditions (RFC 9110, 13.2.2): whether the caller already has the version that it `reads`
    (304). ETags take precedence over dates, and an invalid date is ignored.

    Raises Refused with 412 unless `held`, the current object or None, is what the caller requires.
    """
    required, excluded = fields.get("if-match"), fields.get("if-none-match")
    if held is None:
        if required is not None:
            raise Refused(412, "there is no object", CHANGED_HINT, fault="If-Match")
        return False
    changed_at, since = held.modified_at.replace(microsecond=0), date_of(fields.get("if-unmodified-since", ""))
    if required is not None:
        if not _named(required, held.etag, weak=False):
            raise Refused(412, f"the object has the ETag {held.etag}", CHANGED_HINT, fault="If-Match")
    elif since is not None and changed_at > since:
        changed = format_datetime(held.modified_at, usegmt=True)
        raise Refused(412, f"the object was changed on {changed}", CHANGED_HINT, fault="If-Unmodified-Since")
    if excluded is None:
        since = date_of(fields.get("if-modified-since", ""))
        return reads and since is not None and changed_at <= since
    is_excluded = _named(excluded, held.etag, weak=True)
    if is_excluded and not reads:
        raise Refused(412, f"the object has the ETag {held.etag}", CHANGED_HINT, fault="If-None-Match")
    return is_excluded


def _named(given: str, etag: str, *, weak: bool) -> bool:
    if given.strip() == "*":
        return True
    tags = TAG.findall(given)
    return etag in ([tag.removeprefix("W/") for tag in tags] if weak else tags)


@dataclass(frozen=True, slots=True)
class KeyPolicy:
    """Which keys may be read and written. `allowed`: prefixes of the routes, none = all; `own`: the caller's prefix, ""
    = all; `read_only`: prefix without writes; `exports`: the export's prefix, set even if the routes may write there,
    where keys of an unusual form cannot be deleted; `table`: prefix without any writes, since replacing a table file in
    place silently gives wrong counts.

    Each rule applies to every key that a store could take the given one for: a backslash must not lead out of a prefix,
    or into one.
    """

    allowed: tuple[str, ...] = ()
    read_only: str | None = None
    own: str = ""
    exports: str | None = None
    table: str | None = None

    def reads(self, key: str) -> str:
        """Return `key` if it may be read, in any form: the store looks up exactly that key. Raises Refused."""
        for form in {key, normalized_key(key)}:
            if form.split("/", 1)[0].startswith(HIDDEN_SEGMENT):
                hint = "choose another first segment"
                raise Refused(422, f"keys below {HIDDEN_SEGMENT} are the service's own", hint, fault="key")
            self._within(form, "key")
        return key

    def writes(self, key: str) -> str:
        """Return `key` if a new object may have it. Raises Refused."""
        try:
            check_key(key)
        except BadKey as error:
            raise Refused(422, error.message, error.hint, fault="key") from error
        return self._changes(key)

    def deletes(self, key: str) -> str:
        """Return `key`, in any form, if it may be deleted. Raises Refused."""
        if not is_new_form(key) and self.exports is not None and _is_below(self.exports, key):
            raise Refused(
                403,
                f"{key!r} can be taken for a key of the export, and is only read here",
                "delete it with the store's own tools",
                fault="key",
            )
        return self._changes(key)

    def _changes(self, key: str) -> str:
        self.reads(key)
        if self.table is not None and _is_below(self.table, key):
            message = f"{self.table} is where the table of closed days lies, and read-only here"
            raise Refused(403, message, "choose another key", fault="key")
        if self.read_only is not None and _is_below(self.read_only, key):
            raise Refused(
                403,
                f"{self.read_only or 'the whole bucket'} is where the export writes, and read-only here",
                "choose another key, or set S3_ROUTES_WRITE_EXPORTS=true",
                fault="key",
            )
        return key

    def lists(self, prefix: str) -> str:
        """Return `prefix` if it may be listed. Raises Refused."""
        if not CONTROL.isdisjoint(prefix) or len(prefix.encode("utf-8", "surrogatepass")) > MAX_KEY_BYTES:
            raise Refused(422, "no key can start with this prefix", "leave out control characters", fault="prefix")
        self._within(prefix, "prefix")
        return prefix

    def sweeps(self, key: str) -> bool:
        """Whether an upload to `key` may have come through /s3."""
        return (not self.allowed or key.startswith(self.allowed)) and not (
            self.read_only is not None and key.startswith(self.read_only)
        )

    def _within(self, text: str, fault: str) -> None:
        if not text.startswith(self.own):
            raise Refused(403, f"your key reaches only {self.own}", f"begin with {self.own}", fault=fault)
        if self.allowed and not text.startswith(self.allowed):
            places = ", ".join(self.allowed)
            raise Refused(403, f"/s3 is confined to {places}", f"begin with one of {places}", fault=fault)


def _is_below(prefix: str, key: str) -> bool:
    return key.startswith(prefix) or normalized_key(key).startswith(prefix)


class SignedLinks:
    """Links to this service, with the methods of `S3Transfers`: signed with a secret file in `folder`. Removing that
    file revokes all links.
    """

    def __init__(self, folder: Path, clock: Callable[[], datetime]) -> None:
        self._path = folder / SECRET_NAME
        self._clock = clock

    def link(self, key: str, seconds: int, disposition: str = "") -> str:  # noqa: ARG002 - as S3Transfers
        """The link, as a path of this service."""
        expires = int((self._clock() + timedelta(seconds=seconds)).timestamp())
        signature = self._sign(f"{expires}\n{key}")
        return "/s3/shared?" + urlencode({"key": key, "expires": expires, "signature": signature})

    def check(self, key: str, expires: int, signature: str) -> None:
        """Raises Refused unless this service made the link and it has not expired; both give the same error."""
        if not self._is_ours(f"{expires}\n{key}", signature) or self._clock().timestamp() >= expires:
            raise Refused(403, "the link has expired or was changed", LINK_HINT, fault="signature")

    def form(self, key: str, content_type: str, sizes: range, seconds: int) -> tuple[str, Mapping[str, str]]:
        """See `S3Transfers.form`. The policy has the format of S3's."""
        expires_at = (self._clock() + timedelta(seconds=seconds)).astimezone(UTC)
        conditions = [{"key": key}, {"Content-Type": content_type}, ["content-length-range", sizes[0], sizes[-1]]]
        policy = {"expiration": f"{expires_at:%Y-%m-%dT%H:%M:%SZ}", "conditions": conditions}
        text = base64.b64encode(json.dumps(policy).encode()).decode()
        fields = {"key": key, "Content-Type": content_type, "policy": text, "signature": self._sign(POLICY + text)}
        return "/s3/shared", fields

    def check_form(self, fields: Iterable[tuple[str, str]]) -> tuple[str, str, range]:
        """Key, type and sizes of a form. Raises Refused unless its fields are exactly the issued ones; as on S3, field
        names are case-insensitive.
        """
        given = dict(join_headers(fields))
        text = given.pop("policy", "")
        if not self._is_ours(POLICY + text, given.pop("signature", "")):
            raise Refused(403, "the policy of the form was changed or is missing", LINK_HINT, fault="policy")
        policy = json.loads(base64.b64decode(text))
        if self._clock() >= datetime.fromisoformat(policy["expiration"]):
            raise Refused(403, "the upload link has expired", LINK_HINT, fault="policy")
        key, content_type, (_, first, last) = policy["conditions"]
        wanted = {"key": key["key"], "content-type": content_type["Content-Type"]}
        for name in {*given, *wanted}:
            if given.get(name) != wanted.get(name):
                raise Refused(403, f"the policy does not allow this {name}", "send the fields unchanged", fault=name)
        return key["key"], content_type["Content-Type"], range(first, last + 1)

    def _is_ours(self, text: str, signature: str) -> bool:
        return hmac.compare_digest(self._sign(text).encode(), signature.encode("utf-8", "replace"))

    def _sign(self, text: str) -> str:
        return hmac.new(self._secret(), text.encode("utf-8", "replace"), hashlib.sha256).hexdigest()

    def _secret(self) -> bytes:
        """The secret, read each time, so that processes sharing a folder agree and removal takes effect at once."""
        try:
            if not self._path.exists():
                self._create()
            return self._path.read_bytes()
        except OSError as error:
            raise Permanent(f"{self._path}: {error.strerror}", "let the service's user write to DATA_DIR") from error

    def _create(self) -> None:
        """Create the secret atomically, never overwriting one that another process created meanwhile."""
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


# Headers that an upload stores with an object, and headers of a download.


META = "x-amz-meta-"
SERVER_SIDE = ("x-amz-server-side-encryption", "x-amz-storage-class")
NOT_KEPT = ("x-amz-acl", "x-amz-copy-source", "x-amz-grant-", "x-amz-object-lock-", "x-amz-website-redirect-location")
MAX_HEADER, MAX_METADATA = 1024, 2000  # S3 allows 2 KB of metadata, including our own marker
MAX_TAGS, MAX_TAG_NAME, MAX_TAG_VALUE = 10, 128, 256
TAG_TEXT = re.compile(r"[\w +\-=.:/@]*")


def join_headers(pairs: Iterable[tuple[str, str]]) -> Mapping[str, str]:
    """Header fields with lower-case names; values of a repeated name are joined by commas."""
    fields: dict[str, str] = {}
    for name, value in pairs:
        lower = name.lower()
        fields[lower] = f"{fields[lower]}, {value}" if lower in fields else value
    return fields


def stored_fields(fields: Mapping[str, str]) -> tuple[Mapping[str, str], Mapping[str, str]]:
    """Headers and metadata to store with the object, from a request; a header without a value is "".

    Raises Refused for values that some store would reject or change.
    """
    if "content-range" in fields:  # curl -C sends the rest of a file only, which would replace the whole object
        hint = "send the whole object, or PATCH /s3/patch?offset="
        raise Refused(400, "Content-Range: part of an object cannot be sent here", hint, fault="Content-Range")
    for name in fields:
        if name.startswith(SERVER_SIDE):
            raise Refused(422, f"{name} is the service's setting", "set S3_SSE or S3_STORAGE_CLASS", fault=name)
        if name.startswith(NOT_KEPT):
            raise Refused(422, f"{name} would have no effect here", "leave it out", fault=name)
    headers = {name: _header(name, fields[name].strip()) for name in (*CONTENT_HEADERS, TAGS) if name in fields}
    metadata = {
        name.removeprefix(META): _checked_text(name, value.strip())
        for name, value in fields.items()
        if name.startswith(META)
    }
    if MARK in metadata:
        raise Refused(422, f"the metadata {MARK} is the service's own", "choose another name", fault=META + MARK)
    if "" in metadata.values() or "" in metadata:
        raise Refused(422, "metadata without a name or a value, which some stores forget", "leave it out", fault=META)
    if sum(len(name) + len(value) for name, value in metadata.items()) > MAX_METADATA:
        raise Refused(422, f"the metadata is longer than {MAX_METADATA} bytes", "shorten it", fault=META)
    return headers, metadata


def _checked_text(name: str, text: str) -> str:
    if not (text.isascii() and text.isprintable()):
        raise Refused(422, f"{name} is not printable ASCII", "encode other text, as in a URL", fault=name)
    return text


def _header(name: str, text: str) -> str:
    if len(_checked_text(name, text)) > MAX_HEADER:
        raise Refused(422, f"{name} is longer than {MAX_HEADER} bytes", "shorten it", fault=name)
    if name == TAGS:
        return _tags(text)
    if name == "content-encoding":
        codings = [coding.strip().lower() for coding in text.split(",")]
        if "aws-chunked" in codings:
            raise Refused(422, "a body in signed chunks cannot be read", "send the plain bytes", fault=name)
        return "" if codings == ["identity"] else text
    if name == "expires" and text:
        at = date_of(text)
        if at is None:
            raise Refused(422, "expires is not a date", "send it as Thu, 01 Jan 2032 00:00:00 GMT", fault=name)
        return format_datetime(at, usegmt=True)
    return text


def _tags(text: str) -> str:
    """Tags in canonical form. Source of the limits: the S3 API reference, PutObjectTagging."""
    try:
        pairs = parse_qsl(text, keep_blank_values=True, strict_parsing=bool(text), errors="strict")
    except ValueError:
        pairs = [("", "")]
    names = [name for name, _ in pairs]
    if (
        len(pairs) > MAX_TAGS
        or len(set(names)) < len(names)
        or any(not 0 < len(name) <= MAX_TAG_NAME or len(value) > MAX_TAG_VALUE for name, value in pairs)
        or not all(TAG_TEXT.fullmatch(part) for pair in pairs for part in pair)
    ):
        hint = (
            "send at most 10 as name=value&name=value, percent-encoded, of letters, digits, spaces and + - = . _ : / @"
        )
        raise Refused(422, f"{TAGS} holds what cannot be tags", hint, fault=TAGS)
    return urlencode(pairs, quote_via=quote)


def download_headers(held: ObjectInfo, span: ByteSpan) -> Mapping[str, str]:
    """The headers of a download. By default, only private caches may store it, and must revalidate it each time; a
    stored Cache-Control overrides this.
    """
    kept = {name: value for name, value in held.headers.items() if value.isascii() and value.isprintable()}
    count = kept.get(TAG_COUNT) or str(len(parse_qsl(kept.get(TAGS, ""), keep_blank_values=True)))
    fields = {
        "Accept-Ranges": "bytes",
        "Content-Length": str(span.count),
        "Content-Type": held.content_type,
        "ETag": held.etag,
        "Last-Modified": format_datetime(held.modified_at.astimezone(UTC), usegmt=True),
        "Vary": "Authorization, X-API-Key, Cookie",
        **{name.title(): kept[name] for name in CONTENT_HEADERS if name in kept},
        "Cache-Control": kept.get("cache-control", "private, no-cache"),
        "Content-Disposition": disposition(held.key, kept.get("content-disposition", "")),
        **{META + name: _header_text(value) for name, value in held.metadata.items() if name != MARK},
    }
    if span.part:
        fields["Content-Range"] = f"bytes {span.first}-{span.first + span.count - 1}/{held.size_bytes}"
    return fields if count == "0" else {**fields, TAG_COUNT: count}


def _header_text(text: str) -> str:
    """Encode metadata with other characters, stored by another program, as S3 sends it (RFC 2047)."""
    if text.isascii() and text.isprintable():
        return text
    return f"=?UTF-8?B?{base64.b64encode(text.encode('utf-8', 'replace')).decode()}?="


def disposition(key: str, stored: str = "") -> str:
    """Content-Disposition of a download: always an attachment, whatever is `stored` with the object. The file name is
    the stored one, or the last segment of the key.
    """
    parameters = stored.partition(";")[2].strip()
    if parameters:
        return f"attachment; {parameters}"
    name = key.rpartition("/")[2]
    plain = "".join(each if each.isascii() and each.isprintable() and each not in '"\\' else "_" for each in name)
    extended = f"; filename*=UTF-8''{quote(name, safe='')}" if plain != name else ""
    return f'attachment; filename="{plain}"{extended}'
