"""Bodies are cut into rows the same way whatever the blocks they come in; batches are dealt as documented."""

import gzip
import json
import random
import zlib
from collections.abc import Sequence
from contextlib import closing
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.dwh.request_parsing import BatchLimits, Form, ReceivedBody, WriteOptions, receive
from app.dwh.rows import CheckedRows
from app.dwh.tables import EVENTS, LOCATIONS, TECHNICAL, Table
from app.web.errors import Refusal, Refused
from warehouse import LIMITS, ndjson, rows_of, uuid_of

BIG = 1 << 20
U = uuid_of(1)


def blocks(body: bytes, seed: int) -> list[bytes]:
    """The body in pieces of random sizes, many of them tiny."""
    draw = random.Random(seed)  # noqa: S311
    pieces, start = [], 0
    while start < len(body):
        end = start + draw.choice([1, 2, 7, 100, 5000])
        pieces.append(body[start:end])
        start = end
    return pieces


class Pieces:
    """A body that comes in pieces."""

    def __init__(self, pieces: Sequence[bytes]) -> None:
        self._pieces = list(pieces)

    def read(self, count: int, /) -> bytes:
        piece = self._pieces.pop(0) if self._pieces else b""
        if len(piece) > count:
            self._pieces.insert(0, piece[count:])
        return piece[:count]


def take(
    table: Table,
    form: Form,
    pieces: Sequence[bytes],
    *,
    gzipped: bool = False,
    skip: bool = False,
    body_bytes: int = BIG,
    stream_bytes: int = BIG,
) -> ReceivedBody:
    how = WriteOptions(form, gzipped, skip)
    return receive(Pieces(pieces), table, how, LIMITS, body_bytes=body_bytes, stream_bytes=stream_bytes)


def values(received: ReceivedBody) -> list[list[Any]]:
    with closing(received):
        return [list(row) for block in received.blocks() for row in zip(*block, strict=True)]


def refused(table: Table, form: Form, sent: bytes, **how: Any) -> Refusal:
    with pytest.raises(Refused) as caught:
        take(table, form, [sent], **how)
    return caught.value.refusal


ROWS = rows_of(TECHNICAL, 60)
EXPECTED = values(take(TECHNICAL, "json", [json.dumps({"data": ROWS}).encode()]))


@pytest.mark.parametrize("seed", range(5))
def test_json_and_ndjson_give_the_same_rows_in_any_blocks(seed: int) -> None:
    envelope = b' \n{ "data" :\t' + json.dumps(ROWS, indent=seed).encode() + b" }\r\n "
    assert values(take(TECHNICAL, "json", blocks(envelope, seed))) == EXPECTED
    lines = ndjson(ROWS).replace(b"\n", b"\r\n\n")
    for body in (lines, lines.rstrip()):
        assert values(take(TECHNICAL, "ndjson", blocks(body, seed))) == EXPECTED


@pytest.mark.parametrize("seed", range(5))
def test_gzip_in_any_blocks_and_members_gives_the_same_rows(seed: int) -> None:
    lines = ndjson(ROWS)
    sent = gzip.compress(lines[:1000]) + gzip.compress(lines[1000:])
    received = take(TECHNICAL, "ndjson", blocks(sent, seed), gzipped=True)
    assert values(received) == EXPECTED


CELLS = st.text(st.sampled_from('a,";\n\r é'), max_size=6)


@settings(max_examples=200, deadline=None)
@given(cities=st.lists(CELLS, min_size=1, max_size=8), seed=st.integers(0, 99))
def test_csv_cells_come_as_written_whatever_they_hold(cities: list[str], seed: int) -> None:
    quoted = [city.replace('"', '""') for city in cities]
    lines = [f'{uuid_of(n)},"{city}",{n / 4}' for n, city in enumerate(quoted)]
    body = "\ufeffuuid,city,location_lat\n" + "\n".join(lines)
    received = take(LOCATIONS, "csv", blocks(body.encode(), seed))
    expected = [[uuid_of(n), n / 4, None, city or None, None, None, None] for n, city in enumerate(cities)]
    assert values(received) == expected


def test_csv_has_every_kind_of_value() -> None:
    head = "uuid,plan_json,amplitude_id,is_attribution_event,library"
    sent = f'{head}\r\n{U.upper()},"{{""a"": [1, ""x""]}}",-7,TRUE,007\r\n{uuid_of(2)},,,,\r\n'
    assert values(take(TECHNICAL, "csv", [sent.encode()])) == [
        [U, None, None, -7, True, "007", None, None, '{"a":[1,"x"]}'],
        [uuid_of(2), *[None] * 8],
    ]


def test_a_timestamp_of_csv_may_have_an_offset_of_whole_hours_as_postgresql_writes_it() -> None:
    sent = f"uuid,event_time\n{U},2026-02-07 12:34:56+00\n{uuid_of(2)},2026-02-07 12:34:56.5-05\n"
    found = [row[2] for row in values(take(EVENTS, "csv", [sent.encode()]))]
    assert found == ["2026-02-07T12:34:56.000000Z", "2026-02-07T17:34:56.500000Z"]


