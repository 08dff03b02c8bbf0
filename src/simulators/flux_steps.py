"""Flux tables, and the transformations after `|>`: each maps tables to tables.

Invariants: every value of a group-key column is the same in all rows of a table, and after `merged` no two tables of a
stream have the same key. Rows are held as columns, with None for null, and fetched on demand. A step refuses arguments
that it does not know, so that a query which this simulator would answer differently from a server fails instead.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from simulators.flux_parser import Call, Expression, FluxError, Function, Items, Literal, Member, Name, Operation
from simulators.line_protocol import Value

TIME = "dateTime:RFC3339"
FLUX_NAMES = {
    "double": "float",
    "long": "int",
    "unsignedLong": "uint",
    "boolean": "bool",
    "string": "string",
    TIME: "time",
}
Cells = Sequence[Value | None]
Data = list[Cells]


@dataclass(frozen=True, slots=True)
class Column:
    """`kind` is the `#datatype` value, `group` the `#group` value."""

    label: str
    kind: str
    group: bool = False


@dataclass(frozen=True, slots=True)
class Table:
    """`key` holds the values of the group columns in the order of `columns`; `load` fetches all cells, by column."""

    columns: tuple[Column, ...]
    key: tuple[Value | None, ...]
    load: Callable[[], Data]

    def labels(self) -> tuple[str, ...]:
        """Column names in order."""
        return tuple(column.label for column in self.columns)

    def key_by_label(self) -> dict[str, Value | None]:
        """The group key as a mapping."""
        return dict(zip((one.label for one in self.columns if one.group), self.key, strict=True))

    def index(self, label: str) -> int:
        """Position of a column. Raises FluxError for an unknown name."""
        labels = self.labels()
        if label not in labels:
            raise FluxError(f'no column "{label}" exists')
        return labels.index(label)


def table(columns: Sequence[Column], data: Data, key: Sequence[Value | None] = ()) -> Table:
    """A table whose rows are already loaded."""
    return Table(tuple(columns), tuple(key), lambda: data)


def keep_columns(source: Table, keep: Callable[[str], bool]) -> Table:
    """The table without columns that `keep` rejects; a dropped group column leaves the key too."""
    wanted = [at for at, column in enumerate(source.columns) if keep(column.label)]
    columns = tuple(source.columns[at] for at in wanted)
    key = tuple(value for label, value in source.key_by_label().items() if keep(label))

    def load() -> Data:
        data = source.load()
        return [data[at] for at in wanted]

    return Table(columns, key, load)


def merged(tables: Iterable[Table]) -> list[Table]:
    """Merge tables with the same key, in order of first occurrence; the result has all columns, with null in gaps."""
    groups: dict[object, list[Table]] = {}
    for one in tables:
        key = tuple((label, type(value), value) for label, value in sorted(one.key_by_label().items()))
        groups.setdefault(key, []).append(one)
    return [group[0] if len(group) == 1 else _union(group) for group in groups.values()]


def _union(group: list[Table]) -> Table:
    columns: dict[str, Column] = {}
    for one in group:
        for column in one.columns:
            known = columns.setdefault(column.label, column)
            if known.kind != column.kind:
                kinds = f"{FLUX_NAMES[known.kind]} and {FLUX_NAMES[column.kind]}"
                raise FluxError(f"schema collision: cannot group {kinds} types together")

    def load() -> Data:
        parts: list[list[Value | None]] = [[] for _ in columns]
        for one in group:
            data = dict(zip(one.labels(), one.load(), strict=True))
            length = len(next(iter(data.values()), ()))
            for label, part in zip(columns, parts, strict=True):
                part.extend(data.get(label, (None,) * length))
        return list(parts)

    return Table(tuple(columns.values()), group[0].key, load)


def regrouped(tables: Iterable[Table], by: Callable[[str], bool]) -> list[Table]:
    """Tables split and merged so that the group key is the columns that `by` accepts."""
    parts: list[Table] = []
    for one in tables:
        columns = tuple(replace(column, group=by(column.label)) for column in one.columns)
        constant = one.key_by_label()
        if all(column.label in constant for column in columns if column.group):
            key = tuple(constant[column.label] for column in columns if column.group)
            parts.append(Table(columns, key, one.load))
        else:
            parts.extend(_split(columns, one.load()))
    return merged(parts)


def _split(columns: tuple[Column, ...], data: Data) -> Iterator[Table]:
    grouped = [at for at, column in enumerate(columns) if column.group]
    rows: dict[tuple[Value | None, ...], list[int]] = {}
    for number, key in enumerate(zip(*(data[at] for at in grouped), strict=True)):
        rows.setdefault(key, []).append(number)
    for key, numbers in rows.items():
        yield table(columns, take(data, numbers), key)


def take(data: Data, numbers: Sequence[int]) -> Data:
    """The rows with these indices."""
    return [[cells[number] for number in numbers] for cells in data]


def renamed(source: Table, new_label: Callable[[str], str]) -> Table:
    """Rename columns as `rename` does. Raises FluxError when two get the same name."""
    columns = tuple(replace(column, label=new_label(column.label)) for column in source.columns)
    labels = [column.label for column in columns]
    for label in labels:
        if labels.count(label) > 1:
            raise FluxError(f"table builder already has column with label {label}")
    return Table(columns, source.key, source.load)


def pivoted(tables: Iterable[Table], row: str, column: str, value: str) -> Iterator[Table]:
    """`pivot(rowKey: [row], columnKey: [column], valueColumn: value)`: one row per value of the row key, one column per
    value of the column key.

    Rows come in order of first occurrence of their row key, table by table; columns in neither the group key nor the
    row key are dropped. Raises FluxError when a column key value is the name of a column that stays.
    """
    groups: dict[object, list[Table]] = {}
    for one in tables:
        for label in (row, column, value):
            one.index(label)
        key = one.key_by_label()
        key.pop(column, None)
        groups.setdefault(tuple(sorted(key.items())), []).append(one)
    for group in groups.values():
        yield _pivot_group(group, row, column, value)


def _pivot_group(group: list[Table], row: str, column: str, value: str) -> Table:
    first = group[0]
    keys = [each for each in first.columns if each.group and each.label not in (column, value)]
    key = tuple(first.key_by_label()[each.label] for each in keys)
    times, fields = _spread(group, row, column, value)
    for name in fields:
        if name == row or any(each.label == name for each in keys):
            message = f'value "{name}" appears in a column key column, but a column named "{name}" already exists'
            raise FluxError(f'{message}; consider renaming "{name}" to something else before pivoting')
    kind_of_row = first.columns[first.index(row)].kind
    columns = [*keys, Column(row, kind_of_row), *(Column(name, kind) for name, (kind, _) in fields.items())]
    filled: Data = [[cell] * len(times) for cell in key]
    return table(columns, [*filled, times, *(cells for _, cells in fields.values())], key)


def _spread(group: list[Table], row: str, column: str, value: str) -> tuple[Cells, dict[str, tuple[str, Cells]]]:
    """Times in order of first occurrence, and the type and cells of each field for them."""
    times: dict[Value | None, int] = {}
    fields: dict[str, tuple[str, dict[int, Value | None]]] = {}
    for one in group:
        kind, data = one.columns[one.index(value)].kind, one.load()
        cells = (data[one.index(label)] for label in (column, row, value))
        for name, time, cell in zip(*cells, strict=True):
            known, found = fields.setdefault(str(name), (kind, {}))
            if known != kind:
                kinds = f"{FLUX_NAMES[known]} and {FLUX_NAMES[kind]}"
                raise FluxError(f'schema collision detected: column "{name}" is both of type {kinds}')
            found[times.setdefault(time, len(times))] = cell
    places = range(len(times))
    return list(times), {name: (kind, [found.get(at) for at in places]) for name, (kind, found) in fields.items()}


COMPARE: Mapping[str, Callable[[object, object], bool]] = {
    "==": lambda left, right: left == right,
    "!=": lambda left, right: left != right,
    "<": lambda left, right: left < right,  # type: ignore[operator]
    "<=": lambda left, right: left <= right,  # type: ignore[operator]
    ">": lambda left, right: left > right,  # type: ignore[operator]
    ">=": lambda left, right: left >= right,  # type: ignore[operator]
}

LOGIC: Mapping[str, Callable[[list[object]], object]] = {
    "exists": lambda values: values[0] is not None,
    "not": lambda values: None if values[0] is None else not values[0],
    "and": lambda values: False if False in values else None if None in values else True,
    "or": lambda values: True if True in values else None if None in values else False,
    "if": lambda values: values[1] if values[0] is True else values[2],
}


def undefined(call: Call) -> FluxError:
    """The compiler's error for an unknown function."""
    return FluxError(f"compilation failed: error at {call.where}: undefined identifier {call.name}")


