"""What the demo writes: plausible, the same for a seed, late where it is meant to be."""

import time
from itertools import pairwise
from pathlib import Path

from influx import NOON_NS, SECOND_NS
from simulators.demo_data import (
    HOUR_NS,
    MAX_LATE_NS,
    STEP_NS,
    CsvWriter,
    Device,
    TelemetryWriter,
    arrivals,
    fleet,
    samples,
)
from simulators.influx import InfluxSimulator

DAY_NS = 24 * HOUR_NS


def test_the_same_seed_gives_the_same_samples_in_however_many_steps() -> None:
    device = Device(3, seed=7)
    whole = list(samples(device, NOON_NS, NOON_NS + HOUR_NS))
    cuts = [NOON_NS + HOUR_NS * part // 7 for part in range(8)]
    assert [one for start, stop in pairwise(cuts) for one in samples(device, start, stop)] == whole
    assert list(samples(Device(3, seed=8), NOON_NS, NOON_NS + HOUR_NS)) != whole


def test_values_are_within_the_ranges_of_the_reference_measurement() -> None:
    for sample in samples(Device(1), NOON_NS, NOON_NS + DAY_NS):
        assert 200 <= sample.voltage <= 250
        assert 0 <= sample.current <= 2
        assert 0 <= sample.power <= 500
        assert 20 <= sample.temperature <= 80


def test_a_day_has_gaps_late_points_and_nanoseconds() -> None:
    day = list(samples(Device(1), NOON_NS, NOON_NS + DAY_NS))
    gaps = [later.time_ns - earlier.time_ns for earlier, later in pairwise(day)]
    late = [sample for sample in day if sample.arrives_ns > sample.time_ns]
    assert 0.85 * DAY_NS < len(day) * STEP_NS < DAY_NS
    assert max(gaps) >= 600 * SECOND_NS
    assert 20 < len(late) < len(day) / 5
    assert max(sample.arrives_ns - sample.time_ns for sample in late) > 60 * SECOND_NS
    assert any(sample.time_ns % 1_000_000 for sample in day)


def test_every_sample_arrives_once_and_in_order() -> None:
    devices = fleet(3)
    end_ns = NOON_NS + 2 * HOUR_NS + 2 * MAX_LATE_NS
    cuts = range(NOON_NS, end_ns + 1, 300 * SECOND_NS)
    got = [pair for start, stop in pairwise(cuts) for pair in arrivals(devices, start, stop, NOON_NS)]
    expected = {
        (one.number, sample.time_ns)
        for one in devices
        for sample in samples(one, NOON_NS, end_ns)
        if sample.arrives_ns < cuts[-1]
    }
    assert len(got) == len(expected)
    assert {(one.number, sample.time_ns) for one, sample in got} == expected
    assert all(earlier[1].arrives_ns <= later[1].arrives_ns for earlier, later in pairwise(got))


def test_telemetry_is_written_from_the_oldest_instant_on_and_then_as_it_arrives(influx: InfluxSimulator) -> None:
    now = [NOON_NS]
    writer = TelemetryWriter(influx.write, fleet(4), oldest_ns=NOON_NS - HOUR_NS, now_ns=lambda: now[0])
    writer.write()
    backlog = len(influx.points)
    assert backlog > 2000
    now[0] += 60 * SECOND_NS
    writer.write()
    assert len(influx.points) > backlog + 20
    devices = {dict(series.tags)["device_id"] for series in influx.points.series("device_telemetry")}
    assert devices == {"D1", "D2", "D3", "D4"}


def test_a_writer_goes_on_from_a_thread_until_it_is_closed(tmp_path: Path) -> None:
    writer = CsvWriter(tmp_path, interval_seconds=0.01)
    writer.start()
    while len(list(tmp_path.glob("*.csv"))) < 3:
        time.sleep(0.01)
    writer.close()
    written = sorted(tmp_path.iterdir())
    time.sleep(0.05)
    assert sorted(tmp_path.iterdir()) == written
    assert written[0].read_text().startswith("cluster_name,id,name,value\ncluster-0000,0000,")
