"""Line protocol, the text format for writing points: `measurement,tag=value field=value time`.

Invariant: a line is either one whole point or a `BadLine` that names it. Escaping follows two sets of rules, one for
names and tag values (backslash before comma, space, equals sign), one for quoted strings (backslash before quote and
backslash). Error texts are those of a real InfluxDB 1.6.
"""

import math
import re
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

Value = float | int | str | bool
Tags = tuple[tuple[str, str], ...]

PRECISION_NS = {"ns": 1, "n": 1, "us": 10**3, "u": 10**3, "ms": 10**6, "s": 10**9, "m": 60 * 10**9, "h": 3600 * 10**9}
MIN_TIME_NS = -(2**63) + 2
MAX_TIME_NS = 2**63 - 2
NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?")
INTEGER = re.compile(r"[+-]?\d+")
LINE = re.compile(r'(?:[^"\n\\]|\\[^\n]|\\(?=\n)|"(?:[^"\\]|\\.|\\\n)*"|")*', re.DOTALL)
BOOLEANS = dict.fromkeys(("t", "T", "true", "True", "TRUE"), True) | dict.fromkeys(
    ("f", "F", "false", "False", "FALSE"), False
)


class BadLine(ValueError):
    """A line that is not a point; the message is the server's."""

    def __init__(self, line: str, reason: str) -> None:
        super().__init__(f"unable to parse '{line}': {reason}")


class Field(NamedTuple):
    """One value of a point. `kind` is float, integer, unsigned, string or boolean."""

    name: str
    kind: str
    value: Value


class Point(NamedTuple):
    """One point: tags sorted by name, at least one field, nanoseconds since 1970."""

    measurement: str
    tags: Tags
    fields: tuple[Field, ...]
    time_ns: int


def parse_lines(text: str, now_ns: int, precision: str = "ns") -> Iterator[Point]:
    """The points of `text`; blank lines and comments are skipped. A line without a time gets `now_ns`.

    Raises BadLine at the first line that is not a point, and KeyError for an unknown precision.
    """
    unit_ns = PRECISION_NS[precision]
    for raw in split_lines(text):
        line = raw.strip(" \t\r\n\x00")
        if line and not line.startswith("#"):
            yield parse_line(line, now_ns, unit_ns)


def split_lines(text: str) -> Iterator[str]:
    """Cut at line ends, but not at those inside a quoted string."""
    if '"' not in text:
        yield from text.split("\n")
        return
    at = 0
    while at < len(text):
        end = _line_end(text, at)
        yield text[at:end]
        at = end + 1


def _line_end(text: str, at: int) -> int:
    end = text.find("\n", at)
    if end < 0:
        end = len(text)
    if text.find('"', at, end) < 0:
        return end
    found = LINE.match(text, at)
    return found.end() if found else end


def parse_line(line: str, now_ns: int, unit_ns: int = 1) -> Point:
    """The point of one line. Raises BadLine."""
    key, fields, time = _three_parts(line)
    measurement, tags = _series_key(key, line)
    if not fields:
        raise BadLine(line, "missing fields")
    return Point(measurement, tags, tuple(_fields(fields, line)), _time(time, line, now_ns, unit_ns))


def _three_parts(line: str) -> tuple[str, str, str]:
    if "\\" not in line and '"' not in line:
        parts = line.split()
    else:
        parts = [part for part in _split(line, " ", quotes_after=1) if part]
    if len(parts) > 3:  # noqa: PLR2004 - key, fields, time
        raise BadLine(line, "bad timestamp")
    return (*parts, "", "")[:3]  # type: ignore[return-value]


def _split(text: str, separator: str, quotes_after: int = 0) -> Iterator[str]:
    """Cut at each separator that is neither escaped nor, from the part `quotes_after` on, inside a quoted string."""
    start = at = number = 0
    quoted = False
    while at < len(text):
        char = text[at]
        if char == "\\":
            at += 1
        elif char == '"' and number >= quotes_after:
            quoted = not quoted
        elif char == separator and not quoted:
            yield text[start:at]
            start, number = at + 1, number + 1
        at += 1
    yield text[start:]


