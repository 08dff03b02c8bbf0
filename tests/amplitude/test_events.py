"""Lines of an export as rows of the seven tables."""

import gzip
import io
import json
import random
import zlib
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import IO, TYPE_CHECKING, Any, cast

import pytest

from app.amplitude.events import (
    BLOCK_BYTES,
    NO_UUID,
    NOT_JSON,
    NOT_TEXT,
    HourLines,
    LargeLine,
    blocks,
    lines_in,
    reader,
)
from app.core.runs import Stop
from app.core.windows import EPOCH, HOUR_SECONDS, window_at
from app.dwh.tables import TABLES
from app.product_events.hours import KEPT_LINE_BYTES, MAX_LINE_BYTES
from app.product_events.mapping import mapping

if TYPE_CHECKING:
    from app.product_events.pull import PullPipeline

ID = "0b1c6a6e-7c1d-4f2a-9d57-2f6f0a9a1b11"
SAMPLE: dict[str, Any] = {
    "$insert_id": "abc-1",
    "$schema": 12,
    "adid": None,
    "amplitude_attribution_ids": ["x", "y"],
    "amplitude_id": 2**53 + 1,
    "app": 187520,
    "city": "Berlin",
    "client_event_time": "2022-01-01 03:04:05.678000",
    "country": "Germany",
    "data": {"path": "/2/httpapi"},
    "device_brand": "Apple",
    "device_carrier": None,
    "device_family": "Apple iPhone",
    "device_id": "D-1",
    "device_manufacturer": "Apple",
    "device_model": "iPhone14,2",
    "device_type": "Apple iPhone",
    "event_id": 7,
    "event_properties": {"price": 1.5, "big": 2**60},
    "event_time": "2022-01-01 03:04:05.678000",
    "event_type": "open",
    "group_properties": {},
    "groups": {"plan": ["free"]},
    "ip_address": "203.0.113.7",
    "is_attribution_event": "true",
    "language": "German",
    "library": "amplitude-ios/8",
    "location_lat": 52.5,
    "location_lng": None,
    "os_name": "ios",
    "os_version": "15.1",
    "plan": None,
    "platform": "iOS",
    "region": "Land Berlin",
    "session_id": -1,
    "start_version": "1.0",
    "user_id": None,
    "user_properties": {"EHR_ID": "42", "Gender": "Female", "cohort_day": 3, "registered_via_app": "via app"},
    "uuid": ID.upper(),
    "version_name": "4.2",
    "nobody_said_that": {"a": [1]},
}


class Refused(list[tuple[str, bytes, int, str]]):
    """Lines that are not events: the reason, the bytes, the place and what is wrong."""

    def __call__(self, reason: str, line: bytes, number: int, detail: str) -> None:
        self.append((reason, line, number, detail))


class Choppy(io.BytesIO):
    """Gives so many bytes at a time."""

    def __init__(self, data: bytes, step: int) -> None:
        super().__init__(data)
        self._step = step

    def read(self, size: int | None = -1) -> bytes:
        return super().read(min(self._step, size or 0))


