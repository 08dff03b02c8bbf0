"""Both ends of a pull: which hours are compared, how an object is read and mended; and the gap map.

Invariants: an object is downloaded whole before it is read, so that what goes wrong inside is its own fault. In the
gap map only keys of its windows count, whatever else lies beside them; a window that could not be had is MISSING, since
its record names a version that no object has; one that lines were set aside of is PARTIAL.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from functools import partial
from shutil import copyfileobj
from typing import BinaryIO

from app.core.errors import Permanent, Transient
from app.core.files import temporary_file
from app.core.pipeline import Record
from app.core.repair import GONE_HINT
from app.core.verify import NOTHING, Cell, CellState, Content, Found, Moment, Slot, cells_of
from app.core.windows import DAY_SECONDS, HOUR_SECONDS, Window, floor_to, windows_between
from app.object_store.port import ObjectInfo
from app.product_events.pull import PullContext


def ended_hours(pull: PullContext, span: Window) -> Sequence[Window]:
    """The hours of a span that can be asked for."""
    end = floor_to(min(span.end, pull.due_at), HOUR_SECONDS)
    return list(windows_between(span.start, end, HOUR_SECONDS))


def rest_of_day(hour: Window, until: datetime) -> Window:
    """What is asked for together with an hour: its day from there on, up to `until`."""
    midnight = floor_to(hour.start, DAY_SECONDS) + timedelta(days=1)
    return Window(hour.start, max(hour.end, min(midnight, until)))


@contextmanager
def downloaded(pull: PullContext, info: ObjectInfo) -> Iterator[BinaryIO]:
    """That version of an object in a file. Raises Conflict when it is another version, Transient when it is gone."""
    with temporary_file(pull.spool) as spooled:
        with pull.store.open(info.key, info.etag) as stream:
            if stream is None:
                raise Transient(f"{info.key} went away while it was read", "verify again")
            copyfileobj(stream, spooled, 1 << 18)
        spooled.seek(0)
        yield spooled


@contextmanager
def damage(key: str, broken: tuple[type[Exception], ...]) -> Iterator[None]:
    """What is `broken` while an object is read is Permanent: it is damaged."""
    try:
        yield
    except broken as error:
        what = error.message if isinstance(error, Transient) else error
        hint = "heal the window: the object is written again from what the service gives"
        raise Permanent(f"{key} is damaged: {what}", hint) from error


def refuse_lost(key: str, lacking: int, rows: int) -> None:
    """Raise Permanent when the warehouse lacks some of the events of an object."""
    if lacking:
        hint = "heal the window: its events are loaded again"
        raise Permanent(f"{lacking} of {rows} events of {key} are not in the warehouse", hint)


@dataclass(frozen=True, slots=True)
class ObjectFound:
    """An object as it was found before the service was asked: its version ("" = none), and what it holds (None = it
    cannot be read).
    """

    key: str
    version: str
    content: Content | None

    def stays(self, given: Content, record: Record | None) -> bool:
        """Whether it stays as it is, since the service, which gives this now, no longer has all of it.

        Raises Permanent when it is damaged or foreign and the service has no rows to put in its place.
        """
        if self.content == given:
            return False
        is_confirmed = record is not None and self.version != "" and self.version == record.version
        # What was confirmed and has more rows is from before the service forgot some of them.
        if is_confirmed and self.content is not None and self.content.rows > given.rows:
            return True
        if not given.rows:
            raise Permanent(f"{self.key}: was changed, and the service has no rows of it", GONE_HINT)
        return False

    def over(self, given: Content) -> str | None:
        """The version to store over, for `store_rows`; None where the same rows are there already."""
        return None if self.content == given else self.version


def object_found(key: str, info: ObjectInfo | None, read: Callable[[ObjectInfo], Content]) -> ObjectFound:
    """What is under a key."""
    if info is None:
        return ObjectFound(key, "", NOTHING)
    try:
        return ObjectFound(key, info.etag, read(info))
    except Permanent:
        return ObjectFound(key, info.etag, None)


def covers(partition: str, span: Window, slot: Slot) -> bool:
    """Whether what was given for that span of a partition has this hour."""
    return slot.partition == partition and span.start <= slot.window.start < span.end


def folder_of(key: str) -> str:
    """The key up to its last slash."""
    return key[: key.rfind("/") + 1]


@dataclass(frozen=True, slots=True)
class PullChart:
    """`app.core.verify.Chart` over a pull: a line of hours for each partition, whose objects `key` names."""

    pull: PullContext
    key: Callable[[str, Window], str]

    def partitions(self) -> Sequence[str]:
        """See `Chart.partitions`."""
        return sorted(self.pull.checkpoints.cursors(self.pull.name))

    def cells(self, partition: str, span: Window) -> Sequence[Cell]:
        """See `Chart.cells`: one listing per day."""
        hours = windows_between(span.start, min(span.end, self.pull.clock()), HOUR_SECONDS)
        return pull_cells(self.pull, partition, hours, key=partial(self.key, partition), folder=folder_of, by_line=True)


def pull_cells(
    pull: PullContext,
    partition: str,
    windows: Iterable[Window],
    *,
    key: Callable[[Window], str],
    pipeline: str = "",
    folder: Callable[[str], str] = str,
    by_line: bool = False,
) -> Sequence[Cell]:
    """A cell per window that has begun. `key`: the object of a window; `folder`: the prefix under which to list it.

    One listing per folder. `by_line`: `source_cells` of the records counts the lines, of which `rows` landed.
    """
    cursor_at = pull.checkpoints.cursors(pull.name).get(partition)
    at = Moment(pull.clock(), pull.due_after.total_seconds(), cursor_at, pull.overdue_after.total_seconds())
    begun = [window for window in windows if window.start < at.now]
    if not begun:
        return ()
    keys = {key(window): window.start for window in begun}
    listed = (info for each in sorted(set(map(folder, keys))) for info in pull.store.list(each))
    found = [Found(keys[info.key], info.key, info.etag) for info in listed if info.key in keys]
    records = pull.checkpoints.records(pipeline or pull.name, partition, begun[0].start, begun[-1].end)
    # Lines that were set aside are counted at the source and are in no object.
    lacking = {record.window.start for record in records if by_line and record.source_cells > record.rows}
    return [
        replace(cell, state=CellState.PARTIAL)
        if cell.state in (CellState.EQUAL, CellState.EMPTY) and cell.window.start in lacking
        else cell
        for cell in cells_of(begun, records, found, at)
    ]
