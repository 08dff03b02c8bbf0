"""PostgreSQL as a `Database`: the store that several replicas share. The only module that uses psycopg.

Imported by `open_database` only when a PostgreSQL URL is set, so psycopg costs nothing elsewhere. Invariants: a message
never contains the URL or the password; no call waits forever, whatever the network and the server do.
"""

import re
import select
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import lru_cache
from typing import Any, TypeVar
from uuid import uuid4

import psycopg
from psycopg.abc import PQGen
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.rows import DictRow, dict_row, tuple_row

from app.core.errors import AppError, Permanent, Rejected, Transient
from app.core.network import CA_HINT, is_untrusted
from app.db.database import (
    NAME_TAKEN,
    Connections,
    DamagedDatabase,
    Dialect,
    DuplicateKey,
    Row,
    Session,
    bound,
    fetched_blocks,
)

T = TypeVar("T")

ANSWER_SECONDS = 60.0  # longer than the server's statement timeout, so that the server's error comes first
CONNECTION = {
    "connect_timeout": "5",
    "application_name": "headwater",
    # Notice a vanished peer within about 20 s; the system default is hours.
    "keepalives": "1",
    "keepalives_idle": "10",
    "keepalives_interval": "5",
    "keepalives_count": "2",
    "tcp_user_timeout": "20000",
}
# Overrides the URL, the environment, the role and the database: we always send UTF-8.
ENCODING = {"client_encoding": "UTF8"}
# Set by a statement and not by `options`, which connection poolers refuse. Some override defaults of the role or the
# database: with `extra_float_digits` below 1 floats come back rounded, psycopg reads only ISO dates, and under stricter
# isolation a transaction that waited for a lock does not see the changes made under it. The last one frees the locks of
# a process that was paused in mid-transaction before those who wait to take over its lease give up.
SESSION = """
SELECT
    current_setting('server_encoding') AS encoding,
    set_config('client_encoding', 'UTF8', false),
    set_config('extra_float_digits', '3', false),
    set_config('DateStyle', 'ISO, MDY', false),
    set_config('TimeZone', 'UTC', false),
    set_config('statement_timeout', '30s', false),
    set_config('lock_timeout', '15s', false),
    set_config('default_transaction_isolation', 'read committed', false),
    set_config('idle_in_transaction_session_timeout', '10s', false)
"""
# Text to leave alone (quoted text, comments, casts), a parameter, or a percent sign, which psycopg wants doubled.
TOKEN = re.compile(
    r"""(?P<kept>'(?:[^']|'')*'|"(?:[^"]|"")*"|--[^\n]*|/\*.*?\*/|(?P<tag>\$\w*\$).*?(?P=tag)|::)"""
    r"""|:(?P<name>[A-Za-z_]\w*)|%""",
    re.DOTALL,
)
REFUSED = re.compile(
    r"password authentication failed|no password supplied|does not exist|no pg_hba\.conf entry|permission denied"
    r"|authentication failed|not permitted to log in|certificate verify failed|does not support SSL"
    r"|conversion between UTF8 and \w+ is not supported",
)
SQLSTATE_PASSING = ("08", "25006", "25P", "40", "53", "55P03", "57", "58")
SQLSTATE_ACCESS = ("28", "3D", "42501")
SQLSTATE_VALUE = "22"
SQLSTATE_GONE = ("42P01", "42703")  # a table or a column
SQLSTATE_KEY = "23505"
SQLSTATE_TAKEN = ("42P07", "42710")  # a relation or a type of this name exists; only migrations create any
SQLSTATE_NO_EQUIVALENT = "22P05"
# This encoding stores bytes without a character set, so each client reads them as different text.
NO_TEXT = "SQL_ASCII"
ENCODING_HINT = "move to a database made with CREATE DATABASE ... TEMPLATE template0 ENCODING 'UTF8'"


class BoundedConnection(psycopg.Connection[DictRow]):
    """A connection with a read timeout: a frozen server keeps its sockets open and would block us forever."""

    answer_seconds = ANSWER_SECONDS

    def wait(self, gen: PQGen[T], interval: float = 0.1, timeout: float | None = None) -> T:
        """See psycopg; without a timeout from the caller, ours applies."""
        return super().wait(gen, interval, timeout or self.answer_seconds)


