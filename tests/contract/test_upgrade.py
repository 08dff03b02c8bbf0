"""An upgrade of the state while a process of an older version still runs, on SQLite and PostgreSQL: of the versions
before the two formats that had the first and the last fence.

`state_before_.../` hold the queries of these versions, word for word, and what they do is done here with them alone.
"""

import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from app.core.errors import LeaseLost, Permanent
from app.core.ledger import Ledger
from app.core.pipeline import Commit
from app.core.runs import Outcome
from app.db.database import Database, Row, load_queries, sql_directory
from app.db.migrations import MigratedDatabase, open_database
from app.db.state import FILE, State, open_state

HERE = Path(__file__).parent
OLD = "host:1:abc"
AT = datetime(2026, 2, 7, 12, tzinfo=UTC)


@dataclass(frozen=True)
class OldProcess:
    """A process of an older version: its own connection, its own SQL. `mark`: with what its owners began."""

    database: Database
    queries: Mapping[str, str]
    mark: str

    def rows(self, query: str, **params: Any) -> list[Row]:
        with self.database.transaction() as session:
            return session.rows(self.queries[query], **params)

    def acquire(self, name: str = "influx_to_s3") -> Row | None:
        of = {"free": self.mark, "watched_generation": 0, "watched_expires_at": None}
        return next(iter(self.rows("acquire", name=name, owner=self.mark + OLD, ttl_seconds=30.0, **of)), None)

    def commits(self, lease: Row, meanwhile: Callable[[], object] = lambda: None) -> bool:
        """As it committed: the lease first, then the checkpoint, in one transaction; whether anything was written."""
        with self.database.transaction() as session:
            of = {"name": "influx_to_s3", "owner": self.mark + OLD, "generation": lease["generation"]}
            fenced = session.rows(self.queries["fence"], **of)
            if not fenced:
                return False
            meanwhile()
            summary = {"cursor_at": AT, "high_watermark_at": AT, "key": "k", "rows": 1}
            now_at = fenced[0]["now_at"]
            of_now = {"pipeline": "influx_to_s3", "partition": "D1", "now_at": now_at, "until_at": now_at}
            return session.run(self.queries["save_checkpoint"], **of_now, **summary) == 1

    def saves_run(self, run_id: str) -> None:
        numbers = dict.fromkeys(("rows", "bytes", "windows", "late_rows", "corrected_rows", "new_rows"), 1)
        texts = {"job": "influx_to_s3", "outcome": "ok", "failures": "[]", "error": "", "hint": "", "ledger": "{}"}
        with self.database.transaction() as session:
            times = {"started_at": AT, "ended_at": AT + timedelta(seconds=1)}
            session.run(self.queries["save_run"], run_id=run_id, more=False, **numbers, **texts, **times)


@dataclass(frozen=True)
class Place:
    """A database of an older version, and how to open it as this version does."""

    old: OldProcess
    open_new: Callable[[], State]


@pytest.fixture(params=[("ledger", "0006", ""), ("short_records", "0026", "v3|")], ids=lambda version: version[0])
def before(request: pytest.FixtureRequest) -> tuple[str, str, str]:
    """Which version: before what, its first migration, and the mark of its owners."""
    version: tuple[str, str, str] = request.param
    return version


@pytest.fixture(params=["sqlite", "postgres"])
def place(request: pytest.FixtureRequest, tmp_path: Path, before: tuple[str, str, str]) -> Iterator[Place]:
    what, first, mark = before
    url = ""
    if request.param == "postgres":
        url = request.getfixturevalue("postgres_server").new_database()
    folder = tmp_path / "before" / "state"
    (folder / "migrations").mkdir(parents=True)
    for path in (sql_directory() / "state" / "migrations").iterdir():
        if path.name < first:
            shutil.copy(path, folder / "migrations")
    with closing(open_database(url or f"sqlite:///{tmp_path / FILE}", variables="X")) as database:
        MigratedDatabase(database, folder).prepare()
        old = OldProcess(database, load_queries(HERE / f"state_before_{what}", database.dialect), mark)
        yield Place(old, lambda: open_state(url, tmp_path))


