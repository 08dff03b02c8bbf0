"""Flux tables: columns, a group key, and rows that are fetched only when somebody wants them.

Invariant: every value of a group-key column is the same in all rows of a table, and no two tables of a stream have the
same key once `merged` has seen them. Rows are held as columns, None for null.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

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


class FluxError(Exception):
    """A query that failed while it ran; `code` is the platform's error code."""

    def __init__(self, message: str, code: str = "invalid") -> None:
        super().__init__(message)
        self.message = message
        self.code = code


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
        yield from _pivot(group, axes)


def _pivot(group: list[Table], axes: Axes) -> Iterator[Table]:
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
