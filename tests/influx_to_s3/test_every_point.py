"""Every value of every point is in an object or set aside, exactly once, whatever its tags, names, types and times."""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from app.core.runs import Outcome, Stop
from app.core.verify import PartitionWindow, Verdict, compare
from app.core.windows import EPOCH, window_at
from app.influx_to_s3.set_aside import line
from app.object_store.local import LocalDirectory
from effort import EFFORT
from exporter import NOON, Exporter, exporter_on, ns
from exports import content, objects, rows_of
from influxdb1 import InfluxDB1
from simulators.line_protocol import parse_lines

pytestmark = pytest.mark.slow

MEASUREMENT = "device_telemetry"
DAY_NS = 86_400 * 10**9
START = NOON - 2 * timedelta(days=1)
IGNORED = ("schema_version", "enrichment_status")
TAG_NAMES = ("device_type", "location", "phase", "result", "voltage", "hour", "Phase", "a b,c=d", *IGNORED)
FIELD_NAMES = (
    "voltage",
    "power",
    "count",
    "state",
    "location",
    "phase",
    "device_id",
    "result",
    "table",
    "_time",
    "Count",
    "x y",
)
NAME = st.sampled_from(FIELD_NAMES)
TEXT = st.one_of(
    st.sampled_from(("", "a", '"', "\\", "x,y=z", "ü\n€", "12.5", "true")), st.text('abü "\\,=', max_size=5)
)
VALUES = {
    "float": st.one_of(st.floats(allow_nan=False, allow_infinity=False), st.integers(-5, 5).map(float)),
    "integer": st.integers(-(2**63), 2**63 - 1),
    "string": TEXT,
    "boolean": st.booleans(),
}
Tags = tuple[tuple[str, str], ...]
Cell = tuple[Tags, int, str, str]


