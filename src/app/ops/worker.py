"""One job's own thread: it runs what is asked of it, one after the other.

Invariants: a job never overlaps itself in this process, whoever asks (timer, person, backfill); work that stopped at
its time limit goes on soon, but never in a tight loop; the thread is a daemon, so a stuck run cannot hold up the exit.
"""

import logging
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from app.core.errors import AppError, Rejected, Transient
from app.core.runs import Job, Outcome, Run, RunDesk, Stop, execute
from app.ops.progress import Counts, Tally, logged

LONG_SECONDS = 300
HELD_SECONDS = 60.0
RETRY_SECONDS = 900.0
STORE_AWAY_SECONDS = 5.0
BACKFILLS = 10
log = logging.getLogger(__name__)


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
        self._tally: Tally | None = None
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
