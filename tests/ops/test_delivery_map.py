"""The delivery map: the cells of a span in a time zone, the worst state in each, and listings that are shared."""

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest

from app.core.errors import Rejected, Transient
from app.core.pipeline import Commit
from app.core.verify import CellState, MapCell
from app.core.windows import Window
from app.db.page_queries import NameFilter
from app.db.state import open_state
from app.ops.delivery_map import SPANS, DeliveryMaps, MapCells, cells_between, cells_of_span, letter_of, worst_state

BERLIN, KATHMANDU = ZoneInfo("Europe/Berlin"), ZoneInfo("Asia/Kathmandu")
NOW = datetime(2026, 11, 28, 2, 20, tzinfo=UTC)
HOUR = timedelta(hours=1)


@pytest.mark.parametrize("zone", [UTC, BERLIN, KATHMANDU, ZoneInfo("America/New_York")])
@pytest.mark.parametrize(
    "now", [NOW, datetime(2026, 3, 29, 12, tzinfo=UTC), datetime(2026, 10, 25, 23, 59, tzinfo=UTC)]
)
def test_every_span_is_whole_up_to_now_without_a_hole(zone: ZoneInfo, now: datetime) -> None:
    for span, kinds in SPANS.items():
        for number, seconds in kinds.items():
            cells = cells_of_span(span, number, zone, now)
            edges = cells.edges
            assert len(edges) == number + 1
            assert list(edges) == sorted(set(edges))
            assert edges[-2] <= now < edges[-1], f"{span}: now is in the last cell"
            if seconds >= 86_400:
                assert all(edge.astimezone(zone).hour == 0 for edge in edges), "days begin at midnight"
            if seconds >= 604_800:
                assert {edge.astimezone(zone).weekday() for edge in edges} == {0}, "weeks begin on Monday"
            assert all(abs((b - a).total_seconds() - seconds) <= 3600 for a, b in pairwise(edges))


def test_a_day_of_25_hours_is_one_cell_and_opens_into_whole_hours() -> None:
    month = cells_of_span("30d", None, BERLIN, datetime(2026, 10, 28, tzinfo=UTC))
    (long,) = [place for place in range(30) if month.edges[place + 1] - month.edges[place] == 25 * HOUR]
    finer = cells_between(month.edges[long], month.edges[long + 1], BERLIN)
    assert (finer.seconds, finer.edges[0], finer.edges[-1]) == (4 * 3600, month.edges[long], month.edges[long + 1])
    assert sum((b - a for a, b in pairwise(finer.edges)), timedelta()) == 25 * HOUR


@pytest.mark.parametrize(
    ("hours", "seconds", "count"), [(4, 3600, 4), (24, 14_400, 6), (168, 86_400, 7), (672, 604_800, 4)]
)
def test_a_cell_opens_into_finer_ones(hours: int, seconds: int, count: int) -> None:
    start = datetime(2026, 11, 2, tzinfo=UTC)
    finer = cells_between(start, start + hours * HOUR, UTC)
    assert (finer.seconds, len(finer.edges) - 1) == (seconds, count)


def test_a_span_or_a_number_of_cells_that_there_is_not_is_refused_with_those_there_are() -> None:
    with pytest.raises(Rejected) as caught:
        cells_of_span("5d", None, UTC, NOW)
    assert caught.value.hint == "spans: 24h, 7d, 30d, 365d"
    with pytest.raises(Rejected) as caught:
        cells_of_span("7d", 7, UTC, NOW)
    assert caught.value.hint == "cells: 42, 14"


def test_the_worst_state_in_a_cell_wins_and_a_window_longer_than_a_cell_fills_all_of_them() -> None:
    edges = [NOW.replace(minute=0) + (number - 4) * HOUR for number in range(6)]
    cells = MapCells(edges, 3600)
    ten = timedelta(minutes=10)
    windows = [(edges[0], edges[2], "k"), (edges[1], edges[1] + ten, "m"), (edges[1] + ten, edges[2], "c")]
    assert cells.paint([*windows, (edges[4], edges[5], "o")], NOW) == "kmnno"
    assert worst_state("kco") == "c"
    assert worst_state("") == "n"
    never, lost = (MapCell(Window(edges[0], edges[1]), CellState.MISSING, rows, 0) for rows in (0, 48))
    assert (letter_of(never), letter_of(lost)) == ("l", "m"), "what was never written is late, not missing"


class Colons:
    """A destination of two devices, the name of one of which is that of the other with a colon."""

    def partitions(self) -> Sequence[str]:
        return ["site", "site:meter"]

    def cells(self, partition: str, span: Window) -> Sequence[MapCell]:
        state = CellState.EQUAL if partition == "site" else CellState.STALE
        return [MapCell(Window(span.start, span.start + HOUR), state, 9, 1)]


