"""The summaries are what a full scan says, whatever was put, replaced and deleted, and whoever else works beside."""

import random
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from app.analytics.engine import Engine, EngineLimits
from app.analytics.summaries import Summaries
from app.core.errors import Transient
from app.db.state import State
from fault_proxy import FaultProxy, answer
from lake import BUILT_IN, PREFIX, Lake, bucket_lake, exported, flat, local_lake, parquet, same, scanned
from seaweed import Seaweed

START = datetime(2026, 2, 1, tzinfo=UTC)
NOW = datetime(2026, 2, 7, tzinfo=UTC)
LIMITS = EngineLimits(128, 2, 60)


@pytest.fixture(params=["sqlite", "postgres"])
def state(request: pytest.FixtureRequest, new_state: Callable[[str], State]) -> State:
    return new_state(request.param)


@pytest.fixture
def lake(state: State, tmp_path: Path) -> Iterator[Lake]:
    made = local_lake(tmp_path / "lake", state.summaries)
    yield made
    made.close()


def changed(lake: Lake, draw: random.Random) -> None:
    """One random change: new, replaced or deleted, of either layout."""
    if lake.contents and draw.random() < 0.3:
        lake.delete(draw.choice(sorted(lake.contents)))
        return
    day = START + timedelta(days=draw.randrange(3))
    if draw.random() < 0.5:
        device = draw.choice(["D1", "D2", 'quote"d', "ü"])
        hour = draw.randrange(3)
        content = exported(device, day + timedelta(hours=hour), draw.randrange(60), draw=draw)
        lake.put(f"device_id={device}/date={day:%Y/%m/%d}/export_{hour:02d}0000.parquet", content)
    else:
        lake.put(f"day_{draw.randrange(4):03d}.parquet", flat(day.replace(tzinfo=None), draw.randrange(40), draw=draw))


def assert_right(lake: Lake, tmp_path: Path, paths: tuple[str, ...] = BUILT_IN) -> None:
    lake.summaries.refresh()
    expected = scanned(tmp_path / "plain", list(lake.contents.values()))
    for path in paths:
        assert same(lake.from_summaries(path), expected[path]), path


def test_summaries_and_reports_equal_a_scan_by_plain_duckdb_after_every_kind_of_change(
    lake: Lake, tmp_path: Path
) -> None:
    draw = random.Random(8)  # noqa: S311 - test data
    for _ in range(6):
        for _ in range(draw.randrange(1, 6)):
            changed(lake, draw)
        assert_right(lake, tmp_path)
        lake.now += timedelta(days=1)  # what is known is packed
        assert_right(lake, tmp_path)
        for path in BUILT_IN:
            assert same(lake.from_objects(path), lake.from_summaries(path)), path


def test_a_bucket_gives_the_same_answers_as_plain_duckdb(
    seaweed: Seaweed, new_state: Callable[[str], State], tmp_path: Path
) -> None:
    with closing(bucket_lake(seaweed, tmp_path / "lake", new_state("sqlite").summaries)) as lake:
        draw = random.Random(3)  # noqa: S311 - test data
        for odd in ("with space & plus+.parquet", "star*?[a].parquet", "percent%20.parquet", "a'b/ü=1.parquet"):
            lake.put(odd, exported("D9", START, 20, draw=draw))
        for number in range(12):
            device = f"D{number % 3}"
            lake.put(f"device_id={device}/{number}.parquet", exported(device, START, 3, draw=draw))
        for _ in range(4):
            for _ in range(3):
                changed(lake, draw)
            assert_right(lake, tmp_path)
            for path in BUILT_IN:
                assert same(lake.from_objects(path), lake.from_summaries(path)), path


@pytest.fixture
def between(seaweed: Seaweed, new_state: Callable[[str], State], tmp_path: Path) -> Iterator[tuple[Lake, FaultProxy]]:
    """Three objects in a bucket that is reached through a proxy."""
    with FaultProxy(seaweed.host, seaweed.port) as proxy:
        reached = replace(seaweed, host=proxy.host, port=proxy.port)
        with closing(bucket_lake(reached, tmp_path / "lake", new_state("sqlite").summaries)) as lake:
            draw = random.Random(12)  # noqa: S311 - test data
            for name in ("b", "c", "d"):
                lake.put(f"{name}.parquet", exported("D1", START, 5, draw=draw))
            yield lake, proxy


