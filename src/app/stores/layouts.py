"""Layouts in the state database: window length and format of a pipeline's objects, and from which instant they hold.

Invariant: a layout that is in effect never changes, since objects are named by it; a later one begins a new time.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from app.stores.sql import Database


@dataclass(frozen=True, slots=True)
class Layout:
    """How objects of windows that start at or after `effective_at` are cut and named."""

    effective_at: datetime
    window_seconds: int
    format: str
    date_format: str


class SqlLayouts:
    """The layouts of all pipelines. Raises what `Session` raises."""

    def __init__(self, database: Database, queries: Mapping[str, str]) -> None:
        self._database = database
        self._queries = queries

    def layouts(self, pipeline: str) -> Sequence[Layout]:
        """Oldest first; empty before the first one was added."""
        with self._database.transaction(read_only=True) as session:
            return [Layout(**row) for row in session.rows(self._queries["layouts"], pipeline=pipeline)]

    def add_layout(self, pipeline: str, layout: Layout) -> None:
        """Idempotent. One that is still to come replaces an earlier one of the same instant; one in effect stays."""
        with self._database.transaction() as session:
            session.run(
                self._queries["save_layout"],
                pipeline=pipeline,
                effective_at=layout.effective_at,
                window_seconds=layout.window_seconds,
                format=layout.format,
                date_format=layout.date_format,
            )
