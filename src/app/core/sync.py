"""The one loop: bring each window's object up to what the source holds, then commit.

Order, per window: the object's version first, then the source, then compare-and-swap on that version, then the
transaction. A crash at any line repeats the write onto the same name. Rows that were read before a version was known
are never written over it. Whether a window may be closed is decided from the clock before the source is read.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime
from itertools import count, islice, takewhile
from typing import Any, Generic, TypeVar

from app.core.errors import Conflict, Transient
from app.core.ledger import Ledger, SetAside, Tally
from app.core.ports import ALL_TAGS, UNCOUNTED, Batch, Checkpoints, Commit, Count, Encoded, Held, Record, Sink, Source
from app.core.runs import Context, Report
from app.core.window import Age, Window, age_of

B = TypeVar("B", bound=Batch)
E = TypeVar("E", bound=Encoded)

NOTHING = Count(0, 0)
CONFLICTS = 8
log = logging.getLogger(__name__)


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
    person did to it is seen; such a sink has one object per window, which is replaced also when late rows come.

    `set_aside(partition, window, batch)` keeps what the batch could not take into its rows and says what that was.
    `refused(context, at, live)` takes the rows of a partition that the sink cannot name, and of the partition "".
    `outdated(batch, held)`: rows of the held object cannot be told apart by what tells the batch's rows apart.
    """

    name: str
    source: Source[B]
    sink: Sink[B, E]
    checkpoints: Checkpoints
    grid: Grid
    allow_shrink: bool = False
    asks_sink: bool = False
    kept: dict[tuple[str, datetime], tuple[str, B]] = field(default_factory=dict)
    set_aside: Callable[[str, Window, B], Sequence[SetAside]] | None = None
    refused: "Callable[[Context, Position, Mapping[datetime, Count]], Report] | None" = None
    outdated: Callable[[B, Held], bool] | None = None
    unit: str = "values"

    def keep(self, task: "Task", version: str, batch: B) -> None:
        """Remember the rows of `version`, when building on them pays."""
        if batch.reusable:
            self.kept[task.partition, task.window.start] = (version, batch)

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

    `ahead` gives the rows when they may be read together with those of other windows, after all their records.
    """

    partition: str
    window: Window
    count: Count
    record: Record | None
    final: bool
    ahead: Iterator[Any] | None = None


@dataclass(frozen=True, slots=True)
class Position:
    """Where a partition stands: everything before `cursor_at` is finished. `now` was read before the source was."""

    partition: str
    cursor_at: datetime
    now: datetime


@dataclass(frozen=True, slots=True)
class _Written:
    """The object after a window was settled, and how many bytes had to be stored for it (0 = it was right already)."""

    record: Record | None
    stored_bytes: int = 0
    ledger: Ledger = field(default_factory=Ledger)


Done = Callable[[Report], None]


def sync_partition(
    pipeline: Pipeline[B, E], context: Context, at: Position, live: Mapping[datetime, Count], told: Done | None = None
) -> Report:
    """One step of one partition: its oldest due windows, and when none is left behind, the live ones.

    `live` holds the counts of open and settling windows by start, taken before this call. Raises what the ports raise;
    what was committed before stays, and `told` has heard of it.
    """
    total = Report()

    def done(part: Report) -> None:
        nonlocal total
        total += part
        if told:
            told(part)

    left = dict(live)  # what was counted and is not brought up to date yet
    try:
        due = list(islice(_due(pipeline.grid, at), pipeline.grid.count_windows))
        passed = _close_due(pipeline, context, at.partition, due, left=left, done=done) if due else at.cursor_at
        if due and (passed < due[-1].end or len(due) == pipeline.grid.count_windows):
            done(Report(more=True))
        else:
            _refresh(pipeline, context, replace(at, cursor_at=passed), left, done)
    finally:
        done(Report(ledger=waiting(pipeline.unit, left.values())))
    return total


def waiting(unit: str, counts: Iterable[Count]) -> Ledger:
    """What was counted and is left for a later run."""
    return _counted(unit, counts, "waiting")


def already_there(unit: str, count: Count) -> Ledger:
    """What was counted and is as it was confirmed."""
    return _counted(unit, [count], "already_there")


def _counted(unit: str, counts: Iterable[Count], entry: str) -> Ledger:
    fields: dict[str, int] = {}
    for one in counts:
        for name, number in one.fields.items():
            fields[name] = fields.get(name, 0) + number
    return Ledger(unit, {name: Tally(counted=number, **{entry: number}) for name, number in fields.items()})


def _due(grid: Grid, at: Position) -> Iterator[Window]:
    windows = grid.windows(at.cursor_at, at.now)
    return takewhile(lambda window: age_of(window, at.now, grid.grace_seconds) is Age.DUE, windows)


def _close_due(
    pipeline: Pipeline[B, E],
    context: Context,
    partition: str,
    due: Sequence[Window],
    *,
    left: dict[datetime, Count],
    done: Done,
) -> datetime:
    """Close due windows, oldest first; up to where that went. Runs of empty ones cost one count and one commit."""
    counts = {start: count for (_, start), count in pipeline.source.counts(partition, due).items()}
    left |= counts
    records = _records(pipeline, partition, due)
    work = {w.start: (w, count) for w in due if (count := _to_close(w, records, counts.get(w.start)))}
    ahead = pipeline.source.read_each(partition, list(work.values()))
    passed = committed = due[0].start
    written = 0
    context.progress.advance(total=len(due))
    for window in due:
        context.stop.check()
        if window.start in work:
            if written == pipeline.grid.step_windows:
                break
            task = Task(partition, *work[window.start], records.get(window.start), final=True, ahead=ahead)
            report = settle(pipeline, context, task, moves_cursor=True)
            done(report)
            written += report.windows
            committed = window.end
        elif window.start in counts:
            log.debug("%s %s: %d values counted, closed already", partition, window, counts[window.start].cells)
            done(Report(ledger=already_there(pipeline.unit, counts[window.start])))
        left.pop(window.start, None)
        passed = window.end
        context.progress.advance(done=1)
    if passed > committed and not context.dry_run:
        pipeline.checkpoints.commit(pipeline.name, partition, Commit(cursor_at=passed), context.lease)
    return passed


def _to_close(window: Window, records: Mapping[datetime, Record], count: Count | None) -> Count | None:
    """What to expect in a window that must be settled; None when it is empty or closed."""
    record, expected = records.get(window.start), count or NOTHING
    needed = expected != NOTHING if record is None else not record.closed
    return expected if needed else None


def _refresh(pipeline: Pipeline[B, E], context: Context, at: Position, left: dict[datetime, Count], done: Done) -> None:
    """Bring open and settling windows up to date; one whose count did not move costs nothing."""
    windows = list(pipeline.grid.windows(at.cursor_at, at.now))
    records = _records(pipeline, at.partition, windows) if windows else {}
    for window in windows:
        context.stop.check()
        record, count = records.get(window.start), left.get(window.start, NOTHING)
        if _is_settled(record, count) and not _is_of_older_version(pipeline, record, count):
            log.debug("%s %s: %d values counted, as confirmed: nothing to write", at.partition, window, count.cells)
            done(Report(ledger=already_there(pipeline.unit, count)))
        else:
            done(settle(pipeline, context, Task(at.partition, window, count, record, final=False)))
        left.pop(window.start, None)
    left.clear()  # what is before the cursor was closed earlier


def _is_of_older_version(pipeline: Pipeline[B, E], record: Record | None, count: Count) -> bool:
    """True for an open object that an older version wrote, perhaps without what tells its rows apart: read it once."""
    if pipeline.outdated is None or record is None or count == NOTHING:
        return False
    return not (record.closed or record.fields)


def _is_settled(record: Record | None, count: Count) -> bool:
    if record is None:
        return count == NOTHING
    return record.closed or (count != UNCOUNTED and record.source_cells == count.cells)


def _records(pipeline: Pipeline[B, E], partition: str, windows: Sequence[Window]) -> Mapping[datetime, Record]:
    found = pipeline.checkpoints.records(pipeline.name, partition, windows[0].start, windows[-1].end)
    return {record.window.start: record for record in found if record.part == 0}


def settle(pipeline: Pipeline[B, E], context: Context, task: Task, *, moves_cursor: bool = False) -> Report:
    """Make the window's object equal to the source and commit it, closed when `task.final`. Idempotent."""
    written = _write(pipeline, context, task)
    record = written.record
    if record is not None and task.final:
        record = replace(record, closed=True)
    cursor_at = task.window.end if moves_cursor else None
    if not context.dry_run and (record != task.record or cursor_at):
        commit = Commit((record,) if record else (), cursor_at)
        pipeline.checkpoints.commit(pipeline.name, task.partition, commit, context.lease)
    if not written.stored_bytes or record is None:
        return Report(ledger=written.ledger)
    context.progress.advance(rows=record.rows)
    return Report(rows=record.rows, bytes=written.stored_bytes, windows=1, ledger=written.ledger)


