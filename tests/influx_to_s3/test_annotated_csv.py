"""The parser of annotated CSV: the contract's own examples, any cutting, and every way to cut an answer off."""

import math
import random
import time
from collections.abc import Iterable, Sequence
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.core.errors import AppError, Permanent, Transient
from app.influx_to_s3.annotated_csv import CsvBlock, read_blocks
from app.influx_to_s3.reader import QueryTooLarge
from simulators.annotated_csv import AnnotatedCsv
from simulators.flux_steps import TIME, Cells, Column, Table
from simulators.flux_steps import table as made_table

CONTRACT = (
    b"#datatype,string,long,dateTime:RFC3339,dateTime:RFC3339,dateTime:RFC3339,string,string,double\r\n"
    b"#group,false,false,true,true,false,true,true,false\r\n"
    b"#default,_result,,,,,,,\r\n"
    b",result,table,_start,_stop,_time,_measurement,host,_value\r\n"
    b",,0,2018-04-17T00:00:00Z,2018-04-17T00:05:00Z,2018-04-17T00:00:00Z,cpu,A,42\r\n"
    b",,0,2018-04-17T00:00:00Z,2018-04-17T00:05:00Z,2018-04-17T00:00:01Z,cpu,A,43\r\n"
    b"\r\n"
)
EMPTY_TABLE = (
    b"#datatype,string,long,dateTime:RFC3339,dateTime:RFC3339,dateTime:RFC3339,string,string,double\r\n"
    b"#group,false,false,true,true,false,true,true,false\r\n"
    b"#default,_result,0,2018-04-17T00:00:00Z,2018-04-17T00:05:00Z,,cpu,A,\r\n"
    b",result,table,_start,_stop,_time,_measurement,host,_value\r\n"
    b"\r\n"
)
ERROR_TABLE = (
    b"\r\n#datatype,string,string\r\n#group,true,true\r\n#default,,\r\n,error,reference\r\n,engine: unexpected EOF,\r\n"
)
SIZES = (16, 100, 1000, 10_000)


def head(*columns: tuple[str, str], groups: str = "", defaults: str = "") -> bytes:
    """Annotations and header of a block; `columns` are names and types."""
    names = ",".join(name for name, _ in columns)
    types = ",".join(kind for _, kind in columns)
    groups = groups or ",".join("false" for _ in columns)
    defaults = defaults or "," * (len(columns) - 1)
    return (
        f"#datatype,string,long,{types}\r\n#group,false,false,{groups}\r\n#default,_result,,{defaults}\r\n"
        f",result,table,{names}\r\n"
    ).encode()


def parsed(body: bytes | Iterable[bytes], block_bytes: int = 1 << 20) -> list[CsvBlock]:
    return list(read_blocks([body] if isinstance(body, bytes) else body, block_bytes))


def rows(blocks: Sequence[CsvBlock]) -> list[tuple[Any, ...]]:
    """Names, places in the group key, types and cells of each row, whatever block it came in; NaN as text, since it
    differs from itself.
    """
    found = []
    for block in blocks:
        types = tuple(str(column.type) for column in block.columns)
        plain = [column.cast(pa.int64()) if pa.types.is_timestamp(column.type) else column for column in block.columns]
        for row in zip(*(column.to_pylist() for column in plain), strict=True):
            cells = tuple("nan" if isinstance(cell, float) and math.isnan(cell) else cell for cell in row)
            found.append((tuple(block.grouped), tuple(block.names), types, cells))
    return found


def cells(blocks: Sequence[CsvBlock]) -> list[tuple[Any, ...]]:
    return [row[3] for row in rows(blocks)]


def cut(body: bytes, seed: int) -> list[bytes]:
    """The body in pieces of odd sizes, empty ones among them."""
    draw = random.Random(seed)  # noqa: S311 - sizes of pieces are no secret
    pieces, at = [], 0
    while at < len(body):
        size = draw.choice((0, 1, 2, 3, 7, 50, 1000))
        pieces.append(body[at : at + size])
        at += size
    return pieces


