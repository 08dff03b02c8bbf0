"""Kills csv_inbox over and over; see `kill_rounds`.

`uv run python tests/inbox_rounds.py [--rounds 200] [--seed 1] [--minutes 60] [--folder FOLDER]`
"""

import json
import os
import random
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import inbox_world
from app.csv_inbox.discovery import BAD_ROWS, REASON
from inbox_world import Table, World, model, parsed
from kill_rounds import Command, main

CONFIG = {"checksum_wait_seconds": 0, "key_column": "k", "index_from_mb": 0}
LONG = "中" * 80
FIRST_AT = 1_700_000_000


@dataclass
class InboxWorld:
    """Files that are dropped into both inboxes, each with the time that gives it its turn."""

    killed: World
    calm: World
    merged: Table | None = None
    files: int = 0
    rejected: int = 0
    remembered = (
        "state.db*",
        "merged_metadata.json",
        ".final_clusters_data.csv.loads",
        ".final_clusters_data.csv.index",
        ".final_clusters_data.csv.merge-journal.json",
    )
    to_the_end = (("run", "csv_inbox"),)

    def environ(self, folder: Path) -> Mapping[str, str]:
        return {}

    def change(self, chance: random.Random) -> None:
        for _ in range(chance.choice((1, 2, 4))):
            self._drop_one(chance)

    def _drop_one(self, chance: random.Random) -> None:
        names = ["k", *chance.sample(["a", "b", "c"], chance.randint(1, 3))]
        rows = [
            ",".join([str(chance.randrange(2000)), *(f"{self.files}-{number}" for _ in names[1:])])
            for number in range(chance.choice((3, 40, 400)))
        ]
        is_bad = chance.random() < 0.1
        self._drop(chance, "\n".join([",".join(names), *rows, *(["ragged"] if is_bad else []), ""]), is_bad=is_bad)

    def _drop(self, chance: random.Random, content: str, *, is_bad: bool) -> None:
        name = f"{self.files}{LONG if chance.random() < 0.2 else ''}.csv"
        for each in (self.killed, self.calm):
            at = FIRST_AT + self.files
            os.utime(each.drop(name, content), (at, at))
        self.files += 1
        self.rejected += is_bad
        if not is_bad:
            self.merged = model(self.merged, parsed(content.encode()), "k")

    def command(self, chance: random.Random) -> Command:
        return self.to_the_end[0]

    def calm_down(self) -> None:
        """One more file: metadata that were taken away come with the next merge."""
        self._drop(random.Random(0), "k,a\nlast,1\n", is_bad=False)  # noqa: S311 - no secret

    def rows(self, folder: Path) -> Counter[str]:
        here = self.killed if folder == self.killed.folder else self.calm
        names, rows = parsed(here.master)
        found = Counter(f"row {sorted(zip(names, row, strict=True))}" for row in rows)
        # Without its journal a file that is archived already may be merged once more, which changes nothing.
        found.update({f"archived {path.read_text()}" for path in here.config.archive_dir.iterdir()})
        told = (REASON, BAD_ROWS)
        found.update(
            f"rejected {path.read_text()}"
            for path in here.config.rejected_dir.iterdir()
            if not path.name.endswith(told)
        )
        found.update(f"waiting {name}" for name in here.waiting)
        found[f"metadata {sorted(here.metadata['columns'])} {here.metadata['row_count']}"] += 1
        return found

    def source_rows(self) -> int:
        assert self.merged is not None
        return len(self.merged[1]) + self.files + 1


@contextmanager
def world(folder: Path) -> Iterator[InboxWorld]:
    """Two empty ones."""
    for name in ("killed", "calm"):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(CONFIG))
    yield InboxWorld(inbox_world.world(folder / "killed"), inbox_world.world(folder / "calm"))


if __name__ == "__main__":
    sys.exit(main(world, str(__doc__)))
