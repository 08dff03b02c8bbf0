"""In-process simulator of Amplitude's Export API as described in contracts/amplitude.md, with faults.

Invariants: it serves HTTP on a loopback port; both ends of a range are inclusive; unsettled hours are left out; the
same hours give the same events, in members whose names do not sort in time order. A generated event depends only on its
source, hour and number, and has the shapes of the contract: nulls, undocumented members, ids beyond 2^53, a session of
-1, event times long before the upload.
"""

import base64
import gzip
import io
import json
import random
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from threading import Lock
from typing import Any
from uuid import NAMESPACE_URL, uuid5

from simulators.http_server import Answer, CutHere, Piece, Request, Simulator, Streamed

HOUR = timedelta(hours=1)
PATH = "/api/2/export"
TEXT = {"Content-Type": "text/plain"}
PROJECT = 187_520
BRANDS = (("Apple", "iPhone15,3", "Apple iPhone"), ("Samsung", "SM-S918B", "Samsung Galaxy S"), ("Google", None, None))
PLACES = (
    ("Berlin", "Germany", "Berlin", "DE"),
    ("Lisboa", "Portugal", "Lisboa", "PT"),
    ("Tbilisi", "Georgia", None, "GE"),
)
TYPES = ("open", "view", "search", "purchase", "$identify")
LARGE = (
    b"The file size of the exported data is too large. Shorten the time ranges and try again. The limit size is 4GB."
)
SETTLED_AFTER = timedelta(hours=2)
MAX_DAYS = 365

Span = tuple[datetime, datetime]
Parts = Sequence[bytes]
"""The members of an hour, each a gzip file."""


@dataclass(frozen=True, slots=True)
class AmplitudeFault:
    """The fault of a request: another status, a page instead of the archive, a truncated archive, or a delay.

    `spoilt`: the members of the hour are truncated inside an intact archive; `named`: they have this name instead of
    one with their hour.
    """

    status: int = 200
    body: bytes = b""
    retry_after_seconds: int | None = None
    html: bool = False
    cut_bytes: int | None = None
    stall_seconds: float = 0.0
    spoilt: bool = False
    named: str = ""


