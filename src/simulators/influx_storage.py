"""The points of one bucket, stored as InfluxDB does: per series, in time order, overwritten field by field.

Invariant: (measurement, tag set, time) is the key of a point. Within one shard (a week by default) a field has one type
in the whole measurement; a point that breaks this is dropped and reported, the others of its batch are kept. Columns
are typed arrays parallel to one array of times, so a million points take some tens of megabytes and a window is found
by bisection.
"""

from array import array
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from threading import Lock

from simulators.line_protocol import Field, Point, Tags, Value

SHARD_NS = 7 * 86_400 * 10**9
YEAR_ONE_NS = 62_135_596_800 * 10**9  # shards are counted from 0001-01-01, a Monday; this is its distance from 1970
RESERVED_TAGS = frozenset({"_start", "_stop", "_time", "_value", "_field", "_measurement"})
CODES = {"float": "d", "integer": "q", "unsigned": "Q", "boolean": "b"}
Cell = Value | None
FieldKey = tuple[str, str]


class FieldColumn:
    """The values of one field with one type; a cell without a value has no bit in `present`."""

    __slots__ = ("kind", "present", "values")

    def __init__(self, kind: str, length: int) -> None:
        self.kind = kind
        self.present = bytearray(length)
        self.values: array[float] | array[int] | list[str]
        self.values = [""] * length if kind == "string" else array(CODES[kind], [0]) * length

    def open(self, at: int) -> None:
        """Insert one cell before index `at`."""
        self.present.insert(at, 0)
        self.values.insert(at, "" if self.kind == "string" else 0)  # type: ignore[arg-type]

    def extend(self, length: int, floats: Sequence[float] | None) -> None:
        """Append these values, or cells without a value."""
        self.present.extend((b"\0" if floats is None else b"\1") * length)
        filler = [""] * length if self.kind == "string" else [0] * length
        self.values.extend(filler if floats is None else floats)  # type: ignore[arg-type]

    def set(self, at: int, value: Value) -> None:
        """Write the cell, overwriting an older value."""
        self.values[at] = value  # type: ignore[assignment]
        self.present[at] = 1

    def cells(self, low: int, high: int) -> Sequence[Cell]:
        """A copy of the cells, None where there is no value."""
        values: Sequence[Value] = self.values[low:high]
        if self.kind == "boolean":
            values = [bool(value) for value in values]
        if 0 not in self.present[low:high]:
            return values
        return [value if one else None for value, one in zip(values, self.present[low:high], strict=True)]


class Series:
    """The points of one tag set, ascending by time."""

    __slots__ = ("columns", "measurement", "tags", "times")

    def __init__(self, measurement: str, tags: Tags) -> None:
        self.measurement = measurement
        self.tags = tags
        self.times = array("q")
        self.columns: dict[FieldKey, FieldColumn] = {}

    def write(self, time_ns: int, fields: Iterable[Field]) -> None:
        """Add the point, or overwrite the fields that it contains."""
        at = self._place(time_ns)
        for one in fields:
            key = (one.name, one.kind)
            column = self.columns.get(key)
            if column is None:
                column = self.columns[key] = FieldColumn(one.kind, len(self.times))
            column.set(at, one.value)

    def extend(self, times: Sequence[int], floats: Mapping[str, Sequence[float]]) -> None:
        """Append points; see `Points.extend`."""
        ascending = all(earlier < later for earlier, later in pairwise((*self.times[-1:], *times)))
        if not ascending:
            raise ValueError(f"times of {self.measurement} do not ascend behind those stored")
        for name in floats:
            self.columns.setdefault((name, "float"), FieldColumn("float", len(self.times)))
        self.times.extend(times)
        for (name, kind), column in self.columns.items():
            column.extend(len(times), floats.get(name) if kind == "float" else None)

    def _place(self, time_ns: int) -> int:
        end = len(self.times)
        at = end if not end or time_ns > self.times[-1] else bisect_left(self.times, time_ns)
        if at == end or self.times[at] != time_ns:
            self.times.insert(at, time_ns)
            for column in self.columns.values():
                column.open(at)
        return at

    def span(self, start_ns: int, stop_ns: int) -> tuple[int, int]:
        """The indices of the points in [start_ns, stop_ns)."""
        low = bisect_left(self.times, start_ns)
        return low, bisect_left(self.times, stop_ns, low)


