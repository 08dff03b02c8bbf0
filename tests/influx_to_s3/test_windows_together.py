"""Small windows of a backlog are read in one question: the batches are those that each alone would give."""

from collections.abc import Sequence
from contextlib import closing
from datetime import UTC, datetime, timedelta

import pytest

from app.core.errors import Transient
from app.core.pipeline import Count
from app.core.windows import Window
from app.influx_to_s3.flux import FluxReader
from app.influx_to_s3.reader import InfluxConnection
from app.influx_to_s3.source import InfluxSource, runs_of_few_rows
from exporter import Exporter
from influx_points import source_of
from simulators.influx import Refuse

EVENING = datetime(2026, 2, 7, 21, tzinfo=UTC)
HOURS = [Window(EVENING + timedelta(hours=n), EVENING + timedelta(hours=n + 1)) for n in range(6)]


def source_for(exporter: Exporter, batch_rows: int = 20_000) -> InfluxSource:
    influx = exporter.influx
    reader = FluxReader(
        InfluxConnection(influx.url, influx.token),
        org=influx.org,
        bucket=influx.bucket,
        measurement="device_telemetry",
    )
    return source_of(reader, exporter.folder / "spool", batch_rows=batch_rows, attempts=1)


def fill(exporter: Exporter) -> list[tuple[Window, Count]]:
    """Rows of two tag sets in all hours but one, a field that only one hour has, and rows at the edges."""
    for number, window in enumerate(HOURS):
        if number == 2:
            continue
        exporter.write(window.start, fields=f"voltage=23{number}.5,current=2,power=450")
        exporter.write(window.start + timedelta(minutes=7), fields="voltage=230", location="roof")
        exporter.write(window.start + timedelta(minutes=3), fields='note="a, b"' if number == 4 else "power=1")
        exporter.write(window.end - timedelta(microseconds=1), fields="temperature=20.25")
    counts = source_for(exporter).counts("D1", HOURS)
    return [(window, counts.get(("D1", window.start), Count(0, 0))) for window in HOURS]


def questions(exporter: Exporter) -> int:
    """How often rows were asked for since the last look."""
    asked = sum("pivot" in query.text for query in exporter.influx.queries)
    exporter.influx.forget_queries()
    return asked


def alone(source: InfluxSource, counted: Sequence[tuple[Window, Count]]) -> list[tuple[str, list[dict[str, object]]]]:
    found = []
    for window, count in counted:
        with closing(source.read("D1", window, count, None)) as batch:
            found.append((batch.digest, [row for table in batch.output() for row in table.to_pylist()]))
    return found


def together(
    source: InfluxSource, counted: Sequence[tuple[Window, Count]]
) -> list[tuple[str, list[dict[str, object]]]]:
    found = []
    for batch in source.read_each("D1", counted):
        with closing(batch):
            found.append((batch.digest, [row for table in batch.output() for row in table.to_pylist()]))
    return found


def test_batches_read_together_are_those_read_alone_in_fewer_questions(exporter: Exporter) -> None:
    counted = fill(exporter)
    source = source_for(exporter)
    exporter.influx.forget_queries()
    expected = alone(source, counted)
    assert questions(exporter) == len(HOURS)
    assert together(source, counted) == expected
    assert questions(exporter) == 2  # one on each side of midnight
    assert [len(rows) for _, rows in expected] == [4, 4, 0, 4, 4, 4]


def test_a_question_that_is_refused_for_several_windows_is_asked_for_each(exporter: Exporter) -> None:
    counted = fill(exporter)[:3]
    source = source_for(exporter)
    expected = alone(source, counted)
    exporter.influx.faults.add(Refuse(status=400, message="schema collision"))
    exporter.influx.forget_queries()
    assert together(source, counted) == expected
    assert questions(exporter) == 1 + len(counted)


def test_fewer_rows_than_were_counted_are_an_error_in_the_window_that_lacks_them(exporter: Exporter) -> None:
    counted = fill(exporter)[:2]
    batches = source_for(exporter).read_each("D1", [counted[0], (HOURS[1], Count(99, 99, {"voltage": 99}))])
    next(batches).close()
    with pytest.raises(Transient, match=r"2 values of voltage of D1 .* had counted 99"):
        next(batches)


def points(numbers: Sequence[int]) -> list[tuple[Window, Count]]:
    return [(window, Count(number, number)) for window, number in zip(HOURS, numbers, strict=False)]


def test_windows_go_together_while_their_rows_are_few_and_within_a_day() -> None:
    def runs(counted: list[tuple[Window, Count]]) -> list[list[int]]:
        return [[count.points for _, count in run] for run in runs_of_few_rows(counted, 10)]

    assert runs(points([3, 3, 3, 3, 3, 3])) == [[3, 3, 3], [3, 3, 3]]
    assert runs(points([6, 4, 1])) == [[6, 4], [1]]
    assert runs(points([11, 1, 1])) == [[11], [1, 1]]
    assert runs([*points([1]), *points([1, 1, 1])[2:]]) == [[1], [1]]
    assert runs([]) == []
