"""A pipeline as a value: its ports, what is known of a window, and which rows may be removed from an object.

A source yields batches, a sink holds one object per window, checkpoints remember what was confirmed. Each port method
is a contract that every implementation keeps and one conformance suite checks. Invariant: a row that the source's
retention may have dropped is never removed, whatever is allowed.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from operator import add
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from app.core.ledger import SetAside, Tally
from app.core.runs import VALUES, Lease
from app.core.windows import Window

if TYPE_CHECKING:
    from app.core.runs import Context, Report

EARLIEST, LATEST = datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC)
UNLIMITED = timedelta.max
EXAMPLES = 20
LARGE_AT_ONCE = 2


@dataclass(slots=True)
class Shrink:
    """One merge that may leave rows out. `since`: a row from this time on that the source lacks was deleted there.

    If `removes` is false, such rows stay and are only reported. `rows` and `examples` are what was found.
    """

    since: datetime = EARLIEST
    removes: bool = True
    rows: int = 0
    examples: list[str] = field(default_factory=list)

    def note(self, rows: int, examples: Iterable[str]) -> None:
        """Record that this many rows of the object are no longer at the source, with some of them as text."""
        self.rows += rows
        self.examples += list(examples)[: EXAMPLES - len(self.examples)]

    def told(self, key: str, *, dry_run: bool) -> str:
        """One line that says what happens to these rows."""
        one = self.rows == 1
        verb = "would be removed" if dry_run else "was removed" if one else "were removed"
        if not self.removes:
            verb = f"{'stays' if one else 'stay'}, since --allow-shrink was not given"
        rows = f"{self.rows} {'row' if one else 'rows'} that the source no longer has"
        more = f" and {self.rows - len(self.examples)} more" if self.rows > len(self.examples) else ""
        return f"{key}: {rows} {verb}: {'; '.join(self.examples)}{more}"


def covered_since(now: datetime, retention: timedelta | None, oldest_at: datetime | None) -> datetime:
    """The time from which the source has every row that was not deleted there. `now` must not be before the rows were
    read.

    `retention` UNLIMITED: the source drops nothing by itself. None: it cannot be queried; then everything from the
    oldest point of the measurement that the source still holds, and nothing when it holds none.
    """
    if retention is None:
        return oldest_at or LATEST
    if retention >= now - EARLIEST:
        return EARLIEST
    return now - retention


@dataclass(frozen=True, slots=True)
class Count:
    """What the source reports about a window without returning its rows.

    `cells` counts single values and changes whenever a row is added or removed; `points` is a lower bound for the rows.
    `fields`: values by field, if the source has fields and the window will be read.
    """

    cells: int
    points: int
    fields: Mapping[str, int] = field(default_factory=dict, compare=False)


@dataclass(frozen=True, slots=True)
class Sums:
    """The number of values of one field; for numbers also sum, minimum and maximum, which are None otherwise.

    `magnitude`: the sum of the absolute values. It bounds how far two sums of the same numbers, added in different
    order, may differ. It is computed here, not by the source.
    """

    values: int = 0
    total: float | None = None
    least: float | None = None
    greatest: float | None = None
    magnitude: float = 0.0

    def __add__(self, other: "Sums") -> "Sums":
        def both(one: float | None, two: float | None, join: Callable[[float, float], float]) -> float | None:
            return two if one is None else one if two is None else join(one, two)

        return Sums(
            self.values + other.values,
            both(self.total, other.total, add),
            both(self.least, other.least, min),
            both(self.greatest, other.greatest, max),
            self.magnitude + other.magnitude,
        )


UNCOUNTED = Count(-1, 0)
"""Counting at the source costs as much as reading: read the rows and compare them."""


class Batch(Protocol):
    """All rows of one partition and window, in one canonical order, spooled so that memory stays bounded."""

    @property
    def rows(self) -> int:
        """Number of rows."""

    @property
    def digest(self) -> str:
        """Equal for equal rows, however they were read. Hex."""

    @property
    def min_at(self) -> datetime | None:
        """Oldest event time, None when empty."""

    @property
    def max_at(self) -> datetime | None:
        """Newest event time, None when empty."""

    @property
    def reusable(self) -> bool:
        """True when a later read of the same window may extend these rows instead of reading them again."""

    @property
    def accounts(self) -> Mapping[str, Tally]:
        """By field, what was counted and read at the source for these rows; `new` is the part that the rows hold.

        After a merge: what is new, already there and corrected compared with the other rows. Empty if the pipeline
        keeps its ledger itself.
        """

    @property
    def sums(self) -> Mapping[str, Sums]:
        """By field, sums of the values read at the source. Empty if the source cannot sum them."""

    @property
    def new_rows(self) -> int:
        """After a merge: rows that only the source has. Otherwise all rows."""

    @property
    def corrected_rows(self) -> int:
        """After a merge: rows that were there with other or fewer values. Otherwise 0."""

    @property
    def identities(self) -> Any:
        """The argument for `holds_all` of a later batch: 8 bytes a row; None if not kept."""

    def holds_all(self, identities: Any) -> bool:
        """True when each of these identities has a row in this batch."""

    def close(self) -> None:
        """Free the spooled rows. Idempotent."""


class Encoded(Protocol):
    """A batch as the bytes that the sink will store, in a temporary file."""

    @property
    def write(self) -> str:
        """A unique id of this write, so that no two writes share a version; "" if the object carries none."""

    @property
    def size_bytes(self) -> int:
        """Size of the object."""

    def close(self) -> None:
        """Remove the temporary file. Idempotent."""


ALL_TAGS, SOME_TAGS = "all", "some"
MISSING, FOREIGN = "missing", "foreign"


@dataclass(frozen=True, slots=True)
class ObjectState:
    """The object under a window's name: its version, and what its writer noted ("" and None if unknown).

    `tags`: ALL_TAGS when its rows have every tag that tells rows apart; SOME_TAGS when some rows lost tags in an older
    version; "" when an older version wrote it. `write` identifies the write that made this version; `folded` is the
    highest delta whose rows it holds.
    """

    version: str
    digest: str = ""
    rows: int | None = None
    min_at: datetime | None = None
    max_at: datetime | None = None
    size_bytes: int = 0
    tags: str = ALL_TAGS
    write: str = ""
    folded: int = 0


@dataclass(frozen=True, slots=True)
class Record:
    """What was confirmed about the object of one window. `part` 0 is the object itself, 1 and up are deltas of late
    rows, which older versions wrote.

    `source_cells` was counted before the rows were read, so a difference always means that there is something to read.
    `fields`: by field, how many source values the object holds. `source_digest` covers the rows that the source
    returned; `digest` covers the object, which may hold rows that the source no longer has. Both are empty in a record
    of an older version. `sums`: sums of the source's values when the window was closed. `folded`: see `ObjectState`.

    `trouble`: what the last listing showed instead of the object, MISSING (nothing) or FOREIGN (a version that
    Headwater did not write); "" if all is well. `written_at`: when this was confirmed.
    """

    window: Window
    part: int
    key: str
    version: str
    digest: str
    rows: int
    size_bytes: int
    source_cells: int
    min_at: datetime | None
    max_at: datetime | None
    closed: bool
    fields: Mapping[str, int] = field(default_factory=dict)
    source_digest: str = ""
    sums: Mapping[str, Sums] = field(default_factory=dict)
    trouble: str = ""
    folded: int = 0
    written_at: datetime | None = field(default=None, compare=False)

    @property
    def held(self) -> ObjectState:
        """The object as this record knows it."""
        return ObjectState(
            self.version, self.digest, self.rows, self.min_at, self.max_at, self.size_bytes, folded=self.folded
        )


@dataclass(frozen=True, slots=True)
class Commit:
    """What one transaction confirms for a partition: records of objects, and the cursor when windows are finished.

    `folded`: windows whose deltas are now part of the object, so that their records are deleted. `summaries`: facts
    about objects for readers who would otherwise have to read them; see `Pipeline.summarise`.
    """

    records: Sequence[Record] = ()
    cursor_at: datetime | None = None
    folded: Sequence[Window] = ()
    summaries: Sequence[Any] = ()


B = TypeVar("B", bound=Batch)
B_contra = TypeVar("B_contra", bound=Batch, contravariant=True)
E = TypeVar("E", bound=Encoded)


class Source(Protocol[B]):
    """Where rows come from. Reading is always safe to repeat. Raises Transient, Permanent or Rejected."""

    def partitions(self, since: datetime) -> Sequence[str]:
        """Every partition that may have rows at or after `since`; each once, sorted."""

    def counts(self, partition: str | None, windows: Sequence[Window]) -> Mapping[tuple[str, datetime], Count]:
        """Counts by (partition, window start); absent = no rows. For one partition, or all when it is None.

        UNCOUNTED for every window if the source cannot count.
        """

    def read(self, partition: str, window: Window, count: Count, kept: B | None) -> B:
        """All rows of the window, or an error; never only some of them. `count` was taken before this call.

        `kept` is what this process last wrote as exactly the version to be replaced, otherwise None.
        """

    def read_each(self, counted: Sequence[tuple[str, Window, Count]]) -> Iterator[B | None]:
        """One batch per partition and window, in this order, equal to what `read` returns but with fewer queries; None
        for one that has to be read alone.

        Rows may be read before their batch is taken, so versions must be known before the first batch is taken.
        """

    def union(self, batch: B, held: Sequence[Iterable[Any]], shrink: Shrink | None) -> B:
        """`batch` plus the rows of `held` whose key it lacks; if several have a key, the first one's row. Rows that
        `shrink` covers are reported to it, and left out if it removes them.

        The accounts of the result say what of `batch` is new, already there or corrected compared with `held`. Closes
        neither; the caller closes the result.
        """


class Sink(Protocol[B_contra, E]):
    """Where rows are written: one object per partition, window and part, replaced only by compare-and-swap on its
    version.
    """

    def key(self, partition: str, window: Window, part: int) -> str:
        """The object's name, derived from the arguments alone. Raises Rejected when the partition cannot be named."""

    def head(self, key: str) -> ObjectState | None:
        """The current state of the object; None when there is none."""

    def read(self, key: str, version: str) -> Iterable[Any]:
        """The rows of exactly that version, in order, in the form that the source's `union` takes. Raises Conflict."""

    def encode(self, partition: str, window: Window, batch: B_contra, *, summarises: bool = True) -> E:
        """The batch as bytes in a temporary file. The caller closes it. `summarises`: with what `summarise` needs."""

    def put(self, key: str, encoded: E, expected: str | None, *, closing: bool = False) -> str:
        """Store under `key` if its version is still `expected` (None: if it does not exist); returns the new version. A
        `closing` write is for a past window, which is not expected to change again.

        All or nothing. Raises Conflict when the version differs, even if that is our own write whose response was lost.
        """


