"""The pipeline from a simulated DynamoDB to a simulated Drive, run in this process at any instant."""

import json
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from app.config.environment import load_settings
from app.core.retry import RetryPolicy
from app.core.runs import Context, Lease, Report, Stop
from app.core.windows import Window
from app.dynamo_to_drive import job
from app.object_store.local import LocalDirectory
from app.object_store.set_aside import SetAsideStore, folder_of
from memory import MemoryCheckpoints, MemoryLeases
from simulators.drive import DriveSimulator
from simulators.dynamodb import DynamoSimulator, DynamoTable

TABLE = "underway"
KEY = ("static_partition", "datetime_utc")
START = datetime(2026, 2, 7, 12, 0, tzinfo=UTC)
QUICK = RetryPolicy(attempts=6, first_seconds=0.001, cap_seconds=0.002)


class Silent:
    def advance(self, *, done: int = 0, total: int = 0, rows: int = 0) -> None:
        """Nobody looks."""


def item(at: datetime, **values: str) -> dict[str, dict[str, Any]]:
    numbers = {name: {"N": value} for name, value in values.items()}
    return {"static_partition": {"S": "data"}, "datetime_utc": {"S": f"{at:%Y-%m-%dT%H:%M:%SZ}"}, **numbers}


def accounted(report: Report) -> Report:
    """The report of a run, whatever was done to table and files, accounts for each item."""
    assert report.ledger.closes, report.ledger
    return report


@dataclass
class Shipping:
    """Table, drive, checkpoints and clock; `run` is one run of a job by a process that lives until `restart`."""

    dynamo: DynamoSimulator
    drive: DriveSimulator
    folder: Path
    now: datetime = START
    extra: dict[str, str] = field(default_factory=dict)
    leases: MemoryLeases = field(default_factory=MemoryLeases)
    stop: Stop = field(default_factory=Stop)
    running: tuple[dict[str, str], job.HourFileExport] | None = None

    def __post_init__(self) -> None:
        self.checkpoints = MemoryCheckpoints(self.leases)
        self.token = self.drive.state.tokens.service_account(self.drive.url)

    @property
    def environ(self) -> dict[str, str]:
        return {
            "DATA_DIR": str(self.folder),
            "DYNAMODB_TABLE_NAME": TABLE,
            "DYNAMODB_ENDPOINT_URL": self.dynamo.url,
            "AWS_ACCESS_KEY_ID": self.dynamo.access_key_id,
            "AWS_SECRET_ACCESS_KEY": self.dynamo.secret_access_key,
            "GOOGLE_CREDENTIALS_JSON": json.dumps(self.token),
            "GOOGLE_DRIVE_API_URL": self.drive.url,
            "GOOGLE_DRIVE_FOLDER_ID": self.drive.folder_id,
            "GOOGLE_SHARED_DRIVE_ID": self.drive.state.shared_drive,
            "DRIVE_CATCHUP_HOURS": "2",
            **self.extra,
        }

    def export(self) -> job.HourFileExport:
        environ = {name: value for name, value in self.environ.items() if value}
        set_aside = SetAsideStore(LocalDirectory(self.folder / "objects"), folder_of(job.NAME))
        return job.HourFileExport(load_settings(environ, None), self.checkpoints, set_aside, lambda: self.now, QUICK)

    def context(self, *, dry_run: bool = False) -> Context:
        lease: Lease | None = self.leases.acquire(job.NAME, "test", 3600)
        assert lease is not None
        return Context("run", lease, self.stop, Silent(), dry_run)

    def run(self, name: str = job.NAME, *, dry_run: bool = False) -> Report:
        found = next(each for each in self._running().jobs if each.name == name)
        return accounted(found.work(self.context(dry_run=dry_run)))

    def backfill(self, start: datetime, end: datetime) -> Report:
        return accounted(self._running().backfill(self.context(), Window(start, end)))

    def ping(self) -> str:
        """What `check` says of the table."""
        with closing(self.export()) as export:
            return export.ping_table()

    def restart(self) -> None:
        """The next run is by a new process, which knows nothing but the checkpoints."""
        if self.running is not None:
            self.running[1].close()
            self.running = None

    def _running(self) -> job.HourFileExport:
        """The process with the settings of now; others need a restart."""
        environ = self.environ
        if self.running is None or self.running[0] != environ:
            self.restart()
            self.running = environ, self.export()
        return self.running[1]

    def put(self, *items: dict[str, dict[str, Any]]) -> None:
        self.dynamo.put(TABLE, items)

    def put_rows(self, start: datetime, number: int, every_seconds: int = 2) -> None:
        for count in range(number):
            self.put(item(start + timedelta(seconds=every_seconds * count), temp=f"{15 + count / 1000:.3f}"))

    @property
    def files(self) -> dict[str, bytes]:
        """Name -> content; a name that is given twice is an error."""
        return self.drive.contents()

    def text(self, name: str) -> str:
        return self.files[name].decode()

    def asked(self, pattern: str) -> int:
        return sum(pattern in what for what in self.drive.state.asked)


@contextmanager
def shipping(folder: Path, *, key: tuple[str, ...] = KEY, types: tuple[str, ...] = ("S", "S")) -> Iterator[Shipping]:
    with DynamoSimulator([DynamoTable(TABLE, key, types)]) as dynamo, DriveSimulator() as drive:
        ship = Shipping(dynamo, drive, folder)
        try:
            yield ship
        finally:
            ship.restart()
