"""What the export writes: names, columns and values, in both formats, whatever the source has forgotten since."""

import io
from collections.abc import Collection, Mapping
from pathlib import Path

import duckdb
import pandas as pd
import pytest

from app.core.runs import Outcome
from app.influx_to_s3.job import NAME
from app.object_store.local import LocalDirectory
from exporter import HOUR, MINUTE, NOON, Exporter, exporter_on, ns
from exports import content, exported, rows_of, stored, table
from influxdb1 import InfluxDB1
from simulators.demo_data import Device, samples


def test_an_hour_of_a_device_is_one_object_under_the_documented_name(exporter: Exporter) -> None:
    exporter.write_each(NOON, NOON + HOUR)
    exporter.at(hours=1)
    exporter.well()
    assert exporter.keys == ["telemetry/device_id=D1/date=2026/02/07/export_120000.parquet"]
    exporter.check()


def test_the_date_and_the_prefix_may_be_written_otherwise(exporter: Exporter) -> None:
    exporter.write(NOON)
    exporter.at(minutes=5)
    exporter.well(EXPORT_DATE_FORMAT="%Y-%m-%d", S3_PREFIX="lake/raw/")
    keys = [info.key for info in exporter.store.list("lake/")]
    assert keys == [
        "lake/raw/_headwater/layout.json",
        "lake/raw/device_id=D1/date=2026-02-07/export_120000.parquet",
    ]


def test_the_object_says_what_it_is(exporter: Exporter) -> None:
    rows = exporter.write_each(NOON, NOON + 10 * MINUTE)
    exporter.at(minutes=10)
    exporter.well(EXPORT_WINDOW_SECONDS="900")
    [key] = exporter.keys
    info = exporter.store.head(key)
    assert info is not None
    expected = {"pipeline": NAME, "window": "2026-02-07T12:00:00Z/2026-02-07T12:15:00Z", "rows": str(rows)}
    expected |= {"timestamp-unit": "us", "tags": "all"}
    version = info.metadata["app-version"]
    by_write = {name: info.metadata[name] for name in ("digest", "app-version", "write")}
    assert info.metadata == {**expected, **by_write}
    inside = {name.decode(): value.decode() for name, value in table(exporter.store, key).schema.metadata.items()}
    given = {**info.metadata, "partition": "D1"}
    assert {name: inside[f"headwater.{name}"] for name in given} == given
    assert version
    assert info.content_type == "application/vnd.apache.parquet"
    exporter.write(NOON + 11 * MINUTE)
    exporter.at(minutes=12)
    exporter.well(EXPORT_WINDOW_SECONDS="900")
    after = exporter.store.head(key)
    assert after is not None
    assert after.metadata["cursor"] == f"{exporter.cursor:%Y-%m-%dT%H:%M:%SZ}"
    assert (exporter.cursor < NOON, after.metadata["write"] != info.metadata["write"]) == (True, True)


def test_pandas_and_duckdb_read_the_documented_columns_and_types(exporter: Exporter) -> None:
    exporter.write(NOON, fields='voltage=230i,current=2i,power=414i,soc=80i,mode="eco"')
    exporter.write(NOON + MINUTE, fields="voltage=231i", location="")
    exporter.at(minutes=5)
    exporter.well()
    [key] = exporter.keys
    frame = pd.read_parquet(io.BytesIO(content(exporter.store, key)))
    assert [(name, str(kind)) for name, kind in frame.dtypes.items()] == [
        ("timestamp", "datetime64[us, UTC]"),
        ("device_id", "category"),
        ("device_type", "str"),
        ("location", "str"),
        ("voltage", "float64"),
        ("current", "float64"),
        ("power", "float64"),
        ("temperature", "float64"),
        ("hour", "int32"),
        ("day_of_week", "int32"),
        ("is_weekend", "bool"),
        ("power_factor", "float64"),
        ("mode", "str"),
        ("soc", "float64"),  # an integer column with a gap, as pandas shows it
    ]
    assert frame["location"].tolist() == ["Plant-A", "unknown"]
    assert frame["power_factor"].tolist()[0] == 0.9
    path = exporter.folder / "objects" / key
    with duckdb.connect() as database:
        database.execute("SET TimeZone = 'UTC'")
        found = database.execute(
            "SELECT epoch_ns(timestamp), hour, day_of_week, is_weekend FROM read_parquet(?, hive_partitioning = false)",
            [str(path)],
        ).fetchall()
    assert found == [(at, 12, 5, True) for at in (1_770_465_600 * 10**9, 1_770_465_660 * 10**9)]


