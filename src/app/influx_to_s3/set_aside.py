"""What an object cannot hold, as line protocol beside the data: the exact points, ready to be written somewhere again.

Line protocol is InfluxDB's own form of a point, so nothing about it is lost: all tags, the type of each value, and the
instant in nanoseconds. Source: the InfluxDB documentation, "Line protocol".
"""

import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

from app.core.ledger import SetAside
from app.core.windows import Window
from app.influx_to_s3.reader import Points
from app.object_store.set_aside import LINES, Kept, SetAsideStore

NO_DEVICE_TAG = "no device tag"
REFUSED_ID = "device id cannot name an object"
OTHER_VALUE = "another value in a point that differs only in ignored tags"
CLOCK_NOT_SET = "timestamp before the year 2000"
NAME_ESCAPES = str.maketrans({",": "\\,", "=": "\\=", " ": "\\ "})
MEASUREMENT_ESCAPES = str.maketrans({",": "\\,", " ": "\\ "})
MEMORY_BYTES = 1 << 20
NO_DEVICE = "(no device tag)"
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
    values = ",".join(f"{_field_key(name)}={_value(value)}" for name, value in sorted(fields.items()))
    return f"{measurement.translate(MEASUREMENT_ESCAPES)}{series} {values} {instant_ns}"


def _field_key(name: str) -> str:
    r"""In a field's key InfluxDB reads `\"` as `"` alone, unlike in a tag."""
    return name.translate(NAME_ESCAPES).replace('\\"', '\\\\"')


def _value(value: Any) -> str:
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


class Aside:
    """Keeps points of one measurement as line protocol, an object for each reason, device and window."""

    def __init__(self, store: SetAsideStore, *, measurement: str, device_tag: str) -> None:
        self._store = store
        self._measurement = measurement
        self._device_tag = device_tag

    def keep_values(
        self, reason: str, device: str, window: Window, values: Sequence[Disagreement]
    ) -> Sequence[SetAside]:
        """Keep values of one window, each as a point of its own."""
        if not values:
            return ()
        own = self._own(device)
        lines = [
            line(self._measurement, {**own, **each.tags}, {each.field: each.value}, each.instant_ns) for each in values
        ]
        content = "".join(f"{each}\n" for each in lines).encode("utf-8", "surrogatepass")
        kept = self._store.keep(
            _name(device, window), content, content_type=LINES, reason=reason, number=len(values), sample=lines[0]
        )
        return (kept.entry,)

    def knows(self, device: str) -> bool:
        """True when points of this device were set aside before."""
        return self._store.holds(_owner(device))

    def keep_points(
        self, reason: str, device: str, window: Window, blocks: Iterable[Points]
    ) -> tuple[Kept, Mapping[str, int]]:
        """Keep points of one window as they are; what became of them, and by field how many values they hold.

        `device` "" = the points without the device tag. Lines wait in a temporary file when they are many.
        """
        read: dict[str, int] = {}
        sample = ""
        with tempfile.SpooledTemporaryFile(MEMORY_BYTES) as file:
            for block in blocks:
                for field, number in values_in(block).items():
                    read[field] = read.get(field, 0) + number
                for each in lines_of(block, self._measurement, self._own(device)):
                    sample = sample or each
                    file.write(f"{each}\n".encode("utf-8", "surrogatepass"))
            file.seek(0)
            kept = self._store.keep(
                _name(device, window),
                cast("BinaryIO", file),
                content_type=LINES,
                reason=reason,
                number=sum(read.values()),
                sample=sample,
            )
        return kept, read

    def _own(self, device: str) -> Mapping[str, str]:
        return {self._device_tag: device} if device else {}


def _owner(device: str) -> str:
    return f"device_id={device}" if device else NO_DEVICE


def _name(device: str, window: Window) -> tuple[str, ...]:
    return _owner(device), f"{window.start:%Y-%m-%d}", f"{window.start:%H%M%S}"
