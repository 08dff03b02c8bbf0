"""Every environment variable, declared once: its names in order of precedence, type, default and purpose.

One class per group. Parsing, faults, `.env.example`, README's table and the warnings about misspelt names are all
derived from these models. Invariants: an instance holds only validated values; every secret is a SecretStr, so that no
repr shows it. To get other values, use `load_settings({}, None)` and `model_copy`.

`from app.config.settings import settings` reads the environment and `.env` on first use.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import SecretStr, ValidationInfo, field_validator, model_validator
from pydantic_settings import BaseSettings, InitSettingsSource, SettingsConfigDict

from app.config import DOTENV
from app.config.value_types import (
    LOWER_CASE,
    NO_SECRET,
    Advice,
    Allowed,
    ApiKeys,
    BucketName,
    CaFile,
    ColumnTypes,
    DatabaseHost,
    DateFormat,
    DeviceIds,
    FileStem,
    Flag,
    Folder,
    Host,
    HttpUrl,
    Instant,
    Interval,
    JobSeconds,
    JobUrls,
    KeyFileText,
    LogFile,
    LogLevel,
    OptionalPath,
    OptionalSecret,
    Origins,
    PostgresUrl,
    Prefix,
    Prefixes,
    Resources,
    S3Endpoint,
    Secret,
    SecretUrl,
    SettingsGroup,
    StorageClass,
    Text,
    Texts,
    TimeZone,
    WarehouseUrl,
    checkpoint_url,
    installed_version,
    variable,
)
from app.core.windows import DAY_SECONDS

YEAR_SECONDS = 366 * DAY_SECONDS
GIB = 1 << 30
OF_URL: Mapping[str, Any] = {"exclude": True, "repr": False}  # visible only as part of the URL


class ServiceSettings(SettingsGroup, title="Service"):
    """The process itself. `log_file` None = no file, `health_port` None = probes on `port` alone."""

    name: Text = variable("SERVICE_NAME", default="headwater")
    """Name of this service in logs and answers."""
    title: Text = variable("TITLE", default="Headwater")
    """Title of the API pages."""
    version: Text = variable("VERSION", default=installed_version, unset="the installed version")
    """Version that /health reports."""
    description: Text = variable(
        "DESCRIPTION", default="Delivers telemetry and product-analytics data to where people use it."
    )
    """Text of the API pages."""
    debug: Flag = variable("DEBUG", default=False)
    """Log at level DEBUG, whatever LOG_LEVEL says."""
    host: Host = variable("HOST", default="127.0.0.1")
    """Address to listen on; without API_KEYS, one that others can reach is locked."""
    port: int = variable("PORT", default=8080, ge=1, le=65_535)
    """Port to listen on; platforms such as Railway set it."""
    health_port: int | None = variable("HEALTH_PORT", default=None, unset="none", ge=1, le=65_535)
    """Second port that answers /health and /ready alone; PORT answers them too, before any limit."""
    log_level: LogLevel = variable("LOG_LEVEL LOGGING_LEVEL", default="INFO", validate_default=True)
    """Minimum log level."""
    log_format: Annotated[Literal["auto", "json", "text"], LOWER_CASE] = variable("LOG_FORMAT", default="auto")
    """auto: text on a terminal, one JSON object a line elsewhere, so that platforms can index it."""
    data_dir: Folder = variable("DATA_DIR", default=Path("data"), shown="./data")
    """Directory for all local data: state, warehouse, objects, inbox."""
    log_file: LogFile = variable(
        "LOG_FILE", default=lambda above: above["data_dir"] / "app.log", unset="app.log in DATA_DIR"
    )
    """Rotating log file (1 MB each) beside stdout; off = none."""
    log_files: int = variable("LOG_FILES", default=5, ge=1, le=1000)
    """Older log files that are kept."""
    shutdown_grace_seconds: int = variable("SHUTDOWN_GRACE_SECONDS", default=25, ge=1, le=3600)
    """Maximum time of a shutdown; keep it below the platform's kill timeout (Kubernetes: 30)."""

    @field_validator("log_level")
    @classmethod
    def _debug_beats_it(cls, level: str, info: ValidationInfo) -> str:
        return "DEBUG" if info.data.get("debug") else level


