"""The sync protocol: make each window's object match the source, then commit.

For each window: read the object's version, read the source, compare-and-swap on that version, commit the transaction. A
crash at any point only repeats the write under the same name. Rows read before a version was known never overwrite it.
Whether a window may be closed is decided from the clock before the source is read.

One window, one object: late and corrected rows are merged into the object by identity. The source's row wins, and a row
that only the object has stays. The pass that closes a window writes its object even if unchanged, so that a writer
holding any earlier version gets a conflict. Deltas of older versions are folded into the object and deleted.

A failing window does not block the others of its partition; the cursor stays before it.
"""

import logging
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from datetime import datetime
from itertools import islice, takewhile
from types import MappingProxyType
from typing import Any, Generic, TypeVar

from app.core.errors import Conflict, Permanent, Rejected, Transient
from app.core.ledger import Ledger, SetAside, Tally
from app.core.pipeline import (
    NOTHING,
    UNCOUNTED,
    Batch,
    Commit,
    Count,
    Encoded,
    Grid,
    Objects,
    ObjectState,
    Pipeline,
    Position,
    Record,
    Shrink,
    Source,
    Sums,
    WindowTask,
)
from app.core.runs import Context, Done, Report
from app.core.windows import Age, FailedWindows, Window, age_of

B = TypeVar("B", bound=Batch)
E = TypeVar("E", bound=Encoded)

CONFLICTS = 8
log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Settled(Generic[B]):
    """A window being written: the rows that its object must hold, then the result of the write.

    `source_digest` and `sums` describe what the source returned. `deltas`: keys of deltas whose rows are in the batch
    or already in the object; `folded`: the highest of their parts. `is_united`: the accounts already say what is new
    compared with the object. `is_confirmed`: the source returned what the record has. `shrink`: rows that the source
    lacks.

    `record` describes the object after the write. `stored_bytes`: bytes written (0 = the object was already right).
    `new_rows`: rows that it did not hold before; `corrected_rows`: rows that it held with other values.
    """

    batch: B
    source_digest: str
    sums: Mapping[str, Sums]
    deltas: Sequence[str] = ()
    folded: int = 0
    is_united: bool = False
    is_confirmed: bool = False
    shrink: Shrink | None = None
    record: Record | None = None
    stored_bytes: int = 0
    new_rows: int = 0
    corrected_rows: int = 0
    summaries: Sequence[Any] = ()
    ledger: Ledger = field(default_factory=Ledger)


class ReadTogether(Generic[B]):
    """A live window of many partitions, read with few queries while they take their turns. Thread-safe.

    The versions of their objects are those of the records, which were read before.
    """

    def __init__(self, source: Source[B], counted: Sequence[tuple[str, Window, Count]]) -> None:
        self._coming = {partition for partition, _, _ in counted}
        # It ends early where the source fails as a whole; the rest is read alone then.
        self._read = zip((partition for partition, _, _ in counted), source.read_each(counted), strict=False)
        self._batches: dict[str, B | None] = {}
        self._lock = threading.Lock()

    def batches(self, partition: str) -> Iterator[B | None]:
        """The partition's batch; None if it has to be read alone."""
        with self._lock:
            for name, batch in self._read if partition in self._coming else ():
                self._coming.remove(name)
                self._batches[name] = batch
                if name == partition:
                    break
        yield self._batches.pop(partition, None)


