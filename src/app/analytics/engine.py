"""DuckDB, locked down: one instance, a cursor per query, bounded memory and threads, a time limit on every query.

Invariants: after setup, no setting can change, nothing can be loaded or attached, and only the objects below the prefix
and this process's folder can be read; each query is a single SELECT over the rows of objects or its own CTEs; nothing
is downloaded, since the one extension comes in a package. DuckDB's exceptions are translated here: only errors that an
object may have caused become UnreadableObject, which costs a new listing and a second run; an invalid report or a full
disk fails at once.
"""

import errno
import json
import os
import re
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from app.core.errors import AppError, Permanent, Rejected, Transient
from app.core.network import proxy_for

RELATION = "telemetry"
TEXTS = ("device_id", "device_type", "location")
NUMBERS = ("voltage", "current", "power", "temperature", "soc", "power_factor")
INSTANT = "timestamp"
NANOS = "timestamp_nanos"
DOCUMENTED: Mapping[str, str] = {
    **dict.fromkeys(TEXTS, "VARCHAR"),
    **dict.fromkeys(NUMBERS, "DOUBLE"),
    INSTANT: "TIMESTAMP",
    NANOS: "SMALLINT",
}
"""The columns that every report has -> their types."""

PAD, PAD_WITH_INSTANT = "columns.parquet", "columns-with-instant.parquet"
SOURCES = frozenset({"range", "generate_series", "unnest", "repeat"})
FORBIDDEN = frozenset({"write_log", "parse_duckdb_log_message", "nextval", "currval"})
SPILL = "1GB"
BATCH_ROWS = 10_000
MESSAGE_CHARACTERS = 300
RETRY_HINT = "no action needed, it is retried; if this continues, check the named object"
FATAL = ("INTERNAL Error", "FATAL Error")
FULL = (errno.ENOSPC, errno.EDQUOT)
# Matched by text, since pyarrow passes on DuckDB's errors without their class.
WRONG = re.compile(
    r"(Binder|Catalog|Parser|Syntax|Permission|Not implemented|Conversion|Out of Range|Divide by Zero|Mismatch Type"
    r"|Invalid type|Invalid Input|Expression|Sequence|Parameter Not \w+) Error: "
)
# Errors about objects' bytes: they name an object, which ends in .parquet, or contain one of these words.
OF_OBJECTS = re.compile(
    r"parquet|csv (?:error|parser)|corrupt|unicode|string encoding|bitpacked|stats size", re.IGNORECASE
)


class UnreadableObject(Transient):
    """An object could not be read, or changed during the read: list again, then retry."""


class InvalidReport(Permanent):
    """The query fails although the objects are intact: the report is wrong."""


class ReportTooLarge(Permanent):
    """The query exceeded its memory or disk limit."""


class ReportTooSlow(Transient):
    """The query exceeded its time limit."""


class UnboundName(InvalidReport):
    """A name or a type does not match; the report is wrong, unless objects that changed since the listing cause it."""


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """Resource limits of queries."""

    memory_mb: int
    threads: int
    seconds: float


@dataclass(frozen=True, slots=True)
class RemoteBucket:
    """A bucket and its access keys. `whole`: fetch each object whole with one request; `table`: prefix of the table's
    files, "" if there is no table.
    """

    bucket: str
    prefix: str
    endpoint: str
    region: str
    path_style: bool
    tls: bool
    access_key_id: str
    secret_access_key: str = field(repr=False)
    session_token: str = field(default="", repr=False)
    whole: bool = True
    table: str = ""


