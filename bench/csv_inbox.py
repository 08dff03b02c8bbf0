"""The CSV inbox versus pandas, Polars and DuckDB: `uv run --with polars bench/csv_inbox.py [--mb 1000]`.

Master and incoming file are generated from a fixed seed; every second incoming row replaces one, the others are new.
Each way runs in its own process, in turns, and so does the generator: a child's peak memory starts at that of its
parent. "headwater, indexed" is every merge but the first. Polars is not a dependency of Headwater.

Before each way, as much memory as it will write is written to a file and freed: on a virtual machine the first use of a
page costs ten times the system time, which would be charged to whichever way runs first.
"""

import argparse
import importlib.util
import random
import re
import sys
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from measured import Cost, Goal, in_turns, run, table

WAYS = Path(__file__).with_name("csv_ways.py")
HEAD = "k,name,note,value,empty,code\n"
INDEXED = "headwater, indexed"
FLOOR = "floor of indexed"
PEERS = {"pandas": 7.0, "polars": 1.0, "duckdb": 1.0}
OURS = {"OPENBLAS_NUM_THREADS": "1"}
"""As `python -m app` sets it."""


def row(number: int, noise: str) -> str:
    """About 100 bytes: a number with leading zeros, an empty cell, some quoting."""
    note = f'"quoted, {noise}"' if number % 50 == 0 else noise
    return f"cluster-{number:08d},Plant {number % 977},{note},{number % 1000}.50,,{number % 10000:05d}\n"


def fill(path: Path, size_bytes: int, start: int, step: int) -> int:
    """Write rows until the size is reached; the number after the last."""
    chance = random.Random(4)
    noises = ["".join(chance.choices("abcdefghij klmnop", k=48)) for _ in range(1000)]
    number = start
    with path.open("w", encoding="utf-8") as file:
        written = file.write(HEAD)
        while written < size_bytes:
            written += file.write("".join(row(number + n * step, noises[n]) for n in range(1000)))
            number += 1000 * step
    return number


def prepared(folder: Path, given: argparse.Namespace) -> None:
    """The master, and an incoming file whose first half of rows are spread over it and whose second half are new."""
    end = fill(folder / "whole.csv", given.mb * 1_000_000, 0, 1)
    half = given.incoming_mb * 500_000
    step = max((end * 100) // max(half, 1) // 2, 1)
    fill(folder / "old.csv", half, 0, step)
    fill(folder / "new.csv", half, end, 1)
    with (folder / "incoming.csv").open("w") as out:
        out.write((folder / "old.csv").read_text() + (folder / "new.csv").read_text().removeprefix(HEAD))
    (folder / "first.csv").write_text(HEAD + row(end + 1, "before"))


def warm(folder: Path) -> None:
    """Have the machine's memory at hand."""
    piece = bytes(1 << 20)
    with (folder / "warm").open("wb", 0) as file:
        for _ in range((folder / "whole.csv").stat().st_size * 3 // 2 // len(piece) + 1):
            file.write(piece)
    (folder / "warm").unlink()


def once(way: str, folder: Path) -> Cost:
    """One merge, on a master as it was; an index is there when a merge went before."""
    (folder / "out.csv").unlink(missing_ok=True)
    if way == "headwater":
        run(["cp", str(folder / "whole.csv"), str(folder / "master.csv")])
    if way == INDEXED:
        run(["cp", str(folder / "whole.csv"), str(folder / "master.csv")])
        run([sys.executable, str(WAYS), "headwater", str(folder), "first.csv"], OURS)
    warm(folder)
    return run([sys.executable, str(WAYS), re.split("[, ]", way)[0], str(folder)], OURS)


def goals(costs: Mapping[str, Cost]) -> list[Goal]:
    """The figures of the performance page."""
    found = []
    for way, copies in (("headwater", 10), (INDEXED, 2.5)):
        ours = costs[way]
        found.append(Goal(f"{way}: peak", ours.peak_mib, 80, at_least=False, unit=" MiB, plus the incoming keys"))
        for peer, limit in PEERS.items():
            if peer in costs:
                found.append(Goal(f"{way}: cpu of {peer} / ours", costs[peer].cpu_seconds / ours.cpu_seconds, limit))
        found.append(copies_of(way, costs, copies))
    return found if FLOOR not in costs else [*found, copies_of(FLOOR, costs, 2.5)]


def copies_of(way: str, costs: Mapping[str, Cost], limit: float) -> Goal:
    """How many copies of the master a way is worth."""
    return Goal(f"{way}: cpu / copy", costs[way].cpu_seconds / costs["copy"].cpu_seconds, limit, at_least=False)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mb", type=int, default=1000)
    parser.add_argument("--incoming-mb", type=int, default=50)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--without", nargs="*", default=[], help="ways to leave out")
    given = parser.parse_args()
    if given.make:
        prepared(given.make, given)
        return
    names = [name for name in ("headwater", INDEXED, FLOOR, "copy", *PEERS) if name not in given.without]
    if importlib.util.find_spec("polars") is None and "polars" in names:
        names.remove("polars")
        print("polars is not installed: uv run --with polars bench/csv_inbox.py")
    with tempfile.TemporaryDirectory(prefix="bench-csv-") as temporary:
        folder = Path(temporary)
        sizes = ["--mb", str(given.mb), "--incoming-mb", str(given.incoming_mb)]
        run([sys.executable, __file__, "--make", temporary, *sizes])
        run(["cp", str(folder / "whole.csv"), str(folder / "master.csv")])
        ways: dict[str, Callable[[], Cost]] = {name: partial(once, name, folder) for name in names}
        costs = in_turns(ways, given.repeat) if given.repeat > 1 else {name: way() for name, way in ways.items()}
    print(f"\nmaster {given.mb} MB, incoming {given.incoming_mb} MB, median of {given.repeat}\n\n{table(costs)}\n")
    for goal in goals(costs):
        print(goal)


if __name__ == "__main__":
    main()
