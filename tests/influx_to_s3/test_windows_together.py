"""Small windows are read in one query, of one device or of several: the batches are those that each alone gives."""

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
    for each, common in zip(counted, source.read_each([("D1", *each) for each in counted]), strict=True):
        with closing(common or source.read("D1", *each, None)) as batch:
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


def test_a_window_with_fewer_rows_than_were_counted_is_read_alone_where_that_is_an_error(exporter: Exporter) -> None:
    counted, source = fill(exporter)[:2], source_for(exporter)
    lacking = (HOURS[1], Count(99, 99, {"voltage": 99}))
    first, second = source.read_each([("D1", *counted[0]), ("D1", *lacking)])
    assert first is not None
    assert first.rows == 4
    assert second is None
    with pytest.raises(Transient, match=r"2 values of voltage of D1 .* had counted 99"):
        source.read("D1", *lacking, None)


def test_open_windows_of_devices_read_together_are_those_read_alone_in_one_query(exporter: Exporter) -> None:
    window = HOURS[0]
    exporter.write(window.start, device="D1", fields="voltage=230.5,current=2,power=450")
    exporter.write(window.start + timedelta(minutes=1), device="D1", fields="voltage=231", location="roof")
    exporter.write(window.start, device="D2", fields='note="a, b",soc=5i')
    exporter.write(window.start, device='D"3', fields="voltage=1")
    exporter.write(window.start, device='D"3', fields="voltage=2", location="roof")
    exporter.write(window.start, device="other", fields="voltage=9")
    source, devices = source_for(exporter), ["D1", "D2", 'D"3', "D4"]
    counts = source.counts(None, [window])
    counted = [(device, window, counts.get((device, window.start), Count(0, 0))) for device in devices]
    alone = [source.read(*each, None) for each in counted]
    exporter.influx.forget_queries()
    together = list(source.read_each(counted))
    assert questions(exporter) == 1
    for one, other in zip(together, alone, strict=True):
        assert one is not None
        assert (one.digest, one.rows, one.accounts, one.sums) == (other.digest, other.rows, other.accounts, other.sums)
        assert list(one.identities) == list(other.identities)
        assert [table.to_pylist() for table in one.output()] == [table.to_pylist() for table in other.output()]
    assert [batch.rows for batch in alone] == [2, 1, 2, 0]


def test_a_device_whose_rows_are_cut_in_a_common_response_is_read_alone(exporter: Exporter) -> None:
    window = HOURS[0]
    exporter.write(window.start, device="D1")
    exporter.write(window.start, device="D2")
    lacking = Count(9, 9, {"voltage": 9})
    source = source_for(exporter)
    counts = source.counts(None, [window])
    first, second = source.read_each([("D1", window, lacking), ("D2", window, counts["D2", window.start])])
    assert first is None
    assert second is not None
    assert second.rows == 1


def points(numbers: Sequence[int]) -> list[tuple[Window, Count]]:
    return [(window, Count(number, number)) for window, number in zip(HOURS, numbers, strict=False)]


def test_windows_go_together_while_their_rows_are_few_and_within_a_day() -> None:
    def runs(counted: list[tuple[Window, Count]]) -> list[list[int]]:
        found = runs_of_few_rows([("D1", *each) for each in counted], 10)
        return [[count.points for _, _, count in run] for run in found]

    assert runs(points([3, 3, 3, 3, 3, 3])) == [[3, 3, 3], [3, 3, 3]]
    assert runs(points([6, 4, 1])) == [[6, 4], [1]]
    assert runs(points([11, 1, 1])) == [[11], [1, 1]]
    assert runs([*points([1]), *points([1, 1, 1])[2:]]) == [[1], [1]]
    assert runs([]) == []
