"""Runs of jobs: who may run (lease), what happened (run record), and the one place where every exception ends.

Invariants: leases let a job run in one process at a time; results stay correct even if a lease fails, since its
generation is checked again inside each commit; every started run gets an outcome.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from enum import Enum
from typing import Protocol
from uuid import uuid4

from app.core.errors import AppError, LeaseLost, Stopped, Transient
from app.core.ledger import Ledger, fault_of

VALUES = "values"  # the unit of a ledger that counts single values of rows
current_run: ContextVar[str] = ContextVar("current_run", default="")
"""The id of this thread's run; "" outside of runs."""
run_in_logs: ContextVar[tuple[str, str]] = ContextVar("run_in_logs", default=("", ""))
"""The run and the job that log records of this thread name."""
log = logging.getLogger(__name__)


class Outcome(Enum):
    """How a run ended. PARTIAL: some partitions failed or rows were set aside. STOPPED: the next run continues."""

    RUNNING = "running"
    OK = "ok"
    PARTIAL = "partial"
    FAILED = "failed"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to run `name`. `generation` grows by one with each new holder and fences off earlier ones.

    `acquired_at` is by the clock of the store if it has its own; None if that is this machine's clock.
    """

    name: str
    owner: str
    generation: int
    expires_at: datetime
    acquired_at: datetime | None = None


class Leases(Protocol):
    """Leases in the checkpoint store, timed by the store's own clock if it has one."""

    def acquire(self, name: str, owner: str, ttl_seconds: float) -> Lease | None:
        """A lease of a new generation, or None while another owner's lease is valid. The same owner may acquire again.

        A released lease is free whatever its expiry. A lease that ends later than its TTL allows, since the clock was
        set back, is taken over once this process has seen it unchanged for its TTL, by a monotonic clock: a live holder
        would have renewed it.
        """

    def remaining_seconds(self, name: str) -> float:
        """Seconds until the lease expires; 0 when it has."""

    def watch_seconds(self, name: str, ttl_seconds: float) -> float:
        """How long the lease must be seen unchanged before it is taken over; 0 when its expiry is plausible.

        `ttl_seconds` is assumed for a lease that did not record its TTL.
        """

    def renew(self, lease: Lease, ttl_seconds: float) -> Lease:
        """The same generation with a later expiry. Raises LeaseLost when it has expired or belongs to another owner."""

    def release(self, lease: Lease) -> None:
        """Let others acquire at once. Idempotent; does nothing when the lease belongs to another owner by now."""


@dataclass(frozen=True, slots=True)
class Failure:
    """One partition that could not be finished; its cursor did not move."""

    partition: str
    message: str
    hint: str


@dataclass(frozen=True, slots=True)
class Report:
    """What a job did. `more` is true when it stopped at its time limit with work left: run it again at once.

    `late_rows` and `corrected_rows` count rows of windows that were closed before. `removed_rows` were removed from the
    destination because the source no longer has them and removal was allowed. `notes` are lines for the person who ran
    it by hand. Neither of these two is recorded. `ledger` accounts for every row counted at the source.
    """

    rows: int = 0
    bytes: int = 0
    windows: int = 0
    late_rows: int = 0
    failures: Sequence[Failure] = ()
    more: bool = False
    notes: Sequence[str] = ()
    ledger: Ledger = field(default_factory=Ledger)
    corrected_rows: int = 0
    removed_rows: int = 0
    written_new_rows: int = 0

    @property
    def new_rows(self) -> int:
        """Rows that are new at the destination: counted when written, otherwise taken from a ledger of rows."""
        return self.written_new_rows or (0 if self.ledger.unit == VALUES else self.ledger.total.new)

    def __add__(self, other: "Report") -> "Report":
        return Report(
            self.rows + other.rows,
            self.bytes + other.bytes,
            self.windows + other.windows,
            self.late_rows + other.late_rows,
            (*self.failures, *other.failures),
            self.more or other.more,
            (*self.notes, *other.notes),
            self.ledger + other.ledger,
            self.corrected_rows + other.corrected_rows,
            self.removed_rows + other.removed_rows,
            self.written_new_rows + other.written_new_rows,
        )


