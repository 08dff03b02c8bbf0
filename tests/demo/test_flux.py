"""Flux queries over real HTTP, to the byte, from points that were written."""

import re

import pytest
import urllib3

from influx import NOON_NS, SECOND_NS, post_flux
from simulators.flux_parser import FluxSyntax, Literal, Member, Operation, parse_flux
from simulators.influx import InfluxSimulator

RANGE = "|> range(start: 2026-02-07T12:00:00Z, stop: 2026-02-07T13:00:00Z)"
FROM = f'from(bucket: "telemetry") {RANGE} |> filter(fn: (r) => r._measurement == "m")'
PIVOT = (
    '|> drop(columns: ["_start", "_stop", "_measurement"]) '
    '|> pivot(rowKey: ["_time"], columnKey: ["_field"], valueColumn: "_value")'
)
COUNTS = (
    '|> aggregateWindow(every: 1800s, fn: count, createEmpty: false, timeSrc: "_start") '
    '|> group(columns: ["device_id", "_field", "_time"]) |> sum()'
)


def answer(influx: InfluxSimulator, text: str) -> str:
    got = post_flux(influx, text)
    assert got.status == 200, got.data
    return got.data.decode()


def refused(influx: InfluxSimulator, text: str) -> tuple[int, str, str]:
    got = post_flux(influx, text)
    return got.status, got.headers["X-Platform-Error-Code"], got.json()["message"]


def rows(text: str) -> list[str]:
    return [line for line in text.split("\r\n") if line.startswith(",,")]


def head(*columns: tuple[str, str, bool]) -> str:
    kinds, groups = ",".join(kind for _, kind, _ in columns), ",".join(str(one).lower() for _, _, one in columns)
    names = ",".join(name for name, _, _ in columns)
    defaults = "," * len(columns)
    return (
        f"#datatype,string,long,{kinds}\r\n#group,false,false,{groups}\r\n"
        f"#default,_result,{defaults}\r\n,result,table,{names}\r\n"
    )


TIME = ("_time", "dateTime:RFC3339", False)


def test_rows_of_a_device_are_one_table_per_tag_set(influx: InfluxSimulator) -> None:
    influx.write(f"m,device_id=D1,location=A f=1.5,i=2i {NOON_NS}\nm,device_id=D1,location=B f=3,i=4i {NOON_NS + 5}")
    influx.write(f"m,device_id=D2,location=A f=9 {NOON_NS}\nother,device_id=D1 f=8 {NOON_NS}")
    text = answer(influx, f'{FROM} |> filter(fn: (r) => r["device_id"] == "D1") {PIVOT}')
    columns = (("device_id", "string", True), ("location", "string", True), TIME)
    assert text == (
        head(*columns, ("f", "double", False), ("i", "long", False))
        + ",,0,D1,A,2026-02-07T12:00:00Z,1.5,2\r\n,,1,D1,B,2026-02-07T12:00:00.000000005Z,3,4\r\n\r\n"
    )


def test_another_set_of_fields_begins_a_new_block(influx: InfluxSimulator) -> None:
    influx.write(f'm,device_id=D1 a=1 {NOON_NS}\nm,device_id=D2 a=2,s="x" {NOON_NS}')
    columns = (("device_id", "string", True), TIME, ("a", "double", False))
    assert answer(influx, FROM + PIVOT) == (
        f"{head(*columns)},,0,D1,2026-02-07T12:00:00Z,1\r\n\r\n"
        f"{head(*columns, ('s', 'string', False))},,1,D2,2026-02-07T12:00:00Z,2,x\r\n\r\n"
    )


def test_pivoted_rows_come_in_the_order_in_which_their_time_is_first_met(influx: InfluxSimulator) -> None:
    influx.write(
        f"m,device_id=D1 a=1,b=2 {NOON_NS + 10}\nm,device_id=D1 b=3 {NOON_NS}\nm,device_id=D1 a=4 {NOON_NS + 20}"
    )
    assert rows(answer(influx, FROM + PIVOT)) == [
        ",,0,D1,2026-02-07T12:00:00.00000001Z,1,2",
        ",,0,D1,2026-02-07T12:00:00.00000002Z,4,",
        ",,0,D1,2026-02-07T12:00:00Z,,3",
    ]


def test_a_field_named_like_a_tag_fails_the_pivot(influx: InfluxSimulator) -> None:
    influx.write(f"m,device_id=D1,status=ok status=1 {NOON_NS}")
    status, code, message = refused(influx, FROM + PIVOT)
    assert (status, code) == (400, "invalid")
    assert 'value "status" appears in a column key column, but a column named "status" already exists' in message


