"""The InfluxDB export versus the usual ways, on generated data with a fixed seed.

Every way reads the same bytes from a server in a separate process, runs in its own process, and takes turns with the
others. Prints medians, and each goal with its measured value. The export's objects are compared with the generated data
row by row.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime, timedelta
from functools import partial
from itertools import pairwise
from pathlib import Path

from measured import Cost, Goal, in_turns, run, table
from telemetry import START, WINDOW_SECONDS, Shape

HERE = Path(__file__).parent
# As the daemon sets them itself; here also for the ways that only parse.
OURS = {"ARROW_DEFAULT_MEMORY_POOL": "system", "OPENBLAS_NUM_THREADS": "1"}
PARFLUX = "parflux==0.1.0"
FLOOR, PARSED, FRAME = "pyarrow, plain CSV (floor)", "headwater", "query_data_frame"
EXPORTED, FRAMES, RECORDS, PEER = "headwater", "query_data_frame + pandas", "query() + pandas", f"{PARFLUX}, one file"
ONE = "headwater, one device at a time"
LEAST = "plain CSV, cut, Parquet (floor)"
HOURLY = f"{PARFLUX}, a file an hour"
LONGER = "four times the rows a window"
SETS = ("parse", "export", "memory")


@contextmanager
def server(shape: Shape) -> Iterator[str]:
    """The bench server's address."""
    command = [sys.executable, str(HERE / "influx_server.py"), *shape.arguments()]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    if child.stdout is None or child.stdin is None:
        raise AssertionError
    try:
        yield f"http://127.0.0.1:{child.stdout.readline().strip()}"
    finally:
        child.stdin.close()
        child.wait()


@contextmanager
def empty_folder() -> Iterator[Path]:
    """A folder for one run's output."""
    with tempfile.TemporaryDirectory(prefix="headwater-bench-") as name:
        yield Path(name)


def way(name: str, url: str, shape: Shape, environ: Mapping[str, str] | None = None) -> Cost:
    """Run one of `influx_ways` in an empty folder."""
    with empty_folder() as folder:
        arguments = [f"--url={url}", f"--folder={folder}", *shape.arguments()]
        return run([sys.executable, str(HERE / "influx_ways.py"), name, *arguments], environ)


def checked(url: str, shape: Shape) -> str:
    """Export once more and compare every row; what was found."""
    with empty_folder() as folder:
        arguments = [f"--url={url}", f"--folder={folder}", *shape.arguments()]
        run([sys.executable, str(HERE / "influx_ways.py"), "export-ours", *arguments], OURS)
        found = run([sys.executable, str(HERE / "influx_check.py"), *arguments]).told
    return f"{found['rows']:,} rows of {found['objects']} objects compared: {found['different']} differ"


def parflux_each_hour(url: str, shape: Shape, program: Path) -> Cost:
    """The peer run once for each hour of data, which is what files of an hour take with it."""
    ends = [START + timedelta(seconds=WINDOW_SECONDS * number) for number in range(shape.windows + 1)]
    costs = [parflux(url, program, *span) for span in pairwise(ends)]
    return replace(
        costs[0],
        cpu_seconds=sum(cost.cpu_seconds for cost in costs),
        wall_seconds=sum(cost.wall_seconds for cost in costs),
        peak_mib=max(cost.peak_mib for cost in costs),
    )


def parflux(url: str, program: Path, first: datetime, last: datetime) -> Cost:
    """The peer: one file for all devices of the measurement, no computed columns, no state."""
    with empty_folder() as folder:
        start, end = (f"{instant:%Y-%m-%dT%H:%M:%S}+00:00" for instant in (first, last))
        environ = {"INFLUXDB_V2_URL": url, "INFLUXDB_V2_ORG": "bench", "INFLUXDB_V2_TOKEN": "bench"}
        arguments = ["telemetry/device_telemetry", "--start", start, "--end", end, "--dest", str(folder)]
        cost = run([str(program), *arguments], {**environ, "INFLUXDB_V2_TIMEOUT": "600000"})
        if not list(folder.rglob("*.parquet")):
            sys.exit("parflux wrote nothing")
        return cost


def installed_parflux(folder: Path) -> Path | None:
    """The peer in an environment of its own; None when it cannot be had."""
    uv = shutil.which("uv")
    if uv is None:
        return None
    python = folder / "bin" / "python"
    made = subprocess.run([uv, "venv", "-q", "--python", sys.executable, str(folder)], check=False)
    install = [uv, "pip", "install", "-q", "--compile-bytecode", "--python", str(python), PARFLUX]
    if made.returncode or subprocess.run(install, check=False).returncode:
        return None
    return folder / "bin" / "parflux"