def sync_partition(
    pipeline: Pipeline[B, E],
    context: Context,
    at: Position,
    live: Mapping[datetime, Count],
    done: Done,
    *,
    together: Mapping[datetime, ReadTogether[B]] = MappingProxyType({}),
) -> None:
    """Run one step of one partition: its oldest due windows, then, when none is left, the live ones.

    `live` holds the counts of open and settling windows by start, taken before this call; `together`, by start, what
    reads them with those of other partitions. `done` receives each part as soon as it is committed. Raises what the
    ports raise; an error of one window is raised after the others have been tried.
    """
    left = dict(live)  # counted but not yet up to date
    failed, passed = FailedWindows(), at.cursor_at
    try:
        windows = pipeline.grid.windows(at.cursor_at, at.now)
        past = takewhile(lambda each: age_of(each, at.now, pipeline.grid.grace_seconds) is Age.DUE, windows)
        due = list(islice(past, pipeline.grid.count_windows))
        with failed.one():
            passed = (
                _close_due(pipeline, context, at.partition, due, left=left, done=done, failed=failed) if due else passed
            )
        if due and not failed.first and (passed < due[-1].end or len(due) == pipeline.grid.count_windows):
            done(Report(more=True))
        else:
            failed.go_on()
            at = replace(at, cursor_at=passed)
            _refresh(pipeline, context, at, together=together, left=left, done=done, failed=failed)
        failed.check()
    finally:
        if left:
            done(Report(ledger=ledger_of_counts(pipeline.unit, left.values(), "waiting")))


def ledger_of_counts(unit: str, counts: Iterable[Count], entry: str) -> Ledger:
    """The ledger of counts that all belong to one `entry`: "waiting" for a later run, or "already_there"."""
    fields: dict[str, int] = {}
    for one in counts:
        for name, number in one.fields.items():
            fields[name] = fields.get(name, 0) + number
    return Ledger(unit, {name: Tally(counted=number, **{entry: number}) for name, number in fields.items()})


def _close_due(
    pipeline: Pipeline[B, E],
    context: Context,
    partition: str,
    due: Sequence[Window],
    *,
    left: dict[datetime, Count],
    done: Done,
    failed: FailedWindows,
) -> datetime:
    """Close due windows, oldest first; returns the end of the last one before any failure. A run of empty windows costs
    one count and one commit.
    """
    counts = {start: count for (_, start), count in pipeline.source.counts(partition, due).items()}
    left |= counts
    records = _records(pipeline, partition, due)
    work: dict[datetime, tuple[Window, Count]] = {}
    for window in due:
        record, count = records.get(window.start), counts.get(window.start, NOTHING)
        if count != NOTHING if record is None else not record.closed:
            work[window.start] = window, count
    ahead = pipeline.source.read_each([(partition, *each) for each in work.values()])
    passed = committed = due[0].start
    written = 0
    context.progress.advance(total=len(due))
    for window in due:
        context.stop.check()
        if failed.stops or (window.start in work and written == pipeline.grid.step_windows):
            break
        if window.start in work:
            with failed.one():
                known = None if failed.first else ahead  # after a failure, the iterator is out of step
                task = WindowTask(partition, *work[window.start], records.get(window.start), final=True, ahead=known)
                report = sync_window(pipeline, context, task, moves_cursor=failed.first is None)
                done(report)
                written += report.windows
                committed = window.end
                left.pop(window.start, None)
        elif window.start in counts:
            log.debug("%s %s: %d values counted, closed already", partition, window, counts[window.start].cells)
            done(Report(ledger=ledger_of_counts(pipeline.unit, [left.pop(window.start)], "already_there")))
        passed = passed if failed.first else window.end
        context.progress.advance(done=1)
    if passed > committed and failed.first is None and not context.dry_run:
        pipeline.checkpoints.commit(pipeline.name, partition, Commit(cursor_at=passed), context.lease)
    return passed


