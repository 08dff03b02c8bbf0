"""Opening a database: migrations, which are SQL files applied once, in order, each in one transaction; and recovery
when the file or tables of the state are damaged.

Invariants: an applied migration is recorded in the same transaction, so it is applied whole or not at all; its file
must not change afterwards; two processes that start at once apply each migration once; a database migrated by a newer
version is not touched.
"""

import logging
import os
import re
import sqlite3
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from collections.abc import Set as AbstractSet
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from hashlib import sha256
from pathlib import Path

from app.core.errors import Permanent, Transient
from app.db.database import BROKEN_INSTALLATION, DIALECTS, DamagedDatabase, Database, Dialect, Session
from app.db.sqlite import SqliteDatabase, file_id, folder_lock

LOCK = 4_937_238_650_112  # arbitrary; must not clash with the advisory locks of other programs
CREATE_TABLE = """
CREATE TABLE headwater_migrations (name TEXT NOT NULL PRIMARY KEY, checksum TEXT NOT NULL)
"""
RECORD = "INSERT INTO headwater_migrations (name, checksum) VALUES (:name, :checksum)"
TABLE_EXISTS: dict[Dialect, str] = {
    "sqlite": "SELECT 1 AS found FROM sqlite_master WHERE type = 'table' AND name = 'headwater_migrations'",
    # Not to_regclass: a session may answer it from a cache that is older than its wait for the lock.
    "postgres": (
        "SELECT 1 AS found FROM pg_class WHERE relname = 'headwater_migrations' AND relkind = 'r'"
        " AND pg_table_is_visible(oid)"
    ),
}
# Another process may be migrating, and a migration may take longer than the usual statement timeout.
LOCK_POSTGRES = """
SELECT set_config('lock_timeout', '50s', true), set_config('statement_timeout', '0', true)
"""


@dataclass(frozen=True, slots=True)
class Migration:
    """One migration file. `name` is folder and file name without suffixes."""

    name: str
    sql: str

    @property
    def checksum(self) -> str:
        """SHA-256 of the text, hex."""
        return sha256(self.sql.encode()).hexdigest()


class MigratedDatabase:
    """A `Database` whose migrations are applied before its first transaction, so a daemon starts while it is
    unavailable.

    `folder` holds `migrations/0001_name.sql`, or one file per dialect such as `0001_name.postgres.sql`. Missing tables,
    as in a database that was emptied, are re-created before the next transaction if there is a `check`, which raises
    `DamagedDatabase` when the database is not as the recorded migrations left it. A damaged `file`, which has its own
    check, is replaced; any other database is refused. `before_first` raises when the database belongs to another
    program; it is called while no migration of the folder has been applied.
    """

    def __init__(
        self,
        database: Database,
        folder: Path,
        file: "StateFile | None" = None,
        *,
        check: Callable[[Sequence[Migration]], None] | None = None,
        before_first: Callable[[Session], None] | None = None,
    ) -> None:
        self.dialect, self.place = database.dialect, database.place
        self._database = database
        self._folder = folder
        self._file = file
        self._check = file.check if file else check
        self._before_first = before_first
        self._lock = threading.Lock()
        self._prepared = False

    @contextmanager
    def transaction(self, *, read_only: bool = False) -> Iterator[Session]:
        """See `Database.transaction`; the first one applies the migrations first."""
        if not self._prepared:
            self.prepare()
        try:
            with self._database.transaction(read_only=read_only) as session:
                yield session
        except DamagedDatabase as error:
            self._prepared = False
            if self._check is None:
                raise
            self.prepare(error)
            raise Transient(
                error.message, "no action needed: the state was checked and repaired, and the next attempt continues"
            ) from error

    def prepare(self, suspicion: DamagedDatabase | None = None) -> None:
        """Apply missing migrations. Idempotent; free after the first success.

        A damaged database is moved aside first. If damage is suspected, all stored data is checked.
        """
        if self._prepared:
            return
        with self._lock:
            if self._prepared:
                return
            wanted = migrations(self._folder, self.dialect)
            try:
                if suspicion and suspicion.file is not None:
                    raise suspicion
                self._migrate(wanted, thorough=suspicion is not None)
            except DamagedDatabase as error:
                if self._file is None:
                    raise
                self._file.move_aside(error, lambda: self._migrate(wanted, thorough=True))
                self._migrate(wanted, thorough=False)
                self._file.moved_at = None
            self._prepared = True

    def _migrate(self, wanted: Sequence[Migration], *, thorough: bool) -> None:
        if self._check is not None:
            self._check(wanted)
        apply(self._database, wanted, self._before_first)
        if thorough:
            with self._database.transaction(read_only=True) as session:
                session.check()

    def ping(self) -> None:
        """One round trip. Raises Transient or Permanent when the database cannot be used."""
        with self.transaction(read_only=True) as session:
            session.rows("SELECT 1 AS found")

    def close(self) -> None:
        """See `Database.close`."""
        self._database.close()