Done = Callable[[Report], None]


class ReportSum:
    """A sum of reports. Each part is passed to `told` at once, so that a later error cannot hide it. Thread-safe."""

    def __init__(self, told: Done | None = None) -> None:
        self.total = Report()
        self._told = told
        self._lock = threading.Lock()

    def __call__(self, part: Report) -> None:
        """Add a part."""
        with self._lock:
            self.total += part
        if self._told:
            self._told(part)


@dataclass(frozen=True, slots=True)
class Run:
    """One execution of a job, as recorded. `error` and `hint` are empty unless something failed.

    `started_by` is "schedule", "command line" or the user who requested it, "" in records of earlier versions.
    `requests`: requests sent during the run to systems that charge for them, by kind.
    """

    run_id: str
    job: str
    started_at: datetime
    ended_at: datetime | None = None
    outcome: Outcome = Outcome.RUNNING
    report: Report = field(default_factory=Report)
    error: str = ""
    hint: str = ""
    started_by: str = ""
    requests: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RunTotal:
    """All ended runs of a job with one outcome: how many, their sums, and when the last one ended."""

    job: str
    outcome: Outcome
    runs: int
    report: Report
    ended_at: datetime


@dataclass(frozen=True, slots=True)
class LedgerTotal:
    """The sum over the ledgers of all runs of a job for one entry: `new`, `corrected`, or newly `set_aside` for one
    reason ("" for the other entries).
    """

    job: str
    entry: str
    reason: str
    total: int


class Runs(Protocol):
    """The run records."""

    def save(self, run: Run) -> None:
        """Insert or replace the record of `run.run_id`. Idempotent."""

    def recent(self, job: str | None, limit: int) -> Sequence[Run]:
        """Newest first, with runs recorded by a clock that was ahead at the end; all jobs when `job` is None."""

    def since_done_seconds(self, job: str) -> float | None:
        """Seconds since the start of the newest run that ended ok or partial; None when there is none.

        By the store's own clock if it has one. A run in the future does not count.
        """


class Stop:
    """A stop signal that long work checks at its safe points, and that ends every pause at once."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self._reason = ""
        self._inner: list[Stop] = []

    def ask(self, reason: str) -> None:
        """Request a stop; the first reason is kept."""
        if not self._event.is_set():
            self._reason = reason
            self._event.set()
        for each in tuple(self._inner):
            each.ask(reason)

    @property
    def asked(self) -> bool:
        """True once a stop was requested."""
        return self._event.is_set()

    def check(self) -> None:
        """A safe point: raises Stopped when a stop was requested."""
        if self._event.is_set():
            raise Stopped(f"stopped: {self._reason}", "no action needed; the next run continues from the checkpoint")

    def pause(self, seconds: float) -> None:
        """Wait, or raise Stopped as soon as a stop is requested."""
        self._event.wait(seconds)
        self.check()

    @contextmanager
    def inner(self) -> Iterator["Stop"]:
        """A separate signal for a block: it is set together with this one, but can also be set alone."""
        inner = Stop()
        self._inner.append(inner)
        if self._event.is_set():
            inner.ask(self._reason)
        try:
            yield inner
        finally:
            self._inner.remove(inner)


class Progress(Protocol):
    """Where long work reports progress: a bar on a terminal, otherwise counts in the log and on the dashboard."""

    def advance(self, *, done: int = 0, total: int = 0, rows: int = 0) -> None:
        """Report `done` more units finished, `total` more units known, `rows` more rows moved. Thread-safe."""


class NoProgress:
    """Progress that is not shown."""

    def advance(self, *, done: int = 0, total: int = 0, rows: int = 0) -> None:
        """Do nothing."""


@dataclass(frozen=True, slots=True)
class Context:
    """What a running job receives. `now_at` is when the run began, by the clock shared by all processes on one state:
    the database's if it has one, otherwise this machine's. `done` receives each part of the work as it is done, for the
    record of a run that ends with an error or a stop and so returns no report.
    """

    run_id: str
    lease: Lease
    stop: Stop
    progress: Progress
    dry_run: bool = False
    now_at: datetime = field(default_factory=lambda: datetime.now(UTC))
    services: "RunServices | None" = None
    done: ReportSum = field(default_factory=ReportSum)
    _since: float = field(default_factory=time.monotonic)

    @contextmanager
    def part(self, name: str) -> Iterator["Context | None"]:
        """This run under the lease `name` instead of its own, for a part of its work; None while another process holds
        it. Without services, the run's own lease covers its parts.

        A lease that no live holder can have is watched here, since a command has no later run to take it over.
        """
        if self.services is None:
            yield self
            return
        leases, terms = self.services.leases, self.services.terms
        lease = leases.acquire(name, terms.owner, terms.ttl_seconds)
        if lease is None and (seconds := leases.watch_seconds(name, terms.ttl_seconds)):
            self.stop.pause(seconds)
            lease = leases.acquire(name, terms.owner, terms.ttl_seconds)
        if lease is None:
            yield None
            return
        with _renewed(lease, self.services, self.stop) as stop:
            yield replace(self, lease=lease, stop=stop)

    def clock(self) -> datetime:
        """`now_at` plus the time elapsed since. Never goes back, even when this machine's clock is set."""
        return self.now_at + timedelta(seconds=time.monotonic() - self._since)


