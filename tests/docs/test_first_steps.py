"""The commands of the README and the guides, read from the pages: run where that can be done here, else parsed."""

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.cli import parsed
from daemon import Daemon, Daemons
from shell import Shell

ROOT = Path(__file__).resolve().parents[2]
FENCE = re.compile(r"^```sh\n(.*?)^```", re.MULTILINE | re.DOTALL)
CALL = re.compile(r"\bpython -m app\b([^&|;#]*)")
RUN = "uv run --no-dev python"


def pages() -> Iterator[Path]:
    yield ROOT / "README.md"
    yield from sorted((ROOT / "docs").rglob("*.md"))


def blocks(page: Path) -> list[str]:
    return FENCE.findall(page.read_text(encoding="utf-8"))


def journeys() -> list[list[str]]:
    _, _, section = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Three first steps")
    return [block.splitlines() for block in FENCE.findall(section.partition("\n## ")[0])]


def run(shell: Shell, lines: list[str]) -> str:
    script = "set -e\n" + "\n".join(line.replace(RUN, shlex.quote(sys.executable)) for line in lines)
    environ = {name: value for name, value in shell.environ().items() if name != "DATA_DIR"}
    done = subprocess.run(
        ["bash", "-c", script], env=environ, cwd=shell.folder, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_each_journey_has_at_most_five_steps() -> None:
    assert [len(each) for each in journeys()] == [5, 4, 4]


@pytest.mark.slow
def test_the_journey_of_a_folder_of_csv_files(shell: Shell) -> None:
    said = run(shell, journeys()[0])
    assert said.endswith("cluster_name,depth\nnorth,12.5\nsouth,8\n")


@pytest.mark.slow
def test_the_journey_of_rows_over_http(daemons: Daemons, shell: Shell) -> None:
    daemon: Daemon = daemons.start()
    said = run(shell, [line.replace("localhost:8080", f"127.0.0.1:{daemon.port}") for line in journeys()[2]])
    assert '"count":1' in said.replace(" ", "")
    assert "Bergen" in said


def test_every_command_of_the_pages_can_be_called() -> None:
    called = [
        (page.name, words)
        for page in pages()
        for block in blocks(page)
        for line in block.replace("\\\n", " ").splitlines()
        for words in CALL.findall(line)
    ]
    assert len(called) > 10
    for _, words in called:
        parsed(shlex.split(words))
