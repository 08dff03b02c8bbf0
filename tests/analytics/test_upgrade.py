"""What the last version knew of objects stays where it is still right; what is read otherwise now is learnt again."""

from collections.abc import Callable
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

import pytest

from app.db.database import sql_directory
from app.db.migrations import MigratedDatabase
from app.db.object_summaries import NO_DAY, DaySummary
from app.db.object_summaries import ObjectFacts as Facts
from app.db.state import State
from lake import local_lake, parquet

KNOWN = {"timestamp": "TIMESTAMP WITH TIME ZONE", "device_id": "VARCHAR", "voltage": "DOUBLE"}
LATEST = (1_770_422_400_000_000, 230.0, None, None, None, None, None, None, None)


def part(device: str, day: int) -> DaySummary:
    at = LATEST[0]
    return DaySummary(device, day, 1, at, at, 230.0, 1, None, None, 0, LATEST)


@pytest.mark.parametrize("dialect", ["sqlite", "postgres"])
def test_only_objects_that_are_read_otherwise_now_are_read_again(
    dialect: str, new_state: Callable[[str], State]
) -> None:
    state = new_state(dialect)
    facts = state.summaries
    kept = Facts("kept.parquet", "1", 9, rows=1, columns=KNOWN, parts=[part('"D1"', 20491)])
    naive = {**KNOWN, "timestamp": "VARCHAR"}
    again = [
        Facts("broken.parquet", "1", 9, fault="it was"),
        Facts("pandas.parquet", "1", 9, rows=1, columns={"timestamp": KNOWN["timestamp"]}, parts=[part("null", 20491)]),
        Facts("slashes.parquet", "1", 9, rows=1, columns=naive, parts=[part('"D1"', NO_DAY)]),
        Facts("nested.parquet", "1", 9, rows=1, columns={**KNOWN, "voltage": "STRUCT"}, parts=[part('"D1"', 20491)]),
        Facts("text.parquet", "1", 9, rows=1, columns={**KNOWN, "voltage": "VARCHAR"}, parts=[part('"D1"', 20491)]),
    ]  # fmt: skip
    facts.save([kept, *again])
    sweeps = facts.sweeps()
    with state.database.transaction() as session:
        session.run("DELETE FROM headwater_migrations WHERE name = 'state/0008_foreign_objects'")
    MigratedDatabase(state.database, sql_directory() / "state").prepare()
    assert list(facts.versions()) == [kept.version]
    assert {version for version, _ in facts.parts([('"D1"', 20491), ("null", 20491), ('"D1"', NO_DAY)])} == {
        kept.version
    }
    assert facts.sweeps() == sweeps + 1


def test_a_latest_reading_that_was_kept_without_nanoseconds_counts_as_one_of_none(
    new_state: Callable[[str], State], tmp_path: Path
) -> None:
    with closing(local_lake(tmp_path / "lake", new_state("sqlite").summaries)) as lake:
        lake.put(
            "new.parquet", parquet({"device_id": ["D1"], "timestamp": [datetime(2026, 2, 7, tzinfo=UTC)], "soc": [1.0]})
        )
        lake.summaries.refresh()
        (source,) = lake.summaries.sources(None, None, None)
        lake.facts.forget([source.version])
        lake.facts.save([Facts(source.key, source.etag, 9, rows=1, columns=KNOWN, parts=[part('"D1"', 20491)])])
        lake.put(
            "other.parquet",
            parquet(
                {
                    "device_id": ["D1"],
                    "timestamp": [datetime(2026, 2, 7, tzinfo=UTC)],
                    "voltage": [1.0],
                    "timestamp_nanos": [1],
                }
            ),
        )
        again = lake.another()
        again.refresh()
        assert [row[:3] for row in lake.from_summaries("devices/latest", again)] == [("D1", datetime(2026, 2, 7), 1.0)]  # noqa: DTZ001
