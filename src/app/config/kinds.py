"""What a variable may hold: a type that checks and converts its text, and the words that say so to a person.

Invariant: `read` raises ValueError whose text says what is allowed and never holds the value that was refused; the
caller decides how much of that may be shown.
"""

import base64
import binascii
import csv
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, TypeAdapter, ValidationError

from app.config.keys import parse_keys

CONTROL = re.compile(r"[\x00-\x1f\x7f]")
BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,61}[A-Za-z0-9]")
LABEL = r"[A-Za-z0-9_](?:[A-Za-z0-9_-]*[A-Za-z0-9])?"
HOST_NAME = re.compile(rf"(?=.{{1,253}}$){LABEL}(?:\.{LABEL})*")
DATE_DIRECTIVE = re.compile(r"%(.?)")
MAX_PREFIX_BYTES = 512
RECEIVED = (
    "events",
    "sessions_starts",
    "installations",
    "revenue_events",
    "ad_revenue_events",
    "deeplinks",
    "crashes",
    "errors",
    "ecommerce_events",
)
"""Resources of AppMetrica whose rows say when they were received."""
COLUMN_TYPES = {
    "double": "double",
    "float": "double",
    "float64": "double",
    "integer": "integer",
    "int": "integer",
    "int64": "integer",
    "long": "integer",
    "text": "text",
    "string": "text",
    "boolean": "boolean",
    "bool": "boolean",
}
AWS_ENDPOINT = "https://s3.amazonaws.com"


@dataclass(frozen=True, slots=True)
class Kind:
    """`accepts` is a type for pydantic, `allowed` says in words what passes, `empty` stands for an unset variable.

    `secret`: never shown. `obvious`: `allowed` tells a reader of the reference nothing. `may_be_blank`: set to an empty
    string means `empty`, not unset.
    """

    accepts: Any
    allowed: str
    empty: object = None
    secret: bool = False
    obvious: bool = False
    may_be_blank: bool = False

    def read(self, text: str) -> object:
        """The value that `text` stands for. Raises ValueError that does not quote it."""
        try:
            value: object = TypeAdapter(self.accepts).validate_python(text)
        except ValidationError as error:
            own = [
                str(each["ctx"]["error"]) for each in error.errors(include_url=False) if each["type"] == "value_error"
            ]
        else:
            return value
        raise ValueError((own and own[0]) or f"allowed: {self.allowed}")


def whole(low: int, high: int) -> Kind:
    """A whole number from `low` to `high`."""
    return Kind(Annotated[int, Field(ge=low, le=high)], f"a whole number from {low} to {high}")


def seconds(low: float, high: float) -> Kind:
    """A number of seconds, fractions allowed."""
    accepts = Annotated[float, Field(ge=low, le=high, allow_inf_nan=False)]
    return Kind(accepts, f"a number from {low:g} to {high:g}")


def one_of(*words: str) -> Kind:
    """Exactly one of `words`, in lower case whatever case it was written in."""
    return Kind(Annotated[Literal[words], BeforeValidator(str.lower)], f"one of {', '.join(words)}")


def _plain(text: str) -> str:
    if CONTROL.search(text):
        raise ValueError("holds a control character: remove it")
    return text


def _level(text: str) -> str:
    return {"WARN": "WARNING", "FATAL": "CRITICAL"}.get(text.upper(), text.upper())


def _url(text: str) -> str:
    text = _plain(text).rstrip("/")
    try:
        parts = urlsplit(text)
        known = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        known = False
    if not known or re.search(r"\s", text):
        raise ValueError
    if parts.username is not None or parts.password is not None:
        raise ValueError("user and password do not belong into a URL: take them out and use the variables for them")
    if parts.query or parts.fragment:
        raise ValueError("a query or a fragment does not belong here: end the URL before ? or #")
    return text


def _endpoint(text: str) -> str:
    # Named outright, the global endpoint pins every region to us-east-1; without it the SDK takes the region's own.
    url = _url(text)
    return "" if url.lower() == AWS_ENDPOINT else url


def _called(text: str) -> str:
    """An address that is called as it stands, query and all."""
    return text if _url(_plain(text).partition("?")[0]) and not re.search(r"[\s#]", text) else _url("")


def _pairs(text: str) -> list[tuple[str, str]]:
    """`job=value` by commas."""
    pairs = [part.partition("=") for part in _list(text)]
    if not all(re.fullmatch(r"\w{1,80}", name) and value for name, _, value in pairs):
        raise ValueError
    return [(name, value.strip()) for name, _, value in pairs]


def _job_urls(text: str) -> str:
    return ",".join(f"{name}={_called(value)}" for name, value in _pairs(text))