def text_argument(call: Call, name: str, default: str | None = None) -> str:
    """A string argument. Raises FluxError when it is missing or has another type."""
    value = call.arguments.get(name)
    if isinstance(value, Literal) and isinstance(value.value, str):
        return value.value
    if value is None and default is not None:
        return default
    raise missing(call, name)


def integer_argument(call: Call, name: str, kind: str = "integer") -> int:
    """An argument that is an integer, or a `duration` in nanoseconds."""
    value = call.arguments.get(name)
    if isinstance(value, Literal) and value.kind == kind and isinstance(value.value, int):
        return value.value
    raise missing(call, name)


def texts_argument(call: Call, name: str, default: Sequence[str] | None = None) -> tuple[str, ...]:
    """An argument that is an array of strings."""
    value = call.arguments.get(name)
    if value is None and default is not None:
        return tuple(default)
    if not isinstance(value, Items):
        raise missing(call, name)
    texts = tuple(one.value for one in value.values if isinstance(one, Literal) and isinstance(one.value, str))
    if len(texts) != len(value.values):
        raise missing(call, name)
    return texts


def function_argument(call: Call, name: str) -> Function:
    """An argument that is a function of one parameter."""
    value = call.arguments.get(name)
    if not isinstance(value, Function):
        raise missing(call, name)
    return value


