"""What was exported, read by other programs than the one that wrote it, and beside it what the source holds."""

import csv
import io
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from app.core.errors import Permanent
from app.object_store.port import ObjectStore
from simulators.influx_storage import Points

FORMATS = ("parquet", "csv")
COMPUTED = ("hour", "day_of_week", "is_weekend", "power_factor")
NS = 10**9
IGNORED = ("schema_version", "enrichment_status")
Row = tuple[str, int, str, str]
Fields = Mapping[str, Any]


def objects(store: ObjectStore, prefix: str = "telemetry/") -> list[str]:
    """The keys of all exported objects, sorted; without what lies beside the data."""
    keys = (info.key for info in store.list(prefix) if ".headwater-probe" not in info.key)
    return sorted(key for key in keys if "/_headwater/" not in key and "/_set_aside/" not in key)


def content(store: ObjectStore, key: str) -> bytes:
    with store.open(key) as body:
        assert body is not None, f"{key} is gone"
        return body.read()


def table(store: ObjectStore, key: str) -> pa.Table:
    """A Parquet object as Arrow, with its key-value metadata."""
    return pq.read_table(io.BytesIO(content(store, key)))


def rows_of(store: ObjectStore, key: str) -> list[dict[str, Any]]:
    """The rows of an object; `timestamp` in nanoseconds. Values of CSV objects that look like numbers are numbers."""
    if key.endswith(".csv"):
        text = content(store, key).decode()
        return [
            {**{name: _value(cell) for name, cell in row.items()}, "timestamp": nanoseconds(row["timestamp"])}
            for row in csv.DictReader(io.StringIO(text, newline=""))
        ]
    found = table(store, key)
    at = found.schema.get_field_index("timestamp")
    in_ns = found.set_column(at, "timestamp", found.column(at).cast(pa.timestamp("ns", "UTC")).cast(pa.int64()))
    rows: list[dict[str, Any]] = in_ns.to_pylist()
    for row in rows:
        row["timestamp"] += row.pop("timestamp_nanos", 0)
    return rows


def nanoseconds(text: str) -> int:
    """`2026-02-07T12:00:00.123456789Z` as nanoseconds since the epoch, without a float or datetime in between."""
    import numpy as np

    return int(np.datetime64(text.removesuffix("Z"), "ns").astype(np.int64))


def _value(cell: str) -> Any:
    if cell in ("", "true", "false"):
        return {"": None, "true": True, "false": False}[cell]
    try:
        return float(cell)
    except ValueError:
        return cell


def exported(store: ObjectStore, prefix: str = "telemetry/") -> dict[Row, Fields]:
    """Every row of every object by (device, nanoseconds, device_type, location). Fails when one is given twice or in a
    wrong object.
    """
    found: dict[Row, Fields] = {}
    for key in objects(store, prefix):
        device = key.split("device_id=")[1].split("/")[0]
        for row in rows_of(store, key):
            slot = (device, row["timestamp"], str(row["device_type"]), str(row["location"]))
            assert str(row["device_id"]) == device, key
            assert slot not in found, f"{slot} is in {key} and in an earlier object"
            found[slot] = _fields(row)
    return found


def _fields(row: Mapping[str, Any]) -> Fields:
    left_out = ("timestamp", "device_id", *COMPUTED)
    return {name: value for name, value in row.items() if name not in left_out and value is not None}


def stored(
    points: Points, measurement: str = "device_telemetry", until_ns: int = 1 << 62, since_ns: int = 0
) -> dict[Row, Fields]:
    """Every point of the source that can be exported, as `exported` shows it; further tags are shown as fields are."""
    return dict(_stored(points, measurement, since_ns, until_ns))


def _stored(points: Points, measurement: str, since_ns: int, until_ns: int) -> Iterator[tuple[Row, Fields]]:
    for series in points.series(measurement):
        tags = dict(series.tags)
        if "device_id" not in tags:
            continue
        documented = {name: tags.pop(name, "unknown") for name in ("device_type", "location")}
        device = tags.pop("device_id")
        further = {name: text for name, text in tags.items() if name not in IGNORED}
        window = points.window(series, since_ns, until_ns)
        for row, at in enumerate(window.times):
            cells = {name: cells[row] for (name, _), cells in window.cells.items() if cells[row] is not None}
            yield (device, at, *documented.values()), {**documented, **further, **cells}  # type: ignore[misc]


class CountingStore:
    """An object store that notes each write, lets a test step in before it, and deletes nothing that is locked."""

    def __init__(self, inner: ObjectStore) -> None:
        self.inner = inner
        self.puts: list[str] = []
        self.before_put: Callable[[str], None] = lambda _key: None
        self.is_locked: Callable[[str], bool] = lambda _key: False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    @property
    def conditional(self) -> bool:
        return self.inner.conditional

    @property
    def segment_bytes(self) -> int:
        return self.inner.segment_bytes

    def put(self, key: str, body: Any, put: Any) -> str:
        self.before_put(key)
        etag = self.inner.put(key, body, put)
        self.puts.append(key)
        return etag

    def delete(self, key: str) -> None:
        if self.is_locked(key):
            raise Permanent(f"{key} cannot be deleted: access denied", "allow s3:DeleteObject")
        self.inner.delete(key)