Objects = Mapping[int, tuple[str, str]]
"""One window's objects in a listing: part -> key and version."""


class Deltas(Protocol[E]):
    """Additional objects of a window that older versions wrote for late rows. Nothing writes them any more."""

    def objects(self, partition: str, windows: Sequence[Window]) -> Mapping[datetime, Objects]:
        """All existing objects by window start, deltas or not, from one listing per day made in this call."""

    def noted(self, encoded: E, folded: int) -> E:
        """`encoded` with metadata saying that it holds the rows of all deltas up to part `folded`."""

    def delete(self, key: str) -> None:
        """Delete a delta whose rows are in the window's object. Does nothing when it is gone."""


class Checkpoints(Protocol):
    """What is confirmed. Each commit is one transaction, refused with LeaseLost when the lease is no longer ours."""

    def cursors(self, pipeline: str) -> Mapping[str, datetime]:
        """Partition -> time before which everything is finished."""

    def starts(self, pipeline: str) -> Mapping[str, datetime]:
        """Partition -> the first cursor ever committed; nothing before it was requested."""

    def records(self, pipeline: str, partition: str, since: datetime, until: datetime) -> Sequence[Record]:
        """Records of windows that start in `[since, until)`, by window start, then part."""

    def live_records(
        self, pipeline: str, since: datetime, partitions: Sequence[str] | None = None
    ) -> Mapping[str, Sequence[Record]]:
        """`records` of windows that start at or after `since`, of these partitions or of all, in one query."""

    def commit(self, pipeline: str, partition: str, commit: Commit, lease: Lease) -> None:
        """Store records (insert or replace) and cursor together. Idempotent. Clears the partition's error."""

    def commit_all(self, pipeline: str, commits: Sequence[tuple[str, Commit]], lease: Lease) -> None:
        """`commit` for many (partition, commit) pairs, in this order, in one transaction."""

    def fail(self, pipeline: str, partition: str, message: str, lease: Lease) -> None:
        """Record why the partition failed; its cursor stays."""

    def mark(self, pipeline: str, partition: str, troubles: Sequence[tuple[Record, str]]) -> None:
        """Record what a listing showed of recorded objects: see `Record.trouble`. Needs no lease.

        A record that names another version by now is left alone. Storing the record again clears its trouble.
        """

    def note_undeleted(self, pipeline: str, key: str, error: str) -> None:
        """Record why an object could not be deleted; "" when it is gone. Needs no lease."""


