"""What several variables must hold together, and what is odd about them without being wrong.

Invariant: the rules are pure; each fault names the variable to change and the next step, and shows no secret.
"""

from collections.abc import Iterator, Mapping
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from app.config.groups import Settings
from app.core.window import DAY_SECONDS

Values = Mapping[str, Any]

NEEDS = (
    ("S3_ACCESS_KEY_ID", "S3_SECRET_ACCESS_KEY"),
    ("S3_SECRET_ACCESS_KEY", "S3_ACCESS_KEY_ID"),
    ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"),
    ("AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID"),
    ("CHECKPOINT_DB_HOST", "CHECKPOINT_DB_NAME"),
    ("CHECKPOINT_DB_NAME", "CHECKPOINT_DB_HOST"),
    ("CHECKPOINT_DB_USER", "CHECKPOINT_DB_HOST"),
    ("CHECKPOINT_DB_PASSWORD", "CHECKPOINT_DB_HOST"),
    ("CHECKPOINT_DB_PASSWORD", "CHECKPOINT_DB_USER"),
    ("INFLUXDB_PASSWORD", "INFLUXDB_USERNAME"),
    ("APPMETRICA_API_KEY", "APPMETRICA_APPLICATION_ID"),
    ("APPMETRICA_APPLICATION_ID", "APPMETRICA_API_KEY"),
    ("AMPLITUDE_WEB_CLIENT_ID", "AMPLITUDE_WEB_SECRET_KEY"),
    ("AMPLITUDE_WEB_SECRET_KEY", "AMPLITUDE_WEB_CLIENT_ID"),
    ("AMPLITUDE_MOBILE_CLIENT_ID", "AMPLITUDE_MOBILE_SECRET_KEY"),
    ("AMPLITUDE_MOBILE_SECRET_KEY", "AMPLITUDE_MOBILE_CLIENT_ID"),
)
"""Where the first name is set, the second must be: half a configuration is never what somebody meant."""


def loopback(host: str) -> bool:
    """True when only this machine can reach `host`."""
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.rstrip(".").lower() == "localhost"


def broken_rules(values: Values, names: frozenset[str]) -> Iterator[str]:
    """One line per rule that does not hold. `values` by `group.field`, those that could be read; `names` are set."""
    for given, needed in NEEDS:
        if given in names and needed not in names:
            yield _missing(needed, given)
    yield from _influx(values, names)
    yield from _drive(names)
    yield from _export(values)
    yield from _lease(values)
    yield from _public_host(values)
    yield from _ports(values)


def _missing(needed: str, given: str) -> str:
    return f"{needed}='': needed because {given} is set; set it, or remove {given}"


def _influx(values: Values, names: frozenset[str]) -> Iterator[str]:
    if "INFLUXDB_URL" not in names:
        return
    if values.get("influx.api") == "influxql":
        if not names & {"INFLUXDB_DATABASE", "INFLUXDB_BUCKET"}:
            yield _missing("INFLUXDB_DATABASE", "INFLUXDB_URL")
        return
    if not names & {"INFLUXDB_TOKEN", "INFLUXDB_USERNAME"}:
        yield _missing("INFLUXDB_TOKEN", "INFLUXDB_URL")
    for needed in ("INFLUXDB_ORG", "INFLUXDB_BUCKET"):
        if needed not in names:
            yield _missing(needed, "INFLUXDB_URL")


def _drive(names: frozenset[str]) -> Iterator[str]:
    """A folder without credentials would send to this disk what somebody expects on Drive."""
    for given in ("GOOGLE_DRIVE_FOLDER_ID", "GOOGLE_SHARED_DRIVE_ID"):
        if given in names and not names & {"GOOGLE_CREDENTIALS_FILE", "GOOGLE_CREDENTIALS_JSON"}:
            yield _missing("GOOGLE_CREDENTIALS_FILE", given)


def _export(values: Values) -> Iterator[str]:
    window = values.get("export.window_seconds")
    if window and DAY_SECONDS % window:
        yield (
            f"EXPORT_WINDOW_SECONDS='{window}': allowed: a number of seconds that divides {DAY_SECONDS}, "
            "such as 300, 900 or 3600"
        )


def _lease(values: Values) -> Iterator[str]:
    ttl, heartbeat = values.get("lease.ttl_seconds"), values.get("lease.heartbeat_seconds")
    if ttl and heartbeat and heartbeat > ttl / 2:
        yield f"LEASE_HEARTBEAT_SECONDS='{heartbeat:g}': allowed: at most half of LEASE_TTL_SECONDS, here {ttl / 2:g}"


def _public_host(values: Values) -> Iterator[str]:
    host, keys = values.get("service.host"), values.get("access.api_keys")
    if host is None or keys is None or loopback(host) or keys or values.get("access.allow_anonymous", True):
        return
    yield (
        f"HOST='{host}': others can reach this address and API_KEYS is not set; run `python -m app keys new NAME` and "
        "set API_KEYS to the line it prints, or set HOST=127.0.0.1, or say ALLOW_ANONYMOUS=true"
    )


def _ports(values: Values) -> Iterator[str]:
    port = values.get("service.health_port")
    if port is not None and port == values.get("service.port"):
        yield f"HEALTH_PORT='{port}': allowed: another port than PORT, which answers probes already"


def warnings(settings: Settings, environ: Mapping[str, str]) -> list[str]:
    """What a person should look at before relying on this configuration; `environ` tells of the platform."""
    found = []
    if settings.access.allow_anonymous and not settings.access.api_keys and not loopback(settings.service.host):
        found.append(f"ALLOW_ANONYMOUS=true: everybody who reaches {settings.service.host} may read, write and delete")
    if environ.get("RAILWAY_ENVIRONMENT_NAME"):
        found.extend(_railway(settings, environ))
    return found


def _railway(settings: Settings, environ: Mapping[str, str]) -> Iterator[str]:
    service = settings.service
    volume = environ.get("RAILWAY_VOLUME_MOUNT_PATH", "")
    data_dir = Path.cwd() / service.data_dir
    if not volume or not data_dir.is_relative_to(volume):
        fix = f"set DATA_DIR to a folder under {volume}" if volume else "attach a volume and set DATA_DIR to its path"
        yield f"DATA_DIR={data_dir} is on no Railway volume and is lost at each deployment: {fix}"
    draining = environ.get("RAILWAY_DEPLOYMENT_DRAINING_SECONDS", "")
    if not draining.isdecimal() or int(draining) <= service.shutdown_grace_seconds:
        wanted = service.shutdown_grace_seconds + 5
        yield (
            f"RAILWAY_DEPLOYMENT_DRAINING_SECONDS={draining or 'unset'}: Railway kills before a stop is done: "
            f"set it to {wanted}"
        )
    if loopback(service.host):
        yield f"HOST={service.host}: Railway cannot reach it: set HOST=0.0.0.0 and API_KEYS"
