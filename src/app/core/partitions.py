"""One pass over all partitions of a pipeline: which there are, where they start, and isolation of their failures.

Invariants: a partition's first cursor is committed before any of its rows are read, so a later outage cannot move its
start. Each failing partition backs off on its own and is tried after all others, so failures delay no healthy
partition. Many windows are committed together, each after its object was written; a crash in between repeats those
writes under the same names.
"""

import logging
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from contextvars import copy_context
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import TypeVar

from app.core.errors import LeaseLost, Permanent, Rejected, Stopped, Transient
from app.core.pipeline import (
    NOTHING,
    Batch,
    Checkpoints,
    Commit,
    Count,
    Encoded,
    Pipeline,
    Position,
    Record,
)
from app.core.runs import Context, Done, Failure, Lease, Report, ReportSum
from app.core.sync import ReadTogether, is_as_confirmed, is_just_written, ledger_of_counts, sync_partition
from app.core.windows import Age, Window, age_of

B = TypeVar("B", bound=Batch)
E = TypeVar("E", bound=Encoded)

log = logging.getLogger(__name__)

UNNAMED = ""  # rows that name no partition; older versions kept the time of their last discovery there
COMMITS, COMMIT_SECONDS = 64, 5.0
FIRST_PAUSE = timedelta(minutes=1)
LONGEST_PAUSE = timedelta(hours=1)
SETTLING_PAUSE = timedelta(minutes=10)
FIRST_AT_ONCE, JITTER_SECONDS = 2, 0.005
# Python runs on one core: once it is busy, more threads only take it from each other.
FREE_CORES, BUSY_CORES = 0.8, 0.95


@dataclass(frozen=True, slots=True)
class _FailingPartition:
    """A partition that failed: how often in a row, when last, and why.

    A first failure with a transient cause does not count: if the state or the store was briefly away, the next run
    tries again.
    """

    times: int
    at: datetime
    failure: Failure

    @property
    def due_at(self) -> datetime:
        if not self.times:
            return self.at
        return self.at + min(FIRST_PAUSE * (1 << min(self.times - 1, 10)), LONGEST_PAUSE)


class Backoff:
    """Which partitions failed; kept in this process between runs. Thread-safe."""

    def __init__(self) -> None:
        self._failing: dict[str, _FailingPartition] = {}
        self._lock = threading.Lock()

    def turns(self, partitions: Sequence[str], now: datetime) -> tuple[Sequence[str], Sequence[str], Sequence[str]]:
        """Partitions that are healthy, that failed and are due again (longest waiting first), and that failed and still
        wait.

        After a clock was set back, none waits for it to catch up.
        """
        with self._lock:
            failing = {name: self._failing[name] for name in partitions if name in self._failing}
        due = {name for name, each in failing.items() if not each.at <= now < each.due_at}
        well = [name for name in partitions if name not in failing]
        again = sorted(due, key=lambda name: (failing[name].due_at, name))
        return well, again, [name for name in failing if name not in due]

    def last_failure(self, partition: str) -> Failure:
        """Why a failed partition last failed."""
        return self._failing[partition].failure

    def failed(self, failure: Failure, now: datetime, *, may_pass: bool = False) -> None:
        """Record another failure of the partition."""
        with self._lock:
            before = self._failing.get(failure.partition)
            times = before.times + 1 if before else int(not may_pass)
            self._failing[failure.partition] = _FailingPartition(times, now, failure)

    def is_failing(self, partition: str) -> bool:
        """True when the partition's last attempt failed."""
        return partition in self._failing

    def well(self, partition: str) -> None:
        """Record that the partition is up to date."""
        with self._lock:
            self._failing.pop(partition, None)


class SettlingSchedule:
    """Which live windows a pass counts: recently ended ones every time, older ones every SETTLING_PAUSE, since few rows
    come that late. Kept in this process between runs.
    """

    def __init__(self) -> None:
        self._all_done_at: datetime | None = None

    def counted(self, windows: Sequence[Window], now: datetime) -> Sequence[Window]:
        """The live windows to count now, oldest first; all of them after a clock was set back."""
        before = self._all_done_at
        if before is None or not before <= now < before + SETTLING_PAUSE:
            return windows
        return [window for window in windows if window.end > now - SETTLING_PAUSE]

    def done(self, now: datetime) -> None:
        """Record that all live windows of all partitions were counted at `now` and brought up to date."""
        self._all_done_at = now


