"""The layout of data that have no `_headwater/layout.json`: of an older version, or because the file was lost.

Made from the state's table of an older version where there is one, else from the names and metadata of the objects.
"""

import io
import logging
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, date, datetime, timedelta
from random import Random
from typing import TYPE_CHECKING, Any

from app.core.windows import EPOCH, floor_to
from app.db.checkpoints import Layout
from app.influx_to_s3.layout import (
    COMPUTED,
    DEVICE,
    DOUBLE,
    EVER,
    INTEGER,
    MEASURED,
    NANOS,
    OURS,
    TAGS,
    TEXT,
    TIMESTAMP,
    UNSIGNED,
    Column,
    Tree,
    first_tree,
    kind_of,
)

if TYPE_CHECKING:
    from app.object_store.port import ObjectInfo, ObjectStore

KEY = re.compile(r"device_id=(?P<device>[^/]+)/date=(?P<date>.+)/export_(?P<time>\d{6})\.(?P<format>parquet|csv)")
DATE_FORMATS = ("%Y/%m/%d", "%Y-%m-%d", "%Y%m%d", "%Y/%j", "%Y-%j")
SAMPLES = 64
log = logging.getLogger(__name__)


@dataclass(slots=True)
class Seen:
    """What a listing of the tree shows: one object of each day, the newest one of each device, and some by chance."""

    days: dict[date, "ObjectInfo"] = field(default_factory=dict)
    newest: dict[str, tuple[datetime, "ObjectInfo"]] = field(default_factory=dict)
    oldest_at: datetime | None = None
    number: int = 0
    some: list["ObjectInfo"] = field(default_factory=list)
    date_formats: dict[date, str] = field(default_factory=dict)


def tree_of_data(
    store: "ObjectStore",
    prefix: str,
    *,
    kept: Sequence[Layout],
    starts: Iterable[datetime],
    wanted: Layout,
    first_start_at: datetime,
) -> Tree:
    """The tree as the data show it, or a new one when there are none.

    `kept`: layouts of an older version's state, oldest first; `starts`: the first cursors that the state knows.
    """
    seen = _look(store, prefix, wanted.date_format)
    if seen.oldest_at is None:
        tree = first_tree(wanted, min([first_start_at, *starts]))
        return replace(
            tree, layouts=tuple(replace(each, timestamp_unit=wanted.timestamp_unit) for each in kept) or tree.layouts
        )
    layouts = tuple(kept) or _layouts(store, seen)
    newest = [info for _, info in sorted(seen.newest.values(), key=lambda each: each[0])[-SAMPLES:]]
    samples = {info.key: info for info in (*newest, *seen.some)}.values()
    schemas = [schema for info in samples if (schema := _schema(store, info)) is not None]
    unit = (
        "us"
        if schemas and all(str(each.field(TIMESTAMP).type).startswith("timestamp[us") for each in schemas)
        else "ns"
    )
    first = min(starts, default=floor_to(seen.oldest_at, layouts[0].window_seconds))
    log.warning(
        "the layout of the objects is read from %s and kept beside them from now on",
        "the state" if kept else "the objects",
    )
    return Tree(
        first_start_at=first,
        sealed_day=max(seen.days),
        layouts=tuple(replace(each, timestamp_unit=unit) for each in layouts),
        columns=columns_of(schemas),
    )


def _look(store: "ObjectStore", prefix: str, date_format: str) -> Seen:
    seen = Seen()
    chance = Random(0)  # noqa: S311 - the same sample each time, no secret
    start = f"{prefix}/" if prefix else ""
    formats = dict.fromkeys((date_format, *DATE_FORMATS))
    for info in store.list(f"{start}device_id="):
        named = KEY.fullmatch(info.key.removeprefix(start))
        found = named and _instant(named["date"], named["time"], formats)
        if not named or not found:
            continue
        instant, written_as = found
        day = instant.date()
        seen.days.setdefault(day, info)
        seen.date_formats.setdefault(day, written_as)
        seen.oldest_at = min(seen.oldest_at or instant, instant)
        # A sample in which each object of a tree of any size has the same chance to be.
        seen.number += 1
        place = chance.randrange(seen.number)
        if len(seen.some) < SAMPLES:
            seen.some.append(info)
        elif place < SAMPLES:
            seen.some[place] = info
        if named["device"] not in seen.newest or seen.newest[named["device"]][0] < instant:
            seen.newest[named["device"]] = instant, info
    return seen


