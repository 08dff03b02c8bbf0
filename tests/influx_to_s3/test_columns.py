"""Names and types of columns: every tag and field has one of its own, decided once; every value lands exactly."""

import sys
import threading
from collections.abc import Iterator, Sequence
from datetime import UTC, date, datetime
from fractions import Fraction
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from app.influx_to_s3.layout import (
    ARROW_TYPES,
    BOOLEAN,
    DOUBLE,
    EVER,
    INTEGER,
    OURS,
    TEXT,
    UNSIGNED,
    Column,
    LayoutFile,
    TreeColumns,
    type_of,
)
from app.influx_to_s3.reader import PointColumns
from app.influx_to_s3.rows import canonical_table
from influx_points import IGNORED, NOON, NOON_NS, TIMES, columns_of, points, rows_in, tree_of
from memory_objects import MemoryObjects


def names_of(columns: TreeColumns, tags: Sequence[str], fields: Sequence[str]) -> dict[str, str]:
    """The column of each tag and field, which are seen together."""
    columns.see(tags, dict.fromkeys(fields, DOUBLE))
    return {f"tag {name}": columns.tag_columns[name] for name in tags} | {
        name: columns.fields[name].name for name in fields
    }


def test_names_of_the_source_are_kept() -> None:
    ordinary = [
        "result",
        "table",
        "_time",
        "_value",
        "filename",
        "date",
        "_field",
        "_measurement",
        "a b",
        "é",
        "0",
        '"',
    ]
    assert names_of(columns_of(), [], ordinary) == {name: name for name in ordinary}
    assert names_of(columns_of(), ordinary, []) == {f"tag {name}": name for name in ordinary}


@pytest.mark.parametrize("name", ["timestamp", "timestamp_nanos", "device_id", "hour", "is_weekend", "power_factor"])
def test_a_name_of_ours_gets_a_suffix(name: str) -> None:
    assert names_of(columns_of(), [], [name]) == {name: f"{name}_field"}
    assert names_of(columns_of(device_tag="meter"), [name], []) == {f"tag {name}": f"{name}_tag"}
    both = names_of(columns_of(device_tag="meter"), [name], [name])
    assert both == {f"tag {name}": f"{name}_tag", name: f"{name}_field"}


def test_the_documented_tags_and_fields_have_the_documented_columns() -> None:
    found = names_of(columns_of(), ["device_type", "location"], ["voltage", "current", "power", "temperature"])
    assert all(key.removeprefix("tag ") == name for key, name in found.items())


def test_a_field_called_like_a_tag_gets_a_suffix_whichever_was_there_first() -> None:
    assert names_of(columns_of(), ["room"], ["room"]) == {"tag room": "room", "room": "room_field"}
    columns = columns_of()
    columns.see((), {"room": TEXT})
    assert names_of(columns, ["room"], ["room"]) == {"tag room": "room_tag", "room": "room"}
    assert names_of(columns_of(), ["voltage"], ["location"]) == {
        "tag voltage": "voltage_tag",
        "location": "location_field",
    }


def test_names_that_differ_in_case_only_get_a_number() -> None:
    found = names_of(columns_of(), ["Phase"], ["phase", "PHASE", "Voltage", "voltage", "straße", "STRASSE"])
    assert found == {
        "tag Phase": "Phase",
        "phase": "phase_2",
        "PHASE": "PHASE_3",
        "Voltage": "Voltage_2",
        "voltage": "voltage",
        "straße": "straße",
        "STRASSE": "STRASSE_2",
    }


def test_a_suffix_that_is_taken_gets_a_number() -> None:
    found = names_of(columns_of(), ["hour_field"], ["hour_field", "hour"])
    assert found == {"tag hour_field": "hour_field", "hour_field": "hour_field_field", "hour": "hour_field_2"}


def test_an_overflow_whose_name_is_taken_gets_a_number() -> None:
    columns = columns_of()
    columns.see(["n_double"], {"n": INTEGER, "n_text": BOOLEAN})
    assert columns.overflow(columns.fields["n"], TEXT) == "n_text_2"
    assert columns.overflow(columns.fields["n"], DOUBLE) == "n_double_2"
    assert columns.overflow(columns.fields["n"], TEXT) == "n_text_2"
    assert columns.overflow(columns.fields["n_text"], TEXT) == "n_text_text"
    table = canonical_table(points(0, tags={"n_double": "t"}, n=["x"], n_text=[True]), columns)
    assert rows_in([table])[0].items() >= {"n_double": "t", "n_text_2": "x", "n_text": True}.items()