def test_nanoseconds_survive_and_are_rows_of_their_own(exporter: Exporter) -> None:
    base = 1_770_465_600 * 10**9
    for offset in (0, 1, 2, 999_999_999):
        exporter.influx.write(f"device_telemetry,device_id=D1 voltage={offset} {base + offset}")
    exporter.at(minutes=1)
    exporter.well()
    assert [row["timestamp"] - base for row in rows_of(exporter.store, exporter.keys[0])] == [0, 1, 2, 999_999_999]
    exporter.check()


def test_rows_that_the_source_forgot_stay_in_the_object(exporter: Exporter) -> None:
    exporter.write_each(NOON, NOON + 30 * MINUTE)
    exporter.at(minutes=30)
    exporter.well()
    before = stored(exporter.influx.points)
    exporter.influx.points._series.clear()  # noqa: SLF001 - the simulator knows no retention
    exporter.write_each(NOON + 20 * MINUTE, NOON + 40 * MINUTE)
    exporter.at(minutes=40)
    exporter.well()
    assert exported(exporter.store) == {**before, **stored(exporter.influx.points)}
    exporter.at(hours=3)
    exporter.well()
    assert exported(exporter.store) == {**before, **stored(exporter.influx.points)}


def test_objects_may_shrink_when_that_is_allowed(exporter: Exporter) -> None:
    exporter.environ["EXPORT_ALLOW_SHRINK"] = "true"
    exporter.write_each(NOON, NOON + 30 * MINUTE)
    exporter.at(minutes=30)
    exporter.well()
    exporter.influx.points._series.clear()  # noqa: SLF001 - the simulator knows no retention
    exporter.write(NOON + 20 * MINUTE)
    exporter.well()
    exporter.check()
    exporter.influx.points._series.clear()  # noqa: SLF001 - as above
    exporter.write(NOON + 2 * HOUR)
    exporter.at(hours=4)
    exporter.well()
    exporter.check()


def test_csv_objects_hold_the_same_rows_and_keep_what_the_source_forgot(exporter: Exporter) -> None:
    exporter.environ["EXPORT_FORMAT"] = "csv"
    text = 'voltage=230,note="a,\\"b\\"\nc",count=7i,on=true,name="007"'
    exporter.write(NOON, fields=text)
    exporter.write_each(NOON + MINUTE, NOON + 30 * MINUTE)
    exporter.at(minutes=30)
    exporter.well()
    [key] = exporter.keys
    assert key.endswith("export_120000.csv")
    [first, *_] = content(exporter.store, key).decode().splitlines()
    assert first == (
        "timestamp,device_id,device_type,location,voltage,current,power,temperature,"
        "hour,day_of_week,is_weekend,power_factor,count,name,note,on"
    )
    assert b"2026-02-07T12:00:00.000000000Z" in content(exporter.store, key)
    held = rows_of(exporter.store, key)
    exporter.influx.points._series.clear()  # noqa: SLF001 - the simulator knows no retention
    exporter.write(NOON + 31 * MINUTE)
    exporter.at(minutes=32)
    exporter.well()
    assert rows_of(exporter.store, key)[:-1] == held
    assert b'"007"' in content(exporter.store, key)


@pytest.mark.slow
def test_large_csv_objects_with_sparse_columns_are_united_too(exporter: Exporter) -> None:
    exporter.environ |= {"EXPORT_FORMAT": "csv", "EXPORT_BATCH_SIZE": "100000"}
    rows = 30_000  # more than one block of the CSV reader
    base = 1_770_465_600 * 10**9
    key = ("device_telemetry", (("device_id", "D1"),))
    exporter.influx.points.extend(
        key, [base + n * 10**8 for n in range(rows)], {"voltage": [n / 7 for n in range(rows)]}
    )
    exporter.influx.write(f'device_telemetry,device_id=D1 note="x",level=1.5 {base + rows * 10**8}')
    exporter.influx.write(f"device_telemetry,device_id=D1 level=2 {base + 5}")
    exporter.at(hours=1)
    exporter.well()
    before = stored(exporter.influx.points)
    exporter.influx.points._series.clear()  # noqa: SLF001 - the simulator knows no retention
    exporter.write(NOON + 59 * MINUTE)
    exporter.well()
    assert exported(exporter.store) == {**before, **stored(exporter.influx.points)}


def test_the_reference_measurement_has_the_documented_columns_exactly(exporter: Exporter) -> None:
    exporter.write(
        NOON,
        fields="voltage=230.5,current=0.85,power=195.9,temperature=45.2",
        device_type="bulb",
        schema_version="1",
        enrichment_status="ok",
    )
    exporter.at(minutes=5)
    exporter.well()
    assert table(exporter.store, exporter.keys[0]).column_names == [
        *("timestamp", "device_id", "device_type", "location", "voltage", "current", "power", "temperature"),
        *("hour", "day_of_week", "is_weekend", "power_factor"),
    ]


