"""Pages of items to the file of an hour: however they are read and paged, the bytes are those of a plain reference."""

import csv
import io
import json
from collections.abc import Sequence
from contextlib import closing
from datetime import timedelta
from hashlib import md5
from itertools import pairwise
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.core.errors import Transient
from app.core.windows import Window
from app.dynamo_to_drive.accounts import Accounts
from app.dynamo_to_drive.hour_file import (
    COPY_BYTES,
    FileShape,
    HourWriter,
    UnreadableFile,
    lines_in,
    read_file,
    readable,
)
from app.dynamo_to_drive.rows import MISSES, MOST_CELLS, AttributeValue, PageReader, Row, cell
from app.dynamo_to_drive.source import WantedItems
from app.dynamo_to_drive.timestamps import TimestampReader, ascend
from shipping import START

AT, HASH = "datetime_utc", "static_partition"
TIMES = TimestampReader()
SHAPE = FileShape(AT, ("id",), TIMES)
GUARDED = FileShape(AT, ("id",), TIMES, escape=True)
FORMS = ("{:%Y-%m-%dT%H:%M:%S}Z", "{:%Y-%m-%dT%H:%M:%S}", "{:%Y-%m-%d %H:%M:%S}.250Z", "{:%Y-%m-%dT%H:%M:%S}.5+00:00")

Item = dict[str, dict[str, Any]]
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=6) | st.sampled_from(
    ["=1", "'", 'a"b', "a,b", "\r\n"]
)
numbers = st.sampled_from(["0", "-1.50", "12345678901234567890123456789012345678", "1E-130", "7"])
leaves = st.one_of(
    st.builds(lambda text: {"S": text}, texts),
    st.builds(lambda text: {"N": text}, numbers),
    st.just({"B": "AAH/"}),
    st.builds(lambda flag: {"BOOL": flag}, st.booleans()),
    st.just({"NULL": True}),
    st.builds(lambda found: {"SS": found}, st.lists(texts, min_size=1, max_size=3, unique=True)),
    st.builds(lambda found: {"NS": found}, st.lists(numbers, min_size=1, max_size=3, unique=True)),
)
values = st.recursive(
    leaves,
    lambda inner: (
        st.builds(lambda found: {"L": found}, st.lists(inner, max_size=2))
        | st.builds(lambda found: {"M": found}, st.dictionaries(texts, inner, max_size=2))
    ),
    max_leaves=4,
)
names = st.sampled_from(["temp", "id", "ph,total", 'a"b', "line\nend", "é", "=x", "f0", HASH]) | texts.filter(bool)
plain = st.sampled_from([{"N": "1.5"}, {"N": "2"}, {"S": "x"}, {"S": "y,z"}, {"B": "AA=="}])


@st.composite
def pages(draw: st.DrawFn) -> list[list[Item]]:
    """Mostly rows of one shape, as machines write them; now and then anything else."""
    shape = draw(st.dictionaries(st.sampled_from(["temp", "id", "salinity", HASH]), plain, max_size=4))
    form = draw(st.sampled_from(FORMS))
    made: list[list[Item]] = []
    second = 0
    for _ in range(draw(st.integers(0, 6))):
        page: list[Item] = []
        for _ in range(draw(st.integers(0, 4))):
            second += draw(st.sampled_from([1, 1, 1, 1, 0, -3]))
            odd = draw(st.integers(0, 9)) == 0
            others = draw(st.dictionaries(names, values, max_size=3)) if odd else {**shape, **counted(len(page))}
            at = (draw(st.sampled_from(FORMS)) if odd else form).format(START + timedelta(seconds=second))
            page.append({**others, AT: {"S": at}})
        made.append(page)
    return made


def counted(number: int) -> Item:
    """Tells rows of one key apart, so that the later one is known."""
    return {"number": {"N": str(number)}}


