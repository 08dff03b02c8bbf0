"""A day of 4 GB, generated and not stored, through the route, and an hour of it through the job, at flat memory."""

import gzip
import json
import tracemalloc
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import pytest

from app.amplitude.client import Project
from app.amplitude.routes import week_zip
from app.core.runs import Stop
from pulling import Clock, landed
from simulators.amplitude import AmplitudeSimulator, amplitude_events

DAY = datetime(2024, 2, 1, tzinfo=UTC)
HOUR_BYTES = (4 << 30) // 24
LIMIT_BYTES = 64 << 20


@pytest.fixture(scope="module")
def large_hour() -> bytes:
    """One member of a day of 4 GB: some events, again and again."""
    text = b"".join(json.dumps(event).encode() + b"\n" for event in amplitude_events("web", DAY, 2000))
    return gzip.compress(text, 6, mtime=0) * (HOUR_BYTES // len(text) + 1)


@contextmanager
def flat() -> Iterator[None]:
    """What Python holds at once inside the block stays below the limit."""
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        yield
        assert tracemalloc.get_traced_memory()[1] - before < LIMIT_BYTES
    finally:
        tracemalloc.stop()


def zipped(simulator: AmplitudeSimulator, folder: Path, day: date) -> int:
    asked = Project(simulator.url, *simulator.state.keys["web"], folder)
    with closing(asked.upstream):
        return sum(map(len, week_zip(asked, day, day, Stop())))


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_zip_of_a_day_of_4_gb_goes_out_at_flat_memory(large_hour: bytes, tmp_path: Path) -> None:
    """The limit of the service is met on the way: a day is asked for, then halves, then quarters."""
    with AmplitudeSimulator() as simulator:
        simulator.state.made = lambda _source, _hour: (large_hour,)
        simulator.state.limit_hours = 6
        with flat():
            size_bytes = zipped(simulator, tmp_path, DAY.date())
        assert [end for _, _, end in simulator.state.asked][-1] == "20240201T23"
    assert size_bytes > 0.9 * 24 * len(large_hour)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_large_hour_lands_at_flat_memory(tmp_path: Path) -> None:
    """24,000 events that differ, in lines of 40 MB in all."""

    def parts(_source: str, hour: datetime) -> Sequence[bytes]:
        if hour != DAY:
            return ()
        events = amplitude_events("web", DAY, 3000)
        lines = ({**event, "uuid": f"{n:08x}{str(event['uuid'])[8:]}"} for n in range(8) for event in events)
        return [gzip.compress(b"".join(json.dumps(line).encode() + b"\n" for line in lines), 1, mtime=0)]

    clock = Clock(DAY + timedelta(hours=12))
    with AmplitudeSimulator(clock=clock) as simulator, landed(tmp_path, clock) as made:
        made_once = parts("web", DAY)
        simulator.state.made = lambda _source, hour: made_once if hour == DAY else ()
        pull = made.amplitude(simulator)
        made.state.ping()
        with flat():
            report = pull.fill(DAY, DAY + timedelta(hours=1))
        assert report.rows == 24_000
