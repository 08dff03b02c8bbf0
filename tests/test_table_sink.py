"""The sink of tables: its contract on a directory and on a real S3 server, and the form of its objects."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from app.core.errors import Conflict, Permanent, Rejected
from app.core.windows import Window
from app.db.checkpoints import Layout
from app.influx_to_s3.row_batch import RowBatch
from app.object_store.local import LocalDirectory
from app.object_store.port import ObjectStore, PutRequest
from app.object_store.s3 import S3Store
from app.object_store.table_sink import ROW_GROUP_ROWS, TableSink, in_nanoseconds, split_nanoseconds, stored_schema
from exporter import HOUR, NOON, ns
from exports import FORMATS, content, rows_of
from influx_points import columns_of
from seaweed import Seaweed, target

WINDOW = Window(NOON, NOON + HOUR)
LAYOUT = Layout(datetime(1970, 1, 1, tzinfo=UTC), 3600, "parquet", "%Y/%m/%d")


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
    spool = RowBatch("D1", folder, 10**6, columns_of())
    times = pa.array([ns(NOON) + n * step_ns + 7 for n in range(number)]).cast(pa.timestamp("ns", "UTC"))
    spool.append(pa.table({"timestamp": times, **fields}))
    return spool.finish({}, {})


ROWS: Mapping[str, Sequence[Any]] = {
    "voltage": [1.5, None, -0.1],
    "count": [1, None, 3],
    "note": ['a,"b"\nc', "007", "é😀;\t"],
    "on": [True, None, False],
}


def put(sink: TableSink, key: str, rows: RowBatch, expected: str | None = None) -> str:
    with closing(sink.encode("D1", WINDOW, rows)) as encoded:
        return sink.put(key, encoded, expected)


def test_only_a_closing_write_takes_the_storage_class(make: Callable[..., TableSink], tmp_path: Path) -> None:
    sink = replace(make(), storage_class="STANDARD_IA")
    key, rows, version = sink.key("D1", WINDOW, 0), batch(tmp_path / "rows", ROWS), None
    for closes, held in ((False, ("STANDARD", "")), (True, ("STANDARD_IA",)), (False, ("STANDARD", ""))):
        with closing(sink.encode("D1", WINDOW, rows)) as encoded:
            version = sink.put(key, encoded, version, closing=closes)
        info = sink.store.head(key)
        assert info is not None
        assert info.headers.get("x-amz-storage-class", "") in held


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
def test_the_same_rows_give_the_same_bytes_but_for_the_name_of_the_write(
    make: Callable[..., TableSink], tmp_path: Path, kind: str
) -> None:
    sink = make(format=kind)
    made, writes = [], []
    for _ in range(2):
        with closing(sink.encode("D1", WINDOW, batch(tmp_path / "rows", ROWS))) as encoded:
            encoded.file.seek(0)
            made.append(encoded.file.read())
            writes.append(encoded.write)
    assert len(set(writes)) == 2
    if kind == "csv":
        assert made[0] == made[1]
    else:
        assert [each.count(write.encode()) > 0 for each, write in zip(made, writes, strict=True)] == [True, True]
        assert made[0] != made[1]
        tables = [pq.read_table(BytesIO(each)) for each in made]
        assert tables[0].equals(tables[1])
        plain = [without_metadata(each) for each in made]
        assert plain[0] == plain[1]


def without_metadata(data: bytes) -> bytes:
    """The bytes of a Parquet object up to its footer: every page of it."""
    footer = int.from_bytes(data[-8:-4], "little")
    return data[: -8 - footer]


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


def at(*instants: int) -> pa.Table:
    """Rows at nanoseconds since the epoch."""
    times = pa.array(instants, pa.int64()).cast(pa.timestamp("ns", "UTC"))
    return pa.table({"timestamp": times, "voltage": pa.array([1.0] * len(instants))})


EXTREMES = [-(2**63) + 1, -1_000_001, -1001, -1000, -999, -1, 0, 1, 999, 1000, 1001, 2**63 - 1]


@given(st.lists(st.one_of(st.integers(-(2**63) + 1, 2**63 - 1), st.integers(-5000, 5000)), max_size=20))
@example(EXTREMES)
@example([-2000, 0, 5000])
@settings(max_examples=100, deadline=None)
def test_instants_of_any_time_survive_microseconds_and_what_is_below_them(instants: list[int]) -> None:
    table = at(*instants)
    has_nanos = any(each % 1000 for each in instants)
    written = split_nanoseconds(table, with_nanos=has_nanos)
    assert written.schema == stored_schema(table.schema, in_microseconds=True, with_nanos=has_nanos)
    assert written.schema.field("timestamp").type == pa.timestamp("us", "UTC")
    assert written.column_names == ["timestamp", "voltage", *(["timestamp_nanos"] if has_nanos else [])]
    if has_nanos:
        assert all(0 <= each <= 999 for each in written.column("timestamp_nanos").to_pylist())
    assert in_nanoseconds(written).equals(table)


def test_an_object_in_nanoseconds_is_read_as_it_is() -> None:
    table = at(*EXTREMES)
    assert stored_schema(table.schema, in_microseconds=False, with_nanos=True) == table.schema
    assert in_nanoseconds(table) is table


@pytest.mark.parametrize("unit", ["s", "ms", "us"])
def test_an_object_of_a_coarser_unit_is_read_in_nanoseconds(unit: str) -> None:
    times = (
        pa.array([-86_400, 0, 1_770_465_600], pa.int64()).cast(pa.timestamp("s", "UTC")).cast(pa.timestamp(unit, "UTC"))
    )
    back = in_nanoseconds(pa.table({"timestamp": times}))
    assert back.column("timestamp").cast(pa.int64()).to_pylist() == [-86_400 * 10**9, 0, 1_770_465_600 * 10**9]


@pytest.mark.parametrize("unit", ["us", "ns"])
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("instants", [EXTREMES, [-3000, 0, 7_000_000]])
def test_rows_before_1970_and_with_nanoseconds_come_back_from_objects_of_either_unit(
    make: Callable[..., TableSink], tmp_path: Path, kind: str, unit: str, instants: list[int]
) -> None:
    instants = [each for each in instants if kind == "parquet" or abs(each) < 2**62]
    sink = make(format=kind, timestamp_unit=unit)
    key = sink.key("D1", WINDOW, 0)
    spool = RowBatch("D1", tmp_path / "rows", 10**6, columns_of())
    spool.append(at(*instants))
    rows = spool.finish({}, {})
    assert rows.has_nanos == any(each % 1000 for each in instants)
    version = put(sink, key, rows)
    back = pa.concat_tables(sink.read(key, version))
    assert back.column("timestamp").cast(pa.int64()).to_pylist() == instants
    assert "timestamp_nanos" not in back.column_names
    info = sink.store.head(key)
    assert info is not None
    assert info.metadata["timestamp-unit"] == unit
    if kind == "parquet":
        held = pq.read_schema(BytesIO(content(sink.store, key)))
        assert held.field("timestamp").type == pa.timestamp(unit, "UTC")
        assert (held.names[-1] == "timestamp_nanos") == (unit == "us" and rows.has_nanos)
        assert held.field("device_id").type == pa.dictionary(pa.int32(), pa.string())


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
    version = put(sink, key, RowBatch("D1", tmp_path / "rows", 0, columns_of()).finish({}, {}))
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
    version = sink.store.put(key, BytesIO(body), PutRequest("text/plain"))
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
    "device", ["", "a/b", "a\\b", "..", "../../x", "a..b", "a\nb", "a\0b", "\x7f", "x" * 256, "é" * 128, "/abs"]
)
def test_devices_that_cannot_be_part_of_a_key_are_refused(make: Callable[..., TableSink], device: str) -> None:
    with pytest.raises(Rejected, match="device id") as caught:
        make().key(device, WINDOW, 0)
    assert "DEVICE_IDS" in caught.value.hint


def test_keys_of_different_devices_differ(make: Callable[..., TableSink]) -> None:
    devices = ["D1", "d1", "D1 ", " D1", "D%31", "D1.", "é", "e\u0301", "a=b", "x" * 245]
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
