"""The gap map of raw objects: the keys that windows should have, beside the keys that a listing has.

Invariant: as `app.core.gaps`; only keys of windows of the map count, whatever else lies beside them.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime

from app.core.gaps import Cell, Found, Moment, cells_of
from app.core.ports import Checkpoints
from app.core.window import Window
from app.stores.objects import ObjectStore


@dataclass(frozen=True, slots=True)
class RawLine:
    """One partition of a map. `key`: the object of a window; `folder`: the prefix under which to list that key.

    `cursor_of`: the pipeline and partition whose cursor says what is finished.
    """

    pipeline: str
    partition: str
    cursor_of: tuple[str, str]
    key: Callable[[Window], str]
    folder: Callable[[str], str]


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
        return cells_of(begun, records, found, moment)


def folder_of(key: str) -> str:
    """The key up to its last slash."""
    return key[: key.rfind("/") + 1]
