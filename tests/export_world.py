"""A real InfluxDB whose points grow and change, and the objects of an export of it. Neither is read by the product."""

import io
import json
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from influxdb1 import InfluxDB1
from seaweed import Seaweed

DEVICES = ("D1", "D2")
TAGS = {"device_type": "bulb", "location": "Plant-A"}
FURTHER = "line"
COMPUTED = ("hour", "day_of_week", "is_weekend", "power_factor")
TIMES = ("timestamp", "timestamp_nanos")
BESIDE = ("/_headwater/", "/_set_aside/", "/.headwater")
MINUTE_NS = 60 * 10**9
WRITE_SECONDS = 0.1

Row = tuple[str, str, str, str, int]  # device, type, location, line, nanoseconds
Fields = Mapping[str, Any]


@dataclass
class Source:
    """A database of the server, written all the time by a thread of its own."""

    server: InfluxDB1
    database: str
    now_ns: Callable[[], int]
    chance: random.Random
    devices: Sequence[str] = DEVICES
    start_ns: int = 0
    points: list[tuple[str, int]] = field(default_factory=list)
    quiet: threading.Lock = field(default_factory=threading.Lock)
    _over: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        self.start_ns = self.now_ns()
        self._thread = threading.Thread(target=self._go_on, name="points")
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Nothing is written from now on."""
        self._over.set()
        if self._thread is not None:
            self._thread.join()

    def mark(self) -> set[Row]:
        """One more point of each device."""
        at = self.now_ns()
        self.server.write(self.database, "\n".join(f"{_series(device)} voltage=1 {at}" for device in self.devices))
        return {(device, TAGS["device_type"], TAGS["location"], "", at) for device in self.devices}

    def rows(self) -> dict[Row, Fields]:
        """All points, as a plain query tells them."""
        text = f'SELECT * FROM "{self.database}".."device_telemetry" GROUP BY *'  # noqa: S608 - a name of our own
        results = json.loads(self.server.ask(q=text, epoch="ns"))["results"]
        return dict(_points(results[0].get("series", ())))

    def _go_on(self) -> None:
        while not self._over.wait(WRITE_SECONDS):
            with self.quiet:  # nothing is written while somebody else holds it
                self.server.write(self.database, "\n".join(self._lines()))

    def _lines(self) -> Iterator[str]:
        """A new point of each device, now and then a late or future one or one with a further tag; of earlier points
        another value or a further field.
        """
        chance = self.chance
        for device in self.devices:
            yield self._new(_series(device), self.now_ns() - chance.randrange(2 * 10**9))
        series = _series(
            chance.choice(self.devices), **({FURTHER: f"L{chance.randrange(3)}"} if chance.random() < 0.5 else {})
        )
        if chance.random() < 0.3:
            age_ns = int(chance.expovariate(1 / (30 * MINUTE_NS)))
            yield self._new(series, max(self.start_ns, self.now_ns() - age_ns))
        if chance.random() < 0.05:
            yield self._new(series, self.now_ns() + chance.randrange(20 * MINUTE_NS))
        for _ in range(chance.randrange(3)):
            series, at = self.points[-1 - min(int(chance.expovariate(1 / 100)), len(self.points) - 1)]
            yield f"{series} {chance.choice(_fields(chance))} {at}"

    def _new(self, series: str, at: int) -> str:
        self.points.append((series, at))
        return f"{series} voltage={self.chance.random() * 250:.3f} {at}"


def _series(device: str, **further: str) -> str:
    return ",".join(("device_telemetry", f"device_id={device}", *(f"{k}={v}" for k, v in {**TAGS, **further}.items())))


def _fields(chance: random.Random) -> tuple[str, ...]:
    return (
        f"voltage={chance.random() * 250:.3f}",
        f"voltage={chance.random() * 250:.3f}",
        f"temperature={chance.random() * 50!r}",
        f"count={chance.getrandbits(60)}i",
        f'state="on {chance.randrange(9)}"',
        f"open={chance.choice(('true', 'false'))}",
    )


def _points(series: Any) -> Iterator[tuple[Row, Fields]]:
    for each in series:
        tags = {name: text or "unknown" for name, text in each["tags"].items()}
        named = (tags["device_id"], tags["device_type"], tags["location"], each["tags"].get(FURTHER, ""))
        names = each["columns"][1:]
        for at, *cells in each["values"]:
            yield (*named, at), {name: cell for name, cell in zip(names, cells, strict=True) if cell is not None}


class Bucket(Protocol):
    """Where objects are."""

    @property
    def environ(self) -> Mapping[str, str]:
        """The settings that name it, beside DATA_DIR."""

    def listed(self) -> dict[str, str]:
        """Every key, with what changes with each write."""

    def content(self, key: str) -> bytes:
        """The bytes of one."""


@dataclass(frozen=True)
class Folder:
    """Objects in a directory."""

    root: Path
    environ: Mapping[str, str] = field(default_factory=dict)

    def listed(self) -> dict[str, str]:
        found = {}
        for path in self.root.rglob("*.parquet"):
            with suppress(FileNotFoundError):  # one that is still being written
                seen = path.stat()
                found[f"/{path.relative_to(self.root)}"] = f"{seen.st_ino} {seen.st_mtime_ns}"
        return found

    def content(self, key: str) -> bytes:
        return (self.root / key[1:]).read_bytes()


class S3Bucket:
    """Objects in a bucket of its own on a real S3 server."""

    def __init__(self, client: Any, server: Seaweed) -> None:
        self._client = client
        self._name = server.new_bucket()
        self.environ = {
            "S3_BUCKET": self._name,
            "S3_ENDPOINT_URL": server.endpoint_url,
            "S3_ADDRESSING_STYLE": "path",
            "S3_ACCESS_KEY_ID": server.access_key,
            "S3_SECRET_ACCESS_KEY": server.secret_key,
        }

    def listed(self) -> dict[str, str]:
        pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self._name)
        return {f"/{item['Key']}": item["ETag"] for page in pages for item in page.get("Contents", ())}

    def content(self, key: str) -> bytes:
        body: bytes = self._client.get_object(Bucket=self._name, Key=key[1:])["Body"].read()
        return body


@dataclass
class Objects:
    """Every row of every object. What did not change since it was last read is not read again."""

    bucket: Bucket
    _known: dict[str, tuple[str, list[tuple[Row, Fields]], set[Row]]] = field(default_factory=dict)

    def rows(self) -> dict[Row, list[Fields]]:
        """Each row as often as it is there."""
        self._look()
        found: dict[Row, list[Fields]] = {}
        for _, rows, _ in self._known.values():
            for row, fields in rows:
                found.setdefault(row, []).append(fields)
        return found

    def missing(self, wanted: set[Row]) -> set[Row]:
        """Those that are in no object."""
        self._look()
        return wanted.difference(*(rows for _, _, rows in self._known.values()))

    def keys_of(self, row: Row) -> list[str]:
        """In which objects a row is."""
        return [key for key, (_, _, rows) in self._known.items() if row in rows]

    def _look(self) -> None:
        listed = {key: etag for key, etag in self.bucket.listed().items() if not any(each in key for each in BESIDE)}
        self._known = {key: known for key, known in self._known.items() if listed.get(key) == known[0]}
        for key in listed.keys() - self._known.keys():
            rows = list(_rows_of(self.bucket.content(key)))
            self._known[key] = listed[key], rows, {row for row, _ in rows}


def _rows_of(body: bytes) -> Iterator[tuple[Row, Fields]]:
    table = pq.read_table(io.BytesIO(body))
    times = table["timestamp"].cast(pa.timestamp("ns", "UTC")).cast("int64").to_numpy()
    if "timestamp_nanos" in table.column_names:
        times = times + np.nan_to_num(table["timestamp_nanos"].to_numpy()).astype(np.int64)
    left = [name for name in table.column_names if name not in (*COMPUTED, *TIMES)]
    for at, row in zip(times.tolist(), table.select(left).to_pylist(), strict=True):
        named = [row.pop(name, None) or "" for name in ("device_id", *TAGS, FURTHER)]
        yield (*named, at), {name: cell for name, cell in row.items() if cell is not None}


def differences(source: Mapping[Row, Fields], objects: Mapping[Row, list[Fields]]) -> Counter[str]:
    """Rows that are in no object, in several, or not at the source; `stale`: in one object with other values."""
    return Counter(
        lost=len(source.keys() - objects.keys()),
        doubled=sum(len(found) - 1 for found in objects.values()),
        invented=len(objects.keys() - source.keys()),
        stale=sum(all(fields != source[row] for fields in objects[row]) for row in source.keys() & objects.keys()),
    )
