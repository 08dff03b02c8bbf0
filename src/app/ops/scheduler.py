"""When jobs run. APScheduler provides timers, queues and threads; only this module uses it.

Invariants: each job has an executor with one thread, so it never overlaps itself in this process, whoever starts it
(timer, person, backfill); a missed timer fires once, as soon as it can; when the wall clock jumps in either direction,
each job checks once whether it is due, and none waits for the old time to return; work that a time limit stopped
continues soon, but never in a tight loop.
"""

import logging
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from shutil import get_terminal_size
from typing import Protocol, TypeVar
from uuid import uuid4

from apscheduler.executors.pool import ThreadPoolExecutor
from apscheduler.jobstores.base import JobLookupError
from apscheduler.schedulers.background import BackgroundScheduler
from apscheduler.triggers.interval import IntervalTrigger

from app.core.errors import AppError, Rejected, Transient, did_you_mean
from app.core.runs import Context, Job, Outcome, Report, Run, RunServices, Stop, execute
from app.core.windows import Window
from app.db.state import SqlPauses

# Progress of long work: a bar on a terminal, otherwise a log line now and then; always in memory.
#
# Invariant: counts only grow, and reporting never slows the work down: each advance reads the clock once.

LOG_EVERY_SECONDS = 10.0
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ProgressCounts:
    """Units done, units known so far, and rows moved."""

    done: int = 0
    total: int = 0
    rows: int = 0


class ProgressTally:
    """Implements `app.core.runs.Progress` in memory; `told` is called with the new counts after each advance."""

    def __init__(self, told: Callable[[ProgressCounts], None]) -> None:
        self._lock = threading.Lock()
        self._told = told
        self.counts = ProgressCounts()

    def advance(self, *, done: int = 0, total: int = 0, rows: int = 0) -> None:
        """Add to the counts. Thread-safe."""
        with self._lock:
            held = self.counts
            self.counts = replace(held, done=held.done + done, total=held.total + total, rows=held.rows + rows)
            self._told(self.counts)


def logging_progress(job: str, every_seconds: float = LOG_EVERY_SECONDS) -> ProgressTally:
    """A tally that logs one line per ten seconds of work; short work logs nothing."""
    said_at = time.monotonic()

    def told(counts: ProgressCounts) -> None:
        nonlocal said_at
        now = time.monotonic()
        if now - said_at >= every_seconds:
            said_at = now
            log.info("%s: %d of %d done, %d rows", job, counts.done, counts.total, counts.rows)

    return ProgressTally(told)


@contextmanager
def progress_bar(job: str, unit: str) -> Iterator[ProgressTally]:
    """A tally shown as a progress bar on stderr, which is removed at the end."""
    from tqdm import tqdm

    # a terminal that reports no size, as in some CI jobs, counts as 80 columns: with 0, tqdm shows nothing
    columns, rows = get_terminal_size()
    with tqdm(desc=job, unit=unit, leave=False, ncols=columns, nrows=rows) as shown:

        def told(counts: ProgressCounts) -> None:
            shown.total = max(counts.total, counts.done) or None
            shown.set_postfix(rows=counts.rows, refresh=False)
            shown.update(counts.done - shown.n)

        yield ProgressTally(told)


# When a job is due.

LONG_SECONDS = 300
HELD_SECONDS = 60.0
RETRY_SECONDS = 900.0
STORE_AWAY_SECONDS = 5.0
BACKFILLS = 10


def seconds_until_due(since_done_seconds: float | None, interval_seconds: float) -> float:
    """Seconds until a job is due, given the seconds since its last finished run began; 0 when overdue or unknown.

    Jobs with short intervals are always due, since repeating them costs nothing.
    """
    if since_done_seconds is None or interval_seconds < LONG_SECONDS:
        return 0.0
    return max(interval_seconds - since_done_seconds, 0.0)


def retry_in(run: Run | None, interval_seconds: float) -> float | None:
    """Seconds until a retry before the regular interval; None: the interval is soon enough.

    No run means that another process holds the lease: if it dies, this one takes over within a minute.
    """
    if run is None or run.outcome is Outcome.STOPPED:
        seconds = HELD_SECONDS
    elif run.outcome is Outcome.FAILED:
        seconds = RETRY_SECONDS
    else:
        return None
    return seconds if seconds < interval_seconds else None


def seconds_to_next_step(run: Run) -> float:
    """Seconds until a run with remaining work continues: almost at once, or a little later when a part of it keeps
    failing.
    """
    spread = random.uniform(0.1, 0.4)  # noqa: S311 - jitter only, not security-sensitive
    return spread if run.outcome is Outcome.OK else 25 * spread


