"""The rows of one request into their table, in one transaction of the caller's.

Invariants: each row once, by its natural key; ids are given in the order of the rows; writers of a table take turns, so
that overlapping requests never deadlock. Rows that are new, as most are, take the shortest way: COPY into the table
itself. Only when it meets a key that is there already do they go through a temporary table, where COPY knows conflicts.
"""

from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice, repeat
from typing import Any, Protocol

from app.dwh import ddl
from app.dwh.tables import Table
from app.stores.sql import Session

LOCKS = 4_937_238_650_200  # with a table's number added; no other program uses these for its advisory locks
STATEMENT_ROWS = 20  # of an INSERT in SQLite; more bring no more
PROBED_KEYS = 16
Row = Sequence[Any]
Columns = Sequence[Sequence[Any]]


class Batches(Protocol):
    """What is to be stored: `rows` of them in all, in `batches` batches, told from others by `digest`."""

    @property
    def rows(self) -> int:
        """How many rows there are."""

    @property
    def batches(self) -> int:
        """How many batches they make."""

    @property
    def digest(self) -> str:
        """The same for the same request, hex."""

    def read(self) -> Iterator[Iterable[Row]]:
        """The batches, each as its rows. From the first one, each time."""

    def blocks(self) -> Iterator[Columns]:
        """All rows, some at a time, by column. From the first one, each time."""


def in_sqlite(session: Session, table: Table, batches: Batches) -> "array[int]":
    """By prepared statements: only this transaction writes, so what is newer at its end is what it inserted."""
    before = newest(session, table)
    (now,) = session.rows(f"SELECT {ddl.SQLITE_NOW} AS text")
    rows = chain.from_iterable(zip(*block, strict=True) for block in batches.blocks())
    written = 0
    for rows_each, part in ((STATEMENT_ROWS, islice(rows, batches.rows - batches.rows % STATEMENT_ROWS)), (1, rows)):
        values = [chain.from_iterable(part)] * (rows_each * len(table.columns))
        written += session.run_rows(ddl.upsert_many(table, rows_each), zip(repeat(now["text"]), *values, strict=False))
    return _given(session, table, before, ddl.newer(table), -1 if table.updates else written)


def in_postgres(session: Session, table: Table, batches: Batches, group_rows: int) -> "array[int]":
    """By COPY. What one group of rows has stored when the next one meets a conflict stays stored."""
    if table.updates:
        return _staged(session, table, (united(batch) for batch in batches.read()))
    ids = array("q")
    if not batches.rows:
        return ids
    before = turn(session, table)
    if not _known(session, table, batches):
        for group in _groups(batches.blocks(), group_rows):
            copied = session.append_new(table.name, table.names, group)
            if copied is None:
                break
            ids += _given(session, table, before, ddl.newer_own(table), copied)
            before = ids[-1]
    if len(ids) < batches.rows:
        rows = islice(chain.from_iterable(batches.read()), len(ids), None)
        ids += _staged(session, table, _chunks(rows, group_rows), before)
    return ids


def turn(session: Session, table: Table) -> int:
    """Wait for this table's turn in PostgreSQL; the largest id until now. Ids given from here on are larger."""
    session.rows("SELECT set_config('lock_timeout', '25s', true)")
    session.rows("SELECT pg_advisory_xact_lock(:lock)", lock=LOCKS + table.number)
    return newest(session, table)


def newest(session: Session, table: Table) -> int:
    """The largest id, 0 for none."""
    (row,) = session.rows(ddl.newest(table))
    return int(row["newest"])


def united(rows: Iterable[Row]) -> Iterable[Row]:
    """One row per key, at its first place: of each column the last value that is not null."""
    found: dict[Any, Row] = {}
    for row in rows:
        held = found.get(row[0])
        found[row[0]] = [new if new is not None else old for new, old in zip(row, held, strict=True)] if held else row
    return found.values()


def _staged(session: Session, table: Table, chunks: Iterable[Iterable[Row]], before: int | None = None) -> "array[int]":
    """By COPY into a temporary table, and from there: rows that are only updated have ids from before."""
    session.run(ddl.create_stage(table))
    ids = array("q")
    for number, chunk in enumerate(chunks):
        if number:
            session.run(ddl.empty_stage(table))
        session.append(ddl.stage(table), table.names, chunk)
        before = turn(session, table) if before is None else before
        (written,) = session.rows(ddl.merge(table))
        given = sorted(map(int, written["ids"].split(","))) if written["ids"] else []
        ids.extend(given[bisect_right(given, before) :])
    return ids


def _given(session: Session, table: Table, before: int, newer: str, written: int) -> "array[int]":
    """The ids above `before` that were given to `written` rows, in order; `newer` reads them."""
    (span,) = session.rows(ddl.span(table), newest=before)
    if span["first"] is not None and span["last"] - span["first"] + 1 == written:
        return array("q", range(span["first"], span["last"] + 1))  # so many rows fill all of it, and are all ours
    return array("q", (id_ for (id_,) in session.stream(newer, newest=before)))


def _known(session: Session, table: Table, batches: Batches) -> bool:
    """Whether some of the first rows are there already, as they all are when a request is repeated."""
    keys = next(batches.blocks())[0]
    probed = list(keys[:: len(keys) // PROBED_KEYS + 1])
    (row,) = session.rows(ddl.known(table), keys=probed)
    return bool(row["known"])


def _groups(blocks: Iterator[Columns], rows: int) -> Iterator[Iterator[Columns]]:
    """Some rows together; read a group to its end before the next."""
    for first in blocks:
        yield _until(rows, chain((first,), blocks))


def _until(rows: int, blocks: Iterator[Columns]) -> Iterator[Columns]:
    taken = 0
    while taken < rows and (block := next(blocks, None)):
        taken += len(block[0])
        yield block


def _chunks(rows: Iterator[Row], count: int) -> Iterator[Iterator[Row]]:
    for first in rows:
        yield chain((first,), islice(rows, count - 1))
