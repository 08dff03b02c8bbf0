"""One tree written by Headwater, read by pandas, DuckDB, Polars and Spark with the calls in docs/influx_to_s3.md.

The tree has ordinary features that readers stumble over: several days and devices, ids that look like numbers,
nanoseconds in some objects only, fields and tags added later, three phases at one timestamp, values that do not fit
their column. Each reader must find the rows, timestamps, values and sums that were written; exits with 1 when one does
not.

Spark runs in its own environment, which uv creates in a cache directory, with the system's Java runtime.
"""

import argparse
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import chdir
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

PAGE = Path(__file__).resolve().parents[1] / "docs" / "influx_to_s3.md"
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "headwater-bench"
PYSPARK = "pyspark==3.5.9"
PREFIX = "telemetry"
START = datetime(2026, 2, 5, tzinfo=UTC)
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
DAYS = 4
DEVICES = ("D1", "007", "1001", "1e3")
NS, MICRO_NS = 10**9, 1000
Row = dict[str, Any]
SPARK_CODE = """
import json, os
from pyspark.sql import SparkSession, functions as F
spark = (
    SparkSession.builder.master("local[1]")
    .config("spark.driver.host", "127.0.0.1").config("spark.driver.bindAddress", "127.0.0.1")
    .config("spark.ui.enabled", "false").config("spark.sql.session.timeZone", "UTC").getOrCreate()
)
spark.sparkContext.setLogLevel("OFF")
{page}
for row in frame.withColumn("timestamp", F.expr("unix_micros(timestamp)")).toJSON().collect():
    print("ROW", row)
"""


@dataclass(frozen=True, slots=True)
class Found:
    """What a reader found: rows, their instants added up in nanoseconds, and by column its values and their sum.

    Of a text the checksum is added up, of a boolean the number of those that are true. `whole_rows` is the sum of a
    checksum of each row, which tells when values stand in a wrong row.
    """

    rows: int
    instants: int
    whole_rows: int
    columns: Mapping[str, tuple[int, float]]


def found_in(rows: Iterable[Row]) -> Found:
    """`rows`: timestamp in microseconds, and timestamp_nanos beside it where there are digits below."""
    number = instants = whole_rows = 0
    values: Counter[str] = Counter()
    sums: defaultdict[str, list[float]] = defaultdict(list)
    for row in rows:
        number += 1
        instants += row["timestamp"] * MICRO_NS + int(row.get("timestamp_nanos") or 0)
        there = {name: numeric(value) for name, value in row.items() if value is not None}
        whole_rows += zlib.crc32(repr(sorted(there.items())).encode())
        for name in there.keys() - {"timestamp"}:
            values[name] += 1
            sums[name].append(there[name])
    return Found(
        number, instants, int(whole_rows), {name: (values[name], math.fsum(sums[name])) for name in sorted(values)}
    )


def numeric(value: Any) -> float:
    """A number that stands for a value; readers differ in the types they give to numbers with nulls between them."""
    return float(zlib.crc32(value.encode()) if isinstance(value, str) else value)


