"""Decodes and checks rows of JSON, with a typed decoder per table that is built from the table's declaration."""

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import lru_cache, partial
from types import NoneType
from typing import Annotated, Any

import msgspec
from msgspec import UNSET, Meta, Raw, UnsetType
from msgspec.structs import astuple

from app.db.database import instant_text
from app.dwh.tables import BY_NAME, INTEGER_BITS, KEY_CHARACTERS, Table, TableColumn
from app.web.errors import Refused

# Faults of rows, as reported to the caller.
#
# Invariant: a message gives the location and what is expected; only `fault` of a request may repeat a value of the
# body.

SHAPE_HINT = "see /docs for the columns of this table"
ROW_HINT = "correct that row, or send ?on_error=skip to store the others"


@dataclass(frozen=True, slots=True)
class RowFault:
    """A row that cannot be stored. `index` counts from 0; `field` is "" if the fault is in the row as a whole."""

    index: int
    field: str
    message: str

    def refusal(self) -> Refused:
        """The error when one bad row makes the whole request fail."""
        where = f"row {self.index}, field {self.field}" if self.field else f"row {self.index}"
        fault = f"data.{self.index}.{self.field}" if self.field else f"data.{self.index}"
        return Refused(422, f"{where}: {self.message}", ROW_HINT, fault)


# Splits text that the JSON decoder refused as a whole, so that the one invalid value can be named.
#
# Invariant: this is only a fallback for refused text; each part is decoded again, strictly.

