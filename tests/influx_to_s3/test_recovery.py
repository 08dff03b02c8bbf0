"""The layout of data that have no layout file: an older version's, or what was lost and is read from the objects."""

import io
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from app.core.windows import EPOCH
from app.db.checkpoints import Layout
from app.influx_to_s3.layout import (
    COMPUTED,
    DOUBLE,
    EVER,
    INTEGER,
    MEASURED,
    TAGS,
    TEXT,
    UNSIGNED,
    Column,
    LayoutDocument,
)
from app.influx_to_s3.rewrite import columns_of, layout_from_data
from app.object_store.port import PutRequest
from memory_objects import MemoryObjects

NOON = datetime(2026, 2, 7, 12, tzinfo=UTC)
HOUR, DAY = timedelta(hours=1), timedelta(days=1)
WANTED = Layout(EPOCH, 900, "parquet", "%Y/%m/%d", "us")
OLD = Layout(EPOCH, 3600, "parquet", "%Y/%m/%d", "ns")
COUNT_INT, COUNT_DOUBLE, COUNT_TEXT = (("count", kind) for kind in (pa.int64(), pa.float64(), pa.string()))


def schema(*columns: Any, unit: str = "ns") -> pa.Schema:
    """The documented columns and these."""
    documented = [("device_id", pa.string()), *((name, pa.string()) for name in TAGS)]
    documented += [(name, pa.float64()) for name in MEASURED]
    documented += list(zip(COMPUTED, (pa.int32(), pa.int32(), pa.bool_(), pa.float64()), strict=True))
    return pa.schema([("timestamp", pa.timestamp(unit, "UTC")), *documented, *columns])


def add(
    store: MemoryObjects,
    at: datetime,
    *columns: Any,
    device: str = "D1",
    seconds: int = 3600,
    kind: str = "parquet",
    date_format: str = "%Y/%m/%d",
    unit: str = "ns",
) -> None:
    """An object as a run wrote it."""
    key = f"telemetry/device_id={device}/date={at:{date_format}}/export_{at:%H%M%S}.{kind}"
    body = io.BytesIO()
    if kind == "parquet":
        pq.write_table(schema(*columns, unit=unit).empty_table(), body)
        body.seek(0)
    window = f"{at:%Y-%m-%dT%H:%M:%SZ}/{at + timedelta(seconds=seconds):%Y-%m-%dT%H:%M:%SZ}"
    store.put(key, body, PutRequest("x/y", {"window": window}))


def recovered(store: MemoryObjects, *kept: Layout, starts: tuple[datetime, ...] = ()) -> LayoutDocument:
    return layout_from_data(
        store, "telemetry", kept=kept, starts=starts, wanted=WANTED, first_start_at=NOON - timedelta(minutes=20)
    )


def test_without_objects_and_state_the_tree_is_new() -> None:
    tree = recovered(MemoryObjects())
    assert tree == LayoutDocument(NOON - timedelta(minutes=30), EVER, (WANTED,))


def test_an_installation_that_began_and_wrote_nothing_yet_keeps_where_it_began() -> None:
    tree = recovered(MemoryObjects(), OLD, starts=(NOON - 3 * HOUR, NOON - HOUR))
    assert tree.first_start_at == NOON - 3 * HOUR
    assert [(each.window_seconds, each.timestamp_unit) for each in tree.layouts] == [(3600, "us")]


def test_on_the_upgrade_the_layouts_of_the_state_are_taken_as_they_are() -> None:
    store = MemoryObjects()
    for days in range(3):
        add(store, NOON + days * DAY)
    later = Layout(NOON.replace(hour=0) + DAY, 1800, "parquet", "%Y/%m/%d", "ns")
    tree = recovered(store, OLD, later, starts=(NOON - 2 * DAY, NOON))
    assert tree.layouts == (OLD, later)
    assert tree.first_start_at == NOON - 2 * DAY
    assert tree.sealed_day == date(2026, 2, 9)  # that of the newest object


def test_without_a_state_length_format_and_dates_are_read_from_the_objects() -> None:
    store = MemoryObjects()
    add(store, NOON)
    add(store, NOON + HOUR)
    add(store, NOON + DAY, seconds=900)
    add(store, NOON + 2 * DAY, seconds=900, kind="csv")
    add(store, NOON + 3 * DAY, seconds=900, kind="csv", date_format="%Y-%m-%d")
    store.put("telemetry/device_id=D1/date=2026/02/07/notes.txt", io.BytesIO(b"x"), PutRequest("x/y"))
    store.put("telemetry/_set_aside/x/1.txt", io.BytesIO(b"x"), PutRequest("x/y"))
    tree = recovered(store)
    midnight = NOON.replace(hour=0)
    assert tree.layouts == (
        OLD,
        Layout(midnight + DAY, 900, "parquet", "%Y/%m/%d", "ns"),
        Layout(midnight + 2 * DAY, 900, "csv", "%Y/%m/%d", "ns"),
        Layout(midnight + 3 * DAY, 900, "csv", "%Y-%m-%d", "ns"),
    )
    assert (tree.first_start_at, tree.sealed_day) == (NOON, date(2026, 2, 10))


