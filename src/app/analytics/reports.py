"""Reports: one SQL file each, whose head comments give title, typed parameters and the shape of the answer; and the
answers of the built-in ones from the summaries.

    -- title: Each device over time          display name
    -- path: devices/latest                  where it is served; default: the file name with dashes
    -- param from: timestamp = 2026-01-01: x typed query parameter, its default (none: null) and what it means
    -- param n: integer 1..60 = 5: x         the same with minimum and maximum
    -- param device_id: text required: x     a required parameter
    -- format: parquet                       default format of the answer (otherwise json)
    -- reads: timestamp >= $from             how the objects to read may be limited
    -- answer: devices                       name of the list in the JSON answer; `object`: its one row is the answer
    -- summary: devices                      a shipped report: answered from the summary of this name

Invariant: values reach DuckDB only as bound parameters; only the placeholder is substituted in the SQL text.
"""

import json
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

from app.analytics.engine import NANOS, NUMBERS, RELATION
from app.core.closed_days import EVERYTHING, ReportSpan
from app.core.errors import Permanent, Rejected
from app.db.object_summaries import NO_DAY, DaySummary, Pair
from app.web.text_values import instant

PLACEHOLDER = re.compile(r"\bread_parquet\s*\(\s*(['\"]?)\{\{S3_PATH\}\}\1\s*\)", re.IGNORECASE)
# What may follow a table in FROM and is no alias of it.
CLAUSES = (
    "where|group|having|order|limit|offset|window|qualify|union|except|intersect|join|inner|left|right|full|cross|natural"
    "|asof|positional|semi|anti|on|using|sample|tablesample|pivot|unpivot|select|fetch|with"
)
ALIAS = re.compile(rf"\s+(?!(?:{CLAUSES})\b)[A-Za-z_\"]", re.IGNORECASE)
NAME = re.compile(r"[a-z][a-z0-9_]{0,60}")
PATH = re.compile(r"[a-z0-9_-]{1,60}(/[a-z0-9_-]{1,60}){0,3}")
PARAM = re.compile(
    r"(?P<name>\w+): *(?P<kind>\w+)(?: +(?P<low>-?\d+)\.\.(?P<high>-?\d+))?(?P<required> +required)?"
    # a time of day has colons too: `= 2026-01-01T12:00:00Z: meaning`
    r"(?: *= *(?P<default>'[^']*'|[\d-]+[T ][\d:.]+(?:Z|[+-][\d:]+)?|[^:]*?))?(?: *: *(?P<meaning>.*))?"
)
LIMIT = re.compile(r"(device_id *=|timestamp *>=|timestamp *<) *\$(\w+)")
LIMITS: Mapping[str, str] = {"device_id=": "text", "timestamp>=": "timestamp", "timestamp<": "timestamp"}
FORMATS = ("json", "ndjson", "csv", "parquet", "xlsx")
FIELD = re.compile(r"--\s*(?:(title|path|reads|answer|summary|format):|(param)\b:?)(.*)")
RESERVED = frozenset({"format", "scan"})
OPTIONS = RESERVED | {"as_of", "formula_safe"}
TAKEN = frozenset({"schema", "explore"})
TAKEN_IN_JSON = frozenset({"count", "warnings"})
MAX_TEXT = 1000
WRITTEN = re.compile(r"[0-9.eE+-]+")  # Python also accepts 1_000, surrounding spaces, and digits of other scripts


class BadParameter(Rejected):
    """A parameter that the caller must correct (HTTP 422)."""


def _text(text: str) -> str:
    if len(text) > MAX_TEXT or "\0" in text:
        raise ValueError
    return text


def _whole(text: str) -> int:
    value = int(text)
    if not -(1 << 63) <= value < 1 << 63 or not WRITTEN.fullmatch(text):
        raise ValueError
    return value


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value) or not WRITTEN.fullmatch(text):
        raise ValueError
    return value