def migrations(folder: Path, dialect: Dialect) -> Sequence[Migration]:
    """The folder's migrations for a dialect, in order. Raises Permanent for a missing or duplicate one."""
    found: dict[str, Migration] = {}
    stems: set[str] = set()
    for path in sorted((folder / "migrations").glob("*.sql")):
        stem, _, variant = path.name.removesuffix(".sql").partition(".")
        stems.add(stem)
        if variant not in ("", *DIALECTS) or (stem in found and variant in ("", dialect)):
            raise Permanent(f"migration {path.name} has a wrong or duplicate name", BROKEN_INSTALLATION)
        if variant in ("", dialect):
            found[stem] = Migration(f"{folder.name}/{stem}", path.read_text(encoding="utf-8"))
    if missing := stems - found.keys():
        raise Permanent(f"{folder.name}: no {dialect} version of {', '.join(sorted(missing))}", BROKEN_INSTALLATION)
    return [found[stem] for stem in sorted(found)]


def apply(
    database: Database, wanted: Sequence[Migration], before_first: Callable[[Session], None] | None = None
) -> None:
    """Apply and record a folder's missing migrations, all or none: a single commit makes the first start fast. If none
    is applied yet, `before_first` is called.

    Raises Permanent when an applied migration has a different text, or is not among `wanted`.
    """
    with database.transaction() as session:
        lock(session, database.dialect)
        if not session.rows(TABLE_EXISTS[database.dialect]):
            session.run(CREATE_TABLE)
        folder = wanted[0].name.partition("/")[0]
        found = session.rows("SELECT name, checksum FROM headwater_migrations")
        checksums = {row["name"]: row["checksum"] for row in found}
        others = checksums.keys() - {each.name for each in wanted}
        newer = sorted(name for name in others if name.startswith(f"{folder}/"))
        if newer:  # an older version would misread or overwrite what the newer one wrote
            raise Permanent(
                f"{database.place}: a newer version of Headwater has migrated this database ({', '.join(newer)})",
                "start that version, or restore a backup from before the upgrade",
            )
        if before_first is not None and checksums.keys() == others:
            before_first(session)
        for migration in wanted:
            if migration.name not in checksums:
                session.script(migration.sql)
                session.run(RECORD, name=migration.name, checksum=migration.checksum)
            elif checksums[migration.name] != migration.checksum:
                raise Permanent(
                    f"{database.place}: migration {migration.name} was applied with different contents",
                    "use the version of Headwater that this database belongs to, or another database",
                )


def lock(session: Session, dialect: Dialect) -> None:
    """Let one process at a time in, until the transaction ends; SQLite allows only one writer anyway."""
    if dialect == "postgres":
        session.rows(LOCK_POSTGRES)
        session.rows("SELECT pg_advisory_xact_lock(:lock)", lock=LOCK)


