"""Plans: what is sent of them, what is done here, and that all that they counted is in the ledger whoever reports."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from app.core.errors import Stopped, Transient
from app.core.ledger import Ledger, Tally
from app.core.partitions import SyncPlan
from app.core.pipeline import Count
from app.core.runs import Context, Failure, Lease, NoProgress, Outcome, Report, Stop
from app.db.workers import StepReport
from app.scale.shards import Shards, plan_from_json, plan_to_json
from exporter import NOON, Exporter

NOW = datetime(2026, 2, 7, 12, 0, 0, 123456, tzinfo=UTC)
HOUR_AT = NOW.replace(minute=0, second=0, microsecond=0)


def plan(*names: str) -> SyncPlan:
    counts = {
        name: {HOUR_AT: Count(7, 3, {"voltage": 3, "ü": 4}), HOUR_AT - timedelta(hours=1): Count(2, 2, {"power": 2})}
        for name in names
    }
    return SyncPlan(
        "influx_to_s3", "values", NOW, HOUR_AT, 2.5, {name: NOW - timedelta(days=1) for name in names}, counts
    )


def context(*, dry_run: bool = False) -> Context:
    return Context("run-1", Lease("influx_to_s3", "me", 1, NOW), Stop(), NoProgress(), dry_run)


def landed(part: SyncPlan) -> Report:
    """A step that brought everything."""
    counted = part.left().ledger.total.counted
    return Report(rows=counted, ledger=Ledger("values", {"all": Tally(counted=counted, new=counted)}))


@dataclass
class Workers:
    """Steps are made as soon as they are sent, unless they are `lost`, or `waiting` from before."""

    lost: Sequence[str] = ()
    waiting: Sequence[str] = ()
    failing: bool = False
    late: Sequence[StepReport] = ()
    sent: dict[str, SyncPlan] = field(default_factory=dict)
    requests: Counter[str] = field(default_factory=Counter)  # those of their steps

    def send_step(self, step: str, plan_id: str, plan: Mapping[str, Any]) -> bool:
        if step in self.waiting:
            return False
        assert plan_id == "run-1"
        self.sent[step] = plan_from_json(plan)
        return True

    def take_reports(self, pipeline: str) -> Sequence[StepReport]:
        assert pipeline == "influx_to_s3"
        late, self.late = self.late, ()
        return [*late, *(self._report(step) for step in self.sent if step not in self.lost)]

    def _report(self, step: str) -> StepReport:
        report = landed(self.sent[step])
        if self.failing:
            report = self.sent[step].left() + Report(failures=(Failure(step, "no answer", "look"),))
        return StepReport("run-1", step, report, {"put": 2})


def shared(workers: Workers, *, shards: int, patience_seconds: float) -> Shards:
    send, take, requested = workers.send_step, workers.take_reports, workers.requests.update
    return Shards(send, take, requested, shards=shards, patience_seconds=patience_seconds)


def here(_: Context, part: SyncPlan) -> Report:
    return landed(part)


def test_a_plan_comes_back_as_it_was_sent() -> None:
    sent = plan("D1", "ü/2", "D3")
    again = plan_from_json(plan_to_json(sent))
    assert again == sent
    assert again.counts["D1"][HOUR_AT].fields == {"voltage": 3, "ü": 4}  # which do not count for equality


def test_every_device_is_sent_once_and_always_in_the_same_shard() -> None:
    names = [f"D{number}" for number in range(50)]
    workers = Workers()
    report = shared(workers, shards=4, patience_seconds=5)(context(), plan(*names), here)
    assert sorted(name for part in workers.sent.values() for name in part.cursors) == sorted(names)
    assert set(workers.sent) <= {f"influx_to_s3/{number}" for number in range(4)}
    assert (report.ledger.total.counted, report.ledger.total.new) == (450, 450)
    assert workers.requests == {"put": 2 * len(workers.sent)}
    again = Workers()
    shared(again, shards=4, patience_seconds=5)(context(), plan("D7"), here)
    ((step, _),) = again.sent.items()
    assert "D7" in workers.sent[step].cursors


@pytest.mark.parametrize("name", ["", "nul\x00", "\ud800"])
def test_what_no_database_can_hold_is_done_here(name: str) -> None:
    workers = Workers()
    report = shared(workers, shards=4, patience_seconds=5)(context(), plan(name, "D1"), here)
    assert [list(part.cursors) for part in workers.sent.values()] == [["D1"]]
    assert report.ledger.total.new == 18


def test_a_dry_run_sends_nothing() -> None:
    workers = Workers()
    assert shared(workers, shards=4, patience_seconds=5)(context(dry_run=True), plan("D1"), here).rows == 9
    assert not workers.sent


def test_what_a_dead_worker_had_waits_and_the_next_plan_is_due_at_once() -> None:
    workers = Workers()
    shared(workers, shards=2, patience_seconds=5)(context(), plan("D1", "D2", "D3"), here)
    lost = next(iter(workers.sent))
    dying = Workers(lost=(lost,))
    report = shared(dying, shards=2, patience_seconds=0.1)(context(), plan("D1", "D2", "D3"), here)
    assert report.more
    assert report.ledger.closes
    assert report.ledger.total.waiting == 9 * len(workers.sent[lost].cursors)
    assert report.ledger.total.counted == 27


def test_a_shard_whose_last_step_waits_still_is_not_sent_again() -> None:
    workers = Workers(waiting=("influx_to_s3/0",))
    report = shared(workers, shards=1, patience_seconds=5)(context(), plan("D1"), here)
    assert (report.more, report.ledger.total.waiting, report.ledger.closes) == (True, 9, True)


def test_what_an_earlier_plan_did_not_wait_for_is_in_the_ledger_of_the_next() -> None:
    late = StepReport("run-0", "influx_to_s3/0", landed(plan("D9")))
    workers = Workers(late=(late,))
    report = shared(workers, shards=1, patience_seconds=5)(context(), plan("D1"), here)
    assert (report.rows, report.ledger.total.new, report.ledger.closes) == (18, 18, True)


def test_a_plan_fails_when_all_its_shards_do() -> None:
    workers = Workers(failing=True)
    with pytest.raises(Transient, match="no answer"):
        shared(workers, shards=2, patience_seconds=5)(context(), plan("D1", "D2", "D3"), here)


def test_what_was_reported_is_in_the_record_of_a_plan_that_fails_or_is_stopped() -> None:
    late = StepReport("run-0", "influx_to_s3/0", landed(plan("D9")))
    failing = context()
    with pytest.raises(Transient):
        shared(Workers(failing=True, late=(late,)), shards=1, patience_seconds=5)(failing, plan("D1"), here)
    assert (failing.done.total.rows, failing.done.total.ledger.total.new) == (9, 9)
    stopped = context()
    stopped.stop.ask("the process ends")
    with pytest.raises(Stopped):
        shared(Workers(lost=("influx_to_s3/0",), late=(late,)), shards=1, patience_seconds=5)(stopped, plan("D1"), here)
    assert stopped.done.total.rows == 9


def test_in_one_process_a_shard_that_is_somebody_elses_waits(exporter: Exporter) -> None:
    exporter.write(NOON - timedelta(minutes=5))
    held = exporter.state.leases.acquire("influx_to_s3/0", "a worker", 30)
    assert held is not None
    run = exporter.run()
    assert run.outcome is Outcome.OK
    assert (run.report.ledger.total.waiting, run.report.ledger.closes, run.report.rows) == (3, True, 0)
    exporter.state.leases.release(held)
    assert exporter.run().report.ledger.total.new == 3
    exporter.check()


def test_a_device_whose_count_did_not_move_is_in_no_plan(exporter: Exporter) -> None:
    exporter.write(NOON - timedelta(minutes=5))
    exporter.well()
    plans: list[SyncPlan] = []

    def steps(own: Context, made: SyncPlan, step: Any) -> Report:
        plans.append(made)
        return step(own, made)  # type: ignore[no-any-return]

    exporter.steps = steps
    exporter.run()
    assert plans == []
    exporter.write(NOON - timedelta(minutes=4), "D2")
    exporter.run()
    assert [list(made.cursors) for made in plans] == [["D2"]]


def test_a_plan_that_waited_for_days_loses_and_doubles_nothing(exporter: Exporter) -> None:
    exporter.write(NOON - timedelta(minutes=5))
    kept: list[SyncPlan] = []

    def steps(_: Context, made: SyncPlan, __: Any) -> Report:
        kept.append(made)
        return made.left()

    exporter.steps = steps
    assert exporter.run().report.ledger.total.waiting == 3
    exporter.write(NOON - timedelta(minutes=4))
    exporter.steps = None
    exporter.at(hours=30)
    exporter.well()
    before = exporter.keys
    export = exporter.export()
    run = exporter.execute(lambda own: export.step(own, replace(kept[0])))
    assert (run.outcome, run.report.rows, run.report.ledger.closes) == (Outcome.OK, 0, True)
    assert exporter.keys == before
    exporter.check()