@dataclass(slots=True)
class AmplitudeState:
    """What the simulator holds. `limit_hours`: longer ranges are refused with `limit_status`, 400 or 504.

    `made` generates the members of an hour that has no events in `events`. `lines` are additional raw lines of an hour.
    `faults`: every request for that hour gets the fault until it is removed. `odd`: further members of every archive.
    """

    keys: Mapping[str, tuple[str, str]]
    clock: Callable[[], datetime]
    made: Callable[[str, datetime], Parts] = lambda _source, _hour: ()
    events: dict[tuple[str, datetime], list[dict[str, Any]]] = field(default_factory=dict)
    lines: dict[tuple[str, datetime], list[bytes]] = field(default_factory=dict)
    faults: dict[tuple[str, datetime], AmplitudeFault] = field(default_factory=dict)
    odd: dict[str, bytes] = field(default_factory=dict)
    limit_hours: int = MAX_DAYS * 24
    limit_status: int = 400
    waiting: list[AmplitudeFault] = field(default_factory=list)
    asked: list[tuple[str, str, str]] = field(default_factory=list)
    lock: Lock = field(default_factory=Lock)

    def parts(self, source: str, hour_at: datetime) -> Parts:
        """The members of an hour."""
        events = self.events.get((source, hour_at))
        parts = packed(events) if events else self.made(source, hour_at)
        if lines := self.lines.get((source, hour_at)):
            parts = [*parts, gzip.compress(b"\n".join(lines), 1, mtime=0)]
        fault = self.faults.get((source, hour_at))
        return [part[: len(part) // 2] for part in parts] if fault and fault.spoilt else parts

    def fault_of(self, source: str, span: Span | None) -> AmplitudeFault:
        """The fault of a request for these hours: that of the first hour that has one."""
        found = (at for name, at in sorted(self.faults) if span and name == source and span[0] <= at <= span[1])
        return next((self.faults[source, at] for at in found), AmplitudeFault())


def packed(events: Sequence[Mapping[str, Any]]) -> Parts:
    """Events as members: two with events, the first made of two gzip streams, and an empty one."""
    lines = [json.dumps(event).encode() + b"\n" for event in events]
    half, quarter = len(lines) // 2, len(lines) // 4
    first = gzip.compress(b"".join(lines[:quarter]), 6, mtime=0) + gzip.compress(
        b"".join(lines[quarter:half]), 1, mtime=0
    )
    # The last line has no line end.
    return [first, gzip.compress(b"".join(lines[half:]).rstrip(b"\n"), 6, mtime=0), gzip.compress(b"", mtime=0)]


def generated(events_an_hour: int) -> Callable[[str, datetime], Parts]:
    """Hours of generated events; hours divisible by five are empty, so that empty hours occur too."""

    def parts(source: str, hour_at: datetime) -> Parts:
        number = int(hour_at.timestamp()) // 3600
        return packed(amplitude_events(source, hour_at, events_an_hour)) if number % 5 else ()

    return parts


class AmplitudeSimulator(Simulator):
    """`state` is what it holds and its faults."""

    def __init__(self, *, clock: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        super().__init__()
        self.state = AmplitudeState({"web": ("web-key", "web-secret"), "mobile": ("app-key", "app-secret")}, clock)

    def now_seconds(self) -> float:
        """See `Simulator`."""
        return self.state.clock().timestamp()

    def environment(self, *sources: str) -> dict[str, str]:
        """The settings that point Headwater at it."""
        pairs = {source: self.state.keys[source] for source in sources or ("web", "mobile")}
        named = {f"AMPLITUDE_{source.upper()}_CLIENT_ID": pair[0] for source, pair in pairs.items()}
        secret = {f"AMPLITUDE_{source.upper()}_SECRET_KEY": pair[1] for source, pair in pairs.items()}
        return {"AMPLITUDE_BASE_URL": self.url, **named, **secret}

    def add_fault(self, fault: AmplitudeFault, times: int = 1) -> None:
        """Give the fault to the next `times` requests."""
        with self.state.lock:
            self.state.waiting.extend([fault] * times)

    def respond(self, request: Request) -> Answer:
        """The answer to any request, with the pending fault applied."""
        source = self._source(request.headers.get("authorization", ""))
        if source is None:
            return Answer(401, TEXT, b"")
        if request.path != PATH:
            return Answer(404, TEXT, b"not found")
        span = _span(request)
        with self.state.lock:
            self.state.asked.append((source, request.parameters.get("start", ""), request.parameters.get("end", "")))
            fault = self.state.waiting.pop(0) if self.state.waiting else self.state.fault_of(source, span)
        self.wait(fault.stall_seconds)
        if fault.status != 200 or fault.html:  # noqa: PLR2004 - HTTP
            wait = {} if fault.retry_after_seconds is None else {"Retry-After": str(fault.retry_after_seconds)}
            kind = {"Content-Type": "text/html"} if fault.html else TEXT
            return Answer(fault.status, {**kind, **wait}, b"<html>nginx</html>" if fault.html else fault.body)
        return self._export(source, span, fault)

    def _source(self, authorization: str) -> str | None:
        for source, pair in self.state.keys.items():
            if authorization == f"Basic {base64.b64encode(':'.join(pair).encode()).decode()}":
                return source
        return None

    def _export(self, source: str, span: Span | None, fault: AmplitudeFault) -> Answer:
        if span is None:
            return Answer(400, TEXT, b"Invalid start or end")
        first, last = span
        hours = (last - first) // HOUR + 1
        if hours < 1 or hours > MAX_DAYS * 24:
            return Answer(400, TEXT, b"The time range may not exceed 365 days.")
        if hours > self.state.limit_hours:
            return Answer(self.state.limit_status, TEXT, LARGE if self.state.limit_status == 400 else b"")  # noqa: PLR2004 - HTTP
        until = self.state.clock() - SETTLED_AFTER
        starts = [first + number * HOUR for number in range(hours) if first + (number + 1) * HOUR <= until]
        found = {at: parts for at in starts if (parts := self.state.parts(source, at))}
        if not found:
            return Answer(404, TEXT, b"Raw data files were not found.")
        pieces = _cut(_zipped(found, fault.named, self.state.odd), fault.cut_bytes)
        body = Streamed(pieces, lambda _rows, _bytes, _whole: None)
        return Answer(200, {"Content-Type": "application/zip"}, body)


def _span(request: Request) -> Span | None:
    """The first and the last requested hour; None when they cannot be parsed."""
    try:
        first, last = (
            datetime.strptime(request.parameters[name] + "+0000", "%Y%m%dT%H%z") for name in ("start", "end")
        )
    except (KeyError, ValueError):
        return None
    return first, last


def _zipped(hours: Mapping[datetime, Parts], named: str, odd: Mapping[str, bytes]) -> Iterator[Piece]:
    """A zip, generated while it is sent; members sorted by name, as the service does."""
    members = {
        f"{named}{number}" if named else f"{PROJECT}/{PROJECT}_{at:%Y-%m-%d}_{at.hour}#{number}.json.gz": part
        for at, parts in hours.items()
        for number, part in enumerate(parts)
    }
    members.update(odd)
    sink = _Sink()
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_DEFLATED) as made:
        for name in sorted(members):
            made.writestr(zipfile.ZipInfo(name), members[name])
            yield Piece(sink.taken())
    yield Piece(sink.taken())


def _cut(pieces: Iterator[Piece], cut_bytes: int | None) -> Iterator[Piece]:
    left = cut_bytes
    for piece in pieces:
        if left is not None and len(piece.data) >= left:
            yield Piece(piece.data[:left])
            raise CutHere
        left = None if left is None else left - len(piece.data)
        yield piece


class _Sink(io.RawIOBase):
    """A buffer that a zip is written to and read from at the same time."""

    def __init__(self) -> None:
        self._held = bytearray()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._held += data
        return len(data)

    def taken(self) -> bytes:
        out = bytes(self._held)
        self._held.clear()
        return out


def amplitude_events(source: str, hour_at: datetime, count: int) -> Sequence[dict[str, Any]]:
    """The events that reached Amplitude in an hour."""
    return [amplitude_event(source, hour_at, number) for number in range(count)]


def amplitude_event(source: str, hour_at: datetime, number: int) -> dict[str, Any]:
    """One event, as in a line of an export."""
    name = f"{source}:{hour_at:%Y%m%dT%H}:{number}"
    draw = random.Random(name)  # noqa: S311 - plausible, not secret
    person = draw.randrange(200)
    brand, model, family = BRANDS[person % len(BRANDS)]
    city, country, region, _ = PLACES[person % len(PLACES)]
    arrived_at = hour_at + timedelta(seconds=draw.random() * 3599)
    # A phone that was offline uploads its stored events days later.
    happened_at = arrived_at - timedelta(days=draw.choice((0,) * 19 + (6,)), seconds=draw.random() * 30)
    return {
        "uuid": str(uuid5(NAMESPACE_URL, name)),
        "$insert_id": f"{person}-{draw.randrange(10**6)}" if number % 7 else None,
        "server_upload_time": _spaced(arrived_at),
        "server_received_time": _spaced(arrived_at),
        "event_time": _spaced(happened_at),
        "client_event_time": _spaced(happened_at),
        "app": PROJECT,
        "amplitude_id": 2**53 + person,
        "event_id": number,
        "session_id": int(happened_at.timestamp() * 1000) if number % 5 else -1,
        "user_id": f"user-{person}" if person % 4 else None,
        "device_id": f"{source}-device-{person}",
        "event_type": draw.choice(TYPES),
        "amplitude_event_type": None,
        "event_properties": {"screen": f"s{number % 9}", "price": round(draw.random() * 90, 2), "note": "é\n\u2028"},
        "user_properties": _person(source, person),
        "group_properties": {},
        "groups": {"plan": ["free"]} if person % 3 else {},
        "global_user_properties": {},
        "plan": None,
        "platform": "Web" if source == "web" else "iOS",
        "os_name": "Chrome" if source == "web" else "ios",
        "os_version": "122" if source == "web" else "17.3.1",
        "version_name": None if source == "web" else "4.2.0",
        "start_version": None if source == "web" else "4.0.0",
        "library": "amplitude-ts/2.3.8" if source == "web" else "amplitude-swift/1.4.2",
        "language": "English",
        "device_brand": brand,
        "device_carrier": None,
        "device_family": family,
        "device_manufacturer": brand,
        "device_model": model,
        "device_type": family,
        "city": city,
        "country": country,
        "region": region,
        "dma": None,
        "ip_address": f"203.0.113.{person % 250}",
        "location_lat": None,
        "location_lng": None,
        "amplitude_attribution_ids": None if person % 6 else f"attribution-{person}",
        "is_attribution_event": (False, None, "true", 1)[number % 4],
        "paying": None,
        "sample_rate": None,
        "$schema": 12,
        "source_id": None,
        "data": {"path": "/2/httpapi"},
    }


def _person(source: str, person: int) -> dict[str, Any]:
    records = (10_000 + person, str(10_000 + person), "N/A", None)
    return {
        "EHR_ID": records[person % 4],
        ("Gender", "gender")[person % 2]: ("Female", "male", None)[person % 3],
        "cohort_day": 20_000 + person,
        "cohort_week": 2_857,
        "cohort_month": 658,
        "registered_via_app": ("via app", "1", "0", 1, True, False, "unknown", None)[person % 8],
        "source": source,
    }


def _spaced(at: datetime) -> str:
    return at.strftime("%Y-%m-%d %H:%M:%S.%f")
