"""CSV as rows of JSON, so that its values are checked by the same compiled decoder as all others.

Invariants: rows are cut outside of quotes; an empty cell is null; a cell never changes what stands in another one.
Source of the form: RFC 4180, with a header line, in UTF-8, a byte order mark tolerated.
"""

import csv
import io
import re
from collections.abc import Callable, Iterator, Sequence

import msgspec

from app.dwh.bodies import GROUP_ROWS, row_too_large
from app.dwh.faults import SHAPE_HINT, BadRequest
from app.dwh.tables import Column, Table

NUMBER = re.compile(r"-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][+-]?\d+)?", re.ASCII)
BOM = b"\xef\xbb\xbf"
Cell = Callable[[str], bytes]


class CsvBody:
    """Header, then rows; see the module."""

    def __init__(self, table: Table, row_bytes: int) -> None:
        self._table = table
        self._row_bytes = row_bytes
        self._rest = b""
        self._heads: Sequence[bytes] = ()
        self._cells: Sequence[Cell] = ()

    def feed(self, block: bytes) -> Iterator[Sequence[bytes]]:
        """See `Body.feed`."""
        self._rest += block
        end = _row_end(self._rest)
        whole, self._rest = self._rest[:end], self._rest[end:]
        if len(self._rest) > self._row_bytes:
            raise row_too_large(self._row_bytes)
        yield from self._groups(whole)

    def finish(self) -> Iterator[Sequence[bytes]]:
        """See `Body.finish`."""
        yield from self._groups(self._rest)

    def _groups(self, whole: bytes) -> Iterator[Sequence[bytes]]:
        rows: list[bytes] = []
        for cells in _parsed(whole):
            if not self._heads:
                self._head(cells)
            elif cells:
                rows.append(self._row(cells))
            if len(rows) == GROUP_ROWS:
                yield rows
                rows = []
        if rows:
            yield rows

    def _head(self, cells: Sequence[str]) -> None:
        columns = {column.name: column for column in self._table.columns}
        cells = [cells[0].removeprefix("\ufeff"), *cells[1:]] if cells else []
        unknown = [cell[:80] for cell in cells if cell not in columns]
        if unknown or len(set(cells)) < len(cells) or self._table.key.name not in cells:
            what = f"{unknown[0]!r} is no column" if unknown else f"columns twice, or no {self._table.key.name}"
            raise BadRequest(422, f"the header cannot be used: {what}", SHAPE_HINT, "header")
        self._heads = [msgspec.json.encode(cell) + b":" for cell in cells]
        self._cells = [_cell(columns[cell]) for cell in cells]

    def _row(self, cells: Sequence[str]) -> bytes:
        if len(cells) != len(self._heads):
            name = f"{len(cells)} cells where the header names {len(self._heads)}"
            return b'{"' + name.encode() + b'":null}'  # the decoder refuses it by this name
        pairs = zip(self._heads, self._cells, cells, strict=True)
        return b"{" + b",".join([head + turned(cell) for head, turned, cell in pairs]) + b"}"


def _row_end(held: bytes) -> int:
    """Behind the last newline that has an even number of quotes before it; 0 when there is none."""
    end = held.rfind(b"\n")
    quotes = held.count(b'"', 0, end + 1)
    while end >= 0 and quotes % 2:
        before = held.rfind(b"\n", 0, end)
        quotes -= held.count(b'"', before + 1, end)
        end = before
    return end + 1


def _parsed(whole: bytes) -> Iterator[list[str]]:
    try:
        # Decoded as it is read: a StringIO takes four bytes a character.
        yield from csv.reader(io.TextIOWrapper(io.BytesIO(whole), "utf-8", newline=""), strict=True)
    except UnicodeDecodeError:
        raise BadRequest(400, "the body is not UTF-8", "encode it as UTF-8") from None
    except csv.Error as error:
        raise BadRequest(400, f"the body is not CSV: {error}", "quote cells as RFC 4180 says") from None


def _cell(column: Column) -> Cell:
    """The cell's JSON. What is no value of the kind becomes a string, which the decoder then refuses by its field."""
    if column.kind in ("text", "uuid", "instant"):
        return lambda cell: msgspec.json.encode(cell) if cell else b"null"
    if column.kind == "json":
        return _json
    if column.kind == "bool":
        return lambda cell: {"": "null", "true": "true", "false": "false"}.get(cell.lower(), '"?"').encode()
    return lambda cell: (cell if NUMBER.fullmatch(cell) else '"?"').encode() if cell else b"null"


def _json(cell: str) -> bytes:
    raw = cell.encode()
    try:
        msgspec.json.decode(raw, type=msgspec.Raw)
    except (msgspec.MsgspecError, RecursionError):
        return b'"\\ud800"' if cell else b"null"  # a string that is no Unicode is no JSON either
    return raw
