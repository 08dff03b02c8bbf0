"""A headless Chromium, spoken to through its DevTools pipe: no driver, no further package.

The browser has a profile of its own below the test's folder, reaches loopback only, and is ended by its pid.
"""

import base64
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from needs import needs

START_SECONDS = 60.0
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
    "--hide-scrollbars",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
    "--remote-debugging-pipe",
)


# The browser takes its pipe from the descriptors 3 and 4.
LAUNCH = """
import os, sys
from fcntl import F_DUPFD, fcntl
ends = [fcntl(int(end), F_DUPFD, 100) for end in sys.argv[1:3]]
for place, end in enumerate(ends, 3):
    os.dup2(end, place, inheritable=True)
os.execv(sys.argv[3], sys.argv[3:])
"""


class Browser:
    """One page. Commands are those of the DevTools protocol; messages end with a NUL."""

    def __init__(self, folder: Path) -> None:
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()
        command = [str(needs("chromium")), *FLAGS, f"--user-data-dir={folder / 'profile'}", "about:blank"]
        self._log = (folder / "chromium.log").open("wb")
        started = [sys.executable, "-c", LAUNCH, str(theirs_in), str(theirs_out), *command]
        self._process = subprocess.Popen(
            started, pass_fds=(theirs_in, theirs_out), stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._number = 0
        self._rest = b""
        self._loaded = False
        self.errors: list[str] = []
        targets = self._call("Target.getTargets")["targetInfos"]
        page = next(each for each in targets if each["type"] == "page")
        attached = self._call("Target.attachToTarget", targetId=page["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self._page(f"{domain}.enable")

    _session = ""

    def _call(self, method: str, **params: Any) -> Any:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]
            self._note(answer)

    _page = _call

    def _next(self) -> Mapping[str, Any]:
        while b"\0" not in self._rest:
            chunk = os.read(self._in, 1 << 16)
            assert chunk, f"chromium ended: {Path(self._log.name).read_text(errors='replace')[-2000:]}"
            self._rest += chunk
        text, _, self._rest = self._rest.partition(b"\0")
        found: Mapping[str, Any] = json.loads(text)
        return found

    def _note(self, event: Mapping[str, Any]) -> None:
        """Faults of the page: exceptions, and what the console calls an error."""
        params = event.get("params", {})
        self._loaded = self._loaded or event.get("method") == "Page.loadEventFired"
        if event.get("method") == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(params["exceptionDetails"])[:500])
        if event.get("method") == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.errors.append(f"{params['entry']['text']} {params['entry'].get('url', '')}")

    def open(self, url: str) -> None:
        """Until the page and its scripts are loaded."""
        self._loaded = False
        self._page("Page.navigate", url=url)
        while not self._loaded:
            self._note(self._next())

    def size(self, width: int, height: int, *, phone: bool = False, dark: bool = False) -> None:
        self._page("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._page("Emulation.setEmulatedMedia", features=[scheme])

    def zone(self, name: str) -> None:
        """The time zone of the reader."""
        self._page("Emulation.setTimezoneOverride", timezoneId=name)

    def run(self, script: str) -> Any:
        """The value of an expression, awaited."""
        found = self._page("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def until(self, script: str, seconds: float = 30.0) -> Any:
        """Wait until an expression is true; its value."""
        deadline = time.monotonic() + seconds
        while not (value := self.run(script)):
            assert time.monotonic() < deadline, f"never true: {script}\n{self.run('document.body.innerText')[:3000]}"
            time.sleep(0.05)
        return value

    def click(self, script: str) -> None:
        """Click the element of an expression as a person would, once it is there and in view."""
        self.until(f"!!({script})")
        self.run(f"({script}).scrollIntoView({{block: 'center'}})")
        middle = "[box.x + box.width / 2, box.y + box.height / 2]"
        place = self.run(f"(() => {{ const box = ({script}).getBoundingClientRect(); return {middle}; }})()")
        for kind in ("mousePressed", "mouseReleased"):
            self._page("Input.dispatchMouseEvent", type=kind, x=place[0], y=place[1], button="left", clickCount=1)

    def drag(self, start: tuple[float, float], end: tuple[float, float]) -> None:
        """Press at one place of the view, move, and let go at another."""
        middle = ((start[0] + end[0]) / 2, (start[1] + end[1]) / 2)
        for kind, (x, y) in (
            ("mousePressed", start),
            ("mouseMoved", middle),
            ("mouseMoved", end),
            ("mouseReleased", end),
        ):
            self._page("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", buttons=1, clickCount=1)

    def picture(self, path: Path, script: str = "") -> None:
        """Write a PNG of the view, or of the whole element of an expression."""
        told: dict[str, Any] = {}
        if script:
            edges = "{x: box.x + scrollX, y: box.y + scrollY, width: box.width, height: box.height, scale: 1}"
            clip = self.run(f"(() => {{ const box = ({script}).getBoundingClientRect(); return {edges}; }})()")
            told = {"clip": clip, "captureBeyondViewport": True}
        path.write_bytes(base64.b64decode(self._page("Page.captureScreenshot", **told)["data"]))

    def close(self) -> None:
        self._process.kill()
        self._process.wait(10)
        for descriptor in (self._in, self._out):
            os.close(descriptor)
        self._log.close()


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    opened = Browser(tmp_path)
    yield opened
    opened.close()
