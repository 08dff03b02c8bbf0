"""The OpenAPI document promises what /s3 does: schemathesis makes requests from it and looks at the answers."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from daemon import Daemons


@pytest.mark.slow
def test_schemathesis_finds_no_fault_of_the_server_and_no_broken_promise(daemons: Daemons, tmp_path: Path) -> None:
    daemon = daemons.start()
    command = [
        str(Path(sys.executable).with_name("schemathesis")),
        *("run", f"{daemon.url}/openapi.json", "--include-path-regex", "^/s3/"),
        *("--phases", "examples,coverage,fuzzing", "--max-examples", "5", "--seed", "1"),
        # JSON Schema cannot say what a key may be, nor that a form has exactly one file
        # here everybody may call; who may with keys is tried on every route in tests/ops/test_access_to_routes.py
        *("--exclude-checks", "positive_data_acceptance,ignored_auth"),
        # one worker: threads of CPython 3.11 trip over each other in ast.parse, which hypothesis calls
        *("--workers", "1", "--request-timeout", "20", "--no-color", "--generation-database", "none"),
    ]
    # a condition on the object is looked at before its body is: 412 is an answer to any request that has one
    refusals = '[400, 401, 403, 404, 405, 406, 409, 412, 415, 422, 428, 429, "5xx"]'
    (tmp_path / "schemathesis.toml").write_text(f"[checks]\nnegative_data_rejection.expected-statuses = {refusals}\n")
    environ = {**os.environ, "COLUMNS": "160"}
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-9000:] + done.stderr[-2000:]
