r"""POST and GET of /dwh beside SQLAlchemy's ORM, psql's \copy and Datasette's insert API, in turns.

    uv run --with sqlalchemy --with datasette python bench/dwh.py [--rows 10000] [--read-rows 100000] [--repeat 5]

The peers are installed for this run only. PostgreSQL is the one from the development wheel, with fsync off for all
alike. Ours is the whole daemon over HTTP: parsing, checks, staging, upsert, ids. The ORM way is a parsed body, models,
`add_all`, commit, without any HTTP. Every run stores rows that are not there yet.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dwh_ways import Daemon, Datasette, Orm, Postgres, batch, free_port, psql_copy
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


def measure(folder: Path, postgres: Postgres, given: argparse.Namespace) -> list[Goal]:
    """All comparisons on one pair of daemons."""
    orm_postgres, orm_sqlite = Orm(postgres.new("orm")), Orm(f"sqlite:///{folder}/orm.db")
    with (
        Daemon(folder / "a", postgres.new("ours")) as ours_postgres,
        Daemon(folder / "b", "") as ours_sqlite,
        Datasette(folder / "datasette.db", free_port()) as datasette,
    ):
        copied = postgres.new("copied")
        orm_copy = Orm(copied)
        ways: Mapping[str, Callable[[list[dict[str, Any]]], Any]] = {
            "PostgreSQL: ORM": orm_postgres.post,
            "PostgreSQL: psql \\copy": lambda rows: psql_copy(postgres, copied, rows),
            "PostgreSQL: /dwh": ours_postgres.post,
            "SQLite: ORM": orm_sqlite.post,
            "SQLite: Datasette insert": datasette.post,
            "SQLite: /dwh": ours_sqlite.post,
        }
        del orm_copy
        seconds = posted(ways, given.rows, given.repeat)
        goals = [*post_goals(seconds, given.rows), *memory_goals(ours_postgres, ours_sqlite, given.rows)]
        return goals + read_goals((orm_postgres, ours_postgres, ours_sqlite), given.read_rows)


def posted(ways: Mapping[str, Callable[[list[dict[str, Any]]], Any]], rows: int, repeat: int) -> Mapping[str, float]:
    """Median seconds by way; the first round is not counted."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeat + 1):
        sent = batch(rows, turn * rows)
        for name, way in ways.items():
            started = time.perf_counter()
            way(sent)
            taken[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(times[1:]) for name, times in taken.items()}
    for name, each in medians.items():
        print(f"POST of {rows} rows, {name}: {each:.3f} s, {rows / each:,.0f} rows/s")
    return medians


def post_goals(seconds: Mapping[str, float], rows: int) -> list[Goal]:
    """The ratios of the times."""
    ours, lite = seconds["PostgreSQL: /dwh"], seconds["SQLite: /dwh"]
    return [
        Goal(f"PostgreSQL, {rows} rows: ORM / ours", seconds["PostgreSQL: ORM"] / ours, 25),
        Goal(
            f"PostgreSQL, {rows} rows: ours / psql \\copy",
            ours / seconds["PostgreSQL: psql \\copy"],
            1.5,
            at_least=False,
        ),
        Goal(f"SQLite, {rows} rows: ORM / ours", seconds["SQLite: ORM"] / lite, 10),
        Goal(f"SQLite, {rows} rows: Datasette / ours", seconds["SQLite: Datasette insert"] / lite, 4),
    ]


def memory_goals(postgres: Daemon, sqlite: Daemon, rows: int) -> list[Goal]:
    """How much of its body a request costs, seen from the daemon's peak, and readers of the daemon as it stands."""
    goals = []
    for name, daemon in (("PostgreSQL", postgres), ("SQLite", sqlite)):
        before = daemon.reset_peak_mib()
        size_mib = daemon.post(batch(20_000, 50_000_000 + rows)) / 2**20
        goals.append(
            Goal(
                f"{name}: memory of a request / its body of {size_mib:.1f} MiB",
                (daemon.peak_mib() - before) / size_mib,
                4,
                at_least=False,
            )
        )
    return goals


def read_goals(ways: tuple[Orm, Daemon, Daemon], rows: int) -> list[Goal]:
    """Reading many rows as NDJSON, beside the ORM with a list of models."""
    orm, postgres, sqlite = ways
    for start in range(0, rows, 20_000):
        sent = batch(20_000, 100_000_000 + start)
        orm.fill(sent)
        postgres.post(sent)
        sqlite.post(sent)
    started = time.perf_counter()
    orm.read(rows)
    plain = time.perf_counter() - started
    goals = []
    for name, daemon in (("PostgreSQL", postgres), ("SQLite", sqlite)):
        daemon.read(1000)
        before = daemon.reset_peak_mib()
        started = time.perf_counter()
        daemon.read(rows)
        taken = time.perf_counter() - started
        print(f"GET of {rows} rows, {name}: ORM {plain:.2f} s, ours {taken:.2f} s")
        goals += [
            Goal(f"{name}, GET of {rows} rows: ORM / ours", plain / taken, 8),
            Goal(
                f"{name}, GET of {rows} rows: memory above idle",
                daemon.peak_mib() - before,
                16,
                at_least=False,
                unit=" MiB",
            ),
        ]
    return goals


if __name__ == "__main__":
    sys.exit(main())
