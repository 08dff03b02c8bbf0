"""Pages of items as rows of text, each row in the columns that the pages so far have shown.

The first page of an hour is read value by value, and shows which attributes there are and of which type. From them a
decoder is made that reads the next pages in one step; it takes nothing but these attributes and types, so a page with
anything else is read value by value again, and more is known.
Invariant: both ways give the same rows and columns; a test compares them.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import compress
from operator import attrgetter
from types import GenericAlias
from typing import Any, Protocol

import msgspec

from app.dynamo_to_drive.decode import Item, Taken, Value, cell, items_of

ANY = ""  # a type, or types, whose cell is not the text that came
TIMED = ("S", "N")
MISSES = 8
KEPT_READERS = 16

Row = Sequence[str]
Columns = tuple[str, ...]
Read = Callable[[Taken], list[Row]]


class Wanted(Protocol):
    """Which items make rows."""

    def has_all(self, texts: Sequence[str]) -> bool:
        """True when each of these timestamps is certainly wanted. False says nothing."""

    def has(self, text: str) -> bool | None:
        """Whether a timestamp is wanted; None when it cannot be read."""

    def takes(self, item: Item) -> bool:
        """Whether an item is wanted. One whose timestamp cannot be read is accounted for in this call."""


class Pages:
    """Reads the pages of one hour. Not safe from several threads.

    `columns` begin with `timestamp`; the attribute `left_out` is none of them. Rows that `wanted` does not want are
    dropped, and so are columns that only such rows have. `items` counts those of all pages, `rows` those wanted.
    """

    def __init__(self, timestamp: str, left_out: str, wanted: Wanted | None = None) -> None:
        self.columns: Columns = (timestamp,)
        self.items = 0
        self.rows = 0
        self._left_out = left_out
        self._wanted = wanted
        self._letters: dict[str, str] = {}
        self._read: Read | None = None
        self._misses = 0

    def read(self, taken: Taken) -> list[Row]:
        """The rows of a page in `columns`, which may have grown. Raises Transient for what is no page."""
        rows = self._in_one_step(taken)
        if rows is not None:
            return rows
        items = items_of(taken)
        self.items += len(items)
        wanted = self._wanted
        items = items if wanted is None else [item for item in items if wanted.takes(item)]
        self.rows += len(items)
        self._learn(items)
        return [_cells(item, self.columns) for item in items]

    def _in_one_step(self, taken: Taken) -> list[Row] | None:
        """The rows where all items of the page are as known and all timestamps can be read, else None."""
        if self._read is None:
            return None
        try:
            rows = self._read(taken)
        except msgspec.DecodeError:
            self._misses += 1
            return None
        wanted, number = self._wanted, len(rows)
        if wanted is not None and not wanted.has_all([row[0] for row in rows]):
            has = [wanted.has(row[0]) for row in rows]
            if None in has:
                return None
            rows = list(compress(rows, has))
        self.items += number
        self.rows += len(rows)
        return rows

    def _learn(self, items: Sequence[Item]) -> None:
        """What these items show of attributes and types. A table that never ends to show more is not followed."""
        known = self._letters
        for item in items:
            for name, value in item.items():
                letter = _letter(value)
                if known.setdefault(name, letter) != letter:
                    known[name] = ANY
        timestamp = self.columns[0]
        self.columns = (timestamp, *sorted(known.keys() - {timestamp, self._left_out}))
        letters = tuple(known.get(name, ANY) for name in self.columns)
        self._read = _reader(self.columns, letters, self._left_out) if self._misses < MISSES else None


class _N(msgspec.Struct, frozen=True, gc=False, forbid_unknown_fields=True):
    N: str


class _S(msgspec.Struct, frozen=True, gc=False, forbid_unknown_fields=True):
    S: str


class _B(msgspec.Struct, frozen=True, gc=False, forbid_unknown_fields=True):
    B: str


_FIELDS: dict[str, tuple[Any, Any]] = {
    "N": (_N, _N("")),
    "S": (_S, _S("")),
    "B": (_B, _B("")),
    ANY: (Value | None, None),
}


@lru_cache(KEPT_READERS)
def _reader(columns: Columns, letters: tuple[str, ...], left_out: str) -> Read | None:
    """Reads pages of items with these attributes, each of its letter, and raises DecodeError for others.

    None when there is no such decoder: a field's name may hold no quote, backslash or control character. A timestamp
    is text or a number; where items differ in that, or it is something else, they are looked at one by one.
    """
    if len(columns) == 1 or letters[0] not in TIMED:  # of one field `attrgetter` makes no row
        return None
    fields: list[tuple[str, Any, Any]] = [(f"f{at}", *_FIELDS[letter]) for at, letter in enumerate(letters)]
    names = {f"f{at}": name for at, name in enumerate(columns)}
    if left_out:
        fields.append(("left_out", msgspec.Raw, msgspec.Raw()))
        names["left_out"] = left_out
    try:
        row = msgspec.defstruct("Row", fields, rename=names, forbid_unknown_fields=True, gc=False)
    except ValueError:
        return None
    decoder = msgspec.json.Decoder(GenericAlias(list, (row,)))
    cells = attrgetter(*[f"f{at}.{letter}" if letter else f"f{at}" for at, letter in enumerate(letters)])
    values = [at for at, letter in enumerate(letters) if letter == ANY]

    def read(taken: Taken) -> list[Row]:
        rows = map(cells, decoder.decode(taken))
        return [_told(row, values) for row in rows] if values else list(rows)

    return read


def _told(row: Sequence[Any], values: Sequence[int]) -> Row:
    """The row with the text of those cells that are values still."""
    made = list(row)
    for at in values:
        made[at] = cell(made[at])
    return made


def _letter(value: Value) -> str:
    if value.N is not None:
        return "N"
    if value.S is not None:
        return "S"
    return "B" if value.B is not None else ANY


def _cells(item: Item, columns: Columns) -> Row:
    get = item.get
    return ["" if (value := get(name)) is None else value.N if value.N is not None else cell(value) for name in columns]
