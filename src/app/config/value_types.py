"""What the settings groups are made of: the base class, how a variable is declared, and the types of variables, which
pydantic validates and converts. Each type describes in words what it allows.

Invariant: a validator raises Advice with a text that says what is allowed and never contains the invalid value; for any
other ValueError, the words of the type are used.
"""

import base64
import csv
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from importlib.metadata import PackageNotFoundError, version
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import quote, urlsplit
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    SecretStr,
    ValidatorFunctionWrapHandler,
    field_validator,
)

from app.config import NEW_KEY
from app.core.windows import utc_instant

COMMENT = re.compile(r"\s+#.*$", re.DOTALL)
CONTROL = re.compile(r"[\x00-\x1f\x7f]")
BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,61}[A-Za-z0-9]")
LABEL = r"[A-Za-z0-9_](?:[A-Za-z0-9_-]*[A-Za-z0-9])?"
HOST_NAME = re.compile(rf"(?=.{{1,253}}$){LABEL}(?:\.{LABEL})*")
DATE_DIRECTIVE = re.compile(r"%(.?)")
MAX_PREFIX_BYTES = 512
MAX_FILE_STEM_BYTES = 200  # leaves room for the rest of a 255-byte name
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
"""AppMetrica resources whose rows have a time of receipt."""
SPELLINGS = {
    "double": ("double", "float", "float64"),
    "integer": ("integer", "int", "int64", "long"),
    "text": ("text", "string"),
    "boolean": ("boolean", "bool"),
}
COLUMN_TYPES = {spelling: kind for kind, spellings in SPELLINGS.items() for spelling in spellings}
STORAGE_CLASSES = ("STANDARD", "STANDARD_IA", "ONEZONE_IA", "INTELLIGENT_TIERING", "GLACIER_IR")
AWS_ENDPOINT = "https://s3.amazonaws.com"


@dataclass(frozen=True, slots=True)
class Allowed:
    """What a type allows, in words. `obvious`: the reference leaves them out. `secret`: the value is never shown."""

    words: str
    obvious: bool = False
    secret: bool = False


def variable(names: str, *, default: object, unset: str = "", shown: str | None = None, **limits: Any) -> Any:
    """A field of a group, set by the first of `names` that is present; the string below the field documents it.

    `default` may be a function of the fields above it. `unset` describes what happens without a value, where the
    default does not show it; `shown` is the readable form of the default, where it differs from its text.
    """
    given = {"default_factory": default} if callable(default) else {"default": default}
    return Field(
        **given,
        validation_alias=AliasChoices(*names.split()),
        json_schema_extra={"unset": unset, "shown": shown},
        **limits,
    )


