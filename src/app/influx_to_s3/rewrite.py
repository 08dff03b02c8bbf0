"""Work from the objects themselves: rebuild a lost layout, and re-encode objects in the current form.

Data may lack `_headwater/layout.json` because an older version wrote them or because the file was lost. The layout is
then rebuilt from the older version's table in the state, if there is one, otherwise from the names and metadata of the
objects.
"""

import io
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, date, datetime
from heapq import nlargest
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from app.core.pipeline import ALL_TAGS, Commit, ObjectState, Record
from app.core.runs import Context, Done, Report
from app.core.sync import delete_deltas
from app.core.windows import DAY_SECONDS, EPOCH, Age, Window, age_of, floor_to, named_day, windows_between
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
    LayoutDocument,
    TreeColumns,
    kind_of,
    log,
    new_layout,
)
from app.influx_to_s3.row_batch import RowBatch
from app.influx_to_s3.rows import merge_in_order, merge_ordered, of_object
from app.influx_to_s3.source import OpenedExport
from app.object_store.deltas import window_from_metadata
from app.object_store.port import ObjectInfo, ObjectStore
from app.object_store.table_sink import TableSink

KEY = re.compile(r"device_id=(?P<device>[^/]+)/date=(?P<date>.+)/export_(?P<time>\d{6})\.(?P<format>parquet|csv)")
DATE_FORMATS = ("%Y/%m/%d", "%Y-%m-%d", "%Y%m%d", "%Y/%j", "%Y-%j")
SAMPLES = 64


@dataclass(slots=True)
class TreeSample:
    """A sample of a tree's listing: one object per day, the newest of each device, and some random ones."""

    days: dict[date, ObjectInfo] = field(default_factory=dict)
    newest: dict[str, tuple[datetime, ObjectInfo]] = field(default_factory=dict)
    oldest_at: datetime | None = None
    number: int = 0
    some: list[ObjectInfo] = field(default_factory=list)
    date_formats: dict[date, str] = field(default_factory=dict)


def layout_from_data(
    store: ObjectStore,
    prefix: str,
    *,
    kept: Sequence[Layout],
    starts: Iterable[datetime],
    wanted: Layout,
    first_start_at: datetime,
) -> LayoutDocument:
    """The layout derived from the data, or a new one when there are none.

    `kept`: layouts from an older version's state, oldest first; `starts`: the first cursors in the state.
    """
    seen = _look(store, prefix, wanted.date_format)
    if seen.oldest_at is None:
        tree = new_layout(wanted, min([first_start_at, *starts]))
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
    return LayoutDocument(
        first_start_at=first,
        sealed_day=max(seen.days),
        layouts=tuple(replace(each, timestamp_unit=unit) for each in layouts),
        columns=columns_of(schemas),
    )


def _look(store: ObjectStore, prefix: str, date_format: str) -> TreeSample:
    seen = TreeSample()
    chance = Random(0)  # noqa: S311 - a reproducible sample; not security-sensitive
    for instant, written_as, device, info in _exported(store, prefix, (date_format, *DATE_FORMATS)):
        day = instant.date()
        seen.days.setdefault(day, info)
        seen.date_formats.setdefault(day, written_as)
        seen.oldest_at = min(seen.oldest_at or instant, instant)
        # Reservoir sampling: each object has the same chance, whatever the size of the tree.
        seen.number += 1
        place = chance.randrange(seen.number)
        if len(seen.some) < SAMPLES:
            seen.some.append(info)
        elif place < SAMPLES:
            seen.some[place] = info
        if device not in seen.newest or seen.newest[device][0] < instant:
            seen.newest[device] = instant, info
    return seen


def lost_cursor(store: ObjectStore, prefix: str, device: str, tree: LayoutDocument, now: datetime) -> datetime | None:
    """Where to resume a device whose cursor is lost or ahead of now; None when its objects do not show it.

    The earlier of two times: the last committed cursor that the newest object's writer recorded, and the start of that
    object's window. Objects of older versions record no cursor; at most SAMPLES objects are checked.
    """
    formats = (*(each.date_format for each in tree.layouts), *DATE_FORMATS)
    objects = _exported(store, prefix, formats, device)
    for at, key in nlargest(SAMPLES, ((at, info.key) for at, _, _, info in objects if at <= now)):
        info = store.head(key)
        if info is not None and (stamp := info.metadata.get("cursor")):
            window = next(tree.windows(at, at + datetime.resolution))
            return min(datetime.fromisoformat(stamp), window.start)
    return None