def recorded(session: Session, dialect: Dialect) -> Collection[str]:
    """The names of the applied migrations, of all folders."""
    if not session.rows(TABLE_EXISTS[dialect]):
        return ()
    return [row["name"] for row in session.rows("SELECT name FROM headwater_migrations ORDER BY name")]


def open_database(
    url: str, *, variables: str, default: Path | None = None, connections: int = 12, read_only: bool = False
) -> Database:
    """The database of a URL: `sqlite:///path` (absolute with a fourth slash) or `postgresql://...`; without a URL the
    SQLite file `default`.

    `variables` names the settings to mention in hints; at most `connections` to PostgreSQL are open at once. Raises
    Permanent for any other URL, without quoting it, since it may contain a password. `read_only`: an SQLite file is
    neither created nor changed.
    """
    if default and not url:
        return SqliteDatabase(default)
    scheme, _, rest = url.partition("://")
    if scheme == "sqlite" and len(rest) > 1 and rest.startswith("/"):
        return SqliteDatabase(Path(rest[1:]), read_only=read_only)
    if scheme in ("postgresql", "postgres"):
        from app.db.postgres import PostgresDatabase  # import psycopg only when it is used

        return PostgresDatabase(url, variables=variables, connections=connections)
    raise Permanent(
        f"unknown scheme {scheme[:20] if rest else ''!r} of a database URL",
        f"set {variables} to postgresql://user:password@host:5432/name, or sqlite:///path",
    )


# The SQLite file of the state. The state is a cache, so a damaged file is moved aside and a new one is created.
#
# Invariants: nothing is deleted; a file is moved only while no process opens or moves it, and only if it is still the
# file that was found damaged; a file that is locked, not readable, or on a full disk is not damaged.

MARK = ".damaged-"
COMPANIONS = ("-wal", "-shm", "-journal")
AGAIN_SECONDS = 60.0
SQLITE_COLUMNS = """
SELECT thing.type, thing.name, col.name AS col
FROM sqlite_master AS thing LEFT JOIN pragma_table_info(thing.name) AS col
"""
log = logging.getLogger(__name__)

Schema = AbstractSet[tuple[str, str, str | None]]


class StateFile:
    """The file of a state in SQLite."""

    def __init__(self, database: SqliteDatabase) -> None:
        self._database = database
        self._path = Path(os.path.realpath(database.path))  # of a symbolic link, move the target, not the link
        self.moved_at: float | None = None
        """When it was moved aside, while the new one is not ready: monotonic seconds."""

    def check(self, wanted: Sequence[Migration]) -> None:
        """Raises `DamagedDatabase` when the tables do not match the recorded migrations. Read-only."""
        with self._database.transaction(read_only=True) as session:
            names = recorded(session, self._database.dialect)
            actual = {(row["type"], row["name"], row["col"]) for row in session.rows(SQLITE_COLUMNS)}
        done = [each for each in wanted if each.name in names]
        if len(done) < sum(name.partition("/")[0] == wanted[0].name.partition("/")[0] for name in names):
            return  # from a newer version: refused later and left alone
        before, after = schema_after(tuple(done)), schema_after(tuple(wanted))
        if missing := before - actual:
            raise self._damaged(f"{_named(missing)} missing, though its migration was applied")
        made = {each[:2] for each in after} - {each[:2] for each in before}
        if extra := {each for each in actual if each in after - before or each[:2] in made}:
            raise self._damaged(f"{_named(extra)} there already, though no applied migration makes it")

    def move_aside(self, error: DamagedDatabase, look: Callable[[], None]) -> None:
        """Move the file and its companions, unless another process has done so or `look` finds no fault.

        Raises `error` when a file created a minute ago is damaged again, and Permanent when it cannot be moved.
        """
        if self.moved_at is not None and time.monotonic() - self.moved_at < AGAIN_SECONDS:
            raise error
        seen = file_id(self._path)
        if error.file is None or error.file != seen:
            try:
                look()
            except DamagedDatabase as again:
                error = again
            else:
                return
        with folder_lock(self._path.parent, exclusive=True):
            if file_id(self._path) != seen:
                return  # another process has moved it
            name = self._move()
        self.moved_at = time.monotonic()
        log.error("%s; moved to %s and re-created: jobs go on from what the destinations hold", error.message, name)

    @property
    def note(self) -> str:
        """Which files were moved aside and still exist; "" for none."""
        moved = self._path.parent.glob(f"{self._path.name}{MARK}*")
        names = sorted({re.sub(f"({'|'.join(COMPANIONS)})$", "", path.name) for path in moved})
        if not names:
            return ""
        return f"a damaged state was moved to {', '.join(names)} and a new one made; delete it when nobody needs it"

    def _damaged(self, what: str) -> DamagedDatabase:
        return DamagedDatabase(f"{self._database.place}: {what}", file=file_id(self._path))

    def _move(self) -> str:
        stamp = f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}"
        names = (f"{self._path.name}{MARK}{stamp}{f'-{number}' if number else ''}" for number in range(1000))
        name = next(name for name in names if not list(self._path.parent.glob(f"{name}*")))
        # The database first: after a crash here, the remaining -wal file is noticed and moved later.
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


