"""Rows that cannot be taken, columns that come and go, hours that cannot be had: the rest lands, nothing is lost."""

import csv
import gzip
import io
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from app.appmetrica.rows import (
    ANOTHER_TIME,
    LARGE_ROW,
    NO_RECEIPT,
    NOT_A_ROW,
    NOT_TEXT,
    BadRow,
    CsvRows,
    _Ordinals,
)
from app.core.errors import Transient
from app.core.ledger import fault_of
from app.core.pipeline import Commit
from app.core.verify import CellState
from app.core.windows import Window
from app.product_events.hours import KEEPS_FAILING, KEPT_LINE_BYTES
from pulling import HOUR, START, Landed, Pull, pulling
from simulators.appmetrica import AppMetricaFault, AppMetricaSimulator, appmetrica_rows

DAY = timedelta(days=1)
FIRST = START - DAY - HOUR
SPAN = Window(FIRST, START)
ROWS, MANY_ROWS = 20, 400  # and one that is equal to the first
World = tuple[Landed, AppMetricaSimulator, Pull]


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    yield from worlds(tmp_path, ROWS)


@pytest.fixture
def large_world(tmp_path: Path) -> Iterator[World]:
    yield from worlds(tmp_path, MANY_ROWS)


def worlds(folder: Path, rows: int) -> Iterator[World]:
    with pulling(folder) as (made, _, simulator):
        held = {FIRST + n * HOUR: list(appmetrica_rows(1234567, FIRST + n * HOUR, rows)) for n in range(25)}
        simulator.state.rows = lambda hour: held.get(hour, ())
        made.clock.now += timedelta(minutes=20)
        yield made, simulator, made.appmetrica(simulator)


