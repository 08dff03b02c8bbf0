"""The digest of rows: independent of order, cutting and representation, and of nothing else."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from app.core.verify import NOTHING, WindowContent
from app.object_store.row_digest import cell_lanes, content_of, row_lanes, summed

NOON = datetime(2026, 2, 7, 12, tzinfo=UTC)
ROW = st.fixed_dictionaries(
    {
        "volts": st.one_of(st.none(), st.floats(allow_nan=False, allow_infinity=False)),
        "count": st.one_of(st.none(), st.integers(-(2**63), 2**63 - 1)),
        "on": st.one_of(st.none(), st.booleans()),
        "name": st.one_of(st.none(), st.text(max_size=5)),
    }
)
SCHEMA = pa.schema(
    [
        *(("at", pa.timestamp("ns", "UTC")), ("volts", pa.float64()), ("count", pa.int64())),
        *(("on", pa.bool_()), ("name", pa.string())),
    ]
)


def table(rows: list[dict[str, Any]], schema: pa.Schema = SCHEMA) -> pa.Table:
    return pa.Table.from_pylist(rows, schema=schema)


def content_of_tables(tables: list[pa.Table]) -> WindowContent:
    each = (
        summed(row_lanes((name, table.column(name)) for name in table.column_names), table.num_rows) for table in tables
    )
    return sum(each, NOTHING)


def stamped(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"at": NOON + timedelta(seconds=place), **row} for place, row in enumerate(rows)]


@settings(max_examples=60, deadline=None)
@given(st.lists(ROW, min_size=1, max_size=8), st.randoms(use_true_random=False), st.integers(0, 8))
def test_order_cutting_and_columns_without_values_do_not_matter(rows: Any, random: Any, cut: int) -> None:
    rows = stamped(rows)
    shuffled = random.sample(rows, len(rows))
    wider = pa.schema([*reversed(list(SCHEMA)), ("unused", pa.float64())])
    parts = [table(shuffled[:cut], wider), table(shuffled[cut:])]
    assert content_of_tables(parts) == content_of_tables([table(rows)])


@settings(max_examples=60, deadline=None)
@given(st.lists(ROW, min_size=1, max_size=6), st.data())
def test_any_changed_cell_and_any_doubled_row_is_seen(rows: Any, data: Any) -> None:
    rows = stamped(rows)
    place = data.draw(st.integers(0, len(rows) - 1))
    name = data.draw(st.sampled_from(["volts", "count", "on", "name"]))
    value = data.draw(ROW.map(lambda row: row[name]))
    whole = content_of_tables([table(rows)])
    if value != rows[place][name]:
        changed = [{**row, name: value} if row is rows[place] else row for row in rows]
        assert content_of_tables([table(changed)]) != whole
    assert content_of_tables([table([*rows, rows[place]])]) != whole
    assert content_of_tables([table([*rows, rows[place], rows[place]])]) != whole


def test_a_number_is_the_same_in_every_numeric_type_and_large_ones_stay_apart() -> None:
    def sums(values: list[Any], kind: pa.DataType) -> str:
        return content_of_tables([pa.table({"x": pa.array(values, kind)})]).digest

    assert sums([1, 2], pa.int64()) == sums([1, 2], pa.float64()) == sums([2, 1], pa.uint8())
    assert sums([0.0], pa.float64()) == sums([-0.0], pa.float64())
    assert sums([2**60], pa.int64()) != sums([2**60 + 1], pa.int64())
    assert sums([1], pa.int64()) != sums([True], pa.bool_())


def test_cells_that_change_places_are_seen() -> None:
    both = pa.table({"a": ["x"], "b": ["y"]}), pa.table({"a": ["y"], "b": ["x"]})
    assert content_of_tables([both[0]]) != content_of_tables([both[1]])
    assert content_of([{"a": "x", "b": "y"}]) != content_of([{"a": "y", "b": "x"}])
    assert content_of([{"a": "x", "b": ""}]) == content_of([{"a": "x"}])
    assert content_of([]) == NOTHING == content_of_tables([])
    assert content_of([{}, {}]).rows == 2
    assert content_of([{"a": "\udc80"}]) != content_of([{"a": "\udc81"}])


def cells(values: list[Any], kind: pa.DataType, field: str = "x", at: int = 0, *, as_text: bool = False) -> list[int]:
    """The first hash of each cell in rows that are told apart by their place."""
    rows = row_lanes([("at", pa.array(range(at, at + len(values)), pa.int64()))])
    return list(cell_lanes(rows, field, pa.array(values, kind), as_text=as_text)[0])


def test_a_cell_is_told_by_its_row_its_field_and_its_value_whatever_type_its_column_has() -> None:
    large, larger = 2**53 + 1, 2**63 + 1
    whole = cells([5, large, None, -7], pa.int64())
    assert whole == cells(["5", str(large), None, "-7"], pa.string())
    assert cells([larger], pa.uint64()) == cells([str(larger)], pa.string())
    assert cells([2**60, 5, 0], pa.int64()) == cells([2.0**60, 5.0, -0.0], pa.float64())
    assert cells([True, False], pa.bool_()) == cells(["true", "false"], pa.string())
    assert whole[2] == 0
    other = [
        cells([5], pa.int64(), "y"),
        cells([5], pa.int64(), at=1),
        cells([6], pa.int64()),
        cells(["05"], pa.string()),
    ]
    assert len({whole[0], *(each[0] for each in other)}) == 5


def test_in_an_object_of_text_every_number_is_that_number_and_no_text_is_no_value() -> None:
    numbers = [0.1, 1e300, 1e15, 1234567890123456768.0]
    texts = pa.array(numbers).cast(pa.string()).to_pylist()
    assert cells(texts, pa.string(), as_text=True) == cells(numbers, pa.float64(), as_text=True)
    assert cells(["", "x"], pa.string(), as_text=True)[0] == 0
    assert cells(["", "0.1"], pa.string()) != cells(["", "0.1"], pa.string(), as_text=True)
