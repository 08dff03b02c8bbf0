"""DynamoDB's attribute values: from the body of an answer to the text of a cell, without a number ever being a float.

Invariant: a number's text is the one that DynamoDB sent; the same value always gives the same text, so sets and maps,
which have no order, are sorted. The shapes are those of contracts/dynamodb.md, section 6.
"""

import json
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

import msgspec

Rest = bytes


class Value(msgspec.Struct, gc=False):
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
    """A page of Query or Scan; what is not named here is dropped."""

    Items: list[Item] = []
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
_ENCODER = msgspec.json.Encoder()


def split_page(body: bytes) -> tuple[list[Item], Rest]:
    """The items of a page, and the rest of its document as a body for the SDK. Raises ValueError when it is broken."""
    page = _ANSWERS.decode(body)
    rest = _Rest(page.Count, page.ScannedCount, page.LastEvaluatedKey, page.ConsumedCapacity)
    return page.Items, _ENCODER.encode(rest)


def take_items(response_dict: dict[str, Any], customized_response_dict: dict[str, Any], **_: Any) -> None:
    """A handler for botocore's `before-parse`: the items are decoded here, all else by the SDK as ever.

    A broken body is left to the SDK, which then says what is wrong with it.
    """
    if response_dict["status_code"] != 200:  # noqa: PLR2004 - HTTP's own word for fine
        return
    try:
        items, rest = split_page(response_dict["body"])
    except ValueError:
        return
    customized_response_dict["Items"] = items
    response_dict["body"] = rest


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
