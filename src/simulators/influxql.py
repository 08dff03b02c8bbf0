"""Answers InfluxQL statements from the points of one database, as an InfluxDB 1.x does over `/query`.

Invariant: rows of all series that match are merged by time; a row in which no selected field has a value is not there;
a measurement or a tag that does not exist gives an empty result, never an error.
"""

import heapq
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from simulators.flux_parser import parse_rfc3339
from simulators.influx_storage import Cell, Points, Series, Window
from simulators.influxql_text import EVERY, Condition, Select, Selected, Show, Statement
from simulators.line_protocol import MAX_TIME_NS, MIN_TIME_NS

NUMERIC: Mapping[str, Callable[[Cell], Cell]] = {
    "float": lambda cell: None if cell is None else float(cell),
    "integer": lambda cell: None if cell is None else (_whole(cell) + 2**63) % 2**64 - 2**63,
    "unsigned": lambda cell: None if cell is None else _whole(cell) % 2**64,
}
CASTS = (*NUMERIC, "string", "boolean")
FUNCTIONS: Mapping[str, Callable[[Sequence[Cell]], Cell]] = {
    "count": len,
    "first": lambda cells: cells[0],
    "last": lambda cells: cells[-1],
    "sum": sum,  # type: ignore[dict-item]
    "mean": lambda cells: sum(cells) / len(cells),  # type: ignore[arg-type]
    "min": min,  # type: ignore[dict-item]
    "max": max,  # type: ignore[dict-item]
}
PREFERRED = ("float", "integer", "unsigned", "string", "boolean")


def _whole(cell: Cell) -> int:
    """As Go's conversion on amd64: a float that no int64 holds becomes the least one."""
    if isinstance(cell, int):
        return cell
    return int(cell) if isinstance(cell, float) and -(2.0**63) <= cell < 2.0**63 else -(2**63)


class QlError(Exception):
    """A statement that failed; the message stands in its result, the status stays 200."""


@dataclass(frozen=True, slots=True)
class Answered:
    """One series of a result. `tags` None = not grouped; `rows` begin with the time in nanoseconds, except for SHOW."""

    name: str
    columns: tuple[str, ...]
    rows: Iterable[Sequence[Cell]]
    tags: Mapping[str, str] | None = None
    timed: bool = True


@dataclass(frozen=True, slots=True)
class Span:
    """Half-open range of time; `bounded` when the statement named its start."""

    start_ns: int = MIN_TIME_NS
    stop_ns: int = MAX_TIME_NS + 1

    @property
    def bounded(self) -> bool:
        """True when there is a start."""
        return self.start_ns > MIN_TIME_NS


def answer_influxql(statement: Statement, points: Points, database: str) -> Iterator[Answered]:
    """The series of one statement's result. Raises QlError."""
    if isinstance(statement, Show):
        return SHOWS[statement.what](statement, points, database)
    return _Selection(statement, points).answers()


