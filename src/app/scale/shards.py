"""A plan in shards: send the shards to workers and add up their reports.

Invariants: every row counted by a plan is in its ledger, either reported by a step or as waiting. A plan waits for its
steps at most for the lifetime of a lease, so that a dead worker causes no long delay. Reports that arrive later go to
the next plan.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from itertools import chain
from time import monotonic
from typing import Any
from zlib import crc32

from app.core.errors import Transient
from app.core.partitions import Step, SyncPlan
from app.core.pipeline import Count
from app.core.runs import Context, Report
from app.db.database import storable
from app.db.workers import StepReport

FIRST_LOOK_SECONDS, LONGEST_LOOK_SECONDS = 0.05, 0.5


def plan_to_json(plan: SyncPlan) -> Mapping[str, Any]:
    """The plan as it is sent: field names and timestamps are written once and referenced by index."""
    fields = {name: place for place, name in enumerate(sorted(set(_fields_of(plan))))}
    instants = {at: place for place, at in enumerate(sorted({*plan.cursors.values(), *chain(*plan.counts.values())}))}
    return {
        "pipeline": plan.pipeline,
        "unit": plan.unit,
        "now": plan.now.isoformat(),
        "live_since": plan.live_since.isoformat(),
        "rewrite_seconds": plan.rewrite_seconds,
        "fields": list(fields),
        "instants": [at.isoformat() for at in instants],
        "partitions": {
            name: [
                instants[at],
                [
                    [
                        instants[start],
                        count.cells,
                        count.points,
                        *chain(*((fields[f], n) for f, n in count.fields.items())),
                    ]
                    for start, count in plan.counts[name].items()
                ],
            ]
            for name, at in plan.cursors.items()
        },
    }


def plan_from_json(document: Mapping[str, Any]) -> SyncPlan:
    """The plan that `plan_to_json` wrote."""
    fields, instants = document["fields"], [datetime.fromisoformat(text) for text in document["instants"]]

    def count_of(cells: int, points: int, *values: int) -> Count:
        return Count(cells, points, {fields[f]: n for f, n in zip(values[::2], values[1::2], strict=True)})

    return SyncPlan(
        pipeline=document["pipeline"],
        unit=document["unit"],
        now=datetime.fromisoformat(document["now"]),
        live_since=datetime.fromisoformat(document["live_since"]),
        rewrite_seconds=document["rewrite_seconds"],
        cursors={name: instants[at] for name, (at, _) in document["partitions"].items()},
        counts={
            name: {instants[start]: count_of(*rest) for start, *rest in counts}
            for name, (_, counts) in document["partitions"].items()
        },
    )


def _fields_of(plan: SyncPlan) -> Iterator[str]:
    return chain.from_iterable(count.fields for counts in plan.counts.values() for count in counts.values())


class Shards:
    """See `PassOptions.steps`. `patience_seconds`: how long a plan waits for its steps, the lifetime of a lease.

    `send(step, plan_id, plan)` queues a step; False when an older one with this name is still waiting. `take_reports`
    returns all reports of a pipeline that no plan has taken, each to one caller only. Both raise Transient. `requested`
    is called with the request counts of the steps.
    """

    def __init__(
        self,
        send: Callable[[str, str, Mapping[str, Any]], bool],
        take_reports: Callable[[str], Sequence[StepReport]],
        requested: Callable[[Mapping[str, float]], None],
        *,
        shards: int,
        patience_seconds: float,
    ) -> None:
        self._send = send
        self._take_reports = take_reports
        self._requested = requested
        self._shards = shards
        self._patience_seconds = patience_seconds

    def __call__(self, context: Context, plan: SyncPlan, step: Step) -> Report:
        """Send the plan and add up the reports that arrive in time. The rest waits for the next plan, due at once."""
        if context.dry_run:
            return step(context, plan)
        by_shard: dict[int, list[str]] = {}
        for name in plan.cursors:
            by_shard.setdefault(self._shard_of(name) if _can_be_sent(plan, name) else -1, []).append(name)
        report = Report()
        if here := by_shard.pop(-1, None):
            report += step(context, plan.of(here))
        sent = {f"{plan.pipeline}/{number}": plan.of(names) for number, names in sorted(by_shard.items())}
        waiting = [name for name, part in sent.items() if not self._send(name, context.run_id, plan_to_json(part))]
        for name in waiting:
            report += sent.pop(name).left() + Report(more=True)
        return report + self._gathered(context, plan.pipeline, sent)

    def _shard_of(self, partition: str) -> int:
        """Always the same shard, so that its lease keeps two workers from working on the same partition."""
        return crc32(partition.encode()) % self._shards

    def _gathered(self, context: Context, pipeline: str, sent: dict[str, SyncPlan]) -> Report:
        total, ends_at, look_seconds = Report(), monotonic() + self._patience_seconds, FIRST_LOOK_SECONDS
        out = dict(sent)
        failed: list[Report] = []
        while True:
            for done in self._take_reports(pipeline):
                total += done.report
                context.done(done.report)  # taken from the database: the record of a run that fails must have it
                self._requested(done.requests)
                part = out.pop(done.step, None) if done.plan_id == context.run_id else None
                if part is not None:
                    context.progress.advance(done=len(part.cursors))
                    failed += [done.report] if any(each.partition == done.step for each in done.report.failures) else []
            if not out or monotonic() >= ends_at:
                break
            context.stop.pause(look_seconds)
            look_seconds = min(1.5 * look_seconds, LONGEST_LOOK_SECONDS)
        if sent and len(failed) == len(sent):
            why = failed[0].failures[-1]
            raise Transient(f"{why.partition} and all other shards: {why.message}", why.hint)
        return sum((part.left() + Report(more=True) for part in out.values()), total)


def _can_be_sent(plan: SyncPlan, partition: str) -> bool:
    """False for "" (no device tag), and for ids and fields with NUL or lone surrogates, which no database stores."""
    texts = (partition, *chain.from_iterable(count.fields for count in plan.counts[partition].values()))
    return bool(partition) and all(storable(text) == text for text in texts)
