"""The transformations that stand behind `|>`: each takes tables and gives tables.

Invariant: a step reads only the arguments that it knows and refuses the others, so that a query which this simulator
would answer differently from a server fails instead.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

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
from simulators.flux_tables import (
    TIME,
    Axes,
    Cells,
    Column,
    Data,
    FluxError,
    Table,
    keep_columns,
    merged,
    pivoted,
    regrouped,
    renamed,
    table,
    take,
)
from simulators.flux_text import Call, Expression, Name
from simulators.line_protocol import Value

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