def _write(pipeline: Pipeline[B, E], context: Context, task: Task) -> _Written:
    """Version, source, compare-and-swap; after a conflict all three again. Raises Transient when it never settles."""
    key = pipeline.sink.key(task.partition, task.window, 0)
    held = _known(pipeline, task, key)
    for _ in range(CONFLICTS):
        context.stop.check()
        try:
            with _reading(pipeline, task, held) as batch:
                if batch.rows == 0 if held is None else batch.digest == held.digest:
                    written = _unchanged(pipeline, task, key, held, batch)
                else:
                    written = _store(pipeline, context, task, held, batch)
                log.debug(
                    "%s: %d values counted, %d rows read, %s",
                    key,
                    task.count.cells,
                    batch.rows,
                    f"{written.stored_bytes} bytes written" if written.stored_bytes else "nothing to write",
                )
                return replace(written, ledger=_account(pipeline, context, task, batch, written))
        except Conflict:
            held = pipeline.sink.head(key)
            task = replace(task, ahead=None)  # those rows are older than the version that is there now
            if task.record is None and _has_outdated_delta(pipeline, task):
                task = replace(task, count=replace(task.count, cells=UNCOUNTED.cells))  # reconcile looks at it again
    raise Transient(
        f"{key}: changed {CONFLICTS} times while it was being replaced",
        "another writer uses the same bucket and prefix: give each Headwater its own S3_PREFIX, or one PostgreSQL",
    )