class AccessSettings(SettingsGroup, title="Access"):
    """Who may call. Without keys and without `allow_anonymous`, a service that others can reach is locked:
    `rules.locked`.
    """

    api_keys: ApiKeys = variable("API_KEYS", default=(), unset="this machine only; locked where others can reach it")
    """Who may call: lines that `python -m app keys new admin --scopes admin` prints; they hold only hashes."""
    allow_anonymous: Flag = variable("ALLOW_ANONYMOUS", default=False)
    """Serve a public HOST without keys: anyone may write."""
    forwarded_allow_ips: Texts = variable("FORWARDED_ALLOW_IPS", default=("127.0.0.1",))
    """Proxies whose X-Forwarded-For is trusted; set it to the proxy's address, or rate limits apply to the proxy."""
    cors_origins: Origins = variable("CORS_ORIGINS", default=(), unset="none")
    """Web pages of other origins that may call the API with a key."""


class LimitSettings(SettingsGroup, title="Limits"):
    """Limits on requests."""

    max_body_bytes: int = variable("MAX_BODY_BYTES", default=16_000_000, ge=1024, le=GIB)
    """Largest JSON body; memory grows with it."""
    key_requests_per_second: float = variable("KEY_REQUESTS_PER_SECOND", default=500, ge=1, le=1_000_000)
    """Requests of one key, on average over ten seconds; more are answered 429."""
    max_upload_bytes: int = variable("MAX_UPLOAD_BYTES", default=5 * GIB, ge=1, le=5120 * GIB)
    """Largest upload to /s3; uploads are streamed, so this guards the bucket and not the memory."""


class NetworkSettings(SettingsGroup, title="Network: for every system outside"):
    """How outside systems are reached. `ca_file` None = only the public certificate authorities."""

    https_proxy: Secret = variable("HTTPS_PROXY https_proxy", default=NO_SECRET, unset="none")
    """Proxy for https://, such as http://proxy.example.org:3128."""
    http_proxy: Secret = variable("HTTP_PROXY http_proxy", default=NO_SECRET, unset="none")
    """Proxy for http://."""
    no_proxy: Text = variable("NO_PROXY no_proxy", default="", unset="none")
    """Comma-separated hosts that are reached without a proxy."""
    ca_file: CaFile = variable("CA_FILE", default=None, unset="the public authorities")
    """Certificates of a private authority, in PEM, that are trusted beside the public ones."""


class InfluxSettings(SettingsGroup, title="InfluxDB, the source of influx_to_s3"):
    """InfluxDB, the source. `url` "" = off. With `api` influxql, `database` is never empty when `url` is set."""

    url: HttpUrl = variable("INFLUXDB_URL", default="", unset="influx_to_s3 is off")
    """InfluxDB to export from."""
    token: Secret = variable("INFLUXDB_TOKEN", default=NO_SECRET)
    """Read token for the one bucket."""
    org: Text = variable("INFLUXDB_ORG", default="")
    """Organisation, for flux."""
    bucket: Text = variable("INFLUXDB_BUCKET", default="")
    """Bucket to read, for flux."""
    measurement: Text = variable("INFLUXDB_MEASUREMENT", default="device_telemetry")
    """Measurement to export."""
    device_tag: Text = variable("INFLUXDB_DEVICE_TAG", default="device_id")
    """Tag that names the device."""
    ignored_tags: Annotated[Texts, Allowed("comma-separated values, or empty", obvious=True)] = variable(
        "INFLUXDB_IGNORED_TAGS", default=("schema_version", "enrichment_status"), unset="none"
    )
    """Tags that are neither a column nor part of a row's identity; a change takes effect at the next UTC day."""
    api: Annotated[Literal["flux", "influxql"], LOWER_CASE] = variable("INFLUXDB_API", default="flux")
    """flux for InfluxDB 2; influxql works with 1.x, 2.x and 3."""
    database: Text = variable("INFLUXDB_DATABASE", default=lambda above: above["bucket"], unset="INFLUXDB_BUCKET")
    """Database to read, for influxql."""
    retention_policy: Text = variable("INFLUXDB_RETENTION_POLICY", default="", unset="the default")
    """Retention policy, for influxql."""
    username: Text = variable("INFLUXDB_USERNAME", default="")
    """User, for influxql on 1.x."""
    password: Secret = variable("INFLUXDB_PASSWORD", default=NO_SECRET)
    """Password, for influxql on 1.x."""
    timeout_seconds: float = variable("INFLUXDB_TIMEOUT_SECONDS", default=60.0, ge=1, le=3600)
    """Read timeout of a query."""


