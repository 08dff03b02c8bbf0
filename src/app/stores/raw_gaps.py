"""The gap map of raw objects: the keys that windows should have, beside the keys that a listing has.

Invariants: as `app.core.gaps`; only keys of windows of the map count, whatever else lies beside them. A window that
could not be had is MISSING, since its record names a version that no object has; one that lines were set aside of is
PARTIAL.
"""

from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime

from app.core.gaps import Cell, Found, Moment, State, cells_of
from app.core.ports import Checkpoints, Record
from app.core.window import Window
from app.stores.objects import ObjectStore

NOT_HAD = "not had"
"""The version in the record of a window that the service could not give; `closed` says that it was set aside."""


@dataclass(frozen=True, slots=True)
class RawLine:
    """One partition of a map. `key`: the object of a window; `folder`: the prefix under which to list that key.

    `cursor_of`: the pipeline and partition whose cursor says what is finished. `by_line`: `source_cells` of its records
    counts the lines, of which `rows` landed.
    """

    pipeline: str
    partition: str
    cursor_of: tuple[str, str]
    key: Callable[[Window], str]
    folder: Callable[[str], str]
    by_line: bool = False


@dataclass(frozen=True, slots=True)
class RawMap:
    """Makes the cells of a line."""

    checkpoints: Checkpoints
    store: ObjectStore
    grace_seconds: float

    def cells(self, line: RawLine, windows: Iterable[Window], now: datetime) -> Sequence[Cell]:
        """A cell per window that has begun. One listing per folder."""
        begun = [window for window in windows if window.start < now]
        if not begun:
            return ()
        keys = {line.key(window): window.start for window in begun}
        folders = sorted({line.folder(key) for key in keys})
        listed = (info for folder in folders for info in self.store.list(folder))
        found = [Found(keys[info.key], info.key, info.etag) for info in listed if info.key in keys]
        records = self.checkpoints.records(line.pipeline, line.partition, begun[0].start, begun[-1].end)
        pipeline, partition = line.cursor_of
        moment = Moment(now, self.grace_seconds, self.checkpoints.cursors(pipeline).get(partition))
        lacking = {record.window.start for record in records if line.by_line and record.source_cells > record.rows}
        cells = cells_of(begun, records, found, moment)
        return [_with_gaps(cell, lacking) for cell in cells]


def was_had(record: Record | None) -> bool:
    """False for a window that has no record, or one that says that the service could not give it."""
    return record is not None and record.version != NOT_HAD


def _with_gaps(cell: Cell, lacking: Container[datetime]) -> Cell:
    if cell.state in (State.EQUAL, State.EMPTY) and cell.window.start in lacking:
        return replace(cell, state=State.PARTIAL)
    return cell


def folder_of(key: str) -> str:
    """The key up to its last slash."""
    return key[: key.rfind("/") + 1]
