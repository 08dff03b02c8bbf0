"""Decodes NDJSON events into columns for the mapping, in compiled code; extracts only what the mapping reads.

Invariants: a line is either an event or refused with one of a few reasons; a bad line never costs a good one; memory is
bounded by a block and MAX_LINE_BYTES. An event is identified by its uuid; `digest` does not depend on order.
"""

import gzip
import hashlib
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from operator import attrgetter
from typing import IO, Any, BinaryIO, cast

import msgspec

from app.core.errors import Rejected
from app.core.runs import Stop
from app.core.verify import NOTHING, WindowContent
from app.core.windows import Window
from app.product_events.hours import KEPT_LINE_BYTES, MAX_LINE_BYTES, REFUSED, PulledHour
from app.product_events.mapping import (
    RULES,
    ProductMapping,
    Tables,
    cleaned,
    mapping,
    parsed_json,
    storable_json,
    uuids_in,
)
from app.product_events.pull import PullPipeline

SERVICE = "amplitude"
JSON_WORD = "json"
BLOCK_BYTES = 1 << 19
SUSPICIOUS = re.compile(rb"\\u(?:0000|[dD][89abAB])")
UNREADABLE = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, ValueError, OverflowError)
MODULUS = 1 << 128
INT_BITS = 63

NOT_TEXT = "invalid UTF-8"
NOT_JSON = "not a JSON object"
NO_UUID = "no valid uuid"
LARGE_LINE = "line above 16 MiB"


Refuse = Callable[[str, bytes, int, str], None]
"""Handles a line that is not an event: the reason, its bytes, its line in the block, and what is wrong with it."""


@dataclass(frozen=True, slots=True)
class LargeLine:
    """A line above MAX_LINE_BYTES: its first KEPT_LINE_BYTES, and the length and SHA-256 of the whole."""

    head: bytes
    size_bytes: int
    sha256: str


Block = bytes | LargeLine


class EventReader:
    """Turns lines into tables. Created once per process, since building a typed decoder takes a while."""

    def __init__(self, what: ProductMapping) -> None:
        nested: dict[str, list[str]] = {}
        for path in what.words:
            head, dot, member = path.partition(".")
            nested.setdefault(head, []).extend([member] if dot else [])
        raw = {head for head, members in nested.items() if members or JSON_WORD in what.words[head]}
        self._mapping, self._uuids = what, RULES["uuid"]
        self._scalars = nested.keys() - raw
        self._event = _Members(nested, raw)
        self._inside = {head: _Members(members) for head, members in nested.items() if members}

    def tables(self, block: Block, refuse: Refuse, *, careful: bool = False) -> Tables:
        """Rows by table from whole lines. `careful`: parse each line and rebuild it from what can be stored."""
        if isinstance(block, LargeLine):
            refuse(LARGE_LINE, block.head, 1, f"{block.size_bytes} bytes")
            return {}
        columns = None if careful or SUSPICIOUS.search(block) else self.decoded(block)
        if columns is None:
            columns = self._by_line(block, refuse, careful=careful)
        return self._mapping.tables(columns, len(columns["uuid"]))

    def decoded(self, block: bytes) -> dict[str, list[Any]] | None:
        """All lines at once, as columns by path; None when this cannot decode one of them as an event."""
        try:
            block.decode()  # the decoder does not check members that are never read
            events = self._event.decoder.decode_lines(block)
            columns = self._columns_of(events)
        except UNREADABLE:
            return None
        # The decoder accepts an object that continues on the next line, which would merge two lines into one event.
        return None if None in columns["uuid"] or len(events) != lines_in(block) else columns

    def _by_line(self, block: bytes, refuse: Refuse, *, careful: bool) -> dict[str, list[Any]]:
        """As `decoded`, one line at a time. A line that cannot be decoded as it is, is mended, or refused."""
        found = self._columns_of(())
        for number, line in enumerate(filter(None, map(bytes.strip, block.split(b"\n"))), 1):
            try:
                line.decode()
                columns = None if careful or SUSPICIOUS.search(line) else self.decoded(line)
                if columns is None:
                    columns = self._columns_of([self._event.decoder.decode(self._mended(line))])
            except UnicodeDecodeError as error:
                detail = f"invalid UTF-8 byte 0x{line[error.start]:02X} at byte {error.start + 1}"
                refuse(NOT_TEXT, line, number, detail)
            except UNREADABLE as error:
                refuse(NOT_JSON, line, number, f"not a JSON object ({type(error).__name__})")
            else:
                if columns["uuid"] == [None]:
                    refuse(NO_UUID, line, number, "no valid uuid")
                else:
                    for path, values in columns.items():
                        found[path] += values
        return found

    def _mended(self, line: bytes) -> bytes:
        """The event of a line in a form that can be decoded and stored."""
        found = parsed_json(line)
        if not isinstance(found, dict):
            raise ValueError("not an object")  # noqa: TRY004 - one of UNREADABLE
        event = cleaned(found)
        for name in self._scalars & event.keys():
            if isinstance(event[name], dict | list):
                event[name] = storable_json(event[name])
            elif isinstance(event[name], int) and event[name].bit_length() > INT_BITS:
                event[name] = str(event[name])
        return msgspec.json.encode(event)

    def _columns_of(self, events: Sequence[Any]) -> dict[str, list[Any]]:
        """Columns by path; an event without a valid uuid has None there. Raises one of UNREADABLE."""
        columns = self._event.columns(events)
        columns["uuid"] = list(self._uuids(columns["uuid"]))
        for head, members in self._inside.items():
            found = members.columns([members.scalars(raw) for raw in columns[head]])
            columns |= {f"{head}.{name}": values for name, values in found.items()}
        return columns


