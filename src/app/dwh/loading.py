"""Rows of several tables at once, as a pull brings them: staged first, merged at the end of the same transaction.

Invariants: no lock is held while rows still come; locks are taken in the order of the tables' numbers, so that two
loads never wait for each other; memory is bounded by one chunk and the devices of a load.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import count
from typing import Any

from app.dwh import ddl
from app.dwh.tables import EVENTS, TABLES, Table
from app.stores.product_mapping import Tables
from app.stores.sql import Dialect, Session

BY_NAME = {table.name: table for table in TABLES}


def stage(session: Session, dialect: Dialect, chunks: Iterable[Tables]) -> Sequence[Table]:
    """Stage all rows; the tables that have some, in the order of their numbers."""
    staged: set[str] = set()
    ordinals = count()
    latest: dict[Any, dict[str, Any]] = {}
    for chunk in chunks:
        for name, rows in chunk.items():
            table = BY_NAME[name]
            if name not in staged:
                session.run(ddl.create_stage(table, dialect))
                if dialect == "sqlite":
                    session.run(ddl.empty_stage(table, dialect))
                staged.add(name)
            if table.updates:
                _unite(latest, rows.names, rows.rows)
            else:
                session.append(ddl.stage(table), [ddl.ORDINAL, *rows.names], _numbered(ordinals, rows.rows))
    tables = [table for table in TABLES if table.name in staged]
    for table in (each for each in tables if each.updates):
        united = ([row.get(name) for name in table.names] for row in latest.values())
        session.append(ddl.stage(table), [ddl.ORDINAL, *table.names], _numbered(ordinals, united))
    return tables


def merge(session: Session, tables: Sequence[Table], *, past: bool) -> int:
    """Merge what was staged; how many events are new."""
    written = {table.name: session.run(ddl.upsert(table, past=past)) for table in tables}
    return written.get(EVENTS.name, 0)


def _numbered(ordinals: Iterator[int], rows: Iterable[Sequence[Any]]) -> Iterator[Sequence[Any]]:
    for row in rows:
        yield (next(ordinals), *row)


def _unite(latest: dict[Any, dict[str, Any]], names: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """One row per key, which a database can update once only: of each column the last value that is not null."""
    seen: Sequence[Any] = ()
    for row in rows:
        if row != seen:  # a device mostly sends many events in a row
            values = {name: value for name, value in zip(names, row, strict=True) if value is not None}
            latest.setdefault(row[0], {}).update(values)
            seen = row