def _policies(_show: Show, points: Points, _database: str) -> Iterator[Answered]:
    columns = ("name", "duration", "shardGroupDuration", "replicaN", "default")
    minutes, seconds = divmod(points.shard_ns // 10**9, 60)
    return _shown("", columns, [["autogen", "0s", f"{minutes // 60}h{minutes % 60}m{seconds}s", 1, True]])


def _shown(name: str, columns: tuple[str, ...], rows: Sequence[Sequence[Cell]]) -> Iterator[Answered]:
    if rows:
        yield Answered(name, columns, rows, timed=False)


def _databases(_show: Show, _points: Points, database: str) -> Iterator[Answered]:
    return _shown("databases", ("name",), [[database]])


def _measurements(show: Show, points: Points, _database: str) -> Iterator[Answered]:
    names = sorted({series.measurement for series in _series_of(show, points)})
    return _shown("measurements", ("name",), [[name] for name in names[: show.limit or None]])


def _series_of(show: Show, points: Points) -> Iterator[Series]:
    measurement = show.source[-1] if show.source else None
    span = _span(show.where)
    first, last = points.shard(span.start_ns), points.shard(span.stop_ns - 1)
    start_ns = max(points.shard_start(first), MIN_TIME_NS)
    stop_ns = min(points.shard_start(last + 1), MAX_TIME_NS + 1)
    for series in points.series(measurement):
        is_there = not span.bounded or points.fields(series, start_ns, stop_ns)
        if is_there and (show.where is None or _tags_match(show.where, dict(series.tags))):
            yield series


def _field_keys(show: Show, points: Points, _database: str) -> Iterator[Answered]:
    found: dict[str, list[list[Cell]]] = {}
    for measurement, name, kind in points.types(show.source[-1] if show.source else None):
        found.setdefault(measurement, []).append([name, kind])
    for measurement, rows in found.items():
        yield from _shown(measurement, ("fieldKey", "fieldType"), rows)


def _tag_keys(show: Show, points: Points, _database: str) -> Iterator[Answered]:
    found: dict[str, set[str]] = {}
    for series in _series_of(show, points):
        found.setdefault(series.measurement, set()).update(name for name, _ in series.tags)
    for measurement, names in found.items():
        yield from _shown(measurement, ("tagKey",), [[name] for name in sorted(names)])


def _tag_values(show: Show, points: Points, _database: str) -> Iterator[Answered]:
    found: dict[str, set[tuple[str, str]]] = {}
    for series in _series_of(show, points):
        found.setdefault(series.measurement, set()).update(tag for tag in series.tags if tag[0] in show.keys)
    for measurement, tags in found.items():
        yield from _shown(measurement, ("key", "value"), sorted(tags)[: show.limit or None])


SHOWS: Mapping[str, Callable[[Show, Points, str], Iterator[Answered]]] = {
    "DATABASES": _databases,
    "RETENTION POLICIES": _policies,
    "MEASUREMENTS": _measurements,
    "FIELD KEYS": _field_keys,
    "TAG KEYS": _tag_keys,
    "TAG VALUES": _tag_values,
}


def _tags_match(condition: Condition, tags: Mapping[str, str]) -> bool:
    """Whether the tags satisfy the condition; comparisons of time are left out, a missing tag is the empty string."""
    if condition.parts:
        matches = (_tags_match(part, tags) for part in condition.parts)
        return all(matches) if condition.sign == "and" else any(matches)
    if condition.name == "time":
        return True
    equal = tags.get(condition.name, "") == condition.value
    return equal if condition.sign == "=" else not equal


def _span(condition: Condition | None) -> Span:
    if condition is None:
        return Span()
    if condition.sign == "and":
        spans = [_span(part) for part in condition.parts]
        return Span(max(span.start_ns for span in spans), min(span.stop_ns for span in spans))
    if condition.name != "time":
        return Span()
    at = condition.value if isinstance(condition.value, int) else _instant(str(condition.value))
    after = {">": Span(at + 1), ">=": Span(at), "=": Span(at, at + 1)}
    before = {"<": Span(stop_ns=at), "<=": Span(stop_ns=at + 1)}
    return {**after, **before}[condition.sign]


def _instant(text: str) -> int:
    try:
        return parse_rfc3339(text)
    except ValueError as error:
        raise QlError("invalid operation: time and *influxql.StringLiteral are not compatible") from error


class _Selection:
    """One SELECT on its way."""

    def __init__(self, select: Select, points: Points) -> None:
        self._select = select
        self._points = points
        self._measurement = select.source[-1]
        self._span = _span(select.where)
        self._fields: dict[str, list[str]] = {}
        for _, name, kind in points.types(self._measurement, self._span.start_ns, self._span.stop_ns):
            self._fields.setdefault(name, []).append(kind)
        for kinds in self._fields.values():
            kinds.sort(key=PREFERRED.index)
        self._check(select.where)

    def _check(self, condition: Condition | None) -> None:
        for part in condition.parts if condition else ():
            self._check(part)
        if condition and condition.name in self._fields and condition.cast != "tag":
            raise QlError(f"this simulator compares tags and time only, not the field {condition.name}")

    def answers(self) -> Iterator[Answered]:
        series = [
            one
            for one in self._points.series(self._measurement)
            if self._select.where is None or _tags_match(self._select.where, dict(one.tags))
        ]
        names = sorted({name for one in self._points.series(self._measurement) for name, _ in one.tags})
        selected = list(self._expanded(names))
        functions = {one.function for one in selected}
        if "" in functions and len(functions) > 1:
            raise QlError("mixing aggregate and non-aggregate queries is not supported")
        for tags, group in self._groups(series, names):
            answered = self._raw(group, selected) if "" in functions else self._aggregated(group, selected)
            rows = iter(answered)
            first = next(rows, None)
            if first is not None:
                columns = ("time", *_headings(selected))
                yield Answered(self._measurement, columns, self._limited(_chain(first, rows)), tags)

    def _limited(self, rows: Iterator[Sequence[Cell]]) -> Iterator[Sequence[Cell]]:
        limit, offset = self._select.limit, self._select.offset
        for number, row in enumerate(rows):
            if limit and number >= offset + limit:
                return
            if number >= offset:
                yield row

    def _expanded(self, tag_names: Sequence[str]) -> Iterator[Selected]:
        """Each `*` as what it stands for: all fields, and all tags that are not grouped by."""
        for one in self._select.selected:
            if one.name != EVERY:
                yield one
            elif one.function:
                for name in sorted(self._fields):
                    yield Selected(name, function=one.function, alias=f"{one.alias or one.function}_{name}")
            else:
                grouped = tag_names if EVERY in self._select.tags else self._select.tags
                free = [name for name in tag_names if name not in grouped]
                yield from map(Selected, sorted([*self._fields, *free]))

    def _groups(self, series: list[Series], names: list[str]) -> Iterator[tuple[dict[str, str] | None, list[Series]]]:
        by = names if EVERY in self._select.tags else self._select.tags
        if not by:
            yield None, series
            return
        groups: dict[tuple[str, ...], list[Series]] = {}
        for one in series:
            tags = dict(one.tags)
            groups.setdefault(tuple(tags.get(name, "") for name in by), []).append(one)
        for values, group in sorted(groups.items(), key=lambda item: item[0]):
            yield dict(zip(by, values, strict=True)), group

    def _raw(self, group: list[Series], selected: list[Selected]) -> Iterator[Sequence[Cell]]:
        """Rows of all series, by time, then by the order of the series."""
        ordered = [self._rows(one, number, selected) for number, one in enumerate(group)]
        for _, _, row in heapq.merge(*ordered, key=lambda item: item[:2], reverse=self._select.descending):
            yield row

    def _rows(self, series: Series, number: int, selected: list[Selected]) -> Iterator[tuple[int, int, list[Cell]]]:
        tags = dict(series.tags)
        window = self._points.window(series, self._span.start_ns, self._span.stop_ns)
        columns: list[Sequence[Cell]] = [window.times]
        fields = []
        for at, one in enumerate(selected, 1):
            cells = self._cells(one, window)
            if cells is not None:
                fields.append(at)
                columns.append(cells)
            else:
                value = None if one.cast in (*CASTS, "field") or one.name in self._fields else tags.get(one.name)
                columns.append([value] * len(window.times))
        rows = zip(*columns, strict=True)
        for row in reversed(list(rows)) if self._select.descending else rows:
            if any(row[at] is not None for at in fields):
                yield int(row[0] or 0), number, list(row)

    def _cells(self, one: Selected, window: Window) -> Sequence[Cell] | None:
        """The field's cells under one type, None when the series has none of it or a tag is meant.

        The type is the cast, else the first by preference among the shards of the span. A number is read as any
        number; shards in which the field is of another kind give nothing.
        """
        kinds = self._fields.get(one.name, ())
        if one.cast == "tag" or not kinds:
            return None
        kind = one.cast if one.cast in CASTS else kinds[0]
        read = [other for other in kinds if other == kind or {other, kind} <= NUMERIC.keys()]
        found = [(other, window.cells[one.name, other]) for other in read if (one.name, other) in window.cells]
        columns = [cells if other == kind else [NUMERIC[kind](cell) for cell in cells] for other, cells in found]
        if len(columns) <= 1:
            return columns[0] if columns else None
        return [next((cell for cell in row if cell is not None), None) for row in zip(*columns, strict=True)]

    def _aggregated(self, group: list[Series], selected: list[Selected]) -> Iterator[Sequence[Cell]]:
        unknown = [one.function for one in selected if one.function not in FUNCTIONS]
        if unknown:
            raise QlError(f"undefined function {unknown[0]}()")
        values = [self._values(group, one) for one in selected]
        if not any(times for times, _ in values):
            return
        rows: Iterable[Sequence[Cell]] = map(partial(self._row, selected, values), self._grid(values))
        for row in rows:
            if self._select.fill != "none" or any(cell is not None for cell in row[1:]):
                yield row

    def _values(self, group: list[Series], one: Selected) -> tuple[list[int], list[Cell]]:
        """Times and cells of one field over the series, by time."""
        pairs: list[tuple[int, Cell]] = []
        for series in group:
            window = self._points.window(series, self._span.start_ns, self._span.stop_ns)
            cells = self._cells(one, window) or ()
            pairs.extend((time, cell) for time, cell in zip(window.times, cells, strict=False) if cell is not None)
        pairs.sort(key=lambda pair: pair[0])
        return [time for time, _ in pairs], [cell for _, cell in pairs]

    def _grid(self, values: Sequence[tuple[list[int], list[Cell]]]) -> Sequence[tuple[int, int]]:
        """(start, stop) of each time bucket that can have a row."""
        every = self._select.every_ns
        if not every:
            return [(self._span.start_ns, self._span.stop_ns)]
        starts: Iterable[int] = sorted({time // every * every for times, _ in values for time in times})
        if self._select.fill != "none" and self._span.bounded:
            stop_ns = (
                min(self._span.stop_ns, max(starts) + every) if self._span.stop_ns > MAX_TIME_NS else self._span.stop_ns
            )
            starts = range(self._span.start_ns // every * every, stop_ns, every)
        buckets = [(start, start + every) for start in starts]
        return buckets[::-1] if self._select.descending else buckets

    def _row(
        self,
        selected: Sequence[Selected],
        values: Sequence[tuple[list[int], list[Cell]]],
        bucket: tuple[int, int],
    ) -> list[Cell]:
        start, stop = bucket
        row: list[Cell] = [start if self._select.every_ns or self._span.bounded else 0]
        for one, (times, cells) in zip(selected, values, strict=True):
            inside = cells[bisect_left(times, start) : bisect_left(times, stop)]
            empty = 0 if self._select.fill == "0" or (one.function == "count" and self._counts_zero(times)) else None
            row.append(FUNCTIONS[one.function](inside) if inside else empty)
        return row

    def _counts_zero(self, times: list[int]) -> bool:
        return bool(times) and self._select.fill == "null" and bool(self._select.every_ns)


def _chain(first: Sequence[Cell], rows: Iterator[Sequence[Cell]]) -> Iterator[Sequence[Cell]]:
    yield first
    yield from rows


def _headings(selected: Sequence[Selected]) -> Iterator[str]:
    """Column names; a name that was there before gets a number behind it."""
    seen: dict[str, int] = {}
    for one in selected:
        name = one.alias or one.function or one.name
        number = seen.get(name, 0)
        seen[name] = number + 1
        yield f"{name}_{number}" if number else name
