"""The source over a reader: what is tried again, what is read in parts, and what is given up."""

from datetime import timedelta
from pathlib import Path

import pytest

from app.core.errors import Transient
from app.core.pipeline import Count
from app.core.windows import Window
from app.influx_to_s3.reader import QueryTooLarge, Reader
from app.influx_to_s3.source import InfluxSource
from exporter import NOON
from influx_points import batch_rows, source_of
from influx_readers import BASE, HOUR, LINES, M, S, flux, influxql_without_credentials
from influxdb1 import InfluxDB1
from simulators.influx import Cut, ErrorTable, InfluxSimulator, Refuse

HOUR_LONG = timedelta(hours=1)


class Waits:
    """Pauses that take no time."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def pause(self, seconds: float) -> None:
        self.seconds.append(seconds)


def test_a_field_that_changes_its_type_from_one_week_to_the_next_is_read_whole(
    influx: InfluxSimulator, influxdb1: InfluxDB1, tmp_path: Path
) -> None:
    """The export asks for a window at a time, which has one type; both languages give the same rows."""
    lines = "\n".join(
        [
            f"{M},device_id=D1 voltage=1i,extra=1i,mixed=1i {BASE - 9 * 86_400 * S}",
            f'{M},device_id=D1 voltage=2.5,extra=2.5,mixed="x" {BASE}',
        ]
    )
    influx.write(lines)
    database = influxdb1.new_database()
    influxdb1.write(database, lines)
    readers: tuple[Reader, ...] = (flux(influx), influxql_without_credentials(influxdb1.url, database))
    found = []
    for each in readers:
        source = source_of(each, tmp_path, pauses=Waits())
        windows = [Window(NOON - timedelta(days=9), NOON - timedelta(days=9) + HOUR_LONG), HOUR]
        counts = source.counts("D1", windows)
        assert [counts["D1", window.start].cells for window in windows] == [3, 3]
        batches = [source.read("D1", window, counts["D1", window.start], None) for window in windows]
        assert all(tally.gap == 0 for batch in batches for tally in batch.accounts.values())
        found.append(([batch.digest for batch in batches], [row for batch in batches for row in batch_rows(batch)]))
    assert found[0] == found[1]
    tags = {"device_type": "unknown", "location": "unknown"}
    assert found[0][1] == [
        {"timestamp": -9 * 86_400 * S, **tags, "voltage": 1.0, "extra": 1, "mixed": 1},
        {"timestamp": 0, **tags, "voltage": 2.5, "extra_double": 2.5, "mixed_text": "x"},
    ]


@pytest.fixture
def waits() -> Waits:
    return Waits()


@pytest.fixture
def source(reader: Reader, waits: Waits, tmp_path: Path) -> InfluxSource:
    return source_of(reader, tmp_path / "spool", pauses=waits)


def test_what_may_pass_is_tried_again_and_a_server_that_asks_for_time_gets_it(
    influx: InfluxSimulator, source: InfluxSource, waits: Waits
) -> None:
    influx.write(LINES)
    influx.faults.add(Refuse(429, "slow", retry_after_seconds=3))
    influx.faults.add(Refuse(400, "queue length exceeded"))
    influx.faults.add(Cut(3))
    batch = source.read("D1", HOUR, Count(1, 1), None)
    assert batch.rows >= 34
    assert waits.seconds[0] == 3.0
    assert [most >= waited for waited, most in zip(waits.seconds, (3.0, 0.4, 0.8), strict=True)] == [True] * 3


def test_what_does_not_pass_is_given_up_after_a_few_attempts(
    influx: InfluxSimulator, source: InfluxSource, waits: Waits
) -> None:
    influx.write(LINES)
    influx.faults.add(ErrorTable(3), times=100)
    with pytest.raises(Transient, match="unexpected EOF"):
        source.read("D1", HOUR, Count(1, 1), None)
    assert len(waits.seconds) == 3
    assert len(influx.faults) == 96


def test_a_window_that_the_server_finds_too_large_is_halved_until_it_fits(
    influx: InfluxSimulator, source: InfluxSource, waits: Waits
) -> None:
    influx.write(LINES)
    whole = source.read("D1", HOUR, Count(1, 1), None)
    for end in ("13:00:00Z", "12:30:00Z", "2026-02-07T13:00:00Z"):
        influx.faults.add(Refuse(400, "memory allocation limit reached"), when=lambda text: "COUNT" not in text)
        assert end
    halved = source.read("D1", HOUR, Count(1, 1), None)
    assert len(influx.faults) == 0
    assert (halved.rows, halved.digest) == (whole.rows, whole.digest)
    assert waits.seconds == []


def test_a_server_that_finds_everything_too_large_is_for_a_person(
    influx: InfluxSimulator, source: InfluxSource
) -> None:
    influx.write(LINES)
    influx.faults.add(Refuse(400, "memory allocation limit reached"), times=1000)
    with pytest.raises(QueryTooLarge):
        source.read("D1", HOUR, Count(1, 1), None)


def test_fewer_rows_than_were_counted_are_an_error(influx: InfluxSimulator, source: InfluxSource) -> None:
    influx.write(LINES)
    counted = source.counts("D1", [HOUR])["D1", NOON]
    assert source.read("D1", HOUR, counted, None).rows >= counted.points
    fields = {**counted.fields, "voltage": 1000}
    with pytest.raises(Transient, match=r"values of voltage of D1 .* had counted 1000"):
        source.read("D1", HOUR, Count(counted.cells, counted.points, fields), None)


def test_a_surge_between_counting_and_reading_is_read_in_parts(influx: InfluxSimulator, tmp_path: Path) -> None:
    number = 66_000
    times = [BASE + n * 5 * 10**7 for n in range(number)]
    influx.points.extend((M, (("device_id", "D1"),)), times, {"voltage": [1.0] * number})
    batch = source_of(flux(influx), tmp_path, pauses=Waits()).read("D1", HOUR, Count(10, 10), None)
    batch.close()
    assert batch.rows == number
    assert len(influx.queries) == 3
    assert list(tmp_path.iterdir()) == []
