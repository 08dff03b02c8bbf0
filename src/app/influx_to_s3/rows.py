"""Rows of one device in canonical form, and the operations on them.

Canonical: columns `timestamp, device_type, location` and then the fields; sorted by timestamp, one row per timestamp.
Rows that share an instant (several tag sets) are merged field by field. Invariant: what comes out does not depend on
the order in which the source sent its series.
"""

from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from app.core.window import EPOCH

if TYPE_CHECKING:
    import pyarrow as pa

TIMESTAMP = "timestamp"
DEVICE = "device_id"
TAGS = ("device_type", "location")
MEASURED = ("voltage", "current", "power", "temperature")
COMPUTED = ("hour", "day_of_week", "is_weekend", "power_factor")
RESERVED = frozenset((TIMESTAMP, DEVICE, *TAGS, *COMPUTED))
UNKNOWN = "unknown"


def canonical(table: "pa.Table", time_column: str, tags: frozenset[str]) -> "pa.Table":
    """One answer's columns under their own names: tags other than the documented ones dropped, measured fields float64.

    A field that bears the name of a documented column, and is none of `tags`, is kept as `{name}_field`.
    """
    import pyarrow as pa

    columns = {TIMESTAMP: _as(table.column(time_column), pa.timestamp("ns", "UTC"))}
    for name in table.column_names:
        if name in tags:
            if name in TAGS:
                columns[name] = _as(table.column(name), pa.string())
        elif name in MEASURED:
            columns[name] = _as_float(table.column(name))
        elif name != time_column:
            columns[f"{name}_field" if name in RESERVED else name] = table.column(name)
    return pa.table(columns)


def ordered(tables: Sequence["pa.Table"]) -> "pa.Table":
    """The rows of all tables, sorted by timestamp, rows of one instant merged field by field."""
    import numpy as np
    import pyarrow as pa

    table = pa.concat_tables(same_types(tables), promote_options="default").combine_chunks()
    instants = instants_of(table)
    steps = np.diff(instants)
    if np.all(steps > 0):
        return table
    if np.all(np.diff(np.sort(instants)) > 0):
        return table.take(pa.array(np.argsort(instants)))
    return _merged(table)


def _merged(table: "pa.Table") -> "pa.Table":
    """Sort with ties in an order that the rows alone decide, then take the first value of each cell."""
    import pyarrow.compute as pc

    others = sorted(name for name in table.column_names if name != TIMESTAMP)
    order = pc.sort_indices(table, sort_keys=[(name, "ascending") for name in (TIMESTAMP, *others)])
    grouped = table.take(order).group_by(TIMESTAMP, use_threads=False)
    merged = grouped.aggregate([(name, "first") for name in others])
    merged = merged.rename_columns(
        [name.removesuffix("_first") if name != TIMESTAMP else name for name in merged.column_names]
    )
    return merged.select(table.column_names).sort_by(TIMESTAMP)


def same_types(tables: Iterable["pa.Table"]) -> list["pa.Table"]:
    """Cast columns that differ in type between tables to one that holds them all."""
    tables = list(tables)
    types: dict[str, Any] = {}
    for table in tables:
        for column in table.schema:
            types[column.name] = common_type(types.get(column.name, column.type), column.type)
    return [_cast(table, types) for table in tables]


def _cast(table: "pa.Table", types: dict[str, Any]) -> "pa.Table":
    import pyarrow as pa

    if all(column.type == types[column.name] for column in table.schema):
        return table
    columns = {name: table.column(name).cast(types[name], safe=False) for name in table.column_names}
    return pa.table(columns)


def common_type(one: Any, other: Any) -> Any:
    """The type for a field that has both: numbers meet in float64, everything else in text."""
    import pyarrow as pa

    if one == other or pa.types.is_null(other):
        return one
    if pa.types.is_null(one):
        return other
    numeric = all(pa.types.is_integer(kind) or pa.types.is_floating(kind) for kind in (one, other))
    return pa.float64() if numeric else pa.string()


def _as(column: Any, kind: Any) -> Any:
    """A cast to its own type copies nothing but takes its time."""
    return column if column.type == kind else column.cast(kind)


def _as_float(column: Any) -> Any:
    """A measured value as float64 whatever the source calls it; text that is no number becomes null."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if column.type == pa.float64():
        return column
    if not pa.types.is_string(column.type):
        return (
            column.cast(pa.int8()).cast(pa.float64())
            if pa.types.is_boolean(column.type)
            else column.cast(pa.float64(), safe=False)
        )
    number = pc.match_substring_regex(column, r"^[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$")
    return pc.if_else(number, column, None).cast(pa.float64())


def instants_of(table: "pa.Table") -> Any:
    """Timestamps as int64 nanoseconds since the epoch, a numpy array; a view where the column is in one piece."""
    import pyarrow as pa

    column = table.column(TIMESTAMP)
    return (column.chunk(0).view(pa.int64()) if column.num_chunks == 1 else column.cast(pa.int64())).to_numpy()


def instant_of(nanoseconds: int | None) -> datetime | None:
    """Nanoseconds since the epoch as an aware datetime, cut to microseconds."""
    return None if nanoseconds is None else EPOCH + timedelta(microseconds=nanoseconds // 1000)


def nanoseconds_of(instant: datetime) -> int:
    """Nanoseconds since the epoch; exact."""
    return (instant.astimezone(UTC) - EPOCH) // timedelta(microseconds=1) * 1000


def of_object(table: "pa.Table") -> "pa.Table":
    """Rows that were read back from an object of this pipeline: what was computed from them is dropped."""
    computed = [name for name in (DEVICE, *COMPUTED) if name in table.column_names]
    return canonical(table.drop_columns(computed), TIMESTAMP, frozenset(TAGS))


def united(new: "Iterable[pa.Table]", held: "Iterable[pa.Table]") -> "Iterator[pa.Table]":
    """Two ordered sequences of tables as one; where both have an instant, the row of `new` is taken."""
    streams = [_Ahead(iter(new)), _Ahead(iter(held))]
    while live := [stream for stream in streams if stream.fill()]:
        until = min(stream.last_ns for stream in live)
        first, second = (stream.take(until) for stream in streams)
        yield ordered([table for table in (first, _without(second, first)) if table is not None])


def _without(table: "pa.Table | None", other: "pa.Table | None") -> "pa.Table | None":
    return table if table is None or other is None else lacking(table, instants_of(other))


def lacking(table: "pa.Table", instants: Any) -> "pa.Table":
    """The rows of `table` whose timestamp is not among `instants` (numpy int64 nanoseconds)."""
    import numpy as np
    import pyarrow as pa

    return table.filter(pa.array(~np.isin(instants_of(table), instants)))


class _Ahead:
    """An ordered sequence of tables of which the next one is at hand."""

    def __init__(self, tables: "Iterator[pa.Table]") -> None:
        self._tables = tables
        self._table: pa.Table | None = None
        self.last_ns = 0

    def fill(self) -> bool:
        """True while there are rows."""
        while self._table is None or self._table.num_rows == 0:
            self._table = next(self._tables, None)
            if self._table is None:
                return False
        self.last_ns = int(instants_of(self._table)[-1])
        return True

    def take(self, until_ns: int) -> "pa.Table | None":
        """The rows up to and including `until_ns`, None when there are none."""
        import numpy as np

        if self._table is None:
            return None
        count = int(np.searchsorted(instants_of(self._table), until_ns, side="right"))
        taken, self._table = self._table.slice(0, count), self._table.slice(count)
        return taken if count else None
