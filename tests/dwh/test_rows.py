"""What a row may hold: strict, the same for every table, and named when it is wrong."""

import json
import random
import tracemalloc
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.db.database import instant_text
from app.dwh.rows import CheckedRows, RowFault, instant_texts, reader, repeated_key
from app.dwh.tables import TABLES
from warehouse import BY_NAME, rows_of, uuid_of

U = uuid_of(1)
NUL, NUL_TWICE = "\\u0000", "\\\\u0000"


def rows_in(checked: CheckedRows) -> list[tuple[Any, ...]]:
    return list(zip(*checked.columns, strict=True))


def read(table: str, *texts: str | bytes) -> Any:
    return reader(table).read([text.encode() if isinstance(text, str) else text for text in texts], 0)


def fault(table: str, text: str | bytes) -> RowFault:
    good = json.dumps(rows_of(BY_NAME[table], 1)[0])
    checked = read(table, good, text, good)
    assert len(rows_in(checked)) == 2
    found: RowFault
    (found,) = checked.faults
    assert found.index == 1
    return found


def one(table: str, **values: Any) -> dict[str, Any]:
    """The values of a row after reading, by column."""
    key = {"uuid": U} if BY_NAME[table].key.kind == "uuid" else {}
    checked = read(table, json.dumps({**key, **values}))
    assert checked.faults == ()
    return dict(zip(BY_NAME[table].names, rows_in(checked)[0], strict=True))


@pytest.mark.parametrize(
    ("table", "text", "field"),
    [
        ("events_part", "{}", "uuid"),
        ("events_part", '{"uuid":null}', "uuid"),
        ("events_part", '{"uuid":"x"}', "uuid"),
        ("events_part", f'{{"uuid":"{U}\\n"}}', "uuid"),
        ("events_part", f'{{"uuid":"{U}","colour":1}}', "colour"),
        ("events_part", f'{{"uuid":"{U}","id":1}}', "id"),
        ("events_part", f'{{"uuid":"{U}","event_type":7}}', "event_type"),
        ("events_part", f'{{"uuid":"{U}","user_id":1.5}}', "user_id"),
        ("events_part", f'{{"uuid":"{U}","user_id":true}}', "user_id"),
        ("events_part", f'{{"uuid":"{U}","event_id":"7"}}', "event_id"),
        ("events_part", f'{{"uuid":"{U}","event_id":1.0}}', "event_id"),
        ("events_part", f'{{"uuid":"{U}","event_id":{2**63}}}', "event_id"),
        ("events_part", f'{{"uuid":"{U}","event_id":{"9" * 5000}}}', "event_id"),
        ("events_part", f'{{"uuid":"{U}","event_time":1700000000}}', "event_time"),
        ("events_part", f'{{"uuid":"{U}","event_time":"yesterday"}}', "event_time"),
        ("events_part", f'{{"uuid":"{U}","event_time":"2026-02-30T00:00:00Z"}}', "event_time"),
        ("events_part", f'{{"uuid":"{U}","event_time":"0001-01-01T00:00:00+05:00"}}', "event_time"),
        ("events_part", f'{{"uuid":"{U}","platform":"a{NUL}b"}}', "platform"),
        ("events_part", f'{{"uuid":"{U}","platform":"a","platform":"b"}}', "platform"),
        ("events_part", f'{{"uuid":"{U}","platform" :"a","platform"\t:"b"}}', "platform"),
        ("events_part", f'{{"uuid":"{U}","platform":"a","\\u0070latform":"b"}}', "platform"),
        ("events_part", f'{{"uuid":"{U}","platform":"\\ud800"}}', "platform"),
        ("events_part", b'{"uuid":"' + U.encode() + b'","platform":"\xff"}', "platform"),
        ("events_part", "[]", ""),
        ("events_part", '"x"', ""),
        ("events_part", "{", ""),
        ("events_part", "null", ""),
        ("technical_data", f'{{"uuid":"{U}","plan_json":[1e400]}}', "plan_json"),
        ("technical_data", f'{{"uuid":"{U}","plan_json":[1e-400]}}', "plan_json"),
        ("technical_data", f'{{"uuid":"{U}","plan_json":0.{"1" * 1000}}}', "plan_json"),
        ("technical_data", f'{{"uuid":"{U}","plan_json":"\\udc00"}}', "plan_json"),
        ("mobile_devices", '{"device_id":""}', "device_id"),
        ("mobile_devices", f'{{"device_id":"{"x" * 513}"}}', "device_id"),
        ("permanent_user_properties", '{"ehr_id":"1"}', "ehr_id"),
        ("permanent_user_properties", f'{{"ehr_id":1,"cohort_day":{2**31}}}', "cohort_day"),
        ("permanent_user_properties", '{"ehr_id":1,"registered_via_app":"true"}', "registered_via_app"),
        ("technical_data", f'{{"uuid":"{U}","is_attribution_event":1}}', "is_attribution_event"),
        ("technical_data", f'{{"uuid":"{U}","plan_json":{{"a":1,"a":2}}}}', "a"),
        ("technical_data", f'{{"uuid":"{U}","plan_json":[{{"b":{{"a":1, "a":2}}}}]}}', "a"),
        ("technical_data", f'{{"uuid":"{U}","plan_json":{{"a":"{NUL}"}}}}', "plan_json"),
        ("technical_data", f'{{"uuid":"{U}","plan_json":{{"{NUL}":1}}}}', "plan_json"),
        ("technical_data", f'{{"uuid":"{U}","plan_json":"\\ud800"}}', "plan_json"),
        ("technical_data", f'{{"uuid":"{U}","plan_json":1e400}}', "plan_json"),
        ("technical_data", f'{{"uuid":"{U}","plan_json":{"[" * 101}{"]" * 101}}}', "plan_json"),
        ("user_locations", f'{{"uuid":"{U}","location_lat":NaN}}', "location_lat"),
        ("user_locations", f'{{"uuid":"{U}","location_lat":-Infinity}}', "location_lat"),
        ("user_locations", f'{{"uuid":"{U}","location_lat":1e400}}', "location_lat"),
        ("user_locations", f'{{"uuid":"{U}","location_lat":"55"}}', "location_lat"),
        ("tmp_user_properties", f'{{"uuid":"{U}","migrated":0}}', "migrated"),
    ],
)
def test_a_bad_value_is_named_with_row_and_field(table: str, text: str | bytes, field: str) -> None:
    found = fault(table, text)
    assert found.field == field
    assert found.message
    assert U not in found.message