KINDS: Mapping[str, tuple[Any, str]] = {
    "text": (_text, f"text of at most {MAX_TEXT} characters"),
    "integer": (_whole, "a whole number"),
    "number": (_finite, "a number"),
    "boolean": (lambda text: {"true": True, "1": True, "false": False, "0": False}[text.lower()], "true or false"),
    "date": (date.fromisoformat, "a date such as 2026-02-07"),
    "timestamp": (
        lambda text: instant(text).replace(tzinfo=None),
        "a timestamp such as 2026-02-07T12:00:00Z; UTC when it has no offset",
    ),
}


@dataclass(frozen=True, slots=True)
class QueryParameter:
    """A query parameter. `default`: in the form that a caller would send, "" = null; `limits`: minimum and maximum."""

    name: str
    kind: str
    default: str = ""
    meaning: str = ""
    limits: tuple[int, int] | None = None
    required: bool = False

    def read(self, text: str | None) -> Any:
        """Parse `text`; None gives the default. Raises BadParameter."""
        if text is None and self.required:
            raise BadParameter(f"{self.name} is missing", f"send {self.name}: {self.allowed}")
        text = self.default if text is None else text
        if not text and not self.required and (self.kind == "text" or not self.default):
            return None
        try:
            value = KINDS[self.kind][0](text)
        except (ValueError, KeyError, OverflowError):
            raise BadParameter(f"{self.name}={text[:80]!r} is not {self.kind}", f"send {self.allowed}") from None
        if text == "" or (self.limits and not self.limits[0] <= value <= self.limits[1]):
            raise BadParameter(f"{self.name}={text[:80]!r} is not allowed", f"send {self.allowed}")
        return value

    @property
    def allowed(self) -> str:
        """A description of the allowed values."""
        return KINDS[self.kind][1] + (f" from {self.limits[0]} to {self.limits[1]}" if self.limits else "")


@dataclass(frozen=True, slots=True)
class ReportDefinition:
    """One SQL file. `text`: its content, with the placeholder; `answer` and `summary`: as in its head comments.
    `reads`: the parameters that limit device, start and end of what is read; "" = no limit.
    """

    name: str
    path: str
    title: str
    description: str
    text: str
    parameters: Sequence[QueryParameter] = ()
    reads: tuple[str, str, str] = ("", "", "")
    answer: str = "data"
    summary: str = ""
    format: str = "json"

    def sql(self, relation: str = RELATION) -> str:
        """The statement, reading from `relation`, whose own alias gives way to one in the statement."""
        bare = relation.removesuffix(f" AS {RELATION}")
        return PLACEHOLDER.sub(lambda found: bare if ALIAS.match(self.text, found.end()) else relation, self.text)

    def values(self, query: Iterable[tuple[str, str]]) -> Mapping[str, Any]:
        """Parameter -> value from a query string. Raises BadParameter for unknown, repeated, missing or bad ones."""
        given: dict[str, str] = {}
        names = {parameter.name for parameter in self.parameters}
        for name, text in query:
            if name not in names:
                raise BadParameter(
                    f"report {self.name} has no parameter {name[:80]!r}",
                    f"parameters: {', '.join(sorted(names | OPTIONS))}",
                )
            if name in given:
                raise BadParameter(f"{name} is given twice", "send it once")
            given[name] = text
        values = {each.name: each.read(given.get(each.name)) for each in self.parameters}
        span = self.span(values)
        if span.since is not None and span.until is not None and span.since >= span.until:
            _, first, last = self.reads
            raise BadParameter(
                f"{first}={span.since.isoformat()}Z is not earlier than {last}={span.until.isoformat()}Z",
                f"send the earlier timestamp as {first}",
            )
        return values

    def span(self, values: Mapping[str, Any]) -> ReportSpan:
        """The span to which `reads` limits the rows."""
        return ReportSpan(*map(values.get, self.reads))


