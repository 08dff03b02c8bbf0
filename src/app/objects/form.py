"""The file of a multipart form as a body, without keeping it anywhere.

Invariant: the body ends only when the whole form was read and holds exactly one file; a form that breaks off raises.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from app.objects.faults import NotServed
from app.stores.transfers import Readable

FIELD = "file"
MOST_FIELDS = 100
STEP_BYTES = 1 << 18
FORM_HINT = "send one file, as `curl -F file=@name` does, or the bare bytes"


class Form:
    """Reads to the file when it is made. `content_type` is what the file's own header says, "" for nothing."""

    def __init__(self, body: Readable, boundary: str) -> None:
        self._body = body
        self._events = self._parsed(boundary)
        self._piece = memoryview(b"")
        self.content_type = self._find()

    def read(self, count: int, /) -> bytes:
        """See Readable."""
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
                return str(event.content_type or "")
        raise NotServed(422, "the form holds no file", FORM_HINT, fault=FIELD)

    def _finish(self) -> None:
        if any(_is_file(event) for event in self._events):
            raise NotServed(422, "the form holds more than one file", FORM_HINT, fault=FIELD)

    def _parsed(self, boundary: str) -> Iterator[Any]:
        """Segments, the bytes of each, and None at its end. Raises NotServed."""
        from multipart import MultipartError, PushMultipartParser

        try:
            parser = PushMultipartParser(boundary, max_segment_count=MOST_FIELDS)
            while not parser.closed:
                yield from parser.parse(self._body.read(STEP_BYTES))
            while self._body.read(STEP_BYTES):
                pass  # what follows the form belongs to it and means nothing
        except MultipartError as error:
            raise NotServed(400, f"the form cannot be read: {error}", FORM_HINT) from error


def _is_file(event: Any) -> bool:
    name = getattr(event, "name", None)
    return name is not None and (name == FIELD or event.filename is not None)


def boundary_of(fields: Mapping[str, str]) -> str | None:
    """The boundary of a multipart form; None for a bare body. Raises NotServed."""
    from multipart import parse_options_header

    given = fields.get("content-type", "")
    if not given.lower().startswith("multipart/"):
        return None
    kind, options = parse_options_header(given)
    if kind != "multipart/form-data" or not options.get("boundary"):
        raise NotServed(415, f"{kind} without what is needed to read it", FORM_HINT, fault="Content-Type")
    return str(options["boundary"])