class Engine:
    """One DuckDB instance. `folder` is private to this process; queries may read and spill there."""

    def __init__(self, folder: Path, limits: EngineLimits, remote: RemoteBucket | None = None) -> None:
        self.folder = folder
        self.limits = limits
        self.remote = remote
        self._lock = threading.Lock()
        self._connection: Any = None

    def close(self) -> None:
        """Release the memory. A later query reopens the instance."""
        with self._lock:
            connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def columns(self, sql: str, values: Mapping[str, Any]) -> Mapping[str, str]:
        """Name -> type of the columns that `sql` would return."""
        with self._cursor(self.limits.seconds) as cursor:
            return {row[0]: row[1] for row in cursor.execute(f"DESCRIBE {sql}", values or None).fetchall()}

    def rows(self, sql: str) -> list[tuple[Any, ...]]:
        """All rows of an internal query, in memory and without a time limit."""
        with self._cursor(None) as cursor:
            found: list[tuple[Any, ...]] = cursor.execute(sql).fetchall()
            return found

    @contextmanager
    def batches(self, sql: str, values: Mapping[str, Any], *, rows: str = "") -> Iterator[Any]:
        """A pyarrow RecordBatchReader over the result; the time limit applies until the block ends. `rows`: an internal
        query, which `sql` sees as the view RELATION.
        """
        with self._cursor(self.limits.seconds) as cursor:
            if rows:
                cursor.execute(f"CREATE TEMP VIEW {RELATION} AS {rows}")
            yield cursor.execute(sql, dict(values) or None).to_arrow_reader(BATCH_ROWS)

    def parsed(self, sql: str) -> Any:
        """The output of DuckDB's parser for `sql`: `{"error", "error_message", "statements"}`.

        Raises Rejected when `sql` nests too deeply to be inspected.
        """
        with self._cursor(self.limits.seconds) as cursor:
            text = cursor.execute("SELECT json_serialize_sql($1)", [sql]).fetchone()[0]
        try:
            return json.loads(text)
        except RecursionError:
            raise Rejected("the statement nests too deeply", "use fewer levels of expressions") from None

    def check(self, sql: str) -> set[str]:
        """Parameter names of `sql`. Raises Rejected for anything but one SELECT over RELATION."""
        hint = "write one SELECT FROM read_parquet({{S3_PATH}})"
        nodes = checked(self.parsed(sql), SOURCES, _refused_in, "allowed in reports", hint)
        return {str(node["identifier"]) for node in nodes if node.get("type") == "VALUE_PARAMETER"}

    @contextmanager
    def _cursor(self, seconds: float | None) -> Iterator[Any]:
        with self._lock:
            if self._connection is None:
                self._connection = _opened(self.folder, self.limits, self.remote)
            connection = self._connection
        try:
            with translate_duckdb_errors(seconds), connection.cursor() as cursor:
                if seconds is None:
                    yield cursor
                    return
                timer = threading.Timer(seconds, cursor.interrupt)
                timer.daemon = True
                timer.start()
                try:
                    yield cursor
                finally:
                    timer.cancel()
        except UnreadableObject as error:
            if error.message.startswith(FATAL):  # it refuses every later query, of other objects too
                with self._lock:
                    self._connection = None if self._connection is connection else self._connection
            raise


def _opened(folder: Path, limits: EngineLimits, remote: RemoteBucket | None) -> Any:
    import duckdb

    spill = folder / "spill"
    spill.mkdir(parents=True, exist_ok=True)
    known: dict[str, Any] = {"autoinstall_known_extensions": False, "autoload_known_extensions": False}
    connection = duckdb.connect(":memory:", config=known)
    settings = {
        "TimeZone": "UTC",
        "python_enable_replacements": False,
        "allow_community_extensions": False,
        "allow_persistent_secrets": False,
        "threads": limits.threads,
        "memory_limit": f"{limits.memory_mb}MB",
        "temp_directory": str(spill),
        "max_temp_directory_size": SPILL,
        "enable_external_file_cache": False,  # it may hold an outdated version of an object
    }
    _set(connection, settings)
    allowed = [f"{folder}/"]
    if remote is not None:
        allowed += _open_remote(connection, remote)
    # Files without rows but with every documented column. One is part of every read, so a column that no object has is
    # null instead of an error, and a read without objects gives an empty table.
    for name, left_out in ((PAD, INSTANT), (PAD_WITH_INSTANT, "")):
        columns = ", ".join(f'CAST(NULL AS {kind}) AS "{own}"' for own, kind in DOCUMENTED.items() if own != left_out)
        connection.execute(f"COPY (SELECT {columns} LIMIT 0) TO {literal(str(folder / name))} (FORMAT parquet)")
    _set(connection, {"allowed_directories": allowed, "enable_external_access": False, "lock_configuration": True})
    return connection


