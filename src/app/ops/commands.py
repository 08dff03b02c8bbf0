"""One-off commands in a terminal: run a job, fill past windows, check the systems, list runs.

Invariants: a command takes the same lease as the daemon, so both can be used at once; a signal ends it at the next
safe point; results go to stdout, faults to stderr as one line with the next step.
"""

import logging
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import FrameType

from app.core.errors import AppError, Rejected
from app.core.runs import Job, Outcome, Report, Run, RunDesk, Stop, execute
from app.core.window import Window
from app.ops.progress import Tally, bar, logged
from app.ops.readiness import look
from app.ops.scheduler import backfill_job, named
from app.ops.service import Headwater
from app.settings.masking import describe

OK, FAILED = 0, 1
log = logging.getLogger(__name__)


def run(service: Headwater, name: str, *, dry_run: bool) -> int:
    """Run a job until it has nothing left to do; the exit code."""
    return _finish(service, _job(service, name), dry_run=dry_run)


def backfill(service: Headwater, name: str, span: Window, *, dry_run: bool) -> int:
    """Fill the windows of `span`; the exit code."""
    return _finish(service, backfill_job(_job(service, name), service.pipelines.backfills, span), dry_run=dry_run)


def undo(service: Headwater, name: str, run_id: str, *, do: bool) -> int:
    """Take back what run `run_id` of a job did, or only say what that would be; the exit code."""
    job = _job(service, name)
    take_back = service.pipelines.undos.get(name)
    if take_back is None:
        able = ", ".join(service.pipelines.undos) or "none"
        raise Rejected(f"job {name} has no undo", f"jobs that keep what it takes: {able}")
    code = _finish(service, named(replace(job, work=lambda context: take_back(context, run_id))), dry_run=not do)
    if not do and code == OK:
        sys.stdout.write("nothing was changed yet: add --yes to do this\n")
    return code


def _job(service: Headwater, name: str) -> Job:
    jobs = {job.name: job for job in service.pipelines.jobs}
    if name not in jobs:
        raise Rejected(f"no job is named {name!r}", f"jobs: {', '.join(jobs) or 'none'}")
    if jobs[name].off:
        raise Rejected(f"job {name} is off", jobs[name].off)
    return named(jobs[name])


def _finish(service: Headwater, job: Job, *, dry_run: bool) -> int:
    desk = replace(service.desk, ended=_unexpected)
    with _stoppable(service.stop), _shown(job.name) as tally:
        last, total = _to_the_end(job, desk, service.stop, tally, dry_run=dry_run)
    service.state.close()
    if last is None:
        sys.stderr.write(f"{job.name}: another process runs this job now; try again when it is done\n")
        return job.exits.busy
    _tell(job.name, last, total, dry_run=dry_run)
    codes = {Outcome.OK: OK, Outcome.PARTIAL: job.exits.partial}
    return codes.get(last.outcome, job.exits.failed)


def _to_the_end(job: Job, desk: RunDesk, stop: Stop, tally: Tally, *, dry_run: bool) -> tuple[Run | None, Report]:
    """Repeat the job while it says that it has more to do; its last run (None: another holds the lease) and the sum."""
    total = Report()
    while True:
        run = execute(job, desk, stop, tally, dry_run=dry_run)
        if run is None:
            return None, total
        total += replace(run.report, more=False)
        if dry_run or not run.report.more or run.outcome is not Outcome.OK:
            return run, total


def once(service: Headwater) -> int:
    """Run every job that is on until it has nothing left to do, then show what moved; 1 when one did not end well."""
    lines = []
    fine = True
    desk = replace(service.desk, ended=_unexpected)
    with _stoppable(service.stop):
        for job in (named(job) for job in service.pipelines.jobs if not job.off):
            with _shown(job.name) as tally:
                run, total = _to_the_end(job, desk, service.stop, tally, dry_run=False)
            outcome = run.outcome if run else None
            fine = fine and outcome is Outcome.OK
            moved = (str(total.windows), str(total.rows), str(total.bytes))
            lines.append((job.name, outcome.value if outcome else "busy", *moved, run.error if run else ""))
    service.state.close()
    _table(("job", "outcome", "objects", "rows", "bytes", "error"), lines)
    _table(("where", ""), [(name, where) for name, where in _places(service)])
    return OK if fine else FAILED


