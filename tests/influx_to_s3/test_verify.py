"""Proof of delivery of the export: what was done to objects is named exactly, and mended exactly."""

import io
import json
import re
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from urllib.parse import urlencode

import pytest
import urllib3

from app.core.errors import Rejected
from app.core.runs import Job, Outcome, Run, Stop, execute
from app.core.verify import CellState, ComparedWindow, PartitionWindow, Verdict, heal, verify, why
from app.core.windows import Window
from app.influx_to_s3.job import NAME, InfluxExport
from app.influx_to_s3.verify import ExportEnds
from app.object_store.port import PutRequest
from app.object_store.s3 import S3Store
from exporter import NOON, Exporter, Silent, exporter_on
from exports import content, exported
from seaweed import Seaweed, target
from simulators.http_server import Answer, Request, Simulator

HOUR = timedelta(hours=1)
SPAN = Window(NOON - 6 * HOUR, NOON + HOUR)
Change = Callable[[Exporter, str], None]


def hour(number: int) -> Window:
    """The hour that begins so many hours before noon."""
    return Window(NOON - number * HOUR, NOON - (number - 1) * HOUR)


def signs(export: InfluxExport, span: Window = SPAN) -> dict[PartitionWindow, Verdict]:
    """Every window that is not equal."""
    found = verify(export.verification(Stop()), span, Stop())
    return {each.slot: each.sign for each in found if each.sign is not Verdict.EQUAL}


def mend(exporter: Exporter, export: InfluxExport, span: Window = SPAN) -> tuple[Run, list[ComparedWindow]]:
    told: list[ComparedWindow] = []
    work = Job(NAME, 60, lambda context: heal(export.verification(context.stop), span, context, told.append))
    run = execute(work, exporter._services(), Stop(), Silent())  # noqa: SLF001 - the exporter's own services
    assert run is not None
    return run, told


def key_of(exporter: Exporter, window: Window, device: str = "D1") -> str:
    (key,) = [k for k in exporter.keys if f"={device}/" in k and f"export_{window.start:%H%M%S}" in k]
    return key


def delete(exporter: Exporter, key: str) -> None:
    exporter.store.inner.delete(key)


def truncate(exporter: Exporter, key: str) -> None:
    put_bytes(exporter, key, content(exporter.store, key)[:-40])


def put_another(exporter: Exporter, key: str) -> None:
    """The object of noon's own hour, which is smaller, in the place of another."""
    put_bytes(exporter, key, content(exporter.store, key_of(exporter, hour(1))))


def put_bytes(exporter: Exporter, key: str, data: bytes) -> None:
    exporter.store.inner.put(key, io.BytesIO(data), PutRequest("application/octet-stream"))


def forget(exporter: Exporter) -> None:
    """The source drops all that is old, as retention does."""
    exporter.influx.points._series.clear()  # noqa: SLF001 - the simulator knows no retention
    exporter.write(NOON)


@pytest.fixture(params=["parquet", "csv"])
def full(request: pytest.FixtureRequest, exporter: Exporter) -> Exporter:
    return filled(exporter, request.param, delta=False)


@pytest.fixture(params=["parquet", "csv"])
def with_delta(request: pytest.FixtureRequest, exporter: Exporter) -> Exporter:
    return filled(exporter, request.param, delta=True)


LATE = NOON - 4 * HOUR + timedelta(seconds=1)
DELTA = "export_080001"


def filled(exporter: Exporter, form: str, *, delta: bool) -> Exporter:
    """Six closed hours of two devices, one of them with a delta that an older version wrote."""
    exporter.environ = {"EXPORT_FORMAT": form, "LOOKBACK_HOURS": "6", "EXPORT_GRACE_SECONDS": "0"}
    for device in ("D1", "D2"):
        exporter.write_each(NOON - 6 * HOUR, NOON - 2 * HOUR, 300, device)
        exporter.write_each(NOON - HOUR, NOON, 600, device)
    # more than float64 holds, which the reader of CSV objects in these tests does not hold either
    count = 2**53 + 1 if form == "parquet" else 42
    exporter.write(NOON - 5 * HOUR + timedelta(seconds=7), "D2", f'voltage=1,count={count}i,note="a,\\"b\n",on=true')
    if delta:
        exporter.well()
    exporter.write(LATE, "D1", "voltage=2.5")
    if delta:
        exporter.old_delta("D1", hour(4), 1, Window(LATE, LATE + timedelta(seconds=1)))
    else:
        exporter.well()
    assert any(DELTA in key for key in exporter.keys) is delta
    return exporter


def delta_of(exporter: Exporter) -> str:
    return next(key for key in exporter.keys if DELTA in key)


