"""Where the demo's data begins: a second demo in the same folder finds at the source what the first one exported."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from simulators.demo import MOST_HOURS, began_at

NOW = datetime(2026, 11, 22, 17, 13, 21, 5, UTC)
FIRST = datetime(2026, 11, 22, 14, 10, tzinfo=UTC)


def test_the_data_of_a_second_demo_begins_where_that_of_the_first_did(tmp_path: Path) -> None:
    path = tmp_path / "demo" / "began"
    assert began_at(path, NOW) == FIRST
    assert began_at(path, NOW + timedelta(hours=MOST_HOURS)) == FIRST


@pytest.mark.parametrize(
    "held", ["", "yesterday", "2026-11-20", "2027-01-01T00:00:00+00:00", "2026-11-21T00:00:00+00:00"]
)
def test_a_beginning_that_is_unreadable_to_come_or_long_ago_is_made_anew(tmp_path: Path, held: str) -> None:
    path = tmp_path / "began"
    path.write_text(held)
    assert began_at(path, NOW) == FIRST
    assert path.read_text() == FIRST.isoformat()