def file_of(found: Sequence[Sequence[Item]], shape: FileShape, left_out: str = "") -> bytes:
    read = PageReader(AT, left_out)
    with closing(HourWriter(shape)) as writer:
        for page in found:
            rows = read_whole(read, json.dumps(page).encode())
            writer.add(read.columns, rows)
        hour = writer.finish()
    with hour.file:
        content = hour.file.read()
    assert (hour.digest, hour.size_bytes) == (md5(content, usedforsecurity=False).hexdigest(), len(content))
    return content


def reference(items: Sequence[Item], shape: FileShape, left_out: str = "") -> bytes:
    """All rows at once, sorted, the later one of two with a key, by csv.writer."""
    if not items:
        return b""
    columns = [AT, *sorted({name for one in items for name in one} - {AT, left_out})]
    rows: dict[tuple[str, ...], list[str]] = {}
    for one in items:
        row = [cell(msgspec.convert(one[name], AttributeValue)) if name in one else "" for name in columns]
        rows[(*TIMES.rank(row[0]), *(row[columns.index(name)] for name in shape.key if name in columns), row[0])] = row
    out = io.StringIO()
    guard = [columns, *(rows[order] for order in sorted(rows))]
    csv.writer(out, lineterminator="\r\n").writerows([guarded(row) for row in guard] if shape.escape else guard)
    return out.getvalue().encode()


def guarded(row: Sequence[str]) -> list[str]:
    return [f"'{text}" if text[:1] in tuple("=+-@\t\r'") and not is_number(text) else text for text in row]


def is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


@settings(max_examples=150, deadline=None)
@given(pages(), st.sampled_from([SHAPE, GUARDED]), st.sampled_from(["", HASH]))
def test_the_file_is_that_of_a_plain_reference_however_the_rows_were_paged(
    found: list[list[Item]], shape: FileShape, left_out: str
) -> None:
    items = [one for page in found for one in page]
    expected = reference(items, shape, left_out)
    assert file_of(found, shape, left_out) == expected
    assert file_of([items], shape, left_out) == expected


@settings(max_examples=60, deadline=None)
@given(pages(), st.sampled_from([SHAPE, GUARDED]))
def test_a_file_read_back_and_written_again_is_the_same(found: list[list[Item]], shape: FileShape) -> None:
    read = PageReader(AT, "")
    with closing(HourWriter(shape)) as first, closing(HourWriter(shape)) as second:
        for page in found:
            rows = read_whole(read, json.dumps(page).encode())
            first.add(read.columns, rows)
        once = first.finish()
        second.add_rows(read_file(lines_in(once.file), escaped=shape.escape))
        again = second.finish()
    with once.file, again.file:
        assert (again.digest, again.rows) == (once.digest, once.rows)


def read_whole(read: PageReader, page: bytes) -> list[Row]:
    return [row for rows in read.read(page) for row in rows]


def page_of(letters: dict[str, str], rows: int) -> bytes:
    """A page as machines write it; the letter of each attribute is the same in all rows."""
    made = [
        {AT: {"S": f"2026-02-07T12:00:{row:02d}Z"}, **{name: {letter: "AA=="} for name, letter in letters.items()}}
        for row in range(rows)
    ]
    return json.dumps(made).encode()


def test_pages_of_a_known_shape_are_read_in_one_step_and_others_are_not() -> None:
    """By what the rows are: those of one step are tuples, those that are read value by value are lists."""
    read, shape = PageReader(AT, ""), {"temp": "N", "note": "S", "body": "B"}
    steps = [
        {type(row) for row in read_whole(read, page_of(letters, 3))}
        for letters in (
            shape,  # unknown yet
            shape,
            {name: shape[name] for name in reversed(shape)},  # in another order
            {"temp": "N"},  # fewer
            {**shape, "new": "N"},  # one more
            shape,
            {**shape, "temp": "S"},  # another type
            shape,
        )
    ]
    assert [step == {list} for step in steps[:7]] == [True, False, False, False, True, False, True]
    assert read_whole(read, page_of(shape, 1)) == [["2026-02-07T12:00:00Z", "AA==", "", "AA==", "AA=="]]
    assert read._misses == 2  # noqa: SLF001 - rows with a column of two types are lists in either way