def test_a_whole_export_is_equal_window_by_window(with_delta: Exporter) -> None:
    full = with_delta
    found = list(verify(full.export().verification(Stop()), SPAN, Stop()))
    assert [each.slot for each in found] == [
        PartitionWindow(d, hour(n)) for d in ("D1", "D2") for n in (6, 5, 4, 3, 2, 1)
    ]
    assert {each.sign for each in found} == {Verdict.EQUAL}
    rows = {(each.slot.partition, each.slot.window): each.destination and each.destination.rows for each in found}
    assert rows["D1", hour(4)] == 13
    assert rows["D2", hour(5)] == 13
    assert rows["D1", hour(2)] == 0


@pytest.mark.parametrize("full", ["parquet"], indirect=True)
def test_a_device_that_nobody_knows_is_refused_with_those_that_are_known(full: Exporter) -> None:
    ends = full.export().verification(Stop())
    with pytest.raises(Rejected, match="no partition is named 'D11'") as caught:
        list(verify(ends, SPAN, Stop(), "D11"))
    assert caught.value.hint.startswith("partitions: D1")
    assert {each.sign for each in verify(ends, SPAN, Stop(), "D1")} == {Verdict.EQUAL}


def test_a_documented_tag_may_be_ignored(exporter: Exporter) -> None:
    exporter.environ = {"INFLUXDB_IGNORED_TAGS": "location", "LOOKBACK_HOURS": "6", "EXPORT_GRACE_SECONDS": "0"}
    exporter.write(NOON - HOUR, fields="voltage=1")
    exporter.write(NOON - HOUR, fields="current=2", location="Plant-B")
    exporter.well()
    assert signs(exporter.export()) == {}


@pytest.mark.parametrize("is_layout_lost", [False, True])
def test_what_healing_writes_has_its_columns_in_the_layout_file(full: Exporter, *, is_layout_lost: bool) -> None:
    full.write(NOON - 5 * HOUR + timedelta(seconds=9), "D1", "pressure=2.5", phase="A")
    if is_layout_lost:
        for key in (*full.keys, "telemetry/_headwater/layout.json"):
            delete(full, key)
    export = full.export()
    assert mend(full, export)[0].outcome is Outcome.OK
    assert {(each["kind"], each["name"]) for each in full.layout["columns"]} >= {
        ("field", "pressure"),
        ("tag", "phase"),
    }
    assert signs(export) == {}
    full.check()


def test_what_is_deleted_truncated_or_exchanged_is_named_exactly_and_mended_exactly(with_delta: Exporter) -> None:
    full, export = with_delta, with_delta.export()
    before = {key: content(full.store, key) for key in full.keys}
    rows = exported(full.store)
    damaged = [key_of(full, hour(6)), key_of(full, hour(5)), key_of(full, hour(3), "D2")]
    delete(full, damaged[0])
    truncate(full, damaged[1])
    put_another(full, damaged[2])
    expected = {
        PartitionWindow("D1", hour(6)): Verdict.MISSING,
        PartitionWindow("D1", hour(5)): Verdict.ERROR,
        PartitionWindow("D2", hour(3)): Verdict.DIFFERS,
    }
    assert signs(export) == expected
    full.store.puts.clear()
    run, told = mend(full, export)
    assert run.outcome is Outcome.OK, run.error
    assert {each.slot for each in told if each.healed} == set(expected)
    assert sorted(full.store.puts) == sorted(damaged)
    assert signs(export) == {}
    assert full.keys == sorted(before)
    assert exported(full.store) == rows
    # each write has a name of its own inside the bytes of Parquet, so only what was left alone is the same to the byte
    same = [key for key in before if key.endswith("csv") or key not in damaged]
    assert [key for key in same if content(full.store, key) != before[key]] == []
    full.check()
    assert mend(full, export)[0].report.windows == 0


def test_a_lost_delta_and_its_lost_window_are_written_again_without_a_double(with_delta: Exporter) -> None:
    full, export = with_delta, with_delta.export()
    delete(full, delta_of(full))
    assert signs(export) == {PartitionWindow("D1", hour(4)): Verdict.DIFFERS}
    assert mend(full, export)[0].outcome is Outcome.OK
    full.check()
    for key in [key for key in full.keys if "device_id=D1" in key and "export_0800" in key]:
        delete(full, key)
    assert signs(export) == {PartitionWindow("D1", hour(4)): Verdict.MISSING}
    assert mend(full, export)[0].outcome is Outcome.OK
    full.check()