class WrittenRows(Generic[B]):
    """What this process wrote into the objects of open windows, as far as it remembers: the identities of the rows, and
    the rows themselves when they are `reusable`. A cache that may be lost at any time. Thread-safe.

    Identities are bounded: those written longest ago are dropped first. It owns the batches that it remembers; whoever
    read any other batch closes it.
    """

    def __init__(self, max_bytes: int = 48 << 20) -> None:
        self._max_bytes = max_bytes
        self._size_bytes = 0
        self._identities: OrderedDict[tuple[str, datetime], tuple[str, Any]] = OrderedDict()
        self._batches: dict[tuple[str, datetime], tuple[str, B]] = {}
        self._lock = threading.Lock()

    def keep(self, task: "WindowTask", version: str, batch: B) -> None:
        """Remember that the window's object has these rows in this version; forget it when the window was closed."""
        slot, identities = (task.partition, task.window.start), None if task.final else batch.identities
        with self._lock:
            self._forget_identities(slot)
            if identities is not None:
                self._identities[slot] = (version, identities)
                self._size_bytes += getattr(identities, "nbytes", 0)
                while self._size_bytes > self._max_bytes:
                    self._forget_identities(next(iter(self._identities)))
            if batch.reusable and not task.final:
                self._batches[slot] = (version, batch)

    def _forget_identities(self, slot: tuple[str, datetime]) -> None:
        _, identities = self._identities.pop(slot, ("", None))
        self._size_bytes -= getattr(identities, "nbytes", 0)

    def owns(self, batch: B) -> bool:
        """True for a batch that is remembered: the caller must not close it."""
        return any(batch is mine for _, mine in list(self._batches.values()))

    def take(self, task: "WindowTask", version: str) -> B | None:
        """Hand over the rows that were written as `version`; any other rows of the window are dropped."""
        known, batch = self._batches.pop((task.partition, task.window.start), ("", None))
        if batch is None or (known == version and not task.final):
            return batch
        batch.close()
        return None

    def identities(self, task: "WindowTask", version: str) -> Any:
        """The identities of the rows of exactly that version, None when unknown."""
        # No lock needed: a dict lookup is atomic, and unknown rows are read again.
        known, identities = self._identities.get((task.partition, task.window.start), ("", None))
        return identities if known == version else None

    def drop_before(self, start: datetime) -> None:
        """Drop the rows of windows that start earlier. No open window does, and another process may have closed these:
        then nobody takes them any more.
        """
        for slot in [slot for slot in list(self._batches) if slot[1] < start]:
            _, batch = self._batches.pop(slot, ("", None))
            if batch is not None:
                batch.close()