def applied(function: Function, value: str) -> object:
    """The result of applying a function to a string, such as the new name in `rename`."""

    def bound(expression: Expression) -> Expression:
        if expression == Name(function.parameter):
            return Literal("string", value)
        if isinstance(expression, Operation):
            return Operation(expression.sign, tuple(map(bound, expression.operands)))
        return expression

    return evaluate(bound(function.body), {})


def missing(call: Call, name: str) -> FluxError:
    """The compiler's error for a missing or unusable argument."""
    return FluxError(f"compilation failed: error at {call.where}: missing or wrong argument {name} of {call.name}")


def labels_of(expression: Expression) -> frozenset[str]:
    """The columns that a predicate reads."""
    if isinstance(expression, Member):
        return frozenset({expression.label})
    if isinstance(expression, Operation):
        return frozenset().union(*map(labels_of, expression.operands))
    return frozenset()


def evaluate(expression: Expression, row: Mapping[str, object]) -> object:
    """The value of a predicate for a row; None is null, and a missing column is null."""
    if isinstance(expression, Literal):
        return expression.value
    if isinstance(expression, Member):
        return row.get(expression.label)
    if isinstance(expression, Operation):
        return _operate(expression, [evaluate(one, row) for one in expression.operands])
    raise FluxError("compilation failed: a function may hold its parameter, literals and operators only")


def _operate(operation: Operation, values: list[object]) -> object:
    if operation.sign in LOGIC:
        return LOGIC[operation.sign](values)
    left, right = values
    if left is None or right is None:
        return None
    if operation.sign == "+":
        return _joined(left, right)
    if isinstance(left, str) != isinstance(right, str):
        raise FluxError("type conflict: string and a number cannot be compared")
    return COMPARE[operation.sign](left, right)


