"""The command line: what each command does. Its arguments stand in `app.cli`.

Exit codes: 0 fine, 1 a run failed or is partial or a check failed, 2 wrong usage, 75 another process runs the job
(sysexits' EX_TEMPFAIL: try later), 78 settings that cannot work (EX_CONFIG); a job may name other codes for how its
runs end (`app.core.runs.Exits`). Invariant: settings are checked before
anything heavy is imported, and whatever goes wrong ends as one clear line on stderr.
"""

import argparse
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from app.cli import Work, parser
from app.config import DOTENV
from app.core.errors import AppError, BadSettings

if TYPE_CHECKING:
    from app.config.settings import Settings

OK, FAILED, USAGE, BUSY, BAD_SETTINGS = 0, 1, 2, os.EX_TEMPFAIL, os.EX_CONFIG
SIGNALS = (signal.SIGTERM, signal.SIGINT)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit code."""
    tune()
    given = parser(COMMANDS).parse_args(sys.argv[1:] if arguments is None else arguments)
    command: Callable[[argparse.Namespace], int] = given.command
    try:
        return command(given)
    except BadSettings as error:
        for fault in error.faults:
            say(fault)
        return BAD_SETTINGS
    except AppError as error:
        say(f"error: {error}")
        return FAILED


class Absent:
    """Hides a package from all imports that follow; see `importlib.abc.MetaPathFinder`."""

    def __init__(self, name: str) -> None:
        self._name = name

    def find_spec(self, name: str, *_: object) -> None:
        """Refuse the package, leave the others to the next finder."""
        if name == self._name:
            raise ModuleNotFoundError(f"{name} is not for this process", name=name)


def tune() -> None:
    """What a process of half a core and little memory wants; before anything heavy is imported."""
    # Arrow's own pool keeps some 50 MiB that the system's allocator gives back.
    os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")
    # numpy's linear algebra, which nothing here uses, would start a thread with buffers for each core.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    # pyarrow and DuckDB import pandas wherever it is installed, 91 MiB for nothing: here it is never asked for.
    sys.meta_path.insert(0, Absent("pandas"))


def say(line: str) -> None:
    """One line on stderr."""
    sys.stderr.write(f"{line}\n")


def configured(
    environ: Mapping[str, str] = os.environ, dotenv: Path | None = DOTENV, *, daemon: bool = False
) -> "Settings":
    """Settings of this environment, with logging set up: of a command on stderr, and not into the daemon's file."""
    from app.config.environment import load_settings
    from app.config.masking import secrets_of
    from app.ops import logs

    settings = load_settings(environ, dotenv)
    service = settings.service
    logs.configure(
        service.log_level,
        service.log_format if daemon else "text",
        service.log_file if daemon else None,
        secrets=secrets_of(settings),
        stream=sys.stdout if daemon else sys.stderr,
    )
    return settings


def serve(_: argparse.Namespace) -> int:
    """Serve until a signal."""
    for number in SIGNALS:
        signal.signal(number, _end)
    settings = configured(daemon=True)
    from app.main import build
    from app.ops.daemon import run_daemon

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


def run(given: argparse.Namespace) -> int:
    """Run one job in this process."""
    settings = configured()
    from app.main import build
    from app.ops import commands

    return commands.run(build(settings), given.job, commands.How(given.dry_run, given.as_json))


def backfill(given: argparse.Namespace) -> int:
    """Fill past windows in this process."""
    if given.allow_shrink and not given.replace:
        say("error: --allow-shrink goes with --replace")
        return USAGE
    return _past(given, "replace" if given.replace else "backfill")


def rewrite(given: argparse.Namespace) -> int:
    """Re-encode past objects in this process."""
    return _past(given, "rewrite")


def _past(given: argparse.Namespace, name: str) -> int:
    from app.core.windows import Window

    if _is_empty(given):
        return USAGE
    settings = configured()
    from app.main import build
    from app.ops import commands

    span, how = Window(given.start, given.end), commands.How(given.dry_run, given.as_json)
    if name == "replace":
        return commands.replacement(build(settings), given.job, span, how, allow_shrink=given.allow_shrink)
    command = {"backfill": commands.backfill, "rewrite": commands.rewrite}[name]
    return command(build(settings), given.job, span, how)


def _is_empty(given: argparse.Namespace) -> bool:
    """True, and said, when --from is not before --to."""
    if given.start >= given.end:
        say(f"error: --from {given.start} is not before --to {given.end}")
        return True
    return False


