"""Test support: raw HTTP against the InfluxDB simulator or any other InfluxDB, without a client in between."""

import json
import urllib.parse
from collections.abc import Iterator

import pytest
import urllib3

from simulators.influx import InfluxSimulator

ANNOTATIONS = ("datatype", "group", "default")
NOON_NS = 1_770_465_600 * 10**9  # 2026-02-07T12:00:00Z
SECOND_NS = 10**9


@pytest.fixture
def influx() -> Iterator[InfluxSimulator]:
    """A simulator of its own for the test, with the clock at 2026-02-07T14:00:00Z."""
    with InfluxSimulator(now_ns=lambda: NOON_NS + 7200 * SECOND_NS) as simulator:
        yield simulator


def post_flux(
    simulator: InfluxSimulator, text: str, *, annotations: tuple[str, ...] = ANNOTATIONS, **dialect: object
) -> urllib3.BaseHTTPResponse:
    """The whole answer to a Flux query."""
    body = json.dumps({"query": text, "dialect": {"annotations": list(annotations), **dialect}})
    return post(simulator, body.encode(), {"Content-Type": "application/json"})


def post(simulator: InfluxSimulator, body: bytes, headers: dict[str, str], org: str = "") -> urllib3.BaseHTTPResponse:
    """POST /api/v2/query with these very bytes."""
    headers = {"Authorization": f"Token {simulator.token}", **headers}
    url = f"{simulator.url}/api/v2/query?{urllib.parse.urlencode({'org': org or simulator.org})}"
    with urllib3.PoolManager(retries=False, timeout=10) as pool:
        return pool.request("POST", url, body=body, headers=headers)
