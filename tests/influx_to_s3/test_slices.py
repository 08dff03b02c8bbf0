"""How a window is cut into questions, and from where a large one is read again."""

from datetime import timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.core.pipeline import Count
from app.core.windows import Window
from app.influx_to_s3.source import bucket_seconds, first_change, rows_before, slices
from influx_points import NOON, NOON_NS, rows

WINDOW = Window(NOON, NOON + timedelta(hours=1))


@pytest.mark.parametrize("seconds", [1, 7 * 60, 900, 3600, 86_400])
def test_buckets_divide_the_window_and_are_few(seconds: int) -> None:
    every = bucket_seconds(Window(NOON, NOON + timedelta(seconds=seconds)))
    assert seconds % every == 0
    assert seconds // every <= 30 or every == 1


def test_reading_begins_one_bucket_before_the_first_that_changed() -> None:
    buckets = [NOON + timedelta(minutes=2 * n) for n in range(30)]
    old = dict.fromkeys(buckets[:20], 5)
    assert first_change(old, {**old, buckets[20]: 3}, WINDOW, 120) == buckets[19]
    assert first_change(old, {**old, buckets[4]: 6, buckets[20]: 3}, WINDOW, 120) == buckets[3]
    assert first_change(old, {**old, buckets[0]: 6}, WINDOW, 120) == NOON
    gone = {at: n for at, n in old.items() if at != buckets[7]}
    assert first_change(old, gone, WINDOW, 120) == buckets[6]
    assert first_change(old, old, WINDOW, 120) == WINDOW.end


@given(st.dictionaries(st.integers(0, 29), st.integers(1, 400)), st.integers(1, 500), st.integers(0, 29))
@settings(max_examples=100, deadline=None)
def test_slices_cover_the_span_without_gaps_and_stay_near_the_batch_size(
    numbers: dict[int, int], batch_rows: int, first: int
) -> None:
    counts = {NOON + timedelta(minutes=2 * n): Count(2 * many, many, {"v": many}) for n, many in numbers.items()}
    span = Window(NOON + timedelta(minutes=2 * first), WINDOW.end)
    parts = list(slices(span, 120, counts, batch_rows))
    assert [part.start for part, _ in parts] == [span.start, *(part.end for part, _ in parts[:-1])]
    assert parts[-1][0].end == span.end
    assert sum(count.points for _, count in parts) == sum(many for n, many in numbers.items() if n >= first)
    assert sum(count.cells for _, count in parts) == 2 * sum(many for n, many in numbers.items() if n >= first)
    assert sum(count.fields.get("v", 0) for _, count in parts) == sum(count.points for _, count in parts)
    biggest = max(numbers.values(), default=0)
    assert all(count.points <= max(batch_rows, biggest) for _, count in parts)


def test_before_takes_only_older_rows() -> None:
    table = rows(1, 2, 3, a=[1, 2, 3])
    assert rows_before(table, NOON_NS + 2).column("a").to_pylist() == [1]
