"""Hours of AppMetrica, from the simulator to objects and the warehouse, however long a file takes to be made."""

import csv
import gzip
import io
import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from pulling import HOUR, START, Landed, pulling
from simulators.appmetrica import AppMetricaFault, AppMetricaSimulator, Rows, appmetrica_rows, generated

FIRST = START - timedelta(days=1) - HOUR  # the hour before the cursor is asked for as well
World = tuple[Landed, AppMetricaSimulator]


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with pulling(tmp_path) as (made, _, simulator):
        simulator.state.rows = generated(simulator.state.application_id, 12)
        yield made, simulator


def received(simulator: AppMetricaSimulator, start: datetime, end: datetime) -> int:
    hours = (end - start) // HOUR
    return sum(len(simulator.state.rows(start + number * HOUR)) for number in range(hours))


def test_each_row_lands_once_also_two_that_are_equal_in_every_column(world: World) -> None:
    made, simulator = world
    made.clock.now += timedelta(minutes=20)
    pull = made.appmetrica(simulator, lookback_days=2)
    pull.to_the_end()
    start = START - timedelta(days=2) - HOUR
    assert len(made.rows("events_part")) == received(simulator, start, START)
    assert made.state.checkpoints.cursors("appmetrica") == {"1234567:events": START}
    before, tables = made.lines("appmetrica/"), made.tables()
    assert pull.run().rows == 0
    pull.fill(START - timedelta(days=1), START)
    made.clock.now += HOUR
    pull.to_the_end()
    pull.fill(START - timedelta(days=1), START)
    assert {key: lines for key, lines in made.lines("appmetrica/").items() if key in before} == before
    kept = {str(row["uuid"]) for row in tables["events_part"]}
    assert len(made.rows("events_part")) == len(kept) + received(simulator, START, START + HOUR)


def test_ids_of_64_bits_newlines_and_text_that_is_no_json_arrive_as_they_are(world: World) -> None:
    made, simulator = world
    made.clock.now += timedelta(minutes=20)
    made.appmetrica(simulator).to_the_end()
    assert max(int(row["device_id"]) for row in made.rows("events_part")) > 2**63
    assert None in {row["session_id"] for row in made.rows("events_part")}
    properties = [json.loads(row["event_properties_json"]) for row in made.rows("tmp_event_properties")]
    assert {"_raw": "no json {"} in properties
    assert any("\n" in each.get("text", "") for each in properties)
    assert {row["ip_address"][:4] for row in made.rows("user_locations")} == {"203."}
    assert {row["library"] for row in made.rows("technical_data")} == {"appmetrica"}
    key, body = next(iter(made.objects("appmetrica/").items()))
    assert key.startswith("appmetrica/events/date=2026-02-10/1234567_")
    rows = list(csv.reader(io.StringIO(gzip.decompress(body).decode(), newline="")))
    assert {len(row) for row in rows} == {32}


def test_rows_that_the_service_received_late_in_the_hour_before_land_with_the_next_one(world: World) -> None:
    made, simulator = world
    made.clock.now += timedelta(minutes=20)
    pull = made.appmetrica(simulator)
    pull.to_the_end()
    rows, before = simulator.state.rows, len(made.rows("events_part"))
    late = {**rows(START - HOUR)[0], "event_timestamp": "1770000000"}
    simulator.state.rows = lambda hour: [*rows(hour), *([late] if hour == START - HOUR else [])]
    made.clock.now += HOUR
    report = pull.to_the_end()
    new = len(rows(START)) + 1
    assert len(made.rows("events_part")) == before + new
    assert (report.rows, report.late_rows, report.ledger.total.new) == (new, 1, new)
    (body,) = made.objects(f"appmetrica/events/date={START:%Y-%m-%d}/1234567_{START - HOUR:%H%M%S}").values()
    kept = list(csv.reader(io.StringIO(gzip.decompress(body).decode(), newline="")))
    assert len(kept) == 1 + len(rows(START - HOUR)) + 1, "the header and the late one as well"
    made.clock.now += HOUR
    assert pull.to_the_end().late_rows == 0


