"""Telling people and monitors: a webhook when a job begins to fail, recovers or falls silent, a heartbeat per job.

Invariants: only addresses from the settings are called, and no job waits for an answer; what was told is kept in the
state until it is over, so neither a restart, a pause nor another process tells it twice; a heartbeat delays no alert.
"""

import logging
import queue
import random
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Protocol
from urllib.parse import urlsplit

from app.core.errors import AppError, Stopped
from app.core.retry import RetryPolicy, retry
from app.core.runs import Job, Outcome, Run, Stop, Total
from app.ops.addresses import Heartbeats, post
from app.settings import Settings

WATCH_SECONDS = 15.0
WAITING = 1000
POLICY = RetryPolicy(attempts=4, first_seconds=1.0, cap_seconds=20.0)
BAD = (Outcome.FAILED, Outcome.PARTIAL)
DONE = (Outcome.OK, Outcome.PARTIAL)
FAILED, RECOVERED, STALE = "failed", "recovered", "stale"
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Rules:
    """Whom to tell, and when a job is stale: no run came to its end for its interval and this grace.

    `webhook_url` "" = nobody. `heartbeat_urls` are by job, as are those of `grace_by_job`.
    """

    service: str
    webhook_url: str = ""
    heartbeat_urls: Mapping[str, str] = field(default_factory=dict)
    grace_seconds: float = 900.0
    grace_by_job: Mapping[str, float] = field(default_factory=dict)

    def limits(self, job: Job) -> tuple[float, float]:
        """Interval and grace of a job, in seconds."""
        return job.interval_seconds, self.grace_by_job.get(job.name, self.grace_seconds)


def rules_of(settings: Settings) -> Rules:
    """The rules as they are configured."""
    alert = settings.alert
    pairs = filter(None, alert.heartbeat_urls.get_secret_value().split(","))
    return Rules(
        service=settings.service.name,
        webhook_url=alert.webhook_url.get_secret_value(),
        heartbeat_urls={job: url for job, _, url in (pair.partition("=") for pair in pairs)},
        grace_seconds=alert.grace_seconds,
        grace_by_job=dict(alert.grace_by_job),
    )


class Record(Protocol):
    """What is asked of the record of runs."""

    def totals(self) -> Sequence[Total]:
        """Sums by job and outcome, with the end of the last run of each."""


class Told(Protocol):
    """What people were told of a job and is not over yet, shared by all processes. All methods raise AppError."""

    def told(self) -> Mapping[tuple[str, str], datetime]:
        """Job and event -> since when."""

    def begin(self, job: str, event: str, at: datetime) -> bool:
        """True for the one caller who is first and has to tell; False while it is told already."""

    def end(self, job: str, before: datetime, event: str | None = None) -> bool:
        """Whatever was told of `job` before that instant is over, or only `event`. True for the one who ended it."""


@dataclass(frozen=True, slots=True)
class Watched:
    """What is watched: the jobs, which of them are paused, the record of runs, and what was told of them."""

    jobs: Sequence[Job]
    paused: Callable[[], Collection[str]]
    record: Record
    told: Told
    clock: Callable[[], datetime]


def is_stale(last_at: datetime | None, started_at: datetime, limits: tuple[float, float], now: datetime) -> bool:
    """True when the last run came to its end longer ago than the sum of `limits`, interval and grace in seconds.

    A process that has just started is given the grace, and a job that never ran both.
    """
    interval, grace = (timedelta(seconds=each) for each in limits)
    return now - started_at > grace and now - (last_at or started_at) > interval + grace


def last_ends(totals: Sequence[Total], outcomes: Collection[Outcome]) -> Mapping[str, datetime]:
    """Job -> end of its last run with one of these outcomes."""
    last: dict[str, datetime] = {}
    for total in totals:
        if total.outcome in outcomes:
            last[total.job] = max(total.ended_at, last.get(total.job, total.ended_at))
    return last


