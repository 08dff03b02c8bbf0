"""Every sentence of the `Leases` contract, over memory, SQLite and PostgreSQL."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import pytest

from app.core.errors import LeaseLost
from app.core.runs import Leases
from app.stores.state import State
from memory import MemoryLeases

LONG = 30.0
SHORT = 0.15
ENOUGH = 0.6  # for two questions, also of a busy machine


@pytest.fixture(params=["memory", "sqlite", "postgres"])
def leases(request: pytest.FixtureRequest, new_state: Callable[[str], State]) -> Leases:
    return MemoryLeases() if request.param == "memory" else new_state(request.param).leases


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