@dataclass(frozen=True, slots=True)
class ExitCodes:
    """Exit codes of a command whose job did not end well; `busy`: another process holds its lease."""

    partial: int = 1
    failed: int = 1
    busy: int = 75


@dataclass(frozen=True, slots=True)
class Job:
    """A pipeline with an interval. `off` says why it cannot run ("set INFLUXDB_URL"); empty when it can.

    `work` is synchronous and may be called again at any time; it raises AppError. `unit` is what its progress counts.
    `busy_seconds`: how long a command waits while another process runs the job. `helper_of`: the pipeline it serves.
    `here`: its data is on the disk of the process that runs the schedule, so no worker runs it.
    """

    name: str
    interval_seconds: int
    work: Callable[[Context], Report]
    off: str = ""
    exits: ExitCodes = ExitCodes()
    unit: str = "window"
    busy_seconds: float = 0.0
    helper_of: str = ""
    here: bool = False


@dataclass(frozen=True, slots=True)
class LeaseTerms:
    """The owner of leases, their TTL, and how often they are renewed."""

    owner: str
    ttl_seconds: float = 30.0
    heartbeat_seconds: float = 10.0


@dataclass(frozen=True, slots=True)
class RunServices:
    """What a run needs from outside: the clock, the records, the leases, and who is notified at the end.

    `requests` takes the request counts of a run, given its id.
    """

    clock: Callable[[], datetime]
    leases: Leases
    runs: Runs
    terms: LeaseTerms
    ended: Callable[[Run, BaseException | None], None]
    requests: Callable[[str], Mapping[str, float]] = lambda _: {}


@contextmanager
def named_in_logs(run_id: str, job: str) -> Iterator[None]:
    """Within the block log records name this run and job. An outer block wins: what a worker does for a step belongs to
    the run that made the plan.
    """
    token = run_in_logs.set(run_in_logs.get() if run_in_logs.get()[0] else (run_id, job))
    try:
        yield
    finally:
        run_in_logs.reset(token)


