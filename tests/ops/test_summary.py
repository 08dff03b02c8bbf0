"""What the summary makes of faults, without a server."""

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any

from app.core.runs import Job, Report
from app.core.windows import Window
from app.ops.delivery_map import MapCells, MapFault
from app.ops.scheduler import JobView
from app.ops.summary import RunsOfJob, Snapshot, problems_of, summary_of

NOW = datetime(2026, 2, 9, 12, tzinfo=UTC)
HOUR = timedelta(hours=1)


def seen(faults: Sequence[MapFault], recorded: Sequence[Any] = ()) -> Snapshot:
    """A pipeline `p` whose listings showed these faults, whose records tell of more, and nothing else."""
    rows = {"trouble_by_partition": recorded}
    nothing: Any = SimpleNamespace(rows=lambda query, **_: rows.get(query, ()), partial_runs=lambda _: [])
    ops: Any = SimpleNamespace(
        maps=SimpleNamespace(jobs=["p"], faults=lambda _: faults),
        proofs=SimpleNamespace(jobs=["p"], results=list),
        probes=SimpleNamespace(unreachable=dict),
        alerts=SimpleNamespace(stale=frozenset(), ahead_seconds={}),
    )
    return Snapshot(NOW, UTC, (), nothing, MapCells([NOW - HOUR, NOW], 3600), ops)


def fault(partition: str, hours_ago: int, seen_at: datetime = NOW) -> MapFault:
    start = NOW - hours_ago * HOUR
    return MapFault(partition, Window(start, start + HOUR), "m", seen_at)


def test_a_fault_of_many_partitions_is_one_problem_that_names_those_with_the_most_of_it() -> None:
    earlier = NOW - 2 * HOUR
    faults = [fault(f"D{number}", 5) for number in range(9)] + [fault("D7", 6), fault("D8", 6, earlier)]
    (found,) = problems_of(seen(faults))
    assert found.title == "p, D7, D8, D0 and 6 more: 11 windows missing"
    assert (found.count, found.partition, found.since) == (11, "", earlier)
    assert [action["label"] for action in found.actions] == ["Heal 11 windows", "Show on map"]
    assert found.actions[0]["part"] == {"from": "2026-02-09T06:00:00.000Z", "to": "2026-02-09T08:00:00.000Z"}


def test_what_a_heal_of_all_partitions_would_read_for_long_is_left_to_a_person() -> None:
    (found,) = problems_of(seen([fault("D1", 5), fault("D2", 50)]))
    assert [action["kind"] for action in found.actions] == ["show"]
    assert found.next.endswith("python -m app verify p --from 2026-02-07 --to 2026-02-10 --heal")
    (alone,) = problems_of(seen([fault("D1", 5), fault("D1", 50)]))
    assert alone.title == "p, D1: 2 windows missing"
    assert alone.actions[0]["part"]["partition"] == "D1"


def test_partitions_beyond_the_limit_of_the_page_count_in_what_is_missing() -> None:
    of_all = {"all_windows": 2500, "all_partitions": 1200, "all_first_at": NOW - 30 * HOUR, "all_last_at": NOW}
    one = {"pipeline": "p", "trouble": "missing", "windows": 2, "first_at": NOW - HOUR, "last_at": NOW, **of_all}
    (found,) = problems_of(seen([], [{**one, "device_id": f"D{number:04}"} for number in range(1000)]))
    assert found.title == "p, D0000, D0001, D0002 and 1,197 more: 2,500 windows missing"
    assert (found.count, found.span) == (2500, (NOW - 30 * HOUR, NOW))


def test_the_row_of_a_source_without_rows_says_so() -> None:
    row = {"pipeline": "pull", "device_id": "web", "last_at": None, "first_at": NOW - 50 * HOUR}
    found = seen([])
    look: Any = SimpleNamespace(
        rows=lambda query, **_: [row] if query == "quiet_partitions" else [],
        partial_runs=lambda _: [],
    )
    found.ops.costs = SimpleNamespace(estimate=lambda: SimpleNamespace(by_kind={}))  # type: ignore[assignment]
    view = JobView(Job("pull", 3600, lambda _: Report()), "waiting", None, 0, None, can_backfill=True)
    cells = MapCells([NOW - HOUR * number for number in range(24, -1, -1)], 3600)
    summary = summary_of(replace(found, look=look, views=[view], cells=cells, runs={"pull": RunsOfJob()}), {})
    assert [(job["mark"], job["words"]) for job in summary["jobs"]] == [("warn", "No rows")]
    assert summary["verdict"]["parts"] == [{"text": "pull, web: no rows", "href": "#p-pull"}]
