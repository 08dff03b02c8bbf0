"""/analytics versus plain DuckDB per request over the same objects on a real S3 server, cold and warm.

    uv venv x && uv pip install -p x roapi==0.12.7 datasette==1.0a23
    PATH=$PATH:x/bin uv run python bench/analytics.py [--objects 100 1000] [--rows 200] [--clients 1 8 64] [--seconds 3]

Plain DuckDB is a small asynchronous server: one connection, a cursor per request in eight threads, httpfs over a list
of keys. With its cache it gives wrong answers while objects change, so it is measured both without and with it.
Datasette, over SQLite with the rows in it, and ROAPI, over files in its memory, are measured too if they are on the
PATH; both get the rows beforehand and do not follow changes. From 1,000 objects on, only Headwater is queried by more
than one client.
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
from urllib.parse import urlencode

from analytics_ways import PLAIN, PREFIX, Load, fill, free_port, into_sqlite, load, peak_mib, serving
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


SLOW_OBJECTS = 1000  # from here on others are asked by one client only
MANY_OBJECTS = 3000  # what the goal of 1,000 times is stated for
MANY_ROWS = 1_000_000  # what the goal of 20 times ROAPI is stated for
OVERVIEW = """SELECT count(*) AS total_rows, count(DISTINCT device_id) AS device_count,
    min(timestamp) AS first, max(timestamp) AS last FROM telemetry"""


OVER_TIME = """SELECT device_id, substr(timestamp, 1, 13) AS time, avg(voltage), avg(power), avg(temperature), count(*)
    FROM telemetry WHERE device_id = 'D1' AND timestamp >= '2026-01-01T00' AND timestamp < '2026-01-01T12'
    GROUP BY 1, 2 ORDER BY 1, 2"""


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
    news: bool = True

    def of_others(self, objects: int) -> Sequence[int]:
        """How many clients ask the others."""
        return self.clients if objects < SLOW_OBJECTS else self.clients[:1]


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
    parser.add_argument("--without-news", action="store_true")
    chosen = parser.parse_args()
    given = Given(chosen.rows, sorted(chosen.clients), chosen.seconds, not chosen.without_news)
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
        **({"Datasette": datasette(place, given)} if shutil.which("datasette") else {}),
    }
    print(f"\n{objects} objects of {given.rows} rows\n")
    print("| way | answer | clients | first s | requests/s | p50 ms | cpu ms a request | /health p99 ms | peak MiB |")
    print("|---|---|---|---|---|---|---|---|---|")
    for way, result in results.items():
        for (path, clients), one in result.loads.items():
            name = "over time" if "over-time" in path or "adhoc" in path or "GROUP" in path else "overview"
            print(
                f"| {way} | {name} | {clients} | {result.cold_seconds:.2f} | {one.rate:,.1f} | {one.p50_ms:.1f} "
                f"| {one.cpu_ms:.2f} | {one.health_p99_ms:.0f} | {result.peak:.0f} |"
            )
    if given.news:
        given_news = [bucket, server.endpoint_url, server.access_key, server.secret_key, str(objects)]
        told = run([sys.executable, str(NEWS), str(work / "news"), *given_news]).told
        print(f"\nCPU of a new object: {told['object_ms']:.0f} ms; of the listing: {told['listing_ms']:.0f} ms")
    return goals_of(objects, results, given)


def goals_of(objects: int, results: Mapping[str, Result], given: Given) -> Sequence[Goal]:
    """The figures beside what they should be."""
    mine, uncached, cached = results["headwater"], results["DuckDB, no cache"], results["DuckDB, its cache"]
    few, many = given.clients[0], given.clients[-1]
    others = given.of_others(objects)[-1]
    overview = mine.loads["/analytics/overview", few]
    return [
        *(
            Goal(
                f"{objects} objects, overview, {few} client: CPU of {peer} / ours", one.cpu_ms / overview.cpu_ms, least
            )
            for peer, least in (("ROAPI", 20 if objects * given.rows >= MANY_ROWS else 1), ("Datasette", 1))
            if peer in results
            for one in list(results[peer].loads.values())[:1]
        ),
        Goal(f"{objects} objects, overview inside the process, p50", overview.inside_ms, 2, at_least=False, unit=" ms"),
        Goal(
            f"{objects} objects, overview, {few} client: CPU of DuckDB per request / ours",
            uncached.loads["/overview", few].cpu_ms / overview.cpu_ms,
            1000 if objects >= MANY_OBJECTS else 0,
        ),
        Goal(
            f"{objects} objects, over time, {others} clients: requests/s over DuckDB's with its cache",
            mine.loads[REPORT, others].rate / cached.loads["/adhoc", others].rate,
            1,
        ),
        *(
            Goal(f"{objects} objects, {name}, {many} clients: p99 of /health", p99_ms, 50, at_least=False, unit=" ms")
            for name, path in (("overview", "/analytics/overview"), ("over time", REPORT))
            for p99_ms in [mine.loads[path, many].health_p99_ms]
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
        paths, clients = ("/overview", "/adhoc"), given.of_others(len(place.keys))
        loads = {(path, n): load(child, port, path, n, given.seconds) for path in paths for n in clients}
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
    path, clients = f"/api/sql\n{OVERVIEW}", given.of_others(len(place.keys))
    with serving(command, port, {"RUST_LOG": "error"}) as child:
        loads = {(path, n): load(child, port, path, n, given.seconds) for n in clients}
        return Result(0.0, loads, peak_mib(child.pid))


def datasette(place: Place, given: Given) -> Result:
    """Datasette, over a database that has the rows already."""
    port, database = free_port(), place.work / "lake.db"
    into_sqlite(sorted((place.work / "files").iterdir()), database)
    command = ["datasette", str(database), "-p", str(port), "--setting", "sql_time_limit_ms"]
    paths = [f"/lake/-/query.json?{urlencode({'sql': sql, '_shape': 'arrays'})}" for sql in (OVERVIEW, OVER_TIME)]
    with serving([*command, "600000"], port, {}) as child:
        cold, clients = first(port, paths[0]), given.of_others(len(place.keys))
        loads = {(path, n): load(child, port, path, n, given.seconds) for path in paths for n in clients}
        return Result(cold, loads, peak_mib(child.pid))


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
