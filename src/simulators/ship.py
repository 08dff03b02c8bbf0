"""A simulated research ship: a row every two seconds, and its newest ones written over as they are refined.

Invariant: what a row holds depends on seed, second and state of refinement only. The shape is that of mapping.md: one
partition, whole seconds, numbers that may be absent.
"""

import math
import random
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Self

from simulators.repeating import Repeating

TABLE = "locness-underway-summary"
KEY = ("static_partition", "datetime_utc")
EVERY_SECONDS = 2
REFINED_ROWS = 3
Item = dict[str, dict[str, Any]]
Put = Callable[[str, Sequence[Item]], None]


def row(at: datetime, *, refined: bool = True) -> Item:
    """The measurements at a second. A row that is not refined yet lacks the corrected values."""
    second = int(at.timestamp())
    draw = random.Random(second)  # noqa: S311 - plausible, not secret
    hours = second / 3600
    ph = 8.05 + 0.05 * math.sin(hours) + draw.gauss(0, 0.002)
    values = {
        "latitude": 42.5 + 0.02 * math.sin(hours / 5),
        "longitude": -69.5 + 0.02 * math.cos(hours / 5),
        "rho_ppb": max(0.0, 1.5 + draw.gauss(0, 0.2)),
        "ph_total": ph,
        "vrse": 0.5 + draw.gauss(0, 0.01),
        "temp": 15.0 + math.sin(hours / 4),
        "salinity": 32.1 + draw.gauss(0, 0.05),
    }
    if refined:
        values |= {"ph_corrected": ph - 0.01, "ph_corrected_ma": ph - 0.012, "ph_total_ma": ph - 0.002}
    if draw.random() < 0.02:  # noqa: PLR2004 - one sensor in fifty rows gave no number
        values.pop("rho_ppb")
    item: Item = {name: {"N": f"{value:.6f}".rstrip("0").rstrip(".")} for name, value in values.items()}
    return {"static_partition": {"S": "data"}, "datetime_utc": {"S": f"{at:%Y-%m-%dT%H:%M:%SZ}"}, **item}


class Ship:
    """Writes rows until it is closed. `start` returns when the backlog is written."""

    def __init__(
        self, put: Put, *, backlog_hours: float = 2.0, interval_seconds: float = 4.0, clock: Callable[[], datetime]
    ) -> None:
        self._put = put
        self._clock = clock
        start = clock() - timedelta(hours=backlog_hours)
        self._next_at = start.replace(microsecond=0, second=start.second // EVERY_SECONDS * EVERY_SECONDS)
        self._live = Repeating("ship", lambda: self.sail(clock()), interval_seconds)

    def start(self) -> Self:
        """Write the backlog, then go on from a thread."""
        self.sail(self._clock())
        self._live.start()
        return self

    def close(self) -> None:
        """Stop."""
        self._live.close()

    def sail(self, now: datetime) -> int:
        """Write what was measured since the last call and refine the rows before; the number of new rows."""
        since = self._next_at
        new = []
        while self._next_at <= now:
            new.append(self._next_at)
            self._next_at += timedelta(seconds=EVERY_SECONDS)
        before = [since - timedelta(seconds=EVERY_SECONDS * step) for step in range(REFINED_ROWS, 0, -1)]
        fresh = set(new[-REFINED_ROWS:])
        self._put(TABLE, [row(at, refined=at not in fresh) for at in (*before, *new)])
        return len(new)


def now() -> datetime:
    """The ship's clock."""
    return datetime.now(UTC)
