"""In-process simulator of AppMetrica's Logs API as described in contracts/appmetrica.md, with faults.

Invariants: a file is identified by the whole URL; it is ready after a number of requests, and kept for a day; each URL
has its own row order; at most three files per application are being made. One that nobody asks for any more, since its
client was killed, is made all the same: else it would keep its place in the queue for ever.
"""

import csv
import gzip
import io
import json
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from threading import Lock
from urllib.parse import urlencode
from uuid import UUID
from zoneinfo import ZoneInfo

from simulators.http_server import Answer, CutHere, Request, Simulator

HOUR = timedelta(hours=1)
BRANDS = (("Apple", "iPhone15,3"), ("Samsung", "SM-S918B"), ("Google", ""))
CITIES = (("Berlin", "DE"), ("Lisboa", "PT"), ("Tbilisi", "GE"))
EVENT_NAMES = ("open", "view", "search", "purchase")
TEXT = {"Content-Type": "text/plain"}
EXPORT = "/logs/v1/export/"
APPLICATIONS = "/management/v1/applications"
MOVED = b"Your query is moved to the end of the queue due to provided Cache-Control restriction."
QUEUED = b"There are already 3 enqueued queries for given application_id. Wait until they are completed."
KEPT_FOR = timedelta(hours=24)
QUEUE = 3
LATE_DAYS = 7

Rows = Sequence[Mapping[str, str]]


@dataclass(frozen=True, slots=True)
class AppMetricaFault:
    """The fault of one request: another status, no answer (`cut`), or a truncated file (`half`)."""

    status: int = 200
    body: bytes = b""
    retry_after_seconds: int | None = None
    cut: bool = False
    half: bool = False


@dataclass(slots=True)
class Build:
    """A file that is being made or is ready."""

    questions: int = 0
    asked_at_seconds: float = field(default_factory=time.monotonic)
    made_at: datetime | None = None
    body: bytes = b""


@dataclass(slots=True)
class AppMetricaState:
    """What the simulator holds. `rows(hour)`: rows received in an hour; `questions`: requests until a file is ready.

    `abandoned_seconds`: after so long without a request for it, a file is made anyway; by a real clock, since `clock`
    may stand still. `least_parts`: fewer parts are refused; `unknown`: columns that it refuses; `others`: files of
    other users in the queue. `columns`: the file's columns, out of the requested ones. `lines`: additional raw lines of
    an hour; a lone surrogate in a row stands for an invalid UTF-8 byte. `faults`: every request that includes the hour
    gets the fault.
    """

    clock: Callable[[], datetime]
    rows: Callable[[datetime], Rows] = lambda _hour: ()
    application_id: int = 1234567
    token: str = "demo-token"  # noqa: S105 - of the simulator
    zone: str = "Europe/Moscow"
    questions: int = 2
    abandoned_seconds: float = 10.0
    least_parts: int = 1
    unknown: frozenset[str] = frozenset()
    others: int = 0
    columns: Callable[[Sequence[str]], Sequence[str]] = lambda asked: asked
    lines: dict[datetime, list[bytes]] = field(default_factory=dict)
    faults: dict[datetime, AppMetricaFault] = field(default_factory=dict)
    builds: dict[str, Build] = field(default_factory=dict)
    waiting: list[AppMetricaFault] = field(default_factory=list)
    asked: list[tuple[str, int]] = field(default_factory=list)
    lock: Lock = field(default_factory=Lock)


def generated(application_id: int, events_an_hour: int) -> Callable[[datetime], Rows]:
    """Hours of generated events; hours divisible by seven are empty."""

    def rows(hour_at: datetime) -> Rows:
        number = int(hour_at.timestamp()) // 3600
        return appmetrica_rows(application_id, hour_at, events_an_hour) if number % 7 else ()

    return rows


