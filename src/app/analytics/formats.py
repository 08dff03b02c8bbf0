"""Encodes rows as an answer: JSON, CSV, Parquet or an Excel sheet.

Invariants: an answer is complete before its first byte is sent; a spool bounds its memory; timestamps are ISO 8601
with Z in text formats and UTC in typed ones; NaN and infinity are null in JSON; decimals are numbers wherever the
format allows. No cell of a sheet becomes a formula. CSV is data for programs: text that begins with = is unchanged,
unless `formula_safe` prefixes an apostrophe, since spreadsheets would run it as a formula.
"""

import io
import itertools
import math
import re
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import date, datetime
from decimal import Decimal
from hashlib import blake2b
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from app.analytics.engine import BATCH_ROWS, MESSAGE_CHARACTERS, written
from app.analytics.reports import ReportTable
from app.core.errors import Rejected
from app.web.text_values import FORMULA

if TYPE_CHECKING:
    from app.core.closed_days import TableState

MEDIA: Mapping[str, str] = {
    "json": "application/json",
    "ndjson": "application/x-ndjson",
    "csv": "text/csv; charset=utf-8",
    "parquet": "application/vnd.apache.parquet",
    "xlsx": "application/vnd.openxmlformats-officedocument.spreadsheetml.sheet",
}
MAX_ROWS: Mapping[str, int] = {
    "json": 200_000,
    "ndjson": 5_000_000,
    "csv": 5_000_000,
    "parquet": 5_000_000,
    "xlsx": 100_000,
}
OPAQUE = re.compile(r"arrow\.opaque\[.*?type_name=(\w+)")
FORMULA_START = f"^[{re.escape(FORMULA)}]"
SHEET = {
    "constant_memory": True,
    "strings_to_formulas": False,
    "strings_to_urls": False,
    "default_date_format": "yyyy-mm-dd hh:mm:ss",
}
IN_CELLS = (str, bool, int, float, Decimal, date)
SHEET_YEARS = range(1901, 9999)  # in 1900 programs differ by a day
EXACT = 10**15 - 1
CELL_CHARACTERS = 32_767
WHOLE = range(-(1 << 63), 1 << 63)
MEMORY_BYTES = 1 << 20
PIECE_BYTES = 1 << 18


class ReportAnswer:
    """The bytes of an answer, in memory or in an unnamed file. Any number of readers may read concurrently. `body` is a
    small answer, in one piece.
    """

    def __init__(self, spool: Any) -> None:
        self.size_bytes = spool.seek(0, io.SEEK_END)
        self.left_out = 0  # objects, in addition to those that every answer leaves out
        self.state: TableState | None = None  # snapshot of the table of closed days that was read
        self.engine = "duckdb"
        self._spool = spool
        self._lock = Lock()
        weakref.finalize(self, spool.close)
        digest = blake2b(digest_size=16)
        self.body: bytes | None = b""
        for piece in self.pieces():
            digest.update(piece)
            self.body = piece if self.size_bytes <= PIECE_BYTES else None
        self.etag = f'"{digest.hexdigest()}"'

    def pieces(self) -> Iterator[bytes]:
        """The bytes, in order."""
        for start in range(0, self.size_bytes, PIECE_BYTES):
            with self._lock:
                self._spool.seek(start)
                piece: bytes = self._spool.read(PIECE_BYTES)
            yield piece


@dataclass(frozen=True, slots=True)
class AnswerShape:
    """How an answer is written. `answer`: name of the JSON list, or `object` to return the single row itself;
    `max_rows`: a limit below that of the format.
    """

    format: str
    answer: str
    warnings: Sequence[Mapping[str, str]] = ()
    formula_safe: bool = False
    max_rows: int | None = None


