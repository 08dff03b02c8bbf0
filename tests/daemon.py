"""The real daemon as a subprocess, on a free port, with the environment and the jobs that a test gives it.

`jobs` names a function of `daemon_jobs`; without it the product's own wiring is used. Ended by its pid, always.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from email.message import Message
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).parent
START_SECONDS = 30.0
KEPT = ("PATH", "HOME", "LANG", "TMPDIR", "VIRTUAL_ENV", "PYTHONPATH")


@dataclass(frozen=True)
class Reply:
    status: int
    headers: Message
    text: str

    @property
    def json(self) -> Any:
        return json.loads(self.text)


@dataclass
class Daemon:
    """A running daemon. `log` is everything it wrote to stdout and stderr."""

    port: int
    process: "subprocess.Popen[bytes]"
    log_path: Path
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def call(self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None) -> Reply:
        data = None if body is None else json.dumps(body).encode()
        sent = {**({"Content-Type": "application/json"} if data else {}), **self.headers, **(headers or {})}
        request = urllib.request.Request(self.url + path, data, sent, method=method)  # noqa: S310 - loopback
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:  # noqa: S310 - loopback
                return Reply(answer.status, answer.headers, answer.read().decode())
        except urllib.error.HTTPError as answer:
            with answer:
                return Reply(answer.code, answer.headers, answer.read().decode())

    def get(self, path: str, headers: Mapping[str, str] | None = None) -> Reply:
        return self.call("GET", path, headers=headers)

    def post(self, path: str, body: Any = None, headers: Mapping[str, str] | None = None) -> Reply:
        return self.call("POST", path, body, headers)

    def until(self, holds: Callable[[], Any], seconds: float = 15.0) -> Any:
        """Wait until `holds()` is true; its value. Fails with the daemon's log."""
        asked_at = time.monotonic()
        deadline = asked_at + seconds
        while not (value := holds()):
            now = time.monotonic()
            if now > deadline:
                pytest.fail(f"did not come to hold within {seconds} s; log:\n{self.log[-4000:]}")
            time.sleep(max(0.02, now - asked_at))  # asking takes at most half of a processor from the daemon
            asked_at = time.monotonic()
        return value

    def job(self, name: str) -> Any:
        return next(job for job in self.get("/ops/jobs").json["jobs"] if job["name"] == name)

    def terminate(self, seconds: float = 30.0) -> int:
        """SIGTERM; the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(seconds)

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.process.wait(10)

    @property
    def rss_mib(self) -> float:
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS"))


class Daemons:
    """Starts daemons and ends all that are left."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._started: list[Daemon] = []

    def start(
        self,
        jobs: str = "",
        *,
        wait: bool = True,
        key: str = "",
        descriptors: str = "",
        word: str = "serve",
        **environ: str,
    ) -> Daemon:
        port = int(environ.pop("PORT", 0)) or free_port()
        log_path = self._folder / f"daemon-{len(self._started)}.log"
        values = {"PORT": str(port), "DATA_DIR": str(self._folder / "data"), "LOG_FILE": "off", **environ}
        base = {name: os.environ[name] for name in KEPT if name in os.environ}
        command = [sys.executable, str(TESTS / "daemon_jobs.py"), jobs] if jobs else [sys.executable, "-m", "app", word]
        if descriptors:
            command = ["sh", "-c", f'ulimit -n {descriptors}; exec "$@"', "sh", *command]
        with log_path.open("wb") as log:
            process = subprocess.Popen(
                command, env={**base, **values}, cwd=self._folder, stdout=log, stderr=subprocess.STDOUT
            )
        daemon = Daemon(port, process, log_path, {"Authorization": f"Bearer {key}"} if key else {})
        self._started.append(daemon)
        if wait:
            wait_until_up(daemon)
        return daemon

    def close(self) -> None:
        for daemon in self._started:
            if daemon.process.poll() is None:
                daemon.kill()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until_up(daemon: Daemon) -> None:
    """Until /health answers at all."""
    deadline = time.monotonic() + START_SECONDS
    while True:
        if daemon.process.poll() is not None:
            pytest.fail(f"the daemon ended with {daemon.process.returncode}:\n{daemon.log}")
        try:
            daemon.get("/health")
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            if time.monotonic() > deadline:
                pytest.fail(f"/health did not answer:\n{daemon.log}")
            time.sleep(0.02)
        else:
            return


@pytest.fixture
def daemons(tmp_path: Path) -> Iterator[Daemons]:
    """Daemons of this test; one data directory for all of them unless DATA_DIR is given."""
    started = Daemons(tmp_path)
    yield started
    started.close()
