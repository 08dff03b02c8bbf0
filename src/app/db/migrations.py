"""Migrations: SQL files that are applied once, in order, each in one transaction.

Invariants: an applied migration is recorded in the same transaction, so it is applied whole or not at all; its file
must not change afterwards; two processes that start at once apply each migration once; a database that a newer version
has migrated is not touched.
"""

import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Protocol

from app.core.errors import Permanent, Transient
from app.db.database import BROKEN_INSTALLATION, DIALECTS, Damaged, Database, Dialect, Session

LOCK = 4_937_238_650_112  # any number that no other program uses for its advisory locks
CREATE_TABLE = """
CREATE TABLE headwater_migrations (name TEXT NOT NULL PRIMARY KEY, checksum TEXT NOT NULL)
"""
RECORD = "INSERT INTO headwater_migrations (name, checksum) VALUES (:name, :checksum)"
TABLE_EXISTS: dict[Dialect, str] = {
    "sqlite": "SELECT 1 AS found FROM sqlite_master WHERE type = 'table' AND name = 'headwater_migrations'",
    # Not by to_regclass, which a session may answer from what it knew before it waited for the lock.
    "postgres": (
        "SELECT 1 AS found FROM pg_class WHERE relname = 'headwater_migrations' AND relkind = 'r'"
        " AND pg_table_is_visible(oid)"
    ),
}
# Another process may be migrating for a while, and a migration may take longer than a statement is given otherwise.
LOCK_POSTGRES = """
SELECT set_config('lock_timeout', '50s', true), set_config('statement_timeout', '0', true)
"""


@dataclass(frozen=True, slots=True)
class Migration:
    """One file. `name` is folder and file name without suffixes."""

    name: str
    sql: str

    @property
    def checksum(self) -> str:
        """SHA-256 of the text, hex."""
        return sha256(self.sql.encode()).hexdigest()


class Rebuilt(Protocol):
    """A database that can be made anew when it is damaged, since what it holds can be found again."""

    def check(self, wanted: Sequence[Migration]) -> None:
        """Raises Damaged when it is not as the recorded migrations left it."""

    def move_aside(self, error: Damaged, look: Callable[[], None]) -> None:
        """Make place for a new one, unless `look`, which raises Damaged, no longer finds anything wrong."""

    def made(self) -> None:
        """The new one is in order."""


class Migrated:
    """A `Database` whose migrations are applied before its first transaction, so that a daemon starts while it is away.

    `folder` holds `migrations/0001_name.sql`, or one file per dialect such as `0001_name.postgres.sql`. Tables that are
    gone, as in a database that was emptied, are made again before the next transaction; what is damaged is replaced
    when it is `rebuilt`, and refused otherwise.
    """

    def __init__(self, database: Database, folder: Path, rebuilt: Rebuilt | None = None) -> None:
        self._database = database
        self._folder = folder
        self._rebuilt = rebuilt
        self._lock = threading.Lock()
        self._prepared = False

    @property
    def dialect(self) -> Dialect:
        """See `Database.dialect`."""
        return self._database.dialect

    @property
    def place(self) -> str:
        """See `Database.place`."""
        return self._database.place

    @contextmanager
    def transaction(self, *, read_only: bool = False) -> Iterator[Session]:
        """See `Database.transaction`; the first one applies the migrations before."""
        self.prepare()
        try:
            with self._database.transaction(read_only=read_only) as session:
                yield session
        except Damaged as error:
            self._prepared = False
            if self._rebuilt is None:
                raise
            self._prepare(error)
            raise Transient(error.message, "the state was looked at and mended: the next attempt goes on") from error

    def prepare(self) -> None:
        """Apply what is missing. Idempotent; after it succeeded once it costs nothing."""
        if not self._prepared:
            self._prepare(None)

    def _prepare(self, suspicion: Damaged | None) -> None:
        """Migrate, after a damaged database was moved aside. With a suspicion all that is stored is looked at."""
        with self._lock:
            if self._prepared:
                return
            wanted = migrations(self._folder, self.dialect)
            try:
                if suspicion and suspicion.file is not None:
                    raise suspicion
                self._migrate(wanted, thorough=suspicion is not None)
            except Damaged as error:
                if self._rebuilt is None:
                    raise
                self._rebuilt.move_aside(error, lambda: self._migrate(wanted, thorough=True))
                self._migrate(wanted, thorough=False)
                self._rebuilt.made()
            self._prepared = True

    def _migrate(self, wanted: Sequence[Migration], *, thorough: bool) -> None:
        if self._rebuilt is not None:
            self._rebuilt.check(wanted)
        for migration in wanted:
            apply(self._database, migration, {each.name for each in wanted})
        if thorough:
            with self._database.transaction(read_only=True) as session:
                session.check()

    def close(self) -> None:
        """See `Database.close`."""
        self._database.close()


def migrations(folder: Path, dialect: Dialect) -> Sequence[Migration]:
    """The folder's migrations for a dialect, in order. Raises Permanent when one is missing, or there twice."""
    found: dict[str, Migration] = {}
    stems: set[str] = set()
    for path in sorted((folder / "migrations").glob("*.sql")):
        stem, _, variant = path.name.removesuffix(".sql").partition(".")
        stems.add(stem)
        if variant not in ("", *DIALECTS) or (stem in found and variant in ("", dialect)):
            raise Permanent(f"migration {path.name} is named wrongly or there twice", BROKEN_INSTALLATION)
        if variant in ("", dialect):
            found[stem] = Migration(f"{folder.name}/{stem}", path.read_text(encoding="utf-8"))
    if missing := stems - found.keys():
        raise Permanent(f"{folder.name}: no {dialect} version of {', '.join(sorted(missing))}", BROKEN_INSTALLATION)
    return [found[stem] for stem in sorted(found)]


def apply(database: Database, migration: Migration, known: Collection[str]) -> None:
    """Apply and record one migration unless that was done. `known`: the names of all migrations of its folder.

    Raises Permanent when the applied one had another text, and when one was applied that is not known here.
    """
    with database.transaction() as session:
        if database.dialect == "postgres":
            session.rows(LOCK_POSTGRES)
            session.rows("SELECT pg_advisory_xact_lock(:lock)", lock=LOCK)
        if not session.rows(TABLE_EXISTS[database.dialect]):
            session.run(CREATE_TABLE)
        _refuse_newer(database.place, session, database.dialect, migration.name.partition("/")[0], known)
        done = session.rows("SELECT checksum FROM headwater_migrations WHERE name = :name", name=migration.name)
        if not done:
            session.script(migration.sql)
            session.run(RECORD, name=migration.name, checksum=migration.checksum)
        elif done[0]["checksum"] != migration.checksum:
            raise Permanent(
                f"{database.place}: migration {migration.name} was applied with another text",
                "this database belongs to another version of Headwater: use that version, or another database",
            )


def recorded(session: Session, dialect: Dialect) -> Collection[str]:
    """The names of the migrations that were applied, of all folders."""
    if not session.rows(TABLE_EXISTS[dialect]):
        return ()
    return [row["name"] for row in session.rows("SELECT name FROM headwater_migrations ORDER BY name")]


def _refuse_newer(place: str, session: Session, dialect: Dialect, folder: str, known: Collection[str]) -> None:
    """An older version would write what the newer one no longer understands, or read it wrongly."""
    names = recorded(session, dialect)
    newer = [name for name in names if name.startswith(f"{folder}/") and name not in known]
    if newer:
        raise Permanent(
            f"{place}: a newer version of Headwater has migrated this database ({', '.join(newer)})",
            "start that version, or restore a backup that was made before the upgrade",
        )