def _exported(
    store: ObjectStore, prefix: str, date_formats: Iterable[str], device: str = ""
) -> Iterator[tuple[datetime, str, str, ObjectInfo]]:
    """Every object of a tree or of one device: the timestamp in its name, its date format, and its device."""
    start = f"{prefix}/" if prefix else ""
    formats = dict.fromkeys(date_formats)
    for info in store.list(f"{start}device_id={device}{'/' if device else ''}"):
        named = KEY.fullmatch(info.key.removeprefix(start))
        if named is None:
            continue
        for written_as in formats:
            with suppress(ValueError):
                at = datetime.strptime(f"{named['time']}+0000", "%H%M%S%z").timetz()
                if day := named_day(named["date"], written_as):
                    yield datetime.combine(day, at), written_as, named["device"], info
                    break


def _layouts(store: ObjectStore, seen: TreeSample) -> tuple[Layout, ...]:
    """One layout per run of consecutive days that are cut and named alike, from the metadata of one object per day."""
    layouts: list[Layout] = []
    for day, listed in sorted(seen.days.items()):
        seconds = _seconds(store, listed) or (layouts[-1].window_seconds if layouts else 3600)
        effective_at = datetime(day.year, day.month, day.day, tzinfo=UTC) if layouts else EPOCH
        layout = Layout(effective_at, seconds, listed.key.rpartition(".")[2], seen.date_formats[day])
        if not layouts or replace(layouts[-1], effective_at=effective_at) != layout:
            layouts.append(layout)
    return tuple(layouts)


def _seconds(store: ObjectStore, listed: ObjectInfo) -> int | None:
    """The window length, which every writer records."""
    info = store.head(listed.key)
    noted = window_from_metadata(info) if info else None
    return noted[1] - noted[0] if noted else None


def _schema(store: ObjectStore, info: ObjectInfo) -> Any:
    """The Arrow schema of a Parquet object; None for CSV, and for unreadable objects, which verify reports."""
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
    """Columns with the type that most objects give them; a mix of integers and doubles becomes double."""
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
            # Older versions wrote no column metadata, and renamed only fields that clashed with a built-in column.
            stem = each.name.removesuffix("_field")
            guessed = "field", stem if stem in OURS else each.name
            described[each.name] = (kind, source) if equals else described.get(each.name, guessed)
    return tuple(
        Column(name, *described[name], ((EVER, _most_common(counts)),)) for name, counts in sorted(kinds.items())
    )


def _most_common(counts: Counter[str]) -> str:
    kind, _ = max(counts.items(), key=lambda item: (item[1], item[0] != TEXT))
    return DOUBLE if kind == INTEGER and counts[DOUBLE] else kind


# `python -m app rewrite influx_to_s3`: re-encode objects from themselves, with the current unit, names and types.
#
# The source is not queried, since it may have dropped these rows. Invariants: each object is replaced by
# compare-and-swap on the version that was read, then its record is updated. An interrupted rewrite resumes where it
# stopped, since objects that are already up to date are left alone. Deltas of older versions are folded into their
# window's object.


def devices_in(sink: TableSink) -> Sequence[str]:
    """Every device that has objects, from one listing."""
    start = f"{sink.prefix}/" if sink.prefix else ""
    found = (KEY.fullmatch(info.key.removeprefix(start)) for info in sink.store.list(f"{start}device_id="))
    return sorted({named["device"] for named in found if named})