def test_dates_whose_format_repeats_a_directive_are_read_from_the_objects_too() -> None:
    store, wanted = MemoryObjects(), replace(WANTED, date_format="%Y/%m/%Y-%m-%d")
    add(store, NOON, date_format=wanted.date_format)
    tree = layout_from_data(store, "telemetry", kept=(), starts=(), wanted=wanted, first_start_at=NOON + DAY)
    assert tree.layouts[0] == replace(OLD, date_format=wanted.date_format)


@pytest.mark.parametrize(("units", "expected"), [(("us", "us"), "us"), (("ns", "ns"), "ns"), (("us", "ns"), "ns")])
def test_the_unit_is_that_of_the_objects(units: tuple[str, ...], expected: str) -> None:
    store = MemoryObjects()
    for number, unit in enumerate(units):
        add(store, NOON + number * HOUR, device=f"D{number}", unit=unit)
    assert recovered(store).layouts[-1].timestamp_unit == expected


def test_types_are_those_of_most_objects_and_numbers_of_both_kinds_make_a_double() -> None:
    found = columns_of(
        [
            schema(COUNT_INT, ("mode", pa.string()), ("n", pa.int64()), ("u", pa.uint64())),
            schema(COUNT_INT, ("mode", pa.string()), ("n", pa.float64()), ("u", pa.uint64())),
            schema(COUNT_TEXT, ("mode", pa.int64()), ("n", pa.int64())),
        ]
    )
    assert {each.name: each.types for each in found} == {
        "count": ((EVER, INTEGER),),
        "mode": ((EVER, TEXT),),
        "n": ((EVER, DOUBLE),),
        "u": ((EVER, UNSIGNED),),
    }
    assert {each.kind for each in found} == {"field"}


def test_a_tie_goes_to_the_type_that_keeps_numbers() -> None:
    for order in ((COUNT_TEXT, COUNT_DOUBLE), (COUNT_DOUBLE, COUNT_TEXT)):
        [column] = columns_of([schema(one) for one in order])
        assert column.types == ((EVER, DOUBLE),)


def test_what_the_objects_say_of_their_columns_is_taken_and_the_rest_are_fields() -> None:
    def described(name: str, kind: pa.DataType, text: bytes) -> pa.Field:
        return pa.field(name, kind, metadata={b"headwater": text})

    found = columns_of(
        [
            schema(
                described("phase", pa.string(), b"tag=phase"),
                described("hour_tag", pa.string(), b"tag=hour"),
                described("a=b_2", pa.int64(), b"field=a=b"),
                described("x_text", pa.string(), b"text of=x"),
                ("location_field", pa.string()),
                ("own_field", pa.int64()),
            ),
            schema(("phase", pa.string()), ("x_text", pa.string())),
        ]
    )
    assert [(each.name, each.kind, each.source) for each in found] == [
        ("a=b_2", "field", "a=b"),
        ("hour_tag", "tag", "hour"),
        ("location_field", "field", "location"),  # so an older version wrote a field called like a column of ours
        ("own_field", "field", "own_field"),
        ("phase", "tag", "phase"),
        ("x_text", "text of", "x"),
    ]
    assert all(isinstance(each, Column) for each in found)


def test_of_each_device_the_newest_object_is_asked_and_one_that_is_damaged_is_passed_over() -> None:
    store = MemoryObjects()
    add(store, NOON, COUNT_TEXT)
    add(store, NOON + HOUR, COUNT_INT)
    add(store, NOON, ("other", pa.bool_()), device="D2")
    damaged = "telemetry/device_id=D3/date=2026/02/07/export_130000.parquet"
    store.put(damaged, io.BytesIO(b"PAR1"), PutRequest("x/y"))
    tree = recovered(store)
    assert {each.name: each.types[0][1] for each in tree.columns} == {"count": INTEGER, "other": "boolean"}


def test_deltas_tell_no_other_length() -> None:
    """A delta's name lies some seconds after its window's start; its note is that of its window."""
    store = MemoryObjects()
    add(store, NOON)
    store.put(
        "telemetry/device_id=D1/date=2026/02/07/export_120001.parquet",
        io.BytesIO(b""),
        PutRequest("x/y", {"window": "2026-02-07T12:00:00Z/2026-02-07T13:00:00Z"}),
    )
    tree = recovered(store)
    assert [each.window_seconds for each in tree.layouts] == [3600]