def load_reports(folders: Sequence[Path]) -> Mapping[str, ReportDefinition]:
    """Path -> report, for every SQL file in the folders; a file in a later folder can replace a report that has no
    summary. Raises Permanent for an invalid file, or when two share a path.
    """
    reports: dict[str, ReportDefinition] = {}
    own: dict[str, Path] = {}
    for file in (file for folder in folders for file in sorted(folder.glob("*.sql"))):
        try:
            text = file.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise _fault(file.stem, f"cannot be read: {error}", "make it a readable UTF-8 file") from error
        report = parse(file.stem, text)
        if file.parent != folders[0] or report.summary not in TABLES:
            report = replace(report, summary="")  # elsewhere it is a word of the description
        if report.path in reports and (reports[report.path].summary or own[report.path] == file.parent):
            raise _fault(report.name, f"the path {report.path} is already used by another report", "rename the file")
        reports[report.path], own[report.path] = report, file.parent
    return reports


def parse(name: str, text: str) -> ReportDefinition:
    """Parse the report in `text`. Raises Permanent when its head or placeholder is invalid."""
    if not NAME.fullmatch(name):
        raise _fault(name, "its name is not usable", "use a to z, 0 to 9 and _")
    head: dict[str, list[str]] = {}
    words: list[str] = []
    for line in text.splitlines():
        found = FIELD.match(line)
        if found and (found[1] != "format" or found[3].strip() in FORMATS):
            head.setdefault(found[1] or found[2], []).append(found[3].strip())
        elif line.startswith("--"):
            words.append(line.removeprefix("--").strip())

    def last(field: str, default: str) -> str:
        return head[field][-1] if any(head.get(field, ())) else default

    text = text.strip().removesuffix(";")
    if "{{" in PLACEHOLDER.sub("", text):
        raise _fault(name, "holds {{...}} elsewhere", "write FROM read_parquet({{S3_PATH}}), nothing else is filled in")
    path = last("path", name.replace("_", "-"))
    if not PATH.fullmatch(path) or path in TAKEN:
        raise _fault(name, f"the path {path[:80]!r} cannot be", "use other words of a to z, 0 to 9, - and _")
    if (answer := last("answer", "data")) in TAKEN_IN_JSON:
        raise _fault(name, f"answer: {answer} is another part of the answer", "use another word")
    parameters = [_parameter(name, line) for line in head.get("param", ())]
    return ReportDefinition(
        name=name,
        path=path,
        title=last("title", name.replace("_", " ")),
        description=" ".join(words),
        text=text,
        parameters=parameters,
        reads=_reads(name, last("reads", ""), {each.name: each.kind for each in parameters}),
        answer=answer,
        summary=last("summary", ""),
        format=last("format", "json"),
    )


def _parameter(report: str, line: str) -> QueryParameter:
    found = PARAM.fullmatch(line)
    if not found or found["kind"] not in KINDS or not NAME.fullmatch(found["name"]) or found["name"] in RESERVED:
        raise _fault(report, f"cannot read `param {line[:80]}`", f"write `name: kind`; kinds: {', '.join(KINDS)}")
    if found["low"] and found["kind"] not in ("integer", "number"):
        raise _fault(report, f"`param {line[:80]}` has limits", "declare limits for integer and number only")
    default = (found["default"] or "").strip().strip("'")
    parameter = QueryParameter(
        found["name"],
        found["kind"],
        default,
        (found["meaning"] or "").strip(),
        (int(found["low"]), int(found["high"])) if found["low"] else None,
        required=bool(found["required"]),
    )
    if default:
        try:
            parameter.read(default)
        except BadParameter as error:
            raise _fault(report, error.message, "correct the default") from error
    return parameter