def gaps(pull: Pull) -> dict[int, CellState]:
    cells = pull.chart.cells("1234567:events", SPAN)
    return {(cell.window.start - FIRST) // HOUR: cell.state for cell in cells if cell.state is not CellState.EQUAL}


BAD = {
    3: ({"city": "Z\udcfcrich"}, NOT_TEXT),
    5: ({"event_json": '{"x":\n"' + "y" * (20 << 20) + '"}'}, LARGE_ROW),
    7: ({"event_receive_timestamp": ""}, NO_RECEIPT),
    9: ({"event_receive_timestamp": "0"}, NO_RECEIPT),
    11: ({"event_receive_timestamp": "yesterday"}, NO_RECEIPT),
}
LINES = {
    13: b'one,"too,few',
    15: b"one,two,three",
}


def spoilt(simulator: AppMetricaSimulator) -> Callable[[datetime], Sequence[dict[str, str]]]:
    good = simulator.state.rows

    def rows(hour: datetime) -> Sequence[dict[str, str]]:
        number = (hour - FIRST) // HOUR
        found = [dict(row) for row in good(hour)]
        if number in BAD and found:
            found[1] |= BAD[number][0]
        return found

    return rows


@pytest.mark.slow
def test_one_bad_row_of_each_kind_among_10_000(large_world: World) -> None:
    made, simulator, pull = large_world
    good = simulator.state.rows
    simulator.state.rows = spoilt(simulator)
    simulator.state.lines = {FIRST + number * HOUR: [line] for number, line in LINES.items()}

    report = pull.to_the_end()
    assert made.state.checkpoints.cursors("appmetrica") == {"1234567:events": START}
    assert len(made.rows("events_part")) == 25 * (MANY_ROWS + 1) - len(BAD)
    ledger = report.ledger
    assert (ledger.unit, ledger.closes, report.failures) == ("records", True, ())
    assert ledger.total.counted == 25 * (MANY_ROWS + 1) + len(LINES)
    assert ledger.total.new == len(made.rows("events_part"))
    assert {one.reason: one.new for one in ledger.newly_set_aside} == {
        NOT_TEXT: 1,
        LARGE_ROW: 1,
        NO_RECEIPT: 3,
        NOT_A_ROW: 2,
    }
    kept = b"".join(made.objects("appmetrica/_set_aside/").values())
    assert b"Z\xfcrich" in kept
    assert b"y" * (20 << 20) in kept, "also of a large row every byte is kept"
    assert b"yesterday" in kept
    assert all(line + b"\n" in kept for line in LINES.values())
    assert {3, 5} <= gaps(pull).keys()
    assert set(gaps(pull).values()) == {CellState.PARTIAL}

    made.clock.now += HOUR
    report = pull.to_the_end()
    assert (report.failures, fault_of(report.ledger)) == ((), None)
    pull.fill(SPAN.start, SPAN.end)
    report = pull.fill(SPAN.start, SPAN.end)
    assert (report.failures, fault_of(report.ledger)) == ((), None), "what was set aside is told once"
    assert report.ledger.total.set_aside == len(BAD) + len(LINES)

    simulator.state.rows, simulator.state.lines = good, {}
    report = pull.fill(SPAN.start, SPAN.end)
    assert (report.rows, report.failures, fault_of(report.ledger)) == (len(BAD), (), None)
    assert len(made.rows("events_part")) == 25 * (MANY_ROWS + 1)
    assert gaps(pull) == {}
    assert made.signs(pull.verification, SPAN) == {}


@pytest.mark.parametrize(
    "columns",
    [
        lambda asked: [*asked[::-1]],
        lambda asked: ["new_one", *asked, "another"],
        lambda asked: [name for name in asked if name not in ("city", "windows_aid")],
        lambda asked: [*asked, asked[0]],
    ],
    ids=["another order", "added", "missing", "twice"],
)
@pytest.mark.slow
def test_columns_are_read_by_name(world: World, columns: Callable[[Sequence[str]], Sequence[str]]) -> None:
    made, simulator, pull = world
    pull.to_the_end()
    before, uuids = made.tables(), {str(row["uuid"]) for row in made.rows("events_part")}
    simulator.state.columns = columns
    simulator.state.builds.clear()
    report = pull.fill(SPAN.start, SPAN.end)
    assert (report.rows, report.failures, fault_of(report.ledger)) == (0, (), None)
    assert {str(row["uuid"]) for row in made.rows("events_part")} == uuids
    assert made.tables() == before, "a column that is missing now takes nothing away"
    body = next(iter(made.objects("appmetrica/events/").values()))
    header = next(csv.reader(io.StringIO(gzip.decompress(body).decode())))
    assert {"city", "event_name"} <= set(header)


@pytest.mark.slow
def test_a_backfill_stores_an_object_that_was_deleted(world: World) -> None:
    made, _, pull = world
    pull.to_the_end()
    before = made.lines("appmetrica/")
    made.put(next(iter(before)), None)
    report = pull.fill(SPAN.start, SPAN.end)
    assert (report.rows, fault_of(report.ledger)) == (0, None)
    assert report.notes == (
        f"1234567:events: 25 hours asked for again: 0 records are new, {25 * (ROWS + 1)} were there",
    )
    assert made.lines("appmetrica/") == before


def test_a_column_without_which_rows_cannot_be_told_apart_is_named_and_waited_for(world: World) -> None:
    made, simulator, pull = world
    simulator.state.columns = lambda asked: [name for name in asked if name != "session_id"]
    report = pull.run()
    assert "lacks session_id" in report.failures[0].message
    made.clock.now += 3 * DAY
    assert "lacks session_id" in pull.run().failures[0].message
    assert not made.objects("appmetrica/")
    simulator.state.columns = lambda asked: asked
    simulator.state.builds.clear()
    pull.to_the_end()
    assert len(made.rows("events_part")) == 25 * (ROWS + 1)


@pytest.mark.slow
def test_an_hour_that_fails_for_a_day_is_set_aside_and_a_backfill_lands_it(world: World) -> None:
    made, simulator, pull = world
    bad = FIRST + 10 * HOUR
    simulator.state.faults[bad] = AppMetricaFault(500, b"internal error")
    assert pull.run().failures
    assert pull.run().failures, "it is tried again"
    assert not made.objects("appmetrica/_set_aside/")
    reports = []
    for _ in range(60):
        made.clock.now += 2 * HOUR
        reports.append(pull.run())
        while reports[-1].more:
            reports.append(pull.run())
    newly = [one for report in reports for one in report.ledger.newly_set_aside]
    assert [(one.reason, one.number) for one in newly] == [(KEEPS_FAILING, 1)]
    assert made.state.checkpoints.cursors("appmetrica")["1234567:events"] > START + DAY
    assert not reports[-1].failures
    assert gaps(pull)[10] is CellState.MISSING
    assert pull.fill(bad, bad + HOUR).failures, "a backfill that brings nothing does not say ok"
    simulator.state.faults.clear()
    assert not pull.fill(SPAN.start, SPAN.end).failures
    assert {number: state for number, state in gaps(pull).items() if state is not CellState.EMPTY} == {}
    assert len(made.rows("events_part")) == 25 * (ROWS + 1)


@pytest.mark.slow
def test_a_file_that_never_comes_is_told_after_a_day_and_holds_up_no_other_hour(world: World) -> None:
    made, simulator, pull = world
    bad = FIRST + 10 * HOUR
    simulator.state.faults[bad] = AppMetricaFault(202, b"Wait for result")
    assert not pull.run().failures
    reports = []
    for _ in range(120):
        made.clock.now += 2 * HOUR
        reports.append(pull.run())
    assert "no file of" in next(report.failures for report in reports if report.failures)[0].message
    newly = [one for report in reports for one in report.ledger.newly_set_aside]
    assert [(one.reason, one.number) for one in newly] == [(KEEPS_FAILING, 1)]
    assert made.state.checkpoints.cursors("appmetrica")["1234567:events"] > START + DAY
    assert len(made.rows("events_part")) == 24 * (ROWS + 1)
    simulator.state.faults.clear()
    assert not pull.fill(SPAN.start, SPAN.end).failures
    assert len(made.rows("events_part")) == 25 * (ROWS + 1)


def test_a_request_of_a_clock_that_was_ahead_is_made_again_and_narrowed_after_a_day(world: World) -> None:
    made, simulator, pull = world
    simulator.state.faults[FIRST + 10 * HOUR] = AppMetricaFault(500, b"internal error")
    made.clock.now += 100 * DAY
    made.state.checkpoints.commit(
        "appmetrica", "1234567:events", Commit(cursor_at=START - DAY), made.context("appmetrica").lease
    )
    assert pull.run().failures
    made.clock.now -= 100 * DAY
    assert pull.run().failures
    made.clock.now += DAY + HOUR
    (failure,) = pull.run().failures
    assert failure.hint == "no action needed: it is requested hour by hour from now on"


@pytest.mark.slow
def test_a_service_that_is_away_for_days_sets_nothing_aside(world: World) -> None:
    made, simulator, pull = world
    assert pull.exports.zone
    for _ in range(4):
        simulator.add_fault(AppMetricaFault(503, b"away"), times=20)
        assert pull.run().failures
        simulator.state.waiting.clear()
        made.clock.now += DAY
    assert not made.objects("appmetrica/_set_aside/")
    pull.to_the_end()
    assert len(made.rows("events_part")) == 25 * (ROWS + 1)


def test_a_row_of_a_day_that_was_not_asked_for_is_set_aside(world: World) -> None:
    _, simulator, pull = world
    row = dict(appmetrica_rows(1234567, FIRST, 1)[0])
    row["event_receive_timestamp"] = str(int((FIRST - 9 * DAY).timestamp()))
    text = io.StringIO()
    csv.writer(text, lineterminator="").writerow([row.get(name, "") for name in pull_columns(simulator, pull)])
    simulator.state.lines[FIRST] = [text.getvalue().encode()]
    report = pull.to_the_end()
    assert {one.reason: one.number for one in report.ledger.set_aside} == {ANOTHER_TIME: 1}
    assert report.ledger.closes


def test_rows_that_only_land_as_objects_are_accounted_for_as_well(world: World) -> None:
    made, simulator, pull = world
    simulator.state.lines[FIRST + 3 * HOUR] = [b"one,two"]
    pull = made.appmetrica(simulator, resources="revenue_events")
    ledger = pull.to_the_end().ledger
    rows = 25 * (ROWS + 1)
    assert (ledger.closes, ledger.total.counted, ledger.total.new, ledger.total.set_aside) == (True, rows + 1, rows, 1)
    assert sum(len(lines) - 1 for lines in made.lines("appmetrica/revenue_events/").values()) == rows
    ledger = pull.fill(SPAN.start, SPAN.end).ledger
    assert (ledger.closes, ledger.total.new, ledger.total.already_there) == (True, 0, rows)


def test_no_hour_counts_as_landed_while_its_bad_rows_cannot_be_kept(world: World) -> None:
    made, simulator, pull = world
    simulator.state.lines[FIRST + 3 * HOUR] = [b"one,two"]
    blocked = made.folder / "objects" / "appmetrica"
    blocked.mkdir(parents=True)
    (blocked / "_set_aside").write_text("a file where a folder should be")
    assert "could not be set aside" in pull.run().failures[0].message
    assert not made.rows("events_part")
    (blocked / "_set_aside").unlink()
    pull = made.appmetrica(simulator)
    assert not pull.to_the_end().failures
    assert len(made.objects("appmetrica/_set_aside/")) == 1
    assert len(made.rows("events_part")) == 25 * (ROWS + 1)


def pull_columns(simulator: AppMetricaSimulator, pull: Pull) -> Sequence[str]:
    from app.appmetrica.client import resources

    assert simulator.state.application_id == pull.exports.application_id
    return resources()["events"].columns


def rows_of(body: bytes) -> list[Sequence[str] | BadRow]:
    return list(CsvRows(io.BytesIO(gzip.compress(body, 1))))


def test_a_quote_too_many_takes_no_good_row_with_it() -> None:
    good = [b'%d,"a\n""b""",x' % number for number in range(50)]
    for bad in (b'9,"open,x', b'9,a"b,"c', b'9,"a"b,c', b'"', b'9,"a\nb,x', b'9,"'):
        body = b"a,b,c\n" + b"\n".join([*good[:20], bad, *good[20:]])
        found = rows_of(body)
        assert [row[0] for row in found if not isinstance(row, BadRow)] == [str(number) for number in range(50)], bad
        kept = b"".join(row.raw for row in found if isinstance(row, BadRow))
        assert kept == bad + b"\n"


def test_a_quote_too_many_before_rows_without_any_takes_none_of_them() -> None:
    found = rows_of(b"a,b\n" + b'1,"open\n' + b"".join(b"%d,x\n" % number for number in range(2, 5000)))
    assert len([row for row in found if not isinstance(row, BadRow)]) == 4998


def test_forms_of_a_file_that_are_no_fault() -> None:
    assert rows_of(b"") == []
    assert rows_of(b"a,b\n") == []
    assert rows_of(b"\xef\xbb\xbfa,b\r\n1,2\r\n\r\n3,\r\n") == [["1", "2"], ["3", ""]]
    assert rows_of(b'a,b\n1,"\n"') == [["1", "\n"]]


def test_a_line_above_all_limits_is_held_in_part_only() -> None:
    (large, last) = rows_of(b"a,b\n1," + b"x" * (KEPT_LINE_BYTES + 99) + b"\n2,y\n")
    assert isinstance(large, BadRow)
    assert (large.reason, len(large.raw)) == (LARGE_ROW, KEPT_LINE_BYTES)
    assert last == ["2", "y"]


def test_a_changed_byte_costs_its_row_and_at_most_the_next_and_every_byte_is_kept() -> None:
    chance = random.Random(5)  # noqa: S311 - places and bytes to change, no secret
    rows = [[str(number), 'a "quoted"\nline', "x, y", "\u00e9"] for number in range(30)]
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([list("abcd"), *rows])
    body = text.getvalue().encode()
    start = body.index(b"\n") + 1
    for _ in range(400):
        at, byte = chance.randrange(start, len(body)), chance.choice(b'\xfc"\n,\0\rx')
        changed = body[:at] + bytes([byte]) + body[at + chance.randrange(2) :]
        found = CsvRows(io.BytesIO(gzip.compress(changed, 1)))
        read = [(row, found.raw) for row in found]
        assert b"".join(raw for _, raw in read).replace(b"\n", b"") == changed[start:].replace(b"\n", b"")
        good = [row for row, _ in read if row in rows]
        assert len(good) >= len(rows) - 2, changed[at - 20 : at + 20]


def test_a_temporary_disk_that_is_full_is_an_error_with_what_to_do() -> None:
    with closing(_Ordinals()) as ordinals:
        ordinals._database.execute("PRAGMA max_page_count = 2")  # noqa: SLF001 - no other way to a full disk
        with pytest.raises(Transient, match="database or disk is full") as raised:
            list(map(ordinals.next, map(str, range(1000))))
    assert "TMPDIR" in raised.value.hint
