"""What the SQL stores do when the server, the network or the process itself is taken away."""

import os
import re
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

import pytest

from app.core.errors import Transient
from app.core.pipeline import Commit
from app.db.database import Session, load_queries, sql_directory
from app.db.leases import identity
from app.db.postgres import PostgresDatabase
from app.db.state import State, open_state
from postgres import PostgresServer

pytestmark = pytest.mark.slow

START = datetime(2026, 2, 7, tzinfo=UTC)
HOLDER = """
import sys
from datetime import UTC, datetime
from pathlib import Path
from app.core.errors import AppError
from app.core.pipeline import Commit
from app.db.state import open_state
state = open_state(sys.argv[1], Path())
lease = state.leases.acquire("job", "paused", 0.3)
print("ready", flush=True)
sys.stdin.readline()
try:
    state.checkpoints.commit("p", "d", Commit(cursor_at=datetime(2030, 1, 1, tzinfo=UTC)), lease)
except AppError as error:
    print(type(error).__name__, flush=True)
"""
SLEEPER = """
import sys
from pathlib import Path
from app.db.leases import identity
from app.db.database import load_queries, sql_directory
from app.db.state import open_state
state = open_state(sys.argv[1], Path())
fence = load_queries(sql_directory() / "state", "postgres")["fence"]
lease = state.leases.acquire("job", "paused", 1.0)
with state.database.transaction() as session:
    assert session.rows(fence, **identity(lease))
    print("ready", flush=True)
    sys.stdin.readline()
"""
WRITER = """
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from app.core.pipeline import Commit
from app.db.state import open_state
state = open_state("", Path(sys.argv[1]))
lease = state.leases.acquire(sys.argv[2], "owner", 60)
for number in range(int(sys.argv[3])):
    at = datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=number)
    state.checkpoints.commit(sys.argv[2], "d", Commit(cursor_at=at), lease)
    print(at.isoformat(), flush=True)
"""


@pytest.fixture
def state(postgres_server: PostgresServer, tmp_path: Path) -> Iterator[State]:
    with closing(open_state(postgres_server.new_database(), tmp_path)) as state:
        state.ping()
        yield state


def commit(state: State) -> None:
    lease = state.leases.acquire("job", "one", 30.0)
    assert lease
    state.checkpoints.commit("p", "d", Commit(cursor_at=START), lease)


def state_url(state: State, server: PostgresServer) -> str:
    return server.url(state.database.place.rpartition("/")[2])


def test_a_restart_in_mid_transaction_is_transient_and_the_next_use_works(
    state: State, postgres_server: PostgresServer
) -> None:
    def interrupted(session: Session) -> None:
        session.run("INSERT INTO leases VALUES ('half', 'x', 1, now())")
        postgres_server.restart_immediately()
        session.run("INSERT INTO leases VALUES ('done', 'x', 1, now())")

    with pytest.raises(Transient, match="PostgreSQL at 127") as caught, state.database.transaction() as session:
        interrupted(session)
    assert "CHECKPOINT_DB_HOST" in caught.value.hint or "log" in caught.value.hint
    commit(state)
    with state.database.transaction() as session:
        assert [row["name"] for row in session.rows("SELECT name FROM leases")] == ["job"]


def test_a_restart_between_two_uses_is_not_noticed_by_any_idle_connection(
    state: State, postgres_server: PostgresServer
) -> None:
    together = threading.Barrier(4)

    def hold(_: int) -> None:
        with state.database.transaction() as session:
            session.rows("SELECT 1 AS one")
            together.wait(10)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(hold, range(4)))
        postgres_server.restart_immediately()
        list(pool.map(hold, range(4)))


def test_a_server_that_is_away_is_transient_at_once_and_is_found_again_by_itself(
    state: State, postgres_server: PostgresServer, tmp_path: Path
) -> None:
    name = postgres_server.new_database()
    postgres_server.stop()
    try:
        with closing(open_state(name, tmp_path)) as started_while_away:
            for asked in (state, started_while_away, state):
                before = time.monotonic()
                with pytest.raises(Transient) as caught:
                    asked.ping()
                assert time.monotonic() - before < 20
                assert f"PostgreSQL at 127.0.0.1:{postgres_server.port}/" in caught.value.message
                # closed: by a child of the server that had not come to closing the port before it ended
                assert re.search("refused|closed the connection", caught.value.message)
            postgres_server.start()
            commit(started_while_away)
            commit(state)
    finally:
        if not postgres_server.running:
            postgres_server.start()


@pytest.mark.slow
def test_a_server_that_does_not_answer_is_transient_after_its_five_seconds(
    postgres_server: PostgresServer, tmp_path: Path
) -> None:
    with closing(open_state(postgres_server.new_database(), tmp_path)) as state:
        thaw = postgres_server.freeze()
        try:
            before = time.monotonic()
            with pytest.raises(Transient, match="timeout"):
                state.ping()
            assert 4 < time.monotonic() - before < 20
        finally:
            thaw()
        commit(state)


