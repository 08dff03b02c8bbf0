"""Objects of telemetry for tests of /analytics, and what plain DuckDB says of the same files."""

import io
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from app.analytics.engine import Engine, EngineLimits, RemoteBucket
from app.analytics.formats import AnswerShape, of_table
from app.analytics.queries import WHOLE_BYTES, BucketObjects, LocalObjects, Queries, ReportObjects
from app.analytics.reports import TABLES, ReportDefinition, load_reports
from app.analytics.summaries import Summaries
from app.db.database import sql_directory
from app.db.object_summaries import SqlSummaries
from app.object_store.local import LocalDirectory
from app.object_store.port import ObjectStore, PutRequest
from app.object_store.s3 import S3Store
from app.object_store.s3_client import S3Target
from seaweed import Seaweed

PREFIX = "telemetry"
BUILT_IN = ("overview", "daily-summary", "rows-by-day", "devices", "devices/latest")
ORACLE: Mapping[str, str] = {
    "overview": """
        SELECT count(*) AS total_rows, count(DISTINCT device_id) AS device_count,
            min(timestamp) AS min_timestamp, max(timestamp) AS max_timestamp FROM rows""",
    "daily-summary": """
        SELECT device_id, CAST(timestamp AS DATE) AS date, avg(voltage) AS avg_voltage,
            max(temperature) AS max_temperature, avg(soc) AS avg_soc, count(*) AS row_count
        FROM rows WHERE device_id IS NOT NULL AND timestamp IS NOT NULL GROUP BY 1, 2 ORDER BY 1, 2""",
    "rows-by-day": """
        SELECT CAST(timestamp AS DATE) AS date, count(*) AS row_count, count(DISTINCT device_id) AS device_count
        FROM rows WHERE timestamp IS NOT NULL GROUP BY 1 ORDER BY 1""",
    "devices": """
        SELECT device_id, min(timestamp) AS first_seen, max(timestamp) AS last_seen, count(*) AS total_records
        FROM rows WHERE device_id IS NOT NULL GROUP BY 1 ORDER BY 1""",
    "devices/latest": """
        SELECT device_id, timestamp, voltage, current, power, temperature, soc, power_factor, device_type, location
        FROM rows WHERE device_id IS NOT NULL AND timestamp IS NOT NULL
        QUALIFY row_number() OVER (PARTITION BY device_id ORDER BY timestamp DESC, voltage DESC NULLS FIRST,
            current DESC NULLS FIRST, power DESC NULLS FIRST, temperature DESC NULLS FIRST, soc DESC NULLS FIRST,
            power_factor DESC NULLS FIRST, device_type DESC NULLS FIRST, location DESC NULLS FIRST) = 1
        ORDER BY device_id""",
}
KNOWN: Mapping[str, str] = {
    "device_id": "VARCHAR",
    "timestamp": "TIMESTAMP",
    "voltage": "DOUBLE",
    "current": "DOUBLE",
    "power": "DOUBLE",
    "temperature": "DOUBLE",
    "soc": "DOUBLE",
    "power_factor": "DOUBLE",
    "device_type": "VARCHAR",
    "location": "VARCHAR",
}


def parquet(columns: Mapping[str, Any]) -> bytes:
    """A Parquet file."""
    file = io.BytesIO()
    pq.write_table(pa.table(dict(columns)), file)
    return file.getvalue()


def exported(device: str, start: datetime, rows: int, *, draw: random.Random, step_seconds: int = 60) -> bytes:
    """As `influx_to_s3` writes: UTC nanoseconds, no soc; some values missing."""
    times = [start + timedelta(seconds=step_seconds * number) for number in range(rows)]

    def numbers(low: float, high: float) -> Any:
        return pa.array([draw.uniform(low, high) if draw.random() > 0.1 else None for _ in times], pa.float64())

    return parquet(
        {
            "timestamp": pa.array(times, pa.timestamp("ns", "UTC")),
            "device_id": pa.array([device] * rows, pa.string()).dictionary_encode(),
            "device_type": pa.array([draw.choice(["bulb", None]) for _ in times], pa.string()),
            "voltage": numbers(200, 250),
            "current": numbers(0, 2),
            "power": numbers(0, 500),
            "temperature": numbers(20, 80),
            "hour": pa.array([time.hour for time in times], pa.int64()),
        }
    )


def flat(start: datetime, rows: int, *, draw: random.Random) -> bytes:
    """As document 004 expects: naive instants, soc, whole numbers, several devices, repeated instants, odd devices."""
    devices = [draw.choice(["D1", "D2", "ü", "", None]) for _ in range(rows)]
    times = [draw.choice([start + timedelta(hours=draw.randrange(30)), None]) for _ in range(rows)]
    return parquet(
        {
            "device_id": pa.array(devices, pa.string()),
            "timestamp": pa.array(times, pa.timestamp("us")),
            "voltage": pa.array([draw.randrange(200, 205) for _ in range(rows)], pa.int32()),
            "temperature": pa.array([draw.choice([20.5, 21.5, math.nan, None]) for _ in range(rows)], pa.float32()),
            "soc": pa.array([draw.choice([0.5, 50, math.inf, None]) for _ in range(rows)], pa.float64()),
        }
    )