@cache
def schema_after(wanted: tuple[Migration, ...]) -> Schema:
    """The schema of an SQLite database after these migrations."""
    with closing(sqlite3.connect(":memory:")) as model:
        for migration in wanted:
            model.executescript(migration.sql)
        return frozenset(model.execute(SQLITE_COLUMNS))


def _named(schema: Schema) -> str:
    kind, name, col = min(schema, key=str)
    return f"{kind} {name}{f' ({col})' if col else ''} is"


# The tables of the state in PostgreSQL, after somebody emptied or dropped some of them.
#
# Invariant: only the record of migrations is changed here, and only if all tables and columns exist.

OTHER_PROGRAM_HINT = (
    "set CHECKPOINT_DB_NAME or CHECKPOINT_DATABASE_URL to an empty database, or give Headwater a schema of its own: "
    "ALTER ROLE ... SET search_path TO ..."
)
POSTGRES_COLUMNS = """
SELECT c.relname AS name, a.attname AS col
FROM pg_class AS c INNER JOIN pg_attribute AS a ON a.attrelid = c.oid
WHERE c.relkind = 'r' AND pg_table_is_visible(c.oid) AND a.attnum > 0 AND NOT a.attisdropped
"""


def check_state_tables(database: Database, folder: Path, wanted: Sequence[Migration]) -> None:
    """Record the migrations of tables that all exist without any record, since creating them again would fail.

    Raises `DamagedDatabase` when a table or a column is missing though its migration was applied: a person has to
    restore it.
    """
    with database.transaction() as session:
        lock(session, "postgres")
        names = recorded(session, "postgres")
        there = {(row["name"], row["col"]) for row in session.rows(POSTGRES_COLUMNS)}
        done = {each.name for each in wanted if each.name in names}
        # Tables and columns are the same in both dialects.
        model = schema_after(tuple(each for each in migrations(folder, "sqlite") if not done or each.name in done))
        tables = {(name, col) for kind, name, col in model if kind == "table"}
        missing = tables - there
        if done and missing:
            table, col = min(missing, key=str)
            raise DamagedDatabase(
                f"{database.place}: table {table} ({col}) is missing, though its migration was applied"
            )
        others = {name for name, _ in there} & {name for name, _ in tables}
        if missing and others:
            raise Permanent(f"{database.place}: another program created the table {min(others)}", OTHER_PROGRAM_HINT)
        if not done and not missing:
            if not session.rows(TABLE_EXISTS["postgres"]):
                session.run(CREATE_TABLE)
            session.run_many(RECORD, [{"name": each.name, "checksum": each.checksum} for each in wanted])