def test_a_listing_that_breaks_off_leaves_nothing_behind(between: tuple[Lake, FaultProxy], tmp_path: Path) -> None:
    lake, proxy = between
    assert_right(lake, tmp_path)
    lake.put("a.parquet", exported("D2", START, 5, draw=random.Random(12)))  # noqa: S311 - test data
    proxy.add(answer(503), "GET", "*continuation-token=*")
    with pytest.raises(Transient):
        lake.summaries.refresh()
    lake.delete("a.parquet")
    assert_right(lake, tmp_path)


def test_an_object_that_could_not_be_fetched_is_fetched_later_though_no_page_has_changed(
    between: tuple[Lake, FaultProxy], tmp_path: Path
) -> None:
    lake, proxy = between
    proxy.add(answer(403, b"<Error><Code>AccessDenied</Code></Error>"), "GET", "*/c.parquet*")
    view = lake.summaries.refresh()
    assert (view.objects, [key for key, _ in view.faults]) == (2, [f"{PREFIX}/c.parquet"])
    assert_right(lake, tmp_path)
    assert not lake.summaries.refresh().faults


def test_an_object_that_is_large_is_read_in_pieces_and_still_right(
    seaweed: Seaweed, new_state: Callable[[str], State], tmp_path: Path
) -> None:
    with closing(bucket_lake(seaweed, tmp_path / "lake", new_state("sqlite").summaries, whole_bytes=100)) as lake:
        draw = random.Random(4)  # noqa: S311 - test data
        lake.put("day_001.parquet", exported("D1", START, 500, draw=draw))
        assert_right(lake, tmp_path)
        assert same(lake.from_objects("overview"), lake.from_summaries("overview"))
        lake.put("day_001.parquet", exported("D1", START, 400, draw=draw))
        assert lake.from_objects("overview")[0][0] == 400


def test_a_process_that_starts_again_reads_no_object_twice(lake: Lake, tmp_path: Path) -> None:
    draw = random.Random(5)  # noqa: S311 - test data
    for _ in range(8):
        changed(lake, draw)
    assert_right(lake, tmp_path)
    (lake.folder / "work" / "in the way").touch()
    again = Summaries(lake.store, lake.facts, Engine(lake.folder / "work" / "in the way", LIMITS), PREFIX, lambda: NOW)
    again.refresh()
    for path in BUILT_IN:
        assert lake.from_summaries(path, again) == lake.from_summaries(path)


def test_two_processes_on_one_state_are_both_right_also_when_one_forgets_what_is_gone(
    lake: Lake, tmp_path: Path
) -> None:
    draw = random.Random(6)  # noqa: S311 - test data
    other = lake.another()
    for _ in range(6):
        for _ in range(3):
            changed(lake, draw)
        lake.now += timedelta(minutes=40)
        lake.summaries.refresh()
        if draw.random() < 0.5:
            other.refresh()
    assert_right(lake, tmp_path)
    other.refresh()
    for path in BUILT_IN:
        assert lake.from_summaries(path, other) == lake.from_summaries(path)


def test_what_is_gone_is_forgotten_after_an_hour_and_learnt_again_when_it_comes_back(
    lake: Lake, tmp_path: Path
) -> None:
    draw = random.Random(7)  # noqa: S311 - test data
    content = exported("D1", START, 30, draw=draw)
    lake.put("day_001.parquet", content)
    lake.put("day_002.parquet", exported("D2", START, 30, draw=draw))
    assert_right(lake, tmp_path)
    lake.delete("day_001.parquet")
    assert_right(lake, tmp_path)
    assert len(list(lake.facts.versions())) == 2
    lake.now += timedelta(minutes=61)
    assert_right(lake, tmp_path)
    assert len(list(lake.facts.versions())) == 1
    lake.put("day_001.parquet", content)
    assert_right(lake, tmp_path)


