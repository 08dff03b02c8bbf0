"""One-off commands that do a job's work in a terminal: run it, fill past windows, verify and heal, undo, all at once.

Invariants: a command takes the same lease as the daemon, so both can be used at once; a signal ends it at the next
safe point; results go to stdout, faults to stderr as one line with the next step.
"""

import logging
import math
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import FrameType
from typing import Any

from app.core.errors import AppError, Rejected
from app.core.ledger import summary_of, to_json
from app.core.runs import Job, Outcome, Report, Run, RunDesk, Stop, execute
from app.core.verify import Sign, Verdict, refuse_unknown, verify
from app.core.window import Window
from app.ops import output
from app.ops.progress import Tally, bar, logged
from app.ops.proof import Healing, found, heal_job, shown, summary, told
from app.ops.scheduler import backfill_job, named
from app.ops.service import Headwater
from app.ops.shapes import failures_shown

OK, FAILED = 0, 1
LEASE_POLL_SECONDS = 0.25
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class How:
    """How a command works and speaks."""

    dry_run: bool = False
    as_json: bool = False


def run(service: Headwater, name: str, how: How) -> int:
    """Run a job until it has nothing left to do; the exit code."""
    return _finish(service, _job(service, name), how)


def backfill(service: Headwater, name: str, span: Window, how: How) -> int:
    """Fill the windows of `span`; the exit code."""
    return _finish(service, backfill_job(_job(service, name), service.pipelines.backfills, span), how)


def replacement(service: Headwater, name: str, span: Window, how: How, *, allow_shrink: bool) -> int:
    """Write the windows of `span` again from the source; the exit code."""
    job, work = _job(service, name), service.pipelines.replacements.get(name)
    if work is None:
        able = ", ".join(service.pipelines.replacements) or "none"
        raise Rejected(f"job {name} cannot replace what it wrote", f"jobs that can: {able}; leave out --replace")
    return _finish(service, named(replace(job, work=lambda context: work(context, span, allow_shrink))), how)


def rewrite(service: Headwater, name: str, span: Window, how: How) -> int:
    """Re-encode the objects of `span` from themselves; the exit code."""
    job, work = _job(service, name), service.pipelines.rewrites.get(name)
    if work is None:
        able = ", ".join(service.pipelines.rewrites) or "none"
        raise Rejected(f"job {name} has no rewrite", f"jobs whose objects can be re-encoded: {able}")
    return _finish(service, named(replace(job, work=lambda context: work(context, span))), how)


def undo(service: Headwater, name: str, run_id: str, how: How) -> int:
    """Take back what run `run_id` of a job did, or in a dry run only say what that would be; the exit code."""
    job = _job(service, name)
    take_back = service.pipelines.undos.get(name)
    if take_back is None:
        able = ", ".join(service.pipelines.undos) or "none"
        raise Rejected(f"job {name} has no undo", f"jobs that keep what it takes: {able}")
    code = _finish(service, named(replace(job, work=lambda context: take_back(context, run_id))), how)
    if how.dry_run and code == OK and not how.as_json:
        output.line("nothing was changed yet: add --yes to do this")
    return code


@dataclass(frozen=True, slots=True)
class Wanted:
    """What to verify. `healing`: mend what differs. `every`: name also the windows that are equal."""

    job: str
    what: Healing
    healing: bool
    every: bool


def verify_both(service: Headwater, wanted: Wanted, how: How) -> int:
    """Compare both ends window by window; 0 when all are equal or were mended, or nothing is there to compare yet."""
    job, verdicts = _job(service, wanted.job), list[Verdict]()
    verification = found(service.pipelines.verifications, wanted.job)

    def seen(verdict: Verdict) -> None:
        verdicts.append(verdict)
        if not how.as_json and (wanted.every or verdict.sign is not Sign.EQUAL):
            output.line(_line(verdict))

    if wanted.healing:
        refuse_unknown(verification(service.stop), wanted.what.span, wanted.what.partition)
        desk = replace(service.desk, ended=_unexpected)
        with _stoppable(service.stop):
            ended = _waited_for(heal_job(job, verification, wanted.what, seen), desk, service.stop, logged(job.name))
        if ended is None:
            return _busy(service, job, as_json=how.as_json)
        if ended.outcome not in (Outcome.OK, Outcome.PARTIAL):
            service.state.close()
            raise Rejected(ended.error, ended.hint)
    else:
        with _stoppable(service.stop):
            for verdict in verify(verification(service.stop), wanted.what.span, service.stop, wanted.what.partition):
                seen(verdict)
    service.state.close()
    return _judged(wanted, verdicts, how)


