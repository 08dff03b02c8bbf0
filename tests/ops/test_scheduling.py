"""When a job is due, and that it never overlaps itself: pure decisions, then real timers and real threads."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from app.core.errors import AppError, LeaseLost, Permanent, Rejected, Stopped, Transient
from app.core.runs import (
    Context,
    Job,
    Lease,
    Leases,
    LeaseTerms,
    NoProgress,
    Outcome,
    Report,
    Run,
    RunServices,
    Stop,
    execute,
)
from app.core.windows import Window
from app.db.state import State, open_state
from app.ops.logs import log_run
from app.ops.scheduler import Backfill, JitteredInterval, Scheduler, retry_in, seconds_until_due
from memory import MemoryLeases, MemoryRuns

NOW = datetime(2026, 2, 7, 12, tzinfo=UTC)
DAY = 86_400


def ended(outcome: Outcome, job: str = "daily", started_at: datetime = NOW) -> Run:
    return Run(f"{job} {started_at}", job, started_at, started_at, outcome)


def test_a_job_that_never_ran_is_due_at_once() -> None:
    assert seconds_until_due(None, DAY) == 0


def test_a_daily_job_is_due_a_day_after_its_last_run_and_at_once_when_overdue() -> None:
    assert seconds_until_due(20 * 3600, DAY) == 4 * 3600
    assert seconds_until_due(30 * 3600, DAY) == 0


def test_a_clock_that_jumps_by_decades_costs_one_look_and_not_one_for_each_missed_interval() -> None:
    trigger, now = JitteredInterval(seconds=60, jitter=3, timezone=UTC), datetime(2026, 11, 28, tzinfo=UTC)
    following = trigger.get_next_fire_time(datetime(1970, 1, 1, tzinfo=UTC), now)
    assert following is not None
    assert now < following < now + timedelta(seconds=64)
    in_time = trigger.get_next_fire_time(now - timedelta(seconds=30), now)
    assert in_time is not None
    assert in_time > now


def test_a_job_of_each_minute_is_due_at_once_after_a_restart() -> None:
    assert seconds_until_due(5, 60) == 0


@pytest.mark.parametrize(
    ("run", "interval", "seconds"),
    [
        (None, DAY, 60.0),
        (ended(Outcome.STOPPED), DAY, 60.0),
        (ended(Outcome.FAILED), DAY, 900.0),
        (ended(Outcome.OK), DAY, None),
        (ended(Outcome.PARTIAL), DAY, None),
        (None, 60, None),
        (ended(Outcome.FAILED), 60, None),
    ],
)
def test_a_long_interval_is_cut_short_only_for_runs_that_did_not_come_to_their_end(
    run: Run | None, interval: int, seconds: float | None
) -> None:
    assert retry_in(run, interval) == seconds


class Bench:
    """Schedulers over one SQLite state, as several processes would have them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._open: list[tuple[Scheduler, State]] = []
        self.state = open_state("", folder)

    def start(self, jobs: Sequence[Job], owner: str = "a", backfills: dict[str, Backfill] | None = None) -> Scheduler:
        state = open_state("", self._folder)
        terms = LeaseTerms(owner, ttl_seconds=10, heartbeat_seconds=2)
        services = RunServices(lambda: datetime.now(UTC), state.leases, state.runs, terms, log_run)
        scheduler = Scheduler(jobs, services, Stop(), backfills or {}, state.pauses)
        self._open.append((scheduler, state))
        scheduler.start()
        return scheduler

    def close(self) -> None:
        for scheduler, state in self._open:
            assert scheduler.close(5) == []
            state.close()
        self.state.close()


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path)
    yield made
    made.close()


def test_the_times_of_a_run_lie_within_its_lease_so_that_runs_of_two_daemons_never_overlap(tmp_path: Path) -> None:
    with closing(open_state("", tmp_path)) as state:
        leases = TimedLeases(state.leases)
        terms = LeaseTerms("a", ttl_seconds=10, heartbeat_seconds=2)
        services = RunServices(lambda: datetime.now(UTC), leases, state.runs, terms, log_run)
        for work in (lambda _: Report(), failing):
            run = execute(Job("job", 60, work), services, Stop(), NoProgress())
            assert run is not None
            assert run.ended_at is not None
            assert leases.held_from < run.started_at <= run.ended_at < leases.held_until
            assert [kept.ended_at for kept in state.runs.recent("job", 1)] == [run.ended_at]


