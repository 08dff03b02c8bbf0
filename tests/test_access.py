"""API keys: what a line grants, who is let in, and that nothing else is."""

import asyncio
import re
import secrets
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.config.value_types import GROUPS, SCOPES, parse_keys
from app.core.errors import Rejected, Transient
from app.db.state import DashboardSession, SqlSessions
from app.web.auth import (
    ADDRESSES,
    EVERYBODY,
    FAILURES_A_MINUTE,
    OPEN,
    AccessGuard,
    KeyRates,
    Keyring,
    RouteScopes,
    SignInThrottle,
    new_key,
    presented,
)
from app.web.errors import Refusal, Refused

NOON = datetime(2026, 2, 7, 12, tzinfo=UTC)
DIGEST = "0123456789abcdef" * 4


def ring(*lines: str, now: datetime = NOON) -> Keyring:
    return Keyring(parse_keys(",".join(lines)), lambda: now)


def test_a_new_key_opens_what_its_line_grants() -> None:
    secret, line = new_key("grafana", "analytics:read, ops:read", secrets.token_bytes)
    grant = ring(line).authenticate(secret)
    assert grant is not None
    assert (grant.name, grant.scopes) == ("grafana", frozenset({"analytics:read", "ops:read"}))
    assert "ops:read" in grant.scopes
    assert "ops:run" not in grant.scopes


def test_a_new_key_holds_256_random_bits_and_its_line_does_not_hold_them() -> None:
    secret, line = new_key("ci", "admin", lambda count: bytes(range(count)))
    assert secret == "hw_ci_AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8"
    assert secret[6:] not in line
    assert re.fullmatch(r"ci:admin:[0-9a-f]{64}", line)


def test_groups_open_to_scopes() -> None:
    secret, line = new_key("all", "admin", secrets.token_bytes)
    grant = ring(line).authenticate(secret)
    assert grant is not None
    assert grant.scopes == set(SCOPES)
    assert all(scope.endswith(":read") for scope in GROUPS["read"])
    assert "dwh:write" in GROUPS["write"]
    assert "ops:run" not in GROUPS["write"]
    assert "admin" not in grant.scopes


def test_a_prefix_confines_and_ends_with_a_slash() -> None:
    secret, line = new_key("team", "s3:read+s3:write", secrets.token_bytes, s3_prefix="uploads/team-a")
    grant = ring(line).authenticate(secret)
    assert grant is not None
    assert grant.s3_prefix == "uploads/team-a/"
    assert parse_keys(f"x:read:write:{DIGEST}")[0].s3_prefix == "write/"
    assert parse_keys(f"x:s3:read:a:b/:{DIGEST}")[0].s3_prefix == "a:b/"


def test_a_key_is_good_through_the_day_it_names() -> None:
    secret, line = new_key("temp", "read", secrets.token_bytes, expires_on=date(2026, 2, 7))
    assert line.startswith("temp@2026-02-07:read:")
    assert ring(line, now=datetime(2026, 2, 7, 23, 59, 59, tzinfo=UTC)).authenticate(secret)
    assert ring(line, now=datetime(2026, 2, 8, tzinfo=UTC)).authenticate(secret) is None


def test_a_key_that_has_expired_already_is_not_made() -> None:
    with pytest.raises(Rejected, match="2026-02-06 has passed"):
        new_key("temp", "read", secrets.token_bytes, expires_on=date(2026, 2, 6), today=NOON.date())
    assert new_key("temp", "read", secrets.token_bytes, expires_on=NOON.date(), today=NOON.date())


def test_two_keys_of_a_name_live_side_by_side_with_their_own_scopes() -> None:
    (old, old_line), (new, new_line) = (new_key("ci", scope, secrets.token_bytes) for scope in ("read", "dwh:write"))
    both = ring(old_line, new_line)
    grants = [both.authenticate(old), both.authenticate(new)]
    assert [grant.scopes for grant in grants if grant] == [GROUPS["read"], {"dwh:write"}]
    with pytest.raises(ValueError, match="at most 2"):
        ring(old_line, new_line, f"ci:read:{DIGEST}")


def test_a_key_of_another_name_does_not_open() -> None:
    secret, line = new_key("ci", "admin", secrets.token_bytes)
    assert ring(line).authenticate(secret.replace("hw_ci_", "hw_other_")) is None
    assert ring(line.replace("ci:", "other:", 1)).authenticate(secret) is None


