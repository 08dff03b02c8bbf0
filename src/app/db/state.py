"""The state of the product in one database, and what happens when its file or its tables are damaged."""

import logging
import os
import re
import sqlite3
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from app.core.errors import Permanent
from app.db.checkpoints import SqlCheckpoints, SqlLayouts
from app.db.database import Damaged, Database, load_queries, open_database, sql_directory
from app.db.leases import SqlClocks, SqlLeases, StateClock
from app.db.migrations import CREATE_TABLE, LOCK, RECORD, TABLE_EXISTS, Migrated, Migration, migrations, recorded
from app.db.object_summaries import SqlSummaries
from app.db.page_queries import SqlPages
from app.db.run_records import SqlAlerts, SqlPauses, SqlPulls, SqlRuns
from app.db.sqlite import SqliteDatabase, file_id, folder_lock

# The SQLite file of the state. The state is a cache, so a damaged file is moved aside and a new one is made.
#
# Invariants: nothing is deleted; a file is moved only while no process opens or moves it, and only when it is still
# the file that was found damaged; a file that is locked, may not be read, or has no space left is not damaged.

MARK = ".damaged-"
COMPANIONS = ("-wal", "-shm", "-journal")
AGAIN_SECONDS = 60.0
TABLES = """
SELECT thing.type, thing.name, col.name AS col
FROM sqlite_master AS thing LEFT JOIN pragma_table_info(thing.name) AS col
"""
log = logging.getLogger(__name__)

Schema = set[tuple[str, str, str | None]]


class StateFile:
    """See `app.db.migrations.Rebuilt`."""

    def __init__(self, database: SqliteDatabase) -> None:
        self._database = database
        self._path = Path(os.path.realpath(database.path))  # what a link names is moved, not the link
        self._moved_at: float | None = None

    def check(self, wanted: Sequence[Migration]) -> None:
        """Raises Damaged when the tables are not those of the migrations that are recorded. Nothing is changed."""
        with self._database.transaction(read_only=True) as session:
            names = recorded(session, self._database.dialect)
            actual = {(row["type"], row["name"], row["col"]) for row in session.rows(TABLES)}
        done = [each for each in wanted if each.name in names]
        if len(done) < sum(name.partition("/")[0] == wanted[0].name.partition("/")[0] for name in names):
            return  # a newer version's, which is refused and left alone
        before, after = schema_after(done), schema_after(wanted)
        if missing := before - actual:
            raise self._damaged(f"{_named(missing)} missing, though its migration was applied")
        if extra := (after - before) & actual:
            raise self._damaged(f"{_named(extra)} there already, though no applied migration makes it")

    def move_aside(self, error: Damaged, look: Callable[[], None]) -> None:
        """Move the file with its companions, unless another process has done so or `look` finds nothing wrong.

        Raises `error` when a file that was made a minute ago is damaged again, and Permanent when it cannot be moved.
        """
        if self._moved_at is not None and time.monotonic() - self._moved_at < AGAIN_SECONDS:
            raise error
        seen = file_id(self._path)
        if error.file is None or error.file != seen:
            try:
                look()
            except Damaged as again:
                error = again
            else:
                return
        with folder_lock(self._path.parent, exclusive=True):
            if file_id(self._path) != seen:
                return  # another process has moved it
            name = self._move()
        self._moved_at = time.monotonic()
        log.error(
            "%s; moved to %s, a new state is made: jobs go on from what the destinations hold", error.message, name
        )

    def made(self) -> None:
        """The new file is in order."""
        self._moved_at = None

    @property
    def note(self) -> str:
        """Which files were moved aside and are still there; "" for none."""
        moved = self._path.parent.glob(f"{self._path.name}{MARK}*")
        names = sorted({re.sub(f"({'|'.join(COMPANIONS)})$", "", path.name) for path in moved})
        if not names:
            return ""
        return f"a damaged state was moved to {', '.join(names)} and a new one made; delete it when nobody needs it"

    def _damaged(self, what: str) -> Damaged:
        return Damaged(f"{self._database.place}: {what}", file=file_id(self._path))

    def _move(self) -> str:
        stamp = f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}"
        names = (f"{self._path.name}{MARK}{stamp}{f'-{number}' if number else ''}" for number in range(1000))
        name = next(name for name in names if not list(self._path.parent.glob(f"{name}*")))
        # The database itself first: a log that is left behind by a crash here is found alone, and moved then.
        for suffix in ("", *COMPANIONS):
            try:
                Path(f"{self._path}{suffix}").rename(self._path.parent / f"{name}{suffix}")
            except FileNotFoundError:
                continue
            except OSError as error:
                raise Permanent(
                    f"{self._database.place} is damaged and cannot be moved aside: {error}",
                    "let the user of this process change the folder, or move the file yourself",
                ) from error
        return name


def schema_after(wanted: Sequence[Migration]) -> Schema:
    """What an SQLite database has after these migrations."""
    with closing(sqlite3.connect(":memory:")) as model:
        for migration in wanted:
            model.executescript(migration.sql)
        return {(kind, name, col) for kind, name, col in model.execute(TABLES)}


