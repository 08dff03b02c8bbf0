"""docs/notebook.md, run as a person would: the demo in one terminal, Python in another."""

import os
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from urllib.error import URLError

import pytest

from daemon import KEPT, free_port

PAGE = (Path(__file__).parents[2] / "docs" / "notebook.md").read_text()
BLOCKS = re.findall(r"^```python( plot)?\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
DISPLAYED = re.compile(r"^[a-z][\w.()\[\]\"', ]*$")


def as_script(blocks: list[str], port: int) -> str:
    """What a notebook does: the last line of a cell is shown."""
    cells = []
    for block in blocks:
        *lines, last = block.rstrip().splitlines()
        cells += [*lines, f"print({last})" if DISPLAYED.fullmatch(last) and "savefig" not in last else last]
    return "\n".join(cells).replace(":8080", f":{port}")


@pytest.fixture
def demo(tmp_path: Path) -> Iterator[int]:
    """The port of a running demo whose events have landed."""
    port = free_port()
    environ = {name: os.environ[name] for name in KEPT if name in os.environ}
    command = [sys.executable, "-m", "app", "demo"]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            command, cwd=tmp_path, env={**environ, "PORT": str(port), "DATA_DIR": str(tmp_path)}, stdout=log, stderr=log
        )
    try:
        until = time.monotonic() + 50
        while not _has(port, "/dwh/events-part?platform=iOS&limit=1", '"count":1') or not _has(
            port, "/devices", '"D1"'
        ):
            assert time.monotonic() < until, (tmp_path / "log").read_text()
            time.sleep(0.5)
        yield port
    finally:
        process.terminate()
        process.wait(30)


def _has(port: int, path: str, text: str) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=30) as answer:
            return text in answer.read().decode()
    except (URLError, OSError):
        return False


@pytest.mark.slow
def test_the_page_gives_three_frames_and_a_plot(demo: int, tmp_path: Path) -> None:
    cells = as_script([block for kind, block in BLOCKS if not kind], demo)
    shown = subprocess.run(
        [sys.executable, "-W", "error", "-c", cells],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert shown.returncode == 0, shown.stderr
    for text in ("Headwater(url=", "total_records", "datetime64[", "voltage", "event_type", "from 1 to 527040"):
        assert text in shown.stdout
    (package,) = re.findall(r"--with (matplotlib==\S+) python", PAGE)
    command = ["uv", "run", "--project", str(Path(__file__).parents[2]), "--with", package, "python", "-c"]
    if subprocess.run([*command, "import matplotlib"], cwd=tmp_path, capture_output=True, check=False).returncode:
        pytest.skip("the frames are right; matplotlib cannot be installed here for the plot")
    everything = as_script([block for _, block in BLOCKS], demo)
    subprocess.run([*command, everything], cwd=tmp_path, check=True, timeout=60)
    assert (tmp_path / "power.png").read_bytes().startswith(b"\x89PNG")
