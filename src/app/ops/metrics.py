"""The Prometheus text exposition, version 0.0.4, written by hand: a dozen series do not need a library.

Invariants: the number of series is bounded, of partitions only those that lag most are shown one by one; every counter
is durable, that is kept in the state.
Source of the format: the Prometheus documentation, "Exposition formats".
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
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
        sums: dict[str, float] = {}
        for each in totals:
            sums[each.job] = sums.get(each.job, 0.0) + getattr(each.report, name)
        yield Series(f"headwater_{name}_total", "counter", about, [({"job": job}, n) for job, n in sums.items()])


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
    gauges: Mapping[str, tuple[str, Callable[[Ledger], int]]] = {
        "waiting": ("What the last run left for a later one.", lambda ledger: ledger.total.waiting),
        "set_aside": ("What the last run saw that is set aside.", lambda ledger: ledger.total.set_aside),
        "ledger_gap": ("What the last run counted and cannot account for; 0 is well.", lambda ledger: ledger.gap),
    }
    for name, (about, of) in gauges.items():
        now = [({"job": job}, float(of(ledger))) for job, ledger in last.items()]
        yield Series(f"headwater_{name}", "gauge", about, now)


def call_series(calls: Mapping[str, Calls]) -> Iterator[Series]:
    """What services that allow only so many calls were asked."""
    ever = [({"job": job}, float(each.ever)) for job, each in calls.items()]
    yield Series("headwater_calls_total", "counter", "Calls to a service that counts them.", ever)
    today = [({"job": job}, float(each.today)) for job, each in calls.items()]
    yield Series("headwater_calls_today", "gauge", "Calls since midnight UTC.", today)
    a_day = [({"job": job}, float(each.a_day)) for job, each in calls.items()]
    yield Series("headwater_calls_limit", "gauge", "Calls that a day may have.", a_day)


def success_series(totals: Sequence[Total], now: datetime) -> Series:
    """Age of the last success by job; below 0 where a clock was ahead, which `clock_series` tells of."""
    ages = [(each.job, (now - each.ended_at).total_seconds()) for each in totals if each.outcome is Outcome.OK]
    about = "Seconds since the last run without any failure ended."
    return Series("headwater_last_success_age_seconds", "gauge", about, [({"job": job}, age) for job, age in ages])


def clock_series(views: Sequence[JobView], ahead_seconds: Mapping[str, float]) -> Series:
    """How far what is recorded of a job lies ahead of now."""
    able = [view.job.name for view in views if not view.job.off]
    samples = [({"job": name}, ahead_seconds.get(name, 0.0)) for name in able]
    about = "How far the last run or a cursor of a job lies ahead of now; 0 is well."
    return Series("headwater_clock_ahead_seconds", "gauge", about, samples)


def object_series(views: Sequence[JobView], troubles: Mapping[str, Mapping[str, int]]) -> Iterator[Series]:
    """`troubles`: by job, with how many recorded objects something is wrong."""
    mapped = [view.job.name for view in views if not view.job.off and view.job.name in troubles]
    abouts = {
        MISSING: "Objects that were written and that the last listing of the destination did not show.",
        FOREIGN: "Objects that the last listing showed in a version that Headwater did not write.",
    }
    for trouble, about in abouts.items():
        samples = [({"job": name}, float(troubles[name].get(trouble, 0))) for name in mapped]
        yield Series(f"headwater_objects_{trouble}", "gauge", about, samples)


def job_series(views: Sequence[JobView], stale: Collection[str]) -> Iterator[Series]:
    """What each job is at, and whether it fell silent."""
    able = [view for view in views if not view.job.off]
    paused = [({"job": view.job.name}, float(view.status.state == "paused")) for view in able]
    yield Series("headwater_job_paused", "gauge", "1 while a job is paused.", paused)
    running = [({"job": view.job.name}, float(view.status.state in ("running", "backfill"))) for view in able]
    yield Series("headwater_job_running", "gauge", "1 while a run of a job goes on in this process.", running)
    silent = [({"job": view.job.name}, float(view.job.name in stale)) for view in able]
    yield Series("headwater_job_stale", "gauge", "1 when no run of a job came to its end in time.", silent)


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
    jobs = sorted({job for job, _, _ in lags})
    most = [({"job": job}, max(s for j, _, s in lags if j == job)) for job in jobs]
    yield Series("headwater_lag_max_seconds", "gauge", "The largest lag of all partitions of a job.", most)
    number = [({"job": job}, float(sum(1 for j, _, _ in lags if j == job))) for job in jobs]
    yield Series("headwater_partitions", "gauge", "Partitions known of a job.", number)
