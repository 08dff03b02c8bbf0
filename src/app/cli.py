"""The command line: one table of commands, each with its help, its arguments and the function that it calls.

Exit codes: 0 OK, 1 a run failed or is partial or a check failed, 2 wrong usage, 75 another process runs the job
(sysexits' EX_TEMPFAIL: try later), 78 invalid settings (EX_CONFIG); a job may define other codes for its outcomes
(`app.core.runs.ExitCodes`). Invariants: settings are validated before anything heavy is imported, and every fault is
reported as one clear line on stderr.
"""

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, redirect_stdout, suppress
from dataclasses import dataclass
from datetime import UTC, date, datetime
from functools import partial
from importlib import import_module
from importlib.metadata import version
from types import FrameType
from typing import Any, NoReturn

from app.config import DOTENV
from app.core.errors import AppError, BadSettings, did_you_mean
from app.core.windows import utc_instant
from app.ops.process import BAD_SETTINGS, configured, tune, unsupported

OK, FAILED, USAGE = 0, 1, 2
EXIT_CODES = """0 fine, 1 a run failed or is partial or a check failed, 2 wrong usage,
75 another process runs the job: try later, 78 invalid settings"""
SIGNALS = (signal.SIGTERM, signal.SIGINT)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. Faults go to stderr, and with --json also to stdout as a document."""
    if refusal := unsupported(os.name):
        print_error(refusal)
        return BAD_SETTINGS
    tune()
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        given = parsed(words)
        call: Callable[..., int] = given.pop("call")
        return call(**given)
    except AppError as error:
        code, lines, faults = FAILED, [f"error: {error}"], {}
        if isinstance(error, BadSettings):
            code, lines, faults = BAD_SETTINGS, list(error.faults), {"faults": list(error.faults)}
        elif isinstance(error, UsageError):
            code, lines = USAGE, [str(error)]
        for line in lines:
            print_error(line)
        if "--json" in words:
            document = {"error": {"message": error.message, "hint": error.hint, **faults}}
            sys.stdout.write(json.dumps(document, indent=2) + "\n")
        return code


class UsageError(AppError):
    """Invalid arguments."""


class Parser(argparse.ArgumentParser):
    """Raises UsageError instead of ending the process."""

    def error(self, message: str) -> NoReturn:
        """See `argparse.ArgumentParser.error`."""
        raise UsageError(f"{self.prog}: {message}", f"see `{self.prog} --help`")


def print_error(line: str) -> None:
    """Print one line to stderr."""
    sys.stderr.write(f"{line}\n")


def serve(*, port: int | None = None) -> int:
    """Serve until a signal."""
    for number in SIGNALS:
        signal.signal(number, _end)
    environ = with_port(port)
    settings = configured(environ, daemon=True)
    from app.main import build
    from app.ops.service import run_daemon

    run_daemon(build(settings), environ, DOTENV)
    return OK


def worker(*, port: int | None = None) -> int:
    """Run what other processes send until a signal."""
    for number in SIGNALS:
        signal.signal(number, _end)
    settings = configured(with_port(port), daemon=True)
    from app.main import build

    service = build(settings, is_worker=True)
    if service.scheduler.elsewhere is None:
        raise BadSettings(["SCALE_ENGINE='embedded': a worker needs a queue; set SCALE_ENGINE=procrastinate"])
    from app.scale.worker import run_worker

    run_worker(service)
    return OK


def with_port(port: int | None) -> Mapping[str, str]:
    """The environment; a port from the command line overrides it."""
    return os.environ if port is None else {**os.environ, "PORT": str(port)}


def _end(number: int, _: FrameType | None) -> NoReturn:
    """Signal handler while nothing is being served: exits with the shell's code for the signal.

    It exits at once, since nothing is open then. An exception instead could be swallowed inside an interpreter
    callback, such as those of imports, and the signal would be lost.
    """
    os._exit(128 + number)


def _leave(number: int, _: FrameType | None) -> NoReturn:
    """As `_end`, for work that needs cleanup first."""
    sys.exit(128 + number)


def on_service(name: str, **given: Any) -> int:
    """Call the function `name` of `app.ops.commands` with a service built for it."""
    settings = configured()
    from app.main import build

    call: Callable[..., int] = getattr(import_module("app.ops.commands"), name)
    service = build(settings)
    with closing(service.state):
        return call(service, **given)


def google(*, no_browser: bool, as_json: bool) -> int:
    """Ask for a user's consent in a browser and keep the token."""
    settings = configured()
    from app.dynamo_to_drive import credentials

    kept = settings.service.data_dir / credentials.TOKEN_FILE
    with redirect_stdout(sys.stderr):  # the library prints the URL
        credentials.consent(settings.drive, kept, open_browser=not no_browser)
    from app.ops import commands

    text = f"the token is kept in {kept}; it is renewed there"
    commands.show({"token_file": str(kept)}, lambda: commands.line(text), as_json=as_json)
    return OK


