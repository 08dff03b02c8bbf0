"""What is set aside is line protocol that a real server reads back as the very points that it was made from."""

import re
import urllib.parse
import urllib.request
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

from app.core.windows import Window
from app.influx_to_s3.influxql import InfluxQlReader
from app.influx_to_s3.reader import PointColumns
from app.influx_to_s3.row_batch import RowBatch
from app.influx_to_s3.rows import ConflictingValue
from app.influx_to_s3.set_aside import (
    NO_DEVICE_TAG,
    OTHER_VALUE,
    REFUSED_ID,
    SetAsidePoints,
    line,
    lines_of,
)
from app.object_store.set_aside import SetAsideStore
from influx_points import NOON_NS, TIMES, columns_of, points
from influx_readers import HOUR, influxql_without_credentials
from influxdb1 import InfluxDB1
from memory_objects import MemoryObjects

HOSTILE = [
    "plain",
    "a b",
    "a,b",
    "a=b",
    'a"b',
    "'a'",
    "a\\b",
    "a\\\\b",
    "time2",
    "é😀",
    "a\tb",
    "a::b",
    "$a",
    "{a}",
    "%61",
    "1",
    "true",
    "1i",
    "-",
]
# A measurement must not begin like a comment, and no line can say a field or measurement with such a backslash: the
# server refuses it, so no point has one. Tags may. A tab before the first field is skipped.
HOSTILE_TAGS = ["#a", "\\ a", "a\\,b", "a\\=b", "a\\ b", "a\\\\,b", "a\\\\ b"]
UNSAYABLE = re.compile(r"^\t|\\([,= ]|$)")
Read = tuple[int, tuple[tuple[str, str], ...], str, str, Any]


def read_back(reader: InfluxQlReader, device: str, span: Window = HOUR) -> list[Read]:
    """Every value with its instant, tags, field and type."""
    found: list[Read] = []
    for block in reader.rows(device, span):
        times = block.times.cast(pa.int64()).to_pylist()
        tags = {name: texts.to_pylist() for name, texts in block.tags.items()}
        for field, column in block.fields:
            for row, value in enumerate(column.to_pylist()):
                if value is not None:
                    own = tuple(sorted((name, texts[row]) for name, texts in tags.items() if texts[row] is not None))
                    found.append((times[row], own, field, str(column.type), value))
    return sorted(found, key=repr)


def there(influxdb1: InfluxDB1, lines: Iterable[str], measurement: str = "m") -> InfluxQlReader:
    """A reader of a new database that holds the lines."""
    database = influxdb1.new_database()
    for each in lines:  # one by one: the server's splitter takes a quote in a tag for the beginning of a text
        influxdb1.write(database, each)
    return influxql_without_credentials(influxdb1.url, database, measurement=measurement)


def test_a_line_of_every_type_is_read_back_as_it_was(influxdb1: InfluxDB1) -> None:
    fields: dict[str, Any] = {
        "f": 0.1,
        "whole": 2.0,
        "i": -(2**63),
        "big": 2**63 - 1,
        "yes": True,
        "no": False,
        "t": "x",
    }
    reader = there(influxdb1, [line("m", {"device_id": "D1", "phase": "L1"}, fields, NOON_NS + 7)])
    types = {float: "double", int: "int64", bool: "bool", str: "string"}
    own = (("phase", "L1"),)
    expected = [(NOON_NS + 7, own, name, types[type(value)], value) for name, value in fields.items()]
    assert read_back(reader, "D1") == sorted(expected, key=repr)


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_and_texts_are_read_back_as_they_were(influxdb1: InfluxDB1, name: str) -> None:
    written = line(name, {"device_id": name, name + "t": name}, {name: name}, NOON_NS)
    reader = there(influxdb1, [written], measurement=name)
    assert read_back(reader, name) == [(NOON_NS, ((name + "t", name),), name, "string", name)]


@pytest.mark.parametrize("name", HOSTILE_TAGS)
def test_hostile_names_and_texts_of_tags_are_read_back_as_they_were(influxdb1: InfluxDB1, name: str) -> None:
    reader = there(influxdb1, [line("m", {"device_id": name, name: name}, {"#f": 1.5}, NOON_NS)])
    assert read_back(reader, name) == [(NOON_NS, ((name, name),), "#f", "double", 1.5)]


