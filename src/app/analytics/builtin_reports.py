"""What the built-in reports say, from aggregates by device and day.

Invariant: the answer depends on the parts alone and not on their order, so the same objects give the same bytes.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from typing import Any, Literal

from app.analytics.columns import NANOS, NUMBERS
from app.db.object_summaries import NO_DAY, DaySummary, Pair

LATEST = ("timestamp", *NUMBERS, "device_type", "location", NANOS)
"""The columns of the latest reading, as they are kept; before there were nanoseconds the last one was not there."""

EPOCH = datetime(1970, 1, 1)  # noqa: DTZ001 - instants in answers are UTC without a zone, as DuckDB's are
Kind = Literal["text", "integer", "number", "instant", "date"]


@dataclass(frozen=True, slots=True)
class ReportTable:
    """Rows with named and typed columns; instants are UTC without a zone."""

    columns: Sequence[tuple[str, Kind]]
    rows: Sequence[tuple[Any, ...]]


def merged(parts: Iterable[DaySummary]) -> Mapping[Pair, DaySummary]:
    """One part for each pair."""
    by_pair: dict[Pair, list[DaySummary]] = {}
    for part in parts:
        by_pair.setdefault((part.device, part.day), []).append(part)
    return {pair: _merged(pair, many) for pair, many in by_pair.items()}


def _merged(pair: Pair, parts: Sequence[DaySummary]) -> DaySummary:
    if len(parts) == 1:
        return parts[0]
    return DaySummary(
        device=pair[0],
        day=pair[1],
        rows=sum(part.rows for part in parts),
        min_us=min((part.min_us for part in parts if part.min_us is not None), default=None),
        max_us=max((part.max_us for part in parts if part.max_us is not None), default=None),
        voltage_sum=_sum(part.voltage_sum for part in parts),
        voltage_count=sum(part.voltage_count for part in parts),
        temperature_max=max((part.temperature_max for part in parts if part.temperature_max is not None), default=None),
        soc_sum=_sum(part.soc_sum for part in parts),
        soc_count=sum(part.soc_count for part in parts),
        latest=max((part.latest for part in parts if part.latest is not None), key=_rank, default=None),
    )


def _sum(values: Iterable[float | None]) -> float | None:
    """Exact to the last bit, whatever the order."""
    held = [value for value in values if value is not None]
    try:
        return math.fsum(held) if held else None
    except OverflowError:
        return math.inf


def _rank(latest: tuple[Any, ...]) -> list[tuple[bool, Any]]:
    """By instant and its nanoseconds; ties as DuckDB orders structs: from left to right, null above all."""
    instant, *values = latest[: len(LATEST) - 1]
    nanos = latest[-1] if len(latest) == len(LATEST) else 0
    return [(value is None, 0 if value is None else value) for value in (instant, nanos, *values)]


def _mean(total: float | None, count: int) -> float | None:
    return total / count if total is not None and count and math.isfinite(total) else None


def _at(microseconds: int | None) -> datetime | None:
    return None if microseconds is None else EPOCH + timedelta(microseconds=microseconds)


def _devices(days: Mapping[Pair, DaySummary]) -> Mapping[str, list[DaySummary]]:
    """Device id -> its parts, oldest first; by code point, as DuckDB sorts. Rows without a device are left out."""
    by_text: dict[str, list[DaySummary]] = {}
    for part in sorted(days.values(), key=lambda part: part.day):
        by_text.setdefault(part.device, []).append(part)
    found = {json.loads(text): parts for text, parts in by_text.items()}
    return {device: found[device] for device in sorted(device for device in found if device is not None)}


def overview(days: Mapping[Pair, DaySummary]) -> ReportTable:
    """One row."""
    first = min((part.min_us for part in days.values() if part.min_us is not None), default=None)
    last = max((part.max_us for part in days.values() if part.max_us is not None), default=None)
    row = (sum(part.rows for part in days.values()), len(_devices(days)), _at(first), _at(last))
    columns: Sequence[tuple[str, Kind]] = (
        ("total_rows", "integer"),
        ("device_count", "integer"),
        ("min_timestamp", "instant"),
        ("max_timestamp", "instant"),
    )
    return ReportTable(columns, [row])


def daily_summary(days: Mapping[Pair, DaySummary]) -> ReportTable:
    """A row for each device and day."""
    rows = [
        (
            device,
            date(1970, 1, 1) + timedelta(days=part.day),
            _mean(part.voltage_sum, part.voltage_count),
            part.temperature_max,
            _mean(part.soc_sum, part.soc_count),
            part.rows,
        )
        for device, parts in _devices(days).items()
        for part in parts
        if part.day != NO_DAY
    ]
    columns: Sequence[tuple[str, Kind]] = (
        ("device_id", "text"),
        ("date", "date"),
        ("avg_voltage", "number"),
        ("max_temperature", "number"),
        ("avg_soc", "number"),
        ("row_count", "integer"),
    )
    return ReportTable(columns, rows)


def rows_by_day(days: Mapping[Pair, DaySummary]) -> ReportTable:
    """A row for each day, of all devices together."""
    parts: dict[int, list[DaySummary]] = {}
    for part in days.values():
        if part.day != NO_DAY:
            parts.setdefault(part.day, []).append(part)
    rows = [
        (
            date(1970, 1, 1) + timedelta(days=day),
            sum(part.rows for part in parts[day]),
            sum(json.loads(part.device) is not None for part in parts[day]),
        )
        for day in sorted(parts)
    ]
    columns: Sequence[tuple[str, Kind]] = (("date", "date"), ("row_count", "integer"), ("device_count", "integer"))
    return ReportTable(columns, rows)


def devices(days: Mapping[Pair, DaySummary]) -> ReportTable:
    """A row for each device."""
    rows = [
        (
            device,
            _at(min((part.min_us for part in parts if part.min_us is not None), default=None)),
            _at(max((part.max_us for part in parts if part.max_us is not None), default=None)),
            sum(part.rows for part in parts),
        )
        for device, parts in _devices(days).items()
    ]
    columns: Sequence[tuple[str, Kind]] = (
        ("device_id", "text"),
        ("first_seen", "instant"),
        ("last_seen", "instant"),
        ("total_records", "integer"),
    )
    return ReportTable(columns, rows)


def device_latest(days: Mapping[Pair, DaySummary]) -> ReportTable:
    """The newest reading of each device that has one with an instant."""
    rows = []
    for device, parts in _devices(days).items():
        latest = parts[-1].latest
        if latest is not None:
            rows.append((device, _at(latest[0]), *latest[1 : len(LATEST) - 1]))
    numbers: list[tuple[str, Kind]] = [(name, "number") for name in NUMBERS]
    columns: Sequence[tuple[str, Kind]] = (
        ("device_id", "text"),
        ("timestamp", "instant"),
        *numbers,
        ("device_type", "text"),
        ("location", "text"),
    )
    return ReportTable(columns, rows)


TABLES = {
    "overview": overview,
    "daily_summary": daily_summary,
    "rows_by_day": rows_by_day,
    "devices": devices,
    "device_latest": device_latest,
}
