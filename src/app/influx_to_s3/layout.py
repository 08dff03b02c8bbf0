"""The layout file `_headwater/layout.json`, stored with the data.

It is the only source of truth for how a tree's objects are cut, named and typed, and which column each tag and field
has. It holds the history of window length, format, date format and timestamp unit, the columns with their types, the
first start of the installation and the sealed day. The copy in the state is never read, so a state that is lost or
older than the bucket cannot cause the same rows to be written again under other names.

Invariants: the file changes by compare-and-swap only. A run writes no window of a day later than the sealed day it
read, and a layout change takes effect after that day, so no day is ever cut in two ways. A new column is added to the
file before it is first written and applies to all days.
"""

import io
import json
import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, time, timedelta
from itertools import chain, count, pairwise
from typing import Any, TypeVar

import pyarrow as pa

from app.core.errors import Conflict, Permanent, Transient
from app.core.windows import DAY_SECONDS, EPOCH, Window, floor_to, named_day, windows_between
from app.db.checkpoints import Layout
from app.object_store.port import ObjectStore, PutRequest
from app.object_store.table_sink import CONTENT_TYPES

FOLDER = "_headwater"
NAME = "layout.json"
VERSION = 1
CONFLICTS = 20
EVER = date(1970, 1, 1)
NEVER = date(9000, 1, 1)
A_DAY = date(2026, 11, 29)
UNITS = ("us", "ns")
DOUBLE, INTEGER, TEXT, BOOLEAN, UNSIGNED = "double", "integer", "text", "boolean", "unsigned"
TYPES = (DOUBLE, INTEGER, TEXT, BOOLEAN, UNSIGNED)
KINDS = ("tag", "field", "text of", "double of")
ARROW_TYPES = {
    DOUBLE: pa.float64(),
    INTEGER: pa.int64(),
    UNSIGNED: pa.uint64(),
    BOOLEAN: pa.bool_(),
    TEXT: pa.string(),
}
T = TypeVar("T")


def value_on(history: Sequence[tuple[date, T]], day: date) -> T:
    """The value in force on `day`. `history`: (first UTC day, value) pairs, oldest first, the first from EVER on."""
    return next(value for since, value in reversed(history) if since <= day or since == EVER)


def with_value_from(history: Sequence[tuple[date, T]], day: date, value: T) -> tuple[tuple[date, T], ...]:
    """The history in which `value` is in force from `day` on; later changes, which never took effect, are dropped."""
    earlier = tuple(each for each in history if each[0] < day)
    return earlier if earlier[-1][1] == value else (*earlier, (day, value))


@dataclass(frozen=True, slots=True)
class Column:
    """One column.

    `kind` "tag" and "field": `source` is the name at the source. "text of" and "double of": `source` is the column
    whose unrepresentable values this column holds. `types`: (first UTC day, type) pairs, oldest first, the first one
    from EVER on.
    """

    name: str
    kind: str
    source: str
    types: tuple[tuple[date, str], ...]

    def type_on(self, day: date) -> str:
        """The type of the values of a day."""
        return value_on(self.types, day)


@dataclass(frozen=True, slots=True)
class LayoutDocument:
    """The content of the file. `sealed_day`: the cut and types of days up to this one may no longer change.

    `ignored_tags`: (first UTC day, sorted names) pairs, oldest first, the first one from EVER on; empty in a new tree.
    Ignored tags decide what one row is, so a day keeps those under which its first rows were written.
    """

    first_start_at: datetime
    sealed_day: date
    layouts: tuple[Layout, ...]
    columns: tuple[Column, ...] = ()
    ignored_tags: tuple[tuple[date, tuple[str, ...]], ...] = ()

    def ignored_on(self, day: date) -> frozenset[str]:
        """The tags that are neither a column nor part of a row's identity on `day`."""
        return frozenset(value_on(self.ignored_tags, day)) if self.ignored_tags else frozenset()

    def layout_at(self, instant: datetime) -> Layout:
        """The layout in force at `instant`."""
        return next(each for each in reversed(self.layouts) if each.effective_at <= instant or each is self.layouts[0])

    def windows(self, start: datetime, end: datetime) -> Iterator[Window]:
        """Every window that overlaps `[start, end)`, oldest first, with the length in force at its start."""
        ends = [*(later.effective_at for later in self.layouts[1:]), end]
        for layout, until in zip(self.layouts, ends, strict=True):
            since = start if layout is self.layouts[0] else max(start, layout.effective_at)
            yield from windows_between(since, min(until, end), layout.window_seconds)