def test_the_example_of_the_contract_gives_its_rows_with_types_and_group_key() -> None:
    [block] = parsed(CONTRACT)
    assert block.names == ["_start", "_stop", "_time", "_measurement", "host", "_value"]
    assert block.grouped == [True, True, False, True, True, False]
    assert block.columns[2].type == pa.timestamp("ns", "UTC")
    assert [block.columns[at].to_pylist() for at in (4, 5)] == [["A", "A"], [42.0, 43.0]]


def test_a_tag_that_is_known_gives_no_column_and_a_field_of_its_name_does() -> None:
    columns = ("_time", TIME), ("device_id", "string"), ("voltage", "double")
    rows_of_one = b",,0,2026-02-02T00:00:00Z,D1,1.5\r\n\r\n"
    tag, field = (
        [
            block.names
            for block in read_blocks([head(*columns, groups=groups) + rows_of_one], known=frozenset({"device_id"}))
        ]
        for groups in ("false,true,false", "false,false,false")
    )
    assert tag == [["_time", "voltage"]]
    assert field == [["_time", "device_id", "voltage"]]


def test_data_may_have_the_names_of_the_envelope_and_one_name_twice() -> None:
    columns = (("result", "string"), ("table", "long"), ("v", "double"), ("v", "string"), ("", "string"))
    body = head(*columns, groups="true,false,false,false,false") + b",,0,success,7,1.5,text,x\r\n\r\n"
    [block] = parsed(body)
    assert block.names == ["result", "table", "v", "v", ""]
    assert block.grouped == [True, False, False, False, False]
    assert cells([block]) == [("success", 7, 1.5, "text", "x")]


def test_an_answer_without_tables_is_one_blank_line_and_no_error() -> None:
    assert parsed(b"\r\n") == []


def test_an_empty_table_gives_no_rows_and_hides_none_behind_it() -> None:
    body = EMPTY_TABLE + CONTRACT
    assert cells(parsed(body)) == cells(parsed(CONTRACT))
    assert cells(parsed(CONTRACT + EMPTY_TABLE)) == cells(parsed(CONTRACT))
    assert cells(parsed(EMPTY_TABLE)) == []


def test_a_newline_inside_the_key_of_an_empty_table_does_not_end_the_annotation() -> None:
    body = EMPTY_TABLE.replace(b",cpu,A,", b',cpu,"A\r\nB",') + CONTRACT
    for size in SIZES:
        assert cells(parsed(body, size)) == cells(parsed(CONTRACT))


def test_annotations_may_come_in_any_order() -> None:
    datatype, group, default, rest = CONTRACT.split(b"\r\n", 3)
    body = b"\r\n".join((default, group, datatype, rest))
    assert rows(parsed(body)) == rows(parsed(CONTRACT))


def test_each_block_is_parsed_by_its_own_header() -> None:
    first = head(("_time", "dateTime:RFC3339"), ("power", "long")) + b",,0,2026-02-07T12:00:00Z,7\r\n\r\n"
    second = head(("power", "double"), ("on", "boolean"), ("_time", "dateTime:RFC3339"))
    second += b",,1,7.5,true,2026-02-07T12:00:01.000000009Z\r\n,,1,,false,2026-02-07T12:00:02Z\r\n\r\n"
    blocks = parsed(first + second)
    assert [block.names for block in blocks] == [["_time", "power"], ["power", "on", "_time"]]
    assert blocks[1].columns[0].to_pylist() == [7.5, None]
    assert blocks[1].columns[2].cast(pa.int64()).to_pylist()[0] % 10**9 == 9


def test_several_results_number_their_tables_anew_and_all_their_rows_count() -> None:
    second = CONTRACT.replace(b"_result", b"other").replace(b",42\r\n", b",44\r\n")
    assert [row[-1] for row in cells(parsed(CONTRACT + second))] == [42.0, 43.0, 44.0, 43.0]