def of_table(table: ReportTable, shape: AnswerShape, folder: Path) -> ReportAnswer:
    """The answer with these rows. JSON does not need pyarrow, so an idle daemon answers without importing it."""
    _check_rows(len(table.rows), shape)
    if shape.format in JSON_WRITERS:
        write = JSON_WRITERS[shape.format]
        return _spooled(folder, lambda spool: write(spool, list(table.columns), [table.rows], shape))
    import pyarrow as pa

    types = {
        "text": pa.string(),
        "integer": pa.int64(),
        "number": pa.float64(),
        "instant": pa.timestamp("us"),
        "date": pa.date32(),
    }
    schema = pa.schema([(name, types[kind]) for name, kind in table.columns.items()])
    columns = list(zip(*table.rows, strict=True)) or [()] * len(schema)
    arrays = [pa.array(values, field.type) for values, field in zip(columns, schema, strict=True)]
    return of_batches(pa.table(arrays, schema=schema).to_reader(BATCH_ROWS), shape, folder)


def of_batches(reader: Any, shape: AnswerShape, folder: Path) -> ReportAnswer:
    """The answer with the rows of a pyarrow RecordBatchReader. Raises Rejected for too many rows, and for types that
    the format does not support.
    """
    import pyarrow as pa

    batches = _counted(reader, shape)
    if shape.format in JSON_WRITERS:
        write_json, blocks = JSON_WRITERS[shape.format], (_rows(batch) for batch in batches)
        return _spooled(folder, lambda spool: write_json(spool, _plain(reader.schema).names, blocks, shape))
    write, schema = WRITERS[shape.format], _plain(reader.schema)
    plain = (_cast(batch, schema) for batch in batches)
    try:
        return _spooled(folder, lambda spool: write(spool, schema, plain, shape))
    except (pa.ArrowNotImplementedError, OverflowError) as error:
        raise _unwritable(error) from None


def _spooled(folder: Path, write: Callable[[Any], None]) -> ReportAnswer:
    spool = tempfile.SpooledTemporaryFile(MEMORY_BYTES, dir=str(folder))  # noqa: SIM115 - the answer closes it
    with ExitStack() as undo:
        undo.callback(spool.close)
        with written():
            write(spool)
        answer = ReportAnswer(spool)
        undo.pop_all()
    return answer


def _counted(reader: Any, shape: AnswerShape) -> Iterator[Any]:
    count = 0
    for batch in reader:
        count += batch.num_rows
        _check_rows(count, shape)
        yield batch


def _check_rows(count: int, shape: AnswerShape) -> None:
    most = min(MAX_ROWS[shape.format], shape.max_rows or MAX_ROWS[shape.format])
    if count > most:
        raise Rejected(
            f"the answer has more than {most} rows, too many for {shape.format}",
            "narrow the parameters, or ask for format=parquet",
        )


def _plain(schema: Any) -> Any:
    """The schema with naive UTC timestamps, no dictionaries and unique names: a duplicate column name gets a number, as
    in a table that DuckDB creates from the SELECT. Raises Rejected for a type of DuckDB's own, whose values would be
    its internal bytes.
    """
    import pyarrow as pa

    def plain(kind: Any) -> Any:
        if own := OPAQUE.search(str(kind)):
            raise Rejected(f"a column is of type {own[1].upper()}, which no format has", "cast it to DOUBLE or to text")
        if pa.types.is_timestamp(kind):
            return pa.timestamp("us")
        return kind.value_type if pa.types.is_dictionary(kind) else kind

    names: dict[str, None] = {}
    for column in schema:
        numbered = (f"{column.name}_{number}" for number in itertools.count(1))
        names[next(name for name in itertools.chain([column.name], numbered) if name not in names)] = None
    return pa.schema([(name, plain(column.type)) for name, column in zip(names, schema, strict=True)])


def _cast(batch: Any, schema: Any) -> Any:
    import pyarrow as pa

    cast = (column.cast(field.type, safe=False) for column, field in zip(batch.columns, schema, strict=True))
    return pa.RecordBatch.from_arrays([_within_years(column) for column in cast], schema=schema)


