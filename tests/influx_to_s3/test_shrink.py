"""EXPORT_ALLOW_SHRINK and `backfill --replace`: what was deleted goes, what retention forgot stays."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from app.core.pipeline import UNLIMITED
from app.core.runs import Outcome
from app.core.windows import Window
from app.influx_to_s3.influxql import InfluxQlReader
from app.influx_to_s3.reader import Retention, ServerAnswer
from exporter import EPOCH, HOUR, MINUTE, NOON, Exporter, ns
from exports import exported
from influx_points import source_of
from influx_readers import flux, influxql_without_credentials
from influxdb1 import InfluxDB1
from simulators.influx import Refuse

ALLOWED = {"EXPORT_ALLOW_SHRINK": "true"}


@pytest.fixture
def closed(exporter: Exporter) -> Exporter:
    """Noon's hour is closed; it is half past six."""
    exporter.environ = {"RECONCILE_DAYS": "1", "LOOKBACK_HOURS": "12", "EXPORT_GRACE_SECONDS": "3600"}
    exporter.write_each(NOON, NOON + HOUR)
    exporter.at(hours=6, minutes=30)
    exporter.well()
    return exporter


def lacks(exporter: Exporter, *minutes: int) -> None:
    """The source has the rows of these minutes no more, whatever the cause."""
    exporter.influx.points._series.clear()  # noqa: SLF001 - the simulator deletes nothing
    for number in sorted(set(range(60)) - set(minutes)):
        exporter.write(NOON + number * MINUTE, fields=f"voltage={200 + number % 50}.25,current=1.5,power={number}")