def _line(verdict: Verdict) -> str:
    rows = " ".join(str(end.rows) if end else "?" for end in (verdict.source, verdict.destination))
    error = f"  {verdict.error} ({verdict.hint})" if verdict.error else ""
    return output.cell(f"{verdict.sign.value} {verdict.slot}  {rows}{'  healed' if verdict.healed else ''}{error}")


def _judged(wanted: Wanted, verdicts: list[Verdict], how: How) -> int:
    counts, span = summary(verdicts), wanted.what.span
    fine = all(each.sign is Sign.EQUAL or each.healed for each in verdicts)
    healed = sum(each.healed for each in verdicts)
    document = {
        "job": wanted.job,
        "from": f"{span.start:%Y-%m-%dT%H:%M:%SZ}",
        "to": f"{span.end:%Y-%m-%dT%H:%M:%SZ}",
        "equal": fine if verdicts else None,
        "counts": counts,
        "healed": healed,
        "windows": [shown(each) for each in verdicts if wanted.every or each.sign is not Sign.EQUAL],
    }
    text = f"{wanted.job}: {len(verdicts)} windows: {told(counts)}{f'; {healed} healed' if healed else ''}"
    if not verdicts:
        text = f"{wanted.job}: nothing was compared: no window of {span} has ended yet, or nothing is known to look at"
    output.show(document, lambda: output.line(text), as_json=how.as_json)
    return OK if fine else FAILED


def _job(service: Headwater, name: str) -> Job:
    jobs = {job.name: job for job in service.pipelines.jobs}
    if name not in jobs:
        raise Rejected(f"no job is named {name!r}", f"jobs: {', '.join(jobs) or 'none'}")
    if jobs[name].off:
        raise Rejected(f"job {name} is off", jobs[name].off)
    return named(jobs[name])


def _finish(service: Headwater, job: Job, how: How) -> int:
    desk = replace(service.desk, ended=_unexpected)
    with _stoppable(service.stop), _shown(job) as tally:
        last, total = _to_the_end(job, desk, service.stop, tally, dry_run=how.dry_run)
    if last is None:
        return _busy(service, job, as_json=how.as_json)
    service.state.close()
    output.show(_document(last, total, how), lambda: _tell(job.name, last, total, how), as_json=how.as_json)
    codes = {Outcome.OK: OK, Outcome.PARTIAL: job.exits.partial}
    return codes.get(last.outcome, job.exits.failed)


def _busy(service: Headwater, job: Job, *, as_json: bool) -> int:
    seconds = math.ceil(service.desk.leases.remaining_seconds(job.name))
    service.state.close()

    def told_busy() -> None:
        until = "when it is done" + (f", or in {seconds} s if it was killed" if seconds else "")
        sys.stderr.write(f"{job.name}: another process runs this job now; try again {until}\n")

    output.show({"job": job.name, "outcome": "busy"}, told_busy, as_json=as_json)
    return job.exits.busy


def _to_the_end(job: Job, desk: RunDesk, stop: Stop, tally: Tally, *, dry_run: bool) -> tuple[Run | None, Report]:
    """Repeat the job while it says that it has more to do; its last run (None: another holds the lease) and the sum."""
    total = Report()
    while True:
        run = _waited_for(job, desk, stop, tally, dry_run=dry_run)
        if run is None:
            return None, total
        total += replace(run.report, more=False)
        if dry_run or not run.report.more or run.outcome is not Outcome.OK:
            return run, total