def text_of(*lines: Any) -> bytes:
    return b"".join((line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n" for line in lines)


def tables(*lines: Any, careful: bool = False, refused: Refused | None = None) -> dict[str, list[dict[str, Any]]]:
    made = reader().tables(text_of(*lines), Refused() if refused is None else refused, careful=careful)
    return {name: [dict(zip(rows.names, row, strict=True)) for row in rows.rows] for name, rows in made.items()}


@pytest.mark.parametrize("careful", [False, True])
def test_a_real_event_goes_to_all_seven_tables(careful: bool) -> None:  # noqa: FBT001 - both ways give the same
    made = tables(SAMPLE, careful=careful)
    at = "2022-01-01T03:04:05.678000Z"
    assert made["events_part"] == [
        {
            "uuid": ID,
            "event_type": "open",
            "event_time": at,
            "user_id": None,
            "platform": "iOS",
            "device_id": "D-1",
            "event_id": 7,
            "language": "German",
            "os_name": "ios",
            "os_version": "15.1",
            "session_id": -1,
            "start_version": "1.0",
            "version_name": "4.2",
        }
    ]
    assert made["mobile_devices"][0]["device_model"] == "iPhone14,2"
    person = made["permanent_user_properties"][0]
    assert person["ehr_id"] == 42
    assert (person["gender"], person["cohort_day"], person["registered_via_app"]) == ("female", 3, True)
    technical = made["technical_data"][0]
    assert json.loads(technical["amplitude_attribution_ids"]) == ["x", "y"]
    assert (technical["amplitude_id"], technical["is_attribution_event"], technical["plan_json"]) == (
        2**53 + 1,
        True,
        None,
    )
    assert json.loads(made["tmp_event_properties"][0]["event_properties_json"]) == {"price": 1.5, "big": 2**60}
    assert made["tmp_user_properties"][0]["migrated"] is False
    assert made["tmp_user_properties"][0]["event_time"] == at
    assert (made["user_locations"][0]["location_lat"], made["user_locations"][0]["region"]) == (52.5, "Land Berlin")


@pytest.mark.parametrize("service", ["amplitude", "appmetrica"])
def test_the_mapping_names_tables_and_columns_that_there_are(service: str) -> None:
    for name, places in mapping(service).places.items():
        table = next(each for each in TABLES if each.name == name)
        assert set(places) <= set(table.names)
        assert next(iter(places)) == table.key.name
    assert set(mapping(service).places) == {table.name for table in TABLES}
    assert all(set(mapping("amplitude").places[table.name]) == set(table.names) for table in TABLES)


@pytest.mark.parametrize(
    ("given", "record"), [(7, 7), ("7", 7), (7.0, 7), (None, None), ("N/A", None), ("no ehr", None), ("no_ehr", None)]
)
def test_a_health_record_is_a_number_or_none(given: Any, record: int | None) -> None:
    made = tables({**SAMPLE, "user_properties": {"EHR_ID": given}})
    assert [row["ehr_id"] for row in made.get("permanent_user_properties", [])] == ([] if record is None else [record])


@pytest.mark.parametrize(
    ("given", "said"),
    [
        *(("via app", True), ("1", True), (1, True), (True, True)),
        *(
            ("0", False),
            (0, False),
            (False, False),
            (1.0, True),
            ("0.0", False),
            ("unknown", None),
            ("N/A", None),
            (None, None),
        ),
    ],
)
def test_how_somebody_registered_is_said_in_many_ways(given: Any, said: bool | None) -> None:  # noqa: FBT001 - expected
    made = tables({**SAMPLE, "user_properties": {"EHR_ID": 1, "registered_via_app": given}})
    assert made["permanent_user_properties"][0]["registered_via_app"] is said


@pytest.mark.parametrize("newer", [{}, {"Gender": None}, {"Gender": ""}])
def test_the_older_name_of_the_gender_serves_when_the_newer_one_is_absent(newer: dict[str, Any]) -> None:
    made = tables({**SAMPLE, "user_properties": {"EHR_ID": 1, "gender": "MALE", **newer}})
    assert made["permanent_user_properties"][0]["gender"] == "male"


@pytest.mark.parametrize("text", ["2022-01-01 03:04:05", "2022-01-01T04:04:05.0+01:00", "2022-01-01 03:04:05.000"])
def test_instants_come_in_several_forms(text: str) -> None:
    assert tables({**SAMPLE, "event_time": text})["events_part"][0]["event_time"] == "2022-01-01T03:04:05.000000Z"


def test_an_event_with_nothing_but_its_uuid_is_a_row_in_the_table_of_events_by_which_it_is_counted() -> None:
    made = tables({"uuid": ID})
    assert [row["uuid"] for row in made.pop("events_part")] == [ID]
    assert set(made) == {"tmp_user_properties"}


NASTY = [
    b'{"uuid":"%s","event_type":"a\\u0000b","city":"x\\ud800y","event_properties":{"k\\u0000":"\\udc00"}}',
    b'{"uuid":"%s","event_id":123456789012345678901234567890,"amplitude_id":1e400,"event_properties":{"n":1e400}}',
    b'{"uuid":"%s","session_id":NaN,"location_lat":-Infinity,"event_properties":{"n":NaN}}',
    b'{"uuid":"%s","device_id":{"a":1},"user_properties":[1],"groups":"text","event_type":["x"],"user_id":7}',
    b'{"uuid":"%s","event_properties":' + b'{"a":' * 300 + b"1" + b"}" * 300 + b"}",
    b'{"uuid":"%s","uuid":"%s","event_type":"first","event_type":"last"}',
    b'{"uuid":"%s","session_id":' + b"9" * 5000 + b',"more":' + b"9" * 5000 + b',"city":{"n":' + b"9" * 5000 + b"}}",
    b'{"uuid":"%s","city":"\\ud800","event_properties":{"n":' + b"9" * 5000 + b"}}",
    b'{"uuid":"%s","user_properties":{"EHR_ID":' + b"9" * 5000 + b"}}",
]


@pytest.mark.parametrize("line", NASTY)
def test_what_no_database_stores_is_mended_and_the_event_kept(line: bytes) -> None:
    refused = Refused()
    made = tables(line.replace(b"%s", ID.encode()), SAMPLE, refused=refused)
    assert (len(made["events_part"]), refused) == (2, [])
    text = json.dumps(made)
    assert "\\u0000" not in text
    assert "\\ud800" not in text
    assert "Infinity" not in text
    for row in made["tmp_event_properties"]:
        json.loads(row["event_properties_json"], parse_constant=pytest.fail)


@pytest.mark.parametrize(
    "line", [b"[]", b"{", b'"text"', b'{"uuid":null}', b'{"uuid":"7"}', b"{}", b"9" * 5000, b"[" * 9000]
)
def test_a_line_that_is_no_event_is_counted_and_no_other_is_lost(line: bytes) -> None:
    refused = Refused()
    made = tables(SAMPLE, line, {**SAMPLE, "uuid": ID.replace("0", "1")}, refused=refused)
    assert (len(made["events_part"]), len(refused)) == (2, 1)


def test_the_digest_does_not_depend_on_the_order_and_tells_events_apart(tmp_path: Path) -> None:
    events = [{**SAMPLE, "uuid": f"{number:08x}{ID[8:]}"} for number in range(50)]
    pull = cast("PullPipeline", SimpleNamespace(key=lambda *_: "key", place=lambda *_: ("place",), spool=tmp_path))

    def digest(found: list[dict[str, Any]]) -> str:
        body = io.BytesIO(gzip.compress(text_of(*found)))
        with closing(HourLines(pull, "web", window_at(EPOCH, HOUR_SECONDS), body, Stop())) as hour:
            return hour.digest

    assert digest(events) == digest(events[::-1])
    assert len({digest(events), digest(events[1:]), digest([*events, events[0]])}) == 3


def test_lines_are_found_whatever_the_pieces_are() -> None:
    text = b"".join(b'{"n":%d}\n' % number for number in range(200_000)) + b'{"n":-1}'
    for size in (1 << 10, 99_991, len(text)):
        found = [block for block in blocks(Choppy(text, size)) if isinstance(block, bytes)]
        assert b"".join(found) == text
        assert all(block.endswith(b"\n") for block in found[:-1])
        assert max(map(len, found)) < BLOCK_BYTES + 100


def test_a_line_without_an_end_does_not_fill_memory() -> None:
    packer = zlib.compressobj(1, wbits=31)
    body = b"".join(packer.compress(b"x" * (1 << 20)) for _ in range(100)) + packer.flush()
    with gzip.open(io.BytesIO(body)) as text:
        (found,) = blocks(cast("IO[bytes]", text))
    assert isinstance(found, LargeLine)
    assert (len(found.head), found.size_bytes) == (KEPT_LINE_BYTES, 100 << 20)


@pytest.mark.parametrize("more", [0, 1])
@pytest.mark.parametrize("size", [1000, 1 << 18])
def test_a_line_is_too_large_by_its_length_alone_and_its_neighbours_stay(more: int, size: int) -> None:
    line = b"x" * (MAX_LINE_BYTES - 1 + more) + b"\n"
    text = b"before\n" * 3 + line + b"after\n" * 3 + b"last"
    found = list(blocks(Choppy(text, size)))
    assert [block.size_bytes for block in found if isinstance(block, LargeLine)] == [MAX_LINE_BYTES] * more
    assert b"".join(block.head + b"\n" if isinstance(block, LargeLine) else block for block in found) == text
    assert sum(map(lines_in, found)) == 8


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"uuid":"%s","city":"Z\xfcrich"}', NOT_TEXT),
        (b'{"uuid":"%s","event_properties":{"city":"Z\xfcrich"}}', NOT_TEXT),
        (b'{"uuid":"%s","nobody_reads_it":{"city":["Z\xfcrich"]}}', NOT_TEXT),
        (b'{"uuid":"%s","user_properties":{"nobody_reads_it":"\xed\xa0\x80"}}', NOT_TEXT),
        (b'{"uuid":"%s","city":"x"', NOT_JSON),
        (b'{"uuid":"%s"}{}', NOT_JSON),
        (b'["%s"]', NOT_JSON),
        (b'{"uuid":"%s"}{"uuid":"%s"}', NOT_JSON),
        (b'{"uuid":"%s0"}', NO_UUID),
    ],
)
def test_a_refused_line_keeps_its_bytes_its_reason_and_its_place(line: bytes, reason: str) -> None:
    refused, given = Refused(), line.replace(b"%s", ID.encode())
    other = {**SAMPLE, "uuid": ID.replace("0", "1")}
    made = tables(SAMPLE, given, other, refused=refused)
    assert [row["uuid"] for row in made["events_part"]] == [ID, ID.replace("0", "1")]
    ((*told, detail),) = refused
    assert told == [reason, given, 2]
    assert "rich" not in detail


