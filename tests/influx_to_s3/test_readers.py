"""Flux of the simulator and InfluxQL of a real InfluxDB 1.x or its recorded answers: every point, whatever its name."""

import json
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.core.errors import Permanent
from app.core.pipeline import NOTHING, Sums
from app.core.repair import same_sums
from app.core.windows import Window, floor_to
from app.influx_to_s3.flux import column_of_row, literal, time_literal
from app.influx_to_s3.influxql import exact_pattern, identifier, text_literal
from app.influx_to_s3.reader import FieldCount, QueryTooLarge, Reader, SourceInventory, counted_in_parts, one_type_spans
from app.influx_to_s3.rows import sums_of
from effort import EFFORT
from exporter import NOON
from influx_points import source_of
from influx_readers import (
    BASE,
    HOUR,
    LINES,
    M,
    Make,
    S,
    counted,
    exact,
    flux,
    influxql,
    influxql_without_credentials,
    rows,
    values,
)
from influxdb1 import InfluxDB1, running_influxdb1
from influxql_server import RECORDED, InfluxQlServer, record, recorded
from simulators.influx import InfluxSimulator
from simulators.influx_storage import SHARD_NS
from simulators.line_protocol import Field, Point, parse_lines

DAY = timedelta(days=1)


def test_both_languages_add_up_to_what_their_rows_come_to(influx: InfluxSimulator, influxdb1: InfluxDB1) -> None:
    influx.write(LINES)
    database = influxdb1.new_database()
    influxdb1.write(database, LINES)
    for reader in (flux(influx), influxql_without_credentials(influxdb1.url, database)):
        blocks = [*reader.rows("D1", HOUR), *reader.empty_texts("D1", HOUR, "note")]
        known = sums_of(field for block in blocks for field in block.fields)
        numbers = [name for name, sums in known.items() if sums.total is not None]
        asked: dict[str, Sums] = {}
        for one in reader.sums("D1", HOUR, 3600, numbers):
            assert one.start_at == NOON
            asked[one.field] = asked.get(one.field, Sums()) + one.sums
        assert len(known) > 8
        assert known["note"].total is None
        assert (known["voltage"].least, known["current"].greatest) == (1, 29)
        assert same_sums(asked, known)
        changed = {**known, "voltage": replace(known["voltage"], total=known["voltage"].magnitude + 1e-9)}
        assert not same_sums(asked, changed)


def test_sums_that_no_number_can_hold_are_an_error_that_is_not_repeated(influxdb1: InfluxDB1) -> None:
    database = influxdb1.new_database()
    influxdb1.write(database, "\n".join(f"{M},device_id=D1 voltage=1.5e308 {BASE + n}" for n in range(2)))
    reader = influxql_without_credentials(influxdb1.url, database)
    with pytest.raises(Permanent, match=r"cannot write its response: json: .* \+Inf"):
        list(reader.sums("D1", HOUR, 3600, ["voltage"]))


EVER = Window(datetime(1960, 1, 1, tzinfo=UTC), datetime(2200, 1, 1, tzinfo=UTC))


def test_the_window_holds_its_start_and_not_its_end_and_nanoseconds_survive(
    influx: InfluxSimulator, reader: Reader
) -> None:
    influx.write(LINES)
    found = [at for at, _, _ in rows(reader)]
    assert found[:6] == [0, 7, 11, *found[3:6]]
    assert 123_456_789 in found
    assert 60 * S + 1 in found
    assert all(0 <= at < 3600 * S for at in found)


def test_both_languages_and_a_real_influxdb_1_give_equal_points(influx: InfluxSimulator, influxdb1: InfluxDB1) -> None:
    influx.write(LINES)
    database = influxdb1.new_database()
    influxdb1.write(database, LINES)
    readers: list[Reader] = [flux(influx), influxql_without_credentials(influxdb1.url, database)]
    first, *others = (values(each.rows("D1", HOUR)) + values(each.empty_texts("D1", HOUR, "note")) for each in readers)
    assert first.total() >= 150
    assert others == [first]
    assert [each.devices(NOON - DAY) for each in readers] == [["D1", "D2"]] * 2
    for device in (None, "D1"):
        counts, *other_counts = (counted(each, device) for each in readers)
        assert other_counts == [counts]
        assert counts["D1", "voltage", NOON] == 31