def test_json_without_an_end_is_a_fault_of_its_row() -> None:
    assert fault("technical_data", f'{{"uuid":"{U}","plan_json":{"[" * 200_000}').field in ("", "plan_json")


def test_ids_may_come_as_integers_and_are_text() -> None:
    assert one("events_part", user_id=2**64 - 1, device_id=7)["user_id"] == "18446744073709551615"
    assert one("mobile_devices", device_id=7)["device_id"] == "7"


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("2026-02-07 12:34:56.789000", "2026-02-07T12:34:56.789000Z"),
        ("2026-02-07T12:34:56.789Z", "2026-02-07T12:34:56.789000Z"),
        ("2026-02-07T12:34:56", "2026-02-07T12:34:56.000000Z"),
        ("2026-02-07T00:30:00+05:30", "2026-02-06T19:00:00.000000Z"),
        ("0001-01-01T00:00:00Z", "0001-01-01T00:00:00.000000Z"),
        (None, None),
    ],
)
def test_instants_are_kept_in_utc(given: str | None, kept: str | None) -> None:
    assert one("events_part", event_time=given)["event_time"] == kept


def test_an_absent_value_is_null_and_a_default_holds_for_both() -> None:
    assert one("tmp_user_properties")["migrated"] is False
    assert one("tmp_user_properties", migrated=None)["migrated"] is False
    assert one("tmp_user_properties", migrated=True)["migrated"] is True
    assert set(one("technical_data", plan_json=None).values()) == {U, None}


@pytest.mark.parametrize(
    "value", ["a : b", ":x", '":', "\\u0000", "\\", '\\":', "\\u0022:", "日本", "\x7f", "</script>"]
)
def test_text_that_looks_suspicious_is_kept(value: str) -> None:
    assert one("user_locations", city=value)["city"] == value
    assert json.loads(one("technical_data", plan_json={value: [value]})["plan_json"]) == {value: [value]}


def test_an_escaped_backslash_before_u0000_is_no_nul() -> None:
    checked = read("events_part", f'{{"uuid":"{U}","platform":"a{NUL_TWICE}b"}}')
    assert checked.faults == ()
    assert "\\u0000" in rows_in(checked)[0][4]


def test_json_keeps_its_numbers_and_its_order() -> None:
    text = '{"b":18446744073709551616,"a":[0.1,1e-300,-0.0]}'
    assert one("technical_data", plan_json=json.loads(text))["plan_json"] == text


