"""Rows out of JSON, checked in compiled code: a typed decoder per table, made from its declaration.

Invariants: a row that comes out can be stored in either database and means the same in both; a row that cannot is named
with its field. Source of the types: https://jcristharif.com/msgspec/supported-types.html.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from operator import attrgetter
from typing import Annotated, Any

import msgspec
from msgspec import UNSET, Meta, Raw, UnsetType
from msgspec.structs import astuple

from app.dwh import strict, values
from app.dwh.faults import RowFault
from app.dwh.tables import INTEGER_BITS, KEY_CHARACTERS, TABLES, Column, Table
from app.dwh.values import UUID_CHARACTERS, Turn, Values

Slice = bytes | Raw

UUID_PATTERN = r"^[0-9a-fA-F]{8}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{12}\Z"
UNREADABLE = (msgspec.MsgspecError, RecursionError, UnicodeDecodeError)
MISSING = re.compile(r"missing required field `(.+?)`")
UNKNOWN = re.compile(r"unknown field `(.*)`", re.DOTALL)
AT = re.compile(r" - at `\$\.(\w+)")
FIELD_CHARACTERS = 80


@dataclass(frozen=True, slots=True)
class Checked:
    """Rows that can be stored, by column, with the size of each as it came, and those that cannot."""

    columns: Sequence[Values]
    sizes: Sequence[int]
    faults: Sequence[RowFault] = field(default_factory=tuple)

    @property
    def rows(self) -> Sequence[Values]:
        """The good rows."""
        return list(zip(*self.columns, strict=True))


class RowReader:
    """Turns the JSON of rows into values for one table."""

    def __init__(self, table: Table) -> None:
        self._columns = {column.name: column for column in table.columns}
        self._key = table.key
        self._decode = _decoder(table, _field)
        self._decode_whole = _decoder(table, _whole_field)
        self._turns = [values.turn(column) for column in table.columns]
        self._values_of = [attrgetter(column.name) for column in table.columns]
        self._whole_turns = [values.turn_present(column) for column in table.columns]
        self._json = [position for position, column in enumerate(table.columns) if column.kind == "json"]

    def read(self, slices: Sequence[Slice], first: int) -> Checked:
        """Rows that stand next to each other in a body, the first with the index `first`."""
        try:
            columns = self._together(slices)
        except (*UNREADABLE, strict.Suspicious, OverflowError):
            return self._one_by_one(slices, first)
        return Checked(columns, list(map(len, slices)))

    def _together(self, slices: Sequence[Slice]) -> Sequence[Values]:
        """All of them at once. Raises Suspicious when something can only be told row by row."""
        try:
            columns, keys = self._whole(slices), len(slices) * len(self._columns)
        except UNREADABLE:
            columns, keys = self._sparse(slices)
        json_texts = [value for position in self._json for value in columns[position] if value]
        strict.check_keys(b",".join(slices), keys, values.decoded_again(json_texts))
        return columns

    def _whole(self, slices: Sequence[Slice]) -> Sequence[Values]:
        """Rows that have every column, as those of most callers: nothing has to be looked for and filled in."""
        rows = list(map(self._decode_whole, slices))
        columns: list[Values] = [list(map(value_of, rows)) for value_of in self._values_of]
        if self._key.kind == "uuid":
            values.check_uuids(columns[0])
        return [turn(column) if turn else column for turn, column in zip(self._whole_turns, columns, strict=True)]

    def _sparse(self, slices: Sequence[Slice]) -> tuple[Sequence[Values], int]:
        """Rows that lack some columns, and how many keys they have."""
        columns: list[Values] = list(zip(*map(astuple, map(self._decode, slices)), strict=True))
        keys = len(slices) * len(columns) - sum(column.count(UNSET) for column in columns)
        return [turn(column) for turn, column in zip(self._turns, columns, strict=True)], keys

    def _one_by_one(self, slices: Sequence[Slice], first: int) -> Checked:
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
        return Checked(list(zip(*rows, strict=True)), sizes, tuple(faults))

    def _turned(self, row: Slice) -> Sequence[tuple[Turn, Values]]:
        return [(turn, (value,)) for turn, value in zip(self._turns, astuple(self._decode(row)), strict=True)]

    def _fault(self, row: Slice, index: int) -> RowFault | None:
        """What is wrong with one row; None when nothing is."""
        try:
            turned_row = self._turned(row)
        except UNREADABLE as error:
            return self._unread(index, error)
        for column, (turn, value) in zip(self._columns.values(), turned_row, strict=True):
            try:
                (turned,) = turn(value)
            except (*UNREADABLE, strict.Suspicious, OverflowError):
                return RowFault(index, column.name, f"must be {column.wanted}")
            if isinstance(turned, str) and strict.holds_nul(turned, column):
                return RowFault(index, column.name, f"must be {column.wanted}")
        repeated = strict.repeated_key(bytes(row))
        return None if repeated is None else RowFault(index, repeated[:FIELD_CHARACTERS], "is there twice")

    def _unread(self, index: int, error: Exception) -> RowFault:
        text = str(error)
        if found := MISSING.search(text):
            return RowFault(index, found[1], "is required")
        if found := UNKNOWN.search(text):
            return RowFault(index, found[1][:FIELD_CHARACTERS], "is no column of this table")
        if found := AT.search(text):
            column = self._columns.get(found[1])
            return RowFault(index, found[1], f"must be {column.wanted}" if column else "cannot be read")
        if isinstance(error, msgspec.ValidationError):
            return RowFault(index, "", "a row is an object, its columns by name")
        return RowFault(index, "", "is not JSON in UTF-8 that can be read")


@lru_cache(maxsize=16)
def reader(table_name: str) -> RowReader:
    """The reader of a table; made once, since a typed decoder takes a while to make."""
    return RowReader(next(table for table in TABLES if table.name == table_name))


def _decoder(table: Table, field_of: Callable[[Column], Any]) -> Callable[[Slice], Any]:
    fields = [field_of(column) for column in table.columns]
    row: Any = msgspec.defstruct(f"Row_{table.name}", fields, forbid_unknown_fields=True, kw_only=True, gc=False)
    return msgspec.json.Decoder(row).decode


def _whole_field(column: Column) -> Any:
    """Required, though it may be null. The pattern of a UUID costs more than to check all of them together."""
    if column.kind == "uuid":
        return column.name, Annotated[str, Meta(min_length=UUID_CHARACTERS, max_length=UUID_CHARACTERS)]
    kind = _type(column)
    return column.name, kind if column.required or column.kind == "json" else kind | None


def _field(column: Column) -> Any:
    kind = _type(column)
    if column.required:
        return column.name, kind
    wider = kind if column.kind == "json" else kind | None | UnsetType
    return column.name, wider, UNSET


def _type(column: Column) -> Any:
    if column.kind in INTEGER_BITS:
        bits = INTEGER_BITS[column.kind]
        return Annotated[int, Meta(ge=-(1 << bits), le=(1 << bits) - 1)]
    if column.kind == "text":
        text: Any = Annotated[str, Meta(min_length=1, max_length=KEY_CHARACTERS)] if column.required else str
        return text | int if column.takes_integers else text
    uuid: Any = Annotated[str, Meta(pattern=UUID_PATTERN)]
    return {"uuid": uuid, "float": float, "bool": bool, "json": Raw, "instant": datetime}[column.kind]