class PostgresSession(Session):
    """See `Session`."""

    def __init__(self, connection: BoundedConnection, errors: "PsycopgErrors") -> None:
        self._connection = connection
        self._errors = errors

    def rows(self, sql: str, **params: Any) -> list[Row]:
        """See `Session.rows`."""
        with self._errors.translated():
            return self._connection.execute(_pyformat(sql), bound(params)).fetchall()

    def run(self, sql: str, **params: Any) -> int:
        """See `Session.run`."""
        with self._errors.translated():
            return self._connection.execute(_pyformat(sql), bound(params)).rowcount

    def run_many(self, sql: str, many: Iterable[Mapping[str, Any]]) -> int:
        """See `Session.run_many`. One by one: `executemany` uses a pipeline, and the server does not count a process
        paused inside a pipeline as an idle session, so its locks would stay for as long as it is paused.
        """
        with self._errors.translated():
            return sum(self._connection.execute(_pyformat(sql), bound(params)).rowcount for params in many)

    def run_rows(self, sql: str, rows: Iterable[Sequence[Any]]) -> int:
        """See `Session.run_rows`."""
        with self._errors.translated(), self._connection.cursor() as cursor:
            cursor.executemany(_pyformat(sql).replace(b"?", b"%s"), rows)
            return cursor.rowcount

    def append(self, table: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> int:
        """See `Session.append`: uses COPY."""
        with self._errors.translated(), self._connection.cursor() as cursor:
            with cursor.copy(f"COPY {table} ({', '.join(columns)}) FROM STDIN".encode()) as copy:
                for row in rows:
                    copy.write_row(row)
            return cursor.rowcount

    def blocks(self, sql: str, **params: Any) -> Iterator[Sequence[Sequence[Any]]]:
        """See `Session.blocks`: uses a server-side cursor, so the server holds the rows not yet fetched."""
        with (
            self._errors.translated(),
            self._connection.cursor(f"stream_{uuid4().hex}", row_factory=tuple_row) as cursor,
        ):
            cursor.execute(_pyformat(sql), bound(params))
            yield from fetched_blocks(cursor.fetchmany)

    def script(self, sql: str) -> None:
        """See `Session.script`."""
        with self._errors.translated():
            self._connection.execute(sql.encode())

    def check(self) -> None:
        """See `Session.check`: the server checks its own storage."""


class PostgresDatabase:
    """See `Database`. Raises Permanent for an invalid URL.

    Every connection refuses a database with encoding SQL_ASCII, since its text has no defined meaning. At most
    `connections` are open at once.
    """

    dialect: Dialect = "postgres"

    def __init__(
        self, url: str, *, variables: str, answer_seconds: float = ANSWER_SECONDS, connections: int = 12
    ) -> None:
        self._answer_seconds = answer_seconds
        self._conninfo = conninfo_of(url, variables)
        self._errors = errors_of(url, variables)
        self.place = self._errors.place
        self._connections = Connections(
            self.place, self._connect, _disconnect, alive=_alive, rolled_back=_rolled_back, limit=connections
        )

    @contextmanager
    def transaction(self, *, read_only: bool = False) -> Iterator[PostgresSession]:
        """See `Database.transaction`."""
        with self._connections.lent() as connection:
            connection.read_only = read_only
            connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ if read_only else None
            yield PostgresSession(connection, self._errors)
            with self._errors.translated():
                connection.commit()

    def close(self) -> None:
        """See `Database.close`."""
        self._connections.close()

    def _connect(self) -> BoundedConnection:
        with self._errors.translated():
            # Never prepare on the server: behind a pooler the next statement may run in another server session.
            connection = BoundedConnection.connect(self._conninfo, prepare_threshold=None, row_factory=dict_row)
            with ExitStack() as undo:
                undo.callback(connection.close)
                connection.answer_seconds = self._answer_seconds
                (found,) = connection.execute(SESSION).fetchall()
                if found["encoding"] == NO_TEXT:
                    raise Permanent(f"{self.place}: its encoding {NO_TEXT} cannot hold text", ENCODING_HINT)
                connection.commit()
                undo.pop_all()
            return connection


def conninfo_of(url: str, variables: str) -> str:
    """The connection string for a library that opens its own connections. Raises Permanent as `PostgresDatabase`."""
    return make_conninfo("", **{**CONNECTION, **_given(url, variables), **ENCODING})


def errors_of(url: str, variables: str) -> "PsycopgErrors":
    """The error translation for such a library."""
    return PsycopgErrors(_place(_given(url, variables)), variables)


def _given(url: str, variables: str) -> Mapping[str, Any]:
    try:
        return conninfo_to_dict(url)
    except psycopg.Error:
        # No cause: its text repeats parts of the URL.
        raise Permanent(
            "the PostgreSQL URL cannot be read", f"check {variables}; special characters in it are %-encoded"
        ) from None


class PsycopgErrors:
    """The one place where psycopg's errors become ours."""

    def __init__(self, place: str, variables: str) -> None:
        self.place = place
        self._variables = variables

    @contextmanager
    def translated(self) -> Iterator[None]:
        """Raises Transient, Permanent or Rejected from a psycopg error."""
        try:
            yield
        except psycopg.Error as error:
            raise self._error(error) from error

    def _error(self, error: psycopg.Error) -> AppError:
        state = error.sqlstate or ""
        # The primary message, without the values that PostgreSQL adds in its detail lines.
        text = error.diag.message_primary or str(error).strip() or type(error).__name__
        message = f"{self.place}: {text.splitlines()[0]}"
        if state.startswith(SQLSTATE_VALUE) or (not state and isinstance(error, psycopg.DataError)):
            hint = "correct the value: it is outside the range of the column"
            return Rejected(message, ENCODING_HINT if state == SQLSTATE_NO_EQUIVALENT else hint)
        # A refused connection has no SQLSTATE, only the server's text.
        is_refused = not state and isinstance(error, psycopg.OperationalError) and REFUSED.search(str(error))
        if state.startswith(SQLSTATE_ACCESS) or is_refused:
            hint = f"check {self._variables}: user, password, database and its privileges"
            return Permanent(message, CA_HINT if is_untrusted(error) else hint)
        if state.startswith(SQLSTATE_PASSING):
            return Transient(
                message, "no action needed if this is temporary; otherwise look at the server's log and load"
            )
        if not state and isinstance(error, psycopg.OperationalError | psycopg.InterfaceError):
            return Transient(message, f"check that the server runs and that {self._variables} points to it")
        if state in SQLSTATE_GONE:
            return DamagedDatabase(message)
        kind = DuplicateKey if state == SQLSTATE_KEY else Permanent
        return kind(message, NAME_TAKEN if state in SQLSTATE_TAKEN else "bug in Headwater; please report it")


def _place(given: Mapping[str, Any]) -> str:
    host = given.get("host") or given.get("hostaddr") or "localhost"
    name = given.get("dbname") or given.get("user") or ""
    return f"PostgreSQL at {host}:{given.get('port') or 5432}/{name}"


@lru_cache(maxsize=512)
def _pyformat(sql: str) -> bytes:
    """`:name` as psycopg's `%(name)s`; quoted text, comments and `::` casts stay. Slices such as [1:n] are not
    supported.
    """

    def replaced(token: re.Match[str]) -> str:
        if token["name"]:
            return f"%({token['name']})s"
        return token[0].replace("%", "%%")

    return TOKEN.sub(replaced, sql).encode()


def _alive(connection: BoundedConnection) -> bool:
    """False when an idle connection has data or was closed: the server only does that to end it."""
    if connection.closed:
        return False
    idle: select.poll = select.poll()
    idle.register(connection.fileno(), select.POLLIN)
    events: Sequence[tuple[int, int]] = idle.poll(0)
    return not events


def _rolled_back(connection: BoundedConnection) -> bool:
    """Roll back; False when the connection is lost or still waits for an answer."""
    try:
        if connection.info.transaction_status is psycopg.pq.TransactionStatus.ACTIVE:
            connection.close()
        connection.rollback()
    except psycopg.Error:
        return False
    return True


def _disconnect(connection: BoundedConnection) -> None:
    with suppress(psycopg.Error):
        connection.close()
