"""Cost of `lake_day` per object, and cost of DuckDB over the objects and over the table.

`uv run python bench/lake_day.py [--devices 63] [--rows 60]` writes two days of hourly objects and runs the job in its
own process. Then it runs the same three queries on both, in DuckDB directly and as reports of /analytics, and asks
every engine that reads the table for the sum of each column. Then a late row arrives and the job runs again. Exits with
1 when answers differ or a goal is missed.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from measured import Cost, Goal, run

DAYS = ("2026-02-06", "2026-02-07")
WRITE = """
import io, json, random, sys
from datetime import datetime, timedelta, UTC
import pyarrow as pa, pyarrow.parquet as pq
from app.object_store.local import LocalDirectory
from app.object_store.port import PutRequest
root, devices, rows, days = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:]
store, draw, texts = LocalDirectory(__import__("pathlib").Path(root)), random.Random(1), ("hall", "roof")
for day in days:
    for device in range(devices):
        for hour in range(24):
            start = datetime.fromisoformat(day).replace(tzinfo=UTC, hour=hour)
            times = [start + timedelta(seconds=3600 / rows * n) for n in range(rows)]
            columns = {"timestamp": pa.array(times, pa.timestamp("us", "UTC")),
                       "device_id": pa.array([f"D{device:04}"] * rows).dictionary_encode(),
                       "location": pa.array([texts[device % 2]] * rows)}
            for name in ("voltage", "current", "power", "temperature", "power_factor"):
                columns[name] = pa.array([draw.uniform(0, 250) for _ in times])
            file = io.BytesIO()
            pq.write_table(pa.table(columns), file, compression="zstd")
            key = f"telemetry/device_id=D{device:04}/date={day.replace('-', '/')}/export_{hour:02}0000.parquet"
            store.put(key, io.BytesIO(file.getvalue()), PutRequest("application/vnd.apache.parquet"))
"""
ASK = """
import duckdb, json, sys, time
from importlib.util import find_spec
from pathlib import Path
rows, question = sys.argv[1:]
connection = duckdb.connect(config={"threads": 1})
connection.execute("SET TimeZone = 'UTC'")
for name in ("avro", "iceberg") if "iceberg" in rows else ():
    place = next(iter(find_spec(f"duckdb_extension_{name}").submodule_search_locations))
    connection.execute(f"LOAD '{next(Path(place).rglob(name + '.duckdb_extension'))}'")
began = time.process_time()
found = connection.sql(question.format(rows=rows)).fetchall()
print(json.dumps({"cpu": time.process_time() - began, "answer": repr(sorted(found))}))
"""
SUMS = """
import json, math, sys
import duckdb, polars, pyarrow as pa, pyarrow.compute as pc
from importlib.util import find_spec
from pathlib import Path
from pyiceberg.table import StaticTable
from pysail.spark import SparkConnectServer
from pyspark.sql.connect.session import SparkSession
tree, metadata = sys.argv[1:]
connection = duckdb.connect()
connection.execute("SET TimeZone = 'UTC'")
for name in ("avro", "iceberg"):
    place = next(iter(find_spec(f"duckdb_extension_{name}").submodule_search_locations))
    connection.execute(f"LOAD '{next(Path(place).rglob(name + '.duckdb_extension'))}'")
server = SparkConnectServer("127.0.0.1", 0)
server.start(background=True)
spark = SparkSession.builder.remote(f"sc://127.0.0.1:{server.listening_address[1]}").create()
table = StaticTable.from_metadata(metadata)
found = {
    "objects": connection.sql(f"SELECT * FROM {tree}").to_arrow_table(),
    "duckdb": connection.sql(f"SELECT * FROM iceberg_scan('{metadata}')").to_arrow_table(),
    "pyiceberg": table.scan().to_arrow(),
    "polars": polars.scan_iceberg(table).collect().to_arrow(),
    "sail": spark.read.format("iceberg").load(metadata.split("/metadata/")[0]).toArrow(),
}
def summed(column):
    if pa.types.is_floating(column.type):
        return math.fsum(column.drop_null().to_pylist())
    if pa.types.is_timestamp(column.type):
        column = column.cast(pa.timestamp("us", "UTC"))
        return [sum(column.cast(pa.int64()).to_pylist()), column.null_count]
    return [sum(map(hash, map(str, column.to_pylist()))), column.null_count]
