"""Runs child processes in turns, measures them by the kernel's counters, and reduces the results to medians.

Invariant: the reported numbers are the child's own `rusage`, including children it waited for. This process imports
nothing large, since a child's peak memory is counted from the moment it forks from its parent.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

MIB_KIB = 1024


@dataclass(frozen=True, slots=True)
class Cost:
    """What one run took. `told` is the last line that the child printed, read as JSON."""

    cpu_seconds: float
    wall_seconds: float
    peak_mib: float
    told: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Goal:
    """A figure beside what it should be; `at_least` False means at most."""

    what: str
    value: float
    limit: float
    at_least: bool = True
    unit: str = ""

    @property
    def met(self) -> bool:
        """Whether the figure keeps the limit."""
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def __str__(self) -> str:
        bound = "at least" if self.at_least else "at most"
        verdict = "met" if self.met else "MISSED"
        return f"{self.what}: {self.value:.2f}{self.unit} ({bound} {self.limit:g}{self.unit}: {verdict})"


def run(command: Sequence[str], environ: Mapping[str, str] | None = None) -> Cost:
    """Run a command to its end. Its failure ends the bench."""
    started = time.monotonic()
    child = subprocess.Popen(command, stdout=subprocess.PIPE, env={**clean_environ(), **(environ or {})})
    printed = child.stdout.read() if child.stdout else b""
    _, status, used = os.wait4(child.pid, 0)
    wall_seconds = time.monotonic() - started
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode != 0:
        sys.exit(f"{' '.join(command)} ended with {child.returncode}")
    lines = printed.decode().strip().splitlines()
    told = json.loads(lines[-1]) if lines and lines[-1].startswith("{") else {}
    return Cost(used.ru_utime + used.ru_stime, wall_seconds, used.ru_maxrss / MIB_KIB, told)


def clean_environ() -> dict[str, str]:
    """This environment, but with compiled modules kept: an installation has them."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return {**kept, "PYTHONWARNINGS": "ignore"}


def in_turns(ways: Mapping[str, Callable[[], Cost]], repeat: int) -> Mapping[str, Cost]:
    """Each way once unmeasured where there are several, then `repeat` rounds over all; medians by way."""
    for way in ways.values() if len(ways) > 1 else ():
        way()
    rounds = [{name: way() for name, way in ways.items()} for _ in range(repeat)]
    return {name: median([one[name] for one in rounds]) for name in ways}


def median(costs: Sequence[Cost]) -> Cost:
    """The median of each figure; of what was told, numbers are reduced alike, anything else is the last."""
    last = costs[-1].told
    told = {
        name: statistics.median(cost.told[name] for cost in costs) if isinstance(value, int | float) else value
        for name, value in last.items()
    }
    return Cost(
        statistics.median(cost.cpu_seconds for cost in costs),
        statistics.median(cost.wall_seconds for cost in costs),
        statistics.median(cost.peak_mib for cost in costs),
        told,
    )


def table(rows: Mapping[str, Cost], head: str = "way") -> str:
    """Markdown."""
    lines = [f"| {head} | cpu s | wall s | peak MiB |", "|---|---|---|---|"]
    lines += [
        f"| {name} | {cost.cpu_seconds:.2f} | {cost.wall_seconds:.2f} | {cost.peak_mib:.0f} |"
        for name, cost in rows.items()
    ]
    return "\n".join(lines)