@dataclass(frozen=True, slots=True)
class Window:
    """A copy of a series between two times: `cells[key]` is parallel to `times`; only fields with a value there."""

    times: Sequence[int]
    cells: dict[FieldKey, Sequence[Cell]] = field(default_factory=dict)

    def first(self, key: FieldKey) -> int:
        """The time of the field's first value."""
        return next(time for time, cell in zip(self.times, self.cells[key], strict=True) if cell is not None)


class Points:
    """All series of one bucket. Every method is thread-safe; return values are copies."""

    def __init__(self, shard_ns: int = SHARD_NS) -> None:
        self.shard_ns = shard_ns
        self.retention_seconds: int | None = 0  # only reported, to a token that may read buckets; nothing is dropped
        self._lock = Lock()
        self._series: dict[tuple[str, Tags], Series] = {}
        self._types: dict[tuple[str, int, str], str] = {}

    def write(self, points: Iterable[Point]) -> list[str]:
        """Store the points; returns one reason for each dropped point. A field called `time` is ignored."""
        dropped = []
        with self._lock:
            for given in points:
                point = given
                if any(one.name == "time" for one in given.fields):
                    point = given._replace(fields=tuple(one for one in given.fields if one.name != "time"))
                reason = self._conflict(point)
                if reason:
                    dropped.append(reason)
                    continue
                key = (point.measurement, point.tags)
                series = self._series.get(key)
                if series is None:
                    series = self._series[key] = Series(*key)
                series.write(point.time_ns, point.fields)
        return dropped

    def extend(self, key: tuple[str, Tags], times: Sequence[int], floats: Mapping[str, Sequence[float]]) -> None:
        """Store many points of one series at once: ascending times, all after those stored, float fields only.

        For loads of millions of points, which would take minutes through line protocol. Raises ValueError when the
        times do not ascend, the lengths differ or a field has another type.
        """
        measurement, _ = key
        with self._lock:
            series = self._series.setdefault(key, Series(*key))
            shards = set(map(self.shard, (*times[:1], *times[::1000], *times[-1:])))
            kinds = [self._types.setdefault((measurement, one, name), "float") for one in shards for name in floats]
            if set(kinds) - {"float"} or any(len(cells) != len(times) for cells in floats.values()):
                raise ValueError(f"fields of {measurement} have another type or another length than the times")
            series.extend(times, floats)

    def _conflict(self, point: Point) -> str:
        if not point.fields:
            return f'invalid field name: input field "time" on measurement "{point.measurement}" is invalid'
        for name, _ in point.tags:
            if name == "time":
                return f'invalid tag key: input tag "time" on measurement "{point.measurement}" is invalid'
            if name in RESERVED_TAGS:
                return f'this simulator has no tag "{name}": what a server makes of it is not known'
        shard = self.shard(point.time_ns)
        for one in point.fields:
            known = self._types.setdefault((point.measurement, shard, one.name), one.kind)
            if known != one.kind:
                return (
                    f'field type conflict: input field "{one.name}" on measurement "{point.measurement}" '
                    f"is type {one.kind}, already exists as type {known}"
                )
        return ""

    def shard(self, time_ns: int) -> int:
        """The number of the shard that contains this time."""
        return (time_ns + YEAR_ONE_NS) // self.shard_ns

    def shard_start(self, shard: int) -> int:
        """The first nanosecond of a shard."""
        return shard * self.shard_ns - YEAR_ONE_NS

    def series(self, measurement: str | None = None) -> list[Series]:
        """The series, ordered by measurement and tags. Read their points with `window` and `fields` only."""
        with self._lock:
            keys = sorted(key for key in self._series if measurement is None or key[0] == measurement)
            return [self._series[key] for key in keys]

    def fields(self, series: Series, start_ns: int, stop_ns: int) -> list[FieldKey]:
        """Name and type of each field that has a value in the span, sorted by name."""
        with self._lock:
            low, high = series.span(start_ns, stop_ns)
            return sorted(key for key, one in series.columns.items() if one.present.find(1, low, high) >= 0)

    def window(self, series: Series, start_ns: int, stop_ns: int, only: Iterable[FieldKey] = ()) -> Window:
        """The points of the span; with `only`, restricted to these fields."""
        wanted = set(only)
        with self._lock:
            low, high = series.span(start_ns, stop_ns)
            cells = {
                key: one.cells(low, high)
                for key, one in sorted(series.columns.items())
                if (not wanted or key in wanted) and one.present.find(1, low, high) >= 0
            }
            return Window(series.times[low:high], cells)

    def __len__(self) -> int:
        """Number of points stored."""
        with self._lock:
            return sum(len(series.times) for series in self._series.values())