def test_each_tag_set_of_a_device_is_a_row_of_its_own(exporter: Exporter) -> None:
    exporter.write(NOON, fields="voltage=1", firmware="1")
    exporter.write(NOON, fields="power=2", firmware="2")
    exporter.write(NOON + MINUTE, fields="voltage=3", firmware="2")
    exporter.at(minutes=5)
    exporter.well()
    rows = rows_of(exporter.store, exporter.keys[0])
    assert [(row["firmware"], row["voltage"], row["power"]) for row in rows] == [
        ("1", 1.0, None),
        ("2", None, 2.0),
        ("2", 3.0, None),
    ]


@pytest.mark.parametrize("changes", [("rack", ""), ("", "rack")])
def test_a_change_of_the_ignored_tags_doubles_nothing_that_is_written_already(
    exporter: Exporter, changes: tuple[str, str]
) -> None:
    def rows() -> int:
        return sum(table(exporter.store, key).num_rows for key in exporter.keys)

    before, after = ({"INFLUXDB_IGNORED_TAGS": tags, "EXPORT_GRACE_SECONDS": "0"} for tags in changes)
    for field, rack in (("voltage=1", "A"), ("current=2", "B")):
        exporter.write(NOON, fields=field, rack=rack)
        exporter.write(NOON + HOUR, fields=field, rack=rack)
    exporter.at(hours=1, minutes=1)
    exporter.well(**before)
    number = rows()
    exporter.at(hours=2, minutes=1)
    exporter.well(**after)
    exporter.reconcile(**after)
    exporter.backfill(NOON, NOON + 2 * HOUR, **after)
    assert rows() == number
    for field, rack in (("voltage=1", "A"), ("current=2", "B")):
        exporter.write(NOON + 24 * HOUR, fields=field, rack=rack)
    exporter.at(hours=25)
    exporter.well(**after)
    assert rows() == number + (2 if number == 2 else 1)  # the next day has the other identity


def test_points_that_differ_in_ignored_tags_only_are_one_row_and_what_disagrees_is_set_aside(
    exporter: Exporter,
) -> None:
    exporter.environ["INFLUXDB_IGNORED_TAGS"] = "firmware"
    exporter.write(NOON, fields="voltage=1,current=5", firmware="1")
    exporter.write(NOON, fields="voltage=2,power=2,current=5", firmware="2")
    exporter.at(minutes=5)
    run = exporter.run()
    assert run.outcome is Outcome.PARTIAL
    [row] = rows_of(exporter.store, exporter.keys[0])
    assert (row["voltage"], row["current"], row["power"]) == (1.0, 5.0, 2.0)
    assert "firmware" not in row
    total = run.report.ledger.total
    assert (total.counted, total.new, total.already_there, total.set_aside) == (5, 3, 1, 1)
    [kept] = [info.key for info in exporter.store.list("telemetry/_set_aside/")]
    line = f"device_telemetry,device_id=D1,device_type=pump,firmware=2,location=Plant-A voltage=2.0 {ns(NOON)}\n"
    assert content(exporter.store, kept).decode() == line
    assert exporter.run().outcome is Outcome.OK


def test_flux_and_influxql_of_a_real_influxdb_1_write_the_same_rows(
    exporter: Exporter, influxdb1: InfluxDB1, tmp_path: Path
) -> None:
    device = Device(3, seed=1)
    lines = "\n".join(sample.line(device.series) for sample in samples(device, ns(NOON), ns(NOON + HOUR)))
    exporter.influx.write(lines)
    database = influxdb1.new_database()
    influxdb1.write(database, lines)
    exporter.at(hours=3)
    written = []
    for number, environ in enumerate(
        (
            {},
            {"INFLUXDB_API": "influxql", "INFLUXDB_DATABASE": database, "INFLUXDB_URL": influxdb1.url},
        )
    ):
        for one in exporter_on(LocalDirectory(tmp_path / f"objects{number}"), tmp_path / f"{number}"):
            one.url, one.environ = exporter.url, environ
            one.at(hours=1)
            one.well()
            one.at(hours=3)
            one.well()
            written.append({key: table(one.store, key) for key in one.keys})
    assert list(written[0]) == ["telemetry/device_id=D3/date=2026/02/07/export_120000.parquet"]
    for other in written[1:]:
        assert list(other) == list(written[0])
        for key, rows in other.items():
            own = ("headwater.write", "headwater.cursor")
            assert rows.equals(written[0][key])
            assert without(rows.schema.metadata, own) == without(written[0][key].schema.metadata, own)


def without(metadata: Mapping[bytes, bytes], names: Collection[str]) -> Mapping[bytes, bytes]:
    return {name: value for name, value in metadata.items() if name.decode() not in names}