class SettingsGroup(BaseModel):
    """The settings of one part, named by the `title` of its class. It is given every variable and picks its own."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False, defer_build=True, hide_input_in_errors=True)

    @field_validator("*", mode="wrap")
    @classmethod
    def _read(cls, text: Any, read: ValidatorFunctionWrapHandler) -> Any:
        """Strip a trailing comment, which `docker run --env-file` passes on with the value, if the value is invalid
        with it.
        """
        try:
            return read(text)
        except ValueError:
            bare = COMMENT.sub("", text)
            if bare in ("", text):
                raise
        return read(bare)


class Advice(ValueError):
    """What is wrong with a value, in words that do not contain it."""


def _plain(text: str) -> str:
    if CONTROL.search(text):
        raise Advice("holds a control character: remove it")
    return text


def _level(text: str) -> str:
    return {"WARN": "WARNING", "FATAL": "CRITICAL"}.get(text.upper(), text.upper())


def _url(text: str) -> str:
    text = _plain(text).rstrip("/")
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0 or re.search(r"\s", text):
        raise ValueError
    if parts.username is not None or parts.password is not None:
        raise Advice("a URL must not contain a user or password: use the variables for them")
    if parts.query or parts.fragment:
        raise Advice("a query or fragment is not allowed here: end the URL before ? or #")
    return text


def _endpoint(text: str) -> str:
    # An explicit global endpoint pins every region to us-east-1; without it the SDK uses the region's own.
    url = _url(text)
    return "" if url.lower() == AWS_ENDPOINT else url


def _called(text: str) -> str:
    """A URL that is called unchanged, including its query."""
    _url(_plain(text).partition("?")[0])
    if re.search(r"[\s#]", text):
        raise ValueError
    return text


def _pairs(text: str) -> list[tuple[str, str]]:
    """`job=value`, comma-separated."""
    pairs = [part.partition("=") for part in _parts(text)]
    if not all(re.fullmatch(r"\w{1,80}", name) and value for name, _, value in pairs):
        raise ValueError
    return [(name, value.strip()) for name, _, value in pairs]


def _job_urls(text: str) -> str:
    return ",".join(f"{name}={_called(value)}" for name, value in _pairs(text))


def _database_url(text: str) -> str:
    """`postgresql://...`; the schemes of other tools (`postgres://`, `postgresql+driver://`) are accepted too."""
    text = re.sub(r"^postgres(ql)?(\+\w+)?://", "postgresql://", _plain(text))
    if "@" in text.partition("://")[2].partition("?")[0].partition("/")[2]:
        raise Advice("a / stands before the @: percent-encode it in the password as %2F")
    parts = urlsplit(text)
    if parts.scheme != "postgresql" or len(parts.path) <= 1 or parts.port == 0:
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
    if "/" in _plain(text) or "\\" in text or text in (".", "..") or len(text.encode()) > MAX_FILE_STEM_BYTES:
        raise ValueError
    return text


def _date_format(text: str) -> str:
    """Only fixed-width directives, so that the days of a device have distinct names that sort in order."""
    directives = DATE_DIRECTIVE.findall(text)
    named = {"Y", "m", "d"} <= set(directives) or {"Y", "j"} <= set(directives)
    literal = DATE_DIRECTIVE.sub("0", text)
    plain = re.fullmatch(r"[A-Za-z0-9=._/-]+", literal) and not set(directives) - set("Ymdj")
    if not named or not plain or any(segment in ("", ".", "..") for segment in literal.split("/")):
        raise ValueError
    return text


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _device_ids(text: str) -> tuple[str, ...]:
    """`*` anywhere means discovery; an id that contains a comma is quoted as in CSV.

    An id that cannot be a key is accepted here: the export rejects it, for that device only.
    """
    try:
        parts = next(csv.reader([text], skipinitialspace=True, strict=True), [])
    except csv.Error:
        raise ValueError from None
    ids = tuple(dict.fromkeys(part.strip() for part in parts if part.strip()))
    return () if "*" in ids else ids


def _column_types(text: str) -> tuple[tuple[str, str], ...]:
    """`count=double,state=text`: pairs of column name and type."""
    pairs = []
    for part in _parts(text):
        name, equals, kind = part.rpartition("=")
        if not equals or not name.strip() or kind.strip().lower() not in COLUMN_TYPES:
            raise ValueError
        pairs.append((name.strip(), COLUMN_TYPES[kind.strip().lower()]))
    return tuple(pairs)


def _origin(text: str) -> str:
    """An origin in the form that browsers send: lower case, without the scheme's default port."""
    if text != "*" and not re.fullmatch(r"(?i:https?)://[^/\s@?#]+", text):
        raise ValueError
    text = text.lower()
    return text.removesuffix(":443" if text.startswith("https:") else ":80")


def _log_file(text: str) -> Path | None:
    return None if _plain(text).lower() in ("off", "none") else Path(text)


def _ca_file(text: str) -> Path | None:
    try:
        if b"-----BEGIN CERTIFICATE-----" in Path(_plain(text)).read_bytes():
            return Path(text).absolute()
    except OSError:
        pass
    raise ValueError


