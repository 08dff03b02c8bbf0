"""HEAD on a route that streams: the headers of GET, without reading the body."""

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

from app.core.errors import Transient
from app.db.state import open_state
from app.web.api import StreamedResponse, build_api, route_scopes
from app.web.app import GuardedApi, HeadwaterApp
from app.web.auth import OPEN, AccessGuard, KeyRates, Keyring, needs
from app.web.request_bodies import BodyLimits

NOW = datetime(2026, 2, 9, 12, tzinfo=UTC)
BLOCK = b"x" * 65_536


@pytest.mark.parametrize("spec", ["2.3", "2.4"])
def test_head_reads_no_more_than_a_block_and_lets_go_of_what_was_held(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, spec: str
) -> None:
    read: list[int] = []
    held = ExitStack()
    held.callback(read.append, -1)

    def blocks() -> Iterator[bytes]:
        for number in range(1000):
            read.append(number)
            yield BLOCK
        raise Transient("nobody should come this far", "stop earlier")

    router = APIRouter()

    @router.get("/large", openapi_extra=needs(OPEN))
    def large() -> StreamedResponse:
        return StreamedResponse(blocks(), held, headers={"Content-Length": str(1000 * len(BLOCK))})

    api = build_api("t", "1", "", [router])
    sent: list[MutableMapping[str, Any]] = []

    async def receive() -> MutableMapping[str, Any]:
        await asyncio.sleep(10)
        return {"type": "http.disconnect"}

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)

    with closing(open_state("", tmp_path)) as state:
        guard = AccessGuard(Keyring([], lambda: NOW), lambda: NOW, state.sessions, KeyRates(100.0), anonymous=True)
        app = HeadwaterApp(
            {},
            guard,
            BodyLimits(1000, 1000),
            opened=lambda: None,
            api=lambda: GuardedApi(api, {}, route_scopes(api)),
            close=lambda: None,
        )
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": spec},
            "http_version": "1.1",
            "method": "HEAD",
            "path": "/large",
            "raw_path": b"/large",
            "root_path": "",
            "query_string": b"",
            "scheme": "http",
            "headers": [(b"host", b"localhost")],
        }
        with caplog.at_level(logging.INFO):
            asyncio.run(app(scope, receive, send))
    start, body = sent
    assert (start["status"], dict(start["headers"])[b"content-length"]) == (200, b"65536000")
    assert body == {"type": "http.response.body"}
    assert len(read) <= 3
    assert read[-1] == -1
    assert not [record for record in caplog.records if re.search("cut off|no response", record.message)]
