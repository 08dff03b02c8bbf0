"""One interface over SQLite and PostgreSQL, the named queries that run on it, and the conversion of values.

Invariants: queries use `:name` parameters for both dialects; timestamps are passed and returned as aware UTC datetimes,
and their text form in SQLite has a fixed width, so it sorts by time; text is limited to what every database can store;
driver exceptions never leave this module, only Transient, Permanent and Rejected.
"""

import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import UTC, datetime
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any, Generic, Literal, Protocol, TypeVar

from app.core.errors import Permanent, Rejected, Transient

UNSTORABLE = re.compile(r"[\x00\ud800-\udfff]")
INSTANT_SUFFIX = "_at"
END_OF_LETTERS = 0x1F000  # no letter with two cases lies beyond


def bound(params: Mapping[str, Any], *, as_text: bool = False) -> dict[str, Any]:
    """The parameters with timestamps in UTC, `as_text` in SQLite's form. Raises Rejected for text with a NUL or a lone
    surrogate, which PostgreSQL refuses and SQLite would store: both dialects accept the same values. Raises ValueError
    for a naive datetime.
    """
    checked = dict(params)
    for name, value in params.items():
        if isinstance(value, str):
            if UNSTORABLE.search(value):
                shown = f"{name} {value[:60]!r}"
                raise Rejected(
                    f"{shown} holds a NUL or a lone surrogate", "correct the value: no database stores such text"
                )
        elif isinstance(value, datetime):
            if value.tzinfo is None:
                raise ValueError(f"{name} must be an aware datetime, not {value}")
            instant = value if value.tzinfo is UTC else value.astimezone(UTC)
            checked[name] = instant_text(instant) if as_text else instant
    return checked


def storable(text: str) -> str:
    r"""Text for a message column: characters that no database stores are escaped as `\x00`, `\ud800`."""
    return UNSTORABLE.sub(lambda found: ascii(found[0])[1:-1], text)


@cache
def lower_cases() -> Mapping[int, str]:
    """Code point -> lower case, of each letter that has one in one character of the same kind: not of the Kelvin sign,
    whose lower case is the ASCII letter.
    """
    letters = ((letter, letter.lower()) for letter in map(chr, range(END_OF_LETTERS)))
    return {
        ord(letter): lower
        for letter, lower in letters
        if lower != letter and len(lower) == 1 and letter.isascii() == lower.isascii()
    }


def lower_text(text: str) -> str:
    """Text in lower case, letter by letter. In `str.lower` the last sigma of a word has a form of its own, so that a
    part of a word would not be found in it.
    """
    return text.lower() if text.isascii() else text.translate(lower_cases())


def instant_text(instant: datetime) -> str:
    """A UTC timestamp as `YYYY-MM-DDTHH:MM:SS.ffffffZ`."""
    return instant.isoformat(timespec="microseconds").removesuffix("+00:00") + "Z"


Dialect = Literal["sqlite", "postgres"]
Row = dict[str, Any]

NAMED = re.compile(r"^-- name: *(?P<name>\w+)(?: *\((?P<dialect>\w+)\))? *$", re.MULTILINE)
DIALECTS: tuple[Dialect, ...] = ("sqlite", "postgres")
NAME_TAKEN = "another program made something of this name: use an empty database, or in PostgreSQL a schema of your own"
FIRST_ROWS, SAMPLED_ROWS, BLOCK_ROWS = 16, 16, 1000
BLOCK_BYTES = 1 << 22
BROKEN_INSTALLATION = "reinstall Headwater: the installation is damaged or a query is missing"


class DamagedDatabase(Permanent):
    """The database does not hold what was written to it.

    `file` identifies the file in which that is certain; None if a new check has to confirm it.
    """

    def __init__(self, message: str, *, file: object = None) -> None:
        super().__init__(message, "restore it from a backup, or move it away to start with an empty one")
        self.file = file


class DuplicateKey(Permanent):
    """A row with this key exists already."""