def demo(*, once: bool, port: int | None, as_json: bool) -> int:
    """Everything against simulators; the daemon's own data is left alone."""
    for number in SIGNALS:
        signal.signal(number, _leave)
    environ = with_port(port)
    print_error("starting the simulated systems and writing some hours of telemetry to them")
    from simulators.demo import simulated

    with simulated(environ, live=not once) as simulation:
        settings = configured(simulation, None, daemon=not once)
        from app.main import build
        from app.ops import commands
        from app.ops.service import run_daemon

        if once:
            service = build(settings)
            with closing(service.state):
                return commands.once(service, as_json=as_json)
        run_daemon(build(settings), environ)
    return OK


def setup(*, pipeline: str, printing: bool) -> int:
    """Ask for what a pipeline needs, try it, and write `.env` or print its lines; 1 when a system did not answer."""
    with suppress(BadSettings):  # incomplete settings may be what the user is about to fix
        configured()
    from app.main import build
    from app.ops.setup import setup as asked
    from app.ops.setup import write_dotenv

    text, fine = asked(pipeline, os.environ, DOTENV, build)
    if printing:
        sys.stdout.write(text)
    elif fine or (sys.stdin.isatty() and input("write .env anyway? [y/N] ").strip().lower() == "y"):
        write_dotenv(DOTENV, text)
        print_error(f"wrote {DOTENV.absolute()}; next: python -m app run {pipeline} --dry-run")
    else:
        print_error("nothing was written: correct what failed and run this again, or add --print")
    return OK if fine else FAILED


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


def import_dwh(*, source: str, dry_run: bool, as_json: bool) -> int:
    """Bring the rows of another program's tables into the warehouse."""
    settings = configured()
    from dataclasses import asdict

    from app.db.migrations import open_database
    from app.dwh.old_tables import format_result, import_old_tables
    from app.dwh.warehouse import open_warehouse
    from app.ops import commands

    with closing(open_database(source, variables="the URL to import from", read_only=True)) as old:
        url = settings.dwh.database_url.get_secret_value()
        with closing(open_warehouse(url, settings.service.data_dir)) as warehouse:
            done = import_old_tables(old, warehouse, datetime.now(UTC), dry_run=dry_run)
    text = "\n".join(format_result(done, dry_run=dry_run))
    commands.show({"tables": [asdict(each) for each in done]}, lambda: commands.line(text), as_json=as_json)
    return FAILED if any(each.set_aside_count for each in done) else OK


