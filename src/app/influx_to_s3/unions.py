"""Unions of rows by identity: what the source answers, with what only an object has.

A row is told by its timestamp and all its tags. Invariant: where both sides have an identity, the first side's row is
taken; whatever the sizes, only the rows of one stretch of time are in memory.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from app.core.shrink import EXAMPLES, LATEST, Shrink
from app.influx_to_s3.layout import TAGS, TIMESTAMP, UNKNOWN, Columns
from app.influx_to_s3.rows import instants_of, nanoseconds_of, ordered
from app.object_store.row_digest import row_lanes

if TYPE_CHECKING:
    import pyarrow as pa

FIRST_NS = -(1 << 63)  # of what a timestamp in nanoseconds can hold


class Comparison:
    """What the rows of a source are beside those of an object: by field, how many values are new, there already or
    corrected, how many rows are new, and how many were there with other or fewer values.

    `lost_tags`: held rows were written without their further tags, so one that has none gives way to any row of the
    source with its instant and documented tags, and what it held is corrected. `shrink`: see `Source.union`.
    """

    def __init__(self, columns: Columns, shrink: Shrink | None = None) -> None:
        self.lost_tags = False
        self.new_rows = 0
        self.changed_rows = 0
        self.new: Counter[str] = Counter()
        self.same: Counter[str] = Counter()
        self.corrected: Counter[str] = Counter()
        self._columns = columns
        self._shrink = shrink

    def kept(self, held: "pa.Table") -> "pa.Table":
        """Those of the rows that only an object has which stay in it."""
        import pyarrow as pa

        if self._shrink is None or self._shrink.since == LATEST:
            return held
        lacking = instants_of(held) >= max(nanoseconds_of(self._shrink.since), FIRST_NS)
        rows = held.filter(pa.array(lacking))
        self._shrink.note(rows.num_rows, _described(rows.slice(0, EXAMPLES), self._columns))
        return held.filter(pa.array(~lacking)) if self._shrink.removes else held

    def add(self, new: "pa.Table", held: "pa.Table") -> "pa.Table":
        """Rows of one stretch of time; the held ones that none of the new ones stands for."""
        import numpy as np
        import pyarrow as pa

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

    def _count(self, new: "pa.Table", beside: "pa.Table", exact: "pa.Array") -> Any:
        """Count values of the new rows, and of the held row beside each (nulls where there is none). For each row, true
        when it has a value that is not there; a numpy array.
        """
        import numpy as np
        import pyarrow.compute as pc

        changed = np.zeros(new.num_rows, bool)
        for name in new.column_names:
            if name == TIMESTAMP or name in self._columns.tags:
                continue
            field, values = self._columns.source_of(name) or name, new.column(name)
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


def _described(rows: "pa.Table", columns: Columns) -> Iterator[str]:
    """Instant and tags of each row."""
    import numpy as np

    names = sorted(columns.tags & set(rows.column_names))
    for instant, tags in zip(instants_of(rows), rows.select(names).to_pylist(), strict=True):
        described = (f"{columns.tag_of(name)}={tags[name]}" for name in names if tags[name] not in (None, UNKNOWN))
        yield " ".join((f"{np.datetime64(int(instant), 'ns')}Z", *described))


def _places(ours: Any, theirs: Any) -> tuple[Any, Any]:
    """For each of our identities, where it stands among theirs, and whether it does; numpy arrays."""
    import numpy as np

    if not len(theirs):
        return np.zeros(len(ours), np.int64), np.zeros(len(ours), bool)
    order = np.argsort(theirs)
    places = order[np.minimum(np.searchsorted(theirs, ours, sorter=order), len(order) - 1)]
    return places, theirs[places] == ours


def united(
    new: "Iterable[pa.Table]", held: "Iterable[pa.Table]", columns: Columns, comparison: Comparison
) -> "Iterator[pa.Table]":
    """Two ordered sequences of tables as one; where both have an identity, the row of `new` is taken."""
    streams = [_Ahead(whole_instants(new)), _Ahead(whole_instants(held))]
    while live := [stream for stream in streams if stream.fill()]:
        until = min(stream.last_ns for stream in live)
        first, second = (stream.take(until) for stream in streams)
        if first is not None:
            second = comparison.add(first, first.slice(0, 0) if second is None else second)
        if second is not None:
            second = comparison.kept(second)
        yield ordered([table for table in (first, second) if table is not None], columns)[0]


def in_order(sequences: "Sequence[Iterable[pa.Table]]", columns: Columns) -> "Iterator[pa.Table]":
    """Several ordered sequences of tables as one; of rows with one identity the first sequence's is taken."""
    first, *others = sequences or [()]
    for other in others:
        first = united(first, other, columns, Comparison(columns))
    yield from first


def whole_instants(tables: "Iterable[pa.Table]") -> "Iterator[pa.Table]":
    """The same ordered rows in tables that do not end between rows of one instant, as blocks of a fixed size may."""
    import numpy as np
    import pyarrow as pa

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


def lacks_further_tags(table: "pa.Table", columns: Columns) -> Any:
    """For each row, true when it has no tag besides the documented ones; a numpy array."""
    import numpy as np

    lacks = np.ones(table.num_rows, bool)
    for name in columns.tags & set(table.column_names) - set(TAGS):
        lacks &= table.column(name).is_null().to_numpy()
    return lacks


def identities_of(table: "pa.Table", tags: Iterable[str]) -> Any:
    """64 bits per row for timestamp and these tags, a numpy array. Rows of one set of tags never share a number.

    A tag that a row lacks counts as one that its table lacks, so tables with different columns can be compared.
    """
    names = set(tags) & set(table.column_names)
    return row_lanes((name, table.column(name)) for name in (TIMESTAMP, *names))[0]


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