KEEP_APART = (
    '|> drop(columns: ["_start", "_stop", "_measurement"]) '
    '|> rename(fn: (column) => if column == "_field" or column == "_value" then column else "x_" + column) '
    '|> pivot(rowKey: ["x__time"], columnKey: ["_field"], valueColumn: "_value")'
)


def test_names_that_were_put_apart_let_a_field_bear_the_name_of_a_tag(influx: InfluxSimulator) -> None:
    influx.write(f'm,location=A location="B",_time=1,result=2 {NOON_NS}')
    columns = (("x_location", "string", True), ("x__time", "dateTime:RFC3339", False))
    fields = (("_time", "double", False), ("location", "string", False), ("result", "double", False))
    row = ",,0,A,2026-02-07T12:00:00Z,1,B,2\r\n\r\n"
    assert answer(influx, f"{FROM} {KEEP_APART}") == head(*columns, *fields) + row
    again = tuple((f"y_{name}", kind, grouped) for name, kind, grouped in (*columns, *fields))
    assert answer(influx, f'{FROM} {KEEP_APART} |> rename(fn: (column) => "y_" + column)') == head(*again) + row


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ('"same"', "already has column with label same"),
        ("1", "expected string"),
        ("r", "a function may hold its parameter"),
        ("column + 1", "strings only"),
    ],
)
def test_a_rename_that_gives_no_names_is_refused(influx: InfluxSimulator, function: str, message: str) -> None:
    influx.write(f"m,location=A f=1 {NOON_NS}")
    got = post_flux(influx, f"{FROM} |> rename(fn: (column) => {function})")
    assert got.status == 400
    assert re.search(message, got.json()["message"])


def test_data_called_as_the_envelope_give_a_header_with_a_name_twice(influx: InfluxSimulator) -> None:
    influx.write(f"m,result=ok table=5i {NOON_NS}")
    assert ",result,table,result,_time,table\r\n,,0,ok,2026-02-07T12:00:00Z,5\r\n" in answer(influx, f"{FROM} {PIVOT}")


def test_points_without_a_tag_are_found_by_not_exists(influx: InfluxSimulator) -> None:
    influx.write(f"m,device_id=D1 v=1 {NOON_NS}\nm v=2 {NOON_NS}")
    text = answer(influx, f"{FROM} |> filter(fn: (r) => not exists r.device_id) {PIVOT}")
    assert rows(text) == [",,0,2026-02-07T12:00:00Z,2"]


def test_a_range_over_shards_of_several_types_gives_the_first_type_up_to_the_next(influx: InfluxSimulator) -> None:
    week = 7 * 86_400 * SECOND_NS
    values = ("1.5", '"text"', "2.5")
    influx.write("\n".join(f"m,device_id=D1 v={value},w=1 {NOON_NS + at * week}" for at, value in enumerate(values)))

    def asked(start: str, stop: str) -> list[str]:
        text = (
            f'from(bucket: "telemetry") |> range(start: {start}, stop: {stop}) |> keep(columns: ["_field", "_value"])'
        )
        return [row.split(",")[-2] + "=" + row.split(",")[-1] for row in rows(answer(influx, text)) if ",v" in row]

    assert len(asked("2026-02-01T00:00:00Z", "2026-03-01T00:00:00Z")) == 1
    assert len(asked("2026-02-09T00:00:00Z", "2026-02-16T00:00:00Z")) == 1
    count = 'from(bucket: "telemetry") |> range(start: 2026-02-01T00:00:00Z, stop: 2026-03-01T00:00:00Z) |> count()'
    assert [row.rsplit(",", 1)[1] for row in rows(answer(influx, count))] == ["1", "3"]


def test_a_bucket_tells_the_duration_of_its_shard_groups() -> None:
    with InfluxSimulator(shard_ns=3600 * SECOND_NS) as influx, urllib3.PoolManager(retries=False, timeout=10) as pool:
        headers = {"Authorization": f"Token {influx.token}"}
        told = pool.request("GET", f"{influx.url}/api/v2/buckets?name=telemetry", headers=headers).json()
        assert told["buckets"][0]["retentionRules"][0]["shardGroupDurationSeconds"] == 3600
        influx.write(f'm v=1 {NOON_NS}\nm v="x" {NOON_NS + 3600 * SECOND_NS}')
        assert len(rows(answer(influx, f"{FROM} {PIVOT}"))) == 1


