"""A real InfluxDB 1.x server (`influxd` of Debian) on free loopback ports; tests skip where it is not installed.

Invariant: one process per test session, ended by its own pid; each test takes a database of its own.
"""

import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import pytest

from needs import needs

CONFIG = """
reporting-disabled = true
bind-address = "127.0.0.1:{rpc}"
[meta]
  dir = "{root}/meta"
  logging-enabled = false
[data]
  dir = "{root}/data"
  wal-dir = "{root}/wal"
  query-log-enabled = false
[monitor]
  store-enabled = false
[subscriber]
  enabled = false
[continuous_queries]
  enabled = false
[http]
  bind-address = "127.0.0.1:{http}"
  log-enabled = false
{more}
"""
START_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class InfluxDB1:
    """The running server: `url` without a trailing slash, no authentication."""

    url: str
    numbers: Iterator[int] = field(default_factory=count)

    def new_database(self, terms: str = "") -> str:
        """An empty database under a new name; `terms` such as `WITH SHARD DURATION 1h`."""
        name = f"test{next(self.numbers)}"
        self.query(f'CREATE DATABASE "{name}" {terms}')
        return name

    def query(self, text: str) -> bytes:
        """The answer to a statement that has to succeed."""
        told = self.ask(q=text)
        assert b'"error"' not in told, told  # which comes with status 200
        return told

    def ask(self, **form: str) -> bytes:
        """The answer to whatever is asked, also one that holds an error."""
        body = urllib.parse.urlencode(form).encode()
        with urllib.request.urlopen(f"{self.url}/query", body, timeout=10) as answer:  # noqa: S310 - loopback only
            told: bytes = answer.read()
        return told

    def write(self, database: str, lines: str, policy: str = "") -> None:
        """Write line protocol with nanosecond times."""
        url = f"{self.url}/write?{urllib.parse.urlencode({'db': database, 'rp': policy})}"
        with urllib.request.urlopen(url, lines.encode(), timeout=30) as answer:  # noqa: S310 - loopback only
            assert answer.status == 204


@pytest.fixture(scope="session")
def influxdb1(tmp_path_factory: pytest.TempPathFactory) -> Iterator[InfluxDB1]:
    with running_influxdb1(tmp_path_factory.mktemp("influxdb1")) as server:
        yield server


@contextmanager
def running_influxdb1(root: Path, more: str = "") -> Iterator[InfluxDB1]:
    """A server with its files in `root` and `more` lines in its configuration."""
    program = needs("influxd")
    http, rpc = free_ports(2)
    (root / "influxdb.conf").write_text(CONFIG.format(root=root, http=http, rpc=rpc, more=more))
    with (root / "influxd.log").open("wb") as log:
        process = subprocess.Popen([program, "-config", str(root / "influxdb.conf")], stdout=log, stderr=log)
        try:
            server = InfluxDB1(f"http://127.0.0.1:{http}")
            wait_until_ready(server, process, root / "influxd.log")
            yield server
        finally:
            process.terminate()
            process.wait(20)


def free_ports(number: int) -> list[int]:
    """Ports that nobody listens on at this moment."""
    sockets = [socket.socket() for _ in range(number)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def wait_until_ready(server: InfluxDB1, process: "subprocess.Popen[bytes]", log: Path) -> None:
    """Return when /ping answers; fail with the log when the process ends or the time is over."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(f"{server.url}/ping", timeout=2) as answer:  # noqa: S310 - loopback only
                assert answer.status == 204
                return
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.05)
    pytest.fail(f"influxd did not start: {log.read_text()[-2000:]}")