def rewrite(opened: OpenedExport, context: Context, device: str, span: Window, done: Done) -> None:
    """Re-encode the objects of one device whose windows start in `span` and are due."""
    pipeline, sink, columns = opened.pipeline, opened.sink, opened.columns
    for day in windows_between(span.start, span.end, DAY_SECONDS):
        found = pipeline.checkpoints.records(pipeline.name, device, day.start, day.end)
        records = {record.window.start: record for record in found if not record.part}
        windows = list(pipeline.grid.windows(day.start, day.end))
        objects = sink.objects(device, windows)
        for window in windows:
            context.stop.check()
            keys = {part: key for part, (key, _) in sorted(objects.get(window.start, {}).items())}
            is_due = age_of(window, opened.now, pipeline.grid.grace_seconds) is Age.DUE
            if not (keys and is_due and span.start <= window.start < span.end):
                continue
            held = {part: there for part, key in keys.items() if (there := _own(sink, key))}
            if held and (0 in held or 0 not in keys):
                folded = held[0].folded if 0 in held else 0
                parts = [part for part in held if not part or part > folded]
                tables = [_rows(sink, columns, keys[part], held[part].version) for part in parts]
                with closing(opened.source.spooled(device, merge_in_order(tables, columns))) as batch:
                    # Tags that were lost once stay lost.
                    batch.has_all_tags = all(held[part].tags == ALL_TAGS for part in parts)
                    record = records.get(window.start)
                    done(_replace(opened, context, window, keys=keys, held=held, batch=batch, record=record))
            context.progress.advance(done=1)


def _own(sink: TableSink, key: str) -> ObjectState | None:
    """What Headwater wrote under this key; None for an object of another program, which is left as it is."""
    held = sink.head(key)
    if held is not None and not held.digest:
        log.warning("%s: was not written by Headwater, left as it is: run verify with --heal first", key)
        return None
    return held


def _unit(sink: TableSink, key: str) -> str:
    """The unit of the object's timestamps; older versions recorded none and wrote nanoseconds."""
    info = sink.store.head(key)
    return info.metadata.get("timestamp-unit", "ns") if info else ""


def _rows(sink: TableSink, columns: TreeColumns, key: str, version: str) -> Iterator[pa.Table]:
    for table in sink.read(key, version):
        if table.num_rows:
            yield merge_ordered([of_object(table, columns)], columns)[0]


def _replace(
    opened: OpenedExport,
    context: Context,
    window: Window,
    *,
    keys: Mapping[int, str],
    held: Mapping[int, ObjectState],
    batch: RowBatch,
    record: Record | None,
) -> Report:
    """Write the re-encoded object unless it is up to date, update its record and delete the deltas."""
    pipeline, sink = opened.pipeline, opened.sink
    base, key = held.get(0), keys.get(0) or sink.key(batch.device, window, 0)
    is_done = (
        base is not None
        and base.digest == batch.digest
        and max(held) <= base.folded
        and (key.endswith(".csv") or _unit(sink, key) == sink.layout_at(window.start).timestamp_unit)
    )
    report = Report() if is_done else Report(rows=batch.rows, windows=1)
    if context.dry_run:
        return report
    version, size_bytes = (base.version, base.size_bytes) if base is not None and is_done else ("", 0)
    summaries: Sequence[Any] = ()
    folded = max(base.folded if base is not None else 0, *held)
    if not is_done:
        with closing(sink.noted(sink.encode(batch.device, window, batch), folded)) as encoded:
            version = sink.put(key, encoded, base.version if base else None, closing=True)
            size_bytes = encoded.size_bytes
            summaries = pipeline.summarise(encoded, key, version) if pipeline.summarise else ()
        log.info("%s: rewritten, %d rows", key, batch.rows)
    deltas = [keys[part] for part in held if part]
    if record is not None and (record.version, record.digest) != (version, batch.digest):
        # A rewrite that was killed between the two steps leaves a new object with an outdated record.
        is_confirmed = base is not None and record.version == base.version
        after = replace(
            record,
            version=version,
            digest=batch.digest,
            rows=batch.rows,
            size_bytes=size_bytes,
            source_digest=record.source_digest if is_confirmed else "",
            folded=folded,
        )
        commit = Commit((after,), folded=(window,) if deltas else (), summaries=summaries)
        pipeline.checkpoints.commit(pipeline.name, batch.device, commit, context.lease)
    delete_deltas(pipeline, deltas)
    return report + Report(bytes=0 if is_done else size_bytes)