def new_layout(wanted: Layout, first_start_at: datetime) -> LayoutDocument:
    """The layout of a new installation, starting on the grid. No day is sealed, since nothing has been written."""
    layout = replace(wanted, effective_at=EPOCH)
    return LayoutDocument(floor_to(first_start_at, layout.window_seconds), EVER, (layout,))


def with_layout(tree: LayoutDocument, wanted: Layout, today: date) -> LayoutDocument:
    """Apply `wanted` from the day after the later of today and the sealed day, unless it is already the last layout."""
    if replace(tree.layouts[-1], effective_at=EPOCH) == replace(wanted, effective_at=EPOCH):
        return tree
    effective_at = _midnight(max(tree.sealed_day, today) + timedelta(days=1))
    earlier = tuple(each for each in tree.layouts if each.effective_at < effective_at)
    if replace(earlier[-1], effective_at=EPOCH) == replace(wanted, effective_at=EPOCH):
        return replace(tree, layouts=earlier)  # reverts a change that had not taken effect yet
    return replace(tree, layouts=(*earlier, replace(wanted, effective_at=effective_at)))


def with_types(tree: LayoutDocument, wanted: Mapping[str, str], today: date) -> LayoutDocument:
    """Give the columns in `wanted` these types from the day after the later of today and the sealed day."""
    day = max(tree.sealed_day, today) + timedelta(days=1)

    def retyped(column: Column) -> Column:
        kind = wanted.get(column.name)
        if kind is None or column.kind != "field" or column.types[-1][1] == kind:
            return column
        return replace(column, types=with_value_from(column.types, day, kind))

    columns = tuple(map(retyped, tree.columns))
    return tree if columns == tree.columns else replace(tree, columns=columns)


def with_ignored_tags(tree: LayoutDocument, wanted: Iterable[str], today: date) -> LayoutDocument:
    """Ignore the tags in `wanted` from the day after the later of today and the sealed day.

    A tree that names none was written by an older version, under the setting that it has now.
    """
    names, history = tuple(sorted(wanted)), tree.ignored_tags
    if history and history[-1][1] == names:
        return tree
    day = max(tree.sealed_day, today) + timedelta(days=1)
    return replace(tree, ignored_tags=with_value_from(history, day, names) if history else ((EVER, names),))


def with_types_of(tree: LayoutDocument, today: date, *, first: date, end: date) -> LayoutDocument:
    """Give the days in `[first, end)`, all before `today`, the unit and types of `today`: for a rewrite.

    Neither affects names or how days are cut, so both may change for a sealed day.
    """
    unit = tree.layout_at(_midnight(today)).timestamp_unit
    since, until = max(_midnight(first), EPOCH), _midnight(end)
    layouts: list[Layout] = []
    for at in sorted({since, until, *(each.effective_at for each in tree.layouts)}):
        layout = replace(tree.layout_at(at), effective_at=at)
        layout = replace(layout, timestamp_unit=unit) if since <= at < until else layout
        if not layouts or replace(layouts[-1], effective_at=at) != layout:
            layouts.append(layout)

    def retyped(column: Column) -> Column:
        types: list[tuple[date, str]] = []
        for day in sorted({EVER, first, end, *(each[0] for each in column.types)}):
            kind = column.type_on(today if first <= day < end else day)
            if not types or types[-1][1] != kind:
                types.append((day, kind))
        return replace(column, types=tuple(types))

    return replace(tree, layouts=tuple(layouts), columns=tuple(map(retyped, tree.columns)))


def _midnight(day: date) -> datetime:
    return datetime.combine(day, time(), UTC)