TOKEN = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|["\[\]{},]', re.DOTALL)
KEY_OF_MEMBER = re.compile(rb'[ \t\r\n]*("[^"\\]*+(?:\\.[^"\\]*+)*+")[ \t\r\n]*:', re.DOTALL)
CLOSING = {b"[": b"]", b"{": b"}"}
SHOWN_CHARACTERS = 60


class CsvRow(bytes):
    """The JSON of a CSV row. `fault`: column and message if a cell cannot be converted to JSON."""

    fault: tuple[str, str] | None = None


def split_json(text: bytes) -> Sequence[bytes]:
    """The text between the commas of a JSON array or object. Raises ValueError if a string or bracket is not closed, or
    if anything follows the end.
    """
    parts: list[bytes] = []
    opened: list[bytes] = []
    start = 1
    for token in TOKEN.finditer(text):
        mark = token[0]
        if mark in CLOSING and (opened or token.start() == 0):
            opened.append(CLOSING[mark])
        elif mark == b'"' or not opened:
            break
        elif mark in (b"]", b"}"):
            if opened.pop() != mark:
                break
            if not opened:
                if text[token.end() :].strip(b" \t\r\n"):
                    break
                last = text[start : token.start()]
                return [*parts, last] if parts or last.strip() else []
        elif mark == b"," and len(opened) == 1:
            parts.append(text[start : token.start()])
            start = token.end()
    raise ValueError("strings or brackets do not match")


def json_members(row: bytes) -> Mapping[str, bytes]:
    """Key -> JSON of the value, for each member of a row; members that cannot be split are left out."""
    found: dict[str, bytes] = {}
    with suppress(ValueError):
        for part in split_json(row.strip(b" \t\r\n")):
            if key := KEY_OF_MEMBER.match(part):
                found[json.loads(key[1].decode("utf-8", "replace"), strict=False)] = part[key.end() :]
    return found


def has_json_grammar(text: bytes) -> bool:
    """Whether this is JSON except for a value that JSON does not allow: NaN, Infinity, a lone surrogate, a control
    character, invalid UTF-8. Text that nests too deeply to be parsed also counts: its brackets match.
    """
    try:
        json.loads(text.decode("utf-8", "surrogateescape"), strict=False, parse_int=str, parse_float=str)
    except ValueError:
        return False
    except RecursionError:
        return True
    return True


def quoted_value(value: str) -> str:
    """A value for a message: short, in quotes, without control characters."""
    return repr(value if len(value) <= SHOWN_CHARACTERS else value[:SHOWN_CHARACTERS] + "…")


# Detects what a JSON decoder accepts and a warehouse must not: repeated keys, NUL, deep nesting.
#
# Invariant: nothing suspicious goes unnoticed, at the cost of a few searches through the whole text. Keys are counted:
# `":` follows each key. If there is no whitespace between the two, and no escape hides a quote or a colon, the text has
# at least as many `":` as keys; if that equals the number of keys from the decoder, no key was repeated.

MAX_DEPTH = 100
MARK = b'":'
BLANKS = (b" ", b"\t", b"\n", b"\r")
HIDDEN = (rb"\u0000", rb"\u0022", rb"\u003")
NUMBER_CHARACTERS = 1000
SMALL_OR_LONG = re.compile(rb"[eE]-[0-9]{3}|[0-9]{400}")
# Possessive: a group that may give back its matches keeps a hundred bytes for each of them.
TOKENS = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|-?[0-9][0-9.eE+-]*', re.DOTALL)
NUL_IN_JSON = re.compile(r"(?<!\\)(?:\\\\)*+\\u0000")


class NeedsRowCheck(Exception):
    """The rows must be checked one by one."""


def check_keys(text: bytes, keys: int, json_texts: Sequence[str]) -> None:
    """Raise NeedsRowCheck unless `text` certainly has no repeated key and no NUL. A decoder produced `keys` columns and
    `json_texts` from it.
    """
    # Searching for one byte is ten times faster than for two; most texts have no escapes and no whitespace but spaces.
    if b"\\" in text and any(mark in text for mark in HIDDEN):
        raise NeedsRowCheck
    if any(blank in text and blank + b":" in text for blank in BLANKS):
        raise NeedsRowCheck
    if text.count(MARK) != keys + "\n".join(json_texts).count('":'):
        raise NeedsRowCheck


def repeated_key(text: bytes) -> str | None:
    """A key that occurs twice in one object of `text`, or None. `text` is known to be valid JSON."""
    repeated: list[str] = []

    def check(pairs: list[tuple[str, Any]]) -> None:
        if len({key for key, _ in pairs}) < len(pairs):
            repeated.append(Counter(key for key, _ in pairs).most_common(1)[0][0])

    json.loads(text, object_pairs_hook=check, parse_int=str, parse_float=str)
    return repeated[0] if repeated else None


def check_numbers(text: bytes) -> None:
    """Raise NeedsRowCheck for a nonzero number that underflows a double, or one with very many digits.

    PostgreSQL expands such numbers: eight characters such as 1e-16000 come back as sixteen thousand.
    """
    if SMALL_OR_LONG.search(text):
        for number in (token[0] for token in TOKENS.finditer(text) if not token[0].startswith(b'"')):
            vanishes = float(number) == 0 and number.lower().partition(b"e")[0].strip(b"-0.")
            if len(number) > NUMBER_CHARACTERS or vanishes:
                raise NeedsRowCheck


def depth(value: Any) -> int:
    """The nesting depth of objects and arrays. Iterates level by level, so that depth uses no stack."""
    levels = 0
    level = [value]
    while level := [each for each in level if isinstance(each, dict | list)]:
        levels += 1
        level = [inner for each in level for inner in (each.values() if isinstance(each, dict) else each)]
    return levels


# Converts the values of a column to plain values, in the form that both databases accept.
#
# Invariant: a whole column is converted at once, at a fraction of the cost per value; columns with mixed values fall
# back to value by value; what cannot be stored raises NeedsRowCheck, OverflowError or a decoder error.

BLANK = re.compile(rb"[ \t\r\n]")
BETWEEN = re.compile(rb'("[^"\\]*+(?:\\.[^"\\]*+)*+")|[ \t\r\n]+', re.DOTALL)
SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
Values = Sequence[Any]
Turn = Callable[[Values], Values]

ABSENT = {NoneType, UnsetType}
UUID_CHARACTERS, UUID_BYTES = 36, 16
HYPHENS = (8, 13, 18, 23)
NAIVE, WHOLE = len("2026-02-07T12:34:56.789000"), len("2026-02-07T12:34:56.789000Z")
SECONDS = len("2026-02-07T12:34:56")
# The missing suffix by length of a timestamp: msgspec omits zero microseconds, and the offset of naive ones.
LACKING = {SECONDS: ".000000Z", SECONDS + 1: ".000000Z", NAIVE: "Z", WHOLE: ""}


def converter_of(column: TableColumn) -> Turn:
    """The function that converts the values of a column."""
    if column.kind == "uuid":
        return _uuids
    if column.kind == "instant":
        return _instants
    if column.kind == "json":
        return lambda values: [_json(value) if value else None for value in values]
    return _texts if column.takes_integers else partial(_filled, default=column.default)


def _filled(values: Values, *, default: bool | None) -> Values:
    kinds = set(map(type, values))
    if UnsetType not in kinds and (default is None or NoneType not in kinds):
        return values
    return [default if value is None or value is UNSET else value for value in values]


def _uuids(values: Values) -> Values:
    """Check all UUIDs together, which is cheaper than a regex for each. All have 36 characters."""
    text = "".join(values)
    if any(text[place::UUID_CHARACTERS].count("-") < len(values) for place in HYPHENS):
        raise NeedsRowCheck
    try:
        made = bytes.fromhex(text.replace("-", ""))
    except ValueError:
        raise NeedsRowCheck from None
    if len(made) < UUID_BYTES * len(values):
        raise NeedsRowCheck
    return values if text == text.lower() else [value.lower() for value in values]


def _texts(values: Values) -> Values:
    """Convert values to text; some may be integers."""
    if set(map(type, values)) <= {str, NoneType}:
        return values
    return [None if value is None or value is UNSET else _text(value) for value in values]


def _text(value: Any) -> str:
    text = value if isinstance(value, str) else str(value)
    if len(text) > KEY_CHARACTERS and not isinstance(value, str):
        raise NeedsRowCheck
    return text


def _instants(values: Values) -> Values:
    if ABSENT.isdisjoint(map(type, values)):
        return instant_texts(values)
    present = [value for value in values if value]
    texts = iter(instant_texts(present) if present else ())
    return [next(texts) if value else None for value in values]


def instant_texts(instants: Sequence[datetime]) -> Sequence[str]:
    """As `instant_text`; naive ones are in UTC. All are encoded together, then what the encoder omits is added."""
    encoded = msgspec.json.encode(instants)[2:-2]
    texts = encoded.decode().split('","')
    lengths = set(map(len, texts))
    if lengths == {WHOLE}:
        return texts
    if lengths == {NAIVE}:
        return (encoded.replace(b'","', b'Z","') + b"Z").decode().split('","')
    return [
        (text if len(text) > SECONDS + 1 else text[:SECONDS]) + LACKING[len(text)]
        if len(text) in LACKING
        else instant_text(at.astimezone(UTC))
        for text, at in zip(texts, instants, strict=True)
    ]


def _json(raw: Raw) -> str | None:
    """The JSON as written, minus whitespace between tokens: 1.10 stays 1.10, thirty digits stay thirty. It is still
    decoded to detect invalid JSON, invalid Unicode and numbers that are not finite.
    """
    value = msgspec.json.decode(raw)
    if value is None:
        return None
    text = bytes(raw)
    if text.count(b"[") + text.count(b"{") > MAX_DEPTH and depth(value) > MAX_DEPTH:
        raise NeedsRowCheck  # databases and readers may not handle deeper nesting
    check_numbers(text)
    if SURROGATE.search(text):
        msgspec.json.encode(value)  # raises for a lone surrogate
    if BLANK.search(text):
        text = BETWEEN.sub(rb"\1", text)
    return text.decode()


# Decodes rows of JSON and checks them in compiled code: a typed decoder per table, built from its declaration.
#
# Invariants: a returned row can be stored in either database and means the same in both; any other row is reported with
# its field. Source of the types: https://jcristharif.com/msgspec/supported-types.html.

Slice = bytes | Raw

UNREADABLE = (msgspec.MsgspecError, RecursionError, UnicodeDecodeError)
WITHOUT_NUL = "^[^\\x00]*$"
MISSING = re.compile(r"missing required field `(.+?)`")
UNKNOWN = re.compile(r"unknown field `(.*)`", re.DOTALL)
AT = re.compile(r" - at `\$\.(\w+)")
FIELD_CHARACTERS = 80
UNKNOWN_COLUMN = "is not a column of this table"


@dataclass(frozen=True, slots=True)
class CheckedRows:
    """The valid rows, by column, with the received size of each, and the faults of the others."""

    columns: Sequence[Values]
    sizes: Sequence[int]
    faults: Sequence[RowFault] = field(default_factory=tuple)


class RowReader:
    """Turns the JSON of rows into values for one table."""

    def __init__(self, table: Table) -> None:
        self._columns = {column.name: column for column in table.columns}
        fields = [_field(column) for column in table.columns]
        self.row_type = row_type(fields)
        self._decode: Callable[[Slice], Any] = msgspec.json.Decoder(self.row_type).decode
        self._turns = [converter_of(column) for column in table.columns]
        self._json = [position for position, column in enumerate(table.columns) if column.kind == "json"]

    def read(self, slices: Sequence[Slice], first: int) -> CheckedRows:
        """Check consecutive rows of a body, all at once where that is possible; the first has the index `first`."""
        try:
            columns: list[Values] = list(zip(*map(astuple, map(self._decode, slices)), strict=True))
            keys = len(slices) * len(columns) - sum(column.count(UNSET) for column in columns)
            turned = [turn(column) for turn, column in zip(self._turns, columns, strict=True)]
            json_texts = [value for position in self._json for value in turned[position] if value]
            # the decoder keeps only one of two equal keys
            again = [msgspec.json.encode(msgspec.json.decode(text)).decode() for text in json_texts]
            check_keys(b",".join(slices), keys, again)
        except (*UNREADABLE, NeedsRowCheck, OverflowError):
            return self._one_by_one(slices, first)
        return CheckedRows(turned, list(map(len, slices)))

    def _one_by_one(self, slices: Sequence[Slice], first: int) -> CheckedRows:
        rows: list[Values] = []
        sizes: list[int] = []
        faults: list[RowFault] = []
        for index, each in enumerate(slices, first):
            fault = self._fault(each, index)
            if fault is None:
                rows.append([turn(value)[0] for turn, value in self._turned(each)])
                sizes.append(len(each))
            else:
                faults.append(fault)
        return CheckedRows(list(zip(*rows, strict=True)), sizes, tuple(faults))

    def _turned(self, row: Slice) -> Sequence[tuple[Turn, Values]]:
        return [(turn, (value,)) for turn, value in zip(self._turns, astuple(self._decode(row)), strict=True)]

    def _fault(self, row: Slice, index: int) -> RowFault | None:
        """The fault of one row, or None."""
        if isinstance(row, CsvRow) and row.fault:
            return RowFault(index, *row.fault)
        try:
            turned_row = self._turned(row)
        except UNREADABLE as error:
            return self._unread(row, index, error)
        for column, (turn, value) in zip(self._columns.values(), turned_row, strict=True):
            try:
                (turned,) = turn(value)
            except (*UNREADABLE, NeedsRowCheck, OverflowError):
                return self._wrong(row, index, column.name)
            # neither database stores NUL; in JSON it is escaped
            if isinstance(turned, str) and (NUL_IN_JSON.search(turned) if column.kind == "json" else "\x00" in turned):
                return self._wrong(row, index, column.name)
        repeated = repeated_key(bytes(row))
        return None if repeated is None else RowFault(index, repeated[:FIELD_CHARACTERS], "is given twice")

    def _wrong(self, row: Slice, index: int, name: str) -> RowFault:
        """The fault of a value that its column does not accept. Only CSV cells are repeated in the message."""
        column = self._columns.get(name)
        if column is None:
            return RowFault(index, name[:FIELD_CHARACTERS], UNKNOWN_COLUMN)
        value = json_members(row).get(name) if isinstance(row, CsvRow) else None
        instead = f", not {quoted_value(str(msgspec.json.decode(value)))}" if value else ""
        return RowFault(index, name, f"must be {column.wanted}{instead}")

    def _unread(self, row: Slice, index: int, error: Exception) -> RowFault:
        text = str(error)
        if found := MISSING.search(text):
            return RowFault(index, found[1], "is required")
        if found := UNKNOWN.search(text):
            return RowFault(index, found[1][:FIELD_CHARACTERS], UNKNOWN_COLUMN)
        if found := AT.search(text):
            return self._wrong(row, index, found[1])
        if isinstance(error, msgspec.ValidationError):
            return RowFault(index, "", "a row must be an object with columns by name")
        for name, value in json_members(bytes(row)).items():
            try:
                msgspec.json.encode(msgspec.json.decode(value))
            except UNREADABLE:
                return self._wrong(row, index, name)
        return RowFault(index, "", "is not valid JSON in UTF-8")


def row_type(fields: Sequence[Any]) -> Any:
    """A row type with exactly these fields."""
    return msgspec.defstruct("Row", fields, forbid_unknown_fields=True, kw_only=True, gc=False)


@lru_cache(maxsize=16)
def reader(table_name: str, *, merging: bool = False) -> RowReader:
    """The reader of a table; cached, since building a typed decoder is slow.

    `merging`: absent values keep those of the existing row, so a column with a default must be given.
    """
    table = BY_NAME[table_name]
    if merging:
        columns = [replace(each, required=each.required or each.default is not None) for each in table.columns]
        table = replace(table, columns=columns)
    return RowReader(table)


def _field(column: TableColumn) -> Any:
    kind, about = value_type(column), Meta(description=column.wanted)
    if column.required:
        return column.name, Annotated[kind, about]
    wider = kind if column.kind == "json" else kind | None | UnsetType
    return column.name, Annotated[wider, about], UNSET


def value_type(column: TableColumn) -> Any:
    """The type that a value is decoded as. Constraints that are checked elsewhere appear only in its JSON Schema."""
    if column.kind in INTEGER_BITS:
        bits = INTEGER_BITS[column.kind]
        return Annotated[int, Meta(ge=-(1 << bits), le=(1 << bits) - 1)]
    if column.kind == "text":
        least, most = (1, KEY_CHARACTERS) if column.required else (None, None)
        without_nul = {"pattern": WITHOUT_NUL}
        text: Any = Annotated[str, Meta(min_length=least, max_length=most, extra_json_schema=without_nul)]
        return text | int if column.takes_integers else text
    size = UUID_CHARACTERS
    uuid: Any = Annotated[str, Meta(min_length=size, max_length=size, extra_json_schema={"format": "uuid"})]
    at: Any = Annotated[datetime, Meta(extra_json_schema={"format": "date-time"})]
    return {"uuid": uuid, "float": float, "bool": bool, "json": Raw, "instant": at}[column.kind]