sums = {engine: {name: summed(rows[name]) for name in found["objects"].column_names} for engine, rows in found.items()}
print(json.dumps({engine: one == sums["objects"] for engine, one in sums.items()}))
"""
REPORT = """
import json, sys, time
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from app.analytics import service
from app.analytics.formats import AnswerShape
from app.config.environment import load_settings
from app.db.state import open_state
from app.lake.job import table_for_reports
from app.object_store.local import LocalDirectory
folder, catalog, path, *given = sys.argv[1:]
settings = load_settings({"DATA_DIR": folder, "CATALOG": catalog}, None)
store, clock = LocalDirectory(Path(folder) / "objects"), lambda: datetime.now(UTC)
with closing(open_state("", Path(folder) / "state")) as state:
    table = table_for_reports(settings, store, clock)
    analytics = service.build(settings, store, state.summaries, lambda: ("", "", ""), clock, table=table)
    analytics.workplace.enter()
    analytics.summaries.refresh()
    def ask(path, given):
        report = analytics.reports[path]
        answer = analytics.queries.run(report, report.values(given), AnswerShape("json", report.answer))
        return json.loads(b"".join(answer.pieces()))
    ask(path, [("device_id", "nobody")])  # DuckDB starts, the report is checked, and the table is looked up
    began = time.process_time()
    found = ask(path, [each.split("=", 1) for each in given])["data"]
    spent = time.process_time() - began
    rounded = [{name: f"{value:.9g}" if isinstance(value, float) else value for name, value in row.items()
                if value is not None} for row in found]
    told = {"cpu": spent, "answer": json.dumps(rounded, sort_keys=True)}
    analytics.queries.close()
    analytics.workplace.leave()
print(json.dumps(told))
"""
LATE = """
import io, json, sys
from pathlib import Path
import pyarrow as pa, pyarrow.parquet as pq
from app.object_store.local import LocalDirectory
from app.object_store.port import PutRequest
root, key = sys.argv[1:]
store = LocalDirectory(Path(root))
with store.open(key) as body:
    rows = pq.read_table(io.BytesIO(body.read()))
