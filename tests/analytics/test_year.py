"""Months of hourly objects beside files of the other layout: the four reports say what plain DuckDB says.

EFFORT=3 makes them a year.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import duckdb
import pytest

from app.db.state import State
from effort import EFFORT
from lake import BUILT_IN, KNOWN, ORACLE, exported, flat, local_lake, same

START = datetime(2025, 2, 7, tzinfo=UTC)
HOURS = {"D1": min(365, 122 * EFFORT) * 24, "D2": 40 * 24, "D3": 24}
MONTHS = 12


def write(folder: Path) -> None:
    """As other programs do: the store need not have written what it lists."""
    draw = random.Random(8)  # noqa: S311 - test data
    for device, hours in HOURS.items():
        for number in range(hours):
            start = START + timedelta(hours=number)
            path = folder / f"device_id={device}/date={start:%Y/%m/%d}/export_{start:%H%M%S}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(exported(device, start, 2, draw=draw, step_seconds=1800))
    for number in range(MONTHS):
        month = (START + timedelta(days=30 * number)).replace(tzinfo=None)
        (folder / f"day_{number:03d}.parquet").write_bytes(flat(month, 40, draw=draw))


def plain(folder: Path) -> Mapping[str, Sequence[tuple[Any, ...]]]:
    """DuckDB over all files at once."""
    kept = ", ".join(
        f'CASE WHEN isfinite("{name}") THEN CAST("{name}" AS DOUBLE) END AS "{name}"'
        if kind == "DOUBLE"
        else f"nullif(CAST({name} AS VARCHAR), '') AS {name}"
        if kind == "VARCHAR"
        else f"CAST({name} AS {kind}) AS {name}"
        for name, kind in KNOWN.items()
        if name not in ("power_factor", "location")
    )
    with duckdb.connect() as connection:
        connection.execute("SET TimeZone = 'UTC'")
        files = f"read_parquet('{folder}/**/*.parquet', union_by_name = true, hive_partitioning = false)"
        none = "CAST(NULL AS DOUBLE) AS power_factor, CAST(NULL AS VARCHAR) AS location"
        connection.execute(f"CREATE TABLE rows AS SELECT {kept}, {none} FROM {files}")  # noqa: S608 - own names
        return {name: connection.execute(sql).fetchall() for name, sql in ORACLE.items()}


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_months_of_hourly_objects_of_mixed_schemas_is_what_plain_duckdb_says(
    new_state: Callable[[str], State], tmp_path: Path
) -> None:
    with closing(local_lake(tmp_path / "lake", new_state("sqlite").summaries)) as lake:
        folder = tmp_path / "lake" / "objects" / "telemetry"
        write(folder)
        assert lake.summaries.refresh().objects == sum(HOURS.values()) + MONTHS
        expected = plain(folder)
        for path in BUILT_IN:
            assert same(lake.from_summaries(path), expected[path]), path
        assert same(lake.from_objects("overview"), expected["overview"])
