"""An installation of the last version goes on with this one: its state, settings and objects, whatever it died of.

The last version is the real one, from its wheel. It exports from a real influxd and is killed in mid-export at random.
What it did by design stays known: it wrote no tags but the documented ones, and made one row of points that differ in
others only. Such windows stay as they are until something comes late or `verify --heal` is asked for; then they have
all rows.
"""

import io
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest

from app.core.windows import EPOCH, floor_to
from app.influx_to_s3.job import NAME, RECONCILE
from app.object_store.local import LocalDirectory
from app.object_store.port import ObjectStore, PutRequest
from app.object_store.s3 import S3Store
from daemon import Daemons, free_port
from effort import EFFORT
from exports import objects, rows_of
from influxdb1 import InfluxDB1
from last_version import FENCED, installed, last_version
from seaweed import Seaweed, target

__all__ = ["last_version"]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

HOUR, MINUTE = timedelta(hours=1), timedelta(minutes=1)
STATE = "state.db"
HOURS = 6  # of history, in shards of an hour, so that a field may change its type
STEP = 10 * MINUTE
DOCUMENTED = "device_type=pump,location=Plant-A"
RIGHT = ("D1", "D2", "D5", "D6")  # devices that the last version exported without a loss
LOSSY = ("D3", "D4")
STORES = ("sqlite and a directory", "postgres and s3")
KEPT = ("PATH", "HOME", "LANG", "TMPDIR")
SHORT_LEASE = {"LEASE_TTL_SECONDS": "1", "LEASE_HEARTBEAT_SECONDS": "0.3"}
NOT_COMPARED = (
    "timestamp",
    "device_id",
    "device_type",
    "location",
    "hour",
    "day_of_week",
    "is_weekend",
    "power_factor",
)
Point = tuple[str, int, Mapping[str, Any], str]
Slot = tuple[str, int, str]


def ns(instant: datetime) -> int:
    return (instant - EPOCH) // timedelta(microseconds=1) * 1000


