"""Line protocol: what is a point, and what a server says of a line that is none (compared with InfluxDB 1.6.7)."""

import pytest

from simulators.line_protocol import BadLine, Field, Point, parse_lines


def points(text: str, precision: str = "ns") -> list[Point]:
    return list(parse_lines(text, 7_777_777_777, precision))


def test_a_line_has_measurement_tags_fields_and_a_time() -> None:
    assert points('m,b=2,a=1 f=1.5,i=-3i,u=4u,s="x",t=true,n=F 12') == [
        Point(
            "m",
            (("a", "1"), ("b", "2")),
            (
                Field("f", "float", 1.5),
                Field("i", "integer", -3),
                Field("u", "unsigned", 4),
                Field("s", "string", "x"),
                Field("t", "boolean", value=True),
                Field("n", "boolean", value=False),
            ),
            12,
        )
    ]


def test_names_and_tag_values_escape_comma_space_and_equals_sign() -> None:
    (point,) = points(r"my\,m\ x,t\ a\=g=v\,1\ 2\=3 f\ a\,b\=c=1 1")
    assert point.measurement == "my,m x"
    assert point.tags == (("t a=g", "v,1 2=3"),)
    assert point.fields == (Field("f a,b=c", "float", 1.0),)


def test_strings_may_hold_everything_and_escape_quote_and_backslash() -> None:
    (point,) = points('m s="a \\"b\\", c=1 \\\\ \\n\nnext line",f=2 5')
    assert point.fields == (Field("s", "string", 'a "b", c=1 \\ \\n\nnext line'), Field("f", "float", 2.0))
    assert point.time_ns == 5


def test_a_line_end_inside_a_string_does_not_end_the_line() -> None:
    first, second = points('m s="one\ntwo" 1\nm s="three" 2')
    assert first.fields[0].value == "one\ntwo"
    assert second.time_ns == 2


def test_blank_lines_and_comments_are_passed_over() -> None:
    assert [point.time_ns for point in points("# comment\n\n  \r\nm f=1 3\r\n")] == [3]


@pytest.mark.parametrize(("precision", "time_ns"), [("ns", 5), ("us", 5_000), ("ms", 5_000_000), ("s", 5_000_000_000)])
def test_times_have_the_precision_of_the_request(precision: str, time_ns: int) -> None:
    assert points("m f=1 5", precision)[0].time_ns == time_ns


def test_a_line_without_a_time_is_written_now() -> None:
    assert points("m f=1")[0].time_ns == 7_777_777_777
    assert points("m f=1", "s")[0].time_ns == 7_000_000_000


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("m,a= f=1", "missing tag value"),
        ("m,=a f=3", "missing tag key"),
        ("m", "missing fields"),
        ("m f=", "missing field value"),
        ("m f=1 x", "bad timestamp"),
        ("m f=nan 8", "invalid number"),
        ("m f=1e400 8", "invalid float"),
        (
            "m f=99999999999999999999i 9",
            "unable to parse integer 99999999999999999999: strconv.ParseInt: "  # noqa: ISC004 - one reason
            'parsing "99999999999999999999": value out of range',
        ),
        ('m f="open 1', "unbalanced quotes"),
    ],
)
def test_a_bad_line_is_named_with_the_reason(line: str, reason: str) -> None:
    with pytest.raises(BadLine) as caught:
        points(line)
    assert str(caught.value) == f"unable to parse '{line}': {reason}"
