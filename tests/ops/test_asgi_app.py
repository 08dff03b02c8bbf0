"""The outermost application, without a server: HEAD on a route that streams, and a root below which it is served."""

import asyncio
import logging
import re
from collections.abc import AsyncIterator, Iterable, Iterator, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from fastapi import APIRouter, Request

from app.db.state import State, open_state
from app.web.api import StreamedResponse, build_api, route_scopes
from app.web.app import PAGE, GuardedApi, HeadwaterApp
from app.web.auth import OPEN, AccessGuard, KeyRates, Keyring, needs
from app.web.errors import Refusal, Refused
from app.web.request_bodies import BUFFERED, BodyLimits, read_in_thread

NOW = datetime(2026, 2, 9, 12, tzinfo=UTC)
MIB = 1 << 20
BLOCK = b"x" * 65_536


async def call(
    state: State, router: APIRouter, path: str, body: Iterable[bytes] = (), *, ends: bool = False, **changes: Any
) -> list[MutableMapping[str, Any]]:
    """What the application with these routes sends for GET of `path`, or with these `changes` of the scope. After the
    blocks of the body nothing comes, or its end if it `ends`.
    """
    api, sent, blocks = build_api("t", "1", "", [router]), list[MutableMapping[str, Any]](), iter(body)
    guard = AccessGuard(Keyring([], lambda: NOW), lambda: NOW, state.sessions, KeyRates(100.0), anonymous=True)
    app = HeadwaterApp(
        {},
        guard,
        BodyLimits(100 * MIB, 5000, ("/s3/",)),
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
        for block in blocks:
            return {"type": "http.request", "body": block, "more_body": True}
        if ends:
            return {"type": "http.request", "body": b"", "more_body": False}
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


def test_bodies_that_are_held_whole_are_bounded_together_and_without_a_key_each_is_short(state: State) -> None:
    router, fields = APIRouter(), [(b"host", b"localhost"), (b"transfer-encoding", b"chunked")]
    read: list[int] = []

    async def take(request: Request) -> None:
        read.append(len(await request.body()))

    router.post("/open", openapi_extra=needs(OPEN))(take)
    router.post("/keyed", openapi_extra=needs("ops:run"))(take)
    assert BUFFERED.take(60 * MIB)  # of other requests
    for path, status, most in (("/open", 413, 1), ("/keyed", 503, 42)):
        blocks = iter([b"x" * MIB] * 200)
        start, answer = asyncio.run(call(state, router, path, blocks, method="POST", headers=fields))
        assert (start["status"], dict(start["headers"])[b"connection"]) == (status, b"close")
        assert 200 - most <= sum(1 for _ in blocks) < 200, answer
        assert BUFFERED.held == 60 * MIB
    BUFFERED.held = 0
    assert read == []
    start, *_ = asyncio.run(call(state, router, "/keyed", [b"x" * MIB] * 99, ends=True, method="POST", headers=fields))
    assert (start["status"], read) == (200, [99 * MIB])  # alone, each body may have what MAX_BODY_BYTES allows


def test_uploads_that_wait_for_a_place_hold_a_bounded_part_of_memory() -> None:
    busy, places = Refusal(429, "busy", "wait"), asyncio.Semaphore(0)

    class Sender:
        """An upload that goes on after its first block."""

        async def stream(self) -> AsyncIterator[bytes]:
            yield b"x" * MIB
            await asyncio.sleep(60)

    async def flood() -> int:
        request: Any = Sender()
        with ThreadPoolExecutor(1) as threads:
            waiting = [
                asyncio.create_task(read_in_thread(request, places, busy, threads, lambda _: None)) for _ in range(300)
            ]
            _, pending = await asyncio.wait(waiting, timeout=1)
            for task in pending:
                task.cancel()
            results = await asyncio.gather(*waiting, return_exceptions=True)
        assert {each.refusal.status for each in results if isinstance(each, Refused)} == {429}
        return len(pending)

    assert 40 <= asyncio.run(flood()) <= 64
    assert BUFFERED.held == 0
