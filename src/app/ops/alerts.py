"""Telling people and monitors: a webhook when a job begins to fail, recovers or falls silent, a heartbeat per job.

Invariants: only addresses from the settings are called, a redirect is never followed, no job waits for an answer; what
is told is decided from the record of runs, so a restart tells nothing twice, and of several processes one tells it.
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

from app.core.errors import AppError, Permanent, Stopped, Transient
from app.core.retry import RetryPolicy, retry
from app.core.runs import Job, Leases, LeaseTerms, Outcome, Run, Stop, Total
from app.settings import Settings

WATCH_SECONDS = 15.0
SEND_SECONDS = 10.0
WAITING = 1000
LEASE = "alerts"
POLICY = RetryPolicy(attempts=4, first_seconds=1.0, cap_seconds=20.0)
BAD = (Outcome.FAILED, Outcome.PARTIAL)
DONE = (Outcome.OK, Outcome.PARTIAL)
FAILED, RECOVERED, STALE = "failed", "recovered", "stale"
REFUSED = 300
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

    def ended_before(self, run: Run) -> Run | None:
        """The run of the same job before `run` that ended with a result."""

    def totals(self) -> Sequence[Total]:
        """Sums by job and outcome, with the end of the last run of each."""


@dataclass(frozen=True, slots=True)
class Watched:
    """What is watched: the jobs, which of them are paused, the record, and the leases that let one process tell."""

    jobs: Sequence[Job]
    paused: Callable[[], Collection[str]]
    record: Record
    leases: Leases
    terms: LeaseTerms
    clock: Callable[[], datetime]


def turn_of(run: Run, before: Run | None) -> str:
    """FAILED when a job begins to fail, RECOVERED when it is well again, "" when nothing turned."""
    was_bad = before is not None and before.outcome in BAD
    if run.outcome in BAD:
        return "" if was_bad else FAILED
    return RECOVERED if was_bad and run.outcome is Outcome.OK else ""


def is_stale(last_at: datetime | None, started_at: datetime, limits: tuple[float, float], now: datetime) -> bool:
    """True when the last run came to its end longer ago than the sum of `limits`, interval and grace in seconds.

    A process that has just started is given the grace, and a job that never ran both.
    """
    interval, grace = (timedelta(seconds=each) for each in limits)
    return now - started_at > grace and now - (last_at or started_at) > interval + grace


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

    @property
    def stale(self) -> Collection[str]:
        """Jobs that fell silent, as of the last look."""
        return self._stale

    def start(self) -> None:
        """Begin to look."""
        for name in {*self._rules.heartbeat_urls, *self._rules.grace_by_job} - {job.name for job in self._watched.jobs}:
            log.warning("HEARTBEAT_URLS or ALERT_GRACE_BY_JOB names %r, which is no job", name)
        self._thread.start()

    def close(self) -> None:
        """Tell no more; what is on its way is left behind."""
        self._stop.ask("the process ends")

    def ended(self, run: Run, _: BaseException | None) -> None:
        """A run ended."""
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
        if run.outcome is Outcome.OK and (url := self._rules.heartbeat_urls.get(run.job)):
            self._send(url, None)
        if not self._rules.webhook_url:
            return
        turn = turn_of(run, self._watched.record.ended_before(run))
        if turn:
            message = run.error if turn == FAILED else f"{run.report.rows} rows moved"
            self._tell(turn, run.job, message, {"hint": run.hint, "run_id": run.run_id, "outcome": run.outcome.value})

    def _look(self, now: datetime) -> None:
        """Which jobs are stale; only the process that holds the lease tells it."""
        try:
            stale = self._stale_now(now)
            fresh, over = stale - self._stale, self._stale - stale
            self._stale = stale
            if not self._rules.webhook_url or not (fresh or over) or not self._may_tell():
                return
        except AppError as error:
            log.debug("alerts: the record cannot be read: %s", error)
            return
        for name in sorted(fresh):
            hint = "look at the dashboard and at /ready; `python -m app check` tries every system"
            self._tell(STALE, name, "no run came to its end in time", {"hint": hint})
        for name in sorted(over):
            self._tell(RECOVERED, name, "runs come to their end again", {})

    def _stale_now(self, now: datetime) -> frozenset[str]:
        last: dict[str, datetime] = {}
        for total in self._watched.record.totals():
            if total.outcome in DONE:
                last[total.job] = max(total.ended_at, last.get(total.job, total.ended_at))
        paused = self._watched.paused()
        return frozenset(
            job.name
            for job in self._watched.jobs
            if not job.off
            and job.name not in paused
            and is_stale(last.get(job.name), self._started_at, self._rules.limits(job), now)
        )

    def _may_tell(self) -> bool:
        terms = self._watched.terms
        return self._watched.leases.acquire(LEASE, terms.owner, max(terms.ttl_seconds, 2 * WATCH_SECONDS)) is not None

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

    def _send(self, url: str, body: Mapping[str, Any] | None) -> None:
        try:
            retry(lambda: post(url, body), POLICY, self._stop, random.random)
        except Stopped:
            return
        except AppError as error:
            log.warning("%s was not told: %s", urlsplit(url).hostname, error)


def post(url: str, body: Mapping[str, Any] | None) -> None:
    """POST JSON, or GET without a body. Raises Transient or Permanent, whose texts hold no more than the host."""
    import urllib3

    host = urlsplit(url).hostname
    try:
        with urllib3.PoolManager(retries=False, timeout=SEND_SECONDS, headers={"User-Agent": "headwater"}) as pool:
            answer = pool.request("POST" if body is not None else "GET", url, json=body, redirect=False)
    except urllib3.exceptions.HTTPError as error:
        raise Transient(f"{host}: {type(error).__name__}", "check the address and the network") from error
    if answer.status in (408, 429) or answer.status >= 500:  # noqa: PLR2004 - HTTP's own numbers
        raise Transient(f"{host} answers {answer.status}", "nothing to do: it is tried again")
    if answer.status >= REFUSED:
        raise Permanent(f"{host} answers {answer.status}", "check the address; redirects are not followed")