def _set(connection: Any, settings: Mapping[str, Any]) -> None:
    for name, value in settings.items():
        connection.execute(f"SET GLOBAL {name} = {literal(value)}")


def _open_remote(connection: Any, remote: RemoteBucket) -> Sequence[str]:
    """Load and configure the packaged extension and pass it the keys. Returns the URLs that may be read."""
    connection.execute(f"LOAD {literal(str(extension()))}")
    settings = {
        "force_download": remote.whole,  # one request per object, so that all bytes are of one version
        "s3_url_compatibility_mode": True,  # a key is a literal name, never a pattern
        "httpfs_connection_caching": True,
        "http_timeout": 20,
        "http_retries": 2,
    }
    _set(connection, {**settings, **_network(remote)})
    scopes = [f"s3://{remote.bucket}/{remote.prefix}/" if remote.prefix else f"s3://{remote.bucket}/"]
    scopes += [f"s3://{remote.bucket}/{remote.table}/"] if remote.table else []
    secret = {
        "KEY_ID": remote.access_key_id,
        "SECRET": remote.secret_access_key,
        "REGION": remote.region,
        "URL_STYLE": "path" if remote.path_style else "vhost",
        "USE_SSL": remote.tls,
        "SCOPE": f"s3://{remote.bucket}/",
        **({"ENDPOINT": remote.endpoint} if remote.endpoint else {}),
        **({"SESSION_TOKEN": remote.session_token} if remote.session_token else {}),
    }
    pairs = ", ".join(f"{name} {literal(value)}" for name, value in secret.items())
    connection.execute(f"CREATE SECRET objects (TYPE s3, PROVIDER config, {pairs})")
    return scopes


def _network(remote: RemoteBucket) -> Mapping[str, str]:
    """The machine's proxy, and its CA certificates if it has its own; see `app.core.network`."""
    settings = {"ca_cert_file": os.environ.get("SSL_CERT_FILE", "")}
    if proxy := proxy_for(f"{'https' if remote.tls else 'http'}://{remote.endpoint or 's3.amazonaws.com'}"):
        parts = urlsplit(proxy)
        settings["http_proxy"] = f"{parts.hostname}:{parts.port or 80}"
        settings["http_proxy_username"], settings["http_proxy_password"] = parts.username or "", parts.password or ""
    return {name: value for name, value in settings.items() if value}


def extension() -> Path:
    """Path of the packaged httpfs extension. Raises Permanent when it is missing."""
    spec = find_spec("duckdb_extension_httpfs")
    for place in (spec.submodule_search_locations or ()) if spec else ():
        for found in Path(place).rglob("httpfs.duckdb_extension"):
            return found
    raise Permanent("the httpfs extension of DuckDB is not installed", "install Headwater again")


def literal(value: Any) -> str:
    """A value as a SQL literal."""
    if value is None:
        return "NULL"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, list):
        return f"[{', '.join(map(literal, value))}]"
    return "'" + str(value).replace("'", "''") + "'"


def quoted(name: str) -> str:
    """A name as a SQL identifier."""
    return '"' + name.replace('"', '""') + '"'