class AdaptiveConcurrency:
    """How many partitions are processed at once: two at first, more while the source answers as fast as before and this
    process has CPU time left; the number drops again when either is over. Thread-safe.

    `latency_seconds` and `used_cores`: see `PassOptions` and `UsedCores`.
    """

    def __init__(
        self, ceiling: int, latency_seconds: Callable[[], float | None], used_cores: Callable[[], float]
    ) -> None:
        self.limit = min(FIRST_AT_ONCE, ceiling)
        self._ceiling = ceiling
        self._latency_seconds = latency_seconds
        self._used_cores = used_cores
        self._best_seconds = float("inf")
        self._active = self._done = 0
        self._changed = threading.Condition()

    def __enter__(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._active < self.limit)
            self._active += 1

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._active -= 1
            self._done += 1
            if self._done >= 2 * self.limit:
                self._done = 0
                self._adapt(self._latency_seconds() or 0.0, self._used_cores())
            self._changed.notify_all()

    def _adapt(self, seconds: float, cores: float) -> None:
        if seconds:
            self._best_seconds = min(self._best_seconds, seconds)
        if seconds > 2 * self._best_seconds + JITTER_SECONDS or cores > BUSY_CORES:
            self.limit = max(self.limit // 2, min(FIRST_AT_ONCE, self._ceiling))
        elif seconds <= 1.5 * self._best_seconds + JITTER_SECONDS and cores < FREE_CORES:
            self.limit = min(2 * self.limit, self._ceiling)


class UsedCores:
    """How many cores this process used since the last call."""

    def __init__(self) -> None:
        self._cpu, self._at = time.process_time(), time.monotonic()

    def __call__(self) -> float:
        """CPU seconds per second; 0 if no time has passed."""
        cpu, at = time.process_time(), time.monotonic()
        cores = (cpu - self._cpu) / (at - self._at) if at > self._at else 0.0
        self._cpu, self._at = cpu, at
        return cores


@dataclass(frozen=True, slots=True)
class SyncPlan:
    """What a pass has to do: the position of each partition that needs work, and the counts of its live windows.

    Partitions that match their confirmed state are left out. `now` was read before the source was; see `Position`.
    """

    pipeline: str
    unit: str
    now: datetime
    live_since: datetime
    rewrite_seconds: float
    cursors: Mapping[str, datetime]
    counts: Mapping[str, Mapping[datetime, Count]]

    def of(self, partitions: Iterable[str]) -> "SyncPlan":
        """One shard of it: only these partitions."""
        cursors = {name: self.cursors[name] for name in partitions}
        return replace(self, cursors=cursors, counts={name: self.counts.get(name, {}) for name in cursors})

    def left(self) -> Report:
        """A report in which everything counted waits for a later run."""
        each = (one for some in self.counts.values() for one in some.values())
        return Report(ledger=ledger_of_counts(self.unit, each, "waiting"))


Step = Callable[[Context, SyncPlan], Report]
"""One step of each partition of a plan, under the lease of the context."""


def run_in_process(context: Context, plan: SyncPlan, step: Step) -> Report:
    """Run the whole plan as one shard, here and now."""
    with context.part(f"{plan.pipeline}/0") as own:
        return step(own, plan) if own else plan.left()


@dataclass(frozen=True, slots=True)
class PassOptions:
    """Options of a pass. `first_at` is where a new partition begins. `cursors`: those of the checkpoints, None = to be
    read. `nothing_found` is called when no partition has anything in its live windows, and raises unless the source is
    really empty: then no cursor moves.

    `probe` makes a cheap request to source and sink, and raises when one is away; it is called when `transient_limit`
    partitions failed in a row. Partitions that failed before are tried for `retry_seconds` a run. `concurrency` is the
    maximum number of partitions at once; `latency_seconds` gives the source's mean latency since the last call, if any.
    `steps(context, plan, step)` runs the steps of a plan, here or in other processes, and adds up their reports.
    """

    now: datetime
    first_at: datetime
    probe: Callable[[], None]
    nothing_found: Callable[[], None]
    cursors: Mapping[str, datetime] | None = None
    backoff: Backoff = field(default_factory=Backoff)
    settling: SettlingSchedule = field(default_factory=SettlingSchedule)
    concurrency: int = 4
    latency_seconds: Callable[[], float | None] = lambda: None
    transient_limit: int = 5
    retry_seconds: float = 20.0
    steps: Callable[[Context, SyncPlan, Step], Report] = run_in_process


class BatchedCheckpoints:
    """The checkpoints of one pass: records of live windows are read in one query, and commits are batched, COMMITS at a
    time or after COMMIT_SECONDS. Thread-safe.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        pipeline: str,
        live_since: datetime | None,
        partitions: Sequence[str] | None = None,
    ) -> None:
        # Passed through unchanged.
        self.cursors, self.starts, self.live_records = checkpoints.cursors, checkpoints.starts, checkpoints.live_records
        self.mark, self.note_undeleted = checkpoints.mark, checkpoints.note_undeleted
        self._checkpoints = checkpoints
        self._live_since = live_since
        self._live = checkpoints.live_records(pipeline, live_since, partitions) if live_since else {}
        self._waiting: list[tuple[str, Commit]] = []
        self._flush_at = 0.0
        self._lock = threading.RLock()

    def records(self, pipeline: str, partition: str, since: datetime, until: datetime) -> Sequence[Record]:
        """See `Checkpoints.records`. Records of live windows are as of the start of the pass."""
        if self._live_since is None or since < self._live_since:
            return self._checkpoints.records(pipeline, partition, since, until)
        return [record for record in self._live.get(partition, ()) if since <= record.window.start < until]

    def commit(self, pipeline: str, partition: str, commit: Commit, lease: Lease) -> None:
        """See `Checkpoints.commit`. Commits with folded deltas are made at once, as these are deleted next."""
        with self._lock:
            if not self._waiting:
                self._flush_at = time.monotonic() + COMMIT_SECONDS
            self._waiting.append((partition, commit))
            if commit.folded or len(self._waiting) >= COMMITS or time.monotonic() >= self._flush_at:
                self.flush(pipeline, lease)

    def commit_all(self, pipeline: str, commits: Sequence[tuple[str, Commit]], lease: Lease) -> None:
        """See `Checkpoints.commit_all`."""
        for partition, commit in commits:
            self.commit(pipeline, partition, commit, lease)

    def fail(self, pipeline: str, partition: str, message: str, lease: Lease) -> None:
        """See `Checkpoints.fail`. A commit clears the error, so pending commits are made first."""
        self.flush(pipeline, lease)
        self._checkpoints.fail(pipeline, partition, message, lease)

    def flush(self, pipeline: str, lease: Lease) -> None:
        """Make the pending commits."""
        with self._lock:
            if not self._waiting:
                return
            try:
                self._checkpoints.commit_all(pipeline, self._waiting, lease)
            except Rejected:
                for partition, commit in self._waiting:
                    try:
                        self._checkpoints.commit(pipeline, partition, commit, lease)
                    except Rejected as error:
                        log.warning("partition %r cannot have a checkpoint: %s", partition, error)
            self._waiting = []


def sync_all(pipeline: Pipeline[B, E], context: Context, how: PassOptions) -> Report:
    """Move every partition one step forward: plan, then step. Raises Transient when the source or the sink fails for
    all partitions.
    """
    every = live_windows(pipeline, how.now)
    windows = how.settling.counted(every, how.now)
    live_since = windows[0].start if windows else None
    checkpoints = BatchedCheckpoints(pipeline.checkpoints, pipeline.name, live_since)
    batched = replace(pipeline, checkpoints=checkpoints)
    cursors = _cursors(batched, context, how)
    checkpoints.flush(pipeline.name, context.lease)
    live: dict[str, dict[datetime, Count]] = {}
    for (partition, start), count in (pipeline.source.counts(None, windows) if windows else {}).items():
        if partition in cursors:  # the source also counts partitions that the settings leave out
            live.setdefault(partition, {})[start] = count
    if len(windows) == len(every) and not any(live.get(partition) for partition in cursors if partition != UNNAMED):
        how.nothing_found()

    def is_idle(name: str) -> bool:
        """True when nothing of the partition is due and every count is the confirmed one, so there is nothing to do."""
        if not windows or cursors[name] < every[0].start or how.backoff.is_failing(name):
            return False
        counts, found = live.get(name, {}), checkpoints.records(pipeline.name, name, windows[0].start, how.now)
        records = {record.window.start: record for record in found if not record.part}
        starts = [window.start for window in windows if window.end > cursors[name]]
        return all(is_as_confirmed(records.get(start), counts.get(start, NOTHING)) for start in starts)

    idle = {name for name in cursors if is_idle(name)}
    confirmed = (count for name in idle for count in live.get(name, {}).values())
    report = Report(ledger=ledger_of_counts(pipeline.unit, confirmed, "already_there"))
    context.done(report)
    log.debug("%d of %d partitions are as confirmed", len(idle), len(cursors))
    context.progress.advance(total=len(cursors), done=len(idle))
    if busy := sorted(cursors.keys() - idle):
        spaced = pipeline.rewrite_seconds(len(live)) if pipeline.rewrite_seconds else pipeline.grid.rewrite_seconds
        plan = SyncPlan(pipeline.name, pipeline.unit, how.now, live_since or how.now, spaced, cursors, live).of(busy)
        report += how.steps(context, plan, lambda own, part: sync_step(pipeline, own, part, how, checkpoints))
    if len(windows) == len(every) and not (report.more or report.failures or context.dry_run):
        how.settling.done(how.now)
    return report


def sync_step(
    pipeline: Pipeline[B, E],
    context: Context,
    plan: SyncPlan,
    how: PassOptions,
    checkpoints: BatchedCheckpoints | None = None,
) -> Report:
    """One step of each partition of a plan or of one of its shards. Raises as `sync_all`.

    A plan may be old, for example after waiting for a worker: its counts are older than what is read now, and windows
    closed since then are recognised by their records. `checkpoints`: holds the records that the plan was made from, if
    available.
    """
    if checkpoints is None:
        checkpoints = BatchedCheckpoints(pipeline.checkpoints, pipeline.name, plan.live_since, list(plan.cursors))
    grid = replace(pipeline.grid, rewrite_seconds=plan.rewrite_seconds)
    pipeline = replace(pipeline, checkpoints=checkpoints, grid=grid)
    live = live_windows(pipeline, plan.now)
    pipeline.written.drop_before(live[0].start if live else plan.now)
    nameable = _nameable(pipeline, plan)
    together = _read_together(pipeline, plan, live, nameable, how.backoff)

    def one(partition: str, done: Done) -> None:
        at = Position(partition, plan.cursors[partition], plan.now, plan.live_since)
        if partition in nameable or not pipeline.refused:
            sync_partition(pipeline, context, at, plan.counts[partition], done, together=together)
        else:
            done(pipeline.refused(context, at, plan.counts[partition]))
        context.progress.advance(done=1)

    def left(partition: str) -> Report:
        return Report(ledger=ledger_of_counts(pipeline.unit, plan.counts[partition].values(), "waiting"))

    try:
        report = run_each_partition(
            pipeline, context, sorted(plan.cursors), one, how=replace(how, now=plan.now), left=left
        )
    except (Transient, Permanent, Stopped):
        checkpoints.flush(pipeline.name, context.lease)
        raise
    checkpoints.flush(pipeline.name, context.lease)
    return report


def _nameable(pipeline: Pipeline[B, E], plan: SyncPlan) -> Collection[str]:
    """The partitions whose names can be part of an object's name."""
    window, found = pipeline.grid.window_at(plan.now), set()
    for partition in plan.cursors:
        with suppress(Rejected):
            pipeline.sink.key(partition, window, 0)
            found.add(partition)
    return found


def _read_together(
    pipeline: Pipeline[B, E], plan: SyncPlan, windows: Sequence[Window], nameable: Collection[str], backoff: Backoff
) -> Mapping[datetime, ReadTogether[B]]:
    """The live `windows` that will be written, by start. A partition that failed, or has due windows, is read alone."""
    found: dict[datetime, ReadTogether[B]] = {}
    if pipeline.by_digest or not windows:  # with `by_digest`, versions are known only just before each read
        return found
    partitions = [
        name for name in sorted(nameable) if plan.cursors[name] >= windows[0].start and not backoff.is_failing(name)
    ]
    for window in windows:
        due: list[tuple[str, Window, Count]] = []
        for name in partitions if window.start >= plan.live_since else ():
            count = plan.counts[name].get(window.start, NOTHING)
            records = pipeline.checkpoints.records(pipeline.name, name, window.start, window.end)
            record = next((each for each in records if each.part == 0), None)
            is_done = window.end <= plan.cursors[name] or is_as_confirmed(record, count)
            if not is_done and not is_just_written(record, plan.now, pipeline.grid):
                due.append((name, window, count))
        found[window.start] = ReadTogether(pipeline.source, due)
    return found


def _cursors(pipeline: Pipeline[B, E], context: Context, how: PassOptions) -> Mapping[str, datetime]:
    """Partition -> cursor, for all known and newly discovered partitions; new cursors are committed first.

    A partition whose cursor is lost, or was set by a clock that was ahead, continues where the destination says.
    Starting from the first start would repeat all windows since then and keep its live windows waiting.
    """
    found = pipeline.checkpoints.cursors(pipeline.name) if how.cursors is None else how.cursors
    cursors = {
        partition: at for partition, at in found.items() if partition == UNNAMED or pipeline.is_wanted(partition)
    }
    known = {partition: at for partition, at in cursors.items() if at <= how.now}
    if not pipeline.refused:
        known.pop(UNNAMED, None)
    unnamed = (UNNAMED,) if pipeline.refused else ()
    for partition in (*unnamed, *(cursors.keys() - {UNNAMED}), *pipeline.source.partitions(how.first_at)):
        if partition not in known:
            context.stop.check()
            continues_at = pipeline.lost_cursor(partition) if pipeline.lost_cursor else None
            known[partition] = continues_at or how.first_at
            if not context.dry_run:
                commit = Commit(cursor_at=known[partition])
                pipeline.checkpoints.commit(pipeline.name, partition, commit, context.lease)
    return known


def live_windows(pipeline: Pipeline[B, E], now: datetime) -> Sequence[Window]:
    """Open and settling windows at `now`, oldest first."""
    grid = pipeline.grid
    found: list[Window] = []
    window = grid.window_at(now)
    while age_of(window, now, grid.grace_seconds) is not Age.DUE:
        found.append(window)
        window = grid.window_at(window.start - datetime.resolution)
    return found[::-1]


class _CircuitBreaker:
    """Circuit breaker that separates an outage of the source or the sink from failures of single partitions: when many
    fail in a row, both are probed, once a pass.
    """

    def __init__(self, limit: int, probe: Callable[[], None]) -> None:
        self._limit = limit
        self._probe = probe
        self._in_a_row = 0
        self._is_probed = False
        self._outage: Transient | None = None
        self._lock = threading.Lock()

    def saw(self, error: Transient | None) -> None:
        """Record that a partition succeeded (None) or failed for a transient cause."""
        with self._lock:
            self._in_a_row = self._in_a_row + 1 if error else 0
            if error is None or self._is_probed or self._in_a_row < self._limit:
                return
            self._is_probed = True
            try:
                self._probe()
            except Transient as away:
                self._outage = away

    def check(self) -> None:
        """Raises what the probe found."""
        if self._outage is not None:
            raise self._outage


def run_each_partition(
    pipeline: Pipeline[B, E],
    context: Context,
    partitions: Sequence[str],
    one: Callable[[str, Done], None],
    *,
    how: PassOptions,
    left: Callable[[str], Report] = lambda _: Report(),
) -> Report:
    """Run `one` for each partition, `how.concurrency` at a time; a failing one is reported and the others continue.

    `left` reports what a partition that did not get its turn leaves for a later run.
    """
    outage = _CircuitBreaker(how.transient_limit, how.probe)
    how.latency_seconds()  # discard latencies measured before this pass
    rising = AdaptiveConcurrency(how.concurrency, how.latency_seconds, UsedCores())

    def attempt(partition: str) -> Report:
        context.stop.check()
        outage.check()
        parts = ReportSum()
        try:
            with rising:
                one(partition, parts)
        except (LeaseLost, Stopped):
            raise
        except (Transient, Permanent, Rejected) as error:
            outage.saw(error if isinstance(error, Transient) else None)
            failure = Failure(partition, error.message, error.hint)
            how.backoff.failed(failure, how.now, may_pass=isinstance(error, Transient))
            if not context.dry_run:
                # Record the failure; the cursor stays. A lost lease or an unavailable store ends the whole run.
                try:
                    pipeline.checkpoints.fail(pipeline.name, partition, str(error), context.lease)
                except Rejected as unnamed:
                    log.warning("the failure of partition %r cannot be noted: %s", partition, unnamed)
            return parts.total + Report(failures=(failure,))
        finally:
            context.done(replace(parts.total, ledger=parts.total.ledger.of_partition(partition)))
        outage.saw(None)
        how.backoff.well(partition)
        return parts.total

    def wait(partition: str) -> Report:
        report = left(partition)
        failures = (how.backoff.last_failure(partition), *report.failures)
        return replace(report, failures=failures, ledger=report.ledger.of_partition(partition))

    well, again, still = how.backoff.turns(partitions, how.now)
    with ThreadPoolExecutor(how.concurrency, thread_name_prefix=pipeline.name) as pool:
        total = _all(pool, attempt, well)
        ends_at = time.monotonic() + how.retry_seconds

        def retry(partition: str) -> Report:
            return attempt(partition) if time.monotonic() < ends_at else wait(partition)

        total += _all(pool, retry, again)
    outage.check()
    return sum(map(wait, still), total)


def _all(pool: ThreadPoolExecutor, attempt: Callable[[str], Report], partitions: Sequence[str]) -> Report:
    """The sum over partitions; the first error that does not belong to a single partition ends the pass."""
    # Each thread gets the run's context, from which logging reads the run id.
    futures = [pool.submit(copy_context().run, attempt, partition) for partition in partitions]
    total = Report()
    try:
        for partition, future in zip(partitions, futures, strict=True):
            report = future.result()
            total += replace(report, ledger=report.ledger.of_partition(partition))
    finally:
        for future in futures:
            future.cancel()
    return total
