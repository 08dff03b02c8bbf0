"""Kills dynamo_to_drive over and over; see `kill_rounds`.

`uv run python tests/drive_rounds.py [--rounds 200] [--seed 1] [--minutes 60] [--folder FOLDER]`
"""

import random
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from app.core.windows import floor_to
from kill_rounds import Command, main
from shipping import Shipping, item, shipping
from simulators.drive import DriveFault, DriveSimulator

HOURS = 5
JOBS = ("dynamo_to_drive", "dynamo_to_drive_late", "dynamo_to_drive_reconcile")
REQUESTS = ("POST /token", "GET /drive/v3/files$", "GET .*generateIds", "POST /upload", "PATCH /upload")
FIRST, SECOND = "temp", "depth"


@dataclass
class DriveWorld:
    """One table, and a Drive for each installation."""

    killed: Shipping
    calm: Shipping
    first_at: datetime
    items: dict[datetime, dict[str, str]] = field(default_factory=dict)
    remembered = ("state.db*",)
    to_the_end = tuple(("run", job) for job in JOBS)

    def environ(self, folder: Path) -> Mapping[str, str]:
        return (self.killed if folder == self.killed.folder else self.calm).environ

    def change(self, chance: random.Random) -> None:
        for _ in range(chance.choice((0, 5, 40))):
            at = self.first_at + timedelta(seconds=chance.randrange(HOURS * 3600))
            self._put(at, temp=f"{chance.random():.4f}", **({SECOND: "7"} if chance.random() < 0.3 else {}))
        for at in chance.sample(sorted(self.items), min(3, len(self.items))):
            self._put(at, **{**self.items[at], FIRST: f"{chance.random():.4f}"})
        if chance.random() < 0.4:
            fault = DriveFault(after=chance.random() < 0.7, cut=chance.random() < 0.7)
            self.killed.drive.add_fault(fault, chance.choice(REQUESTS))
        self.killed.drive.state.stale_lists = chance.choice((0, 0, 2))

    def _put(self, at: datetime, **values: str) -> None:
        self.items[at] = values
        self.killed.put(item(at, **values))

    def command(self, chance: random.Random) -> Command:
        return ("run", chance.choice((*JOBS[:1], *JOBS)))

    def calm_down(self) -> None:
        self.killed.drive.state.waiting.clear()
        self.killed.drive.state.stale_lists = 0

    def rows(self, folder: Path) -> Counter[str]:
        drive = (self.killed if folder == self.killed.folder else self.calm).drive
        found = Counter[str]()
        for file in drive.state.files.matching(lambda file: file.is_binary and not file.trashed):
            header, *lines = file.content.decode().splitlines()
            names = header.split(",")
            found.update(f"{file.name}: {sorted(zip(names, line.split(','), strict=True))}" for line in lines)
        return found

    def source_rows(self) -> int:
        return len(self.items)


@contextmanager
def world(folder: Path) -> Iterator[DriveWorld]:
    """The last hours up to now."""
    with ExitStack() as stack:
        killed = stack.enter_context(shipping(folder / "killed"))
        calm = Shipping(killed.dynamo, stack.enter_context(DriveSimulator()), folder / "calm")
        for each in (killed, calm):
            each.extra |= {"DRIVE_CATCHUP_HOURS": str(HOURS + 3), "DRIVE_LATE_HOURS": str(HOURS + 3)}
        first_at = floor_to(datetime.now(UTC), 3600) - timedelta(hours=HOURS - 1)
        yield DriveWorld(killed, calm, first_at)


if __name__ == "__main__":
    sys.exit(main(world, str(__doc__)))
