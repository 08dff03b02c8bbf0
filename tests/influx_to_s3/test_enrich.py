"""The documented columns: their order, their types, and what is computed, in any environment."""

import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from app.influx_to_s3.layout import TreeColumns
from app.influx_to_s3.row_batch import RowBatch
from app.influx_to_s3.rows import canonical_table
from influx_points import columns_of, points

DOCUMENTED = [
    ("timestamp", pa.timestamp("ns", "UTC")),
    ("device_id", pa.dictionary(pa.int32(), pa.string())),
    ("device_type", pa.string()),
    ("location", pa.string()),
    ("voltage", pa.float64()),
    ("current", pa.float64()),
    ("power", pa.float64()),
    ("temperature", pa.float64()),
    ("hour", pa.int32()),
    ("day_of_week", pa.int32()),
    ("is_weekend", pa.bool_()),
    ("power_factor", pa.float64()),
]
SATURDAY = datetime(2026, 2, 7, 12, tzinfo=UTC)


def canonical_rows(instants: list[datetime], **fields: list[Any]) -> pa.Table:
    """Canonical rows of one pump."""
    tags = {"device_type": ["pump"] * len(instants), "location": ["unknown"] * len(instants)}
    return pa.table({"timestamp": pa.array(instants, pa.timestamp("ns", "UTC")), **tags, **fields})


def enriched(table: pa.Table, columns: TreeColumns | None = None) -> pa.Table:
    batch = RowBatch("D1", Path(), 10**6, columns or columns_of())
    batch.append(table)
    batch.finish({}, {})
    return pa.concat_tables([batch.output_schema().empty_table(), *batch.output()])


def test_the_documented_columns_come_first_and_further_fields_by_name() -> None:
    table = enriched(
        canonical_rows([SATURDAY], zeta=[1], alpha=["x"], power=[2.0], voltage=pa.nulls(1, pa.float64()), on=[True])
    )
    assert [(column.name, column.type) for column in table.schema] == [
        *DOCUMENTED,
        ("alpha", pa.string()),
        ("on", pa.bool_()),
        ("zeta", pa.int64()),
    ]


def test_further_tags_come_before_further_fields_each_by_name_and_say_what_they_stand_for() -> None:
    columns = columns_of()
    tags = {"phase": "L1", "hour": "late", "board": "b"}
    table = enriched(canonical_table(points(0, tags=tags, alpha=["x"], hour=[7], zeta=[2.5]), columns), columns)
    assert [(column.name, column.type) for column in table.schema] == [
        *DOCUMENTED,
        ("board", pa.string()),
        ("hour_tag", pa.string()),
        ("phase", pa.string()),
        ("alpha", pa.string()),
        ("hour_field", pa.int64()),
        ("zeta", pa.float64()),
    ]
    assert table.schema.field("hour_tag").metadata == {b"headwater": b"tag=hour"}
    assert table.schema.field("hour_field").metadata == {b"headwater": b"field=hour"}
    assert table.schema.field("voltage").metadata is None


def test_a_window_without_any_measured_field_has_the_documented_columns_too() -> None:
    table = enriched(canonical_rows([SATURDAY]))
    assert [(column.name, column.type) for column in table.schema] == DOCUMENTED
    assert table.column("device_id").to_pylist() == ["D1"]
    assert table.column("power_factor").to_pylist() == [None]


def test_no_rows_keep_their_columns() -> None:
    assert enriched(canonical_rows([]).slice(0, 0)).num_rows == 0


def test_calendar_columns_hold_for_every_hour_of_a_leap_year_and_before_the_epoch() -> None:
    hours = [datetime(2024, 1, 1, tzinfo=UTC) + timedelta(hours=n) for n in range(366 * 24)]
    hours += [datetime(1969, 12, 28, tzinfo=UTC) + timedelta(hours=n) for n in range(96)]
    table = enriched(canonical_rows(hours))
    assert table.column("hour").to_pylist() == [at.hour for at in hours]
    assert table.column("day_of_week").to_pylist() == [at.weekday() for at in hours]
    assert table.column("is_weekend").to_pylist() == [at.weekday() >= 5 for at in hours]


def test_the_last_nanosecond_of_an_hour_belongs_to_it() -> None:
    table = canonical_rows([SATURDAY])
    last = pa.array([int(SATURDAY.timestamp()) * 10**9 - 1]).cast(pa.timestamp("ns", "UTC"))
    assert enriched(table.set_column(0, "timestamp", last)).column("hour").to_pylist() == [11]


def test_power_factor_is_clipped_and_null_where_it_cannot_be_computed() -> None:
    nan, inf = float("nan"), float("inf")
    cases = [
        (230.0, 2.0, 414.0, 0.9),
        (230.0, 2.0, 4600.0, 1.0),
        (230.0, 2.0, -5.0, 0.0),
        (230.0, 0.0, 5.0, None),
        (0.0, 2.0, 0.0, None),
        (None, 2.0, 5.0, None),
        (230.0, None, 5.0, None),
        (230.0, 2.0, None, None),
        (nan, 2.0, 5.0, None),
        (230.0, 2.0, nan, None),
        (inf, 0.0, 5.0, None),
        (-230.0, -2.0, 230.0, 0.5),
        (230.0, 2.0, 0.0, 0.0),
    ]
    voltage, current, power, factor = zip(*cases, strict=True)
    given = {"voltage": voltage, "current": current, "power": power}
    fields = {name: pa.array(column, pa.float64()) for name, column in given.items()}
    table = enriched(canonical_rows([SATURDAY + timedelta(seconds=n) for n in range(len(cases))], **fields))
    assert table.column("power_factor").to_pylist() == list(factor)


@pytest.mark.parametrize("zone", ["Asia/Kathmandu", "America/St_Johns"])
def test_the_time_zone_of_the_process_has_no_influence(zone: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hours = [SATURDAY + timedelta(hours=7 * n) for n in range(60)]
    expected = enriched(canonical_rows(hours))
    with monkeypatch.context() as environment:
        environment.setenv("TZ", zone)
        time.tzset()
        assert datetime.now().astimezone().utcoffset() != timedelta(0)
        assert enriched(canonical_rows(hours)).equals(expected)
    time.tzset()
