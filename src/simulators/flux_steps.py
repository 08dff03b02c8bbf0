"""The transformations that stand behind `|>`: each takes tables and gives tables.

Invariant: a step reads only the arguments that it knows and refuses the others, so that a query which this simulator
would answer differently from a server fails instead.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from simulators.flux_arguments import (
    applied,
    evaluate,
    function_argument,
    labels_of,
    literal_argument,
    missing,
    predicate_argument,
    text_argument,
    texts_argument,
    undefined,
)
from simulators.flux_parser import Call, Expression, FluxError, Name
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
    """`kind` is the word of `#datatype`, `group` that of `#group`."""

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
        """Position of a column. Raises FluxError when there is none of that name."""
        labels = self.labels()
        if label not in labels:
            raise FluxError(f'no column "{label}" exists')
        return labels.index(label)


def table(columns: Sequence[Column], data: Data, key: Sequence[Value | None] = ()) -> Table:
    """A table whose rows are at hand."""
    return Table(tuple(columns), tuple(key), lambda: data)


def keep_columns(source: Table, keep: Callable[[str], bool]) -> Table:
    """Without the columns that `keep` refuses; a dropped group column leaves the key too."""
    wanted = [at for at, column in enumerate(source.columns) if keep(column.label)]
    columns = tuple(source.columns[at] for at in wanted)
    key = tuple(value for label, value in source.key_by_label().items() if keep(label))

    def load() -> Data:
        data = source.load()
        return [data[at] for at in wanted]

    return Table(columns, key, load)


def merged(tables: Iterable[Table]) -> list[Table]:
    """Tables of one key become one, in the order in which the keys were met; columns are united, gaps are null."""
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
    """The rows of these numbers."""
    return [[cells[number] for number in numbers] for cells in data]


def renamed(source: Table, new_label: Callable[[str], str]) -> Table:
    """Columns under other names, as `rename` gives them. Raises FluxError when two would get the same."""
    columns = tuple(replace(column, label=new_label(column.label)) for column in source.columns)
    labels = [column.label for column in columns]
    for label in labels:
        if labels.count(label) > 1:
            raise FluxError(f"table builder already has column with label {label}")
    return Table(columns, source.key, source.load)


@dataclass(frozen=True, slots=True)
class Axes:
    """The columns of a pivot: one row per value of `row`, one column per value of `column`, cells from `value`."""

    row: str = "_time"
    column: str = "_field"
    value: str = "_value"


def pivoted(tables: Iterable[Table], axes: Axes) -> Iterator[Table]:
    """`pivot(rowKey: [row], columnKey: [column], valueColumn: value)`: one column per value of the column key.

    Rows come in the order in which their row key is first met, table after table; columns that are neither group key
    nor row key are lost. Raises FluxError when a value of the column key is the name of a column that stays.
    """
    groups: dict[object, list[Table]] = {}
    for one in tables:
        for label in (axes.row, axes.column, axes.value):
            one.index(label)
        key = one.key_by_label()
        key.pop(axes.column, None)
        groups.setdefault(tuple(sorted(key.items())), []).append(one)
    for group in groups.values():
        yield from _pivot_group(group, axes)


def _pivot_group(group: list[Table], axes: Axes) -> Iterator[Table]:
    first = group[0]
    keys = [column for column in first.columns if column.group and column.label not in (axes.column, axes.value)]
    values = tuple(first.key_by_label()[column.label] for column in keys)
    times, fields = _spread(group, axes)
    for name in fields:
        if name == axes.row or any(column.label == name for column in keys):
            message = f'value "{name}" appears in a column key column, but a column named "{name}" already exists'
            raise FluxError(f'{message}; consider renaming "{name}" to something else before pivoting')
    kind_of_row = first.columns[first.index(axes.row)].kind
    columns = [*keys, Column(axes.row, kind_of_row), *(Column(name, kind) for name, (kind, _) in fields.items())]
    filled: Data = [[value] * len(times) for value in values]
    filled.append(times)
    filled.extend(cells for _, cells in fields.values())
    yield table(columns, filled, values)


def _spread(group: list[Table], axes: Axes) -> tuple[Cells, dict[str, tuple[str, Cells]]]:
    """Times in the order in which they are first met, and type and cells of each field beside them."""
    loaded = [(one, one.load()) for one in group]
    times = loaded[0][1][group[0].index(axes.row)]
    are_distinct = len(set(times)) == len(times)
    direct: dict[str, tuple[str, Cells]] = {}
    for one, data in loaded:
        name = one.key_by_label().get(axes.column)
        if name is None or name in direct or data[one.index(axes.row)] != times or not are_distinct:
            return _spread_slowly(loaded, axes)
        direct[str(name)] = one.columns[one.index(axes.value)].kind, data[one.index(axes.value)]
    return times, direct


def _spread_slowly(loaded: list[tuple[Table, Data]], axes: Axes) -> tuple[Cells, dict[str, tuple[str, Cells]]]:
    times: dict[Value | None, int] = {}
    fields: dict[str, tuple[str, dict[int, Value | None]]] = {}
    for one, data in loaded:
        kind = one.columns[one.index(axes.value)].kind
        cells = (data[one.index(label)] for label in (axes.column, axes.row, axes.value))
        for name, time, value in zip(*cells, strict=True):
            known, column = fields.setdefault(str(name), (kind, {}))
            if known != kind:
                kinds = f"{FLUX_NAMES[known]} and {FLUX_NAMES[kind]}"
                raise FluxError(f'schema collision detected: column "{name}" is both of type {kinds}')
            column[times.setdefault(time, len(times))] = value
    rows = range(len(times))
    return list(times), {name: (kind, [cells.get(row) for row in rows]) for name, (kind, cells) in fields.items()}


Tables = Iterable[Table]
Bounds = tuple[int, int]
Step = Callable[[Tables, Call, Bounds], Tables]


def run_step(tables: Tables, call: Call, bounds: Bounds) -> Tables:
    """The tables behind `|> call`. Raises FluxError for a step or an argument that is not known."""
    step = STEPS.get(call.name)
    if step is None:
        raise undefined(call)
    known = ARGUMENTS[call.name]
    for name in call.arguments:
        if name not in known:
            raise FluxError(f"compilation failed: error at {call.where}: unexpected argument {name} of {call.name}")
    return step(tables, call, bounds)


def filter_tables(tables: Tables, call: Call, _bounds: Bounds) -> Iterator[Table]:
    """`filter`: a table left without rows goes away unless `onEmpty: "keep"`."""
    predicate = predicate_argument(call, "fn")
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


def _drop(tables: Tables, call: Call, _bounds: Bounds) -> Tables:
    gone = frozenset(texts_argument(call, "columns"))
    return merged(keep_columns(one, lambda label: label not in gone) for one in tables)


def _keep(tables: Tables, call: Call, _bounds: Bounds) -> Tables:
    stay = frozenset(texts_argument(call, "columns"))
    return merged(keep_columns(one, stay.__contains__) for one in tables)


def _pivot(tables: Tables, call: Call, _bounds: Bounds) -> Tables:
    rows, columns = (texts_argument(call, name) for name in ("rowKey", "columnKey"))
    if len(rows) != 1 or len(columns) != 1:
        raise FluxError("this simulator pivots one column over one other only", "not implemented")
    return pivoted(tables, Axes(rows[0], columns[0], text_argument(call, "valueColumn")))


def _fields_as_columns(tables: Tables, _call: Call, _bounds: Bounds) -> Tables:
    return pivoted(tables, Axes())


def _rename(tables: Tables, call: Call, _bounds: Bounds) -> Tables:
    function = function_argument(call, "fn")

    def new_label(label: str) -> str:
        new = applied(function, label)
        if not isinstance(new, str):
            raise FluxError(f"compilation failed: error at {call.where}: expected string but found something else")
        return new

    return merged(renamed(one, new_label) for one in tables)


def _group(tables: Tables, call: Call, _bounds: Bounds) -> Tables:
    columns = frozenset(texts_argument(call, "columns", ()))
    if text_argument(call, "mode", "by") == "by":
        return regrouped(tables, columns.__contains__)
    return regrouped(tables, lambda label: label not in columns)


def _sort(tables: Tables, call: Call, _bounds: Bounds) -> Iterator[Table]:
    labels = texts_argument(call, "columns", ("_value",))
    descending = bool(literal_argument(call, "desc", "boolean", default=False))
    for one in tables:
        data = one.load()
        by = [data[one.index(label)] for label in labels if label in one.labels()]
        ranks = [tuple((cell is not None, cell) for cell in row) for row in zip(*by, strict=True)] if by else []
        numbers = sorted(range(len(ranks)), key=ranks.__getitem__, reverse=descending)
        yield table(one.columns, take(data, numbers) if by else data, one.key)


def _limit(tables: Tables, call: Call, _bounds: Bounds) -> Iterator[Table]:
    number = literal_argument(call, "n", "integer")
    offset = literal_argument(call, "offset", "integer", 0)
    for one in tables:
        yield table(one.columns, [cells[offset : offset + number] for cells in one.load()], one.key)


def _tail(tables: Tables, call: Call, _bounds: Bounds) -> Iterator[Table]:
    number = literal_argument(call, "n", "integer")
    for one in tables:
        data = one.load()
        length = len(data[0]) if data else 0
        yield table(one.columns, [cells[max(0, length - number) :] for cells in data], one.key)


def _distinct(tables: Tables, call: Call, _bounds: Bounds) -> Iterator[Table]:
    label = text_argument(call, "column", "_value")
    for one in tables:
        cells = list(dict.fromkeys(one.load()[one.index(label)]))
        yield _with_key(one, [("_value", one.columns[one.index(label)].kind, cells)])


def _with_key(one: Table, extra: Sequence[tuple[str, str, Cells]]) -> Table:
    """The key columns of `one`, then the extra ones."""
    length = len(extra[0][2])
    named = {label for label, _, _ in extra}
    keys = [column for column in one.columns if column.group and column.label not in named]
    values = tuple(one.key_by_label()[column.label] for column in keys)
    data: Data = [[value] * length for value in values]
    data.extend(cells for _, _, cells in extra)
    return table([*keys, *(Column(label, kind) for label, kind, _ in extra)], data, values)


def _present(cells: Cells) -> list[Value]:
    return [cell for cell in cells if cell is not None]


AGGREGATES: Mapping[str, Callable[[Cells], Value | None]] = {
    "count": len,
    "sum": lambda cells: sum(_present(cells)) if _present(cells) else None,  # type: ignore[arg-type]
    "mean": lambda cells: sum(_present(cells)) / len(_present(cells)) if _present(cells) else None,  # type: ignore[arg-type]
}
SELECTORS: Mapping[str, Callable[[Sequence[int], Cells], int]] = {
    "first": lambda rows, _cells: rows[0],
    "last": lambda rows, _cells: rows[-1],
    "min": lambda rows, cells: min(rows, key=lambda row: cells[row]),  # type: ignore[arg-type,return-value]
    "max": lambda rows, cells: max(rows, key=lambda row: cells[row]),  # type: ignore[arg-type,return-value]
}


def _aggregate(tables: Tables, call: Call, _bounds: Bounds) -> Iterator[Table]:
    label = text_argument(call, "column", "_value")
    for one in tables:
        at = one.index(label)
        if call.name == "sum" and one.columns[at].kind not in ("double", "long", "unsignedLong"):
            raise FluxError(f"unsupported input type for sum aggregate: {one.columns[at].kind}")
        value = AGGREGATES[call.name](one.load()[at])
        kind = {"count": "long", "mean": "double"}.get(call.name, one.columns[at].kind)
        yield _with_key(one, [(label, kind, [value])])


def _select(tables: Tables, call: Call, _bounds: Bounds) -> Iterator[Table]:
    label = text_argument(call, "column", "_value")
    for one in tables:
        data = one.load()
        cells = data[one.index(label)]
        rows = [row for row, cell in enumerate(cells) if cell is not None]
        chosen = [SELECTORS[call.name](rows, cells)] if rows else []
        yield table(one.columns, take(data, chosen), one.key)


def _aggregate_window(tables: Tables, call: Call, bounds: Bounds) -> Iterator[Table]:
    """Windows on a grid from 1970, cut at the bounds of the range; one row each, at the window's start or stop."""
    every = literal_argument(call, "every", "duration")
    function = call.arguments.get("fn")
    if not isinstance(function, Name) or function.text not in {*AGGREGATES, *SELECTORS} or every <= 0:
        raise missing(call, "fn")
    at_start = text_argument(call, "timeSrc", "_stop") == "_start"
    empty = bool(literal_argument(call, "createEmpty", "boolean", default=True))
    for one in tables:
        yield _windowed(one, function.text, _windows(one, every, bounds, empty=empty), (bounds, every, at_start))


