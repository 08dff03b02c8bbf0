"""A state file that is damaged in any way is moved aside and made anew; one that merely cannot be used now is left."""

import logging
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from app.core.errors import Permanent, Transient
from app.core.pipeline import Commit
from app.core.runs import Outcome, Run
from app.db.database import sql_directory
from app.db.migrations import MigratedDatabase, StateFile
from app.db.postgres import PostgresDatabase
from app.db.sqlite import FileConnection, SqliteDatabase
from app.db.state import FILE, State, open_state
from postgres import PostgresServer

AT = datetime(2026, 2, 7, tzinfo=UTC)
PAGE = 4096


def commit(state: State, partition: str = "d") -> None:
    lease = state.leases.acquire("job", "one", 30.0)
    assert lease
    state.checkpoints.commit("p", partition, Commit(cursor_at=AT), lease)
    state.leases.release(lease)


def used(folder: Path) -> Path:
    """A state with some pages of content; its file."""
    with closing(open_state("", folder)) as state:
        for number in range(50):
            commit(state, f"device-{number}")
            at = AT + timedelta(seconds=number)
            state.runs.save(Run(f"run {number}", "job", at, at, Outcome.OK, error="x" * 500))
    return folder / FILE


def moved(folder: Path) -> list[str]:
    """The databases that were moved aside; their companions go with them."""
    names = sorted(path.name for path in folder.glob(f"{FILE}.damaged-*"))
    return [name for name in names if not name.endswith(("-wal", "-shm"))]


def works(folder: Path) -> None:
    """The state can be used, at the second attempt at the latest, and holds what is committed to it."""
    with closing(open_state("", folder)) as state:
        for _ in range(2):
            try:
                state.check()
            except Transient:
                continue
        commit(state)
        assert state.checkpoints.cursors("p")["d"] == AT
        state.runs.save(Run("new", "job", AT, AT, Outcome.OK))
        assert state.runs.recent("job", 1)
        state.check()


def overwrite(file: Path, start: int, content: bytes) -> None:
    with file.open("r+b") as opened:
        opened.seek(start)
        opened.write(content)


def run_sql(file: Path, sql: str) -> None:
    with closing(sqlite3.connect(file)) as connection:
        connection.executescript(sql)


def cut(file: Path, part: float) -> None:
    os.truncate(file, int(file.stat().st_size * part))


