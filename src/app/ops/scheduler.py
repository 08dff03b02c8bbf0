"""When jobs run and in which thread. APScheduler has its home here."""

import logging
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Protocol

from apscheduler.jobstores.base import JobLookupError
from apscheduler.schedulers.background import BackgroundScheduler
from apscheduler.triggers.interval import IntervalTrigger

from app.core.errors import AppError, Rejected, Transient
from app.core.runs import Context, Job, Outcome, Report, Run, RunDesk, Stop, execute
from app.core.windows import Window
from app.ops.logs import bound

# How far long work is: a bar on a terminal, a line in the log now and then elsewhere, and always in memory.
#
# Invariant: a tally only grows, and telling of it never slows the work down: one look at a clock per advance.

LOG_EVERY_SECONDS = 10.0
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Counts:
    """Units done of those known so far, and rows moved."""

    done: int = 0
    total: int = 0
    rows: int = 0


class ProgressTally:
    """Implements `app.core.runs.Progress` in memory; `told` is called with the new counts after each advance."""

    def __init__(self, told: Callable[[Counts], None]) -> None:
        self._lock = threading.Lock()
        self._told = told
        self._counts = Counts()

    def advance(self, *, done: int = 0, total: int = 0, rows: int = 0) -> None:
        """Add to the counts. From any thread."""
        with self._lock:
            held = self._counts
            self._counts = replace(held, done=held.done + done, total=held.total + total, rows=held.rows + rows)
            self._told(self._counts)

    @property
    def counts(self) -> Counts:
        """The counts so far."""
        return self._counts


def logged(job: str, every_seconds: float = LOG_EVERY_SECONDS) -> ProgressTally:
    """A tally that writes one line to the log every ten seconds of work; short work stays silent."""
    said_at = time.monotonic()

    def told(counts: Counts) -> None:
        nonlocal said_at
        now = time.monotonic()
        if now - said_at >= every_seconds:
            said_at = now
            log.info("%s: %d of %d done, %d rows", job, counts.done, counts.total, counts.rows)

    return ProgressTally(told)


@contextmanager
def bar(job: str, unit: str) -> Iterator[ProgressTally]:
    """A tally shown as a progress bar on stderr, removed at the end."""
    from tqdm import tqdm

    with tqdm(desc=job, unit=unit, leave=False, dynamic_ncols=True) as shown:

        def told(counts: Counts) -> None:
            shown.total = max(counts.total, counts.done) or None
            shown.set_postfix(rows=counts.rows, refresh=False)
            shown.update(counts.done - shown.n)

        yield ProgressTally(told)


# One job's own thread: it runs what is asked of it, one after the other.
#
# Invariants: a job never overlaps itself in this process, whoever asks (timer, person, backfill); work that stopped
# at its time limit goes on soon, but never in a tight loop; the thread is a daemon, so a stuck run cannot hold up
# the exit.

LONG_SECONDS = 300
HELD_SECONDS = 60.0
RETRY_SECONDS = 900.0
STORE_AWAY_SECONDS = 5.0
BACKFILLS = 10


def due_in(since_done_seconds: float | None, interval_seconds: float) -> float:
    """Seconds until a job is due whose last finished run began so long ago; 0 when overdue or unknown.

    Short intervals are always due at once, since a minute's job costs nothing to repeat.
    """
    if since_done_seconds is None or interval_seconds < LONG_SECONDS:
        return 0.0
    return max(interval_seconds - since_done_seconds, 0.0)


def retry_in(run: Run | None, interval_seconds: float) -> float | None:
    """Seconds until a job should be tried again before its interval is over; None: the interval is soon enough.

    No run means that another process holds the lease: if it dies, this one takes over within a minute.
    """
    if run is None or run.outcome is Outcome.STOPPED:
        seconds = HELD_SECONDS
    elif run.outcome is Outcome.FAILED:
        seconds = RETRY_SECONDS
    else:
        return None
    return seconds if seconds < interval_seconds else None


