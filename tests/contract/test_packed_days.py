"""What /analytics sums of a closed day's objects becomes one row of the state, and nothing of it is known otherwise."""

import math
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest

from app.core.windows import EPOCH
from app.db.object_summaries import DaySummary, Facts
from app.db.packed_days import folder_of
from app.db.state import State

DAY = (datetime(2026, 2, 7, tzinfo=UTC) - EPOCH).days
COLUMNS = {"timestamp": "TIMESTAMP WITH TIME ZONE", "ü": "DOUBLE"}


def facts(hour: int, *, device: str = "ü'", etag: str = "1", day: int = DAY, soc: float = 0.1) -> Facts:
    first_us = (day * 24 + hour) * 3_600_000_000
    latest = (first_us + 7, 0.1 + hour, None, 1.5, None, None, None, None, "Plant \N{GREEK SMALL LETTER ALPHA}", 3)
    text = f'"{device}"' if device.isascii() else f'"\\u{ord(device[0]):04x}{device[1:]}"'
    part = DaySummary(text, day, 60 + hour, first_us, first_us + 7, 1e-320, 3, 5e300, soc, 2, latest)
    date = f"{EPOCH.fromordinal(EPOCH.toordinal() + day):%Y/%m/%d}"
    key = f"telemetry/device_id={device}/date={date}/export_{hour:02d}0000.parquet"
    return Facts(key, etag, 1000 + hour, 60 + hour, COLUMNS, "", (part,))


def everything(state: State, many: list[Facts]) -> list[Any]:
    """What is said of them, whichever way it is asked."""
    known = state.summaries
    versions = [each.version for each in many]
    folders = {folder_of(each.key) for each in many}
    pairs = {(part.device, part.day) for each in many for part in each.parts}
    device = many[0].parts[0].device
    return [
        known.known(versions, folders),
        known.pairs(versions, folders),
        known.all_pairs(),
        sorted(known.parts(pairs), key=repr),
        *(known.keys(*span) for span in ((None, None, None), (device, DAY, DAY), (device, DAY + 1, None))),
        known.count(),
        sorted(known.versions()),
    ]


def rows(state: State, table: str, where: str = "1 = 1") -> int:
    with state.database.transaction(read_only=True) as session:
        return int(session.rows(f"SELECT count(*) AS n FROM {table} WHERE {where}")[0]["n"])  # noqa: S608 - own names


@pytest.mark.parametrize("dialect", ["sqlite", "postgres"])
def test_a_packed_day_is_one_row_and_says_the_same(dialect: str, new_state: Callable[[str], State]) -> None:
    state = new_state(dialect)
    other, later = facts(0, device="d2"), facts(1, day=DAY + 3)
    both = Facts("telemetry/device_id=ü'/all.parquet", "1", 9, 121, COLUMNS, "", (*facts(0).parts, *other.parts))
    broken = Facts("telemetry/device_id=ü'/export_050000.parquet", "1", 9, fault="no Parquet")
    many = [*(facts(hour) for hour in range(24)), facts(3, etag="2"), other, later, both, broken]
    many.append(facts(4, etag="2", soc=-math.inf))
    state.summaries.save(many)
    before = everything(state, many)
    state.summaries.pack("influx_to_s3", "ü'", DAY + 1)
    state.summaries.pack("influx_to_s3", "ü'", DAY + 1)
    assert everything(state, many) == before
    assert [rows(state, table) for table in ("analytics_objects", "analytics_parts", "export_days")] == [4, 4, 1]
    assert state.checkpoints.cursors("influx_to_s3") == {}

    late = facts(5, etag="late")
    state.summaries.save([late, facts(6)])  # the second one is packed, and written again as it was
    many.append(late)
    unpacked = everything(state, many)
    assert rows(state, "export_days", "objects > 0") == 0
    assert len(unpacked[-1]) == len(set(unpacked[-1])) == len(many)
    state.summaries.pack("influx_to_s3", "ü'", DAY + 1)
    assert everything(state, many) == unpacked

    left = facts(5).version
    assert list(state.summaries.known([left])) == [left], "where it lies need not be said"
    assert rows(state, "export_days", "objects > 0") == 0
    state.summaries.pack("influx_to_s3", "ü'", DAY + 1)
    state.summaries.forget([left, other.version])
    assert sorted(state.summaries.versions()) == sorted({each.version for each in many} - {left, other.version})
