"""Rows of a file of AppMetrica: CSV in, hours of receipt out, and events as columns for the mapping.

Invariants: a row is in exactly one hour, by the second in which it was received; the same rows of an hour give the same
uuids, whatever their order; memory does not grow with their number: what must be remembered of each lies on disk.
"""

import csv
import gzip
import hashlib
import io
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import islice
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any, BinaryIO
from uuid import NAMESPACE_URL, uuid5

from app.core.errors import Permanent, Transient
from app.core.window import Window, floor_to
from app.stores.product_mapping import Tables, mapping

SERVICE = "appmetrica"
HOUR = timedelta(hours=1)
HOUR_SECONDS = 3600
CHUNK_ROWS = 2000
MAX_CELL_CHARACTERS = 1 << 24
LEVEL = 1
IDENTITY = (
    "application_id",
    "appmetrica_device_id",
    "installation_id",
    "session_id",
    "event_timestamp",
    "event_name",
)
JSON_COLUMN = "event_json"
NEEDED = frozenset({*IDENTITY, JSON_COLUMN})
MODULUS = 1 << 128
Row = Sequence[str]
CUT = "nothing to do: the file is fetched again"


@dataclass(slots=True)
class HourFile:
    """The rows that were received in one hour, as a gzip file of CSV. `digest` is the same for the same rows."""

    window: Window
    columns: Sequence[str]
    file: BinaryIO
    rows: int = 0
    _sum: int = 0
    _text: Any = field(default=None)
    _packed: Any = field(default=None)
    _writer: Any = field(default=None)

    @property
    def digest(self) -> str:
        """Hex."""
        return hashlib.sha256(f"{','.join(self.columns)}:{self.rows}:{self._sum}".encode()).hexdigest()

    def add(self, row: Row) -> None:
        """Append a row."""
        if self._writer is None:
            self._packed = gzip.GzipFile("", "wb", LEVEL, self.file, mtime=0)
            self._text = io.TextIOWrapper(self._packed, encoding="utf-8", newline="")
            self._writer = csv.writer(self._text, lineterminator="\n")
            self._writer.writerow(self.columns)
        self._writer.writerow(row)
        self.rows += 1
        number = int.from_bytes(hashlib.sha256("\x1f".join(row).encode()).digest()[:16])
        self._sum = (self._sum + number) % MODULUS

    def close_text(self) -> None:
        """No more rows come."""
        if self._text is not None:
            self._text.close()
            self._packed.close()
            self._text = None

    def read(self) -> Iterator[Row]:
        """Its rows, without the header."""
        if not self.rows:
            return
        self.file.seek(0)
        with gzip.open(self.file, "rt", encoding="utf-8", newline="") as text:
            yield from islice(csv.reader(text), 1, None)


@contextmanager
def by_hour(
    files: Iterable[BinaryIO], columns: Sequence[str], received: str, span: Window, spool: Path
) -> Iterator[Sequence[HourFile]]:
    """The rows of all parts, each in the file of its hour, one for each hour of the span. Rows of other hours are left
    out: where clocks are put back, two hours have one name, and the service gives both.
    """
    count = (span.end - span.start) // HOUR
    starts = [span.start + number * HOUR for number in range(count)]
    hours = {at: HourFile(Window(at, at + HOUR), columns, _temporary(spool)) for at in starts}
    try:
        position = columns.index(received)
        for file in files:
            for row in rows_of(file, columns):
                hour = hours.get(_hour_of(row[position], received))
                if hour is not None:
                    hour.add(row)
        for hour in hours.values():
            hour.close_text()
        yield list(hours.values())
    finally:
        for hour in hours.values():
            hour.file.close()


def _temporary(spool: Path) -> BinaryIO:
    file: IO[bytes] = TemporaryFile(dir=spool)  # noqa: SIM115 - `by_hour` closes it
    return file  # type: ignore[return-value]  # typeshed gives the wider type