@pytest.mark.parametrize(
    ("line", "field"),
    [
        (f"{U},1.5,,", "amplitude_id: '1.5'"),
        (f'{U},"1,""library"":""x""",,', "amplitude_id: '1,"),
        (f"{U},,yes,", "is_attribution_event: 'yes'"),
        (f'{U},,,"{{"', "plan_json: '{'"),
        (f"{U},,,NaN", "plan_json: 'NaN'"),
        (f'{U},,,"""\\ud800"""', "plan_json: '\"\\\\ud800\"'"),
        (f"{U},,,{'[' * 3000}", "plan_json: '[[["),
        (f'{U},,,"1,""library"":2"', "plan_json: '1,"),
        (f"{U},,", "plan_json: the row has 3 cells, the header 4; the last cell is ''"),
        (f"{U},,,,x", "plan_json: 'x': the row has 5 cells"),
        ("x,,,", "uuid: not 'x'"),
        (f"{U},\udcff,,", "amplitude_id: '\\udcff'"),
        (f'{U},,,"""\udcff"""', "plan_json: '\"\\udcff\"'"),
    ],
)
def test_a_bad_cell_of_csv_is_named_with_row_column_and_value(line: str, field: str) -> None:
    sent = f"uuid,amplitude_id,is_attribution_event,plan_json\n{uuid_of(3)},1,true,[]\n{line}\n"
    sent += f"{uuid_of(4)},,,\n"
    received = take(TECHNICAL, "csv", [sent.encode(errors="surrogateescape")], skip=True)
    assert [row[0] for row in values(received)] == [uuid_of(3), uuid_of(4)]
    (fault,) = received.faults
    column, _, said = field.partition(": ")
    assert (fault.index, fault.field) == (1, column)
    assert said in fault.message


def test_a_long_cell_of_csv_is_stored_and_a_badly_quoted_one_tells_its_row() -> None:
    long = f"uuid,city\n{U},{'x' * 300_000}\n"
    assert len(values(take(LOCATIONS, "csv", [long.encode()]))[0][3]) == 300_000
    wrong = f'uuid,city\n{U},a\n{U},"b"c\n'.encode()
    assert "row 1: " in refused(LOCATIONS, "csv", wrong).message


IMPOSSIBLE = {
    "not a number": ("session_id", b"NaN"),
    "infinity": ("event_time", b"-Infinity"),
    "half of a pair": ("event_type", b'"\\ud800"'),
    "the other half in a key": ("event_type", b'{"\\udc00":1}'),
    "deep": ("event_type", b"[" * 3000 + b"]" * 3000),
    "deep objects": ("platform", b'{"a":' * 60_000 + b"1" + b"}" * 60_000),
    "no UTF-8": ("platform", b'"\xff"'),
    "control character": ("platform", b'"a\x01b"'),
    "long": ("event_id", b"9" * 5000),
    "large": ("session_id", b"1e400"),
    "in an unknown column": ("colour", b"[1, NaN]"),
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
@pytest.mark.parametrize("form", ["json", "ndjson"])
def test_a_value_that_json_cannot_hold_is_named_and_the_other_rows_are_stored(name: str, form: Form) -> None:
    field, value = IMPOSSIBLE[name]
    rows = [b'{"uuid":"%b"}' % uuid_of(n).encode() for n in range(3)]
    rows[1] = rows[1][:-1] + b',"language":"a, ]} \\" [{", "%b" : %b}' % (field.encode(), value)
    sent = b'{"data": [' + b" , ".join(rows) + b"]}" if form == "json" else b"\n".join(rows)
    refusal = refused(EVENTS, form, sent)
    assert (refusal.status, refusal.fault) == (422, f"data.1.{field}")
    received = take(EVENTS, form, blocks(sent, 1), skip=True)
    assert [row[0] for row in values(received)] == [uuid_of(0), uuid_of(2)]
    assert [(fault.index, fault.field) for fault in received.faults] == [(1, field)]


@pytest.mark.parametrize("form", ["json", "ndjson", "csv"])
@pytest.mark.parametrize("gzipped", [False, True])
@pytest.mark.parametrize("step", [1, 2, 1000])
def test_a_byte_order_mark_is_ignored_in_every_body(form: Form, *, gzipped: bool, step: int) -> None:
    row = json.dumps({"uuid": U})
    text = {"json": f'{{"data":[{row}]}}', "ndjson": row, "csv": f"uuid\n{U}"}[form]
    sent = b"\xef\xbb\xbf" + text.encode()
    sent = gzip.compress(sent) if gzipped else sent
    pieces = [sent[start : start + step] for start in range(0, len(sent), step)]
    received = take(EVENTS, form, pieces, gzipped=gzipped)
    assert [row[0] for row in values(received)] == [U]


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b'{"data":[{}', 400),
        (b"[" * 100_000, 400),
        (b'{"data":[NaN]}', 422),
        (b'{"data":[{"uuid":NaN}', 400),
        (b'{"data":[{"uuid":NaN,}]}', 400),
        (b'{"data":[{"uuid":nan}]}', 400),
        (b'{"data":[{"uuid":NaN}],"data":[]}', 400),
        (b'{"data":[]}', 400),
        (b"null", 422),
        (b' "x" ', 422),
        (b"1.5", 422),
        (b"[]", 422),
        (b"{}", 422),
        (b'{"data":{}}', 422),
        (b'{"data":[{}],"more":1}', 422),
        (b'{"data":[{"uuid":"x"}],"data":[{"uuid":"y"}]}', 422),
        (b'{"data":[{"uuid":"x"}]}', 422),
        (b"\xff\xfe{\x00", 400),
    ],
)
def test_a_json_body_of_another_shape_is_refused(sent: bytes, status: int) -> None:
    assert refused(EVENTS, "json", sent).status == status