def _waited_for(job: Job, desk: RunDesk, stop: Stop, tally: Tally, *, dry_run: bool = False) -> Run | None:
    """One run, once no other process holds the lease; None when that took longer than `job.busy_seconds`.

    A lease that a clock gave out that was ahead is watched here until it can be taken over: the next command would only
    begin to watch anew.
    """
    give_up_at, watched = time.monotonic() + job.busy_seconds, False
    while (run := execute(job, desk, stop, tally, dry_run=dry_run)) is None:
        seconds = 0.0 if watched else desk.leases.watch_seconds(job.name, desk.terms.ttl_seconds)
        if seconds:
            watched = True
            give_up_at = max(give_up_at, time.monotonic() + seconds + 2 * LEASE_POLL_SECONDS)
            sys.stderr.write(f"{job.name}: the clock was set back since another process took this job: ")
            sys.stderr.write(f"watching for {seconds:g} s whether that process still runs\n")
        if stop.asked or time.monotonic() >= give_up_at:
            return None
        time.sleep(LEASE_POLL_SECONDS)
    return run


def _document(last: Run, total: Report, how: How) -> dict[str, Any]:
    return {
        "job": last.job,
        "outcome": last.outcome.value,
        "dry_run": how.dry_run,
        "rows": total.rows,
        "bytes": total.bytes,
        "windows": total.windows,
        "late_rows": total.late_rows,
        "corrected_rows": total.corrected_rows,
        "removed_rows": total.removed_rows,
        "ledger": to_json(total.ledger),
        "ledger_text": summary_of(total.ledger),
        "failures": failures_shown(total),
        "notes": list(total.notes),
        "error": last.error,
        "hint": last.hint,
    }


def once(service: Headwater, how: How) -> int:
    """Run every job that is on until it has nothing left to do, then show what moved; 1 when one did not end well."""
    documents = []
    desk = replace(service.desk, ended=_unexpected)
    with _stoppable(service.stop):
        for job in (named(job) for job in service.pipelines.jobs if not job.off):
            with _shown(job) as tally:
                last, total = _to_the_end(job, desk, service.stop, tally, dry_run=False)
            documents.append(_document(last, total, how) if last else {"job": job.name, "outcome": "busy"})
    service.state.close()
    places = dict(_places(service))
    output.show({"jobs": documents, "where": places}, lambda: _tell_all(documents, places), as_json=how.as_json)
    return OK if all(each["outcome"] == "ok" for each in documents) else FAILED


def _tell_all(documents: list[dict[str, Any]], places: dict[str, str]) -> None:
    names = ("job", "outcome", "windows", "rows", "bytes", "error")
    output.table(
        ("job", "outcome", "objects", "rows", "bytes", "error"),
        ([str(each.get(name, "")) for name in names] for each in documents),
    )
    output.table(("where", ""), places.items())


def _places(service: Headwater) -> Iterator[tuple[str, str]]:
    settings = service.settings
    bucket = settings.s3.bucket
    yield "objects", f"s3://{bucket}/{settings.s3.prefix}" if bucket else str(settings.service.data_dir / "objects")
    yield "state", "PostgreSQL" if settings.checkpoint.url.get_secret_value() else str(settings.service.data_dir)


def _tell(name: str, last: Run, total: Report, how: How) -> None:
    for note in total.notes:
        output.line(note)
    would = "would write " if how.dry_run else ""
    counts = f"{total.rows} rows, {total.bytes} bytes, {total.windows} windows, {total.late_rows} late rows"
    corrected = f", {total.corrected_rows} corrected rows" if total.corrected_rows else ""
    if total.removed_rows:
        counts += (
            f", {'would remove ' if how.dry_run else ''}{total.removed_rows} rows{'' if how.dry_run else ' removed'}"
        )
    output.line(f"{name} {last.outcome.value}: {would}{counts}{corrected}")
    if total.ledger:
        output.line(output.cell(summary_of(total.ledger)))
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
def _shown(job: Job) -> Iterator[Tally]:
    if sys.stderr.isatty():
        with bar(job.name, job.unit) as tally:
            yield tally
    else:
        yield logged(job.name)
