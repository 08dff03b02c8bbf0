"""The warehouse in SQLite or PostgreSQL: stores each row once, and reads rows."""

import json
import threading
from array import array
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from functools import cache
from itertools import chain, islice, repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar, get_args

from app.core.errors import Permanent, Rejected, Transient
from app.db.database import Dialect, NamedQueries, Session, sql_directory
from app.db.migrations import MigratedDatabase, open_database
from app.dwh.query import Erasure, KeysetPosition, Selection, conditions_of
from app.dwh.tables import BY_NAME, EVENTS, POSTGRES_TYPES, SQLITE_NOW, TABLES, Table
from app.product_events.mapping import EventRows, Tables
from app.web.errors import Refused

if TYPE_CHECKING:
    from app.dwh.request_parsing import ReceivedBody

# Inserts the rows of one request into their table, in the caller's transaction.
#
# Invariants: each row is stored once, by its natural key; ids follow the order of the rows; writers of a table take
# turns, so that overlapping requests never deadlock. New rows, the common case, take the fast path: COPY directly into
# the table. Only when a key already exists do rows go through a temporary table, since COPY cannot handle conflicts.
# Every name in the SQL comes from a table declaration, never from a caller.

LOCKS = 4_937_238_650_200  # plus the table's number; no other program uses these advisory locks
STATEMENT_ROWS = 20  # per INSERT in SQLite; more do not help
PROBED_KEYS = 16
MERGE_ROWS = 20_000
COPIED_BLOCKS = 20  # of at most 1000 rows each
Resolution = Literal["ignore-duplicates", "merge-duplicates"]
RESOLUTIONS: tuple[Resolution, ...] = get_args(Resolution)
MERGE = RESOLUTIONS[1]
Row = Sequence[Any]
Columns = Sequence[Sequence[Any]]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class InsertResult:
    """The result of an insert. `ids`: of rows actually inserted; a dry run omits them and reports only their number."""

    ids: "array[int]"
    rows: int
    batches: int
    inserted_rows: int
    dry_run: bool = False
    replayed: bool = False


def _on_conflict(table: Table, *, past: bool = False) -> str:
    """The ON CONFLICT clause. With `past`, existing values are kept and only nulls are filled in."""
    first, second = (table.name, "excluded") if past else ("excluded", table.name)
    taken = ", ".join(f"{name} = coalesce({first}.{name}, {second}.{name})" for name in table.names[1:])
    return f"ON CONFLICT ({table.key.name}) DO {f'UPDATE SET {taken}' if table.updates else 'NOTHING'}"


@cache
def _upsert(table: Table, rows: int = 0, *, past: bool = False) -> str:
    """The upsert of one row, its values bound in order; in SQLite also of several `rows`: a shared `created_at` is
    bound first, then the values. Many rows per statement, and a timestamp computed once, save a third of the time.
    """
    values = ", ".join("?" * len(table.columns))
    names = ", ".join((["created_at"] if rows else []) + list(table.names))
    places = ", ".join([f"(?1, {values})"] * rows) if rows else f"({values})"
    return f"INSERT INTO {table.name} ({names}) VALUES {places} {_on_conflict(table, past=past)}"  # noqa: S608


def in_sqlite(session: Session, table: Table, batches: "ReceivedBody", deleted: "DeletedKeys") -> "array[int]":
    """Insert by prepared statements. SQLite has one writer, so all newer ids at the end are from this transaction."""
    before = largest_id(session, table)
    (now,) = session.rows(f"SELECT {SQLITE_NOW} AS text")
    rows = _each(batches.blocks())
    together = batches.rows - batches.rows % STATEMENT_ROWS
    if deleted.any_of(session, table):
        rows, together = deleted.left_out(session, table, rows), 0
    written = 0
    for rows_each, part in ((STATEMENT_ROWS, islice(rows, together)), (1, rows)):
        values = [chain.from_iterable(part)] * (rows_each * len(table.columns))
        written += session.run_rows(_upsert(table, rows_each), zip(repeat(now["text"]), *values, strict=False))
    return _given(session, table, before, -1 if table.updates else written)