class LayoutFile:
    """Reads and changes the file. `make(now)` creates the first layout, new or derived from existing data."""

    def __init__(self, store: ObjectStore, prefix: str, make: Callable[[datetime], LayoutDocument]) -> None:
        self._store = store
        self.key = "/".join(part for part in (prefix, FOLDER, NAME) if part)
        self._make = make
        self._latest: tuple[LayoutDocument, str] | None = None  # what this process last read or wrote, with its ETag

    def begin(
        self,
        now: datetime,
        *,
        wanted: Callable[[LayoutDocument], Layout],
        types: Mapping[str, str],
        ignored: Iterable[str],
        dry_run: bool,
    ) -> tuple[LayoutDocument, datetime]:
        """The current layout, and the time up to which this run may write windows.

        The settings are applied and today is sealed, but no earlier than the store's own clock allows: a host whose
        clock is ahead waits, so that one wrong clock cannot seal a year. A dry run changes nothing.
        """
        today = now.date()

        def changed(tree: LayoutDocument, day: date) -> LayoutDocument:
            tree = with_types(with_layout(tree, wanted(tree), day), types, day)
            tree = with_ignored_tags(tree, ignored, day)
            return replace(tree, sealed_day=max(tree.sealed_day, day))

        found = self._read()
        if dry_run:
            return changed(found[0] if found else self._make(now), today), now
        tree = found[0] if found else self._create(now)
        day = min(today, self._store_day()) if today > tree.sealed_day else tree.sealed_day
        if changed(tree, day) != tree:
            tree = self.change(lambda each: changed(each, day))
        return tree, min(now, _midnight(tree.sealed_day + timedelta(days=1)))

    def change(self, change: Callable[[LayoutDocument], LayoutDocument]) -> LayoutDocument:
        """Change the layout by compare-and-swap and return the result. `change` is pure and may be called again."""
        for _ in range(CONFLICTS):
            found = self._read()
            if found is None:
                raise Transient(f"{self.key} is gone", "no action needed; the next run re-creates it from the objects")
            tree, etag = found
            changed = change(tree)
            if changed == tree:
                return tree
            try:
                self._put(changed, etag)
            except Conflict:
                continue  # another process, or our own write whose response was lost: re-read and retry
            return changed
        raise Transient(
            f"{self.key}: changed {CONFLICTS} times while it was replaced", "no action needed; it is retried"
        )

    def _create(self, now: datetime) -> LayoutDocument:
        """Create the first layout, unless another process was faster.

        If the host's clock is ahead, the first start is derived from the store's clock: rows before it are never
        exported.
        """
        tree = self._make(now)
        try:
            self._put(tree, "")
        except Conflict:
            found = self._read()
            if found is None:
                raise
            return found[0]
        latest_at = _midnight(self._store_day() + timedelta(days=1))
        if now <= latest_at:
            return tree
        first_start_at = min(tree.first_start_at, self._make(latest_at).first_start_at)
        return self.change(lambda each: replace(each, first_start_at=first_start_at))

    def _store_day(self) -> date:
        """Today by the store's clock, found by rewriting the existing file unchanged."""
        found = self._read()
        if found is not None:
            with suppress(Conflict):  # another process just wrote it, which shows the time as well
                self._put(*found)
        info = self._store.head(self.key)
        return info.modified_at.astimezone(UTC).date() if info else EVER

    def _read(self) -> tuple[LayoutDocument, str] | None:
        for _ in range(CONFLICTS):
            info = self._store.head(self.key)
            if info is None:
                return None
            if self._latest is not None and self._latest[1] == info.etag:
                return self._latest
            try:
                with self._store.open(self.key, info.etag) as body:
                    text = body.read() if body else None
            except Conflict:
                continue  # replaced between the two requests
            if text is None:
                continue
            try:
                self._latest = from_json(json.loads(text)), info.etag
            except (ArithmeticError, LookupError, RecursionError, TypeError, ValueError) as error:
                raise Permanent(
                    f"{self.key} cannot be read: {type(error).__name__}: {str(error)[:200]}",
                    "restore an earlier version of this object, or delete it: then it is re-created from the objects. "
                    "Nothing is written before",
                ) from error
            return self._latest
        raise Transient(f"{self.key}: changed {CONFLICTS} times while it was read", "no action needed; it is retried")

    def _put(self, tree: LayoutDocument, expected: str) -> None:
        text = json.dumps(to_json(tree), indent=1, ensure_ascii=False)
        body = io.BytesIO(text.encode("utf-8", "surrogatepass"))
        self._latest = tree, self._store.put(self.key, body, PutRequest("application/json", {}, expected))


def to_json(tree: LayoutDocument) -> Mapping[str, Any]:
    """The JSON document stored in the file."""
    return {
        "version": VERSION,
        "first_start": f"{tree.first_start_at:%Y-%m-%dT%H:%M:%SZ}",
        "sealed_day": tree.sealed_day.isoformat(),
        "layouts": [
            {
                "from": f"{each.effective_at:%Y-%m-%dT%H:%M:%SZ}",
                "window_seconds": each.window_seconds,
                "format": each.format,
                "date_format": each.date_format,
                "timestamp_unit": each.timestamp_unit,
            }
            for each in tree.layouts
        ],
        "ignored_tags": [{"from": since.isoformat(), "tags": list(names)} for since, names in tree.ignored_tags],
        "columns": [
            {
                "name": each.name,
                "kind": each.kind,
                "source": each.source,
                "types": [{"from": since.isoformat(), "type": kind} for since, kind in each.types],
            }
            for each in tree.columns
        ],
    }


