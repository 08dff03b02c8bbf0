"""What can be said on the command line: every command with its arguments.

Invariant: it is built before the settings are read, so it imports nothing of the product.
"""

import argparse
from collections.abc import Callable, Mapping
from datetime import UTC, date, datetime
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]  # noqa: SLF001 - it has no public name

Work = Mapping[str, Callable[[argparse.Namespace], int]]


def parser(work: Work) -> argparse.ArgumentParser:
    """All commands; without one, serve. Each is given what does its work, by name."""
    top = argparse.ArgumentParser(prog="python -m app", description="Headwater: lands telemetry where people work.")
    top.set_defaults(command=work["serve"])
    commands = top.add_subparsers(title="commands", metavar="")
    commands.add_parser("serve", help="run the jobs and answer HTTP (the default)").set_defaults(command=work["serve"])
    _add_run(commands, work)
    _add_past(commands, work)
    _add_verify(commands, work)
    _add_looking(commands, work)
    demo = commands.add_parser("demo", help="everything at once, against simulated systems")
    demo.add_argument("--once", action="store_true", help="one round, then end")
    demo.add_argument("--port", type=int, default=None, help="where to listen")
    _add_json(demo)
    demo.set_defaults(command=work["demo"])
    _add_keys(commands, work)
    _add_undo(commands, work)
    google = commands.add_parser("google", help="sign in to Google once, for the client secrets of an installed app")
    google.add_argument("--no-browser", action="store_true", help="print the address instead of opening it")
    _add_json(google)
    google.set_defaults(command=work["google"])
    return top


def _add_json(of: argparse.ArgumentParser) -> None:
    of.add_argument("--json", action="store_true", dest="as_json", help="one JSON document on stdout")


def _add_looking(commands: "Commands", work: Work) -> None:
    check = commands.add_parser("check", help="show the settings, what they switch on, and try every system")
    check.set_defaults(command=work["check"])
    status = commands.add_parser("status", help="every job: state, last run, error")
    status.set_defaults(command=work["status"])
    runs = commands.add_parser("runs", help="recent runs, newest first, and what they took in")
    runs.add_argument("job", nargs="?", default=None)
    runs.add_argument("--limit", type=int, default=20)
    runs.set_defaults(command=work["runs"])
    pause = commands.add_parser("pause", help="let a job's timer pass, also after a restart, until it is resumed")
    resume = commands.add_parser("resume", help="follow a job's timer again")
    for each, command in ((pause, "pause"), (resume, "resume")):
        each.add_argument("job")
        each.set_defaults(command=work[command])
    for each in (check, status, runs, pause, resume):
        _add_json(each)


def _add_verify(commands: "Commands", work: Work) -> None:
    verify = commands.add_parser("verify", help="compare both ends of a job by content, window by window")
    verify.add_argument("job")
    _add_span(verify)
    verify.add_argument("--partition", default=None, help="only this one")
    verify.add_argument("--heal", action="store_true", help="write again what is missing or differs")
    verify.add_argument("--all", action="store_true", dest="every", help="name also the windows that are equal")
    _add_json(verify)
    verify.set_defaults(command=work["verify"])


def _add_span(of: argparse.ArgumentParser) -> None:
    of.add_argument("--from", dest="start", type=instant, required=True, help="ISO 8601; without an offset, UTC")
    of.add_argument("--to", dest="end", type=instant, required=True, help="ISO 8601; not included")


def _add_run(commands: "Commands", work: Work) -> None:
    run = commands.add_parser("run", help="run one job now, until it has nothing left to do")
    run.add_argument("job")
    run.add_argument("--dry-run", action="store_true", help="change nothing, say what would be done")
    _add_json(run)
    run.set_defaults(command=work["run"])


def _add_past(commands: "Commands", work: Work) -> None:
    fill = commands.add_parser("backfill", help="fill past windows of a job again")
    again = commands.add_parser(
        "rewrite", help="re-encode past objects from themselves, in today's unit, names and types"
    )
    for each, command in ((fill, "backfill"), (again, "rewrite")):
        each.add_argument("job")
        _add_span(each)
        each.add_argument("--dry-run", action="store_true", help="change nothing, say what would be done")
        _add_json(each)
        each.set_defaults(command=work[command])
    fill.add_argument(
        "--replace", action="store_true", help="write every window again; name the rows that the source no longer has"
    )
    fill.add_argument(
        "--allow-shrink",
        action="store_true",
        help="with --replace: remove those rows, except where the source's retention may have dropped them",
    )


def _add_undo(commands: "Commands", work: Work) -> None:
    undo = commands.add_parser("undo", help="take back what a run did; first shows what that would be")
    undo.add_argument("job")
    undo.add_argument("run", help="the run's id, or its beginning, as the command runs shows it")
    undo.add_argument("--yes", action="store_true", help="do it")
    _add_json(undo)
    undo.set_defaults(command=work["undo"])


def _add_keys(commands: "Commands", work: Work) -> None:
    keys = commands.add_parser("keys", help="make API keys").add_subparsers(required=True, metavar="new")
    new = keys.add_parser("new", help="make one: the secret is shown once")
    new.add_argument("name", help="1 to 40 of a-z, 0-9, - and _")
    new.add_argument("--scopes", nargs="+", required=True, help="read, write, admin, or single ones such as ops:read")
    new.add_argument("--s3-prefix", default="", help="confine the S3 scopes to keys that start with this")
    new.add_argument("--expires", type=date.fromisoformat, default=None, help="last day it is good, YYYY-MM-DD")
    _add_json(new)
    new.set_defaults(command=work["keys"])


def instant(text: str) -> datetime:
    """An aware UTC datetime. Raises ValueError, which argparse turns into a usage error."""
    at = datetime.fromisoformat(text)
    try:
        return at.replace(tzinfo=UTC) if at.tzinfo is None else at.astimezone(UTC)
    except OverflowError as error:  # an offset at either end of time
        raise ValueError(text) from error
