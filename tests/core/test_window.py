"""Windows lie on one grid from the epoch on, and their age decides what may be done with them."""

from datetime import UTC, date, datetime, timedelta, timezone

import pytest

from app.core.errors import Rejected
from app.core.windows import (
    EPOCH,
    Age,
    Window,
    age_of,
    floor_to,
    named_day,
    next_midnight,
    refuse_future,
    window_at,
    windows_between,
)

NOON = datetime(2026, 2, 7, 12, tzinfo=UTC)
HOUR, SECOND, INSTANT = timedelta(hours=1), timedelta(seconds=1), timedelta(microseconds=1)


def test_the_grid_is_counted_from_the_epoch_also_before_it() -> None:
    assert floor_to(NOON + HOUR - INSTANT, 3600) == floor_to(NOON, 3600) == NOON
    assert floor_to(EPOCH - INSTANT, 3600) == EPOCH - HOUR
    assert window_at(NOON + INSTANT, 900) == Window(NOON, NOON + HOUR / 4)
    assert window_at(NOON, 86_400) == Window(NOON - 12 * HOUR, NOON + 12 * HOUR)


def test_every_window_that_overlaps_a_span_is_in_it_and_no_other() -> None:
    for start in (NOON, NOON + SECOND, NOON + HOUR):
        assert list(windows_between(start, start, 3600)) == list(windows_between(start, NOON, 3600)) == []
    assert list(windows_between(NOON, NOON + HOUR, 3600)) == [Window(NOON, NOON + HOUR)]
    around = list(windows_between(NOON - INSTANT, NOON + HOUR + INSTANT, 3600))
    assert around == [Window(NOON + n * HOUR, NOON + (n + 1) * HOUR) for n in (-1, 0, 1)]


@pytest.mark.parametrize(
    ("passed", "age"),
    [
        (-SECOND, Age.OPEN),
        (-INSTANT, Age.OPEN),
        (timedelta(), Age.SETTLING),
        (10 * SECOND - INSTANT, Age.SETTLING),
        (10 * SECOND, Age.DUE),
        (HOUR, Age.DUE),
    ],
)
def test_a_window_is_open_until_its_end_then_settles_for_the_grace(passed: timedelta, age: Age) -> None:
    assert age_of(Window(NOON, NOON + HOUR), NOON + HOUR + passed, 10) is age


def test_without_a_grace_a_window_is_due_at_its_end() -> None:
    assert age_of(Window(NOON, NOON + HOUR), NOON + HOUR, 0) is Age.DUE


def test_the_next_midnight_is_never_now() -> None:
    midnight = NOON + 12 * HOUR
    assert [next_midnight(at) for at in (NOON, midnight - INSTANT, midnight)] == [
        midnight,
        midnight,
        midnight + 24 * HOUR,
    ]


def test_a_window_has_a_length_and_a_text() -> None:
    window = Window(NOON, NOON + HOUR)
    assert (window.seconds, str(window)) == (3600, "2026-02-07T12:00:00Z/2026-02-07T13:00:00Z")


EAST = timezone(HOUR)


@pytest.mark.parametrize(
    ("start", "end"),
    [
        (NOON, NOON),
        (NOON, NOON - HOUR),
        (NOON.astimezone(EAST), NOON + HOUR),
        (NOON, (NOON + HOUR).astimezone(EAST)),
        (NOON.replace(tzinfo=None), NOON + HOUR),
        (NOON, (NOON + HOUR).replace(tzinfo=None)),
    ],
)
def test_a_window_that_is_empty_or_not_in_utc_cannot_be_made(start: datetime, end: datetime) -> None:
    with pytest.raises(ValueError, match="must"):
        Window(start, end)


def test_a_span_that_has_not_begun_or_ends_after_today_is_in_the_future() -> None:
    midnight = next_midnight(NOON)
    for span in (Window(NOON - INSTANT, NOON), Window(EPOCH, midnight), Window(NOON - INSTANT, midnight)):
        refuse_future(span, NOON)
    last = datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC)
    for span in (Window(NOON, midnight), Window(NOON - HOUR, midnight + INSTANT), Window(last - HOUR, last)):
        with pytest.raises(Rejected, match="lies in the future"):
            refuse_future(span, NOON)


@pytest.mark.parametrize(
    "date_format", ["%Y/%m/%d", "%Y-%m-%d", "%Y%m%d", "%Y/%j", "year=%Y/month=%m/%Y-%m-%d", "%d.%m.%Y", "%Y/%j/%m-%d"]
)
def test_a_day_is_found_again_in_its_name_also_where_a_directive_is_repeated(date_format: str) -> None:
    for day in (date(2026, 2, 7), date(2024, 2, 29), date(2026, 12, 31)):
        assert named_day(day.strftime(date_format), date_format) == day


@pytest.mark.parametrize(
    ("text", "date_format"),
    [
        ("2026/02/30", "%Y/%m/%d"),
        ("2026/2/7", "%Y/%m/%d"),
        ("2026-02-07", "%Y/%m/%d"),
        ("2026/02/07x", "%Y/%m/%d"),
        ("2026/02/2026-03-07", "%Y/%m/%Y-%m-%d"),
        ("2026/367", "%Y/%j"),
        ("", "%Y/%m/%d"),
        ("07", "%d"),
    ],
)
def test_text_that_is_not_the_name_of_a_day_names_none(text: str, date_format: str) -> None:
    assert named_day(text, date_format) is None
