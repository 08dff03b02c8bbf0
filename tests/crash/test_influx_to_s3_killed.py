"""The real process is killed over and over while it works off a backlog; the bucket ends up as if it had not been."""

import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from io import BytesIO

import pyarrow.parquet as pq
import pytest

from daemon import Daemons
from effort import EFFORT
from postgres import PostgresServer
from seaweed import Seaweed
from simulators.influx import InfluxSimulator

DEVICES = 40
KILLS = 8 * EFFORT
POINTS = 540
STEP_NS = 10 * 10**9
MEASUREMENT = "device_telemetry"
UNDISTURBED = {"LEASE_TTL_SECONDS": "30", "LEASE_HEARTBEAT_SECONDS": "5"}  # a busy machine may not end a run
Row = tuple[str, int, float]


@dataclass
class Source:
    """Points that were written, so that the outcome can be compared without asking the product."""

    simulator: InfluxSimulator
    start_ns: int
    rows: set[Row]

    def backlog(self) -> None:
        for number in range(DEVICES):
            times = [self.start_ns + step * STEP_NS + number for step in range(POINTS)]
            volts = [200.0 + (step + number) % 50 for step in range(POINTS)]
            tags = (("device_id", f"D{number}"), ("device_type", "bulb"), ("location", "Plant-A"))
            self.simulator.points.extend((MEASUREMENT, tags), times, {"voltage": volts})
            self.rows |= {(f"D{number}", at, value) for at, value in zip(times, volts, strict=True)}

    def late_points(self, chance: random.Random) -> None:
        """A late point for each of some devices, in windows that still settle and in windows that may be closed."""
        for number in chance.sample(range(DEVICES), DEVICES // 5):
            at = self.start_ns + chance.randrange(POINTS) * STEP_NS + 500_000 + chance.randrange(1000)
            tags = f"device_id=D{number},device_type=bulb,location=Plant-A"
            self.simulator.write(f"{MEASUREMENT},{tags} voltage=1.5 {at}")
            self.rows.add((f"D{number}", at, 1.5))


@pytest.fixture
def source() -> Iterator[Source]:
    with InfluxSimulator() as simulator:
        yield Source(simulator, (time.time_ns() // STEP_NS - POINTS - 1) * STEP_NS, set())


def environment(source: Source, seaweed: Seaweed, bucket: str, database: str) -> dict[str, str]:
    return {
        "INFLUXDB_URL": source.simulator.url,
        "INFLUXDB_TOKEN": source.simulator.token,
        "INFLUXDB_ORG": source.simulator.org,
        "INFLUXDB_BUCKET": source.simulator.bucket,
        "CHECKPOINT_DATABASE_URL": database,
        "S3_BUCKET": bucket,
        "S3_ENDPOINT_URL": seaweed.endpoint_url,
        "S3_ADDRESSING_STYLE": "path",
        "S3_ACCESS_KEY_ID": seaweed.access_key,
        "S3_SECRET_ACCESS_KEY": seaweed.secret_key,
        "EXPORT_INTERVAL_SECONDS": "1",
        "EXPORT_WINDOW_SECONDS": "600",
        "EXPORT_GRACE_SECONDS": "3600",
        "EXPORT_TIMESTAMP_UNIT": "ns",
        "LOOKBACK_HOURS": "2",
        "LEASE_TTL_SECONDS": "1",
        "LEASE_HEARTBEAT_SECONDS": "0.3",
    }


def exported(seaweed: Seaweed, bucket: str) -> Mapping[str, list[Row]]:
    """The rows of every object in the bucket; an object that is no whole Parquet file fails here."""
    objects: dict[str, list[Row]] = {}
    with closing(seaweed.client()) as client:
        for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket):
            for item in page.get("Contents", ()):
                if "/date=" not in item["Key"]:
                    continue  # the layout file, and the probe of a process that was killed while it tried the store
                body = client.get_object(Bucket=bucket, Key=item["Key"])["Body"].read()
                table = pq.read_table(BytesIO(body), columns=["device_id", "timestamp", "voltage"])
                columns = (table["device_id"], table["timestamp"].cast("int64"), table["voltage"])
                objects[item["Key"]] = list(zip(*(column.to_pylist() for column in columns), strict=True))
    return objects


def by_window(objects: Mapping[str, list[Row]]) -> Mapping[str, list[Row]]:
    """The rows of each window, those of its deltas among them; a delta's name differs in the seconds alone."""
    windows: dict[str, list[Row]] = {}
    for key, rows in objects.items():
        windows.setdefault(key.removesuffix(".parquet")[:-2], []).extend(rows)
    return {name: sorted(rows) for name, rows in windows.items()}


def told(rows: set[Row], source: Source) -> list[str]:
    """Rows with their age in minutes from the start of the data, to tell which windows they belong to."""
    return [f"{device} +{(at - source.start_ns) / 6e10:.2f} min {value}" for device, at, value in sorted(rows)[:20]]


def run_to_the_end(values: Mapping[str, str], folder: str) -> None:
    """The job, and then the reconcile: it adds what came into a window after that had closed."""
    environ = {**os.environ, **values, **UNDISTURBED, "DATA_DIR": folder}
    for job in ("influx_to_s3", "influx_to_s3_reconcile"):
        command = [sys.executable, "-m", "app", "run", job]
        done = subprocess.run(
            command, env=environ, cwd=folder, capture_output=True, text=True, timeout=200, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr


def run_when_free(values: Mapping[str, str], folder: str) -> None:
    """The killed process's lease runs out by itself."""
    time.sleep(1.5)
    run_to_the_end(values, folder)


@pytest.mark.slow
@pytest.mark.timeout(420)
def test_kills_lose_no_row_double_none_and_leave_nothing_half_written(
    source: Source,
    seaweed: Seaweed,
    postgres_server: PostgresServer,
    daemons: Daemons,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    chance = random.Random(7)  # noqa: S311 - moments to kill at, no secret
    source.backlog()
    bucket = seaweed.new_bucket()
    values = environment(source, seaweed, bucket, postgres_server.new_database())
    for _ in range(KILLS):
        daemon = daemons.start("", wait=True, key="", **values)
        time.sleep(chance.uniform(0.1, 1.5))
        daemon.kill()
        source.late_points(chance)
    folder = tmp_path_factory.mktemp("end")
    run_when_free(values, str(folder))
    objects = exported(seaweed, bucket)
    rows = [row for held in objects.values() for row in held]
    assert len(rows) == len(set(rows))
    assert told(source.rows - set(rows), source) == []
    assert told(set(rows) - source.rows, source) == []

    undisturbed = seaweed.new_bucket()
    calm = environment(source, seaweed, undisturbed, postgres_server.new_database())
    run_to_the_end(calm, str(tmp_path_factory.mktemp("calm")))
    assert by_window(exported(seaweed, undisturbed)) == by_window(objects)