def blank_middle(file: Path) -> None:
    for page in range(2, file.stat().st_size // PAGE):
        overwrite(file, page * PAGE, bytes(PAGE))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "text": lambda file: file.write_text("this is no database\n" * 100),
    "garbage": lambda file: file.write_bytes(bytes(number * 7 % 251 for number in range(20_000))),
    "zeros": lambda file: file.write_bytes(bytes(20_000)),
    "cut to half": lambda file: cut(file, 0.5),
    "cut within a page": lambda file: os.truncate(file, file.stat().st_size - 100),
    "cut to its header": lambda file: os.truncate(file, 100),
    "a broken header": lambda file: overwrite(file, 0, b"SQLite form\x00\x00\x00\x00\x00"),
    "blank pages": blank_middle,
    "a garbled schema": lambda file: overwrite(file, 108, os.urandom(PAGE - 108)),
    "a table missing": lambda file: run_sql(file, "DROP TABLE leases"),
    "all tables but the record of migrations missing": lambda file: run_sql(
        file, "; ".join(f"DROP TABLE {name}" for name in ("leases", "runs", "export_checkpoints", "export_windows"))
    ),
    "a column missing": lambda file: run_sql(file, "ALTER TABLE runs DROP COLUMN ledger"),
    "an index missing": lambda file: run_sql(file, "DROP INDEX runs_of_job"),
    "no record of migrations": lambda file: run_sql(file, "DELETE FROM headwater_migrations"),
    "no table of migrations": lambda file: run_sql(file, "DROP TABLE headwater_migrations"),
    "one migration not recorded": lambda file: run_sql(
        file, "DELETE FROM headwater_migrations WHERE name LIKE '%0003%'"
    ),
    "times that are none": lambda file: run_sql(file, "UPDATE runs SET started_at = 'x'"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_state_is_moved_aside_with_a_word_and_a_new_one_is_made(
    tmp_path: Path, damage: Callable[[Path], object], caplog: pytest.LogCaptureFixture
) -> None:
    damage(used(tmp_path))
    held = (tmp_path / FILE).read_bytes()
    with closing(open_state("", tmp_path)) as state:
        for _ in range(3):
            try:
                state.check()
                state.runs.recent("job", 10)
                commit(state)
            except Transient:
                continue
        state.check()
        (name,) = moved(tmp_path)
        assert name in state.note()
    assert (tmp_path / name).read_bytes()[200:] == held[200:], "what is moved is kept as it was"
    errors = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert [name in record.getMessage() for record in errors] == [True]
    works(tmp_path)
    assert moved(tmp_path) == [name]


def test_a_state_that_is_damaged_while_it_is_used_is_moved_aside_and_its_user_goes_on(tmp_path: Path) -> None:
    with closing(open_state("", tmp_path)) as state:
        commit(state)
        for _ in range(2):
            run_sql(tmp_path / FILE, "PRAGMA wal_checkpoint(TRUNCATE)")
            (tmp_path / FILE).write_bytes(os.urandom(50_000))
            for _ in range(3):
                with suppress(Transient):
                    commit(state)
            assert state.checkpoints.cursors("p") == {"d": AT}
        assert len(moved(tmp_path)) == 2


def test_the_log_of_a_state_that_was_emptied_or_deleted_is_moved_aside_with_it(tmp_path: Path) -> None:
    loses: list[Callable[[Path], None]] = [lambda file: os.truncate(file, 0), Path.unlink]
    for number, lose in enumerate(loses):
        folder = tmp_path / str(number)
        with unclosed(folder) as file:
            lose(file)
        assert Path(f"{file}-wal").stat().st_size > 0
        works(folder)
        assert len(list(folder.glob(f"{FILE}.damaged-*-wal"))) == 1


@contextmanager
def unclosed(folder: Path) -> Iterator[Path]:
    """A copy of a state with commits that are in its log alone, as a kill leaves it."""
    source = folder / "source"
    with closing(open_state("", source)) as state:
        commit(state)
        for suffix in ("", "-wal"):
            shutil.copy(source / f"{FILE}{suffix}", folder / f"{FILE}{suffix}")
    yield folder / FILE


def test_a_log_that_does_not_fit_wedges_nothing(tmp_path: Path) -> None:
    """The log of one state beside the file of another, in both directions."""
    used(tmp_path / "other")
    for number in range(2):
        folder = tmp_path / str(number)
        with unclosed(folder) as file:
            if number:
                shutil.copy(tmp_path / "other" / FILE, file)
            else:
                Path(f"{file}-wal").write_bytes(os.urandom(100_000))
        works(folder)


@pytest.mark.parametrize("part", [0.0, 0.3, 0.9, None])
def test_a_log_that_is_cut_or_deleted_beside_living_states_wedges_none(tmp_path: Path, part: float | None) -> None:
    with closing(open_state("", tmp_path)) as first, closing(open_state("", tmp_path)) as second:
        for state in (first, second):
            commit(state)
        log = tmp_path / f"{FILE}-wal"
        if part is None:
            log.unlink()
        else:
            cut(log, part)
        works(tmp_path)
        for state in (first, second):
            for _ in range(3):
                with suppress(Transient):
                    commit(state, "later")
            commit(state, "last")
            assert {"d", "last"} <= state.checkpoints.cursors("p").keys()


def test_the_files_of_an_older_backup_under_a_newer_log_wedge_nothing(tmp_path: Path) -> None:
    backup = used(tmp_path / "a")
    with closing(open_state("", tmp_path / "b")) as state:
        shutil.copy(backup, tmp_path / "held")
        for number in range(200):
            commit(state, f"device {number}")
        shutil.copy(tmp_path / "b" / f"{FILE}-wal", tmp_path / "log")
    shutil.copy(tmp_path / "held", tmp_path / "b" / FILE)
    shutil.copy(tmp_path / "log", tmp_path / "b" / f"{FILE}-wal")
    works(tmp_path / "b")


def test_of_several_processes_that_find_the_damage_at_once_one_moves_the_file(tmp_path: Path) -> None:
    used(tmp_path).write_bytes(os.urandom(30_000))
    program = "import sys, pathlib; from app.db.state import open_state as o; o('', pathlib.Path(sys.argv[1])).ping()"

    def use(_: int) -> int:
        return subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False).returncode

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(use, range(4))) == [0, 0, 0, 0]
    assert len(moved(tmp_path)) == 1
    works(tmp_path)


