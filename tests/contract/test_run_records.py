"""Every sentence of the `Runs` contract, over memory, SQLite and PostgreSQL."""

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from app.core.ledger import Ledger, SetAside, Tally
from app.core.runs import Failure, LedgerTotal, Outcome, Report, Run, Runs
from app.db.database import NamedQueries, sql_directory
from app.db.state import SqlRuns, State
from memory import MemoryRuns

LEDGER = Ledger(
    "values",
    {"a ü": Tally(counted=2**40, read=7, new=2**40 - 6, already_there=1, corrected=2, set_aside=3)},
    (SetAside("no device tag", 2, 1, 'm "v"=1'), SetAside("instant out of range", 1, 0)),
    {"D1": Tally(counted=3, set_aside=3)},
)
START = datetime(2026, 2, 7, 23, 59, 59, 123456, tzinfo=UTC)


@pytest.fixture(params=["sqlite", "postgres"])
def state(request: pytest.FixtureRequest, new_state: Callable[[str], State]) -> State:
    return new_state(request.param)


@pytest.fixture(params=["memory", "sqlite", "postgres"])
def runs(request: pytest.FixtureRequest, new_state: Callable[[str], State]) -> Runs:
    return MemoryRuns() if request.param == "memory" else new_state(request.param).runs


def run(number: int, job: str = "influx_to_s3") -> Run:
    return Run(f"run-{number:04}", job, START + timedelta(seconds=number))


def ended(number: int, job: str = "influx_to_s3") -> Run:
    report = Report(
        rows=2**40,
        bytes=2**41,
        windows=3,
        late_rows=4,
        failures=(Failure("device/ü", 'could "not"\nfinish', "look"), Failure("d2", "nul \x00 inside", "")),
        more=True,
        ledger=LEDGER,
    )
    at = run(number, job)
    return replace(
        at, ended_at=at.started_at + timedelta(seconds=1), outcome=Outcome.PARTIAL, report=report, error="e", hint="h"
    )


def test_what_is_saved_comes_back_equal(runs: Runs) -> None:
    runs.save(run(1))
    runs.save(ended(2))
    assert list(runs.recent(None, 10)) == [ended(2), run(1)]


def test_saving_is_idempotent_and_replaces_by_run_id(runs: Runs) -> None:
    runs.save(run(1))
    runs.save(ended(1))
    runs.save(ended(1))
    assert list(runs.recent(None, 10)) == [ended(1)]


def test_who_started_a_run_and_what_it_requested_is_kept_with_and_without_a_ledger(state: State) -> None:
    known: dict[str, Any] = {"started_by": "ops", "requests": {"put": 2.0}}
    saved = [run(1), replace(run(2), **known), replace(ended(3), **known)]
    for one in saved:
        state.runs.save(one)
    assert list(state.runs.recent(None, 10)) == saved[::-1]
    with state.database.transaction() as session:
        (first, second, third) = [row[0] for row in session.stream("SELECT ledger FROM runs ORDER BY started_at")]
    assert (first, second) == ("{}", '{"started_by":"ops","requests":{"put":2.0},"is_kept":false}')
    assert '"partitions":{"D1":{"counted":3,"set_aside":3}}' in third


def test_recent_runs_come_newest_first_and_no_more_than_asked_for(runs: Runs) -> None:
    for number in (3, 1, 5, 2, 4):
        runs.save(run(number))
    assert list(runs.recent(None, 3)) == [run(5), run(4), run(3)]
    assert list(runs.recent(None, 0)) == []


def test_recent_runs_of_one_job_leave_the_others_out(runs: Runs) -> None:
    runs.save(run(1, "a"))
    runs.save(run(2, "b"))
    assert list(runs.recent("a", 10)) == [run(1, "a")]
    assert list(runs.recent("c", 10)) == []
    assert len(runs.recent(None, 10)) == 2


def test_the_last_ended_run_is_the_newest_that_is_not_running(state: State) -> None:
    assert state.runs.last_ended("influx_to_s3") is None
    for saved in (ended(1), ended(2), run(3), ended(4, "other")):
        state.runs.save(saved)
    assert state.runs.last_ended("influx_to_s3") == ended(2)


def test_only_the_newest_runs_of_a_job_are_kept(state: State) -> None:
    runs = SqlRuns(NamedQueries(state.database, sql_directory() / "state"), kept=3)
    runs.save(run(0, "other"))
    for number in range(1, 8):
        runs.save(run(number))
    assert list(runs.recent("influx_to_s3", 10)) == [run(7), run(6), run(5)]
    assert list(runs.recent("other", 10)) == [run(0, "other")]


def test_an_error_text_that_no_database_stores_is_kept_readable(state: State) -> None:
    state.runs.save(replace(ended(1), error="device a\x00b", hint="lone \ud800"))
    saved = state.runs.recent(None, 1)[0]
    assert (saved.error, saved.hint) == (r"device a\x00b", r"lone \ud800")


def test_totals_count_each_run_once_when_it_ends_and_outlive_its_record(state: State) -> None:
    runs = SqlRuns(NamedQueries(state.database, sql_directory() / "state"), kept=1)
    for saved in (run(1), ended(1), ended(1), run(2), ended(3), ended(4, "other")):
        runs.save(saved)
    assert list(runs.recent("influx_to_s3", 10)) == [ended(3)]
    mine, other = runs.totals()
    assert (mine.job, mine.outcome, mine.runs, mine.report.rows) == ("influx_to_s3", Outcome.PARTIAL, 2, 2 * 2**40)
    assert mine.ended_at == ended(3).ended_at
    assert (other.job, other.runs) == ("other", 1)