def _refresh(
    pipeline: Pipeline[B, E],
    context: Context,
    at: Position,
    *,
    together: Mapping[datetime, ReadTogether[B]],
    left: dict[datetime, Count],
    done: Done,
    failed: FailedWindows,
) -> None:
    """Update open and settling windows; a window whose count is unchanged costs nothing."""
    grid = pipeline.grid
    windows = list(grid.windows(max(at.cursor_at, at.live_since), at.now))
    if failed.first:  # due windows were already tried, but are still after the cursor
        windows = [window for window in windows if age_of(window, at.now, grid.grace_seconds) is not Age.DUE]
    records = _records(pipeline, at.partition, windows) if windows else {}
    later: dict[datetime, Count] = {}
    for window in windows:
        context.stop.check()
        if failed.stops:
            break
        record, count = records.get(window.start), left.get(window.start, NOTHING)
        if is_as_confirmed(record, count):
            log.debug("%s %s: %d values counted, as confirmed: nothing to write", at.partition, window, count.cells)
            done(Report(ledger=ledger_of_counts(pipeline.unit, [count], "already_there")))
        elif is_just_written(record, at.now, grid):
            known = record.fields if record else {}
            there = {name: min(number, known.get(name, 0)) for name, number in count.fields.items()}
            rest = {name: number - there[name] for name, number in count.fields.items()}
            later[window.start] = replace(count, fields=rest)
            done(Report(ledger=ledger_of_counts(pipeline.unit, [replace(count, fields=there)], "already_there")))
        else:
            with failed.one():
                ahead = together[window.start].batches(at.partition) if window.start in together else None
                task = WindowTask(at.partition, window, count, record, final=False, ahead=ahead)
                done(sync_window(pipeline, context, task))
                left.pop(window.start, None)
            continue
        left.pop(window.start, None)
    for start in [start for start in left if start < at.cursor_at]:
        del left[start]  # windows before the cursor were closed earlier
    left |= later


def is_as_confirmed(record: Record | None, count: Count) -> bool:
    """True when a live window need not be read: its count is the one that its record was made from.

    An open object of an older version, which may lack tags that tell its rows apart, is read once.
    """
    if record is None:
        return count == NOTHING
    is_of_older_version = count != NOTHING and not (record.closed or record.source_digest)
    return not is_of_older_version and (record.closed or (count != UNCOUNTED and record.source_cells == count.cells))


def is_just_written(record: Record | None, now: datetime, grid: Grid) -> bool:
    """True while an open window waits to be rewritten: each write is charged. A time ahead counts as long ago."""
    if record is None or record.written_at is None:
        return False
    return 0 <= (now - record.written_at).total_seconds() < grid.rewrite_seconds


def _records(pipeline: Pipeline[B, E], partition: str, windows: Sequence[Window]) -> Mapping[datetime, Record]:
    found = pipeline.checkpoints.records(pipeline.name, partition, windows[0].start, windows[-1].end)
    return {record.window.start: record for record in found if record.part == 0}


def sync_window(pipeline: Pipeline[B, E], context: Context, task: WindowTask, *, moves_cursor: bool = False) -> Report:
    """Make the window's object equal to the source and commit it, closed when `task.final`. Idempotent.

    Order: write the object with the rows of its deltas, commit, delete the deltas. After a crash in between, the
    object's metadata says which deltas it holds.
    """
    with pipeline.large_turns if task.count.points > pipeline.large_points else nullcontext():
        written = _write(pipeline, context, task)
    record = written.record
    if record is not None and task.final:
        record = replace(record, closed=True)
    cursor_at = task.window.end if moves_cursor else None
    if not context.dry_run and (record != task.record or cursor_at or written.deltas):
        folded = (task.window,) if written.deltas else ()
        commit = Commit((record,) if record else (), cursor_at, folded, written.summaries)
        pipeline.checkpoints.commit(pipeline.name, task.partition, commit, context.lease)
        delete_deltas(pipeline, written.deltas)
    notes: list[str] = []
    removed_rows = 0
    if written.shrink is not None and written.shrink.rows:
        notes.append(written.shrink.told(pipeline.sink.key(task.partition, task.window, 0), dry_run=context.dry_run))
        log.warning("%s", notes[0])
        removed_rows = written.shrink.rows if written.shrink.removes else 0
    if not written.stored_bytes or record is None:
        return Report(ledger=written.ledger, notes=notes)
    was_closed = task.record is not None and task.record.closed
    late_rows, corrected_rows = (written.new_rows, written.corrected_rows) if was_closed else (0, 0)
    if late_rows or corrected_rows:
        log.info("%s: %d late and %d corrected rows of a closed window", record.key, late_rows, corrected_rows)
    context.progress.advance(rows=record.rows)
    return Report(
        rows=record.rows,
        bytes=written.stored_bytes,
        windows=1,
        late_rows=late_rows,
        corrected_rows=corrected_rows,
        removed_rows=removed_rows,
        written_new_rows=written.new_rows,
        notes=notes,
        ledger=written.ledger,
    )


