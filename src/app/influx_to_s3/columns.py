"""Which column each tag and field has, and of which type: decided once, when it is first seen, and kept in the layout.

The documented columns are fixed. Any other name is the source's own, unless it is taken: a field called like a tag or a
column of ours becomes `{name}_field`, such a tag `{name}_tag`, and names that differ in case only get a number, since
engines such as Spark and DuckDB do not tell them apart. Invariant: what has a column keeps it, whatever comes later.
"""

import logging
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from itertools import count

from app.influx_to_s3.layout_file import DOUBLE, EVER, INTEGER, TEXT, Column, LayoutFile, Tree, added

TIMESTAMP = "timestamp"
NANOS = "timestamp_nanos"
DEVICE = "device_id"
TAGS = ("device_type", "location")
MEASURED = ("voltage", "current", "power", "temperature")
COMPUTED = ("hour", "day_of_week", "is_weekend", "power_factor")
OURS = (TIMESTAMP, NANOS, DEVICE, *TAGS, *MEASURED, *COMPUTED)
UNKNOWN = "unknown"
log = logging.getLogger(__name__)


class Columns:
    """The columns of one tree for one run. From any thread.

    `ignored`: tags that are neither a column nor part of a row's identity. `types`: types that the settings name, by
    column; they decide for a column that is first seen. `file` None: a look that must not change anything.
    """

    def __init__(
        self,
        tree: Tree,
        *,
        device_tag: str,
        ignored: Iterable[str],
        types: Mapping[str, str],
        file: LayoutFile | None,
    ) -> None:
        self._tree = tree
        self._device_tag = device_tag
        self.ignored = frozenset(ignored)
        self._types = types
        self._file = file
        self._lock = threading.Lock()
        self._take(tree)

    @property
    def tags(self) -> frozenset[str]:
        """The names of all tag columns: with the timestamp, a row's identity."""
        return self._tags

    def see(self, tags: Iterable[str], fields: Mapping[str, str]) -> None:
        """Make sure that these tags, and fields with the type that they have now, have columns."""
        new = [("tag", name, TEXT) for name in tags if name not in self._tag_columns and name not in self.ignored]
        new += [("field", name, kind) for name, kind in fields.items() if name not in self._fields]
        if new:
            self._add(new)

    def tag(self, name: str) -> str:
        """The column of a tag that was seen and is not ignored."""
        return self._tag_columns[name]

    def field(self, name: str) -> Column:
        """The column of a field that was seen."""
        return self._fields[name]

    def overflow(self, column: Column, kind: str) -> str:
        """The column for values that `column` cannot hold, as TEXT or DOUBLE; made when it is first needed."""
        key = (f"{kind} of", column.name)
        if key not in self._overflows:
            self._add([(*key, kind)])
            widen = (
                ""
                if column.name in MEASURED
                else f"; to widen the column, set EXPORT_COLUMN_TYPES={column.name}={kind}"
            )
            log.warning(
                "values of field %r do not fit its column %s (%s): they are written to %s%s",
                column.source,
                column.name,
                column.types[-1][1],
                self._overflows[key],
                widen,
            )
        return self._overflows[key]

    def source_of(self, name: str) -> str | None:
        """The field whose values stand in the column `name`; None for a column that holds no field."""
        return self._sources.get(name)

    def tag_of(self, name: str) -> str:
        """The tag whose values stand in the column `name`."""
        return self._tag_names[name]

    def by_name(self, name: str) -> Column | None:
        """The field's column of this name, None when it is none."""
        return self._by_name.get(name)

    def describe(self, name: str) -> Mapping[bytes, bytes]:
        """What a column stands for, as metadata of its Parquet field, so that the layout can be made from objects."""
        kind, source = self._descriptions.get(name, ("", ""))
        return {b"headwater": f"{kind}={source}".encode("utf-8", "surrogatepass")} if kind else {}

    def overflow_kind(self, name: str) -> str | None:
        """TEXT or DOUBLE for a column that takes what another one cannot hold, else None."""
        return self._overflow_kinds.get(name)

    def _add(self, new: Sequence[tuple[str, str, str]]) -> None:
        """Add columns of (kind, source, type) to the file before anything is written into them."""
        with self._lock:

            def change(tree: Tree) -> Tree:
                columns: list[Column] = []
                for kind, source, type_ in new:
                    name = named(kind, source, {*OURS, *(each.name for each in (*tree.columns, *columns))})
                    wanted = self._types.get(name, type_) if kind == "field" else type_
                    columns.append(Column(name, kind, source, ((EVER, wanted),)))
                return added(tree, columns)

            self._take(self._file.change(change) if self._file else change(self._tree))

    def _take(self, tree: Tree) -> None:
        """Look-ups are replaced as a whole, so that readers need no lock.

        Those that tell that a column is there come last: a thread that finds it finds everything else about it.
        """
        fixed = [Column(name, "field", name, ((EVER, DOUBLE),)) for name in MEASURED]
        fields = [*fixed, *(each for each in tree.columns if each.kind == "field")]
        by_name = {each.name: each for each in fields}
        tags = {each.source: each.name for each in tree.columns if each.kind == "tag"}
        tag_columns = {**{name: name for name in TAGS if name != self._device_tag}, **tags}
        overflows = {(each.kind, each.source): each.name for each in tree.columns if each.kind.endswith(" of")}
        of_overflows = {name: by_name[column].source for (_, column), name in overflows.items() if column in by_name}
        self._tree = tree
        self._tags = frozenset((*TAGS, *tags.values()))
        self._tag_names = {column: name for name, column in tag_columns.items()} | {name: name for name in TAGS}
        self._sources = {**{each.name: each.source for each in fields}, **of_overflows}
        self._overflow_kinds = {name: kind.removesuffix(" of") for (kind, _), name in overflows.items()}
        self._descriptions = {each.name: (each.kind, each.source) for each in tree.columns}
        self._overflows = overflows
        self._by_name = by_name
        self._fields = {each.source: each for each in fields}
        self._tag_columns = tag_columns


def named(kind: str, source: str, taken: AbstractSet[str]) -> str:
    """A free column name for a tag, a field, or the overflow of a column."""
    suffix = {"tag": "_tag", "field": "_field"}.get(kind, f"_{kind.removesuffix(' of')}")
    wanted = source if kind in ("tag", "field") and source not in taken else f"{source}{suffix}"
    folded = {name.casefold() for name in taken}
    return next(name for name in _numbered(wanted) if name.casefold() not in folded)


def _numbered(name: str) -> Iterator[str]:
    yield name
    for number in count(2):
        yield f"{name}_{number}"


def type_of(kinds: Iterable[str]) -> str:
    """The type of a field that is first seen with several types: numbers meet in double, else the first counts."""
    kinds = list(dict.fromkeys(kinds))
    if DOUBLE in kinds:
        return DOUBLE
    if INTEGER in kinds:
        return INTEGER
    return kinds[0]