@pytest.mark.parametrize(
    ("sent", "kept"),
    [
        ('{ "a" :\t1.10 }', '{"a":1.10}'),
        ("123456789012345678901234567890", "123456789012345678901234567890"),
        (
            "[0.1000000000000000055511151231257827, 1E5,\n-0, 1.0e+2]",
            "[0.1000000000000000055511151231257827,1E5,-0,1.0e+2]",
        ),
        ('{"a b":" c , d ","e":"\\" f"}', '{"a b":" c , d ","e":"\\" f"}'),
        ('"1e-999 is text"', '"1e-999 is text"'),
        ("0e-999", "0e-999"),
    ],
)
def test_json_is_kept_as_written_but_for_its_blanks(sent: str, kept: str) -> None:
    checked = read("technical_data", f'{{"uuid":"{U}","plan_json":{sent}}}')
    assert checked.faults == ()
    assert dict(zip(BY_NAME["technical_data"].names, rows_in(checked)[0], strict=True))["plan_json"] == kept


def test_a_hundred_levels_are_read() -> None:
    deep: Any = 1
    for _ in range(100):
        deep = [deep]
    assert one("technical_data", plan_json=deep)["plan_json"].count("[") == 100


@pytest.mark.parametrize(
    "key",
    [
        "x" * 36,
        U.replace("-", "0"),
        U.replace("-", "_"),
        f" {U[1:]}",
        f"{U[:8]} -{U[10:]}",
        f"-{U[1:]}",
        f"{U[:9]}-{U[10:]}",
        f"{U[:-1]}\uff11",
        f"{U[:-1]}\n",
        U[:-1],
        f"{U}0",
    ],
)
def test_a_bad_uuid_is_found_among_whole_rows(key: str) -> None:
    rows = rows_of(BY_NAME["user_locations"], 3)
    rows[1]["uuid"] = key
    (found,) = read("user_locations", *map(json.dumps, rows)).faults
    assert (found.index, found.field) == (1, "uuid")


INSTANTS = st.datetimes(timezones=st.none() | st.sampled_from([UTC, timezone(timedelta(hours=5, minutes=30))]))


@given(
    instants=st.lists(INSTANTS.filter(lambda at: 1 < at.year < 9999), min_size=1, max_size=20),
    whole_seconds=st.booleans(),
)
def test_instants_are_the_same_together_and_one_by_one(instants: list[datetime], *, whole_seconds: bool) -> None:
    if whole_seconds:
        instants = [at.replace(microsecond=0) for at in instants]
    aware = [at.replace(tzinfo=at.tzinfo or UTC).astimezone(UTC) for at in instants]
    assert list(instant_texts(instants)) == list(map(instant_text, aware))


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
def test_the_quick_way_gives_what_the_way_row_by_row_gives(table: Any) -> None:
    rows = rows_of(table, 50)
    texts = [json.dumps(row, ensure_ascii=False) for row in rows]
    quick = read(table.name, *texts)
    slow = read(table.name, "{}", *texts)
    assert quick.faults == ()
    assert [list(row) for row in rows_in(quick)] == [list(row) for row in rows_in(slow)]
    assert list(quick.sizes) == list(slow.sizes) == [len(text.encode()) for text in texts]


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(st.sampled_from('a":\\ \tu0é'), max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(st.sampled_from('ab":\\ '), max_size=3), inner),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None)
@given(value=VALUES, spaced=st.booleans(), ascii_only=st.booleans(), seed=st.integers(0, 9))
def test_a_repeated_key_is_found_wherever_it_is(value: Any, seed: int, *, spaced: bool, ascii_only: bool) -> None:
    separators = (" , ", " : ") if spaced else (",", ":")
    text = json.dumps(value, separators=separators, ensure_ascii=ascii_only)
    row = f'{{"uuid":"{U}","plan_json":{text}}}'
    assert read("technical_data", row).faults == ()
    doubled = '{"k":1,"k":2}' if seed % 2 else '{"k" :1,"x":":","k": 2}'
    other = random.Random(seed).choice([f"[{text},{doubled}]", f'{{"q":{doubled},"r":{text}}}', doubled])  # noqa: S311
    bad = f'{{"uuid":"{U}","plan_json":{other}}}'
    assert repeated_key(bad.encode()) == "k"
    assert [each.field for each in read("technical_data", row, bad).faults] == ["k"]


@pytest.mark.parametrize(
    "value",
    [
        '[ "{}"]'.format("x" * 2_000_000),
        '[ "{}"]'.format("\\\\" * 1_000_000),
        '[1e-300, "{}"]'.format("\\n" * 1_000_000),
        '["{}", "\\u0022"]'.format("\\\\" * 1_000_000),
    ],
    ids=["a long text", "many backslashes", "a small number", "an escape that is looked at"],
)
def test_a_long_text_is_checked_in_memory_of_a_few_times_its_size(value: str) -> None:
    row = f'{{"uuid":"{uuid_of(1)}","event_properties_json":{value}}}'.encode()
    tracemalloc.start()
    try:
        checked = reader("tmp_event_properties").read([row], 0)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (len(checked.sizes), peak_bytes < 8 * len(row)) == (1, True), f"{peak_bytes / len(row):.0f} times"