def test_an_event_that_is_broken_over_two_lines_is_two_lines_that_are_not_events() -> None:
    refused = Refused()
    made = tables(SAMPLE, b'{"uuid":"%s",\n"city":"x"}' % ID.encode(), refused=refused)
    assert len(made["events_part"]) == 1
    assert [line for _, line, _, _ in refused] == [b'{"uuid":"%s",' % ID.encode(), b'"city":"x"}']


@pytest.mark.parametrize("member", [b'"cohort_day":1e400', b'"source":123456789012345678901234567890', b'"Gender":NaN'])
def test_a_number_that_no_column_holds_does_not_cost_its_event(member: bytes) -> None:
    refused = Refused()
    made = tables(b'{"uuid":"%s","user_properties":{"EHR_ID":7,%s}}' % (ID.encode(), member), SAMPLE, refused=refused)
    assert (len(made["events_part"]), refused) == (2, [])
    assert [row["ehr_id"] for row in made["permanent_user_properties"]] == [7, 42]


def test_a_changed_byte_costs_its_line_at_most_and_each_line_is_counted_once() -> None:
    chance = random.Random(5)  # noqa: S311 - places and bytes to change, no secret
    lines = [json.dumps({**SAMPLE, "uuid": f"{number:08x}{ID[8:]}"}).encode() for number in range(20)]
    text = b"\n".join(lines) + b"\n"
    for _ in range(400):
        at, byte = chance.randrange(len(text)), chance.choice(b'\xfc"\n,\0\r{9\\')
        changed = text[:at] + bytes([byte]) * chance.choice((1, 30)) + text[at + chance.randrange(2) :]
        refused, counted, rows = Refused(), 0, 0
        for block in blocks(io.BytesIO(changed)):
            counted += lines_in(block)
            made = reader().tables(block, refused)
            rows += len(made["events_part"].rows) if made else 0
        assert rows + len(refused) == counted
        assert rows >= len(lines) - 2
