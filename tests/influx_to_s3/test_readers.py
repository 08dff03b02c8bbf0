"""Both query languages on the simulator, InfluxQL on a real InfluxDB 1.x too: equal rows and bound values."""

import random
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from app.demo.influx import InfluxSimulator
from app.influx_to_s3.flux import literal, time_literal
from app.influx_to_s3.influxql import identifier, text_literal
from app.influx_to_s3.reader import Reader
from app.influx_to_s3.source import totals
from exporter import NOON
from influx_readers import BASE, HOUR, LINES, M, Make, S, digest, flux, influxql, influxql_without_credentials, rows
from influxdb1 import InfluxDB1

if TYPE_CHECKING:
    from collections.abc import Callable


def test_the_window_holds_its_start_and_not_its_end_and_nanoseconds_survive(
    influx: InfluxSimulator, reader: Reader
) -> None:
    influx.write(LINES)
    found = [row["timestamp"] for row in rows(reader)]
    assert found[:6] == [0, 7, 11, *found[3:6]]
    assert 123_456_789 in found
    assert 60 * S + 1 in found
    assert all(0 <= at < 3600 * S for at in found)


def test_both_languages_and_a_real_influxdb_1_give_equal_rows(
    influx: InfluxSimulator, influxdb1: InfluxDB1, tmp_path: Path
) -> None:
    influx.write(LINES)
    database = influxdb1.new_database()
    influxdb1.write(database, LINES)
    real = influxql_without_credentials(influxdb1.url, database)
    expected = rows(flux(influx))
    assert len(expected) >= 34
    assert rows(influxql(influx)) == expected
    assert rows(real) == expected
    readers: list[Reader] = [flux(influx), influxql(influx), real]
    assert len({digest(each, "D1", HOUR, tmp_path) for each in readers}) == 1
    assert [each.devices(NOON - timedelta(days=1)) for each in readers] == [["D1", "D2"]] * 3
    assert [each.measurements() for each in readers] == [[M, "other"]] * 3
    for device in (None, "D1"):
        first, *others = (totals(each.counts(device, HOUR, 3600)) for each in readers)
        assert others == [first, first]
        assert first["D1", NOON].points >= 31


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(n, marks=pytest.mark.slow) for n in range(2, 20))])
def test_random_points_are_equal_through_every_reader(
    influx: InfluxSimulator, influxdb1: InfluxDB1, tmp_path: Path, seed: int
) -> None:
    draw = random.Random(seed)  # noqa: S311 - points are no secret
    kinds: dict[str, Callable[[], str]] = {
        "voltage": lambda: f"{draw.choice((draw.uniform(-1e6, 1e6), 5e-324, 1e22, 0.1))!r}",
        "power": lambda: f"{draw.randrange(-(2**62), 2**62)}i",
        "current": lambda: draw.choice(("true", "false")),
        "temperature": lambda: draw.choice(('"21.5"', '"warm"', '""')),
        "note": lambda: draw.choice(('"a"', '"ü, \\"x\\""', '"line\nline"', '"  "')),
        "count": lambda: f"{draw.randrange(10)}i",
        "location_x": lambda: "1.5",
        "hour": lambda: f"{draw.randrange(10)}i",
    }
    lines = []
    for _ in range(300):
        tags = "".join(
            f",{tag}={draw.choice('ab')}" for tag in ("device_type", "firmware", "location") if draw.random() < 0.5
        )
        fields = ",".join(f"{name}={value()}" for name, value in kinds.items() if draw.random() < 0.4) or "count=1i"
        lines.append(
            f"{M},device_id=D{draw.randrange(3)}{tags} {fields} {BASE + draw.randrange(200) * S + draw.randrange(3)}"
        )
    text = "\n".join(lines)
    influx.write(text)
    database = influxdb1.new_database()
    influxdb1.write(database, text)
    readers: list[Reader] = [
        flux(influx),
        influxql(influx),
        influxql_without_credentials(influxdb1.url, database),
    ]
    for device in ("D0", "D1", "D2"):
        first, *others = (rows(each, device) for each in readers)
        assert first
        assert others == [first, first]
        assert len({digest(each, device, HOUR, tmp_path) for each in readers}) == 1
    first_counts, *other_counts = (totals(each.counts(None, HOUR, 600)) for each in readers)
    assert other_counts == [first_counts, first_counts]


