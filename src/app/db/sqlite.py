"""SQLite as a `Database`: the embedded store of one machine.

Invariants: write transactions take the write lock at the start, so none fails half-way because it cannot get it; after
a kill at any instruction, or a power cut, the database opens again with every committed transaction; a connection whose
file was replaced is not reused; its files are readable by their owner only.
"""

import os
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

from app.core.errors import AppError, Permanent, Rejected, Transient
from app.db.database import (
    INSTANT_SUFFIX,
    NAME_TAKEN,
    Connections,
    DamagedDatabase,
    Dialect,
    DuplicateKey,
    Row,
    Session,
    bound,
    fetched_blocks,
    lower_text,
)

BUSY_SECONDS = 10.0
BESIDE = ("-wal", "-shm", "-journal")
OWNER_ONLY, OTHERS = 0o600, 0o077
TAKEN = (sqlite3.SQLITE_CONSTRAINT_UNIQUE, sqlite3.SQLITE_CONSTRAINT_PRIMARYKEY)
PASSING = {
    sqlite3.SQLITE_BUSY: "another process holds the write lock: look for a second Headwater on this directory",
    sqlite3.SQLITE_LOCKED: "no action needed; it is retried",
    sqlite3.SQLITE_PROTOCOL: "no action needed; it is retried",
    sqlite3.SQLITE_INTERRUPT: "no action needed; it is retried",
    sqlite3.SQLITE_NOMEM: "give the process more memory",
    sqlite3.SQLITE_FULL: "free space on its disk",
    sqlite3.SQLITE_IOERR: "check its disk",
}
LASTING = {
    sqlite3.SQLITE_CANTOPEN: "let the user of this process create and write files in its directory",
    sqlite3.SQLITE_READONLY: "let the user of this process write the database file and its directory",
    sqlite3.SQLITE_PERM: "let the user of this process write the database file and its directory",
}
DAMAGED = (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT)
# Extended codes for a -wal file that was truncated under running processes. A failing disk gives others, such as
# IOERR_READ.
CUT = (sqlite3.SQLITE_IOERR, sqlite3.SQLITE_IOERR_SHORT_READ)
GONE = ("no such table", "no such column", "has no column named", "Could not decode to UTF-8")


class FileConnection(sqlite3.Connection):
    """A connection that knows which database file and -wal file it opened; other files may have replaced them since."""

    file: tuple[int, int] | None = None
    log: tuple[int, int] | None = None


