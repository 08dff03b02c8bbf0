"""Routes explored by schemathesis from the OpenAPI document, with a key of all scopes.

`uv run python tests/explored.py [--minutes 10] [--seed 1] [--examples 3] [--postgres]` explores all of them in a daemon
with every outside system of the demo, with all checks: seed after seed, until so many minutes have passed.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, closing
from pathlib import Path

from app.web.auth import new_key
from daemon import Daemons
from postgres import running_postgres
from simulators.demo import simulated

EXCEPTIONS = Path(__file__).with_name("schemathesis.toml")


def explore(
    daemons: Daemons, folder: Path, *which: str, examples: int, jobs: str = "", seed: int = 1, **environ: str
) -> None:
    """Fails with the report unless nothing is found but what EXCEPTIONS allows, and the daemon logged no traceback."""
    secret, line = new_key("explorer", "admin", bytes)
    environ |= {"API_KEYS": line, "KEY_REQUESTS_PER_SECOND": "10000"}
    daemon = daemons.start(jobs, wait=True, key="", **environ)
    command = [
        str(Path(sys.executable).with_name("schemathesis")),
        *("--config-file", str(EXCEPTIONS), "--no-color"),
        *("run", f"{daemon.url}/openapi.json", "--header", f"X-API-Key: {secret}", *which),
        *("--phases", "examples,coverage,fuzzing", "--max-examples", str(examples), "--seed", str(seed)),
        # one worker: threads of CPython 3.11 trip over each other in ast.parse, which hypothesis calls
        *("--workers", "1", "--request-timeout", "20", "--generation-database", "none"),
    ]
    there = {**os.environ, "COLUMNS": "160"}
    done = subprocess.run(command, cwd=folder, env=there, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-40_000:] + done.stderr[-2000:]
    assert daemon.get("/health").status == 200
    assert "Traceback" not in daemon.log


def explore_demo(folder: Path, *which: str, examples: int, seed: int, postgres: bool = False) -> None:
    """`explore`, with every outside system of the demo set, and the warehouse in SQLite or on a PostgreSQL."""
    with ExitStack() as stack:
        environ = dict(stack.enter_context(simulated({"DATA_DIR": str(folder)}, live=True)))
        if postgres:
            environ["DWH_DATABASE_URL"] = stack.enter_context(running_postgres()).new_database()
        daemons = stack.enter_context(closing(Daemons(folder)))
        explore(daemons, folder, *which, examples=examples, seed=seed, **environ)


def main() -> int:
    """The exit code: 1 when something was found, which is printed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help="begin with no seed after so long")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--examples", type=int, default=3)
    parser.add_argument("--postgres", action="store_true", help="the warehouse on a PostgreSQL")
    given = parser.parse_args()
    until, seed = time.monotonic() + given.minutes * 60, given.seed
    while seed == given.seed or time.monotonic() < until:
        with tempfile.TemporaryDirectory() as folder:
            try:
                explore_demo(Path(folder), examples=given.examples, seed=seed, postgres=given.postgres)
            except AssertionError as found:
                print(f"seed {seed}:\n{found}")  # noqa: T201 - a program
                return 1
        print(f"seed {seed}: nothing found", flush=True)  # noqa: T201 - a program
        seed += 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
