"""Objects that hold what a service gave, as it gave it: how they are written, mapped and set aside."""

import hashlib
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryFile
from typing import BinaryIO, Protocol, cast

from app.core.errors import Permanent
from app.core.pipeline import Checkpoints, Held, Record
from app.core.repair import GONE_HINT
from app.core.runs import SetAside
from app.core.verify import Cell, CellState, Content, Found, Moment, cells_of
from app.core.windows import Window
from app.object_store.port import ObjectInfo, ObjectStore, Put
from app.object_store.set_aside import LINES, SetAsideStore

# Objects that hold what a service gave, as it gave it: one per window, told by the digest of its rows.
#
# Invariants: the same rows are not stored twice, however their order or their bytes differ; an object is replaced
# only while it is the version that was looked at, and one that is whole never by one with fewer rows.

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RawObject:
    """What an object is: `rows` of a window, and the digest that tells these rows from others."""

    pipeline: str
    key: str
    window: Window
    content_type: str
    rows: int
    digest: str

    @property
    def metadata(self) -> Mapping[str, str]:
        """What is noted with the object."""
        return {
            "pipeline": self.pipeline,
            "window": str(self.window),
            "rows": str(self.rows),
            "digest": self.digest,
        }


class PutPolicy(Protocol):
    """How the object of a window is stored."""

    def __call__(self, store: ObjectStore, file: BinaryIO, what: RawObject) -> Held:
        """What is there then. Raises Conflict when somebody else writes the same object at this moment."""


def keep(store: ObjectStore, file: BinaryIO, what: RawObject) -> Held:
    """Store `file` from its beginning unless the object holds these rows already; what is there then.

    Raises Conflict when somebody else writes the same object at this moment: read the service again, then repeat.
    """
    there = store.head(what.key)
    held = held_of(there) if there else None
    if held is not None and held.digest == what.digest:
        return held
    if held is not None and (held.rows or 0) > what.rows:
        log.warning("%s holds %s rows, the service now gives %d: it stays", what.key, held.rows, what.rows)
        return held
    return in_place_of(held.version if held else "")(store, file, what)


def in_place_of(version: str) -> PutPolicy:
    """Store over this very version, whatever it holds; "" = nothing is there."""

    def stored(store: ObjectStore, file: BinaryIO, what: RawObject) -> Held:
        size_bytes = file.seek(0, 2)
        file.seek(0)
        etag = store.put(what.key, file, Put(what.content_type, what.metadata, version))
        return replace(Held(etag), digest=what.digest, rows=what.rows, size_bytes=size_bytes)

    return stored


@dataclass(frozen=True, slots=True)
class There:
    """An object as it was found before the service was asked: its version ("" = none), and what it holds (None = it
    cannot be read).
    """

    key: str
    version: str
    content: Content | None


def mending(there: There, given: Content, record: Record | None) -> PutPolicy | None:
    """How to store what the service gives now; None = what is there stays, since the service no longer has all of it.

    Raises Permanent when the object is damaged or foreign and the service has no rows to put in its place.
    """
    if there.content == given:
        return keep
    whole = there.content if record and there.version and there.version == record.version else None
    if whole is not None and whole.rows > given.rows:
        return None
    if not given.rows:
        raise Permanent(f"{there.key}: was changed, and the service has no rows of it", GONE_HINT)
    return in_place_of(there.version)


def held_of(info: ObjectInfo) -> Held:
    """What an object's metadata says; an object that a person put there says nothing."""
    rows = info.metadata.get("rows", "")
    return Held(
        version=info.etag,
        digest=info.metadata.get("digest", ""),
        rows=int(rows) if rows.isdigit() else None,
        size_bytes=info.size_bytes,
    )


# The gap map of raw objects: the keys that windows should have, beside the keys that a listing has.
#
# Invariants: as `app.core.verify`; only keys of windows of the map count, whatever else lies beside them. A window
# that could not be had is MISSING, since its record names a version that no object has; one that lines were set
# aside of is PARTIAL.

NOT_HAD = "not had"
"""The version in the record of a window that the service could not give; `closed` says that it was set aside."""


def raw_cells(
    checkpoints: Checkpoints,
    store: ObjectStore,
    windows: Iterable[Window],
    at: Moment,
    *,
    pipeline: str,
    partition: str,
    key: Callable[[Window], str],
    folder: Callable[[str], str] = str,
    by_line: bool = False,
) -> Sequence[Cell]:
    """A cell per window that has begun. `key`: the object of a window; `folder`: the prefix under which to list it.

    One listing per folder. `by_line`: `source_cells` of the records counts the lines, of which `rows` landed.
    """
    begun = [window for window in windows if window.start < at.now]
    if not begun:
        return ()
    keys = {key(window): window.start for window in begun}
    folders = sorted(set(map(folder, keys)))
    listed = (info for each in folders for info in store.list(each))
    found = [Found(keys[info.key], info.key, info.etag) for info in listed if info.key in keys]
    records = checkpoints.records(pipeline, partition, begun[0].start, begun[-1].end)
    lacking = {record.window.start for record in records if by_line and record.source_cells > record.rows}
    return [
        replace(cell, state=CellState.PARTIAL)
        if cell.state in (CellState.EQUAL, CellState.EMPTY) and cell.window.start in lacking
        else cell
        for cell in cells_of(begun, records, found, at)
    ]


def was_had(record: Record | None) -> bool:
    """False for a window that has no record, or one that says that the service could not give it."""
    return record is not None and record.version != NOT_HAD


def folder_of(key: str) -> str:
    """The key up to its last slash."""
    return key[: key.rfind("/") + 1]


# Lines of a service's files that no event could be made of, on their way to where they are set aside.
#
# Invariants: the bytes stay as they came; memory is bounded by one line, since what is refused lies on disk until
# it is kept; a line is kept under the window that it belongs to, so that a window that is pulled again adds
# nothing.

LARGE_BYTES = 1 << 20
Name = tuple[str, ...]


@dataclass(slots=True)
class _Refused:
    file: BinaryIO
    sample: str
    number: int = 0


class RefusedLines:
    """Close it when it is done with. For one thread."""

    def __init__(self, spool: Path) -> None:
        self._spool = spool
        self._found: dict[tuple[Name, str], _Refused] = {}
        self.not_kept = 0

    def add(self, name: Name, reason: str, line: bytes, sample: str) -> None:
        """Take in a line of the window `name`. A large one gets an object of its own, so that none is cut."""
        if len(line) > LARGE_BYTES:
            name = (*name, hashlib.sha256(line).hexdigest()[:16])
        found = self._found.get((name, reason))
        if found is None:
            file = cast("BinaryIO", TemporaryFile(dir=self._spool))  # noqa: SIM115 - `close` closes it
            found = self._found[name, reason] = _Refused(file, sample)
        found.file.write(line.rstrip(b"\r\n") + b"\n")
        found.number += 1

    def keep(self, store: SetAsideStore) -> list[SetAside]:
        """Keep all, as lines of a ledger. `not_kept` is then how many the store could not be given."""
        entries = []
        for (name, reason), found in self._found.items():
            found.file.seek(0)
            kept = store.keep(
                name, found.file, content_type=LINES, reason=reason, number=found.number, sample=found.sample
            )
            self.not_kept += 0 if kept.key else kept.number
            entries.append(kept.entry)
        return entries

    def close(self) -> None:
        """Free what is spooled. Idempotent."""
        while self._found:
            self._found.popitem()[1].file.close()