def test_a_delta_whose_rows_its_object_holds_is_neither_compared_nor_mapped(with_delta: Exporter) -> None:
    full, export = with_delta, with_delta.export()
    key, held = delta_of(full), full.store.head(delta_of(full))
    assert held is not None
    body = content(full.store, key)
    full.backfill(SPAN.start, NOON)
    assert key not in full.keys
    full.check()
    full.store.inner.put(key, io.BytesIO(body), PutRequest(held.content_type, held.metadata))  # it could not be deleted
    assert signs(export) == {}
    states = [cell.state for cell in export.chart.cells("D1", SPAN)]
    assert states == [CellState.EQUAL] * 4 + [CellState.EMPTY, CellState.EQUAL]
    full.store.puts.clear()
    full.backfill(SPAN.start, NOON)
    assert (key in full.keys, full.store.puts) == (False, [])
    full.check()


def test_a_row_that_is_there_twice_differs_and_is_taken_out(full: Exporter) -> None:
    key, export = key_of(full, hour(3)), full.export()
    put_bytes(full, key.replace("090000", "090001"), content(full.store, key))
    assert signs(export) == {PartitionWindow("D1", hour(3)): Verdict.DIFFERS}
    assert mend(full, export)[0].outcome is Outcome.OK
    full.check()


def test_rows_later_than_the_reconcile_differ_and_go_into_the_object_of_their_window(full: Exporter) -> None:
    export, keys = full.export(), full.keys
    full.write(NOON - 3 * HOUR + timedelta(seconds=2), "D1", "voltage=3")
    assert signs(export) == {PartitionWindow("D1", hour(3)): Verdict.DIFFERS}
    run, _ = mend(full, export)
    assert (run.outcome, run.report.late_rows) == (Outcome.OK, 1)
    assert (signs(export), full.keys) == ({}, keys)
    full.check()


def test_what_only_the_destination_has_is_kept_and_said(full: Exporter) -> None:
    export = full.export()
    forget(full)
    before = {key: content(full.store, key) for key in full.keys}
    assert set(signs(export).values()) == {Verdict.EXTRA}
    run, _ = mend(full, export)
    assert run.outcome is Outcome.PARTIAL
    assert "kept on purpose" in run.hint
    assert {key: content(full.store, key) for key in full.keys} == before


def test_what_only_a_delta_has_is_kept_in_the_object_of_its_window(with_delta: Exporter) -> None:
    full, before = with_delta, exported(with_delta.store)
    forget(full)
    run, _ = mend(full, full.export())
    assert run.outcome is Outcome.PARTIAL
    assert not any(DELTA in key for key in full.keys)
    assert exported(full.store) == before


def test_what_is_lost_at_both_ends_is_not_written_over(full: Exporter) -> None:
    export, key = full.export(), key_of(full, hour(6))
    forget(full)
    put_bytes(full, key, b"half of it")
    run, _ = mend(full, export)
    assert run.outcome is Outcome.PARTIAL
    assert content(full.store, key) == b"half of it"


@pytest.mark.parametrize("with_delta", ["parquet"], indirect=True)
def test_the_gap_map_shows_what_the_listing_shows(with_delta: Exporter) -> None:
    full = with_delta
    chart = full.export().chart
    assert chart.partitions() == ["D1", "D2"]
    before = [cell.state for cell in chart.cells("D1", SPAN)]
    assert before == [CellState.EQUAL] * 4 + [CellState.EMPTY, CellState.EQUAL]
    delete(full, key_of(full, hour(6)))
    put_another(full, key_of(full, hour(5)))
    delete(full, delta_of(full))
    after = [cell.state for cell in chart.cells("D1", replace(SPAN, end=NOON + 3 * HOUR))]
    assert after == [
        CellState.MISSING,
        CellState.STALE,
        CellState.PARTIAL,
        CellState.EQUAL,
        CellState.EMPTY,
        CellState.EQUAL,
    ]
    full.at(minutes=30)
    assert chart.cells("D1", SPAN)[-1].state is CellState.OPEN


class Blind(Simulator):
    """The source as a reader with a fault sees it: its counts and its joined rows lack what `lost` names, in Flux."""

    def __init__(self, url: str, lost: str) -> None:
        super().__init__()
        self._url, self._lost = url, lost

    def respond(self, request: Request) -> Answer:
        query = f"{request.path}?{urlencode(request.parameters)}"
        body = request.body.decode()
        if "pivot(" in body or "aggregateWindow(" in body or "count()" in body:
            body = re.sub(r"(range\([^)]*\))", lambda found: f"{found[1]} |> filter(fn: (r) => {self._lost})", body)
        headers = {name: request.headers[name] for name in ("authorization", "content-type") if name in request.headers}
        answer = urllib3.request(request.method, self._url + query, body=body.encode(), headers=headers)
        return Answer(answer.status, {"Content-Type": answer.headers["Content-Type"]}, answer.data)