@dataclass(frozen=True, slots=True)
class Workload:
    """The load of the workers: live workers, queued jobs by queue, shards in total and running."""

    workers: int
    waiting: Mapping[str, int]
    shards: int
    shards_running: int


class WorkerPool(Protocol):
    """Worker processes that run jobs for this one. All methods raise AppError."""

    def send(self, job: str, by: str) -> None:
        """Queue the job, unless the same one is queued already. `by`: see `Run.started_by`."""

    def look(self) -> Workload:
        """The current load."""

    def close(self) -> None:
        """Close all connections. Idempotent; does not raise."""


Backfill = Callable[[Context, Window], Report]


@dataclass(frozen=True, slots=True)
class JobView:
    """A job for display. `state` is off, paused, running, waiting or backfill; `next_run_at` None while
    off or paused.
    """

    job: Job
    state: str
    progress: ProgressCounts | None
    queued_backfills: int
    next_run_at: datetime | None
    can_backfill: bool


class JitteredInterval(IntervalTrigger):  # type: ignore[misc]  # the library has no types
    """Fires every `seconds`, plus or minus `jitter`. Missed intervals are skipped.

    APScheduler's own trigger enumerates them all before it fires once: after a clock jump of decades that takes hours,
    in which nothing runs.
    """

    def get_next_fire_time(self, previous_fire_time: datetime | None, now: datetime) -> datetime | None:
        """See `apscheduler.triggers.base.BaseTrigger`."""
        at: datetime | None = super().get_next_fire_time(previous_fire_time, now)
        return super().get_next_fire_time(now, now) if at is not None and at <= now else at


@dataclass(slots=True)
class _JobState:
    """The state of one job. `running` is "" while it is idle."""

    job: Job
    running: str = ""
    tally: ProgressTally | None = None
    paused: bool = False
    backfills: int = 0

    @property
    def state(self) -> str:
        return "off" if self.job.off else self.running or ("paused" if self.paused else "waiting")


TICK_SECONDS = 5
STALLED_SECONDS = 30.0
JITTER_PARTS = 20
JITTER_LIMIT_SECONDS = 30
TICK = "tick"


