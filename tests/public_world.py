"""A small world for the snapshots: each source with a row at one past instant, and the commands that work on it."""

import io
import json
import os
import re
import threading
from collections.abc import Mapping
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx

from app.cli import main
from simulators.amplitude import AmplitudeSimulator, amplitude_event
from simulators.appmetrica import AppMetricaSimulator, appmetrica_rows
from simulators.drive import DriveSimulator
from simulators.dynamodb import DynamoSimulator, DynamoTable
from simulators.influx import InfluxSimulator

PAST = datetime(2026, 2, 9, 12, tzinfo=UTC)
SPAN = ("--from", "2026-02-09T12:00", "--to", "2026-02-09T13:00")
PULLED = ("influx_to_s3", "dynamo_to_drive", "amplitude", "appmetrica")
TABLE = "underway"
INBOX = Path("inbox")
COMMON = {"HOME": ".", "COLUMNS": "1000", "LOG_FILE": "off", "VERSION": "1"}


def use(**environ: str) -> None:
    """The variables of all commands that follow."""
    os.environ.clear()
    os.environ.update({**COMMON, **environ})


@dataclass
class Commands:
    """Runs commands in this process; keeps how they exit and what they print as JSON."""

    codes: list[str] = field(default_factory=list)
    documents: dict[str, list[Any]] = field(default_factory=dict)

    def run(self, *arguments: str) -> str:
        """What it prints on stdout."""
        with redirect_stdout(io.StringIO()) as out:
            try:
                code = main(arguments)
            except SystemExit as end:
                code = int(end.code or 0)
        self.codes.append(f"{code:<2}  {' '.join(arguments)}")
        if "--json" in arguments and out.getvalue():
            self.documents.setdefault(arguments[0], []).append(json.loads(out.getvalue()))
        return out.getvalue()


class World:
    """The sources, with a row at PAST and one that has to be set aside, and a Google Drive."""

    def __init__(self, running: ExitStack) -> None:
        table = DynamoTable(TABLE, ("static_partition", "datetime_utc"), ("S", "S"))
        self.influx = running.enter_context(InfluxSimulator())
        self.dynamo = running.enter_context(DynamoSimulator([table]))
        self.drive = running.enter_context(DriveSimulator())
        self.web = running.enter_context(AmplitudeSimulator())
        self.mobile = running.enter_context(AppMetricaSimulator())
        self.write("device_id=D1,device_type=pump,phase=L1", 'voltage=230.5,count=3i,valid=true,state="on"', PAST)
        self.dynamo.put(TABLE, [item("2026-02-09T12:00:00Z", temp="15.25", salinity="32"), item("soon", temp="1")])
        self.web.state.events["web", PAST] = [amplitude_event("web", PAST, 2)]
        self.web.state.lines["web", PAST] = [b"{broken"]
        mobile = self.mobile.state
        mobile.questions = 0
        row = {**appmetrica_rows(mobile.application_id, PAST, 1)[0], "event_json": '{"screen":"s0"}'}
        mobile.rows = lambda hour: [row] if hour == PAST else []
        mobile.lines[PAST] = [b"broken"]

    def write(self, tags: str, fields: str, at: datetime) -> None:
        self.influx.write(f"device_telemetry,{tags} {fields} {int(at.timestamp())}000000000")

    def go_on(self, at: datetime) -> None:
        """Rows of the present, without which a run finds a source that fell silent."""
        self.write("device_id=D1,device_type=pump", "voltage=1", at)
        self.write("device_type=pump", "voltage=1", at)
        self.dynamo.put(TABLE, [item(f"{at:%Y-%m-%dT%H:%M:%SZ}", temp="15")])

    def databases(self) -> Mapping[str, str]:
        return {
            "INFLUXDB_URL": self.influx.url,
            "INFLUXDB_TOKEN": self.influx.token,
            "INFLUXDB_ORG": self.influx.org,
            "INFLUXDB_BUCKET": self.influx.bucket,
            "LOOKBACK_HOURS": "2",
            "DYNAMODB_TABLE_NAME": TABLE,
            "DYNAMODB_ENDPOINT_URL": self.dynamo.url,
            "AWS_ACCESS_KEY_ID": self.dynamo.access_key_id,
            "AWS_SECRET_ACCESS_KEY": self.dynamo.secret_access_key,
        }

    def everything(self) -> Mapping[str, str]:
        return {
            **self.databases(),
            "DATA_DIR": "data",
            "CSV_MONITOR_CONFIG": str(INBOX / "config.json"),
            "GOOGLE_CREDENTIALS_JSON": json.dumps(self.drive.state.tokens.service_account(self.drive.url)),
            "GOOGLE_DRIVE_API_URL": self.drive.url,
            "GOOGLE_DRIVE_FOLDER_ID": self.drive.folder_id,
            "GOOGLE_SHARED_DRIVE_ID": self.drive.state.shared_drive,
            **self.web.environment("web"),
            "RECONCILE_DAYS": "1",
            "AMPLITUDE_LOOKBACK_DAYS": "0",
            **self.mobile.environment(),
            "APPMETRICA_LOOKBACK_DAYS": "0",
            "APPMETRICA_RECOUNT_DAYS": "0",
        }

    def consent(self, commands: Commands) -> None:
        """`google`, whose address is opened as a user would."""
        client = json.dumps(self.drive.state.tokens.installed(self.drive.url))
        use(DATA_DIR="consent", GOOGLE_CREDENTIALS_JSON=client, OAUTHLIB_INSECURE_TRANSPORT="1")
        said = Said()
        user = threading.Thread(target=lambda: httpx.get(said.address(), follow_redirects=True))
        user.start()
        with redirect_stderr(said):
            commands.run("google", "--no-browser", "--json")
        user.join()


class Said(io.StringIO):
    """What a command says on stderr, for a thread that waits for an address there."""

    def __init__(self) -> None:
        super().__init__()
        self._said = threading.Event()

    def write(self, text: str) -> int:
        number = super().write(text)
        if "/auth" in text:
            self._said.set()
        return number

    def address(self) -> str:
        self._said.wait(30)
        found = re.search(r"http://\S+/auth\S+", self.getvalue())
        assert found, self.getvalue()
        return found[0]


def item(at: str, **numbers: str) -> dict[str, dict[str, Any]]:
    key = {"static_partition": {"S": "data"}, "datetime_utc": {"S": at}}
    return {**key, **{name: {"N": text} for name, text in numbers.items()}}


def drop(**files: str) -> None:
    """Files for the inbox, which has nothing to wait for."""
    (INBOX / "csv_inbox").mkdir(parents=True, exist_ok=True)
    settings = {"key_column": "k", "checksum_wait_seconds": 0, "lock_timeout_seconds": 0}
    (INBOX / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    for name, text in files.items():
        (INBOX / "csv_inbox" / f"{name}.csv").write_text(text, encoding="utf-8")
