"""The calls that docs/influx_to_s3.md shows open a whole tree: each is read from the page and run as it stands there.

Spark's call is run by `bench/tree_readers.py`, which compares all four on a larger tree.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from exporter import NOON, Exporter, exporter, ns

PAGE = Path(__file__).resolve().parents[2] / "docs" / "influx_to_s3.md"
BLOCK = re.compile(r"```python\n# ([^\n]+)\n(.*?)```", re.DOTALL)
CALLS = dict(BLOCK.findall(PAGE.read_text(encoding="utf-8")))
NUMBERS = ("voltage", "count", "count_double", "frequency")
TIMES = [NOON - timedelta(minutes=30) + timedelta(days=day) for day in (0, 1, 8)]
__all__ = ["exporter"]


@pytest.fixture
def tree(exporter: Exporter, monkeypatch: pytest.MonkeyPatch) -> Exporter:
    """Ids that look like numbers, nanoseconds in one object, a tag and fields that came later, an overflow; the working
    directory holds it as `telemetry`.
    """
    first, second, third = TIMES
    exporter.write(first, "007", "voltage=230.5,count=1i")
    exporter.well()
    exporter.influx.write(f"device_telemetry,device_id=1001 voltage=1,frequency=50.5 {ns(second) + 123_456_789}")
    for phase in ("L1", "L2"):
        exporter.write(second, "007", "voltage=2,count=2i", phase=phase)
    exporter.at(hours=24)
    exporter.well()
    exporter.write(third, "1001", "count=2.5")
    exporter.at(hours=24 * 8)
    exporter.well()
    monkeypatch.chdir(exporter.folder / "objects")
    return exporter


def run(*names: str) -> Mapping[str, Any]:
    """What the page's code leaves behind."""
    left: dict[str, Any] = {}
    for name in names:
        exec(compile(CALLS[name], f"{PAGE.name}: {name}", "exec"), left)  # noqa: S102 - the page's own code
    return left


def of_pandas(frame: Any) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = frame.astype(object).where(frame.notna(), None).to_dict("records")
    return rows


def of_duckdb(frame: Any) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = frame.to_arrow_table().to_pylist()
    return rows


def of_polars(frame: Any) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = frame.to_dicts()
    return rows


@pytest.mark.usefixtures("tree")
@pytest.mark.parametrize(("reader", "rows_of"), [("pandas", of_pandas), ("DuckDB", of_duckdb), ("Polars", of_polars)])
def test_each_call_finds_every_row_and_every_column(
    reader: str, rows_of: Callable[[Any], list[dict[str, Any]]]
) -> None:
    rows = rows_of(run(reader)["frame"])
    assert Counter(row["device_id"] for row in rows) == {"007": 3, "1001": 2}
    assert {row["phase"] for row in rows} == {None, "L1", "L2"}
    found = {name: sorted(float(row[name]) for row in rows if row[name] is not None) for name in NUMBERS}
    assert found == {
        "voltage": [1, 2, 2, 230.5],
        "count": [1, 2, 2],
        "count_double": [2.5],
        "frequency": [50.5],
    }
    below = TIMES[1] + timedelta(microseconds=123_456)
    assert {(row["timestamp"], row["timestamp_nanos"]) for row in rows if row["frequency"]} == {(below, 789)}


@pytest.mark.usefixtures("tree")
def test_pandas_gives_instants_to_the_nanosecond() -> None:
    exact = run("pandas", "pandas: exact instants")["exact"]
    first, second, third = map(ns, TIMES)
    assert sorted(exact.astype("int64").tolist()) == [first, second, second, second + 123_456_789, third]


def test_the_page_shows_a_call_for_each_reader() -> None:
    assert set(CALLS) == {"pandas", "pandas: exact instants", "DuckDB", "Polars", "Spark"}
