"""`python -m app setup PIPELINE`: asks for what a pipeline needs, tries it, and writes `.env`.

Invariants: answers are validated in the same way as at startup; other variables in `.env` are kept; only the owner can
read the file, and secrets are not echoed while they are typed.
"""

import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from getpass import getpass
from io import StringIO
from pathlib import Path

from dotenv.parser import parse_stream

from app.config.environment import load_settings, read_dotenv
from app.config.reference import descriptions
from app.config.rules import VARIABLES
from app.core.errors import BadSettings
from app.core.files import write_durably
from app.ops.connection_checks import check_once
from app.ops.service import BuiltService

Answers = Mapping[str, str]
OWNER_ONLY = 0o600
BARE = re.compile(r"[\w./:@%+,=*~-]*")


@dataclass(frozen=True, slots=True)
class SetupQuestion:
    """One variable, asked for when `when` is true for the answers so far. `needed`: an empty answer is not accepted."""

    name: str
    needed: bool = True
    when: Callable[[Answers], bool] = lambda _: True


def _flux(answers: Answers) -> bool:
    return answers.get("INFLUXDB_API") != "influxql"


def _influxql(answers: Answers) -> bool:
    return not _flux(answers)


def _given(name: str) -> Callable[[Answers], bool]:
    return lambda answers: bool(answers.get(name))


BUCKET = (
    SetupQuestion("S3_BUCKET", needed=False),
    SetupQuestion("S3_ENDPOINT_URL", needed=False, when=_given("S3_BUCKET")),
    SetupQuestion("S3_REGION", needed=False, when=_given("S3_BUCKET")),
    SetupQuestion("S3_ACCESS_KEY_ID", needed=False, when=_given("S3_BUCKET")),
    SetupQuestion("S3_SECRET_ACCESS_KEY", when=_given("S3_ACCESS_KEY_ID")),
)
PIPELINES: Mapping[str, tuple[Sequence[SetupQuestion], Sequence[str]]] = {
    "influx_to_s3": (
        (
            SetupQuestion("INFLUXDB_URL"),
            SetupQuestion("INFLUXDB_API", needed=False),
            SetupQuestion("INFLUXDB_TOKEN", when=_flux),
            SetupQuestion("INFLUXDB_ORG", when=_flux),
            SetupQuestion("INFLUXDB_BUCKET", when=_flux),
            SetupQuestion("INFLUXDB_DATABASE", when=_influxql),
            SetupQuestion("INFLUXDB_USERNAME", needed=False, when=_influxql),
            SetupQuestion("INFLUXDB_PASSWORD", when=_given("INFLUXDB_USERNAME")),
            SetupQuestion("INFLUXDB_MEASUREMENT", needed=False),
            *BUCKET,
        ),
        ("influxdb", "s3_accessible"),
    ),
    "dynamo_to_drive": (
        (
            SetupQuestion("DYNAMODB_TABLE_NAME"),
            SetupQuestion("AWS_REGION", needed=False),
            SetupQuestion("AWS_ACCESS_KEY_ID", needed=False),
            SetupQuestion("AWS_SECRET_ACCESS_KEY", when=_given("AWS_ACCESS_KEY_ID")),
            SetupQuestion("DYNAMODB_TIMESTAMP_ATTRIBUTE", needed=False),
            SetupQuestion("GOOGLE_CREDENTIALS_FILE", needed=False),
            SetupQuestion("GOOGLE_DRIVE_FOLDER_ID", needed=False, when=_given("GOOGLE_CREDENTIALS_FILE")),
            SetupQuestion("GOOGLE_SHARED_DRIVE_ID", needed=False, when=_given("GOOGLE_CREDENTIALS_FILE")),
        ),
        ("dynamodb", "google_drive"),
    ),
    "csv_inbox": ((SetupQuestion("CSV_MONITOR_CONFIG", needed=False),), ()),
    "amplitude": (
        (
            SetupQuestion("AMPLITUDE_WEB_CLIENT_ID", needed=False),
            SetupQuestion("AMPLITUDE_WEB_SECRET_KEY", when=_given("AMPLITUDE_WEB_CLIENT_ID")),
            SetupQuestion("AMPLITUDE_MOBILE_CLIENT_ID", needed=False),
            SetupQuestion("AMPLITUDE_MOBILE_SECRET_KEY", when=_given("AMPLITUDE_MOBILE_CLIENT_ID")),
        ),
        ("amplitude_web", "amplitude_mobile"),
    ),
    "appmetrica": ((SetupQuestion("APPMETRICA_API_KEY"), SetupQuestion("APPMETRICA_APPLICATION_ID")), ("appmetrica",)),
}
"""The questions, and the systems that are then tried."""