@dataclass
class Installation:
    """What stays over an upgrade: source, state, bucket, folder and settings.

    `written`: the fields of every point by device, instant and further tags that are not ignored.
    """

    influx: InfluxDB1
    database: str
    folder: Path
    last_version: Path
    environ: dict[str, str]
    store: ObjectStore
    start: datetime
    chance: random.Random
    new_database: Callable[[], str]
    written: dict[Slot, dict[str, Any]] = field(default_factory=dict)

    def write(self, *points: Point) -> None:
        """Points arrive at the source. The last element: tags that are no documented ones, as line protocol."""
        lines = []
        for device, at_ns, fields, further in points:
            tags = ",".join(("device_telemetry", f"device_id={device}", DOCUMENTED, *filter(None, [further])))
            cells = ",".join(f"{name}={shown(value)}" for name, value in fields.items())
            lines.append(f"{tags} {cells} {at_ns}")
            identity = "" if further.startswith("schema_version") else further
            self.written.setdefault((device, at_ns, identity), {}).update(fields)
        self.influx.write(self.database, "\n".join(lines))

    def write_history(self, until: datetime) -> None:
        """Every kind of point, each STEP; `count` turns from an integer to a float after a third of the time."""
        points: list[Point] = []
        at = self.start
        while at < until:
            points += points_at(ns(at), (at - self.start) // STEP, is_whole=at - self.start < HOURS * HOUR / 3)
            at += STEP
        self.write(*points)

    def write_late(self, at: datetime, value: float) -> int:
        """One point more of each device; how many."""
        late_ns = ns(at)
        further = {"D3": "phase=L1", "D4": "firmware=1.2", "D6": "schema_version=v1"}
        devices = (*RIGHT, *LOSSY)
        self.write(*((device, late_ns, {"voltage": value}, further.get(device, "")) for device in devices))
        return len(devices)

    def env(self, **more: str) -> dict[str, str]:
        kept = {name: os.environ[name] for name in KEPT if name in os.environ}
        return {**kept, "LOG_FILE": "off", **self.environ, **more}

    def run(self, *arguments: str, last: bool = False, status: Sequence[int] = (0,), **environ: str) -> str:
        """A command of this version, or of the last one; what it printed."""
        command = [str(self.last_version if last else sys.executable), "-m", "app", *arguments]
        done = subprocess.run(
            command,
            env=self.env(**environ),
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode in status, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    def start_last(self, *arguments: str, **environ: str) -> "subprocess.Popen[bytes]":
        return self._started(self.last_version, *arguments, **environ)

    def _started(self, python: Path, *arguments: str, **environ: str) -> "subprocess.Popen[bytes]":
        with (self.folder / "started.log").open("ab") as log:
            return subprocess.Popen(
                [str(python), "-m", "app", *arguments],
                env=self.env(**environ),
                cwd=self.folder,
                stdout=log,
                stderr=log,
            )

    def kill_at_random(self, *arguments: str, last: bool = False) -> None:
        """A command that is killed at some moment of its work, unless it was through with it; its lease runs out."""
        python = self.last_version if last else Path(sys.executable)
        process = self._started(python, *arguments, **SHORT_LEASE)
        try:
            process.wait(self.chance.uniform(0.9, 2.0))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait(10)
        time.sleep(1.1)

    def versions(self) -> Mapping[str, str]:
        """The version of every object by key."""
        return {key: info.etag for key in objects(self.store) if (info := self.store.head(key))}

    def rows(self) -> dict[Slot, dict[str, Any]]:
        """The fields of every row of every object by device, instant and further tags. Fails for one that is twice."""
        found: dict[Slot, dict[str, Any]] = {}
        for key in objects(self.store):
            for row in rows_of(self.store, key):
                cells = {name: value for name, value in row.items() if value is not None and name not in NOT_COMPARED}
                tags = [f"{name}={cells.pop(name)}" for name in ("firmware", "phase") if name in cells]
                slot = (str(row["device_id"]), row["timestamp"], ",".join(tags))
                assert slot not in found, f"{slot} of {key} is given twice"
                found[slot] = cells
        return found

    def closed(self) -> Mapping[str, str]:
        """The version of every object that the state says is closed, read without any version of the product."""
        query = "SELECT s3_key, version FROM export_windows WHERE status = 'closed'"
        url = self.environ.get("CHECKPOINT_DATABASE_URL")
        if url:
            with psycopg.connect(url) as server:
                return dict(server.execute(query).fetchall())
        with closing(sqlite3.connect(self.folder / "data" / STATE)) as file:
            return dict(file.execute(query).fetchall())

    @property
    def layout(self) -> Any:
        with self.store.open("telemetry/_headwater/layout.json") as body:
            assert body is not None
            return json.loads(body.read())

    @property
    def span(self) -> tuple[str, ...]:
        end = floor_to(datetime.now(UTC), 3600)
        return "--from", self.start.isoformat(), "--to", end.isoformat()

    def verify(self) -> set[str]:
        """The devices of which both ends are not equal in some window."""
        document = json.loads(self.run("verify", NAME, *self.span, "--json", status=[0, 1]))
        return {each["partition"] for each in document["windows"] if each["sign"] != "="}

    def lose_state(self) -> None:
        """The database is gone, and with it every record and cursor."""
        if "CHECKPOINT_DATABASE_URL" in self.environ:
            self.environ["CHECKPOINT_DATABASE_URL"] = self.new_database()
        for path in (self.folder / "data").glob(f"{STATE}*"):
            path.unlink()

    def live_by_last_version(self) -> None:
        """A life of the last version: killed while it exports a backlog, late rows, killed while it writes deltas."""
        self.write_history(datetime.now(UTC) - 2 * STEP)
        for _ in range(2):
            self.kill_at_random("run", NAME, last=True)
        self.run("run", NAME, last=True)
        self.write_late(self.start + 31 * MINUTE, 5.5)
        self.kill_at_random("run", RECONCILE, last=True)
        self.run("run", RECONCILE, last=True)
        self.write_late(self.start + 33 * MINUTE, 6.5)
        self.kill_at_random("run", RECONCILE, last=True)
        self.write_late(datetime.now(UTC) - MINUTE, 7.5)
        self.kill_at_random("run", NAME, last=True)


def points_at(at_ns: int, number: int, *, is_whole: bool) -> Iterator[Point]:
    value = float(number)
    yield "D1", at_ns, {"voltage": 230.5, "current": 2.0, "power": value, "temperature": 20.0}, ""
    count: dict[str, Any] = {"count": number} if is_whole else {"count": value + 0.5}
    yield "D2", at_ns, {"voltage": value, **count, **({"note": f"007 {number}"} if number % 3 else {})}, ""
    for phase in (1, 2, 3):
        yield "D3", at_ns, {"voltage": value + phase / 10, "current": 1.0}, f"phase=L{phase}"
    yield "D4", at_ns, {"voltage": value, "on": number % 2 == 0}, "firmware=1.2"
    yield "D5", at_ns + 1_001, {"voltage": value}, ""
    yield "D5", at_ns + 1_002, {"voltage": value + 0.5}, ""
    yield "D6", at_ns, {"voltage": value}, "schema_version=v1"
    yield "D6", at_ns, {"current": value}, "schema_version=v2"


def shown(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return f"{value}i"
    return f'"{value}"' if isinstance(value, str) else repr(value)


def of(devices: Sequence[str], rows: Mapping[Slot, Any]) -> Mapping[Slot, Any]:
    return {slot: fields for slot, fields in rows.items() if slot[0] in devices}


def is_right(key: str) -> bool:
    return key.split("device_id=")[1].partition("/")[0] in RIGHT


def is_whole(key: str) -> bool:
    """True for the object of a window, false for a delta."""
    return key.endswith("0000.parquet")


def is_live(key: str) -> bool:
    """True for the object of a window that may be open or settle still."""
    _, _, name = key.partition("/date=")
    start = datetime.strptime(name, "%Y/%m/%d/export_%H%M%S.parquet").replace(tzinfo=UTC)
    return start > datetime.now(UTC) - 2 * HOUR


def wait_until(holds: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def of_hour(start: datetime, rows: Mapping[Slot, Any]) -> Mapping[Slot, Any]:
    return {slot: fields for slot, fields in rows.items() if ns(start) <= slot[1] < ns(start + HOUR)}


Install = Callable[[int], Installation]


@pytest.fixture(params=STORES)
def install(
    request: pytest.FixtureRequest, influxdb1: InfluxDB1, last_version: Path, tmp_path: Path
) -> Iterator[Install]:
    """An installation on either database, with its objects in a directory or in a bucket."""
    opened: list[S3Store] = []

    def make(seed: int) -> Installation:
        start = floor_to(datetime.now(UTC), 3600) - HOURS * HOUR
        database = influxdb1.new_database("WITH SHARD DURATION 1h")
        environ = {
            "INFLUXDB_URL": influxdb1.url,
            "INFLUXDB_API": "influxql",
            "INFLUXDB_DATABASE": database,
            "DATA_DIR": str(tmp_path / "data"),
            "EXPORT_START": start.isoformat(),
            "EXPORT_GRACE_SECONDS": "1800",
            "EXPORT_INTERVAL_SECONDS": "1",
            "S3_PREFIX": "telemetry",
        }
        store: ObjectStore = LocalDirectory(tmp_path / "data" / "objects")
        new_database: Callable[[], str] = str
        if request.param == STORES[1]:
            server = request.getfixturevalue("postgres_server")
            new_database = server.new_database
            seaweed: Seaweed = request.getfixturevalue("seaweed")
            bucket = seaweed.new_bucket()
            environ |= {
                "CHECKPOINT_DATABASE_URL": new_database(),
                "S3_BUCKET": bucket,
                "S3_ENDPOINT_URL": seaweed.endpoint_url,
                "S3_ADDRESSING_STYLE": "path",
                "S3_ACCESS_KEY_ID": seaweed.access_key,
                "S3_SECRET_ACCESS_KEY": seaweed.secret_key,
            }
            opened.append(S3Store(target(seaweed, bucket), "telemetry/.headwater-probe/test"))
            store = opened[-1]
        chance = random.Random(seed)  # noqa: S311 - moments to kill at, no secret
        return Installation(influxdb1, database, tmp_path, last_version, environ, store, start, chance, new_database)

    yield make
    for each in opened:
        each.close()


def test_every_state_is_carried_over_and_nothing_is_lost_doubled_or_written_again_without_need(
    install: Install, daemons: Daemons
) -> None:
    here = install(1)
    here.live_by_last_version()
    closed, before = here.closed(), here.versions()
    deltas = {key for key in before if not is_whole(key)}
    assert {key.split("/")[1] for key in deltas} == {f"device_id={device}" for device in (*RIGHT, *LOSSY)}

    here.run("run", NAME)
    layout = here.layout
    assert [each["timestamp_unit"] for each in layout["layouts"]] == ["ns"]
    assert layout["first_start"] == f"{here.start:%Y-%m-%dT%H:%M:%SZ}"
    assert {each["name"]: each["types"][-1]["type"] for each in layout["columns"]}["count"] == "double"
    # What was closed, and committed, stays as it was; also what the source has by now and a reconcile did not see.
    assert closed.items() <= here.versions().items()
    here.run("run", RECONCILE)
    assert of(RIGHT, here.rows()) == of(RIGHT, here.written)
    assert not deltas & here.versions().keys(), "their rows are in the objects of their windows now"
    # The older version's records say nothing of sums, so each window is read once: what lost tags has all rows then.
    assert here.verify() == set()
    assert here.rows() == here.written
    late = here.write_late(here.start + 90 * MINUTE + timedelta(seconds=1), 8.5)
    report = json.loads(here.run("run", RECONCILE, "--json"))
    assert report["late_rows"] == late
    assert json.loads(here.run("run", RECONCILE, "--json"))["late_rows"] == 0
    found = here.rows()
    assert of(RIGHT, found) == of(RIGHT, here.written)
    assert of_hour(here.start + HOUR, found) == of_hour(here.start + HOUR, here.written)
    for _ in range(2):
        here.kill_at_random("verify", NAME, *here.span, "--heal")
    here.run("verify", NAME, *here.span, "--heal", status=[0, 1])
    assert here.verify() == set()
    assert here.rows() == here.written
    check_rewrite(here, daemons)


@pytest.mark.parametrize("install", STORES if EFFORT > 1 else STORES[1:], indirect=True)
def test_without_its_state_everything_is_read_from_the_objects_again(install: Install) -> None:
    here = install(2)
    here.live_by_last_version()
    before = here.versions()
    here.lose_state()
    here.run("run", NAME)
    layout = here.layout
    assert [(each["from"][:4], each["window_seconds"], each["timestamp_unit"]) for each in layout["layouts"]] == [
        ("1970", 3600, "ns")
    ]
    assert layout["first_start"] == f"{here.start:%Y-%m-%dT%H:%M:%SZ}"
    assert {each["name"]: each["types"][-1]["type"] for each in layout["columns"] if each["kind"] == "field"} == {
        "count": "double", "note": "text", "on": "boolean",
    }  # fmt: skip
    # Each window is closed once more by a write, which takes in its deltas and finds what lost its tags.
    here.run("run", RECONCILE)
    assert here.rows() == here.written
    assert here.verify() == set()
    settled = here.versions()
    assert {key for key in before if is_whole(key)} <= settled.keys()
    assert all(map(is_whole, settled))
    here.run("run", RECONCILE)
    assert all(is_live(key) for key, version in here.versions().items() if settled.get(key) != version)
    versions, written_layout = here.versions(), here.layout
    here.write_late(here.start + 45 * MINUTE, 9.5)
    assert json.loads(here.run("run", RECONCILE, "--json"))["late_rows"] == len(RIGHT) + len(LOSSY)
    assert here.rows() == here.written
    assert here.layout == written_layout
    changed = [key for key, version in here.versions().items() if versions.get(key) != version]
    assert len(changed) == len(RIGHT) + len(LOSSY)


@pytest.mark.parametrize(("install", "commit"), list(zip(STORES, FENCED, strict=True)), indirect=["install"])
def test_an_older_version_that_still_runs_beside_writes_nothing_more(install: Install, commit: str) -> None:
    here = install(3)
    here.last_version = installed(commit)
    here.write_history(datetime.now(UTC) - STEP)
    beside = here.start_last("serve", PORT=str(free_port()), **SHORT_LEASE)
    try:
        wait_until(lambda: len(here.versions()) > HOURS)
        here.run("run", NAME)
        time.sleep(2)
        seen = here.versions()
        here.write_late(datetime.now(UTC) - timedelta(seconds=5), 9.5)
        here.write_late(here.start + 5 * MINUTE, 9.5)
        time.sleep(4)
        assert beside.poll() is None
        assert here.versions() == seen
        here.run("run", NAME)
        here.run("run", RECONCILE)
        here.run("verify", NAME, *here.span, "--heal", status=[0, 1])
        assert here.rows() == here.written
        assert here.verify() == set()
    finally:
        beside.kill()
        beside.wait(10)
    refused = here.run("run", NAME, last=True, status=range(1, 128))
    assert refused in ("", f"{NAME} failed: 0 rows, 0 bytes, 0 windows, 0 late rows\n")
    assert here.rows() == here.written


def check_rewrite(here: Installation, daemons: Daemons) -> None:
    """The unit is set and, a day later, old objects are rewritten; the rewrite is killed at random and resumed."""
    unit = {"EXPORT_TIMESTAMP_UNIT": "us"}
    here.environ |= unit
    here.run("run", NAME)
    tree = here.layout
    assert [each["timestamp_unit"] for each in tree["layouts"]] == ["ns", "us"]
    assert tree["layouts"][-1]["from"] > f"{datetime.now(UTC):%Y-%m-%d}T23:59:59Z"
    # As it is a day later.
    tree["layouts"][-1]["from"] = f"{datetime.now(UTC):%Y-%m-%d}T00:00:00Z"
    text = json.dumps(tree).encode()
    info = here.store.head("telemetry/_headwater/layout.json")
    assert info is not None
    here.store.put(info.key, io.BytesIO(text), PutRequest("application/json", {}, info.etag))
    midnight = floor_to(here.start, 86_400)
    days = ("--from", midnight.isoformat(), "--to", (midnight + timedelta(days=2)).isoformat())
    for _ in range(2):
        here.kill_at_random("rewrite", NAME, *days)
    check_analytics(here, daemons)
    here.run("rewrite", NAME, *days)
    assert here.rows() == here.written
    versions = here.versions()
    assert here.closed().items() <= versions.items()
    assert json.loads(here.run("rewrite", NAME, *days, "--json"))["rows"] == 0
    here.run("run", RECONCILE)
    assert here.versions() == versions
    assert here.verify() == set()


def check_analytics(here: Installation, daemons: Daemons) -> None:
    """Counts and latest instants over a tree of objects of both versions."""
    daemon = daemons.start("", wait=True, key="", **{**here.environ, "INFLUXDB_URL": ""})
    overview = daemon.get("/analytics/overview").json
    assert (overview["total_rows"], overview.get("warnings", [])) == (len(here.written), [])
    latest = {row["device_id"]: row["timestamp"] for row in daemon.get("/analytics/devices/latest").json["data"]}
    devices = {row["device_id"]: row["total_records"] for row in daemon.get("/analytics/devices").json["devices"]}
    for device in (*RIGHT, *LOSSY):
        instants = [at for name, at, _ in here.written if name == device]
        assert devices[device] == len(instants)
        newest = EPOCH + timedelta(microseconds=max(instants) // 1000)
        assert datetime.fromisoformat(latest[device]) == newest
    daemon.kill()