def test_a_run_is_on_record_while_it_runs_and_a_dry_run_never_is(tmp_path: Path) -> None:
    with closing(open_state("", tmp_path)) as state:
        services = RunServices(lambda: datetime.now(UTC), state.leases, state.runs, LeaseTerms("a"), log_run)
        seen: list[Sequence[Run]] = []

        def work(_: Context) -> Report:
            seen.append(state.runs.recent("job", 5))
            return Report()

        execute(Job("job", 60, work), services, Stop(), NoProgress(), dry_run=True)
        run = execute(Job("job", 60, work), services, Stop(), NoProgress())
        assert run is not None
        assert seen[0] == []
        assert [(each.run_id, each.outcome, each.ended_at) for each in seen[1]] == [(run.run_id, Outcome.RUNNING, None)]
        assert [each.outcome for each in state.runs.recent("job", 5)] == [Outcome.OK]


class FailingLeases(MemoryLeases):
    """Leases that cannot be renewed, with an error for each of the first times, and perhaps not given back."""

    def __init__(self, *renewing: AppError, giving_back: AppError | None = None) -> None:
        super().__init__()
        self._renewing, self._giving_back = list(renewing), giving_back
        self.renewed = 0

    def renew(self, lease: Lease, ttl_seconds: float) -> Lease:
        if self._renewing:
            raise self._renewing.pop(0)
        self.renewed += 1
        return super().renew(lease, ttl_seconds)

    def release(self, lease: Lease) -> None:
        if self._giving_back:
            raise self._giving_back
        super().release(lease)


def run_under(leases: FailingLeases, stop: Stop, work: Callable[[Context], Report]) -> Run:
    terms = LeaseTerms("a", ttl_seconds=10, heartbeat_seconds=0.002)
    services = RunServices(lambda: datetime.now(UTC), leases, MemoryRuns(), terms, log_run)
    run = execute(Job("job", 60, work), services, stop, NoProgress())
    assert run is not None
    return run


@pytest.mark.parametrize("error", [LeaseLost("job was taken over"), Permanent("the state is damaged", "look at it")])
def test_a_run_whose_lease_is_lost_is_asked_to_stop_and_no_other_run_of_the_process_is(error: AppError) -> None:
    def work(context: Context) -> Report:
        context.stop.pause(10)
        return Report()

    process = Stop()
    run = run_under(FailingLeases(error), process, work)
    assert (run.outcome, run.error) == (Outcome.STOPPED, f"stopped: {error.message}")
    assert not process.asked


def test_a_run_stops_when_its_process_is_asked_to() -> None:
    process = Stop()

    def work(context: Context) -> Report:
        assert not context.stop.asked
        threading.Timer(0.05, process.ask, ["the test wants it"]).start()
        with pytest.raises(Stopped, match="the test wants it"):
            context.stop.pause(10)
        assert context.stop.asked
        context.stop.pause(0)
        return Report()

    assert run_under(FailingLeases(), process, work).error == "stopped: the test wants it"


def test_a_lease_is_renewed_again_after_outages_and_until_the_end_of_the_run(
    caplog: pytest.LogCaptureFixture,
) -> None:
    leases = FailingLeases(Transient("the database is away"), Transient("the database is away"))

    def work(_: Context) -> Report:
        until(lambda: leases.renewed >= 3)
        return Report()

    assert run_under(leases, Stop(), work).outcome is Outcome.OK
    assert sum("could not be renewed" in each.getMessage() for each in caplog.records) == 2
    assert not [each for each in threading.enumerate() if each.name == "lease-job"]


def test_a_lease_that_cannot_be_given_back_does_not_hide_how_the_run_ended() -> None:
    run = run_under(FailingLeases(giving_back=Transient("database away")), Stop(), lambda _: Report(rows=3))
    assert (run.outcome, run.report.rows) == (Outcome.OK, 3)


def failing(_: Context) -> Report:
    raise Rejected("no", "nothing to do")