def test_counts_per_window_are_one_row_for_each_device_field_and_time(influx: InfluxSimulator) -> None:
    influx.write("\n".join(f"m,device_id=D1,location=A f=1,g=2 {NOON_NS + at * 600 * SECOND_NS}" for at in range(5)))
    influx.write(f"m,device_id=D1,location=B f=1 {NOON_NS}")
    text = answer(influx, FROM + COUNTS)
    assert text == head(
        ("_field", "string", True), ("device_id", "string", True), ("_time", TIME[1], True), ("_value", "long", False)
    ) + (
        ",,0,f,D1,2026-02-07T12:00:00Z,4\r\n"
        ",,1,f,D1,2026-02-07T12:30:00Z,2\r\n"
        ",,2,g,D1,2026-02-07T12:00:00Z,3\r\n"
        ",,3,g,D1,2026-02-07T12:30:00Z,2\r\n\r\n"
    )


def test_a_window_cut_by_the_range_begins_where_the_range_does(influx: InfluxSimulator) -> None:
    influx.write(f"m,device_id=D1 f=1 {NOON_NS + 600 * SECOND_NS}")
    text = answer(
        influx,
        'from(bucket: "telemetry") |> range(start: 2026-02-07T12:10:00Z, stop: 2026-02-07T12:20:00Z) '
        '|> aggregateWindow(every: 1h, fn: count, createEmpty: false, timeSrc: "_start") '
        '|> keep(columns: ["_time", "_value"])',
    )
    assert rows(text) == [",,0,2026-02-07T12:10:00Z,1"]


def test_without_a_pivot_each_series_and_field_is_a_table(influx: InfluxSimulator) -> None:
    influx.write(f"m,device_id=D1 f=1,g=2i {NOON_NS}")
    text = answer(influx, FROM)
    assert text.splitlines()[3] == ",result,table,_start,_stop,_time,_value,_field,_measurement,device_id"
    span = "2026-02-07T12:00:00Z,2026-02-07T13:00:00Z,2026-02-07T12:00:00Z"
    assert rows(text) == [f",,0,{span},1,f,m,D1", f",,1,{span},2,g,m,D1"]


def test_range_has_its_start_and_not_its_stop(influx: InfluxSimulator) -> None:
    influx.write(f"m f=1 {NOON_NS - 1}\nm f=2 {NOON_NS}\nm f=3 {NOON_NS + 3600 * SECOND_NS}")
    assert len(rows(answer(influx, FROM))) == 1


def test_nothing_found_is_one_empty_line(influx: InfluxSimulator) -> None:
    assert answer(influx, FROM + PIVOT) == "\r\n"


def test_a_filter_that_keeps_empty_tables_leaves_tables_without_rows(influx: InfluxSimulator) -> None:
    influx.write(f"m,device_id=D1 f=1 {NOON_NS}")
    text = answer(influx, f'{FROM} |> filter(fn: (r) => r._value > 5.0, onEmpty: "keep")')
    assert "#default,_result,0,2026-02-07T12:00:00Z,2026-02-07T13:00:00Z,,,f,m,D1\r\n" in text
    assert rows(text) == []


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        ("count()", [",,0,D1,3"]),
        ('first() |> keep(columns: ["device_id", "_value"])', [",,0,1,D1"]),
        ('limit(n: 1) |> keep(columns: ["_value"])', [",,0,1"]),
        ("group() |> sum()", [",,0,6"]),
        ("filter(fn: (r) => r._value >= 2.0 and exists r.device_id) |> count()", [",,0,D1,2"]),
        ('filter(fn: (r) => not (r.device_id == "D1"))', []),
    ],
)
def test_single_steps(influx: InfluxSimulator, step: str, expected: list[str]) -> None:
    influx.write("\n".join(f"m,device_id=D1 f={value} {NOON_NS + value}" for value in (1, 2, 3)))
    text = answer(influx, f'{FROM} |> drop(columns: ["_start", "_stop", "_measurement", "_field"]) |> {step}')
    assert rows(text) == expected


def test_grouping_text_with_numbers_fails_with_a_schema_collision(influx: InfluxSimulator) -> None:
    influx.write(f'm,device_id=D1 f=1,s="x" {NOON_NS}')
    assert refused(influx, f"{FROM} |> group()")[2].startswith("schema collision: cannot group float and string")


def test_several_yields_are_several_results(influx: InfluxSimulator) -> None:
    influx.write(f"m,device_id=D1 f=1 {NOON_NS}")
    text = answer(influx, f'{FROM} |> count() |> yield(name: "a")\n{FROM} |> sum() |> yield(name: "b")')
    assert text.count("#default,a,") == text.count("#default,b,") == 1
    assert len([row for row in rows(text) if row.startswith(",,0,")]) == 2


DISCOVERY = (
    'import "influxdata/influxdb/schema"\n'
    'schema.tagValues(bucket: "telemetry", tag: "device_id", predicate: (r) => r._measurement == "m"{more})'
)


