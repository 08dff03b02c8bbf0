"""Rows of product events on their way into the warehouse, in transactions of a size that does not hold up others.

Invariant: an event's rows go to all tables in one transaction.
"""

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Protocol

from app.stores.product_mapping import Tables

LOAD_EVENTS = 50_000
EVENTS_TABLE = "events_part"


class Load(Protocol):
    """The warehouse: rows of several tables in one transaction, each event once. Idempotent."""

    def __call__(self, chunks: Iterable[Tables], *, past: bool) -> int:
        """How many events are new. `past`: newer ones were loaded before, so what is known of a device stays.

        Raises Transient, Permanent, and Rejected for a value that the database does not take.
        """


class Known(Protocol):
    """The warehouse: which events it holds."""

    def __call__(self, uuids: Collection[str]) -> int:
        """How many of these events are there; each counts once. A few thousand at a time at most."""


class Events(Protocol):
    """What pulls ask of the warehouse."""

    @property
    def load(self) -> Load:
        """See `Load`."""

    @property
    def known(self) -> Known:
        """See `Known`."""


def lost(known: Known, tables: Tables) -> int:
    """How many events of a chunk the warehouse does not hold."""
    rows = tables.get(EVENTS_TABLE)
    if not rows:
        return 0
    place = rows.names.index("uuid")
    uuids = {str(row[place]) for row in rows.rows}
    return len(uuids) - known(uuids)


@dataclass(frozen=True, slots=True)
class Loaded:
    """What became of events that were given to the warehouse: `given` of them, `new` for the first time."""

    given: int = 0
    new: int = 0

    def __add__(self, other: "Loaded") -> "Loaded":
        return Loaded(self.given + other.given, self.new + other.new)


def load_in_turns(load: Load, tables: Iterator[Tables], *, past: bool) -> Loaded:
    """Load all."""
    done = Loaded()
    for first in tables:
        turn = _Turn()
        new = load(turn.counted(chain([first], _up_to(tables, LOAD_EVENTS - events_in(first)))), past=past)
        done += Loaded(turn.given, new)
    return done


@dataclass(slots=True)
class _Turn:
    given: int = 0

    def counted(self, chunks: Iterable[Tables]) -> Iterator[Tables]:
        for chunk in chunks:
            self.given += events_in(chunk)
            yield chunk


def _up_to(tables: Iterator[Tables], events: int) -> Iterator[Tables]:
    while events > 0 and (chunk := next(tables, None)) is not None:
        yield chunk
        events -= events_in(chunk)


def events_in(chunk: Tables) -> int:
    """How many events a chunk holds."""
    rows = chunk.get(EVENTS_TABLE)
    return len(rows.rows) if rows else 0