def test_fields_named_like_tags_stand_beside_them_in_both_languages(influx: InfluxSimulator) -> None:
    influx.write(f'{M},device_id=D1,device_type=pump location="field",hour=3i {BASE}')
    expected = [{"timestamp": 0, "device_type": "pump", "location_field": "field", "hour_field": 3}]
    assert rows(flux(influx)) == expected
    assert rows(influxql(influx)) == expected


def test_a_real_influxdb_1_keeps_a_field_beside_a_tag_of_its_name(influxdb1: InfluxDB1) -> None:
    database = influxdb1.new_database()
    influxdb1.write(database, f'{M},device_id=D1,location=tag location="field",hour=7 {BASE}')
    real = influxql_without_credentials(influxdb1.url, database)
    assert rows(real) == [{"timestamp": 0, "location": "tag", "location_field": "field", "hour_field": 7.0}]


HOSTILE = [
    'D"1',
    "D\\",
    "D'1",
    "${x}",
    '") |> drop(columns: ["x"])',
    "' OR 1=1 --",
    "a\nb",
    "é€😀",
    "\\${",
    "a\tb",
    "$",
    "\\n",
]


@pytest.mark.parametrize("device", HOSTILE)
def test_hostile_values_are_bound(influx: InfluxSimulator, make: Make, device: str) -> None:
    for name in (device, "D1"):
        for measurement in (M, device):
            influx.points.extend((measurement, (("device_id", name),)), [BASE], {"voltage": [float(len(name))]})
    for measurement in (M, device):
        reader = make(measurement=measurement)
        assert rows(reader, device) == [{"timestamp": 0, "voltage": float(len(device))}]
        assert {one.device for one in reader.counts(device, HOUR, 3600)} == {device}
        assert sorted(reader.devices(NOON)) == sorted([device, "D1"])


@pytest.mark.parametrize("device", ['D"1', "D'1", "${x}", '")|>x', "'OR\\ 1\\=1", "é€😀", "D\\\\x", "D\\x"])
def test_hostile_ids_are_bound_on_a_real_influxdb_1(influxdb1: InfluxDB1, device: str) -> None:
    database = influxdb1.new_database()
    influxdb1.write(database, f"{M},device_id={device},z=1 voltage=1 {BASE}\n{M},device_id=other voltage=2 {BASE}")
    reader = influxql_without_credentials(influxdb1.url, database)
    [name] = [found for found in reader.devices(NOON) if found != "other"]
    assert rows(reader, name) == [{"timestamp": 0, "voltage": 1.0}]
    assert {one.device for one in reader.counts(name, HOUR, 3600)} == {name}


def test_literals_escape_what_would_end_or_fill_them() -> None:
    assert literal('a"\\${x}\n\r\t\0') == '"a\\"\\\\\\${x}\\n\\r\\t\\x00"'
    assert text_literal("a'\\\n") == "'a\\'\\\\\\n'"
    assert identifier('a"\\\n') == '"a\\"\\\\\\n"'
    assert time_literal(NOON) == "2026-02-07T12:00:00Z"
    assert time_literal(NOON + timedelta(microseconds=120)) == "2026-02-07T12:00:00.00012Z"
    assert time_literal(datetime(2026, 10, 10, 10, 10, 10, tzinfo=UTC)) == "2026-10-10T10:10:10Z"


def test_a_device_without_points_and_a_measurement_without_fields_give_nothing(
    influx: InfluxSimulator, make: Make
) -> None:
    assert rows(make()) == []
    influx.write(LINES)
    assert rows(make(), "nobody") == []
    assert rows(make(measurement="none")) == []
    assert list(make(measurement="none").counts(None, HOUR, 60)) == []
    assert list(make(measurement="none").devices(NOON)) == []


def test_ping_says_what_answered(influx: InfluxSimulator, influxdb1: InfluxDB1) -> None:
    assert flux(influx).ping() == f"may read bucket telemetry at {influx.url} by Flux"
    assert influxql(influx).ping() == f"may read database telemetry at {influx.url} by InfluxQL"
    database = influxdb1.new_database()
    ping = influxql_without_credentials(influxdb1.url, database).ping()
    assert ping == f"may read database {database} at {influxdb1.url} by InfluxQL"