def delete_deltas(pipeline: Pipeline[B, E], keys: Sequence[str]) -> None:
    """Delete deltas whose rows the window's object holds. One that cannot be deleted is skipped from then on, since the
    object records that it holds its rows.
    """
    for key in keys if pipeline.deltas else ():
        try:
            pipeline.deltas.delete(key)  # type: ignore[union-attr]
        except (Permanent, Rejected) as error:
            log.warning("%s: its rows are in the object of its window, but it cannot be deleted: %s", key, error)
            pipeline.checkpoints.note_undeleted(pipeline.name, key, error.message)
        else:
            log.info("%s: deleted, its rows are in the object of its window", key)
            pipeline.checkpoints.note_undeleted(pipeline.name, key, "")


def _write(pipeline: Pipeline[B, E], context: Context, task: WindowTask) -> _Settled[B]:
    """Read the version and the source, then compare-and-swap; repeat all three on conflict. Raises Transient when
    conflicts persist.
    """
    key = pipeline.sink.key(task.partition, task.window, 0)
    held = pipeline.sink.head(key) if pipeline.by_digest or task.asks else task.record.held if task.record else None
    for _ in range(CONFLICTS):
        context.stop.check()
        try:
            with _reading(pipeline, task, key, held) as one:
                _put(pipeline, context, task, held, one, key=key)
                log.debug(
                    "%s: %d values counted, %d rows read, %s",
                    key,
                    task.count.cells,
                    one.batch.rows,
                    f"{one.stored_bytes} bytes written" if one.stored_bytes else "nothing to write",
                )
                before, fields = task.record.fields if task.record else {}, {}
                is_same = held is not None and one.batch.digest == held.digest  # also where the record was lost
                for name, tally in one.batch.accounts.items():
                    # Rows that an unchanged object, or its record, already holds are not new.
                    known = 0 if one.is_united else min(before.get(name, 0), tally.new)
                    there = known if one.stored_bytes and not is_same else tally.new
                    fields[name] = replace(tally, new=tally.new - there, already_there=tally.already_there + there)
                aside: Sequence[SetAside] = ()
                if pipeline.set_aside and not context.dry_run:
                    aside = pipeline.set_aside(task.partition, task.window, one.batch)
                one.ledger = Ledger(pipeline.unit, fields, aside)
                return one
        except Conflict:
            held = pipeline.sink.head(key)
            task = replace(task, ahead=None, asks=True)  # the rows read ahead are older than the current version
    raise Transient(
        f"{key}: changed {CONFLICTS} times while it was being replaced",
        "give each Headwater its own S3_PREFIX, or one PostgreSQL: another writer uses the same bucket and prefix",
    )