def from_json(document: Mapping[str, Any]) -> LayoutDocument:
    """Parse the JSON document. Raises ValueError, KeyError or TypeError if it is invalid."""
    if document["version"] != VERSION:
        raise ValueError(f"it is of version {document['version']!r}; this Headwater knows version {VERSION}")
    layouts = tuple(map(_layout, document["layouts"]))
    if not layouts or any(later.effective_at <= each.effective_at for each, later in pairwise(layouts)):
        raise ValueError("it holds no layouts, or not in order of time")
    columns = tuple(map(_column, document["columns"]))
    if len({each.name for each in columns}) < len(columns):
        raise ValueError("two of its columns have the same name")
    first_start_at, sealed_day = _instant(document["first_start"]), date.fromisoformat(document["sealed_day"])
    if max(first_start_at.date(), sealed_day) >= NEVER:
        raise ValueError("its first start or sealed day is out of range")
    ignored_tags = tuple(
        (date.fromisoformat(each["from"]), tuple(map(str, each["tags"]))) for each in document.get("ignored_tags", ())
    )
    if ignored_tags and ignored_tags[0][0] != EVER:
        raise ValueError(f"its ignored tags do not begin on {EVER}")
    return LayoutDocument(first_start_at, sealed_day, layouts, columns, ignored_tags)


def _layout(each: Mapping[str, Any]) -> Layout:
    """What a person may have edited is checked here, since a wrong cut or name writes the same rows a second time."""
    layout = Layout(
        _instant(each["from"]),
        int(each["window_seconds"]),
        str(each["format"]),
        str(each["date_format"]),
        str(each["timestamp_unit"]),
    )
    if (
        layout.window_seconds < 1
        or DAY_SECONDS % layout.window_seconds
        or layout.format not in CONTENT_TYPES
        or layout.timestamp_unit not in UNITS
        or named_day(A_DAY.strftime(layout.date_format), layout.date_format) != A_DAY
    ):
        raise ValueError(f"its layout from {each['from']} has a value that is not known")
    return layout


def _instant(text: str) -> datetime:
    at = datetime.fromisoformat(text)
    if at.utcoffset() != timedelta(0):
        raise ValueError(f"{text!r} is not a UTC timestamp: it must end with Z")
    return at


def _column(each: Mapping[str, Any]) -> Column:
    types = tuple((date.fromisoformat(one["from"]), str(one["type"])) for one in each["types"])
    if not types or types[0][0] != EVER or {kind for _, kind in types} - set(TYPES) or each["kind"] not in KINDS:
        raise ValueError(f"column {each['name']!r} has a kind or type that is not known")
    return Column(str(each["name"]), str(each["kind"]), str(each["source"]), types)


def add_columns(tree: LayoutDocument, columns: Sequence[Column]) -> LayoutDocument:
    """Add newly seen columns; a column that another process added meanwhile stays as it is."""
    known = {(each.kind, each.source) for each in tree.columns}
    new = tuple(each for each in columns if (each.kind, each.source) not in known)
    return replace(tree, columns=(*tree.columns, *new)) if new else tree


# The documented columns are fixed. Any other column keeps its name from the source, unless that is taken: a field with
# the name of a tag or a built-in column becomes `{name}_field`, such a tag `{name}_tag`. Names that differ only in case
# get a number, since engines such as Spark and DuckDB do not distinguish them. Invariant: once a tag or field has a
# column, it keeps it.

TIMESTAMP = "timestamp"
NANOS = "timestamp_nanos"
DEVICE = "device_id"
TAGS = ("device_type", "location")
MEASURED = ("voltage", "current", "power", "temperature")
COMPUTED = ("hour", "day_of_week", "is_weekend", "power_factor")
OURS = (TIMESTAMP, NANOS, DEVICE, *TAGS, *MEASURED, *COMPUTED)
UNKNOWN = "unknown"
log = logging.getLogger(__name__)


