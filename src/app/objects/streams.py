"""Request and response bodies of /s3."""

import base64
import hashlib
import io
import mimetypes
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any

from app.object_store.port import ReadableBody
from app.objects.requests import LINK_HINT
from app.web.errors import Refused

# Streams the file of a multipart form as a body, without storing it.
#
# Invariant: the body ends only once the whole form is read and has exactly one file; a truncated form raises.

FIELD = "file"
MOST_FIELDS = 100
MAX_TEXT_BYTES = 1 << 16
STEP_BYTES = 1 << 18
FORM_HINT = "send one file, as `curl -F file=@name` does, or the bare bytes"


class FormReader:
    """Reads up to the file on creation. `content_type`: from the file's own header, "" if absent; `fields`: the text
    fields before the file.

    If no file was chosen, browsers send the file field as an empty, unnamed file; it is ignored.
    """

    def __init__(self, body: ReadableBody, boundary: str) -> None:
        self._body = body
        self._events = self._parsed(boundary)
        self._piece = memoryview(b"")
        self.fields: list[tuple[str, str]] = []
        self.content_type = self._find()

    def read(self, count: int, /) -> bytes:
        """See ReadableBody."""
        if not self._piece:
            event = next(self._events, None)
            if event is None:
                self._finish()
                return b""
            if len(event) <= count:
                return bytes(event)
            self._piece = memoryview(event)
        data, self._piece = self._piece[:count], self._piece[count:]
        return bytes(data)

    def _find(self) -> str:
        for event in self._events:
            if _is_file(event):
                if self._is_chosen(event):
                    return str(event.content_type or "")
            elif getattr(event, "name", None) is not None:
                self.fields.append((event.name, self._text()))
        raise Refused(422, "no file was chosen in the form", FORM_HINT, fault=FIELD)

    def _is_chosen(self, segment: Any) -> bool:
        if not segment.filename:
            self._piece = memoryview(next(self._events, None) or b"")
        return bool(segment.filename or self._piece)

    def _text(self) -> str:
        text = bytearray()
        while piece := next(self._events, None):
            text += piece
            if len(text) > MAX_TEXT_BYTES:
                raise Refused(422, f"a field of the form is longer than {MAX_TEXT_BYTES} bytes", FORM_HINT)
        return text.decode("utf-8", "replace")

    def _finish(self) -> None:
        if any(_is_file(event) and self._is_chosen(event) for event in self._events):
            raise Refused(422, "the form holds more than one file", FORM_HINT, fault=FIELD)

    def _parsed(self, boundary: str) -> Iterator[Any]:
        """Yields each segment, then its bytes, then None at its end. Raises Refused."""
        from multipart import MultipartError, PushMultipartParser

        try:
            parser = PushMultipartParser(boundary, max_segment_count=MOST_FIELDS)
            while not parser.closed:
                yield from parser.parse(self._body.read(STEP_BYTES))
            while self._body.read(STEP_BYTES):
                pass  # data after the end of the form is ignored
        except MultipartError as error:
            raise Refused(400, f"the form cannot be read: {error}", FORM_HINT) from error


def _is_file(event: Any) -> bool:
    name = getattr(event, "name", None)
    return name is not None and (name == FIELD or event.filename is not None)


def boundary_of(fields: Mapping[str, str]) -> str | None:
    """The boundary of a multipart form; None for a bare body. Raises Refused."""
    from multipart import parse_options_header

    given = fields.get("content-type", "")
    if not given.lower().startswith("multipart/"):
        return None
    kind, options = parse_options_header(given)
    if kind != "multipart/form-data" or not options.get("boundary"):
        raise Refused(415, f"{kind} without what is needed to read it", FORM_HINT, fault="Content-Type")
    return str(options["boundary"])


def peek_body(body: ReadableBody, count: int) -> tuple[bytes, ReadableBody]:
    """The first `count` bytes of a body, or all of a shorter one, and a body that still has all bytes."""
    start = b""
    while len(start) < count and (data := body.read(count - len(start))):
        start += data
    return start, _ReplayedBody(start, body)


class _ReplayedBody:
    """A body whose `start` has already been read."""

    def __init__(self, start: bytes, body: ReadableBody) -> None:
        self._start, self._body = start, body

    def read(self, count: int, /) -> bytes:
        """See ReadableBody."""
        if not self._start:
            return self._body.read(count)
        data, self._start = self._start[:count], self._start[count:]
        return data


# The content type to store with an upload.

UNKNOWN = "application/octet-stream"
# sent by clients that do not know the type: curl sends the last one for any bare body
SAYS_NOTHING = frozenset({"", UNKNOWN, "binary/octet-stream", "application/x-www-form-urlencoded"})
MORE_TYPES = {".parquet": "application/vnd.apache.parquet", ".ndjson": "application/x-ndjson", ".md": "text/markdown"}
MAX_CHARACTERS = 200


@cache
def built_in_types() -> mimetypes.MimeTypes:
    """The table of the standard library without this machine's files, which must not affect the result. Made when it is
    first needed, since it takes half a megabyte.
    """
    return mimetypes.MimeTypes(filenames=())


