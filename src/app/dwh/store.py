"""The warehouse in SQLite or PostgreSQL: rows in, each once, and rows out.

Invariants: a request is one transaction, together with the answer kept under its Idempotency-Key; ids are given in the
order of the rows; writers of a table take turns, so that overlapping requests neither deadlock nor give up a lock.
"""

import json
import threading
from array import array
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.core.errors import Transient
from app.dwh import inserting, loading
from app.dwh.answers import Inserted, answer_of, text_of
from app.dwh.faults import BadRequest
from app.dwh.inserting import Batches
from app.dwh.tables import Table
from app.stores.migrations import Migrated
from app.stores.product_mapping import Tables
from app.stores.sql import Session, load_queries, open_database, sql_directory
from app.stores.sqlite import SqliteDatabase

if TYPE_CHECKING:
    from app.dwh.query import Selection

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
class Selected:
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
        self._queries = load_queries(sql_directory() / "dwh", database.dialect)
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
        with self._database.transaction(read_only=True) as session:
            session.rows("SELECT 1 AS found")

    def close(self) -> None:
        """Close all connections. Idempotent."""
        self._database.close()

    def insert(self, table: Table, batches: Batches, request: Request) -> Inserted:
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
                return loading.one_by_one(session, chunks, past=past)
            staged = loading.stage(session, chunks)
            for table in staged:
                inserting.turn(session, table)
            return loading.merge(session, staged, past=past)

    def known(self, uuids: Collection[str]) -> int:
        """How many of these events are there; each counts once. A few thousand at a time at most."""
        with self._database.transaction(read_only=True) as session:
            (found,) = session.rows(self._queries["known_events"], uuids=json.dumps(sorted(uuids)))
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

    def _once(self, session: Session, table: Table, batches: Batches, request: Request) -> Inserted:
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

    def _merge(self, session: Session, table: Table, batches: Batches) -> Inserted:
        if self._lite:
            ids = inserting.in_sqlite(session, table, batches)
        else:
            ids = inserting.in_postgres(session, table, batches, MERGE_ROWS)
        return Inserted(ids, batches.rows, batches.batches)

    @contextmanager
    def selected(self, selection: "Selection") -> Iterator["Selected"]:
        """What a selection finds, in its order, in bounded memory, from one snapshot; valid inside the block."""
        dialect = self._database.dialect
        with self._database.transaction(read_only=True) as session:
            if not self._lite:
                session.run("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
            blocks = session.blocks(selection.sql(dialect), **selection.params)
            edge = session.stream(selection.edge_sql(dialect), **selection.edge_params)
            yield Selected(blocks, edge)


def open_warehouse(url: str, data_dir: Path) -> Warehouse:
    """The warehouse at a URL, or in SQLite under `data_dir` when it is empty. Raises Permanent for a bad URL."""
    plain = open_database(url, variables=VARIABLES) if url else SqliteDatabase(data_dir / FILE)
    return Warehouse(Migrated(plain, sql_directory() / "dwh"))