def _joined(left: object, right: object) -> str:
    if not isinstance(left, str) or not isinstance(right, str):
        raise FluxError("compilation failed: this simulator adds strings only")
    return left + right


Tables = Iterable[Table]
Bounds = tuple[int, int]
Step = Callable[[Tables, Call, Bounds], Tables]


def run_step(tables: Tables, call: Call, bounds: Bounds) -> Tables:
    """The tables after `|> call`. Raises FluxError for an unknown step or argument."""
    if call.name not in STEPS:
        raise undefined(call)
    step, known = STEPS[call.name]
    for name in call.arguments:
        if name not in known:
            raise FluxError(f"compilation failed: error at {call.where}: unexpected argument {name} of {call.name}")
    return step(tables, call, bounds)


def _filter(tables: Tables, call: Call, _bounds: Bounds) -> Iterator[Table]:
    """`filter`: a table left without rows is dropped unless `onEmpty: "keep"`."""
    predicate = function_argument(call, "fn").body
    keep_empty = text_argument(call, "onEmpty", "drop") == "keep"
    wanted = labels_of(predicate)
    for one in tables:
        key = one.key_by_label()
        varying = [column.label for column in one.columns if column.label in wanted and column.label not in key]
        if not varying:
            if evaluate(predicate, key) is True:
                yield one
            elif keep_empty:
                yield table(one.columns, [[] for _ in one.columns], one.key)
            continue
        rows = _matching(one, predicate, varying)
        if keep_empty or (rows and len(rows[0])):
            yield table(one.columns, rows, one.key)


def _matching(one: Table, predicate: Expression, varying: list[str]) -> Data:
    data, key = one.load(), one.key_by_label()
    cells = zip(*(data[one.index(label)] for label in varying), strict=True)
    chosen = (evaluate(predicate, {**key, **dict(zip(varying, row, strict=True))}) is True for row in cells)
    return take(data, [number for number, yes in enumerate(chosen) if yes])


def _narrowed(tables: Tables, call: Call, _bounds: Bounds) -> Tables:
    """`keep` and `drop`."""
    named, keeps = frozenset(texts_argument(call, "columns")), call.name == "keep"
    return merged(keep_columns(one, lambda label: (label in named) == keeps) for one in tables)


def _pivot(tables: Tables, call: Call, _bounds: Bounds) -> Tables:
    rows, columns = (texts_argument(call, name) for name in ("rowKey", "columnKey"))
    if len(rows) != 1 or len(columns) != 1:
        raise FluxError("this simulator pivots one column over one other only", "not implemented")
    return pivoted(tables, rows[0], columns[0], text_argument(call, "valueColumn"))


def _rename(tables: Tables, call: Call, _bounds: Bounds) -> Tables:
    function = function_argument(call, "fn")

    def new_label(label: str) -> str:
        new = applied(function, label)
        if not isinstance(new, str):
            raise FluxError(f"compilation failed: error at {call.where}: expected string but found something else")
        return new

    return merged(renamed(one, new_label) for one in tables)


def _group(tables: Tables, call: Call, _bounds: Bounds) -> Tables:
    return regrouped(tables, frozenset(texts_argument(call, "columns", ())).__contains__)


def _limit(tables: Tables, call: Call, _bounds: Bounds) -> Iterator[Table]:
    number = integer_argument(call, "n")
    for one in tables:
        yield table(one.columns, [cells[:number] for cells in one.load()], one.key)


def _with_key(one: Table, extra: Sequence[tuple[str, str, Cells]]) -> Table:
    """A table of the key columns of `one`, then the extra ones."""
    length = len(extra[0][2])
    named = {label for label, _, _ in extra}
    keys = [column for column in one.columns if column.group and column.label not in named]
    values = tuple(one.key_by_label()[column.label] for column in keys)
    data: Data = [[value] * length for value in values]
    data.extend(cells for _, _, cells in extra)
    return table([*keys, *(Column(label, kind) for label, kind, _ in extra)], data, values)