def test_a_changed_key_does_not_open() -> None:
    secret, line = new_key("ci", "admin", secrets.token_bytes)
    assert ring(line).authenticate(secret[:-1] + ("A" if secret[-1] != "A" else "B")) is None
    assert ring(line).authenticate(secret + " ") is None
    assert ring(line).authenticate(secret + "A" * 1000) is None


@given(st.text(max_size=300) | st.from_regex(r"hw_ci_[A-Za-z0-9_-]{43}", fullmatch=True))
def test_nothing_that_was_not_made_opens_or_crashes(presented: str) -> None:
    assert ring(f"ci:admin:{DIGEST}").authenticate(presented) is None
    assert Keyring((), lambda: NOON).authenticate(presented) is None


@pytest.mark.parametrize("presented", ["\ud800", "hw_ci_\udcff", "", "hw__" + "A" * 43, "hw_ci_" + "\u0661" * 43])
def test_odd_characters_do_not_crash(presented: str) -> None:
    assert ring(f"ci:admin:{DIGEST}").authenticate(presented) is None


def test_the_stand_in_for_unknown_names_cannot_be_opened() -> None:
    assert ring(f"ci:admin:{'0' * 64}").authenticate("hw_nobody_" + "A" * 43) is None


def test_a_ring_without_keys_has_no_names() -> None:
    assert not ring("").by_name
    assert list(ring(f"ci:admin:{DIGEST}").by_name) == ["ci"]


def test_entries_are_separated_by_commas_or_newlines() -> None:
    other = DIGEST[::-1]
    assert [entry.name for entry in parse_keys(f"\n a:read:{DIGEST} ,\n\nb:read:{other}\n")] == ["a", "b"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("canary", "is not name:scopes"),
        (f"canary:{DIGEST}", "is not name:scopes"),
        (f"UPPER:read:{DIGEST}", "the name"),
        (f":read:{DIGEST}", "the name"),
        (f"a,b:read:{DIGEST}", "is not name:scopes"),
        (f"a:fly:{DIGEST}", "a scope is not one of"),
        (f"a::{DIGEST}", "a scope is not one of"),
        (f"a:read+:{DIGEST}", "a scope is not one of"),
        (f"a:s3:{DIGEST}", "a scope is not one of"),
        ("a:read:canary", "64 hexadecimal"),
        (f"a:read:{DIGEST}0", "64 hexadecimal"),
        (f"a:read:../x:{DIGEST}", "S3 prefix"),
        (f"a:read:/x:{DIGEST}", "S3 prefix"),
        (f"a@2026-02-30:read:{DIGEST}", "expiry"),
        (f"a@9999-12-31:read:{DIGEST}", "expiry"),
        (f"a@:read:{DIGEST}", "expiry"),
    ],
)
def test_a_line_that_cannot_be_read_says_which_and_why_and_is_not_quoted(line: str, reason: str) -> None:
    with pytest.raises(ValueError, match="entry 2: ") as caught:
        parse_keys(f"ok:read:{DIGEST[::-1]}\n{line}")
    assert reason in str(caught.value)
    assert "canary" not in str(caught.value)
    assert DIGEST not in str(caught.value)


def test_two_lines_of_one_hash_are_refused() -> None:
    with pytest.raises(ValueError, match="same hash"):
        parse_keys(f"a:read:{DIGEST},b:admin:{DIGEST}")


@pytest.mark.parametrize(
    ("name", "scopes", "prefix"),
    [("A", "read", ""), ("a:b", "read", ""), ("a", "fly", ""), ("a", "read", "x,y"), ("a", "read", "..")],
)
def test_a_key_that_no_line_could_say_is_not_made(name: str, scopes: str, prefix: str) -> None:
    with pytest.raises(Rejected, match="no key for"):
        new_key(name, scopes, secrets.token_bytes, s3_prefix=prefix)


def test_neither_the_hash_nor_the_key_is_in_a_repr() -> None:
    secret, line = new_key("ci", "admin", secrets.token_bytes)
    (entry,) = parse_keys(line)
    text = f"{entry!r} {ring(line)!r} {ring(line).authenticate(secret)!r}"
    assert line.rpartition(":")[2] not in text
    assert secret not in text
    assert str(entry.digest) not in text