class ExportSettings(SettingsGroup, title="Export, how influx_to_s3 cuts and names"):
    """The export to objects. `device_ids` empty = discovery from the tag; `start` is aware UTC.

    `timestamp_unit` None: the unit of the tree, "us" for a new one. `column_types`: (column, type) pairs.
    """

    interval_seconds: Interval = variable("EXPORT_INTERVAL_SECONDS", default=60)
    """Time between runs."""
    batch_size: int = variable("EXPORT_BATCH_SIZE", default=20_000, ge=1, le=10_000_000)
    """Rows held per step: trades memory for speed; the output is the same."""
    format: Annotated[Literal["parquet", "csv"], LOWER_CASE] = variable("EXPORT_FORMAT", default="parquet")
    """Format of the objects."""
    device_ids: DeviceIds = variable("DEVICE_IDS", default=(), shown="*")
    """Comma-separated devices; * finds them in the tag INFLUXDB_DEVICE_TAG."""
    lookback_hours: int = variable("LOOKBACK_HOURS", default=1, ge=1, le=87_600)
    """How far back a device without a checkpoint starts, and how late a row may come."""
    start: Instant = variable("EXPORT_START", default=None, unset="LOOKBACK_HOURS ago")
    """First start of a new installation; kept beside the data."""
    window_seconds: int = variable("EXPORT_WINDOW_SECONDS", default=3600, ge=60, le=DAY_SECONDS)
    """Length of the interval in one object; divides a day, a change takes effect at the next UTC day."""
    grace_seconds: int = variable(
        "EXPORT_GRACE_SECONDS",
        default=lambda above: above["lookback_hours"] * 3600,
        unset="LOOKBACK_HOURS",
        ge=0,
        le=YEAR_SECONDS,
    )
    """How long a window takes late rows before it is closed for good."""
    date_format: DateFormat = variable("EXPORT_DATE_FORMAT", default="%Y/%m/%d")
    """The date= part of a key; %Y-%m-%d for engines that read Hive partitions."""
    timestamp_unit: Annotated[Literal["us", "ns"] | None, LOWER_CASE, Allowed("us or ns")] = variable(
        "EXPORT_TIMESTAMP_UNIT", default=None, unset="us for a new tree, an existing one keeps its unit"
    )
    """Unit of the column timestamp in Parquet, us or ns; Spark, Trino and Iceberg read us."""
    column_types: ColumnTypes = variable(
        "EXPORT_COLUMN_TYPES", default=(), unset="the type of a field when it was first seen"
    )
    """Types of single columns, such as count=double; a change takes effect with the next UTC day."""
    allow_shrink: Flag = variable("EXPORT_ALLOW_SHRINK", default=False)
    """Let an object lose rows that were deleted at the source; rows that its retention dropped are kept."""
    reconcile_days: int = variable("RECONCILE_DAYS", default=7, ge=0, le=3660)
    """Days that the daily reconcile compares with the source."""
    record_days: int = variable("WINDOW_RECORD_DAYS", default=14, ge=0, le=3660)
    """Days that closed windows are recorded one by one, never fewer than RECONCILE_DAYS; 0 = for ever."""
    heal: Annotated[Literal["off", "auto"], LOWER_CASE] = variable("EXPORT_HEAL", default="off")
    """auto: the reconcile rewrites closed objects that vanished or were replaced by others; off: it reports them."""
    concurrency: int = variable("EXPORT_CONCURRENCY", default=16, ge=1, le=64)
    """Maximum number of devices exported at once; it starts at 2 and rises while InfluxDB and the CPU allow it."""
    shards: int = variable("EXPORT_SHARDS", default=32, ge=1, le=1024)
    """Number of shards that the changed devices are split into for workers; a few for each worker."""

    @field_validator("window_seconds")
    @classmethod
    def _divides_a_day(cls, seconds: int) -> int:
        if DAY_SECONDS % seconds:
            raise Advice(f"allowed: a number of seconds that divides {DAY_SECONDS}, such as 300, 900 or 3600")
        return seconds


