"""The commands that work on a built service: run, backfill, rewrite, verify, undo, check, runs, status, pause, resume.

Invariants: results go to stdout, faults to stderr as one line with the next step; with `--json` stdout holds one
document, described in docs/cli-json.md; a command takes the same lease as the daemon, so both can be used at once; a
signal ends it at the next safe point.
"""

import json
import logging
import math
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import Any

from app.config import DOTENV
from app.config.environment import describe, read_dotenv
from app.config.rules import VARIABLES, unknown_names, warnings
from app.core.errors import AppError, Rejected, did_you_mean
from app.core.ledger import summary_of, to_json
from app.core.runs import Job, Outcome, Report, Run, RunServices, Stop, execute
from app.core.verify import ComparedWindow, Verdict, refuse_unknown
from app.core.verify import verify as compared
from app.core.windows import Window, instant_text, refuse_future, whole_second
from app.ops.connection_checks import check_once
from app.ops.json_views import RUN_NUMBERS, failures_shown, run_shown
from app.ops.scheduler import (
    ProgressTally,
    backfill_job,
    logging_progress,
    progress_bar,
    require_ability,
)
from app.ops.service import BuiltService
from app.ops.verification import NO_VERIFICATION, format_signs, heal_job, window_json

OK, FAILED = 0, 1
LEASE_POLL_SECONDS = 0.25
log = logging.getLogger(__name__)

# Output of commands: tables for people, or one JSON document for programs.