class Sessions(SqlSessions):
    """In memory."""

    def __init__(self) -> None:
        self.held: dict[str, DashboardSession] = {}

    def find(self, token_hash: str) -> DashboardSession | None:
        return self.held.get(token_hash)

    def begin(self, token_hash: str, begun: DashboardSession, _: datetime) -> None:
        self.held[token_hash] = begun

    def end(self, token_hash: str) -> None:
        self.held.pop(token_hash, None)


def guard_of(keyring: Keyring, per_second: float = 1000, **more: Any) -> AccessGuard:
    return AccessGuard(keyring, lambda: NOON, Sessions(), KeyRates(per_second), **more)


def tried(guard: AccessGuard, key: str, address: str) -> int:
    """The status of a sign-in; through a Unix socket callers have no address."""
    try:
        guard.sign_in(key, {"client": (address, 1) if address else None})
    except Refused as refused:
        return refused.refusal.status
    return 200


def test_wrong_keys_of_one_address_lock_out_neither_another_address_nor_a_right_key() -> None:
    secret, line = new_key("ci", "admin", secrets.token_bytes)
    guard = guard_of(ring(line))
    assert [tried(guard, "wrong", "192.0.2.1") for _ in range(FAILURES_A_MINUTE + 2)] == [401] * 10 + [429] * 2
    assert tried(guard, "wrong", "192.0.2.2") == tried(guard, "wrong", "") == 401
    assert tried(guard, secret, "192.0.2.1") == 200


def test_an_address_may_try_again_a_minute_after_its_first_failure_and_is_told_how_long_that_is() -> None:
    throttle = SignInThrottle()
    for second in range(FAILURES_A_MINUTE):
        assert throttle.failed("192.0.2.1", NOON + timedelta(seconds=second)) is None
    assert throttle.failed("192.0.2.1", NOON + timedelta(seconds=59.5)) == 0.5
    assert throttle.failed("192.0.2.1", NOON + timedelta(seconds=60)) is None
    assert throttle.failed("192.0.2.1", NOON + timedelta(seconds=60)) == 1


def test_addresses_without_number_are_forgotten_oldest_first() -> None:
    throttle = SignInThrottle()
    for _ in range(FAILURES_A_MINUTE):
        throttle.failed("192.0.2.1", NOON)
    for number in range(ADDRESSES - 1):
        throttle.failed(f"{number}", NOON)
    assert throttle.failed("192.0.2.1", NOON) == 60
    throttle.failed("one more", NOON)
    assert throttle.failed("192.0.2.1", NOON) == 60, "it was not the one that was longest without a failure"
    for number in range(ADDRESSES):
        throttle.failed(f"{number}", NOON)
    assert throttle.failed("192.0.2.1", NOON) is None


def called(method: str = "GET", **fields: str) -> dict[str, Any]:
    """A call as the server hands it on."""
    headers = [(name.replace("_", "-").encode(), value.encode()) for name, value in fields.items()]
    return {"method": method, "path": "/x", "headers": headers, "client": ("192.0.2.1", 1)}


def refused(guard: AccessGuard, call: dict[str, Any], methods: Mapping[str, str]) -> Refusal:
    with pytest.raises(Refused) as told:
        asyncio.run(guard.authorize(call, methods))
    return told.value.refusal


def test_a_call_needs_a_key_of_the_scope_unless_it_is_open_to_all() -> None:
    secret, line = new_key("ci", "ops:read", secrets.token_bytes)
    guard = guard_of(ring(line))
    methods = {"GET": "ops:read", "POST": "ops:run", "DELETE": "", "PUT": OPEN}
    for method in ("GET", "POST", "DELETE", "HEAD"):
        assert refused(guard, called(method), methods).status == 401
    assert refused(guard, called(), {}).status == 401, "what is there is told to callers with a key only"
    opened = called("PUT")
    asyncio.run(guard.authorize(opened, methods))
    assert "state" not in opened
    call = called(x_api_key=secret)
    asyncio.run(guard.authorize(call, methods))
    assert call["state"]["grant"].name == "ci"
    for method in ("POST", "DELETE"):
        assert refused(guard, called(method, x_api_key=secret), methods).status == 403
    assert refused(guard, called(x_api_key=secret), {}).status == 404
    asyncio.run(guard.authorize(called("HEAD", x_api_key=secret), methods))  # as GET
    unknown = refused(guard, called("PATCH", x_api_key=secret), methods)
    assert (unknown.status, unknown.headers) == (405, {"Allow": "DELETE, GET, HEAD, POST, PUT"})
    assert refused(guard, called("HEAD", x_api_key=secret), {"POST": "ops:read"}).status == 405


