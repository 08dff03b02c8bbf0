"""The OpenAPI document promises what /s3 does: schemathesis makes requests from it and looks at the answers."""

from pathlib import Path

import pytest

from daemon import Daemons
from explored import explore


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_schemathesis_finds_no_fault_of_the_server_and_no_broken_promise(daemons: Daemons, tmp_path: Path) -> None:
    explore(daemons, tmp_path, "--include-path-regex", "^/s3/", examples=5)
