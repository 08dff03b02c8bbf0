"""Kills the pull from AppMetrica over and over; see `kill_rounds`.

`uv run python tests/appmetrica_rounds.py [--rounds 200] [--seed 1] [--minutes 60] [--folder FOLDER]`
"""

import random
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from kill_rounds import Command, main
from pull_rounds import backfill, delivered, hours_before, set_aside
from simulators.appmetrica import AppMetricaFault, AppMetricaSimulator, appmetrica_rows

JOB = "appmetrica"
BAD_LINES = (b"one,two", b'one,"Z\xfcrich')
FAULTS = (AppMetricaFault(503), AppMetricaFault(cut=True), AppMetricaFault(half=True))


@dataclass
class AppMetricaWorld:
    """One application. Hours grow, also ones that were pulled; lines that cannot be taken come and go."""

    service: AppMetricaSimulator
    now: datetime
    killed: Path
    calm: Path
    received: dict[datetime, int] = field(default_factory=dict)
    remembered = ("state.db*",)

    @property
    def to_the_end(self) -> tuple[Command, ...]:
        return (("run", JOB), backfill(JOB, self.now), ("run", JOB))

    def environ(self, folder: Path) -> Mapping[str, str]:
        return {**self.service.environment(), "APPMETRICA_LOOKBACK_DAYS": "4", "APPMETRICA_RECOUNT_DAYS": "4"}

    def change(self, chance: random.Random) -> None:
        state = self.service.state
        for at in chance.sample(hours_before(self.now), 6):
            self.received[at] = self.received.get(at, 0) + chance.choice((1, 5, 30))
        for at in chance.sample(sorted(self.received), 2):
            state.lines[at] = chance.sample(BAD_LINES, chance.randrange(3))
        state.questions = chance.choice((0, 0, 1))
        for _ in range(chance.choice((0, 0, 1, 2))):
            self.service.add_fault(chance.choice(FAULTS))

    def command(self, chance: random.Random) -> Command:
        return chance.choice(self.to_the_end[:2])

    def calm_down(self) -> None:
        self.service.state.waiting.clear()
        self.service.state.questions = 0

    def rows(self, folder: Path) -> Counter[str]:
        aside = set_aside(folder, JOB)
        if folder == self.killed:  # lines that the source has no more were set aside while it had them
            aside &= set_aside(self.calm, JOB)
        return delivered(folder, f"{JOB}/events/", BAD_LINES) + aside

    def source_rows(self) -> int:
        # In an object and in the table of events.
        return 2 * sum(self.received.values())


@contextmanager
def world(folder: Path) -> Iterator[AppMetricaWorld]:
    """An application without events."""
    now = datetime.now(UTC)
    with AppMetricaSimulator() as service:
        made = AppMetricaWorld(service, now, folder / "killed", folder / "calm")
        application_id = service.state.application_id
        service.state.rows = lambda at: appmetrica_rows(application_id, at, made.received.get(at, 0))
        yield made


if __name__ == "__main__":
    sys.exit(main(world, str(__doc__)))
