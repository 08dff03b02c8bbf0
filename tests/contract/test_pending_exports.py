"""Requests to export services, over SQLite and PostgreSQL."""

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from app.db.state import SqlPulls, State

NOW = datetime(2026, 2, 7, 12, tzinfo=UTC)


@pytest.fixture(params=["sqlite", "postgres"])
def pulls(request: pytest.FixtureRequest, new_state: Callable[[str], State]) -> SqlPulls:
    return new_state(request.param).pulls


def test_a_number_is_never_given_to_another_request_also_after_the_first_was_deleted(pulls: SqlPulls) -> None:
    numbers = []
    for month in range(3):
        now = NOW + month * timedelta(days=31)
        pulls.forget("appmetrica", "routes", now - timedelta(days=1))
        export = pulls.add("appmetrica", "routes", f"request {month}", now)
        pulls.save(replace(export, asked_at=now, done=True))
        numbers.append(export.export_id)
    assert numbers == [1, 2, 3]
    assert pulls.find("appmetrica", 1) is None
    found = pulls.find("appmetrica", 3)
    assert found is not None
    assert found.request == "request 2"
