"""Keys and scopes, route by route, from the OpenAPI document of the running daemon: default deny."""

import hashlib
import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

from app.config.value_types import SCOPES
from daemon import Daemon, Daemons

PAGES = ("/openapi.json", "/docs", "/redoc", "/docs/swagger-ui.css")


def key(name: str) -> str:
    return f"hw_{name}_{(name.replace('-', '') * 43)[:43]}"


def entry(name: str, scopes: str) -> str:
    return f"{name}:{scopes}:{hashlib.sha256(key(name).encode()).hexdigest()}"


def named(scope: str) -> str:
    return scope.replace(":", "-")


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    keys = [entry("root", "admin"), *(entry(named(scope), scope) for scope in SCOPES)]
    started = Daemons(tmp_path_factory.mktemp("guarded"))
    daemon = started.start("quick_jobs", API_KEYS=",".join(keys), HOST="0.0.0.0")  # noqa: S104 - what needs keys
    daemon.post("/ops/jobs/quick/resume")  # of the log lines that anybody may cause, the tests use up their share
    yield daemon
    started.close()


def bearer(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key(name)}"}


def operations(daemon: Daemon) -> dict[tuple[str, str], Any]:
    document = daemon.get("/openapi.json", bearer("root")).json
    return {
        (method.upper(), path): operation
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    }


def test_every_route_refuses_nobody_and_every_scope_but_its_own(guarded: Daemon) -> None:
    wrong, routes = [], operations(guarded)
    assert routes
    for (method, path), operation in routes.items():
        wanted = operation["x-scope"]
        if wanted == "open":
            continue
        real = re.sub(r"\{\w+\}", "nobody", path)
        if guarded.call(method, real).status != 401:
            wrong.append((method, path, "nobody"))
        for scope in SCOPES:
            status = guarded.call(method, real, headers=bearer(named(scope))).status
            if (status not in (401, 403)) != (scope == wanted):
                wrong.append((method, path, scope))
    assert wrong == []


def test_the_documentation_pages_need_a_key_where_there_are_keys(guarded: Daemon) -> None:
    for path in PAGES:
        assert guarded.get(path).status == 401
        assert guarded.get(path, bearer("ops-run")).status == 403
        assert guarded.get(path, bearer("ops-read")).status == 200


def test_probes_and_the_empty_page_stay_open(guarded: Daemon) -> None:
    for path in ("/health", "/ready", "/", "/runs", "/run", "/assets/common.js", "/assets/map.js", "/assets/pages.css"):
        assert guarded.get(path).status in (200, 503), path


def test_an_unknown_path_tells_nothing_without_a_key(guarded: Daemon) -> None:
    assert guarded.get("/nowhere").status == 401
    assert guarded.get("/nowhere", bearer("root")).status == 404


def test_every_change_that_is_asked_for_is_in_the_audit_log_and_no_key_is(guarded: Daemon) -> None:
    guarded.post("/ops/jobs/quick/run?x=%0a", headers=bearer("root"))
    guarded.post("/ops/jobs/quick/pause", headers=bearer("ops-read"))
    guarded.get("/ops/jobs", bearer("root"))
    lines = [json.loads(line) for line in guarded.log.splitlines() if '"app.audit"' in line]
    found = {(line["who"], line["method"], line["path"], line["status"]) for line in lines}
    assert {
        ("root", "POST", "/ops/jobs/quick/run", 422),
        ("ops-read", "POST", "/ops/jobs/quick/pause", 403),
        ("nobody", "POST", "/ops/jobs/quick/resume", 401),
    } <= found
    assert {line["method"] for line in lines} <= {"POST", "DELETE", "PUT", "PATCH"}
    assert "hw_" not in guarded.log


def test_both_headers_carry_a_key_and_a_query_string_does_not(guarded: Daemon) -> None:
    assert guarded.get("/ops/jobs", {"X-API-Key": key("ops-read")}).status == 200
    assert guarded.get("/ops/jobs", {"Authorization": f"bearer {key('ops-read')}"}).status == 200
    assert guarded.get(f"/ops/jobs?api_key={key('ops-read')}").status == 401


def test_nobody_is_asked_to_sign_in_and_a_missing_scope_is_named(guarded: Daemon) -> None:
    nobody = guarded.get("/ops/jobs")
    assert nobody.headers["WWW-Authenticate"].startswith("Bearer")
    assert "keys new" in nobody.json["error"]["hint"]
    assert "ops:run" in guarded.post("/ops/jobs/quick/run", headers=bearer("ops-read")).json["error"]["message"]


def test_a_body_is_not_looked_at_before_the_caller_is_known(guarded: Daemon) -> None:
    assert guarded.post("/ops/jobs/quick/backfill", {"from": "nonsense"}).status == 401


def test_the_dashboard_signs_in_with_a_cookie_that_scripts_and_other_sites_cannot_use(guarded: Daemon) -> None:
    reply = guarded.post("/ops/session", {"key": key("ops-read")})
    assert reply.status == 204
    cookie = reply.headers["Set-Cookie"]
    assert {"HttpOnly", "SameSite=strict", "Path=/", "Max-Age=43200"} <= set(cookie.split("; "))
    assert key("ops-read") not in cookie
    sent = {"Cookie": cookie.split(";")[0]}
    assert guarded.get("/ops/jobs", sent).status == 200
    assert guarded.get("/ops/session", sent).json["name"] == "ops-read"
    assert guarded.post("/ops/jobs/quick/run", headers={**sent, "Sec-Fetch-Site": "same-site"}).status == 403
    assert guarded.call("DELETE", "/ops/session", headers={**sent, "Origin": "http://other.example"}).status == 403
    assert guarded.post("/ops/session", {"key": key("dwh-read")}).status == 403
    assert "Max-Age=0" in guarded.call("DELETE", "/ops/session", headers=sent).headers["Set-Cookie"]
    assert guarded.get("/ops/jobs", sent).status == 401, "the session has ended, whoever kept its cookie"
    lines = [json.loads(line) for line in guarded.log.splitlines() if '"app.audit"' in line]
    found = {(line["who"], line["method"], line["path"], line["status"]) for line in lines}
    assert {("ops-read", "POST", "/ops/session", 204), ("ops-read", "DELETE", "/ops/session", 204)} <= found
    assert ("dwh-read", "POST", "/ops/session", 403) in found


@pytest.mark.slow
def test_ten_wrong_keys_a_minute_then_429_while_right_keys_go_on(daemons: Daemons) -> None:
    daemon = daemons.start(API_KEYS=entry("root", "admin"))
    answers = [daemon.get("/ops/jobs", {"X-API-Key": f"guess-{n}"}) for n in range(12)]
    assert [answer.status for answer in answers] == [401] * 10 + [429] * 2
    assert 0 < int(answers[-1].headers["Retry-After"]) <= 60
    assert daemon.get("/ops/jobs", bearer("root")).status == 200
    assert key("root") not in daemon.log