def test_a_table_with_ever_new_attributes_is_read_whole_to_its_end() -> None:
    found = [
        [{AT: {"S": f"2026-02-07T12:00:{second:02d}Z"}, f"a{second}": {"N": str(second)}}]
        for second in range(3 * MISSES)
    ]
    assert file_of(found, SHAPE) == reference([one for page in found for one in page], SHAPE)


def test_a_page_whose_items_all_have_attributes_of_their_own_is_read_in_parts_that_fit_into_memory() -> None:
    found = [{AT: {"S": f"2026-02-07T12:00:00.{number}Z"}, f"a{number}": {"N": "1"}} for number in range(3000)]
    read = PageReader(AT, "")
    parts = [len(rows) for rows in read.read(json.dumps(found).encode())]
    assert sum(parts) == 3000
    assert max(parts) * len(read.columns) <= MOST_CELLS


def test_a_row_of_the_next_hour_is_dropped_with_the_columns_that_only_it_has() -> None:
    window = Window(START, START + timedelta(hours=1))
    low, high = (str(int(at.timestamp()) * 1000) for at in (window.start, window.end))
    accounts = Accounts("at")
    read = PageReader("at", "", WantedItems(TIMES, window, accounts))
    rows = [{"at": {"N": low}, "temp": {"N": "1"}}, {"at": {"N": f"{int(high) - 1}.999"}, "temp": {"N": "2"}}]
    last = [{"at": {"N": high}, "temp": {"N": "3"}}, {"at": {"N": f"{high}.0"}, "new": {"N": "4"}}]
    assert [list(row) for row in read_whole(read, json.dumps(rows + last).encode())] == [
        [low, "1"],
        [f"{int(high) - 1}.999", "2"],
    ]
    assert read.columns == ("at", "temp")
    assert read_whole(read, json.dumps(last[:1]).encode()) == []
    assert read_whole(read, json.dumps(last).encode()) == []
    assert read.columns == ("at", "temp")
    assert (read.items, read.rows, accounts.set_aside) == (7, 2, 0)


@pytest.mark.parametrize("body", [b"", b"[", b'[{"a":5}]', b'{"a":1}', b'[{"a":{"N":1}}]'])
def test_what_is_no_page_is_transient_also_after_good_ones(body: bytes) -> None:
    read = PageReader(AT, "")
    for _ in range(2):
        with pytest.raises(Transient):
            read_whole(read, body)
        good = [{AT: {"S": "2026-02-07T12:00:00Z"}, "temp": {"N": "1"}}]
        assert [list(row) for row in read_whole(read, json.dumps(good).encode())] == [["2026-02-07T12:00:00Z", "1"]]


SECONDS = ("2026-02-07T12:00:00", "2026-02-07T12:00:01", "2026-02-07 12:00:00")
ALIKE = (  # texts of one length, whose own order is not always that of time
    [second + zone for second in SECONDS for zone in ("+00:00", "-05:00")],
    [f"{SECONDS[0]}.{tenth}{other}{zone}" for tenth in "05" for other in "0+" for zone in "Z0"],
    ["10000", "1000²", "10010", "1001²", "1000٣", "1E+03", "1E-03"],
    [f"1770465600.{tenth}{other}" for tenth in "05" for other in "05"],
    ["2026-02-07T12:00:00Z", "17704656001234567890", "1770465600.123456789"],
)
stamps = st.sampled_from(ALIKE).flatmap(lambda found: st.lists(st.sampled_from(found), min_size=1, max_size=3))
any_stamps = st.lists(st.text("0123456789-T.Z+ ", max_size=24), min_size=1, max_size=3)


@settings(max_examples=400, deadline=None)
@given((stamps | any_stamps).map(sorted))
def test_texts_that_ascend_have_ranks_that_ascend(found: list[str]) -> None:
    if ascend(found):
        for times in (TIMES, TimestampReader("s"), TimestampReader("ms")):
            ranks = [times.rank(text) for text in found]
            assert all(earlier < later for earlier, later in pairwise(ranks))