def test_the_first_route_of_a_path_and_method_counts_and_near_misses_are_no_routes() -> None:
    scopes = RouteScopes()
    scopes.add("/x", re.compile("^/x$"), {"GET": "ops:read"})
    scopes.add("/x", re.compile("^/x$"), {"GET": OPEN, "POST": "ops:run"})
    scopes.add("/y/{name}/run", re.compile("^/y/(?P<name>[^/]+)/run$"), {"POST": "ops:run"})
    assert scopes.of("/x") == {"GET": "ops:read", "POST": "ops:run"}
    assert scopes.of("/y/a%b\n/run") == {"POST": "ops:run"}
    for path in ("/x\n", "/X", "/x/", "/y//run", "/y/a/b/run", "/y/a/run\n", ""):
        assert scopes.of(path) == {}


OTHER, APP, LIST = "https://other.example", "https://app.example", frozenset({"https://app.example"})


@pytest.mark.parametrize(
    ("method", "fields", "origins", "is_refused"),
    [
        ("POST", {}, LIST, False),
        ("POST", {"sec_fetch_site": "none"}, LIST, False),
        ("DELETE", {"sec_fetch_site": "same-origin", "origin": "https://public.example"}, LIST, False),
        ("GET", {"sec_fetch_site": "cross-site"}, LIST, False),
        ("HEAD", {"sec_fetch_site": "cross-site"}, LIST, False),
        ("POST", {"sec_fetch_site": "cross-site"}, LIST, True),
        ("PATCH", {"sec_fetch_site": "same-site"}, LIST, True),
        ("DELETE", {"sec_fetch_site": "same-site"}, LIST, True),
        ("POST", {"origin": "http://here:8080"}, LIST, False),
        ("POST", {"origin": "http://here"}, LIST, True),
        ("POST", {"origin": "http://here:8080.other.example"}, LIST, True),
        ("POST", {"origin": OTHER}, LIST, True),
        ("POST", {"origin": "null"}, LIST, True),
        ("POST", {"origin": OTHER, "sec_fetch_site": "cross-site"}, LIST, True),
        ("POST", {"origin": APP, "sec_fetch_site": "cross-site"}, frozenset(), True),
        ("POST", {"origin": APP, "sec_fetch_site": "cross-site"}, LIST, False),
        ("POST", {"origin": OTHER, "sec_fetch_site": "cross-site"}, frozenset({"*"}), False),
    ],
)
def test_what_changes_something_may_come_from_our_pages_and_allowed_ones_only(
    method: str,
    fields: dict[str, str],
    origins: frozenset[str],
    is_refused: bool,  # noqa: FBT001
) -> None:
    secret, line = new_key("ci", "admin", secrets.token_bytes)
    guard = guard_of(ring(line), origins=origins)
    call = called(method, host="here:8080", x_api_key=secret, **fields)
    if is_refused:
        assert refused(guard, call, {method: "ops:run"}).status == 403
    else:
        asyncio.run(guard.authorize(call, {method: "ops:run"}))


