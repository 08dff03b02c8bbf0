"""What an object cannot hold, as line protocol beside the data: the exact points, ready to be written somewhere again.

Line protocol is InfluxDB's own form of a point, so nothing about it is lost: all tags, the type of each value, and the
instant in nanoseconds. Source: the InfluxDB documentation, "Line protocol".
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from app.influx_to_s3.reader import Points

NO_DEVICE_TAG = "no device tag"
REFUSED_ID = "device id cannot name an object"
OTHER_VALUE = "another value in a point that differs only in ignored tags"
CLOCK_NOT_SET = "timestamp before the year 2000"
NAME_ESCAPES = str.maketrans({",": "\\,", "=": "\\=", " ": "\\ "})
MEASUREMENT_ESCAPES = str.maketrans({",": "\\,", " ": "\\ "})
TEXT_ESCAPES = str.maketrans({'"': '\\"', "\\": "\\\\"})


@dataclass(frozen=True, slots=True)
class Disagreement:
    """A value that stands in no object, since a point of the same identity has another one for this field."""

    tags: Mapping[str, str]
    field: str
    value: bool | int | float | str
    instant_ns: int


def line(measurement: str, tags: Mapping[str, str], fields: Mapping[str, Any], instant_ns: int) -> str:
    """One point. `fields`: bool, int, float and str values; none of them null."""
    series = "".join(
        f",{name.translate(NAME_ESCAPES)}={text.translate(NAME_ESCAPES)}" for name, text in sorted(tags.items())
    )
    values = ",".join(f"{name.translate(NAME_ESCAPES)}={_value(value)}" for name, value in sorted(fields.items()))
    return f"{measurement.translate(MEASUREMENT_ESCAPES)}{series} {values} {instant_ns}"


def _value(value: bool | int | float | str) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return f"{value}i" if value < 1 << 63 else f"{value}u"
    if isinstance(value, float):
        return repr(value)
    return f'"{value.translate(TEXT_ESCAPES)}"'


def lines_of(points: Points, measurement: str, own: Mapping[str, str]) -> Iterator[str]:
    """Each point of a block as a line. `own`: the device tag, which `points` leaves out."""
    import pyarrow as pa

    times = points.times.cast(pa.int64()).to_pylist()
    tags = {name: texts.to_pylist() for name, texts in points.tags.items()}
    fields = [(name, values.to_pylist()) for name, values in points.fields]
    for row, instant_ns in enumerate(times):
        there = {name: texts[row] for name, texts in tags.items() if texts[row] is not None}
        values = {name: some[row] for name, some in fields if some[row] is not None}
        if values:
            yield line(measurement, {**own, **there}, values, instant_ns)


def values_in(points: Points) -> Mapping[str, int]:
    """By field, how many values a block holds."""
    numbers: dict[str, int] = {}
    for name, values in points.fields:
        numbers[name] = numbers.get(name, 0) + len(values) - values.null_count
    return numbers


def lines_of_disagreements(some: Iterable[Disagreement], measurement: str, own: Mapping[str, str]) -> Iterator[str]:
    """Each value as a point of its own."""
    for each in some:
        yield line(measurement, {**own, **each.tags}, {each.field: each.value}, each.instant_ns)
