"""Other programs read the table: the calls of docs/lake.md, run as they stand there, give the rows of the objects."""

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pytest

from lake_tree import Tree, counted, rows

pytestmark = [
    pytest.mark.slow,  # pyiceberg takes a second to import
    pytest.mark.filterwarnings("ignore::FutureWarning:pyspark"),  # of pandas 3, which its client uses elsewhere
]

PAGE = Path(__file__).resolve().parents[2] / "docs" / "lake.md"
BLOCK = re.compile(r"```python\n# (\w+)[^\n]*\n(.*?)```", re.DOTALL)
CALLS = dict(BLOCK.findall(PAGE.read_text(encoding="utf-8")))


def with_extensions() -> Any:
    """DuckDB with the extensions of their packages, as INSTALL would bring them."""
    connection = duckdb.connect()
    for name in ("avro", "iceberg"):
        spec = find_spec(f"duckdb_extension_{name}")
        assert spec is not None
        place = next(iter(spec.submodule_search_locations or ()))
        (file,) = Path(place).rglob(f"{name}.duckdb_extension")
        connection.execute(f"LOAD '{file}'")
    connection.execute("SET TimeZone = 'UTC'")
    return connection


def test_the_calls_of_the_guide_read_every_value(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sail: str) -> None:
    tree = Tree(tmp_path / "data")
    tree.max_bytes = 1
    for device in ("D1", "D2"):
        for hour in range(2):
            tree.put(device, hour)
    tree.run()
    before = tree.in_objects()
    tree.put("D1", 1, rows("D1", 1, count=6, temperature=pa.array([float(each) for each in range(6)])))
    tree.put("D2", 3, rows("D2", 3, phase=pa.array(["x", "y", None, "z"])))
    tree.run()
    monkeypatch.chdir(tmp_path)
    left: dict[str, Any] = {"connection": with_extensions(), "remote": sail}
    for name in ("pyiceberg", "polars", "duckdb", "spark"):
        exec(compile(CALLS[name], f"{PAGE.name}: {name}", "exec"), left)  # noqa: S102 - the page's own code

    objects = tree.in_objects()
    assert counted(left["day"]) == {row: number for row, number in objects.items() if ("device_id", "D1") in row}
    assert counted(left["earlier"]) == before
    assert dict(left["hot"].rows())["D1"] == 5.0

    everything = f"SELECT * FROM iceberg_scan('{left['metadata']}')"  # noqa: S608 - a path of this test
    by_duckdb = left["connection"].execute(everything).to_arrow_table()
    by_polars = left["polars"].scan_iceberg(left["table"]).collect().to_arrow()
    assert counted(_in_microseconds(by_duckdb)) == objects
    assert counted(_in_microseconds(by_polars)) == objects
    assert dict(left["sums"].fetchall()).keys() == {"D1", "D2"}
    assert counted(_in_microseconds(left["frame"].toArrow())) == objects
    assert counted(_in_microseconds(left["first"])) == before
    assert dict(zip(*left["maxima"].to_pydict().values(), strict=True))["D1"] == 5.0
    left["spark"].stop()


def _in_microseconds(table: pa.Table) -> pa.Table:
    index = table.schema.get_field_index("timestamp")
    return table.set_column(index, "timestamp", table["timestamp"].cast(pa.timestamp("us", "UTC")))
