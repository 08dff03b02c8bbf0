"""Points of one query for several windows or devices: what is done with them is done once for all.

A slot is one of these windows or devices; they are numbered in the order in which they were asked for.
"""

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from app.core.errors import Permanent
from app.core.pipeline import Sums
from app.core.windows import Window
from app.influx_to_s3.layout import TreeColumns
from app.influx_to_s3.reader import PointColumns
from app.influx_to_s3.row_batch import CommonRows
from app.influx_to_s3.rows import (
    canonical_table,
    codes_of,
    instants_of,
    nanoseconds_of,
    sums_of_parts,
    tag_names_in,
    times_of,
    without_ignored,
)
from app.object_store.row_digest import one_array

SPARSE = 2
"""A common table may have this many times the cells of its parts."""


@dataclass(frozen=True, slots=True)
class SlottedPoints:
    """Points by slot, in their original order within it: slot n has the points `bounds[n]` to `bounds[n + 1]`."""

    points: PointColumns
    bounds: Sequence[int]

    def has(self, slot: int) -> bool:
        """Whether the slot has a point."""
        return self.bounds[slot] < self.bounds[slot + 1]

    def of(self, slot: int) -> PointColumns:
        """The points of one slot, without columns in which it has no value."""
        start, end = self.bounds[slot], self.bounds[slot + 1]
        return self.points.each(lambda values: values.slice(start, end - start)).without_empty_columns()


def by_device(block: PointColumns, devices: Sequence[str]) -> SlottedPoints:
    """The points of several devices, each of which is a slot. Raises Permanent if they do not name their devices."""
    if block.devices is None:
        raise Permanent("InfluxDB's response for several devices does not say which point is whose")
    encoded = one_array(block.devices).dictionary_encode()
    places = {device: slot for slot, device in enumerate(devices)}
    slots = np.array([places.get(device, -1) for device in encoded.dictionary.to_pylist()], np.int64)
    return _slotted(block, slots[encoded.indices.to_numpy()], len(devices))


def by_window(block: PointColumns, windows: Sequence[Window]) -> SlottedPoints:
    """The points of adjacent windows, each of which is a slot."""
    edges = [nanoseconds_of(at) for at in (*(window.start for window in windows), windows[-1].end)]
    slots = np.searchsorted(edges, times_of(block.times), side="right") - 1
    return _slotted(block, np.where(slots < len(windows), slots, -1), len(windows))


def _slotted(block: PointColumns, slots: Any, number: int) -> SlottedPoints:
    """`slots`: that of each point, -1 for a point that was not asked for."""
    is_sorted = bool(np.all(slots[1:] >= slots[:-1])) and (not len(slots) or slots[0] >= 0)
    if not is_sorted:
        order = np.argsort(slots, kind="stable")
        order = order[slots[order] >= 0]
        places = pa.array(order)
        block, slots = block.each(lambda values: one_array(values).take(places)), slots[order]
    ends = np.cumsum(np.bincount(slots, minlength=number)).tolist()
    return SlottedPoints(block.each(one_array).without_empty_columns(), [0, *ends])


def sums_by_slot(blocks: Sequence[SlottedPoints], number: int) -> Sequence[dict[str, Sums]]:
    """The sums of each slot, by field: see `rows.sums_of`."""
    found: list[dict[str, Sums]] = [{} for _ in range(number)]
    for block in blocks:
        bounds = np.array(block.bounds)
        for name, values in block.points.fields:
            for slot, sums in sums_of_parts(values, bounds):
                fields = found[slot]
                fields[name] = fields[name] + sums if name in fields else sums
    return found


def common_rows(blocks: Sequence[SlottedPoints], columns: TreeColumns) -> Mapping[int, CommonRows]:
    """Slot -> the rows of which its own are a part. Slots whose points have to be put together alone are left out.

    These are slots in which points have the same identity and, where blocks have different columns, so that a common
    table would be mostly empty, slots with points in several blocks.
    """
    tables = [canonical_table(block.points, columns) for block in blocks]
    slots = [np.repeat(np.arange(len(block.bounds) - 1), np.diff(block.bounds)) for block in blocks]
    names = {name for table in tables for name in table.column_names}
    rows, cells = sum(table.num_rows for table in tables), sum(table.num_rows * table.num_columns for table in tables)
    if len(tables) > 1 and rows * len(names) <= SPARSE * cells:
        tables, slots = [pa.concat_tables(tables, promote_options="default")], [np.concatenate(slots)]
    found: dict[int, CommonRows] = {}
    seen: set[int] = set()
    for table, own in zip(tables, slots, strict=True):
        there = set(np.unique(own).tolist())
        common, repeated = _in_order(table.combine_chunks(), own, columns)
        found |= dict.fromkeys(there - repeated, common)
        for slot in seen & there:
            found.pop(slot, None)
        seen |= there
    return found


def _in_order(table: pa.Table, slots: Any, columns: TreeColumns) -> tuple[CommonRows, AbstractSet[int]]:
    """The rows by slot and in canonical order, and the slots in which points have the same identity."""
    instants = instants_of(table)
    repeated: set[int] = set()
    later, same = slots[1:] > slots[:-1], slots[1:] == slots[:-1]
    if not np.all(later | (same & (instants[1:] > instants[:-1]))):
        series = codes_of(table, tag_names_in(table, columns))
        order = np.lexsort((series, instants, slots))
        slots, instants, series = slots[order], instants[order], series[order]
        alike = (np.diff(slots) == 0) & (np.diff(instants) == 0) & (np.diff(series) == 0)
        repeated = set(slots[1:][alike].tolist())
        table = table.take(pa.array(order)).combine_chunks()
    bounds = [0, *np.cumsum(np.bincount(slots)).tolist()]
    return CommonRows(without_ignored(table), bounds, columns), repeated
