"""Some rounds of the program that kills, pauses and confuses daemons of the export; see `export_rounds`."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from effort import EFFORT
from export_rounds import Servers, lived, serving
from kill_rounds import WORLD_ROUNDS, Runner, faults
from needs import faketime_library, needs

ROUNDS = 4 * EFFORT
SITTINGS = {"sqlite-directory": 0, "postgresql-directory": 1, "sqlite-s3": 2, "postgresql-s3": 3}


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Servers, Runner, Runner]]:
    needs("influxd")
    faketime_library()
    with serving(tmp_path_factory.mktemp("servers")) as all_of_them:
        yield all_of_them


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("number", SITTINGS.values(), ids=SITTINGS)
def test_rounds_of_kills_pauses_lost_states_and_wrong_clocks_lose_double_invent_and_wedge_nothing(
    servers: tuple[Servers, Runner, Runner], number: int, tmp_path: Path
) -> None:
    outside, *runners = servers
    counts = lived(outside, (runners[0], runners[1]), tmp_path / "sitting", f"1-{number * WORLD_ROUNDS}", ROUNDS)
    assert not faults(counts)
    assert len(counts["recovery_seconds"]) == ROUNDS + 1
    assert counts["rows"] > 0
