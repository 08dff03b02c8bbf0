"""Maps product events to warehouse rows as defined in `product_mapping.toml`, and loads them."""

import json
import logging
import math
import re
import tomllib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from app.core.errors import Permanent, Rejected
from app.core.ledger import Tally
from app.db.database import UNSTORABLE, instant_text

if TYPE_CHECKING:
    from app.product_events.hours import PulledHour

# Conversion of product event values: one rule per word of `product_mapping.toml`, each applied to a whole column.
#
# Invariants: whatever the input, the output can be stored in either database or is None. JSON values are text on both
# input and output.

Column = Sequence[Any]
Rule = Callable[[Column], Column]

UUID = re.compile(r"[0-9a-fA-F]{8}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{12}")
SPACED = re.compile(r"\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d\.\d{6}")
WHOLE = re.compile(r"[+-]?\d{1,19}(?:\.0*)?")
KEY_CHARACTERS = 512
NESTED_FROM_CHARACTERS, MAX_DEPTH = 200, 100
NONE = type(None)
YES, NO = frozenset({"true", "1", "1.0", "via app"}), frozenset({"false", "0", "0.0"})
INT_DIGITS = 4300  # Python parses no longer integer
MAPPED_V4 = "::ffff:"


def _rule(turn: Callable[[Any], Any]) -> Rule:
    """A rule that converts value by value; None stays None."""

    def turned(column: Column) -> Column:
        # Most columns repeat a few values: each is converted once. Not where values of several types may be equal.
        if set(map(type, column)) - {NONE} in (set(), {str}, {int}):
            known = {value: turn(value) for value in set(column) if value is not None}
            return list(map(known.get, column))
        return [None if value is None else turn(value) for value in column]

    return turned


def plain(text: str) -> str:
    """Text without what no database stores: NUL and lone surrogates become replacement characters."""
    return UNSTORABLE.sub("\ufffd", text) if UNSTORABLE.search(text) else text


def text(value: Any) -> str | None:
    """A value as text; empty becomes None."""
    if isinstance(value, bool):
        return str(value).lower()
    return plain(str(value)) or None


def key(value: Any) -> str | None:
    """Text short enough for an index."""
    found = text(value)
    return found if found and len(found) <= KEY_CHARACTERS else None


def uuid(value: Any) -> str | None:
    """A UUID in lower case."""
    return value.lower() if isinstance(value, str) and UUID.fullmatch(value) else None


def whole(bits: int) -> Callable[[Any], int | None]:
    """A signed integer of `bits`, also parsed from text."""
    low, high = -(1 << bits), 1 << bits

    def turn(value: Any) -> int | None:
        if isinstance(value, bool):
            return None
        if isinstance(value, str):
            value = int(value.partition(".")[0]) if WHOLE.fullmatch(value.strip()) else None
        elif isinstance(value, float):
            value = int(value) if value.is_integer() else None
        return value if value is not None and low <= value < high else None

    return turn


def number(value: Any) -> float | None:
    """A finite number, also parsed from text."""
    try:
        found = float(value)
    except (ValueError, OverflowError):
        return None
    return found if math.isfinite(found) and not isinstance(value, bool) else None


def truth(value: Any) -> bool | None:
    """True or False from any of the services' spellings; anything else becomes None."""
    said = str(value).strip().lower()
    return True if said in YES else False if said in NO else None


def instant(value: Any) -> str | None:
    """An ISO 8601 timestamp, with a space or a T, UTC if it has no zone; in the form that the databases read."""
    if not isinstance(value, str):
        return None
    try:
        at = datetime.fromisoformat(value)
        if SPACED.fullmatch(value):  # the form of nearly all of them, here confirmed as a real timestamp
            return f"{value[:10]}T{value[11:]}Z"
        return instant_text(at.replace(tzinfo=UTC) if at.tzinfo is None else at.astimezone(UTC))
    except (ValueError, OverflowError):
        return None


def epoch(value: Any) -> str | None:
    """A timestamp from seconds since 1970."""
    seconds = whole(40)(value)
    try:
        return None if seconds is None else instant_text(datetime.fromtimestamp(seconds, UTC))
    except (ValueError, OverflowError, OSError):
        return None


def json_value(value: Any) -> str | None:
    """A JSON value as text; null becomes None, and a value nested too deep for a database becomes one JSON string."""
    found = value if isinstance(value, str) else bytes(value).decode()
    if found == "null":
        return None
    # A hundred levels need more characters than that.
    if len(found) > NESTED_FROM_CHARACTERS and nests_too_deep(found):
        return json.dumps({"_raw": found})
    return found