def test_a_field_that_comes_later_under_the_name_of_an_overflow_has_a_column_of_its_own() -> None:
    columns = columns_of()
    columns.see((), {"n": INTEGER})
    assert columns.overflow(columns.fields["n"], TEXT) == "n_text"
    columns.see((), {"n_text": TEXT})
    assert columns.fields["n_text"].name == "n_text_field"
    assert (columns.sources.get("n_text"), columns.sources.get("n_text_field")) == ("n", "n_text")


@given(
    st.lists(
        st.sampled_from([*OURS, "x", "X", "x_field", "x_tag", "x_text", "x_2", "x_field_2", "ß", "ss"]), max_size=9
    ),
    st.lists(
        st.sampled_from([*OURS, "x", "X", "x_field", "x_tag", "x_text", "x_2", "x_field_2", "ß", "ss"]), max_size=9
    ),
)
@settings(max_examples=80, deadline=None)
def test_no_two_columns_share_a_name_and_each_says_whose_it_is(tags: list[str], fields: list[str]) -> None:
    columns = columns_of(device_tag="meter")
    for tag, field in zip([*tags, *[""] * len(fields)], [*fields, *[""] * len(tags)], strict=True):
        columns.see([tag] if tag else [], {field: INTEGER} if field else {})
        if field:
            columns.overflow(columns.fields[field], TEXT)
    own = [columns.tag_columns[tag] for tag in dict.fromkeys(tags)]
    own += [columns.fields[field].name for field in dict.fromkeys(fields)]
    own += [columns.overflow(columns.fields[field], TEXT) for field in dict.fromkeys(fields)]
    assert len({name.casefold() for name in own}) == len(own)
    assert {columns.sources.get(columns.fields[field].name) for field in fields} == set(fields)
    assert {columns.tag_names[columns.tag_columns[tag]] for tag in tags} == set(tags)
    measured = {"voltage", "current", "power", "temperature", "device_type", "location"}
    assert {name.casefold() for name in own} & {name.casefold() for name in OURS} <= measured


def test_an_ignored_tag_has_no_column_and_its_name_is_free_for_a_field() -> None:
    columns = columns_of()
    canonical_table(points(0, tags={"schema_version": "2", "phase": "A"}, schema_version=[1]), columns)
    assert columns.tags == {"device_type", "location", "phase"}
    assert columns.fields["schema_version"].name == "schema_version"


def test_the_tag_that_names_the_device_may_be_one_of_the_documented_ones() -> None:
    columns = columns_of(device_tag="location")
    columns.see(["device_id", "device_type"], {"location": DOUBLE})
    assert (columns.tag_columns["device_id"], columns.tag_columns["device_type"]) == ("device_id_tag", "device_type")
    assert columns.fields["location"].name == "location_field"


def test_a_type_is_decided_when_a_field_is_first_seen_and_kept() -> None:
    columns = columns_of()
    columns.see((), {"count": INTEGER})
    columns.see((), {"count": DOUBLE, "on": BOOLEAN})
    assert columns.fields["count"].types == ((EVER, INTEGER),)
    assert columns.fields["on"].types == ((EVER, BOOLEAN),)


def test_a_field_that_is_first_seen_with_several_types_is_a_number_when_it_can_be() -> None:
    assert type_of([INTEGER, DOUBLE]) == type_of([TEXT, DOUBLE, INTEGER]) == DOUBLE
    assert type_of([TEXT, INTEGER]) == type_of([BOOLEAN, INTEGER]) == INTEGER
    assert type_of([BOOLEAN, TEXT]) == BOOLEAN


def test_a_type_from_the_settings_decides_for_a_column_that_is_new() -> None:
    columns = columns_of(types={"count": DOUBLE, "serial": TEXT, "hour_field": UNSIGNED})
    table = canonical_table(points(0, count=[1], serial=["007"], hour=[7], other=[1]), columns)
    assert [str(table.schema.field(name).type) for name in ("count", "serial", "hour_field", "other")] == [
        "double",
        "string",
        "uint64",
        "int64",
    ]


