"""The outermost ASGI application: it answers probes at once and passes everything else to the guarded API.

Invariants: the probes answer before the API is imported and while its thread pool is full; every response has the
security headers; requests with unsafe methods are logged with caller and status; background work starts and ends with
the ASGI lifespan.
"""

import asyncio
import gc
import logging
import re
from collections.abc import Callable, Mapping, MutableMapping
from contextlib import suppress
from importlib.resources import files
from typing import Any, NamedTuple
from urllib.parse import unquote_to_bytes

from app.core.errors import AppError
from app.ops.connection_checks import ProbeAnswer
from app.web.auth import LOCKED, OPEN, SAFE_METHODS, AccessGuard, Methods, RouteScopes
from app.web.errors import (
    BROKEN,
    BROKEN_HINT,
    Asgi,
    Receive,
    Refusal,
    Refused,
    Scope,
    Send,
    refusal_of,
    send_json,
    send_refusal,
)
from app.web.request_bodies import BodyLimits

SAFE = "default-src 'none'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
PAGE = "default-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'self'"
# FastAPI's pages have inline scripts.
DOCS = (
    "default-src 'self'; frame-ancestors 'none'; base-uri 'none'; img-src 'self' data:; worker-src blob:; "
    "script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'"
)
POLICIES = {**dict.fromkeys(("/", "/runs", "/run", "/analytics/explore"), PAGE), "/docs": DOCS, "/redoc": DOCS}
HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
)
HSTS = (b"strict-transport-security", b"max-age=31536000")
AUDITED_CHARACTERS = 300
FIELD_NAMES = re.compile(rb"[A-Za-z0-9!#$%&'*+.^_`|~, -]{1,2000}")
log = logging.getLogger(__name__)
audit = logging.getLogger("app.audit")


class GuardedApi(NamedTuple):
    """The API behind the guard: `app`, or for the paths in `fast` their own handler; `scopes` are what its routes
    declare.
    """

    app: Asgi
    fast: Mapping[str, Asgi]
    scopes: RouteScopes


