"""Some rounds of each program that kills a pipeline, takes its state away and sets it back; see `kill_rounds`."""

from pathlib import Path

import pytest

import amplitude_rounds
import appmetrica_rounds
import drive_rounds
import inbox_rounds
from effort import EFFORT
from kill_rounds import WORLD_ROUNDS, MakeWorld, faults, lived, started

ROUNDS = min(10 * EFFORT, WORLD_ROUNDS)
# Each with a seed whose few rounds both take the state away and set it back.
WORLDS = {
    "dynamo_to_drive": (drive_rounds.world, "1-0"),
    "csv_inbox": (inbox_rounds.world, "1-0"),
    "amplitude": (amplitude_rounds.world, "2-0"),
    "appmetrica": (appmetrica_rounds.world, "2-0"),
}


@pytest.mark.slow
@pytest.mark.timeout(500)
@pytest.mark.parametrize(("make", "seed"), WORLDS.values(), ids=WORLDS)
def test_kills_with_the_state_taken_away_and_set_back_lose_double_and_wedge_nothing(
    make: MakeWorld, seed: str, tmp_path: Path
) -> None:
    with started() as runner:
        counts = lived(make, runner, tmp_path / "world", seed, ROUNDS)
    assert not faults(counts)
    assert counts["kills"] >= ROUNDS // 3
    assert counts["taken_away"]
    assert counts["set_back"]
    assert counts["rows"]