def _put(
    pipeline: Pipeline[B, E],
    context: Context,
    task: WindowTask,
    held: ObjectState | None,
    one: _Settled[B],
    *,
    key: str,
) -> None:
    """Encode and swap, unless the object already holds these rows and need not be closed."""
    batch = one.batch
    same = batch.rows == 0 if held is None else batch.digest == held.digest
    closes = task.final and held is not None and not pipeline.by_digest and not (task.record and task.record.closed)
    already_folded = held.folded if held is not None else 0
    folded = max(one.folded, already_folded)  # includes a delta that cannot be deleted and is always skipped
    folds = folded > already_folded
    if held is not None and task.record is not None and one.is_confirmed and not folds:
        sums = one.sums if task.final else {}
        one.record = replace(task.record, source_cells=task.count.cells, sums=sums, folded=folded)
        return
    if same and not closes and not folds and (held is None or not task.always_writes):
        if held is not None:
            pipeline.written.keep(task, held.version, batch)
            one.record = _record(task, key, held, one)
        return
    summarises = pipeline.summarise is not None and (task.final or pipeline.summarises_live())
    with closing(pipeline.sink.encode(task.partition, task.window, batch, summarises=summarises)) as plain:
        encoded = pipeline.deltas.noted(plain, folded) if pipeline.deltas and folded else plain
        version, is_ours = "", False
        if not context.dry_run:
            version, is_ours = _swap(pipeline, task, held, batch, encoded, key=key, folded=folded)
            pipeline.written.keep(task, version, batch)
        one.record = _record(task, key, ObjectState(version, size_bytes=encoded.size_bytes, folded=folded), one)
        one.stored_bytes, one.corrected_rows = encoded.size_bytes, batch.corrected_rows
        one.new_rows = batch.new_rows if one.is_united or held is None else max(batch.rows - (held.rows or 0), 0)
        if pipeline.summarise and summarises and is_ours:
            one.summaries = pipeline.summarise(encoded, key, version)


def _swap(
    pipeline: Pipeline[B, E],
    task: WindowTask,
    held: ObjectState | None,
    batch: B,
    encoded: E,
    *,
    key: str,
    folded: int,
) -> tuple[str, bool]:
    """Returns the new version, and whether it has exactly these bytes. A write whose response was lost is adopted; any
    other conflict is raised.

    While a window is open, another write of the same rows is as good as ours. To close it, it is not: a writer that
    read the version before ours could still replace it.
    """
    try:
        return pipeline.sink.put(key, encoded, held.version if held else None, closing=task.final), True
    except Conflict:
        there = pipeline.sink.head(key)
        if there is None:
            raise
        is_ours = bool(encoded.write) and there.write == encoded.write
        same = (there.digest, there.folded) == (batch.digest, folded)
        if not is_ours and (not same or (task.final and not pipeline.by_digest)):
            raise
        return there.version, is_ours


def _record(task: WindowTask, key: str, held: ObjectState, one: _Settled[B]) -> Record:
    batch = one.batch
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
        fields={name: tally.new + tally.already_there + tally.corrected for name, tally in batch.accounts.items()},
        source_digest=one.source_digest,
        sums=one.sums if task.final else {},  # sums are compared for past windows only
        folded=held.folded,
    )


@contextmanager
def _reading(pipeline: Pipeline[B, E], task: WindowTask, key: str, held: ObjectState | None) -> Iterator[_Settled[B]]:
    """Yield the window's rows, merged with rows that only the sink still has. The batch is closed at the end unless the
    pipeline keeps it.
    """
    kept = pipeline.written.take(task, held.version if held else "")
    try:
        batch: B | None = None
        try:
            batch = next(task.ahead, None) if task.ahead else None
        except (Transient, Permanent, Rejected) as error:  # another window may be the cause
            log.debug("%s %s: is read alone: %s", task.partition, task.window, error)
        if batch is None:
            batch = pipeline.source.read(task.partition, task.window, task.count, kept)
    finally:
        if kept is not None:
            kept.close()
    digest, sums = batch.digest, batch.sums
    try:
        deltas, unfolded, folded = _deltas(pipeline, task, held)
        rows = [pipeline.sink.read(each, _version(pipeline, each)) for each in unfolded]
        is_confirmed = held is not None and not rows and _is_confirmed(pipeline, task, held, digest)
        if held is not None and not is_confirmed and not task.replaces and _needs_union(pipeline, task, held, batch):
            rows.insert(0, pipeline.sink.read(key, held.version))
        shrink = pipeline.shrink() if rows and pipeline.shrink else None
        if rows:
            batch = _united(pipeline, task, batch, rows, shrink)
        yield _Settled(
            batch,
            digest,
            sums,
            deltas,
            folded,
            is_united=bool(rows),
            is_confirmed=is_confirmed,
            shrink=shrink,
        )
    finally:
        if not pipeline.written.owns(batch):
            batch.close()