def test_a_type_from_the_settings_is_for_fields_and_not_for_tags_or_overflows() -> None:
    file = LayoutFile(MemoryObjects(), "t", lambda _: tree_of())
    tree, _ = file.begin(NOON, wanted=lambda tree: tree.layouts[-1], types={}, ignored=IGNORED, dry_run=False)
    columns = columns_of(tree=tree, file=file, types={"phase": DOUBLE, "n_text": INTEGER})
    table = canonical_table(points(0, tags={"phase": "L1"}, n=[1.5]), columns)
    table = canonical_table(points(0, tags={"phase": "L1"}, n=["x"]), columns)
    assert rows_in([table])[0].items() >= {"phase": "L1", "n_text": "x"}.items()
    held = {each.name: each.types for each in file.change(lambda tree: tree).columns}
    assert (held["phase"], held["n_text"]) == (((EVER, TEXT),), ((EVER, TEXT),))


def test_the_types_of_a_day_are_those_that_hold_then() -> None:
    changed = Column("n", "field", "n", ((EVER, INTEGER), (date(2026, 2, 8), DOUBLE)))
    columns = columns_of(changed)
    today = canonical_table(points(0, n=[1]), columns)
    tomorrow = canonical_table(points(86_400 * 10**9, n=[1]), columns)
    long_ago = canonical_table(points(-NOON_NS - 5, n=[1]), columns)
    assert [table.schema.field("n").type for table in (today, tomorrow, long_ago)] == [
        pa.int64(),
        pa.float64(),
        pa.int64(),
    ]


def test_a_look_that_must_not_change_anything_adds_columns_for_itself_only() -> None:
    tree = tree_of()
    columns = columns_of(tree=tree)
    columns.see(["phase"], {"n": INTEGER})
    assert (columns.tag_columns["phase"], columns.fields["n"].name, tree.columns) == ("phase", "n", ())


def test_what_was_written_before_is_known_to_the_next_run() -> None:
    file = LayoutFile(MemoryObjects(), "t", lambda _: tree_of())

    def run() -> TreeColumns:
        tree, _ = file.begin(NOON, wanted=lambda tree: tree.layouts[-1], types={}, ignored=IGNORED, dry_run=False)
        return columns_of(tree=tree, file=file)

    first = run()
    first.see(["Phase"], {"phase": INTEGER})
    first.overflow(first.fields["phase"], TEXT)
    second = run()
    second.see(["Phase"], {"phase": DOUBLE})
    assert (second.tag_columns["Phase"], second.fields["phase"].name) == ("Phase", "phase_2")
    assert second.overflow(second.fields["phase"], TEXT) == "phase_2_text"
    assert second.overflow_kinds.get("phase_2_text") == TEXT
    assert second.fields["phase"].types == ((EVER, INTEGER),)


def test_a_warning_names_the_line_that_widens_a_column(caplog: pytest.LogCaptureFixture) -> None:
    columns = columns_of()
    canonical_table(points(0, n=[1]), columns)
    for _ in range(3):
        canonical_table(points(0, n=[1.5]), columns)
    [told] = [record.getMessage() for record in caplog.records]
    assert "EXPORT_COLUMN_TYPES=n=double" in told
    assert "n_double" in told


