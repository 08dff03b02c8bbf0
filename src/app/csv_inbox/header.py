"""The first record of a file: its columns, byte order mark and line end.

Invariant: what comes out has distinct names and is what was written there, to the byte; for a file that comes in, what
spreadsheets put around a header is taken off first.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from app.csv_inbox.config import ENCODING, HEADER, LONG_RECORD, NO_ROWS
from app.csv_inbox.csv_tokenizer import BOM, LONGEST_RECORD_BYTES, MASTER_RECORD_BYTES, Dialect, Malformed, Read, marked

PIECE_BYTES = 1 << 16
SHOWN_BYTES = 1000
SEPARATOR_LINE = re.compile(rb'"?sep=([^"\r\n\0])"?\r?\n', re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Header:
    """The first record. `size_bytes` is where rows begin, all that stands before included; `eol` may be empty.

    `width` is the number of its fields, with those behind the last name that spreadsheets leave there.
    """

    names: tuple[str, ...]
    fields: tuple[bytes, ...]
    bom: bytes
    eol: bytes
    size_bytes: int
    lines: int
    width: int


def read_header(read: Read, dialect: Dialect) -> Header:
    """The master's header; reads further than that. Raises Malformed: empty, not decodable, or a name that occurs
    twice.
    """
    data = b""
    while piece := read(max(PIECE_BYTES, len(data))):
        data += piece
        if len(data) > MASTER_RECORD_BYTES or len(marked(data, dialect).lasts):
            break
    bom = BOM if data.startswith(BOM) and dialect.encoding == "utf-8" else b""
    raw = _first(data[len(bom) :], dialect)
    record = _without_eol(raw)
    names = _distinct(_values(dialect, record), record)
    fields = tuple(dialect.fields(record))
    lines = max(raw.count(b"\n"), 1)
    return Header(names, fields, bom, raw[len(record) :], len(bom) + len(raw), lines, len(names))


def read_incoming_header(read: Read, master: Dialect, known: Sequence[str]) -> tuple[Header, Dialect]:
    """The header of a file that comes in, and how the file is written, which a line such as `sep=;` may say.

    Byte order marks, that line and blank records before the header are skipped; blanks around a name are taken off;
    fields without a name behind the last one are no columns. `fields` are as the master writes them. `known` are names
    that stand as they are: of the configuration, then of the master. Raises Malformed, also for a NUL byte and above
    the limit of a record.
    """
    data = b""
    while True:
        piece = read(max(PIECE_BYTES, len(data)))
        data += piece
        at, dialect = _before_records(data, master)
        start, end = _first_row(data, at, dialect)
        if end or not piece or len(data) - start > LONGEST_RECORD_BYTES:
            break
    line = 1 + data.count(b"\n", 0, start)
    if (end or len(data)) - start > LONGEST_RECORD_BYTES:
        raise Malformed(f"a header longer than {LONGEST_RECORD_BYTES >> 20} MiB", line, kind=LONG_RECORD)
    raw = _first(data[start:], dialect)
    record = _without_eol(raw)
    written = _values(dialect, record)
    if any("\0" in name for name in written):
        raise Malformed("a NUL byte (0x00) in the header", line, record[:SHOWN_BYTES], kind=ENCODING)
    names = _distinct(columns(written, known), record)
    as_is = dialect.delimiter == master.delimiter
    fields = tuple(
        raw_field if as_is and name == value else master.written(name.encode(master.encoding))
        for name, value, raw_field in zip(names, written, dialect.fields(record), strict=False)
    )
    size, lines = start + len(raw), line + max(raw.count(b"\n"), 1) - 1
    return Header(names, fields, b"", raw[len(record) :], size, lines, len(written)), dialect


def columns(written: Sequence[str], known: Iterable[str]) -> tuple[str, ...]:
    """The columns that a header means: blanks around names are none, and fields behind the last name are none."""
    stripped = [_stripped(name) for name in written]
    there: dict[str, str] = {}
    for name in known:
        there.setdefault(_stripped(name), name)
        if name == _stripped(name):
            there[name] = name
    kept = max((place for place, name in enumerate(stripped, 1) if name), default=1)
    if kept == len(stripped) - 1 and "" in there:  # a master may have a column without a name
        kept = len(stripped)
    return tuple(there.get(name, name) for name in stripped[:kept])


def _stripped(name: str) -> str:
    """Without blanks and byte order marks around it; quotes behind a blank were meant as quotes."""
    bare = name.strip().strip("\ufeff").strip()
    if bare != name and len(bare) > 1 and bare[0] == bare[-1] == '"':
        bare = bare[1:-1].replace('""', '"').strip()
    return bare


def _before_records(data: bytes, dialect: Dialect) -> tuple[int, Dialect]:
    """Where records begin, behind byte order marks and a line that says the delimiter, and the dialect from there."""
    at = 0
    while dialect.encoding == "utf-8" and data.startswith(BOM, at):
        at += len(BOM)
    said = SEPARATOR_LINE.match(data, at)
    if said is None or said[1] >= b"\x80":
        return at, dialect
    return said.end(), Dialect(said[1].decode("ascii"), dialect.encoding)


def _first_row(data: bytes, at: int, dialect: Dialect) -> tuple[int, int]:
    """Bounds of the first record that is not blank; the end is 0 while it is not there as a whole."""
    marks = marked(data[at:], dialect)
    start = at
    for last in marks.lasts.tolist():
        end = at + int(marks.at[last]) + 1
        if not dialect.blank(_without_eol(data[start:end])):
            return start, end
        start = end
    return start, 0


def _first(body: bytes, dialect: Dialect) -> bytes:
    """The first record with its line end, which may be lacking."""
    marks = marked(body, dialect)
    if len(marks.lasts):
        return body[: int(marks.at[marks.lasts[0]]) + 1]
    if not body:
        raise Malformed("the file is empty", 1, kind=NO_ROWS)
    if body.endswith(b"\r") or len(marked(body + b"\n", dialect).lasts) != 1:
        raise Malformed("the header is not complete: a quote or a line end is cut", 1, kind=HEADER)
    return body


def _without_eol(raw: bytes) -> bytes:
    return raw.removesuffix(b"\n").removesuffix(b"\r") if raw.endswith(b"\n") else raw


def _values(dialect: Dialect, record: bytes) -> Sequence[str]:
    try:
        return [dialect.unquoted(field).decode(dialect.encoding) for field in dialect.fields(record)]
    except UnicodeDecodeError as error:
        told = f"the header cannot be read as {dialect.encoding}: {error}"
        raise Malformed(told, 1, record[:SHOWN_BYTES], kind=ENCODING) from error


def _distinct(names: Sequence[str], record: bytes) -> tuple[str, ...]:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            told = f"the column {name!r} occurs twice in the header"
            raise Malformed(told, 1, record[:SHOWN_BYTES], kind=HEADER)
        seen.add(name)
    return tuple(names)