file = io.BytesIO()
pq.write_table(pa.concat_tables([rows, rows.slice(0, 1)]), file, compression="zstd")
store.put(key, io.BytesIO(file.getvalue()), PutRequest("application/vnd.apache.parquet"))
"""
SNAPSHOTS = """
import json, sys
from pyiceberg.table import StaticTable
table = StaticTable.from_metadata(sys.argv[1])
every = table.snapshots()
files = [{task.file.file_path for task in table.scan(snapshot_id=each.snapshot_id).plan_files()} for each in every]
rows = [table.scan(snapshot_id=each.snapshot_id, selected_fields=("device_id",)).to_arrow().num_rows for each in every]
print(json.dumps({"swapped": len(files[0] - files[-1]), "rows": rows}))
"""
QUESTIONS = {
    "daily": "SELECT device_id, CAST(timestamp AS DATE), round(avg(voltage), 6), max(temperature), count(*)"
    " FROM {rows} GROUP BY ALL",
    "latest": "SELECT device_id, max(timestamp), arg_max(voltage, timestamp), arg_max(power, timestamp)"
    " FROM {rows} GROUP BY ALL",
    "one device's hour": "SELECT timestamp, voltage, power FROM {rows} WHERE device_id = 'D0007'"
    " AND timestamp >= '2026-02-07T05:00:00Z' AND timestamp < '2026-02-07T06:00:00Z'",
}
REPORTS = {
    "daily": ["daily-summary"],
    "latest": ["devices/latest"],
    "one device's hour": ["rows", "device_id=D0007", "from=2026-02-07T05:00:00Z", "to=2026-02-07T06:00:00Z"],
}
GOALS = {"daily": 8.0, "latest": 10.0, "one device's hour": 30.0}


def python(code: str, *words: str, environ: Mapping[str, str] | None = None) -> Cost:
    """Run code in a process of its own."""
    return run([sys.executable, "-c", code, *words], environ)


def lake_day(folder: Path) -> Cost:
    """One run of the job, as by hand."""
    environ = {"CATALOG": "iceberg", "DATA_DIR": str(folder), "LOG_FILE": "off", "PYTHONWARNINGS": "ignore"}
    return run([sys.executable, "-m", "app", "run", "lake_day", "--json"], {**os.environ, **environ})


def newest_metadata(folder: Path) -> Path:
    """Of the table."""
    return max((folder / "objects" / "lake").rglob("*.metadata.json"), key=lambda path: path.name)


def main() -> int:
    """Exit status: 0 when answers are equal and every goal is met."""
    parser = argparse.ArgumentParser(description=str(__doc__))
    parser.add_argument("--devices", type=int, default=63)
    parser.add_argument("--rows", type=int, default=60, help="of each object")
    given = parser.parse_args()
    objects = given.devices * 24 * len(DAYS)
    with tempfile.TemporaryDirectory(prefix="bench-lake-") as name:
        folder = Path(name).resolve()
        python(WRITE, str(folder / "objects"), str(given.devices), str(given.rows), *DAYS)
        first, again = lake_day(folder), lake_day(folder)
        print(
            f"{objects} objects of {given.rows} rows: {first.cpu_seconds:.1f} s of CPU in all; a run with nothing to do"
        )
        print(f"  {again.cpu_seconds:.1f} s, most of it the start; peak {first.peak_mib:.0f} MiB")
        metadata = newest_metadata(folder)
        tree = f"read_parquet('{folder}/objects/telemetry/**/*.parquet', union_by_name=true, hive_partitioning=false)"
        table = f"iceberg_scan('{metadata}')"
        goals = [
            Goal("CPU a source object", (first.cpu_seconds - again.cpu_seconds) * 1000 / objects, 1.5, False, " ms"),  # noqa: FBT003 - at most
            Goal("peak memory", first.peak_mib, 200, False, " MiB"),  # noqa: FBT003 - at most
        ]
        differ = False
        for what, question in QUESTIONS.items():
            plain, quick = (python(ASK, rows, question).told for rows in (tree, table))
            by_objects, by_table = (python(REPORT, str(folder), of, *REPORTS[what]).told for of in ("none", "iceberg"))
            differ |= plain["answer"] != quick["answer"] or by_objects["answer"] != by_table["answer"]
            ways = {"DuckDB, objects": plain, "table": quick, "/analytics, objects": by_objects, "table ": by_table}
            print(f"{what}, ms of CPU:", ", ".join(f"{way} {each['cpu'] * 1000:.0f}" for way, each in ways.items()))
            for way, each in (("DuckDB", quick), ("/analytics", by_table)):
                said = f"{what}: {way} over the table, times less CPU than DuckDB over the objects"
                goals.append(Goal(said, plain["cpu"] / each["cpu"], GOALS[what]))
        script = folder / "sums.py"  # Spark's client takes a `python -c` for a run of its doctests
        script.write_text(SUMS)
        equal = run([sys.executable, str(script), tree, str(metadata)]).told
        print("the sum of each column is that of the objects:", json.dumps(equal))
        differ |= not all(equal.values())
        key = f"telemetry/device_id=D0001/date={DAYS[-1].replace('-', '/')}/export_050000.parquet"
        python(LATE, str(folder / "objects"), key)
        late = lake_day(folder)
        told = python(SNAPSHOTS, str(newest_metadata(folder))).told
        print(f"a late row: {late.cpu_seconds:.1f} s of CPU, {told['swapped']} file swapped; rows of each snapshot:")
        print(f"  {told['rows']}")
        rows = objects * given.rows
        differ |= told != {"swapped": 1, "rows": [rows, rows + 1]}
    print(*goals, sep="\n")
    if differ:
        print(json.dumps("the answers differ"))
    return int(differ or not all(goal.met for goal in goals))


if __name__ == "__main__":
    sys.exit(main())
