"""The configuration of the CSV inbox (`config.json`, or the file named by CSV_MONITOR_CONFIG), and the inbox's errors.

Invariant: a configuration is complete and valid: every key has its documented default and every path is absolute.
Invalid settings raise one BadSettings with one line per fault. No files or folders are created here.
"""

import codecs
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    ValidationInfo,
)

from app.core.errors import BadSettings, Rejected, Transient
from app.core.files import NAME_BYTES


class FaultKind(StrEnum):
    """A small fixed set of texts, since the ledger and the metrics count by them."""

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
class FileFault:
    """One fault of a file; `line`, `column` and `value` are set where known."""

    reason: str
    line: int | None = None
    column: str | None = None
    value: str | None = None


class UnmergeableFile(Rejected):
    """This file goes to quarantine; of the master, which is never set aside, it says that it cannot be read.

    `more` is the number of faults beyond `faults`; `rows` is the number of rows read before the file was rejected;
    `bad_rows` is what stands in the file of bad rows: the header and the raw rows.
    """

    def __init__(
        self, kind: FaultKind, faults: Sequence[FileFault], hint: str, *, more: int = 0, rows: int = 0
    ) -> None:
        first = faults[0]
        where = f"line {first.line}: " if first.line else ""
        others = len(faults) - 1 + more
        told = f"{where}{first.reason}" + (f" (and {others} more faults)" if others else "")
        super().__init__(printable(told), printable(hint))
        self.kind = kind
        self.faults = faults
        self.more = more
        self.rows = rows
        self.bad_rows = b""


class FileStillChanging(Transient):
    """The file changed or vanished while it was processed; it is left for the next run."""

    def __init__(self, message: str) -> None:
        super().__init__(message, "no action needed; the next run checks again")


class StuckFile(Transient):
    """This file cannot be read or moved at the moment; it stays in the inbox, and every run reports it."""


def printable(text: str) -> str:
    """The text as one line that any log, terminal and database takes, whatever is in a file's name or header."""
    clean = os.fsencode(text).decode("utf-8", "backslashreplace") if not text.isascii() else text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in clean)


MOST_KEPT = 1000
LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")


def _placed(name: Any, info: ValidationInfo[Any]) -> Path:
    if not isinstance(name, str | Path) or not str(name) or "\0" in str(name):
        raise ValueError
    folder: Path = info.context
    # Resolved, since a rename replaces the master: a symbolic link must still lead to it afterwards.
    return (folder / name).resolve()


def _encoding(name: str) -> str:
    """UTF-8 or a single-byte encoding: only in these can rows be split without decoding them."""
    lower, upper = bytes(range(128)), bytes(range(128, 256))
    try:
        found = codecs.lookup(name).name
        one_byte_each = found in ("utf-8", "utf-8-sig") or len(upper.decode(found, "replace")) == len(upper)
        # Python's own unicode_escape would pass without the last test.
        if one_byte_each and len(rb"\u0041".decode(found)) > 1 and lower.decode(found) == lower.decode("ascii"):
            return found
    except (LookupError, UnicodeError) as error:
        raise ValueError from error
    raise ValueError


Place = Annotated[Path, BeforeValidator(_placed), Field(description="text that is not empty")]
Name = Annotated[str, Field(min_length=1, pattern=r"^[^\x00]*$", description="text that is not empty")]
Names = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(strict=False)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False, description="a number of seconds, 0 or more")]
Level = Annotated[str, StringConstraints(to_upper=True, pattern=rf"(?i)^({'|'.join(LEVELS)})$")]
Megabytes = Annotated[float, Field(allow_inf_nan=False)]


