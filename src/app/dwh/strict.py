r"""What a JSON decoder lets pass and a warehouse must not: repeated keys, NUL, deep nesting.

Invariant: nothing suspicious passes unseen, at the cost of a few searches through all the text. Keys are counted:
`":` stands behind each key, so when no blank may come between the two, and no escape hides a quote or a colon, the
text has at least as many as it has keys; when it has just as many as came out of the decoder, none was there twice.
"""

import json
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from app.dwh.tables import Column

MAX_DEPTH = 100
MARK = b'":'
BLANKS = (b" ", b"\t", b"\n", b"\r")
HIDDEN = (rb"\u0000", rb"\u0022", rb"\u003")
NUMBER_CHARACTERS = 1000
SMALL_OR_LONG = re.compile(rb"[eE]-[0-9]{3}|[0-9]{400}")
TOKENS = re.compile(rb'"(?:[^"\\]|\\.)*"|-?[0-9][0-9.eE+-]*', re.DOTALL)
NUL_IN_JSON = re.compile(r"(?<!\\)(?:\\\\)*\\u0000")


class Suspicious(Exception):
    """Only a look at each row by itself can tell."""


class _Repeated(Exception):
    pass


def check_keys(text: bytes, keys: int, json_texts: Sequence[str]) -> None:
    """`keys` columns and `json_texts`, as a decoder leaves them, came from `text`: raise Suspicious unless it has no
    repeated key and no NUL.
    """
    # One byte is found ten times quicker than two, and most texts hold neither escapes nor blanks but spaces.
    if b"\\" in text and any(mark in text for mark in HIDDEN):
        raise Suspicious
    if any(blank in text and blank + b":" in text for blank in BLANKS):
        raise Suspicious
    if text.count(MARK) != keys + "\n".join(json_texts).count('":'):
        raise Suspicious


def repeated_key(text: bytes) -> str | None:
    """A key that one object of `text` holds twice; None when there is none. `text` is JSON that was read already."""

    def check(pairs: list[tuple[str, Any]]) -> None:
        if len({key for key, _ in pairs}) < len(pairs):
            raise _Repeated(Counter(key for key, _ in pairs).most_common(1)[0][0])

    try:
        json.loads(text, object_pairs_hook=check, parse_int=str, parse_float=str)
    except _Repeated as repeated:
        return str(repeated)
    return None


def holds_nul(value: str, column: Column) -> bool:
    """True when the text of a value holds a NUL, which no database stores; in JSON it is escaped."""
    return bool(NUL_IN_JSON.search(value)) if column.kind == "json" else "\x00" in value


def check_depth(raw: Any, value: Any) -> None:
    """Raise Suspicious for JSON that nests deeper than databases and readers can be trusted with."""
    text = bytes(raw)
    if text.count(b"[") + text.count(b"{") > MAX_DEPTH and depth(value) > MAX_DEPTH:
        raise Suspicious


def check_numbers(text: bytes) -> None:
    """Raise Suspicious for a number that is not 0 and yet nearer to it than a double can be, or of very many digits.

    PostgreSQL writes such a number out: nine characters such as 1e-16000 come back as sixteen thousand.
    """
    if SMALL_OR_LONG.search(text):
        numbers = (token for token in TOKENS.findall(text) if not token.startswith(b'"'))
        if any(len(number) > NUMBER_CHARACTERS or _vanishes(number) for number in numbers):
            raise Suspicious


def _vanishes(number: bytes) -> bool:
    mantissa = number.lower().partition(b"e")[0]
    return float(number) == 0 and mantissa.strip(b"-0.") != b""


def depth(value: Any) -> int:
    """How many objects and arrays are around the innermost value. Level by level, so that depth costs no stack."""
    levels = 0
    level = [value]
    while level := [each for each in level if isinstance(each, dict | list)]:
        levels += 1
        level = [inner for each in level for inner in (each.values() if isinstance(each, dict) else each)]
    return levels