def _known(pipeline: Pipeline[B, E], task: Task, key: str) -> Held | None:
    """The object as it is known before the source is read."""
    if pipeline.asks_sink:
        return pipeline.sink.head(key)
    return task.record.held if task.record else None


def _unchanged(pipeline: Pipeline[B, E], task: Task, key: str, held: Held | None, batch: B) -> _Written:
    """Nothing to store. An object that is closed unwritten must still be the one that was confirmed: else Conflict."""
    if held is None:
        return _Written(None)
    if task.final:
        there = pipeline.sink.head(key)
        if there is None or there.version != held.version:
            raise Conflict(f"{key}: is not the version that was confirmed", "nothing to do: it is read again")
    else:
        pipeline.keep(task, held.version, batch)
    return _Written(_record(task, key, held, batch))


def _store(pipeline: Pipeline[B, E], context: Context, task: Task, held: Held | None, batch: B) -> _Written:
    """Encode and swap. A conflict with the same rows is our own lost answer and is adopted; any other is raised."""
    key = pipeline.sink.key(task.partition, task.window, 0)
    with closing(pipeline.sink.encode(task.partition, task.window, batch)) as encoded:
        stored = Held("", size_bytes=encoded.size_bytes)
        if not context.dry_run:
            try:
                version = pipeline.sink.put(key, encoded, held.version if held else None)
            except Conflict:
                there = pipeline.sink.head(key)
                if there is None or there.digest != batch.digest:
                    raise
                version = there.version
            stored = replace(stored, version=version)
            if not task.final:
                pipeline.keep(task, version, batch)
        return _Written(_record(task, key, stored, batch), encoded.size_bytes)


