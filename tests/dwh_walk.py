"""Walks /dwh by every sort order, in both directions, while writers insert: each row of the start exactly once.

`uv run python tests/dwh_walk.py [--rows 100000] [--limit 10000] [--url postgresql://...]`; without a URL on SQLite.
"""

import argparse
import sys
import tempfile
import threading
import time
from contextlib import closing
from itertools import count, islice
from pathlib import Path

from app.dwh.tables import BY_NAME, Table
from app.dwh.warehouse import open_warehouse
from warehouse import SORTED, Desk, mixed, walked

WRITERS = 3
CHUNK_ROWS = 5000


def walk(url: str, folder: Path, rows: int, limit: int) -> list[str]:
    """One line per walk that missed or repeated rows."""
    faults: list[str] = []
    with closing(open_warehouse(url, folder)) as warehouse:
        desk = Desk(warehouse)
        for table in (BY_NAME[name] for name in SORTED):
            for first in range(0, rows, CHUNK_ROWS):
                desk.post(table, mixed(table, range(first, min(first + CHUNK_ROWS, rows))))
            faults += walk_table(desk, table, rows, limit)
    return faults


def walk_table(desk: Desk, table: Table, rows: int, limit: int) -> list[str]:
    """The walks of one table, while writers insert rows that lie everywhere in each order."""
    over, numbers, lock = threading.Event(), count(rows), threading.Lock()

    def insert() -> None:
        while not over.wait(0.05):
            with lock:
                some = list(islice(numbers, 7))
            desk.post(table, mixed(table, some))

    writers = [threading.Thread(target=insert) for _ in range(WRITERS)]
    faults = []
    for writer in writers:
        writer.start()
    try:
        for sort_by in SORTED[table.name]:
            for sort_dir in ("asc", "desc"):
                begun = time.monotonic()
                ids = walked(desk, table, limit, lambda: None, sort_by=sort_by, sort_dir=sort_dir, select="id")
                started = set(range(1, rows + 1))
                lost, twice = len(started - set(ids)), len(ids) - len(set(ids))
                line = f"{table.name} by {sort_by} {sort_dir}: {lost} lost, {twice} twice, of {len(ids)}"
                print(f"{line} in {time.monotonic() - begun:.1f} s", flush=True)  # noqa: T201 - a program
                if lost or twice:
                    faults.append(line)
    finally:
        over.set()
        for writer in writers:
            writer.join()
    return faults


def main() -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--limit", type=int, default=10_000)
    parser.add_argument("--url", default="")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        return 1 if walk(given.url, Path(folder), given.rows, given.limit) else 0


if __name__ == "__main__":
    sys.exit(main())
