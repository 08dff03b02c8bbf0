"""The Prometheus text exposition, version 0.0.4, written by hand: a dozen series do not need a library.

Invariant: the number of series is bounded; of partitions only those that lag most are shown one by one.
Source of the format: the Prometheus documentation, "Exposition formats".
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

PARTITIONS = 100

Labels = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Series:
    """One metric with its samples. `kind` is gauge or counter."""

    name: str
    kind: str
    about: str
    samples: Sequence[tuple[Labels, float]]


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


def run_series(runs: Mapping[tuple[str, str], int], sums: Mapping[tuple[str, str], int]) -> Iterator[Series]:
    """Counters of runs by outcome, and of what they moved."""
    by_outcome = [({"job": job, "outcome": outcome}, float(n)) for (job, outcome), n in sorted(runs.items())]
    yield Series("headwater_runs_total", "counter", "Runs that ended, by outcome.", by_outcome)
    abouts = {
        "rows": "Rows written to a sink.",
        "bytes": "Bytes written to a sink.",
        "windows": "Windows written to a sink.",
        "late_rows": "Rows that came after their window was closed.",
    }
    for name, about in abouts.items():
        samples = [({"job": job}, float(n)) for (job, what), n in sorted(sums.items()) if what == name]
        yield Series(f"headwater_{name}_total", "counter", about, samples)


def success_series(succeeded_at: Mapping[str, datetime], now: datetime) -> Series:
    """Age of the last success by job."""
    samples = [({"job": job}, (now - at).total_seconds()) for job, at in sorted(succeeded_at.items())]
    about = "Seconds since the last run without any failure ended."
    return Series("headwater_last_success_age_seconds", "gauge", about, samples)


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
