"""What becomes of one incoming file, in the plainest words, with the standard library's reader; nothing clever."""

import csv
import io
import re
from collections.abc import Sequence

from app.csv_inbox.config import FaultKind
from inbox_world import Table

MEBIBYTE = 1 << 20
RECORD_BYTES = 16 * MEBIBYTE
csv.field_size_limit(1 << 30)


class Rejected(Exception):
    """The file is set aside; the argument is the kind of fault."""


def table_of(
    content: bytes,
    master: Table | None,
    *,
    delimiter: str = ",",
    encoding: str = "utf-8",
    key: str = "k",
    required: Sequence[str] = (),
    max_bytes: int = 500 * MEBIBYTE,
) -> Table:
    """The columns and rows that a file means. Raises Rejected."""
    if len(content) > max_bytes:
        raise Rejected(FaultKind.TOO_LARGE)
    text = text_of(content, encoding)
    said = re.match(r'"?sep=(.)"?\r?\n', text, re.IGNORECASE)
    if said:
        delimiter, text = said[1], text[said.end() :]
    first, *others = [rows_of(part, delimiter) for part in text.replace("\n\ufeff", "\n\0").split("\0")]
    if not first:
        raise Rejected(FaultKind.NO_ROWS)
    known = [key, *required, *(master[0] if master else [])]
    header, rows = first[0], first[1:]
    names = names_of(header, known)
    for part in others:
        rows += appended(part, names, known)
    rows = [row for row in rows if row != header or len(names) == 1]
    if len(set(names)) < len(names):
        raise Rejected(FaultKind.HEADER)
    if not {key, *required} <= set(names):
        raise Rejected(FaultKind.MISSING_COLUMN)
    if not rows:
        raise Rejected(FaultKind.NO_ROWS)
    return names, checked([even(row, names, header, rows) for row in rows], names.index(key))


def text_of(content: bytes, encoding: str) -> str:
    """The text without byte order marks before it; after one, an encoding other than UTF-8 can only be ASCII."""
    plain = content
    while plain.startswith(b"\xef\xbb\xbf"):
        plain = plain[3:]
    try:
        text = plain.decode("ascii" if plain != content and encoding != "utf-8" else encoding)
    except UnicodeDecodeError as error:
        raise Rejected(FaultKind.ENCODING) from error
    if "\0" in text:
        raise Rejected(FaultKind.ENCODING)
    return text


def appended(rows: list[list[str]], names: list[str], known: Sequence[str]) -> list[list[str]]:
    """The rows of a file that was appended to another one."""
    if rows and names_of(rows[0], known) == names:
        return rows[1:]
    if rows and {name for name in names_of(rows[0], known) if name} & set(names):
        raise Rejected(FaultKind.SECOND_HEADER)
    return rows


def rows_of(text: str, delimiter: str) -> list[list[str]]:
    """All records but blank ones."""
    sentinel = "end"
    rows = list(csv.reader(io.StringIO(f"{text}\n{sentinel}", newline=""), delimiter=delimiter))
    if rows[-1] != [sentinel]:
        longest = len(text.encode()) > RECORD_BYTES
        raise Rejected(FaultKind.LONG_RECORD if longest else FaultKind.OPEN_QUOTE)
    plain = text.replace("\r\n", "\n")
    told_apart = list(csv.reader(io.StringIO(plain.replace("\r", "?"), newline=""), delimiter=delimiter))
    if text.endswith("\r") or len(told_apart) < len(
        list(csv.reader(io.StringIO(plain, newline=""), delimiter=delimiter))
    ):
        raise Rejected(FaultKind.LONE_RETURN)
    if any(sum(len(value.encode()) + 1 for value in row) > RECORD_BYTES for row in rows):
        raise Rejected(FaultKind.LONG_RECORD)
    return [row for row in rows[:-1] if any(value.strip(" \t") for value in row)]


def names_of(header: Sequence[str], known: Sequence[str]) -> list[str]:
    """Blanks around a name are none, and neither are fields behind the last name."""
    bare = [name.strip().strip("\ufeff").strip() for name in header]
    pairs = zip(bare, header, strict=True)
    bare = [name[1:-1] if name != raw and name[:1] == name[-1:] == '"' else name for name, raw in pairs]
    while len(bare) > 1 and not bare[-1]:
        bare.pop()
    if "" in known and len(bare) == len(header) - 1:
        bare.append("")
    return [name if name in known else next((old for old in known if old.strip() == name), name) for name in bare]


def even(row: list[str], names: list[str], header: list[str], rows: list[list[str]]) -> list[str]:
    """The row without empty fields behind the last column, where the header or every row has these."""
    width = len(names)
    surplus_everywhere = {len(each) for each in rows} == {len(row)}
    allowed = width <= len(row) <= len(header) or (len(header) == width and surplus_everywhere)
    if len(row) < width or not allowed or any(value.strip(" \t") for value in row[width:]):
        raise Rejected(FaultKind.RAGGED)
    return row[:width]


def checked(rows: list[list[str]], key: int) -> list[list[str]]:
    """The rows, each of which has a key."""
    if any(not row[key] or "\ufeff" in row[key] for row in rows):
        raise Rejected(FaultKind.EMPTY_KEY)
    return rows
