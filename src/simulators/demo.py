"""The simulated outside systems of `python -m app demo`, and the environment that points the product at them.

Invariant: the demo reads none of the user's settings but where to listen, what to log and where data goes, so it can
never touch a real system.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

from app.core.window import floor_to
from simulators import amplitude, appmetrica
from simulators.demo_data import SHIP_KEY, SHIP_TABLE, Drops, Feeder, Ship, fleet, http_writer, ship_clock
from simulators.drive import DriveSimulator
from simulators.dynamodb import DynamoSimulator, Table
from simulators.flux_parser import NS
from simulators.influx import InfluxSimulator

DEVICES = 8
BACKLOG_HOURS = 3
MOST_HOURS = 12
WINDOW_SECONDS = 600
BEGAN = "began"
LIVE_SECONDS = 2.0
EVENTS_AN_HOUR = 12
FOLDER = "demo"
DRIVE = "drive"
KEPT = ("HOST", "PORT", "LOG_LEVEL", "LOGGING_LEVEL", "LOG_FORMAT", "API_KEYS", "ALLOW_ANONYMOUS")


@contextmanager
def simulated(environ: Mapping[str, str], *, live: bool) -> Iterator[Mapping[str, str]]:
    """Start the simulators with some hours of data, `live` with more each few seconds; the demo's whole environment."""
    with InfluxSimulator() as influx, ExitStack() as others:
        write = http_writer(influx.url, token=influx.token, org=influx.org, bucket=influx.bucket)
        folder = _folder(environ)
        began = began_at(folder / BEGAN, ship_clock())
        oldest_ns = int(began.timestamp()) * NS
        feeder = Feeder(write, fleet(DEVICES), oldest_ns=oldest_ns, interval_seconds=LIVE_SECONDS)
        others.callback(feeder.close)
        feeder.start()
        drops = Drops(folder / "csv_inbox")
        others.callback(drops.close)
        drops.drop()
        drops.drop()
        if live:
            drops.start()
        else:
            feeder.close()
        measured = _sailing(others, folder / DRIVE, began, live=live)
        clicked = _clicking(others)
        yield {
            **_kept(environ),
            **_short_cycle(influx),
            **measured,
            **clicked,
            **_inbox(folder),
            "DATA_DIR": str(folder),
        }


def began_at(path: Path, now: datetime) -> datetime:
    """The oldest instant of the simulated data: as in the last demo here, so that it finds what it exported again, or
    some hours ago in the first one and long after the last.
    """
    fresh = floor_to(now - timedelta(hours=BACKLOG_HOURS), WINDOW_SECONDS)
    try:
        began = datetime.fromisoformat(path.read_text().strip()).astimezone(UTC)
    except (FileNotFoundError, ValueError):
        began = fresh
    if not fresh - timedelta(hours=MOST_HOURS) <= began <= now:
        began = fresh
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(began.isoformat())
    return began


def _sailing(running: ExitStack, kept: Path, began: datetime, *, live: bool) -> Mapping[str, str]:
    """A ship that writes to DynamoDB, and a shared drive for its hours; started into `running`.

    The other systems make the same data anew each time; what is on the drive, the product has put there.
    """
    dynamo = running.enter_context(DynamoSimulator([Table(SHIP_TABLE, SHIP_KEY, ("S", "S"))]))
    drive = running.enter_context(DriveSimulator(folder=kept))
    backlog_hours = (ship_clock() - began) / timedelta(hours=1)
    vessel = Ship(dynamo.put, backlog_hours=backlog_hours, clock=ship_clock)
    running.callback(vessel.close)
    vessel.start()
    if not live:
        vessel.close()
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


def _clicking(running: ExitStack) -> Mapping[str, str]:
    """Two services that collect product events; started into `running`. Their hours are due later than those of others,
    as the real services' are.
    """
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


def _inbox(folder: Path) -> Mapping[str, str]:
    """A configuration of its own, so that a config.json in the working directory is left alone."""
    config = folder / "config.json"
    config.write_text(json.dumps({"required_columns": ["id", "name"], "checksum_wait_seconds": 1}, indent=2))
    return {"CSV_MONITOR_CONFIG": str(config), "CSV_INBOX_INTERVAL_SECONDS": "5"}


def _kept(environ: Mapping[str, str]) -> Mapping[str, str]:
    return {name: environ[name] for name in KEPT if name in environ}


def _folder(environ: Mapping[str, str]) -> Path:
    """Beside the real data, never among it."""
    return Path(environ.get("DATA_DIR") or "data") / FOLDER


def _short_cycle(influx: InfluxSimulator) -> Mapping[str, str]:
    """Windows of ten minutes and a run each five seconds: a newcomer sees rows land, settle and close."""
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
