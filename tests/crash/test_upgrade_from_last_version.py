"""An installation of the last version goes on with this one: its state, settings and objects, whatever it died of.

The last version is the real one, from its wheel; it exports from a real influxd and is killed in mid-export at random.
"""

import os
import random
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from app.core.window import EPOCH
from app.stores.objects import ObjectStore
from app.stores.state import State, open_state
from exports import objects, rows_of
from influxdb1 import InfluxDB1

HOUR, MINUTE = timedelta(hours=1), timedelta(minutes=1)
HOURS = 8  # of history, in shards of an hour, so that a field may change its type
TAGS = "device_type=pump,location=Plant-A"
KILLS = 4
LEASE = {"LEASE_TTL_SECONDS": "1", "LEASE_HEARTBEAT_SECONDS": "0.3"}
COMPUTED = ("hour", "day_of_week", "is_weekend", "power_factor")
Row = tuple[str, int, tuple[tuple[str, Any], ...]]


def ns(instant: datetime) -> int:
    return (instant - EPOCH) // timedelta(microseconds=1) * 1000


@dataclass
class Installation:
    """What stays over an upgrade: source, state, bucket, folder and settings. `points`: all that was written."""

    influx: InfluxDB1
    database: str
    folder: Path
    old: Path
    environ: Mapping[str, str]
    store: ObjectStore
    first_at: datetime
    state_url: str = ""
    written: dict[tuple[str, int, str], dict[str, Any]] = field(default_factory=dict)
    log: str = ""

    def write(self, device: str, at_ns: int, fields: Mapping[str, Any], further: str = "") -> None:
        """A point arrives at the source. `further`: tags that are no documented ones, as line protocol."""
        self.write_all([(device, at_ns, fields, further)])

    def write_all(self, points: list[tuple[str, int, Mapping[str, Any], str]]) -> None:
        lines = []
        for device, at_ns, fields, further in points:
            tags = f"device_id={device},{TAGS}{',' + further if further else ''}"
            cells = ",".join(f"{name}={shown(value)}" for name, value in fields.items())
            lines.append(f"device_telemetry,{tags} {cells} {at_ns}")
            self.written.setdefault((device, at_ns, further), {}).update(fields)
        self.influx.write(self.database, "\n".join(lines))

    def command(self, python: Path, *arguments: str) -> list[str]:
        return [str(python), "-m", "app", *arguments]

    def env(self, **more: str) -> dict[str, str]:
        kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "TMPDIR") if name in os.environ}
        return {**kept, "LOG_FILE": "off", **self.environ, **more}

    def run(self, *arguments: str, old: bool = False, status: int = 0, **environ: str) -> str:
        """A command of the new version, or of the old one; what it printed."""
        command = self.command(self.old if old else Path(sys.executable), *arguments)
        done = subprocess.run(
            command, env=self.env(**environ), cwd=self.folder, capture_output=True, text=True, timeout=100, check=False
        )
        self.log = done.stdout + done.stderr
        assert done.returncode == status, self.log[-4000:]
        return done.stdout

    def start(self, *arguments: str, old: bool = False, **environ: str) -> "subprocess.Popen[bytes]":
        with (self.folder / f"{'old' if old else 'new'}.log").open("ab") as log:
            return subprocess.Popen(
                self.command(self.old if old else Path(sys.executable), *arguments),
                env=self.env(**environ),
                cwd=self.folder,
                stdout=log,
                stderr=log,
            )

    def kill_at_random(self, chance: random.Random, *arguments: str, old: bool = False, least: float = 0.6) -> None:
        """A command that is killed at some moment of its work, or was through with it."""
        process = self.start(*arguments, old=old, **LEASE)
        try:
            process.wait(chance.uniform(least, least + 1.2))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait(10)

    def objects(self) -> Mapping[str, tuple[str, list[dict[str, Any]]]]:
        """Every object by key: its version and rows."""
        found = {}
        for key in objects(self.store):
            info = self.store.head(key)
            assert info is not None
            found[key] = info.etag, rows_of(self.store, key)
        return found

    def versions(self) -> Mapping[str, str]:
        return {key: version for key, (version, _) in self.objects().items()}

    def state(self) -> State:
        return open_state(self.state_url, self.folder / "data")

    def closed(self) -> Mapping[str, str]:
        """Every object that the state says is closed, with its version."""
        with closing(self.state()) as state, state.database.transaction(read_only=True) as session:
            rows = session.rows("SELECT s3_key, version FROM export_windows WHERE status = 'closed'")
        return {row["s3_key"]: row["version"] for row in rows}


def shown(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return f"{value}i"
    return f'"{value}"' if isinstance(value, str) else repr(value)