def points() -> Iterable[tuple[Row, Row, int]]:
    """Tags, fields and the instant in nanoseconds of every point; none twice."""
    for day in range(DAYS):
        for number, device in enumerate(DEVICES[: 3 + day // 2]):  # the last device came on the third day
            for minute in range(0, 1440, 20):
                at_ns = (START - EPOCH) // timedelta(microseconds=1) * MICRO_NS + (day * 1440 + minute) * 60 * NS
                at_ns += 123_456_789 if number == 1 and day == 1 else 0  # nanoseconds in some objects
                tags = {"device_id": device, "device_type": "meter", "location": f"Plant-{number}"}
                if number == 0:
                    del tags["location"]
                fields: Row = {"voltage": 230 + minute / 8, "current": 1.5, "power": 300.25 + number, "count": minute}
                fields = later(fields, day, minute)
                yield from phases(tags, fields, at_ns) if number == 2 else [(tags, fields, at_ns)]


def phases(tags: Row, fields: Row, at_ns: int) -> Iterable[tuple[Row, Row, int]]:
    """Three points of one device and instant that differ in a further tag."""
    for phase in ("L1", "L2", "L3"):
        yield {**tags, "phase": phase}, {**fields, "power": fields["power"] + int(phase[1])}, at_ns


def later(fields: Row, day: int, minute: int) -> Row:
    """Fields that came later, and on later days values that the columns' first types cannot hold."""
    if day >= 1:
        fields = {**fields, "alarm": minute % 40 == 0, "frequency": 50 + minute / 1024}
    if day == 2:
        fields = {**fields, "count": minute + 0.5}
    if day == 3:
        fields = {**fields, "count": "off" if minute % 40 else "überlauf", "status": 'ok, "quoted"'}
    return fields


def line(tags: Row, fields: Row, at_ns: int) -> str:
    """The point as line protocol."""

    def text(value: Any) -> str:
        if isinstance(value, str):
            return '"' + value.replace('"', '\\"') + '"'
        return str(value).lower() if isinstance(value, bool) else f"{value}i" if isinstance(value, int) else repr(value)

    series = "".join(f",{name}={value}" for name, value in tags.items())
    return f"device_telemetry{series} {','.join(f'{name}={text(value)}' for name, value in fields.items())} {at_ns}"


def row_of(tags: Row, fields: Row, at_ns: int) -> Row:
    """The row that the page promises for a point, every column computed anew."""
    at = EPOCH + timedelta(seconds=at_ns // NS)
    row: Row = {"timestamp": at_ns // MICRO_NS, "device_type": "unknown", "location": "unknown", **tags}
    row |= {"hour": at.hour, "day_of_week": at.weekday(), "is_weekend": at.weekday() >= 5}
    apparent = fields["voltage"] * fields["current"]
    row["power_factor"] = min(1.0, max(0.0, fields["power"] / apparent))
    for name, value in fields.items():
        suffix = {float: "_double", str: "_text"}.get(type(value), "") if name == "count" else ""
        row[name + suffix] = value
    if at_ns // (86_400 * NS) == (START - EPOCH).days + 1 and tags["device_id"] == DEVICES[1]:
        row["timestamp_nanos"] = at_ns % MICRO_NS  # only in objects that have digits below the microsecond
    return row


def write_tree(folder: Path) -> Found:
    """Export every point by the product's own job; what stands in the tree then, computed from the points."""
    from app.config.environment import load_settings
    from app.core.runs import LeaseTerms, Outcome, RunServices, Stop, execute
    from app.db.state import open_state
    from app.influx_to_s3 import job
    from app.object_store.local import LocalDirectory
    from app.object_store.set_aside import SetAsideStore, folder_of
    from simulators.influx import InfluxSimulator

    class Silent:
        def advance(self, *, done: int = 0, total: int = 0, rows: int = 0) -> None:
            """Nobody watches."""

    def failed(cause: BaseException | None) -> None:
        if cause is not None:
            raise cause

    now = [START]
    state = open_state("", folder / "data")
    store = LocalDirectory(folder / "objects")
    with InfluxSimulator(shard_ns=86_400 * NS) as influx:
        environ = {"INFLUXDB_URL": influx.url, "INFLUXDB_TOKEN": influx.token, "INFLUXDB_ORG": influx.org}
        environ |= {"INFLUXDB_BUCKET": influx.bucket, "DATA_DIR": str(folder / "data"), "S3_PREFIX": PREFIX}
        settings = load_settings({**environ, "EXPORT_START": START.isoformat(), "EXPORT_WINDOW_SECONDS": "21600"}, None)
        aside = SetAsideStore(store, folder_of(PREFIX), settings.set_aside.max_bytes)
        clock: Callable[[], datetime] = lambda: now[0]  # noqa: E731 - it is read again and again
        export = job.build(settings, state.checkpoints, store, set_aside=aside, clock=clock)
        services = RunServices(clock, state.leases, state.runs, LeaseTerms("bench"), lambda _run, cause: failed(cause))
        written = list(points())
        for day in range(DAYS):  # day by day, so that fields and devices come later for the product as well
            now[0] = START + timedelta(days=day + 1, hours=2)
            until_ns = (now[0] - timedelta(hours=2) - EPOCH) // timedelta(microseconds=1) * MICRO_NS
            new = [point for point in written if until_ns - 86_400 * NS <= point[2] < until_ns]
            influx.write("\n".join(line(*point) for point in new))
            more = True
            while more:
                run = execute(export.jobs[0], services, Stop(), Silent())
                if run is None or run.outcome is not Outcome.OK:
                    sys.exit(f"the export failed: {run}")
                more = run.report.more
    state.close()
    return found_in(row_of(*point) for point in written)


def call_of(reader: str) -> str:
    """The call that the page shows for a reader: a block of Python that opens `telemetry` as `frame`."""
    blocks = re.findall(r"```python\n# (\w+)\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    return str(next(code for name, code in blocks if name == reader))


def found_by(reader: str) -> Found:
    """Run the page's call in this process, in the folder that holds the tree."""
    import pyarrow as pa

    names: Row = {}
    exec(compile(call_of(reader), f"{PAGE.name}: {reader}", "exec"), names)  # noqa: S102 - the page's own code
    frame = names["frame"]
    if reader == "pandas":
        table = pa.Table.from_pandas(frame, preserve_index=False)
    else:
        table = frame.to_arrow_table() if reader == "DuckDB" else frame.to_arrow()
    at = table.schema.get_field_index("timestamp")
    table = table.set_column(at, "timestamp", table.column(at).cast(pa.timestamp("us", "UTC")).cast(pa.int64()))
    return found_in(table.to_pylist())


def spark_python() -> Path | str:
    """The Python of an environment with Spark, or why there is none."""
    uv, python = shutil.which("uv"), CACHE / PYSPARK / "bin" / "python"
    if shutil.which("java") is None:
        return "no Java runtime: apt-get install default-jre-headless"
    if uv is None:
        return "no uv"
    if not (python.parent / "spark-submit").exists():
        made = subprocess.run([uv, "venv", "-q", "--python", sys.executable, str(CACHE / PYSPARK)], check=False)
        install = [uv, "pip", "install", "-q", "--python", str(python), PYSPARK, "setuptools"]
        if made.returncode or subprocess.run(install, check=False).returncode:
            return f"{PYSPARK} cannot be installed"
    return python


def found_by_spark(python: Path) -> Found:
    """Run the page's call in Spark's own environment."""
    code = SPARK_CODE.format(page=call_of("Spark"))
    environ = {**os.environ, "PYSPARK_PYTHON": str(python), "SPARK_LOCAL_IP": "127.0.0.1", "TZ": "UTC"}
    done = subprocess.run([str(python), "-c", code], env=environ, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"Spark ended with {done.returncode}: {done.stderr[-2000:]}")
    rows = (text.removeprefix("ROW ") for text in done.stdout.splitlines() if text.startswith("ROW "))
    return found_in(map(json.loads, rows))


def table_of(found: Mapping[str, Found]) -> str:
    """Markdown: rows, instants and each column, one column a reader."""
    names = sorted({name for one in found.values() for name in one.columns})

    def line_of(title: str, show: Callable[[Found], str]) -> str:
        return f"| {title} | {' | '.join(show(one) for one in found.values())} |"

    def column(name: str) -> Callable[[Found], str]:
        return lambda one: "{}: {:.10g}".format(*one.columns[name]) if name in one.columns else "absent"

    return "\n".join(
        [
            line_of("values: sum", lambda one: next(name for name, each in found.items() if each is one)),
            f"|---|{'---|' * len(found)}",
            line_of("rows", lambda one: str(one.rows)),
            line_of("instants, ns", lambda one: str(one.instants)),
            line_of("rows by checksum", lambda one: str(one.whole_rows)),
            *(line_of(name, column(name)) for name in names),
        ]
    )


def differences(written: Found, found: Found) -> Sequence[str]:
    """What a reader found otherwise than it was written; sums of floats depend on their order in the last digits."""
    wrong = [
        f"{what}: {theirs}, not {ours}"
        for what, ours, theirs in (
            ("rows", written.rows, found.rows),
            ("instants", written.instants, found.instants),
            ("rows by checksum", written.whole_rows, found.whole_rows),
            ("columns", sorted(written.columns), sorted(found.columns)),
        )
        if ours != theirs
    ]
    for name in written.columns.keys() & found.columns.keys():
        (values, total), (other_values, other) = written.columns[name], found.columns[name]
        if values != other_values or not math.isclose(total, other, rel_tol=1e-12):
            wrong.append(f"{name}: {other_values} values of {other!r}, not {values} of {total!r}")
    return wrong


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the tree, open it by every reader, and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--spark-python", type=Path, help="the Python of an environment that has pyspark already")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="headwater-bench-") as name:
        folder = Path(name)
        found = {"written": write_tree(folder)}
        with chdir(folder / "objects"):
            found |= {reader: found_by(reader) for reader in ("pandas", "DuckDB", "Polars")}
            python = given.spark_python or spark_python()
            if isinstance(python, Path):
                found["Spark"] = found_by_spark(python)
            else:
                print(f"Spark is skipped: {python}")
        objects = sorted((folder / "objects" / PREFIX).rglob("*.parquet"))
    print(f"\n### {len(objects)} objects of {len(DEVICES)} devices on {DAYS} days\n\n{table_of(found)}\n")
    wrong = {reader: differences(found["written"], one) for reader, one in found.items()}
    for reader, lines in wrong.items():
        print("\n".join(f"- {reader}: {each}" for each in lines or ("equal",)))
    return 1 if any(wrong.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
