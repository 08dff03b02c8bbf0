"""Annotated CSV as InfluxDB 2 writes it (contracts/influxdb.md section 2), as a stream of pieces.

Invariant: the joined pieces are byte for byte the whole answer; a piece holds whole rows only and says how many, so
that a fault can be placed after any row.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from decimal import Decimal
from itertools import islice, repeat

from simulators.flux_parser import rfc3339
from simulators.flux_steps import TIME, Column, Table
from simulators.http_server import Piece

ANNOTATIONS = frozenset({"datatype", "group", "default"})
BATCH_ROWS = 1000
SPECIAL = frozenset(',"\r\n')
Result = tuple[str, Iterable[Table]]


class AnnotatedCsv:
    """Writes results, each with a name and tables, with the annotations that the client asked for, in its order.
    `batch_rows` limits the rows per piece.
    """

    def __init__(self, annotations: Sequence[str] = (), batch_rows: int = BATCH_ROWS) -> None:
        self._annotations = annotations
        self._batch_rows = batch_rows

    def pieces(self, results: Iterable[Result]) -> Iterator[Piece]:
        """All results, each followed by an empty line; without any result, a single empty line."""
        none = True
        for name, tables in results:
            none = False
            yield from self._result(name, tables)
            yield Piece(b"\r\n")
        if none:
            yield Piece(b"\r\n")

    def error(self, message: str) -> bytes:
        """The error table that follows rows already sent, reporting that the query failed."""
        known = {"datatype": ["string", "string"], "group": ["true", "true"], "default": ["", ""]}
        rows = [[f"#{name}", *known[name]] for name in self._annotations]
        rows += [["", "error", "reference"], ["", message, ""]]
        return ("\r\n" + "".join(map(self._line, rows))).encode()

    def _result(self, name: str, tables: Iterable[Table]) -> Iterator[Piece]:
        known: tuple[Column, ...] | None = None
        started = False
        for number, one in enumerate(tables):
            data = one.load()
            empty = not data or not len(data[0])
            if empty or one.columns != known:
                head = self._head(name, one, number if empty else None)
                yield Piece((b"\r\n" if started else b"") + head)
            started, known = True, None if empty else one.columns
            if not empty:
                yield from self._rows(name, number, one.columns, data)

    def _head(self, name: str, one: Table, empty_number: int | None) -> bytes:
        """Annotations and column names; an empty table has its number and group key in the defaults."""
        key = one.key_by_label() if empty_number is not None else {}
        defaults = [_text(key.get(column.label), column.kind) for column in one.columns]
        number = "" if empty_number is None else str(empty_number)
        known = {
            "datatype": ["string", "long", *(column.kind for column in one.columns)],
            "group": ["false", "false", *("true" if column.group else "false" for column in one.columns)],
            "default": [name, number, *defaults],
        }
        rows = [[f"#{annotation}", *known[annotation]] for annotation in self._annotations]
        rows.append(["", "result", "table", *one.labels()])
        return "".join(map(self._line, rows)).encode()

    def _rows(
        self, name: str, number: int, columns: Sequence[Column], data: Sequence[Sequence[object]]
    ) -> Iterator[Piece]:
        result = "" if "default" in self._annotations else self._quoted(name)
        start = f",{result},{number},"
        rows = zip(*(self._cells(cells, one) for cells, one in zip(data, columns, strict=True)), strict=True)
        while batch := list(islice(rows, self._batch_rows)):
            text = "".join(f"{start}{','.join(row)}\r\n" for row in batch)
            yield Piece(text.encode(), len(batch))

    def _cells(self, cells: Sequence[object], column: Column) -> Iterator[str]:
        if column.group:
            return repeat(self._quoted(_text(cells[0], column.kind)), len(cells))
        write = WRITERS[column.kind]
        if column.kind == "string":
            return ("" if cell is None else self._quoted(str(cell)) for cell in cells)
        return ("" if cell is None else write(cell) for cell in cells)

    def _line(self, cells: Iterable[str]) -> str:
        return ",".join(map(self._quoted, cells)) + "\r\n"

    def _quoted(self, text: str) -> str:
        if not text or (text[0] not in " \t\v\f\x85\xa0" and text != "\\." and SPECIAL.isdisjoint(text)):
            return text
        plain = text.replace('"', '""').replace("\r", "").replace("\n", "\r\n")
        return f'"{plain}"'


def decimal_text(value: float) -> str:
    """A float without an exponent or a redundant `.0`; `NaN`, `+Inf`, `-Inf`."""
    text = repr(value)
    if "e" in text:
        return format(Decimal(text), "f")
    if "n" not in text:
        return text.removesuffix(".0")
    return {"nan": "NaN", "inf": "+Inf", "-inf": "-Inf"}.get(text, text)


def _text(value: object, kind: str) -> str:
    return "" if value is None else WRITERS[kind](value)


WRITERS: dict[str, Callable[..., str]] = {
    "string": str,
    "long": str,
    "unsignedLong": str,
    "double": decimal_text,
    "boolean": lambda value: "true" if value else "false",
    TIME: rfc3339,
}