def _reads(report: str, line: str, kinds: Mapping[str, str]) -> tuple[str, str, str]:
    """Parse a `reads` line. `kinds`: parameter -> kind; a limit needs the kind of the column it is compared with."""
    limits = dict.fromkeys(LIMITS, "")
    for part in filter(None, (each.strip() for each in line.split(","))):
        found = LIMIT.fullmatch(part)
        what = found[1].replace(" ", "") if found else ""
        if not found or found[2] not in kinds:
            raise _fault(
                report,
                f"cannot read `reads: {part[:80]}`",
                "write device_id = $x, timestamp >= $x, timestamp < $x with declared parameters",
            )
        if kinds[found[2]] != LIMITS[what]:
            wanted = f"declare `param {found[2]}: {LIMITS[what]}`, or leave this out of `reads`"
            raise _fault(report, f"`reads: {part[:80]}` with {found[2]}, which is {kinds[found[2]]}", wanted)
        limits[what] = found[2]
    return limits["device_id="], limits["timestamp>="], limits["timestamp<"]


def _fault(report: str, message: str, hint: str) -> Permanent:
    return Permanent(f"report {report}.sql: {message}", hint)


# Answers of the built-in reports, from aggregates by device and day.
#
# Invariant: the answer does not depend on the order of the parts, so the same objects give the same bytes.

LATEST = ("timestamp", *NUMBERS, "device_type", "location", NANOS)
"""The stored columns of the latest reading; older versions stored it without the nanoseconds at the end."""

EPOCH = datetime(1970, 1, 1)  # noqa: DTZ001 - timestamps in answers are naive UTC, as in DuckDB
ColumnKind = Literal["text", "integer", "number", "instant", "date"]
NUMBER: ColumnKind = "number"


@dataclass(frozen=True, slots=True)
class ReportTable:
    """Rows, and column -> kind in column order; timestamps are naive UTC."""

    columns: Mapping[str, ColumnKind]
    rows: Sequence[tuple[Any, ...]]


def merged(parts: Iterable[DaySummary]) -> Mapping[Pair, DaySummary]:
    """Merge the parts of each (device, day) pair into one."""
    by_pair: dict[Pair, list[DaySummary]] = {}
    for part in parts:
        by_pair.setdefault((part.device, part.day), []).append(part)
    return {pair: many[0] if len(many) == 1 else _merged(many) for pair, many in by_pair.items()}


def _merged(parts: Sequence[DaySummary]) -> DaySummary:
    """The sum of parts, with the device and day of the first."""
    return DaySummary(
        device=parts[0].device,
        day=parts[0].day,
        rows=sum(part.rows for part in parts),
        min_us=min((part.min_us for part in parts if part.min_us is not None), default=None),
        max_us=max((part.max_us for part in parts if part.max_us is not None), default=None),
        voltage_sum=_sum(part.voltage_sum for part in parts),
        voltage_count=sum(part.voltage_count for part in parts),
        temperature_max=max((part.temperature_max for part in parts if part.temperature_max is not None), default=None),
        soc_sum=_sum(part.soc_sum for part in parts),
        soc_count=sum(part.soc_count for part in parts),
        latest=max((part.latest for part in parts if part.latest is not None), key=rank, default=None),
    )


def _sum(values: Iterable[float | None]) -> float | None:
    """An exactly rounded sum, independent of the order."""
    held = [value for value in values if value is not None]
    try:
        return math.fsum(held) if held else None
    except OverflowError:
        return math.inf


def rank(latest: tuple[Any, ...]) -> list[tuple[bool, Any]]:
    """Sort key: timestamp with nanoseconds; ties as DuckDB orders structs: left to right, null greatest."""
    instant, *values = latest[: len(LATEST) - 1]
    nanos = latest[-1] if len(latest) == len(LATEST) else 0
    return [(value is None, 0 if value is None else value) for value in (instant, nanos, *values)]


def _mean(total: float | None, count: int) -> float | None:
    return total / count if total is not None and count and math.isfinite(total) else None


def _at(microseconds: int | None) -> datetime | None:
    return None if microseconds is None else EPOCH + timedelta(microseconds=microseconds)