def _series_key(key: str, line: str) -> tuple[str, Tags]:
    try:
        return parse_series_key(key)
    except ValueError as error:
        raise BadLine(line, str(error)) from error


@lru_cache(maxsize=4096)
def parse_series_key(key: str) -> tuple[str, Tags]:
    """Measurement and sorted tags of `m,a=1,b=2`. Raises ValueError with the reason."""
    measurement, *pairs = _split(key, ",", quotes_after=len(key))
    if not measurement:
        raise ValueError("missing measurement")
    tags = {}
    for pair in pairs:
        name, *rest = _split(pair, "=", quotes_after=len(pair))
        if not name:
            raise ValueError("missing tag key")
        if len(rest) != 1 or not rest[0]:
            raise ValueError("missing tag value" if len(rest) < 2 else "invalid tag format")  # noqa: PLR2004 - one value
        if _plain(name) in tags:
            raise ValueError("duplicate tags")
        tags[_plain(name)] = _plain(rest[0])
    return _plain(measurement), tuple(sorted(tags.items()))


def _plain(text: str) -> str:
    """Remove escaping backslashes; a backslash before anything else is literal."""
    return re.sub(r"\\([, =])", r"\1", text) if "\\" in text else text


def _fields(text: str, line: str) -> Iterator[Field]:
    simple = "\\" not in text and '"' not in text
    for pair in text.split(",") if simple else _split(text, ","):
        name, *rest = pair.split("=", 1) if simple else _name_and_value(pair)
        if not name:
            raise BadLine(line, "missing field key")
        if not rest or not rest[0]:
            raise BadLine(line, "missing field value")
        yield _field(name if simple else _plain(name), rest[0], line)


def _name_and_value(pair: str) -> list[str]:
    name = next(_split(pair, "=", quotes_after=1))
    return [name, pair[len(name) + 1 :]]


def _field(name: str, text: str, line: str) -> Field:
    last = text[-1]
    if last in "0123456789." and NUMBER.fullmatch(text):
        return Field(name, "float", _float(text, line))
    if last in "iu" and INTEGER.fullmatch(text[:-1]):
        return _integer(name, text, line)
    if text in BOOLEANS:
        return Field(name, "boolean", BOOLEANS[text])
    if text[0] == '"' and last == '"' and len(text) > 1:
        return Field(name, "string", re.sub(r'\\(["\\])', r"\1", text[1:-1]))
    raise BadLine(line, "unbalanced quotes" if text[0] == '"' else "invalid number")


def _float(text: str, line: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise BadLine(line, "invalid float")
    return value


def _integer(name: str, text: str, line: str) -> Field:
    digits, unsigned = text[:-1], text[-1] == "u"
    low, high = (0, 2**64) if unsigned else (-(2**63), 2**63)
    if len(digits) > 20 or not low <= int(digits) < high:  # noqa: PLR2004 - digits of 2**64 and a sign
        parse = "ParseUint" if unsigned else "ParseInt"
        kind = "unsigned" if unsigned else "integer"
        reason = f'unable to parse {kind} {digits}: strconv.{parse}: parsing "{digits}": value out of range'
        raise BadLine(line, reason)
    return Field(name, "unsigned" if unsigned else "integer", int(digits))


def _time(text: str, line: str, now_ns: int, unit_ns: int) -> int:
    if not text:
        return now_ns // unit_ns * unit_ns
    if not INTEGER.fullmatch(text):
        raise BadLine(line, "bad timestamp")
    if len(text) > 20:  # noqa: PLR2004 - digits of 2**64 and a sign
        raise BadLine(line, f'strconv.ParseInt: parsing "{text}": value out of range')
    time_ns = int(text) * unit_ns
    if not MIN_TIME_NS <= time_ns <= MAX_TIME_NS:
        raise BadLine(line, "time outside range -9223372036854775806 - 9223372036854775806")
    return time_ns