def _json_object(text: str) -> str:
    """The JSON text of a key file, decoded if it is base64."""
    if not text.lstrip().startswith("{"):
        text = base64.b64decode(text, validate=True).decode()
    try:
        is_object = isinstance(json.loads(text), dict)
    except RecursionError:
        is_object = False
    if not is_object:
        raise ValueError
    return text


def _timezone(text: str) -> str:
    try:
        return ZoneInfo(text).key
    except (ZoneInfoNotFoundError, OSError) as error:
        raise ValueError from error


def _resources(text: str) -> tuple[str, ...]:
    found = tuple(dict.fromkeys(_parts(text.lower())))
    if set(found) - set(RECEIVED):
        raise ValueError
    return found


def _each(check: Callable[[str], str]) -> BeforeValidator:
    """Comma-separated values, each validated by `check`."""
    return BeforeValidator(lambda text: tuple(check(part) for part in _parts(text)))


# API_KEYS: `name[@expiry]:scopes[:s3-prefix]:sha256hex`, entries separated by commas or newlines.
#
# Only the SHA-256 of a key is ever configured. A fault refers to an entry by its position and never quotes it, since
# somebody may have put the key itself there.

SCOPES = (
    "dwh:read",
    "dwh:write",
    "dwh:delete",
    "s3:read",
    "s3:write",
    "s3:delete",
    "analytics:read",
    "analytics:sql",
    "pull:read",
    "ops:read",
    "ops:run",
)
GROUPS = {
    "read": frozenset(scope for scope in SCOPES if scope.endswith(":read")),
    "write": frozenset(SCOPES) - {"ops:run", "dwh:delete", "analytics:sql"},
    "admin": frozenset(SCOPES),
}
KEYS_PER_NAME = 2
KEY_NAME = re.compile(r"[a-z0-9](?:[a-z0-9_-]{0,38}[a-z0-9])?")
DIGEST = re.compile(r"[0-9a-fA-F]{64}")


@dataclass(frozen=True, slots=True)
class KeyEntry:
    """One configured key. `scopes` are single scopes, groups expanded; at `expires_at` the key is no longer valid.

    `s3_prefix` restricts the S3 scopes to object keys that start with it; "" = all. It ends with a slash, so that `a`
    does not open `ab/`.
    """

    name: str
    scopes: frozenset[str]
    s3_prefix: str
    digest: bytes = field(repr=False)
    expires_at: datetime | None = None


def parse_keys(text: str) -> tuple[KeyEntry, ...]:
    """Every entry of `text`. Raises ValueError that says which entry is invalid and why, without quoting it."""
    parsed: list[KeyEntry] = []
    for part in filter(None, (each.strip() for each in re.split(r"[,\n]", text))):
        try:
            parsed.append(_key_entry(part))
        except ValueError as error:
            raise Advice(f"entry {len(parsed) + 1}: {error}") from None
    names = [entry.name for entry in parsed]
    for name in dict.fromkeys(names):
        if names.count(name) > KEYS_PER_NAME:
            raise Advice(f"{name} has {names.count(name)} keys, at most {KEYS_PER_NAME} may live at once")
    if len({entry.digest for entry in parsed}) < len(parsed):
        raise Advice("two entries have the same hash")
    return tuple(parsed)


def parse_scopes(text: str) -> frozenset[str]:
    """Scopes and groups joined by `+` or blanks, groups expanded. Raises ValueError."""
    opened: set[str] = set()
    for word in re.split(r"[+\s]+", text.strip()):
        if word not in SCOPES and word not in GROUPS:
            raise Advice(f"a scope is not one of {', '.join((*GROUPS, *SCOPES))}")
        opened |= GROUPS.get(word, {word})
    return frozenset(opened)


