"""Proof of delivery of AppMetrica's hours: what was done to objects or rows is named exactly, and mended exactly."""

import gzip
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from app.core.verify import CellState
from app.core.windows import Window
from app.object_store.s3 import S3Store
from pulling import HOUR, START, Landed, Pull, pulling
from seaweed import Seaweed, target
from simulators.appmetrica import AppMetricaFault, AppMetricaSimulator, generated

FIRST = START - timedelta(days=1)
SPAN = Window(FIRST, START + HOUR)
NAME = "1234567:events"
World = tuple[Landed, AppMetricaSimulator, Pull]


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    yield from worlds(tmp_path)


def worlds(folder: Path, **given: Any) -> Iterator[World]:
    with pulling(folder, **given) as (made, _, simulator):
        simulator.state.rows = generated(simulator.state.application_id, 6)
        made.clock.now += timedelta(minutes=20)
        pull = made.appmetrica(simulator)
        pull.to_the_end()
        yield made, simulator, pull


def keys(made: Landed) -> list[str]:
    """Objects of the span; that of the hour before is there, too."""
    return [
        info.key for info in made.store.list("appmetrica/") if f"{FIRST - HOUR:%Y-%m-%d}/1234567_05" not in info.key
    ]


def hour(key: str) -> str:
    """How a window with this object is called here."""
    date, _, name = key.partition("date=")[2].partition("/")
    return f"{NAME} {date[-2:]} {name.partition('_')[2][:2]}"


def test_what_is_deleted_truncated_or_exchanged_is_named_exactly_and_mended_exactly(world: World) -> None:
    made, simulator, pull = world
    calls = len(simulator.state.asked)
    assert made.signs(pull.verification, SPAN) == {}
    assert len({url for url, _ in simulator.state.asked[calls:]}) == 2, "one file a day"
    before, lines, tables = made.objects(), made.lines("appmetrica/"), made.tables()
    gone, cut, other, empty, foreign = keys(made)[2:12:2]
    made.put(gone, None)
    made.put(cut, before[cut][:-9])
    made.put(other, before[keys(made)[-1]])
    made.put(empty, b"")
    made.put(foreign, gzip.compress(b"a,b\n1,2\n3\n"))
    named = {hour(gone): "-", hour(cut): "!", hour(other): "*", hour(empty): "!", hour(foreign): "!"}
    assert made.signs(pull.verification, SPAN) == named
    whole = {info.key: info.etag for info in made.store.list("") if hour(info.key) not in named}
    calls = len(simulator.state.asked)
    report, told = made.mend("appmetrica", pull.verification, SPAN)
    assert [each.healed for each in told] == [True] * 5
    assert (report.windows, report.rows, report.failures) == (5, 0, ())
    assert len({url for url, _ in simulator.state.asked[calls:]}) == 2, "mending asks for nothing more"
    assert made.signs(pull.verification, SPAN) == {}
    assert (made.lines("appmetrica/"), made.tables()) == (lines, tables)
    assert whole.items() <= {info.key: info.etag for info in made.store.list("")}.items()
    cells = pull.chart.cells(NAME, Window(FIRST, START))
    assert {cell.state for cell in cells} == {CellState.EQUAL, CellState.EMPTY}
    made.put(gone, None)
    made.put(cut, b"")
    states = {f"{NAME} {cell.window.start:%d %H}": cell.state for cell in pull.chart.cells(NAME, SPAN)}
    assert (states[hour(gone)], states[hour(cut)]) == (CellState.MISSING, CellState.STALE)
    assert pull.chart.partitions() == [NAME]


def test_what_the_service_dropped_stays_and_what_it_added_lands(world: World) -> None:
    made, simulator, pull = world
    rows, objects = simulator.state.rows, made.objects()
    fewer, more = FIRST + 4 * HOUR, FIRST + 8 * HOUR
    late = [{**rows(more)[0], "event_timestamp": "1770000000"}]
    simulator.state.rows = lambda at: rows(at)[:2] if at == fewer else [*rows(at), *(late if at == more else [])]
    named = {f"{NAME} {fewer:%d %H}": "*", f"{NAME} {more:%d %H}": "*"}
    assert made.signs(pull.verification, SPAN) == named
    report, told = made.mend("appmetrica", pull.verification, SPAN)
    assert [each.healed for each in told] == [False, True]
    assert report.rows == 1
    after = made.objects()
    assert [hour(key) for key in objects if objects[key] != after[key]] == [f"{NAME} {more:%d %H}"]
    simulator.state.rows = lambda _hour: ()
    assert set(made.signs(pull.verification, SPAN).values()) == {"+"}
    made.put(keys(made)[5], b"half of it")
    _, told = made.mend("appmetrica", pull.verification, SPAN)
    assert not any(each.healed for each in told)
    assert made.objects() == {**after, keys(made)[5]: b"half of it"}


def test_a_file_that_takes_long_is_gone_on_with_by_the_next_verification(world: World) -> None:
    made, simulator, pull = world
    simulator.state.questions = 40
    simulator.add_fault(AppMetricaFault(503, b"try later"))
    day = Window(START - 5 * HOUR, START)
    waited = len(made.clock.paused)
    assert set(made.signs(pull.verification, day).values()) == {"!"}
    assert sum(made.clock.paused[waited:]) < 400, "the first hour waits for all"
    first = {url for url, status in simulator.state.asked if status == 202}
    looks = 1
    while made.signs(pull.verification, day):
        looks += 1
        assert looks < 9
    assert looks > 2
    assert {url for url, status in simulator.state.asked if status == 202} == first
    simulator.state.questions = 1
    simulator.state.unknown = frozenset({"windows_aid"})
    assert made.signs(pull.verification, day) == {}, "a column that is not given any more was empty"


ON_A_SERVER = (
    test_what_is_deleted_truncated_or_exchanged_is_named_exactly_and_mended_exactly,
    test_what_the_service_dropped_stays_and_what_it_added_lands,
)


@pytest.mark.slow
@pytest.mark.parametrize("check", ON_A_SERVER, ids=lambda check: check.__name__.removeprefix("test_"))
def test_on_an_s3_server(check: Callable[[World], None], seaweed: Seaweed, tmp_path: Path) -> None:
    with closing(S3Store(target(seaweed, seaweed.new_bucket()), "probe")) as bucket:
        for made in worlds(tmp_path, bucket=bucket):
            check(made)
