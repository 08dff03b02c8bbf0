"""The gap map: which windows a destination holds, from its own listing beside what was confirmed.

Invariant: a cell is decided from the listing; a record only says what should be there, so an object that somebody took
away or changed shows although the checkpoints believe in it.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import Enum
from typing import Protocol

from app.core.pipeline import Record
from app.core.windows import Age, Window, age_of


class CellState(Enum):
    """EMPTY: nothing was to be written. STALE: not the version that was confirmed. PARTIAL: some objects are gone.

    OPEN: not finished yet, so that what is there may still change. WAITING: due, and a coming run writes it.
    MISSING also: overdue, and not written yet.
    """

    EMPTY = "empty"
    MISSING = "missing"
    PARTIAL = "partial"
    STALE = "stale"
    EQUAL = "equal"
    OPEN = "open"
    WAITING = "waiting"


@dataclass(frozen=True, slots=True)
class Found:
    """One object in a listing: the start of the window that it is named by, and its version."""

    window_start: datetime
    key: str
    version: str


@dataclass(frozen=True, slots=True)
class Cell:
    """One window of a partition on the map."""

    window: Window
    state: CellState
    rows: int
    objects: int


class Chart(Protocol):
    """What the gap map asks of a pipeline. Raises AppError. From any thread."""

    def partitions(self) -> Sequence[str]:
        """Every partition that has a checkpoint, sorted."""

    def cells(self, partition: str, span: Window) -> Sequence[Cell]:
        """Every window of `span` up to now, oldest first, from a listing of the destination made in this call."""


@dataclass(frozen=True, slots=True)
class Moment:
    """When the map is made, how long windows take late rows, and up to where the partition is finished.

    A window is overdue when it was due for `overdue_seconds` and nothing of it was written.
    """

    now: datetime
    grace_seconds: float
    cursor_at: datetime | None = None
    overdue_seconds: float = 0.0


def cells_of(
    windows: Iterable[Window], records: Sequence[Record], found: Iterable[Found], at: Moment
) -> Sequence[Cell]:
    """A cell per window. `records` are those of the windows; `found` may hold objects of other windows too."""
    expected: dict[datetime, list[Record]] = {}
    for record in records:
        expected.setdefault(record.window.start, []).append(record)
    there: dict[datetime, dict[str, str]] = {}
    for each in found:
        there.setdefault(each.window_start, {})[each.key] = each.version
    return [_cell(w, expected.get(w.start, ()), there.get(w.start, {}), at) for w in windows if w.start < at.now]


def _cell(window: Window, records: Sequence[Record], there: Mapping[str, str], at: Moment) -> Cell:
    rows = sum(record.rows for record in records)
    return Cell(window, _state(window, [r for r in records if r.version], there, at), rows, len(there))


def _state(window: Window, records: Sequence[Record], there: Mapping[str, str], at: Moment) -> CellState:
    if at.cursor_at is None or window.end > at.cursor_at:
        if there or not (records or age_of(window, at.now, at.grace_seconds) is Age.DUE):
            return CellState.OPEN
        is_overdue = age_of(window, at.now, at.grace_seconds + at.overdue_seconds) is Age.DUE
        return CellState.MISSING if records or is_overdue else CellState.WAITING
    gone = [record for record in records if record.key not in there]
    if gone:
        return CellState.MISSING if len(gone) == len(records) else CellState.PARTIAL
    known = {record.key: record.version for record in records}
    if any(known.get(key) != version for key, version in there.items()):
        return CellState.STALE
    return CellState.EQUAL if records else CellState.EMPTY
