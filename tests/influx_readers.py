"""Readers of both query languages, the rows that they give, and points that are hard to read."""

import math
from collections import Counter
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any

import pyarrow as pa

from app.core.windows import Window
from app.influx_to_s3.flux import FluxReader
from app.influx_to_s3.influxql import InfluxQlReader
from app.influx_to_s3.reader import InfluxConnection, PointColumns, Reader
from exporter import NOON, ns
from simulators.influx import InfluxSimulator

HOUR = Window(NOON, NOON + timedelta(hours=1))
BASE = ns(NOON)
S = 10**9
M = "device_telemetry"
Make = Callable[..., Reader]


def flux(
    influx: InfluxSimulator,
    *,
    org: str = "",
    bucket: str = "",
    measurement: str = M,
    tag: str = "device_id",
    **server: Any,
) -> FluxReader:
    given = {"url": influx.url, "token": influx.token, "timeout_seconds": 10.0, **server}
    return FluxReader(
        InfluxConnection(**given),
        org=org or influx.org,
        bucket=bucket or influx.bucket,
        measurement=measurement,
        device_tag=tag,
    )


def influxql(
    influx: InfluxSimulator, *, database: str = "", measurement: str = M, tag: str = "device_id", **server: Any
) -> InfluxQlReader:
    given = {"url": influx.url, "token": influx.token, "timeout_seconds": 10.0, **server}
    return InfluxQlReader(
        InfluxConnection(**given),
        database=database or influx.bucket,
        retention_policy="",
        measurement=measurement,
        device_tag=tag,
    )


def influxql_without_credentials(
    url: str, database: str, *, policy: str = "", measurement: str = M, tag: str = "device_id"
) -> InfluxQlReader:
    return InfluxQlReader(
        InfluxConnection(url), database=database, retention_policy=policy, measurement=measurement, device_tag=tag
    )


Value = tuple[int, tuple[tuple[str, str], ...], str, Any]


def values(points: Iterable[PointColumns]) -> "Counter[Value]":
    """(nanoseconds after BASE, tags, field, value) of every value; texts, booleans and numbers are never equal.

    A whole number is an integer whatever its type, except for the negative zero, which only a float can be.
    """
    found: Counter[Value] = Counter()
    for one in points:
        times = one.times.cast(pa.int64()).to_pylist()
        tags = {name: column.to_pylist() for name, column in one.tags.items()}
        assert all(len(column) == len(times) for column in tags.values())
        named = [
            tuple((name, tags[name][at]) for name in sorted(tags) if tags[name][at] is not None)
            for at in range(len(times))
        ]
        for field, column in one.fields:
            assert len(column) == len(times)
            for at, cell in enumerate(column.to_pylist()):
                if cell is not None:
                    found[(times[at] - BASE, named[at], field, exact(cell))] += 1
    return found


def exact(cell: Any) -> Any:
    if isinstance(cell, float) and cell.is_integer() and not (cell == 0 and math.copysign(1, cell) < 0):
        return int(cell)
    return repr(cell) if isinstance(cell, float | bool) else cell


def rows(reader: Reader, device: str = "D1", span: Window = HOUR) -> list[tuple[int, dict[str, str], dict[str, Any]]]:
    """Nanoseconds after noon, tags and fields of every point, in order."""
    found: dict[tuple[int, tuple[tuple[str, str], ...]], dict[str, Any]] = {}
    for at, tags, field, cell in values(reader.rows(device, span)):
        row = found.setdefault((at, tags), {})
        assert field not in row
        row[field] = cell
    return [(at, dict(tags), found[at, tags]) for at, tags in sorted(found)]


def counted(
    reader: Reader, device: str | None = None, span: Window = HOUR, every_seconds: int = 3600
) -> "Counter[Any]":
    """Values by device, field and start of the bucket."""
    found: Counter[Any] = Counter()
    for one in reader.counts(device, span, every_seconds):
        found[one.device, one.field, one.start_at] += one.values
    return found


LINES = "\n".join(
    [
        *(
            f'{M},device_id=D1,device_type=pump,location=Plant\\ A voltage={200 + n}.5,current={n}i,note="n{n}",'
            f"on={str(n % 2 == 0).lower()},soc={n / 7} {BASE + n * 60 * S + n}"
            for n in range(30)
        ),
        f"{M},device_id=D1,device_type=pump,location=B,firmware=1.2 power=7 {BASE + 60 * S + 1}",
        f"{M},device_id=D1 temperature=21,hour=99,device_type_x=1 {BASE + 7}",
        f'{M},device_id=D1 note="a,\\"b\\" c é 😀 #x\nnew line",power_factor=2 {BASE + 123_456_789}',
        f"{M},device_id=D1 big=9007199254740993i,tiny=0.0000001,huge=1e300 {BASE + 11}",
        f'{M},device_id=D1 note="" {BASE + 13}',
        f'{M},device_id=D1 note="",voltage=1 {BASE + 14}',
        f"{M},device_id=D1 voltage=1 {BASE - 1}",
        f"{M},device_id=D1 voltage=2 {BASE + 3600 * S}",
        f"{M},device_id=D2 voltage=3 {BASE}",
        f"{M},location=A voltage=4 {BASE}",
        f"other,device_id=D1 voltage=5 {BASE}",
    ]
)
