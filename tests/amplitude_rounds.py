"""Kills the pull from Amplitude over and over; see `kill_rounds`.

`uv run python tests/amplitude_rounds.py [--rounds 200] [--seed 1] [--minutes 60] [--folder FOLDER]`
"""

import random
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from kill_rounds import Command, main
from pull_rounds import backfill, delivered, hours_before, set_aside
from simulators.amplitude import AmplitudeFault, AmplitudeSimulator, amplitude_events

JOB, SOURCE = "amplitude", "web"
BAD_LINES = (b'{"city":"Z\xfcrich"}', b'{"no":"uuid"}', b"{")
FAULTS = (AmplitudeFault(503), AmplitudeFault(429, retry_after_seconds=0), AmplitudeFault(cut_bytes=900))


@dataclass
class AmplitudeWorld:
    """One project. Hours grow, also ones that were pulled; lines that cannot be taken come and go."""

    service: AmplitudeSimulator
    now: datetime
    killed: Path
    calm: Path
    remembered = ("state.db*",)

    @property
    def to_the_end(self) -> tuple[Command, ...]:
        return (("run", JOB), backfill(JOB, self.now), ("run", JOB))

    def environ(self, folder: Path) -> Mapping[str, str]:
        return {**self.service.environment(SOURCE), "AMPLITUDE_LOOKBACK_DAYS": "1"}

    def change(self, chance: random.Random) -> None:
        state = self.service.state
        for at in chance.sample(hours_before(self.now), 6):
            events = state.events.get((SOURCE, at), [])
            grown = amplitude_events(SOURCE, at, len(events) + chance.choice((1, 5, 30)))
            state.events[SOURCE, at] = list(grown)
        for at in chance.sample(sorted(at for _, at in state.events), 2):
            state.lines[SOURCE, at] = chance.sample(BAD_LINES, chance.randrange(3))
        for _ in range(chance.choice((0, 0, 1, 2))):
            self.service.add_fault(chance.choice(FAULTS))

    def command(self, chance: random.Random) -> Command:
        return chance.choice(self.to_the_end[:2])

    def calm_down(self) -> None:
        self.service.state.waiting.clear()

    def rows(self, folder: Path) -> Counter[str]:
        aside = set_aside(folder, JOB)
        if folder == self.killed:  # lines that the source has no more were set aside while it had them
            aside &= set_aside(self.calm, JOB)
        return delivered(folder, f"{JOB}/{SOURCE}/hours/", BAD_LINES) + aside

    def source_rows(self) -> int:
        # In an object and in the table of events.
        return 2 * sum(len(events) for events in self.service.state.events.values())


@contextmanager
def world(folder: Path) -> Iterator[AmplitudeWorld]:
    """A project without events."""
    now = datetime.now(UTC)
    with AmplitudeSimulator(clock=lambda: now) as service:
        yield AmplitudeWorld(service, now, folder / "killed", folder / "calm")


if __name__ == "__main__":
    sys.exit(main(world, str(__doc__)))
