"""What the conditions and ranges of a request ask for: Range, If-Range, If-Match, If-None-Match.

Invariant: pure functions; what cannot be read as a range is no range, as RFC 9110 wants it.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from app.objects.faults import NotServed
from app.stores.objects import ObjectInfo

RANGE = re.compile(r"bytes=\s*(\d{0,18})\s*-\s*(\d{0,18})\s*")
TAG = re.compile(r'(?:W/)?"[^"]*"')
CHANGED_HINT = "look at the object, then send it again"


@dataclass(frozen=True, slots=True)
class Span:
    """The bytes `[first, first + count)`; `part` False = it is the whole object."""

    first: int
    count: int
    part: bool


def span_of(fields: Mapping[str, str], held: ObjectInfo) -> Span:
    """What to send. Raises NotServed with 416 for a range that begins behind the end."""
    size_bytes = held.size_bytes
    match = RANGE.fullmatch(fields.get("range", ""))
    whole = Span(0, size_bytes, part=False)
    if match is None or match[1] + match[2] == "" or not _still(fields.get("if-range"), held.etag):
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
    return Span(first, last - first + 1, part=True)


def _still(if_range: str | None, etag: str) -> bool:
    """A date is never taken for the version: it has only seconds."""
    return if_range is None or if_range.strip() == etag


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