def test_recorded_answers_of_an_influxdb_1_give_the_points_that_flux_gives(influx: InfluxSimulator) -> None:
    influx.write(LINES)
    with InfluxQlServer(influx, recorded()) as server:
        reader, other = influxql(influx, url=server.url), flux(influx)
        empty_texts = values(other.empty_texts("D1", HOUR, "note"))
        assert values(reader.rows("D1", HOUR)) == values(other.rows("D1", HOUR)) + empty_texts
        assert reader.devices(NOON - DAY) == other.devices(NOON - DAY)
        for device in (None, "D1"):
            assert counted(reader, device) == counted(other, device)
        assert reader.inventory() == other.inventory()
        assert reader.ping() == f"may read database telemetry at {server.url} by InfluxQL"


def test_recorded_answers_are_those_of_a_real_influxdb_1(influxdb1: InfluxDB1) -> None:
    assert record(influxdb1) == json.loads(RECORDED.read_text(encoding="utf-8")), "run tests/influxql_server.py"


def test_points_that_differ_in_a_further_tag_stay_apart_and_keep_it(influx: InfluxSimulator, make: Make) -> None:
    influx.write("\n".join(f"{M},device_id=D1,phase={phase} voltage=23{at} {BASE}" for at, phase in enumerate("ABC")))
    assert rows(make()) == [(0, {"phase": phase}, {"voltage": 230 + at}) for at, phase in enumerate("ABC")]


NAMED = [
    f'{M},device_id=D1,location=lab location="x",device_id=5,hour=3i',
    f'{M},device_id=D1,result=success,table=t,error=e,reference=r v=1,result="pass",table=5i',
    f'{M},device_id=D1,filename=f,date=d,count_v=t filename="g",date=2,count_v=1,v=1,c0=2',
    f'{M},device_id=D1 _time=1,_value="x",_start=2,_stop=3,_field=4i,_measurement="m",error=1,reference=2',
    f'{M},device_id=D1,a\\,b\\ c\\=d=e v\\,\\ \\=w=1,"q"=2,b\\s=3,é😀=4,${{x}}=5,a::float=6,*=7,/x/=8',
]


@pytest.mark.parametrize("line", NAMED)
def test_tags_and_fields_may_bear_any_name_also_the_same(
    influx: InfluxSimulator, influxdb1: InfluxDB1, line: str
) -> None:
    text = f"{line} {BASE}\n{M},device_id=D1 voltage=1 {BASE + 1}\n{M},device_id=D2 device_id=7,v=1 {BASE}"
    influx.write(text)
    database = influxdb1.new_database()
    influxdb1.write(database, text)
    [parsed, *_] = parse_lines(text, 0)
    tags = {name: value for name, value in parsed.tags if name != "device_id"}
    fields = {one.name: exact(one.value) for one in parsed.fields}
    for reader in (flux(influx), influxql_without_credentials(influxdb1.url, database)):
        assert rows(reader) == [(0, tags, fields), (1, {}, {"voltage": 1})]
        assert rows(reader, "D2") == [(0, {}, {"device_id": 7, "v": 1})]
        assert counted(reader, "D1") == {("D1", name, NOON): 1 for name in (*fields, "voltage")}


