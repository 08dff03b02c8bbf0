"""Every environment variable, its default and its reason; read once at the start into frozen groups."""

from app.settings.environment import load_settings
from app.settings.groups import (
    AccessSettings,
    AmplitudeSettings,
    AnalyticsSettings,
    AppMetricaSettings,
    CheckpointSettings,
    DriveSettings,
    DwhSettings,
    DynamoSettings,
    ExportSettings,
    InboxSettings,
    InfluxSettings,
    LeaseSettings,
    LimitSettings,
    S3Settings,
    ServiceSettings,
    Settings,
)
from app.settings.masking import describe, secrets_of
from app.settings.rules import loopback, warnings

__all__ = [
    "AccessSettings",
    "AmplitudeSettings",
    "AnalyticsSettings",
    "AppMetricaSettings",
    "CheckpointSettings",
    "DriveSettings",
    "DwhSettings",
    "DynamoSettings",
    "ExportSettings",
    "InboxSettings",
    "InfluxSettings",
    "LeaseSettings",
    "LimitSettings",
    "S3Settings",
    "ServiceSettings",
    "Settings",
    "describe",
    "load_settings",
    "loopback",
    "secrets_of",
    "warnings",
]
