"""Commands that look or say a word: check, runs, status, pause, resume.

Invariant: they work while the daemon runs and while it does not, since everything that they need is in the state.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from app.config import DOTENV
from app.config.environment import read_dotenv
from app.config.masking import describe
from app.config.rules import warnings
from app.core.errors import Rejected
from app.core.ledger import summary_of
from app.core.runs import Outcome, Run
from app.ops import output
from app.ops.readiness import Finding, look
from app.ops.service import Headwater
from app.ops.shapes import instant_text, run_shown

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
        output.line(f"1 values: as they were understood, from the environment and {env_file or 'no .env file'}")
        output.table(("setting", "value"), values.items())
        output.line("2 wiring: what they switch on")
        every = {job.name: f"every {job.interval_seconds} s" for job in service.pipelines.jobs}
        output.table(("job", "state"), ((each["name"], each["why"] or every[str(each["name"])]) for each in jobs))  # type: ignore[misc]
        for warning in said:
            output.line(f"warning: {warning}")
        output.line("3 live: each system tried with these credentials")
        rows = [(name, "ok" if f.ok else "FAILED", _said(f)) for name, f in findings.items()]
        output.table(("system", "state", "what it said"), rows)

    live = [
        {"system": name, "ok": each.ok, "note": each.note, "error": each.error, "hint": each.hint}
        for name, each in findings.items()
    ]
    wiring = {"jobs": jobs, "warnings": said}
    document = {"ok": ok, "env_file": env_file, "values": values, "wiring": wiring, "live": live}
    output.show(document, told, as_json=as_json)
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
        output.table(("started", "run", "job", "outcome", "rows", "ledger; error"), rows)
        for name, lines in histories.items():
            output.line(f"what {name} took in, newest first")
            head = tuple(lines[0]) if lines else ("nothing yet",)
            output.table(head, [[output.cell(value) for value in each.values()] for each in lines])

    document = {"runs": [run_shown(run) for run in found], "histories": histories}
    output.show(document, told, as_json=as_json)
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
    output.show({"jobs": lines}, lambda: _told(lines), as_json=as_json)
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
    output.table(("job", "state", "last run", "outcome", "rows", "error"), rows)


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
    output.show({"job": name, "paused": paused}, lambda: output.line(f"{name} {word}"), as_json=as_json)
    return OK
