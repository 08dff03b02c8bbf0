"""The load history: one small file for each file that was merged or rejected.

Invariants: a record is written as part of the step that it tells of, under a name that is the same when the step is
repeated; the newest are kept, so the folder cannot grow for ever.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from app.core.files import write_durably
from app.csv_inbox.places import RECORD

KEPT_LOADS = 1000
REVERT = ".undo"
MERGED, REJECTED, UNDONE = "merged", "rejected", "undone"


@dataclass(frozen=True, slots=True)
class Load:
    """What became of one file. `load_id` begins with its instant in UTC, so names sort by time.

    `revert` says how the merge can be taken back: "rows" (removed rows were kept), "whole" (the old master was),
    "first" (there was no master), "" (cannot). `size_bytes` and `mtime_ns` are those of the master after it,
    `mtime_before_ns` that of the one before.

    The last fields are how rows are found that are written to the file later: its name in the archive as it is, its
    device, inode, size and modification time when it was last looked at, the MD5 of all that was taken in by then,
    where its rows begin, and the size of a last record without a line end. `source` is empty where nothing is known.
    """

    load_id: str
    run_id: str
    file: str
    at: str
    outcome: str
    rows: int = 0
    inserted: int = 0
    replaced: int = 0
    unchanged: int = 0
    duplicates: int = 0
    columns_added: tuple[str, ...] = ()
    columns_removed: tuple[str, ...] = ()
    rows_before: int = 0
    rows_after: int = 0
    seconds: float = 0.0
    archived_as: str = ""
    error: str = ""
    revert: str = ""
    kept_bytes: int = 0
    ranges: int = 0
    size_bytes: int = 0
    mtime_ns: int = 0
    mtime_before_ns: int = 0
    archive_name: str = ""
    source: tuple[int, ...] = ()
    source_md5: str = ""
    rows_at: int = 0
    unended_bytes: int = 0

    def told(self) -> str:
        """One line for people."""
        if self.outcome == REJECTED:
            return f"{self.file}: rejected: {self.error}"
        counts = f"{self.rows} rows: {self.inserted} inserted, {self.replaced} replaced, {self.unchanged} unchanged"
        parts = [counts]
        if self.duplicates:
            parts.append(f"{self.duplicates} rows whose key comes again later in the file left out")
        parts += [f"columns {word}: {', '.join(names)[:500]}" for word, names in self._columns() if names]
        return f"{self.file}: {self.outcome}, {'; '.join(parts)}; {self.rows_after} rows in all"

    def _columns(self) -> Iterator[tuple[str, tuple[str, ...]]]:
        yield "added", self.columns_added
        yield "removed", self.columns_removed


def load_of(content: Mapping[str, Any]) -> Load:
    """A load from its record; keys of a later version are left out."""
    known = {each.name for each in fields(Load)}
    values: dict[str, Any] = {name: value for name, value in content.items() if name in known}
    values |= {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
    return Load(**values)


def save_load(folder: Path, load: Load) -> None:
    """Write or replace the record, durably. Raises OSError."""
    text = json.dumps(asdict(load), indent=1)
    write_durably(folder / f"{load.load_id}{RECORD}", [text.encode("ascii")])


def loads(folder: Path, limit: int) -> Sequence[Load]:
    """Newest first; empty when there is no folder. A record that cannot be read is left out."""
    try:
        names = sorted(
            (path for path in folder.iterdir() if path.suffix == RECORD and path.name[0] != "."), reverse=True
        )
    except FileNotFoundError:
        return []
    return [load for path in names[:limit] if (load := _read(path)) is not None]


def _read(path: Path) -> Load | None:
    try:
        return load_of(json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError):
        return None


def revert_file(folder: Path, load_id: str) -> Path:
    """What it takes to undo a merge; it exists as long as the merge can be undone."""
    return folder / f"{load_id}{REVERT}"


def prune(folder: Path, undo_keep: int) -> None:
    """Remove what lies beyond the number of merges that can be undone, and the oldest records. Idempotent."""
    reverts = sorted((path for path in folder.glob(f"*{REVERT}")), reverse=True)
    records = sorted((path for path in folder.glob(f"*{RECORD}")), reverse=True)
    for path in (*reverts[undo_keep:], *records[KEPT_LOADS:]):
        path.unlink(missing_ok=True)


def undone(load: Load) -> Load:
    """The record of a merge after it was taken back."""
    return replace(load, outcome=UNDONE, revert="")


def shown(load: Load) -> Mapping[str, Any]:
    """A load as one line of a table."""
    columns = [f"+{name}" for name in load.columns_added] if load.rows_before else []
    columns += [f"-{name}" for name in load.columns_removed]
    return {
        "at": load.at,
        "file": load.file,
        "outcome": load.outcome,
        "rows": load.rows,
        "inserted": load.inserted,
        "replaced": load.replaced,
        "unchanged": load.unchanged,
        "columns": " ".join(columns)[:200],
        "total": load.rows_after,
        "seconds": round(load.seconds, 2),
        "run": load.run_id[:12],
        "error": load.error,
    }