def _named(schema: Schema) -> str:
    kind, name, col = min(schema, key=str)
    return f"{kind} {name}{f' ({col})' if col else ''} is"


# The tables of the state in PostgreSQL, after somebody emptied or dropped some of them.
#
# Invariant: nothing is made, changed or removed here but the record of migrations, and that only where all tables
# and columns are there.

COLUMNS = """
SELECT c.relname AS name, a.attname AS col
FROM pg_class AS c INNER JOIN pg_attribute AS a ON a.attrelid = c.oid
WHERE c.relkind = 'r' AND pg_table_is_visible(c.oid) AND a.attnum > 0 AND NOT a.attisdropped
"""


class StateTables:
    """See `app.db.migrations.Rebuilt`. Tables that are gone while others are there are a person's to bring back."""

    def __init__(self, database: Database, folder: Path) -> None:
        self._database = database
        self._folder = folder

    def check(self, wanted: Sequence[Migration]) -> None:
        """Record the migrations of tables that are all there without any record: to make them again would fail.

        Raises Damaged when a table or a column is missing though its migration was applied.
        """
        with self._database.transaction() as session:
            session.rows("SELECT pg_advisory_xact_lock(:lock)", lock=LOCK)
            names = recorded(session, "postgres")
            there = {(row["name"], row["col"]) for row in session.rows(COLUMNS)}
            done = {each.name for each in wanted if each.name in names}
            # The tables and columns of both dialects are the same.
            model = [each for each in migrations(self._folder, "sqlite") if not done or each.name in done]
            missing = {(name, col) for kind, name, col in schema_after(model) if kind == "table"} - there
            if done and missing:
                table, col = min(missing, key=str)
                raise Damaged(
                    f"{self._database.place}: table {table} ({col}) is missing, though its migration was applied"
                )
            if not done and not missing:
                if not session.rows(TABLE_EXISTS["postgres"]):
                    session.run(CREATE_TABLE)
                session.run_many(RECORD, [{"name": each.name, "checksum": each.checksum} for each in wanted])

    def move_aside(self, error: Damaged, look: Callable[[], None]) -> None:  # noqa: ARG002 - the port's
        """Nothing is moved. Raises Damaged unless `look` finds everything in order by now."""
        look()

    def made(self) -> None:
        """Nothing to do."""


# The state of the product in one database: checkpoints, leases, runs, layouts, pauses, open alerts, pulls,
# summaries.
#
# Invariant: nothing is connected or migrated before the first use, so the daemon starts while PostgreSQL is away.

FILE = "state.db"
VARIABLES = "CHECKPOINT_DATABASE_URL or CHECKPOINT_DB_HOST, _PORT, _NAME, _USER, _PASSWORD"


@dataclass(frozen=True, slots=True)
class State:
    """Everything that the product remembers, on one database."""

    database: Migrated
    file: StateFile | None
    checkpoints: SqlCheckpoints
    leases: SqlLeases
    runs: SqlRuns
    layouts: SqlLayouts
    summaries: SqlSummaries
    pauses: SqlPauses
    pulls: SqlPulls
    alerts: SqlAlerts
    clocks: SqlClocks
    clock: StateClock
    pages: SqlPages

    def ping(self) -> None:
        """One round trip. Raises Transient or Permanent when the database cannot be used."""
        with self.database.transaction(read_only=True) as session:
            session.rows("SELECT 1 AS found")

    def check(self) -> None:
        """As `ping`, and look at all that is stored. Transient when that was damaged: it was replaced."""
        with self.database.transaction(read_only=True) as session:
            session.check()

    def note(self) -> str:
        """What a person should know of the state though it can be used; "" for nothing."""
        notes = [self.file.note if self.file else "", self.clocks.note()]
        return "; ".join(filter(None, notes))

    def close(self) -> None:
        """Close all connections. Idempotent."""
        self.database.close()


def open_state(url: str, data_dir: Path) -> State:
    """The state at a database URL, or in SQLite under `data_dir` when it is empty. Raises Permanent for a bad URL."""
    folder = sql_directory() / "state"
    plain = open_database(url, variables=VARIABLES) if url else SqliteDatabase(data_dir / FILE)
    file = StateFile(plain) if isinstance(plain, SqliteDatabase) else None
    database = Migrated(plain, folder, file or StateTables(plain, folder))
    queries = load_queries(folder, database.dialect)
    clock = StateClock()
    return State(
        database=database,
        file=file,
        checkpoints=SqlCheckpoints(database, queries),
        leases=SqlLeases(database, queries, clock),
        runs=SqlRuns(database, queries),
        layouts=SqlLayouts(database, queries),
        summaries=SqlSummaries(database, queries),
        pauses=SqlPauses(database, queries),
        pulls=SqlPulls(database, queries),
        alerts=SqlAlerts(database, queries),
        clocks=SqlClocks(database, queries),
        clock=clock,
        pages=SqlPages(database, queries),
    )