def test_a_process_goes_on_in_the_file_that_took_the_place_of_its_own(tmp_path: Path) -> None:
    backup = used(tmp_path / "backup")
    with closing(open_state("", tmp_path)) as state:
        commit(state)
        shutil.copy(backup, tmp_path / "restored")
        (tmp_path / "restored").rename(tmp_path / FILE)
        Path(tmp_path / f"{FILE}-wal").unlink()
        assert "device-7" in state.checkpoints.cursors("p")
    assert moved(tmp_path) == []


def test_a_locked_state_is_not_moved(tmp_path: Path) -> None:
    file = used(tmp_path)
    with closing(sqlite3.connect(file, isolation_level=None)) as holder:
        holder.execute("BEGIN EXCLUSIVE")
        folder = sql_directory() / "state"
        plain = SqliteDatabase(file, busy_seconds=0.1)
        with (
            closing(MigratedDatabase(plain, folder, StateFile(plain))) as database,
            pytest.raises(Transient, match="locked"),
        ):
            database.prepare()
    works(tmp_path)
    assert moved(tmp_path) == []


def test_a_state_that_may_not_be_read_or_written_is_not_moved(tmp_path: Path) -> None:
    """As a user without rights to it, for whom the file is there and nothing more."""
    program = (
        "import os, sys, pathlib; from app.core.errors import AppError; from app.db.state import open_state as o\n"
        "from app.db import checkpoints, postgres, sqlite\n"
        "os.setgid(65534); os.setuid(65534)\n"
        "try: o('', pathlib.Path(sys.argv[1])).ping()\n"
        "except AppError as error: print(type(error).__name__, error)\n"
    )
    if os.geteuid() != 0:
        pytest.skip("only root can become a user without rights")
    folder = tmp_path / "state"
    file = used(folder)
    for parent in (folder, *folder.parents):
        if parent.stat().st_uid == 0 and parent != Path("/"):
            parent.chmod(parent.stat().st_mode | 0o055)
    for mode, folder_mode in ((0o600, 0o755), (0o644, 0o755), (0o600, 0o777)):
        file.chmod(mode)
        folder.chmod(folder_mode)
        done = subprocess.run([sys.executable, "-c", program, str(folder)], capture_output=True, text=True, check=False)
        assert done.stdout.startswith("Permanent"), done.stdout + done.stderr
        assert "let the user of this process" in done.stdout
        assert moved(folder) == []
    works(folder)


def test_a_state_on_a_full_disk_is_not_moved_and_works_when_there_is_space_again(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(disk)], check=False).returncode:
        pytest.skip("this user cannot mount a small disk")
    try:
        used(disk)
        with pytest.raises(OSError, match="No space"):
            (disk / "ballast").write_bytes(bytes(10_000_000))
        with closing(open_state("", disk)) as state, pytest.raises((Transient, Permanent)):
            commit(state, "another" * 20_000)
        assert moved(disk) == []
        (disk / "ballast").unlink()
        works(disk)
        assert moved(disk) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_newer_state_is_refused_and_not_moved(tmp_path: Path) -> None:
    run_sql(used(tmp_path), "INSERT INTO headwater_migrations VALUES ('state/0999_later', 'x'); DROP INDEX runs_of_job")
    with closing(open_state("", tmp_path)) as state, pytest.raises(Permanent, match="a newer version"):
        state.ping()
    assert moved(tmp_path) == []


def test_a_disk_that_damages_each_new_file_is_not_filled_with_them(tmp_path: Path) -> None:
    class BadDisk(SqliteDatabase):
        def _connect(self) -> FileConnection:
            self.path.write_bytes(b"rubbish" * 1000)
            return super()._connect()

    plain = BadDisk(tmp_path / FILE)
    database = MigratedDatabase(plain, sql_directory() / "state", StateFile(plain))
    for _ in range(5):
        with pytest.raises(Permanent, match="not a database"):
            database.prepare()
    assert len(moved(tmp_path)) == 1


