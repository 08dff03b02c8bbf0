"""Routes explored by schemathesis from the OpenAPI document, with a key of all scopes."""

import os
import subprocess
import sys
from pathlib import Path

from app.web.auth import new_key
from daemon import Daemons

EXCEPTIONS = Path(__file__).with_name("schemathesis.toml")


def explore(daemons: Daemons, folder: Path, *which: str, examples: int, jobs: str = "", **environ: str) -> None:
    """Fails with the report unless nothing is found but what EXCEPTIONS allows, and the daemon logged no traceback."""
    secret, line = new_key("explorer", "admin", bytes)
    environ |= {"API_KEYS": line, "KEY_REQUESTS_PER_SECOND": "10000"}
    daemon = daemons.start(jobs, wait=True, key="", **environ)
    command = [
        str(Path(sys.executable).with_name("schemathesis")),
        *("--config-file", str(EXCEPTIONS), "--no-color"),
        *("run", f"{daemon.url}/openapi.json", "--header", f"X-API-Key: {secret}", *which),
        *("--phases", "examples,coverage,fuzzing", "--max-examples", str(examples), "--seed", "1"),
        # one worker: threads of CPython 3.11 trip over each other in ast.parse, which hypothesis calls
        *("--workers", "1", "--request-timeout", "20", "--generation-database", "none"),
    ]
    there = {**os.environ, "COLUMNS": "160"}
    done = subprocess.run(command, cwd=folder, env=there, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-9000:] + done.stderr[-2000:]
    assert daemon.get("/health").status == 200
    assert "Traceback" not in daemon.log
