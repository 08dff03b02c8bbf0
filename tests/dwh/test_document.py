"""The OpenAPI document promises what the routes do: schemathesis makes requests from it and looks at the answers."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from daemon import Daemons


@pytest.mark.slow
@pytest.mark.parametrize("dialect", ["sqlite", "postgres"])
def test_schemathesis_finds_no_fault_of_the_server_and_no_broken_promise(
    daemons: Daemons, tmp_path: Path, dialect: str, request: pytest.FixtureRequest
) -> None:
    environ = {}
    if dialect == "postgres":
        environ["DWH_DATABASE_URL"] = request.getfixturevalue("postgres_server").new_database()
    daemon = daemons.start(**environ)
    command = [
        str(Path(sys.executable).with_name("schemathesis")),
        *("run", f"{daemon.url}/openapi.json", "--include-path-regex", "^/dwh/"),
        *("--phases", "examples,coverage,fuzzing", "--max-examples", "3", "--seed", "1"),
        # JSON Schema takes 1.0 for an integer, and cannot say what NDJSON and CSV may hold
        # here everybody may call; who may with keys is tried on every route in tests/ops/test_access_to_routes.py
        *("--exclude-checks", "positive_data_acceptance,ignored_auth"),
        # one worker: threads of CPython 3.11 trip over each other in ast.parse, which hypothesis calls
        *("--workers", "1", "--request-timeout", "20", "--no-color", "--generation-database", "none"),
    ]
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "COLUMNS": "160"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
