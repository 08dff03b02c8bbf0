"""The sink of tables: its contract on a directory and on a real S3 server, then the export through a faulty network."""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from app.core.errors import Conflict, Permanent, Rejected
from app.core.runs import Outcome
from app.core.window import Window
from app.influx_to_s3.job import NAME, RECONCILE
from app.influx_to_s3.spool import RowBatch, Spool
from app.stores.layouts import Layout
from app.stores.local_directory import LocalDirectory
from app.stores.objects import ObjectStore, Put
from app.stores.parquet import ROW_GROUP_ROWS, TableSink
from app.stores.s3 import S3Store
from exporter import NOON, Exporter, exporter_on, ns
from exports import content, exported, rows_of, stored
from fault_proxy import (
    Fault,
    FaultProxy,
    answer,
    answer_afterwards,
    black_hole,
    cut_request,
    lose_answer,
    reset,
    truncate,
)
from seaweed import Seaweed, target

HOUR = timedelta(hours=1)
MINUTE = timedelta(minutes=1)
WINDOW = Window(NOON, NOON + HOUR)
LAYOUT = Layout(datetime(1970, 1, 1, tzinfo=UTC), 3600, "parquet", "%Y/%m/%d")
FORMATS = ("parquet", "csv")


@pytest.fixture(scope="module")
def bucket(seaweed: Seaweed) -> str:
    return seaweed.new_bucket()


@pytest.fixture(scope="module")
def shared_s3(seaweed: Seaweed, bucket: str) -> Iterator[S3Store]:
    """One for all tests of the contract: making the SDK's client takes a third of a second."""
    with closing(S3Store(target(seaweed, bucket), "probe")) as store:
        store.probe()
        yield store