class TimedLeases:
    """Leases that note when one is held, and take long over giving it out and back."""

    def __init__(self, leases: Leases) -> None:
        self._leases = leases
        self.held_from = self.held_until = NOW
        self.acquired_at: datetime | None = None

    def acquire(self, name: str, owner: str, ttl_seconds: float) -> Lease | None:
        lease = self._leases.acquire(name, owner, ttl_seconds)
        time.sleep(0.002)
        self.held_from = datetime.now(UTC)
        return replace(lease, acquired_at=self.acquired_at) if lease else None

    def renew(self, lease: Lease, ttl_seconds: float) -> Lease:
        return self._leases.renew(lease, ttl_seconds)

    def remaining_seconds(self, name: str) -> float:
        return self._leases.remaining_seconds(name)

    def watch_seconds(self, name: str, ttl_seconds: float) -> float:
        return self._leases.watch_seconds(name, ttl_seconds)

    def release(self, lease: Lease) -> None:
        time.sleep(0.002)
        self.held_until = datetime.now(UTC)
        self._leases.release(lease)


class Meter:
    """Counts how many runs go on at the same time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.running = self.most = self.ended = 0

    @contextmanager
    def counted(self) -> Iterator[None]:
        with self._lock:
            self.running += 1
            self.most = max(self.most, self.running)
        try:
            yield
        finally:
            with self._lock:
                self.running -= 1
                self.ended += 1

    def work(self, seconds: float, report: Callable[[int], Report] = lambda _: Report()) -> Callable[[Context], Report]:
        def work(context: Context) -> Report:
            with self.counted():
                context.stop.pause(seconds)
            return report(self.ended)

        return work


def until(holds: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "did not come to hold"
        time.sleep(0.01)


@pytest.mark.slow
def test_a_run_longer_than_its_interval_never_overlaps_itself(bench: Bench) -> None:
    meter = Meter()
    scheduler = bench.start([Job("slow", 1, meter.work(0.7))])
    for _ in range(5):
        scheduler.run_now("slow")
        time.sleep(0.1)
    until(lambda: meter.ended >= 3)
    assert meter.most == 1


def test_two_schedulers_on_one_state_never_run_a_job_at_once(bench: Bench) -> None:
    meter = Meter()
    schedulers = [bench.start([Job("shared", 1, meter.work(0.15))], owner) for owner in ("a", "b")]
    until(lambda: meter.ended >= 1)
    for _ in range(20):
        for scheduler in schedulers:
            scheduler.run_now("shared")
        time.sleep(0.03)
    until(lambda: meter.ended >= 4)
    assert meter.most == 1


def test_a_job_with_work_left_runs_again_at_once_until_it_is_done(bench: Bench) -> None:
    meter = Meter()
    bench.start([Job("catching-up", 3600, meter.work(0, lambda runs: Report(more=runs < 4)))])
    until(lambda: meter.ended == 4)
    time.sleep(0.6)
    assert meter.ended == 4


def test_a_failing_job_is_not_repeated_in_a_tight_loop(bench: Bench) -> None:
    runs: list[float] = []

    def work(_: Context) -> Report:
        runs.append(time.monotonic())
        raise Transient("source away")

    bench.start([Job("failing", 60, work)])
    until(lambda: len(runs) == 1)
    time.sleep(0.5)
    assert len(runs) == 1


def test_a_daily_job_that_ran_today_waits_after_a_restart_and_an_overdue_one_runs(bench: Bench) -> None:
    now = datetime.now(UTC)
    bench.state.runs.save(ended(Outcome.OK, "fresh", now - timedelta(hours=2)))
    bench.state.runs.save(ended(Outcome.OK, "overdue", now - timedelta(hours=25)))
    bench.state.runs.save(ended(Outcome.FAILED, "failed", now - timedelta(hours=2)))
    meters = {name: Meter() for name in ("fresh", "overdue", "failed")}
    scheduler = bench.start([Job(name, DAY, meter.work(0)) for name, meter in meters.items()])
    until(lambda: meters["overdue"].ended == 1 and meters["failed"].ended == 1)
    assert meters["fresh"].ended == 0
    view = next(view for view in scheduler.views() if view.job.name == "fresh")
    assert view.next_run_at is not None
    assert timedelta(hours=21) < view.next_run_at - now < timedelta(hours=23)


def test_a_daily_job_whose_last_run_lies_in_the_future_runs_once_and_then_waits(bench: Bench) -> None:
    now = datetime.now(UTC)
    bench.state.runs.save(ended(Outcome.OK, "ahead", now + timedelta(days=40)))
    meter = Meter()
    bench.start([Job("ahead", DAY, meter.work(0))])
    until(lambda: bench.state.runs.since_done_seconds("ahead") is not None)
    again = bench.start([Job("ahead", DAY, meter.work(0))], "after a restart")
    until(lambda: timedelta(hours=23) < (again.views()[0].next_run_at or now) - now)
    assert meter.ended == 1


def test_a_run_has_the_time_of_the_databases_lease_and_no_clock_that_is_set_makes_it_end_before_it_began(
    tmp_path: Path,
) -> None:
    hours = iter([50, 40, 30, 20, 10])
    seen: list[Context] = []

    def work(context: Context) -> Report:
        seen.append(context)
        return Report()

    with closing(open_state("", tmp_path)) as state:
        leases = TimedLeases(state.leases)
        services = RunServices(lambda: NOW + timedelta(hours=next(hours)), leases, state.runs, LeaseTerms("a"), log_run)
        for acquired_at in (None, NOW + timedelta(days=3)):
            leases.acquired_at = acquired_at
            run = execute(Job("job", 60, work), services, Stop(), NoProgress())
            assert run is not None
            assert run.ended_at is not None
            assert run.started_at <= run.ended_at < run.started_at + timedelta(seconds=10)
            assert seen[-1].now_at == run.started_at
            assert run.started_at <= seen[-1].clock() < run.started_at + timedelta(seconds=10)
        assert seen[-1].now_at == NOW + timedelta(days=3)


def test_a_job_held_by_another_owner_is_tried_again_within_a_minute(bench: Bench) -> None:
    assert bench.state.leases.acquire("held", "somebody", 60)
    meter = Meter()
    scheduler = bench.start([Job("held", DAY, meter.work(0))])
    soon = datetime.now(UTC) + timedelta(seconds=70)
    until(lambda: timedelta() < soon - (scheduler.views()[0].next_run_at or soon) < timedelta(seconds=30))
    assert meter.ended == 0


def test_a_paused_job_ignores_its_timer_but_not_a_person(bench: Bench) -> None:
    meter = Meter()
    scheduler = bench.start([Job("paused", 1, meter.work(0))])
    until(lambda: meter.ended >= 1)
    scheduler.pause("paused", "me")
    until(lambda: scheduler.views()[0].state == "paused")  # a turn that was let through before has ended
    before = meter.ended
    time.sleep(1.3)
    assert meter.ended == before
    assert scheduler.views()[0].state == "paused"
    scheduler.run_now("paused")
    until(lambda: meter.ended == before + 1)
    scheduler.resume("paused")
    until(lambda: meter.ended >= before + 2)


def test_a_backfill_waits_for_the_running_job_and_is_repeated_until_done(bench: Bench) -> None:
    meter = Meter()
    spans: list[Window] = []

    def fill(_: Context, span: Window) -> Report:
        with meter.counted():
            spans.append(span)
        return Report(more=len(spans) < 3)

    scheduler = bench.start([Job("filled", 60, meter.work(0.3))], backfills={"filled": fill})
    until(lambda: meter.running == 1)
    span = Window(NOW - timedelta(days=1), NOW)
    scheduler.backfill("filled", span)
    until(lambda: len(spans) == 3)
    assert meter.most == 1
    assert set(spans) == {span}


def test_jobs_that_are_off_are_listed_with_their_reason_and_refuse_to_run(bench: Bench) -> None:
    scheduler = bench.start([Job("sleeping", 60, Meter().work(0), off="set INFLUXDB_URL")])
    (view,) = scheduler.views()
    assert (view.state, view.job.off, view.next_run_at) == ("off", "set INFLUXDB_URL", None)
    with pytest.raises(Rejected, match="set INFLUXDB_URL"):
        scheduler.run_now("sleeping")
    with pytest.raises(Rejected, match="no job is named"):
        scheduler.run_now("unknown")


def test_after_a_stop_was_asked_for_nothing_starts(bench: Bench) -> None:
    meter = Meter()
    scheduler = bench.start([Job("ending", 1, meter.work(5))])
    until(lambda: meter.running == 1)
    scheduler.ask_stop("test")
    until(lambda: meter.ended == 1)
    with pytest.raises(Transient):
        scheduler.run_now("ending")
    assert not scheduler.running
    assert scheduler.turning
