"""Pages are exact while writers insert at the same time; `tests/dwh_walk.py` walks 100,000 rows."""

from pathlib import Path

import pytest

from dwh_walk import walk


@pytest.mark.slow
def test_no_row_is_lost_or_doubled_for_whoever_walks_while_writers_insert(warehouse_url: str, tmp_path: Path) -> None:
    assert walk(warehouse_url, tmp_path, rows=3000, limit=700) == []
