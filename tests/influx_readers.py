"""Readers of both query languages, the rows that they give, and points that are hard to read."""

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from app.core.window import Window
from app.demo.influx import InfluxSimulator
from app.influx_to_s3.connection import Connection, Server
from app.influx_to_s3.flux import FluxReader, FluxTarget
from app.influx_to_s3.influxql import InfluxQlReader, InfluxQlTarget
from app.influx_to_s3.reader import Reader
from app.influx_to_s3.rows import ordered
from app.influx_to_s3.spool import Spool
from exporter import NOON, ns

HOUR = Window(NOON, NOON + timedelta(hours=1))
BASE = ns(NOON)
S = 10**9
M = "device_telemetry"
Make = Callable[..., Reader]


def flux(
    influx: InfluxSimulator, *, org: str = "", bucket: str = "", measurement: str = M, **server: Any
) -> FluxReader:
    given = {"url": influx.url, "token": influx.token, "timeout_seconds": 10.0, **server}
    return FluxReader(Connection(Server(**given)), FluxTarget(org or influx.org, bucket or influx.bucket, measurement))


def influxql(influx: InfluxSimulator, *, database: str = "", measurement: str = M, **server: Any) -> InfluxQlReader:
    given = {"url": influx.url, "token": influx.token, "timeout_seconds": 10.0, **server}
    return InfluxQlReader(Connection(Server(**given)), InfluxQlTarget(database or influx.bucket, "", measurement))


def influxql_without_credentials(url: str, database: str) -> InfluxQlReader:
    return InfluxQlReader(Connection(Server(url)), InfluxQlTarget(database, "", M))


@pytest.fixture(params=[flux, influxql])
def make(request: pytest.FixtureRequest, influx: InfluxSimulator) -> Make:
    """A reader of either language; settings as keywords."""
    return lambda **more: request.param(influx, **more)


@pytest.fixture
def reader(make: Make) -> Reader:
    return make()


def rows(reader: Reader, device: str = "D1", span: Window = HOUR) -> list[dict[str, Any]]:
    """All rows in order, without what is null; `timestamp` in nanoseconds after noon."""
    tables = list(reader.rows(device, span))
    if not tables:
        return []
    table = ordered(tables)
    plain = table.set_column(0, "timestamp", table.column(0).cast(pa.int64()))
    return [
        {name: value - BASE if name == "timestamp" else value for name, value in row.items() if value is not None}
        for row in plain.to_pylist()
    ]


def digest(reader: Reader, device: str, span: Window, folder: Path) -> str:
    spool = Spool(device, folder, 10**6)
    tables = list(reader.rows(device, span))
    if tables:
        spool.append(ordered(tables))
    return spool.finish({}).digest


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