def test_a_second_data_is_not_read_in_silence() -> None:
    row = json.dumps({"uuid": U})
    for sent in (f'{{"data":[{row}],"data":[{row}]}}', f'{{"data":[{row}],"data" :[{row}]}}'):
        assert refused(EVENTS, "json", sent.encode()).status in (400, 422)


@pytest.mark.parametrize(
    ("form", "row_bytes", "sent", "status"),
    [
        ("ndjson", BIG, b"\n \r\n", 400),
        ("ndjson", 1000, b"x" * 2000, 413),
        ("ndjson", 1000, b'{"uuid":"' + b"x" * 2000 + b'"}\n', 413),
        ("csv", BIG, b"", 400),
        ("csv", BIG, b"uuid\n", 400),
        ("csv", BIG, b"uuid,colour\n", 422),
        ("csv", BIG, b"uuid,uuid\n", 422),
        ("csv", BIG, b"platform\nx\n", 422),
        ("csv", BIG, b"uuid\n\xff\n", 422),
        ("csv", BIG, b'uuid\n"' + U.encode(), 400),
        ("csv", 1000, b'uuid\n"' + b"x" * 2000, 413),
        ("json", 1000, b" " * 2000, 413),
    ],
)
def test_what_cannot_be_cut_into_rows_is_refused(form: Form, row_bytes: int, sent: bytes, status: int) -> None:
    assert refused(EVENTS, form, sent, body_bytes=row_bytes).status == status


def test_two_rows_on_a_line_are_not_taken_for_one() -> None:
    row = json.dumps({"uuid": U}).encode()
    assert refused(EVENTS, "ndjson", row + b"," + row + b"\n").status == 422


def test_gzip_that_is_damaged_cut_or_a_bomb_is_refused() -> None:
    sent = gzip.compress(ndjson(ROWS))
    assert refused(TECHNICAL, "ndjson", sent[:-1], gzipped=True).status == 400
    assert refused(TECHNICAL, "ndjson", sent + b"junk", gzipped=True).status == 400
    assert refused(TECHNICAL, "ndjson", ndjson(ROWS), gzipped=True).status == 400
    assert refused(TECHNICAL, "ndjson", zlib.compress(ndjson(ROWS)), gzipped=True).status == 400
    bomb = zlib.compress((b" " * 1023 + b"\n") * 20_000, 9, wbits=31)
    assert refused(TECHNICAL, "ndjson", bomb, gzipped=True, stream_bytes=1 << 40).status == 413
    assert refused(TECHNICAL, "ndjson", bomb, gzipped=True).status == 413


def dealt(limits: BatchLimits, sizes: Sequence[int], group: int) -> list[int]:
    """The batch of the last row of each group in which rows come."""
    numbers: list[int] = []
    with closing(ReceivedBody(limits)) as received:
        for start in range(0, len(sizes), group):
            some = sizes[start : start + group]
            received.add(CheckedRows([[uuid_of(n) for n in range(len(some))]], some))
            numbers.append(received.batches)
        assert received.rows == len(sizes)
    return numbers


@settings(max_examples=200, deadline=None)
@given(
    sizes=st.lists(st.integers(2, 40), min_size=1, max_size=60),
    rows=st.integers(1, 20),
    size_bytes=st.integers(1, 200),
    group=st.integers(1, 30) | st.just(1),
)
def test_batches_are_cut_by_rows_and_then_by_bytes(sizes: list[int], rows: int, size_bytes: int, group: int) -> None:
    expected: list[int] = []
    batch = 0
    for start in range(0, len(sizes), rows):
        filled = size_bytes
        for size in sizes[start : start + rows]:
            if filled + size + 1 > size_bytes:
                batch, filled = batch + 1, 1
            filled += size + 1
            expected.append(batch)
    ends = [*range(group - 1, len(sizes) - 1, group), len(sizes) - 1]
    assert dealt(BatchLimits(rows, size_bytes), sizes, group) == [expected[end] for end in ends]


def test_a_thousand_five_hundred_rows_are_two_batches() -> None:
    assert dealt(LIMITS, [50] * 1500, 400)[-1] == 2
