"""Draws docs/pictures: the demo with a gap, its healing and a run, as a browser shows them.

`uv run python tests/pictures.py [--folder docs/pictures]` starts a demo of its own and takes about two minutes.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from argparse import ArgumentParser
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from browser import Browser
from daemon import KEPT

MAP = "document.getElementById('map-influx_to_s3')"
GONE = 2
START_SECONDS, SEEN_SECONDS, STOP_SECONDS = 300.0, 90.0, 60.0


@contextmanager
def demo(folder: Path) -> Iterator[str]:
    """A demo in `folder`, all of whose data were delivered; its URL."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environ = {name: os.environ[name] for name in KEPT if name in os.environ}
    url, command = f"http://127.0.0.1:{port}", [sys.executable, "-m", "app", "demo", "--port", str(port)]
    with (folder / "log").open("wb") as log, subprocess.Popen(command, cwd=folder, env=environ, stdout=log) as process:
        try:
            until(lambda: process.poll() is None and delivered(url), START_SECONDS)
            yield url
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(STOP_SECONDS)


def delivered(url: str) -> bool:
    try:
        found = asked(f"{url}/ops/summary")
    except OSError:
        return False
    return all(job["last_run"] and job["last_run"]["ended_at"] for job in found["jobs"])


def asked(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=10) as answer:  # noqa: S310 - loopback
        return json.load(answer)


def until(holds: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"{holds} did not come to hold"
        time.sleep(0.5)


def lose(objects: Path) -> None:
    """Remove the objects of one device's closed windows, as somebody does who cleans up a bucket."""
    for path in sorted(objects.rglob("export_*.parquet"))[:GONE]:
        path.unlink()


def draw(url: str, objects: Path, browser: Browser, folder: Path) -> None:
    browser.size(1440, 1000)
    lose(objects)
    browser.open(url)
    browser.until(f"document.getElementById('verdict').innerText.includes('{GONE} windows are missing')", SEEN_SECONDS)
    browser.until(f"{MAP}.querySelector('.cell.missing') && !document.querySelector('.late')", SEEN_SECONDS)
    browser.picture(folder / "dashboard.png")
    browser.click(f"{MAP}.querySelector('.cell.missing')")
    heal = f"[...{MAP}.querySelectorAll('.drill button')].find(x => x.textContent.startsWith('Heal'))"
    browser.until(f"!!{heal}")
    browser.picture(folder / "gap.png", MAP)
    browser.click("[...document.querySelectorAll('#todo button')].find(x => x.textContent.startsWith('Heal'))")
    browser.until("document.getElementById('notice').innerText.includes('written again')", SEEN_SECONDS)
    browser.until(f"!{MAP}.querySelector('.cell.missing')", SEEN_SECONDS)
    browser.click(f"[...{MAP}.querySelectorAll('.drill button, .drill a')].find(x => x.textContent === 'Close')")
    browser.run("scrollTo(0, 0)")
    browser.picture(folder / "heal.png")
    runs = asked(f"{url}/ops/runs?job=influx_to_s3&limit=200")["runs"]
    most = max(runs, key=lambda run: run["rows"])
    browser.open(f"{url}/run?id={most['run_id']}")
    browser.until("document.body.innerText.includes('counted')")
    browser.picture(folder / "run.png")
    browser.size(390, 844, phone=True, dark=True)
    browser.open(url)
    browser.until(f"{MAP}?.querySelectorAll('.cell').length > 0")
    browser.run(f"{MAP}.scrollIntoView()")
    browser.picture(folder / "phone.png")


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("docs/pictures"), help="where the pictures are written")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as place, demo(Path(place)) as url, closing(Browser(Path(place))) as browser:
        draw(url, Path(place) / "data" / "demo" / "objects" / "telemetry", browser, folder)


if __name__ == "__main__":
    main()