class Scheduler:
    """Starts jobs when they are due, and on request. All methods are thread-safe.

    With `elsewhere`, jobs are sent to that pool; only backfills and jobs marked `here` run in this process.
    """

    def __init__(
        self,
        jobs: Iterable[Job],
        services: RunServices,
        stop: Stop,
        backfills: Mapping[str, Backfill],
        pauses: SqlPauses,
        *,
        elsewhere: WorkerPool | None = None,
    ) -> None:
        self._services = services
        self._stop = stop
        self._backfills = backfills
        self._pauses = pauses
        self.elsewhere = elsewhere
        self._lanes = {job.name: _JobState(job) for job in jobs}
        self._changed = threading.Condition()
        self._timers = BackgroundScheduler(
            timezone=UTC,
            executors={"default": ThreadPoolExecutor(1)},
            # at most two requested runs: one in progress, and one after it
            job_defaults={"misfire_grace_time": None, "coalesce": True, "max_instances": 2},
        )
        self._longest_seconds: dict[str, float] = {TICK: 2 * TICK_SECONDS}
        self._ticked_at = time.monotonic()
        self._closed = threading.Event()

    def start(self) -> None:
        """Start the timers. Every job that can run checks at once whether it is due, spread by jitter."""
        # a timer that fires while its job runs is skipped, which does not deserve a warning
        logging.getLogger("apscheduler").setLevel(logging.ERROR)
        now = datetime.now(UTC)
        for lane in self._able():
            name, interval = lane.job.name, lane.job.interval_seconds
            jitter = min(interval / JITTER_PARTS, JITTER_LIMIT_SECONDS)
            trigger = JitteredInterval(seconds=interval, jitter=jitter, timezone=UTC)
            self._longest_seconds[name] = interval + jitter + TICK_SECONDS
            self._timers.add_executor(ThreadPoolExecutor(1, {"thread_name_prefix": f"job-{name}"}), name)
            self._timers.add_job(self._turn, trigger, [lane], id=name, executor=name, next_run_time=now)
        self._timers.add_job(
            self._tick, JitteredInterval(seconds=TICK_SECONDS, timezone=UTC), id=TICK, next_run_time=now
        )
        self._timers.start()
        threading.Thread(target=self._watch, name="watch", daemon=True).start()

    def ask_stop(self, reason: str) -> None:
        """Start no new runs; running ones end at their next safe point."""
        self._stop.ask(reason)

    def close(self, seconds: float) -> Sequence[str]:
        """Stop everything within `seconds`; the names of stuck jobs that were abandoned."""
        self.ask_stop("the process ends")
        self._closed.set()
        if self._timers.running:
            self._timers.shutdown(wait=False)
        if self.elsewhere is not None:
            self.elsewhere.close()
        with self._changed:
            self._changed.wait_for(lambda: not self.busy, seconds)
            return [lane.job.name for lane in self._able() if lane.running]

    @property
    def turning(self) -> bool:
        """True while timers fire, or the process is shutting down. No I/O."""
        return self._stop.asked or time.monotonic() - self._ticked_at < STALLED_SECONDS

    @property
    def running(self) -> bool:
        """True from the start until a stop is requested."""
        return bool(self._timers.running) and not self._stop.asked

    @property
    def busy(self) -> bool:
        """True while any job is running."""
        return any(lane.running for lane in self._able())

    def views(self) -> Sequence[JobView]:
        """Every job, including those that are off."""
        return [self._view(lane) for lane in self._lanes.values()]

    def run_now(self, name: str, by: str = "a person") -> None:
        """Run `name` as soon as it is idle, even while paused. Raises Rejected (unknown, off) or
        Transient (stopping).
        """
        lane = self._lane(name)
        self._refuse(lane)
        self._turn_in(0, lane, by=by)

    def pause(self, name: str, by: str) -> None:
        """Suspend scheduled runs of `name` in every process. Raises Transient while the state is unavailable."""
        lane = self._lane(name)
        self._pauses.pause(name, self._services.clock(), by)
        self._follow(lane, paused=True)

    def resume(self, name: str) -> None:
        """Resume scheduled runs of `name` in every process."""
        lane = self._lane(name)
        self._pauses.resume(name)
        self._follow(lane, paused=False)

    def backfill(self, name: str, span: Window, by: str = "a person") -> None:
        """Fill `span` once the job is free. Raises Rejected when the job has no backfill."""
        self.queue(name, lambda job: backfill_job(job, self._backfills, span), by)

    def queue(self, name: str, other: Callable[[Job], Job], by: str = "a person") -> None:
        """Run `other(job)`, the job with different work, once the job is idle, until it has no more to do."""
        lane = self._lane(name)
        work = other(lane.job)
        self._refuse(lane)
        if lane.backfills >= BACKFILLS:
            raise Transient(f"{name}: {BACKFILLS} backfills are waiting already", "try again when one has finished")
        self._turn_in(0, lane, work, by=by)

    def _able(self) -> Sequence[_JobState]:
        return [lane for lane in self._lanes.values() if not lane.job.off]

    def _lane(self, name: str) -> _JobState:
        try:
            return self._lanes[name]
        except KeyError:
            hint = f"{did_you_mean(name[:80], self._lanes)}jobs: {', '.join(self._lanes)}"
            raise Rejected(f"no job is named {name[:80]!r}", hint) from None

    def _refuse(self, lane: _JobState) -> None:
        if lane.job.off:
            raise Rejected(f"job {lane.job.name} is off", lane.job.off)
        if self._stop.asked:
            raise Transient("the process is stopping: no new run starts", "ask again after the restart")

    def _view(self, lane: _JobState) -> JobView:
        name, state = lane.job.name, lane.state
        timer = None if state in ("off", "paused") else self._timers.get_job(name)
        return JobView(
            lane.job,
            state,
            lane.tally.counts if lane.tally else None,
            lane.backfills,
            getattr(timer, "next_run_time", None),
            can_backfill=name in self._backfills and not lane.job.off,
        )

    def _turn_in(
        self, seconds: float, lane: _JobState, other: Job | None = None, *, by: str = "", more: bool = False
    ) -> None:
        """Schedule one run beside the job's timer. A queued ordinary run is replaced by a later one."""
        if self._stop.asked:
            return
        with self._changed:
            lane.backfills += other is not None
        self._timers.add_job(
            self._turn,
            "date",
            [lane, other],
            {"by": by, "more": more},
            id=f"{lane.job.name} {uuid4().hex if other else bool(by)}",
            executor=lane.job.name,
            run_date=datetime.now(UTC) + timedelta(seconds=seconds),
            replace_existing=True,
        )

    def _turn(self, lane: _JobState, other: Job | None = None, *, by: str = "", more: bool = False) -> None:
        """One run, in the thread of its job. `other`: a backfill. `by`: who requested it, which also overrides a pause.
        `more`: it continues work that a time limit cut short.
        """
        with self._changed:
            lane.backfills -= other is not None
        if not (other or by):
            self._follow_pauses()  # without the state there are no leases either, so nothing runs
            if lane.paused or not (more or self._is_due(lane)):
                return
        if self.elsewhere is not None and other is None and not lane.job.here:
            self._send(self.elsewhere, lane.job, by or "schedule")
            return
        tally = logging_progress(lane.job.name)
        with self._changed:
            if self._stop.asked:
                return
            lane.running, lane.tally = "backfill" if other else "running", tally
        try:
            run = execute(other or lane.job, self._services, self._stop, tally, started_by=by or "schedule")
        finally:
            with self._changed:
                lane.running, lane.tally = "", None
                self._changed.notify_all()
        if run is None:
            log.debug("%s: another process holds the lease", lane.job.name)
        if run is not None and run.report.more:
            self._turn_in(seconds_to_next_step(run), lane, other, by=by, more=True)
        elif other is None:
            early_seconds = retry_in(run, lane.job.interval_seconds)
            if early_seconds is not None and not self._stop.asked:
                self._fire_in(early_seconds, lane.job.name)
        elif run is None:
            self._turn_in(HELD_SECONDS, lane, other, by=by)

    def _send(self, elsewhere: WorkerPool, job: Job, by: str) -> None:
        """A worker runs the job and continues while there is more. A retry timer covers workers that die or fail."""
        try:
            elsewhere.send(job.name, by)
        except AppError as error:
            log.warning("%s: it cannot be sent to a worker yet: %s", job.name, error)
        if job.interval_seconds > RETRY_SECONDS:
            self._fire_in(RETRY_SECONDS, job.name)

    def _is_due(self, lane: _JobState) -> bool:
        """Check the run records, which all processes share; if the job is not due, move its timer instead."""
        name, interval = lane.job.name, lane.job.interval_seconds
        if interval < LONG_SECONDS:
            return True
        try:
            seconds = seconds_until_due(self._services.runs.since_done_seconds(name), interval)
        except AppError as error:
            log.debug("%s: cannot read when it ran last: %s", name, error)
            seconds = STORE_AWAY_SECONDS
        if seconds > 0:
            self._fire_in(seconds, name)
        return seconds == 0

    def _follow(self, lane: _JobState, *, paused: bool) -> None:
        """While `paused`, skip the timer (a current run finishes); when it is resumed, fire at once."""
        with self._changed:
            resumed = lane.paused and not paused
            lane.paused = paused
        if resumed:
            self._fire_in(0, lane.job.name)

    def _fire_in(self, seconds: float, name: str) -> None:
        try:
            self._timers.modify_job(name, next_run_time=datetime.now(UTC) + timedelta(seconds=seconds))
        except JobLookupError:
            log.debug("%s: its timer is gone", name)

    def _tick(self) -> None:
        self._ticked_at = time.monotonic()

    def _watch(self) -> None:
        """Watch the wall clock and pauses by other processes, in a thread of its own, so that waiting
        delays nothing.
        """
        ahead = time.time() - time.monotonic()
        self._follow_pauses()
        while not self._closed.wait(TICK_SECONDS):
            self._follow_pauses()
            now_ahead = time.time() - time.monotonic()
            step, ahead = now_ahead - ahead, now_ahead
            if abs(step) > TICK_SECONDS:
                way = "forward" if step > 0 else "back"
                log.warning("the clock was set %s by %.0f s: every job checks now whether it is due", way, abs(step))
            # A clock that jumped ahead and back between two checks shows no step, but leaves timers far in the future.
            until = datetime.now(UTC) + timedelta(seconds=TICK_SECONDS)
            for timer in self._timers.get_jobs():
                longest = timedelta(seconds=self._longest_seconds.get(timer.id, HELD_SECONDS))
                if abs(step) > TICK_SECONDS or timer.next_run_time > until + longest:
                    self._fire_in(0, timer.id)

    def _follow_pauses(self) -> None:
        """As the state says, which all processes share."""
        try:
            paused = self._pauses.paused()
        except AppError as error:
            log.debug("cannot read which jobs are paused: %s", error)
            return
        for lane in self._able():
            self._follow(lane, paused=lane.job.name in paused)


Work = TypeVar("Work")


def require_ability(works: Mapping[str, Work], job: str, refusal: str, hint: str) -> Work:
    """The entry of `job` in a mapping that only some jobs are in. Raises Rejected, whose `hint` names those."""
    if job not in works:
        raise Rejected(f"job {job} {refusal}", hint.format(", ".join(sorted(works)) or "none"))
    return works[job]


def backfill_job(job: Job, backfills: Mapping[str, Backfill], span: Window) -> Job:
    """`job`, with its name and lease, whose work is to fill `span`. Raises Rejected when it has no backfill."""
    fill = require_ability(backfills, job.name, "has no backfill", "jobs that can be filled again: {}")
    return replace(job, work=lambda context: fill(context, span))
