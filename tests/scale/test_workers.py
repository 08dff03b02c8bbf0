"""Real processes: one that serves and has the schedule, and workers; and one alone, which loads nothing of a queue."""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from app.object_store.local import LocalDirectory
from daemon import Daemon, Daemons
from exports import exported, stored
from postgres import PostgresServer
from simulators.influx import InfluxSimulator

SECOND_NS = 10**9
DEVICES = 6
ALONE = """
import sys
from app.config.environment import load_settings
from app.main import build
import app.cli, app.ops.commands, app.ops.routes, app.web.server
build(load_settings({"DATA_DIR": sys.argv[1], "INFLUXDB_URL": "http://127.0.0.1:9", "INFLUXDB_TOKEN": "t",
                     "INFLUXDB_ORG": "o", "INFLUXDB_BUCKET": "b"}, None))
loaded = {name.partition(".")[0] for name in sys.modules} & {"procrastinate", "psycopg_pool", "asgiref", "croniter"}
print(sorted(loaded), [name for name in sys.modules if name.startswith("app.scale")])
"""


@pytest.mark.slow
def test_one_process_alone_loads_nothing_of_a_queue(tmp_path: Path) -> None:
    told = subprocess.run([sys.executable, "-c", ALONE, str(tmp_path)], check=True, capture_output=True, text=True)
    assert told.stdout == "[] []\n"


@pytest.fixture
def daemons(tmp_path: Path) -> Iterator[Daemons]:
    daemons = Daemons(tmp_path)
    yield daemons
    daemons.close()


def metrics_of(daemon: Daemon) -> dict[str, str]:
    lines = daemon.get("/metrics").text.splitlines()
    return dict(line.rsplit(" ", 1) for line in lines if line.startswith(("headwater_workers", "headwater_queue")))


@pytest.mark.slow
def test_workers_deliver_what_a_process_without_them_keeps_waiting(
    daemons: Daemons, postgres_server: PostgresServer, tmp_path: Path
) -> None:
    with InfluxSimulator() as influx:

        def write(number: int) -> None:
            for device in range(DEVICES):
                at = time.time_ns() - (number + 1) * SECOND_NS
                influx.write(f"device_telemetry,device_id=D{device},device_type=pump,location=A voltage={number} {at}")

        def all_there() -> bool:
            return exported(LocalDirectory(tmp_path / "data" / "objects"), "telemetry/") == stored(influx.points)

        given: dict[str, Any] = {
            "INFLUXDB_URL": influx.url,
            "INFLUXDB_TOKEN": influx.token,
            "INFLUXDB_ORG": influx.org,
            "INFLUXDB_BUCKET": influx.bucket,
            "CHECKPOINT_DATABASE_URL": postgres_server.new_database(),
            "SCALE_ENGINE": "procrastinate",
            "EXPORT_INTERVAL_SECONDS": "1",
            "LEASE_TTL_SECONDS": "5",
            "LEASE_HEARTBEAT_SECONDS": "0.5",
        }
        write(1)
        web = daemons.start(**given)
        web.until(lambda: metrics_of(web).get('headwater_queue_depth{queue="jobs"}', "0") != "0")
        assert metrics_of(web)["headwater_workers"] == "0"
        assert not all_there()

        worker = daemons.start(word="worker", **given)
        worker.until(all_there)
        web.until(lambda: metrics_of(web)["headwater_workers"] == "1")
        assert web.get("/ops/summary").json["scale"]["shards"] == 32
        assert worker.get("/ops/jobs").status == 404
        last = web.until(lambda: web.job("influx_to_s3")["last_run"])
        assert last["job"] == "influx_to_s3"

        postgres_server.restart_immediately()
        write(2)
        worker.until(all_there, 40)
        assert worker.terminate() == 128 + signal.SIGTERM
        assert "Traceback" not in worker.log + web.log
        web.until(lambda: metrics_of(web).get("headwater_workers") == "0")

        alone = daemons.start(**{**given, "SCALE_ENGINE": "embedded"})
        write(3)
        alone.until(all_there)
        runs = web.get("/ops/runs?job=influx_to_s3&limit=100").json["runs"]
        assert {run["job"] for run in runs} == {"influx_to_s3"}
        assert all(run["ledger"]["closes"] for run in runs if run["ledger"])


@pytest.mark.slow
def test_a_worker_without_a_queue_says_what_to_set(tmp_path: Path) -> None:
    told = subprocess.run(
        [sys.executable, "-m", "app", "worker"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert told.returncode == 78
    assert "set SCALE_ENGINE=procrastinate" in told.stderr
