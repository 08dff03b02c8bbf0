"""The InfluxDB export of this checkout versus that of another one, in turns: the cost of a change.

    git worktree add --detach ../before COMMIT && (cd ../before && uv sync)
    uv run python bench/influx_before.py ../before

Each checkout runs its own `bench/influx_ways.py` in its own environment, against one server with pre-rendered answers.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from influx_to_s3 import OURS, empty_folder, server
from measured import Cost, Goal, in_turns, run, table
from telemetry import Shape

HERE = Path(__file__).resolve().parents[1]
BEFORE, NOW = "before", "now"


def export(checkout: Path, way: str, url: str, shape: Shape) -> Cost:
    """One export by a checkout, from the start of its process to its end."""
    with empty_folder() as folder:
        arguments = [way, f"--url={url}", f"--folder={folder}", *shape.arguments()]
        command = [str(checkout / ".venv" / "bin" / "python"), str(checkout / "bench" / "influx_ways.py")]
        return run([*command, *arguments], OURS)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run both in turns; 1 when a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="a checkout with its own .venv")
    parser.add_argument("--devices", type=int, default=50)
    parser.add_argument("--windows", type=int, default=7, help="hours per device")
    parser.add_argument("--rows", type=int, default=1_000_000, help="of all devices and windows")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--way", choices=("export-ours", "export-ours-one"), default="export-ours")
    given = parser.parse_args(arguments)
    shape = Shape(given.devices, given.windows, -(-given.rows // (given.devices * given.windows)))
    with server(shape) as url:
        ways: dict[str, Callable[[], Cost]] = {
            BEFORE: partial(export, given.before.resolve(), given.way, url, shape),
            NOW: partial(export, HERE, given.way, url, shape),
        }
        costs = in_turns(ways, given.repeat)
    print(f"\n### Export of {shape.total_rows:,} rows, {shape.devices * shape.windows} objects\n\n{table(costs)}\n")
    if costs[BEFORE].told.get("rows") != costs[NOW].told.get("rows"):
        sys.exit(f"rows differ: {costs[BEFORE].told} before, {costs[NOW].told} now")
    ratio = costs[NOW].cpu_seconds / costs[BEFORE].cpu_seconds
    goals = [
        Goal("cpu, now against before", ratio, 1.10, at_least=False, unit=" x"),
        Goal("peak now", costs[NOW].peak_mib, 150, at_least=False, unit=" MiB"),
    ]
    for goal in goals:
        print(f"- {goal}")
    return 0 if all(goal.met for goal in goals) else 1


if __name__ == "__main__":
    sys.exit(main())
