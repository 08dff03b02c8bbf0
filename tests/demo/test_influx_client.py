"""The real influxdb-client reads the simulator as it reads a server (contracts/influxdb.md section 4)."""

from collections.abc import Iterator
from typing import Any

import pytest
import urllib3
from influxdb_client.client.flux_csv_parser import FluxQueryException
from influxdb_client.client.influxdb_client import InfluxDBClient
from influxdb_client.client.write_api import SYNCHRONOUS
from influxdb_client.rest import ApiException

from influx import NOON_NS, SECOND_NS
from simulators.influx import Cut, ErrorTable, InfluxSimulator, Refuse

QUERY = (
    'from(bucket: "telemetry") |> range(start: 2026-02-07T12:00:00Z, stop: 2026-02-07T13:00:00Z) '
    '|> drop(columns: ["_start", "_stop", "_measurement"]) '
    '|> pivot(rowKey: ["_time"], columnKey: ["_field"], valueColumn: "_value")'
)


@pytest.fixture
def client(influx: InfluxSimulator) -> Iterator[Any]:
    with InfluxDBClient(influx.url, influx.token, org=influx.org) as connected:
        yield connected


def write(client: Any, rows: int = 10) -> None:
    lines = "\n".join(
        f'm,device_id=D1 f={row}.5,i={row}i,s="a\\"b,\nc",ok=true {NOON_NS + row * SECOND_NS}' for row in range(rows)
    )
    client.write_api(write_options=SYNCHRONOUS).write("telemetry", record=lines)


def test_what_the_client_writes_it_reads_again(client: Any) -> None:
    write(client, 2)
    (table,) = client.query_api().query(QUERY)
    first, second = (record.values for record in table.records)
    assert (first["f"], first["i"], first["s"], first["ok"]) == (0.5, 0, 'a"b,\nc'.replace("\n", "\r\n"), True)
    assert second["_time"].isoformat() == "2026-02-07T12:00:01+00:00"
    assert second["device_id"] == "D1"


def test_a_data_frame_has_one_row_for_each_point(client: Any) -> None:
    write(client)
    frame = client.query_api().query_data_frame(QUERY)
    assert list(frame["f"]) == [row + 0.5 for row in range(10)]
    assert str(frame["i"].dtype) == "int64"


def test_another_schema_gives_another_data_frame(client: Any, influx: InfluxSimulator) -> None:
    influx.write(f"m,device_id=D1 f=1 {NOON_NS}\nm,device_id=D2 f=1,g=2 {NOON_NS}")
    frames = client.query_api().query_data_frame(QUERY)
    assert [len(frame) for frame in frames] == [1, 1]


def test_the_raw_answer_is_the_bytes_of_the_server(client: Any) -> None:
    write(client)
    assert client.query_api().query_raw(QUERY).read().endswith(b"\r\n\r\n")


def test_nothing_found_is_no_table(client: Any) -> None:
    assert client.query_api().query(QUERY) == []


def test_a_refused_query_is_an_api_exception(client: Any, influx: InfluxSimulator) -> None:
    influx.faults.add(Refuse(429, "too much", retry_after_seconds=3))
    with pytest.raises(ApiException) as caught:
        client.query_api().query(QUERY)
    assert caught.value.status == 429
    assert caught.value.headers["Retry-After"] == "3"


def test_an_error_table_is_a_query_exception_behind_the_rows(client: Any, influx: InfluxSimulator) -> None:
    write(client)
    influx.faults.add(ErrorTable(after_rows=4, message="engine: broken"))
    rows = client.query_api().query_stream(QUERY)
    assert [next(rows)["i"] for _ in range(4)] == [0, 1, 2, 3]
    with pytest.raises(FluxQueryException, match="engine: broken"):
        next(rows)


def test_a_cut_answer_is_a_protocol_error(client: Any, influx: InfluxSimulator) -> None:
    write(client)
    influx.faults.add(Cut(after_rows=4))
    with pytest.raises(urllib3.exceptions.ProtocolError):
        client.query_api().query_raw(QUERY).read()


def test_health_bucket_and_compression_are_found(client: Any, influx: InfluxSimulator) -> None:
    assert client.ping()
    assert client.buckets_api().find_bucket_by_name("telemetry").name == "telemetry"
    with InfluxDBClient(influx.url, influx.token, org=influx.org, enable_gzip=True) as packed:
        write(packed, 100)
        (table,) = packed.query_api().query(QUERY)
    assert len(table.records) == 100
    assert influx.queries[-1].sent_bytes < 3000