class HeadwaterApp:
    """See the module. `opened` starts the work, `close` ends it within its time limit, `api` imports and builds the
    API.
    """

    def __init__(
        self,
        probes: Mapping[str, Callable[[], ProbeAnswer]],
        guard: AccessGuard,
        limits: BodyLimits,
        *,
        opened: Callable[[], None],
        api: Callable[[], GuardedApi],
        close: Callable[[], None],
    ) -> None:
        self._probes = probes
        self._guard = guard
        self._limits = limits
        self._opened, self._make_api, self._close = opened, api, close
        self._building: asyncio.Future[None] | None = None
        self._api: GuardedApi | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One ASGI call. Adds missing security headers to each response, and logs requests with unsafe methods."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._lifespan(receive, send)
            return
        path = scope["path"].removeprefix(scope.get("root_path", ""))  # other ASGI servers can set a root
        policy, started = POLICIES.get(path, SAFE).encode(), False
        added = [*HEADERS, (b"content-security-policy", policy), *([HSTS] if scope["scheme"] == "https" else [])]
        if self._guard.origins:  # CORS headers: they let an allowed page of another origin read the response
            added.append((b"vary", b"Origin"))
            if origin := self._guard.allowed_origin(scope):
                added.append((b"access-control-allow-origin", origin.encode("latin-1")))
                added.append((b"access-control-expose-headers", b"*"))

        async def answered(message: MutableMapping[str, Any]) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                held = list(message.get("headers", ()))
                names = {name.lower() for name, _ in held} - {b"vary"}
                message = {**message, "headers": [*held, *(each for each in added if each[0] not in names)]}
                if scope["method"] not in SAFE_METHODS:  # audit log: who asked for what change, and the status
                    who = getattr(scope.get("state", {}).get("grant"), "name", "nobody")
                    path = scope.get("raw_path", b"").decode("latin-1")[:AUDITED_CHARACTERS]
                    said = {"who": who, "method": scope["method"], "path": path, "status": message["status"]}
                    address = (scope.get("client") or ("",))[0]
                    text = "%s %s by %s: %d"
                    audit.info(text, scope["method"], path, who, message["status"], extra={**said, "address": address})
            await send(message)

        try:
            await self._answer(path, scope, receive, answered)
        except AppError as error:
            await send_refusal(answered, refusal_of(error))
        finally:
            if not started:
                log.error("%s %s: no response was sent", scope["method"], scope["path"])
                await send_refusal(answered, Refusal(500, BROKEN, BROKEN_HINT))

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        await receive()
        try:
            await asyncio.to_thread(self._opened)
        except AppError as error:
            log.error("the service cannot start: %s", error)  # noqa: TRY400 - the message is enough
            await send({"type": "lifespan.startup.failed", "message": str(error)})
            return
        if not self._guard.locked:
            self._build()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await asyncio.to_thread(self._close)
        await send({"type": "lifespan.shutdown.complete"})

    def _build(self) -> "asyncio.Future[None]":
        """Import and build the API in a thread, once; requests that need it wait.

        After a failure the next request builds it again: imports that run beside other threads may fail by chance, as
        seen with the AST constructor of CPython 3.11.7 (gh-106905).
        """

        def build() -> None:
            self._api = self._make_api()
            gc.freeze()  # a garbage collection over all imported objects would stop every thread for 0.1 s

        if self._building is None or self._building.done():
            self._building = asyncio.ensure_future(asyncio.to_thread(build))
        return self._building

    async def _answer(self, path: str, scope: Scope, receive: Receive, send: Send) -> None:
        probe = self._probes.get(path)
        if probe is not None and scope["method"] in ("GET", "HEAD"):
            answer = probe()
            await send_json(send, answer.status, answer.body, {})
            return
        if self._guard.locked:
            if b"text/html" not in dict(scope["headers"]).get(b"accept", b""):
                raise Refused(*LOCKED)
            await _send_locked_page(send)
            return
        while self._api is None:
            await asyncio.shield(self._build())
        app, fast, scopes = self._api
        # FastAPI redirects a path with a trailing slash.
        methods = scopes.of(path) or scopes.of(path.rstrip("/"))
        if scope["method"] == "OPTIONS" and (preflight := _preflight(scope, methods, self._guard)):
            await send({"type": "http.response.start", "status": 204, "headers": preflight})
            await send({"type": "http.response.body"})
            return
        await self._guard.authorize(scope, methods)
        if scope["method"] == "HEAD" and "HEAD" not in methods:
            scope, send = {**scope, "method": "GET"}, _without_body(send)
        if b"%" in scope["query_string"] or not scope["query_string"].isascii():
            try:
                unquote_to_bytes(scope["query_string"]).decode()
            except UnicodeDecodeError:  # it would be decoded to a different key or filter
                hint = "percent-encode the UTF-8 bytes of each value"
                raise Refused(422, "the query is not UTF-8", hint) from None
        is_open = methods.get(scope["method"]) == OPEN
        with suppress(_HeadSent):
            await self._limits.call(fast.get(path, app), path, scope, receive, send, is_open=is_open)


class _HeadSent(Exception):
    """The response to HEAD is complete, and its body would be read for nobody."""


def _without_body(send: Send) -> Send:
    """`send` for HEAD. Raises _HeadSent where a body would be streamed: it may be a large object or a whole export."""

    async def sent(message: MutableMapping[str, Any]) -> None:
        is_body = message["type"] == "http.response.body"
        await send({"type": message["type"]} if is_body else message)
        if is_body and message.get("more_body"):
            raise _HeadSent

    return sent


async def _send_locked_page(send: Send) -> None:
    """The page that a browser gets instead of `LOCKED`; it needs nothing else from this server."""
    page = files("app.ops").joinpath("assets", "locked.html").read_bytes()
    policy = (
        b"default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
    )
    headers = [(b"content-type", b"text/html; charset=utf-8"), (b"content-security-policy", policy)]
    await send({"type": "http.response.start", "status": LOCKED.status, "headers": headers})
    await send({"type": "http.response.body", "body": page})


def _preflight(scope: Scope, methods: Methods, guard: AccessGuard) -> list[tuple[bytes, bytes]]:
    """The headers that answer a CORS preflight request; empty for any other request."""
    fields = dict(scope["headers"])
    asked = fields.get(b"access-control-request-headers", b"")
    if b"access-control-request-method" not in fields or not guard.allowed_origin(scope):
        return []
    return [
        (b"access-control-allow-methods", ", ".join(sorted(methods)).encode()),
        (b"access-control-allow-headers", asked if FIELD_NAMES.fullmatch(asked) else b""),
        (b"access-control-max-age", b"600"),
    ]