def test_devices_are_discovered_from_the_tag(influx: InfluxSimulator) -> None:
    influx.write(f"m,device_id=D2 f=1 {NOON_NS}\nm,device_id=D1 f=1 {NOON_NS}\nother,device_id=D9 f=1 {NOON_NS}")
    assert answer(influx, DISCOVERY.format(more=", start: 2026-01-01T00:00:00Z")) == (
        head(("_value", "string", False)) + ",,0,D1\r\n,,0,D2\r\n\r\n"
    )


def test_a_device_silent_for_thirty_days_vanishes_from_discovery_without_a_start(influx: InfluxSimulator) -> None:
    influx.write(f"m,device_id=D1 f=1 {NOON_NS - 31 * 86_400 * SECOND_NS}")
    assert answer(influx, DISCOVERY.format(more="")) == "\r\n"
    assert rows(answer(influx, DISCOVERY.format(more=", start: 2025-12-01T00:00:00Z"))) == [",,0,D1"]


def test_measurements_are_listed(influx: InfluxSimulator) -> None:
    influx.write(f"b f=1 {NOON_NS}\na f=1 {NOON_NS}")
    text = answer(influx, 'import "influxdata/influxdb/schema" schema.measurements(bucket: "telemetry", start: -3h)')
    assert rows(text) == [",,0,a", ",,0,b"]


@pytest.mark.parametrize(
    ("text", "status", "message"),
    [
        (
            'from(bucket: "x") |> range(start: -1h)',
            404,
            'failed to initialize execute state: could not find bucket "x"',
        ),
        ('from(bucket: "telemetry") |> rnge(start: -1h)', 400, "cannot submit unbounded read"),
        (f"{FROM} |> smile()", 400, "undefined identifier smile"),
        (f"{FROM} |> limit(n: 1, m: 2)", 400, "unexpected argument m"),
        (f"{FROM} |> aggregateWindow(every: 1h, fn: count)", 400, "missing or wrong argument createEmpty"),
        ('from(bucket: "telemetry" |> x', 400, "compilation failed: error at @1:26-1:28: "),
        ('from(bucket: "telemetry")\n  |> range(start: ?)', 400, "compilation failed: error at @2:19-2:20: "),
        ('schema.measurements(bucket: "telemetry")', 400, "undefined identifier schema"),
        (
            'from(bucket: "telemetry") |> range(start: 2026-02-07T12:00:00Z, stop: 2026-02-07T12:00:00Z)',
            400,
            "empty range",
        ),
        ('from(bucket: "tele${x}") |> range(start: -1h)', 400, "compilation failed: error at @1:19-1:21: "),
    ],
)
def test_queries_that_a_server_refuses_are_refused(
    influx: InfluxSimulator, text: str, status: int, message: str
) -> None:
    got_status, code, got = refused(influx, text)
    assert (got_status, code) == (status, "not found" if status == 404 else "invalid")
    assert message in got


def test_string_literals_take_the_escapes_of_flux(influx: InfluxSimulator) -> None:
    influx.write(f'm,device_id=a"b\\\\\\ ${{x}} f=1 {NOON_NS}')
    (series,) = influx.points.series("m")
    device_id = dict(series.tags)["device_id"]
    escaped = device_id.replace("\\", "\\\\").replace('"', '\\"').replace("${", "\\${")
    assert len(rows(answer(influx, f'{FROM} |> filter(fn: (r) => r.device_id == "{escaped}")'))) == 1


def test_a_predicate_binds_and_tighter_than_or() -> None:
    program = parse_flux('filter(fn: (r) => r.a == "1" or r["b"] == "2" and exists r.c)')
    body = program.pipelines[0][0].arguments["fn"].body  # type: ignore[union-attr]
    assert body == Operation(
        "or",
        (
            Operation("==", (Member("a"), Literal("string", "1"))),
            Operation(
                "and", (Operation("==", (Member("b"), Literal("string", "2"))), Operation("exists", (Member("c"),)))
            ),
        ),
    )


NO_PROGRAMS = ("", "from(", 'from(bucket: "x', "|> count()", "filter(fn: (r) => )", "count() count")
DOLLARS = ('from(bucket: "a${b}")', 'from(bucket: "$\\\\")', 'from(bucket: "\\$\\"")')


@pytest.mark.parametrize("text", [*NO_PROGRAMS, *DOLLARS])
def test_texts_that_are_no_program_are_refused_with_a_place(text: str) -> None:
    with pytest.raises(FluxSyntax, match=r"^compilation failed: error at @1:\d+-1:\d+: "):
        parse_flux(text)