class Alerts:
    """One thread that looks and tells. `ended` may be called from any thread and never waits."""

    def __init__(self, rules: Rules, watched: Watched) -> None:
        self._rules = rules
        self._watched = watched
        self._ended: queue.Queue[Run] = queue.Queue(WAITING)
        self._stop = Stop()
        self._started_at = watched.clock()
        self._stale: frozenset[str] = frozenset()
        self._thread = threading.Thread(target=self._loop, name="alerts", daemon=True)
        self._heartbeats = Heartbeats(rules.heartbeat_urls)

    @property
    def stale(self) -> Collection[str]:
        """Jobs that fell silent, as of the last look."""
        return self._stale

    def start(self) -> None:
        """Begin to look."""
        for name in {*self._rules.heartbeat_urls, *self._rules.grace_by_job} - {job.name for job in self._watched.jobs}:
            log.warning("HEARTBEAT_URLS or ALERT_GRACE_BY_JOB names %r, which is no job", name)
        self._thread.start()
        self._heartbeats.start()

    def close(self) -> None:
        """Tell no more; what is on its way is left behind."""
        self._heartbeats.close()
        self._stop.ask("the process ends")

    def ended(self, run: Run, _: BaseException | None) -> None:
        """A run ended."""
        if run.outcome is Outcome.OK:
            self._heartbeats.beat(run.job)
        if not self._rules.webhook_url:
            return
        try:
            self._ended.put_nowait(run)
        except queue.Full:
            log.warning("%s: nobody is told of the end of run %s: %d wait already", run.job, run.run_id, WAITING)

    def _loop(self) -> None:
        looked_at = self._started_at
        while not self._stop.asked:
            try:
                self._heed(self._ended.get(timeout=1.0))
            except queue.Empty:
                pass
            except AppError as error:
                log.warning("alerts: %s", error)
            now = self._watched.clock()
            if abs((now - looked_at).total_seconds()) >= WATCH_SECONDS:
                looked_at = now
                self._look(now)

    def _heed(self, run: Run) -> None:
        """Bad runs open an alert, the first good one after them ends all that is open of its job."""
        at = run.ended_at or self._watched.clock()
        more = {"hint": run.hint, "run_id": run.run_id, "outcome": run.outcome.value}
        if run.outcome in BAD and self._watched.told.begin(run.job, FAILED, at):
            self._tell(FAILED, run.job, run.error, more)
        if run.outcome is Outcome.OK and self._watched.told.end(run.job, at):
            self._tell(RECOVERED, run.job, f"{run.report.rows} rows moved", more)

    def _look(self, now: datetime) -> None:
        """Which jobs are stale, and what is over without a run that was heeded here: another process's, a command's."""
        try:
            totals = self._watched.record.totals()
            self._stale = self._stale_now(last_ends(totals, DONE), now)
            if self._rules.webhook_url:
                self._tell_over(totals)
                self._tell_stale(now)
        except AppError as error:
            log.debug("alerts: the record cannot be read: %s", error)

    def _tell_stale(self, now: datetime) -> None:
        known = self._watched.told.told()
        for name in sorted(self._stale):
            if (name, STALE) not in known and self._watched.told.begin(name, STALE, now):
                hint = "look at the dashboard and at /ready; `python -m app check` tries every system"
                self._tell(STALE, name, "no run came to its end in time", {"hint": hint})

    def _tell_over(self, totals: Sequence[Total]) -> None:
        """A good run ends all; one that is partial ends a silence, of which nothing is said: it began a failure."""
        good, done = last_ends(totals, (Outcome.OK,)), last_ends(totals, DONE)
        for (name, event), told_at in self._watched.told.told().items():
            if (at := good.get(name)) and at > told_at:
                if self._watched.told.end(name, at):
                    self._tell(RECOVERED, name, "runs come to their end again", {})
            elif event == STALE and (at := done.get(name)) and at > told_at:
                self._watched.told.end(name, at, STALE)

    def _stale_now(self, last: Mapping[str, datetime], now: datetime) -> frozenset[str]:
        paused = self._watched.paused()
        return frozenset(
            job.name
            for job in self._watched.jobs
            if not job.off
            and job.name not in paused
            and is_stale(last.get(job.name), self._started_at, self._rules.limits(job), now)
        )

    def _tell(self, event: str, job: str, message: str, more: Mapping[str, str]) -> None:
        """`text` is what chat services show; the other fields are for programs."""
        sign = {FAILED: "✗", RECOVERED: "✓", STALE: "…"}[event]
        hint = f" Next: {more['hint']}" if more.get("hint") else ""
        body = {
            "event": event,
            "service": self._rules.service,
            "job": job,
            "at": self._watched.clock().isoformat(timespec="seconds").replace("+00:00", "Z"),
            "message": message,
            **more,
            "text": f"{sign} {self._rules.service}: {job} {event}: {message}{hint}",
        }
        self._send(self._rules.webhook_url, body)

    def _send(self, url: str, body: Mapping[str, Any]) -> None:
        try:
            retry(lambda: post(url, body), POLICY, self._stop, random.random)
        except Stopped:
            return
        except AppError as error:
            log.warning("%s was not told: %s", urlsplit(url).hostname, error)
