"""What a run is made of: reports that add up, stops that end every pause, and what is recorded of each end."""

import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime

import pytest

from app.core.errors import AppError, LeaseLost, Permanent, Rejected, Stopped, Transient
from app.core.ledger import SetAside, Tally, ledger_of
from app.core.runs import (
    Context,
    Failure,
    Job,
    Lease,
    LeaseTerms,
    NoProgress,
    Outcome,
    Report,
    Run,
    RunServices,
    Stop,
    execute,
)
from memory import MemoryLeases, MemoryRuns

NOW = datetime(2026, 2, 7, 12, tzinfo=UTC)
FAILURE = Failure("D1", "no such device", "look")


def test_reports_add_up_in_every_field() -> None:
    one = ledger_of(Tally(counted=3, read=3, new=3), unit="rows")
    first = Report(1, 2, 3, 4, (FAILURE,), more=True, notes=("a",), ledger=one)
    second = Report(10, 20, 30, 40, (FAILURE,), more=False, notes=("b",), ledger=one)
    both = Report(11, 22, 33, 44, (FAILURE, FAILURE), more=True, notes=("a", "b"), ledger=one + one)
    assert first + second == both
    assert (second + first).more
    assert not (second + Report()).more
    assert sum([Report()] * 2, Report()) == Report()


def test_a_pause_lasts_as_long_as_was_said_and_ends_at_once_when_a_stop_is_asked_for() -> None:
    stop, began = Stop(), time.monotonic()
    stop.pause(0.05)
    assert time.monotonic() - began >= 0.05
    threading.Timer(0.02, stop.ask, ["first"]).start()
    with pytest.raises(Stopped, match="stopped: first"):
        stop.pause(20)
    assert stop.asked
    stop.ask("second")
    with pytest.raises(Stopped, match="stopped: first"):
        stop.check()


def run_of(work: Callable[[Context], Report], runs: MemoryRuns | None = None) -> tuple[Run, BaseException | None]:
    """The run as it was told at its end, and its cause."""
    told: list[tuple[Run, BaseException | None]] = []
    terms = LeaseTerms("a", heartbeat_seconds=60)
    services = RunServices(
        lambda: NOW, MemoryLeases(), runs or MemoryRuns(), terms, lambda run, cause: told.append((run, cause))
    )
    run = execute(Job("job", 60, work), services, Stop(), NoProgress())
    assert told[0][0] == run
    return told[0]


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (Stopped("asked to"), Outcome.STOPPED),
        (LeaseLost("another has it"), Outcome.STOPPED),
        (Transient("away"), Outcome.FAILED),
        (Permanent("wrong key", "set another"), Outcome.FAILED),
        (Rejected("bad", "mend it"), Outcome.FAILED),
    ],
)
def test_each_of_our_errors_ends_a_run_with_its_message_and_hint(error: AppError, outcome: Outcome) -> None:
    def work(context: Context) -> Report:
        context.done(Report(rows=2))
        context.done(Report(rows=1, bytes=5))
        raise error

    run, cause = run_of(work)
    assert (run.outcome, run.error, run.hint, cause) == (outcome, error.message, error.hint, error)
    assert run.report == Report(rows=3, bytes=5), "what was done before is recorded"


def test_any_other_exception_is_a_fault_of_the_program_that_is_named() -> None:
    def work(_: Context) -> Report:
        raise ZeroDivisionError("by zero")

    run, cause = run_of(work)
    assert (run.outcome, run.error) == (Outcome.FAILED, "ZeroDivisionError: by zero")
    assert "report" in run.hint
    assert isinstance(cause, ZeroDivisionError)


@pytest.mark.parametrize(
    ("report", "outcome", "error"),
    [
        (Report(rows=1), Outcome.OK, ""),
        (Report(failures=(FAILURE,)), Outcome.PARTIAL, "D1: no such device"),
        (Report(failures=(FAILURE, FAILURE)), Outcome.PARTIAL, "D1 and 1 more: no such device"),
        (Report(failures=(Failure("", "x", "y"),)), Outcome.PARTIAL, "(unnamed): x"),
    ],
)
def test_a_report_with_failures_is_partial_and_names_the_first(report: Report, outcome: Outcome, error: str) -> None:
    run, cause = run_of(lambda _: report)
    assert (run.outcome, run.error, run.report, cause) == (outcome, error, report, None)
    assert run.hint == (report.failures[0].hint if report.failures else "")


def test_a_ledger_that_does_not_close_or_newly_sets_aside_makes_a_run_partial() -> None:
    aside = SetAside("bad rows", 1, 1, "row 1")
    for ledger in (
        ledger_of(Tally(counted=3, read=3, new=2), unit="rows"),
        ledger_of(Tally(counted=3, read=3, new=2), aside, unit="rows"),
    ):
        run, _ = run_of(lambda _, ledger=ledger: Report(ledger=ledger))  # type: ignore[misc]
        assert run.outcome is Outcome.PARTIAL
        assert run.error
        assert run.hint


class RunsAway(MemoryRuns):
    """A record that is away once the run was put on it."""

    def save(self, run: Run) -> None:
        if run.ended_at:
            raise Transient("database away")
        super().save(run)


def test_a_record_that_is_away_does_not_hide_how_the_run_ended() -> None:
    run, cause = run_of(lambda _: Report(rows=3), RunsAway())
    assert (run.outcome, run.report.rows) == (Outcome.OK, 3)
    assert isinstance(cause, Transient)


def test_a_job_whose_lease_is_anothers_does_not_run_and_leaves_no_record() -> None:
    leases, runs = MemoryLeases(), MemoryRuns()
    assert leases.acquire("job", "another", 60)
    services = RunServices(lambda: NOW, leases, runs, LeaseTerms("a"), lambda *_: pytest.fail("nothing ended"))
    assert execute(Job("job", 60, lambda _: pytest.fail("it ran")), services, Stop(), NoProgress()) is None
    assert runs.recent(None, 1) == []


def test_the_clock_of_a_run_goes_on_from_its_beginning() -> None:
    context = Context("run", Lease("job", "a", 1, NOW), Stop(), NoProgress(), now_at=NOW)
    first = context.clock()
    time.sleep(0.01)
    assert NOW <= first < context.clock()
    assert (context.clock() - first).total_seconds() >= 0.01