def execute(
    job: Job,
    services: RunServices,
    stop: Stop,
    progress: Progress,
    *,
    started_by: str = "schedule",
    dry_run: bool = False,
    is_part: bool = False,
) -> Run | None:
    """Run `job` once under its lease and record the outcome; None when another process holds the lease. There is no
    record of a dry run, nor of a part (`is_part`), which is in that of the run that planned it.

    Never raises for anything the job does: this is the one place where every exception becomes a recorded outcome.
    """
    run = Run(uuid4().hex, job.name, services.clock(), started_by=started_by)
    cause: BaseException | None = None
    done = ReportSum()
    try:
        lease = services.leases.acquire(job.name, services.terms.owner, services.terms.ttl_seconds)
        if lease is None:
            return None
        with _renewed(lease, services, stop) as own_stop:
            # Both times are taken while the lease is held, and the clock is read once: no two recorded runs of a job
            # overlap, and none ends before it began, even if the clock is changed meanwhile.
            run = replace(run, started_at=lease.acquired_at or services.clock())
            context = Context(run.run_id, lease, own_stop, progress, dry_run, run.started_at, services, done)
            if not (dry_run or is_part):
                services.runs.save(run)
            token = current_run.set(run.run_id)
            try:
                with named_in_logs(run.run_id, job.name):
                    report = job.work(context)
            finally:
                current_run.reset(token)
                run = replace(run, ended_at=context.clock(), requests=services.requests(run.run_id))
        run = _reported(run, report)
    except Exception as error:  # noqa: BLE001 - the one handler of its kind: whatever a job does, its run gets an outcome
        cause = error
        run = _failed(replace(run, report=done.total), error)
    run = replace(run, ended_at=run.ended_at or max(services.clock(), run.started_at))
    if not (dry_run or is_part):
        try:
            services.runs.save(run)
        except AppError as error:  # an unavailable store must not hide how the run ended
            cause = error
    services.ended(run, cause)
    return run


def _reported(run: Run, report: Report) -> Run:
    """Ok only when no partition failed and the ledger accounts for every row."""
    if report.failures:
        first = report.failures[0]
        others = f" and {len(report.failures) - 1} more" if len(report.failures) > 1 else ""
        error, hint = f"{first.partition or '(unnamed)'}{others}: {first.message}", first.hint
    elif fault := fault_of(report.ledger):
        error, hint = fault
    else:
        return replace(run, outcome=Outcome.OK, report=report)
    return replace(run, outcome=Outcome.PARTIAL, report=report, error=error, hint=hint)


def _failed(run: Run, error: Exception) -> Run:
    outcome = Outcome.STOPPED if isinstance(error, Stopped | LeaseLost) else Outcome.FAILED
    if isinstance(error, AppError):
        return replace(run, outcome=outcome, error=error.message, hint=error.hint)
    hint = "bug in Headwater; please report it with the log around this line"
    return replace(run, outcome=outcome, error=f"{type(error).__name__}: {error}", hint=hint)


@contextmanager
def _renewed(lease: Lease, services: RunServices, stop: Stop) -> Iterator[Stop]:
    """Renew the lease from a background thread; losing it stops this run, and only this run."""
    done = threading.Event()

    def beat(own_stop: Stop) -> None:
        held = lease
        while not done.wait(services.terms.heartbeat_seconds):
            try:
                held = services.leases.renew(held, services.terms.ttl_seconds)
            except LeaseLost as error:
                own_stop.ask(error.message)
                return
            except Transient as error:
                # The store is unavailable. The lease may still be valid, and each commit checks it: keep trying.
                log.warning("the lease of %s could not be renewed: %s", lease.name, error)
            except AppError as error:
                own_stop.ask(error.message)
                return

    with stop.inner() as own_stop:
        heart = threading.Thread(target=beat, args=(own_stop,), name=f"lease-{lease.name}", daemon=True)
        heart.start()
        try:
            yield own_stop
        finally:
            done.set()
            heart.join()
            try:
                services.leases.release(lease)
            except AppError as error:  # unavailable: the lease expires by itself, so others wait its TTL at most
                log.warning("the lease of %s could not be released and expires by itself: %s", lease.name, error)