def _job_seconds(text: str) -> list[tuple[str, int]]:
    pairs = [(name, int(value)) for name, value in _pairs(text)]
    if any(value <= 0 for _, value in pairs):
        raise ValueError
    return pairs


def _database_url(text: str) -> str:
    """`postgresql://...`; the spellings of other tools (`postgres://`, `postgresql+driver://`) mean the same."""
    text = re.sub(r"^postgres(ql)?(\+\w+)?://", "postgresql://", _plain(text))
    try:
        parts = urlsplit(text)
        known = parts.scheme == "postgresql" and len(parts.path) > 1 and (parts.port is None or parts.port > 0)
    except ValueError:
        known = False
    if "@" in text.partition("://")[2].partition("?")[0].partition("/")[2]:
        raise ValueError("a / stands before the @: percent-encode it in the password as %2F")
    if not known:
        raise ValueError
    return text


def _warehouse_url(text: str) -> str:
    text = re.sub(r"^sqlite\+\w+://", "sqlite://", text)
    if text.startswith("sqlite:///") and len(text) > len("sqlite:///"):
        return _plain(text)
    return _database_url(text)


def _host(text: str) -> str:
    try:
        return str(ip_address(text.strip("[]")))
    except ValueError:
        if HOST_NAME.fullmatch(text):
            return text
    raise ValueError


def _database_host(text: str) -> str:
    return _plain(text) if text.startswith("/") else _host(text)


def _bucket(text: str) -> str:
    if not BUCKET.fullmatch(text) or ".." in text:
        raise ValueError
    return text


def _prefix(text: str) -> str:
    text = _plain(text).strip("/")
    if any(segment in ("", ".", "..") for segment in text.split("/")) or len(text.encode()) > MAX_PREFIX_BYTES:
        raise ValueError
    return text


def _file_stem(text: str) -> str:
    if "/" in _plain(text) or "\\" in text or text in (".", "..") or len(text.encode()) > 200:  # noqa: PLR2004 - leaves room for the rest of a 255-byte name
        raise ValueError
    return text


def _date_format(text: str) -> str:
    """Directives of fixed width only, so that the days of a device never share a name and sort as they follow."""
    directives = DATE_DIRECTIVE.findall(text)
    named = {"Y", "m", "d"} <= set(directives) or {"Y", "j"} <= set(directives)
    literal = DATE_DIRECTIVE.sub("0", text)
    plain = re.fullmatch(r"[A-Za-z0-9=._/-]+", literal) and not set(directives) - set("Ymdj")
    if not named or not plain or any(segment in ("", ".", "..") for segment in literal.split("/")):
        raise ValueError
    return text


def _instant(text: str) -> datetime:
    try:
        at = datetime.fromisoformat(text)
        return at.replace(tzinfo=UTC) if at.tzinfo is None else at.astimezone(UTC)
    except (ValueError, OverflowError):
        raise ValueError from None


