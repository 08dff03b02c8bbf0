"""Twenty rounds of each program that kills a pipeline, takes its state away and sets it back; see `kill_rounds`."""

from pathlib import Path

import pytest

import amplitude_rounds
import appmetrica_rounds
import drive_rounds
import inbox_rounds
from kill_rounds import WORLD_ROUNDS, MakeWorld, faults, lived, started

WORLDS = {
    "dynamo_to_drive": drive_rounds.world,
    "csv_inbox": inbox_rounds.world,
    "amplitude": amplitude_rounds.world,
    "appmetrica": appmetrica_rounds.world,
}


@pytest.mark.slow
@pytest.mark.timeout(500)
@pytest.mark.parametrize("make", WORLDS.values(), ids=WORLDS)
def test_twenty_kills_with_the_state_taken_away_and_set_back_lose_double_and_wedge_nothing(
    make: MakeWorld, tmp_path: Path
) -> None:
    with started() as runner:
        counts = lived(make, runner, tmp_path / "world", "1-0", WORLD_ROUNDS)
    assert not faults(counts)
    assert counts["kills"] > WORLD_ROUNDS // 3
    assert counts["taken_away"]
    assert counts["set_back"]
    assert counts["rows"]