@pytest.fixture(params=["local directory", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ObjectStore:
    if request.param == "s3":
        shared: ObjectStore = request.getfixturevalue("shared_s3")
        return shared
    local = LocalDirectory(tmp_path / "objects")
    local.probe()
    return local


@pytest.fixture
def make(store: ObjectStore, tmp_path: Path) -> Callable[..., TableSink]:
    """A sink of its own prefix and layout."""

    def made(**layout: Any) -> TableSink:
        return TableSink(
            store=store,
            pipeline="influx_to_s3",
            prefix=f"t{tmp_path.name}",
            layout_at=lambda _instant: replace(LAYOUT, **layout),
            spool_directory=tmp_path / "spool",
            app_version="1.2.3",
            dictionary=("device_id", "device_type", "location"),
        )

    return made


def batch(folder: Path, fields: Mapping[str, Sequence[Any]], step_ns: int = 10**9) -> RowBatch:
    """Rows of D1 in WINDOW, one a second."""
    number = len(next(iter(fields.values())))
    spool = Spool("D1", folder, 10**6)
    times = pa.array([ns(NOON) + n * step_ns + 7 for n in range(number)]).cast(pa.timestamp("ns", "UTC"))
    spool.append(pa.table({"timestamp": times, **fields}))
    return spool.finish({})


ROWS: Mapping[str, Sequence[Any]] = {
    "voltage": [1.5, None, -0.1],
    "count": [1, None, 3],
    "note": ['a,"b"\nc', "007", "é😀;\t"],
    "on": [True, None, False],
}


def put(sink: TableSink, key: str, rows: RowBatch, expected: str | None = None) -> str:
    with closing(sink.encode("D1", WINDOW, rows)) as encoded:
        return sink.put(key, encoded, expected)


@pytest.mark.parametrize("kind", FORMATS)
def test_what_was_put_is_there_with_what_its_writer_said_of_it(
    make: Callable[..., TableSink], tmp_path: Path, kind: str
) -> None:
    sink = make(format=kind)
    rows = batch(tmp_path / "rows", ROWS)
    key = sink.key("D1", WINDOW, 0)
    assert sink.head(key) is None
    version = put(sink, key, rows)
    held = sink.head(key)
    assert held is not None
    assert (held.version, held.digest, held.rows) == (version, rows.digest, 3)
    assert held.size_bytes == len(content(sink.store, key))


@pytest.mark.parametrize("kind", FORMATS)
def test_an_object_is_replaced_only_as_the_version_that_was_seen(
    make: Callable[..., TableSink], tmp_path: Path, kind: str
) -> None:
    sink = make(format=kind)
    key = sink.key("D1", WINDOW, 0)
    first, second = (batch(tmp_path / "rows", {"voltage": [value]}) for value in (1.0, 2.0))
    old = put(sink, key, first)
    with pytest.raises(Conflict):
        put(sink, key, second)
    new = put(sink, key, second, old)
    assert new != old
    with pytest.raises(Conflict):
        put(sink, key, first, old)
    held = sink.head(key)
    assert held is not None
    assert held.digest == second.digest
    with pytest.raises(Conflict):
        put(sink, sink.key("D2", WINDOW, 0), first, old)


@pytest.mark.parametrize("kind", FORMATS)
def test_the_same_rows_give_the_same_bytes(make: Callable[..., TableSink], tmp_path: Path, kind: str) -> None:
    sink = make(format=kind)
    made = []
    for _ in range(2):
        with closing(sink.encode("D1", WINDOW, batch(tmp_path / "rows", ROWS))) as encoded:
            encoded.file.seek(0)
            made.append(encoded.file.read())
    assert made[0] == made[1]


@pytest.mark.parametrize("kind", FORMATS)
def test_rows_come_back_in_order_with_nanoseconds_and_the_text_that_they_were(
    make: Callable[..., TableSink], tmp_path: Path, kind: str
) -> None:
    sink = make(format=kind)
    key = sink.key("D1", WINDOW, 0)
    version = put(sink, key, batch(tmp_path / "rows", ROWS))
    back = pa.concat_tables(sink.read(key, version))
    assert back.column("timestamp").cast(pa.int64()).to_pylist() == [ns(NOON) + n * 10**9 + 7 for n in range(3)]
    assert back.schema.field("timestamp").type == pa.timestamp("ns", "UTC")
    assert back.column("note").to_pylist() == ROWS["note"]
    as_text = kind == "csv"
    assert back.column("count").to_pylist() == (["1", None, "3"] if as_text else [1, None, 3])
    assert back.column("on").to_pylist() == (["true", None, "false"] if as_text else [True, None, False])


@pytest.mark.parametrize("kind", FORMATS)
def test_only_the_version_that_was_asked_for_is_read(make: Callable[..., TableSink], tmp_path: Path, kind: str) -> None:
    sink = make(format=kind)
    key = sink.key("D1", WINDOW, 0)
    old = put(sink, key, batch(tmp_path / "rows", {"voltage": [1.0]}))
    new = put(sink, key, batch(tmp_path / "rows", {"voltage": [2.0]}), old)
    with pytest.raises(Conflict):
        list(sink.read(key, old))
    assert len(list(sink.read(key, new))) == 1
    with pytest.raises(Conflict):
        list(sink.read(sink.key("D2", WINDOW, 0), new))


@pytest.mark.parametrize("kind", FORMATS)
def test_no_rows_are_an_object_with_columns_only(make: Callable[..., TableSink], tmp_path: Path, kind: str) -> None:
    sink = make(format=kind)
    key = sink.key("D1", WINDOW, 0)
    version = put(sink, key, Spool("D1", tmp_path / "rows", 0).finish({}))
    assert sum(table.num_rows for table in sink.read(key, version)) == 0
    assert rows_of(sink.store, key) == []


@pytest.mark.parametrize("kind", FORMATS)
def test_a_reading_that_is_given_up_leaves_no_file(make: Callable[..., TableSink], tmp_path: Path, kind: str) -> None:
    sink = make(format=kind)
    key = sink.key("D1", WINDOW, 0)
    version = put(sink, key, batch(tmp_path / "rows", {"voltage": [0.5] * 3000}))
    tables = iter(sink.read(key, version))
    next(tables)
    tables.close()  # type: ignore[attr-defined]
    assert list((tmp_path / "spool").iterdir()) == []


@pytest.mark.parametrize(
    "body", [b"", b"PAR1", b"not a table at all", b"timestamp,x\nnever,1\n", b'"timestamp', b"a\xff\n1\n"]
)
@pytest.mark.parametrize("kind", FORMATS)
def test_an_object_that_is_no_table_is_named(make: Callable[..., TableSink], kind: str, body: bytes) -> None:
    sink = make(format=kind)
    key = sink.key("D1", WINDOW, 0)
    version = sink.store.put(key, BytesIO(body), Put("text/plain"))
    held = sink.head(key)
    assert held is not None
    assert (held.digest, held.rows) == ("", None)
    with pytest.raises(Permanent) as caught:
        list(sink.read(key, version))
    assert key in caught.value.message


def test_keys_follow_the_layout_and_number_deltas_by_seconds(make: Callable[..., TableSink]) -> None:
    sink = make(format="csv", date_format="%Y-%m-%d")
    base = sink.key("D1", WINDOW, 0)
    assert base.endswith("/device_id=D1/date=2026-02-07/export_120000.csv")
    assert sink.key("D1", WINDOW, 3599).endswith("export_125959.csv")
    with pytest.raises(Rejected, match="no name left"):
        sink.key("D1", WINDOW, 3600)
    bare = replace(sink, prefix="")
    assert bare.key("D1", WINDOW, 0) == "device_id=D1/date=2026-02-07/export_120000.csv"


@pytest.mark.parametrize(
    "device", ["", "a/b", "..", "../../x", "a..b", "a\nb", "a\0b", "\x7f", "x" * 256, "é" * 128, "/abs"]
)
def test_devices_that_cannot_be_part_of_a_key_are_refused(make: Callable[..., TableSink], device: str) -> None:
    with pytest.raises(Rejected, match="device id") as caught:
        make().key(device, WINDOW, 0)
    assert "DEVICE_IDS" in caught.value.hint


def test_keys_of_different_devices_differ(make: Callable[..., TableSink]) -> None:
    devices = ["D1", "d1", "D1 ", " D1", "D%31", "D1.", "é", "e\u0301", "a=b", "a\\b", "x" * 255]
    assert len({make().key(device, WINDOW, 0) for device in devices}) == len(devices)


def test_parquet_has_sensible_row_groups_statistics_and_compression(tmp_path: Path) -> None:
    store = LocalDirectory(tmp_path / "objects")
    sink = TableSink(store, "p", "t", lambda _at: LAYOUT, tmp_path / "spool", "1", ("device_id",))
    number = ROW_GROUP_ROWS + 1000
    rows = batch(tmp_path / "rows", {"voltage": [float(n) for n in range(number)]}, step_ns=10**6)
    put(sink, "t/x.parquet", rows)
    found = pq.ParquetFile(BytesIO(content(store, "t/x.parquet"))).metadata
    assert [found.row_group(n).num_rows for n in range(found.num_row_groups)] == [ROW_GROUP_ROWS, 1000]
    columns = {
        found.row_group(1).column(n).path_in_schema: found.row_group(1).column(n) for n in range(found.num_columns)
    }
    assert {column.compression for column in columns.values()} == {"ZSTD"}
    assert columns["voltage"].statistics.max == float(number - 1)
    assert columns["timestamp"].statistics.has_min_max
    assert columns["device_id"].has_dictionary_page
    assert not columns["voltage"].has_dictionary_page


@pytest.fixture(scope="module")
def shared_proxy(seaweed: Seaweed) -> Iterator[FaultProxy]:
    with FaultProxy(seaweed.host, seaweed.port) as proxy:
        yield proxy


@pytest.fixture
def proxy(shared_proxy: FaultProxy) -> Iterator[FaultProxy]:
    shared_proxy.seen.clear()
    yield shared_proxy
    shared_proxy.clear()


@pytest.fixture(scope="module")
def shared_remote(seaweed: Seaweed, shared_proxy: FaultProxy, bucket: str) -> Iterator[S3Store]:
    with closing(S3Store(replace(target(seaweed, bucket), endpoint_url=shared_proxy.url), "probe")) as store:
        store.probe()
        yield store


@pytest.fixture
def remote(shared_remote: S3Store, proxy: FaultProxy, tmp_path: Path) -> Iterator[Exporter]:
    """The export to the S3 server, through the proxy, below a prefix of its own."""
    assert proxy.port
    for made in exporter_on(shared_remote, tmp_path, f"x{tmp_path.name}"):
        made.write_each(NOON, NOON + 20 * MINUTE)
        made.at(minutes=20)
        yield made


OBJECT = "*export_*"


@pytest.mark.parametrize(
    "fault",
    [answer(500), answer(503), reset(), cut_request(2000), lose_answer(), answer_afterwards(500)],
    ids=lambda f: f.name,
)
@pytest.mark.parametrize("settled", [False, True])
def test_a_put_that_goes_wrong_once_ends_as_one_object_without_a_double(
    remote: Exporter,
    proxy: FaultProxy,
    fault: Fault,
    settled: bool,  # noqa: FBT001 - a parameter of the test
) -> None:
    if settled:
        remote.well()
        remote.write_each(NOON + 20 * MINUTE, NOON + 25 * MINUTE)
        remote.at(minutes=25)
    proxy.add(fault, "PUT", OBJECT)
    remote.well()
    assert [seen.fault for seen in proxy.seen].count(fault.name) == 1
    assert len(remote.keys) == 1
    remote.check()
    remote.store.puts.clear()
    remote.well()
    assert remote.store.puts == []


@pytest.mark.parametrize(
    "fault",
    [
        black_hole(),
        lose_answer(),
        *(pytest.param(n, marks=pytest.mark.slow) for n in (answer(503), answer_afterwards(500))),
    ],
    ids=lambda f: f.name,
)
def test_a_store_that_stays_broken_fails_the_device_and_is_made_up_for(
    remote: Exporter, proxy: FaultProxy, fault: Fault
) -> None:
    proxy.add(fault, "PUT", OBJECT, times=1000)
    run = remote.run()
    assert run.outcome in (Outcome.PARTIAL, Outcome.OK)  # OK: all was stored, and found to be
    proxy.clear()
    remote.write_each(NOON + 20 * MINUTE, NOON + 25 * MINUTE)
    remote.at(minutes=25)
    remote.well()
    assert len(remote.keys) == 1
    remote.check()


def test_a_broken_download_of_what_has_to_be_kept_is_resumed(remote: Exporter, proxy: FaultProxy) -> None:
    remote.well()
    before = exported(remote.store, remote.prefix)
    remote.influx.points._series.clear()  # noqa: SLF001 - the simulator knows no retention
    remote.write(NOON + 21 * MINUTE)
    remote.at(minutes=22)
    proxy.add(truncate(1000), "GET", OBJECT, times=2)
    remote.well()
    assert len(exported(remote.store, remote.prefix)) == len(before) + 1


def test_an_object_that_another_writer_replaced_is_read_about_again(remote: Exporter) -> None:
    remote.well()
    [key] = remote.keys
    remote.store.inner.put(key, BytesIO(b"what a person put there"), Put("text/plain"))
    remote.write(NOON + 21 * MINUTE)
    remote.at(minutes=22)
    remote.well()
    remote.check()


@pytest.mark.parametrize(
    "fault", [answer_afterwards(200, headers={"ETag": '"any"'}), answer(501)], ids=["ignored", "not implemented"]
)
def test_a_store_without_conditions_is_right_for_one_process(
    remote: Exporter, seaweed: Seaweed, proxy: FaultProxy, bucket: str, fault: Fault
) -> None:
    proxy.add(
        fault, "PUT", times=10_000, fits=lambda request: {"if-match", "if-none-match"} & request.headers.keys() != set()
    )
    with closing(S3Store(replace(target(seaweed, bucket), endpoint_url=proxy.url), f"p{remote.prefix}")) as store:
        for one in exporter_on(store, remote.folder / "one", remote.prefix):
            one.write_each(NOON, NOON + HOUR)
            for minutes in (20, 40, 59):
                one.at(minutes=minutes)
                one.well()
            assert not store.conditional
            one.write(NOON + timedelta(seconds=1))
            one.at(hours=2, minutes=1)
            one.well()
            one.write(NOON + timedelta(seconds=2))
            assert one.reconcile().report.late_rows == 1
            assert len(one.keys) == 2
            one.check()


def test_a_missing_bucket_and_a_wrong_key_are_one_clear_line(seaweed: Seaweed, bucket: str, tmp_path: Path) -> None:
    good = target(seaweed, bucket)
    for wrong, words in (
        (replace(good, bucket="no-such"), "S3_BUCKET"),
        (replace(good, secret_access_key="x"), "S3_SECRET"),
    ):
        with closing(S3Store(wrong, "probe")) as store:
            for one in exporter_on(store, tmp_path / words, "x"):
                one.write(NOON)
                one.at(minutes=1)
                run = one.run()
                assert run.outcome is Outcome.FAILED
                assert "\n" not in run.error
                assert words in run.hint


@pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(1, 12))])
def test_two_processes_that_know_nothing_of_each_other_lose_and_double_nothing(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)  # noqa: S311 - an order of events is no secret
    store = LocalDirectory(tmp_path / "objects")
    for first in exporter_on(store, tmp_path / "a"):
        for second in exporter_on(store, tmp_path / "b"):
            second.url, second.influx = first.url, first.influx
            both = (first, second)
            meanwhile = interruption(both, draw)
            first.store.before_put = meanwhile
            for step in range(25):
                now = NOON + step * 10 * MINUTE
                for _ in range(3):
                    late = timedelta(seconds=draw.randrange(0, 5400) if draw.random() < 0.3 else draw.randrange(0, 600))
                    first.write(now - late, fields=f"voltage={draw.randrange(100)}")
                first.now = second.now = now
                draw.choice(both).run()
            first.store.before_put = lambda _key: None
            for one in both:
                one.now = NOON + 24 * HOUR
                one.well()
            for one in both:  # which may be told that the other one replaced what it took for closed
                one.run(RECONCILE)
            since = ns(NOON - HOUR)  # where the first start went back to
            assert exported(store) == {
                slot: row for slot, row in stored(first.influx.points).items() if slot[1] >= since
            }


def interruption(both: tuple[Exporter, Exporter], draw: random.Random) -> Callable[[str], None]:
    """Now and then, before the first process writes, the second one does a whole run."""

    def run(_key: str) -> None:
        if draw.random() < 0.4:
            both[1].run()

    return run


@pytest.mark.parametrize("kind", FORMATS)
def test_the_record_names_the_object_that_is_there(remote: Exporter, kind: str) -> None:
    remote.well(EXPORT_FORMAT=kind)
    [record] = remote.state.checkpoints.records(NAME, "D1", NOON, NOON + HOUR)
    info = remote.store.head(record.key)
    assert info is not None
    assert (info.etag, info.size_bytes, info.metadata["rows"]) == (record.version, record.size_bytes, str(record.rows))
