"""Items of DynamoDB as rows of text."""

import json
from collections.abc import Callable, Sequence
from decimal import Decimal
from functools import lru_cache
from itertools import compress
from operator import attrgetter
from types import GenericAlias
from typing import TYPE_CHECKING, Any

import msgspec

from app.core.errors import Transient

if TYPE_CHECKING:
    from app.dynamo_to_drive.source import WantedItems

# DynamoDB's attribute values: from the body of an answer to the text of a cell, without a number ever being a float.
#
# Invariants: a number's text is the one that DynamoDB sent; the same value always gives the same text, so sets and
# maps, which have no order, are sorted. The items of an answer pass through the SDK as the bytes that came: it does
# not parse them. The shapes are those of contracts/dynamodb.md, section 6.

TEXT_LIMIT = 200
Taken = bytes | msgspec.Raw


class AttributeValue(msgspec.Struct, gc=False, omit_defaults=True):
    """One attribute: exactly one field is set. `N` stays text, `B` stays base64 as it came."""

    N: str | None = None
    S: str | None = None
    B: str | None = None
    BOOL: bool | None = None
    NULL: bool | None = None
    M: "dict[str, AttributeValue] | None" = None
    L: "list[AttributeValue] | None" = None
    SS: list[str] | None = None
    NS: list[str] | None = None
    BS: list[str] | None = None


Item = dict[str, AttributeValue]


_ANSWERS = msgspec.json.Decoder(dict[str, msgspec.Raw])
_ITEMS = msgspec.json.Decoder(list[Item])
_ENCODER = msgspec.json.Encoder()
_SORTED = msgspec.json.Encoder(order="deterministic")


def take_items(response_dict: dict[str, Any], customized_response_dict: dict[str, Any], **_: Any) -> None:
    """A handler for botocore's `before-parse`: the items are put aside as bytes, all else is the SDK's as ever.

    A broken body is left to the SDK, which then says what is wrong with it.
    """
    if response_dict["status_code"] != 200:  # noqa: PLR2004 - HTTP's own word for fine
        return
    try:
        page = _ANSWERS.decode(response_dict["body"])
    except ValueError:
        return
    if "Items" in page:
        customized_response_dict["Items"] = page.pop("Items")
        response_dict["body"] = _ENCODER.encode(page)


def items_of(taken: Taken) -> list[Item]:
    """The items that `take_items` put aside. Raises Transient for what is not of DynamoDB's form."""
    try:
        return _ITEMS.decode(taken)
    except (msgspec.DecodeError, TypeError) as error:  # TypeError: left to the SDK, which took it
        raise Transient(
            f"DynamoDB's answer cannot be read: {str(error)[:TEXT_LIMIT]}",
            "check that DYNAMODB_ENDPOINT_URL is DynamoDB; it is retried",
        ) from error


def timestamp_text(item: Item, attribute: str) -> str | None:
    """The text or number of an attribute; None where it is absent or anything else."""
    value = item.get(attribute)
    if value is None:
        return None
    return value.S if value.S is not None else value.N


def text_of(item: Item) -> bytes:
    """The item in DynamoDB's JSON, as `aws dynamodb put-item` takes it; the same item always gives the same text."""
    return _SORTED.encode(item)


def cell(value: AttributeValue | None) -> str:
    """The text of an attribute: absent and NULL are empty, sets, maps and lists are JSON, the rest is as stored."""
    if value is None:
        return ""
    if value.N is not None:
        return value.N
    if value.S is not None:
        return value.S
    if value.B is not None:
        return value.B
    return "" if value.NULL is not None else as_json(value)


def as_json(value: AttributeValue) -> str:
    """JSON with sorted keys and sorted sets; numbers keep every digit, binaries are base64 text."""
    if value.M is not None:
        return f"{{{','.join(f'{_text(name)}:{as_json(value.M[name])}' for name in sorted(value.M))}}}"
    if value.L is not None:
        return f"[{','.join(map(as_json, value.L))}]"
    if value.NS is not None:
        return f"[{','.join(sorted(value.NS, key=lambda text: (Decimal(text), text)))}]"
    texts = value.SS if value.SS is not None else value.BS
    if texts is not None:
        return f"[{','.join(map(_text, sorted(texts)))}]"
    if value.N is not None or value.BOOL is not None:
        return value.N or str(value.BOOL).lower()
    text = value.S if value.S is not None else value.B
    return "null" if text is None else _text(text)


def _text(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


# Pages of items as rows of text, each row in the columns that the pages so far have shown.
#
# The first page of an hour is read value by value, and shows which attributes there are and of which type. From them
# a decoder is made that reads the next pages in one step; it takes nothing but these attributes and types, so a page
# with anything else is read value by value again, and more is known. Invariant: both ways give the same rows and
# columns; a test compares them.

ANY = ""  # a type, or types, whose cell is not the text that came
TIMED = ("S", "N")
MISSES = 8
KEPT_READERS = 16

Row = Sequence[str]
Columns = tuple[str, ...]
Read = Callable[[Taken], list[Row]]


class PageReader:
    """Reads the pages of one hour. Not safe from several threads.

    `columns` begin with `timestamp`; the attribute `left_out` is none of them. Rows that `wanted` does not want are
    dropped, and so are columns that only such rows have. `items` counts those of all pages, `rows` those wanted.
    """

    def __init__(self, timestamp: str, left_out: str, wanted: "WantedItems | None" = None) -> None:
        self.columns: Columns = (timestamp,)
        self.items = 0
        self.rows = 0
        self._left_out = left_out
        self._wanted = wanted
        self._letters: dict[str, str] = {}
        self._read: Read | None = None
        self._misses = 0

    def read(self, taken: Taken) -> list[Row]:
        """The rows of a page in `columns`, which may have grown. Raises Transient for what is not a page."""
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
        except (msgspec.DecodeError, TypeError):
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
    ANY: (AttributeValue | None, None),
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


def _letter(value: AttributeValue) -> str:
    if value.N is not None:
        return "N"
    if value.S is not None:
        return "S"
    return "B" if value.B is not None else ANY


def _cells(item: Item, columns: Columns) -> Row:
    get = item.get
    return ["" if (value := get(name)) is None else value.N if value.N is not None else cell(value) for name in columns]
