"""The gap map of raw objects: the keys that windows should have, beside the keys that a listing has.

Invariants: as `app.core.gaps`; only keys of windows of the map count, whatever else lies beside them. A window that
could not be had is MISSING, since its record names a version that no object has; one that lines were set aside of is
PARTIAL.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from app.core.gaps import Cell, Found, Moment, State, cells_of
from app.core.ports import Checkpoints, Record
from app.core.window import Window
from app.stores.objects import ObjectStore

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
        replace(cell, state=State.PARTIAL)
        if cell.state in (State.EQUAL, State.EMPTY) and cell.window.start in lacking
        else cell
        for cell in cells_of(begun, records, found, at)
    ]


def was_had(record: Record | None) -> bool:
    """False for a window that has no record, or one that says that the service could not give it."""
    return record is not None and record.version != NOT_HAD


def folder_of(key: str) -> str:
    """The key up to its last slash."""
    return key[: key.rfind("/") + 1]
