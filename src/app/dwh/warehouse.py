"""The warehouse in SQLite or PostgreSQL: rows in, each once, and rows out."""

import json
import threading
from array import array
from bisect import bisect_right
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from itertools import chain, islice, repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from app.core.errors import Transient
from app.db.database import NamedQueries, Session, sql_directory
from app.db.migrations import Migrated, open_database
from app.dwh import table_sql
from app.dwh.results import BadRequest, Inserted, answer_of, text_of
from app.dwh.tables import EVENTS, TABLES, Table
from app.product_events.mapping import Rows, Tables

if TYPE_CHECKING:
    from app.dwh.query import Selection

# The rows of one request into their table, in one transaction of the caller's.
#
# Invariants: each row once, by its natural key; ids are given in the order of the rows; writers of a table take
# turns, so that overlapping requests never deadlock. Rows that are new, as most are, take the shortest way: COPY into
# the table itself. Only when it meets a key that is there already do they go through a temporary table, where COPY
# knows conflicts.

LOCKS = 4_937_238_650_200  # with a table's number added; no other program uses these for its advisory locks
STATEMENT_ROWS = 20  # of an INSERT in SQLite; more bring no more
PROBED_KEYS = 16
Row = Sequence[Any]
Columns = Sequence[Sequence[Any]]


class StorableBatches(Protocol):
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


def in_sqlite(session: Session, table: Table, batches: StorableBatches) -> "array[int]":
    """By prepared statements: only this transaction writes, so what is newer at its end is what it inserted."""
    before = newest(session, table)
    (now,) = session.rows(f"SELECT {table_sql.SQLITE_NOW} AS text")
    rows = chain.from_iterable(zip(*block, strict=True) for block in batches.blocks())
    written = 0
    for rows_each, part in ((STATEMENT_ROWS, islice(rows, batches.rows - batches.rows % STATEMENT_ROWS)), (1, rows)):
        values = [chain.from_iterable(part)] * (rows_each * len(table.columns))
        upsert = table_sql.upsert_many(table, rows_each)
        written += session.run_rows(upsert, zip(repeat(now["text"]), *values, strict=False))
    return _given(session, table, before, table_sql.newer(table), -1 if table.updates else written)


def in_postgres(session: Session, table: Table, batches: StorableBatches, group_rows: int) -> "array[int]":
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
            ids += _given(session, table, before, table_sql.newer_own(table), copied)
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
    (row,) = session.rows(table_sql.newest(table))
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
    session.run(table_sql.create_stage(table))
    ids = array("q")
    for number, chunk in enumerate(chunks):
        if number:
            session.run(table_sql.empty_stage(table))
        session.append(table_sql.stage(table), table.names, chunk)
        before = turn(session, table) if before is None else before
        (written,) = session.rows(table_sql.merge(table))
        given = sorted(map(int, written["ids"].split(","))) if written["ids"] else []
        ids.extend(given[bisect_right(given, before) :])
    return ids


def _given(session: Session, table: Table, before: int, newer: str, written: int) -> "array[int]":
    """The ids above `before` that were given to `written` rows, in order; `newer` reads them."""
    (span,) = session.rows(table_sql.span(table), newest=before)
    if span["first"] is not None and span["last"] - span["first"] + 1 == written:
        return array("q", range(span["first"], span["last"] + 1))  # so many rows fill all of it, and are all ours
    return array("q", (id_ for (id_,) in session.stream(newer, newest=before)))


