"""Every sentence of the `Leases` contract, over memory, SQLite and PostgreSQL."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import pytest

from app.core.errors import LeaseLost
from app.core.runs import Leases
from app.db.state import State
from memory import MemoryLeases

LONG = 30.0
SHORT = 0.15
ENOUGH = 0.6  # for two questions, also of a busy machine


@pytest.fixture(params=["memory", "sqlite", "postgres"])
def leases(request: pytest.FixtureRequest, new_state: Callable[[str], State]) -> Leases:
    return MemoryLeases() if request.param == "memory" else new_state(request.param).leases


@pytest.fixture(params=["sqlite", "postgres"])
def state(request: pytest.FixtureRequest, new_state: Callable[[str], State]) -> State:
    return new_state(request.param)


def set_clock_back(state: State, days: int = 40) -> None:
    """As the leases stand when the database's clock was ahead by so much until now."""
    with state.database.transaction() as session:
        for row in session.rows("SELECT name, expires_at FROM leases"):
            ahead = row["expires_at"] + timedelta(days=days)
            session.run("UPDATE leases SET expires_at = :ahead WHERE name = :name", ahead=ahead, name=row["name"])


def test_a_free_lease_is_acquired_with_an_expiry_that_lies_ahead_by_its_ttl(leases: Leases) -> None:
    lease = leases.acquire("job", "one", LONG)
    assert lease is not None
    assert (lease.name, lease.owner, lease.generation) == ("job", "one", 1)
    assert abs(lease.expires_at - datetime.now(UTC) - timedelta(seconds=LONG)) < timedelta(seconds=5)
    assert lease.expires_at.utcoffset() == timedelta(0)


def test_another_owner_gets_none_while_the_lease_lives(leases: Leases) -> None:
    assert leases.acquire("job", "one", LONG)
    assert leases.acquire("job", "two", LONG) is None


def test_leases_of_different_names_do_not_touch_each_other(leases: Leases) -> None:
    assert leases.acquire("job", "one", LONG)
    assert leases.acquire("other", "two", LONG)


def test_exactly_one_of_eight_threads_gets_the_lease(leases: Leases) -> None:
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda number: leases.acquire("job", f"owner-{number}", LONG), range(8)))
    assert len([lease for lease in found if lease]) == 1


def test_an_expired_lease_can_be_taken_over_with_the_next_generation(leases: Leases) -> None:
    first = leases.acquire("job", "one", SHORT)
    assert first
    time.sleep(SHORT * 1.5)
    second = leases.acquire("job", "two", LONG)
    assert second
    assert second.generation == first.generation + 1
    assert LONG - 5 < leases.remaining_seconds("job") <= LONG, "the TTL of who took it over"


def test_an_expired_lease_is_taken_over_by_exactly_one_of_eight_threads(leases: Leases) -> None:
    leases.acquire("job", "one", SHORT)
    time.sleep(SHORT * 1.5)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda number: leases.acquire("job", f"owner-{number}", LONG), range(8)))
    assert [lease.generation for lease in found if lease] == [2]


def test_the_same_owner_may_acquire_again_and_gets_a_fresh_generation(leases: Leases) -> None:
    first, second = leases.acquire("job", "one", LONG), leases.acquire("job", "one", LONG)
    assert first
    assert second
    assert second.generation == first.generation + 1
    with pytest.raises(LeaseLost):
        leases.renew(first, LONG)


def test_a_renewed_lease_keeps_its_generation_and_lives_longer(leases: Leases) -> None:
    lease = leases.acquire("job", "one", ENOUGH)
    assert lease
    renewed = leases.renew(lease, LONG)
    assert renewed.generation == lease.generation
    assert renewed.expires_at > lease.expires_at
    time.sleep(ENOUGH * 1.05)
    assert leases.acquire("job", "two", LONG) is None


def test_an_expired_lease_cannot_be_renewed_even_when_nobody_took_it(leases: Leases) -> None:
    lease = leases.acquire("job", "one", SHORT)
    assert lease
    time.sleep(SHORT * 1.5)
    with pytest.raises(LeaseLost, match="job"):
        leases.renew(lease, LONG)


def test_a_lease_that_was_taken_over_cannot_be_renewed(leases: Leases) -> None:
    lease = leases.acquire("job", "one", SHORT)
    assert lease
    time.sleep(SHORT * 1.5)
    assert leases.acquire("job", "two", LONG)
    with pytest.raises(LeaseLost):
        leases.renew(lease, LONG)


def test_a_released_lease_is_free_at_once_and_its_generation_goes_on(leases: Leases) -> None:
    lease = leases.acquire("job", "one", LONG)
    assert lease
    leases.release(lease)
    with pytest.raises(LeaseLost):
        leases.renew(lease, LONG)
    following = leases.acquire("job", "two", LONG)
    assert following
    assert following.generation == 2


def test_releasing_twice_does_nothing_more(leases: Leases) -> None:
    lease = leases.acquire("job", "one", LONG)
    assert lease
    leases.release(lease)
    leases.release(lease)
    assert leases.acquire("job", "two", LONG)