class S3Settings(SettingsGroup, title="S3 or a compatible store: exports, /s3, /analytics"):
    """The object store. `bucket` "" = a local directory; keys None = the SDK's own credential chain; `endpoint_url` ""
    = AWS.

    `prefix` never starts or ends with a slash. Each of `allowed_prefixes` ends with one, so that `startswith` is
    enough; an empty tuple = all keys. `session_token` belongs to the AWS_ pair of keys.
    """

    bucket: BucketName = variable("S3_BUCKET S3_BUCKET_NAME", default="", unset="a directory in DATA_DIR")
    """Bucket of all objects."""
    prefix: Prefix = variable("S3_PREFIX", default="telemetry")
    """Prefix of the export's keys, with or without a trailing slash."""
    region: Text = variable("S3_REGION AWS_REGION", default="us-east-1")
    """Region of the bucket."""
    endpoint_url: S3Endpoint = variable("S3_ENDPOINT_URL", default="", unset="AWS")
    """URL of a compatible store (MinIO, SeaweedFS, Railway, R2)."""
    addressing_style: Annotated[Literal["auto", "path", "virtual"], LOWER_CASE] = variable(
        "S3_ADDRESSING_STYLE", default="auto"
    )
    """path for most compatible stores, virtual for new Railway buckets."""
    access_key_id: OptionalSecret = variable(
        "S3_ACCESS_KEY_ID AWS_ACCESS_KEY_ID", default=None, unset="the SDK's own chain, such as an IAM role"
    )
    """Access key; set it with its secret key of the same family."""
    secret_access_key: OptionalSecret = variable("S3_SECRET_ACCESS_KEY AWS_SECRET_ACCESS_KEY", default=None)
    """Its secret key."""
    session_token: OptionalSecret = variable("AWS_SESSION_TOKEN", default=None)
    """Token of temporary AWS_ keys."""
    allowed_prefixes: Prefixes = variable("S3_ALLOWED_PREFIXES", default=(), unset="all")
    """Comma-separated prefixes that /s3 is confined to."""
    routes_write_exports: Flag = variable("S3_ROUTES_WRITE_EXPORTS", default=False)
    """Let /s3 write below S3_PREFIX; closed objects are never expected to change."""
    sweep_hours: int = variable("S3_SWEEP_HOURS", default=24, ge=0, le=8760)
    """Age at which unfinished multipart uploads in the bucket are aborted, whoever started them; 0 = never."""

    sse: Annotated[
        Literal["", "aes256", "aws:kms", "aws:kms:dsse"], LOWER_CASE, Allowed("AES256, aws:kms or aws:kms:dsse")
    ] = variable("S3_SSE", default="", unset="as the bucket does")
    """Server-side encryption of everything that is written to the bucket."""
    sse_kms_key_id: Text = variable("S3_SSE_KMS_KEY_ID", default="", unset="the key of AWS for S3")
    """KMS key for S3_SSE=aws:kms and aws:kms:dsse."""
    storage_class: StorageClass = variable("S3_STORAGE_CLASS", default="", unset="as the bucket does")
    """Storage class of exported objects whose window is closed; archive classes are refused."""

    @model_validator(mode="before")
    @classmethod
    def _token_of_its_keys(cls, given: Mapping[str, str]) -> Mapping[str, str]:
        if "AWS_ACCESS_KEY_ID" in given and "S3_ACCESS_KEY_ID" not in given:
            return given
        return {name: text for name, text in given.items() if name != "AWS_SESSION_TOKEN"}


class RequestCostSettings(SettingsGroup, title="Request costs: what S3 and DynamoDB charge for"):
    """`prices_file` "" = the built-in table of AWS prices; `max_monthly` None = no limit."""

    prices_file: Text = variable("REQUEST_PRICES_FILE", default="", unset="AWS prices, for AWS only")
    """JSON file of request prices, in the form of src/app/ops/request_prices.json."""
    max_monthly: float | None = variable(
        "MAX_MONTHLY_REQUEST_COST", default=None, unset="no limit", ge=0.01, le=1_000_000
    )
    """Monthly cost of requests, above which open windows are rewritten less often; closing is never delayed."""


class SetAsideSettings(SettingsGroup, title="Set aside: rows that a run could not take"):
    """How long set-aside rows are kept in the object store. `days` 0 = for ever."""

    days: int = variable("SET_ASIDE_DAYS", default=90, ge=0, le=3660)
    """Days that rows which a run set aside are kept in _set_aside/; 0 = for ever."""
    max_bytes: int = variable("SET_ASIDE_MAX_BYTES", default=16 << 20, ge=1024, le=GIB)
    """Largest object in _set_aside/; rows beyond it are only counted."""


