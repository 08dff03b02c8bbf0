"""What the pages ask of the state, over SQLite and PostgreSQL: maps of the records, pages of runs, new rows by time."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from app.core.ledger import Tally, ledger_of
from app.core.pipeline import FOREIGN, MISSING, Commit, Record
from app.core.runs import Failure, Outcome, Report, Run
from app.core.verify import MapCell
from app.core.windows import Window
from app.db.page_queries import NameFilter, RunFilter
from app.db.state import State
from app.ops.delivery_map import DeliveryMaps, cells_of_span

JOB = "influx_to_s3"
NOW = datetime.now(UTC).replace(minute=30, second=0, microsecond=0) - timedelta(hours=1)
HOUR = timedelta(hours=1)
START = NOW.replace(minute=0) - 6 * HOUR


class Unlisted:
    """A chart that must not be asked: the records tell."""

    def partitions(self) -> Sequence[str]:
        raise AssertionError("the destination was asked for its partitions")

    def cells(self, partition: str, span: Window) -> Sequence[MapCell]:
        raise AssertionError(f"the destination was listed: {partition} {span}")


@pytest.fixture(params=["sqlite", "postgres"])
def state(request: pytest.FixtureRequest, new_state: Callable[[str], State]) -> State:
    return new_state(request.param)


def record(number: int) -> Record:
    window = Window(START + number * HOUR, START + (number + 1) * HOUR)
    return Record(window, 0, f"key-{number}", "v", "d", 10, 100, 10, window.start, window.start, closed=True)


def commit(state: State, names: Sequence[str], numbers: Sequence[int], cursor: int) -> None:
    """These hours of each partition, which is finished up to the hour `cursor`."""
    lease = state.leases.acquire(JOB, "test", 60)
    assert lease is not None
    one = Commit(tuple(record(number) for number in numbers), START + cursor * HOUR)
    state.checkpoints.commit_all(JOB, [(name, one) for name in names], lease)
    state.leases.release(lease)


def maps(state: State) -> DeliveryMaps:
    return DeliveryMaps({JOB: Unlisted()}, state.pages, lambda: NOW)


def ended(number: int, outcome: Outcome = Outcome.OK, job: str = JOB, **report: Any) -> Run:
    start = START + timedelta(minutes=number)
    return Run(
        f"{job}-{number}",
        job,
        start,
        start + timedelta(seconds=2),
        outcome,
        Report(**report),
    )


def test_a_cell_of_the_records_is_the_worst_of_what_was_marked_what_is_there_and_how_far_the_cursor_is(
    state: State,
) -> None:
    commit(state, ["a", "b_1", "b%2"], [0, 1, 3], cursor=5)
    commit(state, ["late"], [0], cursor=1)
    state.checkpoints.mark(JOB, "a", [(record(1), MISSING)])
    state.checkpoints.mark(JOB, "b_1", [(record(3), FOREIGN)])
    state.checkpoints.mark(JOB, "b%2", [(record(1), MISSING), (record(3), MISSING)])
    with state.pages.look() as look:
        (most,) = look.rows("trouble_by_partition", limit=1)
    of_all = [most[name] for name in ("windows", "all_windows", "all_partitions", "all_first_at", "all_last_at")]
    assert (most["device_id"], of_all) == ("b%2", [2, 3, 2, START + HOUR, START + 4 * HOUR]), "also beyond the limit"
    state.checkpoints.mark(JOB, "b%2", [(record(1), ""), (record(3), "")])
    cells = cells_of_span("24h", None, UTC, NOW)
    found = maps(state).recorded(JOB, cells, NameFilter(), offset=0, limit=200, only_problems=False)
    assert [(row.name, row.cells[-7:], row.problems) for row in found.rows] == [
        ("a", "kmnknoo", 1),
        ("b%2", "kknknoo", 0),
        ("b_1", "kknc" + "noo", 1),
        ("late", "kllloo" + "o", 1),
    ]
    assert (found.total, found.problems, found.listed, found.grouped) == (4, 3, False, False)
    assert maps(state).strip(JOB, cells_of_span("365d", None, UTC, NOW), 0.0) is not None
    only = maps(state).recorded(JOB, cells, NameFilter(), offset=1, limit=1, only_problems=True)
    assert ([row.name for row in only.rows], only.pages_of) == (["b_1"], 3)
    only = maps(state).recorded(JOB, cells, NameFilter(), offset=2, limit=9, only_problems=True)
    assert [(row.name, row.problems) for row in only.rows] == [("late", 1)], "what is late is a problem too"
    group = NameFilter("b%2", "b_1")
    only = maps(state).recorded(JOB, cells, group, offset=0, limit=9, only_problems=True)
    assert ([row.name for row in only.rows], only.problems) == (["b_1"], 1), "of an opened group, not of all"
    for text, names in (("B_", ["b_1"]), ("%", ["b%2"]), ("x", [])):
        found = maps(state).recorded(JOB, cells, NameFilter(find=text), offset=0, limit=9, only_problems=False)
        assert [row.name for row in found.rows] == names, text


def test_more_than_two_hundred_partitions_are_groups_by_name_each_with_its_worst_state(state: State) -> None:
    names = [f"D{number:03}" for number in range(251)]
    commit(state, names, [0], cursor=6)
    commit(state, ["D026"], [2], cursor=6)
    state.checkpoints.mark(JOB, "D030", [(record(0), MISSING)])
    cells = cells_of_span("24h", None, UTC, NOW)
    found = maps(state).recorded(JOB, cells, NameFilter(), offset=1, limit=200, only_problems=False)
    first, *_, last = found.rows
    assert (first.name, first.last, first.count, first.problems) == ("D025", "D049", 25, 1)
    assert (last.name, last.last, last.count) == ("D250", "D250", 1)
    assert (first.cells[-7:], last.cells[-7:]) == ("mnknnno", "knnnnno")
    assert (found.total, found.pages_of, found.grouped) == (251, 11, True)
    opened = maps(state).recorded(JOB, cells, NameFilter("D025", "D049"), offset=0, limit=200, only_problems=False)
    assert [row.name for row in opened.rows] == names[25:50]
    assert maps(state).strip(JOB, cells, 0.0) == first.cells


def test_runs_are_chosen_by_job_outcome_time_and_news_and_come_in_pages(state: State) -> None:
    bad: dict[str, Any] = {"failures": (Failure("web", "403", "set the key"),)}
    runs = [
        ended(0, rows=5, written_new_rows=5),
        ended(1),
        ended(2, Outcome.PARTIAL, **bad),
        ended(3, Outcome.FAILED),
        ended(4, job="csv_inbox", ledger=ledger_of(Tally(counted=3, new=2, corrected=1), unit="records")),
    ]
    for run in runs:
        state.runs.save(run)
        state.runs.save(run)  # again, as after a lost answer
    everything = RunFilter(START, NOW)
    with state.pages.look() as look:
        assert [run.run_id for run in look.runs(everything, 9, NOW)[0]] == [run.run_id for run in reversed(runs)]
        assert look.runs(everything, 9, NOW)[1:] == (5, 4)
        assert [run.run_id for run in look.runs(replace(everything, news=True, job=JOB), 9, runs[3].started_at)[0]] == [
            f"{JOB}-2",
            f"{JOB}-0",
        ]
        assert look.runs(replace(everything, outcome=Outcome.FAILED), 9, NOW)[0] == [runs[3]]
        assert look.runs(RunFilter(START + timedelta(minutes=4), NOW), 9, NOW)[1] == 1
        assert look.failures_in_a_row(JOB) == (2, runs[2].started_at)
        assert look.failures_in_a_row("csv_inbox") == (0, None)
        assert look.beside(runs[2]) == (runs[1], runs[3])
        assert look.beside(runs[4]) == (None, None)
        assert look.run(runs[0].run_id) == runs[0]
        assert look.run("nobody") is None
        short = look.run(runs[4].run_id[:8])
        assert short is not None
        assert short.run_id == runs[4].run_id
        assert look.run(runs[4].run_id[:7]) is None
        assert look.run(f"{JOB}-") is None, "several runs begin so"
        slots = {
            (row["job"], row["new_rows"], row["updated_rows"], row["runs"], row["failed_runs"])
            for row in look.rows("new_rows_since", since_at=START, until_at=NOW)
        }
    assert slots == {(JOB, 5, 0, 4, 2), ("csv_inbox", 2, 1, 1, 0)}
    assert {(total.job, total.outcome): total.report.new_rows for total in state.runs.totals()}[JOB, Outcome.OK] == 5


def test_a_rewrite_of_an_open_window_counts_its_rows_once() -> None:
    values = ledger_of(Tally(counted=40, new=40), unit="values")
    assert Report(rows=10, written_new_rows=10, ledger=values).new_rows == 10
    assert Report(rows=10, ledger=values).new_rows == 0, "values are no rows"
    assert Report(rows=12, ledger=ledger_of(Tally(counted=12, new=3, already_there=9), unit="items")).new_rows == 3


def test_what_a_run_wrote_is_told_until_a_later_one_writes_it_again(state: State) -> None:
    commit(state, ["a"], [5], cursor=6)
    with state.pages.look() as look:
        now = look.now()
        run = replace(ended(0), started_at=now - timedelta(minutes=1), ended_at=now + timedelta(minutes=1))
        assert [(row["device_id"], row["s3_key"], row["record_count"]) for row in look.written_by(run, JOB)] == [
            ("a", "key-5", 10)
        ]
        later = replace(run, started_at=now + timedelta(minutes=1), ended_at=None)
        assert look.written_by(later, JOB) == []


def test_a_problem_that_was_dismissed_is_one_again_when_it_happens_later(state: State) -> None:
    for at in (NOW - HOUR, NOW):
        state.pages.dismiss("one", at, "ana")
    with state.pages.look() as look:
        assert look.rows("dismissed") == [{"problem_id": "one", "dismissed_at": NOW}]
