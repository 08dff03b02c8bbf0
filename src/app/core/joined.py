"""A pipeline as a value: one source joined to one sink, its windows, and one window as a task."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from app.core.known_rows import KnownRows
from app.core.ledger import SetAside
from app.core.ports import Batch, Checkpoints, Count, Deltas, Encoded, Record, Sink, Source
from app.core.shrink import Shrink
from app.core.window import Window

if TYPE_CHECKING:
    from app.core.runs import Context, Report

B = TypeVar("B", bound=Batch)
E = TypeVar("E", bound=Encoded)


NOTHING = Count(0, 0)


@dataclass(frozen=True, slots=True)
class Grid:
    """The windows of a pipeline. `windows(start, end)` gives every window that overlaps the interval, oldest first.

    One step of a partition counts at most `count_windows` and writes at most `step_windows`, so that partitions take
    turns however long the backlog is.
    """

    windows: Callable[[datetime, datetime], Iterator[Window]]
    grace_seconds: float
    step_windows: int = 24
    count_windows: int = 744


@dataclass(frozen=True, slots=True)
class Pipeline(Generic[B, E]):
    """One source joined to one sink, named once.

    `kept` is what this process last wrote, as (version, batch) by partition and window start: a memory that may be lost
    at any time. A kept batch belongs to the pipeline; every other one is closed by who read it.

    `asks_sink`: what a window's object is at is asked of the sink before each read, not of the records, so that what a
    person did to it is seen. `by_digest`: the sink's own digest is the checkpoint: an object with the same digest is
    never written again, and rows are united only where some are certainly gone from the source. `deltas`: those of
    older versions, which are folded into their window's object. `shrink`: which rows that only the object has may go,
    asked after the source was read; None: all stay.

    `set_aside(partition, window, batch)` keeps what the batch could not take into its rows and says what that was.
    `refused(context, at, live)` takes the rows of a partition that the sink cannot name, and of the partition "".
    """

    name: str
    source: Source[B]
    sink: Sink[B, E]
    checkpoints: Checkpoints
    grid: Grid
    shrink: Callable[[], Shrink] | None = None
    asks_sink: bool = False
    by_digest: bool = False
    deltas: Deltas[E] | None = None
    identities: KnownRows = field(default_factory=KnownRows)
    kept: dict[tuple[str, datetime], tuple[str, B]] = field(default_factory=dict)
    set_aside: Callable[[str, Window, B], Sequence[SetAside]] | None = None
    refused: "Callable[[Context, Position, Mapping[datetime, Count]], Report] | None" = None
    unit: str = "values"

    def keep(self, task: "Task", version: str, batch: B) -> None:
        """Remember which rows `version` has, while its window is open, and the rows themselves when that pays."""
        slot = (task.partition, task.window.start)
        self.identities.keep(slot, version, None if task.final or self.by_digest else batch.identities)
        if batch.reusable and not task.final:
            self.kept[slot] = (version, batch)

    def keeps(self, batch: B) -> bool:
        """True when `batch` belongs to the pipeline."""
        return any(batch is mine for _, mine in list(self.kept.values()))

    def take(self, task: "Task", version: str) -> B | None:
        """Hand over the rows that this process wrote as `version`; any other memory of the window is dropped."""
        known, batch = self.kept.pop((task.partition, task.window.start), ("", None))
        if batch is None or (known == version and not task.final):
            return batch
        batch.close()
        return None


@dataclass(frozen=True, slots=True)
class Task:
    """One window to bring up to date. `count` was taken before; `record` is what is confirmed so far.

    `asks`: the destination is asked what it holds, deltas of older versions included, whatever the record says.
    `mends`: what another program put in the place of a delta goes. `replaces`: the object itself is not what was
    confirmed, and none of its rows is kept. `always_writes`: the object is put also where it is right.
    `ahead` gives the rows when they may be read together with those of other windows, after all their records.
    """

    partition: str
    window: Window
    count: Count
    record: Record | None
    final: bool
    ahead: Iterator[Any] | None = None
    asks: bool = False
    mends: bool = False
    replaces: bool = False
    always_writes: bool = False


@dataclass(frozen=True, slots=True)
class Position:
    """Where a partition stands: everything before `cursor_at` is finished. `now` was read before the source was."""

    partition: str
    cursor_at: datetime
    now: datetime