def test_points_without_the_device_tag_are_those_of_the_empty_device(
    influx: InfluxSimulator, influxdb1: InfluxDB1
) -> None:
    lines = f'{M},location=A voltage=4 {BASE}\n{M} device_id="D1" {BASE}\n{M},device_id=D1 voltage=5 {BASE}'
    influx.write(lines)
    database = influxdb1.new_database()
    influxdb1.write(database, lines)
    for reader in (flux(influx), influxql_without_credentials(influxdb1.url, database)):
        assert rows(reader, "") == [(0, {}, {"device_id": "D1"}), (0, {"location": "A"}, {"voltage": 4})]
        assert counted(reader, "") == {("", "voltage", NOON): 1, ("", "device_id", NOON): 1}
        assert counted(reader) == {**counted(reader, ""), ("D1", "voltage", NOON): 1}


def test_another_tag_may_name_the_device(influx: InfluxSimulator, influxdb1: InfluxDB1) -> None:
    lines = f"{M},the\\ host=H1,device_id=D1 v=1 {BASE}\n{M},the\\ host=H2 v=2 {BASE}"
    influx.write(lines)
    database = influxdb1.new_database()
    influxdb1.write(database, lines)
    readers: list[Reader] = [flux(influx, tag="the host")]
    readers += [influxql_without_credentials(influxdb1.url, database, tag="the host")]
    for reader in readers:
        assert reader.devices(NOON) == ["H1", "H2"]
        assert rows(reader, "H1") == [(0, {"device_id": "D1"}, {"v": 1})]
        assert counted(reader) == {("H1", "v", NOON): 1, ("H2", "v", NOON): 1}


def test_names_that_no_influxql_literal_can_hold_are_read_from_a_real_influxdb_1(influxdb1: InfluxDB1) -> None:
    week = 7 * 86_400 * S
    database = influxdb1.new_database()
    influxdb1.write(
        database,
        f'{M},device_id=D1,t\ru=x a\rb="x",v=1 {BASE}\n{M},device_id=D1 a\rb=21,a\0c=-0.0 {BASE + week}\n'
        f"{M},device_id=D\r2 v=2 {BASE}",
    )
    reader = influxql_without_credentials(influxdb1.url, database)
    span = Window(NOON, NOON + 8 * DAY)
    assert rows(reader, span=span) == [
        (0, {"t\ru": "x"}, {"a\rb": "x", "v": 1}),
        (week, {}, {"a\rb": 21, "a\0c": "-0.0"}),
    ]
    assert rows(reader, "D\r2") == [(0, {}, {"v": 2})]
    assert counted(reader, "D\r2") == {("D\r2", "v", NOON): 1}


SHORT = timedelta(hours=1)


@pytest.mark.parametrize("shard", [timedelta(days=7), SHORT])
def test_a_field_of_another_type_in_another_shard_is_read_and_counted_whole(
    influxdb1: InfluxDB1, shard: timedelta
) -> None:
    shard_ns = shard // timedelta(microseconds=1) * 1000
    lines = "\n".join(
        f"{M},device_id=D1 state={value} {BASE + at * shard_ns + more}"
        for at, given in enumerate((("1.5", "-0.0"), ('"v"', '""'), ("9007199254740993i", "-1i"), ("true", "false")))
        for more, value in enumerate(given)
    )
    expected = ["1.5", "-0.0", "v", "", 9007199254740993, -1, "True", "False"]
    span = Window(NOON, NOON + 5 * shard)
    database = influxdb1.new_database(f"WITH SHARD DURATION {shard // SHORT}h")
    influxdb1.write(database, lines)
    with InfluxSimulator(shard_ns=shard_ns) as influx:
        influx.write(lines)
        for reader in (flux(influx), influxql_without_credentials(influxdb1.url, database)):
            found = values(reader.rows("D1", span)) + values(reader.empty_texts("D1", span, "state"))
            assert [cell for _, _, _, cell in sorted(found, key=lambda value: value[0])] == expected
            assert sum(counted(reader, None, span, 86_400).values()) == 8
            assert sum(counted(reader, "D1", span, 600).values()) == 8