def test_a_file_that_takes_an_hour_is_waited_for_over_restarts(world: World) -> None:
    made, simulator = world
    simulator.state.questions = 100
    made.clock.now += timedelta(minutes=20)
    until = made.clock.now + HOUR
    made.appmetrica(simulator).to_the_end()  # the pause grows: in an hour it asks some 80 times
    runs = 0
    made.clock.now = until
    simulator.state.questions = 70
    made.clock.at_pause = lambda _seconds: None
    report = made.appmetrica(simulator).run()
    while report.more:
        runs += 1
        report = made.appmetrica(simulator).run()  # a new process each time: all that it has is what is kept
    assert runs > 3
    asked = {url for url, status in simulator.state.asked if status == 202}
    assert len(asked) == 2, "the same question, again and again"
    assert made.state.checkpoints.cursors("appmetrica") == {"1234567:events": START + HOUR}


def test_a_file_that_the_service_forgot_is_asked_for_anew(world: World) -> None:
    made, simulator = world
    made.clock.now += timedelta(minutes=20)
    simulator.state.questions = 1000
    assert made.appmetrica(simulator).run().more
    made.clock.now += timedelta(hours=30)
    simulator.state.questions = 2
    made.appmetrica(simulator).to_the_end()
    due = START + timedelta(hours=30)
    assert made.state.checkpoints.cursors("appmetrica") == {"1234567:events": due}
    assert len(made.rows("events_part")) == received(simulator, FIRST, due)


def test_a_backfill_whose_files_take_longer_than_a_run_asks_for_each_day_once(world: World) -> None:
    made, simulator = world
    made.clock.now += timedelta(minutes=20)
    pull, days = made.appmetrica(simulator, lookback_days=6, poll_timeout_seconds=20), 5
    pull.to_the_end()
    uuids, simulator.state.questions = {str(row["uuid"]) for row in made.rows("events_part")}, 6
    with made.warehouse.database.transaction() as session:
        session.run("DELETE FROM events_part")
    simulator.state.asked.clear()
    start, runs = START - timedelta(days=days), 1
    while pull.fill(start, START).more:
        runs += 1
        assert runs < 4 * days
    assert len({url for url, status in simulator.state.asked if status == 200}) == days
    assert sum(status == 200 for _, status in simulator.state.asked) == days
    again = {str(row["uuid"]) for row in made.rows("events_part")}
    assert again < uuids
    assert len(again) == received(simulator, start, START)
    simulator.state.questions = 0
    simulator.state.asked.clear()
    pull.fill(start, START)
    assert sum(status == 200 for _, status in simulator.state.asked) == days, "a new backfill begins at its start"


def test_a_backfill_that_waits_in_a_full_queue_asks_for_no_earlier_day_again(world: World) -> None:
    made, simulator = world
    made.clock.now += timedelta(minutes=20)
    pull = made.appmetrica(simulator, lookback_days=3)
    pull.to_the_end()
    rows, start = simulator.state.rows, START - timedelta(days=2)

    def filling(hour: datetime) -> Rows:
        simulator.state.others = 3
        return rows(hour)

    simulator.state.rows, simulator.state.questions = filling, 0
    simulator.state.asked.clear()
    assert pull.fill(start, START).more
    simulator.state.rows, simulator.state.others = rows, 0
    assert not pull.fill(start, START).more
    assert sum(status == 200 for _, status in simulator.state.asked) == 2


def test_a_full_queue_is_waited_for(world: World) -> None:
    made, simulator = world
    made.clock.now += timedelta(minutes=20)
    simulator.state.others = 3

    def served(_seconds: float) -> None:
        if len(made.clock.paused) == 3:
            simulator.state.others = 2

    made.clock.at_pause = served
    made.appmetrica(simulator).to_the_end()
    assert [status for _, status in simulator.state.asked].count(429) == 3
    assert made.clock.paused[:3] == [60, 60, 60]
    assert made.state.checkpoints.cursors("appmetrica") == {"1234567:events": START}


