"""Answers a Flux query from the points of one bucket.

Invariant: errors that a server reports before its first byte are raised before the first table is made. The range and
the filters directly after it are answered from the index (series, then bisection), so a window costs only its own rows.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from simulators.annotated_csv import Result
from simulators.flux_parser import (
    UNITS_NS,
    Call,
    Expression,
    FluxError,
    Function,
    Literal,
    Member,
    Operation,
    Pipeline,
    parse_flux,
)
from simulators.flux_steps import (
    TIME,
    Bounds,
    Column,
    Data,
    Table,
    evaluate,
    function_argument,
    labels_of,
    run_step,
    table,
    text_argument,
    undefined,
)
from simulators.influx_storage import FieldKey, Points, Series

if TYPE_CHECKING:
    from simulators.line_protocol import Value

KINDS = {"float": "double", "integer": "long", "unsigned": "unsignedLong", "string": "string", "boolean": "boolean"}
SCHEMA = "influxdata/influxdb/schema"
THIRTY_DAYS_NS = 30 * UNITS_NS["d"]
MEASUREMENT = Member("_measurement")


def answer_flux(text: str, points: Points, bucket: str, now_ns: int) -> Iterator[Result]:
    """(name, tables) of each result, from the points of the only bucket.

    Raises FluxError or FluxSyntax, some of them only while tables are fetched.
    """
    program = parse_flux(text)
    results: dict[str, Pipeline] = {}
    for pipeline in program.pipelines:
        name, calls = _yielded(pipeline)
        if name in results:
            raise FluxError(f'tried to produce more than one result with the name "{name}"')
        used = [call.name for call in calls if call.name.startswith("schema.")]
        if used and SCHEMA not in program.imports:
            raise undefined(replace(calls[0], name="schema"))
        results[name] = calls
    return ((name, _Run(points, bucket, now_ns).tables(calls)) for name, calls in results.items())


def _yielded(pipeline: Pipeline) -> tuple[str, Pipeline]:
    if pipeline[-1].name == "yield":
        return text_argument(pipeline[-1], "name", "_result"), pipeline[:-1]
    return "_result", pipeline


class _Run:
    """One running pipeline."""

    def __init__(self, points: Points, bucket: str, now_ns: int) -> None:
        self._points = points
        self._bucket = bucket
        self._now_ns = now_ns

    def tables(self, pipeline: Pipeline) -> Iterable[Table]:
        if not pipeline:
            raise FluxError("compilation failed: an empty pipeline")
        first, *steps = pipeline
        bounds = (0, self._now_ns)
        if first.name == "from":
            tables, bounds, steps = self._from(first, steps)
        elif first.name in SCHEMA_CALLS:
            tables = iter(self._schema(first))
        else:
            raise undefined(first)
        for call in steps:
            tables = run_step(tables, call, bounds)
        return tables

    def _from(self, first: Call, steps: list[Call]) -> tuple[Iterable[Table], Bounds, list[Call]]:
        name = self._check_bucket(first)
        if not steps or steps[0].name != "range":
            raise FluxError(f"cannot submit unbounded read to \"{name}\"; try bounding 'from' with a call to 'range'")
        bounds = self._bounds(steps[0])
        predicates, rest = [], steps[1:]
        while rest and _pushed_down(rest[0]):
            predicates.append(function_argument(rest.pop(0), "fn").body)
        return self._stored(bounds, predicates), bounds, rest

    def _check_bucket(self, call: Call) -> str:
        name = text_argument(call, "bucket")
        if name != self._bucket:
            raise FluxError(f'failed to initialize execute state: could not find bucket "{name}"', "not found")
        return name

    def _bounds(self, call: Call) -> Bounds:
        start = self._instant(call, "start", None)
        stop = self._instant(call, "stop", self._now_ns)
        if start >= stop:
            raise FluxError('error calling function "range" ' + call.where + ": cannot query an empty range")
        return start, stop

    def _instant(self, call: Call, name: str, default: int | None) -> int:
        value = call.arguments.get(name)
        if isinstance(value, Literal) and isinstance(value.value, int) and value.kind in ("time", "duration"):
            return value.value + (self._now_ns if value.kind == "duration" else 0)
        if value is None and default is not None:
            return default
        raise FluxError(f'error calling function "range" {call.where}: {name} is missing or not a time')

    def _matching(
        self, bounds: Bounds, predicates: Sequence[Expression]
    ) -> Iterator[tuple[Series, FieldKey, dict[str, object]]]:
        start, stop = bounds
        for series in self._points.series(_measurement(predicates)):
            base = {"_start": start, "_stop": stop, "_measurement": series.measurement, **dict(series.tags)}
            if any(_never(predicate, base) for predicate in predicates):
                continue
            for key in self._points.fields(series, start, stop):
                row = {**base, "_field": key[0]}
                if all(evaluate(predicate, row) is True for predicate in predicates):
                    yield series, key, row

    def _stored(self, bounds: Bounds, predicates: Sequence[Expression]) -> Iterator[Table]:
        """A table per series and field. Where a field's type changes between shards of the range, the server's cursor
        ends: only the points before that, with the first type, are returned.
        """
        found: dict[tuple[int, str], list[tuple[Series, FieldKey]]] = {}
        for series, key, _row in self._matching(bounds, predicates):
            found.setdefault((id(series), key[0]), []).append((series, key))
        for (series, key), *others in found.values():
            if others:
                yield self._first_type_table(series, [key, *(other for _, other in others)], bounds)
            else:
                yield self._series_table(series, key, bounds, bounds[1])

    def _first_type_table(self, series: Series, keys: list[FieldKey], bounds: Bounds) -> Table:
        firsts = {key: self._points.window(series, *bounds, only=[key]).first(key) for key in keys}
        key = min(firsts, key=firsts.__getitem__)
        changed = min(self._points.shard(at) for other, at in firsts.items() if other != key)
        return self._series_table(series, key, bounds, self._points.shard_start(changed))

    def _series_table(self, series: Series, key: FieldKey, bounds: Bounds, end: int) -> Table:
        """Columns in the server's order: _start, _stop, _time, _value, _field, _measurement, tags by name."""
        tags = [Column(name, "string", group=True) for name, _ in series.tags]
        columns = (
            Column("_start", TIME, group=True),
            Column("_stop", TIME, group=True),
            Column("_time", TIME),
            Column("_value", KINDS[key[1]]),
            Column("_field", "string", group=True),
            Column("_measurement", "string", group=True),
            *tags,
        )
        values: tuple[Value, ...] = (*bounds, key[0], series.measurement, *(value for _, value in series.tags))

        def load() -> Data:
            window = self._points.window(series, bounds[0], end, only=[key])
            cells = window.cells[key]
            times = list(window.times)
            if None in cells:
                times = [time for time, cell in zip(times, cells, strict=True) if cell is not None]
                cells = [cell for cell in cells if cell is not None]
            constant: list[list[Value]] = [[value] * len(times) for value in values]
            return [*constant[:2], times, cells, *constant[2:]]

        return Table(columns, values, load)

    def _schema(self, call: Call) -> list[Table]:
        """One sorted column `_value`; no table when it would be empty. The default start is 30 days ago."""
        self._check_bucket(call)
        start = self._instant(call, "start", self._now_ns - THIRTY_DAYS_NS)
        stop = self._instant(call, "stop", self._now_ns)
        predicates = [function_argument(call, "predicate").body] if "predicate" in call.arguments else []
        rows = (row for _, _, row in self._matching((start, stop), predicates))
        found = sorted({value for row in rows for value in SCHEMA_CALLS[call.name](call, row)})
        return [table([Column("_value", "string")], [found])] if found else []