class Session(Protocol):
    """One open transaction. Used by the thread that opened it, until its block ends.

    Raises Transient (connection lost, server unavailable, timeout, deadlock), Permanent (access), `DamagedDatabase`
    (tables or their content are gone) and Rejected (a value that cannot be stored, such as text with a NUL).
    """

    def rows(self, sql: str, **params: Any) -> list[Row]:
        """All rows, by column name. A column named `*_at` is a timestamp; use AS to name other columns so."""

    def run(self, sql: str, **params: Any) -> int:
        """The number of rows changed."""

    def run_many(self, sql: str, many: Iterable[Mapping[str, Any]]) -> int:
        """Run the statement once per set of parameters; returns the number of rows changed."""

    def run_rows(self, sql: str, rows: Iterable[Sequence[Any]]) -> int:
        """Run the statement once per row, with the row's values for its `?`, unconverted; in bounded memory. See
        `append`.

        Returns the number of rows changed.
        """

    def append(self, table: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> int:
        """Insert rows by the fastest means of the database, in bounded memory; returns how many there were.

        Values are None, bool, int, float and str, each in the form that the column accepts; timestamps are text.
        `table` and `columns` are trusted names, not user input.
        """

    def append_new(self, table: str, columns: Sequence[str], blocks: Iterable[Sequence[Sequence[Any]]]) -> int | None:
        """As `append`, for blocks of rows by column. If a key already exists, returns None and stores nothing; the
        transaction continues as if this had not been called.
        """
        rows = chain.from_iterable(zip(*block, strict=True) for block in blocks)
        self.run("SAVEPOINT appending")
        try:
            count = self.append(table, columns, rows)
        except DuplicateKey:
            self.run("ROLLBACK TO SAVEPOINT appending")
            count = None
        self.run("RELEASE SAVEPOINT appending")
        return count

    def stream(self, sql: str, **params: Any) -> Iterator[Sequence[Any]]:
        """Rows as tuples of raw database values, timestamps unconverted, in bounded memory."""
        return chain.from_iterable(self.blocks(sql, **params))

    def blocks(self, sql: str, **params: Any) -> Iterator[Sequence[Sequence[Any]]]:
        """As `stream`, but several rows at a time, since each generator step costs as much as a value; see
        `fetched_blocks`.
        """

    def script(self, sql: str) -> None:
        """Run several statements without parameters inside this transaction."""

    def check(self) -> None:
        """Check all stored data, if that is our job and not the server's. Raises `DamagedDatabase`."""


def fetched_blocks(fetch: Callable[[int], Sequence[Sequence[Any]]]) -> Iterator[Sequence[Sequence[Any]]]:
    """The rows that `fetch(count)` returns, fewer than `count` at the end. A block has at most BLOCK_ROWS rows and,
    judging by a sample of the block before, at most BLOCK_BYTES of text: JSON columns may have megabytes in each row.
    """
    count = FIRST_ROWS
    while rows := fetch(count):
        yield rows
        if len(rows) < count:
            return
        sample = rows[:: len(rows) // SAMPLED_ROWS + 1]
        sampled_bytes = sum(len(value) for row in sample for value in row if isinstance(value, str | bytes))
        count = max(1, min(BLOCK_ROWS, BLOCK_BYTES * len(sample) // max(sampled_bytes, 1)))


class Database(Protocol):
    """A database shared by many threads. Creating it does not connect; the first transaction does."""

    @property
    def dialect(self) -> Dialect:
        """Which versions of the named queries to use."""

    @property
    def place(self) -> str:
        """Its location, for messages. Never contains a password."""

    def transaction(self, *, read_only: bool = False) -> AbstractContextManager[Session]:
        """Commits when the block ends, rolls back when it raises. Do not nest. A lost connection is replaced next time.
        A `read_only` transaction reads one consistent snapshot.

        Transient raised by the commit itself means that it may or may not have happened: repeat what is idempotent.
        """

    def close(self) -> None:
        """Close all connections; an open transaction keeps its own until it ends. Idempotent."""


def sql_directory() -> Path:
    """The directory of migrations and queries: inside the installed package, otherwise at the root of the checkout."""
    package = Path(__file__).resolve().parent.parent
    installed = package / "sql"
    return installed if installed.is_dir() else package.parent.parent / "sql"


def load_queries(folder: Path, dialect: Dialect) -> Mapping[str, str]:
    """Name -> SQL of every `-- name: x` section in the folder's files, without the comments that describe it;
    `-- name: x (postgres)` is for one dialect only.

    Raises Permanent when a query is missing for this dialect, duplicate, empty, or has an unknown dialect.
    """
    queries: dict[str, str] = {}
    names: set[str] = set()
    for path in sorted(folder.glob("*.sql")):
        _, *parts = NAMED.split(path.read_text(encoding="utf-8"))
        for name, variant, text in zip(parts[::3], parts[1::3], parts[2::3], strict=True):
            lines = (line for line in text.splitlines() if not line.lstrip().startswith("--"))
            sql = "\n".join(lines).strip().removesuffix(";")
            if not sql or variant not in (None, *DIALECTS):
                raise Permanent(f"{path.name}: query {name} is empty or for no known dialect", BROKEN_INSTALLATION)
            names.add(name)
            if variant not in (None, dialect):
                continue
            if name in queries:
                raise Permanent(f"{path.name}: query {name} is defined twice for {dialect}", BROKEN_INSTALLATION)
            queries[name] = sql
    if missing := names - queries.keys():
        raise Permanent(f"{folder.name}: no {dialect} version of {', '.join(sorted(missing))}", BROKEN_INSTALLATION)
    if not names:
        raise Permanent(f"no SQL queries found at {folder}", BROKEN_INSTALLATION)
    return queries


class NamedQueries(dict[str, str]):
    """The named queries of a folder for one database: SQL by name, for callers with a session. Each method call is one
    transaction; raises what `Session` raises.
    """

    def __init__(self, database: Database, folder: Path) -> None:
        super().__init__(load_queries(folder, database.dialect))
        self.database = database

    def rows(self, query: str, /, **params: Any) -> list[Row]:
        """The rows that the query returns."""
        with self.database.transaction(read_only=True) as session:
            return session.rows(self[query], **params)

    def run(self, query: str, /, **params: Any) -> int:
        """The number of rows that the statement changed."""
        with self.database.transaction() as session:
            return session.run(self[query], **params)


class Repository:
    """The base of what is kept in one database: its methods use the named queries. They raise what `Session` raises."""

    def __init__(self, queries: NamedQueries) -> None:
        self._queries = queries

    @contextmanager
    def _reading(self) -> Iterator[tuple[Session, datetime]]:
        """A read-only transaction, and the database's clock in it."""
        with self._queries.database.transaction(read_only=True) as session:
            yield session, now_of(session, self._queries)


def now_of(session: Session, queries: NamedQueries) -> datetime:
    """The current time by the session's database."""
    now: datetime = session.rows(queries["now"])[0]["now_at"]
    return now


# A bounded pool of connections that threads borrow one at a time.
#
# Invariants: a connection is either borrowed by one thread or idle; a failed one is closed, never returned to the pool;
# when one turns out to be lost, all idle ones are dropped too, so that an outage causes one error and not one per
# connection.

C = TypeVar("C")


class Connections(Generic[C]):
    """`connect` opens a connection, `disconnect` closes one without raising, `alive` is a cheap check of an idle one,
    `rolled_back` rolls back a failed transaction and returns whether that worked.
    """

    def __init__(
        self,
        place: str,
        connect: Callable[[], C],
        disconnect: Callable[[C], None],
        *,
        alive: Callable[[C], bool] = lambda _: True,
        rolled_back: Callable[[C], bool] = lambda _: True,
        limit: int = 12,
    ) -> None:
        self._place = place
        self._connect, self._disconnect, self._alive, self._rolled_back = connect, disconnect, alive, rolled_back
        self._idle: list[C] = []
        self._lock = threading.Lock()
        self._places = threading.BoundedSemaphore(limit)
        self._limit = limit
        self._closed = False

    @contextmanager
    def lent(self, timeout_seconds: float = 10.0) -> Iterator[C]:
        """Lend an idle connection or a new one for a block. When the block raises, the transaction is rolled back; if
        that fails, this connection and all idle ones are closed.

        Raises Transient when all are busy for too long, and what `connect` raises.
        """
        if not self._places.acquire(timeout=timeout_seconds):
            raise Transient(
                f"{self._place}: all {self._limit} connections were busy for {timeout_seconds:g} s",
                "look for slow statements or a slow disk; it is retried",
            )
        try:
            connection = self._idle_one() or self._connect()
            is_in_order = False
            try:
                yield connection
                is_in_order = True
            finally:
                is_in_order = is_in_order or self._rolled_back(connection)
                with self._lock:
                    self._idle.append(connection)
                    if is_in_order and not self._closed:
                        gone = []
                    else:
                        gone, self._idle = self._idle, []
                for each in gone:
                    self._disconnect(each)
        finally:
            self._places.release()

    def _idle_one(self) -> C | None:
        while True:
            with self._lock:
                if self._closed:
                    raise Permanent(f"{self._place}: used after it was closed", "start the program again")
                if not self._idle:
                    return None
                connection = self._idle.pop()
            if self._alive(connection):
                return connection
            self._disconnect(connection)

    def close(self) -> None:
        """Close idle connections; borrowed ones are closed when they are returned."""
        with self._lock:
            self._closed = True
            gone, self._idle = self._idle, []
        for each in gone:
            self._disconnect(each)