def _hour_of(text: str, column: str) -> datetime:
    try:
        return floor_to(datetime.fromtimestamp(int(text), UTC), HOUR_SECONDS)
    except (ValueError, OverflowError, OSError) as error:
        raise Permanent(f"{column} is {text[:60]!r}, which is no instant", "please report it") from error


def rows_of(file: BinaryIO, columns: Sequence[str]) -> Iterator[Row]:
    """The rows of a part. Raises Transient when it was cut, Permanent when it has other columns than were asked for."""
    csv.field_size_limit(MAX_CELL_CHARACTERS)  # the default is below one stack trace of a crash
    file.seek(0)
    with gzip.open(file, "rt", encoding="utf-8-sig", newline="") as text:
        rows = csv.reader(text, strict=True)
        try:
            header = next(rows, None)
            if header is not None and header != list(columns):
                raise Permanent(
                    f"AppMetrica gives the columns {','.join(header)[:200]}, not those that were asked for",
                    "please report it: the service does not answer what was asked",
                )
            for row in rows:
                if len(row) != len(columns):
                    raise Transient(f"line {rows.line_num} of the file has {len(row)} of {len(columns)} cells", CUT)
                yield row
        except (csv.Error, UnicodeDecodeError) as error:
            raise Transient(f"line {rows.line_num} of the file cannot be read: {error}", CUT) from error


def tables(hour: HourFile, application_id: int) -> Iterator[Tables]:
    """The hour's events as rows of the warehouse."""
    what = mapping(SERVICE)
    with closing(_Ordinals()) as ordinals:
        rows = hour.read()
        while chunk := list(islice(rows, CHUNK_ROWS)):
            columns = _columns(chunk, hour.columns, application_id)
            columns["uuid"] = _uuids(columns, len(chunk), ordinals)
            yield what.tables({path: columns[path] for path in what.words}, len(chunk))


def _columns(chunk: Sequence[Row], names: Sequence[str], application_id: int) -> dict[str, Sequence[Any]]:
    """Cells by column; an empty one is nothing. A column that was not given is empty."""
    given = dict(zip(names, zip(*chunk, strict=True), strict=True))
    nothing = ("",) * len(chunk)
    wanted = {*mapping(SERVICE).words, *IDENTITY, JSON_COLUMN} - {"uuid"}
    columns: dict[str, Sequence[Any]] = {
        name: [cell or None for cell in given.get(name, nothing)] for name in sorted(wanted)
    }
    columns["application_id"] = [str(application_id)] * len(chunk)
    return columns


def _uuids(columns: Mapping[str, Sequence[Any]], count: int, ordinals: "_Ordinals") -> Sequence[str]:
    """What tells events apart; the service gives no id. Two that are equal in all of it get two ordinals."""
    identities = zip(*(columns[name] for name in IDENTITY), strict=True)
    made = []
    for position, identity in zip(range(count), identities, strict=True):
        json_digest = hashlib.sha256((columns[JSON_COLUMN][position] or "").encode()).hexdigest()
        name = "\x1f".join([*(cell or "" for cell in identity), json_digest])
        made.append(str(uuid5(NAMESPACE_URL, f"{name}\x1f{ordinals.next(name)}")))
    return made


class _Ordinals:
    """How often something was seen, counted on disk: an hour may have millions of rows."""

    def __init__(self) -> None:
        self._database = sqlite3.connect("", isolation_level=None, check_same_thread=False)  # a file without a name
        self._database.execute("CREATE TABLE seen (id BLOB PRIMARY KEY, n INTEGER NOT NULL) WITHOUT ROWID")
        self._database.execute("BEGIN")

    def next(self, name: str) -> int:
        """0, and one more each time."""
        identity = hashlib.sha256(name.encode()).digest()[:16]
        (found,) = self._database.execute(
            "INSERT INTO seen VALUES (?, 0) ON CONFLICT (id) DO UPDATE SET n = n + 1 RETURNING n", (identity,)
        ).fetchall()
        return int(found[0])

    def close(self) -> None:
        self._database.close()
