"""Converts DynamoDB items to rows of text."""

import json
from collections.abc import Callable, Iterator, Sequence
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

# DynamoDB attribute values: from a response body to the text of a cell; a number never becomes a float.
#
# Invariants: a number keeps the text that DynamoDB sent; equal values give equal text, so sets and maps, which have no
# order, are sorted. The items of a response pass through the SDK as raw bytes, unparsed. Formats:
# contracts/dynamodb.md, section 6.

TEXT_LIMIT = 200
Taken = bytes | msgspec.Raw


class AttributeValue(msgspec.Struct, gc=False, omit_defaults=True):
    """One attribute value: exactly one field is set. `N` stays text, `B` stays base64."""

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
    """A botocore `before-parse` handler: takes the items out as raw bytes; the SDK parses the rest as usual.

    Leaves a malformed body to the SDK, which then raises its error.
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
    """Parse the items from `take_items`. Raises Transient if they are not in DynamoDB's format."""
    try:
        return _ITEMS.decode(taken)
    except (msgspec.DecodeError, TypeError) as error:  # TypeError: `take_items` left the items to the SDK
        raise Transient(
            f"DynamoDB's response cannot be read: {str(error)[:TEXT_LIMIT]}",
            "check that DYNAMODB_ENDPOINT_URL is DynamoDB; it is retried",
        ) from error


def timestamp_text(item: Item, attribute: str) -> str | None:
    """The text of a string or number attribute; None if it is absent or of another type."""
    value = item.get(attribute)
    if value is None:
        return None
    return value.S if value.S is not None else value.N


def text_of(item: Item) -> bytes:
    """The item in DynamoDB JSON, as `aws dynamodb put-item` accepts it; equal items give equal text."""
    return _SORTED.encode(item)


def cell(value: AttributeValue | None) -> str:
    """The cell text of an attribute: absent and NULL are empty; BOOL, sets, maps and lists are JSON; others as stored.

    Binaries stay base64.
    """
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


# Converts pages of items to rows of text, in the columns seen so far.
#
# The first page of an hour is read value by value to learn the attributes and their types. A decoder built from them
# reads the next pages in one step. It accepts only these attributes and types; a page with anything else is read value
# by value again, and extends them. Invariant: both ways give the same rows and columns; a test compares them.

ANY = ""  # mixed types, or a type whose cell is not the received text
TIMED = ("S", "N")
MISSES = 8
KEPT_READERS = 16
WIDE_COLUMNS = 1000
MOST_CELLS = 1 << 21

Row = Sequence[str]
Columns = tuple[str, ...]
Read = Callable[[Taken], list[Row]]


def rows_at_once(columns: Columns, most: int) -> int:
    """How many rows of these columns to hold in memory, at most `most`."""
    return max(1, min(most, MOST_CELLS // len(columns)))


class PageReader:
    """Reads the pages of one hour. Not thread-safe.

    `columns` begin with `timestamp` and omit the attribute `left_out`. Rows that `wanted` rejects are dropped, and so
    are columns that only such rows have. `items` counts all items read, `rows` those kept.
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

    def read(self, taken: Taken) -> Iterator[list[Row]]:
        """The rows of a page in `columns`, which may grow, in parts that fit into memory: each item of a page may have
        attributes of its own. Raises Transient for a malformed page.
        """
        if (rows := self._in_one_step(taken)) is not None:
            yield rows
            return
        items, wanted = items_of(taken), self._wanted
        self.items += len(items)
        if wanted is not None:
            items = [item for item in items if wanted.takes(item)]
        self.rows += len(items)
        self._learn(items)
        step = rows_at_once(self.columns, len(items))
        for first in range(0, len(items), step):
            yield [_cells(item, self.columns) for item in items[first : first + step]]

    def _in_one_step(self, taken: Taken) -> list[Row] | None:
        """The rows if all items have known attributes and types and all timestamps are readable, else None."""
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
        """Learn attributes and types from these items. After MISSES failed pages, stop using the fast decoder."""
        known = self._letters
        for item in items:
            for name, value in item.items():
                letter = _letter(value)
                if known.setdefault(name, letter) != letter:
                    known[name] = ANY
        timestamp = self.columns[0]
        self.columns = (timestamp, *sorted(known.keys() - {timestamp, self._left_out}))
        letters = tuple(known.get(name, ANY) for name in self.columns)
        is_regular = self._misses < MISSES and len(self.columns) < WIDE_COLUMNS
        self._read = _reader(self.columns, letters, self._left_out) if is_regular else None


def _only(letter: str) -> tuple[Any, Any]:
    """A type for values of one type letter, which refuses others, and its empty value."""
    kind = msgspec.defstruct(letter, [(letter, str)], frozen=True, gc=False, forbid_unknown_fields=True)
    return kind, kind("")


_FIELDS = {**{letter: _only(letter) for letter in "NSB"}, ANY: (AttributeValue | None, None)}


@lru_cache(KEPT_READERS)
def _reader(columns: Columns, letters: tuple[str, ...], left_out: str) -> Read | None:
    """A reader for pages of items with these attributes and type letters; it raises DecodeError for others.

    None if such a decoder is impossible: a field name must not contain quotes, backslashes or control characters, and
    all timestamps must be of one type, text or number; otherwise items are read value by value.
    """
    if len(columns) == 1 or letters[0] not in TIMED:  # with one field, `attrgetter` returns no tuple
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
        if not values:
            return list(rows)
        made: list[Any] = [list(row) for row in rows]
        for row in made:
            for at in values:
                row[at] = cell(row[at])
        return made

    return read


def _letter(value: AttributeValue) -> str:
    if value.N is not None:
        return "N"
    if value.S is not None:
        return "S"
    return "B" if value.B is not None else ANY


def _cells(item: Item, columns: Columns) -> Row:
    get = item.get
    return ["" if (value := get(name)) is None else value.N if value.N is not None else cell(value) for name in columns]