class SqliteSession(Session):
    """See `Session`."""

    def __init__(self, connection: FileConnection, path: Path) -> None:
        self._connection = connection
        self._path = path

    def rows(self, sql: str, **params: Any) -> list[Row]:
        """See `Session.rows`."""
        with _translated(self._path):
            cursor = self._connection.execute(sql, bound(params, as_text=True))
            found = cursor.fetchall()
        names = [column[0] for column in cursor.description or ()]
        try:
            return [{name: _read(name, value) for name, value in zip(names, row, strict=True)} for row in found]
        except ValueError as error:
            raise DamagedDatabase(f"SQLite at {self._path}: {error}", file=self._connection.file) from error

    def run(self, sql: str, **params: Any) -> int:
        """See `Session.run`."""
        with _translated(self._path):
            return self._connection.execute(sql, bound(params, as_text=True)).rowcount

    def run_many(self, sql: str, many: Iterable[Mapping[str, Any]]) -> int:
        """See `Session.run_many`."""
        with _translated(self._path):
            return self._connection.executemany(sql, [bound(params, as_text=True) for params in many]).rowcount

    def run_rows(self, sql: str, rows: Iterable[Sequence[Any]]) -> int:
        """See `Session.run_rows`."""
        with _translated(self._path):
            return self._connection.executemany(sql, rows).rowcount

    def append(self, table: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> int:
        """See `Session.append`."""
        places = ", ".join("?" * len(columns))
        sql = f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({places})"  # noqa: S608 - names of the program's own
        return self.run_rows(sql, rows)

    def blocks(self, sql: str, **params: Any) -> Iterator[Sequence[Sequence[Any]]]:
        """See `Session.blocks`."""
        with _translated(self._path):
            yield from fetched_blocks(self._connection.execute(sql, bound(params, as_text=True)).fetchmany)

    def script(self, sql: str) -> None:
        """See `Session.script`. Not `executescript`, which first commits the open transaction."""
        statement = ""
        for line in (*sql.splitlines(keepends=True), "\n;"):
            statement += line
            if sqlite3.complete_statement(statement):
                if statement.strip(" \n;"):
                    self.run(statement)
                statement = ""

    def check(self) -> None:
        """See `Session.check`. Reads the whole file."""
        for row in self.rows("PRAGMA integrity_check(1)"):
            if (said := next(iter(row.values()))) != "ok":
                raise DamagedDatabase(f"SQLite at {self._path}: {said}")


class SqliteDatabase:
    """See `Database`. The file and its directory are created on first use; `read_only` creates and changes nothing."""

    dialect: Dialect = "sqlite"

    def __init__(self, path: Path, *, busy_seconds: float = BUSY_SECONDS, read_only: bool = False) -> None:
        self.path = path
        self.place = f"SQLite at {path}"
        self._busy_seconds = busy_seconds
        self._read_only = read_only
        self._connections = Connections(
            self.place, self._connect, sqlite3.Connection.close, alive=self._is_current, rolled_back=_rolled_back
        )

    @contextmanager
    def transaction(self, *, read_only: bool = False) -> Iterator[SqliteSession]:
        """See `Database.transaction`."""
        with self._connections.lent(self._busy_seconds) as connection:
            # IMMEDIATE: a lock requested only at the first write cannot be waited for once the snapshot is old.
            with _translated(self.path):
                connection.execute("BEGIN" if read_only else "BEGIN IMMEDIATE")
            yield SqliteSession(connection, self.path)
            with _translated(self.path):
                connection.execute("COMMIT")

    def close(self) -> None:
        """See `Database.close`."""
        self._connections.close()

    def _connect(self) -> FileConnection:
        if self._read_only:
            if not self.path.exists():
                raise Permanent(f"{self.place}: there is no such file", "correct the path in the URL")
            with _translated(self.path):
                return _opened(self.path, self._busy_seconds, read_only=True)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise Permanent(f"{self.place}: {error}", LASTING[sqlite3.SQLITE_CANTOPEN]) from error
        with folder_lock(self.path.parent), _translated(self.path):
            _refuse_lone_wal(self.path)
            return _opened(self.path, self._busy_seconds)

    def _is_current(self, connection: FileConnection) -> bool:
        """False when the file or its -wal was moved, deleted or replaced: nobody would see what is committed to it.
        Closing the last connection writes a deleted -wal into its database file.
        """
        log = None if connection.log is None else file_id(Path(f"{self.path}-wal"))
        return (connection.file, connection.log) == (file_id(self.path), log)


def _rolled_back(connection: FileConnection) -> bool:
    try:
        connection.rollback()
    except sqlite3.Error:
        return False
    return True


@contextmanager
def folder_lock(folder: Path, *, exclusive: bool = False) -> Iterator[None]:
    """Files in the folder are opened under the shared lock and moved under the exclusive one: if a database were moved
    while it is opened, two processes would hold different parts. The kernel releases the lock when a process dies.
    """
    import fcntl  # not on Windows, which an earlier check refuses with one line

    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise Permanent(f"{folder}: {error}", LASTING[sqlite3.SQLITE_CANTOPEN]) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH)
        yield
    finally:
        os.close(descriptor)


