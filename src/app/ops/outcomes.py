"""What is told of each run in the log.

Invariant: every run that ended is logged exactly once, at the level that says what a person has to do.
"""

import logging
from collections.abc import Callable

from app.core.errors import AppError
from app.core.ledger import TALLY_NAMES
from app.core.runs import Outcome, Run
from app.ops.log import bound

LEVELS = {Outcome.OK: logging.INFO, Outcome.STOPPED: logging.INFO, Outcome.PARTIAL: logging.WARNING}
Ended = Callable[[Run, BaseException | None], None]
log = logging.getLogger(__name__)


def both(first: Ended, second: Ended) -> Ended:
    """Both are told, in this order."""

    def ended(run: Run, cause: BaseException | None) -> None:
        first(run, cause)
        second(run, cause)

    return ended


def log_run(run: Run, cause: BaseException | None) -> None:
    """One line; the traceback only of what the program did not expect, or at DEBUG."""
    report = run.report
    told = f": {run.error}" + (f" ({run.hint})" if run.hint else "") if run.error else ""
    ledger = report.ledger
    entries = {name: getattr(ledger.total, name) for name in TALLY_NAMES} if ledger else {}
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
                "corrected_rows": report.corrected_rows,
                **entries,
                **({"ledger_closes": ledger.closes} if ledger else {}),
                "seconds": round((run.ended_at - run.started_at).total_seconds(), 3) if run.ended_at else 0.0,
            },
        )
    if isinstance(cause, AppError) and not run.error:
        log.warning("%s: the end of run %s could not be recorded: %s", run.job, run.run_id, cause)
