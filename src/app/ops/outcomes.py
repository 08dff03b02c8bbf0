"""What is told of each run: one line in the log, and the counters behind /metrics.

Invariant: every run that ended is counted and logged exactly once, at the level that says what a person has to do.
"""

import logging
import threading
from collections import Counter
from collections.abc import Mapping
from datetime import datetime

from app.core.errors import AppError
from app.core.runs import Outcome, Run
from app.ops.log import bound

LEVELS = {Outcome.OK: logging.INFO, Outcome.STOPPED: logging.INFO, Outcome.PARTIAL: logging.WARNING}
log = logging.getLogger(__name__)


class Tallies:
    """Counters since the start of the process, by job."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._runs: Counter[tuple[str, str]] = Counter()
        self._sums: Counter[tuple[str, str]] = Counter()
        self._succeeded_at: dict[str, datetime] = {}

    def ended(self, run: Run, cause: BaseException | None) -> None:
        """`RunDesk.ended`: count the run and log it."""
        with self._lock:
            self._runs[run.job, run.outcome.value] += 1
            for name in ("rows", "bytes", "windows", "late_rows"):
                self._sums[run.job, name] += getattr(run.report, name)
            if run.outcome is Outcome.OK and run.ended_at:
                self._succeeded_at[run.job] = run.ended_at
        log_run(run, cause)

    def runs(self) -> Mapping[tuple[str, str], int]:
        """(job, outcome) -> number of runs."""
        with self._lock:
            return dict(self._runs)

    def sums(self) -> Mapping[tuple[str, str], int]:
        """(job, "rows" | "bytes" | "windows" | "late_rows") -> sum over all runs."""
        with self._lock:
            return dict(self._sums)

    def succeeded_at(self) -> Mapping[str, datetime]:
        """Job -> end of its last run without any failure."""
        with self._lock:
            return dict(self._succeeded_at)


def log_run(run: Run, cause: BaseException | None) -> None:
    """One line; the traceback only of what the program did not expect, or at DEBUG."""
    report = run.report
    told = f": {run.error}" + (f" ({run.hint})" if run.hint else "") if run.error else ""
    unexpected = cause is not None and not isinstance(cause, AppError)
    with bound(run.run_id, run.job):
        log.log(
            LEVELS.get(run.outcome, logging.ERROR),
            "%s %s%s",
            run.job,
            run.outcome.value,
            told,
            exc_info=cause if unexpected or log.isEnabledFor(logging.DEBUG) else None,
            extra={
                "outcome": run.outcome.value,
                "rows": report.rows,
                "bytes": report.bytes,
                "windows": report.windows,
                "late_rows": report.late_rows,
                "seconds": round((run.ended_at - run.started_at).total_seconds(), 3) if run.ended_at else 0.0,
            },
        )
    if isinstance(cause, AppError) and not run.error:
        log.warning("%s: the end of run %s could not be recorded: %s", run.job, run.run_id, cause)