def test_a_far_span_is_counted_in_one_question(influx: InfluxSimulator, influxdb1: InfluxDB1) -> None:
    lines = f"{M},device_id=D1 v=1,w=2 {BASE}\n{M} v=1 9000000000000000000\n{M},device_id=D2 v=1 -5000000000"
    influx.write(lines)
    database = influxdb1.new_database()
    influxdb1.write(database, lines)
    for reader in (flux(influx), influxql_without_credentials(influxdb1.url, database)):
        future = Window(NOON + DAY, datetime(9999, 1, 1, tzinfo=UTC))
        assert list(reader.outside(future)) == [FieldCount("", NOON + DAY, "v", 1)]
        past = Window(datetime(1, 1, 1, tzinfo=UTC), NOON)
        assert list(reader.outside(past)) == [FieldCount("D2", past.start, "v", 1)]
        assert list(reader.outside(Window(datetime(3000, 1, 1, tzinfo=UTC), future.end))) == []
        assert list(reader.devices(NOON)) in (["D1"], ["D1", "D2"])


def test_a_device_of_the_future_and_of_long_ago_is_found(influx: InfluxSimulator, make: Make) -> None:
    influx.write(f"{M},device_id=OLD v=1 1000\n{M},device_id=FUTURE v=1 {BASE + 10**18}")
    assert make().devices(datetime(1970, 1, 1, tzinfo=UTC)) == ["FUTURE", "OLD"]
    assert flux(influx).devices(NOON) == ["FUTURE"]  # a 1.x server knows a value's time by its shard at best


def test_the_inventory_says_what_there_is(influx: InfluxSimulator, influxdb1: InfluxDB1) -> None:
    lines = f"{M},host=H1 v=1,w=2 {BASE}\nother,device_id=D1 x=1 {BASE}"
    influx.write(lines)
    database = influxdb1.new_database()
    influxdb1.write(database, lines)
    influxdb1.query(f'CREATE RETENTION POLICY "long" ON "{database}" DURATION INF REPLICATION 1')
    influxdb1.write(database, f"late,device_id=D1 x=1 {BASE}", "long")

    def real(**target: Any) -> SourceInventory:
        return influxql_without_credentials(influxdb1.url, database, **target).inventory()

    expected = SourceInventory([M, "other"], has_points=True, tags=["host"], fields=["v", "w"], devices=[])
    assert flux(influx).inventory() == expected
    assert flux(influx, tag="host").inventory().devices == ["H1"]
    nothing = SourceInventory([M, "other"], has_points=False, tags=[], fields=[], devices=[])
    assert flux(influx, measurement="none").inventory() == nothing
    assert real().tags == ["host"]
    assert real(tag="host").devices == ["H1"]
    assert real(measurement="late").policies == ("long",)
    assert not real(measurement="late").has_points
    assert real(measurement="late", policy="long").has_points
    assert real(measurement="none").measurements == ["device_telemetry", "late", "other"]
    assert real(policy="long").policies == ("autogen",)


def test_a_limit_of_buckets_is_met_by_shorter_questions(tmp_path: Path) -> None:
    with running_influxdb1(tmp_path, "[coordinator]\n  max-select-buckets = 5") as server:
        database = server.new_database()
        lines = (f"{M},device_id=D1 v={at} {BASE + at * 1800 * S}" for at in range(-100, 100))
        server.write(database, "\n".join(lines))
        reader = influxql_without_credentials(server.url, database)
        found = counted(reader, None, Window(NOON - 3 * DAY, NOON + 3 * DAY))
        assert found.total() == 200
        assert set(found.values()) == {2}
        assert counted(reader, "D1", Window(NOON, NOON + DAY), 60).total() == 48


def test_a_limit_of_series_is_no_sign_of_an_empty_measurement(tmp_path: Path) -> None:
    with running_influxdb1(tmp_path, "[coordinator]\n  max-select-series = 1") as server:
        database = server.new_database()
        server.write(database, f"{M},device_id=D1 v=1 {BASE}\n{M},device_id=D2 v=1 {BASE}")
        reader = influxql_without_credentials(server.url, database)
        assert reader.inventory().has_points
        with pytest.raises(QueryTooLarge, match="max-select-series"):
            counted(reader)
        assert counted(reader, "D2") == {("D2", "v", NOON): 1}