def test_an_empty_cell_means_the_default_of_its_column() -> None:
    columns = (("name", "string"), ("count", "long"), ("ok", "boolean"), ("_time", "dateTime:RFC3339"))
    body = head(*columns, defaults="none,7,true,2026-02-07T12:00:00Z") + b",,0,,,,\r\n,,0,a,1,false,\r\n\r\n"
    noon = 1_770_465_600 * 10**9
    assert cells(parsed(body)) == [("none", 7, True, noon), ("a", 1, False, noon)]


def test_floats_may_be_infinite_or_no_number_and_integers_as_large_as_they_come() -> None:
    columns = (("f", "double"), ("u", "unsignedLong"), ("i", "long"))
    body = head(*columns)
    for values in (
        "NaN,18446744073709551615,-9223372036854775808",
        "+Inf,0,9223372036854775807",
        "-Inf,,",
        "0.0000001,,",
    ):
        body += f",,0,{values}\r\n".encode()
    assert cells(parsed(body + b"\r\n")) == [
        ("nan", 2**64 - 1, -(2**63)),
        (math.inf, 0, 2**63 - 1),
        (-math.inf, None, None),
        (1e-7, None, None),
    ]


def test_text_keeps_quotes_commas_newlines_and_number_signs() -> None:
    body = head(("s", "string"), ("t", "string"))
    body += b',,0,"a""b,c","#x\r\n#y\r\n\r\n,z"\r\n,,0,#default,"\r\n"\r\n,,0," ",NaN\r\n\r\n'
    for size in SIZES:
        assert cells(parsed(body, size)) == [('a"b,c', "#x\n#y\n\n,z"), ("#default", "\n"), (" ", "NaN")]


def test_texts_of_many_lines_take_linear_time_also_where_the_lines_look_like_annotations() -> None:
    def seconds(line: str, lines: int, texts: int) -> float:
        text = f"{line}\r\n" * lines
        body = head(("_value", "string")) + "".join(f',,0,"{text}"\r\n' for _ in range(texts)).encode()
        chunks = [body[at : at + (1 << 18)] for at in range(0, len(body), 1 << 18)]
        began = time.process_time()
        assert cells(parsed(chunks)) == [(text.replace("\r\n", "\n"),)] * texts
        return time.process_time() - began

    short = seconds("a b", 200, 1000)
    assert seconds("# a", 200, 1000) < 100 * short
    assert seconds("a", 10_000, 400) < 100 * short


def test_thousands_of_tiny_tables_of_one_schema_come_in_few_blocks() -> None:
    body = b"".join(
        head(("_time", "dateTime:RFC3339"), ("v", "double")) + f",,{n},2026-02-07T12:00:00Z,{n}\r\n\r\n".encode()
        for n in range(3000)
    )
    blocks = parsed(body)
    assert len(blocks) == 1
    assert blocks[0].columns[1].to_pylist() == list(map(float, range(3000)))


def test_an_error_table_behind_rows_is_an_error() -> None:
    for size in SIZES:
        with pytest.raises(Transient, match="engine: unexpected EOF"):
            parsed(CONTRACT[:-2] + ERROR_TABLE, size)


def test_an_error_table_alone_is_an_error() -> None:
    with pytest.raises(Transient, match="unexpected EOF"):
        parsed(ERROR_TABLE.lstrip())


def test_an_error_about_memory_asks_for_less() -> None:
    body = CONTRACT + ERROR_TABLE.replace(b"engine: unexpected EOF", b"memory allocation limit reached")
    with pytest.raises(QueryTooLarge, match="memory allocation"):
        parsed(body)


def test_a_tag_called_error_is_no_error() -> None:
    body = head(("error", "string"), ("reference", "string"), groups="true,true") + b",,0,E1,R1\r\n\r\n"
    assert cells(parsed(body)) == [("E1", "R1")]


@pytest.mark.parametrize("size", SIZES)
def test_an_answer_that_is_cut_anywhere_inside_a_line_is_an_error(size: int) -> None:
    body = CONTRACT[:-2] + head(("s", "string"), ("v", "double")) + b',,0,"a\r\nb",1.25\r\n,,0,c,2.5\r\n\r\n'
    ends = {at + 1 for at in range(len(body)) if body[at : at + 1] == b"\n"}
    for at in range(1, len(body)):
        if at not in ends:
            with pytest.raises(AppError):
                parsed(body[:at], size)