@dataclass(frozen=True, slots=True)
class Status:
    """Where a job stands: `state` is off, paused, running, waiting or backfill."""

    state: str
    progress: Counts | None
    queued_backfills: int


@dataclass(frozen=True, slots=True)
class _Turn:
    """One thing to run, not before a monotonic instant.

    `asked`: a person wants it, also while paused. `more`: it goes on with what a time limit cut short.
    """

    job: Job
    not_before: float
    asked: bool = False
    more: bool = False
    backfill: bool = False


class Worker:
    """The thread of one job. `fire_in(seconds)` moves its timer; `paused()` asks the state, and raises AppError."""

    def __init__(
        self,
        job: Job,
        desk: RunDesk,
        stop: Stop,
        fire_in: Callable[[float], None],
        paused: Callable[[], bool],
    ) -> None:
        self.job = job
        self._asks_paused = paused
        self._desk = desk
        self._stop = stop
        self._fire_in = fire_in
        self._changed = threading.Condition()
        self._turns: list[_Turn] = []
        self._running: _Turn | None = None
        self._tally: ProgressTally | None = None
        self._paused = False
        self._thread = threading.Thread(target=self._loop, name=f"job-{job.name}", daemon=True)

    def start(self) -> None:
        """Begin to take turns."""
        self._thread.start()

    def due(self) -> None:
        """The timer fired: run once, unless paused. A wake during a run means one more run after it."""
        with self._changed:
            if not self._paused:
                self._put(_Turn(self.job, 0.0))

    def run_now(self) -> None:
        """Run once more, as soon as nothing of this job runs; also while paused. Raises Rejected or Transient."""
        with self._changed:
            self._refuse()
            self._put(_Turn(self.job, 0.0, asked=True))

    def backfill(self, job: Job) -> None:
        """Queue `job`, this job with other work, to be repeated until it has no more to do."""
        with self._changed:
            self._refuse()
            if sum(turn.backfill for turn in self._turns) >= BACKFILLS:
                raise Transient(
                    f"{self.job.name}: {BACKFILLS} backfills are waiting already", "try again when one of them is done"
                )
            self._put(_Turn(job, 0.0, asked=True, backfill=True))

    def follow(self, *, paused: bool) -> None:
        """Let the timer pass while `paused`, what runs now runs to its end; then follow it again, beginning at once."""
        with self._changed:
            if paused == self._paused:
                return
            self._paused = paused
            if paused:
                self._turns = [turn for turn in self._turns if turn.asked]
        if not paused:
            self.due()

    def wake(self) -> None:
        """Look at the stop signal now."""
        with self._changed:
            self._changed.notify_all()

    def join(self, seconds: float) -> bool:
        """Wait for the thread's end; False when it is stuck."""
        self._thread.join(max(seconds, 0.0))
        return not self._thread.is_alive()

    @property
    def alive(self) -> bool:
        """True while the thread lives."""
        return self._thread.is_alive()

    @property
    def busy(self) -> bool:
        """True while something runs."""
        return self._running is not None

    @property
    def status(self) -> Status:
        """Where the job stands now."""
        with self._changed:
            waiting = sum(turn.backfill for turn in self._turns)
            counts = self._tally.counts if self._tally else None
            return Status(self._state(), counts, waiting)

    def _state(self) -> str:
        if self.job.off:
            return "off"
        if self._running:
            return "backfill" if self._running.backfill else "running"
        return "paused" if self._paused else "waiting"

    def _refuse(self) -> None:
        if self.job.off:
            raise Rejected(f"job {self.job.name} is off", self.job.off)
        if self._stop.asked:
            raise Transient("the process is stopping: no new run starts", "ask again after the restart")

    def _put(self, turn: _Turn) -> None:
        """Add a turn. Of ordinary turns one is enough: an asked one takes the place of one that the timer put."""
        if not turn.backfill:
            same = [held for held in self._turns if not held.backfill]
            asked = turn.asked or any(held.asked for held in same)
            turn = replace(turn, asked=asked, more=turn.more or any(held.more for held in same))
            self._turns = [held for held in self._turns if held.backfill]
        self._turns.append(turn)
        self._changed.notify_all()

    def _loop(self) -> None:
        while (turn := self._next()) is not None:
            try:
                self._take(turn)
            finally:
                with self._changed:
                    self._running = None
                    self._tally = None

    def _next(self) -> _Turn | None:
        """Wait for a turn; None once a stop was asked for."""
        with self._changed:
            while not self._stop.asked:
                now = time.monotonic()
                ready = next((turn for turn in self._turns if turn.not_before <= now), None)
                if ready is not None:
                    self._turns.remove(ready)
                    self._running = ready
                    return ready
                soonest = min((turn.not_before for turn in self._turns), default=None)
                self._changed.wait(None if soonest is None else soonest - now)
        return None

    def _take(self, turn: _Turn) -> None:
        if not turn.asked and (self._is_paused() or not (turn.more or self._is_due())):
            return
        tally = logged(turn.job.name)
        with self._changed:
            self._tally = tally
        run = execute(turn.job, self._desk, self._stop, tally)
        if run is None:
            log.debug("%s: another process holds the lease", turn.job.name)
        if run is not None and run.report.more:
            self._go_on(turn, run)
        elif not turn.backfill:
            self._retry_early(run)
        elif run is None:
            self._again(turn, HELD_SECONDS)

    def _is_paused(self) -> bool:
        """As the state says, which other processes share. While it is away no lease is had either, so nothing runs."""
        try:
            paused = self._asks_paused()
        except AppError as error:
            log.debug("%s: whether it is paused cannot be read: %s", self.job.name, error)
            return self._paused
        self.follow(paused=paused)
        return paused

    def _is_due(self) -> bool:
        """Look at the record of runs, which other processes share; when the job is not due, move the timer instead."""
        if self.job.interval_seconds < LONG_SECONDS:
            return True
        try:
            seconds = due_in(self._desk.runs.since_done_seconds(self.job.name), self.job.interval_seconds)
        except AppError as error:
            log.debug("%s: when it ran last cannot be read: %s", self.job.name, error)
            self._fire_in(STORE_AWAY_SECONDS)
            return False
        if seconds > 0:
            self._fire_in(seconds)
        return seconds == 0

    def _go_on(self, turn: _Turn, run: Run) -> None:
        """There is work left: go on at once, or a little later when a part of it fails each time."""
        spread = random.uniform(0.1, 0.4)  # noqa: S311 - replicas apart, not a secret
        self._again(turn, spread if run.outcome is Outcome.OK else 25 * spread)

    def _again(self, turn: _Turn, seconds: float) -> None:
        with self._changed:
            if not self._paused or turn.asked:
                self._put(replace(turn, not_before=time.monotonic() + seconds, more=True))

    def _retry_early(self, run: Run | None) -> None:
        seconds = retry_in(run, self.job.interval_seconds)
        if seconds is not None and not self._stop.asked:
            self._fire_in(seconds)


