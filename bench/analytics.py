"""/analytics beside plain DuckDB per request over the same objects of a real S3 server, cold and warm.

    uv run python bench/analytics.py [--objects 100 1000] [--rows 200] [--clients 1 8 64] [--seconds 3]

Plain DuckDB is a small asynchronous server: one connection, a cursor per request in eight threads, httpfs over a list
of keys. With its cache it gives wrong answers while objects change, so it is shown without and with it. ROAPI is
measured too when its program is on the PATH: `uv venv x && uv pip install -p x roapi`, then PATH=$PATH:x/bin.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from analytics_ways import PLAIN, PREFIX, Load, fill, free_port, load, peak_mib, serving
from measured import Goal, run
from seaweed import SERVICES, Seaweed, free_ports, running

NEWS = Path(__file__).with_name("analytics_news.py")
QUERIES = Path(__file__).resolve().parent.parent / "sql" / "analytics"
REPORT = "/analytics/over-time?device_id=D1&from=2026-01-01T00:00:00Z&to=2026-01-01T12:00:00Z&minutes=60"
AD_HOC = """
    SELECT device_id, time_bucket(INTERVAL 60 MINUTE, CAST(timestamp AS TIMESTAMP)) AS time, avg(voltage), avg(power),
        avg(temperature), count(*)
    FROM read_parquet({{S3_PATH}})
    WHERE device_id = 'D1' AND timestamp >= '2026-01-01 00:00:00+00' AND timestamp < '2026-01-01 12:00:00+00'
    GROUP BY ALL ORDER BY ALL
"""


MANY_OBJECTS = 3000  # what the goal of 1,000 times is stated for
OVERVIEW = """SELECT count(*) AS total_rows, count(DISTINCT device_id) AS device_count,
    min(timestamp) AS first, max(timestamp) AS last FROM telemetry"""


@dataclass(frozen=True, slots=True)
class Place:
    """A bucket with objects, and a folder for what is written meanwhile."""

    server: Seaweed
    bucket: str
    keys: Sequence[str]
    work: Path


@dataclass(frozen=True, slots=True)
class Given:
    """How much is measured."""

    rows: int
    clients: Sequence[int]
    seconds: float


@dataclass(frozen=True, slots=True)
class Result:
    """One server: seconds to the first answer, and the load by path and clients."""

    cold_seconds: float
    loads: Mapping[tuple[str, int], Load]
    peak: float


def main() -> int:
    """Print the tables and the goals; 1 when one is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objects", type=int, nargs="+", default=[100, 1000])
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--seconds", type=float, default=3.0)
    chosen = parser.parse_args()
    given = Given(chosen.rows, chosen.clients, chosen.seconds)
    goals: list[Goal] = []
    with tempfile.TemporaryDirectory(prefix="headwater-bench-") as folder:
        (Path(folder) / "s3").mkdir()
        with running(Path(folder) / "s3", free_ports(2 * len(SERVICES))) as server:
            for objects in chosen.objects:
                work = Path(folder) / str(objects)
                work.mkdir()
                goals += measure(server, work, objects, given)
    print("\n" + "\n".join(f"- {goal}" for goal in goals))
    return 0 if all(goal.met for goal in goals) else 1


def measure(server: Seaweed, work: Path, objects: int, given: Given) -> Sequence[Goal]:
    """All ways over one bucket."""
    bucket = server.new_bucket()
    (work / "files").mkdir()
    place = Place(server, bucket, fill(server, bucket, objects, given.rows, work / "files"), work)
    results = {
        "DuckDB, no cache": plain(place, given, cache=False),
        "DuckDB, its cache": plain(place, given, cache=True),
        "headwater": ours(place, given),
        **({"ROAPI": roapi(place, given)} if shutil.which("roapi") else {}),
    }
    print(f"\n{objects} objects of {given.rows} rows\n")
    print("| way | answer | clients | first s | requests/s | p50 ms | cpu ms a request | /health p99 ms | peak MiB |")
    print("|---|---|---|---|---|---|---|---|---|")
    for way, result in results.items():
        for (path, clients), one in result.loads.items():
            name = "over time" if "over-time" in path or "adhoc" in path else "overview"
            print(
                f"| {way} | {name} | {clients} | {result.cold_seconds:.2f} | {one.rate:,.1f} | {one.p50_ms:.1f} "
                f"| {one.cpu_ms:.2f} | {one.health_p99_ms:.0f} | {result.peak:.0f} |"
            )
    given_news = [bucket, server.endpoint_url, server.access_key, server.secret_key, str(objects)]
    told = run([sys.executable, str(NEWS), str(work / "news"), *given_news]).told
    print(f"\nCPU of a new object: {told['object_ms']:.0f} ms; of the listing: {told['listing_ms']:.0f} ms")
    return goals_of(objects, results, given)