@pytest.fixture
def eager_threads() -> Iterator[None]:
    """Threads that take turns after every few instructions."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("eager_threads")
def test_a_column_that_one_thread_can_name_is_known_in_every_way() -> None:
    """Else rows that differ in a tag that is just added would be taken for one."""
    columns = columns_of()
    wrong: list[str] = []
    names = [f"n{number}" for number in range(40)]

    def watch() -> None:
        for name in names:
            while not has_tag(columns, name):
                continue
            if name not in columns.tags:
                wrong.append(name)

    watchers = [threading.Thread(target=watch) for _ in range(2)]
    for watcher in watchers:
        watcher.start()
    for name in names:
        columns.see([name], {})
    for watcher in watchers:
        watcher.join()
    assert wrong == []


def has_tag(columns: TreeColumns, name: str) -> bool:
    try:
        return bool(columns.tag_columns[name])
    except KeyError:
        return False


WHOLE = st.one_of(
    st.integers(-3, 3),
    st.integers(-(2**63), 2**63 - 1),
    st.sampled_from([2**53 - 1, 2**53, 2**53 + 1, -(2**53) - 1, -(2**53), 2**63 - 1, -(2**63)]),
)
LARGE = st.one_of(st.integers(0, 2**64 - 1), st.sampled_from([0, 2**53, 2**53 + 1, 2**63 - 1, 2**63, 2**64 - 1]))
FLOATS = st.one_of(
    st.floats(),
    st.integers(-5, 5).map(float),
    st.sampled_from([0.0, -0.0, 2.0**53, 2.0**53 + 2, -(2.0**53), 2.0**63, 2.0**64, 1e300, 5e-324, -1.0]),
)
KINDS: dict[str, tuple[pa.DataType, st.SearchStrategy[Any]]] = {
    "float": (pa.float64(), FLOATS),
    "int": (pa.int64(), WHOLE),
    "uint": (pa.uint64(), LARGE),
    "bool": (pa.bool_(), st.booleans()),
    "text": (
        pa.string(),
        st.text(st.characters(codec="utf-8"), max_size=6) | st.sampled_from(["1", "true"]),
    ),
}
VALUES = st.sampled_from(sorted(KINDS)).flatmap(lambda kind: st.tuples(st.just(kind), KINDS[kind][1]))


def blocks_of(values: Sequence[tuple[str, Any]]) -> PointColumns:
    """One point for each value, the field in one part for each type, as readers give it."""
    times = pa.array([NOON_NS + at for at in range(len(values))], pa.int64()).cast(TIMES)
    parts = [
        ("x", pa.array([value if kind == name else None for kind, value in values], arrow))
        for name, (arrow, _) in KINDS.items()
        if any(kind == name for kind, _ in values)
    ]
    return PointColumns(times, {}, parts)


def same(value: Any, found: Any) -> bool:
    """True when what was written is the value itself, whatever type holds it."""
    if isinstance(value, str):
        return isinstance(found, str) and found == value
    if isinstance(value, bool):
        return found is value or found == str(value).lower()
    if isinstance(value, float):
        return not isinstance(found, bool | str) and repr(float(found)) == repr(value)
    exact = Fraction(found) if isinstance(found, float) else Fraction(int(found))
    return not isinstance(found, bool) and exact == value


@pytest.mark.parametrize("kind", [DOUBLE, INTEGER, UNSIGNED, BOOLEAN, TEXT])
@given(values=st.lists(VALUES, min_size=1, max_size=12))
@example(values=[("uint", 2**64 - 1), ("int", -1), ("float", 0.5), ("bool", True), ("text", "x")])
@example(values=[("uint", 2**53 + 1), ("int", 2**53 + 1), ("float", 2.0**53)])
@settings(max_examples=60, deadline=None)
def test_every_value_lands_exactly_once_in_the_column_its_double_or_its_text(
    kind: str, values: list[tuple[str, Any]]
) -> None:
    columns = columns_of(Column("x", "field", "x", ((EVER, kind),)))
    table = canonical_table(blocks_of(values), columns)
    if "x" in table.column_names:
        assert table.schema.field("x").type == ARROW_TYPES[kind]
    for (_, value), row in zip(values, rows_in([table]), strict=True):
        landed = {name: row[name] for name in ("x", "x_double", "x_text") if name in row}
        assert len(landed) == 1
        assert same(value, *landed.values())
        if "x" not in landed:
            assert not fits(value, kind)


def fits(value: Any, kind: str) -> bool:
    """What the column itself has to hold, at the least."""
    if isinstance(value, bool):
        return kind == BOOLEAN
    if isinstance(value, str):
        return kind == TEXT
    if isinstance(value, float):
        return kind == DOUBLE
    whole: int = value
    held = {DOUBLE: abs(whole) <= 2**53, INTEGER: -(2**63) <= whole < 2**63, UNSIGNED: 0 <= whole < 2**64}
    return held.get(kind, False)


def test_values_of_one_field_in_two_types_meet_in_one_column() -> None:
    columns = columns_of()
    table = canonical_table(
        blocks_of([("int", 1), ("float", 2.5), ("uint", 3), ("text", "x"), ("bool", True)]), columns
    )
    found = [{k: v for k, v in row.items() if k.startswith("x")} for row in rows_in([table])]
    assert found == [{"x": 1.0}, {"x": 2.5}, {"x": 3.0}, {"x_text": "x"}, {"x_text": "true"}]


def test_no_rows_need_no_day() -> None:
    assert canonical_table(blocks_of([("int", 1)]), columns_of()).slice(0, 0).num_rows == 0
    empty = PointColumns(pa.array([], TIMES), {}, [("x", pa.array([], pa.int64()))])
    assert canonical_table(empty, columns_of()).num_rows == 0
    assert datetime(1970, 1, 1, tzinfo=UTC).date() == EVER
