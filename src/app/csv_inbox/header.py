"""The first record of a file: its columns, byte order mark and line end.

Invariant: what comes out has distinct names and is what was written there, to the byte.
"""

import csv
from dataclasses import dataclass

from app.csv_inbox.dialect import BOM, Dialect, Malformed
from app.csv_inbox.records import LONGEST_RECORD_BYTES, Read, marked

PIECE_BYTES = 1 << 16
SHOWN_BYTES = 1000


@dataclass(frozen=True, slots=True)
class Header:
    """The first record. `size_bytes` is where rows begin, byte order mark included; `eol` may be empty."""

    names: tuple[str, ...]
    fields: tuple[bytes, ...]
    bom: bytes
    eol: bytes
    size_bytes: int
    lines: int


def read_header(read: Read, dialect: Dialect) -> Header:
    """The header; reads further than that. Raises Malformed: empty, not decodable, or a name that occurs twice."""
    data = b""
    while piece := read(max(PIECE_BYTES, len(data))):
        data += piece
        if len(data) > LONGEST_RECORD_BYTES or len(marked(data, dialect).lasts):
            break
    bom = BOM if data.startswith(BOM) and dialect.encoding == "utf-8" else b""
    raw = _first(data[len(bom) :], dialect)
    record = raw.removesuffix(b"\n").removesuffix(b"\r") if raw.endswith(b"\n") else raw
    names = _names(dialect, record)
    eol = raw[len(record) :]
    return Header(names, tuple(dialect.fields(record)), bom, eol, len(bom) + len(raw), max(raw.count(b"\n"), 1))


def _first(body: bytes, dialect: Dialect) -> bytes:
    """The first record with its line end, which may be lacking."""
    marks = marked(body, dialect)
    if len(marks.lasts):
        return body[: int(marks.at[marks.lasts[0]]) + 1]
    if not body:
        raise Malformed("the file is empty", 1)
    if body.endswith(b"\r") or len(marked(body + b"\n", dialect).lasts) != 1:
        raise Malformed("the header is not complete: a quote or a line end is cut", 1)
    return body


def _names(dialect: Dialect, record: bytes) -> tuple[str, ...]:
    try:
        names = tuple(dialect.values(record))
    except (UnicodeDecodeError, csv.Error) as error:
        told = f"the header cannot be read as {dialect.encoding}: {error}"
        raise Malformed(told, 1, record[:SHOWN_BYTES]) from error
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise Malformed(f"the column {name!r} occurs twice in the header", 1, record[:SHOWN_BYTES])
        seen.add(name)
    return names
