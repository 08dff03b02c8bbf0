"""Results of InfluxQL as the JSON that InfluxDB 1.x writes, whole or in chunks.

Invariant: `partial` stands on a result until its last document and on a series until its last row; numbers and escapes
are those of Go's encoder, so that answers can be compared to the byte.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from itertools import islice

from simulators.flux_parser import UNITS_NS, rfc3339
from simulators.http_server import Piece
from simulators.influxql import Answered

EPOCHS = {
    "ns": 1,
    "n": 1,
    "u": 1000,
    "µ": 1000,
    "ms": 10**6,
    "s": UNITS_NS["s"],
    "m": UNITS_NS["m"],
    "h": UNITS_NS["h"],
}
DEFAULT_CHUNK_ROWS = 10_000
HTML = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}


@dataclass(frozen=True, slots=True)
class Shape:
    """How the client wants the answer: unit of time ("" = RFC 3339), rows of a document (0 = all in one)."""

    epoch: str = ""
    chunk_rows: int = 0


@dataclass(frozen=True, slots=True)
class Result:
    """One statement's series, or its error."""

    series: Iterable[Answered] = ()
    error: str = ""


def error_document(message: str) -> bytes:
    """An error of the whole request."""
    return f'{{"error":{go_text(message)}}}\n'.encode()


def failed_document(message: str) -> bytes:
    """A document that says, behind others already sent, that the statement failed."""
    return f'{{"results":[{{"statement_id":0,"error":{go_text(message)}}}]}}\n'.encode()


def documents(results: Iterable[Result], shape: Shape) -> Iterator[Piece]:
    """The answer: one document a line, or one in all."""
    if shape.chunk_rows:
        for number, result in enumerate(results):
            yield from _chunks(number, result, shape)
        return
    whole, rows = [], 0
    for number, result in enumerate(results):
        parts = list(_parts(result, Shape(shape.epoch, DEFAULT_CHUNK_ROWS**4)))
        rows += sum(part_rows for _, part_rows in parts)
        whole.append(_result(number, result, [text for text, _ in parts]))
    yield Piece(f'{{"results":[{",".join(whole)}]}}\n'.encode(), rows)


def _chunks(number: int, result: Result, shape: Shape) -> Iterator[Piece]:
    parts = _parts(result, shape)
    held = next(parts, None)
    if held is None:
        yield Piece(f'{{"results":[{_result(number, result, [])}]}}\n'.encode())
    while held is not None:
        following = next(parts, None)
        document = _result(number, result, [held[0]], partial=following is not None)
        yield Piece(f'{{"results":[{document}]}}\n'.encode(), held[1])
        held = following


def _result(number: int, result: Result, series: Sequence[str], *, partial: bool = False) -> str:
    text = f'{{"statement_id":{number}'
    if series:
        text += f',"series":[{",".join(series)}]'
    if result.error:
        text += f',"error":{go_text(result.error)}'
    return text + (',"partial":true}' if partial else "}")


def _parts(result: Result, shape: Shape) -> Iterator[tuple[str, int]]:
    """Each series as JSON with its number of rows, cut into parts of at most `chunk_rows`."""
    for one in result.series:
        write = _row_writer(one, shape.epoch)
        rows = iter(one.rows)
        batch = list(islice(rows, shape.chunk_rows))
        while True:
            following = list(islice(rows, shape.chunk_rows))
            yield _series(one, map(write, batch), partial=bool(following)), len(batch)
            if not following:
                break
            batch = following


def _series(one: Answered, rows: Iterable[str], *, partial: bool) -> str:
    text = "{" + (f'"name":{go_text(one.name)},' if one.name else "")
    if one.tags is not None:
        text += f'"tags":{_object(one.tags)},'
    columns = ",".join(map(go_text, one.columns))
    text += f'"columns":[{columns}],"values":[{",".join(rows)}]'
    return text + (',"partial":true}' if partial else "}")


def _object(tags: Mapping[str, str]) -> str:
    return "{" + ",".join(f"{go_text(name)}:{go_text(value)}" for name, value in sorted(tags.items())) + "}"


def _row_writer(one: Answered, epoch: str) -> Callable[[Sequence[object]], str]:
    if not one.timed:
        return lambda row: f"[{','.join(map(go_value, row))}]"
    unit = EPOCHS.get(epoch)

    def write(row: Sequence[object]) -> str:
        time = int(row[0])  # type: ignore[call-overload]
        at = f'"{rfc3339(time)}"' if unit is None else str(time // unit)
        return ",".join((f"[{at}", *map(go_value, row[1:]))) + "]"

    return write


def go_value(value: object) -> str:
    """A cell as Go's encoder writes it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return go_float(value)
    return go_text(value) if isinstance(value, str) else str(value)


def go_float(value: float) -> str:
    """Plain decimals, with an exponent below 1e-6 and from 1e21 on (`1e+21`, `1e-7`)."""
    text = repr(value)
    if text.endswith(".0"):
        return text[:-2]
    if "e" not in text:
        return text
    mantissa, exponent = text.split("e")
    if -6 <= int(exponent) < 21:  # noqa: PLR2004 - Go's own limits
        return format(Decimal(text), "f")
    sign = "-" if exponent.startswith("-") else "+"
    return f"{mantissa}e{sign}{abs(int(exponent))}"


def go_text(text: str) -> str:
    """A JSON string with Go's escapes for HTML."""
    plain = json.dumps(text, ensure_ascii=False)
    return re.sub("[<>&\u2028\u2029]", lambda found: HTML[found.group()], plain)
