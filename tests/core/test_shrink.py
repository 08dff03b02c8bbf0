"""What an object may lose: what was deleted at the source, never what its retention may have forgotten."""

from datetime import UTC, datetime, timedelta

from hypothesis import given
from hypothesis import strategies as st

from app.core.pipeline import EARLIEST, LATEST, UNLIMITED, Shrink, covered_since
from app.core.windows import Window
from world import GRACE_SECONDS, START, Process, World

INSTANTS = st.datetimes(timezones=st.just(UTC))
PERIODS = st.timedeltas(min_value=timedelta(0))
MINUTE = timedelta(minutes=1)
SPAN = Window(START, START + 10 * MINUTE)


@given(now=INSTANTS, later=st.timedeltas(min_value=timedelta(0)), period=PERIODS, at=INSTANTS, oldest=INSTANTS)
def test_a_row_that_retention_may_have_forgotten_never_goes(
    now: datetime, later: timedelta, period: timedelta, at: datetime, oldest: datetime
) -> None:
    since = covered_since(now, period, oldest)
    assert (at < since) == (period < UNLIMITED and at - EARLIEST < now - EARLIEST - period)
    if later < LATEST - now:
        assert covered_since(now + later, period, oldest) >= since


@given(now=INSTANTS, oldest=INSTANTS)
def test_without_a_limit_any_row_may_go_and_where_nobody_can_tell_none_before_the_oldest_point(
    now: datetime, oldest: datetime
) -> None:
    assert covered_since(now, UNLIMITED, oldest) == covered_since(now, UNLIMITED, None) == EARLIEST
    assert covered_since(now, None, oldest) == oldest
    assert covered_since(now, None, None) == LATEST


def closed() -> World:
    """Ten rows of a closed window, of which the source lacks three afterwards."""
    world = World()
    for minute in range(10):
        world.write("a", START + minute * MINUTE, f"a{minute}")
    world.now = START + 10 * MINUTE + timedelta(seconds=GRACE_SECONDS + 600)
    Process(world).run_until_done()
    for minute in (1, 4, 8):
        del world.rows["a"][START + minute * MINUTE]
    return world


def test_what_was_deleted_goes_from_a_closed_window_and_what_retention_does_not_cover_stays() -> None:
    world = closed()
    process = Process(world, shrink=lambda: Shrink(START + 4 * MINUTE))
    report = process.fill(SPAN)
    assert [value for _, _, value in world.exported()] == ["a0", "a1", "a2", "a3", "a5", "a6", "a7", "a9"]
    assert report.removed_rows == 2
    assert list(report.notes) == [
        f"a/{START:%Y%m%dT%H%M%S}.0: 2 rows that the source no longer has were removed: a4; a8",
    ]
    assert process.fill(SPAN, by_content=True).windows == 0


def test_a_deletion_that_was_not_allowed_at_first_goes_as_soon_as_it_is() -> None:
    world = closed()
    Process(world).fill(SPAN)
    assert len(world.exported()) == 10
    Process(world, shrink=Shrink).fill(SPAN, by_content=True)
    assert world.exported() == world.produced(world.now)


def test_a_window_that_lost_all_its_rows_at_the_source_is_emptied() -> None:
    world = closed()
    world.rows["a"].clear()
    Process(world, shrink=Shrink).fill(SPAN)
    assert world.exported() == []


def test_a_span_is_written_again_and_names_what_would_go_until_that_is_allowed() -> None:
    world = closed()
    keeps = Process(world, shrink=lambda: Shrink(START + 4 * MINUTE, removes=False))
    for _ in range(2):
        world.puts.clear()
        report = keeps.fill(SPAN, again=True)
        assert (len(world.puts), report.windows, report.removed_rows) == (1, 1, 0)
        assert "2 rows that the source no longer has stay" in report.notes[0]
        assert len(world.exported()) == 10
    removes = Process(world, shrink=lambda: Shrink(START + 4 * MINUTE))
    tried = removes.fill(SPAN, dry_run=True, again=True)
    assert (tried.removed_rows, len(world.exported())) == (2, 10)
    assert "would be removed" in tried.notes[0]
    assert removes.fill(SPAN, again=True).removed_rows == 2
    assert len(world.exported()) == 8
    assert removes.fill(SPAN, again=True).notes == ()


def test_a_span_is_written_again_also_without_a_state_and_where_the_source_has_nothing_left() -> None:
    world = closed()
    world.rows["a"].clear()
    world.records.clear()
    later = Window(SPAN.end, SPAN.end + 10 * MINUTE)
    both = Window(SPAN.start, later.end)
    report = Process(world, shrink=Shrink).fill(both, again=True)
    assert (report.removed_rows, world.exported(), len(world.objects)) == (10, [], 1)
