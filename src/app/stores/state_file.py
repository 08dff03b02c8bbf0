"""The SQLite file of the state. The state is a cache, so a damaged file is moved aside and a new one is made.

Invariants: nothing is deleted; a file is moved only while no process opens or moves it, and only when it is still the
file that was found damaged; a file that is locked, may not be read, or has no space left is not damaged.
"""

import logging
import os
import re
import sqlite3
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

from app.core.errors import Permanent
from app.stores.migrations import Migration, recorded
from app.stores.sql import Damaged
from app.stores.sqlite import SqliteDatabase, file_id, folder_lock

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
    """See `app.stores.migrations.Rebuilt`."""

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