def _account(pipeline: Pipeline[B, E], context: Context, task: Task, batch: B, written: _Written) -> Ledger:
    """What became of the values of the window. What an unchanged object, or its record, holds is not new."""
    before = task.record.fields if task.record else {}
    fields = {}
    for name, tally in batch.accounts.items():
        held = min(before.get(name, 0), tally.new) if written.stored_bytes else tally.new
        moved = replace(tally, new=tally.new - held, already_there=tally.already_there + held) if held else tally
        fields[name] = moved
    aside = pipeline.set_aside(task.partition, task.window, batch) if pipeline.set_aside and not context.dry_run else ()
    return Ledger(pipeline.unit, fields, aside)


def _record(task: Task, key: str, held: Held, batch: Batch) -> Record:
    return Record(
        window=task.window,
        part=0,
        key=key,
        version=held.version,
        digest=batch.digest,
        rows=batch.rows,
        size_bytes=held.size_bytes,
        source_cells=task.count.cells,
        min_at=batch.min_at,
        max_at=batch.max_at,
        closed=False,
        fields={name: tally.new for name, tally in batch.accounts.items()},
    )


@contextmanager
def _reading(pipeline: Pipeline[B, E], task: Task, held: Held | None) -> Iterator[B]:
    """The window's rows, closed at the end unless they were kept; rows that only the sink still has are put back in."""
    kept = pipeline.take(task, held.version if held else "")
    try:
        ahead, source = task.ahead, pipeline.source
        batch = next(ahead) if ahead else source.read(task.partition, task.window, task.count, kept)
    finally:
        if kept is not None:
            kept.close()
    try:
        if held is not None and not pipeline.allow_shrink and _needs_union(pipeline, task, batch, held):
            batch = _united(pipeline, task, batch, held)
        if held is not None and task.record is None and not pipeline.asks_sink:
            batch = _without_deltas(pipeline, task, batch)
        yield batch
    finally:
        if not pipeline.keeps(batch):
            batch.close()


def _needs_union(pipeline: Pipeline[B, E], task: Task, batch: B, held: Held) -> bool:
    """True when the held object may have rows that the source no longer returns."""
    if _shrank(batch, held):
        key = pipeline.sink.key(task.partition, task.window, 0)
        log.warning(
            "%s holds rows that the source no longer returns (%s held, %d read): kept", key, held.rows, batch.rows
        )
        return True
    # An older version made one row of several, so their number says nothing.
    return pipeline.outdated is not None and pipeline.outdated(batch, held)


def _has_outdated_delta(pipeline: Pipeline[B, E], task: Task) -> bool:
    """True when the first delta is of an older version; one that is left empty is not, nor are those after it."""
    there = pipeline.sink.head(pipeline.sink.key(task.partition, task.window, 1)) if pipeline.outdated else None
    return there is not None and there.tags != ALL_TAGS


def _shrank(batch: Batch, held: Held) -> bool:
    """True when rows of the held object are certainly gone from the source."""
    if held.rows is not None and batch.rows < held.rows:
        return True
    if batch.min_at is None or batch.max_at is None:
        return False
    earlier = held.min_at is not None and held.min_at < batch.min_at
    return earlier or (held.max_at is not None and held.max_at > batch.max_at)


def _united(pipeline: Pipeline[B, E], task: Task, batch: B, held: Held) -> B:
    key = pipeline.sink.key(task.partition, task.window, 0)
    with closing(batch):
        return pipeline.source.union(batch, pipeline.sink.read(key, held.version))


def _without_deltas(pipeline: Pipeline[B, E], task: Task, batch: B) -> B:
    """An object that no record knows was written before the state was lost, and may have deltas: leave theirs out."""
    for part in count(1):
        key = pipeline.sink.key(task.partition, task.window, part)
        there = pipeline.sink.head(key)
        if there is None:
            break
        with closing(batch):
            batch = pipeline.source.missing(batch, pipeline.sink.read(key, there.version))
    return batch