def test_more_parts_are_taken_when_the_service_wants_them(world: World) -> None:
    made, simulator = world
    made.clock.now += timedelta(minutes=20)
    simulator.state.least_parts = 5
    made.appmetrica(simulator).to_the_end()
    assert len(made.rows("events_part")) == received(simulator, FIRST, START)
    assert sum("parts_count=8&part_number=7" in url for url, status in simulator.state.asked if status == 200) == 1


PASSING = [
    AppMetricaFault(420, b"Quota exceeded"),
    AppMetricaFault(429, b"Too many requests", retry_after_seconds=9),
    AppMetricaFault(503, b"try later"),
    AppMetricaFault(cut=True),
    AppMetricaFault(half=True),
]


@pytest.mark.parametrize("fault", PASSING)
@pytest.mark.parametrize("answered", [0, 2])
def test_what_passes_is_waited_for(world: World, fault: AppMetricaFault, answered: int) -> None:
    made, simulator = world
    made.clock.now += timedelta(minutes=20)
    simulator.state.questions = answered
    pull = made.appmetrica(simulator)
    assert pull.exports.zone
    simulator.add_fault(AppMetricaFault(), times=answered)
    simulator.add_fault(fault, times=2)
    assert not pull.to_the_end().failures
    assert len(made.rows("events_part")) == received(simulator, FIRST, START)


def test_a_column_that_the_service_does_not_know_is_left_out(world: World) -> None:
    made, simulator = world
    made.clock.now += timedelta(minutes=20)
    simulator.state.unknown = frozenset({"windows_aid"})
    assert not made.appmetrica(simulator).to_the_end().failures
    simulator.state.unknown = frozenset({"event_name"})
    made.clock.now += HOUR
    report = made.appmetrica(simulator).run()
    assert "Unknown field: event_name" in report.failures[0].message


def test_an_hour_without_rows_is_finished_as_well(world: World) -> None:
    made, simulator = world
    made.clock.now += timedelta(minutes=20)
    simulator.state.rows = lambda _hour: ()
    made.appmetrica(simulator).to_the_end()
    assert made.state.checkpoints.cursors("appmetrica") == {"1234567:events": START}
    assert not made.objects("appmetrica/")


def test_the_calls_of_a_day_are_counted_and_never_exceeded(world: World) -> None:
    made, simulator = world
    made.clock.now += timedelta(minutes=20)
    simulator.state.questions = 1000
    pull = made.appmetrica(simulator, daily_calls=10)
    report = pull.run()
    assert "all 10 calls of today" in report.failures[0].message
    assert len(simulator.state.asked) == 10
    assert made.state.pulls.calls_ever("appmetrica", made.clock()) == (10, 10)
    assert made.state.pulls.calls_ever("appmetrica", made.clock() + timedelta(days=1)) == (0, 10)
    assert made.state.pulls.calls("appmetrica", made.clock()) == 10
    simulator.state.questions = 2
    made.clock.now = datetime(2026, 2, 12, 0, 20, tzinfo=UTC)
    assert not pull.to_the_end().failures


@pytest.mark.parametrize(
    ("zone", "day"),
    [
        ("Europe/Berlin", datetime(2026, 10, 26, tzinfo=UTC)),
        ("America/New_York", datetime(2026, 3, 9, tzinfo=UTC)),
        ("Australia/Lord_Howe", datetime(2026, 4, 5, tzinfo=UTC)),
        ("Australia/Lord_Howe", datetime(2026, 10, 4, tzinfo=UTC)),
    ],
)
def test_no_hour_is_lost_or_doubled_where_clocks_are_changed(tmp_path: Path, zone: str, day: datetime) -> None:
    with pulling(tmp_path) as (made, _, simulator):
        simulator.state.zone = zone
        simulator.state.rows = lambda hour: appmetrica_rows(simulator.state.application_id, hour, 1)
        made.clock.now = day + timedelta(minutes=20)
        made.appmetrica(simulator).to_the_end()
        assert len(made.rows("events_part")) == received(simulator, day - timedelta(days=1) - HOUR, day)
