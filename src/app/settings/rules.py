"""What several variables must hold together, and what is odd about them without being wrong.

Invariant: the rules are pure; each fault names the variable to set, and shows no value but numbers.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any

from app.core.window import DAY_SECONDS
from app.settings.groups import Settings

Values = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Needs:
    """Where one of `given` is set, each of `needed` must be. Fields as `group.field`, with the name to ask for."""

    given: tuple[str, ...]
    needed: Mapping[str, str]


PAIRS = (
    ("S3_ACCESS_KEY_ID", "S3_SECRET_ACCESS_KEY"),
    ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"),
)
NEEDS = (
    Needs(
        ("checkpoint.host", "checkpoint.database", "checkpoint.user", "checkpoint.password", "checkpoint.port"),
        {"checkpoint.host": "CHECKPOINT_DB_HOST", "checkpoint.database": "CHECKPOINT_DB_NAME"},
    ),
    Needs(("checkpoint.password",), {"checkpoint.user": "CHECKPOINT_DB_USER"}),
    Needs(
        ("appmetrica.api_key", "appmetrica.application_id"),
        {"appmetrica.api_key": "APPMETRICA_API_KEY", "appmetrica.application_id": "APPMETRICA_APPLICATION_ID"},
    ),
    Needs(
        ("amplitude.web_client_id", "amplitude.web_secret_key"),
        {"amplitude.web_client_id": "AMPLITUDE_WEB_CLIENT_ID", "amplitude.web_secret_key": "AMPLITUDE_WEB_SECRET_KEY"},
    ),
    Needs(
        ("amplitude.mobile_client_id", "amplitude.mobile_secret_key"),
        {
            "amplitude.mobile_client_id": "AMPLITUDE_MOBILE_CLIENT_ID",
            "amplitude.mobile_secret_key": "AMPLITUDE_MOBILE_SECRET_KEY",
        },
    ),
    Needs(("influx.password",), {"influx.username": "INFLUXDB_USERNAME"}),
)


def loopback(host: str) -> bool:
    """True when only this machine can reach `host`."""
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.rstrip(".").lower() == "localhost"


def broken_rules(values: Values, chosen: Mapping[str, str]) -> Iterator[str]:
    """One line per rule that does not hold. A value that could not be read is absent, and its rules are left out."""
    yield from _half_configured(chosen)
    yield from _influx(values, chosen)
    yield from _export(values)
    yield from _lease(values)
    yield from _public_host(values)


def _half_configured(chosen: Mapping[str, str]) -> Iterator[str]:
    # placeholder in the skeleton
    yield from ()


def _influx(values: Values, chosen: Mapping[str, str]) -> Iterator[str]:
    yield from ()


def _export(values: Values) -> Iterator[str]:
    window = values.get("export.window_seconds")
    if window and DAY_SECONDS % window:
        yield f"EXPORT_WINDOW_SECONDS='{window}': allowed: a number of seconds that divides {DAY_SECONDS}, such as 3600"


def _lease(values: Values) -> Iterator[str]:
    yield from ()


def _public_host(values: Values) -> Iterator[str]:
    yield from ()


def warnings(settings: Settings, environ: Mapping[str, str]) -> list[str]:
    """What a person should look at before relying on this configuration."""
    return []
