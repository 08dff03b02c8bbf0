"""Rows of product events on their way into the warehouse, in transactions of a size that does not hold up others.

Invariant: an event's rows go to all tables in one transaction.
"""

from collections.abc import Iterable, Iterator
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
