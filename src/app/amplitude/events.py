"""NDJSON of events as columns for the mapping, decoded in compiled code: only what the mapping reads is taken out.

Invariants: a line is either an event or a fault with its number; a line that is fine is never lost to one that is not;
memory is bounded by a block and the longest line. An event is told by its uuid; `digest` does not depend on order.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from operator import attrgetter
from typing import Any

import msgspec

from app.core.errors import Permanent
from app.stores.product_mapping import ProductMapping, Tables, mapping
from app.stores.product_values import cleaned, rule, storable_json

SERVICE = "amplitude"
JSON_WORD = "json"
BLOCK_BYTES = 1 << 19
MAX_LINE_BYTES = 1 << 24
SUSPICIOUS = re.compile(rb"\\u(?:0000|[dD][89abAB])")
UNREADABLE = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, ValueError)
MODULUS = 1 << 128
SHOWN_FAULTS = 3
INT_BITS = 63


@dataclass(slots=True)
class Seen:
    """What an hour came to: `rows` events, `faults` lines that are none, and what tells its events from others'."""

    rows: int = 0
    faults: list[str] = field(default_factory=list)
    fault_rows: int = 0
    _sum: int = 0

    @property
    def digest(self) -> str:
        """The same for the same events in any order. Hex."""
        return hashlib.sha256(f"{self.rows}:{self._sum}".encode()).hexdigest()

    def took(self, uuids: Iterable[str]) -> None:
        """Count events."""
        numbers = [int(each.replace("-", ""), 16) for each in uuids]
        self.rows += len(numbers)
        self._sum = (self._sum + sum(numbers)) % MODULUS

    def refused(self, what: str) -> None:
        """Count a line that is no event."""
        self.fault_rows += 1
        if len(self.faults) < SHOWN_FAULTS:
            self.faults.append(what)


class Reader:
    """Turns lines into tables. Made once per process, since a typed decoder takes a while to make."""

    def __init__(self, what: ProductMapping) -> None:
        self._mapping = what
        heads = sorted({path.partition(".")[0] for path in what.words})
        self._nested = {head: sorted(path for path in what.words if path.startswith(f"{head}.")) for head in heads}
        raw = {head for head in heads if self._nested[head] or JSON_WORD in what.words.get(head, ())}
        event = _struct("Event", {head: msgspec.Raw if head in raw else _SCALAR for head in heads})
        self._columns = {head: attrgetter(_attribute(number)) for number, head in enumerate(heads)}
        self._scalars = set(heads) - raw
        self._uuids = rule("uuid")
        self._event = msgspec.json.Decoder(event)
        self._inside = {head: _Inside(paths) for head, paths in self._nested.items() if paths}

    def tables(self, block: bytes, seen: Seen, *, careful: bool = False) -> Tables:
        """Rows by table of whole lines. `careful`: each line is taken apart and put together of what can be stored."""
        events = None if careful or SUSPICIOUS.search(block) else self.decoded(block)
        return self._tables(self._by_line(block, seen, careful=careful) if events is None else events, seen)

    def decoded(self, block: bytes) -> Sequence[Any] | None:
        """All lines at once, typed; None when one of them cannot be read so."""
        try:
            return self._event.decode_lines(block)
        except UNREADABLE:
            return None

    def _by_line(self, block: bytes, seen: Seen, *, careful: bool) -> Sequence[Any]:
        events = []
        for line in filter(None, map(bytes.strip, block.split(b"\n"))):
            try:
                if careful or SUSPICIOUS.search(line):
                    raise ValueError
                events.append(self._event.decode(line))
            except UNREADABLE:
                try:
                    events.append(self._event.decode(self._mended(line)))
                except UNREADABLE as error:
                    seen.refused(f"no event: {str(error)[:120]}")
        return events

    def _mended(self, line: bytes) -> bytes:
        """The event of a line in a form that can be decoded and stored."""
        event = cleaned(dict(_members(json.loads(line))))
        for name in self._scalars & event.keys():
            if isinstance(event[name], dict | list):
                event[name] = storable_json(event[name])
            elif isinstance(event[name], int) and event[name].bit_length() > INT_BITS:
                event[name] = str(event[name])
        return msgspec.json.encode(event)

    def _tables(self, events: Sequence[Any], seen: Seen) -> Tables:
        columns: dict[str, Sequence[Any]] = {head: list(map(take, events)) for head, take in self._columns.items()}
        known = self._uuids(columns["uuid"])
        kept = [position for position, each in enumerate(known) if each is not None]
        if len(kept) < len(known):
            for each in (each for each, turned in zip(columns["uuid"], known, strict=True) if turned is None):
                seen.refused(f"its uuid is {str(each)[:60]!r}")
            columns = {head: [column[at] for at in kept] for head, column in columns.items()}
        seen.took(known[position] for position in kept)
        for head, inside in self._inside.items():
            columns |= inside.columns(columns[head])
        return self._mapping.tables(columns, len(columns["uuid"]))


def _members(found: Any) -> Iterable[tuple[str, Any]]:
    if isinstance(found, dict):
        return found.items()
    raise ValueError("it is no object")


_SCALAR: Any = str | int | float | bool | None


class _Inside:
    """Members of an object that an event holds. Those of another kind than a single value are none."""

    def __init__(self, paths: Sequence[str]) -> None:
        self._takes: Mapping[str, Callable[[Any], Any]] = {
            path: attrgetter(_attribute(number)) for number, path in enumerate(paths)
        }
        names = [path.partition(".")[2] for path in paths]
        self._decode = msgspec.json.Decoder(_struct("Inside", dict.fromkeys(names, _SCALAR))).decode
        self._nothing = self._decode(b"{}")
        self._names = frozenset(names)

    def columns(self, objects: Sequence[Any]) -> Mapping[str, Sequence[Any]]:
        found = [self._nothing if each is None else self._one(each) for each in objects]
        return {path: list(map(take, found)) for path, take in self._takes.items()}

    def _one(self, raw: Any) -> Any:
        try:
            return self._decode(raw)
        except UNREADABLE:
            found = msgspec.json.decode(raw)
            if not isinstance(found, dict):
                return self._nothing
            kept = {name: found[name] for name in self._names & found.keys()}
            scalars = {name: value for name, value in kept.items() if not isinstance(value, dict | list)}
            return self._decode(msgspec.json.encode(scalars))


def _attribute(number: int) -> str:
    return f"f{number}"


def _struct(name: str, kinds: Mapping[str, Any]) -> Any:
    fields = [(_attribute(number), kind, None) for number, kind in enumerate(kinds.values())]
    names = {_attribute(number): head for number, head in enumerate(kinds)}
    return msgspec.defstruct(name, fields, rename=names, gc=False)


@lru_cache(maxsize=1)
def reader() -> Reader:
    """The reader of Amplitude's events."""
    return Reader(mapping(SERVICE))


def blocks(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """The pieces as blocks of whole lines. Raises Permanent for a line that is no event by its size."""
    held: list[bytes] = []
    held_bytes = 0
    for piece in pieces:
        end = piece.rfind(b"\n") + 1
        if held_bytes + end >= BLOCK_BYTES and end:
            yield b"".join((*held, piece[:end]))
            held, held_bytes = [piece[end:]], len(piece) - end
        else:
            held.append(piece)
            held_bytes += len(piece)
        if held_bytes > MAX_LINE_BYTES:
            raise Permanent(f"an event is larger than {MAX_LINE_BYTES} bytes", "it is no export of events")
    if rest := b"".join(held):
        yield rest