def _devices(days: Mapping[Pair, DaySummary]) -> Mapping[str, list[DaySummary]]:
    """Device id -> its parts, oldest first. Sorted by code point, as in DuckDB; rows without a device are left out."""
    by_text: dict[str, list[DaySummary]] = {}
    for part in sorted(days.values(), key=lambda part: part.day):
        by_text.setdefault(part.device, []).append(part)
    found = {json.loads(text): parts for text, parts in by_text.items()}
    return {device: found[device] for device in sorted(device for device in found if device is not None)}


def _span(parts: Collection[DaySummary]) -> tuple[datetime | None, datetime | None, int]:
    """First and last timestamp, and row count."""
    first = min((part.min_us for part in parts if part.min_us is not None), default=None)
    last = max((part.max_us for part in parts if part.max_us is not None), default=None)
    return _at(first), _at(last), sum(part.rows for part in parts)


def parts_within(days: Mapping[Pair, DaySummary], span: ReportSpan) -> Mapping[Pair, DaySummary]:
    """The parts within a span of whole days."""
    if span == EVERYTHING:
        return days
    text = None if span.device is None else json.dumps(span.device)
    first = NO_DAY if span.since is None else (span.since - EPOCH).days
    end = math.inf if span.until is None else (span.until - EPOCH).days
    is_timed = span.since is not None or span.until is not None
    return {
        (own, day): part
        for (own, day), part in days.items()
        if text in (None, own) and first <= day < end and not (is_timed and day == NO_DAY)
    }


def overview(days: Mapping[Pair, DaySummary]) -> ReportTable:
    """One row."""
    first, last, rows = _span(days.values())
    devices = len({part.device for part in days.values()} - {"null"})
    return ReportTable(
        {"total_rows": "integer", "device_count": "integer", "min_timestamp": "instant", "max_timestamp": "instant"},
        [(rows, devices, first, last)],
    )


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
    numbers = dict.fromkeys(("avg_voltage", "max_temperature", "avg_soc"), NUMBER)
    return ReportTable({"device_id": "text", "date": "date", **numbers, "row_count": "integer"}, rows)


def rows_by_day(days: Mapping[Pair, DaySummary]) -> ReportTable:
    """A row for each day, over all devices."""
    parts: dict[int, list[DaySummary]] = {}
    for part in days.values():
        if part.day != NO_DAY:
            parts.setdefault(part.day, []).append(part)
    rows = [
        (
            date(1970, 1, 1) + timedelta(days=day),
            sum(part.rows for part in parts[day]),
            sum(part.device != "null" for part in parts[day]),
        )
        for day in sorted(parts)
    ]
    return ReportTable({"date": "date", "row_count": "integer", "device_count": "integer"}, rows)


def devices(days: Mapping[Pair, DaySummary]) -> ReportTable:
    """A row for each device."""
    return ReportTable(
        {"device_id": "text", "first_seen": "instant", "last_seen": "instant", "total_records": "integer"},
        [(device, *_span(parts)) for device, parts in _devices(days).items()],
    )


def device_latest(days: Mapping[Pair, DaySummary]) -> ReportTable:
    """The latest reading of each device; devices without any timestamp are left out."""
    rows = [
        (device, _at(latest[0]), *latest[1 : len(LATEST) - 1])
        for device, parts in _devices(days).items()
        if (latest := parts[-1].latest) is not None
    ]
    numbers = dict.fromkeys(NUMBERS, NUMBER)
    texts: Mapping[str, ColumnKind] = {"device_type": "text", "location": "text"}
    return ReportTable({"device_id": "text", "timestamp": "instant", **numbers, **texts}, rows)


TABLES = {
    "overview": overview,
    "daily_summary": daily_summary,
    "rows_by_day": rows_by_day,
    "devices": devices,
    "device_latest": device_latest,
}
