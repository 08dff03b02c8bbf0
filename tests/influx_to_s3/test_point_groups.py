"""What is computed once for many windows or devices is what each alone gives, whatever their points are."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from datetime import timedelta
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pytest

from app.core.windows import Window
from app.influx_to_s3.point_groups import by_device, by_window, common_rows, sums_by_slot
from app.influx_to_s3.reader import PointColumns
from app.influx_to_s3.row_batch import RowBatch
from app.influx_to_s3.rows import canonical_table, merge_ordered, sums_of
from influx_points import NOON, NOON_NS, TIMES, columns_of

MINUTE_NS = 60 * 10**9
WINDOWS = [Window(NOON + n * timedelta(minutes=10), NOON + (n + 1) * timedelta(minutes=10)) for n in range(5)]
FIELDS: Mapping[str, Callable[[Random], Any]] = {
    "voltage": lambda random: random.choice([230.5, -0.0, math.inf, math.nan, 1e300, random.random()]),
    "power": lambda random: random.randrange(-9, 9),
    "note": lambda random: random.choice(["", "a", "naïve", "x" * 40]),
    "on": lambda random: random.random() < 0.5,
    "count": lambda random: random.choice([7, 1 << 60]),
}


def drawn(random: Random, devices: Sequence[str], *, twice: bool, further: int) -> list[PointColumns]:
    """Blocks of points of several series in random order; a field is missing, or has another type, in some."""
    blocks: list[PointColumns] = []
    for _ in range(random.randrange(1, 4)):
        number = random.randrange(1, 60)
        names = [name for name in FIELDS if random.random() < 0.8]
        fields: list[tuple[str, Any]] = []
        for name in names:
            make = FIELDS["note" if random.random() < 0.2 else name]
            values = [None if random.random() < 0.3 else make(random) for _ in range(number)]
            fields.append(
                (name, pa.array(values) if any(each is not None for each in values) else pa.nulls(number, pa.float64()))
            )
        tags = {
            name: pa.array([random.choice(["a", "b", None]) for _ in range(number)], pa.string())
            for name in ("phase", "location", "schema_version")
        }
        instants = [NOON_NS + random.randrange(0, 50) * MINUTE_NS + random.choice([0, 1, 1000]) for _ in range(number)]
        # In no other block.
        own = {f"further {len(blocks)} {place}": [random.random() for _ in range(number)] for place in range(further)}
        fields += [(name, pa.array(values)) for name, values in own.items()]
        if not twice:
            tags["series"] = pa.array([f"{len(blocks)}-{at}" for at in range(number)])
        owners = [random.choice(devices) for _ in range(number)]
        blocks.append(PointColumns(pa.array(instants).cast(TIMES), tags, fields, pa.array(owners, pa.string())))
    return blocks


def alone(
    blocks: Sequence[PointColumns], rows: Sequence[Sequence[int]], device: str, folder: Path, columns: Any
) -> RowBatch:
    """A batch of these rows of each block."""
    own = [
        block.each(partial(pc.take, indices=pa.array(at, pa.int64()))).without_empty_columns()
        for block, at in zip(blocks, rows, strict=True)
        if at
    ]
    batch = RowBatch(device, folder, 10**6, columns)
    tables = [canonical_table(block, columns) for block in own]
    read = sums_of(field for block in own for field in block.fields)
    if tables:
        table, others, twice = merge_ordered(tables, columns)
        batch.append(table, read, twice, others)
    return batch.finish({}, {})


def owners_of(block: PointColumns) -> list[str]:
    assert block.devices is not None
    found: list[str] = block.devices.to_pylist()
    return found


def described(batch: RowBatch) -> dict[str, Any]:
    tables = {unit: [table.to_pylist() for table in batch.output(unit)] for unit in ("us", "ns")}
    return {
        "digest": batch.digest,
        "rows": (batch.rows, batch.min_at, batch.max_at, batch.has_nanos),
        "schemas": [batch.schema, batch.output_schema("us"), batch.output_schema("ns")],
        "accounts": batch.accounts,
        "sums": repr(sorted(batch.sums.items())),
        "identities": batch.identities.tolist(),
        "tables": repr([table.to_pylist() for table in batch.tables()]),
        "output": repr({unit: [{**row} for table in some for row in table] for unit, some in tables.items()}),
    }


@pytest.mark.parametrize("by", ["device", "window"])
@pytest.mark.parametrize("points", ["unique", "repeated", "sparse"])
@pytest.mark.parametrize("seed", range(25))
def test_parts_of_common_rows_are_the_batches_that_each_slot_gives_alone(
    by: str, points: str, seed: int, tmp_path: Path
) -> None:
    random, columns = Random(f"{seed} {by} {points}"), columns_of()  # noqa: S311 - reproducible
    devices = [f"D{number}" for number in range(5)] if by == "device" else ["D0"]
    blocks = drawn(
        random,
        [*devices, "other"] if by == "device" else devices,
        twice=points == "repeated",
        further=20 * (points == "sparse"),
    )
    for block in blocks:
        canonical_table(block.without_empty_columns(), columns)  # names and types do not depend on who comes first
    slotted = [by_device(block, devices) if by == "device" else by_window(block, WINDOWS) for block in blocks]
    slotted = [block for block in slotted if block.bounds[-1]]
    read = sums_by_slot(slotted, 5)
    rows = common_rows(slotted, columns)
    for slot in range(5):
        device = devices[slot] if by == "device" else "D0"
        inside = range(1 << 63) if by == "device" else range(slot * 10 * MINUTE_NS, (slot + 1) * 10 * MINUTE_NS)
        own = [
            [
                at
                for at, (owner, instant) in enumerate(
                    zip(owners_of(block), block.times.cast(pa.int64()).to_pylist(), strict=True)
                )
                if owner == device and instant - NOON_NS in inside
            ]
            for block in blocks
        ]
        with closing(alone(blocks, own, device, tmp_path, columns)) as expected:
            several = sum(map(bool, own)) > 1
            if slot not in rows:
                assert points == "repeated" or (points == "sparse" and several) or not expected.rows
                own_points = [block.of(slot) for block in slotted if block.has(slot)]
                assert sum(len(block.times) for block in own_points) == sum(map(len, own))
                continue
            batch = RowBatch(device, tmp_path, 10**6, columns)
            batch.take(rows[slot], slot, read[slot])
            assert described(batch.finish({}, {})) == described(expected)


def test_devices_with_different_columns_do_not_share_a_table() -> None:
    devices = [f"D{number}" for number in range(40)]
    blocks = [
        PointColumns(
            pa.array([NOON_NS, NOON_NS + 1]).cast(TIMES),
            {},
            [(f"{device} {number}", pa.array([1.5, 2.5])) for number in range(50)],
            pa.array([device] * 2, pa.string()),
        )
        for device in devices
    ]
    rows = common_rows([by_device(block, devices) for block in blocks], columns_of())
    assert rows.keys() == set(range(40))
    assert max(common.table.num_columns for common in rows.values()) < 60