def minutes_of(exporter: Exporter) -> set[int]:
    return {(at - ns(NOON)) // ns(datetime(1970, 1, 1, 0, 1, tzinfo=UTC)) for _, at, _, _ in exported(exporter.store)}


def test_a_deletion_reaches_closed_windows_and_rows_that_retention_forgot_stay(closed: Exporter) -> None:
    closed.influx.points.retention_seconds = 6 * 3600
    lacks(closed, 10, 29, 30, 40)
    assert closed.reconcile(**ALLOWED).report.removed_rows == 2
    assert minutes_of(closed) == set(range(60)) - {30, 40}
    closed.store.puts.clear()
    closed.reconcile(**ALLOWED)
    assert closed.store.puts == []


def test_where_nothing_is_forgotten_any_row_may_go(closed: Exporter) -> None:
    lacks(closed, 0, 10, 59)
    closed.backfill(NOON, NOON + HOUR, **ALLOWED)
    assert minutes_of(closed) == set(range(1, 59)) - {10}


def test_where_retention_cannot_be_asked_nothing_goes_before_the_oldest_point(closed: Exporter) -> None:
    closed.influx.points.retention_seconds = None
    lacks(closed, *range(10), 20)
    closed.backfill(NOON, NOON + HOUR, **ALLOWED)
    assert minutes_of(closed) == set(range(60)) - {20}
    closed.influx.points._series.clear()  # noqa: SLF001 - as above
    closed.backfill(NOON, NOON + HOUR, **ALLOWED)
    assert minutes_of(closed) == set(range(60)) - {20}


def test_a_span_is_written_again_and_says_what_would_go(closed: Exporter) -> None:
    closed.influx.points.retention_seconds = 6 * 3600
    lacks(closed, 10, 40)
    closed.environ |= ALLOWED  # the flag of the command decides
    for dry_run in (False, True):
        closed.store.puts.clear()
        run = closed.replace(NOON, NOON + HOUR, dry_run=dry_run, allow_shrink=dry_run)
        assert len(closed.store.puts) == (0 if dry_run else 1)
        [note] = run.report.notes
        assert "1 row that the source no longer has " in note
        assert "2026-02-07T12:40:00.000000000Z device_type=pump location=Plant-A" in note
        assert minutes_of(closed) == set(range(60))
    assert closed.replace(NOON, NOON + HOUR, allow_shrink=True).report.removed_rows == 1
    assert minutes_of(closed) == set(range(60)) - {40}
    assert closed.replace(NOON, NOON + HOUR, allow_shrink=True).report.notes == ()


def test_a_retention_that_is_shortened_in_the_middle_of_a_run_takes_nothing_away(closed: Exporter) -> None:
    closed.write_each(NOON, NOON + HOUR, device="D2")
    closed.backfill(NOON, NOON + HOUR)
    lacks(closed, 10)

    def forget(text: str) -> bool:
        """When D1 was compared, and before D2 is counted."""
        if '"D2"' in text:
            closed.influx.points.retention_seconds = 3600
            closed.influx.points._series.clear()  # noqa: SLF001 - as above
        return False

    closed.influx.faults.add(Refuse(500), when=forget)
    export = closed.export(EXPORT_CONCURRENCY="1", **ALLOWED)
    run = closed.execute(lambda context: export.backfill(context, Window(NOON, NOON + HOUR)))
    assert (run.outcome, run.report.removed_rows) == (Outcome.OK, 1)
    found = [(device, (at - ns(NOON)) // ns(EPOCH + MINUTE)) for device, at, _, _ in exported(closed.store)]
    assert sorted(found) == [("D1", n) for n in range(60) if n != 10] + [("D2", n) for n in range(60)]


def test_a_clock_that_is_behind_forgets_nothing(tmp_path: Path) -> None:
    clock, answers = NOON - 9 * HOUR, [Retention(2 * HOUR, told_at=NOON), Retention(None, NOON)]

    class Asked:
        def retention(self) -> Retention:
            return answers.pop(0)

    source = source_of(Asked(), tmp_path)  # type: ignore[arg-type]
    assert source.covered_since(lambda: clock) == NOON - 2 * HOUR
    assert source.covered_since(lambda: clock) == NOON


@pytest.mark.parametrize(
    ("terms", "period"),
    [("", UNLIMITED), ("WITH DURATION 90m", timedelta(minutes=90)), ("WITH DURATION 52w", timedelta(weeks=52))],
)
def test_influxdb_1_says_how_long_it_keeps_points(influxdb1: InfluxDB1, terms: str, period: timedelta) -> None:
    reader = influxql_without_credentials(influxdb1.url, influxdb1.new_database(terms))
    found = reader.retention()
    assert found.period == period
    assert found.told_at is not None
    assert abs(found.told_at - datetime.now(UTC)) < timedelta(minutes=5)


def test_influxdb_1_is_asked_for_the_policy_that_is_read_and_otherwise_for_its_oldest_point(
    influxdb1: InfluxDB1,
) -> None:
    database = influxdb1.new_database()
    influxdb1.query(f'CREATE RETENTION POLICY "short" ON "{database}" DURATION 2h REPLICATION 1')
    assert influxql_without_credentials(influxdb1.url, database, policy="short").retention().period == 2 * HOUR
    nowhere = influxql_without_credentials(influxdb1.url, database, policy="none")
    assert (nowhere.retention().period, nowhere.retention().oldest_at) == (None, None)
    influxdb1.write(
        database, "device_telemetry,device_id=D2 on=true 1001\ndevice_telemetry,device_id=D1 voltage=1 2001"
    )
    reader = influxql_without_credentials(influxdb1.url, database)
    assert reader._oldest_at() == datetime(1970, 1, 1, microsecond=2, tzinfo=UTC)  # noqa: SLF001 - 1.x is never asked for it


class Recorded:
    """A connection to InfluxDB 2 that speaks InfluxQL: its answers, as they were recorded."""

    def __init__(self, points: str) -> None:
        self.url = "http://recorded"
        self._answers = [points, POLICIES]

    @contextmanager
    def ask(self, path: str, body: bytes | None, headers: Mapping[str, str], where: str) -> Iterator[ServerAnswer]:
        del path, body, headers, where
        yield ServerAnswer(iter([self._answers.pop().encode()]), framed=True, version="v2.7.12", told_at=NOON)


POLICIES = (
    '{"results":[{"statement_id":0,"series":[{"columns":["name","duration","shardGroupDuration","replicaN","default"],'
    '"values":[["autogen","0s","168h0m0s",1,true]]}]}]}\n'
)


@pytest.mark.parametrize(
    ("points", "oldest_at"),
    [
        (
            '"series":[{"name":"m","columns":["time","v"],"values":[[1000000001,1]]}]',
            "1970-01-01T00:00:01.000001+00:00",
        ),
        ('"series":[]', ""),
        ('"error":"max-select-series limit exceeded"', ""),
    ],
)
def test_influxdb_2_which_says_by_influxql_that_it_keeps_everything_is_not_believed(
    points: str, oldest_at: str
) -> None:
    recorded = Recorded(f'{{"results":[{{"statement_id":0,{points}}}]}}\n')
    reader = InfluxQlReader(recorded, database="db", retention_policy="", measurement="m")  # type: ignore[arg-type]
    expected = datetime.fromisoformat(oldest_at) if oldest_at else None
    assert reader.retention() == Retention(None, expected, NOON)


def test_flux_says_how_long_a_bucket_keeps_points(exporter: Exporter) -> None:
    exporter.write(NOON)
    exporter.write(NOON - HOUR, "D2", "on=true")
    reader = flux(exporter.influx)
    assert (reader.retention().period, reader.retention().told_at) == (UNLIMITED, NOON)
    exporter.influx.points.retention_seconds = 7200
    assert reader.retention().period == 2 * HOUR
    unknown = flux(exporter.influx, bucket="other")
    assert unknown.retention().period is None
    exporter.influx.points.retention_seconds = None
    assert (reader.retention().period, reader.retention().oldest_at) == (None, NOON - HOUR)