class InboxConfig(BaseModel):
    """The keys of the file, under their own names; a field's description says what is allowed. Paths are absolute.

    `csv_encoding` is Python's codec name; the encoding is ASCII-compatible: bytes below 128 are ASCII characters.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", validate_default=True)

    watch_dir: Place = Path("csv_inbox")
    archive_dir: Place = Path("csv_archive")
    rejected_dir: Place = Path("csv_inbox_rejected")
    merged_file: Place = Path("final_clusters_data.csv")
    metadata_file: Place = Path("merged_metadata.json")
    log_file: Place = Path("csv_watchdog.log")
    key_column: Name = "cluster_name"
    required_columns: Names = Field((), description='a list of column names, such as ["id", "name"]')
    checksum_wait_seconds: Seconds = 5
    max_file_size_mb: Megabytes = Field(500, ge=0.001, description="a number of megabytes, 0.001 or more")
    csv_delimiter: str = Field(
        ",", pattern=r'^[\x01-\x7F&&[^"\r\n]]$', description='one ASCII character, such as "," or ";" or "\\t"'
    )
    csv_encoding: Annotated[str, AfterValidator(_encoding)] = Field(
        "utf-8",
        description="utf-8, utf-8-sig, or an encoding with one byte for each character, such as latin-1 or cp1252",
    )
    log_level: Level = Field("INFO", description=f"one of {', '.join(LEVELS)}")
    log_to_console: Annotated[bool, Field(description="true or false")] = False
    lock_timeout_seconds: Seconds = 30
    undo_keep: int = Field(10, ge=0, le=MOST_KEPT, description=f"a whole number from 0 to {MOST_KEPT}")
    index_from_mb: Megabytes = Field(16, ge=0, description="a number of megabytes, 0 or more")


FIELDS = InboxConfig.model_fields


def load_config(named: Path | None, data_dir: Path) -> InboxConfig:
    """Load `named`, else `config.json` in the working directory, else the defaults below `data_dir`.

    Raises BadSettings with one line per fault.
    """
    path = named or Path("config.json")
    if named is None and not path.is_file():
        return configured({}, data_dir.absolute(), "")
    try:
        given = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        fault = f"CSV_MONITOR_CONFIG={str(path)!r}: {error.strerror}; allowed: a JSON file that can be read"
        raise BadSettings([fault]) from error
    except (ValueError, RecursionError) as error:
        raise BadSettings([f"{path}: not JSON: {error}; allowed: one object with the documented keys"]) from error
    if not isinstance(given, dict):
        raise BadSettings([f"{path}: a {type(given).__name__}; allowed: one object with the documented keys"])
    return configured(given, path.absolute().parent, f"{path}: ")


def configured(given: Mapping[str, Any], folder: Path, where: str) -> InboxConfig:
    """Validate `given` and fill in defaults; paths are relative to `folder`, faults begin with `where`.

    Raises BadSettings.
    """
    faults = []
    try:
        config = InboxConfig.model_validate(given, context=folder)
    except ValidationError as error:
        wrong = dict.fromkeys(str(each["loc"][0]) for each in error.errors())
        faults = [f"{where}unknown key {key!r}{_nearest(key)}" for key in wrong if key not in FIELDS]
        faults += [
            f"{where}{key}={json.dumps(given[key])[:200]}; allowed: {FIELDS[key].description}"
            for key in wrong
            if key in FIELDS
        ]
        right = {key: value for key, value in given.items() if key not in wrong}
        config = InboxConfig.model_validate(right, context=folder)
    faults += [f"{where}{clash}" for clash in _clashes(config)]
    if faults:
        raise BadSettings(faults)
    return config


def _nearest(key: str) -> str:
    near = get_close_matches(key, FIELDS, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else f"; allowed: {', '.join(FIELDS)}"


def _clashes(config: InboxConfig) -> list[str]:
    """Faults for equal paths: a rejected or archived file would be ingested again, a log would overwrite data.

    Also faults for file names that are too long.
    """
    folders = (config.watch_dir, config.archive_dir, config.rejected_dir)
    files = (config.merged_file, config.metadata_file, config.log_file)
    found = []
    if len(set(folders)) < len(folders):
        found.append("watch_dir, archive_dir and rejected_dir; allowed: three different folders")
    if len({*folders, *files}) < len(set(folders)) + len(files):
        found.append("merged_file, metadata_file and log_file; allowed: three different files, none of them a folder")
    # The log is rotated to `{name}.1`.
    limits = {"merged_file": NAME_BYTES, "metadata_file": NAME_BYTES, "log_file": NAME_BYTES - 2}
    for key, limit in limits.items():
        size = len(os.fsencode(getattr(config, key).name))
        if not 0 < size <= limit:
            found.append(f"{key}: a name of {size} bytes; allowed: 1 to {limit}")
    return found