@pytest.mark.parametrize("text", ["", " ", '"', "\\", '\\"', "a\nb", 'a\n"b\\n', "\\\\", "a\\", "\r\n", "x" * 5000])
def test_any_text_is_read_back_as_it_was(influxdb1: InfluxDB1, text: str) -> None:
    reader = there(influxdb1, [line("m", {"device_id": "D1"}, {"t": text, "u": "after"}, NOON_NS)])
    assert read_back(reader, "D1") == [
        (NOON_NS, (), "t", "string", text),
        (NOON_NS, (), "u", "string", "after"),
    ]


@pytest.mark.parametrize("value", [5e-324, 1.7976931348623157e308, -0.1, 1e21, 1e16, 123456789.123456789, 1 / 3])
def test_floats_are_read_back_to_the_last_digit(influxdb1: InfluxDB1, value: float) -> None:
    reader = there(influxdb1, [line("m", {"device_id": "D1"}, {"f": value}, NOON_NS)])
    assert read_back(reader, "D1") == [(NOON_NS, (), "f", "double", value)]


NAMES = st.text(st.sampled_from('ab,= "\\é#\t'), min_size=1, max_size=6)
TEXTS = st.text(st.sampled_from('ab,= "\\é#\t\n'), max_size=8)


@given(
    st.lists(
        st.tuples(
            st.dictionaries(NAMES, NAMES, max_size=2),
            st.dictionaries(
                NAMES, TEXTS | st.integers(-5, 5) | st.booleans() | st.floats(-5, 5), min_size=1, max_size=3
            ),
        ),
        min_size=1,
        max_size=5,
    )
)
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_random_points_are_read_back_as_they_were(
    influxdb1: InfluxDB1, drawn: list[tuple[dict[str, str], dict[str, Any]]]
) -> None:
    types = {float: "double", int: "int64", bool: "bool", str: "string"}
    lines, expected, kinds = [], [], dict[str, type]()
    for at, (tags, fields) in enumerate(drawn):
        # The server takes the blank behind a backslash for the end of the tags, and may then take a line feed within a
        # text for the end of the line: no point with both has come. HOSTILE_TAGS has such tags.
        own = {name: text for name, text in tags.items() if not re.search(r"\\( |$)", f"{name}\n{text}", re.MULTILINE)}
        held = {name: value for name, value in fields.items() if not UNSAYABLE.search(name)}
        held = {name: value for name, value in held.items() if kinds.setdefault(name, type(value)) is type(value)}
        if held:
            lines.append(line("m", {**own, "device_id": "D1"}, held, NOON_NS + at))
            named = tuple(sorted(own.items()))
            expected += [(NOON_NS + at, named, name, types[type(value)], value) for name, value in held.items()]
    note("\n".join(lines))
    if lines:
        assert read_back(there(influxdb1, lines), "D1") == sorted(expected, key=repr)


def test_points_of_a_block_are_lines_with_their_own_tags_and_values_only() -> None:
    times = pa.array([NOON_NS, NOON_NS + 1, NOON_NS + 2], pa.int64()).cast(TIMES)
    block = PointColumns(
        times,
        {"phase": pa.array(["L1", None, "L2"])},
        [("v", pa.array([1.5, None, None])), ("v", pa.array([None, 2, None])), ("on", pa.array([None, True, None]))],
    )
    assert list(lines_of(block, "m", {"device_id": "a/b"})) == [
        f"m,device_id=a/b,phase=L1 v=1.5 {NOON_NS}",
        f"m,device_id=a/b on=true,v=2i {NOON_NS + 1}",
    ]
    assert block.numbers == {"v": 2, "on": 1}


def test_a_value_of_an_unsigned_type_says_so_where_no_integer_holds_it() -> None:
    assert line("m", {}, {"u": 2**64 - 1, "i": 2**63 - 1}, 0) == f"m i={2**63 - 1}i,u={2**64 - 1}u 0"


def aside_in(store: MemoryObjects) -> SetAsidePoints:
    return SetAsidePoints(SetAsideStore(store, "telemetry/_set_aside"), measurement="m", device_tag="device_id")