@pytest.mark.parametrize("form", ["{:%Y-%m-%dT%H:%M:%S}Z", "{:%Y-%m-%dT%H:%M:%S.%f}Z", "{:%Y-%m-%d %H:%M:%S}+00:00"])
def test_what_machines_write_ascends(form: str) -> None:
    found = [form.format(START + timedelta(seconds=second, milliseconds=1)) for second in range(0, 4000, 7)]
    assert ascend(found)
    assert not ascend(found[::-1])
    assert not ascend([*found[:3], found[2]])
    assert ascend([str(number) for number in range(1_770_465_600, 1_770_465_700)])


@pytest.mark.parametrize(
    ("text", "written", "guard"),
    [
        ("-1.5", "-1.5", ""),
        ("1e3", "1e3", ""),
        ("=1+1", "=1+1", "'"),
        ("@a", "@a", "'"),
        ("'a", "'a", "'"),
        ('a"b', '"a""b"', ""),
        ("a,b", '"a,b"', ""),
        ("a\nb", '"a\nb"', ""),
        ("a\rb", '"a\rb"', ""),
    ],
)
def test_a_cell_is_quoted_where_it_must_be_and_guarded_where_a_spreadsheet_would_count(
    text: str, written: str, guard: str
) -> None:
    item = {AT: {"S": "2026-02-07T12:00:00Z"}, "v": {"S": text}}
    line = f"2026-02-07T12:00:00Z,{guard}{written}\r\n"
    assert file_of([[item]], SHAPE) == f"{AT},v\r\n2026-02-07T12:00:00Z,{written}\r\n".encode()
    assert file_of([[item]], GUARDED) == f"{AT},v\r\n{line}".encode()
    (row,) = read_file(io.StringIO(f"{AT},v\r\n{line}", newline=""), escaped=True)
    assert row["v"] == text


@pytest.mark.parametrize("end", ["", "\r\n"])
def test_lines_longer_than_what_is_read_at_once_and_a_last_one_without_an_end_are_read_whole(end: str) -> None:
    lines = ["a,b\r\n", f"{'x' * (2 * COPY_BYTES)},1\r\n", *(f"{n},{'y' * 1000}\r\n" for n in range(400)), f"z,2{end}"]
    assert list(lines_in(io.BytesIO("".join(lines).encode()))) == lines
    with closing(HourWriter(SHAPE)) as writer:
        for page in range(3):  # segments that overlap are read again, each from its own place
            writer.add_rows(row_of(second, page) for second in range(page, 3000, 3))
        hour = writer.finish()
    with hour.file:
        assert list(read_file(lines_in(hour.file), escaped=False)) == [row_of(n, n % 3) for n in range(3000)]


def row_of(second: int, page: int) -> dict[str, str]:
    return {AT: f"{START + timedelta(seconds=second):%Y-%m-%dT%H:%M:%SZ}", "text": f"{page}" * 200}


def test_rows_that_were_there_already_are_counted_in_a_page_and_between_pages() -> None:
    rows = [row_of(second, 0) for second in (1, 2)]
    with closing(HourWriter(SHAPE)) as writer:
        for given in ([*rows, rows[1]], rows):
            writer.add_rows(given)
        hour = writer.finish()
    hour.close()
    assert (hour.rows, hour.repeated, hour.new_rows, hour.sums) == (2, 3, 2, {})


class CountedReads(io.BytesIO):
    taken_bytes = 0

    def read(self, size: int | None = -1, /) -> bytes:
        found = super().read(size)
        self.taken_bytes += len(found)
        return found


def test_a_line_longer_than_any_row_is_refused_before_it_is_read_whole() -> None:
    file = CountedReads(b"datetime_utc,temp\r\n2026-02-07T12:00:00Z," + bytes(80 << 20))
    with pytest.raises(UnreadableFile, match="line is too long"), readable("hour"):
        list(read_file(lines_in(file), escaped=False))
    assert file.taken_bytes < 40 << 20