# When jobs run. The timers are APScheduler's, whose only home this is; the runs have threads of their own.
#
# Invariants: jobs that are off get no timer; a timer that was missed fires once when it can; when the wall clock
# steps, either way, each job checks once if it is due, and none waits for the clock to come round again.

TICK_SECONDS = 5
STALLED_SECONDS = 30.0
JITTER_PARTS = 20
JITTER_LIMIT_SECONDS = 30
TICK = "tick"


class JobPauses(Protocol):
    """Which jobs are paused, kept where every process looks. All methods raise AppError."""

    def paused(self) -> Mapping[str, datetime]:
        """Job -> since when."""

    def pause(self, job: str, at: datetime, by: str) -> None:
        """Idempotent."""

    def resume(self, job: str) -> None:
        """Idempotent."""


Backfill = Callable[[Context, Window], Report]


@dataclass(frozen=True, slots=True)
class JobView:
    """A job as it is shown. `next_run_at` is None when off or paused."""

    job: Job
    status: Status
    next_run_at: datetime | None
    can_backfill: bool


class Every(IntervalTrigger):  # type: ignore[misc]  # the library has no types
    """Each `seconds`, apart by `jitter`. Intervals that were missed are left out.

    APScheduler's own trigger names every one of them before one is run for all: after a jump of the clock by decades
    that takes hours, in which nothing runs.
    """

    def get_next_fire_time(self, previous_fire_time: datetime | None, now: datetime) -> datetime | None:
        """See `apscheduler.triggers.base.BaseTrigger`."""
        at: datetime | None = super().get_next_fire_time(previous_fire_time, now)
        return super().get_next_fire_time(now, now) if at is not None and at <= now else at


