"""Verifications and healings: whose progress a result shows, and what becomes of one that never runs or breaks off."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from app.core.errors import Transient
from app.core.runs import Job, Report, Stop
from app.core.verify import NOTHING, PartitionWindow, WindowContent
from app.core.windows import Window
from app.db.state import open_state
from app.ops.delivery_map import DeliveryMaps
from app.ops.verification import Verifications

NOW = datetime(2026, 2, 9, 12, tzinfo=UTC)
HOUR = timedelta(hours=1)
SPAN = Window(NOW - 3 * HOUR, NOW)
JOB = Job("p", 60, lambda _: Report())


class Equal:
    """Both ends are equal; reading the source may break."""

    def __init__(self, source: Callable[[], WindowContent] = lambda: NOTHING) -> None:
        self._source = source

    def partitions(self, span: Window) -> Sequence[str]:
        return ["one"]

    def slots(self, span: Window, partition: str | None) -> Iterator[PartitionWindow]:
        yield from (PartitionWindow("one", Window(NOW - (n + 1) * HOUR, NOW - n * HOUR)) for n in (2, 1, 0))

    def source(self, slot: PartitionWindow) -> WindowContent:
        return self._source()

    def destination(self, slot: PartitionWindow) -> WindowContent:
        return NOTHING

    def heal(self, context: Any, slot: PartitionWindow) -> Report:
        raise AssertionError("nothing differs")


class Running:
    """The context of a run."""

    stop = Stop()

    class progress:  # noqa: N801 - stands for an attribute
        @staticmethod
        def advance(**_: int) -> None: ...


@pytest.fixture
def made(tmp_path: Path) -> Iterator[Callable[[Equal], Verifications]]:
    ticks = iter(range(1000))
    with closing(open_state("", tmp_path)) as state:
        maps = DeliveryMaps({}, state.pages, lambda: NOW)
        yield lambda ends: Verifications({"p": lambda _: ends}, Stop(), lambda: NOW + next(ticks) * HOUR, maps)


def queued(proofs: Verifications) -> Job:
    """Ask for a healing; the job that does it."""
    taken: list[Job] = []
    proofs.heal("p", SPAN, None, "me", lambda other: taken.append(other(JOB)))
    return taken[0]


def test_a_healing_that_no_queue_took_is_not_shown_as_under_way(made: Callable[[Equal], Verifications]) -> None:
    def full(_: object) -> None:
        raise Transient("10 backfills are waiting already", "try again")

    proofs = made(Equal())
    with pytest.raises(Transient):
        proofs.heal("p", SPAN, None, "me", full)
    assert proofs.heals() == []


def test_the_windows_of_an_earlier_healing_are_not_counted_in_the_one_that_waits(
    made: Callable[[Equal], Verifications],
) -> None:
    proofs = made(Equal())
    first, second = queued(proofs), queued(proofs)
    first.work(Running())  # type: ignore[arg-type]
    (shown,) = proofs.heals()
    assert (shown.counts, shown.ended_at) == ({}, None)
    second.work(Running())  # type: ignore[arg-type]
    (shown,) = proofs.heals()
    assert (shown.counts, shown.ended_at is not None, shown.equal) == ({"=": 3}, True, True)


def test_a_healing_that_an_unexpected_error_ended_has_ended(made: Callable[[Equal], Verifications]) -> None:
    def broken() -> WindowContent:
        raise RuntimeError

    proofs = made(Equal(broken))
    with pytest.raises(RuntimeError):
        queued(proofs).work(Running())  # type: ignore[arg-type]
    (shown,) = proofs.heals()
    assert (shown.ended_at is not None, shown.error) == (True, "the verification was interrupted")
