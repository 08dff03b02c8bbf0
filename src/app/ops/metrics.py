"""The Prometheus text exposition, version 0.0.4, written by hand: a dozen series do not need a library.

Invariants: the number of series is bounded, of partitions only those that lag most are shown one by one; every counter
is durable, that is kept in the state.
Source of the format: the Prometheus documentation, "Exposition formats".
"""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from app.core.ledger import Ledger
from app.core.pipeline import FOREIGN, MISSING
from app.core.runs import LedgerTotal, Outcome, Total
from app.ops.json_views import Calls
from app.ops.scheduler import JobView, Workload

PARTITIONS = 100

Labels = Mapping[str, str]
Samples = Sequence[tuple[Labels, float]]


@dataclass(frozen=True, slots=True)
class Series:
    """One metric with its samples. `kind` is gauge or counter."""

    name: str
    kind: str
    about: str
    samples: Samples


def exposition(series: Iterable[Series]) -> str:
    """All series as text; those without samples are left out."""
    return "".join(f"{line}\n" for one in series if one.samples for line in _lines(one))


def _lines(series: Series) -> Iterator[str]:
    yield f"# HELP {series.name} {series.about}"
    yield f"# TYPE {series.name} {series.kind}"
    for labels, value in series.samples:
        inner = ",".join(f'{name}="{escaped(text)}"' for name, text in labels.items())
        yield f"{series.name}{{{inner}}} {value:.15g}" if inner else f"{series.name} {value:.15g}"


def escaped(text: str) -> str:
    """A label value as the format wants it."""
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')


def _by_job(name: str, about: str, values: Mapping[str, float], kind: str = "gauge") -> Series:
    """One sample a job."""
    return Series(f"headwater_{name}", kind, about, [({"job": job}, float(value)) for job, value in values.items()])


def total_series(totals: Sequence[Total]) -> Iterator[Series]:
    """Counters of runs by outcome, and of what they moved: sums of the state, which no restart sets back."""
    by_outcome = [({"job": each.job, "outcome": each.outcome.value}, float(each.runs)) for each in totals]
    yield Series("headwater_runs_total", "counter", "Runs that ended, by outcome.", by_outcome)
    abouts = {
        "rows": "Rows written to a sink.",
        "bytes": "Bytes written to a sink.",
        "windows": "Windows written to a sink.",
        "late_rows": "Rows that came after their window was closed.",
        "corrected_rows": "Rows that were corrected at the source after their window was closed.",
    }
    for name, about in abouts.items():
        sums: Counter[str] = Counter()
        for each in totals:
            sums[each.job] += getattr(each.report, name)
        yield _by_job(f"{name}_total", about, sums, "counter")


def ledger_series(totals: Sequence[LedgerTotal], last: Mapping[str, Ledger]) -> Iterator[Series]:
    """Counters of what ledgers say, which are sums of the state, and gauges of the last ended run of each job."""
    jobs = sorted({each.job for each in totals})
    sums = {(job, entry): 0.0 for job in jobs for entry in ("new", "corrected", "set_aside")}
    for each in totals:
        sums[each.job, each.entry] += each.total
    entries = [({"job": job, "entry": entry}, number) for (job, entry), number in sums.items()]
    about = "What runs found new, corrected, or set aside for the first time, in the unit of the job's ledger."
    yield Series("headwater_ledger_total", "counter", about, entries)
    reasons = [({"job": each.job, "reason": each.reason}, float(each.total)) for each in totals if each.reason]
    about = "What runs set aside for the first time, by reason."
    yield Series("headwater_set_aside_total", "counter", about, reasons)
    waiting, aside = (
        {job: getattr(ledger.total, entry) for job, ledger in last.items()} for entry in ("waiting", "set_aside")
    )
    yield _by_job("waiting", "What the last run left for a later one.", waiting)
    yield _by_job("set_aside", "What the last run saw that is set aside.", aside)
    about = "What the last run counted and cannot account for; 0 is well."
    yield _by_job("ledger_gap", about, {job: ledger.gap for job, ledger in last.items()})


