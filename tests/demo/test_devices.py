"""Devices and the feeder: plausible, the same for a seed, late where they are meant to be."""

from itertools import pairwise

from influx import NOON_NS, SECOND_NS
from simulators.demo_data import HOUR_NS, MAX_LATE_NS, STEP_NS, Device, Feeder, arrivals, fleet, http_writer, samples
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


def test_the_feeder_writes_its_backlog_over_http_and_then_live_points(influx: InfluxSimulator) -> None:
    now = [NOON_NS]
    write = http_writer(influx.url, token=influx.token, org=influx.org, bucket=influx.bucket)
    with Feeder(write, fleet(4), oldest_ns=now[0] - HOUR_NS, interval_seconds=30, now_ns=lambda: now[0]) as feeder:
        backlog = feeder.written
        assert backlog == len(influx.points) > 2000
        assert feeder.feed(NOON_NS + 60 * SECOND_NS) > 20
        assert len(influx.points) == feeder.written
    assert {dict(series.tags)["device_id"] for series in influx.points.series("device_telemetry")} == {
        "D1",
        "D2",
        "D3",
        "D4",
    }


def test_the_feeder_goes_on_after_the_database_was_away(influx: InfluxSimulator) -> None:
    write = http_writer(influx.url, token=influx.token, org=influx.org, bucket=influx.bucket)
    now = [NOON_NS]
    with Feeder(
        write, fleet(2), oldest_ns=now[0] - HOUR_NS // 10, interval_seconds=0.01, now_ns=lambda: now[0]
    ) as feeder:
        before = feeder.written
        influx.close()
        now[0] += 120 * SECOND_NS
        influx.start()
        while feeder.written == before:
            pass
    assert len(influx.points) >= before + 24
