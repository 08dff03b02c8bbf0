"""CSV files for the inbox of the demo: now and then one more, some rows known and some new, and now and then a bad one.

Invariant: a file appears under its name only when it is whole; which rows it holds depends on its number only.
"""

from pathlib import Path

from simulators.repeating import Repeating

HEAD = "cluster_name,id,name,value"
ROWS = 6
BAD_EACH = 8
WRITE_SECONDS = 7.0


def content(number: int) -> str:
    """File `number`: half of its rows have the keys of the file before; each eighth lacks the key."""
    if number % BAD_EACH == BAD_EACH - 1:
        return f"id,name\n{number:04d},no key\n"
    first = number * ROWS // 2
    rows = [f"cluster-{n:04d},{n:04d},Plant {n % 5},{(n * 37 + number) % 100}.0" for n in range(first, first + ROWS)]
    return "\n".join([HEAD, *rows]) + "\n"


class Drops:
    """Writes files into `folder` until it is closed. `number` counts them."""

    def __init__(self, folder: Path, every_seconds: float = WRITE_SECONDS) -> None:
        self.number = 0
        self._folder = folder
        self._live = Repeating("drops", self.drop, every_seconds)

    def drop(self) -> Path:
        """Write the next file."""
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"clusters_{self.number:04d}.csv"
        part = path.with_suffix(".part")
        part.write_text(content(self.number), encoding="utf-8")
        part.replace(path)
        self.number += 1
        return path

    def start(self) -> None:
        """Go on from a thread of its own."""
        self._live.start()

    def close(self) -> None:
        """Stop."""
        self._live.close()
