"""What the values of a column become: plain values, in the form that both databases read.

Invariant: a whole column at a time, since that costs a fraction of a value at a time; what only some values are is left
to the way value by value, and what cannot be stored raises Suspicious, OverflowError or an error of the decoder.
"""

import re
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from types import NoneType
from typing import Any

import msgspec
from msgspec import UNSET, Raw, UnsetType

from app.dwh import strict
from app.dwh.tables import KEY_CHARACTERS, Column
from app.stores.sql_values import instant_text

BLANK = re.compile(rb"[ \t\r\n]")
BETWEEN = re.compile(rb'("(?:[^"\\]|\\.)*")|[ \t\r\n]+', re.DOTALL)
SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
Values = Sequence[Any]
Turn = Callable[[Values], Values]

ABSENT = {NoneType, UnsetType}
UUID_CHARACTERS, UUID_BYTES = 36, 16
HYPHENS = (8, 13, 18, 23)
NAIVE, WHOLE = len("2026-02-07T12:34:56.789000"), len("2026-02-07T12:34:56.789000Z")
SECONDS = len("2026-02-07T12:34:56")
# What an instant of each length lacks: msgspec leaves out what is zero, and the offset where there is none.
LACKING = {SECONDS: ".000000Z", SECONDS + 1: ".000000Z", NAIVE: "Z", WHOLE: ""}


def turn(column: Column) -> Turn:
    """The function for the values of a column."""
    if column.kind == "uuid":
        return _uuids
    if column.kind == "instant":
        return _instants
    if column.kind == "json":
        return lambda values: [_json(value) if value else None for value in values]
    if column.takes_integers:
        return _texts
    default = column.default
    return lambda values: [default if value is None or value is UNSET else value for value in values]


def turn_present(column: Column) -> Turn | None:
    """The same for values that are there or null; None when such values are as they have to be."""
    as_they_are = column.kind in ("text", "integer", "bigint", "float", "bool") and not column.takes_integers
    return None if as_they_are and column.default is None else turn(column)


def check_uuids(values: Sequence[str]) -> None:
    """Raise Suspicious unless all of these, each of 36 characters, are UUIDs."""
    text = "".join(values)
    if any(text[place::UUID_CHARACTERS].count("-") < len(values) for place in HYPHENS):
        raise strict.Suspicious
    try:
        made = bytes.fromhex(text.replace("-", ""))
    except ValueError:
        raise strict.Suspicious from None
    if len(made) < UUID_BYTES * len(values):
        raise strict.Suspicious


def _uuids(values: Values) -> Values:
    text = "".join(values)
    return values if text == text.lower() else [value.lower() for value in values]


def _texts(values: Values) -> Values:
    """Text, of which some may have come as integers."""
    if set(map(type, values)) <= {str, NoneType}:
        return values
    return [None if value is None or value is UNSET else _text(value) for value in values]


def _text(value: Any) -> str:
    text = value if isinstance(value, str) else str(value)
    if len(text) > KEY_CHARACTERS and not isinstance(value, str):
        raise strict.Suspicious
    return text


def _instants(values: Values) -> Values:
    if ABSENT.isdisjoint(map(type, values)):
        return instant_texts(values)
    present = [value for value in values if value]
    texts = iter(instant_texts(present) if present else ())
    return [next(texts) if value else None for value in values]


def instant_texts(instants: Sequence[datetime]) -> Sequence[str]:
    """As `instant_text`; naive ones are in UTC. Encoded all together, and mended where the encoder is brief."""
    encoded = msgspec.json.encode(instants)[2:-2]
    texts = encoded.decode().split('","')
    lengths = set(map(len, texts))
    if lengths == {WHOLE}:
        return texts
    if lengths == {NAIVE}:
        return (encoded.replace(b'","', b'Z","') + b"Z").decode().split('","')
    return [_mended(text, at) for text, at in zip(texts, instants, strict=True)]


def _mended(text: str, at: datetime) -> str:
    lacking = LACKING.get(len(text))
    if lacking is None:
        return instant_text(at.astimezone(UTC))
    return (text if len(text) > SECONDS + 1 else text[:SECONDS]) + lacking


def _json(raw: Raw) -> str | None:
    """The value as it was written, without the blanks between its parts: 1.10 stays 1.10, thirty digits stay thirty.
    It is decoded all the same, which finds what is no JSON, no Unicode, or no finite number.
    """
    value = msgspec.json.decode(raw)
    if value is None:
        return None
    strict.check_depth(raw, value)
    text = bytes(raw)
    strict.check_numbers(text)
    if SURROGATE.search(text):
        msgspec.json.encode(value)  # raises for half of a pair
    if BLANK.search(text):
        text = BETWEEN.sub(rb"\1", text)
    return text.decode()


def decoded_again(json_texts: Sequence[str]) -> Sequence[str]:
    """JSON as a decoder leaves it, which keeps one of two equal keys."""
    return [msgspec.json.encode(msgspec.json.decode(text)).decode() for text in json_texts]