def test_a_device_named_like_another_with_a_colon_has_a_row_of_its_own(tmp_path: Path) -> None:
    with closing(open_state("", tmp_path)) as state:
        for name in ("site", "site:meter"):
            lease = state.leases.acquire("export", "me", 30)
            assert lease
            state.checkpoints.commit("export", name, Commit(cursor_at=NOW), lease)
        maps = DeliveryMaps({"export": Colons()}, state.pages, lambda: NOW)
        found = maps.whole("export", cells_of_span("24h", None, UTC, NOW))
    assert [(row.name, row.cells[0]) for row in found.rows] == [("site", "k"), ("site:meter", "c")]


class Listed:
    """A destination of three partitions, one of which cannot be listed, and one in longer windows."""

    def __init__(self) -> None:
        self.listings = 0
        self.lost = {3}

    def partitions(self) -> Sequence[str]:
        return ["away", "web", "web:weeks"]

    def cells(self, partition: str, span: Window) -> Sequence[MapCell]:
        self.listings += 1
        if partition == "away":
            raise Transient("no answer", "look at the network")
        if partition == "web:weeks":
            return [MapCell(Window(span.start, span.start + 2 * HOUR), CellState.STALE, 9, 1)]
        hours = [Window(span.start + number * HOUR, span.start + (number + 1) * HOUR) for number in range(23)]
        states = [CellState.MISSING if place in self.lost else CellState.EQUAL for place in range(23)]
        return [MapCell(hour, state, 10, 1) for hour, state in zip(hours, states, strict=True)]


def test_few_partitions_are_listed_once_for_all_who_look_and_again_after_something_was_changed(tmp_path: Path) -> None:
    chart, state = Listed(), open_state("", tmp_path)
    maps = DeliveryMaps({"pull": chart}, state.pages, lambda: NOW)
    cells = cells_of_span("24h", None, BERLIN, NOW)
    found = maps.whole("pull", cells)
    assert [(row.name, row.cells) for row in found.rows] == [("away", "u" * 24), ("web", "cckm" + "k" * 19 + "n")]
    assert (found.listed, chart.listings, found.rows[0].error) == (True, 3, "no answer (look at the network)")
    assert maps.strip("pull", cells, 5.0) == "cc" + "um" + "u" * 20
    assert maps.whole("pull", cells, NameFilter(find="WE")).rows == found.rows[1:]
    assert chart.listings == 3, "kept for all who look"
    assert {(fault.partition, fault.letter) for fault in maps.faults("pull")} == {("web", "m"), ("web:weeks", "c")}
    chart.lost = set()
    maps.healed("pull", "web", Window(cells.edges[3], cells.edges[4]))
    assert [fault.partition for fault in maps.faults("pull")] == ["web:weeks"]
    assert maps.whole("pull", cells).rows[1].cells == "cc" + "k" * 21 + "n"
    week = [maps.whole("pull", cells_of_span("7d", number, BERLIN, NOW)) for number in (42, 14)]
    assert [len(found.rows[1].cells) for found in week] == [42, 14], "a phone and a desk have maps of their own"
    with pytest.raises(Rejected, match="no delivery map"):
        maps.whole("other", cells)
    with pytest.raises(Rejected, match="no partition 'nobody'"):
        maps.partition("pull", "nobody", cells.window)
    state.close()


class Slow:
    """A destination of one partition, whose listing waits in the middle until it is released."""

    def __init__(self) -> None:
        self.begun, self.released = threading.Event(), threading.Event()
        self.state = CellState.MISSING

    def partitions(self) -> Sequence[str]:
        return ["web"]

    def cells(self, partition: str, span: Window) -> Sequence[MapCell]:
        found = [MapCell(Window(span.start, span.start + HOUR), self.state, 10, 1)]
        self.begun.set()
        self.released.wait(10)
        return found


def test_a_listing_that_began_before_a_window_was_healed_shows_nobody_its_fault_afterwards(tmp_path: Path) -> None:
    chart, cells = Slow(), cells_of_span("24h", None, UTC, NOW)
    with closing(open_state("", tmp_path)) as state, ThreadPoolExecutor(1) as other:
        maps = DeliveryMaps({"pull": chart}, state.pages, lambda: NOW)
        before = other.submit(maps.whole, "pull", cells)
        chart.begun.wait(10)
        chart.state = CellState.EQUAL
        maps.forget("pull")
        chart.released.set()
        assert before.result().rows[0].cells[0] == "m"
        assert list(maps.faults("pull")) == []
        assert maps.whole("pull", cells).rows[0].cells[0] == "k"


def test_a_destination_that_is_slow_to_list_delays_only_its_own_map(tmp_path: Path) -> None:
    slow, cells = Slow(), cells_of_span("24h", None, UTC, NOW)
    with closing(open_state("", tmp_path)) as state, ThreadPoolExecutor(1) as other:
        maps = DeliveryMaps({"slow": slow, "pull": Listed()}, state.pages, lambda: NOW)
        waiting = other.submit(maps.whole, "slow", cells)
        slow.begun.wait(10)
        assert maps.whole("pull", cells).rows[1].name == "web"
        assert not waiting.done()
        slow.released.set()
        waiting.result()
