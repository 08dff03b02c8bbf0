"""Rows in the text form of PostgreSQL's COPY, made column by column, since that costs a fraction of a value at a time.

Invariant: what COPY reads back is the very row, whatever tabs, newlines and backslashes its text holds. Source:
https://www.postgresql.org/docs/current/sql-copy.html, "Text Format".
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

BLOCK_ROWS = 1000
NULL = r"\N"
NONE = type(None)
ESCAPES = str.maketrans({"\\": r"\\", "\t": r"\t", "\n": r"\n", "\r": r"\r"})


def copy_text(rows: Iterable[Sequence[Any]]) -> Iterator[bytes]:
    """Blocks of whole lines. Values are None, bool, int, float and str."""
    each = iter(rows)
    while block := list(islice(each, BLOCK_ROWS)):
        yield block_text(list(zip(*block, strict=True)))


def block_text(columns: Sequence[Sequence[Any]]) -> bytes:
    """The lines of some rows, which are given by column."""
    return ("\n".join(map("\t".join, zip(*map(_texts, columns), strict=True))) + "\n").encode()


def _texts(column: Sequence[Any]) -> Sequence[str]:
    kinds = set(map(type, column))
    if kinds == {NONE}:
        return [NULL] * len(column)
    if kinds <= {str, NONE}:
        return _escaped(column, nullable=NONE in kinds)
    if bool in kinds:
        return [NULL if value is None else _plain(value) for value in column]
    if NONE in kinds:
        return [NULL if value is None else str(value) for value in column]
    return list(map(str, column))


def _plain(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value).translate(ESCAPES)


def _escaped(column: Sequence[Any], *, nullable: bool) -> Sequence[str]:
    """A column of text; most hold nothing to escape, which three searches over all of it tell."""
    joined = "".join(filter(None, column)) if nullable else "".join(column)
    if "\\" in joined or "\t" in joined or "\n" in joined or "\r" in joined:
        return [NULL if value is None else value.translate(ESCAPES) for value in column]
    return [NULL if value is None else value for value in column] if nullable else column
