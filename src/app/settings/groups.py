"""The settings as the program sees them: frozen groups, one per part, built once by `load_settings`.

Invariants: a group holds only checked values; every secret is a SecretStr, so that no repr shows one; what has no
variable is not here. Defaults stand in `variables`, nowhere else: take `load_settings({}, None)` and `replace`.
"""

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal

from pydantic import SecretStr

from app.settings.keys import KeyEntry


@dataclass(frozen=True, slots=True)
class ServiceSettings:
    """The process itself. `log_file` None = no file, `health_port` None = probes on `port` alone."""

    name: str
    title: str
    version: str
    description: str
    debug: bool
    host: str
    port: int
    health_port: int | None
    log_level: str
    log_format: Literal["auto", "json", "text"]
    log_file: Path | None
    data_dir: Path
    shutdown_grace_seconds: int


@dataclass(frozen=True, slots=True)
class AccessSettings:
    """Who may call. Without keys and without `allow_anonymous` the host is loopback, that is checked at the start."""

    api_keys: tuple[KeyEntry, ...]
    allow_anonymous: bool
    forwarded_allow_ips: tuple[str, ...]
    cors_origins: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class LimitSettings:
    """What a request may cost."""

    max_body_bytes: int
    max_upload_bytes: int


@dataclass(frozen=True, slots=True)
class InfluxSettings:
    """InfluxDB, the source. `url` "" = off. With `api` influxql, `database` is never empty when `url` is set."""

    url: str
    token: SecretStr
    org: str
    bucket: str
    measurement: str
    device_tag: str
    ignored_tags: tuple[str, ...]
    api: Literal["flux", "influxql"]
    database: str
    retention_policy: str
    username: str
    password: SecretStr
    timeout_seconds: float


@dataclass(frozen=True, slots=True)
class ExportSettings:
    """The export to objects. `device_ids` empty = discovery from the tag; `start` is aware UTC.

    `timestamp_unit` None: the unit of the tree, "us" for a new one. `column_types`: (column, type) pairs.
    """

    interval_seconds: int
    batch_size: int
    format: Literal["parquet", "csv"]
    device_ids: tuple[str, ...]
    lookback_hours: int
    start: datetime | None
    window_seconds: int
    grace_seconds: int
    date_format: str
    timestamp_unit: Literal["us", "ns"] | None
    column_types: tuple[tuple[str, str], ...]
    allow_shrink: bool
    reconcile_days: int
    heal: Literal["off", "auto"]
    concurrency: int


@dataclass(frozen=True, slots=True)
class S3Settings:
    """Where objects live. `bucket` "" = a local directory; keys None = the SDK's own chain; `endpoint_url` "" = AWS.

    `prefix` never starts or ends with a slash; each of `allowed_prefixes` ends with one, so that `startswith` is the
    whole check, and none = all keys. `session_token` belongs to the AWS_ pair of keys.
    """

    bucket: str
    prefix: str
    region: str
    endpoint_url: str
    addressing_style: Literal["auto", "path", "virtual"]
    access_key_id: SecretStr | None
    secret_access_key: SecretStr | None
    session_token: SecretStr | None
    allowed_prefixes: tuple[str, ...]
    routes_write_exports: bool
    sweep_hours: int


@dataclass(frozen=True, slots=True)
class SetAsideSettings:
    """What runs set aside and keep in the object store. `days` 0 = for ever."""

    days: int
    max_bytes: int


@dataclass(frozen=True, slots=True)
class CheckpointSettings:
    """Where the state is kept. `url` "" = SQLite at `data_dir / "state.db"`, else postgresql://."""

    url: SecretStr


@dataclass(frozen=True, slots=True)
class LeaseSettings:
    """How long a job belongs to one process, and how often that is renewed."""

    ttl_seconds: float
    heartbeat_seconds: float


@dataclass(frozen=True, slots=True)
class DynamoSettings:
    """DynamoDB, the source. `table_name` "" = off; `endpoint_url` "" = AWS; keys None = the SDK's own chain."""

    table_name: str
    region: str
    endpoint_url: str
    access_key_id: SecretStr | None
    secret_access_key: SecretStr | None
    session_token: SecretStr | None
    timestamp_attribute: str
    timestamp_unit: Literal["auto", "s", "ms", "us"]
    partition_values: tuple[str, ...]
    scan_max_bytes: int


@dataclass(frozen=True, slots=True)
class DriveSettings:
    """Google Drive, the sink. At most one of the two credentials is set; neither = a local directory.

    `credentials_json` is the JSON text itself, decoded when it came as base64. `api_url` "" = Google's.
    """

    credentials_file: Path | None
    credentials_json: SecretStr | None
    folder_id: str
    shared_drive_id: str
    api_url: str
    timeout_seconds: float
    csv_name_prefix: str
    interval_seconds: int
    grace_seconds: int
    catchup_hours: int
    late_hours: int
    allow_shrink: bool
    escape_formulas: bool


@dataclass(frozen=True, slots=True)
class InboxSettings:
    """The CSV inbox. `config_file` None = `config.json` in the working directory when there is one."""

    config_file: Path | None
    interval_seconds: int


@dataclass(frozen=True, slots=True)
class DwhSettings:
    """The warehouse. `database_url` "" = SQLite at `data_dir / "dwh.db"`, else sqlite:/// or postgresql://."""

    database_url: SecretStr
    max_write_batch_bytes: int
    max_rows_per_insert: int


@dataclass(frozen=True, slots=True)
class AnalyticsSettings:
    """/analytics. `reports_dir` None = only the reports that come with the product."""

    refresh_seconds: float
    timeout_seconds: float
    memory_mb: int
    reports_dir: Path | None


@dataclass(frozen=True, slots=True)
class AppMetricaSettings:
    """AppMetrica. `api_key` None = off; then `application_id` is None too."""

    base_url: str
    api_key: SecretStr | None
    application_id: int | None
    poll_interval_seconds: float
    poll_timeout_seconds: float
    daily_calls: int
    resources: tuple[str, ...]
    timezone: str
    interval_seconds: int
    lookback_days: int
    recount_days: int


@dataclass(frozen=True, slots=True)
class AmplitudeSettings:
    """Amplitude. A source whose two keys are None is off."""

    base_url: str
    web_client_id: SecretStr | None
    web_secret_key: SecretStr | None
    mobile_client_id: SecretStr | None
    mobile_secret_key: SecretStr | None
    interval_seconds: int
    lookback_days: int


@dataclass(frozen=True, slots=True)
class AlertSettings:
    """Who is told of failures, recoveries and silence. `webhook_url` "" = nobody; `heartbeat_urls` is `job=URL,...`."""

    webhook_url: SecretStr
    heartbeat_urls: SecretStr
    grace_seconds: int
    grace_by_job: tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything that was configured, checked."""

    service: ServiceSettings
    access: AccessSettings
    limits: LimitSettings
    influx: InfluxSettings
    export: ExportSettings
    s3: S3Settings
    set_aside: SetAsideSettings
    checkpoint: CheckpointSettings
    lease: LeaseSettings
    dynamo: DynamoSettings
    drive: DriveSettings
    inbox: InboxSettings
    dwh: DwhSettings
    analytics: AnalyticsSettings
    appmetrica: AppMetricaSettings
    amplitude: AmplitudeSettings
    alert: AlertSettings