@st.composite
def points(draw: st.DrawFn) -> Mapping[tuple[Tags, int], Mapping[str, Any]]:
    """Fields by tags and nanoseconds. A field has one type in a shard, which is a day; days differ."""
    kinds: dict[tuple[str, int], str] = {}
    # Without any device the run fails and says so.
    found: dict[tuple[Tags, int], dict[str, Any]] = {((("device_id", "D1"),), ns(START)): {"current": 1.0}}
    for _ in range(draw(st.integers(1, 12))):
        device = draw(st.sampled_from(("D1", "D1", "D2", "a/b", "")))
        names = draw(st.sets(st.sampled_from(TAG_NAMES), max_size=4))
        texts = {name: draw(st.sampled_from(("A", "B", "ü x", "1"))) for name in names}
        tags = tuple(sorted({**texts, **({"device_id": device} if device else {})}.items()))
        day = draw(st.integers(0, 1))
        instant = (
            ns(START) + day * DAY_NS + draw(st.sampled_from((0, 1, 999, 1000, 3_600 * 10**9, 86_399 * 10**9 // 2)))
        )
        fields = found.setdefault((tags, instant), {})
        for name in draw(st.sets(NAME, min_size=1, max_size=4)):
            kind = kinds.setdefault((name, day), draw(st.sampled_from(sorted(VALUES))))
            fields[name] = draw(VALUES[kind])
    return found


def lines_of(some: Mapping[tuple[Tags, int], Mapping[str, Any]]) -> str:
    return "\n".join(line(MEASUREMENT, dict(tags), fields, instant) for (tags, instant), fields in some.items())


def as_text(value: Any) -> str:
    """A value as it compares: numbers by their value, whatever type holds them."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and value.is_integer() and str(value) != "-0.0":
        return str(int(value))
    return str(value)


def in_source(some: Mapping[tuple[Tags, int], Mapping[str, Any]], ignored: tuple[str, ...]) -> Counter[Cell]:
    """The source's cells. Points that differ in ignored tags only have a value once that they agree on."""
    cells: Counter[Cell] = Counter()
    for (tags, instant), fields in some.items():
        kept = tuple((name, text) for name, text in tags if name not in ignored)
        for name, value in fields.items():
            cell = (kept, instant, name, as_text(value))
            cells[cell] = 1
    return cells


def in_objects(exporter: Exporter) -> Iterator[Cell]:
    """Names, tags and sources come from the layout beside the data."""
    layout = {each["name"]: each for each in exporter.layout["columns"]}
    documented = ("device_type", "location")
    for key in objects(exporter.store):
        for row in rows_of(exporter.store, key):
            tags = {name: row[name] for name in documented if row[name] != "unknown"}
            tags |= {
                layout[n]["source"]: v
                for n, v in row.items()
                if v is not None and n in layout and layout[n]["kind"] == "tag"
            }
            own = tuple(sorted({**tags, "device_id": row["device_id"]}.items()))
            for name, value in row.items():
                source = source_of(layout, name)
                if value is not None and source is not None:
                    yield own, row["timestamp"], source, as_text(value)


def source_of(layout: Mapping[str, Any], name: str) -> str | None:
    if name in ("voltage", "current", "power", "temperature"):
        return name
    column = layout.get(name)
    if column is None or column["kind"] == "tag":
        return None
    if column["kind"] == "field":
        return str(column["source"])
    return source_of(layout, column["source"])


def in_set_aside(exporter: Exporter, ignored: tuple[str, ...]) -> Iterator[Cell]:
    for info in exporter.store.list("telemetry/_set_aside/"):
        for point in parse_lines(content(exporter.store, info.key).decode(), 0):
            tags = tuple((name, text) for name, text in point.tags if name not in ignored)
            for each in point.fields:
                yield tags, point.time_ns, each.name, as_text(each.value)


@contextmanager
def exporting(api: str, influxdb1: InfluxDB1, lines: str) -> Iterator[tuple[Exporter, dict[str, str]]]:
    with TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        make = contextmanager(exporter_on)
        exporter = stack.enter_context(make(LocalDirectory(folder / "objects"), folder, shard=timedelta(days=1)))
        environ = {"EXPORT_START": f"{START:%Y-%m-%dT%H:%M:%SZ}"}
        if api == "influxql":
            database = influxdb1.new_database("WITH SHARD DURATION 1d")
            influxdb1.write(database, lines)
            environ |= {"INFLUXDB_API": api, "INFLUXDB_URL": influxdb1.url, "INFLUXDB_DATABASE": database}
        else:
            exporter.influx.write(lines)
        yield exporter, environ


def check(api: str, influxdb1: InfluxDB1, some: Mapping[tuple[Tags, int], Mapping[str, Any]], ignored: str) -> None:
    with exporting(api, influxdb1, lines_of(some)) as (exporter, environ):
        exporter.environ |= environ
        if ignored != "default":
            exporter.environ["INFLUXDB_IGNORED_TAGS"] = ignored
        without = tuple(filter(None, ignored.split(","))) if ignored != "default" else IGNORED
        exporter.at(hours=-2)
        for _ in range(20):
            run = exporter.run()
            assert run.outcome in (Outcome.OK, Outcome.PARTIAL), f"{run.error} ({run.hint})"
            assert run.report.failures == ()
            assert run.report.ledger.closes, run.error
            if not run.report.more:
                break
        landed = Counter(in_objects(exporter))
        found = landed + Counter(in_set_aside(exporter, without))
        assert found == in_source(some, without)
        assert exporter.run().report.rows == 0
        ends = exporter.export().verification(Stop())
        verdicts = [compare(ends, slot) for slot in slots_of(some)]
        assert [each for each in verdicts if each.sign is not Verdict.EQUAL] == []
        others = [cell for cell in in_set_aside(exporter, without) if dict(cell[0]).get("device_id") in ("D1", "D2")]
        assert sum(each.source.set_aside for each in verdicts if each.source) == len(others)


def slots_of(some: Mapping[tuple[Tags, int], Mapping[str, Any]]) -> set[PartitionWindow]:
    """The windows with points of devices that can have objects."""
    instants = {
        (dict(tags).get("device_id", ""), instant // 1000) for (tags, instant), fields in some.items() if fields
    }
    named = ((device, EPOCH + timedelta(microseconds=at)) for device, at in instants if device in ("D1", "D2"))
    return {PartitionWindow(device, window_at(at, 3600)) for device, at in named}


@pytest.mark.parametrize("ignored", ["default", ""])
@pytest.mark.parametrize("api", ["influxql", "flux"])
@settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck))
@given(some=points())
def test_every_value_is_in_an_object_or_set_aside(
    influxdb1: InfluxDB1, api: str, ignored: str, some: Mapping[tuple[Tags, int], Mapping[str, Any]]
) -> None:
    check(api, influxdb1, some, ignored)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("ignored", ["default", ""])
@pytest.mark.parametrize("api", ["influxql", "flux"])
@settings(max_examples=20 * EFFORT, deadline=None, suppress_health_check=list(HealthCheck))
@given(some=points())
def test_every_value_is_in_an_object_or_set_aside_in_many_examples(
    influxdb1: InfluxDB1, api: str, ignored: str, some: Mapping[tuple[Tags, int], Mapping[str, Any]]
) -> None:
    check(api, influxdb1, some, ignored)
