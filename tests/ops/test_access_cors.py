"""CORS_ORIGINS: pages of named sites call with keys and read the answers; others and cookies do not."""

import asyncio
from pathlib import Path

import httpx

from app.main import build
from app.web.auth import new_key
from given_settings import loaded
from public_interface import served

APP, OTHER = "https://app.example", "https://other.example"
ASKS = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type, x-api-key"}


async def calls(tmp_path: Path) -> None:
    key, line = new_key("page", "dwh:read dwh:write ops:read", bytes)
    app = build(loaded(DATA_DIR=str(tmp_path), API_KEYS=line, CORS_ORIGINS=f"{APP}:443,https://Second.example")).app
    transport = httpx.ASGITransport(app=app)
    async with served(app), httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        path, page = "/dwh/mobile-devices", {"Origin": APP, "Sec-Fetch-Site": "cross-site"}
        asked = await client.options(path, headers={**page, **ASKS})
        assert asked.status_code == 204
        assert asked.headers["Access-Control-Allow-Origin"] == APP
        assert {"GET", "POST"} <= set(asked.headers["Access-Control-Allow-Methods"].split(", "))
        assert asked.headers["Access-Control-Allow-Headers"] == "content-type, x-api-key"
        rows = {"data": [{"device_id": "d1"}]}
        stored = await client.post(path, json=rows, headers={**page, "X-API-Key": key})
        assert (stored.status_code, stored.headers["Access-Control-Allow-Origin"]) == (200, APP)
        assert stored.headers["Access-Control-Expose-Headers"] == "*"
        refused = await client.post(path, json=rows, headers=page)
        assert (refused.status_code, refused.headers["Access-Control-Allow-Origin"]) == (401, APP), "a page reads why"
        second = await client.get(path, headers={"Origin": "https://second.example", "X-API-Key": key})
        assert second.headers["Access-Control-Allow-Origin"] == "https://second.example"
        cookie = (await client.post("/ops/session", json={"key": key})).headers["Set-Cookie"].split(";")[0]
        client.cookies.clear()
        assert (await client.get("/ops/jobs", headers={"Cookie": cookie})).status_code == 200
        assert (await client.get("/ops/jobs", headers={**page, "Cookie": cookie})).status_code == 401
        for answer in (asked, stored, refused):
            assert "Access-Control-Allow-Credentials" not in answer.headers
        for headers in ({"Origin": OTHER}, {"Origin": "null"}, {}):
            asked = await client.options(path, headers={**headers, **ASKS, "X-API-Key": key})
            read = await client.get(path, headers={**headers, "X-API-Key": key})
            assert (asked.status_code, read.status_code) == (405, 200)
            for answer in (asked, read):
                assert "Access-Control-Allow-Origin" not in answer.headers
                assert "Origin" in answer.headers.get_list("Vary", split_commas=True)


def test_pages_of_named_sites_call_with_keys_and_others_do_not(tmp_path: Path) -> None:
    asyncio.run(calls(tmp_path))
