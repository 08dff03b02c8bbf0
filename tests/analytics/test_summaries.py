"""The summaries are what a full scan says, whatever was put, replaced and deleted, and whoever else works beside."""

import random
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from app.stores.state import State
from lake import BUILT_IN, Lake, exported, flat, local_lake, same, scanned

START = datetime(2026, 2, 1, tzinfo=UTC)


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
        for path in BUILT_IN:
            assert same(lake.from_objects(path), lake.from_summaries(path)), path
