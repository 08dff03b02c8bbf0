"""Layouts over SQLite and PostgreSQL: what is in effect never changes."""

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from app.stores.layouts import Layout
from app.stores.state import State

TOMORROW = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0) + timedelta(days=2)
PAST = Layout(datetime(2026, 1, 1, tzinfo=UTC), 3600, "parquet", "%Y/%m/%d")


@pytest.fixture(params=["sqlite", "postgres"])
def state(request: pytest.FixtureRequest, new_state: Callable[[str], State]) -> State:
    return new_state(request.param)


def test_layouts_come_oldest_first_and_by_pipeline(state: State) -> None:
    later = replace(PAST, effective_at=TOMORROW, format="csv")
    state.layouts.add_layout("p", later)
    state.layouts.add_layout("p", PAST)
    state.layouts.add_layout("other", PAST)
    assert list(state.layouts.layouts("p")) == [PAST, later]
    assert list(state.layouts.layouts("unknown")) == []


def test_adding_a_layout_twice_changes_nothing(state: State) -> None:
    state.layouts.add_layout("p", PAST)
    state.layouts.add_layout("p", PAST)
    assert list(state.layouts.layouts("p")) == [PAST]


def test_a_layout_in_effect_stays_and_one_to_come_is_replaced(state: State) -> None:
    coming = replace(PAST, effective_at=TOMORROW)
    for layout in (PAST, replace(PAST, format="csv"), coming, replace(coming, window_seconds=900)):
        state.layouts.add_layout("p", layout)
    assert list(state.layouts.layouts("p")) == [PAST, replace(coming, window_seconds=900)]
