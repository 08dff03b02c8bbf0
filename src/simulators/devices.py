"""Plausible devices: what each of them measures at any instant, as a pure function of seed, number and time.

Invariant: the same seed gives the same samples, whatever range is asked for and in however many steps: nothing is
remembered between calls. Every sample says when it happened and when it arrives: mostly at once, some late.
The measurement is the reference one of mapping.md: `device_telemetry`, five tags, four float fields, a point each 5 s.
"""

import heapq
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from simulators.instants import NS

MEASUREMENT = "device_telemetry"
STEP_NS = 5 * NS
BLOCK_NS = 600 * NS
DAY_NS = 86_400 * NS
SINE_NS = 6 * 3600 * NS
MASK = 2**64 - 1
GAP_BLOCKS = 24  # one block of ten minutes in so many is not measured at all
HELD_BLOCKS = 30  # one in so many is held back and arrives whole, minutes after its end
LATE_SAMPLES = 250  # one sample in so many arrives late by itself
FINE_SAMPLES = 97  # one in so many has a time to the nanosecond
MAX_LATE_NS = 15 * 60 * NS
TYPES = ("bulb", "heater", "pump", "sensor")
LOCATIONS = ("Plant-A", "Plant-B", "Plant-C")


@dataclass(frozen=True, slots=True)
class Device:
    """One device; `number` counts from 1 and names it."""

    number: int
    seed: int = 0

    @property
    def device_id(self) -> str:
        """The tag `device_id`."""
        return f"D{self.number}"

    @property
    def tags(self) -> tuple[tuple[str, str], ...]:
        """All tags, in order of their names."""
        return (
            ("device_id", self.device_id),
            ("device_type", TYPES[(self.number - 1) % len(TYPES)]),
            ("enrichment_status", "raw"),
            ("location", LOCATIONS[(self.number - 1) % len(LOCATIONS)]),
            ("schema_version", "1"),
        )

    @property
    def series(self) -> str:
        """Measurement and tags as line protocol writes them; no value here needs an escape."""
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
    """Everything that happens in [start_ns, stop_ns), in order of time."""
    phase = device.number * 37_000_000 % STEP_NS // 1_000_000 * 1_000_000
    first = -(-(start_ns - phase) // STEP_NS)
    for slot in range(first - 1, -(-(stop_ns - phase) // STEP_NS)):
        sample = _sample(device, slot, slot * STEP_NS + phase)
        if sample is not None and start_ns <= sample.time_ns < stop_ns:
            yield sample


def arrivals(
    devices: Sequence[Device], start_ns: int, stop_ns: int, oldest_ns: int = 0
) -> Iterator[tuple[Device, Sample]]:
    """Everything that arrives in [start_ns, stop_ns) and did not happen before `oldest_ns`, in order of arrival."""
    from_ns = max(oldest_ns, start_ns - MAX_LATE_NS - BLOCK_NS)
    streams = [_arriving(device, from_ns, start_ns, stop_ns) for device in devices]
    for _, _, device, sample in heapq.merge(*streams, key=lambda item: item[:2]):
        yield device, sample


def _arriving(device: Device, from_ns: int, start_ns: int, stop_ns: int) -> list[tuple[int, int, Device, Sample]]:
    found = [
        (sample.arrives_ns, device.number, device, sample)
        for sample in samples(device, from_ns, stop_ns)
        if start_ns <= sample.arrives_ns < stop_ns
    ]
    return sorted(found, key=lambda item: item[:2])


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
    """64 even bits of the numbers (the finalizer of SplitMix64)."""
    state = 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) & MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & MASK
        state ^= state >> 31
    return state
