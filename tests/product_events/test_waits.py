"""Every wait of a pull ends: with the stop that is asked, with the caller who goes away, or in a bounded time."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import pytest

from app.amplitude.client import Project
from app.amplitude.routes import week_zip
from app.core.errors import Stopped, Transient
from app.core.runs import Stop
from app.core.windows import Window
from app.product_events.http_client import Upstream
from pulling import landed, pulling
from simulators.amplitude import AmplitudeFault, AmplitudeSimulator, generated
from simulators.appmetrica import AppMetricaFault, appmetrica_rows
from simulators.http_server import Answer, Piece, Request, Simulator, Streamed

MONDAY = date(2026, 2, 2)
HOUR = Window(datetime(2026, 2, 2, 3, tzinfo=UTC), datetime(2026, 2, 2, 4, tzinfo=UTC))
STALL = AmplitudeFault(stall_seconds=60)
SOON_SECONDS = 10.0


@pytest.fixture
def simulator() -> Iterator[AmplitudeSimulator]:
    with AmplitudeSimulator() as made:
        made.state.made = generated(300)
        yield made


@pytest.fixture
def web(simulator: AmplitudeSimulator, tmp_path: Path) -> Iterator[Project]:
    made = Project(simulator.url, *simulator.state.keys["web"], tmp_path)
    with closing(made.upstream):
        yield made


def took_seconds(work: Callable[[], object]) -> float:
    began = time.monotonic()
    work()
    return time.monotonic() - began


def until(holds: Callable[[], object]) -> None:
    deadline = time.monotonic() + SOON_SECONDS
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_closing_a_zip_does_not_wait_for_the_day_that_is_fetched_ahead(
    simulator: AmplitudeSimulator, web: Project
) -> None:
    simulator.add_fault(AmplitudeFault())
    simulator.add_fault(STALL)
    pieces = week_zip(web, MONDAY, MONDAY + timedelta(days=6), Stop())
    next(pieces)
    until(lambda: len(simulator.state.asked) == 2)
    assert took_seconds(pieces.close) < SOON_SECONDS
    simulator.close()  # ends the answer that is stalled


def test_a_stop_ends_a_zip_that_waits_for_its_next_day(simulator: AmplitudeSimulator, web: Project) -> None:
    simulator.add_fault(STALL)
    stop = Stop()
    pieces = week_zip(web, MONDAY, MONDAY, stop)
    threading.Timer(0.5, stop.ask, ("the client disconnected",)).start()
    with pytest.raises(Stopped):
        next(pieces)
    simulator.close()


def test_a_stop_ends_the_wait_behind_an_answer_that_does_not_come(simulator: AmplitudeSimulator, web: Project) -> None:
    simulator.add_fault(STALL)
    with ThreadPoolExecutor(1) as pool:
        stalled, stop = Stop(), Stop()
        first = pool.submit(lambda: list(web.fetch(HOUR, stalled)))
        until(lambda: simulator.state.asked)
        threading.Timer(0.5, stop.ask, ("the process ends",)).start()
        with pytest.raises(Stopped):
            next(web.fetch(HOUR, stop))
        assert not first.done()
        assert len(simulator.state.asked) == 1, "one request at a time"
        stalled.ask("the process ends")
        assert isinstance(first.exception(SOON_SECONDS), Stopped), "though the service has not answered yet"


class Trickling(Simulator):
    """Sends a byte now and then, for ever."""

    def respond(self, request: Request) -> Answer:
        del request

        def pieces() -> Iterator[Piece]:
            while True:
                self.wait(0.05)
                yield Piece(b".")

        return Answer(200, body=Streamed(pieces(), lambda _rows, _bytes, _whole: None))


@pytest.mark.parametrize("reads", ["raw", "text"])
def test_an_answer_that_only_trickles_in_is_given_up(reads: str) -> None:
    with (
        Trickling() as service,
        closing(Upstream("Service", service.url, "SERVICE_URL", {}, whole_seconds=0.5)) as upstream,
        upstream.get("/", {"Accept-Encoding": "identity"}, Stop()) as answer,
        pytest.raises(Transient, match=r"did not arrive within 0\.5 seconds"),
    ):
        list(answer.raw()) if reads == "raw" else answer.text()


@pytest.mark.parametrize(
    ("date", "at"),
    [
        ("Mon, 02 Feb 2026 03:00:00 GMT", HOUR.start),
        ("Mon, 02 Feb 2026 03:00:00 -0000", HOUR.start),
        ("yesterday", None),
        ("Mon, 02 Feb 99999 03:00:00 GMT", None),
    ],
)
def test_the_clock_of_a_service_is_read_from_its_answer(date: str, at: datetime | None) -> None:
    class Dated(Simulator):
        def respond(self, request: Request) -> Answer:
            del request
            return Answer(200, {"Date": date})

    with Dated() as service, closing(Upstream("Service", service.url, "SERVICE_URL", {})) as upstream:
        with upstream.get("/", {}, Stop()) as answer:
            assert answer.status == 200
        assert upstream.answered_at == at


def test_files_that_a_killed_client_asked_for_do_not_fill_the_queue_for_ever(tmp_path: Path) -> None:
    with pulling(tmp_path) as (world, _, simulator):
        simulator.state.rows = lambda at: appmetrica_rows(simulator.state.application_id, at, 3)
        simulator.state.questions = 1000
        for days in (3, 4, 5):  # each time the state is lost, and with it what was asked for
            with landed(tmp_path / f"lost {days}", world.clock) as lost:
                assert lost.appmetrica(simulator, lookback_days=days, poll_timeout_seconds=1).run().more
        assert sum(build.made_at is None for build in simulator.state.builds.values()) == 3
        simulator.state.questions, simulator.state.abandoned_seconds = 0, 0.0
        assert world.appmetrica(simulator, lookback_days=9).to_the_end().rows > 0


@pytest.mark.parametrize("seconds", [3600, 10**400], ids=["an hour", "400 digits"])
def test_a_run_does_not_wait_as_long_as_a_service_asks(tmp_path: Path, seconds: int) -> None:
    with pulling(tmp_path) as (world, _, simulator):
        pull = world.appmetrica(simulator, poll_timeout_seconds=100, timezone="UTC")
        simulator.add_fault(AppMetricaFault(429, retry_after_seconds=seconds), 10)
        began_at = world.clock.now
        assert pull.run().more
        assert world.clock.now - began_at <= timedelta(seconds=200)
