"""InfluxQL: the simulator's JSON beside that of a real InfluxDB 1.x for the same points and the same queries."""
# ruff: noqa: S608 - the queries under test are put together from constants of this file

import json
from itertools import groupby
from typing import Any

import pytest

from influx import NOON_NS, SECOND_NS, get_influxql
from influxdb1 import InfluxDB1
from simulators.demo_data import Device, samples
from simulators.influx import InfluxSimulator
from simulators.influxql_json import go_float, go_text

RANGE = "time >= '2026-02-07T12:00:00Z' AND time < '2026-02-07T13:00:00Z'"
COLUMNS = '"f"::field, "device_id"::tag, "location"::tag, "i"::integer, "s"::string, "b"::boolean'
LINES = "\n".join(
    [
        *(
            f'm,device_id={device},location={place} f={row}.5,v=23,i={row}i,s="a\\"b<&>",b=true '
            f"{NOON_NS + row * 1800 * SECOND_NS}"
            for device, place in (("D1", "A"), ("D1", "B"), ("D2", "A"))
            for row in range(3)
        ),
        f"m,device_id=D1,location=A f=9 {NOON_NS + 123_456_789}",
        f'm,device_id=D3 s="x" {NOON_NS + 5}',
        f"m,device_id=D4 big=1e21,small=1e-7,e=1e300,odd=0.1,huge=123456789012345680000 {NOON_NS}",
        f"m,device_id=O'X\\ é f=1 {NOON_NS}",
        f"other x=1 {NOON_NS}",
    ]
)
QUERIES = [
    "SHOW MEASUREMENTS",
    "SHOW FIELD KEYS",
    'SHOW FIELD KEYS FROM "m"',
    'SHOW FIELD KEYS FROM "none"',
    "SHOW TAG KEYS",
    'SHOW TAG KEYS FROM "m"',
    'SHOW TAG VALUES FROM "m" WITH KEY = "device_id"',
    'SHOW TAG VALUES WITH KEY = "device_id"',
    'SHOW TAG VALUES FROM "m" WITH KEY IN ("device_id", "location") WHERE "device_id" = \'D1\'',
    'SHOW TAG VALUES FROM "none" WITH KEY = "x"',
    f'SELECT {COLUMNS} FROM "m" WHERE {RANGE} AND "device_id" = \'D1\'',
    f'SELECT {COLUMNS} FROM "m" WHERE {RANGE} AND "device_id" = \'none\'',
    f'SELECT "f"::float, "nix"::field, "notag"::tag FROM "m" WHERE {RANGE}',
    f'SELECT "i"::float, "f"::integer FROM "m" WHERE {RANGE}',
    f'SELECT "device_id"::tag FROM "m" WHERE {RANGE}',
    f'SELECT "big", "small", "e", "odd", "huge" FROM "m" WHERE {RANGE}',
    f'SELECT * FROM "m" WHERE {RANGE}',
    f'SELECT * FROM "m" WHERE {RANGE} GROUP BY *',
    f"SELECT \"f\" FROM \"m\" WHERE {RANGE} AND (device_id = 'D1' OR device_id = 'D2') AND location != 'B'",
    'SELECT "f" FROM "m" WHERE "device_id" = \'O\\\'X é\'',
    f'SELECT "f"::field FROM "m" WHERE {RANGE} AND "device_id" = \'D2\' ORDER BY time DESC LIMIT 1',
    "SELECT \"f\" FROM \"m\" WHERE time >= '2026-02-07T12:00:00.000000001Z' AND time < '2026-02-07 12:30:01'",
    f'SELECT "f" FROM "autogen"."m" WHERE time = {NOON_NS + 123_456_789}',
    f'SELECT COUNT(*) FROM "m" WHERE {RANGE}',
    f'SELECT COUNT("f"::float) AS "c0", COUNT("s"::string) AS "c1" FROM "m" WHERE {RANGE} GROUP BY "device_id"::tag',
    f'SELECT "f"::float AS "c0", "s"::string AS "c1" FROM "m" WHERE {RANGE} AND "device_id"::tag = \'D1\' GROUP BY *',
    f'SELECT "f"::float AS "c0" FROM "m" WHERE {RANGE} AND "location"::tag = \'\' GROUP BY *',
    f'SELECT COUNT(*) FROM "m" WHERE {RANGE} GROUP BY "location"::tag, time(1800s) fill(none)',
    'SHOW TAG VALUES FROM "m" WITH KEY = "device_id" WHERE time >= \'2026-02-07T00:00:00Z\' LIMIT 2',
    'SHOW TAG VALUES FROM "m" WITH KEY = "device_id" WHERE time >= \'2026-03-07T00:00:00Z\'',
    "SHOW MEASUREMENTS LIMIT 1",
    "SHOW RETENTION POLICIES",
    f'SELECT COUNT(*) FROM "m" WHERE {RANGE}; SELECT COUNT(*) FROM "none"; SHOW TAG KEYS FROM "other"',
    f'SELECT COUNT("f") FROM "m" WHERE {RANGE} GROUP BY "device_id"',
    f'SELECT COUNT(*) FROM "m" WHERE {RANGE} GROUP BY "device_id", time(3600s) fill(none)',
    f'SELECT COUNT(*) FROM "m" WHERE {RANGE} GROUP BY "device_id", time(1800s) fill(none)',
    f'SELECT COUNT("f") FROM "m" WHERE {RANGE} GROUP BY time(20m), "device_id"',
    f'SELECT COUNT("f"), COUNT("i") FROM "m" WHERE {RANGE}',
    f'SELECT COUNT("f") AS "n" FROM "m" WHERE time >= {NOON_NS} AND time < {NOON_NS + 3600 * SECOND_NS}',
    f'SELECT COUNT("f") FROM "m" WHERE {RANGE} AND "device_id" = \'none\'',
    'SELECT "f" FROM "other"; SHOW MEASUREMENTS',
    "SELECT * FROM nothing",
]
REFUSED = [
    "SELEC",
    'SELECT "f" FROM "m" WHERE time >',
    "",
]