class Scheduler:
    """Starts jobs when they are due, and on request. All methods may be called from any thread."""

    def __init__(
        self, jobs: Iterable[Job], desk: RunDesk, stop: Stop, backfills: Mapping[str, Backfill], pauses: JobPauses
    ) -> None:
        self._clock = desk.clock
        self._pauses = pauses
        self._stop = stop
        self._backfills = backfills
        self._timers = BackgroundScheduler(
            timezone=UTC, job_defaults={"misfire_grace_time": None, "coalesce": True, "max_instances": 1}
        )
        self._workers = {job.name: self._hired(job, desk) for job in jobs}
        self._longest_seconds: dict[str, float] = {TICK: 2 * TICK_SECONDS}
        self._ticked_at = time.monotonic()
        self._closed = threading.Event()

    def start(self) -> None:
        """Start the timers; every job that can run is looked at at once, spread by its jitter."""
        logging.getLogger("apscheduler").setLevel(logging.WARNING)
        now = datetime.now(UTC)
        for worker in self._able():
            worker.start()
            interval = worker.job.interval_seconds
            jitter = min(interval / JITTER_PARTS, JITTER_LIMIT_SECONDS)
            trigger = Every(seconds=interval, jitter=jitter, timezone=UTC)
            self._timers.add_job(worker.due, trigger, id=worker.job.name, next_run_time=now)
            self._longest_seconds[worker.job.name] = interval + jitter + TICK_SECONDS
        self._timers.add_job(self._tick, Every(seconds=TICK_SECONDS, timezone=UTC), id=TICK, next_run_time=now)
        self._timers.start()
        threading.Thread(target=self._watch, name="watch", daemon=True).start()

    def ask_stop(self, reason: str) -> None:
        """No new run starts from now on; running ones end at their next safe point."""
        self._stop.ask(reason)
        for worker in self._workers.values():
            worker.wake()

    def close(self, seconds: float) -> Sequence[str]:
        """Stop everything within `seconds`; the names of jobs that are stuck and were left behind."""
        self.ask_stop("the process ends")
        self._closed.set()
        if self._timers.running:
            self._timers.shutdown(wait=False)
        deadline = time.monotonic() + seconds
        return [w.job.name for w in self._able() if w.alive and not w.join(deadline - time.monotonic())]

    @property
    def stop(self) -> Stop:
        """The stop signal of all work."""
        return self._stop

    @property
    def turning(self) -> bool:
        """True while timers fire and every job's thread lives, or the process is about to end. No I/O."""
        return self._stop.asked or (time.monotonic() - self._ticked_at < STALLED_SECONDS and self.running)

    @property
    def running(self) -> bool:
        """True while every job's thread lives and no stop was asked for."""
        return not self._stop.asked and all(worker.alive for worker in self._able())

    @property
    def busy(self) -> bool:
        """True while a run goes on."""
        return any(worker.busy for worker in self._able())

    def views(self) -> Sequence[JobView]:
        """Every job, also those that are off."""
        return [self._view(worker) for worker in self._workers.values()]

    def run_now(self, name: str) -> None:
        """Run `name` as soon as nothing of it runs. Raises Rejected (unknown, off) or Transient (stopping)."""
        self._worker(name).run_now()

    def pause(self, name: str, by: str) -> None:
        """Skip the timer of `name` in every process until it is resumed. Raises Transient while the state is away."""
        worker = self._worker(name)
        self._pauses.pause(name, self._clock(), by)
        worker.follow(paused=True)

    def resume(self, name: str) -> None:
        """Follow the timer of `name` again, in every process."""
        worker = self._worker(name)
        self._pauses.resume(name)
        worker.follow(paused=False)

    def backfill(self, name: str, span: Window) -> None:
        """Fill `span` once the job is free. Raises Rejected when the job has no backfill."""
        self.queue(name, lambda job: backfill_job(job, self._backfills, span))

    def queue(self, name: str, other: Callable[[Job], Job]) -> None:
        """Run `other(job)`, the job with other work, once the job is free."""
        worker = self._worker(name)
        worker.backfill(other(worker.job))

    def _hired(self, job: Job, desk: RunDesk) -> Worker:
        def paused() -> bool:
            return job.name in self._pauses.paused()

        return Worker(named(job), desk, self._stop, self._mover(job.name), paused)

    def _able(self) -> Sequence[Worker]:
        return [worker for worker in self._workers.values() if not worker.job.off]

    def _worker(self, name: str) -> Worker:
        try:
            return self._workers[name]
        except KeyError:
            raise Rejected(f"no job is named {name[:80]!r}", f"jobs: {', '.join(self._workers)}") from None

    def _view(self, worker: Worker) -> JobView:
        status = worker.status
        timer = None if status.state in ("off", "paused") else self._timers.get_job(worker.job.name)
        at = getattr(timer, "next_run_time", None)
        return JobView(worker.job, status, at, worker.job.name in self._backfills and not worker.job.off)

    def _mover(self, name: str) -> Callable[[float], None]:
        def fire_in(seconds: float) -> None:
            try:
                self._timers.modify_job(name, next_run_time=datetime.now(UTC) + timedelta(seconds=seconds))
            except JobLookupError:
                log.debug("%s: its timer is gone, the process ends", name)

        return fire_in

    def _tick(self) -> None:
        self._ticked_at = time.monotonic()

    def _watch(self) -> None:
        """Look at the clock and at what other processes paused, in a thread whose waiting holds up nothing."""
        ahead = time.time() - time.monotonic()
        self._follow_pauses()
        while not self._closed.wait(TICK_SECONDS):
            self._follow_pauses()
            now_ahead = time.time() - time.monotonic()
            step, ahead = now_ahead - ahead, now_ahead
            if abs(step) > TICK_SECONDS:
                way = "forward" if step > 0 else "back"
                log.warning("the clock was set %s by %.0f s: every job looks now whether it is due", way, abs(step))
            # A clock that went ahead and back between two looks leaves no step, and timers that lie far ahead.
            until = datetime.now(UTC) + timedelta(seconds=TICK_SECONDS)
            for name, seconds in self._longest_seconds.items():
                at = getattr(self._timers.get_job(name), "next_run_time", None)
                if abs(step) > TICK_SECONDS or (at is not None and at > until + timedelta(seconds=seconds)):
                    self._mover(name)(0)

    def _follow_pauses(self) -> None:
        try:
            paused = self._pauses.paused()
        except AppError as error:
            log.debug("which jobs are paused cannot be read: %s", error)
            return
        for worker in self._able():
            worker.follow(paused=worker.job.name in paused)


def backfill_job(job: Job, backfills: Mapping[str, Backfill], span: Window) -> Job:
    """`job`, under its own name and lease, with the filling of `span` as its work. Raises Rejected when it has none."""
    fill = backfills.get(job.name)
    if fill is None:
        raise Rejected(f"job {job.name} has no backfill", "only pipelines with windows can be filled again")
    return named(replace(job, work=lambda context: fill(context, span)))


def named(job: Job) -> Job:
    """`job`, whose log records say which run made them."""

    def work(context: Context) -> Report:
        with bound(context.run_id, job.name):
            return job.work(context)

    return replace(job, work=work)
