"""How long /analytics waits between two listings, how long it keeps answers, and what it holds on to meanwhile."""

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from traceback import walk_tb

import httpx
import pytest
from fastapi import FastAPI

from app.analytics import routes, service
from app.analytics.service import LEAST_SECONDS, SHARE, Analytics, pause_after
from app.core.closed_days import NO_TABLE, ListedVersion, ReportSpan, TableRows
from app.core.errors import Transient
from app.db.state import State
from app.object_store.local import LocalDirectory
from given_settings import loaded

DAY = 20_000


class RowsOfGoneObjects:
    """A table of closed days with rows of a day that no object has any more."""

    count = 1

    def rows(
        self,
        span: ReportSpan,
        changes: Mapping[int, int],
        objects: Callable[[int, int], Sequence[ListedVersion]],
    ) -> TableRows:
        del span, changes, objects
        return NO_TABLE

    def rows_at(self, instant: datetime, span: ReportSpan) -> TableRows:
        del instant, span
        return NO_TABLE

    def day_counts(self) -> Mapping[int, int]:
        return {DAY: self.count}

    def look_again(self) -> None:
        pass


@pytest.fixture
def analytics(new_state: Callable[[str], State], tmp_path: Path) -> Iterator[Analytics]:
    settings = loaded({"DATA_DIR": str(tmp_path), "ANALYTICS_REFRESH_SECONDS": "0.2"})
    store, facts = LocalDirectory(tmp_path / "objects"), new_state("sqlite").summaries
    made = service.build(
        settings, store, facts, lambda: ("", "", ""), lambda: datetime.now(UTC), table=RowsOfGoneObjects()
    )
    with closing(made.queries):
        made.workplace.enter()
        yield made
        made.workplace.leave()


def test_two_listings_and_the_pause_between_fit_into_the_interval() -> None:
    for taken in (0.0, 0.3, 2.0, 4.0):
        assert 2 * taken + pause_after(taken, 0.05, 10) <= 10


def test_a_listing_that_computes_is_followed_by_a_pause_in_proportion_and_one_that_waits_is_not() -> None:
    assert pause_after(30, 5, 10) == SHARE * 5
    assert pause_after(30, 0.1, 10) == LEAST_SECONDS
    assert pause_after(3, 60, 10) == SHARE * 3, "what other threads used does not count"


def test_an_error_that_many_requests_get_does_not_hold_their_frames(analytics: Analytics) -> None:
    analytics.refresher.trouble = trouble = Transient("the store is away", "wait")

    async def scenario() -> None:
        for _ in range(50):
            with pytest.raises(Transient):
                await routes.current_view(analytics)

    asyncio.run(scenario())
    assert len(list(walk_tb(trouble.__traceback__))) < 10


def test_an_answer_with_rows_of_the_table_is_asked_for_again_soon(analytics: Analytics) -> None:
    analytics.summaries.refresh()
    api = FastAPI()
    api.include_router(routes.build(analytics))

    async def scenario() -> list[str]:
        transport = httpx.ASGITransport(app=api)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            engines = []
            for rows in (1, 0, 0, 1):  # the table changes, the objects do not
                RowsOfGoneObjects.count = rows
                answer = await client.get("/analytics/overview")
                engines.append(answer.headers["Server-Timing"].partition(";")[0])
                await asyncio.sleep(0.3)
        return engines

    assert asyncio.run(scenario()) == ["duckdb", "summary", "summary", "summary"], "sums of the objects alone are kept"