def checked(
    parsed: Mapping[str, Any],
    sources: Collection[str],
    refused_in: Callable[[Mapping[str, Any]], str],
    allowed: str,
    hint: str,
) -> Sequence[Mapping[str, Any]]:
    """The nodes of a parsed statement. Raises Rejected unless it is one SELECT whose tables are RELATION, its own CTEs
    and the functions `sources`, and of which `refused_in`, given a node, refuses nothing.
    """
    if parsed["error"]:
        raise Rejected(str(parsed.get("error_message"))[:MESSAGE_CHARACTERS], hint)
    if len(parsed["statements"]) != 1:
        raise Rejected(f"there are {len(parsed['statements'])} statements", hint)
    nodes = list(_nodes_of(parsed["statements"]))
    tables = {str(entry["key"]).lower() for node in nodes for entry in (node.get("cte_map") or {}).get("map", ())}
    for node in nodes:
        refused = refused_in(node)
        if node.get("type") == "BASE_TABLE":
            name = str(node["table_name"])
            if node["schema_name"] or node["catalog_name"] or name.lower() not in {*tables, RELATION}:
                refused = f"the table {name!r}"
        if node.get("type") == "TABLE_FUNCTION":
            name = str(node["function"].get("function_name"))
            refused = refused if name.lower() in sources else f"the table function {name}()"
        if refused:
            raise Rejected(f"{refused[:MESSAGE_CHARACTERS]} is not {allowed}", hint)
    return nodes


def _nodes_of(tree: Any) -> Iterator[Mapping[str, Any]]:
    """Every JSON object in a parsed statement."""
    waiting = [tree]
    while waiting:
        one = waiting.pop()
        if isinstance(one, dict):
            yield one
            waiting.extend(one.values())
        elif isinstance(one, list):
            waiting.extend(one)


def _refused_in(node: Mapping[str, Any]) -> str:
    """What this node contains that a report may not do, "" if nothing."""
    if node.get("type") == "FUNCTION" and str(node.get("function_name")).lower() in FORBIDDEN:
        return f"function {node['function_name']}()"
    return "DESCRIBE, SHOW and SUMMARIZE" if node.get("type") == "SHOW_REF" else ""


@contextmanager
def translate_duckdb_errors(seconds: float | None) -> Iterator[None]:
    """Turn every DuckDB exception into an error with a next step; `seconds` is the query's time limit."""
    import duckdb

    try:
        yield
    except (duckdb.Error, UnicodeDecodeError, OSError) as error:
        # UnicodeDecodeError: the message quotes bytes of a torn read; OSError: pyarrow's form of DuckDB's errors
        raise _error(error, seconds) from error


@contextmanager
def written() -> Iterator[None]:
    """Report a full disk with a clear error; other errors pass through."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise _disk_full(str(error)) from error
        raise


def _disk_full(text: str) -> Transient:
    return Transient(f"the disk is full: {text}"[:MESSAGE_CHARACTERS], "free space in DATA_DIR")


def _error(error: Exception, seconds: float | None) -> AppError:
    import duckdb

    said = str(error).split("\n\nLINE ", 1)[0]  # the rest quotes the statement
    text = said.split("\n", 1)[0][:MESSAGE_CHARACTERS]
    if "CSV" in text:  # the reason is the last line before the advice, after the record itself
        text = f"{text}: {said.partition(chr(10) + 'Possible ')[0].rstrip().rsplit(chr(10), 1)[-1]}"[
            :MESSAGE_CHARACTERS
        ]
    if isinstance(error, duckdb.InterruptException) or text.startswith("INTERRUPT"):
        hint = "narrow its parameters, or raise ANALYTICS_TIMEOUT_SECONDS"
        return ReportTooSlow(f"the report took longer than {seconds or 0:g} s", hint)
    if getattr(error, "errno", None) in FULL or any(os.strerror(number) in said for number in FULL):
        return _disk_full(text)
    if isinstance(error, duckdb.OutOfMemoryException) or text.startswith("Out of Memory"):
        hint = "narrow its parameters, or raise ANALYTICS_MEMORY_MB"
        return ReportTooLarge(f"needs more memory or disk: {text}", hint)
    if isinstance(error, UnicodeDecodeError):
        return UnreadableObject("an object changed while it was read", RETRY_HINT)
    if not WRONG.match(text) or OF_OBJECTS.search(said):
        return UnreadableObject(text, RETRY_HINT)
    return (UnboundName if text.startswith("Binder") else InvalidReport)(text, "correct its SQL file")