def test_facts_that_another_process_removed_are_learnt_again_before_anything_is_answered(
    lake: Lake, tmp_path: Path
) -> None:
    draw = random.Random(9)  # noqa: S311 - test data
    lake.now = START + timedelta(days=1)  # nothing is packed yet
    for number in range(3):
        lake.put(f"day_{number:03d}.parquet", exported("D1", START + timedelta(hours=number), 30, draw=draw))
    assert_right(lake, tmp_path)
    lake.facts.forget(list(lake.facts.versions())[:2])
    lake.put("day_009.parquet", exported("D1", START + timedelta(hours=9), 30, draw=draw))
    assert_right(lake, tmp_path)


def test_an_empty_prefix_answers_zeros_and_empty_lists(lake: Lake, tmp_path: Path) -> None:
    assert_right(lake, tmp_path)
    assert lake.from_summaries("overview") == [(0, 0, None, None)]
    assert lake.from_objects("overview") == [(0, 0, None, None)]
    assert all(lake.from_summaries(path) == lake.from_objects(path) == [] for path in BUILT_IN[1:])


def test_an_object_that_cannot_be_read_is_named_and_the_rest_is_answered(lake: Lake, tmp_path: Path) -> None:
    draw = random.Random(10)  # noqa: S311 - test data
    lake.put("day_001.parquet", exported("D1", START, 30, draw=draw))
    assert_right(lake, tmp_path)
    whole = exported("D2", START, 30, draw=draw)
    broken = {
        "cut.parquet": whole[: len(whole) // 2],
        "text.parquet": b"not at all",
        "empty.parquet": b"",
        "flags.parquet": parquet({"device_id": ["D1"], "timestamp": [True]}),
        "nested.parquet": parquet({"device_id": ["D1"], "timestamp": [datetime(2026, 2, 1)], "voltage": [[230.0]]}),  # noqa: DTZ001
        "torn.parquet": whole[:40] + bytes(200) + whole[240:],
    }
    for key, content in broken.items():
        lake.put(key, content)
        del lake.contents[key]
    assert_right(lake, tmp_path)
    view = lake.summaries.view
    assert view is not None
    assert [key for key, _ in view.faults] == [f"{PREFIX}/{key}" for key in sorted(broken)]
    assert all(fault and str(tmp_path) not in fault for _, fault in view.faults)
    for path in BUILT_IN:
        assert same(lake.from_objects(path), lake.from_summaries(path)), path
    lake.put("cut.parquet", whole)
    for key in sorted(broken.keys() - {"cut.parquet"}):
        lake.store.delete(f"{PREFIX}/{key}")
    assert_right(lake, tmp_path)
    assert lake.summaries.view is not None
    assert not lake.summaries.view.faults


def test_files_of_other_programs_below_the_prefix_are_left_alone(lake: Lake, tmp_path: Path) -> None:
    lake.put("_delta_log/1.checkpoint.parquet", b"no")
    lake.put(".hidden/x.parquet", b"no")
    lake.put("note.txt", b"no")
    lake.contents.clear()
    assert_right(lake, tmp_path)
    assert lake.summaries.view is not None
    assert lake.summaries.view.objects == 0


def test_a_query_reads_only_the_objects_of_its_device_and_span(lake: Lake) -> None:
    draw = random.Random(11)  # noqa: S311 - test data
    for device in ("D1", "D2"):
        for day in range(3):
            lake.put(f"{device}/{day}.parquet", exported(device, START + timedelta(days=day), 10, draw=draw))
    lake.summaries.refresh()
    since = (START + timedelta(days=1)).replace(tzinfo=None)
    until = (START + timedelta(days=2)).replace(tzinfo=None)
    limited = lake.summaries.sources("D1", since, until)
    assert [source.key for source in limited] == [f"{PREFIX}/D1/1.parquet"]
    longer = lake.summaries.sources("D1", since, until + timedelta(microseconds=1))
    assert [source.key for source in longer] == [f"{PREFIX}/D1/1.parquet", f"{PREFIX}/D1/2.parquet"]
    rows = lake.from_objects("over-time", device_id="D1", **{"from": since, "to": until})
    assert [(row[0], row[1], row[-1]) for row in rows] == [("D1", since, 10)]