def test_an_answer_that_is_cut_between_annotations_or_inside_quotes_is_an_error() -> None:
    text = head(("s", "string"), ("v", "double"))
    for lines in (1, 2, 3):
        with pytest.raises(Transient):
            parsed(CONTRACT + b"\r\n".join(text.split(b"\r\n")[:lines]) + b"\r\n")
    with pytest.raises(Transient, match="quoted"):
        parsed(text + b',,0,"a\r\n')


def test_an_error_table_whose_text_is_cut_off_is_an_error() -> None:
    with pytest.raises(Transient):
        parsed(CONTRACT + ERROR_TABLE[: ERROR_TABLE.index(b",engine")])


@pytest.mark.parametrize(
    "body",
    [
        b"<html><body>Sign in</body></html>\n",
        b'{"results":[]}\n',
        b",result,table,_value\r\n,_result,0,1\r\n\r\n",
        b"#group,false,false,false\r\n,result,table,_value\r\n,,0,1\r\n\r\n",
        b"#datatype,string,long\r\n#group,false,false\r\n#default,,\r\n,result,table,_value\r\n,,0,1\r\n\r\n",
        b"#datatype,string,long,double\r\n\r\n",
        head(("v", "double")) + b",,0,\xff\r\n\r\n",
        head(("v", "long")) + b",,0,1.5\r\n\r\n",
        head(("v", "long"), defaults="x") + b",,0,\r\n\r\n",
        head(("v", "double")) + b",,0,1,2\r\n\r\n",
        head(("v", "double")) + b",,0\r\n\r\n",
    ],
)
def test_what_is_no_annotated_csv_is_an_error_of_ours_and_never_silence(body: bytes) -> None:
    with pytest.raises((Transient, Permanent)):
        parsed(body)


TEXT = st.text(st.sampled_from('ab#,"\n é\u2028'), max_size=6)
CELLS: dict[str, Any] = {
    "string": st.none() | TEXT.filter(bool),
    "long": st.none() | st.integers(-(2**63), 2**63 - 1),
    "unsignedLong": st.none() | st.integers(0, 2**64 - 1),
    "double": st.none() | st.floats(width=64) | st.sampled_from((math.nan, math.inf, -math.inf)),
    "boolean": st.none() | st.booleans(),
    TIME: st.integers(0, 2**62),
}


@st.composite
def tables(draw: st.DrawFn) -> Table:
    """A table of the simulator; its group columns have one value."""
    kinds = draw(st.lists(st.sampled_from(sorted(CELLS)), min_size=1, max_size=4))
    number = draw(st.integers(0, 4))
    tag = draw(TEXT.filter(bool))
    columns = [Column("host", "string", group=True), *(Column(f"c{at}", kind) for at, kind in enumerate(kinds))]
    values: list[Cells] = [[tag] * number, *([draw(CELLS[kind]) for _ in range(number)] for kind in kinds)]
    return made_table(columns, values, [tag])


@given(st.lists(st.lists(tables(), max_size=5), max_size=3), st.integers(0, 1 << 30))
@settings(max_examples=40, deadline=None)
def test_any_cutting_and_any_block_size_give_one_result(results: list[list[Table]], seed: int) -> None:
    writer = AnnotatedCsv(("datatype", "group", "default"))
    body = b"".join(piece.data for piece in writer.pieces((f"r{n}", one) for n, one in enumerate(results)))
    expected = [
        tuple("nan" if isinstance(cell, float) and math.isnan(cell) else cell for cell in row)
        for one in results
        for each in one
        for row in zip(*each.load(), strict=True)
    ]
    for block_bytes in (16, 64, 1000, 10_000):
        found = rows(parsed(cut(body, seed), block_bytes))
        assert sorted(map(repr, (row[3] for row in found))) == sorted(map(repr, expected))
    assert sorted(map(repr, rows(parsed(body)))) == sorted(map(repr, rows(parsed(cut(body, seed), 16))))