class AppMetricaSimulator(Simulator):
    """`state` is what it holds and its faults."""

    def __init__(self, *, clock: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        super().__init__()
        self.state = AppMetricaState(clock)

    def now_seconds(self) -> float:
        """See `Simulator`."""
        return self.state.clock().timestamp()

    def environment(self) -> dict[str, str]:
        """The settings that point Headwater at it."""
        return {
            "APPMETRICA_BASE_URL": self.url,
            "APPMETRICA_API_KEY": self.state.token,
            "APPMETRICA_APPLICATION_ID": str(self.state.application_id),
            "APPMETRICA_POLL_INTERVAL_SECONDS": "1",
        }

    def add_fault(self, fault: AppMetricaFault, times: int = 1) -> None:
        """Give the fault to the next `times` requests."""
        with self.state.lock:
            self.state.waiting.extend([fault] * times)

    def respond(self, request: Request) -> Answer:
        """The answer to any request, with the pending fault applied."""
        with self.state.lock:
            fault = self.state.waiting.pop(0) if self.state.waiting else self._fault_of(request)
            answer = self._answer(request, fault)
            self.state.asked.append((f"{request.path}?{urlencode(request.parameters)}", answer.status))
        if fault.cut:
            raise CutHere
        return answer

    def _fault_of(self, request: Request) -> AppMetricaFault:
        """The fault of a request for these hours: that of the first hour that has one."""
        if not request.path.startswith(EXPORT):
            return AppMetricaFault()
        first, last = self._span(request.parameters)
        found = (at for at in sorted(self.state.faults) if first <= at <= last)
        return next((self.state.faults[at] for at in found), AppMetricaFault())

    def _span(self, given: Mapping[str, str]) -> tuple[datetime, datetime]:
        zone = ZoneInfo(self.state.zone)
        first, last = (
            datetime.fromisoformat(given[name]).replace(tzinfo=zone).astimezone(UTC)
            for name in ("date_since", "date_until")
        )
        return first, last

    def _answer(self, request: Request, fault: AppMetricaFault) -> Answer:
        if fault.status != 200:  # noqa: PLR2004 - HTTP
            wait = {} if fault.retry_after_seconds is None else {"Retry-After": str(fault.retry_after_seconds)}
            return Answer(fault.status, {**TEXT, **wait}, fault.body)
        if request.headers.get("authorization") != f"OAuth {self.state.token}":
            return Answer(401, TEXT, b"Unauthorized")
        if request.path == APPLICATIONS:
            listed = [{"id": self.state.application_id, "name": "Demo", "time_zone_name": self.state.zone}]
            return Answer(200, {"Content-Type": "application/json"}, json.dumps({"applications": listed}).encode())
        refused = self._refused(request)
        return refused or self._made(request, half=fault.half)

    def _refused(self, request: Request) -> Answer | None:
        given = request.parameters
        if not request.path.startswith(EXPORT) or not request.path.endswith(".csv"):
            return Answer(404, TEXT, b"Unknown resource")
        if given.get("application_id") != str(self.state.application_id):
            return Answer(403, TEXT, b"Access to the application is denied")
        for needed in ("date_since", "date_until", "fields"):
            if not given.get(needed):
                return Answer(400, TEXT, f"Parameter {needed} is missing".encode())
        for column in given["fields"].split(","):
            if column in self.state.unknown:
                return Answer(400, TEXT, f"Unknown field: {column}".encode())
        if int(given.get("parts_count", "1")) < self.state.least_parts:
            return Answer(400, TEXT, b"Try to use more parts.")
        return None

    def _made(self, request: Request, *, half: bool) -> Answer:
        """202 until the file was requested often enough; then the file."""
        now = self.state.clock()
        url = f"{request.path}?{urlencode(request.parameters)}"
        for each in self.state.builds.values():
            if each.made_at is None and time.monotonic() - each.asked_at_seconds > self.state.abandoned_seconds:
                each.made_at = now
        build = self.state.builds.get(url)
        if build is not None and build.made_at is not None and now - build.made_at > KEPT_FOR:
            build = None
        fresh = "no-cache" in request.headers.get("cache-control", "")
        if build is None or (fresh and build.made_at is not None):
            if self._busy() >= QUEUE:
                return Answer(429, TEXT, QUEUED)
            build = self.state.builds[url] = Build()
        elif fresh:
            build.questions = 0
            return Answer(202, TEXT, MOVED)
        build.asked_at_seconds = time.monotonic()
        if build.made_at is None and build.questions < self.state.questions:
            build.questions += 1
            percent = 100 * (build.questions - 1) // self.state.questions
            return Answer(202, TEXT, b"Wait for result" if build.questions == 1 else f"Progress is {percent}%".encode())
        build.made_at = build.made_at or now
        build.body = build.body or self._file(request, url)
        headers = {"Content-Type": "text/csv", "Content-Encoding": "gzip"}
        return Answer(200, headers, build.body[: len(build.body) // 2] if half else build.body)

    def _busy(self) -> int:
        return self.state.others + sum(build.made_at is None for build in self.state.builds.values())

    def _file(self, request: Request, url: str) -> bytes:
        given = request.parameters
        first, last = self._span(given)
        rows: list[Mapping[str, str] | bytes] = list(self._selected(given))
        rows += [line for at, lines in self.state.lines.items() if first <= at <= last for line in lines]
        random.Random(url.partition("&parts_count")[0]).shuffle(rows)  # noqa: S311 - no secret
        parts, number = int(given.get("parts_count", "1")), int(given.get("part_number", "0"))
        body = _csv(rows[number::parts], self.state.columns(given["fields"].split(",")))
        return gzip.compress(body, 1, mtime=0)

    def _selected(self, given: Mapping[str, str]) -> Iterator[Mapping[str, str]]:
        zone = ZoneInfo(self.state.zone)
        receive = given.get("date_dimension") == "receive"
        column = "event_receive_timestamp" if receive else "event_timestamp"
        at, end = self._span(given)
        hour_at = at.replace(minute=0, second=0) - HOUR
        last_at = end + (HOUR if receive else timedelta(days=LATE_DAYS))
        while hour_at <= last_at:
            for row in self.state.rows(hour_at):
                seconds = int(row[column]) if row[column].isdigit() and int(row[column]) else int(hour_at.timestamp())
                told = datetime.fromtimestamp(seconds, zone).strftime("%Y-%m-%d %H:%M:%S")
                if given["date_since"] <= told <= given["date_until"]:
                    yield row
            hour_at += HOUR


def _csv(rows: Sequence[Mapping[str, str] | bytes], columns: Sequence[str]) -> bytes:
    """Header and rows; the last line has no line end."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        if isinstance(row, bytes):
            text.write(row.decode("utf-8", "surrogateescape") + "\n")
        else:
            writer.writerow([row.get(column, "") for column in columns])
    return text.getvalue().rstrip("\n").encode("utf-8", "surrogateescape")


def appmetrica_rows(application_id: int, hour_at: datetime, count: int) -> Sequence[dict[str, str]]:
    """The events that AppMetrica received in an hour, every value as text; two of them equal in every column."""
    rows = [_received(application_id, hour_at, number) for number in range(count)]
    return [*rows, rows[0]] if rows else rows


def _received(application_id: int, hour_at: datetime, number: int) -> dict[str, str]:
    draw = random.Random(f"{application_id}:{hour_at:%Y%m%dT%H}:{number}")  # noqa: S311 - plausible, not secret
    person = draw.randrange(100)
    brand, model = BRANDS[person % len(BRANDS)]
    city, country = CITIES[person % len(CITIES)]
    received_at = hour_at + timedelta(seconds=number % 3600)
    happened_at = received_at - timedelta(seconds=draw.randrange(90), days=draw.choice((0,) * 9 + (5,)))
    properties = {"screen": f"s{number % 7}", "text": 'a "quoted"\nline, and another'}
    return {
        "event_json": {5: "", 7: "no json {", 9: "{}"}.get(number % 12, json.dumps(properties, indent=1)),
        "event_name": draw.choice(EVENT_NAMES),
        "event_receive_timestamp": str(int(received_at.timestamp())),
        "event_timestamp": str(int(happened_at.timestamp())),
        "session_id": str((2**64 - 1 if person % 5 == 0 else 10_000_000_000) - person),
        "installation_id": UUID(int=person + 1).hex,
        "appmetrica_device_id": str(2**64 - 1 - person),
        "city": city,
        "country_iso_code": country,
        "device_ipv6": f"::ffff:203.0.113.{person}",
        "device_locale": "de_DE",
        "device_manufacturer": brand,
        "device_model": model,
        "device_type": "phone",
        "operator_name": "MTS" if person % 2 else "",
        "os_name": "android",
        "os_version": "14",
        "profile_id": str(50_000 + person) if person % 3 else f"guest-{person}",
        "app_package_name": "com.example.app",
        "app_version_name": "4.2.0",
        "application_id": str(application_id),
    }
