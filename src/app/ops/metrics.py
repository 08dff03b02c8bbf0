"""The Prometheus text format, version 0.0.4, written by hand: a dozen series do not need a library.

Invariants: the number of series is bounded, since only the partitions that lag most have their own; every counter is
durable, that is, kept in the state. Source of the format: the Prometheus documentation, "Exposition formats".
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from app.core.errors import AppError
from app.core.ledger import Ledger
from app.core.pipeline import FOREIGN, MISSING
from app.core.runs import LedgerTotal, Outcome, RunTotal
from app.ops.json_views import lag_seconds
from app.ops.scheduler import Workload
from app.ops.service import BuiltService

PARTITIONS = 100
MOVED = {
    "rows": "Rows written to a sink.",
    "bytes": "Bytes written to a sink.",
    "windows": "Windows written to a sink.",
    "late_rows": "Rows that came after their window was closed.",
    "corrected_rows": "Rows that were corrected at the source after their window was closed.",
}
ENTRIES = {
    "waiting": "What the last run left for a later one.",
    "set_aside": "What the last run saw that is set aside.",
}
TROUBLES = {
    MISSING: "Objects that were written and that the last listing of the destination did not show.",
    FOREIGN: "Objects that the last listing showed in a version that Headwater did not write.",
}

Labels = Mapping[str, str]
Samples = Sequence[tuple[Labels, float]]


@dataclass(frozen=True, slots=True)
class MetricSeries:
    """One metric with its samples. `kind` is gauge or counter."""

    name: str
    kind: str
    about: str
    samples: Samples


def exposition(series: Iterable[MetricSeries]) -> str:
    """All series as text; those without samples are left out."""
    lines = []
    for one in series:
        if one.samples:
            lines += [f"# HELP {one.name} {one.about}", f"# TYPE {one.name} {one.kind}"]
        for labels, value in one.samples:
            inner = ",".join(f'{name}="{escaped(text)}"' for name, text in labels.items())
            lines.append(f"{one.name}{{{inner}}} {value:.15g}" if inner else f"{one.name} {value:.15g}")
    return "".join(f"{line}\n" for line in lines)


def escaped(text: str) -> str:
    """A label value, escaped as the format requires."""
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')


def series_of(ops: BuiltService) -> Iterator[MetricSeries]:
    """All series; while the state is unavailable only those that do not need it, one of which says why."""
    views, ahead, stale = ops.scheduler.views(), ops.alerts.ahead_seconds, ops.alerts.stale
    states = {view.job.name: view.state for view in views if not view.job.off}
    version = [({"version": ops.probes.version}, 1.0)]
    yield MetricSeries("headwater_build_info", "gauge", "Version of Headwater.", version)
    yield _by_job("job_paused", "1 while a job is paused.", {job: state == "paused" for job, state in states.items()})
    running = {job: state in ("running", "backfill") for job, state in states.items()}
    yield _by_job("job_running", "1 while a run of a job goes on in this process.", running)
    silent = {job: job in stale for job in states}
    yield _by_job("job_stale", "1 when no run of a job finished in time.", silent)
    about = "How far the last run or a cursor of a job lies ahead of now; 0 is normal."
    yield _by_job("clock_ahead_seconds", about, {job: ahead.get(job, 0.0) for job in states})
    checks = [({"check": name}, float(ok)) for name, ok in ops.probes.ready().body["checks"].items()]
    yield MetricSeries("headwater_check", "gauge", "1 while a system can be reached.", checks)
    with suppress(AppError):
        yield from list(_recorded(ops, states))


def _recorded(ops: BuiltService, states: Mapping[str, str]) -> Iterator[MetricSeries]:
    """The series from the state. `states` are by enabled job."""
    now, runs, totals = ops.state.clocks.now(), ops.state.runs, ops.state.runs.totals()
    yield from _totals(totals)
    # negative where a clock was ahead, which another series reports
    ages = {each.job: (now - each.ended_at).total_seconds() for each in totals if each.outcome is Outcome.OK}
    yield _by_job("last_success_age_seconds", "Seconds since the last run without any failure ended.", ages)
    # from the last finished run of each job; runs from before ledgers existed are left out
    ledgers = {run.job: run.report.ledger for run in map(runs.last_ended, states) if run and run.report.ledger}
    yield from _ledgers(runs.ledger_totals(), ledgers)
    calls = {job: of() for job, of in ops.pipelines.calls.items()}
    ever, today, a_day = ({job: getattr(of, name) for job, of in calls.items()} for name in ("ever", "today", "a_day"))
    yield _by_job("calls_total", "Calls to a service that counts them.", ever, "counter")
    yield _by_job("calls_today", "Calls since midnight UTC.", today)
    yield _by_job("calls_limit", "Calls that a day may have.", a_day)
    troubles = {**{name: {} for name in ops.pipelines.listed}, **ops.state.checkpoints.troubles()}
    for trouble, about in TROUBLES.items():
        numbers = {name: troubles[name].get(trouble, 0) for name in states if name in troubles}
        yield _by_job(f"objects_{trouble}", about, numbers)
    if ops.scheduler.elsewhere:
        yield from _workload(ops.scheduler.elsewhere.look())
    lags = [(job, at.partition, lag_seconds(at, now)) for job, at in ops.partitions()]
    yield from lag_series([(job, name, lag) for job, name, lag in lags if lag is not None])


def _by_job(name: str, about: str, values: Mapping[str, float], kind: str = "gauge") -> MetricSeries:
    return MetricSeries(
        f"headwater_{name}", kind, about, [({"job": job}, float(value)) for job, value in values.items()]
    )


def _totals(totals: Sequence[RunTotal]) -> Iterator[MetricSeries]:
    """Counters of runs by outcome and of moved rows; they are sums in the state, so a restart does not reset them."""
    by_outcome = [({"job": each.job, "outcome": each.outcome.value}, float(each.runs)) for each in totals]
    yield MetricSeries("headwater_runs_total", "counter", "Runs that ended, by outcome.", by_outcome)
    for name, about in MOVED.items():
        sums: Counter[str] = Counter()
        for each in totals:
            sums[each.job] += getattr(each.report, name)
        yield _by_job(f"{name}_total", about, sums, "counter")


def _ledgers(totals: Sequence[LedgerTotal], last: Mapping[str, Ledger]) -> Iterator[MetricSeries]:
    """Counters from the ledgers, which are sums in the state, and gauges of the last finished run of each job."""
    jobs = sorted({each.job for each in totals})
    sums = {(job, entry): 0.0 for job in jobs for entry in ("new", "corrected", "set_aside")}
    for each in totals:
        sums[each.job, each.entry] += each.total
    entries = [({"job": job, "entry": entry}, number) for (job, entry), number in sums.items()]
    about = "What runs found new, corrected, or set aside for the first time, in the unit of the job's ledger."
    yield MetricSeries("headwater_ledger_total", "counter", about, entries)
    reasons = [({"job": each.job, "reason": each.reason}, float(each.total)) for each in totals if each.reason]
    about = "What runs set aside for the first time, by reason."
    yield MetricSeries("headwater_set_aside_total", "counter", about, reasons)
    for entry, about in ENTRIES.items():
        yield _by_job(entry, about, {job: getattr(ledger.total, entry) for job, ledger in last.items()})
    about = "What the last run counted and cannot account for; 0 is normal."
    yield _by_job("ledger_gap", about, {job: ledger.gap for job, ledger in last.items()})


def _workload(load: Workload) -> Iterator[MetricSeries]:
    """The load of the workers, where jobs go to a queue."""
    about = "Shards that workers share the export in."
    yield MetricSeries("headwater_workers", "gauge", "Workers that live.", [({}, load.workers)])
    queued = [({"queue": name}, number) for name, number in load.waiting.items()]
    yield MetricSeries("headwater_queue_depth", "gauge", "What waits for a worker.", queued)
    yield MetricSeries("headwater_shards", "gauge", about, [({}, load.shards)])
    about = "Shards that a worker works on now."
    yield MetricSeries("headwater_shards_running", "gauge", about, [({}, load.shards_running)])


def lag_series(lags: Sequence[tuple[str, str, float]]) -> Iterator[MetricSeries]:
    """`lags`: (job, partition, seconds). A series for each of the largest, and per job the maximum and the number."""
    worst = sorted(lags, key=lambda lag: -lag[2])
    singly = [({"job": job, "partition": name}, seconds) for job, name, seconds in worst[:PARTITIONS]]
    yield MetricSeries(
        "headwater_lag_seconds", "gauge", f"Age of the newest event seen, the {PARTITIONS} largest.", singly
    )
    by_job: dict[str, list[float]] = {job: [] for job in sorted({job for job, _, _ in lags})}
    for job, _, seconds in lags:
        by_job[job].append(seconds)
    most = {job: max(seconds) for job, seconds in by_job.items()}
    yield _by_job("lag_max_seconds", "The largest lag of all partitions of a job.", most)
    yield _by_job("partitions", "Partitions known of a job.", {job: len(seconds) for job, seconds in by_job.items()})
