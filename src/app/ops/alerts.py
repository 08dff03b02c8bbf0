"""Webhooks and heartbeats: reports when a job begins to fail, recovers or falls silent."""

import logging
import queue
import random
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any
from urllib.parse import urlsplit

from app.config.settings import Settings
from app.core.errors import AppError, Permanent, Stopped, Transient
from app.core.network import CA_HINT, connection_fault, is_untrusted, proxy_for
from app.core.repair import HEAL_HINT, describe_trouble
from app.core.retry import RetryPolicy, retry
from app.core.runs import Job, Outcome, Run, RunTotal, Stop
from app.core.windows import whole_second
from app.db.state import State

# Outgoing calls: one HTTP request with strict rules, and the thread that sends heartbeats.
#
# Invariants: redirects are never followed, an error names only the host, nothing beyond the response head is read; an
# undeliverable heartbeat delays only other heartbeats, and those by one timeout at most.

SEND_SECONDS = 10.0
BEAT_SECONDS = 4.0
REFUSED = 300
log = logging.getLogger(__name__)


def post(url: str, body: Mapping[str, Any] | None, seconds: float = SEND_SECONDS) -> None:
    """POST JSON, or GET without a body. Raises Transient or Permanent; their texts contain no more than the host."""
    import urllib3

    host, method = urlsplit(url).hostname, "GET" if body is None else "POST"
    options: dict[str, Any] = {"retries": False, "timeout": seconds, "headers": {"User-Agent": "headwater"}}
    proxy = proxy_for(url)
    pool = urllib3.ProxyManager(proxy, **options) if proxy else urllib3.PoolManager(**options)
    try:
        with pool, closing(pool.request(method, url, json=body, redirect=False, preload_content=False)) as answer:
            status = answer.status
    except urllib3.exceptions.HTTPError as error:
        if is_untrusted(error):
            raise Permanent(f"{host}: its certificate is not trusted", CA_HINT) from error
        why = connection_fault(error, url) or f"no response from {host}"
        raise Transient(why, "check the address and the network") from error
    if status in (408, 429) or status >= 500:  # noqa: PLR2004 - HTTP status codes
        raise Transient(f"{host} answers {status}", "no action needed; it is retried")
    if status >= REFUSED:
        raise Permanent(f"{host} answers {status}", "check the address; redirects are not followed")


class Heartbeats:
    """One thread that calls a job's URL once for each `beat`; `beat` itself never blocks.

    Beats of a job that is already queued are merged, so the queue is bounded by the number of jobs.
    """

    def __init__(self, urls: Mapping[str, str], seconds: float = BEAT_SECONDS) -> None:
        self.urls = urls
        self._seconds = seconds
        self._queue: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._waiting: set[str] = set()
        self._silent: set[str] = set()
        self._closed = False

    def start(self) -> None:
        """Start the thread, if any URL is set."""
        if self.urls:
            threading.Thread(target=self._loop, name="heartbeats", daemon=True).start()

    def close(self) -> None:
        """Stop sending; a call in progress is abandoned."""
        self._closed = True
        self._queue.put("")

    def beat(self, job: str) -> None:
        """Report a successful run of `job`."""
        if job in self.urls and job not in self._waiting:
            self._waiting.add(job)
            self._queue.put(job)

    def _loop(self) -> None:
        """One attempt for each beat; the next successful run calls again. Logs only when a URL becomes unreachable or
        reachable again.
        """
        while (job := self._queue.get()) and not self._closed:
            self._waiting.discard(job)
            try:
                post(self.urls[job], None, self._seconds)
            except AppError as error:
                if job not in self._silent:
                    log.warning("the heartbeat of %s cannot be delivered: %s", job, error)
                self._silent.add(job)
            else:
                if job in self._silent:
                    log.info("the heartbeat of %s is delivered again", job)
                self._silent.discard(job)


# Alerts: a webhook when a job begins to fail, recovers or falls silent, and a heartbeat per job.
#
# Invariants: only URLs from the settings are called, and no job waits for a response; open alerts are kept in the
# state, so none is sent again after a restart, a pause, or by another process; a heartbeat never delays an alert.

WATCH_SECONDS = 15.0
WAITING = 1000
POLICY = RetryPolicy(attempts=4, first_seconds=1.0, cap_seconds=20.0)
ONCE = replace(POLICY, attempts=1)  # while the webhook is away
AWAY_SECONDS = 60.0
BAD = (Outcome.FAILED, Outcome.PARTIAL)
DONE = (Outcome.OK, Outcome.PARTIAL)
FAILED, RECOVERED, STALE, CLOCK_AHEAD = "failed", "recovered", "stale", "clock_ahead"
OBJECTS = "objects_missing"
AHEAD = timedelta(seconds=60)
TICK = timedelta(microseconds=1)
STALE_HINT = "look at the dashboard and at /ready; `python -m app check` tries every system"
CLOCK_HINT = "check the clocks of the machines; nothing waits for them, and the next good run sets its own time right"