def _within_years(values: Any) -> Any:
    """Replace timestamps and dates outside years 1 to 9999 by null: ISO text and our readers do not support them."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if not (pa.types.is_timestamp(values.type) or pa.types.is_date32(values.type)):
        return values
    first, last = (pa.scalar(at, values.type) for at in (datetime.min, datetime.max))  # noqa: DTZ901 - in UTC
    return pc.if_else(pc.and_(pc.greater_equal(values, first), pc.less_equal(values, last)), values, None)


def _rows(batch: Any) -> Sequence[tuple[Any, ...]]:
    try:
        return list(zip(*(column.to_pylist() for column in _cast(batch, _plain(batch.schema)).columns), strict=True))
    except (OverflowError, ValueError) as error:
        raise _unwritable(error) from None


def _unwritable(error: Exception) -> Rejected:
    """The error for rare values that cannot be written, such as a date in the year 290000 inside a list."""
    text = str(error)[:MESSAGE_CHARACTERS]
    return Rejected(f"a value cannot be written: {text}", "cast it to text, or ask for another format")


def to_json(value: Any) -> Any:
    """A value in a JSON type. DuckDB returns decimals for sums of integers and for literals such as 1.5."""
    found: Any
    match value:
        case float():
            found = value if math.isfinite(value) else None
        case None | int() | str():
            found = value
        case Decimal():
            is_whole = value.as_tuple().exponent == 0 and int(value) in WHOLE
            found = int(value) if is_whole else float(value)
        case datetime():
            found = f"{value.replace(tzinfo=None).isoformat()}Z"
        case date():
            found = value.isoformat()
        case bytes():
            found = value.hex()
        case Mapping():
            found = {str(name): to_json(each) for name, each in value.items()}
        case list() | tuple():
            found = [to_json(each) for each in value]
        case _:
            found = str(value)
    return found


def _write_json(
    spool: Any, names: Sequence[str], blocks: Iterable[Sequence[tuple[Any, ...]]], shape: AnswerShape
) -> None:
    import msgspec

    encode = msgspec.json.encode
    tail = b',"warnings":' + encode(list(shape.warnings)) if shape.warnings else b""
    if shape.answer == "object":
        first = next((row for block in blocks for row in block), None)
        row = first or (None,) * len(names)
        spool.write(encode({name: to_json(value) for name, value in zip(names, row, strict=True)})[:-1] + tail + b"}")
        return
    count = 0
    spool.write(b"{%s:[" % encode(shape.answer))
    for block in blocks:
        lines = encode([{name: to_json(value) for name, value in zip(names, row, strict=True)} for row in block])
        spool.write((b"," if count and block else b"") + lines[1:-1])
        count += len(block)
    spool.write(b'],"count":%d%s}' % (count, tail))


def _write_ndjson(
    spool: Any, names: Sequence[str], blocks: Iterable[Sequence[tuple[Any, ...]]], _: AnswerShape
) -> None:
    import msgspec

    encoder = msgspec.json.Encoder()
    for block in blocks:
        rows = [{name: to_json(value) for name, value in zip(names, row, strict=True)} for row in block]
        spool.write(encoder.encode_lines(rows))


def _write_csv(spool: Any, schema: Any, batches: Iterable[Any], shape: AnswerShape) -> None:
    """Timestamps are ISO 8601; nested and binary values, for which CSV has no type, are JSON. `formula_safe`: an
    apostrophe is prefixed to each text and name that a spreadsheet would take for a formula.
    """
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.csv as pacsv

    def is_json(kind: Any) -> bool:
        return bool(pa.types.is_nested(kind) or pa.types.is_binary(kind) or _is_odd(kind))

    def cells(values: Any, kind: Any) -> Any:
        if pa.types.is_timestamp(values.type):
            values = pc.strftime(values, format="%Y-%m-%dT%H:%M:%SZ", locale="C")
        elif is_json(values.type):
            values = _json_texts(values)
        is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
        safe = shape.formula_safe and is_text
        return pc.replace_substring_regex(values, f"({FORMULA_START})", r"'\1") if safe else values

    names = [re.sub(FORMULA_START, r"'\g<0>", name) if shape.formula_safe else name for name in schema.names]
    kinds = [pa.string() if pa.types.is_timestamp(kind) or is_json(kind) else kind for kind in schema.types]
    written = pa.schema(zip(names, kinds, strict=True))
    with pacsv.CSVWriter(spool, written, write_options=pacsv.WriteOptions(quoting_style="needed")) as writer:
        for batch in batches:
            writer.write_batch(pa.RecordBatch.from_arrays([*map(cells, batch.columns, kinds)], schema=written))


def _is_odd(kind: Any) -> bool:
    """Whether this is a duration or a union, which neither CSV nor Parquet supports."""
    import pyarrow as pa

    return bool(pa.types.is_interval(kind) or pa.types.is_union(kind))


def _json_texts(values: Any) -> Any:
    import pyarrow as pa

    return pa.array(map(_json_text, values.to_pylist()), pa.string())


def _json_text(value: Any) -> str | None:
    """A value as text: JSON strings unquoted, anything else as JSON."""
    import msgspec

    found = to_json(value)
    return found if found is None or isinstance(found, str) else msgspec.json.encode(found).decode()


def _write_parquet(spool: Any, schema: Any, batches: Iterable[Any], _: AnswerShape) -> None:
    import pyarrow as pa
    from pyarrow.parquet import ParquetWriter

    def kept(kind: Any) -> Any:
        return pa.timestamp("us", "UTC") if pa.types.is_timestamp(kind) else pa.string() if _is_odd(kind) else kind

    utc = pa.schema([(column.name, kept(column.type)) for column in schema])
    with ParquetWriter(spool, utc, compression="zstd") as writer:
        for batch in batches:
            columns = [_json_texts(values) if _is_odd(values.type) else values for values in batch.columns]
            writer.write_batch(_cast(pa.RecordBatch.from_arrays(columns, schema.names), utc))


def _write_xlsx(spool: Any, schema: Any, batches: Iterable[Any], _: AnswerShape) -> None:
    """Write row by row, so that memory is bounded. Text stays text, even if it looks like a formula or a link."""
    import xlsxwriter

    with xlsxwriter.Workbook(spool, SHEET) as book:
        sheet = book.add_worksheet("report")
        sheet.freeze_panes(1, 0)
        days = book.add_format({"num_format": "yyyy-mm-dd"})
        sheet.write_row(0, 0, schema.names, book.add_format({"bold": True}))
        rows = (row for batch in batches for row in _rows(batch))
        for number, row in enumerate(rows, 1):
            for column, value in enumerate(row):
                cell = _cell(value)
                if type(cell) is date:
                    sheet.write_datetime(number, column, cell, days)
                elif cell is not None:
                    sheet.write(number, column, cell)


def _cell(value: Any) -> Any:
    """The value of a cell; None (an empty cell) for null, NaN and infinity. What a spreadsheet would show as another
    value is text: dates before its calendar, and whole numbers with more digits than it keeps. Raises Rejected for a
    text that is longer than a cell.
    """
    if isinstance(value, float) and not math.isfinite(value):
        return None
    is_beyond = value.year not in SHEET_YEARS if isinstance(value, date) else type(value) is int and abs(value) > EXACT
    found = value if isinstance(value, IN_CELLS) and not is_beyond else _json_text(value)
    if isinstance(found, str) and len(found) > CELL_CHARACTERS:
        raise Rejected(f"a text of {len(found)} characters does not fit into a cell", "ask for another format")
    return found


JSON_WRITERS = {"json": _write_json, "ndjson": _write_ndjson}
WRITERS = {"csv": _write_csv, "parquet": _write_parquet, "xlsx": _write_xlsx}
