"""API keys, and who may call which route."""

import asyncio
import hashlib
import hmac
import math
import re
from base64 import urlsafe_b64encode
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta
from http.cookies import CookieError, SimpleCookie
from secrets import token_urlsafe
from urllib.parse import urlsplit

from app.config import NEW_KEY
from app.config.rules import UNLOCK, loopback
from app.config.value_types import KEY_NAME, SCOPES, KeyEntry, parse_keys
from app.core.errors import Rejected
from app.db.state import DashboardSession, SqlSessions
from app.web.errors import Refusal, Refused, Scope

# API keys: how they are made and checked.
#
# Invariants: only the SHA-256 of a key is stored, which is enough for 256 random bits and too fast to be used for a
# denial of service; comparisons take constant time, and an unknown name costs one as well.

KEY_BYTES = 32
MAX_PRESENTED_CHARACTERS = 128
PRESENTED = re.compile(r"hw_([a-z0-9_-]{1,40})_[A-Za-z0-9_-]{43}")
NOBODY = KeyEntry("", frozenset(), "", bytes(hashlib.sha256().digest_size))


class Keyring:
    """The configured keys, `settings.access.api_keys`. Safe to use from any thread."""

    def __init__(self, entries: Iterable[KeyEntry], clock: Callable[[], datetime]) -> None:
        self._clock = clock
        self.by_name: dict[str, list[KeyEntry]] = {}
        for entry in entries:
            self.by_name.setdefault(entry.name, []).append(entry)

    def authenticate(self, presented: str) -> KeyEntry | None:
        """The key that is `presented`, unless it has expired; None for anything else."""
        match = PRESENTED.fullmatch(presented[: MAX_PRESENTED_CHARACTERS + 1])
        return self.living(match[1] if match else "", _digest(presented if match else ""))

    def living(self, name: str, digest: bytes) -> KeyEntry | None:
        """The key with this name and SHA-256; None when it was removed or has expired."""
        found = None
        for entry in self.by_name.get(name, [NOBODY]):
            is_alive = entry.expires_at is None or self._clock() < entry.expires_at
            if hmac.compare_digest(digest, entry.digest) and is_alive:
                found = entry
        return found


def new_key(
    name: str,
    scopes: str,
    randomness: Callable[[int], bytes],
    *,
    s3_prefix: str = "",
    expires_on: date | None = None,
    today: date | None = None,
) -> tuple[str, str]:
    """The secret, to be shown once, and the line for API_KEYS. Raises Rejected when no such key is possible.

    `scopes`: scopes and groups, separated by commas, blanks or `+`. `randomness(n)` returns n bytes:
    `secrets.token_bytes`. `expires_on` is the last day (UTC) on which the key is valid; not before `today`.
    """
    secret = f"hw_{name}_{urlsafe_b64encode(randomness(KEY_BYTES)).rstrip(b'=').decode()}"
    head = f"{name}@{expires_on.isoformat()}" if expires_on else name
    granted = "+".join(re.split(r"[+,\s]+", scopes.strip()))
    line = ":".join(filter(None, (head, granted, s3_prefix, _digest(secret).hex())))
    reason = "the name is not 1 to 40 of a-z, 0-9, - and _" if not KEY_NAME.fullmatch(name) else ""
    if re.search(r"[,\n]", s3_prefix):
        reason = "the S3 prefix holds a comma or a newline, which end an entry of API_KEYS"
    if expires_on and today and expires_on < today:
        reason = f"{expires_on} has passed, so the key would never be good; today is {today}"
    try:
        parse_keys("" if reason else line)
    except ValueError as error:
        reason = str(error).removeprefix("entry 1: ")
    if reason:
        raise Rejected(f"no key for {name!r} with scopes {granted}: {reason}", "see `python -m app keys new --help`")
    return secret, line


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode()).digest()


# Who may call which route: deny by default, decided once and before a body is read.
#
# Invariants: a route that declares no scope is closed to everybody; a failed sign-in costs one hash and is counted by
# client address; a key is never read from a URL. Failures with other keys never lock out a valid one.

COOKIE = "headwater_key"
SESSION = timedelta(hours=12)
FAILURES_A_MINUTE = 10
ADDRESSES = 10_000
BURST_SECONDS = 10
SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
OWN_PAGES = frozenset({"none", "same-origin"})
EVERYBODY = KeyEntry("anonymous", frozenset(SCOPES), "", b"")
OPEN = "open"
SIGN_IN = f"send a key as `Authorization: Bearer` or `X-API-Key`; `{NEW_KEY}` makes one"
LOCKED = Refusal(503, "locked: API_KEYS is not set, so only /health and /ready are answered", UNLOCK)
Methods = Mapping[str, str]
"""Method of a path -> the permission that a caller needs; OPEN for everybody, "" for nobody."""
Fields = Mapping[bytes, str]
"""Header fields by lower-case name."""


