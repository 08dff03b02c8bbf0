"""What docs/dwh.md shows as request and answer is what the daemon answers, in the order of the page."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import httpx
import pytest

from daemon import Daemons

PAGE = Path(__file__).parents[2] / "docs" / "dwh.md"
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SHOWN = "http://127.0.0.1:8080"


@pytest.mark.slow
def test_each_request_of_the_page_has_the_answer_that_it_shows(daemons: Daemons) -> None:
    url = daemons.start("", wait=True, key="").url
    blocks = [(kind, text.replace(SHOWN, url)) for kind, text in BLOCK.findall(PAGE.read_text(encoding="utf-8"))]
    answered = 0
    said, in_python = "", None
    for kind, text in blocks:
        if kind == "sh" and "curl" in text:
            command = ["bash", "-c", text.replace("curl ", "curl -s ")]
            said, in_python = subprocess.run(command, capture_output=True, text=True, check=True).stdout, None
        elif kind == "python":
            in_python = evaluated(text)
        elif kind == "json" and said:
            assert json.loads(said) == json.loads(text), text
            assert in_python is None or in_python.keys() <= {*json.loads(text), "dry_run"}
            answered += 1
        elif kind == "" and said.startswith("HTTP/"):
            assert set(text.splitlines()) <= set(said.splitlines()), said
            answered += 1
    assert answered >= 8


def evaluated(text: str) -> Any:
    """The value of the last line."""
    *statements, last = text.strip().splitlines()
    names: dict[str, Any] = {"httpx": httpx}
    exec("\n".join(statements), names)  # noqa: S102 - the page's own
    return eval(last, names)  # noqa: S307 - the page's own