def _places(service: Headwater) -> Iterator[tuple[str, str]]:
    settings = service.settings
    bucket = settings.s3.bucket
    yield "objects", f"s3://{bucket}/{settings.s3.prefix}" if bucket else str(settings.service.data_dir / "objects")
    yield "state", "PostgreSQL" if settings.checkpoint.url.get_secret_value() else str(settings.service.data_dir)


def _tell(name: str, last: Run, total: Report, *, dry_run: bool) -> None:
    for note in total.notes:
        sys.stdout.write(f"{note}\n")
    would = "would write " if dry_run else ""
    counts = f"{total.rows} rows, {total.bytes} bytes, {total.windows} windows, {total.late_rows} late rows"
    sys.stdout.write(f"{name} {last.outcome.value}: {would}{counts}\n")
    if last.error:
        sys.stderr.write(f"{name}: {last.error}{f' ({last.hint})' if last.hint else ''}\n")


def _unexpected(run: Run, cause: BaseException | None) -> None:
    """The outcome is told at the end; only what the program did not expect needs its traceback."""
    if cause is not None and not isinstance(cause, AppError):
        log.error("%s failed", run.job, exc_info=cause)


@contextmanager
def _stoppable(stop: Stop) -> Iterator[None]:
    """Signals ask for a stop; a second one ends the process at once."""

    def ask(number: int, _: FrameType | None) -> None:
        stop.ask("the command was interrupted")
        signal.signal(number, signal.SIG_DFL)

    held = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in held.items():
            signal.signal(number, handler)


@contextmanager
def _shown(name: str) -> Iterator[Tally]:
    if sys.stderr.isatty():
        with bar(name) as tally:
            yield tally
    else:
        yield logged(name)


def check(service: Headwater) -> int:
    """Print the settings, the jobs and one attempt per system; 1 when an attempt fails."""
    described = describe(service.settings)
    _table(("setting", "value"), described.items())
    _table(
        ("job", "state"), ((job.name, job.off or f"every {job.interval_seconds} s") for job in service.pipelines.jobs)
    )
    findings = {name: look(attempt) for name, attempt in service.checks.items()}
    rows = [
        (name, "ok" if found.ok else "FAILED", found.note or " - ".join(filter(None, (found.error, found.hint))))
        for name, found in findings.items()
    ]
    _table(("system", "state", "what it said"), rows)
    service.state.close()
    return OK if all(found.ok for found in findings.values()) else FAILED


def runs(service: Headwater, job: str | None, limit: int) -> int:
    """Print recent runs."""
    found = service.state.runs.recent(job, limit)
    rows = [
        (f"{run.started_at:%Y-%m-%d %H:%M:%S}Z", run.job, run.outcome.value, str(run.report.rows), run.error)
        for run in found
    ]
    _table(("started", "job", "outcome", "rows", "error"), rows)
    for name, history in service.pipelines.histories.items():
        if job in (None, name):
            lines = history(limit)
            sys.stdout.write(f"what {name} took in, newest first\n")
            _table(
                tuple(lines[0]) if lines else ("nothing yet",), [[_cell(v) for v in line.values()] for line in lines]
            )
    service.state.close()
    return OK


def _cell(value: object) -> str:
    """A value on one line, whatever characters data brought."""
    return "".join(c if c.isprintable() else " " for c in str(value))


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    lines = [head, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head) - 1)]
    for line in lines:
        cells = [cell.ljust(width) for cell, width in zip(line[:-1], widths, strict=True)]
        sys.stdout.write("  ".join([*cells, line[-1]]).rstrip() + "\n")
    sys.stdout.write("\n")
