"""The outermost application, without a server: HEAD on a route that streams, and a root below which it is served."""

import asyncio
import logging
import re
from collections.abc import Iterator, MutableMapping
from contextlib import ExitStack, closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from fastapi import APIRouter

from app.db.state import State, open_state
from app.web.api import StreamedResponse, build_api, route_scopes
from app.web.app import PAGE, GuardedApi, HeadwaterApp
from app.web.auth import OPEN, AccessGuard, KeyRates, Keyring, needs
from app.web.request_bodies import BodyLimits

NOW = datetime(2026, 2, 9, 12, tzinfo=UTC)
BLOCK = b"x" * 65_536


async def call(state: State, router: APIRouter, path: str, **changes: Any) -> list[MutableMapping[str, Any]]:
    """What the application with these routes sends for GET of `path`, or with these `changes` of the scope."""
    api, sent = build_api("t", "1", "", [router]), list[MutableMapping[str, Any]]()
    guard = AccessGuard(Keyring([], lambda: NOW), lambda: NOW, state.sessions, KeyRates(100.0), anonymous=True)
    app = HeadwaterApp(
        {},
        guard,
        BodyLimits(1000, 5000, ("/s3/",)),
        opened=lambda: None,
        api=lambda: GuardedApi(api, {}, route_scopes(api)),
        close=lambda: None,
    )
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "method": "GET",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": b"",
        "scheme": "http",
        "headers": [(b"host", b"localhost")],
    }

    async def receive() -> MutableMapping[str, Any]:
        await asyncio.sleep(10)
        return {"type": "http.disconnect"}

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)

    await app({**scope, **changes}, receive, send)
    return sent


@pytest.fixture
def state(tmp_path: Path) -> Iterator[State]:
    with closing(open_state("", tmp_path)) as made:
        yield made


@pytest.mark.parametrize("spec", ["2.3", "2.4"])
def test_head_reads_no_more_than_a_block_and_lets_go_of_what_was_held(
    state: State, caplog: pytest.LogCaptureFixture, spec: str
) -> None:
    read: list[int] = []
    held = ExitStack()
    held.callback(read.append, -1)
    router = APIRouter()

    def blocks() -> Iterator[bytes]:
        for number in range(1000):
            read.append(number)
            yield BLOCK

    @router.get("/large", openapi_extra=needs(OPEN))
    def large() -> StreamedResponse:
        return StreamedResponse(blocks(), held, headers={"Content-Length": str(1000 * len(BLOCK))})

    with caplog.at_level(logging.INFO):
        start, body = asyncio.run(call(state, router, "/large", method="HEAD", asgi={"spec_version": spec}))
    assert (start["status"], dict(start["headers"])[b"content-length"]) == (200, b"65536000")
    assert body == {"type": "http.response.body"}
    assert len(read) <= 3
    assert read[-1] == -1
    assert not [record for record in caplog.records if re.search("cut off|no response", record.message)]


def test_below_a_root_a_page_keeps_its_policy_and_an_upload_its_limit(state: State) -> None:
    router = APIRouter()

    @router.get("/runs", openapi_extra=needs(OPEN))
    @router.get("/s3/x", openapi_extra=needs(OPEN))
    def page() -> str:
        return "page"

    start, _ = asyncio.run(call(state, router, "/api/runs", root_path="/api"))
    assert (start["status"], dict(start["headers"])[b"content-security-policy"]) == (200, PAGE.encode())
    for size, status in ((b"5000", 200), (b"5001", 413)):
        fields = [(b"host", b"localhost"), (b"content-length", size)]
        start, *more = asyncio.run(call(state, router, "/api/s3/x", root_path="/api", headers=fields))
        assert start["status"] == status
    assert "MAX_UPLOAD_BYTES limits it" in more[0]["body"].decode()
