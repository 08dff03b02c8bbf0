"""The OpenAPI document promises what the routes do: schemathesis makes requests from it and looks at the answers."""

from pathlib import Path

import pytest

from daemon import Daemons
from explored import explore


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("dialect", ["sqlite", "postgres"])
def test_schemathesis_finds_no_fault_of_the_server_and_no_broken_promise(
    daemons: Daemons, tmp_path: Path, dialect: str, request: pytest.FixtureRequest
) -> None:
    environ = {}
    if dialect == "postgres":
        environ["DWH_DATABASE_URL"] = request.getfixturevalue("postgres_server").new_database()
    explore(daemons, tmp_path, "--include-path-regex", "^/dwh/", examples=3, **environ)
