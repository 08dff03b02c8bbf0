"""Rows of one device in canonical form: ordering, identity, and unions with an object's rows.

Canonical: `timestamp` in nanoseconds, the tag columns, then the fields under their columns' names and types (see
`layout`). A row is identified by its timestamp and all its tags, and rows are sorted by these. Points that differ only
in ignored tags form one row with the fields of all of them. Where their values conflict, the value of the first tag set
in byte order is kept and the others are set aside. Invariant: the result does not depend on the order in which the
source sent the points.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from app.core.errors import Permanent
from app.core.pipeline import EXAMPLES, LATEST, Shrink, Sums
from app.core.windows import EPOCH
from app.influx_to_s3.layout import (
    ARROW_TYPES,
    BOOLEAN,
    COMPUTED,
    DEVICE,
    DOUBLE,
    INTEGER,
    NANOS,
    TAGS,
    TEXT,
    TIMESTAMP,
    UNKNOWN,
    UNSIGNED,
    TreeColumns,
    kind_of,
    type_of,
)
from app.influx_to_s3.reader import PointColumns
from app.object_store.row_digest import LANES, one_array, row_lanes
from app.object_store.table_sink import CSV_ROWS, lost_tags_in

IGNORED = "\0"  # prefix of an ignored tag's name while rows are sorted; no name at a source begins with it
GROUP = "\0\0group"
DAY_NS = 86_400_000_000_000
GUESSES = (
    (INTEGER, r"^-?(0|[1-9]\d{0,17})$"),
    (DOUBLE, r"^-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?$"),
    (BOOLEAN, "^(true|false)$"),
)
EXACT = 1 << 53  # integers up to here are exact in float64


@dataclass(frozen=True, slots=True)
class ConflictingValue:
    """A value that is in no object, because a point with the same identity has another value for this field."""

    tags: Mapping[str, str]
    field: str
    value: bool | int | float | str
    instant_ns: int


def canonical_table(points: PointColumns, columns: TreeColumns) -> pa.Table:
    """Points of one UTC day under their columns' names and types, in their original order.

    A value that its column cannot hold moves unchanged to the column's overflow.
    """
    kinds: dict[str, list[str]] = {}
    for name, values in points.fields:
        kinds.setdefault(name, []).append(kind_of(values.type))
    day = day_of(points.times)
    ignored = columns.ignored_on(day)
    own = [tag for tag in points.tags if tag not in ignored]
    columns.see(own, {name: type_of(some) for name, some in kinds.items()})
    table = {TIMESTAMP: points.times}
    for tag, texts in points.tags.items():
        if tag in ignored:
            table[IGNORED + tag] = texts
        else:
            name = columns.tag_columns[tag]
            table[name] = texts.fill_null(UNKNOWN) if name in TAGS and texts.null_count else texts
    for name in TAGS:
        if name not in table:
            table[name] = constant(UNKNOWN, len(points.times))
    for field, values in points.fields:
        column = columns.fields[field]
        _put(table, column.name, _fitting(values, column.type_on(day), partial(columns.overflow, column)))
    return pa.table(table)


def sums_of(columns: Iterable[tuple[str, Any]]) -> Mapping[str, Sums]:
    """The sums of columns, by name; a name may occur once per type."""
    sums: dict[str, Sums] = {}
    for name, values in columns:
        added = dict(sums_of_parts(one_array(values), np.array([0, len(values)]))).get(0, Sums(0))
        sums[name] = sums[name] + added if name in sums else added
    return sums


def sums_of_parts(values: Any, bounds: Any) -> Sequence[tuple[int, Sums]]:
    """Number and sums of each part that has values; part n of the array is `bounds[n]` to `bounds[n + 1]`."""
    if values.null_count:
        valid = values.is_valid().to_numpy(zero_copy_only=False)
        bounds = np.concatenate(([0], np.cumsum(valid)))[bounds]
        values = values.drop_null()
    numbers = np.diff(bounds)
    parts = np.flatnonzero(numbers)
    if not (pa.types.is_floating(values.type) or pa.types.is_integer(values.type)):
        return [(part, Sums(count)) for part, count in zip(parts.tolist(), numbers[parts].tolist(), strict=True)]
    there, starts = values.to_numpy(), bounds[:-1][parts]
    floats = there.astype(np.float64, copy=False)
    least = np.minimum.reduceat(there, starts)
    with np.errstate(over="ignore", invalid="ignore"):
        totals = np.add.reduceat(floats, starts)
        magnitudes = np.where(least >= 0, totals, np.add.reduceat(np.abs(floats), starts))
    found = (parts, numbers[parts], totals, least, np.maximum.reduceat(there, starts), magnitudes)
    return [(part, Sums(*each)) for part, *each in zip(*(each.tolist() for each in found), strict=True)]


def constant(text: str, rows: int) -> Any:
    """A column with the same text in each row."""
    return pa.repeat(pa.scalar(text), rows)


def _put(table: dict[str, Any], name: str, parts: Iterable[tuple[str, Any]]) -> None:
    """Add values and their overflow; where a column exists already, at most one of the two has a value in any row."""
    for overflow, values in parts:
        key = overflow or name
        table[key] = pc.coalesce(table[key], values) if key in table else values


def _fitting(values: Any, kind: str, overflow: Any) -> Iterator[tuple[str, Any]]:
    """Pairs of (overflow column, or "" for the column itself, and values): each value once, unchanged."""
    if values.type == ARROW_TYPES[kind]:
        yield "", values
        return

    held = _held(values, kind)
    if held.null_count < len(values):
        yield "", held
    rest = pc.if_else(held.is_valid(), pa.scalar(None, values.type), values)
    if rest.null_count == len(rest):
        return
    number = pa.types.is_floating(values.type) or pa.types.is_integer(values.type)
    if number and kind != DOUBLE:
        doubles = _held(rest, DOUBLE)
        if doubles.null_count < len(doubles):
            yield overflow(DOUBLE), doubles
        rest = pc.if_else(doubles.is_valid(), pa.scalar(None, values.type), rest)
    if rest.null_count < len(rest):
        yield overflow(TEXT), rest.cast(pa.string())


def _held(values: Any, kind: str) -> Any:
    """The values converted to `kind` where that is lossless, else null; numbers count as equal across types."""
    target = ARROW_TYPES[kind]
    if values.type == target:
        return values
    whole, unsigned = pa.types.is_integer(values.type), pa.types.is_unsigned_integer(values.type)
    low, high = (-EXACT, EXACT) if kind == DOUBLE else (0, (1 << 63) - 1)
    if whole and kind in (DOUBLE, INTEGER, UNSIGNED):
        # Bounds have the type of the values: Arrow compares unsigned values with plain Python integers as signed.
        exact = pc.and_(
            pc.less_equal(values, pa.scalar(high, values.type)),
            pc.greater_equal(values, pa.scalar(max(low, 0) if unsigned else low, values.type)),
        )
        return pc.if_else(exact, values, pa.scalar(None, values.type)).cast(target)
    if kind in (INTEGER, UNSIGNED) and pa.types.is_floating(values.type):
        return _whole_numbers(values, target)
    return pa.nulls(len(values), target)


def _whole_numbers(values: Any, target: Any) -> Any:
    """Floats that are integers exactly representable in float64, except negative zero."""
    floats = one_array(values).to_numpy(zero_copy_only=False)
    low = 0 if target == pa.uint64() else -EXACT
    with np.errstate(invalid="ignore"):
        fits = (
            (np.trunc(floats) == floats) & (floats >= low) & (floats <= EXACT) & ~((floats == 0) & np.signbit(floats))
        )
    return pa.array(np.where(fits, floats, 0).astype(np.int64), mask=~fits).cast(target)


def merge_ordered(
    tables: Sequence[pa.Table], columns: TreeColumns
) -> tuple[pa.Table, Sequence[ConflictingValue], Mapping[str, int]]:
    """The rows of all tables in canonical order, each identity once.

    Also returns the conflicting values, and the number of repeated values per field.
    """
    table = (tables[0] if len(tables) == 1 else pa.concat_tables(tables, promote_options="default")).combine_chunks()
    instants = instants_of(table)
    if np.all(instants[1:] > instants[:-1]):
        return without_ignored(table), (), {}
    series = codes_of(table, tag_names_in(table, columns))
    order = np.lexsort((series, instants))
    steps, alike = np.diff(instants[order]), np.diff(series[order])
    first = np.concatenate(([True], (steps != 0) | (alike != 0)))
    if first.all():
        return without_ignored(table).take(pa.array(order)), (), {}
    whole_series = codes_of(table, [name for name in table.column_names if name in columns.tags or name[0] == IGNORED])
    return _merged(table.take(pa.array(np.lexsort((whole_series, series, instants)))), first, columns)


def tag_names_in(table: pa.Table, columns: TreeColumns) -> Sequence[str]:
    """The columns of tags, which together with the timestamp identify a row."""
    return [name for name in table.column_names if name in columns.tags]


def codes_of(table: pa.Table, names: Sequence[str]) -> Any:
    """An int64 per row that ranks its values in these text columns.

    Ranks follow the byte order of `name=value,...` (absent ones left out), as InfluxDB writes a series key.
    """
    if not names:
        return np.zeros(table.num_rows, np.int64)
    names = sorted(names, key=lambda name: name.lstrip(IGNORED))
    encoded = [table.column(name).combine_chunks().dictionary_encode() for name in names]
    places = np.stack([each.indices.fill_null(-1).to_numpy(zero_copy_only=False) for each in encoded], axis=1)
    combinations, inverse = np.unique(places, axis=0, return_inverse=True)
    texts = [each.dictionary.to_pylist() for each in encoded]
    keys = [
        ",".join(
            f"{name.lstrip(IGNORED)}={some[at]}" for name, some, at in zip(names, texts, row, strict=True) if at >= 0
        ).encode("utf-8", "surrogatepass")
        for row in combinations.tolist()
    ]
    ranks = np.empty(len(keys), np.int64)
    ranks[sorted(range(len(keys)), key=keys.__getitem__)] = np.arange(len(keys))
    return ranks[inverse.reshape(-1)]


def without_ignored(table: pa.Table) -> pa.Table:
    """The rows without the ignored tags, which are needed only to sort them."""
    return table.select([name for name in table.column_names if name[0] != IGNORED])


def _merged(
    table: pa.Table, first: Any, columns: TreeColumns
) -> tuple[pa.Table, Sequence[ConflictingValue], Mapping[str, int]]:
    """One row per identity, with the first value of each column. `first` is true for the first row of each identity."""
    groups = np.cumsum(first) - 1
    kept = without_ignored(table)
    values = [name for name in kept.column_names if name != TIMESTAMP and name not in columns.tags]
    grouped = kept.select(values).append_column(GROUP, pa.array(groups)).group_by(GROUP, use_threads=False)
    united = grouped.aggregate([(name, "first") for name in values])
    result = kept.filter(pa.array(first))
    disagreements: list[ConflictingValue] = []
    twice: dict[str, int] = {}
    for name in values:
        merged = united.column(f"{name}_first")
        result = result.set_column(result.schema.get_field_index(name), name, merged)
        surplus = table.column(name).is_valid().to_numpy(zero_copy_only=False)
        surplus &= ~_first_values(surplus, groups)
        if not surplus.any():
            continue
        mine, stands = table.column(name).filter(pa.array(surplus)), merged.take(pa.array(groups[surplus]))
        differs = pc.not_equal(mine, stands).fill_null(True).to_numpy(zero_copy_only=False)  # noqa: FBT003 - Arrow's own signature
        field = columns.sources.get(name) or name
        twice[field] = twice.get(field, 0) + int((~differs).sum())
        rows = np.flatnonzero(surplus)[differs]
        disagreements += _disagreements(table.take(pa.array(rows)), name, field, columns)
    return result, disagreements, {name: number for name, number in twice.items() if number}


def _first_values(valid: Any, groups: Any) -> Any:
    """True for the first valid value of each group."""
    places = np.flatnonzero(valid)
    found = np.zeros(len(valid), bool)
    _, firsts = np.unique(groups[places], return_index=True)
    found[places[firsts]] = True
    return found


def _disagreements(rows: pa.Table, name: str, field: str, columns: TreeColumns) -> Iterator[ConflictingValue]:
    tags = [each for each in rows.column_names if each[0] == IGNORED or each in columns.tags]
    for row, instant in zip(rows.select([name, *tags]).to_pylist(), instants_of(rows).tolist(), strict=True):
        own = {
            each[1:] if each[0] == IGNORED else columns.tag_names[each]: row[each]
            for each in tags
            if row[each] is not None and not (each in TAGS and row[each] == UNKNOWN)
        }
        yield ConflictingValue(own, field, row[name], instant)


def instants_of(table: pa.Table) -> Any:
    """Timestamps as int64 nanoseconds since the epoch, a numpy array; a view where the column has a single chunk."""
    return times_of(table.column(TIMESTAMP))


def times_of(times: Any) -> Any:
    """A timestamp[ns] column as int64, a numpy array; a view where it has a single chunk."""
    return one_array(times).view(pa.int64()).to_numpy()


def day_of(times: Any) -> date:
    """The UTC day of timestamps in nanoseconds, which must all be on the same day."""
    return (EPOCH + timedelta(days=times[0].value // DAY_NS)).date() if len(times) else EPOCH.date()


def instant_of(nanoseconds: int | None) -> datetime | None:
    """Nanoseconds since the epoch as an aware datetime, truncated to microseconds."""
    return None if nanoseconds is None else EPOCH + timedelta(microseconds=nanoseconds // 1000)


def nanoseconds_of(instant: datetime) -> int:
    """Nanoseconds since the epoch; exact."""
    return (instant.astimezone(UTC) - EPOCH) // timedelta(microseconds=1) * 1000


def of_object(table: pa.Table, columns: TreeColumns) -> pa.Table:
    """Rows read back from an object, in the current columns; computed columns are dropped.

    Values whose type differs from the column's move to the overflow, like those of the source. A CSV object holds only
    text, which is parsed as the column's type. Raises Permanent for a value that cannot be parsed, unless an older
    version wrote it: there a column could have another type in each object.
    """
    rows: dict[str, Any] = {TIMESTAMP: table.column(TIMESTAMP)}
    for tag in TAGS:
        has = tag in table.column_names
        rows[tag] = table.column(tag).fill_null(UNKNOWN) if has else constant(UNKNOWN, table.num_rows)
    day = day_of(table.column(TIMESTAMP))
    is_csv = CSV_ROWS.items() <= (table.schema.metadata or {}).items()
    for name in table.column_names:
        if name in (TIMESTAMP, NANOS, DEVICE, *TAGS, *COMPUTED):
            continue
        values = table.column(name)
        if name in columns.tags:
            _put(rows, name, [("", values)])
            continue
        column = columns.overflow_of.get(name) or columns.by_name.get(name)
        if column is None:
            columns.see((), {name: kind_of(values.type)})  # from an older version; not sent since
            column = columns.by_name.get(name) or columns.fields[name]
        kind = column.type_on(day)
        parts = [values]
        if is_csv and lost_tags_in(table):
            parts = list(_guessed(values, kind))
        elif is_csv:
            parts = [_parsed(name, values, columns.overflow_kinds.get(name) or kind)]
        # What did not fit when it was written may fit the type that the column now has for this day.
        for part in parts:
            _put(rows, column.name, _fitting(part, kind, partial(columns.overflow, column)))
    return pa.table(rows)


def _parsed(name: str, values: Any, kind: str) -> Any:
    """Text of a CSV object, converted back to the type it was written from."""
    try:
        return values.cast(ARROW_TYPES[kind])
    except pa.ArrowInvalid as error:
        raise Permanent(
            f"column {name!r} of a CSV object holds text where {kind} is expected: {str(error)[:100]}",
            f"set EXPORT_COLUMN_TYPES={name}=text, or restore an earlier version of the object",
        ) from error


def _guessed(values: Any, kind: str) -> Iterator[Any]:
    """Text of a CSV object by what it looks like: number, boolean, else text. All text if `kind` is TEXT."""
    rest = values
    for each, pattern in GUESSES if kind != TEXT else ():
        fits = pc.fill_null(pc.match_substring_regex(rest, pattern), False)  # noqa: FBT003 - Arrow's own signature
        if pc.any(fits).as_py():
            yield pc.if_else(fits, rest, None).cast(ARROW_TYPES[each])
            rest = pc.if_else(fits, None, rest)
    if rest.null_count < len(rest) or kind == TEXT:
        yield rest


# Unions of rows by identity: what the source returns, plus what only an object has.
#
# A row is identified by its timestamp and all its tags. Invariants: where both sides have an identity, the first side's
# row wins; only the rows of one time span are in memory, whatever the sizes.

FIRST_NS = -(1 << 63)  # lower bound of a nanosecond timestamp


class RowComparison:
    """Compares the source's rows with an object's.

    Counts values per field that are new, unchanged (`same`) or corrected; rows that are new; and rows that are changed,
    because they had other or fewer values before. `lost_tags`: the object's rows were written without their further
    tags. Such a row is replaced by any row of the source with its timestamp and documented tags, and its values count
    as corrected. `shrink`: see `Source.union`.
    """

    def __init__(self, columns: TreeColumns, shrink: Shrink | None = None) -> None:
        self.lost_tags = False
        self.new_rows = 0
        self.changed_rows = 0
        self.new: Counter[str] = Counter()
        self.same: Counter[str] = Counter()
        self.corrected: Counter[str] = Counter()
        self._columns = columns
        self._shrink = shrink

    def kept(self, held: pa.Table) -> pa.Table:
        """Filter rows that only an object has to those that stay in it."""
        if self._shrink is None or self._shrink.since == LATEST:
            return held
        lacking = instants_of(held) >= max(nanoseconds_of(self._shrink.since), FIRST_NS)
        rows = held.filter(pa.array(lacking))
        self._shrink.note(rows.num_rows, _described(rows.slice(0, EXAMPLES), self._columns))
        return held.filter(pa.array(~lacking)) if self._shrink.removes else held

    def add(self, new: pa.Table, held: pa.Table) -> pa.Table:
        """Compare rows of one time span. Returns the held rows that no new row replaces."""
        tags = self._columns.tags
        ours, theirs = identities_of(new, tags), identities_of(held, tags)
        places, exact = _places(ours, theirs)
        superseded, matched = np.isin(theirs, ours), exact
        if self.lost_tags:
            ours, theirs = identities_of(new, TAGS), identities_of(held, TAGS)
            plain = np.flatnonzero(lacks_further_tags(held, self._columns))
            superseded[plain] |= np.isin(theirs[plain], ours)
            loosely, found = _places(ours, theirs[plain])
            places = np.where(exact | ~found, places, plain[loosely] if len(plain) else places)
            matched = exact | found
        self.new_rows += int((~matched).sum())
        changed = self._count(new, held.take(pa.array(places, mask=~matched)), pa.array(exact))
        self.changed_rows += int((matched & changed).sum())
        return held.filter(pa.array(~superseded))

    def _count(self, new: pa.Table, beside: pa.Table, exact: pa.Array) -> Any:
        """Count the values of new rows against the held row `beside` each (nulls where there is none).

        Returns a numpy array: for each row, true when it has a value that the held row lacks.
        """
        changed = np.zeros(new.num_rows, bool)
        for name in new.column_names:
            if name == TIMESTAMP or name in self._columns.tags:
                continue
            field, values = self._columns.sources.get(name) or name, new.column(name)
            there = same = 0
            is_same: Any = np.zeros(new.num_rows, bool)
            if name in beside.column_names:
                before = beside.column(name)
                is_there = pc.and_(values.is_valid(), before.is_valid())
                there = pc.sum(is_there).as_py() or 0
                both = pc.and_kleene(pc.and_(is_there, exact), pc.equal(values, before))
                is_same = both.fill_null(False).to_numpy()  # noqa: FBT003 - Arrow's own signature
                same = int(is_same.sum())
            changed |= values.is_valid().to_numpy() & ~is_same
            self.same[field] += same
            self.corrected[field] += there - same
            self.new[field] += new.num_rows - values.null_count - there
        return changed


def _described(rows: pa.Table, columns: TreeColumns) -> Iterator[str]:
    """Timestamp and tags of each row."""
    names = sorted(columns.tags & set(rows.column_names))
    for instant, tags in zip(instants_of(rows), rows.select(names).to_pylist(), strict=True):
        described = (f"{columns.tag_names[name]}={tags[name]}" for name in names if tags[name] not in (None, UNKNOWN))
        yield " ".join((f"{np.datetime64(int(instant), 'ns')}Z", *described))


def _places(ours: Any, theirs: Any) -> tuple[Any, Any]:
    """For each of our identities, its position among theirs, and whether it occurs there; numpy arrays."""
    if not len(theirs):
        return np.zeros(len(ours), np.int64), np.zeros(len(ours), bool)
    order = np.argsort(theirs)
    places = order[np.minimum(np.searchsorted(theirs, ours, sorter=order), len(order) - 1)]
    return places, theirs[places] == ours


def union_by_identity(
    new: Iterable[pa.Table], held: Iterable[pa.Table], columns: TreeColumns, comparison: RowComparison
) -> Iterator[pa.Table]:
    """Merge two ordered sequences of tables; where both have an identity, the row of `new` wins."""
    streams = [_Ahead(whole_instants(new)), _Ahead(whole_instants(held))]
    while live := [stream for stream in streams if stream.fill()]:
        until = min(stream.last_ns for stream in live)
        first, second = (stream.take(until) for stream in streams)
        if first is not None:
            second = comparison.add(first, first.slice(0, 0) if second is None else second)
        if second is not None:
            second = comparison.kept(second)
        yield merge_ordered([table for table in (first, second) if table is not None], columns)[0]


def merge_in_order(sequences: Sequence[Iterable[pa.Table]], columns: TreeColumns) -> Iterator[pa.Table]:
    """Merge several ordered sequences of tables; where several have an identity, the earliest sequence wins."""
    first, *others = sequences or [()]
    for other in others:
        first = union_by_identity(first, other, columns, RowComparison(columns))
    yield from first


def whole_instants(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """The same ordered rows, re-split so that no table ends between rows of one timestamp, as fixed-size blocks may."""
    rest: list[pa.Table] = []
    for table in tables:
        if table.num_rows == 0:
            continue
        instants = instants_of(table)
        last = int(np.searchsorted(instants, instants[-1], side="left"))
        if last:
            yield pa.concat_tables([*rest, table.slice(0, last)], promote_options="default")
            rest = [table.slice(last)]
        elif rest and instants_of(rest[0])[0] != instants[0]:
            yield pa.concat_tables(rest, promote_options="default")
            rest = [table]
        else:
            rest.append(table)
    if rest:
        yield pa.concat_tables(rest, promote_options="default")


def lacks_further_tags(table: pa.Table, columns: TreeColumns) -> Any:
    """For each row, true when it has no tags other than the documented ones; a numpy array."""
    lacks = np.ones(table.num_rows, bool)
    for name in columns.tags & set(table.column_names) - set(TAGS):
        lacks &= table.column(name).is_null().to_numpy()
    return lacks


def identities_of(table: pa.Table, tags: Iterable[str]) -> Any:
    """64 bits per row for timestamp and these tags, a numpy array. Rows of one tag set never share a number.

    A tag missing from a row counts the same as one missing from the table, so tables with different columns are
    comparable.
    """
    names = set(tags) & set(table.column_names)
    return row_lanes(((name, table.column(name)) for name in (TIMESTAMP, *names)), LANES[:1])[0]


class _Ahead:
    """An ordered sequence of tables with one table read ahead."""

    def __init__(self, tables: Iterator[pa.Table]) -> None:
        self._tables = tables
        self._table: pa.Table | None = None
        self.last_ns = 0

    def fill(self) -> bool:
        """Read ahead if needed. True while there are rows."""
        while self._table is None or self._table.num_rows == 0:
            self._table = next(self._tables, None)
            if self._table is None:
                return False
        self.last_ns = int(instants_of(self._table)[-1])
        return True

    def take(self, until_ns: int) -> pa.Table | None:
        """The rows up to and including `until_ns`, None if there are none."""
        if self._table is None:
            return None
        count = int(np.searchsorted(instants_of(self._table), until_ns, side="right"))
        taken, self._table = self._table.slice(0, count), self._table.slice(count)
        return taken if count else None
