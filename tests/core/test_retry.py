"""What is tried again, how often, and how long is waited between."""

import time
from collections.abc import Callable

import pytest

from app.core.errors import AppError, Conflict, LeaseLost, Permanent, Rejected, Stopped, Transient
from app.core.retry import LEAST_REST_SECONDS, RequestPacer, RetryPolicy, asked_seconds, pause_seconds, retry
from app.core.runs import Stop

POLICY = RetryPolicy(attempts=4, first_seconds=1, cap_seconds=3)


class Pauses:
    """Waits for nothing, and notes how long it should have; the pause of number `stopped_at` is a stop."""

    def __init__(self, stopped_at: int = -1) -> None:
        self.seconds: list[float] = []
        self._stopped_at = stopped_at

    def pause(self, seconds: float) -> None:
        self.seconds.append(seconds)
        if len(self.seconds) == self._stopped_at:
            raise Stopped("asked to")


def failing(*errors: AppError) -> Callable[[], str]:
    """Fails with each of the errors in turn, then works."""
    left = list(errors)

    def act() -> str:
        if left:
            raise left.pop(0)
        return "done"

    return act


def test_what_passes_is_tried_again_after_growing_pauses_up_to_the_cap() -> None:
    pauses = Pauses()
    assert retry(failing(*[Transient("away")] * 3), POLICY, pauses, lambda: 0.5) == "done"
    assert pauses.seconds == [0.5, 1, 1.5]


def test_the_last_error_is_raised_when_the_attempts_are_used_up() -> None:
    pauses, errors = Pauses(), [Transient(f"{number}") for number in range(5)]
    with pytest.raises(Transient, match="3"):
        retry(failing(*errors), POLICY, pauses, lambda: 1)
    assert pauses.seconds == [1, 2, 3]


@pytest.mark.parametrize(
    "error", [Conflict("changed"), LeaseLost("gone"), Permanent("wrong", "set"), Rejected("no", "mend")]
)
def test_what_does_not_pass_by_itself_is_not_tried_again(error: AppError) -> None:
    pauses = Pauses()
    with pytest.raises(type(error)):
        retry(failing(error), POLICY, pauses, lambda: 1)
    assert pauses.seconds == []


def test_a_stop_ends_the_waiting() -> None:
    with pytest.raises(Stopped):
        retry(failing(Transient("away")), POLICY, Pauses(stopped_at=1), lambda: 1)


def test_a_policy_needs_an_attempt() -> None:
    with pytest.raises(ValueError, match="at least one attempt"):
        retry(failing(), RetryPolicy(attempts=0), Pauses(), lambda: 1)
    assert retry(failing(), RetryPolicy(attempts=1), Pauses(), lambda: 1) == "done"


def test_the_other_side_is_given_the_time_it_asks_for_up_to_the_cap() -> None:
    assert [pause_seconds(POLICY, 0, asked, 0.5) for asked in (None, 0.2, 2, 100)] == [0.5, 0.5, 2, 3]
    assert retry(failing(Transient("busy", retry_after_seconds=2)), POLICY, pauses := Pauses(), lambda: 0) == "done"
    assert pauses.seconds == [2]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("", None), ("7", 7.0), (" 30 ", 30.0), ("1.5", None), ("\N{SUPERSCRIPT TWO}", None), ("Wed, 21 Oct 2026", None)],
)
def test_a_retry_after_that_is_no_number_asks_for_nothing(text: str, seconds: float | None) -> None:
    assert asked_seconds(text) == seconds


def test_questions_take_no_more_than_their_share_and_short_ones_wait_for_nothing() -> None:
    stop, asked = Stop(), 0.0
    pace = RequestPacer(stop, 0.1)
    began = time.monotonic()
    for number in range(8):
        at = time.monotonic()
        pace.ask(lambda: time.sleep(0.015))
        if number == 0:
            assert time.monotonic() - at < LEAST_REST_SECONDS
        asked += 0.015
    assert time.monotonic() - began >= 10 * asked - 2 * LEAST_REST_SECONDS
