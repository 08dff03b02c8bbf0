"""One pass over all partitions of a pipeline: who they are, where they start, and that one's failure stays its own.

Invariants: a partition gets its first cursor committed before anything of it is read, so an outage that follows cannot
move its start; a new partition starts where the last discovery left off, so what it wrote meanwhile is not missed.
"""

import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass, field
from datetime import datetime
from typing import TypeVar

from app.core.errors import Permanent, Rejected, Transient
from app.core.ports import Batch, Commit, Count, Encoded
from app.core.runs import Context, Failure, Report
from app.core.sync import Pipeline, Position, sync_partition
from app.core.window import Age, Window, age_of

B = TypeVar("B", bound=Batch)
E = TypeVar("E", bound=Encoded)

log = logging.getLogger(__name__)

DISCOVERY = ""  # the partition name under which a pipeline keeps the instant of its last discovery; never a real one


@dataclass(frozen=True, slots=True)
class Pass:
    """How a pass is made. `start_at(now)` is where a pipeline begins that has no checkpoint at all."""

    clock: Callable[[], datetime]
    start_at: Callable[[datetime], datetime]
    concurrency: int = 4
    transient_limit: int = 5


def sync_all(pipeline: Pipeline[B, E], context: Context, how: Pass) -> Report:
    """Bring every partition one step forward. Raises Transient when the source or the sink fails for all of them."""
    now = how.clock()
    cursors = _cursors(pipeline, context, how, now)
    live = _live_counts(pipeline, cursors, now)
    context.progress.advance(total=len(cursors))

    def one(partition: str) -> Report:
        at = Position(partition, cursors[partition], now)
        report = sync_partition(pipeline, context, at, live.get(partition, {}))
        context.progress.advance(done=1)
        return report

    return isolated(pipeline, context, sorted(cursors), one, how)


def _cursors(pipeline: Pipeline[B, E], context: Context, how: Pass, now: datetime) -> Mapping[str, datetime]:
    """Partition -> cursor, for all that are known or newly discovered; new ones are committed first."""
    known = dict(pipeline.checkpoints.cursors(pipeline.name))
    start_at = known.pop(DISCOVERY, None)
    first_at = how.start_at(now)
    if start_at is None:
        start_at = first_at
        _move(pipeline, context, DISCOVERY, start_at)
    oldest = min([start_at, *known.values()])
    for partition in pipeline.source.partitions(oldest):
        if partition not in known:
            known[partition] = start_at
            _move(pipeline, context, partition, start_at)
    if first_at > start_at:
        _move(pipeline, context, DISCOVERY, first_at)
    return known


def _move(pipeline: Pipeline[B, E], context: Context, partition: str, cursor_at: datetime) -> None:
    if context.dry_run:
        return
    try:
        pipeline.checkpoints.commit(pipeline.name, partition, Commit(cursor_at=cursor_at), context.lease)
    except Rejected as error:
        log.warning("partition %r cannot have a checkpoint: %s", partition, error)


def _live_counts(
    pipeline: Pipeline[B, E], cursors: Mapping[str, datetime], now: datetime
) -> Mapping[str, Mapping[datetime, Count]]:
    """The counts of all open and settling windows, by partition and window start, in one question to the source."""
    windows = live_windows(pipeline, now)
    if not cursors or not windows:
        return {}
    by_partition: dict[str, dict[datetime, Count]] = {}
    for (partition, start), count in pipeline.source.counts(None, windows).items():
        by_partition.setdefault(partition, {})[start] = count
    return by_partition


def live_windows(pipeline: Pipeline[B, E], now: datetime) -> Sequence[Window]:
    """Open and settling windows at `now`, oldest first."""
    grid = pipeline.grid

    def backwards() -> Iterator[Window]:
        window = next(grid.windows(now, _after(now)))
        while age_of(window, now, grid.grace_seconds) is not Age.DUE:
            yield window
            window = next(grid.windows(_before(window.start), window.start))

    return list(backwards())[::-1]


def _after(instant: datetime) -> datetime:
    return instant + _TICK


def _before(instant: datetime) -> datetime:
    return instant - _TICK


_TICK = datetime.resolution


@dataclass(slots=True)
class _Weather:
    """How many partitions in a row failed for a cause that may pass: many mean that it is not the partitions' fault."""

    limit: int
    in_a_row: int = 0
    last: Transient | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)

    def saw(self, error: Transient | None) -> None:
        with self.lock:
            self.in_a_row = self.in_a_row + 1 if error else 0
            self.last = error

    def check(self) -> None:
        with self.lock:
            if self.last is not None and self.in_a_row >= self.limit:
                raise self.last


def isolated(
    pipeline: Pipeline[B, E],
    context: Context,
    partitions: Sequence[str],
    one: Callable[[str], Report],
    how: Pass,
) -> Report:
    """Run `one` for each partition, `how.concurrency` at a time; a failing one is reported and the others go on."""
    weather = _Weather(how.transient_limit)

    def attempt(partition: str) -> Report:
        context.stop.check()
        weather.check()
        try:
            report = one(partition)
        except Transient as error:
            weather.saw(error)
            return _failed(pipeline, context, partition, error)
        except (Rejected, Permanent) as error:
            return _failed(pipeline, context, partition, error)
        weather.saw(None)
        return report

    total = Report()
    with ThreadPoolExecutor(how.concurrency, thread_name_prefix=pipeline.name) as pool:
        # Each thread carries the run's context, which the log reads its run id from.
        futures = [pool.submit(copy_context().run, attempt, partition) for partition in partitions]
        try:
            for future in futures:
                total += future.result()
        finally:
            for future in futures:
                future.cancel()
    weather.check()
    return total


def _failed(
    pipeline: Pipeline[B, E], context: Context, partition: str, error: Transient | Rejected | Permanent
) -> Report:
    """Note the failure beside the cursor, which stays. A lost lease or an absent store ends the whole run."""
    if not context.dry_run:
        try:
            pipeline.checkpoints.fail(pipeline.name, partition, str(error), context.lease)
        except Rejected as unnamed:
            log.warning("the failure of partition %r cannot be noted beside its cursor: %s", partition, unnamed)
    return Report(failures=(Failure(partition, error.message, error.hint),))