def file_id(path: Path) -> tuple[int, int] | None:
    """Device and inode, which tell a file from its replacement; None when it does not exist."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _refuse_lone_wal(path: Path) -> None:
    """Raises `DamagedDatabase` for a -wal file next to an empty or missing database: SQLite would take that for a new
    database and delete the -wal.
    """
    with suppress(OSError):
        if Path(f"{path}-wal").stat().st_size and not (path.exists() and path.stat().st_size):
            raise DamagedDatabase(f"SQLite at {path}: the file is empty or gone, while its -wal is there")


def _opened(path: Path, busy_seconds: float, *, read_only: bool = False) -> FileConnection:
    connection = sqlite3.connect(
        f"{path.resolve().as_uri()}?mode=ro" if read_only else path,
        uri=read_only,
        timeout=busy_seconds,
        isolation_level=None,
        check_same_thread=False,
        factory=FileConnection,
    )
    if read_only:
        connection.file = file_id(path)
        return connection
    with ExitStack() as undo:
        undo.callback(connection.close)
        connection.execute("PRAGMA schema_version")  # creates the file
        _keep_to_owner(path)
        _use_wal(connection, busy_seconds)
        # FULL: committed data survives a power cut. With less, state and warehouse could come back from different
        # points in time, and the state would vouch for rows that the warehouse has lost.
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA foreign_keys = ON")
        # SQLite's own lower() only handles ASCII.
        connection.create_function("lower_text", 1, lambda text: text and lower_text(text), deterministic=True)
        connection.create_function("sha256_hex", 1, lambda text: sha256(text.encode()).hexdigest(), deterministic=True)
        connection.file, connection.log = file_id(path), file_id(Path(f"{path}-wal"))
        undo.pop_all()
    return connection


def _keep_to_owner(path: Path) -> None:
    """Set mode 0600 on a file of ours and, if an earlier version made it, on SQLite's companion files; new ones inherit
    the mode. By name: opening and closing the file here would release the locks of other connections.
    """
    for name in (path, *(path.with_name(path.name + suffix) for suffix in BESIDE)):
        try:
            found = name.stat()
            if found.st_uid == os.geteuid() and found.st_mode & OTHERS:
                name.chmod(OWNER_ONLY)
        except FileNotFoundError:
            pass  # SQLite has no such file, or has just removed it


def _use_wal(connection: sqlite3.Connection, busy_seconds: float) -> None:
    """WAL lets readers continue during a write. Switching a new file to WAL fails at once while another process writes
    or switches (the busy timeout does not cover that), so the wait is done here.
    """
    deadline = time.monotonic() + busy_seconds
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.02)
        else:
            return


def _read(name: str, value: Any) -> Any:
    """Raises ValueError for text with a NUL: it was never stored, but zeroed disk sectors read as such."""
    if not isinstance(value, str):
        return value
    if "\0" in value:
        raise ValueError(f"the text in {name} holds a NUL")
    return datetime.fromisoformat(value) if name.endswith(INSTANT_SUFFIX) else value


@contextmanager
def _translated(path: Path) -> Iterator[None]:
    """The one place where SQLite's errors become ours."""
    try:
        yield
    except (sqlite3.Error, OverflowError) as error:
        raise _error(path, error) from error


def _error(path: Path, error: sqlite3.Error | OverflowError) -> AppError:
    message = f"SQLite at {path}: {error}"
    if isinstance(error, OverflowError | sqlite3.DataError):
        return Rejected(message, "correct the value: it is outside the range of the column")
    detailed = getattr(error, "sqlite_errorcode", None) or 0
    code = detailed & 0xFF  # the low byte; the others hold details
    if code in DAMAGED or detailed in CUT or any(sign in str(error) for sign in GONE):
        return DamagedDatabase(message)
    if code in PASSING:
        return Transient(message, PASSING[code])
    kind = DuplicateKey if detailed in TAKEN else Permanent
    unknown = NAME_TAKEN if " already " in str(error) else "bug in Headwater; please report it"
    return kind(message, LASTING.get(code, unknown))