class CheckpointSettings(SettingsGroup, title="Checkpoints"):
    """Where the state is kept. `url` "" = SQLite at `data_dir / "state.db"`, else postgresql://..."""

    host: DatabaseHost = variable("CHECKPOINT_DB_HOST", default="", unset="SQLite in DATA_DIR", **OF_URL)
    """PostgreSQL that keeps checkpoints, runs and leases; overrides CHECKPOINT_DATABASE_URL."""
    port: int = variable("CHECKPOINT_DB_PORT", default=5432, ge=1, le=65_535, **OF_URL)
    """Its port."""
    database: Text = variable("CHECKPOINT_DB_NAME", default="", **OF_URL)
    """Its database."""
    user: Text = variable("CHECKPOINT_DB_USER", default="", **OF_URL)
    """Its user: a role that owns one schema is enough."""
    password: Secret = variable("CHECKPOINT_DB_PASSWORD", default=NO_SECRET, **OF_URL)
    """Its password."""
    sslmode: Annotated[
        Literal["disable", "allow", "prefer", "require", "verify-ca", "verify-full"] | None,
        LOWER_CASE,
        Allowed("disable, allow, prefer, require, verify-ca or verify-full"),
    ] = variable("CHECKPOINT_DB_SSLMODE", default=None, unset="prefer: TLS where the server offers it", **OF_URL)
    """How its TLS is checked; verify-full checks the certificate, against CA_FILE too, and the host name."""
    url: PostgresUrl = variable("CHECKPOINT_DATABASE_URL", default=checkpoint_url)
    """All of the above in one URL."""
    run_records: int = variable("RUN_RECORDS", default=1000, ge=10, le=1_000_000)
    """Runs of each job that are remembered; totals and metrics count all."""

    @field_validator("url")
    @classmethod
    def _parts_beat_it(cls, url: SecretStr, info: ValidationInfo) -> SecretStr:
        return checkpoint_url(info.data) or url


class LeaseSettings(SettingsGroup, title="Leases, for several replicas"):
    """How long a lease on a job lasts, and how often it is renewed. `engine`: who runs jobs."""

    ttl_seconds: float = variable("LEASE_TTL_SECONDS", default=30.0, ge=1, le=3600)
    """Time after the last heartbeat before another process takes over a job."""
    heartbeat_seconds: float = variable("LEASE_HEARTBEAT_SECONDS", default=10.0, ge=0.1, le=1800)
    """Time between renewals; at most half of LEASE_TTL_SECONDS, so that one may be lost."""
    engine: Annotated[Literal["embedded", "procrastinate"], LOWER_CASE] = variable("SCALE_ENGINE", default="embedded")
    """procrastinate: `python -m app worker` runs jobs and shards, queued in the PostgreSQL of the checkpoints."""


class DynamoSettings(SettingsGroup, title="DynamoDB, the source of dynamo_to_drive"):
    """DynamoDB, the source. `table_name` "" = off; `endpoint_url` "" = AWS; keys None = the SDK's credential chain."""

    table_name: Text = variable("DYNAMODB_TABLE_NAME", default="", unset="dynamo_to_drive is off")
    """DynamoDB table to read."""
    region: Text = variable("AWS_REGION", default="us-east-1")
    """Region of the table."""
    endpoint_url: HttpUrl = variable("DYNAMODB_ENDPOINT_URL", default="", unset="AWS")
    """URL of a compatible server or a test server."""
    access_key_id: OptionalSecret = variable("AWS_ACCESS_KEY_ID", default=None, unset="the SDK's own chain")
    """Access key with DescribeTable, Query and Scan on the table."""
    secret_access_key: OptionalSecret = variable("AWS_SECRET_ACCESS_KEY", default=None)
    """Its secret key."""
    session_token: OptionalSecret = variable("AWS_SESSION_TOKEN", default=None)
    """Token of temporary keys."""
    timestamp_attribute: Text = variable("DYNAMODB_TIMESTAMP_ATTRIBUTE", default="datetime_utc")
    """Attribute that says when a row was measured."""
    timestamp_unit: Annotated[Literal["auto", "s", "ms", "us"], LOWER_CASE] = variable(
        "DYNAMODB_TIMESTAMP_UNIT", default="auto"
    )
    """Unit of that attribute where it is a number; auto tells it from the size of each number."""
    partition_values: Texts = variable(
        "DYNAMODB_PARTITION_VALUES", default=(), unset="data where the partition key is static_partition, else a scan"
    )
    """Comma-separated partition key values to query."""
    scan_max_bytes: int = variable("DYNAMODB_SCAN_MAX_BYTES", default=GIB, ge=0, le=1 << 50)
    """A larger table is not scanned, since each run pays for all of it; raise it to allow that."""