def parsing(shape: Shape, repeat: int) -> list[Goal]:
    """Parsing alone: CPU of the work, without starting, importing and fetching."""
    names = {FLOOR: "parse-floor", PARSED: "parse-ours", FRAME: "parse-data-frame"}
    with server(shape) as url:
        costs = in_turns({title: partial(way, name, url, shape, OURS) for title, name in names.items()}, repeat)
    shown = {title: replace(cost, cpu_seconds=cost.told["work_cpu_seconds"]) for title, cost in costs.items()}
    print(f"\n### Parsing {shape.total_rows:,} rows of one answer\n\n{table(shown, 'way (cpu: parsing alone)')}\n")
    ours = shown[PARSED].cpu_seconds
    return [
        Goal("parsing, query_data_frame against ours", shown[FRAME].cpu_seconds / ours, 12, unit=" x"),
        Goal("parsing, ours against the floor", ours / shown[FLOOR].cpu_seconds, 1.6, at_least=False, unit=" x"),
    ]


def exporting(shape: Shape, repeat: int, program: Path | None) -> list[Goal]:
    """The whole export, from the start of the process to its end."""
    with server(shape) as url:
        ways: dict[str, Callable[[], Cost]] = {
            LEAST: partial(way, "export-floor", url, shape, OURS),
            EXPORTED: partial(way, "export-ours", url, shape, OURS),
            ONE: partial(way, "export-ours-one", url, shape, OURS),
            FRAMES: partial(way, "export-data-frame", url, shape),
            RECORDS: partial(way, "export-records", url, shape),
        }
        if program is not None:
            ways[PEER] = partial(parflux, url, program, START, shape.end)
            ways[HOURLY] = partial(parflux_each_hour, url, shape, program)
        costs = in_turns(ways, repeat)
        print(f"\n### Export of {shape.total_rows:,} rows, {shape.devices * shape.windows} objects\n\n{table(costs)}\n")
        print(checked(url, shape))
    goals = [
        Goal(f"export, {name} against {ours}", costs[name].cpu_seconds / costs[ours].cpu_seconds, limit, unit=" x")
        for ours in (EXPORTED, ONE)
        for name, limit in {FRAMES: 6.0, RECORDS: 10.0, PEER: 3.0, HOURLY: 3.0}.items()
        if name in costs
    ]
    floor = costs[LEAST].cpu_seconds
    print(
        "What the floor itself would reach: "
        + ", ".join(f"{n} {c.cpu_seconds / floor:.1f} x" for n, c in costs.items())
    )
    return [*goals, Goal("export, peak", costs[EXPORTED].peak_mib, 150, at_least=False, unit=" MiB")]


def remembering(shape: Shape, repeat: int) -> list[Goal]:
    """Peak memory at four times the rows, in longer windows and in more of them, and of one window with them all."""
    idle = run([sys.executable, str(HERE / "influx_ways.py"), "idle", "--url=", "--folder=.", *shape.arguments()], OURS)
    shapes = {
        "as above": shape,
        LONGER: replace(shape, rows=shape.rows * 4),
        "four times the windows": replace(shape, windows=shape.windows * 4),
        "all rows in one window": Shape(1, 1, shape.total_rows),
    }
    costs: dict[str, Cost] = {}
    for title, wanted in shapes.items():
        with server(wanted) as url:
            costs[title] = in_turns({title: partial(way, "export-ours", url, wanted, OURS)}, repeat)[title]
            print(f"{title}: {checked(url, wanted)}")
            if title == LONGER:
                frames = way("export-data-frame", url, wanted)
    print(f"\n### Memory of the export\n\n{table({'everything imported, nothing done': idle, **costs}, 'rows')}\n")
    print(f"{FRAMES}, {LONGER}:\n\n{table({FRAMES: frames})}\n")
    first, *others = (cost.peak_mib for cost in costs.values())
    return [
        *(
            Goal(
                f"peak above that at {shape.total_rows:,} rows, {title}", peak - first, 15, at_least=False, unit=" MiB"
            )
            for title, peak in zip(list(costs)[1:3], others, strict=False)
        ),
        Goal(f"export, {LONGER}, {FRAMES} against ours", frames.cpu_seconds / costs[LONGER].cpu_seconds, 6, unit=" x"),
        Goal("peak above idle, all rows in one window", others[-1] - idle.peak_mib, 256, at_least=False, unit=" MiB"),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the chosen sets; 1 when a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--devices", type=int, default=50)
    parser.add_argument("--windows", type=int, default=7, help="hours per device")
    parser.add_argument("--rows", type=int, default=1_000_000, help="of all devices and windows")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--memory-repeat", type=int, default=1)
    parser.add_argument("--only", choices=SETS, action="append", help="repeat for several")
    parser.add_argument("--no-parflux", action="store_true", help="do not install and run the peer")
    given = parser.parse_args(arguments)
    shape = Shape(given.devices, given.windows, -(-given.rows // (given.devices * given.windows)))
    only = given.only or SETS
    goals: list[Goal] = []
    if "parse" in only:
        goals += parsing(shape, given.repeat)
    if "export" in only:
        with empty_folder() as folder:
            program = None if given.no_parflux else installed_parflux(folder)
            goals += exporting(shape, given.repeat, program)
    if "memory" in only:
        goals += remembering(shape, given.memory_repeat)
    print("\n### Goals\n")
    for goal in goals:
        print(f"- {goal}")
    return 0 if all(goal.met for goal in goals) else 1


if __name__ == "__main__":
    sys.exit(main())