def in_postgres(session: Session, table: Table, batches: "ReceivedBody", deleted: "DeletedKeys") -> "array[int]":
    """Insert by COPY. Groups already stored stay so when a later group meets a conflict."""
    if table.updates:
        return _staged(session, table, deleted, (merge_duplicates(_each([block]), {}) for block in batches.blocks()))
    ids = array("q")
    if not batches.rows:
        return ids
    before = lock_table(session, table)
    if not deleted.any_of(session, table) and not _known(session, table, batches):
        for group in _chunks(batches.blocks(), COPIED_BLOCKS):
            copied = session.append_new(table.name, table.names, group)
            if copied is None:
                break
            # Excludes rows from other writers: `now()` is the start of this transaction.
            ids += _given(session, table, before, copied, own="AND created_at = now()")
            before = ids[-1]
    if len(ids) < batches.rows:
        rows = islice(_each(batches.blocks()), len(ids), None)
        ids += _staged(session, table, deleted, _chunks(rows, MERGE_ROWS), before)
    return ids


def _each(blocks: Iterable[Columns]) -> Iterator[Row]:
    """The rows of blocks by column, one by one."""
    return chain.from_iterable(zip(*block, strict=True) for block in blocks)


def lock_table(session: Session, table: Table) -> int:
    """Wait for the table's lock in PostgreSQL; returns the largest id so far. Later ids are larger."""
    session.rows("SELECT set_config('lock_timeout', '25s', true)")
    session.rows("SELECT pg_advisory_xact_lock(:lock)", lock=LOCKS + table.number)
    return largest_id(session, table)


def largest_id(session: Session, table: Table) -> int:
    """The largest id, 0 for none."""
    (row,) = session.rows(f"SELECT coalesce(max(id), 0) AS newest FROM {table.name}")  # noqa: S608
    return int(row["newest"])


def merge_duplicates(rows: Iterable[Row], found: dict[Any, Row]) -> Iterable[Row]:
    """Merge rows into `found`: one row per key, at its first position, with the last non-null value of each column.
    This is needed because one statement can update a row only once.
    """
    seen: Row = ()
    for row in rows:
        if row != seen:  # a device usually sends many events in succession
            held = found.get(row[0], row)
            found[row[0]] = [new if new is not None else old for new, old in zip(row, held, strict=True)]
            seen = row
    return found.values()


def _stage(table: Table) -> str:
    """The name of the temporary table for rows in PostgreSQL, since COPY cannot handle conflicts."""
    return f"staged_{table.name}"


def _create_stage(session: Session, table: Table) -> None:
    """Create the temporary table, once per connection; it is empty at the start of each use. The server numbers
    incoming rows, which is cheaper than sending the numbers.
    """
    columns = ", ".join(f"{each.name} {POSTGRES_TYPES[each.kind]}" for each in table.columns)
    ordinal = "n bigint GENERATED ALWAYS AS IDENTITY"
    session.run(f"CREATE TEMP TABLE IF NOT EXISTS {_stage(table)} ({ordinal}, {columns}) ON COMMIT DELETE ROWS")


def _merge(table: Table, *, past: bool = False) -> str:
    """The upsert of all staged rows, in order of arrival."""
    columns = ", ".join(table.names)
    staged = f"SELECT {columns} FROM {_stage(table)} ORDER BY n"  # noqa: S608
    return f"INSERT INTO {table.name} ({columns}) {staged} {_on_conflict(table, past=past)}"


def _staged(
    session: Session,
    table: Table,
    deleted: "DeletedKeys",
    chunks: Iterable[Iterable[Row]],
    before: int | None = None,
) -> "array[int]":
    """Insert by COPY into a temporary table and an upsert from there. Rows that are only updated keep their ids."""
    _create_stage(session, table)
    ids_written = "SELECT coalesce(string_agg(id::text, ','), '') AS ids FROM written"
    merge_chunk = f"WITH written AS ({_merge(table)} RETURNING id) {ids_written}"
    ids = array("q")
    for number, chunk in enumerate(chunks):
        if number:
            session.run(f"TRUNCATE {_stage(table)}")
        session.append(_stage(table), table.names, chunk)
        before = lock_table(session, table) if before is None else before
        deleted.leave_out_staged(session, table)
        (written,) = session.rows(merge_chunk)
        given = sorted(map(int, written["ids"].split(","))) if written["ids"] else []
        ids.extend(given[bisect_right(given, before) :])
    return ids


