"""Bounded retries with full jitter for `Transient` errors; all other errors pass through at once.

Invariant: a retry never exceeds the policy's attempts, and a requested stop ends the waiting.
"""

import math
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

from app.core.errors import Conflict, LeaseLost, Transient

T = TypeVar("T")
LEAST_REST_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """At most `attempts` calls; the n-th pause is drawn from [0, min(cap, first * 2**n)] seconds."""

    attempts: int = 4
    first_seconds: float = 0.2
    cap_seconds: float = 10.0


class Pauses(Protocol):
    """Waiting as a parameter: the stop signal in production, a counter in tests."""

    def pause(self, seconds: float) -> None:
        """Wait; raise `Stopped` as soon as a stop is requested."""


class RequestPacer:
    """Spaces out sequential requests so that they take at most `share` of one core on the other side, whatever they
    cost. Short rests are accumulated up to LEAST_REST_SECONDS, and other work in between counts as rest. Thread-safe.
    """

    def __init__(self, pauses: Pauses, share: float) -> None:
        self._pauses = pauses
        self._rest = 1 / share - 1
        self._turn = threading.Lock()
        self._rested_at = -math.inf

    def ask(self, question: Callable[[], T]) -> T:
        """The answer, after a rest if one is due."""
        with self._turn:
            owed = self._rested_at - time.monotonic()
            if owed >= LEAST_REST_SECONDS:
                self._pauses.pause(owed)
            began = time.monotonic()
            try:
                return question()
            finally:
                now = time.monotonic()
                self._rested_at = max(self._rested_at, began) + (now - began) * (self._rest + 1)


def retry(action: Callable[[], T], policy: RetryPolicy, pauses: Pauses, draw: Callable[[], float] = random.random) -> T:
    """Call `action` until it returns. `draw` gives a number in [0, 1), which is jitter only and not security-sensitive.

    `Conflict` and `LeaseLost` are not retried here: the caller has to re-read or give up. Raises the last `Transient`
    when the attempts are used up.
    """
    for attempt in range(policy.attempts):
        try:
            return action()
        except (Conflict, LeaseLost):
            raise
        except Transient as error:
            if attempt + 1 == policy.attempts:
                raise
            pauses.pause(pause_seconds(policy, attempt, error.retry_after_seconds, draw()))
    raise ValueError("a retry policy needs at least one attempt")


def asked_seconds(text: str) -> float | None:
    """The delay in seconds of a Retry-After header; None if absent or a date, which proxies may send."""
    bare = text.strip()
    return float(bare) if bare.isascii() and bare.isdigit() else None


def pause_seconds(policy: RetryPolicy, attempt: int, asked_seconds: float | None, drawn: float) -> float:
    """How long to wait after failed call number `attempt` (from 0); at least what the other side asked for."""
    ceiling = min(policy.cap_seconds, policy.first_seconds * 2.0**attempt)
    # Capped too: a service that asks for an hour must not block a run for that long.
    asked = min(asked_seconds or 0.0, policy.cap_seconds)
    return max(asked, drawn * ceiling)
