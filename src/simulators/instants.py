"""Instants as InfluxDB writes them: integer nanoseconds since 1970, and RFC 3339 text with up to nine decimals.

Invariant: reading what was written gives the same nanosecond; nothing passes through a float.
"""

import re
from datetime import UTC, datetime, timedelta, timezone
from functools import lru_cache

NS = 10**9
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
RFC3339 = re.compile(
    r"(\d{4}-\d\d-\d\d)(?:[T ](\d\d:\d\d:\d\d)(?:\.(\d{1,9}))?(Z|[+-]\d\d:\d\d)?)?",
)
UNITS_NS = {
    "ns": 1,
    "us": 10**3,
    "u": 10**3,
    "µs": 10**3,
    "ms": 10**6,
    "s": NS,
    "m": 60 * NS,
    "h": 3600 * NS,
    "d": 86_400 * NS,
    "w": 7 * 86_400 * NS,
}
DURATION = re.compile(r"(\d+)(ns|us|µs|ms|u|s|m(?!o)|h|d|w)")


def rfc3339(time_ns: int) -> str:
    """`2026-02-07T12:00:00.5Z`: UTC, trailing zeros cut."""
    second, fraction = divmod(time_ns, NS)
    if not fraction:
        return _second(second) + "Z"
    return f"{_second(second)}.{fraction:09d}".rstrip("0") + "Z"


@lru_cache(maxsize=8192)
def _second(second: int) -> str:
    return (EPOCH + timedelta(seconds=second)).strftime("%Y-%m-%dT%H:%M:%S")


def parse_rfc3339(text: str) -> int:
    """Nanoseconds of an RFC 3339 text; a date alone is its midnight, no zone is UTC. Raises ValueError."""
    found = RFC3339.fullmatch(text)
    if found is None:
        raise ValueError(f"not a time: {text!r}")
    day, clock, fraction, zone = found.groups()
    at = datetime.fromisoformat(f"{day}T{clock or '00:00:00'}").replace(tzinfo=_zone(zone))
    elapsed = at - EPOCH
    return (elapsed.days * 86_400 + elapsed.seconds) * NS + int((fraction or "0").ljust(9, "0"))


def _zone(text: str | None) -> timezone:
    if text in (None, "Z"):
        return UTC
    assert text is not None  # noqa: S101 - told apart one line above
    minutes = int(text[1:3]) * 60 + int(text[4:6])
    return timezone(timedelta(minutes=-minutes if text[0] == "-" else minutes))


def duration_ns(text: str) -> int:
    """Nanoseconds of `1h30m`. Raises ValueError for anything else, months and years included."""
    parts = DURATION.findall(text)
    if not parts or "".join(number + unit for number, unit in parts) != text:
        raise ValueError(f"not a duration: {text!r}")
    return sum(int(number) * UNITS_NS[unit] for number, unit in parts)