def media_type(given: str, key: str, held: str = "") -> str:
    """The client's content type, if it gave a valid one; otherwise `held`, that of the current object, or the type
    implied by the key's suffix.
    """
    said = given.strip()
    fits = said.isascii() and said.isprintable() and len(said) <= MAX_CHARACTERS
    if fits and said.partition(";")[0].strip().lower() not in SAYS_NOTHING:
        return said
    if held:
        return held
    name = key.rpartition("/")[2]
    ending = "." + name.rpartition(".")[2].lower()
    guessed, encoding = built_in_types().guess_type(name)
    return MORE_TYPES.get(ending) or (guessed if guessed and not encoding else UNKNOWN)


# Checks a body against its checksums and size limits before the store makes it visible.


class Crc32:
    """CRC-32 with the hashlib interface."""

    def __init__(self) -> None:
        self._value = 0

    def update(self, data: bytes, /) -> None:
        """Add the next bytes."""
        self._value = zlib.crc32(data, self._value)

    def digest(self) -> bytes:
        """Big endian, as S3 sends it."""
        return self._value.to_bytes(4)


CHECKSUM = "x-amz-checksum-"
PAYLOAD_HASH, UNSIGNED = "x-amz-content-sha256", "UNSIGNED-PAYLOAD"
SHA256_BYTES = 32
CHECKSUMS: Mapping[str, tuple[int, Callable[[], Any]]] = {
    "content-md5": (16, lambda: hashlib.md5(usedforsecurity=False)),
    f"{CHECKSUM}crc32": (4, Crc32),
    f"{CHECKSUM}sha1": (20, lambda: hashlib.sha1(usedforsecurity=False)),
    f"{CHECKSUM}sha256": (SHA256_BYTES, hashlib.sha256),
}
DIGESTS = ("content-digest", "repr-digest")
"""RFC 9530: algorithm=:base64:, several of them separated by commas; others than SHA-256 are ignored."""
DIGEST = re.compile(r"sha-256\s*=\s*:([^:]*):", re.IGNORECASE)
NO_CHECKSUMS = frozenset({f"{CHECKSUM}algorithm", f"{CHECKSUM}type", f"{CHECKSUM}mode"})


class ChecksummedBody:
    """A body that ends only if its bytes match the request's checksums.

    Creation raises Refused for a checksum that cannot be parsed (400) or computed (422). The end of a body that does
    not match raises Refused with 400, before the store makes the object visible.
    """

    def __init__(self, body: ReadableBody, fields: Mapping[str, str]) -> None:
        self._body = body
        self._promised = [
            (name, _promised(name, text, size_bytes), make())
            for name, (size_bytes, make) in CHECKSUMS.items()
            if (text := fields.get(name)) is not None
        ]
        texts = [(name, found[1]) for name in DIGESTS if (found := DIGEST.search(fields.get(name, "")))]
        if (payload := fields.get(PAYLOAD_HASH, "")) not in ("", UNSIGNED):
            texts.append((PAYLOAD_HASH, payload))
        self._promised += [(name, _promised(name, text, SHA256_BYTES), hashlib.sha256()) for name, text in texts]

    @staticmethod
    def check(fields: Mapping[str, str]) -> None:
        """Raises Refused for faults that can be found without the body."""
        if fields.get(PAYLOAD_HASH, "").startswith("STREAMING-"):  # also without Content-Encoding: aws-chunked
            raise Refused(422, "a body in signed chunks cannot be read", "send the plain bytes", fault=PAYLOAD_HASH)
        for name in fields:
            if name.startswith(CHECKSUM) and name not in CHECKSUMS and name not in NO_CHECKSUMS:
                known = ", ".join(CHECKSUMS)
                raise Refused(422, f"{name} cannot be checked here", f"send one of {known}", fault=name)
        if "x-amz-trailer" in fields:
            hint = "send the checksum in a header"
            raise Refused(422, "checksums after the body are not read", hint, fault="x-amz-trailer")
        ChecksummedBody(io.BytesIO(), fields)

    def read(self, count: int, /) -> bytes:
        """See ReadableBody."""
        data = self._body.read(count)
        for name, promised, digest in self._promised:
            if data:
                digest.update(data)
            elif digest.digest() != promised:
                came = base64.b64encode(digest.digest()).decode()
                raise Refused(400, f"{name}: the bytes received have {came}", "send them again", fault=name)
        return data


def _promised(name: str, text: str, size_bytes: int) -> bytes:
    in_hex = name == PAYLOAD_HASH
    try:
        promised = bytes.fromhex(text) if in_hex else base64.b64decode(text.strip(), validate=True)
    except ValueError:
        promised = b""
    if len(promised) != size_bytes:
        form = "hex" if in_hex else "base64"
        raise Refused(400, f"{name} is not {size_bytes} bytes in {form}", "compute it again", fault=name)
    return promised


class SizedBody:
    """A body with one of these sizes. Raises Refused with 400, as S3 does, before the store makes it visible."""

    def __init__(self, body: ReadableBody, sizes: range) -> None:
        self._body, self._sizes = body, sizes
        self._size_bytes = 0

    def read(self, count: int, /) -> bytes:
        """See ReadableBody."""
        data = self._body.read(count)
        self._size_bytes += len(data)
        if self._size_bytes > self._sizes[-1]:
            raise Refused(400, f"the file is larger than {self._sizes[-1]} bytes", LINK_HINT, fault="file")
        if not data and self._size_bytes < self._sizes[0]:
            raise Refused(400, f"the file is smaller than {self._sizes[0]} bytes", LINK_HINT, fault="file")
        return data