@pytest.fixture
def new(place: Place) -> Iterator[State]:
    with closing(place.open_new()) as state:
        yield state


def migrated(place: Place) -> list[Row]:
    with place.old.database.transaction() as session:
        return session.rows("SELECT name FROM headwater_migrations")


def test_a_lease_of_the_version_before_ends_and_its_commit_writes_nothing(place: Place, new: State) -> None:
    lease = place.old.acquire()
    assert lease
    assert place.old.commits(lease), "before the upgrade"
    new.ping()
    assert not place.old.commits(lease)
    held = {"name": "influx_to_s3", "owner": place.old.mark + OLD, "generation": lease["generation"]}
    assert place.old.rows("renew", **held, ttl_seconds=30.0) == []
    assert place.old.acquire() is None, "it finds the job held by another process"
    assert place.old.acquire("a job that never ran") is None


def test_a_commit_that_is_under_way_is_waited_for(place: Place, new: State) -> None:
    lease = place.old.acquire()
    assert lease
    with ThreadPoolExecutor(1) as pool:
        upgrades: list[Future[None]] = []

        def upgrade() -> None:
            upgrades.append(pool.submit(new.ping))
            time.sleep(0.3)
            assert not upgrades[0].done()

        assert place.old.commits(lease, upgrade)
        upgrades[0].result(30)
    assert new.checkpoints.cursors("influx_to_s3") == {"D1": AT}
    assert not place.old.commits(lease)


def test_this_version_takes_over_at_once_with_a_generation_that_was_never_used(place: Place, new: State) -> None:
    before = place.old.acquire()
    assert before
    lease = new.leases.acquire("influx_to_s3", "host:2:def", 30.0)
    assert lease
    assert lease.generation > before["generation"]
    assert place.old.acquire() is None
    new.checkpoints.commit("influx_to_s3", "D1", Commit((), AT), new.leases.renew(lease, 30.0))
    new.leases.release(lease)
    assert place.old.acquire() is None, "also not one that was given back"
    assert new.leases.acquire("influx_to_s3", "host:3:ghi", 30.0)
    with pytest.raises(LeaseLost):
        new.checkpoints.commit("influx_to_s3", "D1", Commit((), AT), lease)


def test_an_owner_cannot_be_taken_for_one_of_the_other_version(place: Place, new: State) -> None:
    new.ping()
    assert new.leases.acquire("influx_to_s3", OLD, 30.0)
    assert place.old.acquire() is None, "the same text is another owner there"


def test_runs_of_the_version_before_have_no_ledger_and_can_still_be_saved(place: Place, new: State) -> None:
    place.old.saves_run("before")
    new.ping()
    place.old.saves_run("after")
    found = new.runs.recent(None, 10)
    assert {run.run_id for run in found} == {"before", "after"}
    assert all(run.report.ledger == Ledger() and run.outcome is Outcome.OK for run in found)
    assert list(new.runs.ledger_totals()) == []


def test_a_database_that_a_newer_version_has_migrated_is_refused_before_anything_is_applied(
    place: Place, new: State
) -> None:
    applied = {row["name"] for row in migrated(place)}
    with place.old.database.transaction() as session:
        session.run("INSERT INTO headwater_migrations (name, checksum) VALUES ('state/0999_later', 'x')")
        session.run("INSERT INTO headwater_migrations (name, checksum) VALUES ('dwh/0999_theirs', 'x')")
    with pytest.raises(Permanent, match=r"a newer version .*state/0999_later\)") as refused:
        new.ping()
    assert "restore a backup" in refused.value.hint
    assert {row["name"] for row in migrated(place)} - applied == {"state/0999_later", "dwh/0999_theirs"}