def expects(what: str, read: Callable[[str], Any]) -> Callable[[str], Any]:
    """`read` as an argparse type whose error says in words `what` is expected."""

    def typed(text: str) -> Any:
        try:
            return read(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {what}") from None

    return typed


INSTANT = expects("an ISO 8601 date or timestamp, such as 2026-02-01 or 2026-02-01T12:00Z", utc_instant)
NUMBER = expects("a whole number", int)
MAX_LIMIT = 100_000


def _limit(text: str) -> int:
    if not 1 <= (number := int(text)) <= MAX_LIMIT:
        raise ValueError(text)
    return number


LIMIT = expects(f"a whole number from 1 to {MAX_LIMIT}", _limit)


def parsed(words: Sequence[str]) -> dict[str, Any]:
    """The arguments by name, plus `call`. Raises UsageError."""
    first = next((word for word in words if not word.startswith("-")), None)
    names = dict.fromkeys(command.name.partition(" ")[0] for command in COMMANDS)
    if first is not None and first not in names:
        raise UsageError(f"unknown command {first!r}", f"{did_you_mean(first, names)}commands: {', '.join(names)}")
    given = vars(parser().parse_args(words))
    if "start" in given and given["start"] >= given["end"]:
        raise UsageError(f"--from {given['start']} must be earlier than --to {given['end']}", "exchange them")
    if given.get("allow_shrink") and not given["replacing"]:
        raise UsageError("--allow-shrink works only with --replace", "add --replace")
    return given


Argument = tuple[tuple[str, ...], Mapping[str, Any]]


def argument(*names: str, **options: Any) -> Argument:
    """The parameters of `argparse.ArgumentParser.add_argument`."""
    return names, options


@dataclass(frozen=True, slots=True)
class Command:
    """One command. `call` takes the arguments by name and returns the exit code; None = the function of the command's
    name in `app.ops.commands`, which also takes a built service. `examples` are valid arguments.
    """

    name: str
    help: str
    arguments: Sequence[Argument] = ()
    call: Callable[..., int] | None = None
    examples: Sequence[str] = ()


JOBS = {
    "influx_to_s3": "telemetry of InfluxDB to Parquet or CSV in S3 or a directory",
    "influx_to_s3_reconcile": "compares past windows with the source, once a day",
    "lake_day": "adds closed days to the Iceberg table, once an hour",
    "dynamo_to_drive": "rows of DynamoDB to one CSV file an hour on Google Drive or in a directory",
    "dynamo_to_drive_late": "looks for late rows in past hours, every 15 min",
    "dynamo_to_drive_reconcile": "compares past hours with the table, once a day",
    "csv_inbox": "CSV files of a folder into one master file",
    "amplitude": "events of Amplitude to objects and the warehouse",
    "appmetrica": "events of AppMetrica to objects and the warehouse",
    "set_aside_sweep": "deletes what was set aside long ago",
    "s3_sweep": "aborts unfinished uploads in the bucket",
}
SETUPS = ("influx_to_s3", "dynamo_to_drive", "csv_inbox", "amplitude", "appmetrica")
JSON = argument("--json", action="store_true", dest="as_json", help="one JSON document on stdout, errors too")
JOB = argument("job", metavar="JOB", help="name of a job, see `python -m app --help`")
DRY_RUN = argument("--dry-run", action="store_true", help="change nothing, say what would be done")
PORT = argument("--port", type=NUMBER, default=None, help="port to listen on, instead of PORT")
SPAN = (
    argument("--from", dest="start", type=INSTANT, required=True, help="ISO 8601; without an offset, UTC"),
    argument("--to", dest="end", type=INSTANT, required=True, help="ISO 8601; exclusive"),
)
DAY = "--from 2026-02-01 --to 2026-02-02"
COMMANDS = (
    Command("serve", "run the jobs and answer HTTP (the default)", (PORT,), serve, ("serve --port 8000",)),
    Command(
        "run",
        "run one job now, until it has nothing left to do",
        (JOB, DRY_RUN, JSON),
        examples=("run csv_inbox --dry-run", "run influx_to_s3 --json"),
    ),
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
        examples=(f"backfill influx_to_s3 {DAY}", f"backfill influx_to_s3 {DAY} --replace --dry-run"),
    ),
    Command(
        "rewrite",
        "re-encode past objects from themselves, in today's unit, names and types",
        (JOB, *SPAN, DRY_RUN, JSON),
        examples=(f"rewrite influx_to_s3 {DAY} --dry-run",),
    ),
    Command(
        "verify",
        "compare both ends of a job by content, window by window",
        (
            JOB,
            *SPAN,
            argument("--partition", default=None, help="only this one, such as a device"),
            argument("--heal", action="store_true", help="rewrite what is missing or differs"),
            argument("--all", action="store_true", dest="every", help="also list the windows that are equal"),
            JSON,
        ),
        examples=(f"verify influx_to_s3 {DAY} --heal",),
    ),
    Command(
        "setup",
        "ask for what a pipeline needs, try it, and write .env",
        (
            argument("pipeline", metavar="PIPELINE", choices=SETUPS, help=", ".join(SETUPS)),
            argument("--print", action="store_true", dest="printing", help="print the text of .env, write nothing"),
        ),
        setup,
        ("setup influx_to_s3", "setup csv_inbox --print"),
    ),
    Command(
        "check",
        "say what the settings switch on and where rows will go, and try every system",
        (argument("--settings", action="store_true", help="show every setting too, secrets as ***"), JSON),
        examples=("check", "check --settings"),
    ),
    Command("status", "every job: state, last run, error", (JSON,), examples=("status --json",)),
    Command(
        "runs",
        "recent runs, newest first, and the files that csv_inbox ingested",
        (
            argument("job", nargs="?", default=None, metavar="JOB", help="only runs of this job"),
            argument("--limit", type=LIMIT, default=20, help="maximum number of lines"),
            JSON,
        ),
        examples=("runs csv_inbox --limit 5",),
    ),
    Command(
        "pause", "suspend scheduled runs of a job; survives restarts", (JOB, JSON), examples=("pause influx_to_s3",)
    ),
    Command("resume", "run a job on its schedule again", (JOB, JSON), examples=("resume influx_to_s3",)),
    Command(
        "worker",
        "run the jobs and shards that `serve` sends with SCALE_ENGINE=procrastinate; PORT answers probes",
        (PORT,),
        worker,
        ("worker --port 8081",),
    ),
    Command(
        "demo",
        "everything at once, against simulated systems",
        (argument("--once", action="store_true", help="run every job once, then exit"), PORT, JSON),
        demo,
        ("demo", "demo --once"),
    ),
    Command(
        "keys new",
        "make an API key: the secret is shown once",
        (
            argument("name", metavar="NAME", help="1 to 40 of a-z, 0-9, - and _"),
            argument("--scopes", nargs="+", required=True, help="read, write, admin, or single ones such as ops:read"),
            argument("--s3-prefix", default="", help="confine the S3 scopes to keys that start with this"),
            argument(
                "--expires",
                type=expects("a date, such as 2027-01-31", date.fromisoformat),
                default=None,
                help="last day the key is valid, YYYY-MM-DD",
            ),
            JSON,
        ),
        new_key,
        ("keys new admin --scopes admin", "keys new grafana --scopes ops:read --expires 2027-01-31"),
    ),
    Command(
        "import-dwh",
        "import the rows of the DWH Helper's tables, which are only read",
        (argument("source", help="the URL of their database: sqlite:///path or postgresql://..."), DRY_RUN, JSON),
        import_dwh,
        ("import-dwh sqlite:////srv/dwh/dwh.db --dry-run",),
    ),
    Command(
        "undo",
        "undo a run; without --yes, only show what would change",
        (
            JOB,
            argument("run", metavar="RUN", help="the run's id, or its beginning, as the command runs shows it"),
            argument("--yes", action="store_true", help="do it"),
            JSON,
        ),
        examples=("undo csv_inbox 3f9c21ab",),
    ),
    Command(
        "google",
        "sign in to Google once, for the client secrets of an installed app",
        (argument("--no-browser", action="store_true", help="print the address instead of opening it"), JSON),
        google,
        ("google --no-browser",),
    ),
)
DESCRIPTION = """\
Headwater delivers telemetry and product-analytics data to where people use it, and never loses or doubles a row.
Settings come from the environment and from .env in the working directory. With none, everything runs locally."""
FIRST = ("demo", "check", "run csv_inbox --dry-run", "serve --port 8000", "keys new admin --scopes admin")


def parser() -> argparse.ArgumentParser:
    """All commands; the default is serve. Built before the settings are read, so it imports nothing heavy."""
    jobs = "\n".join(f"  {name:<26}{text}" for name, text in JOBS.items())
    top = Parser(
        prog="python -m app",
        description=DESCRIPTION,
        epilog=f"{_examples(FIRST)}\n\njobs:\n{jobs}\n\nexit codes: {EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"headwater {version('headwater')}")
    top.set_defaults(call=serve)
    groups = {"": top.add_subparsers(title="commands", metavar="COMMAND")}
    for command in COMMANDS:
        group, _, name = command.name.rpartition(" ")
        if group not in groups:
            outer = groups[""].add_parser(group, help="make API keys")
            groups[group] = outer.add_subparsers(required=True, metavar=name)
        one = groups[group].add_parser(
            name,
            help=command.help,
            description=f"{command.help[0].upper()}{command.help[1:]}.",
            epilog=_examples(command.examples),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        for names, options in command.arguments:
            one.add_argument(*names, **options)
        one.set_defaults(call=command.call or partial(on_service, command.name))
    return top


def _examples(lines: Sequence[str]) -> str:
    return "\n".join(("examples:", *(f"  python -m app {line}" for line in lines)))
