"""The bytes of annotated CSV, compared with the examples of contracts/influxdb.md section 2."""

import math
from collections.abc import Iterable, Sequence

import pytest

from simulators.annotated_csv import AnnotatedCsv, decimal_text
from simulators.flux_parser import parse_rfc3339, rfc3339
from simulators.flux_steps import TIME, Column, Table, table
from simulators.line_protocol import Value

ALL = ("datatype", "group", "default")
START, STOP = parse_rfc3339("2018-04-17T00:00:00Z"), parse_rfc3339("2018-04-17T00:05:00Z")
COLUMNS = (
    Column("_start", TIME, group=True),
    Column("_stop", TIME, group=True),
    Column("_time", TIME),
    Column("_measurement", "string", group=True),
    Column("host", "string", group=True),
    Column("_value", "double"),
)
HEAD = (
    "#datatype,string,long,dateTime:RFC3339,dateTime:RFC3339,dateTime:RFC3339,string,string,double\r\n"
    "#group,false,false,true,true,false,true,true,false\r\n"
    "#default,_result,,,,,,,\r\n"
    ",result,table,_start,_stop,_time,_measurement,host,_value\r\n"
)
SPAN = "2018-04-17T00:00:00Z,2018-04-17T00:05:00Z"


def cpu(host: str, values: list[float]) -> Table:
    times = [START + second * 10**9 for second in range(len(values))]
    key = (START, STOP, "cpu", host)
    same = [[value] * len(values) for value in key]
    return table(COLUMNS, [*same[:2], times, *same[2:], values], key)


def written(*results: tuple[str, Iterable[Table]], annotations: Sequence[str] = ALL) -> str:
    writer = AnnotatedCsv(annotations)
    return b"".join(piece.data for piece in writer.pieces(results)).decode()


def one_column(kind: str, *values: Value | None) -> Table:
    return table([Column("_value", kind)], [list(values)])


def test_a_table_is_three_annotations_a_header_its_rows_and_an_empty_line() -> None:
    assert written(("_result", [cpu("A", [42, 43])])) == (
        f"{HEAD},,0,{SPAN},2018-04-17T00:00:00Z,cpu,A,42\r\n,,0,{SPAN},2018-04-17T00:00:01Z,cpu,A,43\r\n\r\n"
    )


def test_tables_of_one_schema_follow_each_other_without_a_header() -> None:
    text = written(("_result", [cpu("A", [1]), cpu("B", [2])]))
    assert text == (f"{HEAD},,0,{SPAN},2018-04-17T00:00:00Z,cpu,A,1\r\n,,1,{SPAN},2018-04-17T00:00:00Z,cpu,B,2\r\n\r\n")


def test_another_type_begins_a_new_block_after_an_empty_line() -> None:
    text = written(("_result", [one_column("double", 1.5), one_column("string", "x")]))
    assert text == (
        "#datatype,string,long,double\r\n#group,false,false,false\r\n#default,_result,,\r\n,result,table,_value\r\n"
        ",,0,1.5\r\n"
        "\r\n"
        "#datatype,string,long,string\r\n#group,false,false,false\r\n#default,_result,,\r\n,result,table,_value\r\n"
        ",,1,x\r\n"
        "\r\n"
    )


def test_an_empty_table_has_its_number_and_key_in_the_defaults_and_the_next_table_a_new_header() -> None:
    text = written(("_result", [cpu("A", []), cpu("B", [2])]))
    empty = HEAD.replace("#default,_result,,,,,,,\r\n", f"#default,_result,0,{SPAN},,cpu,A,\r\n")
    assert text == f"{empty}\r\n{HEAD},,1,{SPAN},2018-04-17T00:00:00Z,cpu,B,2\r\n\r\n"


def test_no_result_is_one_empty_line() -> None:
    assert written() == "\r\n"
    assert written(("_result", [])) == "\r\n"


def test_table_numbers_begin_again_with_each_result() -> None:
    text = written(("a", [one_column("long", 1)]), ("b", [one_column("long", 2)]))
    assert text.count(",,0,") == 2
    assert "#default,a,,\r\n,result,table,_value\r\n,,0,1\r\n\r\n#datatype" in text


def test_without_the_default_annotation_every_row_names_its_result() -> None:
    assert (
        written(("_result", [one_column("long", 1)]), annotations=()) == ",result,table,_value\r\n,_result,0,1\r\n\r\n"
    )


def test_annotations_come_in_the_order_asked_for() -> None:
    text = written(("_result", [one_column("long", 1)]), annotations=("group", "datatype"))
    assert (
        text == "#group,false,false,false\r\n#datatype,string,long,long\r\n,result,table,_value\r\n,_result,0,1\r\n\r\n"
    )


@pytest.mark.parametrize(
    ("value", "cell"),
    [
        ("plain text", "plain text"),
        ("a,b", '"a,b"'),
        ('say "x"', '"say ""x"""'),
        (" lead", '" lead"'),
        ("two\nlines", '"two\r\nlines"'),
        ("carriage\rreturn", '"carriagereturn"'),
        ("", ""),
        (None, ""),
        ("żółć", "żółć"),
    ],
)
def test_strings_are_quoted_only_where_they_must_be(value: str | None, cell: str) -> None:
    assert written(("_result", [one_column("string", value)])).endswith(f",,0,{cell}\r\n\r\n")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (42.0, "42"),
        (0.5, "0.5"),
        (1e-7, "0.0000001"),
        (1e21, "1000000000000000000000"),
        (-1.5e-10, "-0.00000000015"),
        (math.nan, "NaN"),
        (math.inf, "+Inf"),
        (-math.inf, "-Inf"),
    ],
)
def test_floats_are_plain_decimals(value: float, text: str) -> None:
    assert decimal_text(value) == text


@pytest.mark.parametrize("text", ["2026-02-07T12:00:00Z", "2026-02-07T12:00:00.5Z", "2026-02-07T12:00:00.123456789Z"])
def test_times_keep_nanoseconds_and_lose_trailing_zeros(text: str) -> None:
    assert rfc3339(parse_rfc3339(text)) == text


def test_an_error_table_follows_rows_after_an_empty_line() -> None:
    assert AnnotatedCsv(ALL).error("engine: unexpected EOF") == (
        b"\r\n#datatype,string,string\r\n#group,true,true\r\n#default,,\r\n"
        b",error,reference\r\n,engine: unexpected EOF,\r\n"
    )


def test_an_error_table_has_only_the_annotations_asked_for() -> None:
    assert AnnotatedCsv().error("x, y") == b'\r\n,error,reference\r\n,"x, y",\r\n'
