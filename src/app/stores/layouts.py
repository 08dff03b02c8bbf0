"""Layouts as older versions kept them, in the state database: read once, when the layout moves beside the data."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from app.stores.sql import Database


@dataclass(frozen=True, slots=True)
class Layout:
    """How objects of windows that start at or after `effective_at` are cut, named and encoded.

    `timestamp_unit` "us" or "ns" is that of the column timestamp in Parquet; older versions knew nanoseconds only.
    """

    effective_at: datetime
    window_seconds: int
    format: str
    date_format: str
    timestamp_unit: str = "ns"


class SqlLayouts:
    """The layouts of all pipelines. Raises what `Session` raises."""

    def __init__(self, database: Database, queries: Mapping[str, str]) -> None:
        self._database = database
        self._queries = queries

    def layouts(self, pipeline: str) -> Sequence[Layout]:
        """Oldest first; empty before the first one was added."""
        with self._database.transaction(read_only=True) as session:
            return [Layout(**row) for row in session.rows(self._queries["layouts"], pipeline=pipeline)]