def needs(scope: str) -> dict[str, str]:
    """`openapi_extra` of a route: the scope that a caller must have, or OPEN."""
    return {"x-scope": scope}


class RouteScopes:
    """The scopes that the routes declare, by path. A path that only FastAPI would match, such as one with a newline, is
    unknown here and never reaches it.
    """

    def __init__(self) -> None:
        self._fixed: dict[str, dict[str, str]] = {}
        self._templates: dict[re.Pattern[str], dict[str, str]] = {}

    def add(self, path: str, pattern: re.Pattern[str], methods: Methods) -> None:
        """Add a route. The first one for a path and method wins."""
        held = self._templates.setdefault(pattern, {}) if "{" in path else self._fixed.setdefault(path, {})
        held.update({method: scope for method, scope in methods.items() if method not in held})

    def of(self, path: str) -> Methods:
        """The declared methods of a path; none when there is no such path."""
        fixed = self._fixed.get(path)
        if fixed is not None:
            return fixed
        return next((methods for pattern, methods in self._templates.items() if pattern.fullmatch(path)), {})


class SignInThrottle:
    """Failed sign-ins by address in the last minute. Used only from the event loop; bounded in memory."""

    def __init__(self) -> None:
        self._failed: OrderedDict[str, deque[datetime]] = OrderedDict()

    def failed(self, address: str, now: datetime) -> float | None:
        """Count a failure; the seconds to wait when the address is over its limit, else None."""
        times = self._failed.setdefault(address, deque(maxlen=FAILURES_A_MINUTE))
        self._failed.move_to_end(address)
        if len(self._failed) > ADDRESSES:
            self._failed.popitem(last=False)
        while times and times[0] <= now - timedelta(minutes=1):
            times.popleft()
        if len(times) == FAILURES_A_MINUTE:
            return (times[0] + timedelta(minutes=1) - now).total_seconds()
        times.append(now)
        return None


class KeyRates:
    """A token bucket for each key: `per_second` requests on average over ten seconds. Bounded by the number of keys."""

    def __init__(self, per_second: float) -> None:
        self._per_second = per_second
        self._buckets: dict[str, tuple[float, datetime]] = {}

    def wait_seconds(self, name: str, now: datetime) -> float:
        """Count a request; 0 when it is within the rate, otherwise the seconds to wait."""
        most = self._per_second * BURST_SECONDS
        tokens, at = self._buckets.get(name, (most, now))
        tokens = min(most, tokens + max(0.0, (now - at).total_seconds()) * self._per_second)
        allowed = tokens >= 1
        self._buckets[name] = (tokens - allowed, now)
        return 0.0 if allowed else (1 - tokens) / self._per_second