def test_what_one_bucket_is_too_much_for_is_said() -> None:
    asked: list[Window] = []

    def ask(spans: Any) -> Any:
        asked.extend(spans)
        raise QueryTooLarge("too much", "ask for less")
        yield None

    with pytest.raises(QueryTooLarge):
        list(counted_in_parts([Window(NOON, NOON + 4 * SHORT)], 3600, ask))
    assert [span.seconds for span in asked] == [14_400, 7200, 3600]


def test_spans_end_at_midnight_and_where_a_shard_group_does() -> None:
    start = datetime(2026, 2, 7, 22, 30, tzinfo=UTC)
    parts = list(one_type_spans(Window(start, start + 3 * DAY), timedelta(days=7)))
    assert [part.end.hour for part in parts] == [0, 0, 0, 22]
    assert [part.start for part in parts[1:]] == [part.end for part in parts[:-1]]
    assert len(list(one_type_spans(Window(start, start + DAY), timedelta(minutes=90)))) == 16
    [noon, *_] = one_type_spans(Window(start, start + DAY), timedelta(hours=36))
    assert noon.end.hour == 0
    assert {part.end.hour for part in one_type_spans(Window(start, start + 4 * DAY), timedelta(hours=36))} == {
        0,
        12,
        22,
    }


NAMES = ["v", "device_id", "location", "result", "table", "error", "filename", "date", "count_v", "c0", "time_", "name"]
HOSTILE_NAMES = ['a"b', "a'b", "a b", "a,b", "a=b", "a\\b", "é😀", "${x}", "*", "a.b", "#x", "\u2028", "\x01", "a\tb"]
FIELDS = [*NAMES, *HOSTILE_NAMES, "_time", "_value", "_start", "_field", "_measurement"]
TAGS = [name for name in (*NAMES, *HOSTILE_NAMES) if name not in ("device_id", "\u2028", "a\tb")]
TEXTS = st.text(st.sampled_from("ab\"',=\\ \n#é😀\u2028$"), max_size=4)
CELLS: dict[str, st.SearchStrategy[Any]] = {
    "float": st.floats(allow_nan=False, allow_infinity=False) | st.integers(-3, 3).map(float),
    "integer": st.integers(-(2**63), 2**63 - 1) | st.integers(-3, 3),
    "string": TEXTS,
    "boolean": st.booleans(),
}
SHARDS = (-1, 0, 1)
SPAN = Window(NOON - 20 * DAY, NOON + 20 * DAY)
MONDAY = ((BASE + 3 * 86_400 * S) // SHARD_NS) * SHARD_NS - 3 * 86_400 * S


@st.composite
def points(draw: st.DrawFn) -> list[Point]:
    """Points of a few devices in three weeks, in each of which a field has a type of its own."""
    fields = draw(st.lists(st.sampled_from(FIELDS), min_size=1, max_size=4, unique=True))
    tags = draw(st.lists(st.sampled_from(TAGS), max_size=2, unique=True))
    kinds = {(name, shard): draw(st.sampled_from(sorted(CELLS))) for name in fields for shard in SHARDS}
    found = []
    for _ in range(draw(st.integers(1, 12))):
        shard = draw(st.sampled_from(SHARDS))
        time_ns = MONDAY + shard * SHARD_NS + draw(st.sampled_from((0, 1, 86_400 * S - 1, 86_400 * S, SHARD_NS - 1)))
        named = {name: draw(st.sampled_from(("x", "y z", 'q"', "é"))) for name in tags if draw(st.booleans())}
        if draw(st.booleans()):
            named["device_id"] = draw(st.sampled_from(("D1", "D'2\"")))
        chosen = draw(st.lists(st.sampled_from(fields), min_size=1, unique=True))
        cells = [Field(name, kinds[name, shard], draw(CELLS[kinds[name, shard]])) for name in chosen]
        found.append(Point(M, tuple(sorted(named.items())), tuple(cells), time_ns))
    return found


def line(point: Point) -> str:
    """Line protocol of a point."""

    def name(text: str) -> str:
        return "".join(f"\\{char}" if char in ",= " else char for char in text)

    def cell(one: Field) -> str:
        if one.kind == "string":
            return '"' + str(one.value).replace("\\", "\\\\").replace('"', '\\"') + '"'
        return {"float": repr(one.value), "integer": f"{one.value}i", "boolean": str(one.value).lower()}[one.kind]

    tags = "".join(f",{name(key)}={name(value)}" for key, value in point.tags)
    return f"{M}{tags} {','.join(f'{name(one.name)}={cell(one)}' for one in point.fields)} {point.time_ns}"


def expected_of(given_points: list[Point]) -> tuple[dict[str, Counter[Any]], Counter[Any]]:
    """Values by device, and counts of hours: what was written, where a later point replaces a former one."""
    stored = {(one.tags, one.time_ns, cell.name): exact(cell.value) for one in given_points for cell in one.fields}
    by_device: dict[str, Counter[Any]] = {device: Counter() for device in ("D1", "D'2\"", "")}
    counts: Counter[Any] = Counter()
    for (tags, time_ns, name), value in stored.items():
        device = dict(tags).get("device_id", "")
        others = tuple(tag for tag in tags if tag[0] != "device_id")
        by_device[device][time_ns - BASE, others, name, value] += 1
        at = floor_to(datetime.fromtimestamp(time_ns // S, UTC), 3600)
        counts[device, name, at] += 1
    return by_device, counts


def check_readers(influxdb1: InfluxDB1, given_points: list[Point]) -> None:
    by_device, counts = expected_of(given_points)
    database = influxdb1.new_database()
    influxdb1.write(database, "\n".join(map(line, given_points)))
    with InfluxSimulator() as influx:
        assert influx.points.write(given_points) == []
        names = {field.name for one in given_points for field in one.fields}
        readers: list[Reader] = [flux(influx), influxql_without_credentials(influxdb1.url, database)]
        for reader in readers:
            for device, expected in by_device.items():
                found = values(reader.rows(device, SPAN))
                for name in names:
                    found += values(reader.empty_texts(device, SPAN, name))
                assert found == expected
            assert counted(reader, None, SPAN) == counts
            assert reader.devices(SPAN.start) == sorted(name for name, cells in by_device.items() if name and cells)
            check_together(reader, {floor_to(at, 86_400) for _, _, at in counts})


def check_together(reader: Reader, days: Iterable[datetime]) -> None:
    """A day of several devices that is read with one query is the same as read alone."""
    source = source_of(reader, Path(tempfile.gettempdir()))
    for day in (Window(at, at + DAY) for at in days):
        counted_now = source.counts(None, [day])
        each = [(device, day, counted_now.get((device, day.start), NOTHING)) for device in ("D1", "D'2\"")]
        alone = [source.read(*one, None) for one in each]
        for batch, own in zip(source.read_each(each), alone, strict=True):
            assert batch is not None
            assert (batch.digest, batch.rows, batch.accounts, batch.sums) == (
                own.digest,
                own.rows,
                own.accounts,
                own.sums,
            )
            assert list(batch.identities) == list(own.identities)
            assert [table.to_pylist() for table in batch.output()] == [table.to_pylist() for table in own.output()]


@pytest.mark.slow
@given(points())
@settings(max_examples=5, deadline=None)
def test_every_reader_gives_what_was_written(influxdb1: InfluxDB1, given_points: list[Point]) -> None:
    check_readers(influxdb1, given_points)


@pytest.mark.slow
@pytest.mark.timeout(600)
@given(points())
@settings(max_examples=20 * EFFORT, deadline=None)
def test_every_reader_gives_what_was_written_in_many_more_cases(
    influxdb1: InfluxDB1, given_points: list[Point]
) -> None:
    check_readers(influxdb1, given_points)


HOSTILE = [
    'D"1',
    "D\\",
    "D'1",
    "${x}",
    '") |> drop(columns: ["x"])',
    "' OR 1=1 --",
    "a\nb",
    "é€😀",
    "\\${",
    "a\tb",
    "$",
    "\\n",
]


@pytest.mark.parametrize("device", HOSTILE)
def test_hostile_values_are_bound(influx: InfluxSimulator, device: str) -> None:
    for name in (device, "D1"):
        for measurement in (M, device):
            influx.points.extend((measurement, (("device_id", name),)), [BASE], {"voltage": [float(len(name))]})
    for measurement in (M, device):
        reader = flux(influx, measurement=measurement)
        assert rows(reader, device) == [(0, {}, {"voltage": len(device)})]
        assert {one.device for one in reader.counts(device, HOUR, 3600)} == {device}
        assert sorted(reader.devices(NOON)) == sorted([device, "D1"])


@pytest.mark.parametrize("device", ['D"1', "D'1", "${x}", '")|>x', "'OR\\ 1\\=1", "é€😀", "D\\\\x", "D\\x"])
def test_hostile_ids_are_bound_on_a_real_influxdb_1(influxdb1: InfluxDB1, device: str) -> None:
    database = influxdb1.new_database()
    influxdb1.write(database, f"{M},device_id={device},z=1 voltage=1 {BASE}\n{M},device_id=other voltage=2 {BASE}")
    reader = influxql_without_credentials(influxdb1.url, database)
    [name] = [found for found in reader.devices(NOON) if found != "other"]
    assert rows(reader, name) == [(0, {"z": "1"}, {"voltage": 1})]
    assert {one.device for one in reader.counts(name, HOUR, 3600)} == {name}


def test_literals_escape_what_would_end_or_fill_them() -> None:
    assert literal('a"\\${x}\n\r\t\0') == '"a\\"\\\\\\x24{x}\\n\\r\\t\\x00"'
    assert text_literal("a'\\\n") == "'a\\'\\\\\\n'"
    assert identifier('a"\\\n') == '"a\\"\\\\\\n"'
    assert exact_pattern("a\r/.") == "/^a\\x{d}\\x{2f}\\x{2e}$/"
    assert time_literal(NOON) == "2026-02-07T12:00:00Z"
    assert time_literal(NOON + timedelta(microseconds=120)) == "2026-02-07T12:00:00.00012Z"
    assert time_literal(datetime(2026, 10, 10, 10, 10, 10, tzinfo=UTC)) == "2026-10-10T10:10:10Z"
    assert time_literal(datetime(1, 1, 1, tzinfo=UTC)) == "1677-09-21T00:12:43.145224194Z"
    assert time_literal(datetime(9999, 1, 1, tzinfo=UTC)) == "2262-04-11T23:47:16.854775806Z"
    assert [column_of_row(name) for name in ("device_id", "if", "a b")] == ["r.device_id", 'r["if"]', 'r["a b"]']


def test_a_device_without_points_and_a_measurement_without_fields_give_nothing(
    influx: InfluxSimulator, make: Make
) -> None:
    assert rows(make()) == []
    influx.write(LINES)
    assert rows(make(), "nobody") == []
    assert rows(make(measurement="none")) == []
    assert list(make(measurement="none").counts(None, HOUR, 60)) == []
    assert list(make(measurement="none").devices(NOON)) == []


def test_ping_says_what_answered(influx: InfluxSimulator, influxdb1: InfluxDB1) -> None:
    assert flux(influx).ping() == f"may read bucket telemetry at {influx.url} by Flux"
    database = influxdb1.new_database()
    ping = influxql_without_credentials(influxdb1.url, database).ping()
    assert ping == f"may read database {database} at {influxdb1.url} by InfluxQL"