def told(url: str, query: str, **parameters: str) -> tuple[int, list[Any]]:
    """Status and documents; rows of one instant are sorted, since a server promises no order among them."""
    got = get_influxql(url, query, **parameters)
    documents = [json.loads(line) for line in got.data.splitlines() if line]
    for document in documents:
        for result in document.get("results", []):
            for series in result.get("series", []):
                if series["columns"][0] == "time":
                    series["values"] = sorted_within_instants(series["values"])
    return got.status, documents


def sorted_within_instants(rows: list[list[Any]]) -> list[list[Any]]:
    return [row for _, group in groupby(rows, key=lambda row: row[0]) for row in sorted(group, key=repr)]


@pytest.fixture(scope="module")
def pair(influxdb1: InfluxDB1) -> Any:
    """The simulator and the real server with the same points; calls give both answers."""
    with InfluxSimulator(bucket="db") as simulator:
        simulator.write(LINES)
        database = influxdb1.new_database()
        influxdb1.write(database, LINES)

        def both(query: str, **parameters: str) -> tuple[Any, Any]:
            ours = told(simulator.url, query, **{"db": "db", "p": simulator.token, **parameters})
            return ours, told(influxdb1.url, query, **{"db": database, **parameters})

        yield both


@pytest.mark.parametrize("query", QUERIES)
def test_answers_are_those_of_a_real_server(pair: Any, query: str) -> None:
    for parameters in ({}, {"epoch": "ns"}, {"epoch": "ms"}):
        ours, theirs = pair(query, **parameters)
        assert ours == theirs


@pytest.mark.parametrize("chunk_size", ["1", "2", "3", "1000"])
def test_chunks_are_those_of_a_real_server(pair: Any, chunk_size: str) -> None:
    for query in (
        f'SELECT "f"::field, "i"::field FROM "m" WHERE {RANGE} AND "device_id" = \'D1\' AND "location" = \'A\'',
        f'SELECT * FROM "m" WHERE {RANGE} GROUP BY *',
        f'SELECT COUNT(*) FROM "m" WHERE {RANGE} GROUP BY "device_id", time(1800s) fill(none)',
        f'SELECT "f" FROM "m" WHERE {RANGE} AND "device_id" = \'none\'',
    ):
        ours, theirs = pair(query, epoch="ns", chunked="true", chunk_size=chunk_size)
        assert ours == theirs


@pytest.mark.parametrize("query", REFUSED)
def test_what_a_real_server_cannot_parse_is_refused_in_the_same_words(pair: Any, query: str) -> None:
    ours, theirs = pair(query)
    assert ours[0] == theirs[0] == 400
    assert ours == theirs


def test_an_unknown_database_or_policy_is_an_error_of_the_statement(pair: Any) -> None:
    for parameters in ({"db": "nodb"}, {"db": ""}, {"rp": "nix"}):
        ours, theirs = pair('SELECT "f" FROM "m"', **parameters)
        assert ours == theirs
        assert "error" in ours[1][0]["results"][0]


def test_a_day_of_a_plausible_device_is_read_alike(influxdb1: InfluxDB1) -> None:
    device = Device(1)
    day = samples(device, NOON_NS, NOON_NS + 6 * 3600 * SECOND_NS)
    lines = "\n".join(sample.line(device.series) for sample in day)
    database = influxdb1.new_database()
    influxdb1.write(database, lines)
    query = (
        'SELECT "voltage"::field, "current"::field, "power"::field, "temperature"::field, "device_type"::tag '
        f'FROM "device_telemetry" WHERE time >= {NOON_NS} AND "device_id" = \'D1\''
    )
    with InfluxSimulator() as simulator:
        simulator.write(lines)
        options = {"epoch": "ns", "chunked": "true", "chunk_size": "500"}
        ours = get_influxql(simulator.url, query, db=simulator.bucket, p=simulator.token, **options)
    theirs = get_influxql(influxdb1.url, query, db=database, **options)
    assert ours.data == theirs.data


@pytest.mark.parametrize(
    ("value", "text"),
    [(23.0, "23"), (1e-7, "1e-7"), (1e21, "1e+21"), (1e16, "10000000000000000"), (1e-6, "0.000001"), (0.0, "0")],
)
def test_floats_are_written_as_go_does(value: float, text: str) -> None:
    assert go_float(value) == text


def test_text_is_escaped_as_go_does() -> None:
    assert go_text('a"<&>é\u2028') == '"a\\"\\u003c\\u0026\\u003eé\\u2028"'