def _given(session: Session, table: Table, before: int, written: int, *, own: str = "") -> "array[int]":
    """The ids above `before` assigned to `written` rows, in order; -1: number unknown."""
    newer = f"FROM {table.name} WHERE id > :newest"
    # Two index lookups, regardless of the number of rows.
    ends = f"SELECT (SELECT min(id) {newer}) AS first, (SELECT max(id) {newer}) AS last"
    (span,) = session.rows(ends, newest=before)
    if span["first"] is not None and span["last"] - span["first"] + 1 == written:
        return array("q", range(span["first"], span["last"] + 1))  # no gaps, so all ids are ours
    return array("q", (id_ for (id_,) in session.stream(f"SELECT id {newer} {own} ORDER BY id", newest=before)))


def _known(session: Session, table: Table, batches: "ReceivedBody") -> bool:
    """Whether some of the first rows already exist, as they all do when a request is repeated."""
    keys = next(batches.blocks())[0]
    probed = f"{table.key.name} = ANY(:keys::{POSTGRES_TYPES[table.key.kind]}[])"
    (row,) = session.rows(
        f"SELECT EXISTS (SELECT FROM {table.name} WHERE {probed}) AS known",  # noqa: S608
        keys=list(keys[:: len(keys) // PROBED_KEYS + 1]),
    )
    return bool(row["known"])


def _chunks(each: Iterator[T], count: int) -> Iterator[Iterator[T]]:
    """Chunks of `count`; exhaust one before starting the next."""
    for first in each:
        yield chain((first,), islice(each, count - 1))


# Loads rows of several tables at once, as delivered by a pull, in the caller's transaction.
#
# Invariants: in PostgreSQL no lock is held while rows still arrive, and locks are taken in the order of the tables'
# numbers, so that two loads never deadlock; memory is bounded by one chunk and the devices of a load.


def load_postgres(session: Session, chunks: Iterable[Tables], deleted: "DeletedKeys", *, past: bool) -> int:
    """Stage all rows, then merge them; returns the number of new events."""
    staged: set[str] = set()
    latest: dict[str, dict[Any, Row]] = {}
    for chunk in chunks:
        for name, rows in chunk.items():
            table = BY_NAME[name]
            if name not in staged:
                _create_stage(session, table)
                staged.add(name)
            if table.updates:
                merge_duplicates(_in_order(table, rows), latest.setdefault(name, {}))
            else:
                session.append(_stage(table), rows.names, rows.rows)
    for name, found in latest.items():
        session.append(_stage(BY_NAME[name]), BY_NAME[name].names, found.values())
    tables = [table for table in TABLES if table.name in staged]
    for table in tables:
        lock_table(session, table)
        deleted.leave_out_staged(session, table)
    written = {table.name: session.run(_merge(table, past=past)) for table in tables}
    return written.get(EVENTS.name, 0)


def load_sqlite(session: Session, chunks: Iterable[Tables], deleted: "DeletedKeys", *, past: bool) -> int:
    """Store all rows by prepared statements; returns the number of new events."""
    latest: dict[str, dict[Any, Row]] = {}
    before = largest_id(session, EVENTS)
    for chunk in chunks:
        for name, rows in chunk.items():
            table = BY_NAME[name]
            if table.updates:
                merge_duplicates(_in_order(table, rows), latest.setdefault(name, {}))
            else:
                session.run_rows(_upsert(table), deleted.left_out(session, table, _in_order(table, rows)))
    for name, found in latest.items():
        values = deleted.left_out(session, BY_NAME[name], found.values())
        session.run_rows(_upsert(BY_NAME[name], past=past), values)
    newer = f"SELECT count(*) AS events FROM {EVENTS.name} WHERE id > :newest"  # noqa: S608
    return int(session.rows(newer, newest=before)[0]["events"])


def _in_order(table: Table, rows: EventRows) -> Iterable[Row]:
    """The rows with all columns of the table, in table order; null for missing columns."""
    if tuple(rows.names) == tuple(table.names):
        return rows.rows
    places = [rows.names.index(each) if each in rows.names else None for each in table.names]
    return ([None if place is None else row[place] for place in places] for row in rows.rows)


# Keeps rows that were deleted on request from returning.
#
# Invariant: keys are checked while holding the table's lock, so that a row deleted meanwhile does not come back.

LOOKED_UP_ROWS = 1000
HASH: dict[Dialect, str] = {
    "sqlite": "sha256_hex((SELECT salt FROM dwh_deleted_salt) || '{table}/' || {key})",
    "postgres": (
        "encode(sha256(convert_to((SELECT salt FROM dwh_deleted_salt) || '{table}/' || {key}, 'UTF8')), 'hex')"
    ),
}
"""What is stored of a deleted row's natural key, as text; same as in `deleted.sql` and the migration."""


@dataclass(frozen=True, slots=True)
class EraseResult:
    """Numbers of rows deleted, of keys newly remembered as deleted, and of keys forgotten."""

    deleted: int
    remembered: int = 0
    forgotten: int = 0


class DeletedKeys:
    """The hashes of the natural keys of deleted rows."""

    def __init__(self, queries: NamedQueries) -> None:
        self._queries = queries

    def _hash(self, table: Table, key: str) -> str:
        return HASH[self._queries.database.dialect].format(table=table.name, key=f"CAST({key} AS text)")

    def any_of(self, session: Session, table: Table) -> bool:
        """Whether this table has any deleted keys."""
        return bool(session.rows(self._queries["has_deleted"], table=table.name)[0]["has_deleted"])

    def left_out(self, session: Session, table: Table, rows: Iterable[Row]) -> Iterator[Row]:
        """The rows whose keys were not deleted."""
        each = iter(rows)
        if not self.any_of(session, table):
            yield from each
        while some := list(islice(each, LOOKED_UP_ROWS)):
            found = self.among(session, table, [str(row[0]) for row in some])
            yield from (row for row in some if str(row[0]) not in found)

    def among(self, session: Session, table: Table, keys: Sequence[str]) -> Collection[str]:
        """Those of the given keys that belong to deleted rows."""
        found = session.rows(self._queries["deleted_keys"], table=table.name, keys=json.dumps(keys))
        return {row["key"] for row in found}

    def leave_out_staged(self, session: Session, table: Table) -> None:
        """Remove deleted rows from the staged ones in PostgreSQL."""
        if self.any_of(session, table):
            of_table = "table_name = :table AND "
            session.run(
                f"DELETE FROM {_stage(table)} AS staged USING dwh_deleted WHERE {of_table}"  # noqa: S608 - declared
                f"dwh_deleted.key_hash = {self._hash(table, f'staged.{table.key.name}')}",
                table=table.name,
            )

    def remember(self, session: Session, table: Table, condition: str, params: Mapping[str, Any], at: datetime) -> int:
        """Remember the keys of all rows that match the condition; returns how many are new."""
        key_hash = self._hash(table, table.key.name)
        return session.run(
            "INSERT INTO dwh_deleted (table_name, key_hash, deleted_at) "  # noqa: S608 - declared
            f"SELECT '{table.name}', {key_hash}, :deleted_at FROM {table.name} WHERE {condition} "
            "ON CONFLICT DO NOTHING",
            **params,
            deleted_at=at,
        )

    def forget(self, session: Session, table: Table, keys: Sequence[str]) -> int:
        """Forget these keys; returns how many were remembered."""
        names = {f"key_{number}": key for number, key in enumerate(keys)}
        places = ", ".join(self._hash(table, f":{name}") for name in names)
        condition = f"table_name = :table AND key_hash IN ({places})"
        return session.run(f"DELETE FROM dwh_deleted WHERE {condition}", table=table.name, **names) if keys else 0  # noqa: S608


# The warehouse in SQLite or PostgreSQL: stores each row once, and reads rows.
#
# Invariants: a request is one transaction, which includes the answer stored under its Idempotency-Key; ids follow the
# order of the rows; writers of a table take turns, so that overlapping requests neither deadlock nor give up a lock.

FILE = "dwh.db"
VARIABLES = "DWH_DATABASE_URL"
OTHER_PROGRAM_HINT = (
    "set DWH_DATABASE_URL to an empty database; if these are the tables of the DWH Helper, bring their rows over with "
    "python -m app import-dwh URL, where URL is that of this database"
)
TABLE_NAMES: dict[Dialect, str] = {
    "sqlite": "SELECT lower(name) AS name FROM sqlite_master WHERE type IN ('table', 'view')",
    "postgres": (
        "SELECT relname AS name FROM pg_class WHERE relkind IN ('r', 'p', 'v', 'm', 'f') AND pg_table_is_visible(oid)"
    ),
}
"""Tables and views: both have rows, and neither leaves the name to another. SQLite's names have no case."""
TURN_SECONDS = 60.0
KEPT_DAYS = 7


class _RollBack(Exception):
    """Rolls back the transaction of a dry run."""


class SelectedRows(NamedTuple):
    """The result of a selection. `blocks` have one row more than requested, if it exists. `total`: number of matching
    rows, None if not requested. `last()`: the last row, if more follow it, from a query of its own.
    """

    blocks: Iterator[Sequence[Sequence[Any]]]
    total: int | None
    last: Callable[[], KeysetPosition | None]


class Warehouse:
    """Seven tables in one database. Connects on first use. Safe to use from many threads."""

    def __init__(self, database: MigratedDatabase) -> None:
        self.database = database
        self._lite = database.dialect == "sqlite"
        self._queries = NamedQueries(database, sql_directory() / "dwh")
        self._deleted = DeletedKeys(self._queries)
        # SQLite has one writer. Threads queue on this lock, because waiting for SQLite's own lock is not fair.
        self._turn = threading.Lock()

    def ping(self) -> str:
        """One round trip to the database; returns "". Raises Transient or Permanent when it fails."""
        self.database.ping()
        return ""

    def close(self) -> None:
        """Close all connections. Idempotent."""
        self.database.close()

    def insert(
        self,
        table: Table,
        batches: "ReceivedBody",
        *,
        at: datetime,
        caller: str = "",
        key: str = "",
        dry_run: bool = False,
        resolution: Resolution | None = None,
    ) -> InsertResult:
        """Store rows that do not exist yet, all or nothing: for `caller`, under an Idempotency-Key ("" for none).

        `resolution`: how to treat a row whose key exists; None: as the table declares.

        Raises Refused for an Idempotency-Key that was used for another request. After Transient, the rows may or may
        not be stored; repeating the request is safe.
        """
        if resolution:
            table = replace(table, updates=resolution == MERGE)
        name = {"caller": caller, "key": key} if key and not dry_run else {}
        with suppress(_RollBack), self._writing() as session:
            if name:
                fingerprint = ":".join(filter(None, (table.name, batches.digest, resolution)))
                if answered := self._answered(session, name, fingerprint, at):
                    return answered
            insert = in_sqlite if self._lite else in_postgres
            ids = insert(session, table, batches, self._deleted)
            done = InsertResult(ids, batches.rows, batches.batches, len(ids))
            if dry_run:
                raise _RollBack
            if name:
                answer = json.dumps({"ids": done.ids.tolist(), "rows": done.rows, "batches": done.batches})
                session.run(self._queries["answer_request"], **name, answer=answer)
            return done
        return replace(done, ids=array("q"), dry_run=True)

    def _answered(
        self, session: Session, name: Mapping[str, str], fingerprint: str, at: datetime
    ) -> InsertResult | None:
        """The stored answer of an earlier request with the same Idempotency-Key; None for the first request."""
        session.run(self._queries["forget_requests"], before_at=at - timedelta(days=KEPT_DAYS))
        if session.run(self._queries["claim_request"], **name, fingerprint=fingerprint, created_at=at):
            return None
        (held,) = session.rows(self._queries["request"], **name)
        if held["fingerprint"] != fingerprint:
            what = "this Idempotency-Key was used for another request"
            raise Refused(409, what, "use a new key", "Idempotency-Key")
        answer = json.loads(held["answer"])
        ids = array("q", answer["ids"])
        return InsertResult(ids, answer["rows"], answer["batches"], len(ids), replayed=True)

    def load(self, chunks: Iterable[Tables], *, past: bool = False) -> int:
        """Load rows of several tables in one transaction; returns the number of new events. Idempotent.

        Existing rows stay unchanged, except devices, which take the latest values. With `past`, nothing is replaced.
        """
        with self._writing() as session:
            return (load_sqlite if self._lite else load_postgres)(session, chunks, self._deleted, past=past)

    def erase(self, erasure: Erasure, *, at: datetime) -> EraseResult:
        """Delete all rows that match the filters, and remember hashes of their natural keys, so that they are not
        inserted again; or, to allow that again, forget the hashes.
        """
        table, dialect = erasure.table, self.database.dialect
        conditions, params = conditions_of(erasure.filters, dialect)
        condition = " AND ".join(conditions)
        remembered = forgotten = deleted = 0
        with suppress(_RollBack), self._writing() as session:
            if not self._lite:
                lock_table(session, table)
            if erasure.forget:
                forgotten = self._deleted.forget(session, table, erasure.keys)
            else:
                remembered = self._deleted.remember(session, table, condition, params, at)
            deleted = session.run(f"DELETE FROM {table.name} WHERE {condition}", **params)  # noqa: S608 - declared
            if erasure.dry_run:
                raise _RollBack
        return EraseResult(deleted, remembered, forgotten)

    def known(self, uuids: Collection[str]) -> int:
        """How many of these events are stored, or were deleted on request. Pass at most a few thousand at a time."""
        asked = sorted(uuids)
        with self.database.transaction(read_only=True) as session:
            (found,) = session.rows(self._queries["known_events"], uuids=json.dumps(asked))
            return int(found["events"]) + len(self._deleted.among(session, EVENTS, asked))

    @contextmanager
    def _writing(self) -> Iterator[Session]:
        if self._lite and not self._turn.acquire(timeout=TURN_SECONDS):
            raise Transient("other requests are writing to the warehouse", "send the same request again later")
        try:
            with self.database.transaction() as session:
                yield session
        finally:
            if self._lite:
                self._turn.release()

    @contextmanager
    def selected(self, selection: Selection, *, count: bool = False) -> Iterator["SelectedRows"]:
        """The rows of a selection, in order, in bounded memory, from one snapshot; valid inside the block."""
        dialect = self.database.dialect
        with self.database.transaction(read_only=True) as session:
            if not self._lite:
                session.run("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
            if selection.after and selection.after.of_row:
                looking, params = selection.place_sql()
                if not (found := session.rows(looking, **params)):
                    what = "the row at this position, whose value is too long for a link, was deleted"
                    raise Rejected(what, "begin again, or sort by another column")
                selection = replace(selection, after=KeysetPosition(selection.after.id, found[0]["value"]))
            total = None
            if count:
                counting, params = selection.count_sql(dialect)
                total = int(session.rows(counting, **params)[0]["total"])

            def last() -> KeysetPosition | None:
                edge, params = selection.edge_sql(dialect)
                found = list(session.stream(edge, **params))
                return selection.edge_place(found[0]) if len(found) > 1 else None

            reading, params = selection.rows_sql(dialect)
            yield SelectedRows(session.blocks(reading, **params), total, last)


def open_warehouse(url: str, data_dir: Path) -> Warehouse:
    """The warehouse at a URL, or in SQLite under `data_dir` when it is empty. Raises Permanent for a bad URL."""
    plain = open_database(url, variables=VARIABLES, default=data_dir / FILE)

    def refuse_other_program(session: Session) -> None:
        if names := other_tables(session, plain.dialect):
            raise Permanent(f"{plain.place}: another program created the table {min(names)}", OTHER_PROGRAM_HINT)

    return Warehouse(MigratedDatabase(plain, sql_directory() / "dwh", before_first=refuse_other_program))


def other_tables(session: Session, dialect: Dialect) -> Collection[str]:
    """The database's tables and views that share a name with one of ours."""
    return {row["name"] for row in session.rows(TABLE_NAMES[dialect])} & BY_NAME.keys()
