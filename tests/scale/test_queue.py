"""The queue on a real PostgreSQL: its tables, what is sent twice, and workers that run what is sent."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import psycopg
import pytest

from app.config.environment import load_settings
from app.core.errors import BadSettings, Permanent, Transient
from app.core.ledger import Ledger, Tally
from app.core.runs import Context, Failure, Job, LeaseTerms, Report, RunServices, Stop
from app.db.state import State, open_state
from app.db.workers import StepReport
from app.ops.scheduler import Scheduler, Workload
from app.scale.queue import JOBS, STEPS, Workers, consume, install
from given_settings import loaded
from postgres import PostgresServer

REPORT = Report(
    rows=5,
    more=True,
    failures=(Failure("D1", "no \x00", "look"),),
    ledger=Ledger("values", {"ü": Tally(counted=5, new=4, waiting=1)}),
    written_new_rows=4,
)


@pytest.fixture
def url(postgres_server: PostgresServer) -> str:
    return postgres_server.new_database()


@pytest.fixture
def queue(state: State, url: str) -> Iterator[Workers]:
    with closing(
        Workers(loaded({"SCALE_ENGINE": "procrastinate", "CHECKPOINT_DATABASE_URL": url}), state, lambda _: None)
    ) as queue:
        yield queue


@pytest.fixture
def state(url: str, tmp_path: Path) -> Iterator[State]:
    with closing(open_state(url, tmp_path)) as state:
        yield state


def test_its_tables_are_made_once_whoever_begins(state: State, url: str) -> None:
    threads = [threading.Thread(target=install, args=(state.database,)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    install(state.database)
    with psycopg.connect(url) as connection:
        found = connection.execute("SELECT to_regclass('procrastinate_jobs') IS NOT NULL").fetchone()
    assert found == (True,)


def test_the_tables_of_a_newer_version_are_left_alone(state: State) -> None:
    install(state.database)
    with state.database.transaction() as session:
        session.run("INSERT INTO headwater_migrations (name, checksum) VALUES ('procrastinate/99', '')")
    with pytest.raises(Permanent, match="a newer version of Headwater"):
        install(state.database)


def test_a_database_that_was_made_anew_gets_its_tables_again(queue: Workers, url: str) -> None:
    queue.send("csv", "schedule")
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("DROP SCHEMA public CASCADE")
        connection.execute("CREATE SCHEMA public")
    until(lambda: sent(queue))
    assert queue.look().waiting == {JOBS: 1, STEPS: 0}


def test_what_waits_already_is_not_added(queue: Workers) -> None:
    queue.send("csv", "schedule")
    queue.send("csv", "a key")
    queue.send("other", "schedule")
    assert queue.send_step("influx_to_s3/1", "run", {})
    assert not queue.send_step("influx_to_s3/1", "run", {})
    assert queue.look().waiting == {JOBS: 2, STEPS: 1}


@pytest.mark.slow
def test_workers_run_what_is_sent_and_go_on_after_a_restart_of_the_database(
    queue: Workers, url: str, postgres_server: PostgresServer
) -> None:
    with consuming(queue, url) as found:
        queue.send("csv", "a key")
        queue.send_step("influx_to_s3/1", "run", {"a": ["ü", 1]})
        until(lambda: len(found) == 2)
        assert sorted(found, key=str) == [("csv", False, "a key"), ("influx_to_s3/1", "run", {"a": ["ü", 1]})]
        postgres_server.restart_immediately()
        until(lambda: sent(queue))
        until(lambda: ("after", False, "schedule") in found)
        assert queue.look().waiting == {JOBS: 0, STEPS: 0}


@contextmanager
def consuming(queue: Workers, url: str) -> Iterator[list[object]]:
    """A worker, and what it ran."""
    found: list[object] = []
    stop = Stop()
    thread = threading.Thread(
        target=lambda: consume(
            url,
            stop,
            prepare=lambda: queue.prepare(again=True),
            run_job=lambda name, more, by: found.append((name, more, by)),
            run_step=lambda step, plan_id, plan: found.append((step, plan_id, plan)),
            heartbeat_seconds=0.5,
            ttl_seconds=2.0,
        )
    )
    thread.start()
    try:
        yield found
    finally:
        stop.ask("the test is over")
        thread.join()


@pytest.mark.slow
def test_workers_go_on_when_the_queue_is_that_of_a_backup(queue: Workers, url: str) -> None:
    """A worker, a task of a worker that died, and tasks that wait, as they were when the backup was made."""
    with consuming(queue, url) as found, psycopg.connect(url, autocommit=True) as database:
        queue.send("before", "schedule")
        until(lambda: found)
        database.execute("DELETE FROM procrastinate_workers")
        database.execute(
            "INSERT INTO procrastinate_workers (id, last_heartbeat) OVERRIDING SYSTEM VALUE"
            " VALUES (9000, now() - INTERVAL '1 day')"
        )
        for status, worker in (("todo", None), ("doing", 9000), ("doing", None)):
            database.execute(
                "INSERT INTO procrastinate_jobs (queue_name, task_name, lock, queueing_lock, args, status, worker_id)"
                " VALUES ('steps', 'step', NULL, %s, %s, %s, %s)",
                (
                    f"steps/{status}{worker}" if status == "todo" else None,
                    '{"step": "influx_to_s3/1", "plan_id": "old", "plan": {}}',
                    status,
                    worker,
                ),
            )
        until(lambda: ("influx_to_s3/1", "old", {}) in found)
        assert queue.send_step("influx_to_s3/1", "new", {})
        until(lambda: ("influx_to_s3/1", "new", {}) in found)
        queue.send("after", "schedule")
        until(lambda: ("after", False, "schedule") in found)
        until(lambda: not database.execute("SELECT 1 FROM procrastinate_jobs WHERE status = 'doing'").fetchall(), 40)


def sent(queue: Workers) -> bool:
    with suppress(Transient, Permanent):
        queue.send("after", "schedule")
        return True
    return False


def until(holds: Callable[[], object], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("dialect", ["sqlite", "postgres"])
def test_a_report_comes_back_once(new_state: Callable[[str], State], dialect: str) -> None:
    workers = new_state(dialect).workers
    workers.save_report("influx_to_s3", StepReport("run", "influx_to_s3/1", Report()))
    done = StepReport("run", "influx_to_s3/1", REPORT, {"put": 3, "read_unit": 0.5})
    workers.save_report("influx_to_s3", done)  # the same step, once more
    assert list(workers.take_reports("influx_to_s3")) == [done]
    assert list(workers.take_reports("influx_to_s3")) == []


@pytest.mark.parametrize("dialect", ["sqlite", "postgres"])
def test_workers_are_known_while_they_are_seen(new_state: Callable[[str], State], dialect: str) -> None:
    state = new_state(dialect)
    state.workers.see("a")
    state.workers.see("a")
    state.workers.see("b")
    assert state.workers.alive(30) == 2
    state.workers.forget("a")
    assert (state.workers.alive(30), state.workers.alive(-1)) == (1, 0)
    lease = state.leases.acquire("influx_to_s3/1", "a", 30)
    state.leases.acquire("influx_to_s3_reconcile", "a", 30)
    assert lease is not None
    assert state.workers.parts_held("influx_to_s3") == 1
    state.leases.release(lease)
    assert state.workers.parts_held("influx_to_s3") == 0


def test_a_queue_is_refused_without_a_postgresql() -> None:
    with pytest.raises(BadSettings) as refused:
        load_settings({"SCALE_ENGINE": "procrastinate"}, None)
    (fault,) = refused.value.faults
    needed = "set CHECKPOINT_DB_HOST, _NAME, _USER and _PASSWORD, or remove SCALE_ENGINE"
    assert fault == f"SCALE_ENGINE='procrastinate': needs checkpoints in PostgreSQL: {needed}"


class Elsewhere:
    def __init__(self) -> None:
        self.sent: list[str] = []

    def send(self, job: str, by: str) -> None:
        self.sent.append(f"{job} by {by}")

    def look(self) -> Workload:
        return Workload(0, {}, 0, 0)

    def close(self) -> None:
        """Nothing is open."""


def test_jobs_are_sent_but_those_whose_files_are_here(new_state: Callable[[str], State]) -> None:
    state, elsewhere, ran, stop = new_state("sqlite"), Elsewhere(), [], Stop()

    def work(context: Context) -> Report:
        ran.append(context.lease.name)
        return Report()

    services = RunServices(state.clock, state.leases, state.runs, LeaseTerms("me"), lambda *_: None)
    jobs = [Job("far", 60, work), Job("near", 60, work, here=True)]
    scheduler = Scheduler(
        jobs, services, stop, {"far": lambda context, _: work(context)}, state.pauses, elsewhere=elsewhere
    )
    scheduler.start()
    try:
        until(lambda: elsewhere.sent and ran)
        assert (elsewhere.sent, ran) == (["far by schedule"], ["near"])
    finally:
        scheduler.close(5)
