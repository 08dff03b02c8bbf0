"""Generated telemetry with a fixed seed: the same rows for the server that sends them and for the later check.

Invariant: the points of one device and window depend only on the shape and the two numbers.
"""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

START = datetime(2026, 2, 2, tzinfo=UTC)
WINDOW_SECONDS = 3600
FIELDS = ("voltage", "current", "power", "temperature")
TYPES = ("inverter", "meter", "charger", "heat-pump")
LOCATIONS = ("hall-a", "hall-b", "roof", "yard", "cellar")
SEED = 20260202
NS = 10**9


@dataclass(frozen=True, slots=True)
class Shape:
    """How much there is: each device has `rows` points in each of its `windows` hours."""

    devices: int
    windows: int
    rows: int

    @property
    def total_rows(self) -> int:
        """Points of all devices."""
        return self.devices * self.windows * self.rows

    @property
    def end(self) -> datetime:
        """The end of the last window."""
        return START + timedelta(seconds=WINDOW_SECONDS * self.windows)

    def arguments(self) -> list[str]:
        """As the command line of a child process takes them."""
        return [f"--devices={self.devices}", f"--windows={self.windows}", f"--rows={self.rows}"]


def device_name(number: int) -> str:
    """The device tag."""
    return f"device-{number:03}"


def tags_of(number: int) -> tuple[str, str]:
    """The device's type and location."""
    return TYPES[number % len(TYPES)], LOCATIONS[number % len(LOCATIONS)]


def points(shape: Shape, device: int, window: int) -> Any:
    """A pyarrow table: `_time` as int64 nanoseconds, strictly rising, and FIELDS; one temperature in a hundred is null.

    Values have three decimals at most, as meters send them; times have nanoseconds, at uneven distances.
    """
    import numpy as np
    import pyarrow as pa

    random = np.random.default_rng((SEED, device, window))
    step_ns = WINDOW_SECONDS * NS // shape.rows
    begin_ns = (int(START.timestamp()) + window * WINDOW_SECONDS) * NS
    times = begin_ns + np.arange(shape.rows) * step_ns + random.integers(0, step_ns, shape.rows)
    voltage = np.round(random.normal(230, 3, shape.rows), 3)
    current = np.round(random.uniform(0.5, 16, shape.rows), 3)
    power = np.round(voltage * current * random.uniform(0.8, 1.02, shape.rows), 2)
    temperature = np.round(random.normal(21, 6, shape.rows), 2)
    columns = (voltage, current, power, pa.array(temperature, mask=random.random(shape.rows) < 0.01))
    return pa.table({"_time": times, **dict(zip(FIELDS, columns, strict=True))})