_SCALAR: Any = str | int | float | bool | None


class _Members:
    """Decodes the members of JSON objects that have these names; the values of `raw` ones stay JSON text."""

    def __init__(self, names: Iterable[str], raw: Collection[str] = ()) -> None:
        self._fields = {name: f"f{number}" for number, name in enumerate(names)}
        kinds = [(field, msgspec.Raw if name in raw else _SCALAR, None) for name, field in self._fields.items()]
        rename = {field: name for name, field in self._fields.items()}
        self.decoder = msgspec.json.Decoder(msgspec.defstruct("Members", kinds, rename=rename, gc=False))

    def columns(self, objects: Sequence[Any]) -> dict[str, list[Any]]:
        """The values of decoded objects by name."""
        return {name: list(map(attrgetter(field), objects)) for name, field in self._fields.items()}

    def scalars(self, raw: Any) -> Any:
        """A decoded object. Members that are not scalars count as missing, as all do where the text is no object."""
        try:
            return self.decoder.decode(b"{}" if raw is None else raw)
        except UNREADABLE:
            found = cleaned(parsed_json(bytes(raw)))  # accepts numbers of any size
            kept = {name: found[name] for name in self._fields if name in found} if isinstance(found, dict) else {}
            scalars = {name: value for name, value in kept.items() if not isinstance(value, dict | list)}
            return self.decoder.decode(msgspec.json.encode(scalars))


@lru_cache(maxsize=1)
def reader() -> EventReader:
    """The reader of Amplitude's events."""
    return EventReader(mapping(SERVICE))


def lines_in(block: Block) -> int:
    """Number of lines that are not blank."""
    return 1 if isinstance(block, LargeLine) else sum(1 for line in block.split(b"\n") if line and not line.isspace())


def blocks(text: IO[bytes]) -> Iterator[Block]:
    """The rest of a stream as blocks of whole lines. A line above MAX_LINE_BYTES comes on its own, in its place."""
    while block := text.read(BLOCK_BYTES):
        end = block.rfind(b"\n") + 1
        line = block[end:] + text.readline(MAX_LINE_BYTES) if end < len(block) else b""
        if len(line) <= MAX_LINE_BYTES:
            yield block[:end] + line
            continue
        if end:
            yield block[:end]
        yield _large_line(line, text)


