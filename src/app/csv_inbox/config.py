"""The configuration of the CSV inbox, `config.json` or the file that CSV_MONITOR_CONFIG names, and its errors."""

import codecs
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from math import isfinite
from pathlib import Path
from typing import Any

from app.core.errors import BadSettings, Rejected, Transient
from app.core.files import NAME_BYTES

# Why a file is not merged: for good, or not yet.
#
# Invariant: each fault names what is wrong and, where it is known, the line, the column and the value; each kind of
# fault is one of few fixed texts, since the ledger and the metrics count by it.

NOT_REGULAR = "not a regular file"
NO_ACCESS = "cannot be opened"
TOO_LARGE = "file too large"
HEADER = "unusable header"
MISSING_COLUMN = "missing column"
NO_ROWS = "no rows"
ENCODING = "invalid text"
RAGGED = "wrong number of fields"
EMPTY_KEY = "unusable key"
LONG_RECORD = "record too long"
OPEN_QUOTE = "quote not closed"
LONE_RETURN = "lone carriage return"
SECOND_HEADER = "second header"


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that is wrong with a file; `line`, `column` and `value` where they are known."""

    reason: str
    line: int | None = None
    column: str | None = None
    value: str | None = None


class Unmergeable(Rejected):
    """This file goes to quarantine. `records` are the bad rows as they stand, below the header line `header`.

    `kind` is one of the texts above. `rows` is how many rows were seen before the file was given up.
    """

    def __init__(
        self,
        faults: list[Fault],
        hint: str,
        *,
        kind: str,
        header: bytes = b"",
        records: list[bytes] | None = None,
        more: int = 0,
        rows: int = 0,
    ) -> None:
        first = faults[0]
        where = f"line {first.line}: " if first.line else ""
        others = len(faults) - 1 + more
        super().__init__(f"{where}{first.reason}" + (f" (and {others} more faults)" if others else ""), hint)
        self.faults = faults
        self.kind = kind
        self.header = header
        self.records = records or []
        self.more = more
        self.rows = rows


class Unsteady(Transient):
    """The file changed while it was looked at; it is left for the next run."""


class Stuck(Transient):
    """This one file can be neither read nor moved now; it stays in the inbox, and every run names it."""


# The configuration of the CSV inbox: `config.json`, or the file that CSV_MONITOR_CONFIG names.
#
# Invariant: what comes out is complete and checked: every key has its documented default, every path is absolute, and
# what cannot work is one BadSettings with one line per fault. Nothing is created here.

FILE = "config.json"
LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")


@dataclass(frozen=True, slots=True)
class InboxConfig:
    """Every key of the file, under its own name. Paths are absolute; `csv_delimiter` is one ASCII character.

    `csv_encoding` is the codec's own name, of one in which a byte below 128 is always that ASCII character.
    """

    watch_dir: Path
    archive_dir: Path
    rejected_dir: Path
    merged_file: Path
    metadata_file: Path
    log_file: Path
    key_column: str
    required_columns: tuple[str, ...]
    checksum_wait_seconds: float
    max_file_size_mb: float
    csv_delimiter: str
    csv_encoding: str
    log_level: str
    log_to_console: bool
    lock_timeout_seconds: float
    undo_keep: int
    index_from_mb: float


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value or "\0" in value:
        raise ValueError("a text that is not empty")
    return value


def _texts(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(each, str) and each for each in value):
        raise ValueError('a list of column names, such as ["id", "name"]')
    return tuple(value)


def _switch(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("true or false")  # noqa: TRY004 - one kind of fault, whatever is odd about the value
    return value


def _number(least: float, unit: str) -> Callable[[Any], float]:
    def read(value: Any) -> float:
        good = isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value) and value >= least
        if not good:
            raise ValueError(f"a number of {unit}, {least:g} or more")
        return float(value)

    return read


def _kept(value: Any) -> int:
    most = 1000
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= most:
        raise ValueError(f"a whole number from 0 to {most}")
    return value


def _delimiter(value: Any) -> str:
    if not isinstance(value, str) or len(value) != 1 or not value.isascii() or value in '"\r\n\0':
        raise ValueError('one ASCII character, such as "," or ";" or "\\t"')
    return value


def _encoding(value: Any) -> str:
    """UTF-8, or one byte for each character: only there can rows be told apart without decoding all of them."""
    told = "utf-8, utf-8-sig, or an encoding with one byte for each character, such as latin-1 or cp1252"
    try:
        name = codecs.lookup(value if isinstance(value, str) else "").name
        ascii_bytes = bytes(range(128))
        same = ascii_bytes.decode(name) == ascii_bytes.decode("ascii")
        if same and (name in ("utf-8", "utf-8-sig") or len(bytes(range(128, 256)).decode(name, "replace")) == 128):  # noqa: PLR2004 - half a byte's values
            return name
    except (LookupError, UnicodeError) as error:
        raise ValueError(told) from error
    raise ValueError(told)


def _level(value: Any) -> str:
    if not isinstance(value, str) or value.upper() not in LEVELS:
        raise ValueError(f"one of {', '.join(LEVELS)}")
    return value.upper()


_SECONDS = _number(0, "seconds")
KEYS: Mapping[str, tuple[Any, Callable[[Any], Any]]] = {
    "watch_dir": ("csv_inbox", _text),
    "archive_dir": ("csv_archive", _text),
    "rejected_dir": ("csv_inbox_rejected", _text),
    "merged_file": ("final_clusters_data.csv", _text),
    "metadata_file": ("merged_metadata.json", _text),
    "log_file": ("csv_watchdog.log", _text),
    "key_column": ("cluster_name", _text),
    "required_columns": ([], _texts),
    "checksum_wait_seconds": (5, _SECONDS),
    "max_file_size_mb": (500, _number(0.001, "megabytes")),
    "csv_delimiter": (",", _delimiter),
    "csv_encoding": ("utf-8", _encoding),
    "log_level": ("INFO", _level),
    "log_to_console": (False, _switch),
    "lock_timeout_seconds": (30, _SECONDS),
    "undo_keep": (10, _kept),
    "index_from_mb": (16, _number(0, "megabytes")),
}
"""Key -> its default, and what reads a value (raises ValueError with what is allowed)."""

PATHS = ("watch_dir", "archive_dir", "rejected_dir", "merged_file", "metadata_file", "log_file")


def load_config(named: Path | None, data_dir: Path) -> InboxConfig:
    """The configuration of `named`, else of `config.json` in the working directory, else the defaults below `data_dir`.

    Raises BadSettings with one line per fault.
    """
    path = named or Path(FILE)
    if named is None and not path.is_file():
        return configured({}, data_dir.absolute(), "")
    try:
        given = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        fault = f"CSV_MONITOR_CONFIG={str(path)!r}: {error.strerror}; allowed: a JSON file that can be read"
        raise BadSettings([fault]) from error
    except ValueError as error:
        raise BadSettings([f"{path}: not JSON: {error}; allowed: one object with the documented keys"]) from error
    if not isinstance(given, dict):
        raise BadSettings([f"{path}: a {type(given).__name__}; allowed: one object with the documented keys"])
    return configured(given, path.absolute().parent, f"{path}: ")


def configured(given: Mapping[str, Any], folder: Path, where: str) -> InboxConfig:
    """`given` with the defaults, paths relative to `folder`; each fault begins with `where`. Raises BadSettings."""
    faults = [f"{where}unknown key {key!r}{_nearest(key)}" for key in given if key not in KEYS]
    values: dict[str, Any] = {}
    for key, (default, read) in KEYS.items():
        value = given.get(key, default)
        try:
            values[key] = read(value)
        except ValueError as error:
            faults.append(f"{where}{key}={json.dumps(value)[:200]}; allowed: {error}")
            values[key] = default
    # Resolved, since the master is replaced by renaming: a link must lead to the same file afterwards.
    values |= {key: (folder / str(values[key])).expanduser().resolve() for key in PATHS}
    config = InboxConfig(**{field.name: values[field.name] for field in fields(InboxConfig)})
    faults += [f"{where}{clash}" for clash in _clashes(config)]
    if faults:
        raise BadSettings(faults)
    return config


def _nearest(key: str) -> str:
    near = get_close_matches(key, KEYS, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else f"; allowed: {', '.join(KEYS)}"


def _clashes(config: InboxConfig) -> list[str]:
    """Places that must differ: a rejected or archived file would come back as a new one, a log would overwrite data."""
    folders = (config.watch_dir, config.archive_dir, config.rejected_dir)
    files = (config.merged_file, config.metadata_file, config.log_file)
    found = []
    if len(set(folders)) < len(folders):
        found.append("watch_dir, archive_dir and rejected_dir; allowed: three different folders")
    if len({*folders, *files}) < len(set(folders)) + len(files):
        found.append("merged_file, metadata_file and log_file; allowed: three different files, none of them a folder")
    # The log moves aside as `{name}.1`.
    limits = {"merged_file": NAME_BYTES, "metadata_file": NAME_BYTES, "log_file": NAME_BYTES - 2}
    for key, limit in limits.items():
        size = len(os.fsencode(getattr(config, key).name))
        if size > limit:
            found.append(f"{key}: a name of {size} bytes; allowed: at most {limit}")
    return found
