"""What queries read is what one whole listing showed: not what a listing has found so far, and not what one left behind
that failed.
"""

import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from app.analytics.queries import Queries
from app.analytics.summaries import Summaries
from app.core.errors import Transient
from app.db.state import State
from app.object_store.port import ListingBatch
from lake import PREFIX, Lake, exported, local_lake

START = datetime(2026, 2, 1, tzinfo=UTC)


@pytest.fixture
def lake(new_state: Callable[[str], State], tmp_path: Path) -> Iterator[Lake]:
    with closing(local_lake(tmp_path / "lake", new_state("sqlite").summaries)) as made:
        made.now = START + timedelta(days=1)  # nothing is packed yet
        yield made


def put(lake: Lake, key: str, rows: int) -> None:
    lake.put(f"{key}.parquet", exported(f"D{key}", START, rows, draw=random.Random(rows)))  # noqa: S311 - test data


def counted(lake: Lake) -> tuple[int, int]:
    """Rows that a scan reads, and the devices that it sees."""
    total, devices, *_ = lake.from_objects("overview")[0]
    return total, devices


class Watched:
    """What is known, as it is; `before_known` is called with the versions that are asked for."""

    def __init__(self, facts: Any, before_known: Callable[[Any], None]) -> None:
        self._facts = facts
        self._before_known = before_known

    def __getattr__(self, name: str) -> Any:
        return getattr(self._facts, name)

    def known(self, versions: Any) -> Any:
        self._before_known(list(versions))
        return self._facts.known(versions)


class Failing:
    """The store; after so many `good` listings, one shows the first object and fails."""

    def __init__(self, store: Any) -> None:
        self._store = store
        self.good = 1

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def batches(self, prefix: str, objects: int) -> Iterator[ListingBatch]:
        self.good -= 1
        if self.good >= 0:
            yield from self._store.batches(prefix, objects)
            return
        first = next(self._store.list(prefix))
        yield ListingBatch(b"", lambda: [first])
        raise Transient("the second page failed")


def over(lake: Lake, store: Any, facts: Any) -> Summaries:
    """The lake's summaries, with another store or other facts."""
    lake.summaries = Summaries(store, facts, lake.engine, PREFIX, lambda: lake.now)
    lake.queries = Queries(lake.summaries, lake.objects(lake.engine), lake.engine)
    return lake.summaries


def test_a_query_during_a_listing_reads_each_object_once(lake: Lake) -> None:
    """The listing stands still where it has learnt the new version and not yet dropped the old one."""
    known: set[Any] = set()
    reached, go_on = threading.Event(), threading.Event()

    def before_known(versions: list[Any]) -> None:
        if known and known.issuperset(versions):  # what was there before is asked for again only to be dropped
            reached.set()
            assert go_on.wait(20)

    put(lake, "a", 100)
    put(lake, "b", 100)
    summaries = over(lake, lake.store, Watched(lake.facts, before_known))
    before = summaries.refresh()
    sources = summaries.sources(None, None, None)
    known.update(source.version for source in sources)
    put(lake, "a", 101)
    put(lake, "c", 50)
    with ThreadPoolExecutor(1) as other:
        refreshed = other.submit(summaries.refresh)
        assert reached.wait(20)
        try:
            assert counted(lake) == (201, 2), "the newest version, once, and nothing that no view has shown"
            assert summaries.holds(sources)
            assert summaries.view is before
        finally:
            go_on.set()
        assert refreshed.result().rows == 251
    assert counted(lake) == (251, 3)
    assert not summaries.holds(sources)


def test_a_listing_whose_second_page_fails_changes_nothing_that_a_query_sees(lake: Lake) -> None:
    store = Failing(lake.store)
    put(lake, "a", 100)
    put(lake, "b", 100)
    summaries = over(lake, store, lake.facts)
    before = summaries.refresh()
    put(lake, "a", 101)
    for _ in range(2):
        with pytest.raises(Transient, match="second page"):
            summaries.refresh()
        assert counted(lake) == (201, 2)
        assert summaries.view is before
    store.good = 1
    after = summaries.refresh()
    assert (after.rows, after.number) == (201, before.number + 1)
    assert counted(lake) == (201, 2)


def test_facts_that_another_process_removed_do_not_empty_what_queries_see(lake: Lake) -> None:
    store = Failing(lake.store)
    put(lake, "a", 100)
    put(lake, "b", 100)
    summaries = over(lake, store, lake.facts)
    before = summaries.refresh()
    (gone,) = summaries.sources("Db", None, None)
    lake.facts.forget([gone.version])
    store.good = 1  # it shows that something is missing; the next one, which learns everything again, fails
    with pytest.raises(Transient, match="second page"):
        summaries.refresh()
    assert summaries.view is before
    assert summaries.holds([gone])
    assert counted(lake)[0] >= 100, "what is still known is still read"
