"""Layouts of an older version over SQLite and PostgreSQL: read as they were written, and written no more."""

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from app.db.checkpoints import Layout
from app.db.state import State

PAST = Layout(datetime(2026, 1, 1, tzinfo=UTC), 3600, "parquet", "%Y/%m/%d", "ns")
INSERT = """INSERT INTO layouts (pipeline, effective_from, window_seconds, format, date_format)
            VALUES (:pipeline, :effective_at, :window_seconds, :format, :date_format)"""


@pytest.fixture(params=["sqlite", "postgres"])
def state(request: pytest.FixtureRequest, new_state: Callable[[str], State]) -> State:
    return new_state(request.param)


def add(state: State, pipeline: str, layout: Layout) -> None:
    """As the version before wrote it."""
    with state.database.transaction() as session:
        session.run(
            INSERT,
            pipeline=pipeline,
            effective_at=layout.effective_at,
            window_seconds=layout.window_seconds,
            format=layout.format,
            date_format=layout.date_format,
        )


def test_layouts_come_oldest_first_by_pipeline_and_in_nanoseconds(state: State) -> None:
    later = replace(PAST, effective_at=PAST.effective_at + timedelta(days=2), format="csv", window_seconds=900)
    add(state, "p", later)
    add(state, "p", PAST)
    add(state, "other", PAST)
    assert list(state.checkpoints.layouts("p")) == [PAST, later]
    assert list(state.checkpoints.layouts("unknown")) == []
