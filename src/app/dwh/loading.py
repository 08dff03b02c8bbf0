"""Rows of several tables at once, as a pull brings them, in one transaction of the caller's.

Invariants: in PostgreSQL no lock is held while rows still come, and locks are taken in the order of the tables'
numbers, so that two loads never wait for each other; memory is bounded by one chunk and the devices of a load.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from app.dwh import ddl
from app.dwh.tables import EVENTS, TABLES, Table
from app.stores.product_mapping import Rows, Tables
from app.stores.sql import Session

BY_NAME = {table.name: table for table in TABLES}


def stage(session: Session, chunks: Iterable[Tables]) -> Sequence[Table]:
    """Stage all rows in PostgreSQL; the tables that have some, in the order of their numbers."""
    staged: set[str] = set()
    latest = Latest()
    for chunk in chunks:
        for name, rows in chunk.items():
            table = BY_NAME[name]
            if name not in staged:
                session.run(ddl.create_stage(table))
                staged.add(name)
            if table.updates:
                latest.add(table, rows)
            else:
                session.append(ddl.stage(table), rows.names, rows.rows)
    for table, values in latest.rows():
        session.append(ddl.stage(table), table.names, values)
    return [table for table in TABLES if table.name in staged]


def merge(session: Session, tables: Sequence[Table], *, past: bool) -> int:
    """Merge what was staged; how many events are new."""
    written = {table.name: session.run(ddl.merge_all(table, past=past)) for table in tables}
    return written.get(EVENTS.name, 0)


def one_by_one(session: Session, chunks: Iterable[Tables], *, past: bool) -> int:
    """Store all rows in SQLite, by prepared statements; how many events are new."""
    latest = Latest()
    (before,) = session.rows(ddl.newest(EVENTS))
    for chunk in chunks:
        for name, rows in chunk.items():
            table = BY_NAME[name]
            if table.updates:
                latest.add(table, rows)
            else:
                session.run_rows(ddl.upsert(table), _whole(table, rows))
    for table, values in latest.rows():
        session.run_rows(ddl.upsert(table, past=past), values)
    return sum(1 for _ in session.stream(ddl.newer(EVENTS), newest=before["newest"]))


def _whole(table: Table, rows: Rows) -> Iterable[Sequence[Any]]:
    """Rows with every column of the table, in its order."""
    if tuple(rows.names) == tuple(table.names):
        return rows.rows
    places = [rows.names.index(name) if name in rows.names else None for name in table.names]
    return ([None if place is None else row[place] for place in places] for row in rows.rows)


class Latest:
    """One row per key of tables that take new values: a statement can update a row once only. The last value that is
    not null counts.
    """

    def __init__(self) -> None:
        self._found: dict[str, dict[Any, dict[str, Any]]] = {}

    def add(self, table: Table, rows: Rows) -> None:
        """Take rows in."""
        held = self._found.setdefault(table.name, {})
        seen: Sequence[Any] = ()
        for row in rows.rows:
            if row != seen:  # a device mostly sends many events in a row
                values = {name: value for name, value in zip(rows.names, row, strict=True) if value is not None}
                held.setdefault(row[0], {}).update(values)
                seen = row

    def rows(self) -> Iterator[tuple[Table, Iterable[Sequence[Any]]]]:
        """Each table with its rows, whole."""
        for name, held in self._found.items():
            table = BY_NAME[name]
            yield table, [[values.get(column) for column in table.names] for values in held.values()]
