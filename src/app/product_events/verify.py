"""Both ends of a pull: which hours are compared, and how an object is read; and the gap map.

Invariant: an object is downloaded whole before it is read, so that what goes wrong inside is its own fault.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from shutil import copyfileobj
from tempfile import TemporaryFile
from typing import BinaryIO, cast

from app.core.errors import Permanent, Transient
from app.core.verify import NOTHING, Cell, Content, Moment, Slot
from app.core.windows import DAY_SECONDS, Window, floor_to, windows_between
from app.object_store.port import ObjectInfo
from app.product_events.pull import HOUR_SECONDS, PullContext
from app.product_events.raw_objects import There, folder_of, raw_cells

DAMAGED = "heal the window: the object is written again from what the service gives"
LOST = "heal the window: its events are loaded again"


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
    with TemporaryFile(dir=pull.spool) as spooled:
        with pull.store.open(info.key, info.etag) as stream:
            if stream is None:
                raise Transient(f"{info.key} went away while it was read", "verify again")
            copyfileobj(stream, spooled, 1 << 18)
        spooled.seek(0)
        yield cast("BinaryIO", spooled)


@contextmanager
def damage(key: str, broken: tuple[type[Exception], ...]) -> Iterator[None]:
    """What is `broken` while an object is read is Permanent: it is damaged."""
    try:
        yield
    except broken as error:
        what = error.message if isinstance(error, Transient) else error
        raise Permanent(f"{key} is damaged: {what}", DAMAGED) from error


def refuse_lost(key: str, lacking: int, rows: int) -> None:
    """Raise Permanent when the warehouse lacks some of the events of an object."""
    if lacking:
        raise Permanent(f"{lacking} of {rows} events of {key} are not in the warehouse", LOST)


def found_at(key: str, info: ObjectInfo | None, read: Callable[[ObjectInfo], Content]) -> There:
    """What is under a key; its content is None when it cannot be read."""
    if info is None:
        return There(key, "", NOTHING)
    try:
        return There(key, info.etag, read(info))
    except Permanent:
        return There(key, info.etag, None)


def covers(partition: str, span: Window, slot: Slot) -> bool:
    """Whether what was given for that span of a partition has this hour."""
    return slot.partition == partition and span.start <= slot.window.start < span.end


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
        at = moment_of(self.pull, partition)
        return raw_cells(
            self.pull.checkpoints,
            self.pull.store,
            windows_between(span.start, min(span.end, at.now), HOUR_SECONDS),
            at,
            pipeline=self.pull.name,
            partition=partition,
            key=partial(self.key, partition),
            folder=folder_of,
            by_line=True,
        )


def moment_of(pull: PullContext, partition: str) -> Moment:
    """Now, and how far a partition is."""
    cursor_at = pull.checkpoints.cursors(pull.name).get(partition)
    due, overdue = pull.due_after.total_seconds(), pull.overdue_after.total_seconds()
    return Moment(pull.clock(), due, cursor_at, overdue)
