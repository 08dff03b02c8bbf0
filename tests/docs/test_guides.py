"""What the pages of the HTTP API show as request and answer, by curl and in Python, is what the daemon answers."""

import hashlib
import json
import re
import subprocess
from base64 import b64encode
from contextlib import chdir
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest

from daemon import Daemons

DOCS = Path(__file__).parents[2] / "docs"
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SHOWN = re.compile(r"(?:http://)?(?:localhost|127\.0\.0\.1):8080")
OF_THE_MOMENT = {"etag", "ETag", "version_id", "signature", "expires_at", "last_modified", "LastModified"}
FILES = {"file": bytes(range(256)) * 4, "other": b"other bytes", "day.csv": b"a,b\n", "day.csv.gz": bytes(1024)}


@pytest.mark.slow
@pytest.mark.parametrize(("page", "least"), [("dwh.md", 8), ("s3.md", 6), ("analytics.md", 4)])
def test_each_request_of_a_page_has_the_answer_that_it_shows(
    daemons: Daemons, tmp_path: Path, page: str, least: int
) -> None:
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content)
    if page == "analytics.md":
        telemetry(tmp_path / "data" / "objects" / "telemetry")
    url = daemons.start("", wait=True, key="").url
    names: dict[str, Any] = {"json": json, "Path": Path, "b64encode": b64encode, "sha256": hashlib.sha256}
    said, in_python, answered = "", None, 0
    with httpx.Client(timeout=60) as client, chdir(tmp_path):
        names["httpx"] = client
        for kind, text in BLOCK.findall(SHOWN.sub(url, (DOCS / page).read_text(encoding="utf-8"))):
            if kind == "sh" and "curl" in text:
                said, in_python = "" if "..." in text else by_curl(text), None
            elif kind == "python":
                in_python = evaluated(text, names)
                assert not isinstance(in_python, int) or in_python < 300, text
            elif kind == "json" and said:
                shown = json.loads(text)
                assert matches(shown, last_json(said), exactly=page != "analytics.md"), (text, said)
                assert in_python is None or in_python.keys() <= {*shown, "dry_run"}, text
                said, answered = "", answered + 1
            elif kind == "" and said.startswith("HTTP/"):
                assert set(text.splitlines()) <= set(said.splitlines()), said
                answered += 1
    assert answered >= least


def by_curl(text: str) -> str:
    command = ["bash", "-c", text.replace("curl ", "curl -s ")]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def last_json(said: str) -> Any:
    """The last of the JSON texts that stand behind each other."""
    end, found = 0, None
    while end < len(said.rstrip()):
        found, end = json.JSONDecoder().raw_decode(said, end)
        end += len(said[end:]) - len(said[end:].lstrip())
    return found


def matches(shown: Any, said: Any, *, exactly: bool) -> bool:
    """Whether an answer is as shown: but for `...` and what is of the moment, and not `exactly`: but for the values."""
    if isinstance(shown, dict):
        same = isinstance(said, dict) and shown.keys() == said.keys()
        names = shown.keys() - OF_THE_MOMENT
        return same and all(matches(shown[name], said[name], exactly=exactly) for name in names)
    if isinstance(shown, list) and not exactly:
        return bool(said) and matches(shown[0], said[0], exactly=False)
    if isinstance(shown, list):
        return len(shown) == len(said) and all(
            matches(one, other, exactly=True) for one, other in zip(shown, said, strict=True)
        )
    if isinstance(shown, str) and "..." in shown:
        return str(said).startswith(shown.partition("...")[0])
    return bool(shown == said) if exactly else None in (shown, said) or isinstance(said, type(shown))


def evaluated(text: str, names: dict[str, Any]) -> Any:
    """The value of the last line; what the lines before it name stays for the rest of the page."""
    *statements, last = text.strip().splitlines()
    exec("\n".join(statements), names)  # noqa: S102 - the page's own
    return eval(last, names)  # noqa: S307 - the page's own


def telemetry(folder: Path) -> None:
    """Four readings of two devices."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    times = [datetime(2026, 2, day, hour, tzinfo=UTC) for day, hour in ((1, 0), (2, 0), (7, 12), (1, 6))]
    columns = {
        "timestamp": pa.array(times, pa.timestamp("us", "UTC")),
        "device_id": ["D1", "D1", "D1", "D7"],
        "device_type": ["bulb"] * 4,
        "voltage": [229.6, 230.5, 230.1, 231.0],
        "current": [0.04, 0.04, 0.05, 0.06],
        "power": [391.4, 300.0, 200.0, 482.1],
        "temperature": [41.5, 40.9, 40.0, 39.0],
    }
    folder.mkdir(parents=True)
    pq.write_table(pa.table(columns), folder / "day_001.parquet")
