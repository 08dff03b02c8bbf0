"""When jobs run. The timers are APScheduler's, whose only home this is; the runs have threads of their own.

Invariants: jobs that are off get no timer; a timer that was missed fires once when it can; when the wall clock steps,
either way, each job checks once if it is due, and none waits for the clock to come round again.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Protocol

from apscheduler.jobstores.base import JobLookupError
from apscheduler.schedulers.background import BackgroundScheduler
from apscheduler.triggers.interval import IntervalTrigger

from app.core.errors import AppError, Rejected
from app.core.runs import Context, Job, Report, RunDesk, Stop
from app.core.window import Window
from app.ops.log import bound
from app.ops.worker import Status, Worker

TICK_SECONDS = 5
STALLED_SECONDS = 30.0
JITTER_PARTS = 20
JITTER_LIMIT_SECONDS = 30
TICK = "tick"


class Pauses(Protocol):
    """Which jobs are paused, kept where every process looks. All methods raise AppError."""

    def paused(self) -> Mapping[str, datetime]:
        """Job -> since when."""

    def pause(self, job: str, at: datetime, by: str) -> None:
        """Idempotent."""

    def resume(self, job: str) -> None:
        """Idempotent."""


Backfill = Callable[[Context, Window], Report]
log = logging.getLogger(__name__)


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
        self, jobs: Iterable[Job], desk: RunDesk, stop: Stop, backfills: Mapping[str, Backfill], pauses: Pauses
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
