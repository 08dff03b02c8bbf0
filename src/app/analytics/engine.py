"""DuckDB, locked down: one instance, a cursor per query, bounded memory and threads, an end to every query.

Invariants: after the set-up nothing can be changed, loaded, attached or reached but the objects below the prefix and
the folder of this process; only a single SELECT is run, whose tables are the rows of objects or its own; nothing is
downloaded, since the one extension comes with a package. This is DuckDB's home: its exceptions end here, see `errors`.
"""

import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from app.analytics.columns import literal, write_pads
from app.analytics.errors import MESSAGE_CHARACTERS, translated
from app.analytics.reports import RELATION
from app.core.errors import Permanent, Rejected

SOURCES = frozenset({"range", "generate_series", "unnest", "repeat"})
FORBIDDEN = frozenset({"write_log", "parse_duckdb_log_message", "nextval", "currval"})
SPILL = "1GB"


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """What queries may use."""

    memory_mb: int
    threads: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Remote:
    """A bucket, and the keys to read it with. `whole`: objects are fetched whole, each by one request."""

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


class Engine:
    """One DuckDB. `folder` is this process's own; queries may read there, and spill to disk."""

    def __init__(self, folder: Path, limits: EngineLimits, remote: Remote | None = None) -> None:
        self.folder = folder
        self.limits = limits
        self.remote = remote
        self._lock = threading.Lock()
        self._made: Any = None

    def close(self) -> None:
        """Give the memory back. A later query opens it anew."""
        with self._lock:
            made, self._made = self._made, None
        if made is not None:
            made.close()

    def columns(self, sql: str, values: Mapping[str, Any]) -> Mapping[str, str]:
        """Name -> type of what `sql` would answer."""
        with self._cursor(self.limits.seconds) as cursor:
            return {row[0]: row[1] for row in cursor.execute(f"DESCRIBE {sql}", values or None).fetchall()}

    def rows(self, sql: str) -> list[tuple[Any, ...]]:
        """All rows of our own query, in memory and without a time limit."""
        with self._cursor(None) as cursor:
            found: list[tuple[Any, ...]] = cursor.execute(sql).fetchall()
            return found

    @contextmanager
    def batches(self, sql: str, values: Mapping[str, Any], batch_rows: int) -> Iterator[Any]:
        """A pyarrow RecordBatchReader over the answer; the time limit holds until the block ends."""
        with self._cursor(self.limits.seconds) as cursor:
            yield cursor.execute(sql, dict(values) or None).to_arrow_reader(batch_rows)

    def check(self, sql: str) -> set[str]:
        """Names of the parameters. Raises Rejected for anything that is not one SELECT over RELATION."""
        with self._cursor(self.limits.seconds) as cursor:
            text = cursor.execute("SELECT json_serialize_sql($1)", [sql]).fetchone()[0]
        return checked(json.loads(text))

    @contextmanager
    def _cursor(self, seconds: float | None) -> Iterator[Any]:
        with translated(seconds), self._instance().cursor() as cursor:
            timer = threading.Timer(seconds, cursor.interrupt) if seconds else None
            if timer:
                timer.daemon = True
                timer.start()
            try:
                yield cursor
            finally:
                if timer:
                    timer.cancel()

    def _instance(self) -> Any:
        with self._lock:
            if self._made is None:
                self._made = _opened(self.folder, self.limits, self.remote)
            return self._made


def _opened(folder: Path, limits: EngineLimits, remote: Remote | None) -> Any:
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
        "enable_external_file_cache": False,  # what it keeps may be of another version than what is read next
    }
    for name, value in settings.items():
        connection.execute(f"SET GLOBAL {name} = {literal(value)}")
    allowed = [f"{folder}/"]
    if remote is not None:
        allowed.append(_open_remote(connection, remote))
    write_pads(connection, folder)
    connection.execute(f"SET GLOBAL allowed_directories = {literal(allowed)}")
    connection.execute("SET GLOBAL enable_external_access = false")
    connection.execute("SET GLOBAL lock_configuration = true")
    return connection


def _open_remote(connection: Any, remote: Remote) -> str:
    """Load the extension of the package, set it up, and hand it the keys; what may be read."""
    connection.execute(f"LOAD {literal(str(extension()))}")
    settings = {
        "force_download": remote.whole,  # one request: the object is one version, whoever replaces it meanwhile
        "s3_url_compatibility_mode": True,  # a key is a name and never a pattern
        "httpfs_connection_caching": True,
        "http_timeout": 20,
        "http_retries": 2,
    }
    for name, value in settings.items():
        connection.execute(f"SET GLOBAL {name} = {literal(value)}")
    scope = f"s3://{remote.bucket}/{remote.prefix}/" if remote.prefix else f"s3://{remote.bucket}/"
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
    return scope


def extension() -> Path:
    """The httpfs extension inside its package. Raises Permanent when it is not there."""
    spec = find_spec("duckdb_extension_httpfs")
    for place in (spec.submodule_search_locations or ()) if spec else ():
        for found in Path(place).rglob("httpfs.duckdb_extension"):
            return found
    raise Permanent("the httpfs extension of DuckDB is not installed", "install Headwater again")


def checked(parsed: Mapping[str, Any]) -> set[str]:
    """Names of the parameters of a parsed text. Raises Rejected for what a report may not do."""
    if parsed["error"]:
        raise Rejected(str(parsed.get("error_message"))[:MESSAGE_CHARACTERS], "a report is one SELECT")
    if len(parsed["statements"]) != 1:
        raise Rejected("there is more than one statement", "a report is one SELECT")
    nodes = list(_nodes(parsed["statements"]))
    own = {name.lower() for node in nodes for name in _named(node)}
    for node in nodes:
        _check_node(node, own)
    return {str(node["identifier"]) for node in nodes if node.get("type") == "VALUE_PARAMETER"}


def _nodes(tree: Any) -> Iterator[Mapping[str, Any]]:
    waiting = [tree]
    while waiting:
        one = waiting.pop()
        if isinstance(one, dict):
            yield one
            waiting.extend(one.values())
        elif isinstance(one, list):
            waiting.extend(one)


def _named(node: Mapping[str, Any]) -> Iterator[str]:
    """Names that WITH gives in this node."""
    for entry in (node.get("cte_map") or {}).get("map", ()):
        yield str(entry["key"])


def _check_node(node: Mapping[str, Any], own: set[str]) -> None:
    kind, name = node.get("type"), ""
    if kind == "BASE_TABLE":
        name = str(node["table_name"])
        if node["schema_name"] or node["catalog_name"] or name.lower() not in own | {RELATION}:
            raise _refused(f"table {name!r}")
    elif kind == "TABLE_FUNCTION":
        name = str(node["function"].get("function_name"))
        if name.lower() not in SOURCES:
            raise _refused(f"table function {name}()")
    elif kind == "SHOW_REF":
        raise _refused("DESCRIBE, SHOW and SUMMARIZE")
    elif kind == "FUNCTION" and str(node.get("function_name")).lower() in FORBIDDEN:
        raise _refused(f"function {node['function_name']}()")


def _refused(what: str) -> Rejected:
    return Rejected(f"{what} is not for reports"[:MESSAGE_CHARACTERS], "read FROM read_parquet({{S3_PATH}}) only")