def _windows(one: Table, every: int, bounds: Bounds, *, empty: bool) -> dict[int, list[Value]]:
    start, stop = bounds
    grid = range(start // every * every, stop, every) if empty else ()
    windows: dict[int, list[Value]] = {at: [] for at in grid}
    data = one.load()
    for time, value in zip(data[one.index("_time")], data[one.index("_value")], strict=True):
        if value is not None:
            windows.setdefault(int(time or 0) // every * every, []).append(value)
    return dict(sorted(windows.items()))


def _windowed(one: Table, function: str, windows: Mapping[int, list[Value]], grid: tuple[Bounds, int, bool]) -> Table:
    (start, stop), every, at_start = grid
    times = [max(at, start) if at_start else min(at + every, stop) for at in windows]
    if function in AGGREGATES:
        values = [AGGREGATES[function](cells) for cells in windows.values()]
    else:
        values = [cells[SELECTORS[function](range(len(cells)), cells)] if cells else None for cells in windows.values()]
    kind = {"count": "long", "mean": "double"}.get(function, one.columns[one.index("_value")].kind)
    made = _with_key(one, [("_time", TIME, times), ("_value", kind, values)])
    if function not in AGGREGATES:
        filled = [row for row, value in enumerate(values) if value is not None]
        made = table(made.columns, take(made.load(), filled), made.key)
    return made


STEPS: Mapping[str, Step] = {
    "filter": filter_tables,
    "drop": _drop,
    "keep": _keep,
    "rename": _rename,
    "pivot": _pivot,
    "schema.fieldsAsCols": _fields_as_columns,
    "group": _group,
    "sort": _sort,
    "limit": _limit,
    "tail": _tail,
    "distinct": _distinct,
    "aggregateWindow": _aggregate_window,
    **dict.fromkeys(AGGREGATES, _aggregate),
    **dict.fromkeys(SELECTORS, _select),
}
ARGUMENTS: Mapping[str, frozenset[str]] = {
    **dict.fromkeys((*AGGREGATES, *SELECTORS, "distinct"), frozenset({"column"})),
    "filter": frozenset({"fn", "onEmpty"}),
    "drop": frozenset({"columns"}),
    "keep": frozenset({"columns"}),
    "rename": frozenset({"fn"}),
    "pivot": frozenset({"rowKey", "columnKey", "valueColumn"}),
    "schema.fieldsAsCols": frozenset(),
    "group": frozenset({"columns", "mode"}),
    "sort": frozenset({"columns", "desc"}),
    "limit": frozenset({"n", "offset"}),
    "tail": frozenset({"n"}),
    "aggregateWindow": frozenset({"every", "fn", "createEmpty", "timeSrc"}),
}
