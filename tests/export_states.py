"""What a person or a broken disk does to the state of Headwater, on either database, also while processes use it."""

import os
import random
import shutil
import sqlite3
import time
from collections.abc import Callable, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import psycopg

from postgres import PostgresServer

BESIDE = ("-wal", "-shm")
TABLES = "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite%'"
PG_TABLES = "SELECT tablename FROM pg_tables WHERE schemaname = 'public'"


class SavedState(Protocol):
    """A state. Each method says whether there was something to do it to."""

    @property
    def environ(self) -> Mapping[str, str]:
        """The settings that name it."""

    def save(self) -> bool:
        """Take a copy, in the place of an earlier one."""

    def set_back(self) -> bool:
        """Put the copy in its place."""

    def take_away(self) -> bool:
        """Leave nothing of it."""

    def damage(self, chance: random.Random) -> bool:
        """Cut it, or write over it."""

    def empty(self, chance: random.Random) -> bool:
        """Delete the rows of some tables, or of all."""


@dataclass
class SqliteState:
    """`state.db` in a folder, with what SQLite keeps beside it."""

    folder: Path
    backup: Path
    environ: Mapping[str, str] = field(default_factory=dict)

    @property
    def _file(self) -> Path:
        return self.folder / "state.db"

    def save(self) -> bool:
        if not self._file.exists():
            return False
        self.backup.unlink(missing_ok=True)
        with suppress(sqlite3.DatabaseError), closing(sqlite3.connect(self._file)) as source:
            with closing(sqlite3.connect(self.backup)) as target:
                source.backup(target)
            return True
        return False

    def set_back(self) -> bool:
        if not self.backup.exists():
            return False
        copy = self.folder / "copy"
        shutil.copy2(self.backup, copy)
        self._remove(BESIDE)
        copy.replace(self._file)
        return True

    def take_away(self) -> bool:
        was_there = self._file.exists()
        self._remove(("", *BESIDE))
        return was_there

    def damage(self, chance: random.Random) -> bool:
        """Of the file or of its log; the end is missing, or sectors hold something else."""
        path = Path(f"{self._file}{chance.choice(('', '', '-wal'))}")
        if not path.exists() or not (size := path.stat().st_size):
            return False
        if chance.random() < 0.5:
            os.truncate(path, chance.randrange(size))
            return True
        with path.open("r+b") as file:
            for _ in range(chance.choice((1, 3))):
                file.seek(chance.choice((0, chance.randrange(size))))
                file.write(chance.choice((bytes(512), chance.randbytes(512), chance.randbytes(8192))))
        return True

    def empty(self, chance: random.Random) -> bool:
        with suppress(sqlite3.DatabaseError), closing(sqlite3.connect(self._file, timeout=5)) as connection:
            tables = [name for (name,) in connection.execute(TABLES)]
            for table in _some(tables, chance):
                connection.execute(f'DELETE FROM "{table}"')  # noqa: S608 - a name that the database told
            connection.commit()
            return bool(tables)
        return False

    def _remove(self, suffixes: tuple[str, ...]) -> None:
        for suffix in suffixes:
            Path(f"{self._file}{suffix}").unlink(missing_ok=True)


@dataclass
class PostgresState:
    """A database of a server."""

    server: PostgresServer
    url: str
    saved: bool = False

    @property
    def environ(self) -> Mapping[str, str]:
        return {"CHECKPOINT_DATABASE_URL": self.url}

    @property
    def _name(self) -> str:
        return self.url.rpartition("/")[2]

    @property
    def _copy(self) -> str:
        return f"{self._name}_copy"

    def save(self) -> bool:
        self._replace(self._copy, self._name)
        self.saved = True
        return True

    def set_back(self) -> bool:
        if self.saved:
            self._replace(self._name, self._copy)
        return self.saved

    def take_away(self) -> bool:
        self._replace(self._name, "template0")
        return True

    def damage(self, chance: random.Random) -> bool:
        """The server goes down at once in the middle of everything; PostgreSQL mends its files itself."""
        del chance
        self.server.restart_immediately()
        return True

    def empty(self, chance: random.Random) -> bool:
        with psycopg.connect(self.url, autocommit=True) as connection:
            tables = [name for (name,) in connection.execute(PG_TABLES)]
            names = ", ".join(f'"{name}"' for name in _some(tables, chance))
            with suppress(psycopg.errors.DeadlockDetected):  # with a daemon at work, which PostgreSQL spared
                if names:
                    connection.execute(f"TRUNCATE {names} CASCADE".encode())
                    return True
        return False

    def _replace(self, name: str, template: str) -> None:
        """A copy of `template` in the place of `name`. Sessions of living processes are ended, as often as needed."""
        self.server.run_sql(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")
        if template != "template0":
            self.server.run_sql(f"ALTER DATABASE {template} ALLOW_CONNECTIONS false")
        try:
            _until_done(lambda: self._copied(name, template))
        finally:
            if template != "template0":
                self.server.run_sql(f"ALTER DATABASE {template} ALLOW_CONNECTIONS true")

    def _copied(self, name: str, template: str) -> None:
        sessions = f"pg_stat_activity WHERE datname = '{template}'"
        self.server.run_sql(f"SELECT pg_terminate_backend(pid) FROM {sessions}")  # noqa: S608 - a name of our own
        self.server.run_sql(f"CREATE DATABASE {name} TEMPLATE {template} STRATEGY file_copy")
        self.server.run_sql(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")


def _some(tables: list[str], chance: random.Random) -> list[str]:
    """All of them, or some."""
    return chance.choice((tables, chance.sample(tables, min(len(tables), chance.randint(1, 4)))))


def _until_done(act: Callable[[], None], tries: int = 50) -> None:
    """A session that was told to end needs a moment."""
    for left in reversed(range(tries)):
        try:
            act()
        except psycopg.errors.ObjectInUse:
            if not left:
                raise
            time.sleep(0.02)
        else:
            return
