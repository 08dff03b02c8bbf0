"""DynamoDB's attribute values: from the body of an answer to the text of a cell, without a number ever being a float.

Invariants: a number's text is the one that DynamoDB sent; the same value always gives the same text, so sets and maps,
which have no order, are sorted. The items of an answer pass through the SDK as the bytes that came: it does not parse
them. The shapes are those of contracts/dynamodb.md, section 6.
"""

import json
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

import msgspec

from app.core.errors import Transient

TEXT_LIMIT = 200
Taken = bytes | msgspec.Raw


class Value(msgspec.Struct, gc=False, omit_defaults=True):
    """One attribute: exactly one field is set. `N` stays text, `B` stays base64 as it came."""

    N: str | None = None
    S: str | None = None
    B: str | None = None
    BOOL: bool | None = None
    NULL: bool | None = None
    M: "dict[str, Value] | None" = None
    L: "list[Value] | None" = None
    SS: list[str] | None = None
    NS: list[str] | None = None
    BS: list[str] | None = None


Item = dict[str, Value]


class _Answer(msgspec.Struct):
    """A page of Query or Scan; what is not named here is dropped. Without items it is none."""

    Items: msgspec.Raw
    Count: int = 0
    ScannedCount: int = 0
    LastEvaluatedKey: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    ConsumedCapacity: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET


class _Rest(msgspec.Struct):
    Count: int
    ScannedCount: int
    LastEvaluatedKey: msgspec.Raw | msgspec.UnsetType
    ConsumedCapacity: msgspec.Raw | msgspec.UnsetType


_ANSWERS = msgspec.json.Decoder(_Answer)
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
    rest = _Rest(page.Count, page.ScannedCount, page.LastEvaluatedKey, page.ConsumedCapacity)
    customized_response_dict["Items"] = page.Items
    response_dict["body"] = _ENCODER.encode(rest)


def items_of(taken: Taken) -> list[Item]:
    """The items that `take_items` put aside. Raises Transient for what is not of DynamoDB's form."""
    try:
        return _ITEMS.decode(taken)
    except msgspec.DecodeError as error:
        raise Transient(
            f"DynamoDB's answer cannot be read: {str(error)[:TEXT_LIMIT]}",
            "check that DYNAMODB_ENDPOINT_URL is DynamoDB; it is tried again",
        ) from error


def timed(item: Item, attribute: str) -> str | None:
    """The text or number of an attribute; None where it is absent or anything else."""
    value = item.get(attribute)
    if value is None:
        return None
    return value.S if value.S is not None else value.N


def text_of(item: Item) -> bytes:
    """The item in DynamoDB's JSON, as `aws dynamodb put-item` takes it; the same item always gives the same text."""
    return _SORTED.encode(item)


def cell(value: Value | None) -> str:
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


def as_json(value: Value) -> str:
    """JSON with sorted keys and sorted sets; numbers keep every digit, binaries are base64 text."""
    if value.N is not None:
        return value.N
    if value.M is not None:
        return _object(value.M)
    if value.L is not None:
        return f"[{','.join(map(as_json, value.L))}]"
    if value.NS is not None:
        return f"[{','.join(sorted(value.NS, key=lambda text: (Decimal(text), text)))}]"
    texts = value.SS if value.SS is not None else value.BS
    if texts is not None:
        return f"[{','.join(map(_text, sorted(texts)))}]"
    return _single(value)


def _object(members: Mapping[str, Value]) -> str:
    return f"{{{','.join(f'{_text(name)}:{as_json(members[name])}' for name in sorted(members))}}}"


def _single(value: Value) -> str:
    if value.BOOL is not None:
        return "true" if value.BOOL else "false"
    text = value.S if value.S is not None else value.B
    return "null" if text is None else _text(text)


def _text(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