NOTHING = Count(0, 0)

# A source that answers but returns no rows may be the wrong one: it never returned any for NEVER_AFTER, or none for
# QUIET_AFTER after USUAL_HOURS hours with rows (half a week).
NEVER_AFTER, QUIET_AFTER = timedelta(days=1), timedelta(days=3)
USUAL_HOURS = 84


@dataclass(frozen=True, slots=True)
class Grid:
    """The windows of a pipeline. `windows(start, end)` gives every window that overlaps the interval, oldest first.

    One step of a partition counts at most `count_windows` and writes at most `step_windows`, so that partitions take
    turns even with a long backlog. An open window's object is rewritten at most every `rewrite_seconds`; closing does
    not wait for that.
    """

    windows: Callable[[datetime, datetime], Iterator[Window]]
    grace_seconds: float
    step_windows: int = 24
    count_windows: int = 744
    rewrite_seconds: float = 0.0

    def window_at(self, instant: datetime) -> Window:
        """The window that contains `instant`."""
        return next(self.windows(instant, instant + datetime.resolution))


@dataclass(frozen=True, slots=True)
class Pipeline(Generic[B, E]):
    """One source joined to one sink, under one name.

    `by_digest`: the sink's own digest is the checkpoint. Before each read, the window's version comes from the sink
    instead of the records, so that manual changes are noticed; an object with the same digest is never rewritten, and
    one that cannot be read is left to the sink. `deltas`: those of older versions, which are folded into their window's
    object. `shrink`: which rows that only the object has may be removed, called after the source was read; None: all
    stay.

    Windows of more than `large_points` are written LARGE_AT_ONCE at a time, however many partitions are in progress,
    since memory grows with them. `lost_cursor(partition)` derives from the destination where a partition without a
    cursor continues; None = at the first start. `set_aside(partition, window, batch)` stores what the batch could not
    take into its rows and returns what it was. `rewrite_seconds(partitions)`: `Grid.rewrite_seconds` of a pass in which
    that many partitions have rows. `summarise(encoded, key, version)`: what is committed with the record of an object
    just written; for live windows only if `summarises_live()`. `refused(context, at, live)` handles the rows of a
    partition that the sink cannot name, and of the partition "". `is_wanted(partition)`: False for one that the
    settings leave out; its cursor waits.
    """

    name: str
    source: Source[B]
    sink: Sink[B, E]
    checkpoints: Checkpoints
    grid: Grid
    shrink: Callable[[], Shrink] | None = None
    by_digest: bool = False
    deltas: Deltas[E] | None = None
    written: WrittenRows[B] = field(default_factory=WrittenRows)
    large_points: int = 1 << 62
    large_turns: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(LARGE_AT_ONCE))
    lost_cursor: Callable[[str], datetime | None] | None = None
    set_aside: Callable[[str, Window, B], Sequence[SetAside]] | None = None
    refused: "Callable[[Context, Position, Mapping[datetime, Count]], Report] | None" = None
    is_wanted: Callable[[str], bool] = lambda _: True
    unit: str = VALUES
    rewrite_seconds: Callable[[int], float] | None = None
    summarise: Callable[[E, str, str], Sequence[Any]] | None = None
    summarises_live: Callable[[], bool] = lambda: False


@dataclass(frozen=True, slots=True)
class WindowTask:
    """One window to bring up to date. `count` was taken before; `record` is what is confirmed so far.

    `asks`: query the destination for what it holds, including deltas of older versions, whatever the record says.
    `mends`: delete another program's object found in place of a delta. `replaces`: the object is not what was
    confirmed, and none of its rows is kept. `always_writes`: write the object even if it is right. `ahead` yields the
    rows if they may be read together with those of other windows, after all their records.
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
    """The progress of a partition: everything before `cursor_at` is finished. `now` was read before the source was.

    `live_since`: live windows that start earlier were not counted in this pass and are skipped.
    """

    partition: str
    cursor_at: datetime
    now: datetime
    live_since: datetime = EARLIEST
