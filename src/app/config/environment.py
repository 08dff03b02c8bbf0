"""From the environment and `.env` to `Settings`, or to the list of everything that is wrong.

Invariants: the environment beats `.env` name by name, then the first name of a variable that is set wins; all faults
are found in one go; no fault shows a secret, nor user and password in a URL.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from io import StringIO
from pathlib import Path
from typing import Any
from urllib.parse import quote

from dotenv.parser import parse_stream
from pydantic import SecretStr

from app.config import groups, variables
from app.config.groups import Settings
from app.config.rules import broken_rules
from app.config.variables import Variable
from app.core.errors import BadSettings

SHOWN_CHARACTERS = 80
QUOTED = re.compile(r"""(["'])(.*)\1(?:\s+#.*)?""", re.DOTALL)
COMMENT = re.compile(r"\s+#.*$", re.DOTALL)
MAY_BE_BLANK = {
    name for part in variables.PARTS for each in part.variables if each.kind.may_be_blank for name in each.names
}
AWS_NAMES = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")


@dataclass(frozen=True, slots=True)
class Found:
    """What was found: `values` by `group.field`, `chosen` the name that gave each of those that were set."""

    values: Mapping[str, Any]
    chosen: Mapping[str, str]
    faults: tuple[str, ...]


def load_settings(environ: Mapping[str, str], dotenv: Path | None) -> Settings:
    """The settings, checked. A `dotenv` that does not exist is none. Raises BadSettings with every fault."""
    in_file, file_faults = _read_dotenv(dotenv)
    found = _find({**in_file, **_said(environ)})
    faults = [*file_faults, *found.faults, *broken_rules(found.values, frozenset(found.chosen.values()))]
    if faults:
        raise BadSettings(tuple(dict.fromkeys(faults)))
    return _assemble(found)


def _read_dotenv(path: Path | None) -> tuple[dict[str, str], list[str]]:
    if path is None or not path.exists():
        return {}, []
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        return {}, [f"{path}: cannot be read ({type(error).__name__}); allowed: a UTF-8 text file of NAME=value lines"]
    lines = list(parse_stream(StringIO(text)))
    faults = [f"{path} line {each.original.line}: allowed: NAME=value" for each in lines if each.error]
    return {
        each.key: each.value or "" for each in lines if each.key and (each.value or each.key in MAY_BE_BLANK)
    }, faults


def _said(environ: Mapping[str, str]) -> dict[str, str]:
    """What is set. `docker run --env-file` hands quotes on as part of the value, so those of the whole value go."""
    texts = {name: text.strip() for name, text in environ.items()}
    bare = {name: match[2] if (match := QUOTED.fullmatch(text)) else text for name, text in texts.items()}
    return {name: text for name, text in bare.items() if text or name in MAY_BE_BLANK}


def _find(said: Mapping[str, str]) -> Found:
    values: dict[str, Any] = {}
    chosen: dict[str, str] = {}
    faults: list[str] = []
    for part in variables.PARTS:
        for variable in part.variables:
            name = next(
                (name for name in variable.names if said.get(name, "").strip() or name in MAY_BE_BLANK & said.keys()),
                None,
            )
            text = said[name].strip() if name else variable.default
            if name:
                chosen[variable.goes_to] = name
            try:
                values[variable.goes_to] = _read(variable, text)
            except ValueError as error:
                faults.append(f"{name}={shown(variable, text)}: {error}")
    return Found(values, chosen, tuple(faults))


def _read(variable: Variable, text: str) -> object:
    """The value of `text`. A trailing comment, which `docker run --env-file` hands on, is cut where that helps."""
    if not text:
        return variable.kind.empty
    try:
        return variable.kind.read(text)
    except ValueError:
        rest = COMMENT.sub("", text)
        if rest == text or not rest:
            raise
        return variable.kind.read(rest)


def shown(variable: Variable, text: str) -> str:
    """`text` as a fault may show it."""
    if variable.kind.secret:
        return "***"
    text = re.sub(r"^([A-Za-z][A-Za-z0-9+.-]*:/*)?.*@", r"\1***@", text, flags=re.DOTALL)
    text = re.sub(r"\?.*$", "?***", text, flags=re.DOTALL)
    return repr(text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "...")


def _assemble(found: Found) -> Settings:
    values = {**found.values, **_derived(found)}

    def group(name: str, of: Any) -> Any:
        return of(**{each.name: values[f"{name}.{each.name}"] for each in fields(of)})

    return Settings(**{each.name: group(each.name, each.type) for each in fields(groups.Settings)})


def _derived(found: Found) -> dict[str, Any]:
    """What follows from several variables, or from others where its own is unset."""
    values, chosen = found.values, found.chosen
    with_aws_keys = chosen.get("s3.access_key_id") == AWS_NAMES[0]
    return {
        "service.version": values["service.version"] or _installed_version(),
        "service.log_level": "DEBUG" if values["service.debug"] else values["service.log_level"],
        "service.log_file": (
            values["service.log_file"] if "service.log_file" in chosen else values["service.data_dir"] / "app.log"
        ),
        "influx.database": values["influx.database"] or values["influx.bucket"],
        "export.grace_seconds": (
            values["export.lookback_hours"] * 3600
            if values["export.grace_seconds"] is None
            else values["export.grace_seconds"]
        ),
        "s3.session_token": values["s3.session_token"] if with_aws_keys else None,
        "checkpoint.url": _checkpoint_url(values),
        "drive.credentials_json": None if values["drive.credentials_file"] else values["drive.credentials_json"],
    }


def _installed_version() -> str:
    try:
        return version("headwater")
    except PackageNotFoundError:  # run from a checkout that was never installed
        return "unknown"


def _checkpoint_url(values: Mapping[str, Any]) -> SecretStr:
    """CHECKPOINT_DB_* as one URL, each part percent-encoded; without a host, CHECKPOINT_DATABASE_URL.

    libpq takes a percent-encoded path in the place of the host as the folder of a socket.
    """
    host = values["checkpoint.host"]
    if not host:
        url: SecretStr = values["checkpoint.url"]
        return url
    user, password = values["checkpoint.user"], values["checkpoint.password"].get_secret_value()
    login = quote(user, safe="") + (f":{quote(password, safe='')}" if password else "")
    address = f"[{host}]" if ":" in host else quote(host, safe="")
    database = quote(values["checkpoint.database"], safe="")
    return SecretStr(f"postgresql://{login}{'@' if login else ''}{address}:{values['checkpoint.port']}/{database}")
