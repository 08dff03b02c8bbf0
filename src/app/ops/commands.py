"""The commands that work on a built service: run, backfill, verify, undo, check, runs, status, pause, resume."""

import json
import logging
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import FrameType
from typing import Any

from app.config import DOTENV
from app.config.environment import read_dotenv
from app.config.masking import describe
from app.config.rules import warnings
from app.core.errors import AppError, Rejected
from app.core.ledger import summary_of, to_json
from app.core.runs import Job, Outcome, Report, Run, RunDesk, Stop, execute
from app.core.verify import Sign, Verdict, refuse_unknown, verify
from app.core.windows import Window, refuse_future
from app.ops.health import Finding, look
from app.ops.json_views import failures_shown, instant_text, run_shown
from app.ops.scheduler import ProgressTally, backfill_job, bar, logged, named
from app.ops.service import Headwater
from app.ops.verification import Healing, found, heal_job, shown, summary, told

log = logging.getLogger(__name__)

# What commands print: tables for people, or one JSON document for programs.
#
# Invariants: with `--json` stdout holds exactly one document and nothing else; a cell is one line, whatever
# characters data brought. The documents are described in docs/cli-json.md.


def show(document: Mapping[str, Any], told: Callable[[], None], *, as_json: bool) -> None:
    """The document as JSON, or what `told` prints."""
    if as_json:
        sys.stdout.write(json.dumps(document, indent=2, ensure_ascii=False, default=str) + "\n")
    else:
        told()


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Columns as wide as their widest cell."""
    lines = [head, *([cell(each) for each in row] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head) - 1)]
    for line in lines:
        cells = [each.ljust(width) for each, width in zip(line[:-1], widths, strict=True)]
        sys.stdout.write("  ".join([*cells, line[-1]]).rstrip() + "\n")
    sys.stdout.write("\n")


def line(text: str) -> None:
    """One line."""
    sys.stdout.write(f"{text}\n")


def cell(value: object) -> str:
    """A value on one line."""
    return "".join(c if c.isprintable() else " " for c in str(value))


# Commands that look or say a word: check, runs, status, pause, resume.
#
# Invariant: they work while the daemon runs and while it does not, since everything that they need is in the state.

OK, FAILED = 0, 1


def check(service: Headwater, *, as_json: bool) -> int:
    """Three layers: the values as they were understood, what they switch on, and every system tried with its rights.

    The exit code is 1 when an attempt fails.
    """
    values = describe(service.settings)
    jobs = [{"name": job.name, "on": not job.off, "why": job.off} for job in service.pipelines.jobs]
    said = warnings(service.settings, os.environ, read_dotenv(DOTENV)[0])
    env_file = str(DOTENV.absolute()) if DOTENV.exists() else None
    findings = {name: look(attempt) for name, attempt in {**service.checks, **service.rights}.items()}
    service.state.close()
    ok = all(finding.ok for finding in findings.values())

    def told() -> None:
        line(f"1 values: as they were understood, from the environment and {env_file or 'no .env file'}")
        table(("setting", "value"), values.items())
        line("2 wiring: what they switch on")
        every = {job.name: f"every {job.interval_seconds} s" for job in service.pipelines.jobs}
        table(("job", "state"), ((each["name"], each["why"] or every[str(each["name"])]) for each in jobs))  # type: ignore[misc]
        for warning in said:
            line(f"warning: {warning}")
        line("3 live: each system tried with these credentials")
        rows = [(name, "ok" if f.ok else "FAILED", _said(f)) for name, f in findings.items()]
        table(("system", "state", "what it said"), rows)

    live = [
        {"system": name, "ok": each.ok, "note": each.note, "error": each.error, "hint": each.hint}
        for name, each in findings.items()
    ]
    wiring = {"jobs": jobs, "warnings": said}
    document = {"ok": ok, "env_file": env_file, "values": values, "wiring": wiring, "live": live}
    show(document, told, as_json=as_json)
    return OK if ok else FAILED


def _said(found: Finding) -> str:
    return found.note or " - ".join(filter(None, (found.error, found.hint)))


def runs(service: Headwater, job: str | None, limit: int, *, as_json: bool) -> int:
    """Recent runs, newest first, and what they took in."""
    found = service.state.runs.recent(job, limit)
    wanted = {name: history for name, history in service.pipelines.histories.items() if job in (None, name)}
    histories = {name: list(history(limit)) for name, history in wanted.items()}
    service.state.close()

    def told() -> None:
        rows = [
            (_instant(run), run.run_id[:8], run.job, run.outcome.value, str(run.report.rows), _told_of(run))
            for run in found
        ]
        table(("started", "run", "job", "outcome", "rows", "ledger; error"), rows)
        for name, lines in histories.items():
            line(f"what {name} took in, newest first")
            head = tuple(lines[0]) if lines else ("nothing yet",)
            table(head, [[cell(value) for value in each.values()] for each in lines])

    document = {"runs": [run_shown(run) for run in found], "histories": histories}
    show(document, told, as_json=as_json)
    return OK


def _instant(run: Run) -> str:
    return f"{run.started_at:%Y-%m-%d %H:%M:%S}Z"


def _told_of(run: Run) -> str:
    error = f"{run.error} ({run.hint})" if run.hint else run.error
    return "; ".join(filter(None, (summary_of(run.report.ledger), error)))


def status(service: Headwater, *, as_json: bool) -> int:
    """Every job as the state knows it; 1 when the last result of one that is on is a failure."""
    paused = service.state.pauses.paused()
    lines: list[Mapping[str, Any]] = []
    for job in service.pipelines.jobs:
        last = service.state.runs.last_ended(job.name)
        going = next((run for run in service.state.runs.recent(job.name, 1) if run.outcome is Outcome.RUNNING), None)
        state = "off" if job.off else "paused" if job.name in paused else "running" if going else "waiting"
        partitions = service.state.checkpoints.of(job.name)
        lines.append(
            {
                "name": job.name,
                "state": state,
                "off": job.off,
                "interval_seconds": job.interval_seconds,
                "paused_at": instant_text(paused.get(job.name)),
                "last_run": last and run_shown(last),
                "partitions": len(partitions),
                "partitions_with_errors": sum(1 for each in partitions if each.error),
            }
        )
    service.state.close()
    show({"jobs": lines}, lambda: _told(lines), as_json=as_json)
    bad = [each for each in lines if each["state"] != "off" and (each["last_run"] or {}).get("outcome") == "failed"]
    return FAILED if bad else OK


def _told(lines: Sequence[Mapping[str, Any]]) -> None:
    rows = []
    for each in lines:
        last = each["last_run"] or {"started_at": "never", "outcome": "", "rows": 0, "error": "", "hint": ""}
        error = f"{last['error']} ({last['hint']})" if last["hint"] else last["error"]
        rows.append(
            (each["name"], each["state"], last["started_at"], last["outcome"], str(last["rows"]), each["off"] or error)
        )
    table(("job", "state", "last run", "outcome", "rows", "error"), rows)


def pause(service: Headwater, name: str, *, as_json: bool) -> int:
    """Let the timer of a job pass, in every process, until it is resumed."""
    service.state.pauses.pause(
        _known(service, name), service.desk.clock(), f"command line: {os.environ.get('USER', '')}"
    )
    return _spoken(service, name, paused=True, as_json=as_json)


def resume(service: Headwater, name: str, *, as_json: bool) -> int:
    """Follow the timer of a job again."""
    service.state.pauses.resume(_known(service, name))
    return _spoken(service, name, paused=False, as_json=as_json)


def _known(service: Headwater, name: str) -> str:
    names = [job.name for job in service.pipelines.jobs]
    if name not in names:
        raise Rejected(f"no job is named {name!r}", f"jobs: {', '.join(names) or 'none'}")
    return name


def _spoken(service: Headwater, name: str, *, paused: bool, as_json: bool) -> int:
    service.state.close()
    word = "is paused: its timer passes until it is resumed" if paused else "follows its timer again"
    show({"job": name, "paused": paused}, lambda: line(f"{name} {word}"), as_json=as_json)
    return OK


# One-off commands that do a job's work in a terminal: run it, fill past windows, verify and heal, undo, all at
# once.
#
# Invariants: a command takes the same lease as the daemon, so both can be used at once; a signal ends it at the
# next safe point; results go to stdout, faults to stderr as one line with the next step.

LEASE_POLL_SECONDS = 0.25


@dataclass(frozen=True, slots=True)
class How:
    """How a command works and speaks."""

    dry_run: bool = False
    as_json: bool = False


def run(service: Headwater, name: str, how: How) -> int:
    """Run a job until it has nothing left to do; the exit code."""
    return _finish(service, _job(service, name), how)


def backfill(service: Headwater, name: str, span: Window, how: How) -> int:
    """Fill the windows of `span`; the exit code. Raises Rejected for one in the future."""
    refuse_future(span, service.desk.clock())
    return _finish(service, backfill_job(_job(service, name), service.pipelines.backfills, span), how)


def replacement(service: Headwater, name: str, span: Window, how: How, *, allow_shrink: bool) -> int:
    """Write the windows of `span` again from the source; the exit code. Raises Rejected for one in the future."""
    refuse_future(span, service.desk.clock())
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
        line("nothing was changed yet: add --yes to do this")
    return code


@dataclass(frozen=True, slots=True)
class VerifyRequest:
    """What to verify. `healing`: mend what differs. `every`: name also the windows that are equal."""

    job: str
    what: Healing
    healing: bool
    every: bool


def verify_both(service: Headwater, wanted: VerifyRequest, how: How) -> int:
    """Compare both ends window by window; 0 when all are equal or were mended, or nothing is there to compare yet."""
    job, verdicts = _job(service, wanted.job), list[Verdict]()
    verification = found(service.pipelines.verifications, wanted.job)

    def seen(verdict: Verdict) -> None:
        verdicts.append(verdict)
        if not how.as_json and (wanted.every or verdict.sign is not Sign.EQUAL):
            line(_line(verdict))

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
    return cell(f"{verdict.sign.value} {verdict.slot}  {rows}{'  healed' if verdict.healed else ''}{error}")


def _judged(wanted: VerifyRequest, verdicts: list[Verdict], how: How) -> int:
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
    show(document, lambda: line(text), as_json=how.as_json)
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
    show(_document(last, total, how), lambda: _tell(job.name, last, total, how), as_json=how.as_json)
    codes = {Outcome.OK: OK, Outcome.PARTIAL: job.exits.partial}
    return codes.get(last.outcome, job.exits.failed)


def _busy(service: Headwater, job: Job, *, as_json: bool) -> int:
    seconds = math.ceil(service.desk.leases.remaining_seconds(job.name))
    service.state.close()

    def told_busy() -> None:
        until = "when it is done" + (f", or in {seconds} s if it was killed" if seconds else "")
        sys.stderr.write(f"{job.name}: another process runs this job now; try again {until}\n")

    show({"job": job.name, "outcome": "busy"}, told_busy, as_json=as_json)
    return job.exits.busy


def _to_the_end(
    job: Job, desk: RunDesk, stop: Stop, tally: ProgressTally, *, dry_run: bool
) -> tuple[Run | None, Report]:
    """Repeat the job while it says that it has more to do; its last run (None: another holds the lease) and the sum."""
    total = Report()
    while True:
        run = _waited_for(job, desk, stop, tally, dry_run=dry_run)
        if run is None:
            return None, total
        total += replace(run.report, more=False)
        if dry_run or not run.report.more or run.outcome is not Outcome.OK:
            return run, total


def _waited_for(job: Job, desk: RunDesk, stop: Stop, tally: ProgressTally, *, dry_run: bool = False) -> Run | None:
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
    show({"jobs": documents, "where": places}, lambda: _tell_all(documents, places), as_json=how.as_json)
    return OK if all(each["outcome"] == "ok" for each in documents) else FAILED


def _tell_all(documents: list[dict[str, Any]], places: dict[str, str]) -> None:
    names = ("job", "outcome", "windows", "rows", "bytes", "error")
    table(
        ("job", "outcome", "objects", "rows", "bytes", "error"),
        ([str(each.get(name, "")) for name in names] for each in documents),
    )
    table(("where", ""), places.items())


def _places(service: Headwater) -> Iterator[tuple[str, str]]:
    settings = service.settings
    bucket = settings.s3.bucket
    yield "objects", f"s3://{bucket}/{settings.s3.prefix}" if bucket else str(settings.service.data_dir / "objects")
    yield "state", "PostgreSQL" if settings.checkpoint.url.get_secret_value() else str(settings.service.data_dir)


def _tell(name: str, last: Run, total: Report, how: How) -> None:
    for note in total.notes:
        line(note)
    would = "would write " if how.dry_run else ""
    counts = f"{total.rows} rows, {total.bytes} bytes, {total.windows} windows, {total.late_rows} late rows"
    corrected = f", {total.corrected_rows} corrected rows" if total.corrected_rows else ""
    if total.removed_rows:
        counts += (
            f", {'would remove ' if how.dry_run else ''}{total.removed_rows} rows{'' if how.dry_run else ' removed'}"
        )
    line(f"{name} {last.outcome.value}: {would}{counts}{corrected}")
    if total.ledger:
        line(cell(summary_of(total.ledger)))
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
def _shown(job: Job) -> Iterator[ProgressTally]:
    if sys.stderr.isatty():
        with bar(job.name, job.unit) as tally:
            yield tally
    else:
        yield logged(job.name)
