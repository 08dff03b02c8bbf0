"""The compared ways of the InfluxDB export, each run by name in its own process; prints the results as JSON.

The usual ways are written as people write them: one query per device and hour, pandas for the computed columns,
`to_parquet` per object. Headwater's way is its own job with state in SQLite and objects in a directory.
"""

import argparse
import json
import resource
import sys
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from telemetry import START, WINDOW_SECONDS, Shape, device_name

if TYPE_CHECKING:
    import pandas as pd

TOKEN, ORG, BUCKET, MEASUREMENT = "bench", "bench", "telemetry", "device_telemetry"
PIECE_BYTES = 1 << 16
TAGS = ["device_id", "device_type", "location"]
Told = dict[str, Any]


def flux(start: datetime, end: datetime, device: str) -> str:
    """The query that the ordinary ways ask; `device` "" = all."""
    only = f' and r.device_id == "{device}"' if device else ""
    return (
        f'from(bucket: "{BUCKET}") |> range(start: {start:%Y-%m-%dT%H:%M:%SZ}, stop: {end:%Y-%m-%dT%H:%M:%SZ})'
        f' |> filter(fn: (r) => r._measurement == "{MEASUREMENT}"{only})'
        ' |> drop(columns: ["_start", "_stop", "_measurement"])'
        ' |> pivot(rowKey: ["_time"], columnKey: ["_field"], valueColumn: "_value")'
    )


def cpu_seconds() -> float:
    """User and system time of this process so far."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def timed(work: Callable[[], int]) -> Told:
    """The CPU time of `work` alone, and the rows that it says it saw."""
    before = cpu_seconds()
    rows = work()
    return {"work_cpu_seconds": cpu_seconds() - before, "rows": rows}


def client(url: str) -> Any:
    """The client library as its documentation opens it."""
    from influxdb_client.client.influxdb_client import InfluxDBClient

    return InfluxDBClient(url=url, token=TOKEN, org=ORG, timeout=600_000)


# ---- parsing only: one answer over all devices


def pieces(body: bytes) -> Iterator[bytes]:
    """The body as it comes off a connection."""
    return (body[start : start + PIECE_BYTES] for start in range(0, len(body), PIECE_BYTES))


def parse_ours(url: str, shape: Shape, _: Path) -> Told:
    """`read_blocks` over the bytes in memory."""
    import numpy as np  # noqa: F401 - loaded before the clock starts, as the next ones
    import pyarrow.compute
    import pyarrow.csv  # noqa: F401

    from app.influx_to_s3.annotated_csv import read_blocks

    body = client(url).query_api().query_raw(flux(START, shape.end, "")).read()
    return timed(lambda: sum(len(block.columns[0]) for block in read_blocks(pieces(body))))


def parse_floor(url: str, _: Shape, __: Path) -> Told:
    """The same data as plain CSV, types given, by pyarrow alone, on one thread: what no program here can beat."""
    import pyarrow.csv  # noqa: F401 - loaded before the clock starts

    body = fetched(url)
    return timed(lambda: int(parsed(body).num_rows))


def parse_data_frame(url: str, shape: Shape, _: Path) -> Told:
    """`query_data_frame`, less what reading the same bytes over HTTP costs."""
    import pandas as pd  # noqa: F401 - loaded before the clock starts

    api = client(url).query_api()
    query = flux(START, shape.end, "")
    reading = timed(lambda: len(api.query_raw(query).read()))["work_cpu_seconds"]
    told = timed(lambda: len(api.query_data_frame(query)))
    return {**told, "work_cpu_seconds": told["work_cpu_seconds"] - reading}


# ---- the whole export


def export_floor(url: str, shape: Shape, folder: Path) -> Told:
    """The least that gives these objects: plain CSV in one piece, parsed by pyarrow, cut, written. Nothing computed,
    compared, made durable or remembered.
    """
    import pyarrow.parquet as pq

    table = plain(url)
    for number, (device, start, _) in enumerate(spans(shape)):
        path = folder / f"device_id={device}" / f"date={start:%Y/%m/%d}" / f"export_{start:%H%M%S}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        part = table.slice(number * shape.rows, shape.rows)
        pq.write_table(part, path, compression="zstd", compression_level=1, use_dictionary=TAGS)
    return {"rows": table.num_rows}


def plain(url: str) -> Any:
    """The data as plain CSV, types given, parsed on one thread."""
    return parsed(fetched(url))


def fetched(url: str) -> bytes:
    """The plain CSV's bytes."""
    import urllib3

    body: bytes = urllib3.request("GET", f"{url}/plain", timeout=600).data
    return body


def parsed(body: bytes) -> Any:
    """A table of the plain CSV."""
    import pyarrow as pa
    import pyarrow.csv as pacsv

    convert = pacsv.ConvertOptions(column_types={"_time": pa.timestamp("ns", "UTC")}, strings_can_be_null=True)
    return pacsv.read_csv(pa.BufferReader(body), pacsv.ReadOptions(use_threads=False), convert_options=convert)


