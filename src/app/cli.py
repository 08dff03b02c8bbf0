"""The command line: one table of commands, each with its help, its arguments and what it calls.

Exit codes: 0 fine, 1 a run failed or is partial or a check failed, 2 wrong usage, 75 another process runs the job
(sysexits' EX_TEMPFAIL: try later), 78 settings that cannot work (EX_CONFIG); a job may name other codes for how its
runs end (`app.core.runs.Exits`). Invariants: settings are checked before anything heavy is imported, and whatever goes
wrong ends as one clear line on stderr.
"""

import argparse
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from datetime import UTC, date, datetime
from functools import partial
from importlib import import_module
from types import FrameType
from typing import Any, NoReturn

from app.config import DOTENV
from app.core.errors import AppError, BadSettings
from app.ops.process import configured, tune

OK, FAILED, USAGE, BAD_SETTINGS = 0, 1, 2, 78
SIGNALS = (signal.SIGTERM, signal.SIGINT)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit code."""
    tune()
    top = parser()
    given = vars(top.parse_args(sys.argv[1:] if arguments is None else arguments))
    refuse_nonsense(top, given)
    call: Callable[..., int] = given.pop("call")
    try:
        return call(**given)
    except BadSettings as error:
        for fault in error.faults:
            say(fault)
        return BAD_SETTINGS
    except AppError as error:
        say(f"error: {error}")
        return FAILED


def say(line: str) -> None:
    """One line on stderr."""
    sys.stderr.write(f"{line}\n")


def serve() -> int:
    """Serve until a signal."""
    for number in SIGNALS:
        signal.signal(number, _end)
    settings = configured(daemon=True)
    from app.main import build
    from app.ops.service import run_daemon

    run_daemon(build(settings), os.environ, DOTENV)
    return OK


def _end(number: int, _: FrameType | None) -> NoReturn:
    """A signal while nothing is served, before or after: the shell's convention for its exit code.

    At once, since nothing is open then: an exception that is raised wherever the program happens to be is swallowed
    inside callbacks of the interpreter, as those of its imports, and the signal is lost with it.
    """
    os._exit(128 + number)


def _leave(number: int, _: FrameType | None) -> NoReturn:
    """As `_end`, for what has to be taken down first."""
    sys.exit(128 + number)


def on_service(name: str, **given: Any) -> int:
    """The function `name` of `app.ops.commands`, on a service that is built for it."""
    settings = configured()
    from app.main import build

    call: Callable[..., int] = getattr(import_module("app.ops.commands"), name)
    return call(build(settings), **given)


def google(*, no_browser: bool, as_json: bool) -> int:
    """Ask for a user's consent in a browser and keep the token."""
    settings = configured()
    from app.core.errors import Permanent
    from app.dynamo_to_drive import drive, job

    where = job.given_of(settings)
    if where is None:
        raise Permanent("no Google credentials are set", "set GOOGLE_CREDENTIALS_FILE to the client secrets file")
    with redirect_stdout(sys.stderr):  # the address, which the library prints
        kept = drive.consent(where, open_browser=not no_browser)
    from app.ops import commands

    text = f"the token is kept in {kept}; it is renewed there"
    commands.show({"token_file": str(kept)}, lambda: commands.line(text), as_json=as_json)
    return OK


def demo(*, once: bool, port: int | None, as_json: bool) -> int:
    """Everything against simulators; the daemon's own data is left alone."""
    for number in SIGNALS:
        signal.signal(number, _leave)
    environ = {**os.environ, **({"PORT": str(port)} if port is not None else {})}
    say("starting the simulated systems and writing some hours of telemetry to them")
    from simulators.demo import simulated

    with simulated(environ, live=not once) as simulation:
        settings = configured(simulation, None, daemon=not once)
        from app.main import build
        from app.ops import commands
        from app.ops.service import run_daemon

        if once:
            return commands.once(build(settings), as_json=as_json)
        run_daemon(build(settings), environ)
    return OK


def new_key(*, name: str, scopes: Sequence[str], s3_prefix: str, expires: date | None, as_json: bool) -> int:
    """Print a new key and the line for API_KEYS."""
    import secrets

    from app.ops import commands
    from app.web import auth

    today = datetime.now(UTC).date()
    presented, line = auth.new_key(
        name, "+".join(scopes), secrets.token_bytes, s3_prefix=s3_prefix, expires_on=expires, today=today
    )
    text = f"key, shown only now: {presented}\nadd to API_KEYS:     {line}"
    document = {"name": name, "key": presented, "api_keys_entry": line}
    commands.show(document, lambda: commands.line(text), as_json=as_json)
    return OK


def instant(text: str) -> datetime:
    """An aware UTC datetime. Raises ValueError, which argparse turns into a usage error."""
    at = datetime.fromisoformat(text)
    try:
        return at.replace(tzinfo=UTC) if at.tzinfo is None else at.astimezone(UTC)
    except OverflowError as error:  # an offset at either end of time
        raise ValueError(text) from error