@dataclass(frozen=True, slots=True)
class AccessGuard:
    """`anonymous`: ALLOW_ANONYMOUS is set, so other machines may call without keys. `locked`: nobody may call.

    `origins`: the other origins whose pages may call with a key, "*" for all.
    """

    keyring: Keyring
    clock: Callable[[], datetime]
    sessions: SqlSessions
    rates: KeyRates
    anonymous: bool = False
    locked: bool = False
    origins: frozenset[str] = frozenset()
    throttle: SignInThrottle = field(default_factory=SignInThrottle)

    async def authorize(self, scope: Scope, methods: Methods) -> None:
        """Check that the caller may call a path with these `methods`, and HEAD where there is GET; put the caller into
        the request's state.

        Raises Refused: 401 without valid credentials, 403 without the scope, 429 above the key's rate, 404 and 405
        (only for callers with a key) for an unknown path or method. Raises Transient when a session cannot be looked
        up.
        """
        method = scope["method"]
        if method not in SAFE_METHODS and not self._own_page(scope):
            hint = "call from the dashboard itself, or name the page's origin in CORS_ORIGINS"
            raise Refused(403, "a page of another site started this call", hint)
        answered = {"HEAD": methods["GET"], **methods} if "GET" in methods else methods
        wanted = answered.get(method, "")
        if wanted == OPEN:
            return
        grant = await self.grant(scope)
        if grant is None:
            raise Refused(*unauthorized("this needs a key"))
        scope.setdefault("state", {})["grant"] = grant
        seconds = self.rates.wait_seconds(grant.name, self.clock()) if grant.digest else 0
        if seconds:
            wait = {"Retry-After": str(math.ceil(seconds))}
            raise Refused(429, f"too many requests with the key {grant.name}", "send fewer", headers=wait)
        if not methods:
            raise Refused(404, "Not Found", "see /docs for what there is")
        if method not in answered:
            allowed = {"Allow": ", ".join(sorted(answered))}
            hint = "see /docs for the methods of this path"
            raise Refused(405, "Method Not Allowed", hint, headers=allowed)
        if not wanted:
            raise Refused(403, "this route declares no scope", "report it: nobody can call it")
        if wanted not in grant.scopes:
            hint = f"use a key with this scope; `python -m app keys new helper --scopes {wanted}` makes one"
            raise Refused(403, f"this needs the scope {wanted}", hint)

    async def grant(self, scope: Scope) -> KeyEntry | None:
        """The caller's key; None without credentials. Raises Refused for a wrong key or a session that has ended,
        Transient when sessions cannot be looked up.
        """
        fields = _fields(scope)
        if not self.keyring.by_name:
            # a name of this machine: DNS rebinding makes a foreign page's name resolve to 127.0.0.1
            host = fields.get(b"host", "")
            if not self.anonymous and not loopback(host if host.endswith("]") else host.rsplit(":", 1)[0]):
                hint = "use localhost or 127.0.0.1, or set API_KEYS"
                raise Refused(403, "without keys only calls to this machine's own name are answered", hint)
            return EVERYBODY
        if key := presented(fields):
            return self.sign_in(key, scope)
        token = _cookie(fields)
        if not token or self.allowed_origin(scope):
            return None
        session = await asyncio.to_thread(self.sessions.find, _digest(token).hex())
        alive = session is not None and self.clock() < session.ends_at
        grant = self.keyring.living(session.key_name, bytes.fromhex(session.key_hash)) if session and alive else None
        if grant is None:
            raise Refused(*unauthorized("the session has ended"))
        return grant

    def sign_in(self, key: str, scope: Scope) -> KeyEntry:
        """The entry of a valid key, which is put into the state. Raises Refused with 401, or 429 after too many
        failures from this address.
        """
        now = self.clock()
        grant = self.keyring.authenticate(key)
        if grant is not None:
            scope.setdefault("state", {})["grant"] = grant
            return grant
        seconds = self.throttle.failed((scope.get("client") or ("",))[0], now)
        if seconds is not None:
            wait = {"Retry-After": str(math.ceil(seconds))}
            raise Refused(429, "too many failed sign-ins", "wait, then use a valid key", headers=wait)
        raise Refused(*unauthorized("the key is unknown or has expired"))

    async def begin_session(self, grant: KeyEntry) -> str:
        """The token of a new session for this key, for a cookie. Raises Transient when it cannot be stored."""
        now, token = self.clock(), token_urlsafe(KEY_BYTES)
        begun = DashboardSession(grant.name, grant.digest.hex(), now + SESSION)
        await asyncio.to_thread(self.sessions.begin, _digest(token).hex(), begun, now)
        return token

    async def end_session(self, scope: Scope) -> None:
        """End the session of the caller's cookie, if any; its owner is put into the state."""
        if token := _cookie(_fields(scope)):
            with suppress(Refused):
                scope.setdefault("state", {})["grant"] = await self.grant(scope)
            await asyncio.to_thread(self.sessions.end, _digest(token).hex())

    def allowed_origin(self, scope: Scope) -> str:
        """The value of Access-Control-Allow-Origin for a call from another site's page, "" for none."""
        origin = _fields(scope).get(b"origin", "") if self.origins else ""
        if origin and "*" in self.origins:
            return "*"
        return origin if origin in self.origins else ""

    def _own_page(self, scope: Scope) -> bool:
        """Whether the call comes from no page, from one of ours, or from an allowed origin. Browsers tell by
        Sec-Fetch-Site, but on plain http only by Origin.
        """
        fields = _fields(scope)
        site, origin = fields.get(b"sec-fetch-site", ""), fields.get(b"origin", "")
        if origin and self.allowed_origin(scope):
            return True
        return site in OWN_PAGES if site else not origin or urlsplit(origin).netloc == fields.get(b"host", "")


def _fields(scope: Scope) -> Fields:
    return {name: value.decode("latin-1") for name, value in scope["headers"]}


def presented(fields: Fields) -> str:
    """The key in a request's headers, Bearer or X-API-Key; "" when there is none."""
    kind, _, token = fields.get(b"authorization", "").partition(" ")
    return token.strip() if kind.lower() == "bearer" else fields.get(b"x-api-key", "")


def _cookie(fields: Fields) -> str:
    """The session token in the dashboard's cookie; "" when there is none."""
    try:
        cookie = SimpleCookie(fields.get(b"cookie", "")).get(COOKIE)
    except CookieError:
        return ""
    return cookie.value if cookie else ""


def unauthorized(message: str) -> Refusal:
    """401 in the form that RFC 9110 requires."""
    return Refusal(401, message, SIGN_IN, headers={"WWW-Authenticate": 'Bearer realm="headwater"'})
