"""How points are kept: keyed, ordered, overwritten field by field, of one type within a week."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulators.influx_storage import SHARD_NS, Points
from simulators.line_protocol import parse_lines


def stored(*texts: str) -> tuple[Points, list[str]]:
    points = Points()
    dropped = [reason for text in texts for reason in points.write(parse_lines(text, 0))]
    return points, dropped


def test_a_late_point_takes_its_place_in_time() -> None:
    points, _ = stored("m f=1 10\nm f=3 30", "m f=2 20\nm f=0 1")
    window = points.window(points.series()[0], 0, 100)
    assert list(window.times) == [1, 10, 20, 30]
    assert list(window.cells["f", "float"]) == [0, 1, 2, 3]


def test_the_same_point_is_overwritten_field_by_field() -> None:
    points, _ = stored("m a=1,b=1 10", "m b=2,c=3 10")
    window = points.window(points.series()[0], 0, 100)
    assert {name: list(cells) for (name, _), cells in window.cells.items()} == {"a": [1], "b": [2], "c": [3]}
    assert len(points) == 1


def test_a_window_has_its_start_and_not_its_stop() -> None:
    points, _ = stored("m f=1 10\nm f=2 20\nm f=3 30")
    assert list(points.window(points.series()[0], 10, 30).times) == [10, 20]


def test_cells_without_a_value_are_none_and_fields_without_any_are_left_out() -> None:
    points, _ = stored('m a=1 1\nm s="x" 2\nm late=1 3')
    window = points.window(points.series()[0], 0, 3)
    assert {key: list(cells) for key, cells in window.cells.items()} == {
        ("a", "float"): [1, None],
        ("s", "string"): [None, "x"],
    }


def test_another_type_in_the_same_week_drops_the_point_and_keeps_the_others() -> None:
    points, dropped = stored("m,d=1 f=1 10", "m,d=2 f=1i 20\nm,d=2 f=2 30")
    assert dropped == [
        'field type conflict: input field "f" on measurement "m" is type integer, already exists as type float'
    ]
    assert len(points) == 2


def test_another_type_in_another_week_is_another_column() -> None:
    points, dropped = stored("m f=1 10", f"m f=1i {2 * SHARD_NS}")
    assert not dropped
    assert points.fields(points.series()[0], 0, 3 * SHARD_NS) == [("f", "float"), ("f", "integer")]


def test_many_points_are_stored_at_once_behind_those_that_are_there() -> None:
    points, _ = stored("m,d=1 f=1,g=1 10")
    points.extend(("m", (("d", "1"),)), [20, 30], {"f": [2.0, 3.0]})
    window = points.window(points.series()[0], 0, 100)
    assert list(window.cells["f", "float"]) == [1, 2, 3]
    assert list(window.cells["g", "float"]) == [1, None, None]
    with pytest.raises(ValueError, match="do not ascend"):
        points.extend(("m", (("d", "1"),)), [30, 40], {"f": [2.0, 3.0]})


@given(st.lists(st.tuples(st.integers(0, 30), st.sampled_from("ab"), st.integers(0, 9))))
def test_any_order_of_writes_ends_as_a_dictionary_would(writes: list[tuple[int, str, int]]) -> None:
    points, _ = stored(*(f"m {name}={value} {time}" for time, name, value in writes))
    expected: dict[int, dict[str, float]] = {}
    for time, name, value in writes:
        expected.setdefault(time, {})[name] = value
    for series in points.series():
        window = points.window(series, 0, 100)
        assert all(earlier < later for earlier, later in pairwise(window.times))
        found = {
            time: {name: cells[row] for (name, _), cells in window.cells.items() if cells[row] is not None}
            for row, time in enumerate(window.times)
        }
        assert found == expected
