"""Kills lake_day over and over; see `kill_rounds`.

`uv run python tests/lake_rounds.py [--rounds 200] [--seed 1] [--minutes 60] [--folder FOLDER]`
"""

import io
import random
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path

from app.object_store.port import PutRequest
from kill_rounds import Command, main
from lake_tree import DAY, Tree, parquet, rows

DEVICES, DAYS = ("a", "b", "c", "d"), 3
RUN = ("run", "lake_day")


@dataclass
class LakeWorld:
    """The same objects in two directories. What is remembered is the catalog, and all that lies in the store."""

    killed: Tree
    calm: Tree
    remembered = ("lake.db*", "objects/lake")
    to_the_end = (RUN, RUN)

    def environ(self, folder: Path) -> Mapping[str, str]:
        return {"CATALOG": "iceberg"}

    def change(self, chance: random.Random) -> None:
        for _ in range(chance.choice((0, 1, 10))):
            device, day = chance.choice(DEVICES), DAY + timedelta(days=chance.randrange(DAYS))
            self.put(device, chance.randrange(24), day, chance.randrange(1, 30))

    def put(self, device: str, hour: int, day: date, count: int) -> None:
        content = parquet(rows(device, hour, count=count, day=day))
        for tree in (self.killed, self.calm):
            tree.store.put(
                tree.key(device, hour, day), io.BytesIO(content), PutRequest("application/vnd.apache.parquet")
            )

    def command(self, chance: random.Random) -> Command:
        return RUN

    def calm_down(self) -> None:
        """Nothing loses answers here."""

    def rows(self, folder: Path) -> Counter[str]:
        tree = self.killed if folder == self.killed.folder else self.calm
        return Counter({str(row): number for row, number in tree.in_table().items()})

    def source_rows(self) -> int:
        return sum(self.calm.in_objects().values())


@contextmanager
def world(folder: Path) -> Iterator[LakeWorld]:
    """A few objects to begin with."""
    made = LakeWorld(Tree(folder / "killed"), Tree(folder / "calm"))
    for device in DEVICES:
        made.put(device, 0, DAY, 4)
    yield made


if __name__ == "__main__":
    sys.exit(main(world, str(__doc__)))