@pytest.mark.parametrize("form", ["parquet", "csv"])
@pytest.mark.parametrize("lost", ['r._field != "count"', 'r.location != "B"'], ids=["a field", "a series"])
def test_what_only_the_exports_own_reading_loses_is_found_by_verify_and_mended_when_it_reads_again(
    exporter: Exporter, lost: str, form: str
) -> None:
    exporter.environ = {"EXPORT_FORMAT": form, "LOOKBACK_HOURS": "6", "EXPORT_GRACE_SECONDS": "0"}
    exporter.write(NOON - 3 * HOUR, "D1", "voltage=1,count=7i")
    exporter.write(NOON - 3 * HOUR, "D1", "voltage=2,count=8i", location="B")
    with Blind(exporter.influx.url, json.dumps(lost)[1:-1]) as blind:
        exporter.url = blind.url
        exporter.well()
        # what reads as the export does finds nothing
        assert (exporter.reconcile().report.windows, exporter.backfill(SPAN.start, NOON).report.windows) == (0, 0)
        assert signs(exporter.export()) == {PartitionWindow("D1", hour(3)): Verdict.DIFFERS}
        run, _ = mend(exporter, exporter.export())
        assert (run.outcome, "at the source" in run.error) == (Outcome.PARTIAL, True)
    exporter.url = exporter.influx.url
    assert mend(exporter, exporter.export())[0].outcome is Outcome.OK
    assert signs(exporter.export()) == {}
    exporter.check()


@pytest.mark.parametrize("form", ["parquet", "csv"])
def test_every_set_of_tags_type_and_value_set_aside_is_equal_and_said_in_either_language(
    exporter_of_either: Exporter, form: str
) -> None:
    exporter = exporter_of_either
    exporter.environ |= {"EXPORT_FORMAT": form, "LOOKBACK_HOURS": "169", "EXPORT_GRACE_SECONDS": "0"}
    exporter.write(NOON - 168 * HOUR, "D1", 'voltage=1,count=9007199254740993i,note="x",state=true')
    exporter.write(NOON - 3 * HOUR, "D1", 'voltage=2,count=8.5,note="1.5",state="on",empty=""')
    exporter.write(NOON - 3 * HOUR, "D1", 'voltage=3,count=9007199254740993,note="true"', phase="L1")
    exporter.write(NOON - 3 * HOUR, "D1", "voltage=4,count=1e300,power=-0.0", phase="L2", schema_version="1")
    exporter.write(NOON - 3 * HOUR, "D1", "voltage=5,power=0.1", phase="L2", schema_version="2")
    exporter.write(NOON - 3 * HOUR, "D1", "voltage=4", phase="L2", schema_version="3")
    while exporter.run().report.more:
        pass
    spans = (hour(168), Window(NOON - 4 * HOUR, NOON))
    found = [each for span in spans for each in verify(exporter.export().verification(Stop()), span, Stop())]
    assert {each.sign for each in found} == {Verdict.EQUAL}
    rows = {each.slot.window: each.source and (each.source.rows, each.source.set_aside) for each in found}
    assert (rows[hour(3)], rows[hour(168)]) == ((3, 2), (1, 0))
    exporter.write(NOON - 3 * HOUR, "D1", "voltage=6", phase="L2", schema_version="1")  # what stands is another now
    compared = list(verify(exporter.export().verification(Stop()), spans[1], Stop()))
    [differs] = [each for each in compared if each.sign is not Verdict.EQUAL]
    assert "values set aside are not compared" in why(differs)[0]
    mend(exporter, exporter.export(), spans[1])
    assert signs(exporter.export(), spans[1]) == {}


def test_a_window_of_more_values_than_are_held_at_once_is_read_in_slices(exporter: Exporter) -> None:
    exporter.environ = {"LOOKBACK_HOURS": "6", "EXPORT_GRACE_SECONDS": "0"}
    exporter.write_each(NOON - 3 * HOUR, NOON - 2 * HOUR, 60)
    exporter.well()
    ends = exporter.export().verification(Stop())
    assert isinstance(ends, ExportEnds)
    ends.most_cells = 30
    found = list(verify(ends, SPAN, Stop()))
    assert {each.sign for each in found} == {Verdict.EQUAL}
    assert sum(each.source.rows for each in found if each.source) == 60
    assert ends.slice <= timedelta(minutes=10)


ON_A_SERVER = (
    test_what_is_deleted_truncated_or_exchanged_is_named_exactly_and_mended_exactly,
    test_a_lost_delta_and_its_lost_window_are_written_again_without_a_double,
    test_the_gap_map_shows_what_the_listing_shows,
)


@pytest.mark.slow
@pytest.mark.parametrize("check", ON_A_SERVER, ids=lambda check: check.__name__.removeprefix("test_"))
def test_on_an_s3_server(check: Callable[[Exporter], None], seaweed: Seaweed, tmp_path: Path) -> None:
    with closing(S3Store(target(seaweed, seaweed.new_bucket()), "probe")) as store:
        for made in exporter_on(store, tmp_path):
            check(filled(made, "parquet", delta=True))
