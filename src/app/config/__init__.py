"""Every environment variable, its default and its reason; read once at the start into frozen groups."""

from app.config.environment import load_settings
from app.config.groups import (
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
from app.config.masking import describe, secrets_of
from app.config.rules import loopback, warnings

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