class TreeColumns:
    """The columns of one tree for one run. Thread-safe.

    `types`: configured types by column, used when a column is first seen. `file`: None for a read-only view.

    Lookups: `tags`, the names of all tag columns, which together with the timestamp identify a row; `tag_columns`, tag
    -> column, and `tag_names`, the reverse; `fields`, field -> column, and `by_name`, the same columns by name;
    `sources`, column -> field. For overflow columns: `overflow_of`, the column whose values they take, and
    `overflow_kinds`, TEXT or DOUBLE. Lookups are replaced as a whole, so readers need no lock.
    """

    def __init__(
        self,
        tree: LayoutDocument,
        *,
        device_tag: str,
        types: Mapping[str, str],
        file: LayoutFile | None,
    ) -> None:
        self._tree = tree
        self._device_tag = device_tag
        self.ignored_on = tree.ignored_on
        self._types = types
        self._file = file
        self._lock = threading.Lock()
        self._take(tree)

    def see(self, tags: Iterable[str], fields: Mapping[str, str]) -> None:
        """Ensure that these tags, of which none is ignored, and these fields with their current types have columns."""
        new = [("tag", name, TEXT) for name in tags if name not in self.tag_columns]
        new += [("field", name, kind) for name, kind in fields.items() if name not in self.fields]
        if new:
            self._add(new)

    def overflow(self, column: Column, kind: str) -> str:
        """The overflow column, TEXT or DOUBLE, for values that `column` cannot hold; created on first use."""
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

    def describe(self, name: str) -> Mapping[bytes, bytes]:
        """Parquet field metadata with a column's origin, so that the layout can be rebuilt from objects."""
        kind, source = self._descriptions.get(name, ("", ""))
        return {b"headwater": f"{kind}={source}".encode("utf-8", "surrogatepass")} if kind else {}

    def _add(self, new: Sequence[tuple[str, str, str]]) -> None:
        """Add columns of (kind, source, type) to the file before any object uses them."""
        with self._lock:

            def change(tree: LayoutDocument) -> LayoutDocument:
                columns: list[Column] = []
                for kind, source, type_ in new:
                    name = free_column_name(kind, source, {*OURS, *(each.name for each in (*tree.columns, *columns))})
                    wanted = self._types.get(name, type_) if kind == "field" else type_
                    columns.append(Column(name, kind, source, ((EVER, wanted),)))
                return add_columns(tree, columns)

            self._take(self._file.change(change) if self._file else change(self._tree))

    def _take(self, tree: LayoutDocument) -> None:
        """Replace the lookups; those that `see` and `overflow` test come last.

        A thread that finds an entry there then finds everything else about it.
        """
        fixed = [Column(name, "field", name, ((EVER, DOUBLE),)) for name in MEASURED]
        fields = [*fixed, *(each for each in tree.columns if each.kind == "field")]
        by_name = {each.name: each for each in fields}
        tags = {each.source: each.name for each in tree.columns if each.kind == "tag"}
        tag_columns = {**{name: name for name in TAGS if name != self._device_tag}, **tags}
        overflows = {(each.kind, each.source): each.name for each in tree.columns if each.kind.endswith(" of")}
        overflow_of = {name: by_name[column] for (_, column), name in overflows.items() if column in by_name}
        self._tree = tree
        self.tags = frozenset((*TAGS, *tags.values()))
        self.tag_names = {column: name for name, column in tag_columns.items()} | {name: name for name in TAGS}
        self.sources = {name: each.source for name, each in {**by_name, **overflow_of}.items()}
        self.overflow_kinds = {name: kind.removesuffix(" of") for (kind, _), name in overflows.items()}
        self._descriptions = {each.name: (each.kind, each.source) for each in tree.columns}
        self.overflow_of = overflow_of
        self._overflows = overflows
        self.by_name = by_name
        self.fields = {each.source: each for each in fields}
        self.tag_columns = tag_columns


def free_column_name(kind: str, source: str, taken: AbstractSet[str]) -> str:
    """A free column name for a tag, a field, or the overflow of a column."""
    suffix = {"tag": "_tag", "field": "_field"}.get(kind, f"_{kind.removesuffix(' of')}")
    wanted = source if kind in ("tag", "field") and source not in taken else f"{source}{suffix}"
    folded = {name.casefold() for name in taken}
    names = chain([wanted], (f"{wanted}_{number}" for number in count(2)))
    return next(name for name in names if name.casefold() not in folded)


def type_of(kinds: Iterable[str]) -> str:
    """The type of a field first seen with several types: mixed numbers become double, otherwise the first one wins."""
    kinds = list(dict.fromkeys(kinds))
    if DOUBLE in kinds:
        return DOUBLE
    if INTEGER in kinds:
        return INTEGER
    return kinds[0]


def kind_of(arrow_type: Any) -> str:
    """The layout's type name for values of an Arrow type."""
    if pa.types.is_floating(arrow_type):
        return DOUBLE
    if pa.types.is_boolean(arrow_type):
        return BOOLEAN
    return INTEGER if pa.types.is_integer(arrow_type) else TEXT