def refuse_nonsense(top: argparse.ArgumentParser, given: Mapping[str, Any]) -> None:
    """End with a usage error where arguments contradict each other."""
    if "start" in given and given["start"] >= given["end"]:
        top.error(f"--from {given['start']} must be earlier than --to {given['end']}")
    if given.get("allow_shrink") and not given["replacing"]:
        top.error("--allow-shrink goes with --replace")


Argument = tuple[tuple[str, ...], Mapping[str, Any]]


def argument(*names: str, **options: Any) -> Argument:
    """What `argparse.ArgumentParser.add_argument` takes."""
    return names, options


@dataclass(frozen=True, slots=True)
class Command:
    """One command. `call` is given the arguments by name and returns the exit code; None is the function of the
    command's name in `app.ops.commands`, which is given a built service too.
    """

    name: str
    help: str
    arguments: Sequence[Argument] = ()
    call: Callable[..., int] | None = None


JSON = argument("--json", action="store_true", dest="as_json", help="one JSON document on stdout")
JOB = argument("job")
DRY_RUN = argument("--dry-run", action="store_true", help="change nothing, say what would be done")
SPAN = (
    argument("--from", dest="start", type=instant, required=True, help="ISO 8601; without an offset, UTC"),
    argument("--to", dest="end", type=instant, required=True, help="ISO 8601; not included"),
)
COMMANDS = (
    Command("serve", "run the jobs and answer HTTP (the default)", (), serve),
    Command("run", "run one job now, until it has nothing left to do", (JOB, DRY_RUN, JSON)),
    Command(
        "backfill",
        "fill past windows of a job again",
        (
            JOB,
            *SPAN,
            DRY_RUN,
            JSON,
            argument(
                "--replace",
                action="store_true",
                dest="replacing",
                help="write every window again; name the rows that the source no longer has",
            ),
            argument(
                "--allow-shrink",
                action="store_true",
                help="with --replace: remove those rows, except where the source's retention may have dropped them",
            ),
        ),
    ),
    Command(
        "rewrite",
        "re-encode past objects from themselves, in today's unit, names and types",
        (JOB, *SPAN, DRY_RUN, JSON),
    ),
    Command(
        "verify",
        "compare both ends of a job by content, window by window",
        (
            JOB,
            *SPAN,
            argument("--partition", default=None, help="only this one"),
            argument("--heal", action="store_true", help="write again what is missing or differs"),
            argument("--all", action="store_true", dest="every", help="name also the windows that are equal"),
            JSON,
        ),
    ),
    Command("check", "show the settings, what they switch on, and try every system", (JSON,)),
    Command("status", "every job: state, last run, error", (JSON,)),
    Command(
        "runs",
        "recent runs, newest first, and the files that csv_inbox ingested",
        (argument("job", nargs="?", default=None), argument("--limit", type=int, default=20), JSON),
    ),
    Command("pause", "suspend scheduled runs of a job; survives restarts", (JOB, JSON)),
    Command("resume", "run a job on its schedule again", (JOB, JSON)),
    Command(
        "demo",
        "everything at once, against simulated systems",
        (
            argument("--once", action="store_true", help="one round, then end"),
            argument("--port", type=int, default=None, help="port to listen on"),
            JSON,
        ),
        demo,
    ),
    Command(
        "keys new",
        "make an API key: the secret is shown once",
        (
            argument("name", help="1 to 40 of a-z, 0-9, - and _"),
            argument("--scopes", nargs="+", required=True, help="read, write, admin, or single ones such as ops:read"),
            argument("--s3-prefix", default="", help="confine the S3 scopes to keys that start with this"),
            argument("--expires", type=date.fromisoformat, default=None, help="last day it is good, YYYY-MM-DD"),
            JSON,
        ),
        new_key,
    ),
    Command(
        "undo",
        "take back what a run did; first shows what that would be",
        (
            JOB,
            argument("run", help="the run's id, or its beginning, as the command runs shows it"),
            argument("--yes", action="store_true", help="do it"),
            JSON,
        ),
    ),
    Command(
        "google",
        "sign in to Google once, for the client secrets of an installed app",
        (argument("--no-browser", action="store_true", help="print the address instead of opening it"), JSON),
        google,
    ),
)


def parser() -> argparse.ArgumentParser:
    """All commands; without one, serve. Built before the settings are read, so nothing heavy is imported for it."""
    top = argparse.ArgumentParser(
        prog="python -m app", description="Headwater: delivers telemetry to where people use it."
    )
    top.set_defaults(call=serve)
    groups = {"": top.add_subparsers(title="commands", metavar="")}
    for command in COMMANDS:
        group, _, name = command.name.rpartition(" ")
        if group not in groups:
            outer = groups[""].add_parser(group, help="make API keys")
            groups[group] = outer.add_subparsers(required=True, metavar=name)
        one = groups[group].add_parser(name, help=command.help)
        for names, options in command.arguments:
            one.add_argument(*names, **options)
        one.set_defaults(call=command.call or partial(on_service, command.name))
    return top