def test_ledgers_are_summed_once_per_run_in_the_transaction_that_ends_it_and_outlive_its_record(state: State) -> None:
    runs = SqlRuns(NamedQueries(state.database, sql_directory() / "state"), kept=1)
    assert list(runs.ledger_totals()) == []
    for saved in (run(1), ended(1), ended(1), ended(2), ended(3, "other")):
        runs.save(saved)
    runs.save(replace(ended(4, "no ledger"), report=Report(rows=1)))
    mine = [total for total in runs.ledger_totals() if total.job == "influx_to_s3"]
    assert mine == [
        LedgerTotal("influx_to_s3", "corrected", "", 4),
        LedgerTotal("influx_to_s3", "new", "", 2 * (2**40 - 6)),
        LedgerTotal("influx_to_s3", "set_aside", "instant out of range", 0),
        LedgerTotal("influx_to_s3", "set_aside", "no device tag", 2),
    ]
    assert {total.job for total in runs.ledger_totals()} == {"influx_to_s3", "other"}


def test_a_ledger_with_any_text_can_be_kept(state: State) -> None:
    hostile = "a\x00b\ud800\n'"
    ledger = Ledger("values", {hostile: Tally(counted=1, set_aside=1)}, (SetAside("x", 1, 1, hostile),))
    state.runs.save(replace(ended(1), report=Report(ledger=ledger.of_partition(hostile))))
    saved = state.runs.recent(None, 1)[0].report.ledger
    assert saved.total == ledger.total
    assert saved.set_aside[0].sample == r"a\x00b\ud800 '"


def test_a_pause_is_known_until_it_is_resumed_and_its_first_word_is_kept(state: State) -> None:
    state.pauses.pause("a", START, "me")
    state.pauses.pause("a", START + timedelta(hours=1), "you")
    state.pauses.resume("b")
    assert state.pauses.paused() == {"a": START}
    state.pauses.resume("a")
    assert state.pauses.paused() == {}


def test_an_alert_is_begun_by_one_and_ended_by_one_and_not_by_what_came_before_it(state: State) -> None:
    later = START + timedelta(hours=1)
    assert [state.alerts.begin("a", "stale", at) for at in (START, later)] == [True, False]
    assert state.alerts.begin("a", "failed", later)
    assert state.alerts.told() == {("a", "stale"): START, ("a", "failed"): later}
    assert not state.alerts.end("a", START)
    assert not state.alerts.end("b", later)
    assert [state.alerts.end("a", later, "stale") for _ in range(2)] == [True, False]
    assert [state.alerts.end("a", later + timedelta(seconds=1)) for _ in range(2)] == [True, False]
    assert state.alerts.told() == {}


def done(at: datetime, outcome: Outcome = Outcome.OK, job: str = "influx_to_s3") -> Run:
    return Run(f"{job} {at}", job, at, at + timedelta(seconds=1), outcome)


def test_runs_of_a_clock_that_was_ahead_come_after_all_others(runs: Runs) -> None:
    now = datetime.now(UTC)
    ahead, before, after = (done(now + timedelta(minutes=minutes)) for minutes in (60, -2, -1))
    for each in (before, ahead, after):
        runs.save(each)
    assert list(runs.recent(None, 10)) == [after, before, ahead]
    assert list(runs.recent("influx_to_s3", 2)) == [after, before]


def test_the_age_of_the_last_finished_run_leaves_out_failures_and_what_lies_ahead(runs: Runs) -> None:
    now = datetime.now(UTC)
    assert runs.since_done_seconds("influx_to_s3") is None
    runs.save(done(now + timedelta(days=40)))
    assert runs.since_done_seconds("influx_to_s3") is None
    runs.save(done(now - timedelta(seconds=500), Outcome.PARTIAL))
    runs.save(done(now - timedelta(seconds=100), Outcome.FAILED))
    runs.save(done(now - timedelta(seconds=50), job="other"))
    age = runs.since_done_seconds("influx_to_s3")
    assert age is not None
    assert 500 <= age < 530


def test_runs_ahead_of_now_do_not_push_the_others_out(state: State) -> None:
    now = datetime.now(UTC)
    runs = SqlRuns(NamedQueries(state.database, sql_directory() / "state"), kept=3)
    for number in range(5):
        runs.save(done(now + timedelta(days=40, minutes=number)))
    for number in range(5, 0, -1):
        runs.save(done(now - timedelta(minutes=number)))
    known = [done(now - timedelta(minutes=number)) for number in (1, 2, 3)]
    assert list(runs.recent(None, 3)) == known
    assert len(runs.recent(None, 100)) == 6
    assert runs.last_ended("influx_to_s3") == known[0]


def test_what_ended_ahead_of_now_is_told_of_until_a_run_has_ended_since(state: State) -> None:
    now = datetime.now(UTC)
    state.runs.save(done(now + timedelta(days=40)))
    state.runs.save(done(now + timedelta(seconds=20), job="in order"))
    (name, seconds), *others = state.clocks.ahead_seconds().items()
    assert (name, others) == ("influx_to_s3", [])
    assert abs(seconds - 40 * 86_400) < 60
    state.runs.save(done(now - timedelta(seconds=5), Outcome.PARTIAL))
    assert state.clocks.ahead_seconds() == {}
    ends = {total.outcome: total.ended_at for total in state.runs.totals() if total.job == "influx_to_s3"}
    assert set(ends.values()) == {now - timedelta(seconds=4)}
