"""A tree of exported objects and the lake day over it, with a clock that is handed in."""

import io
import random
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from app.core.runs import Context, Lease, NoProgress, Report, Stop
from app.lake.job import MAX_BYTES, LakeDay, opened_table
from app.lake.reader import TableReader
from app.object_store.local import LocalDirectory
from app.object_store.port import ObjectStore, PutRequest
from given_settings import loaded

DAY = date(2026, 2, 7)
NOW = datetime(2026, 2, 8, 12, tzinfo=UTC)


def rows(device: str, hour: int, count: int = 4, *, day: date = DAY, shift_us: int = 0, **columns: Any) -> pa.Table:
    """An object's rows as the export writes them, in microseconds; `columns` are added, or replace those of a name."""
    start = datetime(day.year, day.month, day.day, hour, tzinfo=UTC) + timedelta(microseconds=shift_us)
    times = [start + timedelta(seconds=3600 // count * number) for number in range(count)]
    draw = random.Random(f"{device} {hour} {day}")  # noqa: S311 - data of a test
    held = {
        "timestamp": pa.array(times, pa.timestamp("us", "UTC")),
        "device_id": pa.array([device] * count, pa.string()).dictionary_encode(),
        "location": pa.array([draw.choice(["hall", "roof", None]) for _ in times], pa.string()),
        "voltage": pa.array([draw.uniform(200, 250) for _ in times], pa.float64()),
        "hour": pa.array([hour] * count, pa.int64()),
        **columns,
    }
    return pa.table(held)


def parquet(table: pa.Table) -> bytes:
    file = io.BytesIO()
    pq.write_table(table, file)
    return file.getvalue()


class Tree:
    """The objects, the table, and a run of the job whenever it is asked for."""

    def __init__(self, folder: Path, *, store: ObjectStore | None = None, **variables: str) -> None:
        self.folder = folder
        given = {"CATALOG": "iceberg", "DATA_DIR": str(folder), **variables}
        self.settings = loaded(given)
        self.store = store or LocalDirectory(folder / "objects")
        self.now = NOW
        self.max_bytes = MAX_BYTES

    def key(self, device: str, hour: int, day: date = DAY, second: int = 0) -> str:
        return f"telemetry/device_id={device}/date={day:%Y/%m/%d}/export_{hour:02d}00{second:02d}.parquet"

    def put(self, device: str, hour: int, table: pa.Table | None = None, *, day: date = DAY, second: int = 0) -> str:
        key = self.key(device, hour, day, second)
        content = parquet(rows(device, hour, day=day) if table is None else table)
        self.store.put(key, io.BytesIO(content), PutRequest("application/vnd.apache.parquet"))
        return key

    def run(self, *, dry_run: bool = False, job: LakeDay | None = None) -> Report:
        lease = Lease("lake_day", "test", 1, self.now)
        context = Context("0123456789abcdef", lease, Stop(), NoProgress(), dry_run, self.now)
        report = (job or LakeDay(self.settings, self.store, max_bytes=self.max_bytes)).run(context)
        assert report.ledger.closes
        return report

    def reader(self) -> TableReader:
        """What reports read the table through."""
        return TableReader(self.settings, self.store, lambda: self.now)

    @contextmanager
    def table(self) -> Iterator[Any]:
        """pyiceberg's own table."""
        with opened_table(self.settings, self.store) as opened:
            yield opened._catalog.load_table(("headwater", "telemetry"))  # noqa: SLF001 - as another program sees it

    def files(self) -> list[str]:
        with self.table() as table:
            return sorted(task.file.file_path for task in table.scan().plan_files())

    def in_table(self, snapshot_id: int | None = None) -> Counter[tuple[Any, ...]]:
        """Every row of the table by pyiceberg, as often as it is there."""
        with self.table() as table:
            found = table.scan(snapshot_id=snapshot_id).to_arrow()
        return counted(found)

    def in_objects(self) -> Counter[tuple[Any, ...]]:
        """Every row of the objects."""
        counts = Counter[tuple[Any, ...]]()
        for info in self.store.list("telemetry/"):
            with self.store.open(info.key) as body:
                assert body is not None
                counts += counted(pq.ParquetFile(io.BytesIO(body.read())).read())
        return counts


def counted(table: pa.Table) -> Counter[tuple[Any, ...]]:
    """Rows as (name, value) pairs of what is not null; an instant with its nanoseconds as one number."""
    counts = Counter[tuple[Any, ...]]()
    index = table.schema.get_field_index("timestamp")
    unit = table.schema.field(index).type.unit
    instants = table["timestamp"].cast(pa.int64()).to_pylist()
    for instant, row in zip(instants, _plain(table), strict=True):
        nanos = instant if unit == "ns" else instant * 1000 + (row.pop("timestamp_nanos", None) or 0)
        counts[(nanos, *sorted((name, value) for name, value in row.items() if value is not None))] += 1
    return counts


def _plain(table: pa.Table) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = table.drop_columns(["timestamp"]).to_pylist()
    return found