def _key_entry(text: str) -> KeyEntry:
    head, separator, rest = text.partition(":")
    body, colon, digest = rest.rpartition(":")
    name, at, expiry = head.partition("@")
    if not separator or not colon:
        raise Advice(f"is not name:scopes:sha256hex or name:scopes:s3-prefix:sha256hex, as `{NEW_KEY}` prints it")
    if not KEY_NAME.fullmatch(name):
        raise Advice("the name is not 1 to 40 of a-z, 0-9, - and _")
    if not DIGEST.fullmatch(digest):
        raise Advice("the last part is not a SHA-256 in 64 hexadecimal digits")
    scopes, prefix = _split_prefix(body)
    return KeyEntry(name, parse_scopes(scopes), prefix, bytes.fromhex(digest), _expiry(expiry) if at else None)


def _split_prefix(body: str) -> tuple[str, str]:
    """Scopes contain colons themselves, so the prefix is what follows the longest run of known scopes."""
    match = re.match(rf"(?:{'|'.join((*SCOPES, *GROUPS))})(?:[+\s]+(?:{'|'.join((*SCOPES, *GROUPS))}))*(?=:|$)", body)
    if match is None:
        return body, ""
    prefix = body[match.end() + 1 :]
    if ".." in prefix.split("/") or prefix.startswith("/") or not prefix.isprintable():
        raise Advice("the S3 prefix has a '..' segment, a leading slash or a control character")
    return match.group(), prefix if not prefix or prefix.endswith("/") else prefix + "/"


def _expiry(text: str) -> datetime:
    """The end of the given day, UTC: a key is valid through its expiry date."""
    try:
        return datetime.strptime(text, "%Y-%m-%d").replace(tzinfo=UTC) + timedelta(days=1)
    except (ValueError, OverflowError):
        raise Advice("the expiry after @ is not a date YYYY-MM-DD") from None


PLAIN = Allowed("text without control characters", obvious=True)
HIDDEN = Allowed(PLAIN.words, obvious=True, secret=True)
HTTP = Allowed("http://host[:port] or https://host[:port]")
PREFIX = Allowed("names between single slashes, without '.' and '..'")


def _storage_class(text: str) -> str:
    name = text.upper()
    if name in ("GLACIER", "DEEP_ARCHIVE"):
        raise Advice("archived objects cannot be read until somebody restores them; GLACIER_IR can")
    if name not in STORAGE_CLASSES:
        raise ValueError
    return name


