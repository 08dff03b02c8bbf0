"""API keys: making them, and telling who presents one.

Invariants: the key itself is never kept, only its SHA-256, which is enough for 256 random bits and too quick to be a
lever for attackers; compares take constant time, and an unknown name costs one as well.
"""

import hashlib
import hmac
import re
from base64 import urlsafe_b64encode
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import date, datetime

from app.config.keys import NAME, KeyEntry, parse_keys
from app.config.rules import loopback
from app.core.errors import Rejected

__all__ = ["Grant", "KeyEntry", "Keyring", "loopback", "new_key"]

KEY_BYTES = 32
MAX_PRESENTED_CHARACTERS = 128
PRESENTED = re.compile(r"hw_([a-z0-9_-]{1,40})_[A-Za-z0-9_-]{43}")
NOBODY = KeyEntry("", frozenset(), "", bytes(hashlib.sha256().digest_size))


@dataclass(frozen=True, slots=True)
class Grant:
    """Who calls and what they may do. S3 scopes reach only keys that start with `s3_prefix`; "" = all."""

    name: str
    scopes: frozenset[str]
    s3_prefix: str = ""

    def allows(self, scope: str) -> bool:
        """True when exactly this scope was granted; groups were opened when the key was read."""
        return scope in self.scopes


class Keyring:
    """The configured keys, `settings.access.api_keys`. False when there is none. Safe to use from any thread."""

    def __init__(self, entries: Iterable[KeyEntry], clock: Callable[[], datetime]) -> None:
        self._clock = clock
        self._by_name: dict[str, list[KeyEntry]] = {}
        for entry in entries:
            self._by_name.setdefault(entry.name, []).append(entry)

    def __bool__(self) -> bool:
        return bool(self._by_name)

    def authenticate(self, presented: str) -> Grant | None:
        """The grant of the key that is `presented` and not expired; None for anything else, whatever it is."""
        match = PRESENTED.fullmatch(presented[: MAX_PRESENTED_CHARACTERS + 1])
        entries = self._by_name.get(match[1], []) if match else []
        digest = _digest(presented if match else "")
        grant = None
        for entry in entries or [NOBODY]:
            if hmac.compare_digest(digest, entry.digest) and self._alive(entry):
                grant = Grant(entry.name, entry.scopes, entry.s3_prefix)
        return grant

    def _alive(self, entry: KeyEntry) -> bool:
        return entry.expires_at is None or self._clock() < entry.expires_at


def new_key(
    name: str,
    scopes: str,
    randomness: Callable[[int], bytes],
    *,
    s3_prefix: str = "",
    expires_on: date | None = None,
) -> tuple[str, str]:
    """The secret, to be shown once, and the line for API_KEYS. Raises Rejected when no such key can be.

    `scopes`: scopes and groups by commas, blanks or `+`. `randomness(n)` gives n bytes: `secrets.token_bytes`.
    `expires_on` is the last day, UTC, on which the key is good.
    """
    secret = f"hw_{name}_{urlsafe_b64encode(randomness(KEY_BYTES)).rstrip(b'=').decode()}"
    head = f"{name}@{expires_on.isoformat()}" if expires_on else name
    granted = "+".join(re.split(r"[+,\s]+", scopes.strip()))
    line = ":".join(filter(None, (head, granted, s3_prefix, _digest(secret).hex())))
    reason = "the name is not 1 to 40 of a-z, 0-9, - and _" if not NAME.fullmatch(name) else ""
    if re.search(r"[,\n]", s3_prefix):
        reason = "the S3 prefix holds a comma or a newline, which end an entry of API_KEYS"
    try:
        parse_keys("" if reason else line)
    except ValueError as error:
        reason = str(error).removeprefix("entry 1: ")
    if reason:
        raise Rejected(f"no key for {name!r}: {reason}", "see `python -m app keys new --help`")
    return secret, line


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode()).digest()
