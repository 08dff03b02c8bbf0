"""Data that the devices, the ship and the users of the demo produce, and the writers that keep adding to it.

Invariant: all data is a pure function of seed, number and time: the same for any range, any number of steps and any
demo. The shapes are those of mapping.md.
"""

import math
import random
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import islice
from pathlib import Path
from threading import Event, Thread
from typing import Any

NS = 10**9
HOUR_NS = 3600 * NS
# Telemetry: `device_telemetry` with five tags and four float fields, a point each 5 s, some of them late.
MEASUREMENT = "device_telemetry"
STEP_NS = 5 * NS
BLOCK_NS = 600 * NS
DAY_NS = 86_400 * NS
SINE_NS = 6 * 3600 * NS
MASK = 2**64 - 1
GAP_BLOCKS = 24  # one ten-minute block in this many has no data at all
HELD_BLOCKS = 30  # one block in this many is held back and arrives whole, minutes after its end
LATE_SAMPLES = 250  # one sample in this many arrives late by itself
FINE_SAMPLES = 97  # one sample in this many has a timestamp with nanoseconds
MAX_LATE_NS = 15 * 60 * NS
TYPES = ("bulb", "heater", "pump", "sensor")
LOCATIONS = ("Plant-A", "Plant-B", "Plant-C")


@dataclass(frozen=True, slots=True)
class Device:
    """One device; `number` starts at 1 and is part of its name."""

    number: int
    seed: int = 0

    @property
    def device_id(self) -> str:
        """The tag `device_id`."""
        return f"D{self.number}"

    @property
    def tags(self) -> tuple[tuple[str, str], ...]:
        """All tags, sorted by name."""
        return (
            ("device_id", self.device_id),
            ("device_type", TYPES[(self.number - 1) % len(TYPES)]),
            ("enrichment_status", "raw"),
            ("location", LOCATIONS[(self.number - 1) % len(LOCATIONS)]),
            ("schema_version", "1"),
        )

    @property
    def series(self) -> str:
        """Measurement and tags in line protocol; no value here needs escaping."""
        return ",".join((MEASUREMENT, *(f"{name}={value}" for name, value in self.tags)))


@dataclass(frozen=True, slots=True)
class Sample:
    """One point: when it happened, when it arrives, and what was measured."""

    time_ns: int
    arrives_ns: int
    voltage: float
    current: float
    power: float
    temperature: float

    def line(self, series: str) -> str:
        """The point as line protocol."""
        fields = f"voltage={self.voltage},current={self.current},power={self.power},temperature={self.temperature}"
        return f"{series} {fields} {self.time_ns}"


def fleet(number: int, seed: int = 0) -> tuple[Device, ...]:
    """Devices D1 to D`number`."""
    return tuple(Device(one, seed) for one in range(1, number + 1))


