"""The digest of rows: independent of order, cutting and representation, and of nothing else."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from app.core.verify import NOTHING, content_of
from app.object_store.row_digest import content_of_tables

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


def stamped(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"at": NOON + timedelta(seconds=place), **row} for place, row in enumerate(rows)]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(ROW, min_size=1, max_size=8),
    st.randoms(use_true_random=False),
    st.integers(0, 8),
    st.sampled_from([True, False]),
)
def test_order_cutting_and_columns_without_values_do_not_matter(rows: Any, random: Any, cut: int, as_text: Any) -> None:
    rows = stamped(rows)
    shuffled = random.sample(rows, len(rows))
    wider = pa.schema([*reversed(list(SCHEMA)), ("unused", pa.float64())])
    parts = [table(shuffled[:cut], wider), table(shuffled[cut:])]
    assert content_of_tables(parts, as_text=as_text) == content_of_tables([table(rows)], as_text=as_text)


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