def verify(given: argparse.Namespace) -> int:
    """Compare both ends of a job, and mend what differs when that is asked for."""
    from app.core.windows import Window

    if _is_empty(given):
        return USAGE
    settings = configured()
    from app.main import build
    from app.ops import commands
    from app.ops.verification import Healing

    what = Healing(Window(given.start, given.end), given.partition)
    wanted = commands.VerifyRequest(given.job, what, healing=given.heal, every=given.every)
    return commands.verify_both(build(settings), wanted, commands.How(as_json=given.as_json))


def undo(given: argparse.Namespace) -> int:
    """Take back what a run did, in this process."""
    settings = configured()
    from app.main import build
    from app.ops import commands

    return commands.undo(build(settings), given.job, given.run, commands.How(not given.yes, given.as_json))


def check(given: argparse.Namespace) -> int:
    """Show the settings and try every system."""
    settings = configured()
    from app.main import build
    from app.ops import commands

    return commands.check(build(settings), as_json=given.as_json)


def status(given: argparse.Namespace) -> int:
    """Show every job."""
    settings = configured()
    from app.main import build
    from app.ops import commands

    return commands.status(build(settings), as_json=given.as_json)


def runs(given: argparse.Namespace) -> int:
    """Show recent runs."""
    settings = configured()
    from app.main import build
    from app.ops import commands

    return commands.runs(build(settings), given.job, given.limit, as_json=given.as_json)


def pause(given: argparse.Namespace) -> int:
    """Pause a job in every process."""
    settings = configured()
    from app.main import build
    from app.ops import commands

    return commands.pause(build(settings), given.job, as_json=given.as_json)


def resume(given: argparse.Namespace) -> int:
    """End a job's pause."""
    settings = configured()
    from app.main import build
    from app.ops import commands

    return commands.resume(build(settings), given.job, as_json=given.as_json)


def google(given: argparse.Namespace) -> int:
    """Ask for a user's consent in a browser and keep the token."""
    settings = configured()
    from app.core.errors import Permanent
    from app.dynamo_to_drive import drive, job

    where = job.given_of(settings)
    if where is None:
        raise Permanent("no Google credentials are set", "set GOOGLE_CREDENTIALS_FILE to the client secrets file")
    with redirect_stdout(sys.stderr):  # the address, which the library prints
        kept = drive.consent(where, open_browser=not given.no_browser)
    from app.ops import commands

    text = f"the token is kept in {kept}; it is renewed there"
    commands.show({"token_file": str(kept)}, lambda: commands.line(text), as_json=given.as_json)
    return OK


def demo(given: argparse.Namespace) -> int:
    """Everything against simulators; the daemon's own data is left alone."""
    for number in SIGNALS:
        signal.signal(number, _leave)
    environ = {**os.environ, **({"PORT": str(given.port)} if given.port is not None else {})}
    sys.stderr.write("starting the simulated systems and writing some hours of telemetry to them\n")
    from simulators.demo import simulated

    with simulated(environ, live=not given.once) as simulation:
        settings = configured(simulation, None, daemon=not given.once)
        from app.main import build
        from app.ops import commands
        from app.ops.daemon import run_daemon

        if given.once:
            return commands.once(build(settings), commands.How(as_json=given.as_json))
        run_daemon(build(settings), environ)
    return OK


def new_key(given: argparse.Namespace) -> int:
    """Print a new key and the line for API_KEYS."""
    import secrets

    from app.ops import commands
    from app.web import auth

    presented, line = auth.new_key(
        given.name, "+".join(given.scopes), secrets.token_bytes, s3_prefix=given.s3_prefix, expires_on=given.expires
    )
    text = f"key, shown only now: {presented}\nadd to API_KEYS:     {line}"
    document = {"name": given.name, "key": presented, "api_keys_entry": line}
    commands.show(document, lambda: commands.line(text), as_json=given.as_json)
    return OK


COMMANDS: Work = {
    "serve": serve,
    "run": run,
    "backfill": backfill,
    "rewrite": rewrite,
    "verify": verify,
    "undo": undo,
    "check": check,
    "status": status,
    "runs": runs,
    "pause": pause,
    "resume": resume,
    "google": google,
    "demo": demo,
    "keys": new_key,
}


if __name__ == "__main__":
    sys.exit(main())