EMPTIED = {
    "dropped": "DROP SCHEMA public CASCADE; CREATE SCHEMA public",
    "emptied with the record of migrations": """
        DO $$ DECLARE one text; BEGIN
            FOR one IN SELECT tablename FROM pg_tables WHERE schemaname = 'public' LOOP
                EXECUTE format('TRUNCATE %I', one);
            END LOOP;
        END $$
    """,
    "emptied, without a record of migrations": "TRUNCATE leases, analytics_sweeps; DROP TABLE headwater_migrations",
}


@pytest.mark.parametrize("running", [True, False], ids=["by who runs", "by who starts"])
@pytest.mark.parametrize("sql", EMPTIED.values(), ids=EMPTIED)
def test_a_postgres_state_that_was_emptied_is_used_again(
    postgres_server: PostgresServer, tmp_path: Path, sql: str, *, running: bool
) -> None:
    url = postgres_server.new_database()
    with closing(open_state(url, tmp_path)) as before:
        commit(before)
        with before.database.transaction() as session:
            session.script(sql)
        with closing(before if running else open_state(url, tmp_path)) as state:
            with suppress(Transient):
                commit(state)
            commit(state)
            assert state.checkpoints.cursors("p") == {"d": AT}
            sweeps = state.summaries.sweeps()
            assert state.summaries.forget([]) == sweeps + 1
            state.runs.save(Run("new", "job", AT, AT, Outcome.OK))


def test_a_postgres_state_that_lacks_a_table_says_which(postgres_server: PostgresServer, tmp_path: Path) -> None:
    url = postgres_server.new_database()
    with closing(open_state(url, tmp_path)) as state:
        commit(state)
        with state.database.transaction() as session:
            session.run("DROP TABLE export_windows")
        with pytest.raises(Permanent, match=r"table export_windows .* is missing, though its migration was applied"):
            state.checkpoints.records("p", "d", AT, AT + timedelta(days=1))
        with state.database._database.transaction() as session:  # noqa: SLF001 - below what refuses the state
            session.script("DROP SCHEMA public CASCADE; CREATE SCHEMA public")
        commit(state)


def test_tables_of_another_program_in_postgres_are_named_and_left_alone(
    postgres_server: PostgresServer, tmp_path: Path
) -> None:
    url = postgres_server.new_database()
    with closing(PostgresDatabase(url, variables="X")) as plain:
        with plain.transaction() as session:  # as the Data Export Service has it
            session.script("CREATE TABLE export_checkpoints (id SERIAL, device_id TEXT, last_exported_at TIMESTAMPTZ)")
            session.script("INSERT INTO export_checkpoints (device_id) VALUES ('D1')")
        with closing(open_state(url, tmp_path)) as state:
            with pytest.raises(Permanent, match="another program created the table export_checkpoints") as refused:
                state.ping()
            assert "CHECKPOINT_DB_NAME" in refused.value.hint
        with plain.transaction() as session:
            assert session.rows("SELECT device_id FROM export_checkpoints") == [{"device_id": "D1"}]
            session.script(
                "CREATE SCHEMA ours; ALTER ROLE CURRENT_USER IN DATABASE "
                + url.rpartition("/")[2]
                + " SET search_path TO ours"
            )
    with closing(open_state(url, tmp_path)) as state:
        commit(state)


def test_a_file_of_another_program_is_moved_aside(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / FILE)) as other:
        other.executescript("CREATE TABLE runs (note TEXT); INSERT INTO runs VALUES ('mine')")
    works(tmp_path)
    with closing(sqlite3.connect(tmp_path / moved(tmp_path)[0])) as other:
        assert other.execute("SELECT note FROM runs").fetchall() == [("mine",)]


def test_a_database_of_a_stricter_isolation_is_migrated_by_many_at_once(
    postgres_server: PostgresServer, tmp_path: Path
) -> None:
    url = postgres_server.new_database()
    postgres_server.run_sql(
        f"ALTER DATABASE {url.rpartition('/')[2]} SET default_transaction_isolation = 'serializable'"
    )

    def use(_: int) -> None:
        with closing(open_state(url, tmp_path)) as state:
            state.ping()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(use, range(8)))


def test_commits_of_the_state_are_flushed_to_the_disk(tmp_path: Path) -> None:
    with closing(open_state("", tmp_path)) as state, state.database.transaction(read_only=True) as session:
        assert session.rows("PRAGMA synchronous") == [{"synchronous": 2}]