def lines_in(store: MemoryObjects) -> dict[str, list[str]]:
    found = {}
    for info in store.list("telemetry/_set_aside/"):
        with store.open(info.key) as body:
            assert body is not None
            found[info.key] = body.read().decode("utf-8", "surrogatepass").splitlines()
    return found


def test_points_of_a_device_that_cannot_be_named_are_kept_once_and_counted_each_time() -> None:
    store = MemoryObjects()
    block = points(0, 1, tags={"phase": "L1"}, voltage=[1.5, None], power=[2.5, 3.5])
    kept, read = aside_in(store).keep_points(REFUSED_ID, "a/b", HOUR, [block])
    assert (kept.number, kept.new, read) == (3, 3, {"voltage": 1, "power": 2})
    [lines] = lines_in(store).values()
    assert lines == [
        f"m,device_id=a/b,phase=L1 power=2.5,voltage=1.5 {NOON_NS}",
        f"m,device_id=a/b,phase=L1 power=3.5 {NOON_NS + 1}",
    ]
    again, _ = aside_in(store).keep_points(REFUSED_ID, "a/b", HOUR, [block])
    assert (again.number, again.new) == (3, 0)
    assert aside_in(store).knows("a/b")
    assert not aside_in(store).knows("a/c")


def test_points_without_the_device_tag_are_kept_without_it() -> None:
    store = MemoryObjects()
    aside_in(store).keep_points(NO_DEVICE_TAG, "", HOUR, [points(0, voltage=[1.5])])
    assert list(lines_in(store).values()) == [[f"m voltage=1.5 {NOON_NS}"]]


def test_values_that_disagree_are_kept_with_the_tags_of_their_point() -> None:
    store = MemoryObjects()
    batch = RowBatch("D1", Path(), 0, columns_of())
    batch.disagreements = [
        ConflictingValue({"schema_version": "2", "phase": "L1"}, "voltage", 3.5, NOON_NS),
        ConflictingValue({"schema_version": "3", "phase": "L1"}, "note", "a\nb", NOON_NS + 1),
    ]
    [told] = aside_in(store).keep_values("D1", HOUR, batch)
    assert (told.reason, told.number, told.new) == (OTHER_VALUE, 2, 2)
    [again] = aside_in(store).keep_values("D1", HOUR, batch)
    assert (again.number, again.new) == (2, 0)
    batch.disagreements = []
    assert aside_in(store).keep_values("D1", HOUR, batch) == ()


def test_a_name_with_a_lone_surrogate_is_kept_and_does_not_end_the_run() -> None:
    store = MemoryObjects()
    block = points(0, tags={"ph\ud800": "x"}, v=[1.5])
    kept, _ = aside_in(store).keep_points(REFUSED_ID, "a\ud800/b", HOUR, [block])
    assert kept.new == 1
    assert list(lines_in(store).values()) == [[f"m,device_id=a\ud800/b,ph\ud800=x v=1.5 {NOON_NS}"]]


def test_the_lines_of_a_kept_object_can_be_written_to_a_server_again(influxdb1: InfluxDB1) -> None:
    store = MemoryObjects()
    fields: dict[str, Any] = {"v=1": [1.5, 2.5], "note": ["a\nb", '"']}
    block = points(0, 1, tags={"ph ase": "L,1"}, **fields)
    aside_in(store).keep_points(REFUSED_ID, "a/b", HOUR, [block])
    [info] = store.list("telemetry/_set_aside/")
    with store.open(info.key) as body:
        assert body is not None
        content = body.read()
    database = influxdb1.new_database()
    url = f"{influxdb1.url}/write?{urllib.parse.urlencode({'db': database})}"
    with urllib.request.urlopen(url, content, timeout=30) as answer:  # noqa: S310 - loopback only
        assert answer.status == 204
    reader = influxql_without_credentials(influxdb1.url, database, measurement="m")
    own = (("ph ase", "L,1"),)
    assert read_back(reader, "a/b") == sorted(
        [
            (NOON_NS, own, "v=1", "double", 1.5),
            (NOON_NS + 1, own, "v=1", "double", 2.5),
            (NOON_NS, own, "note", "string", "a\nb"),
            (NOON_NS + 1, own, "note", "string", '"'),
        ],
        key=repr,
    )