LOWER_CASE = BeforeValidator(str.lower)
StorageClass = Annotated[str, AfterValidator(_storage_class), Allowed(", ".join(STORAGE_CLASSES))]
Text = Annotated[str, AfterValidator(_plain), PLAIN]
Secret = Annotated[SecretStr, BeforeValidator(_plain), HIDDEN]
OptionalSecret = Annotated[SecretStr | None, BeforeValidator(_plain), HIDDEN]
Flag = Annotated[bool, Allowed("true or false", obvious=True)]
Folder = Annotated[Path, BeforeValidator(_plain), Allowed("a path", obvious=True)]
OptionalPath = Annotated[Path | None, BeforeValidator(_plain), Allowed("a path", obvious=True)]
LogFile = Annotated[Path | None, PlainValidator(_log_file), Allowed("a path, or off", obvious=True)]
CaFile = Annotated[
    Path | None, PlainValidator(_ca_file), Allowed("the path of a readable file with certificates in PEM")
]
LogLevel = Annotated[Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"], BeforeValidator(_level)]
Interval = Annotated[int, Field(ge=1, le=86_400)]
Host = Annotated[str, AfterValidator(_host), Allowed("an IP address or a host name, such as 127.0.0.1 or 0.0.0.0")]
DatabaseHost = Annotated[str, AfterValidator(_database_host), Allowed("a host, or the directory of a socket")]
HttpUrl = Annotated[str, AfterValidator(_url), HTTP]
S3Endpoint = Annotated[str, AfterValidator(_endpoint), HTTP]
PostgresUrl = Annotated[
    SecretStr, BeforeValidator(_database_url), Allowed("postgresql://user:password@host:port/name", secret=True)
]
WarehouseUrl = Annotated[
    SecretStr,
    BeforeValidator(_warehouse_url),
    Allowed("sqlite:///path or postgresql://user:password@host:port/name", secret=True),
]
BucketName = Annotated[
    str,
    AfterValidator(_bucket),
    Allowed("3 to 63 letters, digits, dots, dashes and underscores: the bare name, without s3:// and without a path"),
]
Prefix = Annotated[str, AfterValidator(_prefix), PREFIX]
Prefixes = Annotated[
    tuple[str, ...], _each(lambda part: _prefix(part) + "/"), Allowed(f"{PREFIX.words}, comma-separated")
]
FileStem = Annotated[
    str, AfterValidator(_file_stem), Allowed("the start of a file name, without a slash", obvious=True)
]
DateFormat = Annotated[
    str,
    AfterValidator(_date_format),
    Allowed("%Y with %m and %d, or %Y with %j, and letters, digits, = . _ - and single slashes between them"),
]
Instant = Annotated[
    datetime | None,
    PlainValidator(utc_instant),
    Allowed("an ISO 8601 date or timestamp, such as 2026-02-07T00:00:00Z"),
]
DeviceIds = Annotated[
    tuple[str, ...],
    PlainValidator(_device_ids),
    Allowed("comma-separated device ids, one with a comma in double quotes; or *", obvious=True),
]
ColumnTypes = Annotated[
    tuple[tuple[str, str], ...],
    PlainValidator(_column_types),
    Allowed("comma-separated name=type, with one of the types double, integer, text, boolean"),
]
Texts = Annotated[tuple[str, ...], _each(_plain), Allowed("comma-separated values", obvious=True)]
Origins = Annotated[
    tuple[str, ...], _each(_origin), Allowed("comma-separated origins such as https://example.org, or *")
]
Resources = Annotated[
    tuple[str, ...], PlainValidator(_resources), Allowed(f"some of {', '.join(RECEIVED)}, comma-separated")
]
TimeZone = Annotated[str, AfterValidator(_timezone), Allowed("a name of the IANA time zone database")]
ApiKeys = Annotated[
    tuple[KeyEntry, ...],
    PlainValidator(parse_keys),
    Allowed(
        f"lines that `{NEW_KEY}` prints, separated by commas or newlines",
        obvious=True,
        secret=True,
    ),
]
SecretUrl = Annotated[SecretStr, BeforeValidator(_called), Allowed("https://host/path", secret=True)]
JobUrls = Annotated[
    SecretStr, BeforeValidator(_job_urls), Allowed("job=https://host/path, comma-separated", secret=True)
]
JobSeconds = Annotated[
    tuple[tuple[str, Annotated[int, Field(gt=0)]], ...],
    BeforeValidator(_pairs),
    Allowed("job=seconds, comma-separated"),
]
KeyFileText = Annotated[
    SecretStr | None,
    BeforeValidator(_json_object),
    Allowed("the JSON text of the key file, as it is or as base64", secret=True),
]


NO_SECRET = SecretStr("")


def installed_version() -> str:
    """The version of this package; "unknown" in a checkout that was never installed."""
    try:
        return version("headwater")
    except PackageNotFoundError:
        return "unknown"


def checkpoint_url(parts: Mapping[str, Any]) -> SecretStr:
    """CHECKPOINT_DB_* as one URL, each part percent-encoded; "" without a host.

    libpq takes a percent-encoded path in place of the host as the directory of a Unix socket.
    """
    host = parts.get("host")
    if not host:
        return NO_SECRET
    texts = (parts.get("user", ""), parts.get("password", NO_SECRET).get_secret_value(), parts.get("database", ""))
    user, password, database = (quote(text, safe="", errors="surrogateescape") for text in texts)
    login = user + (f":{password}" if password else "")
    address = f"[{host}]" if ":" in host else quote(host, safe="", errors="surrogateescape")
    mode = f"?sslmode={parts['sslmode']}" if parts.get("sslmode") else ""
    return SecretStr(f"postgresql://{login}{'@' if login else ''}{address}:{parts.get('port')}/{database}{mode}")