def show(document: Mapping[str, Any], print_text: Callable[[], None], *, as_json: bool) -> None:
    """The document as JSON, or what `print_text` prints."""
    if as_json:
        sys.stdout.write(json.dumps(document, indent=2, ensure_ascii=False, default=str) + "\n")
    else:
        print_text()


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print columns as wide as their widest cell; each cell is on one line, whatever characters the data contain."""
    lines = [head, *([cell(each) for each in row] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head) - 1)]
    for line in lines:
        cells = [each.ljust(width) for each, width in zip(line[:-1], widths, strict=True)]
        sys.stdout.write("  ".join([*cells, line[-1]]).rstrip() + "\n")
    sys.stdout.write("\n")


def line(text: str) -> None:
    """Print one line."""
    sys.stdout.write(f"{text}\n")


def cell(value: object) -> str:
    """A value on one line."""
    return "".join(c if c.isprintable() else " " for c in str(value))


# Read-only and control commands: they use the state, so they work whether the daemon runs or not.


def check(service: BuiltService, *, settings: bool, as_json: bool) -> int:
    """What the settings switch on and where rows will go, then every system tried with its rights; with `settings` the
    values as they were understood. The exit code is 1 when an attempt fails.
    """
    values, (in_file, _) = describe(service.settings), read_dotenv(DOTENV)
    env_file = str(DOTENV.absolute()) if DOTENV.exists() else None
    where = service.pipelines.destinations
    jobs = [
        {"name": job.name, "on": not job.off, "why": job.off, "to": where.get(job.name, "")}
        for job in service.pipelines.jobs
    ]
    said, unread = warnings(service.settings, os.environ, in_file), unknown_names(in_file)
    live: list[dict[str, Any]] = [
        {"system": each.key, "title": each.title, "variable": each.variable, **asdict(check_once(each.check))}
        for each in service.systems
    ]
    ok = all(each["ok"] for each in live)

    def print_text() -> None:
        line(f"settings: the environment and {env_file or f'no .env file in {Path.cwd()}'}")
        if settings:
            known = [(each.names[0], values[each.goes_to]) for each in VARIABLES if each.goes_to in values]
            table(("variable", "value"), known)
        for warning in said:
            line(f"warning: {warning}")
        if unread:
            line(f"note: .env has names that Headwater does not read: {', '.join(unread)}")
        states = (
            (job.name, "off" if job.off else f"every {job.interval_seconds} s", job.off or where.get(job.name, ""))
            for job in service.pipelines.jobs
        )
        table(("job", "state", "delivers to, or how to switch it on"), states)
        rows = []
        for each in live:
            message = each["note"] or " - ".join(filter(None, (each["error"], each["hint"])))
            rows.append((each["title"], each["variable"], "ok" if each["ok"] else "FAILED", message))
        table(("system", "variable", "state", "what it said"), rows)

    wiring = {"jobs": jobs, "warnings": said, "unread": unread}
    document = {"ok": ok, "env_file": env_file, "values": values, "wiring": wiring, "live": live}
    show(document, print_text, as_json=as_json)
    return OK if ok else FAILED


def runs(service: BuiltService, *, job: str | None, limit: int, as_json: bool) -> int:
    """Recent runs, newest first, and what they took in."""
    if job is not None:
        _job(service, job, on=False)
    found = service.state.runs.recent(job, limit)
    wanted = {name: history for name, history in service.pipelines.histories.items() if job in (None, name)}
    histories = {name: list(history(limit)) for name, history in wanted.items()}

    def print_text() -> None:
        rows = []
        for run in found:
            error = f"{run.error} ({run.hint})" if run.hint else run.error
            said = "; ".join(filter(None, (summary_of(run.report.ledger), error)))
            began = f"{run.started_at:%Y-%m-%d %H:%M:%SZ}"
            rows.append((began, run.run_id[:8], run.job, run.outcome.value, str(run.report.rows), said))
        table(("started", "run", "job", "outcome", "rows", "ledger; error"), rows)
        for name, lines in histories.items():
            line(f"what {name} ingested, newest first")
            head = tuple(lines[0]) if lines else ("nothing yet",)
            table(head, [[cell(value) for value in each.values()] for each in lines])

    document = {"runs": [run_shown(run) for run in found], "histories": histories}
    show(document, print_text, as_json=as_json)
    return OK


def status(service: BuiltService, *, as_json: bool) -> int:
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

    def print_text() -> None:
        rows = []
        for each in lines:
            last = each["last_run"] or {"started_at": "never", "outcome": "", "rows": 0, "error": "", "hint": ""}
            error = f"{last['error']} ({last['hint']})" if last["hint"] else last["error"]
            began, why = last["started_at"], each["off"] or error
            rows.append((each["name"], each["state"], began, last["outcome"], str(last["rows"]), why))
        table(("job", "state", "last run", "outcome", "rows", "error"), rows)

    show({"jobs": lines}, print_text, as_json=as_json)
    bad = [each for each in lines if each["state"] != "off" and (each["last_run"] or {}).get("outcome") == "failed"]
    return FAILED if bad else OK


def pause(service: BuiltService, *, job: str, as_json: bool) -> int:
    """Suspend scheduled runs of a job, in every process, until it is resumed."""
    _job(service, job, on=False)
    service.state.pauses.pause(job, service.services.clock(), f"command line: {os.environ.get('USER', '')}")
    show({"job": job, "paused": True}, lambda: line(f"{job} is paused until it is resumed"), as_json=as_json)
    return OK


def resume(service: BuiltService, *, job: str, as_json: bool) -> int:
    """Run a job on its schedule again."""
    _job(service, job, on=False)
    service.state.pauses.resume(job)
    show({"job": job, "paused": False}, lambda: line(f"{job} runs on its schedule again"), as_json=as_json)
    return OK


# Commands that do a job's work in a terminal: run it, fill past windows, verify and heal, undo, or run all jobs.


def run(service: BuiltService, *, job: str, dry_run: bool, as_json: bool) -> int:
    """Run a job until it has nothing left to do; the exit code."""
    return _finish(service, _job(service, job), dry_run=dry_run, as_json=as_json)


def backfill(
    service: BuiltService,
    *,
    job: str,
    start: datetime,
    end: datetime,
    replacing: bool,
    allow_shrink: bool,
    dry_run: bool,
    as_json: bool,
) -> int:
    """Fill the windows of a span, or write them again from the source; the exit code."""
    span, ours, pipelines = Window(start, end), _job(service, job), service.pipelines
    refuse_future(span, service.services.clock())
    if replacing:
        refusal = "cannot replace what it wrote", "jobs that can: {}; leave out --replace"
        work = require_ability(pipelines.replacements, job, *refusal)
        ours = replace(ours, work=lambda context: work(context, span, allow_shrink))
    else:
        ours = backfill_job(ours, pipelines.backfills, span)
    return _finish(service, ours, dry_run=dry_run, as_json=as_json)


def rewrite(service: BuiltService, *, job: str, start: datetime, end: datetime, dry_run: bool, as_json: bool) -> int:
    """Re-encode the objects of a span from themselves; the exit code."""
    span, ours = Window(start, end), _job(service, job)
    refusal = "has no rewrite", "jobs whose objects can be re-encoded: {}"
    work = require_ability(service.pipelines.rewrites, job, *refusal)
    ours = replace(ours, work=lambda context: work(context, span))
    return _finish(service, ours, dry_run=dry_run, as_json=as_json)


def undo(service: BuiltService, *, job: str, run: str, yes: bool, as_json: bool) -> int:
    """Take back what run `run` of a job did, or without `yes` only say what that would be; the exit code."""
    ours = _job(service, job)
    take_back = require_ability(service.pipelines.undos, job, "has no undo", "jobs that keep what it takes: {}")
    ours = replace(ours, work=lambda context: take_back(context, run))
    code = _finish(service, ours, dry_run=not yes, as_json=as_json)
    if not yes and code == OK and not as_json:
        line("nothing was changed yet: add --yes to do this")
    return code


def verify(
    service: BuiltService,
    *,
    job: str,
    start: datetime,
    end: datetime,
    partition: str | None,
    heal: bool,
    every: bool,
    as_json: bool,
) -> int:
    """Compare both ends window by window; 0 when all are equal or were mended, or nothing is there to compare yet."""
    ours, span = _job(service, job), Window(start, end)
    verification = require_ability(service.pipelines.verifications, job, *NO_VERIFICATION)
    counts, healed, windows = Counter[str](), 0, list[Mapping[str, Any]]()

    def seen(verdict: ComparedWindow) -> None:
        nonlocal healed
        counts[verdict.sign.value] += 1
        healed += verdict.healed
        if not every and verdict.sign is Verdict.EQUAL:
            return
        if as_json:
            windows.append(window_json(verdict))
        else:
            rows = " ".join(str(each.rows) if each else "?" for each in (verdict.source, verdict.destination))
            error = f"  {verdict.error} ({verdict.hint})" if verdict.error else ""
            line(cell(f"{verdict.sign.value} {verdict.slot}  {rows}{'  healed' if verdict.healed else ''}{error}"))

    with _foreground(service) as services:
        if heal:
            refuse_unknown(verification(service.stop), span, partition)
            healing = heal_job(ours, verification, span, partition, seen)
            ended = _waited_for(healing, services, service.stop, logging_progress(job))
            if ended is None:
                return _busy(service, ours, as_json=as_json)
            if ended.outcome not in (Outcome.OK, Outcome.PARTIAL):
                raise Rejected(ended.error, ended.hint)
        else:
            for verdict in compared(verification(service.stop), span, service.stop, partition):
                seen(verdict)

    number = counts.total()
    fine = counts[Verdict.EQUAL.value] + healed == number  # the sign of a healed window is that from before
    document = {
        "job": job,
        "from": whole_second(span.start),
        "to": whole_second(span.end),
        "equal": fine if number else None,
        "counts": counts,
        "healed": healed,
        "windows": windows,
    }
    text = f"{job}: {number} windows: {format_signs(counts)}{f'; {healed} healed' if healed else ''}"
    if not number:
        text = f"{job}: nothing was compared: no window of {span} has ended yet, or no partition is known"
    show(document, lambda: line(text), as_json=as_json)
    return OK if fine else FAILED


def once(service: BuiltService, *, as_json: bool) -> int:
    """Run every job that is on until it has nothing left to do, then show what moved; 1 when one did not end well."""
    documents = []
    with _foreground(service) as services:
        for job in (each for each in service.pipelines.jobs if not each.off):
            with _shown(job) as tally:
                last, total = _to_the_end(job, services, service.stop, tally, dry_run=False)
            documents.append(_document(last, total, dry_run=False) if last else {"job": job.name, "outcome": "busy"})
    settings = service.settings
    s3, data_dir = settings.s3, settings.service.data_dir
    places = {
        "objects": f"s3://{s3.bucket}/{s3.prefix}" if s3.bucket else str(data_dir / "objects"),
        "state": "PostgreSQL" if settings.checkpoint.url.get_secret_value() else str(data_dir),
    }

    def told_all() -> None:
        names = ("job", "outcome", "windows", "rows", "bytes", "error")
        rows = ([str(each.get(name, "")) for name in names] for each in documents)
        table(("job", "outcome", "objects", "rows", "bytes", "error"), rows)
        table(("where", ""), places.items())

    show({"jobs": documents, "where": places}, told_all, as_json=as_json)
    return OK if all(each["outcome"] == "ok" for each in documents) else FAILED


def _job(service: BuiltService, name: str, *, on: bool = True) -> Job:
    """The job of this name. Raises Rejected when there is none, or when it has to be `on` and is off."""
    jobs = {job.name: job for job in service.pipelines.jobs}
    if name not in jobs:
        raise Rejected(f"no job is named {name!r}", f"{did_you_mean(name, jobs)}jobs: {', '.join(jobs) or 'none'}")
    if on and jobs[name].off:
        raise Rejected(f"job {name} is off", jobs[name].off)
    return jobs[name]


def _finish(service: BuiltService, job: Job, *, dry_run: bool, as_json: bool) -> int:
    with _foreground(service) as services, _shown(job) as tally:
        last, total = _to_the_end(job, services, service.stop, tally, dry_run=dry_run)
    if last is None:
        return _busy(service, job, as_json=as_json)
    document = _document(last, total, dry_run=dry_run)
    show(document, lambda: _tell(last, total, dry_run=dry_run), as_json=as_json)
    return {Outcome.OK: OK, Outcome.PARTIAL: job.exits.partial}.get(last.outcome, job.exits.failed)


def _busy(service: BuiltService, job: Job, *, as_json: bool) -> int:
    seconds = math.ceil(service.services.leases.remaining_seconds(job.name))

    def told_busy() -> None:
        until = "when it is done" + (f", or in {seconds} s if it was killed" if seconds else "")
        sys.stderr.write(f"{job.name}: another process runs this job now; try again {until}\n")

    show({"job": job.name, "outcome": "busy"}, told_busy, as_json=as_json)
    return job.exits.busy


def _to_the_end(
    job: Job, services: RunServices, stop: Stop, tally: ProgressTally, *, dry_run: bool
) -> tuple[Run | None, Report]:
    """Repeat the job while it has more to do; its last run (None: another process holds the lease) and the sum."""
    total = Report()
    while True:
        run = _waited_for(job, services, stop, tally, dry_run=dry_run)
        if run is None:
            return None, total
        if dry_run or not run.report.more or run.outcome is not Outcome.OK:
            return run, total + replace(run.report, more=False)
        total += replace(run.report, more=False, ledger=run.report.ledger.settled())


def _waited_for(
    job: Job, services: RunServices, stop: Stop, tally: ProgressTally, *, dry_run: bool = False
) -> Run | None:
    """One run, once no other process holds the lease; None when that takes longer than `job.busy_seconds`.

    A lease with a timestamp in the future is watched until it can be taken over; a second command would only start
    watching again.
    """
    give_up_at, watched = time.monotonic() + job.busy_seconds, False
    while (run := execute(job, services, stop, tally, started_by="command line", dry_run=dry_run)) is None:
        seconds = 0.0 if watched else services.leases.watch_seconds(job.name, services.terms.ttl_seconds)
        if seconds:
            watched = True
            give_up_at = max(give_up_at, time.monotonic() + seconds + 2 * LEASE_POLL_SECONDS)
            sys.stderr.write(f"{job.name}: the clock was set back since another process took this job: ")
            sys.stderr.write(f"watching for {seconds:g} s whether that process still runs\n")
        if stop.asked or time.monotonic() >= give_up_at:
            return None
        time.sleep(LEASE_POLL_SECONDS)
    return run


def _document(last: Run, total: Report, *, dry_run: bool) -> dict[str, Any]:
    return {
        "job": last.job,
        "outcome": last.outcome.value,
        "dry_run": dry_run,
        **{name: getattr(total, name) for name in RUN_NUMBERS if name != "new_rows"},
        "removed_rows": total.removed_rows,
        "ledger": to_json(total.ledger),
        "ledger_text": summary_of(total.ledger),
        "failures": failures_shown(total),
        "notes": list(total.notes),
        "error": last.error,
        "hint": last.hint,
    }


def _tell(last: Run, total: Report, *, dry_run: bool) -> None:
    for note in total.notes:
        line(note)
    would = "would write " if dry_run else ""
    counts = f"{total.rows} rows, {total.bytes} bytes, {total.windows} windows, {total.late_rows} late rows"
    corrected = f", {total.corrected_rows} corrected rows" if total.corrected_rows else ""
    if total.removed_rows:
        counts += f", {'would remove ' if dry_run else ''}{total.removed_rows} rows{'' if dry_run else ' removed'}"
    line(f"{last.job} {last.outcome.value}: {would}{counts}{corrected}")
    if total.ledger:
        line(cell(summary_of(total.ledger)))
    if last.error:
        sys.stderr.write(f"{last.job}: {last.error}{f' ({last.hint})' if last.hint else ''}\n")


@contextmanager
def _foreground(service: BuiltService) -> Iterator[RunServices]:
    """What runs need in a terminal. The first signal asks for a stop; the second ends the process at once."""

    def ask(number: int, _: FrameType | None) -> None:
        service.stop.ask("the command was interrupted")
        signal.signal(number, signal.SIG_DFL)

    def ended(run: Run, cause: BaseException | None) -> None:  # the outcome is printed at the end
        if cause is not None and not isinstance(cause, AppError):
            log.error("%s failed", run.job, exc_info=cause)

    held = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield replace(service.services, ended=ended)
    finally:
        for number, handler in held.items():
            signal.signal(number, handler)


@contextmanager
def _shown(job: Job) -> Iterator[ProgressTally]:
    if sys.stderr.isatty():
        with progress_bar(job.name, job.unit) as tally:
            yield tally
    else:
        yield logging_progress(job.name)