def scanned(folder: Path, contents: Sequence[bytes]) -> Mapping[str, list[tuple[Any, ...]]]:
    """What plain DuckDB says of these files, report by report."""
    folder.mkdir(exist_ok=True)
    with duckdb.connect() as connection:
        connection.execute("SET TimeZone = 'UTC'")
        empty = ", ".join(f'CAST(NULL AS {kind}) AS "{name}"' for name, kind in KNOWN.items())
        connection.execute(f"CREATE TABLE rows AS SELECT {empty} LIMIT 0")
        for number, content in enumerate(contents):
            file = folder / f"{number}.parquet"
            file.write_bytes(content)
            there = [row[0] for row in connection.execute(f"DESCRIBE FROM '{file}'").fetchall()]
            kept = [f'CAST("{name}" AS {KNOWN[name]}) AS "{name}"' for name in there if name in KNOWN]
            connection.execute(f"INSERT INTO rows BY NAME SELECT {', '.join(kept)} FROM '{file}'")  # noqa: S608 - own names
        for name, kind in KNOWN.items():
            if kind == "DOUBLE":
                connection.execute(f'UPDATE rows SET "{name}" = NULL WHERE NOT isfinite("{name}")')  # noqa: S608
        connection.execute("UPDATE rows SET device_id = NULL WHERE device_id = ''")
        return {name: connection.execute(sql).fetchall() for name, sql in ORACLE.items()}


def same(left: Sequence[Sequence[Any]], right: Sequence[Sequence[Any]]) -> bool:
    """Equal, numbers but for the rounding of their last digits."""
    return len(left) == len(right) and all(
        len(one) == len(other) and all(_same(a, b) for a, b in zip(one, other, strict=True))
        for one, other in zip(left, right, strict=True)
    )


def _same(left: Any, right: Any) -> bool:
    if isinstance(left, float) and isinstance(right, float):
        return math.isclose(left, right, rel_tol=1e-12)
    return bool(left == right)


def put_telemetry(folder: Path, key: str, content: bytes) -> None:
    """An object of a daemon whose test folder this is."""
    LocalDirectory(folder / "data" / "objects").put(f"{PREFIX}/{key}", io.BytesIO(content), PutRequest("x"))


@dataclass
class Lake:
    """A store with objects, and /analytics over it."""

    store: ObjectStore
    facts: SqlSummaries
    folder: Path
    objects: Callable[[Engine], ReportObjects]
    contents: dict[str, bytes] = field(default_factory=dict)
    now: datetime = datetime(2026, 2, 7, tzinfo=UTC)

    def __post_init__(self) -> None:
        (self.folder / "work").mkdir(parents=True)
        self.engine = Engine(self.folder / "work", EngineLimits(128, 2, 60))
        self.summaries = self.another()
        self.queries = Queries(self.summaries, self.objects(self.engine), self.engine)
        self.reports: Mapping[str, ReportDefinition] = load_reports([sql_directory() / "analytics"])

    def another(self) -> Summaries:
        """The summaries of a process that starts now, on the same store and the same state."""
        return Summaries(self.store, self.facts, self.engine, PREFIX, lambda: self.now)

    def put(self, key: str, content: bytes) -> None:
        self.contents[key] = content
        self.store.put(f"{PREFIX}/{key}", io.BytesIO(content), PutRequest("application/vnd.apache.parquet"))

    def delete(self, key: str) -> None:
        del self.contents[key]
        self.store.delete(f"{PREFIX}/{key}")

    def from_summaries(self, path: str, summaries: Summaries | None = None) -> Sequence[tuple[Any, ...]]:
        view = (summaries or self.summaries).view
        assert view is not None
        return TABLES[self.reports[path].summary](view.days).rows

    def from_objects(self, path: str, **values: Any) -> list[tuple[Any, ...]]:
        """The rows of a report that DuckDB ran over the objects."""
        report = self.reports[path]
        given = {**report.values([]), **values}
        answer = self.queries.run(report, given, AnswerShape("parquet", report.answer))
        table = pq.read_table(io.BytesIO(b"".join(answer.pieces())))
        plain = [c.cast(pa.timestamp("us")) if pa.types.is_timestamp(c.type) else c for c in table.columns]
        return list(zip(*(column.to_pylist() for column in plain), strict=True))

    def bytes_of(self, path: str, how: str) -> bytes:
        """The answer from the summaries in a format."""
        view = self.summaries.view
        assert view is not None
        report = self.reports[path]
        answer = of_table(TABLES[report.summary](view.days), AnswerShape(how, report.answer), self.folder)
        return b"".join(answer.pieces())

    def close(self) -> None:
        self.queries.close()


def local_lake(folder: Path, facts: SqlSummaries) -> Lake:
    """Over a directory."""
    store = LocalDirectory(folder / "objects")
    return Lake(store, facts, folder, lambda engine: LocalObjects(engine, store.pin))


def bucket_lake(server: Seaweed, folder: Path, facts: SqlSummaries, *, whole_bytes: int = WHOLE_BYTES) -> Lake:
    """Over a bucket of a real server; objects above `whole_bytes` are read in pieces."""
    bucket = server.new_bucket()
    target = S3Target(
        bucket=bucket,
        endpoint_url=server.endpoint_url,
        addressing_style="path",
        access_key_id=server.access_key,
        secret_access_key=server.secret_key,
        attempts=1,
        page_keys=2,
    )

    def remote(whole: bool) -> RemoteBucket:  # noqa: FBT001 - as the port has it
        return RemoteBucket(
            bucket=bucket,
            prefix=PREFIX,
            endpoint=f"{server.host}:{server.port}",
            region="us-east-1",
            path_style=True,
            tls=False,
            access_key_id=server.access_key,
            secret_access_key=server.secret_key,
            whole=whole,
        )

    def objects(engine: Engine) -> ReportObjects:
        made = partial(Engine, engine.folder, EngineLimits(128, 8, 60))
        return BucketObjects(remote, made, whole_bytes)

    return Lake(S3Store(target, "probe/key"), facts, folder, objects)
