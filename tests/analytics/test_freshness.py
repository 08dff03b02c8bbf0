"""How long /analytics waits between two listings."""

from app.analytics.service import LEAST_SECONDS, SHARE, pause_after


def test_two_listings_and_the_pause_between_fit_into_the_interval() -> None:
    for taken in (0.0, 0.3, 2.0, 4.0):
        assert 2 * taken + pause_after(taken, 0.05, 10) <= 10


def test_a_listing_that_computes_is_followed_by_a_pause_in_proportion_and_one_that_waits_is_not() -> None:
    assert pause_after(30, 5, 10) == SHARE * 5
    assert pause_after(30, 0.1, 10) == LEAST_SECONDS
    assert pause_after(3, 60, 10) == SHARE * 3, "what other threads used does not count"