def _tag_value(call: Call, row: Mapping[str, object]) -> list[str]:
    value = row.get(text_argument(call, "tag"))
    return [str(value)] if value is not None else []


SCHEMA_CALLS: Mapping[str, Callable[[Call, Mapping[str, object]], list[str]]] = {
    "schema.measurements": lambda _call, row: [str(row["_measurement"])],
    "schema.tagKeys": lambda _call, row: [*row],
    "schema.tagValues": _tag_value,
    "schema.fieldKeys": lambda _call, row: [str(row["_field"])],
}


def _measurement(predicates: Iterable[Expression]) -> str | None:
    """The measurement that the predicates select; None when they select none."""
    for predicate in predicates:
        if isinstance(predicate, Operation) and predicate.sign == "and":
            found = _measurement(predicate.operands)
            if found is not None:
                return found
        elif isinstance(predicate, Operation) and predicate.sign == "==" and predicate.operands[0] == MEASUREMENT:
            value = predicate.operands[1]
            return str(value.value) if isinstance(value, Literal) else None
    return None


def _never(predicate: Expression, base: Mapping[str, object]) -> bool:
    """True when no field of the series can satisfy the predicate; avoids checking the fields."""
    if isinstance(predicate, Operation) and predicate.sign == "and":
        return any(_never(one, base) for one in predicate.operands)
    return "_field" not in labels_of(predicate) and evaluate(predicate, base) is not True


def _pushed_down(call: Call) -> bool:
    """True for a filter that the index can answer."""
    function = call.arguments.get("fn")
    return (
        call.name == "filter"
        and "onEmpty" not in call.arguments
        and isinstance(function, Function)
        and labels_of(function.body).isdisjoint({"_time", "_value"})
    )
