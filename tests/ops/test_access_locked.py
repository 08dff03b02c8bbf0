"""Locked: without keys, where others may reach the service, only probes are answered; one command unlocks it."""

import asyncio
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import urllib.request
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import httpx
import pytest

from app import cli
from app.config import NEW_KEY
from app.main import build
from daemon import free_port
from given_settings import loaded
from public_interface import served

ROOT = Path(__file__).resolve().parents[2]
PATHS = ("/", "/docs", "/openapi.json", "/ops/jobs", "/metrics", "/assets/icon.svg", "/s3/shared", "/nowhere")
MADE = re.compile(r"python -m app (keys new[^`\n|<#]*)")


async def asked(variables: dict[str, str], *, own_server: bool, headers: dict[str, str]) -> dict[str, httpx.Response]:
    app = build(loaded(variables), own_server=own_server).app
    transport = httpx.ASGITransport(app=app)
    async with served(app), httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        answers = {path: await client.get(path, headers=headers) for path in ("/health", "/ready", *PATHS)}
        page = await client.get("/runs", headers={**headers, "Accept": "text/html,*/*"})
        assert (page.status_code, page.headers["content-type"]) == (503, "text/html; charset=utf-8")
        assert NEW_KEY in page.text
        assert "script" not in page.text
        answers["sign-in"] = await client.post("/ops/session", json={"key": "x"}, headers=headers)
        return answers


@pytest.mark.parametrize(
    ("variables", "own_server"),
    [({"HOST": "0.0.0.0"}, True), ({"HOST": "::"}, True), ({}, False), ({"HOST": "127.0.0.1"}, False)],  # noqa: S104
)
@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:8000", "example.org"])
def test_what_is_locked_answers_probes_without_details_and_the_command_to_everything_else(
    variables: dict[str, str],
    own_server: bool,  # noqa: FBT001
    host: str,
    tmp_path: Path,
) -> None:
    answers = asyncio.run(
        asked({**variables, "DATA_DIR": str(tmp_path)}, own_server=own_server, headers={"Host": host})
    )
    assert answers.pop("/health").json().keys() == {"status", "version", "timestamp"}
    ready = answers.pop("/ready").json()
    assert ready.keys() == {"ready", "checks"}
    assert ready["checks"] == {}
    for path, answer in answers.items():
        assert answer.status_code == 503, path
        assert f"`{NEW_KEY}`" in answer.json()["error"]["hint"]
        assert answer.headers["X-Content-Type-Options"] == "nosniff"


def test_every_command_that_makes_a_key_runs_as_it_is_printed() -> None:
    pages = [ROOT / "README.md", *ROOT.glob("docs/**/*.md"), *ROOT.glob("deploy/**/*.*"), *ROOT.glob("src/app/**/*.*")]
    texts = [page.read_text(encoding="utf-8") for page in pages if page.suffix in (".md", ".py", ".html", ".yaml")]
    commands = {command.strip().rstrip('".;') for text in texts for command in MADE.findall(text)}
    commands -= {"keys new helper --scopes {wanted}", "keys new --help"}
    assert len(commands) >= 3
    for command in commands:
        given = vars(cli.parser().parse_args(shlex.split(command)))
        with redirect_stdout(StringIO()) as out:
            assert given.pop("call")(**given) == 0, command
        assert "add to API_KEYS:" in out.getvalue()


def started(folder: Path, **variables: str) -> "tuple[subprocess.Popen[bytes], str]":
    port = free_port()
    command = [sys.executable, "-m", "uvicorn", "app.main:app", "--host", "0.0.0.0", "--port", str(port)]  # noqa: S104
    environ = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    with (folder / "log").open("ab") as log:
        process = subprocess.Popen(command, cwd=folder, env={**environ, **variables}, stdout=log, stderr=log)
    return process, f"http://127.0.0.1:{port}"


def answered(url: str, headers: dict[str, str] | None = None) -> Any:
    until = time.monotonic() + 30
    while True:
        try:
            with urllib.request.urlopen(urllib.request.Request(url, headers=headers or {}), timeout=10) as answer:  # noqa: S310
                return json.loads(answer.read())
        except urllib.error.HTTPError as answer:
            return json.loads(answer.read())
        except OSError:
            assert time.monotonic() < until
            time.sleep(0.1)


@pytest.mark.slow
def test_another_server_is_locked_until_the_command_that_it_names_was_run(tmp_path: Path) -> None:
    process, url = started(tmp_path)
    try:
        assert answered(f"{url}/health")["status"] == "healthy"
        hint = answered(f"{url}/ops/jobs")["error"]["hint"]
        until = time.monotonic() + 20
        while "csv_inbox ok" not in (tmp_path / "log").read_text() and time.monotonic() < until:
            time.sleep(0.2)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)
    log = (tmp_path / "log").read_text()
    assert "csv_inbox ok" in log, "jobs run"
    assert "does not enforce" in log
    command = hint.split("`")[1].split()
    assert command[:3] == ["python", "-m", "app"]
    made = subprocess.run([sys.executable, *command[1:]], cwd=tmp_path, capture_output=True, text=True, check=True)
    key, line = (text.rpartition(" ")[2] for text in made.stdout.splitlines())
    process, url = started(tmp_path, API_KEYS=line)
    try:
        assert answered(f"{url}/ops/session", {"X-API-Key": key})["name"] == "admin"
        assert answered(f"{url}/ops/jobs", {"X-API-Key": key})["jobs"]
        assert answered(f"{url}/ops/jobs")["error"]["message"] == "this needs a key"
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


def test_settings_that_cannot_work_end_another_server_with_one_line_each_and_78(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import app.main as m; m.app"],
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"], "PORT": "eighty", "LEASE_TTL_SECONDS": "x"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 78
    assert [line.partition("=")[0] for line in done.stderr.splitlines()] == ["PORT", "LEASE_TTL_SECONDS"]