def test_a_session_lasts_until_its_end_its_key_or_the_sign_out_and_serves_no_other_site() -> None:
    secret, line = new_key("ci", "ops:read", secrets.token_bytes)
    guard = guard_of(ring(line), origins=LIST)
    grant = guard.sign_in(secret, called())
    token = asyncio.run(guard.begin_session(grant))
    assert token not in repr(guard.sessions)
    signed_in = called(cookie=f"headwater_key={token}")
    assert asyncio.run(guard.grant(signed_in)) == grant
    assert asyncio.run(guard.grant(called(cookie=f"headwater_key={token}", origin=APP))) is None
    _, other = new_key("ci", "ops:read", secrets.token_bytes)
    for late in (
        replace(guard, clock=lambda: NOON + timedelta(hours=12)),
        replace(guard, keyring=ring(other)),
        replace(guard, keyring=ring(line.replace("ci:", "ci@2026-02-06:", 1))),
        replace(guard, sessions=Sessions()),
    ):
        assert refused(late, signed_in, {"GET": "ops:read"}).status == 401
    leaving = called(cookie=f"headwater_key={token}")
    asyncio.run(guard.end_session(leaving))
    assert leaving["state"]["grant"].name == "ci", "the audit line names who signed out"
    assert refused(guard, signed_in, {"GET": "ops:read"}).status == 401
    assert refused(guard, called(cookie=f"headwater_key={secret}"), {"GET": "ops:read"}).status == 401, "a key is none"
    asyncio.run(guard.end_session(signed_in))


def test_a_session_that_cannot_be_looked_up_is_no_sign_out() -> None:
    class Away(Sessions):
        def find(self, _: str) -> DashboardSession | None:
            raise Transient("the database is away", "wait")

    _, line = new_key("ci", "ops:read", secrets.token_bytes)
    guard = replace(guard_of(ring(line)), sessions=Away())
    with pytest.raises(Transient):
        asyncio.run(guard.authorize(called(cookie="headwater_key=x"), {"GET": "ops:read"}))


def test_a_key_above_its_rate_is_told_when_to_come_back_and_others_are_not() -> None:
    (one, first), (two, second) = (new_key(name, "ops:read", secrets.token_bytes) for name in ("one", "two"))
    guard = guard_of(ring(first, second), per_second=2)
    for _ in range(20):
        asyncio.run(guard.authorize(called(x_api_key=one), {"GET": "ops:read"}))
    told = refused(guard, called(x_api_key=one), {"GET": "ops:read"})
    assert (told.status, told.headers) == (429, {"Retry-After": "1"})
    asyncio.run(guard.authorize(called(x_api_key=two), {"GET": "ops:read"}))
    asyncio.run(
        replace(guard, clock=lambda: NOON + timedelta(seconds=0.5)).authorize(
            called(x_api_key=one), {"GET": "ops:read"}
        )
    )
    without = guard_of(ring(""), per_second=2)
    for _ in range(50):
        asyncio.run(without.authorize(called(host="localhost"), {"GET": "ops:read"}))


@pytest.mark.parametrize("host", ["localhost", "localhost:8080", "127.0.0.1:80", "127.8.8.8", "[::1]", "[::1]:8080"])
def test_without_keys_calls_to_this_machines_own_name_are_answered(host: str) -> None:
    assert asyncio.run(guard_of(ring("")).grant(called(host=host))) == EVERYBODY


@pytest.mark.parametrize("host", ["", "rebound.example", "localhost.rebound.example:80", "192.0.2.7", "[2001:db8::1]"])
def test_without_keys_calls_to_other_names_are_answered_only_when_that_was_allowed(host: str) -> None:
    assert refused(guard_of(ring("")), called(host=host), {"GET": "ops:read"}).status == 403
    assert asyncio.run(guard_of(ring(""), anonymous=True).grant(called(host=host))) == EVERYBODY


@pytest.mark.parametrize(
    ("fields", "key"),
    [
        ({b"authorization": "Bearer one"}, "one"),
        ({b"authorization": "bearer  one "}, "one"),
        ({b"authorization": "Basic one"}, ""),
        ({b"authorization": "Basic one", b"x-api-key": "two"}, "two"),
        ({b"authorization": "Bearer one", b"x-api-key": "two", b"cookie": "headwater_key=three"}, "one"),
        ({b"x-api-key": "two", b"cookie": "headwater_key=three"}, "two"),
        ({b"cookie": "headwater_key=three"}, ""),
        ({}, ""),
    ],
)
def test_a_key_is_taken_from_the_first_of_two_places(fields: dict[bytes, str], key: str) -> None:
    assert presented(fields) == key


@pytest.mark.parametrize("cookie", ["key=three", "a\x00=b; headwater_key=three", "headwater_key=", ""])
def test_a_cookie_without_a_token_is_nobody(cookie: str) -> None:
    _, line = new_key("ci", "ops:read", secrets.token_bytes)
    assert asyncio.run(guard_of(ring(line)).grant(called(cookie=cookie))) is None