def goals_of(objects: int, results: Mapping[str, Result], given: Given) -> Sequence[Goal]:
    """The figures beside what they should be."""
    mine, uncached, cached = results["headwater"], results["DuckDB, no cache"], results["DuckDB, its cache"]
    few, many = min(given.clients), max(given.clients)
    overview = mine.loads["/analytics/overview", few]
    peer = [one for (_, clients), one in results["ROAPI"].loads.items() if clients == few] if "ROAPI" in results else []
    return [
        *(
            Goal(f"{objects} objects, overview, {few} client: CPU of ROAPI / ours", one.cpu_ms / overview.cpu_ms, 20)
            for one in peer
        ),
        Goal(f"{objects} objects, overview inside the process, p50", overview.inside_ms, 2, at_least=False, unit=" ms"),
        Goal(
            f"{objects} objects, overview, {few} client: CPU of DuckDB per request / ours",
            uncached.loads["/overview", few].cpu_ms / overview.cpu_ms,
            1000 if objects >= MANY_OBJECTS else 0,
        ),
        Goal(
            f"{objects} objects, over time, {many} clients: requests/s over DuckDB's with its cache",
            mine.loads[REPORT, many].rate / cached.loads["/adhoc", many].rate,
            1,
        ),
        Goal(
            f"{objects} objects, {many} clients: p99 of /health",
            mine.loads["/analytics/overview", many].health_p99_ms,
            50,
            at_least=False,
            unit=" ms",
        ),
    ]


def plain(place: Place, given: Given, *, cache: bool) -> Result:
    """DuckDB behind HTTP."""
    queries = {"overview": (QUERIES / "overview.sql").read_text(), "adhoc": AD_HOC}
    (place.work / "keys.json").write_text(json.dumps(list(place.keys)))
    (place.work / "queries.json").write_text(json.dumps(queries))
    port = free_port()
    server = place.server
    told = [place.bucket, f"{server.host}:{server.port}", server.access_key, server.secret_key, str(cache).lower()]
    files = [str(place.work / "keys.json"), str(place.work / "queries.json")]
    with serving([sys.executable, "-c", PLAIN, str(port), *told, *files], port, {}) as child:
        cold = first(port, "/overview")
        paths = ("/overview", "/adhoc")
        loads = {(path, n): load(child, port, path, n, given.seconds) for path in paths for n in given.clients}
        return Result(cold, loads, peak_mib(child.pid))


def ours(place: Place, given: Given) -> Result:
    """The daemon."""
    port = free_port()
    environ = {
        "PORT": str(port),
        "DATA_DIR": str(place.work / "data"),
        "LOG_LEVEL": "WARNING",
        "LOG_FILE": "off",
        "S3_BUCKET": place.bucket,
        "S3_PREFIX": PREFIX,
        "S3_ENDPOINT_URL": place.server.endpoint_url,
        "S3_ACCESS_KEY_ID": place.server.access_key,
        "S3_SECRET_ACCESS_KEY": place.server.secret_key,
    }
    with serving([sys.executable, "-m", "app"], port, environ) as child:
        cold = first(port, "/analytics/overview")
        paths = ("/analytics/overview", REPORT)
        loads = {(path, n): load(child, port, path, n, given.seconds) for path in paths for n in given.clients}
        return Result(cold, loads, peak_mib(child.pid))


def roapi(place: Place, given: Given) -> Result:
    """ROAPI, which reads a copy of the objects into its memory at its start."""
    port = free_port()
    command = ["roapi", "-a", f"127.0.0.1:{port}", "-p", f"127.0.0.1:{free_port()}"]
    command += ["--addr-flight-sql", f"127.0.0.1:{free_port()}", "-t", f"telemetry={place.work}/files,format=parquet"]
    path = f"/api/sql\n{OVERVIEW}"
    with serving(command, port, {"RUST_LOG": "error"}) as child:
        loads = {(path, n): load(child, port, path, n, given.seconds) for n in given.clients}
        return Result(0.0, loads, peak_mib(child.pid))


def first(port: int, path: str) -> float:
    """Seconds to the first answer; 503 = still at it."""
    began = time.monotonic()
    while True:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=600).close()
            return time.monotonic() - began
        except urllib.error.HTTPError as error:
            with error:
                if error.code != 503:
                    raise
            time.sleep(0.1)


if __name__ == "__main__":
    sys.exit(main())
