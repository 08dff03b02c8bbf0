"""How records of one CSV file are written, field by field: the plain rules that everything faster has to agree with.

Invariant: quotes follow the csv module: one opens only at the start of a field, elsewhere it is text.
"""

import re

from app.core.errors import AppError

BOM = b"\xef\xbb\xbf"


class Malformed(AppError):
    """Not CSV of one width. `line` is that of the file, None where it is not known; `record` the raw record.

    `kind` is one of the fixed texts of `faults`.
    """

    def __init__(self, message: str, line: int | None = None, record: bytes = b"", *, kind: str) -> None:
        super().__init__(message)
        self.line = line
        self.record = record
        self.kind = kind


class Dialect:
    """How records are written. `encoding` keeps ASCII as it is; `delimiter` is one ASCII character."""

    def __init__(self, delimiter: str, encoding: str) -> None:
        self.delimiter = delimiter
        self.encoding = "utf-8" if encoding == "utf-8-sig" else encoding
        self.bom = BOM if encoding == "utf-8-sig" else b""
        d = re.escape(delimiter.encode("ascii"))
        quoted = rb'"(?:[^"]++|"")*+"[^' + d + rb"\n]*+"
        plain = rb'(?!")[^' + d + rb"\n]*+"
        self._field = re.compile(rb"(?:" + quoted + rb"|" + plain + rb")")
        self._record = re.compile(
            rb"(?:" + quoted + rb"|" + plain + rb")(?:" + d + rb"(?:" + quoted + rb"|" + plain + rb"))*+\n"
        )
        self._value = re.compile(rb'"((?:[^"]++|"")*+)"(.*+)', re.DOTALL)
        self._blank = re.compile(rb'[ \t"' + d + rb"]*+")
        self._needs_quotes = re.compile(rb'["\r\n' + d + rb"]")

    def fields(self, record: bytes) -> list[bytes]:
        """The raw fields of one record without its line end, quotes and all."""
        d = self.delimiter.encode("ascii")
        if b'"' not in record:
            return record.split(d)
        found = []
        at = 0
        while True:
            match = self._field.match(record, at)
            if match is None:  # an opening quote that is never closed
                found.append(record[at:])
                return found
            found.append(match[0])
            at = match.end() + 1
            if at > len(record):
                return found

    def blank(self, record: bytes) -> bool:
        """True when nothing but delimiters, blanks and empty quotes is there, as spreadsheets write an empty row."""
        blanks = self._blank.fullmatch(record) is not None
        return blanks and not any(self.unquoted(field).strip(b" \t") for field in self.fields(record))

    def written(self, value: bytes) -> bytes:
        """A raw field with this value, quoted where that is needed."""
        return b'"' + value.replace(b'"', b'""') + b'"' if self._needs_quotes.search(value) else value

    def unquoted(self, field: bytes) -> bytes:
        """The value of one raw field."""
        match = self._value.fullmatch(field)
        return match[1].replace(b'""', b'"') + match[2] if match else field

    def outside(self, field: bytes) -> bytes:
        """What of a raw field is not inside its quotes."""
        match = self._value.fullmatch(field)
        return match[2] if match else field

    def record_end(self, data: bytes, at: int) -> int:
        """The offset behind the record that begins at `at`, line end included; -1 when it does not end in `data`."""
        match = self._record.match(data, at)
        return match.end() if match else -1
