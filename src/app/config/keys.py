"""The text of API_KEYS: `name[@expiry]:scopes[:s3-prefix]:sha256hex`, entries separated by commas or newlines.

Invariants: only the SHA-256 of a key is ever configured; a fault names an entry by its place and never quotes it, since
somebody may have put the key itself there.
"""

import re
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

SCOPES = (
    "dwh:read",
    "dwh:write",
    "s3:read",
    "s3:write",
    "s3:delete",
    "analytics:read",
    "pull:read",
    "ops:read",
    "ops:run",
)
GROUPS = {
    "read": frozenset(scope for scope in SCOPES if scope.endswith(":read")),
    "write": frozenset(SCOPES) - {"ops:run"},
    "admin": frozenset(SCOPES),
}
KEYS_PER_NAME = 2
NAME = re.compile(r"[a-z0-9](?:[a-z0-9_-]{0,38}[a-z0-9])?")
DIGEST = re.compile(r"[0-9a-fA-F]{64}")


@dataclass(frozen=True, slots=True)
class KeyEntry:
    """One configured key. `scopes` are single scopes, groups opened; `expires_at` is the first instant it is dead.

    `s3_prefix` confines the S3 scopes to keys that start with it; "" = all. It ends with a slash, so that `a` does not
    open `ab/`.
    """

    name: str
    scopes: frozenset[str]
    s3_prefix: str
    digest: bytes = field(repr=False)
    expires_at: datetime | None = None


def parse_keys(text: str) -> tuple[KeyEntry, ...]:
    """Every entry of `text`. Raises ValueError that says which entry is wrong and why, without quoting it."""
    entries = [part.strip() for part in re.split(r"[,\n]", text)]
    parsed = tuple(_entry(part, place) for place, part in enumerate(filter(None, entries), start=1))
    names = [entry.name for entry in parsed]
    for name in dict.fromkeys(names):
        if names.count(name) > KEYS_PER_NAME:
            raise ValueError(f"{name} has {names.count(name)} keys, at most {KEYS_PER_NAME} may live at once")
    if len({entry.digest for entry in parsed}) < len(parsed):
        raise ValueError("two entries have the same hash")
    return parsed


def parse_scopes(text: str) -> frozenset[str]:
    """Scopes and groups joined by `+` or blanks, groups opened. Raises ValueError."""
    opened: set[str] = set()
    for word in re.split(r"[+\s]+", text.strip()):
        if word not in SCOPES and word not in GROUPS:
            raise ValueError(f"a scope is not one of {', '.join((*GROUPS, *SCOPES))}")
        opened |= GROUPS.get(word, {word})
    return frozenset(opened)


def _entry(text: str, place: int) -> KeyEntry:
    try:
        return _parts(text)
    except ValueError as error:
        raise ValueError(f"entry {place}: {error}") from None


def _parts(text: str) -> KeyEntry:
    head, separator, rest = text.partition(":")
    body, colon, digest = rest.rpartition(":")
    name, at, expiry = head.partition("@")
    if not separator or not colon:
        raise ValueError("is not name:scopes:sha256hex or name:scopes:s3-prefix:sha256hex")
    if not NAME.fullmatch(name):
        raise ValueError("the name is not 1 to 40 of a-z, 0-9, - and _")
    if not DIGEST.fullmatch(digest):
        raise ValueError("the last part is not a SHA-256 in 64 hexadecimal digits")
    scopes, prefix = _split_prefix(body)
    return KeyEntry(name, parse_scopes(scopes), prefix, bytes.fromhex(digest), _expiry(expiry) if at else None)


def _split_prefix(body: str) -> tuple[str, str]:
    """Scopes hold colons themselves, so the prefix is what follows the longest run of known scopes."""
    match = re.match(rf"(?:{'|'.join((*SCOPES, *GROUPS))})(?:[+\s]+(?:{'|'.join((*SCOPES, *GROUPS))}))*(?=:|$)", body)
    if match is None:
        return body, ""
    prefix = body[match.end() + 1 :]
    if ".." in prefix.split("/") or prefix.startswith("/") or not prefix.isprintable():
        raise ValueError("the S3 prefix has a '..' segment, a leading slash or a control character")
    return match.group(), prefix if not prefix or prefix.endswith("/") else prefix + "/"


def _expiry(text: str) -> datetime:
    """The end of the named day, UTC: a key is good through the date written on it."""
    try:
        return datetime.strptime(text, "%Y-%m-%d").replace(tzinfo=UTC) + timedelta(days=1)
    except (ValueError, OverflowError):
        raise ValueError("the expiry after @ is not a date YYYY-MM-DD") from None
