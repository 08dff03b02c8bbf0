"""What is known of days that are over is packed, and every answer stays what a full scan says."""

import random
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from app.analytics.engine import Engine, EngineLimits
from app.analytics.reports import merged
from app.analytics.summaries import Summaries
from app.core.errors import Transient
from app.db.object_summaries import DayPack, DaySummary, ObjectFacts, unpacked, version_of
from app.db.state import State
from lake import BUILT_IN, PREFIX, Lake, exported, local_lake, same, scanned

START = datetime(2026, 2, 1, tzinfo=UTC)
DAY = 20_485
HOURS = 4


@pytest.fixture(params=["sqlite", "postgres"])
def lake(request: pytest.FixtureRequest, new_state: Callable[[str], State], tmp_path: Path) -> Iterator[Lake]:
    """Four hours of two devices on each of two days, looked at once and then packed."""
    draw = random.Random(1)  # noqa: S311 - test data
    with closing(local_lake(tmp_path / "lake", new_state(request.param).summaries)) as made:
        for number in range(16):
            at = START + timedelta(days=number // 4 % 2, hours=number % HOURS)
            made.put(key_of(f"D{number // 8}", at), exported(f"D{number // 8}", at, 5, draw=draw))
        made.summaries.refresh()
        assert len(list(made.facts.packs())) == 4
        assert not list(made.facts.every())
        yield made


def key_of(device: str, at: datetime) -> str:
    return f"device_id={device}/date={at:%Y/%m/%d}/export_{at:%H%M%S}.parquet"


def unable(lake: Lake) -> Summaries:
    """Those of a process that starts now and can read no object."""
    (lake.folder / "in the way").touch()
    engine = Engine(lake.folder / "in the way", EngineLimits(128, 2, 60))
    return Summaries(lake.store, lake.facts, engine, PREFIX, lambda: lake.now)


def assert_right(lake: Lake, tmp_path: Path, summaries: Summaries) -> None:
    view = summaries.refresh()
    contents = list(lake.contents.values())
    expected = scanned(tmp_path / "plain", contents)
    assert (view.objects, view.size_bytes) == (len(contents), sum(map(len, contents)))
    assert view.columns["voltage"] == {"DOUBLE": len(contents)}
    for path in BUILT_IN:
        assert same(lake.from_summaries(path, summaries), expected[path]), path


def test_a_process_that_starts_again_reads_none_of_them(lake: Lake, tmp_path: Path) -> None:
    again = unable(lake)
    assert_right(lake, tmp_path, again)
    assert {one.key for one in again.sources("D1", None, None)} == {
        f"{PREFIX}/{key}" for key in lake.contents if "D1" in key
    }
    first = datetime(2026, 2, 1)  # noqa: DTZ001 - naive UTC as everywhere in queries
    found = again.sources("D1", first, first + timedelta(days=1))
    assert [one.key for one in found] == [f"{PREFIX}/{key_of('D1', START + timedelta(hours=n))}" for n in range(HOURS)]
    assert [one.etag for one in found] == [held.etag for one in found if (held := lake.store.head(one.key))]
    assert lake.from_objects("overview") == lake.from_summaries("overview", again)


def test_an_object_that_is_replaced_or_deleted_makes_only_those_of_its_device_and_day_be_read_again(
    lake: Lake, tmp_path: Path
) -> None:
    draw = random.Random(2)  # noqa: S311 - test data
    lake.put(key_of("D0", START), exported("D0", START, 3, draw=draw))
    lake.delete(key_of("D1", START))
    assert_right(lake, tmp_path, lake.summaries)
    assert {pack.pair for pack in lake.facts.packs()} == {('"D0"', DAY + 1), ('"D1"', DAY + 1)}
    assert {one.key for _, one in lake.facts.every()} == {
        f"{PREFIX}/{key}" for key in lake.contents if "2026/02/01" in key
    }
    assert_right(lake, tmp_path, unable(lake))
    lake.now += timedelta(days=1)
    assert_right(lake, tmp_path, lake.summaries)
    assert len(list(lake.facts.packs())) == 4
    assert not list(lake.facts.every())
    assert_right(lake, tmp_path, unable(lake))


def test_a_new_object_of_a_packed_day_joins_it_and_hinders_no_answer_before(lake: Lake, tmp_path: Path) -> None:
    other = lake.another()
    assert_right(lake, tmp_path, other)
    at = START + timedelta(hours=HOURS)
    lake.put(key_of("D0", at), exported("D0", at, 7, draw=random.Random(3)))  # noqa: S311 - test data
    for summaries in (lake.summaries, other, unable(lake)):
        assert_right(lake, tmp_path, summaries)
    lake.now += timedelta(days=1)
    for summaries in (lake.summaries, other, unable(lake)):
        assert_right(lake, tmp_path, summaries)
    assert not list(lake.facts.every())
    assert [len(pack.keys) for pack in lake.facts.packs([('"D0"', DAY)])] == [HOURS + 1]


def test_a_whole_day_that_goes_is_known_for_an_hour_and_counts_when_it_comes_back(lake: Lake, tmp_path: Path) -> None:
    gone = {key: lake.contents[key] for key in list(lake.contents) if "D0" in key}
    away = lake.folder / "away"
    place = lake.folder / "objects" / PREFIX / "device_id=D0"
    place.rename(away)
    for key in gone:
        del lake.contents[key]
    assert_right(lake, tmp_path, lake.summaries)
    away.rename(place)
    lake.contents |= gone
    again = unable(lake)
    assert_right(lake, tmp_path, again)
    place.rename(away)
    for key in gone:
        del lake.contents[key]
    assert_right(lake, tmp_path, again)
    away.rename(place)
    lake.contents |= gone
    assert_right(lake, tmp_path, again)
    place.rename(away)
    for key in gone:
        del lake.contents[key]
    assert_right(lake, tmp_path, again)
    lake.now += timedelta(minutes=61)
    assert_right(lake, tmp_path, again)
    assert {pack.part.device for pack in lake.facts.packs()} == {'"D1"'}


def test_an_object_that_was_written_once_more_as_it_was_counts_once(lake: Lake, tmp_path: Path) -> None:
    key = f"{PREFIX}/{key_of('D0', START)}"
    held = lake.store.head(key)
    assert held is not None
    part = DaySummary('"D0"', DAY, 5, 1, 2, 1.0, 1, None, None, 0, None)
    columns = {"voltage": "DOUBLE"}
    lake.facts.save([ObjectFacts(key, held.etag, held.size_bytes, 5, columns, "", (part,))])
    assert_right(lake, tmp_path, unable(lake))
    assert len([one for one in unable_sources(lake) if one == key]) == 1
    lake.now += timedelta(days=1)
    assert_right(lake, tmp_path, lake.summaries)
    assert not list(lake.facts.every())
    lake.facts.save([ObjectFacts(key, held.etag, held.size_bytes, 5, columns, "", (part,))])
    lake.put(key_of("D0", START), exported("D0", START, 3, draw=random.Random(4)))  # noqa: S311 - test data
    assert_right(lake, tmp_path, lake.summaries)


def unable_sources(lake: Lake) -> list[str]:
    summaries = unable(lake)
    summaries.refresh()
    return [one.key for one in summaries.sources(None, None, None)]


def test_packs_that_another_process_breaks_up_or_forgets_are_noticed(lake: Lake, tmp_path: Path) -> None:
    other = lake.another()
    assert_right(lake, tmp_path, other)
    lake.delete(key_of("D0", START))
    assert_right(lake, tmp_path, lake.summaries)
    assert_right(lake, tmp_path, other)
    lake.facts.forget((), [pack.pair for pack in lake.facts.packs()])
    assert_right(lake, tmp_path, other)
    assert_right(lake, tmp_path, lake.summaries)


class Failing:
    """What it stands for; the first call of `method` fails."""

    def __init__(self, inner: Any, method: str) -> None:
        self._inner, self._method = inner, method

    def __getattr__(self, name: str) -> Any:
        if name != self._method:
            return getattr(self._inner, name)
        self._method = ""
        raise Transient("away")


def test_a_start_that_fails_half_way_counts_nothing_twice(lake: Lake, tmp_path: Path) -> None:
    facts: Any = Failing(lake.facts, "packs")
    again = Summaries(lake.store, facts, lake.engine, PREFIX, lambda: lake.now)
    with pytest.raises(Transient, match="away"):
        again.refresh()
    assert_right(lake, tmp_path, again)


def test_objects_of_a_broken_pack_that_cannot_be_read_at_once_are_read_later(lake: Lake, tmp_path: Path) -> None:
    for method in ("forget", "open"):
        store: Any = Failing(lake.store, method)
        facts: Any = Failing(lake.facts, method)
        again = Summaries(store, facts, lake.engine, PREFIX, lambda: lake.now)
        lake.delete(key_of("D0" if method == "open" else "D1", START))
        with pytest.raises(Transient, match="away"):
            again.refresh()
        assert again.view is None
        assert_right(lake, tmp_path, again)
        assert_right(lake, tmp_path, unable(lake))


def test_only_versions_that_are_current_and_of_one_part_are_packed(new_state: Callable[[str], State]) -> None:
    facts = new_state("sqlite").summaries

    def part(device: str, day: int) -> DaySummary:
        return DaySummary(device, day, 1, 1, 2, 0.1, 1, None, None, 0, (1, 0.1, None))

    one, gone, young = ([part('"D1"', day)] for day in (5, 5, 6))
    facts.save(
        [
            ObjectFacts("one", '"e"', 1, 1, parts=one),
            ObjectFacts("gone", '"e"', 1, 1, parts=gone),
            ObjectFacts("young", '"e"', 1, 1, parts=young),
            ObjectFacts("two", '"e"', 1, 2, parts=[part('"D1"', 5), part('"D2"', 5)]),
            ObjectFacts("faulty", '"e"', 1, 1, fault="odd", parts=one),
        ]
    )
    left = version_of("gone", '"e"')
    assert facts.pack(6, lambda versions: [version != left for version in versions], merged) == 1
    assert [pack.keys for pack in facts.packs()] == [["one"]]
    assert {known.key for _, known in facts.every()} == {"gone", "young", "two", "faulty"}


def test_a_pack_is_read_as_it_was_written_whatever_its_etags_and_values_are() -> None:
    digests = ['"d41d8cd98f00b204e9800998ecf8427e"', '"00000000000000000000000000000001"']
    for etags in (digests, ['"d41d8cd98f00b204e9800998ecf8427e-2"', digests[0]], [digests[0].upper(), "W/1"]):
        part = DaySummary('"\\u00fc"', 7, 3, 1, 2, float("inf"), 3, -0.5, None, 0, (2, 0.1, None, "ü", 0))
        pack = DayPack(part, ["a", "ü/'b"], etags, [1, 1 << 40], ["s", "t"])
        row = pack.row
        assert unpacked(row["device"], row["day"], row["etags"], row["packed"]) == pack