AGGREGATES: Mapping[str, Callable[..., Any]] = {"count": len, "sum": sum, "min": min, "max": max}
WINDOWED = {"createEmpty": Literal("boolean", value=False), "timeSrc": Literal("string", "_start")}


def _kind_of_aggregate(name: str, kind: str) -> str:
    """The type of an aggregate of a column. Raises FluxError for one that has no such aggregate."""
    if name == "count":
        return "long"
    if kind not in ("double", "long", "unsignedLong"):
        raise FluxError(f"unsupported input type for {name} aggregate: {kind}")
    return kind


def _whole(tables: Tables, call: Call, _bounds: Bounds) -> Iterator[Table]:
    """`count` and `sum` of each table; only `count` counts nulls."""
    label = text_argument(call, "column", "_value")
    for one in tables:
        at = one.index(label)
        kind = _kind_of_aggregate(call.name, one.columns[at].kind)
        cells = [cell for cell in one.load()[at] if cell is not None or call.name == "count"]
        yield _with_key(one, [(label, kind, [AGGREGATES[call.name](cells) if cells or call.name == "count" else None])])


def _selected(tables: Tables, call: Call, _bounds: Bounds) -> Iterator[Table]:
    """The whole row with the first, minimum or maximum value; of equal ones the first."""
    label = text_argument(call, "column", "_value")
    for one in tables:
        data = one.load()
        cells = data[one.index(label)]
        rows = [row for row, cell in enumerate(cells) if cell is not None]
        if call.name != "first" and rows:
            rows = [AGGREGATES[call.name](rows, key=lambda row: cells[row])]
        yield table(one.columns, take(data, rows[:1]), one.key)


def _windowed(tables: Tables, call: Call, bounds: Bounds) -> Iterator[Table]:
    """`aggregateWindow` as used for counting: non-empty windows on a grid from 1970, labelled by their start; the first
    one is cut at the start of the range.
    """
    every = integer_argument(call, "every", "duration")
    for name, wanted in WINDOWED.items():
        if call.arguments.get(name) != wanted:
            raise missing(call, name)
    function = call.arguments.get("fn")
    if not isinstance(function, Name) or function.text not in AGGREGATES:
        raise missing(call, "fn")
    for one in tables:
        data, kind = one.load(), _kind_of_aggregate(function.text, one.columns[one.index("_value")].kind)
        windows: dict[int, list[Any]] = {}
        for time, value in zip(data[one.index("_time")], data[one.index("_value")], strict=True):
            if value is not None:
                windows.setdefault(int(time or 0) // every * every, []).append(value)
        times = [max(at, bounds[0]) for at in sorted(windows)]
        values = [AGGREGATES[function.text](windows[at]) for at in sorted(windows)]
        yield _with_key(one, [("_time", TIME, times), ("_value", kind, values)])


STEPS: Mapping[str, tuple[Step, frozenset[str]]] = {
    "filter": (_filter, frozenset({"fn", "onEmpty"})),
    "drop": (_narrowed, frozenset({"columns"})),
    "keep": (_narrowed, frozenset({"columns"})),
    "rename": (_rename, frozenset({"fn"})),
    "pivot": (_pivot, frozenset({"rowKey", "columnKey", "valueColumn"})),
    "group": (_group, frozenset({"columns"})),
    "limit": (_limit, frozenset({"n"})),
    "count": (_whole, frozenset({"column"})),
    "sum": (_whole, frozenset({"column"})),
    "first": (_selected, frozenset({"column"})),
    "min": (_selected, frozenset({"column"})),
    "max": (_selected, frozenset({"column"})),
    "aggregateWindow": (_windowed, frozenset({"every", "fn", "createEmpty", "timeSrc"})),
}
"""Each step with the arguments that it knows."""