def setup(
    pipeline: str, environ: Mapping[str, str], dotenv: Path, build: Callable[..., BuiltService]
) -> tuple[str, bool]:
    """Ask on stderr and try the systems; the text of `.env` with the answers, and whether every system answered.

    Raises BadSettings when the answers conflict with each other or with other settings.
    """
    questions, systems = PIPELINES[pipeline]
    text = dotenv.read_text(encoding="utf-8-sig") if dotenv.exists() else ""
    answers, held = dict[str, str](), {**read_dotenv(dotenv)[0], **environ}
    for question in questions:
        if question.when({**held, **answers}) and (said := _answer(question, held)):
            answers[question.name] = said
    service = build(load_settings({**environ, **answers}, dotenv))
    fine = True
    for system in (each for each in service.systems if each.key in systems):
        found = check_once(system.check)
        fine = fine and found.ok
        said = found.note or f"{found.error} ({found.hint})"
        _say(f"{'ok' if found.ok else 'FAILED'}: {system.title}: {said}")
    _say(f"{pipeline} delivers to {service.pipelines.destinations.get(pipeline, '')}")
    service.state.close()
    return merged(text, answers, pipeline), fine


def _answer(question: SetupQuestion, known: Mapping[str, str]) -> str:
    """Ask until the answer is valid for the variable; "" keeps the `known` value or the default."""
    variable = next(each for each in VARIABLES if question.name in each.names)
    meaning, held = descriptions()[variable.goes_to], known.get(question.name, "")
    shown = "***" if held and variable.allowed.secret else held or variable.default
    other = f" [{shown}]" if shown else "" if question.needed else f" [enter: {variable.unset or 'unset'}]"
    while True:
        _say(meaning)
        said = _typed(f"{question.name}{other}: ", secret=variable.allowed.secret)
        if said is None:
            raise BadSettings([f"{question.name}='': the input ended before it was answered"])
        fault = next(_faults(question.name, said or held), "")
        if not fault and (said or held or not question.needed or variable.default):
            return said
        _say(fault or f"{question.name} is needed")


def _typed(prompt: str, *, secret: bool) -> str | None:
    """One line of input, None at its end."""
    if secret and sys.stdin.isatty():
        return getpass(prompt).strip()
    sys.stderr.write(prompt)
    sys.stderr.flush()
    line = sys.stdin.readline()
    return line.strip() if line else None


def _faults(name: str, value: str) -> Iterator[str]:
    """The faults that startup would report for this variable alone."""
    try:
        load_settings({name: value}, None)
    except BadSettings as error:
        yield from (fault for fault in error.faults if fault.startswith(f"{name}="))


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")


def merged(text: str, answers: Answers, pipeline: str) -> str:
    """The text of `.env` with the answers: what sets a variable is replaced where it stands first, and dropped where it
    is set again; a variable that is not set yet is appended.
    """
    parts, left = list[str](), dict(answers)
    for each in parse_stream(StringIO(text)):
        if each.key not in answers:
            parts.append(each.original.string)
            continue
        before = re.match(r"\s*", each.original.string)
        parts.append(before[0] if before else "")
        if each.key in left:
            parts.append(f"{each.key}={quoted(left.pop(each.key))}\n")
    kept = "".join(parts)
    lines = [kept.rstrip("\n"), ""] if kept.strip() else []
    if left:
        lines += [f"# {pipeline}", *(f"{name}={quoted(value)}" for name, value in left.items()), ""]
    return "\n".join(lines)


def quoted(value: str) -> str:
    """A value quoted for `.env`."""
    if BARE.fullmatch(value):
        return value
    escaped = value.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def write_dotenv(path: Path, text: str) -> None:
    """Write the file, readable only by its owner."""
    if not path.exists():
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY, OWNER_ONLY))  # write_durably keeps the mode
    path.chmod(OWNER_ONLY)
    write_durably(path, [text.encode()])