def call_series(calls: Mapping[str, Calls]) -> Iterator[Series]:
    """What services that allow only so many calls were asked."""
    ever, today, a_day = ({job: getattr(of, name) for job, of in calls.items()} for name in ("ever", "today", "a_day"))
    yield _by_job("calls_total", "Calls to a service that counts them.", ever, "counter")
    yield _by_job("calls_today", "Calls since midnight UTC.", today)
    yield _by_job("calls_limit", "Calls that a day may have.", a_day)


def success_series(totals: Sequence[Total], now: datetime) -> Series:
    """Age of the last success by job; below 0 where a clock was ahead, which `clock_series` tells of."""
    ages = {each.job: (now - each.ended_at).total_seconds() for each in totals if each.outcome is Outcome.OK}
    return _by_job("last_success_age_seconds", "Seconds since the last run without any failure ended.", ages)


def clock_series(views: Sequence[JobView], ahead_seconds: Mapping[str, float]) -> Series:
    """How far what is recorded of a job lies ahead of now."""
    about = "How far the last run or a cursor of a job lies ahead of now; 0 is well."
    ahead = {view.job.name: ahead_seconds.get(view.job.name, 0.0) for view in views if not view.job.off}
    return _by_job("clock_ahead_seconds", about, ahead)


def object_series(views: Sequence[JobView], troubles: Mapping[str, Mapping[str, int]]) -> Iterator[Series]:
    """`troubles`: by job, with how many recorded objects something is wrong."""
    mapped = [view.job.name for view in views if not view.job.off and view.job.name in troubles]
    abouts = {
        MISSING: "Objects that were written and that the last listing of the destination did not show.",
        FOREIGN: "Objects that the last listing showed in a version that Headwater did not write.",
    }
    for trouble, about in abouts.items():
        yield _by_job(f"objects_{trouble}", about, {name: troubles[name].get(trouble, 0) for name in mapped})


def job_series(views: Sequence[JobView], stale: Collection[str]) -> Iterator[Series]:
    """What each job is at, and whether it fell silent."""
    states = {view.job.name: view.state for view in views if not view.job.off}
    yield _by_job("job_paused", "1 while a job is paused.", {job: state == "paused" for job, state in states.items()})
    running = {job: state in ("running", "backfill") for job, state in states.items()}
    yield _by_job("job_running", "1 while a run of a job goes on in this process.", running)
    silent = {job: job in stale for job in states}
    yield _by_job("job_stale", "1 when no run of a job came to its end in time.", silent)


def workload_series(load: Workload) -> Iterator[Series]:
    """What workers are at, where jobs are sent to a queue."""
    yield Series("headwater_workers", "gauge", "Workers that live.", [({}, float(load.workers))])
    queued = [({"queue": name}, float(number)) for name, number in load.waiting.items()]
    yield Series("headwater_queue_depth", "gauge", "What waits for a worker.", queued)
    yield Series("headwater_shards", "gauge", "Shards that workers share the export in.", [({}, float(load.shards))])
    going: Samples = [({}, float(load.shards_running))]
    yield Series("headwater_shards_running", "gauge", "Shards that a worker works on now.", going)


def lag_series(lags: Sequence[tuple[str, str, float]]) -> Iterator[Series]:
    """`lags`: (job, partition, seconds). The largest ones singly, and for each job its maximum and number."""
    worst = sorted(lags, key=lambda lag: -lag[2])
    singly = [({"job": job, "partition": name}, seconds) for job, name, seconds in worst[:PARTITIONS]]
    yield Series("headwater_lag_seconds", "gauge", f"Age of the newest event seen, the {PARTITIONS} largest.", singly)
    by_job: dict[str, list[float]] = {job: [] for job in sorted({job for job, _, _ in lags})}
    for job, _, seconds in lags:
        by_job[job].append(seconds)
    most = {job: max(seconds) for job, seconds in by_job.items()}
    yield _by_job("lag_max_seconds", "The largest lag of all partitions of a job.", most)
    yield _by_job("partitions", "Partitions known of a job.", {job: len(seconds) for job, seconds in by_job.items()})