def test_a_server_that_freezes_in_mid_transaction_does_not_hold_us_for_ever(postgres_server: PostgresServer) -> None:
    with closing(PostgresDatabase(postgres_server.new_database(), variables="X", answer_seconds=2.0)) as database:
        with database.transaction() as session:
            session.rows("SELECT 1 AS one")

        def frozen() -> None:
            with database.transaction() as session:
                session.rows("SELECT 1 AS one")
                thaw = postgres_server.freeze()
                try:
                    session.rows("SELECT 2 AS two")
                finally:
                    thaw()

        with pytest.raises(Transient, match="timeout"):
            frozen()
        with database.transaction() as session:
            assert session.rows("SELECT 3 AS three") == [{"three": 3}]


def test_a_deadlock_is_transient_for_one_and_nothing_for_the_other(state: State) -> None:
    for name in ("a", "b"):
        assert state.leases.acquire(name, "one", 30.0)
    together = threading.Barrier(2)

    def both(names: str) -> bool:
        try:
            with state.database.transaction() as session:
                session.run("UPDATE leases SET generation = generation + 1 WHERE name = :name", name=names[0])
                together.wait(10)
                session.run("UPDATE leases SET generation = generation + 1 WHERE name = :name", name=names[1])
        except Transient:
            return False
        return True

    with ThreadPoolExecutor(2) as pool:
        assert sorted(pool.map(both, ("ab", "ba"))) == [False, True]


def test_a_paused_holders_commit_is_refused_after_a_take_over(state: State, postgres_server: PostgresServer) -> None:
    command = [sys.executable, "-c", HOLDER, state_url(state, postgres_server)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "ready\n"
        os.kill(holder.pid, signal.SIGSTOP)
        time.sleep(0.35)
        taken = state.leases.acquire("job", "other", 30.0)
        assert taken is not None
        state.checkpoints.commit("p", "d", Commit(cursor_at=START), taken)
        os.kill(holder.pid, signal.SIGCONT)
        assert holder.communicate("\n", timeout=30)[0] == "LeaseLost\n"
    assert dict(state.checkpoints.cursors("p")) == {"d": START}


def test_a_take_over_waits_for_a_commit_that_has_passed_the_fence(state: State) -> None:
    fence = load_queries(sql_directory() / "state", "postgres")["fence"]
    lease = state.leases.acquire("job", "one", 1.0)
    assert lease
    with ThreadPoolExecutor(1) as pool:
        with state.database.transaction() as session:
            assert session.rows(fence, **identity(lease))
            time.sleep(1.05)
            taking_over = pool.submit(state.leases.acquire, "job", "two", 30.0)
            time.sleep(0.2)
            assert not taking_over.done()
        taken = taking_over.result(10)
    assert taken is not None
    assert taken.generation == 2


@pytest.mark.slow
def test_a_holder_that_is_paused_in_mid_transaction_holds_up_a_take_over_for_seconds_only(
    state: State, postgres_server: PostgresServer
) -> None:
    command = [sys.executable, "-c", SLEEPER, state_url(state, postgres_server)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "ready\n"
        os.kill(holder.pid, signal.SIGSTOP)
        time.sleep(1.05)
        try:
            assert state.leases.acquire("job", "other", 30.0)
        finally:
            holder.kill()


def test_two_processes_write_one_sqlite_file_without_being_refused(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    writers = [
        subprocess.Popen([*command, name, "300"], stdout=subprocess.PIPE, stderr=subprocess.PIPE) for name in "ab"
    ]
    ended = [(*writer.communicate(timeout=60), writer.returncode) for writer in writers]
    assert [(out.count(b"\n"), err, code) for out, err, code in ended] == [(300, b"", 0)] * 2


def test_the_switch_to_wal_waits_for_a_writer_although_sqlite_itself_would_not(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "state.db", isolation_level=None, check_same_thread=False)) as writer:
        writer.execute("BEGIN IMMEDIATE")
        ending = threading.Timer(0.2, writer.execute, ["COMMIT"])
        ending.start()
        with closing(open_state("", tmp_path)) as state:
            state.ping()
        ending.join()


def test_a_kill_in_the_middle_of_writes_leaves_a_sqlite_file_with_every_commit(tmp_path: Path) -> None:
    for attempt in range(3):
        command = [sys.executable, "-c", WRITER, str(tmp_path / str(attempt)), "job", "1000000"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout is not None
            lines = [writer.stdout.readline() for _ in range(50 + attempt)]
            writer.kill()
            lines.extend(line for line in writer.stdout if line.endswith("\n"))
        with closing(open_state("", tmp_path / str(attempt))) as state:
            assert state.checkpoints.cursors("job")["d"] >= datetime.fromisoformat(lines[-1].strip())
            with state.database.transaction() as session:
                assert session.rows("PRAGMA integrity_check") == [{"integrity_check": "ok"}]
