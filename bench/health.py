"""Latency of /health while a server is busy, measured from a separate process: `health.py PORT SECONDS`.

A load generator would count its own waiting as well.
"""

import asyncio
import http.client
import json
import statistics
import sys
import time
from dataclasses import dataclass

PAUSE_SECONDS = 0.01


@dataclass(frozen=True, slots=True)
class Waits:
    """Milliseconds."""

    p50_ms: float
    p99_ms: float


async def waits(port: int, seconds: float) -> Waits:
    """Ask in a child process."""
    command = [sys.executable, __file__, str(port), str(seconds)]
    child = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    printed, _ = await child.communicate()
    return Waits(**json.loads(printed))


def main() -> None:
    """Ask over one connection, and print the answer of `waits`."""
    port, seconds = int(sys.argv[1]), float(sys.argv[2])
    taken = []
    until = time.monotonic() + seconds
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    while time.monotonic() < until:
        began = time.perf_counter()
        connection.request("GET", "/health")
        connection.getresponse().read()
        taken.append((time.perf_counter() - began) * 1000)
        time.sleep(PAUSE_SECONDS)
    print(json.dumps({"p50_ms": statistics.median(taken), "p99_ms": sorted(taken)[int(len(taken) * 0.99)]}))


if __name__ == "__main__":
    main()