class DriveSettings(SettingsGroup, title="Google Drive, the sink of dynamo_to_drive"):
    """Google Drive, the sink. At most one of the two credentials is set; neither = a local directory.

    `credentials_json` is the JSON text, decoded if it was given as base64. `api_url` "" = Google's.
    """

    credentials_file: OptionalPath = variable(
        "GOOGLE_CREDENTIALS_FILE", default=None, unset="files go to a directory in DATA_DIR"
    )
    """Key file of a service account or of an installed app."""
    credentials_json: KeyFileText = variable("GOOGLE_CREDENTIALS_JSON", default=None)
    """The same file's text, raw or base64, where no file can be mounted; GOOGLE_CREDENTIALS_FILE overrides it."""
    folder_id: Text = variable("GOOGLE_DRIVE_FOLDER_ID", default="", unset="the root folder")
    """Folder that takes the files."""
    shared_drive_id: Text = variable("GOOGLE_SHARED_DRIVE_ID", default="", unset="My Drive")
    """Shared drive of that folder."""
    api_url: HttpUrl = variable("GOOGLE_DRIVE_API_URL", default="", unset="Google")
    """URL of a test server."""
    timeout_seconds: float = variable("GOOGLE_DRIVE_TIMEOUT_SECONDS", default=30.0, ge=0.1, le=3600)
    """Read timeout of a call to Drive."""
    csv_name_prefix: FileStem = variable("CSV_NAME_PREFIX", default="locness_data")
    """Files are called {CSV_NAME_PREFIX}_{YYYYMMDD_HH}.csv."""
    interval_seconds: Interval = variable("DRIVE_INTERVAL_SECONDS", default=60)
    """Time between runs."""
    grace_seconds: int = variable("DRIVE_GRACE_SECONDS", default=600, ge=0, le=DAY_SECONDS)
    """How long an hour takes late rows."""
    catchup_hours: int = variable("DRIVE_CATCHUP_HOURS", default=24, ge=0, le=8784)
    """Hours that are made up for after an outage."""
    late_hours: int = variable("DRIVE_LATE_HOURS", default=6, ge=0, le=8784)
    """Past hours that are checked again every 15 min."""
    allow_shrink: Flag = variable("DRIVE_ALLOW_SHRINK", default=False)
    """Let a file lose rows that the table no longer returns (TTL, deletion); otherwise they are kept."""
    escape_formulas: Flag = variable("CSV_ESCAPE_FORMULAS", default=False)
    """Put ' before text that a spreadsheet would take for a formula (= + - @); otherwise data stays as it is."""

    @field_validator("credentials_json")
    @classmethod
    def _file_beats_it(cls, text: SecretStr, info: ValidationInfo) -> SecretStr | None:
        return None if info.data.get("credentials_file") else text


class InboxSettings(SettingsGroup, title="CSV inbox"):
    """The CSV inbox. `config_file` None = `config.json` in the working directory when there is one."""

    config_file: OptionalPath = variable(
        "CSV_MONITOR_CONFIG", default=None, unset="config.json in the working directory, or the defaults in DATA_DIR"
    )
    """JSON file with the keys of the CSV inbox."""
    interval_seconds: Interval = variable("CSV_INBOX_INTERVAL_SECONDS", default=60)
    """Time between runs."""


class DwhSettings(SettingsGroup, title="Warehouse: /dwh"):
    """The warehouse. `database_url` "" = SQLite at `data_dir / "dwh.db"`, else sqlite:/// or postgresql://."""

    database_url: WarehouseUrl = variable("DWH_DATABASE_URL", default=NO_SECRET, unset="SQLite in DATA_DIR")
    """Database of the seven tables, sqlite:/// or postgresql://."""
    max_write_batch_bytes: int = variable("DWH_MAX_WRITE_BATCH_BYTES", default=10_000_000, ge=1, le=GIB)
    """Bytes of JSON in one INSERT; a larger row goes alone."""
    max_rows_per_insert: int = variable("DWH_MAX_ROWS_PER_INSERT", default=1000, ge=1, le=1_000_000)
    """Rows in one INSERT."""