def json_text(value: Any) -> str | None:
    """JSON contained in a text; text that is not JSON becomes a JSON string."""
    if not value:
        return None
    try:
        parsed = parsed_json(value, parse_constant=_refuse)
        is_readable = not nests_too_deep(value)
    except (ValueError, RecursionError):
        is_readable = False
    if not is_readable:
        return json.dumps({"_raw": plain(str(value))}, ensure_ascii=False)
    return storable_json(parsed)


def parsed_json(found: str | bytes, **options: Any) -> Any:
    """The value of JSON text. An integer that Python does not parse becomes a text of its digits."""
    return json.loads(found, parse_int=lambda digits: int(digits) if len(digits) <= INT_DIGITS else digits, **options)


def storable_json(value: Any) -> str | None:
    """JSON text of a value, without what no database stores. Infinite numbers become null."""
    return None if value is None else json.dumps(cleaned(value), ensure_ascii=False, separators=(",", ":"))


def cleaned(value: Any) -> Any:
    """The value with plain texts and finite numbers at every level."""
    if isinstance(value, str):
        return plain(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, list):
        return [cleaned(each) for each in value]
    if isinstance(value, dict):
        return {plain(name): cleaned(each) for name, each in value.items()}
    return value


def nests_too_deep(found: str) -> bool:
    """True when JSON text may be nested deeper than databases and readers reliably handle."""
    if found.count("{") + found.count("[") <= MAX_DEPTH:
        return False
    levels = deepest = 0
    # Possessive: a group that may give back its matches keeps a hundred bytes for each of them.
    for token in re.finditer(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"|[\[{]|[\]}]', found):
        levels += {"[": 1, "{": 1, "]": -1, "}": -1}.get(token[0], 0)
        deepest = max(deepest, levels)
    return deepest > MAX_DEPTH


def _refuse(constant: str) -> None:
    raise ValueError(constant)


RULES: Mapping[str, Rule] = {
    "text": _rule(text),
    "key": _rule(key),
    "uuid": _rule(uuid),
    "bigint": _rule(whole(63)),
    "integer": _rule(whole(31)),
    "float": _rule(number),
    "bool": _rule(truth),
    "instant": _rule(instant),
    "epoch": _rule(epoch),
    "lower": _rule(lambda value: (text(value) or "").lower() or None),
    "json": _rule(json_value),
    "jsontext": _rule(json_text),
    "ipv4": _rule(lambda value: (text(value) or "").removeprefix(MAPPED_V4) or None),
}


# Product events as warehouse rows, as defined in `product_mapping.toml`: columns of events in, rows by table out.
#
# Invariants: the rows of one call belong to the same events, and an event has a row in a table only when it has that
# table's key. This code knows nothing about a service or a table beyond what the file says.

FILE = Path(__file__).with_name("product_mapping.toml")
EVENTS_TABLE = "events_part"


@dataclass(frozen=True, slots=True)
class EventRows:
    """Rows of one table. `names` are its columns; the table's other columns stay empty."""

    names: Sequence[str]
    rows: Sequence[Sequence[Any]]


Tables = Mapping[str, EventRows]


@dataclass(frozen=True, slots=True)
class ValuePlace:
    """Where a value comes from and how it is converted. `constant` None = the first of `paths` that has a value."""

    paths: tuple[str, ...]
    constant: str | None
    word: str


@dataclass(frozen=True)
class ProductMapping:
    """How one service's events are mapped. `places` by table and column, in order."""

    places: Mapping[str, Mapping[str, ValuePlace]]

    @cached_property
    def words(self) -> Mapping[str, frozenset[str]]:
        """Every path that is read -> the rule words applied to its values."""
        found: dict[str, set[str]] = {}
        for place in self._all:
            for path in place.paths:
                found.setdefault(path, set()).add(place.word)
        return {path: frozenset(words) for path, words in found.items()}

    @cached_property
    def _all(self) -> frozenset[ValuePlace]:
        return frozenset(place for columns in self.places.values() for place in columns.values())

    def tables(self, events: Mapping[str, Column], count: int) -> Tables:
        """Rows of `count` events, given as columns by path. Tables without a row are left out."""
        turned = {place: RULES[place.word](_taken(place, events, count)) for place in self._all}
        found = {}
        for table, places in self.places.items():
            # An event with nothing but its uuid gets a row in one table only, so that it is counted.
            alone = table == EVENTS_TABLE or "uuid" not in places
            rows = _rows([turned[place] for place in places.values()], alone=alone)
            if rows:
                found[table] = EventRows(tuple(places), rows)
        return found


def _taken(place: ValuePlace, events: Mapping[str, Column], count: int) -> Column:
    if place.constant is not None:
        return [place.constant] * count
    column = events[place.paths[0]]
    for path in place.paths[1:]:
        column = [
            first if first not in (None, "") else second for first, second in zip(column, events[path], strict=True)
        ]
    return column


def _rows(columns: Sequence[Column], *, alone: bool) -> Sequence[Sequence[Any]]:
    """Rows that have a key and, unless `alone`, at least one other value."""
    keys, *others = columns
    rows = list(zip(*columns, strict=True))
    # Most events have all keys and most rows another value: these checks are cheaper than checking each row.
    if None in keys:
        rows = [row for row in rows if row[0] is not None]
    if not alone and all(None in other for other in others):
        rows = [row for row in rows if row.count(None) < len(others)]
    return rows


@lru_cache(maxsize=4)
def mapping(service: str) -> ProductMapping:
    """The mapping of a service: `amplitude` or `appmetrica`."""
    sections = tomllib.loads(FILE.read_text(encoding="utf-8"))[service]
    return ProductMapping(
        {table: {name: _place(text) for name, text in columns.items()} for table, columns in sections.items()}
    )


def _place(text: str) -> ValuePlace:
    where, _, word = text.rpartition(" : ")
    if where.startswith("'"):
        return ValuePlace((), where.strip("'"), word)
    return ValuePlace(tuple(path.strip() for path in where.split("|")), None, word)


# Loads product events into the warehouse, in transactions small enough not to block others.
#
# Invariant: an event's rows go to all tables in one transaction.

LOAD_EVENTS = 50_000
REFUSED_ROWS = 20
log = logging.getLogger(__name__)


class EventWarehouse(Protocol):
    """What pulls need from the warehouse."""

    def load(self, chunks: Iterable[Tables], *, past: bool) -> int:
        """Load rows of several tables in one transaction, each event once; returns the number of new events.
        Idempotent.

        `past`: newer events were loaded before, so the known device data stays. Raises Transient, Permanent, and
        Rejected for a value that the database does not accept.
        """

    def known(self, uuids: Collection[str]) -> int:
        """How many of these events exist; each counts once. Pass at most a few thousand at a time."""


def uuids_in(chunk: Tables) -> Sequence[str]:
    """The uuids of a chunk's events, one each."""
    rows = chunk.get(EVENTS_TABLE)
    return [row[0] for row in rows.rows] if rows else []  # the key comes first


def missing_events(known: Callable[[Collection[str]], int], chunk: Tables) -> int:
    """How many events of a chunk the warehouse does not hold."""
    uuids = set(uuids_in(chunk))
    return len(uuids) - known(uuids) if uuids else 0


def load_hour(warehouse: EventWarehouse, hour: "PulledHour", *, past: bool) -> Tally:
    """Load an hour; if the warehouse refuses it, retry event by event with sanitised values. Returns how many events
    are new and how many were there.

    Raises the warehouse's error when it accepts none of the events.
    """
    first, loaded, faults = Tally(), Tally(), list[Permanent]()
    try:
        for part in _loaded(warehouse, hour.tables(), past=past):
            first += part
    except (Permanent, Rejected) as error:
        log.warning("%s: retrying event by event with sanitised values: %s", hour.window, error)
    else:
        return first

    def load_one(tables: Tables) -> None:
        nonlocal loaded
        try:
            loaded = sum(_loaded(warehouse, iter((tables,)), past=past), loaded)
        except Permanent as error:
            faults.append(error)
            if loaded == Tally() and len(faults) >= REFUSED_ROWS:
                raise
            raise Rejected(error.message, error.hint) from error

    # If the warehouse accepts some events it is working, so the refused events are at fault.
    hour.load_each(load_one)
    if faults and loaded == Tally():
        raise faults[0]
    # What was there by now may have been loaded a moment ago.
    again = min(first.new, loaded.already_there)
    return Tally(new=loaded.new + again, already_there=loaded.already_there - again)


def _loaded(warehouse: EventWarehouse, tables: Iterator[Tables], *, past: bool) -> Iterator[Tally]:
    """Load all of `tables`, in transactions of about LOAD_EVENTS."""
    for first in tables:
        given = 0

        def one_turn(chunk: Tables | None = first) -> Iterator[Tables]:
            nonlocal given
            while chunk is not None:
                given += len(uuids_in(chunk))
                yield chunk
                chunk = next(tables, None) if given < LOAD_EVENTS else None

        new = warehouse.load(one_turn(), past=past)
        yield Tally(new=new, already_there=given - new)
