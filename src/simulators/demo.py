"""The simulated systems of `python -m app demo`, and the environment that points Headwater at them.

Invariant: of the user's settings the demo reads only the listen address, the logging and the data directory, so it can
never touch a real system.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

from simulators import amplitude, appmetrica
from simulators.demo_data import NS, SHIP_KEY, SHIP_TABLE, CsvWriter, ShipWriter, TelemetryWriter, Writer, fleet
from simulators.drive import DriveSimulator
from simulators.dynamodb import DynamoSimulator, DynamoTable
from simulators.influx import InfluxSimulator

DEVICES = 8
BACKLOG_HOURS = 3
MOST_HOURS = 12
WINDOW_SECONDS = 600
EVENTS_AN_HOUR = 12
Fill = Callable[[Writer], None]
KEPT = ("HOST", "PORT", "LOG_LEVEL", "LOGGING_LEVEL", "LOG_FORMAT", "API_KEYS", "ALLOW_ANONYMOUS")


@contextmanager
def simulated(environ: Mapping[str, str], *, live: bool) -> Iterator[Mapping[str, str]]:
    """Start the simulators with some hours of data, with `live` adding more every few seconds; yields the whole demo
    environment.
    """
    folder = Path(environ.get("DATA_DIR") or "data") / "demo"  # next to the real data, never inside it
    began = began_at(folder / "began", datetime.now(UTC))
    with ExitStack() as running:

        def fill(writer: Writer) -> None:
            """Write the backlog, and in a live demo also start a thread that writes new data."""
            writer.write()
            if live:
                running.callback(writer.close)
                writer.start()

        yield {
            **{name: environ[name] for name in KEPT if name in environ},
            "DATA_DIR": str(folder),
            **_telemetry(running, fill, began),
            **_ship(running, fill, began, folder / "drive"),
            **_product_events(running),
            **_inbox(fill, folder),
        }


def began_at(path: Path, now: datetime) -> datetime:
    """The oldest timestamp of the simulated data. It is that of the last demo here, so that the demo finds its earlier
    exports; in the first demo, and long after the last one, it is some hours ago.
    """
    oldest_seconds = int((now - timedelta(hours=BACKLOG_HOURS)).timestamp())
    fresh = datetime.fromtimestamp(oldest_seconds // WINDOW_SECONDS * WINDOW_SECONDS, UTC)
    try:
        began = datetime.fromisoformat(path.read_text().strip()).astimezone(UTC)
    except (FileNotFoundError, ValueError):
        began = fresh
    if not fresh - timedelta(hours=MOST_HOURS) <= began <= now:
        began = fresh
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(began.isoformat())
    return began


def _telemetry(running: ExitStack, fill: Fill, began: datetime) -> Mapping[str, str]:
    """Devices that write to InfluxDB. Ten-minute windows and a run every five seconds, so that a newcomer sees rows
    arrive, settle and close.
    """
    influx = running.enter_context(InfluxSimulator())
    fill(TelemetryWriter(influx.write, fleet(DEVICES), oldest_ns=int(began.timestamp()) * NS))
    return {
        "INFLUXDB_URL": influx.url,
        "INFLUXDB_TOKEN": influx.token,
        "INFLUXDB_ORG": influx.org,
        "INFLUXDB_BUCKET": influx.bucket,
        "EXPORT_INTERVAL_SECONDS": "5",
        "EXPORT_WINDOW_SECONDS": str(WINDOW_SECONDS),
        "EXPORT_GRACE_SECONDS": "900",
        "LOOKBACK_HOURS": str(BACKLOG_HOURS),
    }


def _ship(running: ExitStack, fill: Fill, began: datetime, kept: Path) -> Mapping[str, str]:
    """A ship that writes to DynamoDB, and a shared drive for its hours.

    The drive's content is kept, since Headwater put it there; the other systems generate the same data each time.
    """
    dynamo = running.enter_context(DynamoSimulator([DynamoTable(SHIP_TABLE, SHIP_KEY, ("S", "S"))]))
    drive = running.enter_context(DriveSimulator(folder=kept))
    fill(ShipWriter(dynamo.put, oldest_at=began))
    return {
        "DYNAMODB_TABLE_NAME": SHIP_TABLE,
        "DYNAMODB_ENDPOINT_URL": dynamo.url,
        "AWS_ACCESS_KEY_ID": dynamo.access_key_id,
        "AWS_SECRET_ACCESS_KEY": dynamo.secret_access_key,
        "GOOGLE_CREDENTIALS_JSON": json.dumps(drive.state.tokens.service_account(drive.url)),
        "GOOGLE_DRIVE_API_URL": drive.url,
        "GOOGLE_DRIVE_FOLDER_ID": drive.folder_id,
        "GOOGLE_SHARED_DRIVE_ID": drive.state.shared_drive,
        "DRIVE_INTERVAL_SECONDS": "5",
        "DRIVE_CATCHUP_HOURS": str(BACKLOG_HOURS),
    }


def _product_events(running: ExitStack) -> Mapping[str, str]:
    """Two services that collect product events; as with the real ones, their hours are due later than others."""
    web = running.enter_context(amplitude.AmplitudeSimulator())
    web.state.made = amplitude.generated(EVENTS_AN_HOUR)
    mobile = running.enter_context(appmetrica.AppMetricaSimulator())
    mobile.state.rows = appmetrica.generated(mobile.state.application_id, EVENTS_AN_HOUR)
    return {
        **web.environment(),
        **mobile.environment(),
        "AMPLITUDE_INTERVAL_SECONDS": "60",
        "AMPLITUDE_LOOKBACK_DAYS": "0",
        "APPMETRICA_INTERVAL_SECONDS": "60",
        "APPMETRICA_LOOKBACK_DAYS": "1",
    }


def _inbox(fill: Fill, folder: Path) -> Mapping[str, str]:
    """CSV files and a separate configuration, so that a config.json in the working directory stays untouched."""
    files = CsvWriter(folder / "csv_inbox")
    files.write()
    fill(files)
    config = folder / "config.json"
    config.write_text(json.dumps({"required_columns": ["id", "name"], "checksum_wait_seconds": 1}, indent=2))
    return {"CSV_MONITOR_CONFIG": str(config), "CSV_INBOX_INTERVAL_SECONDS": "5"}