def _known(session: Session, table: Table, batches: StorableBatches) -> bool:
    """Whether some of the first rows are there already, as they all are when a request is repeated."""
    keys = next(batches.blocks())[0]
    probed = list(keys[:: len(keys) // PROBED_KEYS + 1])
    (row,) = session.rows(table_sql.known(table), keys=probed)
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


# Rows of several tables at once, as a pull brings them, in one transaction of the caller's.
#
# Invariants: in PostgreSQL no lock is held while rows still come, and locks are taken in the order of the tables'
# numbers, so that two loads never wait for each other; memory is bounded by one chunk and the devices of a load.

BY_NAME = {table.name: table for table in TABLES}


def stage(session: Session, chunks: Iterable[Tables]) -> Sequence[Table]:
    """Stage all rows in PostgreSQL; the tables that have some, in the order of their numbers."""
    staged: set[str] = set()
    latest = Latest()
    for chunk in chunks:
        for name, rows in chunk.items():
            table = BY_NAME[name]
            if name not in staged:
                session.run(table_sql.create_stage(table))
                staged.add(name)
            if table.updates:
                latest.add(table, rows)
            else:
                session.append(table_sql.stage(table), rows.names, rows.rows)
    for table, values in latest.rows():
        session.append(table_sql.stage(table), table.names, values)
    return [table for table in TABLES if table.name in staged]


def merge(session: Session, tables: Sequence[Table], *, past: bool) -> int:
    """Merge what was staged; how many events are new."""
    written = {table.name: session.run(table_sql.merge_all(table, past=past)) for table in tables}
    return written.get(EVENTS.name, 0)


def one_by_one(session: Session, chunks: Iterable[Tables], *, past: bool) -> int:
    """Store all rows in SQLite, by prepared statements; how many events are new."""
    latest = Latest()
    (before,) = session.rows(table_sql.newest(EVENTS))
    for chunk in chunks:
        for name, rows in chunk.items():
            table = BY_NAME[name]
            if table.updates:
                latest.add(table, rows)
            else:
                session.run_rows(table_sql.upsert(table), _whole(table, rows))
    for table, values in latest.rows():
        session.run_rows(table_sql.upsert(table, past=past), values)
    return sum(1 for _ in session.stream(table_sql.newer(EVENTS), newest=before["newest"]))


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


# The warehouse in SQLite or PostgreSQL: rows in, each once, and rows out.
#
# Invariants: a request is one transaction, together with the answer kept under its Idempotency-Key; ids are given in
# the order of the rows; writers of a table take turns, so that overlapping requests neither deadlock nor give up a
# lock.

FILE = "dwh.db"
VARIABLES = "DWH_DATABASE_URL"
TURN_SECONDS = 60.0
MERGE_ROWS = 20_000
KEPT_DAYS = 7


@dataclass(frozen=True, slots=True)
class Request:
    """How to store: for `caller`, under an Idempotency-Key ("" for none), in earnest or to see what would happen."""

    at: datetime
    caller: str = ""
    key: str = ""
    dry_run: bool = False


class _Undo(Exception):
    """Ends the transaction of a dry run."""


@dataclass(frozen=True, slots=True)
class SelectedRows:
    """`blocks` of rows hold one more than was asked for, if there are so many; `edge` is the last one asked for, and
    that one.
    """

    blocks: Iterator[Sequence[Sequence[Any]]]
    edge: Iterator[Sequence[Any]]

    def last_id(self) -> int | None:
        """The id of the last row when more follow it. For who has not read to the end; costs a search of its own."""
        found = list(self.edge)
        return int(found[0][0]) if len(found) > 1 else None


class Warehouse:
    """Seven tables in one database. Connects on first use. Safe to use from many threads."""

    def __init__(self, database: Migrated) -> None:
        self._database = database
        self._lite = database.dialect == "sqlite"
        self._queries = NamedQueries(database, sql_directory() / "dwh")
        # SQLite has one writer; threads that wait here do so in turn, where its own lock would be a matter of luck.
        self._turn = threading.Lock()

    @property
    def database(self) -> Migrated:
        """Where the tables are."""
        return self._database

    @property
    def place(self) -> str:
        """Where it is, for messages."""
        return self._database.place

    def ping(self) -> None:
        """One round trip. Raises Transient or Permanent when the warehouse cannot be used."""
        self._database.ping()

    def close(self) -> None:
        """Close all connections. Idempotent."""
        self._database.close()

    def insert(self, table: Table, batches: StorableBatches, request: Request) -> Inserted:
        """Store what is not there yet, all or nothing. Raises BadRequest for a key that was used for another request.

        Transient means that it may or may not have been stored: the same request again does no harm.
        """
        with suppress(_Undo), self._writing() as session:
            done = self._once(session, table, batches, request)
            if request.dry_run:
                raise _Undo
        return replace(done, ids=array("q"), count=done.inserted_rows, dry_run=True) if request.dry_run else done

    def load(self, chunks: Iterable[Tables], *, past: bool = False) -> int:
        """Rows of several tables in one transaction, all or nothing; how many events are new. Idempotent.

        What is there stays, but for devices: these take the values that came last. Rows of the `past` replace none.
        """
        with self._writing() as session:
            if self._lite:
                return one_by_one(session, chunks, past=past)
            staged = stage(session, chunks)
            for table in staged:
                turn(session, table)
            return merge(session, staged, past=past)

    def known(self, uuids: Collection[str]) -> int:
        """How many of these events are there; each counts once. A few thousand at a time at most."""
        (found,) = self._queries.rows("known_events", uuids=json.dumps(sorted(uuids)))
        return int(found["events"])

    @contextmanager
    def _writing(self) -> Iterator[Session]:
        if not self._lite:
            with self._database.transaction() as session:
                yield session
            return
        if not self._turn.acquire(timeout=TURN_SECONDS):
            raise Transient("other requests are writing to the warehouse", "send the same request again later")
        try:
            with self._database.transaction() as session:
                yield session
        finally:
            self._turn.release()

    def _once(self, session: Session, table: Table, batches: StorableBatches, request: Request) -> Inserted:
        """The stored answer of an earlier request with the same key, else the rows and then the answer."""
        if not request.key or request.dry_run:
            return self._merge(session, table, batches)
        name = {"caller": request.caller, "key": request.key}
        fingerprint = f"{table.name}:{batches.digest}"
        session.run(self._queries["forget_requests"], before_at=request.at - timedelta(days=KEPT_DAYS))
        if not session.run(self._queries["claim_request"], **name, fingerprint=fingerprint, created_at=request.at):
            (held,) = session.rows(self._queries["request"], **name)
            if held["fingerprint"] != fingerprint:
                raise BadRequest(
                    409, "this Idempotency-Key was used for another request", "use a new key", "Idempotency-Key"
                )
            return replace(answer_of(held["answer"]), replayed=True)
        done = self._merge(session, table, batches)
        session.run(self._queries["answer_request"], **name, answer=text_of(done))
        return done

    def _merge(self, session: Session, table: Table, batches: StorableBatches) -> Inserted:
        ids = in_sqlite(session, table, batches) if self._lite else in_postgres(session, table, batches, MERGE_ROWS)
        return Inserted(ids, batches.rows, batches.batches)

    @contextmanager
    def selected(self, selection: "Selection") -> Iterator["SelectedRows"]:
        """What a selection finds, in its order, in bounded memory, from one snapshot; valid inside the block."""
        dialect = self._database.dialect
        with self._database.transaction(read_only=True) as session:
            if not self._lite:
                session.run("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
            blocks = session.blocks(selection.sql(dialect), **selection.params)
            edge = session.stream(selection.edge_sql(dialect), **selection.edge_params)
            yield SelectedRows(blocks, edge)


def open_warehouse(url: str, data_dir: Path) -> Warehouse:
    """The warehouse at a URL, or in SQLite under `data_dir` when it is empty. Raises Permanent for a bad URL."""
    plain = open_database(url, variables=VARIABLES, default=data_dir / FILE)
    return Warehouse(Migrated(plain, sql_directory() / "dwh"))