def test_releasing_a_lease_that_is_anothers_by_now_leaves_it_to_them(leases: Leases) -> None:
    lease = leases.acquire("job", "one", LONG)
    assert lease
    leases.release(lease)
    theirs = leases.acquire("job", "two", LONG)
    assert theirs
    leases.release(lease)
    assert leases.acquire("job", "three", LONG) is None
    assert leases.renew(theirs, LONG)


def test_releasing_an_older_generation_of_the_same_owner_leaves_the_newer_one(leases: Leases) -> None:
    older, newer = leases.acquire("job", "one", LONG), leases.acquire("job", "one", LONG)
    assert older
    assert newer
    leases.release(older)
    assert leases.acquire("job", "two", LONG) is None


def test_a_lease_says_how_long_it_lives_and_none_when_it_was_given_back(leases: Leases) -> None:
    assert leases.remaining_seconds("job") == 0
    lease = leases.acquire("job", "one", LONG)
    assert lease
    assert LONG - 5 < leases.remaining_seconds("job") <= LONG
    leases.release(lease)
    assert leases.remaining_seconds("job") == 0


def test_another_owners_lease_that_is_renewed_is_not_taken_over_however_long_it_is_watched(leases: Leases) -> None:
    lease = leases.acquire("job", "one", LONG)
    assert lease
    for _ in range(6):
        assert leases.acquire("job", "two", SHORT) is None
        time.sleep(SHORT * 0.6)
        lease = leases.renew(lease, LONG)


def test_a_lease_that_was_given_back_while_the_clock_was_ahead_is_free(state: State) -> None:
    lease = state.leases.acquire("job", "one", LONG)
    assert lease
    state.leases.release(lease)
    set_clock_back(state)
    assert state.leases.remaining_seconds("job") == 0
    assert state.leases.acquire("job", "two", LONG)


def test_a_lease_can_be_given_back_after_the_clock_has_passed_its_time(state: State) -> None:
    lease = state.leases.acquire("job", "one", LONG)
    assert lease
    set_clock_back(state, days=-40)
    state.leases.release(lease)
    set_clock_back(state, days=80)
    assert state.leases.acquire("job", "two", LONG)


def test_a_lease_in_the_future_that_nobody_renews_is_taken_over_after_one_ttl_of_watching(state: State) -> None:
    first = state.leases.acquire("job", "killed", ENOUGH)
    assert first
    set_clock_back(state)
    assert state.leases.watch_seconds("job", LONG) == ENOUGH
    watched_from = time.monotonic()
    while (second := state.leases.acquire("job", "two", ENOUGH)) is None:
        assert time.monotonic() - watched_from < ENOUGH * 5
        time.sleep(0.02)
    assert time.monotonic() - watched_from >= ENOUGH
    assert second.generation == first.generation + 1
    assert state.leases.remaining_seconds("job") <= ENOUGH
    assert state.leases.watch_seconds("job", LONG) == 0


def test_a_lease_in_the_future_whose_holder_lives_stays_with_it(state: State) -> None:
    lease = state.leases.acquire("job", "one", LONG)
    assert lease
    set_clock_back(state)
    for _ in range(4):
        assert state.leases.acquire("job", "two", SHORT) is None
        lease = state.leases.renew(lease, LONG)
        time.sleep(SHORT * 0.6)
    assert state.leases.remaining_seconds("job") <= LONG


def test_a_lease_with_a_longer_ttl_than_that_of_who_asks_is_not_taken_over_before_its_time(state: State) -> None:
    assert state.leases.acquire("job", "one", LONG)
    assert state.leases.watch_seconds("job", SHORT) == 0
    for _ in range(3):
        assert state.leases.acquire("job", "two", SHORT) is None
        time.sleep(SHORT)


def test_a_lease_in_the_future_whose_ttl_is_not_known_is_watched_for_that_of_who_asks(state: State) -> None:
    assert state.leases.acquire("job", "one", LONG)
    set_clock_back(state)
    with state.database.transaction() as session:
        session.run("UPDATE leases SET ttl_seconds = NULL")
    assert state.leases.watch_seconds("job", SHORT) == SHORT
    assert state.leases.acquire("job", "two", SHORT) is None
    time.sleep(SHORT * 1.5)
    assert state.leases.acquire("job", "two", SHORT)


def test_only_a_database_with_a_clock_of_its_own_says_when_a_lease_was_acquired(state: State) -> None:
    lease = state.leases.acquire("job", "one", LONG)
    assert lease
    if state.database.dialect == "sqlite":
        assert lease.acquired_at is None
    else:
        assert lease.acquired_at is not None
        assert lease.expires_at - lease.acquired_at <= timedelta(seconds=LONG)
        assert abs(lease.acquired_at - state.clocks.now()) < timedelta(seconds=5)


def test_jobs_go_by_the_clock_of_the_database_as_a_lease_tells_it_else_by_this_machines(state: State) -> None:
    before = state.clock()
    assert abs(before - datetime.now(UTC)) < timedelta(seconds=1)
    far = datetime(2031, 5, 5, tzinfo=UTC)
    state.clock.follow(far)
    assert timedelta() <= state.clock() - far < timedelta(seconds=5)
    assert state.leases.acquire("job", "one", LONG)
    near = abs(state.clock() - datetime.now(UTC)) < timedelta(seconds=5)
    assert near == (state.database.dialect == "postgres"), "SQLite has no clock to tell"