def _united(
    pipeline: Pipeline[B, E], task: WindowTask, batch: B, rows: Sequence[Iterable[Any]], shrink: Shrink | None
) -> B:
    """The batch merged with the rows that only the object has. If an object cannot be read and its window is not closed
    yet, it is rewritten from the source. For a closed window the error is raised, since the source may no longer have
    its rows.
    """
    try:
        united = pipeline.source.union(batch, rows, shrink)
    except Permanent as error:
        if batch.rows == 0 or pipeline.by_digest or (task.record is not None and task.record.closed):
            raise
        log.warning("%s: it is written again", error.message)
        return batch
    batch.close()
    return united


def _is_confirmed(pipeline: Pipeline[B, E], task: WindowTask, held: ObjectState, source_digest: str) -> bool:
    """True when the window need not be closed and the source returns the same rows as when this version was confirmed:
    the object then holds them all, whatever else it holds.
    """
    record = task.record
    if record is None or task.replaces or task.always_writes or pipeline.by_digest:
        return False
    if pipeline.shrink is not None and record.digest != source_digest:
        return False  # the object has additional rows, some of which may now be removable
    same = (record.version, record.source_digest) == (held.version, source_digest)
    return same and (record.closed or not task.final)


def _needs_union(pipeline: Pipeline[B, E], task: WindowTask, held: ObjectState, batch: B) -> bool:
    """Whether the version to be replaced may hold rows that the source no longer returns.

    Counts and the first and last row cannot answer that; only the identities of the rows that this process wrote as
    that version can.
    """
    if batch.digest == held.digest:
        return False
    identities = pipeline.written.identities(task, held.version)
    return identities is None or not batch.holds_all(identities)


def _deltas(
    pipeline: Pipeline[B, E], task: WindowTask, held: ObjectState | None
) -> tuple[Sequence[str], Sequence[str], int]:
    """A window's deltas: the keys to delete afterwards, the keys whose rows the object does not hold yet, and the
    highest part. They are looked up only when the task asks the destination.

    Objects of other programs are left alone, but deleted when damage is being repaired. In a repair, unreadable deltas
    are also left out of the merge; the source may have their rows.
    """
    folded = held.folded if held is not None and not task.replaces else 0
    keys: list[str] = []
    unfolded: list[str] = []
    highest = folded
    objects: Objects = {}
    if pipeline.deltas and task.asks:
        objects = pipeline.deltas.objects(task.partition, [task.window]).get(task.window.start, {})
    for part, (key, _) in sorted(objects.items()):
        there = pipeline.sink.head(key) if part else None
        is_own = there is not None and bool(there.digest)
        if part and (is_own or task.mends):
            keys.append(key)
            highest = max(highest, part)
            if is_own and part > folded and not (task.replaces and _is_damaged(pipeline, key)):
                unfolded.append(key)
        elif there is not None:
            log.warning("%s: was not written by Headwater and is left alone: run verify with --heal", key)
    return keys, unfolded, highest


def _is_damaged(pipeline: Pipeline[B, E], key: str) -> bool:
    try:
        deque(pipeline.sink.read(key, _version(pipeline, key)), maxlen=0)
    except Permanent as error:
        log.warning("%s", error)
        return True
    return False


def _version(pipeline: Pipeline[B, E], key: str) -> str:
    there = pipeline.sink.head(key)
    if there is None:
        raise Conflict(f"{key} is gone", "no action needed; the window is read again")
    return there.version