class LakeSettings(SettingsGroup, title="Lake: closed days as an Iceberg table"):
    """The table of closed days. `catalog` "none" = off; `prefix` is never inside the export's prefix."""

    catalog: Annotated[Literal["none", "iceberg"], LOWER_CASE] = variable("CATALOG", default="none")
    """iceberg: closed days also become one Iceberg table, with its catalog in the checkpoint database."""
    prefix: Prefix = variable("S3_LAKE_PREFIX", default="lake")
    """Prefix of the table's files, outside S3_PREFIX."""
    wait_hours: int = variable("LAKE_WAIT_HOURS", default=6, ge=0, le=8784)
    """How long after its end and EXPORT_GRACE_SECONDS a day is added."""
    interval_seconds: Interval = variable("LAKE_INTERVAL_SECONDS", default=3600)
    """Time between runs; each lists the whole tree."""
    snapshot_days: int = variable("LAKE_SNAPSHOT_DAYS", default=7, ge=1, le=3660)
    """How long an earlier snapshot of the table can be read."""


class AnalyticsSettings(SettingsGroup, title="Reports: /analytics"):
    """/analytics. `reports_dir` None = only the built-in reports."""

    refresh_seconds: float = variable("ANALYTICS_REFRESH_SECONDS", default=10.0, ge=0.1, le=DAY_SECONDS)
    """Time within which a change of the objects is seen; above some 200,000 objects it takes longer."""
    timeout_seconds: float = variable("ANALYTICS_TIMEOUT_SECONDS", default=30.0, ge=0.1, le=3600)
    """Maximum duration of one report."""
    memory_mb: int = variable("ANALYTICS_MEMORY_MB", default=128, ge=32, le=65_536)
    """Memory of DuckDB, once for a directory and up to three times for a bucket; what needs more goes to DATA_DIR."""
    reports_dir: OptionalPath = variable("ANALYTICS_REPORTS_DIR", default=None, unset="none")
    """Directory of further reports, one .sql file each."""
    engine: Annotated[Literal["duckdb", "spark"], LOWER_CASE] = variable("ANALYTICS_ENGINE", default="duckdb")
    """spark: reports of closed days run over Spark Connect; needs CATALOG=iceberg."""
    spark_remote: OptionalSecret = variable("SPARK_REMOTE", default=None)
    """Spark Connect server, such as sc://host:15002, with ;token= where it wants one."""
    spark_table: Text = variable("SPARK_TABLE", default="", unset="it is read by its location")
    """The table in a catalog of that Spark, such as headwater.headwater.telemetry."""


class AppMetricaSettings(SettingsGroup, title="AppMetrica"):
    """AppMetrica. `api_key` None = off; `application_id` is then None too."""

    base_url: HttpUrl = variable("APPMETRICA_BASE_URL", default="https://api.appmetrica.yandex.com")
    """Base URL of AppMetrica."""
    api_key: OptionalSecret = variable("APPMETRICA_API_KEY", default=None, unset="appmetrica is off")
    """OAuth token of AppMetrica."""
    application_id: int | None = variable("APPMETRICA_APPLICATION_ID", default=None, ge=1, le=2**63 - 1)
    """Application to export."""
    poll_interval_seconds: float = variable("APPMETRICA_POLL_INTERVAL_SECONDS", default=5.0, ge=1, le=3600)
    """Time between two requests for a file; a day allows 5,000 requests."""
    poll_timeout_seconds: float = variable("APPMETRICA_POLL_TIMEOUT_SECONDS", default=300.0, ge=1, le=DAY_SECONDS)
    """How long one call waits; the export itself goes on and can be asked for again."""
    daily_calls: int = variable("APPMETRICA_DAILY_CALLS", default=5000, ge=1, le=1_000_000)
    """Requests allowed a UTC day; the service allows an account 5,000."""
    resources: Resources = variable("APPMETRICA_RESOURCES", default=("events",))
    """What to pull; everything is stored as objects, events also in the warehouse."""
    timezone: TimeZone = variable("APPMETRICA_TIMEZONE", default="", unset="requested from the service")
    """Time zone of the application, such as Europe/Moscow."""
    interval_seconds: Interval = variable("APPMETRICA_INTERVAL_SECONDS", default=3600)
    """Time between runs."""
    lookback_days: int = variable("APPMETRICA_LOOKBACK_DAYS", default=7, ge=0, le=360)
    """How far back a resource starts when it was never pulled."""
    recount_days: int = variable("APPMETRICA_RECOUNT_DAYS", default=15, ge=0, le=366)
    """Days of receipt that are counted again once a day, for rows that arrive late; 0 = off."""