def _instant(day: str, time: str, formats: Iterable[str]) -> tuple[datetime, str] | None:
    for written_as in formats:
        try:
            at = datetime.strptime(f"{day} {time}", f"{written_as} %H%M%S").replace(tzinfo=UTC)
        except ValueError:
            continue
        if at.strftime(written_as) == day:
            return at, written_as
    return None


def _layouts(store: "ObjectStore", seen: Seen) -> tuple[Layout, ...]:
    """A layout for each run of days that are cut and named alike, from the metadata of one object a day."""
    layouts: list[Layout] = []
    for day, listed in sorted(seen.days.items()):
        seconds = _seconds(store, listed) or (layouts[-1].window_seconds if layouts else 3600)
        effective_at = datetime(day.year, day.month, day.day, tzinfo=UTC) if layouts else EPOCH
        layout = Layout(effective_at, seconds, listed.key.rpartition(".")[2], seen.date_formats[day])
        if not layouts or replace(layouts[-1], effective_at=effective_at) != layout:
            layouts.append(layout)
    return tuple(layouts)


def _seconds(store: "ObjectStore", listed: "ObjectInfo") -> int | None:
    """The window's length, which each writer noted: `{start}/{end}`."""
    info = store.head(listed.key)
    start, _, end = (info.metadata.get("window", "") if info else "").partition("/")
    try:
        return int((datetime.fromisoformat(end) - datetime.fromisoformat(start)) / timedelta(seconds=1)) or None
    except ValueError:
        return None


def _schema(store: "ObjectStore", info: "ObjectInfo") -> Any:
    """The Arrow schema of a Parquet object; None for CSV, and for what cannot be read, which verify tells of."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not info.key.endswith(".parquet"):
        return None
    with store.open(info.key, info.etag) as body:
        content = body.read() if body else b""
    try:
        schema = pq.read_schema(io.BytesIO(content))
    except (pa.ArrowException, OSError) as error:
        log.warning("%s cannot be read: %s", info.key, error)
        return None
    return schema if TIMESTAMP in schema.names else None


def columns_of(schemas: Iterable[Any]) -> tuple[Column, ...]:
    """Columns with the type that most objects give them; numbers of both kinds make a double."""
    kinds: dict[str, Counter[str]] = {}
    described: dict[str, tuple[str, str]] = {}
    for schema in schemas:
        for each in schema:
            if each.name in (TIMESTAMP, NANOS, DEVICE, *TAGS, *MEASURED, *COMPUTED):
                continue
            unsigned = str(each.type) == "uint64"
            kinds.setdefault(each.name, Counter())[UNSIGNED if unsigned else kind_of(each.type)] += 1
            kind, equals, source = (
                (each.metadata or {}).get(b"headwater", b"").decode("utf-8", "surrogatepass").partition("=")
            )
            described[each.name] = (
                (kind, source) if equals else described.get(each.name, ("field", _source_of(each.name)))
            )
    return tuple(
        Column(name, *described[name], ((EVER, _most_common(counts)),)) for name, counts in sorted(kinds.items())
    )


def _source_of(name: str) -> str:
    """The field of a column of an older version, which renamed only fields called like a column of ours."""
    stem = name.removesuffix("_field")
    return stem if stem in OURS else name


def _most_common(counts: "Counter[str]") -> str:
    kind, _ = max(counts.items(), key=lambda item: (item[1], item[0] != TEXT))
    return DOUBLE if kind == INTEGER and counts[DOUBLE] else kind