def export_ours(url: str, shape: Shape, folder: Path, **variables: str) -> Told:
    """The product's job, run until nothing is left."""
    import logging

    from app.analytics.object_facts import TableSums
    from app.config.environment import load_settings
    from app.core.runs import LeaseTerms, Outcome, RunServices, Stop, execute
    from app.db.state import open_state
    from app.influx_to_s3 import job
    from app.object_store.local import LocalDirectory
    from app.object_store.set_aside import SetAsideStore, folder_of
    from app.ops.process import share_the_machine, tune

    tune()
    share_the_machine()
    logging.basicConfig(level=logging.WARNING)
    environ = {"INFLUXDB_URL": url, "INFLUXDB_TOKEN": TOKEN, "INFLUXDB_ORG": ORG, "INFLUXDB_BUCKET": BUCKET}
    environ |= {"DATA_DIR": str(folder), "EXPORT_START": START.isoformat()}
    settings = load_settings({**environ, **variables}, None)
    now: datetime = shape.end + timedelta(seconds=settings.export.grace_seconds + 60)

    def clock() -> datetime:
        return now

    state = open_state("", folder)
    store = LocalDirectory(folder / "objects")
    aside = SetAsideStore(store, folder_of(settings.s3.prefix), settings.set_aside.max_bytes)
    sums = job.ObjectSums(TableSums, state.summaries)
    export = job.build(settings, state.checkpoints, store, set_aside=aside, clock=clock, sums=sums)
    services = RunServices(clock, state.leases, state.runs, LeaseTerms("bench"), lambda _run, cause: raised(cause))
    rows, more = 0, True
    while more:
        run = execute(export.jobs[0], services, Stop(), Silent())
        if run is None or run.outcome is not Outcome.OK:
            sys.exit(f"the export failed: {run}")
        rows, more = rows + run.report.rows, run.report.more
    state.close()
    forbidden = sorted({"pandas", "pyarrow.dataset", "boto3"} & sys.modules.keys())
    return {"rows": rows, "imported": forbidden}


def idle(_: str, __: Shape, ___: Path) -> Told:
    """Everything imported that an export needs, and nothing done."""
    from app.ops.process import tune

    tune()
    import numpy as np
    import pyarrow.compute
    import pyarrow.csv
    import pyarrow.parquet as pq
    import urllib3

    from app.config.environment import load_settings
    from app.db import state
    from app.influx_to_s3 import job
    from app.object_store import local

    imported = (urllib3, np, pyarrow.compute, pyarrow.csv, pq, job, load_settings, local, state)
    return {"rows": 0, "imported": len(imported)}


class Silent:
    """Progress that nobody watches."""

    def advance(self, *, done: int = 0, total: int = 0, rows: int = 0) -> None:
        """Nothing."""


def raised(cause: BaseException | None) -> None:
    """An error inside a run is an error of the bench."""
    if cause is not None:
        raise cause


def export_data_frame(url: str, shape: Shape, folder: Path) -> Told:
    """`query_data_frame` per device and hour, pandas, `to_parquet`."""
    api = client(url).query_api()
    rows = 0
    for device, start, end in spans(shape):
        frame = api.query_data_frame(flux(start, end, device))
        rows += write(frame.drop(columns=["result", "table"]), folder, device, start)
    return {"rows": rows}


def export_records(url: str, shape: Shape, folder: Path) -> Told:
    """`query()` per device and hour, its records into pandas, `to_parquet`."""
    import pandas as pd

    api = client(url).query_api()
    rows = 0
    for device, start, end in spans(shape):
        tables = api.query(flux(start, end, device))
        frame = pd.DataFrame([record.values for table in tables for record in table.records])  # noqa: PD011 - not of pandas
        rows += write(frame.drop(columns=["result", "table"]), folder, device, start)
    return {"rows": rows}


def spans(shape: Shape) -> Iterator[tuple[str, datetime, datetime]]:
    """Every device and hour."""
    for number in range(shape.devices):
        for window in range(shape.windows):
            start = START + timedelta(seconds=window * WINDOW_SECONDS)
            yield device_name(number), start, start + timedelta(seconds=WINDOW_SECONDS)


def write(frame: "pd.DataFrame", folder: Path, device: str, start: datetime) -> int:
    """The computed columns, then one object."""
    frame = frame.rename(columns={"_time": "timestamp"}).sort_values("timestamp")
    frame["device_type"] = frame["device_type"].fillna("unknown")
    frame["location"] = frame["location"].fillna("unknown")
    frame["hour"] = frame["timestamp"].dt.hour
    frame["day_of_week"] = frame["timestamp"].dt.day_of_week
    frame["is_weekend"] = frame["day_of_week"] >= 5
    frame["power_factor"] = (frame["power"] / (frame["voltage"] * frame["current"])).clip(0, 1)
    path = folder / f"device_id={device}" / f"date={start:%Y/%m/%d}" / f"export_{start:%H%M%S}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    frame.to_parquet(path, compression="zstd", index=False)
    return len(frame)


WAYS: dict[str, Callable[[str, Shape, Path], Told]] = {
    "parse-ours": parse_ours,
    "parse-floor": parse_floor,
    "parse-data-frame": parse_data_frame,
    "idle": idle,
    "export-floor": export_floor,
    "export-ours": export_ours,
    "export-ours-one": partial(export_ours, EXPORT_CONCURRENCY="1"),
    "export-data-frame": export_data_frame,
    "export-records": export_records,
}


def main() -> None:
    """Run one way."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("way", choices=sorted(WAYS))
    parser.add_argument("--url", required=True)
    parser.add_argument("--folder", type=Path, required=True)
    for name in ("devices", "windows", "rows"):
        parser.add_argument(f"--{name}", type=int, required=True)
    given = parser.parse_args()
    shape = Shape(given.devices, given.windows, given.rows)
    print(json.dumps(WAYS[given.way](given.url, shape, given.folder)))


if __name__ == "__main__":
    main()