def samples(device: Device, start_ns: int, stop_ns: int) -> Iterator[Sample]:
    """All samples in [start_ns, stop_ns), in time order."""
    phase = device.number * 37_000_000 % STEP_NS // 1_000_000 * 1_000_000
    first = -(-(start_ns - phase) // STEP_NS)
    for slot in range(first - 1, -(-(stop_ns - phase) // STEP_NS)):
        sample = _sample(device, slot, slot * STEP_NS + phase)
        if sample is not None and start_ns <= sample.time_ns < stop_ns:
            yield sample


def arrivals(
    devices: Sequence[Device], start_ns: int, stop_ns: int, oldest_ns: int = 0
) -> Iterator[tuple[Device, Sample]]:
    """All samples that arrive in [start_ns, stop_ns) with a time of at least `oldest_ns`, in order of arrival."""
    from_ns = max(oldest_ns, start_ns - MAX_LATE_NS - BLOCK_NS)
    found = (
        (device, sample)
        for device in devices
        for sample in samples(device, from_ns, stop_ns)
        if start_ns <= sample.arrives_ns < stop_ns
    )
    yield from sorted(found, key=lambda each: (each[1].arrives_ns, each[0].number))


def _sample(device: Device, slot: int, at_ns: int) -> Sample | None:
    block = at_ns // BLOCK_NS
    fate = _mixed(device.seed, device.number, block)
    if fate % GAP_BLOCKS == 0:
        return None
    chance = _mixed(device.seed ^ 0x5EED, device.number, slot)
    time_ns = at_ns + (chance >> 8) % 1_000_000 if chance % FINE_SAMPLES == 0 else at_ns
    held_ns = 0
    if (fate >> 16) % HELD_BLOCKS == 0:
        held_ns = (block + 1) * BLOCK_NS - time_ns + (fate >> 32) % (MAX_LATE_NS // 3)
    elif (chance >> 12) % LATE_SAMPLES == 0:
        held_ns = 60 * NS + (chance >> 20) % (MAX_LATE_NS - 60 * NS)
    return Sample(time_ns, time_ns + held_ns, *_measured(device, time_ns, chance))


def _measured(device: Device, time_ns: int, chance: int) -> tuple[float, float, float, float]:
    """Voltage in 200-250 V, current in 0-2 A, power in 0-500 W, temperature in 20-80 C: a slow sine with noise."""
    wave = math.sin(2 * math.pi * (time_ns % SINE_NS) / SINE_NS + device.number)
    day = math.sin(2 * math.pi * (time_ns % DAY_NS) / DAY_NS)
    noise = [((chance >> shift) & 0xFFF) / 0xFFF - 0.5 for shift in (0, 12, 24, 36)]
    voltage = 226 + 10 * wave + 4 * noise[0]
    current = 0.9 + 0.3 * wave + 0.3 * day + 0.1 * noise[1]
    power = voltage * current * (0.93 + 0.04 * noise[2])
    temperature = 45 + 12 * wave + 8 * day + noise[3]
    return round(voltage, 2), round(current, 3), round(power, 2), round(temperature, 2)


def _mixed(*numbers: int) -> int:
    """64 uniform bits from the numbers (the finalizer of SplitMix64)."""
    state = 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) & MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & MASK
        state ^= state >> 31
    return state


class Writer(ABC):
    """Writes newly due data every `interval_seconds` from `start` to `close`.

    Invariant: `close` waits for a write in progress, and nothing is written afterwards.
    """

    def __init__(self, interval_seconds: float) -> None:
        self._interval_seconds = interval_seconds
        self._closing = Event()
        self._thread: Thread | None = None

    @abstractmethod
    def write(self) -> None:
        """Write data that has become due since the last call."""

    def start(self) -> None:
        """Start a thread that first writes after one interval."""
        self._thread = Thread(target=self._run, name=type(self).__name__, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop; does nothing when not running."""
        self._closing.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while not self._closing.wait(self._interval_seconds):
            self.write()


BATCH_LINES = 5000


class TelemetryWriter(Writer):
    """Writes the samples of `devices` to `store` as line protocol, in order of arrival; first all since `oldest_ns`."""

    def __init__(
        self,
        store: Callable[[str], None],
        devices: Sequence[Device],
        *,
        oldest_ns: int,
        interval_seconds: float = 2.0,
        now_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        super().__init__(interval_seconds)
        self._store = store
        self._devices = devices
        self._now_ns = now_ns
        self._oldest_ns = self._done_ns = oldest_ns

    def write(self) -> None:
        """Write samples that arrived since the last call."""
        now_ns = self._now_ns()
        lines = self._lines(self._done_ns, now_ns)
        while batch := list(islice(lines, BATCH_LINES)):
            self._store("\n".join(batch))
        self._done_ns = now_ns

    def _lines(self, start_ns: int, stop_ns: int) -> Iterator[str]:
        series = {device.number: device.series for device in self._devices}
        for at_ns in range(start_ns, stop_ns, HOUR_NS):
            end_ns = min(at_ns + HOUR_NS, stop_ns)
            for device, sample in arrivals(self._devices, at_ns, end_ns, self._oldest_ns):
                yield sample.line(series[device.number])


# Underway measurements: one partition, whole seconds, a row every two seconds, numbers that may be missing.
SHIP_TABLE = "locness-underway-summary"
SHIP_KEY = ("static_partition", "datetime_utc")
EVERY_SECONDS = 2
REFINED_ROWS = 3
Item = dict[str, dict[str, Any]]


def ship_row(at: datetime, *, refined: bool = True) -> Item:
    """The measurements at a second. An unrefined row lacks the corrected values."""
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
    if draw.random() < 0.02:  # noqa: PLR2004 - a sensor gives no number in one of fifty rows
        values.pop("rho_ppb")
    item: Item = {name: {"N": f"{value:.6f}".rstrip("0").rstrip(".")} for name, value in values.items()}
    return {"static_partition": {"S": "data"}, "datetime_utc": {"S": f"{at:%Y-%m-%dT%H:%M:%SZ}"}, **item}


class ShipWriter(Writer):
    """Puts the rows measured since `oldest_at` into the table; overwrites the newest ones as they are refined."""

    def __init__(
        self,
        put: Callable[[str, Sequence[Item]], None],
        *,
        oldest_at: datetime,
        interval_seconds: float = 4.0,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        super().__init__(interval_seconds)
        self._put = put
        self._clock = clock
        self._next_at = oldest_at.replace(microsecond=0, second=oldest_at.second // EVERY_SECONDS * EVERY_SECONDS)

    def write(self) -> None:
        """Write measurements since the last call, and refine earlier rows."""
        since, now = self._next_at, self._clock()
        new = []
        while self._next_at <= now:
            new.append(self._next_at)
            self._next_at += timedelta(seconds=EVERY_SECONDS)
        before = [since - timedelta(seconds=EVERY_SECONDS * step) for step in range(REFINED_ROWS, 0, -1)]
        fresh = set(new[-REFINED_ROWS:])
        self._put(SHIP_TABLE, [ship_row(at, refined=at not in fresh) for at in (*before, *new)])


# Files for the inbox: some rows known, some new, and now and then an invalid file.
CSV_HEAD = "cluster_name,id,name,value"
CSV_ROWS = 6
BAD_EACH = 8


def csv_content(number: int) -> str:
    """File `number`: half of its rows have the keys of the previous file; every eighth file lacks the key column."""
    if number % BAD_EACH == BAD_EACH - 1:
        return f"id,name\n{number:04d},no key\n"
    first = number * CSV_ROWS // 2
    rows = [
        f"cluster-{n:04d},{n:04d},Plant {n % 5},{(n * 37 + number) % 100}.0" for n in range(first, first + CSV_ROWS)
    ]
    return "\n".join([CSV_HEAD, *rows]) + "\n"


class CsvWriter(Writer):
    """Adds one file to `folder` per write; a file gets its name only when it is complete."""

    def __init__(self, folder: Path, interval_seconds: float = 7.0) -> None:
        super().__init__(interval_seconds)
        self._folder = folder
        self._number = 0

    def write(self) -> None:
        """Write the next file."""
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"clusters_{self._number:04d}.csv"
        part = path.with_suffix(".part")
        part.write_text(csv_content(self._number), encoding="utf-8")
        part.replace(path)
        self._number += 1