def _list(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _device_ids(text: str) -> tuple[str, ...]:
    """`*` anywhere means discovery; an id that holds a comma is quoted as in CSV.

    An id that cannot be a key is taken here: it is refused alone, device by device.
    """
    try:
        parts = next(csv.reader([text], skipinitialspace=True, strict=True), [])
    except csv.Error:
        raise ValueError from None
    ids = tuple(dict.fromkeys(part.strip() for part in parts if part.strip()))
    return () if "*" in ids else ids


def _column_types(text: str) -> list[tuple[str, str]]:
    """`count=double,state=text`: pairs of column name and type."""
    pairs = []
    for part in _list(text):
        name, equals, kind = part.rpartition("=")
        if not equals or not name.strip() or kind.strip().lower() not in COLUMN_TYPES:
            raise ValueError
        pairs.append((name.strip(), COLUMN_TYPES[kind.strip().lower()]))
    return pairs


def _origin(text: str) -> str:
    if text != "*" and not re.fullmatch(r"https?://[^/\s@?#]+", text):
        raise ValueError
    return text


def _log_file(text: str) -> Path | None:
    return None if text.lower() in ("off", "none") else Path(text)


def _json_object(text: str) -> str:
    """The JSON text of a key file, also when it came as base64."""
    if not text.lstrip().startswith("{"):
        try:
            text = base64.b64decode(text, validate=True).decode()
        except (binascii.Error, UnicodeDecodeError):
            raise ValueError from None
    try:
        is_object = isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        is_object = False
    if not is_object:
        raise ValueError
    return text


def _timezone(text: str) -> str:
    try:
        return ZoneInfo(text).key
    except (ZoneInfoNotFoundError, ValueError):
        raise ValueError from None


def _resources(text: str) -> list[str]:
    found = list(dict.fromkeys(_list(text.lower())))
    if set(found) - set(RECEIVED):
        raise ValueError
    return found


def _secret(check: Callable[[str], str]) -> Any:
    return Annotated[SecretStr, BeforeValidator(check)]


def _texts(check: Callable[[str], str]) -> Any:
    return Annotated[tuple[Annotated[str, AfterValidator(check)], ...], BeforeValidator(_list)]


def _split(convert: Callable[[str], Sequence[object]]) -> Any:
    return Annotated[tuple[Any, ...], BeforeValidator(convert)]


TEXT = Kind(Annotated[str, AfterValidator(_plain)], "text without control characters", "", obvious=True)
SECRET = Kind(_secret(_plain), "text without control characters", SecretStr(""), secret=True, obvious=True)
SECRET_OR_NONE = Kind(_secret(_plain), "text without control characters", None, secret=True, obvious=True)
FLAG = Kind(bool, "true or false", obvious=True)
PATH = Kind(Annotated[Path, BeforeValidator(_plain)], "a path", obvious=True)
LOG_FILE = Kind(Annotated[Any, BeforeValidator(_plain), AfterValidator(_log_file)], "a path, or off", obvious=True)
LOG_LEVEL = Kind(
    Annotated[Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"], BeforeValidator(_level)],
    "one of DEBUG, INFO, WARNING, ERROR, CRITICAL",
)
HOST = Kind(Annotated[str, AfterValidator(_host)], "an IP address or a host name, such as 127.0.0.1 or 0.0.0.0")
DATABASE_HOST = Kind(Annotated[str, AfterValidator(_database_host)], "a host, or the folder of a socket", "")
HTTP_URL = Kind(Annotated[str, AfterValidator(_url)], "http://host[:port] or https://host[:port]", "")
ENDPOINT = Kind(Annotated[str, AfterValidator(_endpoint)], HTTP_URL.allowed, "")
POSTGRES_URL = Kind(_secret(_database_url), "postgresql://user:password@host:port/name", SecretStr(""), secret=True)
WAREHOUSE_URL = Kind(
    _secret(_warehouse_url),
    "sqlite:///path or postgresql://user:password@host:port/name",
    SecretStr(""),
    secret=True,
)
BUCKET_NAME = Kind(
    Annotated[str, AfterValidator(_bucket)],
    "3 to 63 letters, digits, dots, dashes and underscores: the bare name, without s3:// and without a path",
    "",
)
PREFIX = Kind(Annotated[str, AfterValidator(_prefix)], "names between single slashes, without '.' and '..'", "")
PREFIXES = Kind(_split(lambda text: [_prefix(part) + "/" for part in _list(text)]), PREFIX.allowed + ", by commas", ())
FILE_STEM = Kind(
    Annotated[str, AfterValidator(_file_stem)], "the start of a file name, without a slash", "", obvious=True
)
DATE_FORMAT = Kind(
    Annotated[str, AfterValidator(_date_format)],
    "%Y with %m and %d, or %Y with %j, and letters, digits, = . _ - and single slashes between them",
    "",
)
INSTANT = Kind(Annotated[Any, AfterValidator(_instant)], "an ISO 8601 date or instant, such as 2026-02-07T00:00:00Z")
DEVICE_IDS = Kind(
    _split(_device_ids), "comma-separated device ids, one with a comma in double quotes; or *", (), obvious=True
)
COLUMN_TYPES_KIND = Kind(
    _split(_column_types), "comma-separated name=type, with one of the types double, integer, text, boolean", ()
)
LIST = Kind(_texts(_plain), "values by commas", (), obvious=True)
LIST_OR_BLANK = Kind(_texts(_plain), "comma-separated values, or empty", (), obvious=True, may_be_blank=True)
UNIT_OR_NONE = Kind(Annotated[Literal["us", "ns"], BeforeValidator(str.lower)], "us or ns")
ORIGINS = Kind(_texts(_origin), "origins such as https://example.org by commas, or *", ())
APPMETRICA_RESOURCES = Kind(_split(_resources), f"some of {', '.join(RECEIVED)}, by commas", ())
TIMEZONE = Kind(Annotated[str, AfterValidator(_timezone)], "a name of the IANA time zone database", "")
API_KEYS = Kind(
    _split(parse_keys), "lines of `python -m app keys new`, by commas or newlines", (), secret=True, obvious=True
)
SECRET_URL = Kind(_secret(_called), "https://host/path", SecretStr(""), secret=True)
JOB_URLS = Kind(_secret(_job_urls), "job=https://host/path, by commas", SecretStr(""), secret=True)
JOB_SECONDS = Kind(_split(_job_seconds), "job=seconds, by commas", ())
CREDENTIALS_JSON = Kind(
    _secret(_json_object), "the JSON text of the key file, as it is or as base64", None, secret=True
)