def _large_line(line: bytes, text: IO[bytes]) -> LargeLine:
    """The large line that starts with `line`; the rest of it is read but only the beginning is kept."""
    head, digest, size_bytes = bytearray(), hashlib.sha256(), 0
    while True:
        piece = line.rstrip(b"\n")
        head += piece[: KEPT_LINE_BYTES - len(head)]
        digest.update(piece)
        size_bytes += len(piece)
        if line.endswith(b"\n") or not (line := text.readline(BLOCK_BYTES)):
            return LargeLine(bytes(head), size_bytes, digest.hexdigest())


class HourLines(PulledHour):
    """The lines of an hour in a gzip file; None = the hour has no lines.

    The file holds every line as it came, including lines that are not events. Each pass recounts all lines as
    `counted`, and again adds those that are not events to `refused_lines`: `refused` is their number.
    """

    counted = 0

    def __init__(self, pull: PullPipeline, source: str, window: Window, file: BinaryIO | None, stop: Stop) -> None:
        super().__init__(window, file, pull.spool)
        self._stop, self._key, self._place = stop, pull.key(source, window), pull.place(source, window)
        self._before = self._uuid_sum = 0
        self._is_read = False

    def _restart(self) -> None:
        self.refused_lines.close()
        self._is_read = True
        self.counted = self.rows = self.refused = self._before = self._uuid_sum = 0

    @property
    def digest(self) -> str:
        """Equal for the same events in any order; "" for an hour without lines. Hex."""
        if self.file is None:
            return ""
        if not self._is_read:
            for _ in self.tables():
                pass
        return hashlib.sha256(f"{self.rows}:{self._uuid_sum}".encode()).hexdigest()

    def tables(self) -> Iterator[Tables]:
        """See `PulledHour.tables`."""
        self._restart()
        for block in self._blocks():
            self._before = self.rows + self.refused
            found = reader().tables(block, self._refuse)
            self._took(found)
            yield found

    def load_each(self, load: Callable[[Tables], None]) -> None:
        """See `PulledHour.load_each`."""
        self._restart()
        for block in self._blocks():
            for line in filter(bytes.strip, block.split(b"\n")) if isinstance(block, bytes) else (block,):
                self._before = self.rows + self.refused
                found = reader().tables(line, self._refuse, careful=True)
                try:
                    if found:
                        load(found)
                except Rejected as error:
                    self._refuse(REFUSED, cast("bytes", line), 1, f"refused by the warehouse: {error.message}")
                else:
                    self._took(found)

    def content(self) -> WindowContent:
        """See `PulledHour.content`."""
        return sum(map(content_of_block, self._blocks()), NOTHING)

    def _refuse(self, reason: str, line: bytes, number: int, detail: str) -> None:
        """Count a line that is not an event. `detail` says what is wrong, without values."""
        what = f"line {self._before + number}: {detail}"
        self.refused += 1
        self.refused_lines.add(self._place, reason, line, f"{self._key} {what}")

    def _took(self, found: Tables) -> None:
        uuids = uuids_in(found)
        self.rows += len(uuids)
        self._uuid_sum = (self._uuid_sum + sum(int(each.replace("-", ""), 16) for each in uuids)) % MODULUS

    def _blocks(self) -> Iterator[Block]:
        """The lines, counted as they come."""
        if self.file is None:
            return
        self.file.seek(0)
        # A broken stream is detected when members are joined, or is reported as a damaged object.
        with gzip.open(self.file) as text:
            for block in blocks(cast("IO[bytes]", text)):
                self._stop.check()
                self.counted += lines_in(block)
                yield block


def content_of_block(block: Block) -> WindowContent:
    """The content of whole lines: equal for the same events, wherever they are stored."""
    from app.object_store.row_digest import content_of  # imports numpy and pyarrow, which a pull does not need

    if not isinstance(block, bytes):
        return content_of([{"event": f"{block.size_bytes} bytes, {block.sha256}"}])
    return content_of({"event": _canonical(line)} for line in block.split(b"\n") if line.strip())


def _canonical(line: bytes) -> str:
    try:
        return msgspec.json.encode(msgspec.json.decode(line), order="sorted").decode()
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return line.strip().decode("utf-8", "backslashreplace")
