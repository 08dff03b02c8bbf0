"""Rows of product events on their way into the warehouse, in transactions of a size that does not hold up others.

Invariant: an event's rows go to all tables in one transaction.
"""

from collections.abc import Collection, Iterable, Iterator
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


def load_in_turns(load: Load, tables: Iterator[Tables], *, past: bool) -> int:
    """Load all; how many events are new."""
    new = 0
    for first in tables:
        new += load(chain([first], _up_to(tables, LOAD_EVENTS - _events(first))), past=past)
    return new


def _up_to(tables: Iterator[Tables], events: int) -> Iterator[Tables]:
    while events > 0 and (chunk := next(tables, None)) is not None:
        yield chunk
        events -= _events(chunk)


def _events(chunk: Tables) -> int:
    rows = chunk.get(EVENTS_TABLE)
    return len(rows.rows) if rows else 0
