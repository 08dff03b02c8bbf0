"""The commands of the README and the guides, read from the pages: run where that can be done here, else parsed."""

import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from uvicorn.main import main as uvicorn

from app.cli import parsed
from daemon import KEPT, Daemon, Daemons, free_port
from shell import Shell
from simulators.demo import simulated
from simulators.influx import InfluxSimulator

ROOT = Path(__file__).resolve().parents[2]
FENCE = re.compile(r"^ *```sh\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
RUN = "uv run python"
SHELL = {"mkdir", "printf", "cat"}
ADDRESS = re.compile(r"(?:localhost|127\.0\.0\.1):8080")
STAYS = {"serve", "demo", "setup"}
"""Our own commands that go on until a signal, or wait for a person; tests of their own call them."""
NOT_CALLED = re.compile(r"\.\.\. |/var/lib/|eyJl|export_id=1|(?:amplitude|appmetrica) --from|csv_inbox RUN")
"""Parsed only: what names something that only the reader has, and what would pull days of events hour by hour."""
RUN_PAGES_OF_THEIR_OWN = {"dwh.md", "notebook.md"}
RUN_ID = "3f9c21ab5d0e4c7f8a1b2c3d4e5f6071"
CALLS = """
import json, sys
from app.cli import main
for words in json.loads(sys.argv[1]):
    code = main(words)
    if code:
        sys.stderr.write(f"exit {code}: {words}\\n")
"""

NOT_RUN = {
    "docker": "needs a container engine",
    "kubectl": "needs a cluster",
    "railway": "needs an account",
    "systemctl": "changes this machine",
    "journalctl": "changes this machine",
    "useradd": "changes this machine",
    "install": "changes this machine",
    "cp": "names a place that the reader chooses",
    "gunicorn": "is not among our packages",
    "influx": "is the client of InfluxDB 2",
    "spark-sql": "is a program of Spark's, which downloads packages",
    "pip": "downloads packages",
    "uv": "downloads packages",
}
"""Programs of the pages that no test calls; a new one has to be run here, or be listed with the reason."""


@dataclass(frozen=True)
class Line:
    """One command of a page, without its comment."""

    page: str
    text: str

    @property
    def words(self) -> list[str]:
        return shlex.split(self.text, comments=True)

    @property
    def own(self) -> list[str] | None:
        """The arguments of `python -m app`, None for another program."""
        words = self.words[2:] if self.words[:2] == ["uv", "run"] else self.words
        return words[3:] if words[:3] == ["python", "-m", "app"] else None


def pages() -> Iterator[Path]:
    yield from (ROOT / "README.md", ROOT / "CONTRIBUTING.md")
    yield from sorted((ROOT / "docs").rglob("*.md"))


def lines() -> Iterator[Line]:
    """Every command, those behind && too; one may go over several lines."""
    for page in pages():
        for block in FENCE.findall(page.read_text(encoding="utf-8")):
            held = ""
            for line in block.splitlines():
                held = f"{held}\n{line}" if held else line
                if is_whole(held) and shlex.split(held, comments=True):
                    yield from (Line(page.name, each.strip()) for each in held.split(" && "))
                if is_whole(held):
                    held = ""
            assert not held, f"{page.name}: {held}"


def is_whole(text: str) -> bool:
    try:
        shlex.split(text, comments=True)
    except ValueError:
        return False
    return not text.endswith("\\")


def journeys() -> list[list[str]]:
    _, _, section = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Three first steps")
    return [block.splitlines() for block in FENCE.findall(section.partition("\n## ")[0])]


def run(shell: Shell, script: list[str], answers: str = "") -> str:
    text = "set -e\n" + "\n".join(line.replace(RUN, shlex.quote(sys.executable)) for line in script)
    environ = {name: value for name, value in shell.environ().items() if name != "DATA_DIR"}
    done = subprocess.run(
        ["bash", "-c", text],
        env=environ,
        cwd=shell.folder,
        input=answers,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_each_journey_has_at_most_five_steps() -> None:
    assert [len(each) for each in journeys()] == [5, 4, 4]


@pytest.mark.slow
def test_the_journey_of_a_folder_of_csv_files(shell: Shell) -> None:
    said = run(shell, journeys()[0])
    assert said.endswith("cluster_name,depth\nnorth,12.5\nsouth,8\n")


@pytest.mark.slow
def test_the_journey_of_telemetry_to_files(daemons: Daemons, shell: Shell) -> None:
    *steps, last = journeys()[1]
    with InfluxSimulator() as influx:
        influx.write(f"device_telemetry,device_id=D1 voltage=230.5 {time.time_ns() - 60 * 10**9}")
        asked = (influx.url, "", influx.token, influx.org, influx.bucket, "", "")
        said = run(shell, steps, "".join(f"{answer}\n" for answer in asked))
        assert "ok: InfluxDB: " in said
        assert "influx_to_s3 ok: would write 1 rows" in said
        assert last == f"{RUN} -m app"
        daemon = daemons.start(DATA_DIR="data")
        daemon.until(lambda: daemon.job("influx_to_s3")["last_run"])
        assert len(list((shell.folder / "data" / "objects").rglob("device_id=D1/**/export_*.parquet"))) == 1


def test_every_command_of_the_pages_can_be_called_or_is_listed_with_the_reason() -> None:
    named = list(lines())
    assert len(named) > 80
    for own in {line.text: line.own for line in named}.values():
        if own is not None:
            parsed(own)
    for line in named:
        if line.words[0] == "uvicorn":
            uvicorn.make_context("uvicorn", line.words[1:])
    others = {line.words[0] for line in named if line.own is None}
    assert others - {"curl", "uvicorn", *SHELL} == NOT_RUN.keys()


def is_run_here(line: Line) -> bool:
    if line.page in RUN_PAGES_OF_THEIR_OWN or NOT_CALLED.search(line.text):
        return False
    if line.own is not None:
        return bool(line.own) and line.own[0] not in STAYS
    return line.words[0] == "curl" or "duckdb" in line.words


@pytest.mark.slow
def test_every_command_that_can_run_here_ends_well(daemons: Daemons, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("bytes" * 50)
    (tmp_path / "day.csv.gz").write_bytes(b"bytes")
    named = [line for line in lines() if is_run_here(line)]
    with simulated({"DATA_DIR": str(tmp_path / "data")}, live=False) as given:
        environ = {**given, "EXPORT_WINDOW_SECONDS": "3600"}
        daemon = daemons.start("", wait=True, **environ, PORT=str(free_port()))
        ran = ("influx_to_s3", "csv_inbox", "amplitude", "appmetrica")
        daemon.until(lambda: all((daemon.job(name)["last_run"] or {}).get("ended_at") for name in ran), 60)
        run_id = daemon.job("csv_inbox")["last_run"]["run_id"]
        texts = [line.text.replace(RUN_ID, run_id) for line in named if line.own is None]
        failed = [said for text in texts if (said := asked(daemon, text, tmp_path))]
        assert daemon.terminate() >= 0
        done = subprocess.run(
            [
                sys.executable,
                "-c",
                CALLS,
                json.dumps(list({line.text: line.own for line in named if line.own}.values())),
            ],
            env={**{name: os.environ[name] for name in KEPT if name in os.environ}, **environ},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )
    failed += [line for line in done.stderr.splitlines() if line.startswith("exit")]
    assert (failed, done.returncode) == ([], 0), done.stdout + done.stderr


def asked(daemon: Daemon, text: str, folder: Path) -> str:
    """What a command of another program said that failed; "" where it ended well."""
    text = ADDRESS.sub(f"127.0.0.1:{daemon.port}", text).replace("curl ", "curl --fail-with-body -sS ", 1)
    text = text.replace("uv run --with duckdb python", sys.executable)
    done = subprocess.run(["bash", "-c", text], cwd=folder, capture_output=True, text=True, timeout=60, check=False)
    return "" if done.returncode == 0 else f"{text}: {done.stdout}{done.stderr}"
