"""What the OpenAPI document promises of operations, tried by schemathesis: no fault of the server whatever is sent."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from daemon import Daemons


@pytest.mark.slow
def test_schemathesis_finds_no_fault_of_the_server_on_any_route(daemons: Daemons, tmp_path: Path) -> None:
    daemon = daemons.start("shelf")
    command = [
        str(Path(sys.executable).with_name("schemathesis")),
        # the warehouse has a longer run of its own
        *("run", f"{daemon.url}/openapi.json", "--exclude-path-regex", "^/dwh/"),
        *("--phases", "examples,coverage,fuzzing", "--max-examples", "8", "--seed", "1"),
        *("--checks", "not_a_server_error,content_type_conformance,response_headers_conformance"),
        # one worker: threads of CPython 3.11 trip over each other in ast.parse, which hypothesis calls
        *("--workers", "1", "--request-timeout", "20", "--no-color", "--generation-database", "none"),
    ]
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "COLUMNS": "160"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert daemon.get("/health").status == 200
    assert "Traceback" not in daemon.log