class AmplitudeSettings(SettingsGroup, title="Amplitude"):
    """Amplitude. A source whose two keys are None is off."""

    base_url: HttpUrl = variable("AMPLITUDE_BASE_URL", default="https://amplitude.com")
    """https://analytics.eu.amplitude.com for EU residency."""
    web_client_id: OptionalSecret = variable("AMPLITUDE_WEB_CLIENT_ID", default=None, unset="web is off")
    """API key of the web project."""
    web_secret_key: OptionalSecret = variable("AMPLITUDE_WEB_SECRET_KEY", default=None)
    """Its secret key."""
    mobile_client_id: OptionalSecret = variable("AMPLITUDE_MOBILE_CLIENT_ID", default=None, unset="mobile is off")
    """API key of the mobile project."""
    mobile_secret_key: OptionalSecret = variable("AMPLITUDE_MOBILE_SECRET_KEY", default=None)
    """Its secret key."""
    interval_seconds: Interval = variable("AMPLITUDE_INTERVAL_SECONDS", default=3600)
    """Time between runs."""
    lookback_days: int = variable("AMPLITUDE_LOOKBACK_DAYS", default=7, ge=0, le=360)
    """How far back a source starts when it was never pulled, from the Monday of that week on."""


class AlertSettings(SettingsGroup, title="Alerts and heartbeats"):
    """Where failures, recoveries and silent jobs are reported. `webhook_url` "" = nowhere; `heartbeat_urls` is
    `job=URL,...`.
    """

    webhook_url: SecretUrl = variable("ALERT_WEBHOOK_URL", default=NO_SECRET, unset="nobody is told")
    """URL that gets a JSON message when a job starts to fail, recovers or goes silent; Slack and Mattermost read it."""
    grace_seconds: int = variable("ALERT_GRACE_SECONDS", default=900, ge=1, le=YEAR_SECONDS)
    """A job is stale when no run finished for its interval and this long."""
    grace_by_job: JobSeconds = variable("ALERT_GRACE_BY_JOB", default=(), unset="ALERT_GRACE_SECONDS")
    """The same for single jobs, such as influx_to_s3=300."""
    heartbeat_urls: JobUrls = variable("HEARTBEAT_URLS", default=NO_SECRET, unset="none")
    """URLs that are called after each successful run, so that a monitor elsewhere notices silence."""


class Settings(BaseSettings):
    """The whole validated configuration."""

    model_config = SettingsConfigDict(frozen=True, defer_build=True, hide_input_in_errors=True)

    service: ServiceSettings
    access: AccessSettings
    limits: LimitSettings
    network: NetworkSettings
    influx: InfluxSettings
    export: ExportSettings
    s3: S3Settings
    request_costs: RequestCostSettings
    set_aside: SetAsideSettings
    checkpoint: CheckpointSettings
    lease: LeaseSettings
    dynamo: DynamoSettings
    drive: DriveSettings
    inbox: InboxSettings
    dwh: DwhSettings
    lake: LakeSettings
    analytics: AnalyticsSettings
    appmetrica: AppMetricaSettings
    amplitude: AmplitudeSettings
    alert: AlertSettings

    def __init__(self, texts: Mapping[str, str]) -> None:
        """From the texts by variable name. Every group gets all of them and picks its own, in the order of its names.

        The sources of pydantic-settings resolve names per source, so the second name in the environment would beat the
        first in `.env`, and a fault would always name the first. Raises pydantic's ValidationError with every fault.
        """
        given = InitSettingsSource(type(self), {group: dict(texts) for group in type(self).model_fields})
        super().__init__(_build_sources=((given,), {}))


if TYPE_CHECKING:
    settings: Settings
else:

    def __getattr__(name: str) -> Settings:
        """`settings`, the name that document 002 uses: loaded on first use."""
        if name != "settings":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from app.config.environment import load_settings

        globals()[name] = found = load_settings(os.environ, DOTENV)
        return found
