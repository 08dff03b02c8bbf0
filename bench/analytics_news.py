"""What a new object costs a daemon that has many already."""

import json
import statistics
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass

ROUNDS = 5
ROUND_SECONDS = 3.0
POLL_SECONDS = 0.02


@dataclass(frozen=True, slots=True)
class News:
    """Seconds until a new object is answered; CPU of a listing that finds nothing, and what one more object adds."""

    seen_seconds: float
    listing_ms: float
    object_ms: float


def news(port: int, cpu_seconds: Callable[[], float], put: Callable[[int], None], every_seconds: float) -> News:
    """Rounds of equal length, without a new object and with one by `put(number)`; medians. The daemon lists every
    `every_seconds`.
    """
    quiet, busy, seen = [], [], []
    for number in range(ROUNDS):
        quiet.append(_spent(cpu_seconds, lambda: None))
        before = _rows(port)
        began = time.monotonic()

        def changed(number: int = number, before: int = before, began: float = began) -> None:
            put(number)
            while _rows(port) == before:
                time.sleep(POLL_SECONDS)
            seen.append(time.monotonic() - began)

        busy.append(_spent(cpu_seconds, changed))
    nothing = statistics.median(quiet)
    polls_ms = 1000 * _poll_cpu(port, cpu_seconds) * statistics.median(seen) / POLL_SECONDS
    return News(
        statistics.median(seen),
        nothing * 1000 * every_seconds / ROUND_SECONDS,
        (statistics.median(busy) - nothing) * 1000 - polls_ms,
    )


def _spent(cpu_seconds: Callable[[], float], work: Callable[[], None]) -> float:
    before, until = cpu_seconds(), time.monotonic() + ROUND_SECONDS
    work()
    time.sleep(max(until - time.monotonic(), 0))
    return cpu_seconds() - before


def _poll_cpu(port: int, cpu_seconds: Callable[[], float], count: int = 300) -> float:
    """CPU of one question for the rows."""
    before = cpu_seconds()
    for _ in range(count):
        _rows(port)
    return (cpu_seconds() - before) / count


def _rows(port: int) -> int:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/analytics/overview", timeout=60) as answer:
        return int(json.load(answer)["total_rows"])