def is_stale(last_seconds: float | None, up_seconds: float, limits: tuple[float, float]) -> bool:
    """True when the last run finished longer ago than the sum of `limits`, interval and grace in seconds.

    A process that has just started gets the grace, and a job that never ran gets both. A negative age only shows that a
    clock was wrong: the job is then treated as one that never ran.
    """
    if last_seconds is None or last_seconds < -AHEAD.total_seconds():
        last_seconds = up_seconds
    interval, grace = limits
    return up_seconds > grace and last_seconds > interval + grace


def last_ends(totals: Sequence[RunTotal], outcomes: Collection[Outcome]) -> Mapping[str, datetime]:
    """The end of each job's last run with one of these outcomes."""
    last: dict[str, datetime] = {}
    for total in totals:
        if total.outcome in outcomes:
            last[total.job] = max(total.ended_at, last.get(total.job, total.ended_at))
    return last


def ahead_message(seconds: float) -> str:
    """The message for a job whose records lie this far in the future."""
    return f"its last run or one of its cursors lies {seconds:,.0f} s ahead of now"


class Alerts:
    """One thread that checks and sends alerts. `ended` may be called from any thread and never blocks.

    `state` stores the alerts that were sent, so that only one of several processes sends each, and provides the clocks
    of the run records; `clock` is this machine's; `elapsed_seconds` is monotonic. As of the last check, `stale` are
    silent jobs, and `ahead_seconds` says how far the records of a job lie in the future, if they do.
    """

    def __init__(
        self,
        settings: Settings,
        jobs: Sequence[Job],
        state: State,
        clock: Callable[[], datetime],
        elapsed_seconds: Callable[[], float] = time.monotonic,
    ) -> None:
        self._service, self._jobs, self._state = settings.service.name, jobs, state
        self._url = settings.alert.webhook_url.get_secret_value()
        self._grace_seconds, self._grace_by_job = settings.alert.grace_seconds, dict(settings.alert.grace_by_job)
        pairs = filter(None, settings.alert.heartbeat_urls.get_secret_value().split(","))
        self._heartbeats = Heartbeats({job: url for job, _, url in (pair.partition("=") for pair in pairs)})
        self._clock, self._elapsed_seconds = clock, elapsed_seconds
        self._ended: queue.Queue[Run] = queue.Queue(WAITING)
        self._stop = Stop()
        self._since_seconds = elapsed_seconds()
        self._away_until_seconds = 0.0  # 0: the last message was delivered
        self.stale: Collection[str] = frozenset()
        self.ahead_seconds: Mapping[str, float] = {}
        self._thread = threading.Thread(target=self._loop, name="alerts", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        for name in {*self._heartbeats.urls, *self._grace_by_job} - {job.name for job in self._jobs}:
            log.warning("HEARTBEAT_URLS or ALERT_GRACE_BY_JOB names %r, which is not a job", name)
        self._thread.start()
        self._heartbeats.start()

    def close(self) -> None:
        """Stop sending; messages in progress are abandoned."""
        self._heartbeats.close()
        self._stop.ask("the process ends")

    def ended(self, run: Run) -> None:
        """Record the end of a run."""
        if run.outcome is Outcome.OK:
            self._heartbeats.beat(run.job)
        if not self._url:
            return
        try:
            self._ended.put_nowait(run)
        except queue.Full:
            log.warning("%s: no message for the end of run %s: %d wait already", run.job, run.run_id, WAITING)

    def _loop(self) -> None:
        now, up = self._clock(), self._elapsed_seconds()
        while not self._stop.asked:
            try:
                self._heed(self._ended.get(timeout=1.0))
            except queue.Empty:
                pass
            except AppError as error:
                log.warning("alerts: %s", error)
            passed = self._elapsed_seconds() - up
            if passed >= WATCH_SECONDS:
                before, now, up = now, self._clock(), up + passed
                if abs((now - before).total_seconds() - passed) > WATCH_SECONDS:
                    self._since_seconds = up  # the clock was set: ages mean nothing until jobs have had time to run
                self._look()

    def _heed(self, run: Run) -> None:
        """A bad run opens an alert; the next good one closes all open alerts of its job."""
        at = run.ended_at or self._clock()
        more = {"hint": run.hint, "run_id": run.run_id, "outcome": run.outcome.value}
        if run.outcome in BAD:
            self._begin(FAILED, run.job, at, run.error, more)
        if run.outcome is Outcome.OK and self._state.alerts.end(run.job, at):
            self._tell(RECOVERED, run.job, f"{run.report.rows} rows moved", more)

    def _look(self) -> None:
        """Find stale jobs, and alerts to close whose run ended elsewhere: in another process or a command."""
        try:
            # Read before the runs: an alert that another process closes meanwhile is not opened again.
            known = self._state.alerts.told() if self._url else {}
            now, totals = self._state.clocks.now(), self._state.runs.totals()
            self.stale = self._stale_now(last_ends(totals, DONE), now)
            ahead = self._state.clocks.ahead_seconds()
            for job in sorted(ahead.keys() - self.ahead_seconds.keys()):
                log.warning("%s: %s (%s)", job, ahead_message(ahead[job]), CLOCK_HINT)
            self.ahead_seconds = ahead
            if self._url:
                self._tell_over(totals, now)
                self._tell_open(now, known)
        except AppError as error:
            log.debug("alerts: the record cannot be read: %s", error)

    def _tell_open(self, now: datetime, known: Collection[tuple[str, str]]) -> None:
        """Open the alerts that are not among those `known`."""
        silent = dict.fromkeys(self.stale, "no run finished in time")
        ahead = {name: ahead_message(seconds) for name, seconds in self.ahead_seconds.items()}
        troubles = self._state.checkpoints.troubles()
        objects = {name: ", ".join(describe_trouble(some)) for name, some in troubles.items() if some}
        for event, messages, hint in (
            (STALE, silent, STALE_HINT),
            (CLOCK_AHEAD, ahead, CLOCK_HINT),
            (OBJECTS, objects, HEAL_HINT),
        ):
            for name in sorted(messages):
                if (name, event) not in known:
                    self._begin(event, name, now, messages[name], {"hint": hint})

    def _tell_over(self, totals: Sequence[RunTotal], now: datetime) -> None:
        """A good run closes all alerts but two, which end when clocks agree or a listing shows the objects again; a
        partial one closes "stale" silently, since it opens a failure.
        """
        good, done, latest = (last_ends(totals, outcomes) for outcomes in ((Outcome.OK,), DONE, tuple(Outcome)))
        for (name, event), told_at in self._state.alerts.told().items():
            before = told_at + TICK
            # an alert from a clock that was ahead is over with the job's latest run
            since = before if told_at <= now + AHEAD else latest.get(name, before)
            ended = {end_at for ends in (good, done) if (end_at := ends.get(name)) and since <= end_at <= now + AHEAD}
            if event == CLOCK_AHEAD:
                if name not in self.ahead_seconds:
                    self._state.alerts.end(name, before, event)
            elif event == OBJECTS:
                if not self._state.checkpoints.troubles().get(name) and self._state.alerts.end(name, before, event):
                    self._tell(RECOVERED, name, "its objects are as they were confirmed", {})
            elif good.get(name) in ended:
                if self._state.alerts.end(name, before):
                    self._tell(RECOVERED, name, "runs finish again", {})
            elif event == STALE and ended:
                self._state.alerts.end(name, before, STALE)

    def _stale_now(self, last: Mapping[str, datetime], now: datetime) -> frozenset[str]:
        paused = self._state.pauses.paused()
        return frozenset(
            job.name
            for job in self._jobs
            if not job.off
            and job.name not in paused
            and is_stale(
                (now - last[job.name]).total_seconds() if job.name in last else None,
                self._elapsed_seconds() - self._since_seconds,
                (job.interval_seconds, self._grace_by_job.get(job.name, self._grace_seconds)),
            )
        )

    def _begin(self, event: str, job: str, at: datetime, message: str, more: Mapping[str, str]) -> None:
        """Send an alert that is not active yet. One that could not be delivered begins anew with a later run or look:
        the fault of the network that it tells of may have kept it back. While it is away, one a minute is tried.
        """
        if self._elapsed_seconds() < self._away_until_seconds or not self._state.alerts.begin(job, event, at):
            return
        if not self._tell(event, job, message, more):
            self._state.alerts.end(job, at + TICK, event)

    def _tell(self, event: str, job: str, message: str, more: Mapping[str, str]) -> bool:
        """Send a message; whether it was delivered. Chat services show `text`; the other fields are for programs."""
        sign = {FAILED: "✗", RECOVERED: "✓", STALE: "…", CLOCK_AHEAD: "…", OBJECTS: "✗"}[event]
        hint = f" Next: {more['hint']}" if more.get("hint") else ""
        body = {
            "event": event,
            "service": self._service,
            "job": job,
            "at": whole_second(self._clock()),
            "message": message,
            **more,
            "text": f"{sign} {self._service}: {job} {event}: {message}{hint}",
        }
        policy = ONCE if self._away_until_seconds else POLICY
        try:
            retry(lambda: post(self._url, body), policy, self._stop, random.random)
        except AppError as error:
            self._away_until_seconds = self._elapsed_seconds() + AWAY_SECONDS
            if not isinstance(error, Stopped):
                log.warning("webhook delivery to %s failed: %s", urlsplit(self._url).hostname, error)
            return False
        self._away_until_seconds = 0.0
        return True
