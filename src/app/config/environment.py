"""Reads the environment and `.env` into `Settings`, or into a list of every fault.

Invariants: the environment beats `.env` name by name; then the first name of a variable that is set wins. All faults
are reported at once; no fault shows a secret, or the user and password of a URL.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from io import StringIO
from itertools import groupby
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from dotenv.parser import parse_stream
from pydantic import SecretStr, ValidationError
from pydantic_core import ErrorDetails

from app.config.rules import MASK, VARIABLES, Variable, broken_rules, text_of
from app.config.settings import Settings
from app.config.value_types import Advice
from app.core.errors import BadSettings
from app.core.network import use

SHOWN_CHARACTERS = 80
QUOTED = re.compile(r"""(["'])(.*)\1(?:\s+#.*)?""", re.DOTALL)
MAY_BE_BLANK = {"INFLUXDB_IGNORED_TAGS"}  # an empty value means "none" here, not the default


def load_settings(environ: Mapping[str, str], dotenv: Path | None) -> Settings:
    """The validated settings. A missing `dotenv` file is ignored. Raises BadSettings with every fault."""
    in_file, faults = read_dotenv(dotenv)
    said = {**in_file, **_unquoted(environ)}
    errors: list[ErrorDetails] = []
    try:
        settings = Settings(said)
    except ValidationError as error:
        errors = error.errors(include_url=False, include_input=False)
    refused = set[str]()
    for variable, fault in _faults(errors, said):
        refused.update(variable.names)
        faults.append(fault)
    if errors:
        # The remaining values are readable: apply the rules to them now, so that all faults are reported at once.
        settings = Settings({name: text for name, text in said.items() if name not in refused})
    faults += broken_rules(settings, said.keys(), refused)
    if faults:
        raise BadSettings(tuple(dict.fromkeys(faults)))
    return settings


def read_dotenv(path: Path | None) -> tuple[dict[str, str], list[str]]:
    """What a file sets, and a fault for each line that cannot be read. A missing file sets nothing."""
    if path is None or not path.exists():
        return {}, []
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        return {}, [f"{path}: cannot be read ({type(error).__name__}); allowed: a UTF-8 text file of NAME=value lines"]
    lines = list(parse_stream(StringIO(text)))
    faults = [f"{path} line {each.original.line}: allowed: NAME=value" for each in lines if each.error]
    return _set((each.key, each.value or "") for each in lines if each.key), faults


def _unquoted(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables that are set. `docker run --env-file` keeps quotes as part of the value; quotes around it are
    removed.
    """
    texts = ((name, text.strip()) for name, text in environ.items())
    return _set((name, match[2] if (match := QUOTED.fullmatch(text)) else text) for name, text in texts)


def _set(texts: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Drop empty values: they mean unset."""
    stripped = ((name, text.strip()) for name, text in texts)
    return {name: text for name, text in stripped if text or name in MAY_BE_BLANK}


def _faults(errors: Sequence[ErrorDetails], said: Mapping[str, str]) -> Iterator[tuple[Variable, str]]:
    """One line for each invalid variable: its name, the value and what is allowed."""
    declared = {(each.goes_to.partition(".")[0], name): each for each in VARIABLES for name in each.names}
    # A default that depends on an invalid field is not computed; that is not a separate fault.
    own = (each for each in errors if each["type"] != "default_factory_not_called")
    for (group, name), found in groupby(own, lambda each: each["loc"][:2]):
        variable = declared[str(group), str(name)]
        causes = (each.get("ctx", {}).get("error") for each in found)
        advice = next((str(cause) for cause in causes if isinstance(cause, Advice)), "")
        why = advice or f"allowed: {variable.allowed.words}"
        yield variable, f"{name}={_shown(variable, said[str(name)])}: {why}"


def _shown(variable: Variable, text: str) -> str:
    """`text` in a form that a fault may show."""
    if variable.allowed.secret:
        return MASK
    text = re.sub(r"^([A-Za-z][A-Za-z0-9+.-]*:/*)?.*@", r"\1***@", text, flags=re.DOTALL)
    text = re.sub(r"\?.*$", "?***", text, flags=re.DOTALL)
    return repr(text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "...")


# The settings in readable form: the configuration without its secrets, and the secrets for the log filter.
#
# Nothing here depends on field names: a secret is whatever is held as SecretStr.

LEAST_CHARACTERS = 16
HTTP_URL = re.compile(r"https?://[^\s,]+")


def describe(settings: Settings) -> dict[str, str]:
    """Every setting as `group.field` -> text, secrets as `***`, unset as an empty text."""
    return {name: text_of(value) for name, value in _flat(settings)}


def secrets_of(settings: Settings) -> tuple[str, ...]:
    """Every text that must never be logged: secrets, passwords in URLs, the parts of a key file."""
    found: dict[str, None] = {}
    for _, value in _flat(settings):
        if isinstance(value, SecretStr) and (secret := value.get_secret_value()):
            found.update(dict.fromkeys((secret, *_inside(secret))))
    return tuple(sorted(found, key=len, reverse=True))


def _flat(settings: Settings) -> Iterator[tuple[str, Any]]:
    for group, held in settings:
        for name, field in type(held).model_fields.items():
            if not field.exclude:
                yield f"{group}.{name}", getattr(held, name)


def _inside(secret: str) -> Iterator[str]:
    scheme, separator, rest = secret.partition("://")
    login, at, _ = rest.rpartition("@")
    if separator and at and scheme.isalnum() and (password := login.partition(":")[2]):
        yield from (password, unquote(password))
    if secret.lstrip().startswith("{"):
        with suppress(ValueError, RecursionError):  # a password may look like the start of a key file
            for text in _strings(json.loads(secret)):
                yield from (line for line in text.splitlines() if len(line) >= LEAST_CHARACTERS and "://" not in line)
    else:
        yield from HTTP_URL.findall(secret)  # HEARTBEAT_URLS is one secret of several URLs


def _strings(node: object) -> Iterator[str]:
    """Key files are small and flat. Each long line may be part of a key, and no log needs any of them."""
    if isinstance(node, str):
        yield node
    elif isinstance(node, dict):
        for each in node.values():
            yield from _strings(each)
    elif isinstance(node, list):
        for each in node:
            yield from _strings(each)


def use_network(settings: Settings) -> None:
    """Configure the proxies and CA_FILE for every library. Raises Permanent when DATA_DIR cannot be written."""
    given, public = settings.network, Path()
    if given.ca_file is not None:
        import certifi  # the default CA bundle of httpx, botocore and httplib2

        public = Path(certifi.where())
    proxies = {
        "HTTPS_PROXY": given.https_proxy.get_secret_value(),
        "HTTP_PROXY": given.http_proxy.get_secret_value(),
        "NO_PROXY": given.no_proxy,
    }
    use(proxies, given.ca_file, public, settings.service.data_dir.absolute() / "ca-bundle.pem")
