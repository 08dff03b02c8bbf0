"""Every environment variable: its names in order of precedence, where it goes, its default, and why one would set it.

Invariant: this table is the one declaration. Reading, faults, `.env.example` and README's table all come from it.
"""

from app.settings import kinds
from app.settings.alert_variables import ALERT
from app.settings.pull_variables import AMPLITUDE, APPMETRICA
from app.settings.variable import Part, Variable
from app.settings.variable import of as _of

__all__ = ["PARTS", "Part", "Variable"]

YEAR_SECONDS = 366 * 86_400
GIB = 1 << 30


SERVICE = _of(
    "service",
    ("name", "SERVICE_NAME", kinds.TEXT, "headwater", "name of this service in logs and answers"),
    ("title", "TITLE", kinds.TEXT, "Headwater", "title of the API pages"),
    ("version", "VERSION", kinds.TEXT, "", "version that /health reports", "the installed version"),
    (
        "description",
        "DESCRIPTION",
        kinds.TEXT,
        "Lands telemetry and product-analytics data where people work with it.",
        "text of the API pages",
    ),
    ("debug", "DEBUG", kinds.FLAG, "false", "log at level DEBUG, whatever LOG_LEVEL says"),
    ("host", "HOST", kinds.HOST, "127.0.0.1", "address to listen on; one that others can reach needs API_KEYS"),
    ("port", "PORT", kinds.whole(1, 65_535), "8080", "port to listen on; platforms such as Railway set it"),
    (
        "health_port",
        "HEALTH_PORT",
        kinds.whole(1, 65_535),
        "",
        "second port that answers /health and /ready alone; PORT answers them too, before any limit",
        "none",
    ),
    ("log_level", "LOG_LEVEL LOGGING_LEVEL", kinds.LOG_LEVEL, "INFO", "least level that is logged"),
    (
        "log_format",
        "LOG_FORMAT",
        kinds.one_of("auto", "json", "text"),
        "auto",
        "auto: text on a terminal, one JSON object a line elsewhere, so that platforms can index it",
    ),
    (
        "log_file",
        "LOG_FILE",
        kinds.LOG_FILE,
        "",
        "rotating log file (1 MB, five kept) beside stdout; off = none",
        "app.log in DATA_DIR",
    ),
    ("data_dir", "DATA_DIR", kinds.PATH, "./data", "folder of all that is embedded: state, warehouse, objects, inbox"),
    (
        "shutdown_grace_seconds",
        "SHUTDOWN_GRACE_SECONDS",
        kinds.whole(1, 3600),
        "25",
        "time a stop may take; stay below what the platform waits before it kills (Kubernetes: 30)",
    ),
)

ACCESS = _of(
    "access",
    (
        "api_keys",
        "API_KEYS",
        kinds.API_KEYS,
        "",
        "who may call: lines of `python -m app keys new NAME`; only hashes stand here",
        "loopback only",
    ),
    (
        "allow_anonymous",
        "ALLOW_ANONYMOUS",
        kinds.FLAG,
        "false",
        "serve a public HOST without keys: everybody may write",
    ),
    (
        "forwarded_allow_ips",
        "FORWARDED_ALLOW_IPS",
        kinds.LIST,
        "127.0.0.1",
        "proxies whose X-Forwarded-For is believed; set it to the proxy's address, else limits count the proxy",
    ),
    ("cors_origins", "CORS_ORIGINS", kinds.ORIGINS, "", "web pages of other origins that may call the API", "none"),
)

LIMITS = _of(
    "limits",
    ("max_body_bytes", "MAX_BODY_BYTES", kinds.whole(1024, GIB), "10000000", "largest JSON body; memory grows with it"),
    (
        "max_upload_bytes",
        "MAX_UPLOAD_BYTES",
        kinds.whole(1, 5120 * GIB),
        str(5 * GIB),
        "largest upload to /s3; uploads are streamed, so this guards the bucket and not the memory",
    ),
)

INFLUX = _of(
    "influx",
    ("url", "INFLUXDB_URL", kinds.HTTP_URL, "", "InfluxDB to export from", "influx_to_s3 is off"),
    ("token", "INFLUXDB_TOKEN", kinds.SECRET, "", "read token for the one bucket"),
    ("org", "INFLUXDB_ORG", kinds.TEXT, "", "organisation, for flux"),
    ("bucket", "INFLUXDB_BUCKET", kinds.TEXT, "", "bucket to read, for flux"),
    ("measurement", "INFLUXDB_MEASUREMENT", kinds.TEXT, "device_telemetry", "measurement to export"),
    ("device_tag", "INFLUXDB_DEVICE_TAG", kinds.TEXT, "device_id", "tag that names the device"),
    (
        "ignored_tags",
        "INFLUXDB_IGNORED_TAGS",
        kinds.LIST_OR_BLANK,
        "schema_version,enrichment_status",
        "tags that are neither a column nor part of a row's identity; points that differ only in these are merged",
        "none",
    ),
    (
        "api",
        "INFLUXDB_API",
        kinds.one_of("flux", "influxql"),
        "flux",
        "flux for InfluxDB 2; influxql works with 1.x, 2.x and 3",
    ),
    ("database", "INFLUXDB_DATABASE", kinds.TEXT, "", "database to read, for influxql", "INFLUXDB_BUCKET"),
    ("retention_policy", "INFLUXDB_RETENTION_POLICY", kinds.TEXT, "", "retention policy, for influxql", "the default"),
    ("username", "INFLUXDB_USERNAME", kinds.TEXT, "", "user, for influxql on 1.x"),
    ("password", "INFLUXDB_PASSWORD", kinds.SECRET, "", "password, for influxql on 1.x"),
    ("timeout_seconds", "INFLUXDB_TIMEOUT_SECONDS", kinds.seconds(1, 3600), "60", "longest silence of one query"),
)

EXPORT = _of(
    "export",
    ("interval_seconds", "EXPORT_INTERVAL_SECONDS", kinds.whole(1, 86_400), "60", "time between runs"),
    (
        "batch_size",
        "EXPORT_BATCH_SIZE",
        kinds.whole(1, 10_000_000),
        "20000",
        "rows held per step: memory against speed, never what is written",
    ),
    ("format", "EXPORT_FORMAT", kinds.one_of("parquet", "csv"), "parquet", "format of the objects"),
    (
        "device_ids",
        "DEVICE_IDS",
        kinds.DEVICE_IDS,
        "*",
        "comma-separated devices; * finds them in the tag INFLUXDB_DEVICE_TAG",
    ),
    (
        "lookback_hours",
        "LOOKBACK_HOURS",
        kinds.whole(1, 87_600),
        "1",
        "how far back a device without a checkpoint starts, and how late a row may come",
    ),
    (
        "start",
        "EXPORT_START",
        kinds.INSTANT,
        "",
        "first start of a new installation; kept beside the data",
        "LOOKBACK_HOURS ago",
    ),
    (
        "window_seconds",
        "EXPORT_WINDOW_SECONDS",
        kinds.whole(60, 86_400),
        "3600",
        "length of the interval in one object; divides a day, a change takes effect at the next UTC day",
    ),
    (
        "grace_seconds",
        "EXPORT_GRACE_SECONDS",
        kinds.whole(0, YEAR_SECONDS),
        "",
        "how long a window takes late rows before it is closed for good",
        "LOOKBACK_HOURS",
    ),
    (
        "date_format",
        "EXPORT_DATE_FORMAT",
        kinds.DATE_FORMAT,
        "%Y/%m/%d",
        "the date= part of a key; %Y-%m-%d for engines that read Hive partitions",
    ),
    (
        "timestamp_unit",
        "EXPORT_TIMESTAMP_UNIT",
        kinds.UNIT_OR_NONE,
        "",
        "unit of the column timestamp in Parquet, us or ns; Spark, Trino and Iceberg read us",
        "us for a new tree, an existing one keeps its unit",
    ),
    (
        "column_types",
        "EXPORT_COLUMN_TYPES",
        kinds.COLUMN_TYPES_KIND,
        "",
        "types of single columns, such as count=double; a change takes effect with the next UTC day",
        "the type of a field when it was first seen",
    ),
    (
        "allow_shrink",
        "EXPORT_ALLOW_SHRINK",
        kinds.FLAG,
        "false",
        "let an object lose rows that were deleted at the source; rows that its retention dropped are kept",
    ),
    ("reconcile_days", "RECONCILE_DAYS", kinds.whole(0, 3660), "7", "days that the daily search for late rows covers"),
    ("concurrency", "EXPORT_CONCURRENCY", kinds.whole(1, 64), "2", "devices that are exported at once"),
)

S3 = _of(
    "s3",
    ("bucket", "S3_BUCKET S3_BUCKET_NAME", kinds.BUCKET_NAME, "", "bucket of all objects", "a folder in DATA_DIR"),
    ("prefix", "S3_PREFIX", kinds.PREFIX, "telemetry", "where the export stands, with or without a trailing slash"),
    ("region", "S3_REGION AWS_REGION", kinds.TEXT, "us-east-1", "region of the bucket"),
    (
        "endpoint_url",
        "S3_ENDPOINT_URL",
        kinds.ENDPOINT,
        "",
        "URL of a compatible store (MinIO, SeaweedFS, Railway, R2)",
        "AWS",
    ),
    (
        "addressing_style",
        "S3_ADDRESSING_STYLE",
        kinds.one_of("auto", "path", "virtual"),
        "auto",
        "path for most compatible stores, virtual for new Railway buckets",
    ),
    (
        "access_key_id",
        "S3_ACCESS_KEY_ID AWS_ACCESS_KEY_ID",
        kinds.SECRET_OR_NONE,
        "",
        "access key; set it with its secret key of the same family",
        "the SDK's own chain, such as an IAM role",
    ),
    ("secret_access_key", "S3_SECRET_ACCESS_KEY AWS_SECRET_ACCESS_KEY", kinds.SECRET_OR_NONE, "", "its secret key"),
    ("session_token", "AWS_SESSION_TOKEN", kinds.SECRET_OR_NONE, "", "token of temporary AWS_ keys"),
    (
        "allowed_prefixes",
        "S3_ALLOWED_PREFIXES",
        kinds.PREFIXES,
        "",
        "prefixes that /s3 is confined to, by commas",
        "all",
    ),
    (
        "routes_write_exports",
        "S3_ROUTES_WRITE_EXPORTS",
        kinds.FLAG,
        "false",
        "let /s3 write below S3_PREFIX; closed objects are never expected to change",
    ),
    (
        "sweep_hours",
        "S3_SWEEP_HOURS",
        kinds.whole(0, 8760),
        "24",
        "age at which unfinished multipart uploads in the bucket are aborted, by whomever they were begun; 0 = never",
    ),
)

SET_ASIDE = _of(
    "set_aside",
    (
        "days",
        "SET_ASIDE_DAYS",
        kinds.whole(0, 3660),
        "90",
        "days that rows which a run set aside are kept in _set_aside/; 0 = for ever",
    ),
    (
        "max_bytes",
        "SET_ASIDE_MAX_BYTES",
        kinds.whole(1024, GIB),
        str(16 << 20),
        "largest object in _set_aside/; rows beyond it are only counted",
    ),
)

CHECKPOINT = _of(
    "checkpoint",
    (
        "host",
        "CHECKPOINT_DB_HOST",
        kinds.DATABASE_HOST,
        "",
        "PostgreSQL that keeps checkpoints, runs and leases; beats CHECKPOINT_DATABASE_URL",
        "SQLite in DATA_DIR",
    ),
    ("port", "CHECKPOINT_DB_PORT", kinds.whole(1, 65_535), "5432", "its port"),
    ("database", "CHECKPOINT_DB_NAME", kinds.TEXT, "", "its database"),
    ("user", "CHECKPOINT_DB_USER", kinds.TEXT, "", "its user: a role that owns one schema is enough"),
    ("password", "CHECKPOINT_DB_PASSWORD", kinds.SECRET, "", "its password"),
    ("url", "CHECKPOINT_DATABASE_URL", kinds.POSTGRES_URL, "", "all of the above in one URL"),
)

LEASE = _of(
    "lease",
    (
        "ttl_seconds",
        "LEASE_TTL_SECONDS",
        kinds.seconds(1, 3600),
        "30",
        "a job is taken over this long after its process went silent",
    ),
    (
        "heartbeat_seconds",
        "LEASE_HEARTBEAT_SECONDS",
        kinds.seconds(0.1, 1800),
        "10",
        "time between renewals; at most half of LEASE_TTL_SECONDS, so that one may be lost",
    ),
)

DYNAMO = _of(
    "dynamo",
    ("table_name", "DYNAMODB_TABLE_NAME", kinds.TEXT, "", "DynamoDB table to read", "dynamo_to_drive is off"),
    ("region", "AWS_REGION", kinds.TEXT, "us-east-1", "region of the table"),
    ("endpoint_url", "DYNAMODB_ENDPOINT_URL", kinds.HTTP_URL, "", "URL of a compatible server or a test server", "AWS"),
    (
        "access_key_id",
        "AWS_ACCESS_KEY_ID",
        kinds.SECRET_OR_NONE,
        "",
        "access key with DescribeTable, Query and Scan on the table",
        "the SDK's own chain",
    ),
    ("secret_access_key", "AWS_SECRET_ACCESS_KEY", kinds.SECRET_OR_NONE, "", "its secret key"),
    ("session_token", "AWS_SESSION_TOKEN", kinds.SECRET_OR_NONE, "", "token of temporary keys"),
    (
        "timestamp_attribute",
        "DYNAMODB_TIMESTAMP_ATTRIBUTE",
        kinds.TEXT,
        "datetime_utc",
        "attribute that says when a row was measured",
    ),
    (
        "timestamp_unit",
        "DYNAMODB_TIMESTAMP_UNIT",
        kinds.one_of("auto", "s", "ms", "us"),
        "auto",
        "unit of that attribute where it is a number; auto tells it from the size of each number",
    ),
    (
        "partition_values",
        "DYNAMODB_PARTITION_VALUES",
        kinds.LIST,
        "",
        "partition key values to query, by commas",
        "data where the partition key is static_partition, else a scan",
    ),
    (
        "scan_max_bytes",
        "DYNAMODB_SCAN_MAX_BYTES",
        kinds.whole(0, 1 << 50),
        str(GIB),
        "a larger table is not scanned, since each run pays for all of it; raise it to allow that",
    ),
)

DRIVE = _of(
    "drive",
    (
        "credentials_file",
        "GOOGLE_CREDENTIALS_FILE",
        kinds.PATH,
        "",
        "key file of a service account or of an installed app",
        "files go to a folder in DATA_DIR",
    ),
    (
        "credentials_json",
        "GOOGLE_CREDENTIALS_JSON",
        kinds.CREDENTIALS_JSON,
        "",
        "the same file's text, raw or base64, where no file can be mounted; GOOGLE_CREDENTIALS_FILE beats it",
    ),
    ("folder_id", "GOOGLE_DRIVE_FOLDER_ID", kinds.TEXT, "", "folder that takes the files", "the root folder"),
    ("shared_drive_id", "GOOGLE_SHARED_DRIVE_ID", kinds.TEXT, "", "shared drive of that folder", "My Drive"),
    ("api_url", "GOOGLE_DRIVE_API_URL", kinds.HTTP_URL, "", "URL of a test server", "Google"),
    (
        "timeout_seconds",
        "GOOGLE_DRIVE_TIMEOUT_SECONDS",
        kinds.seconds(0.1, 3600),
        "30",
        "longest silence of Drive in one call",
    ),
    (
        "csv_name_prefix",
        "CSV_NAME_PREFIX",
        kinds.FILE_STEM,
        "locness_data",
        "files are called {CSV_NAME_PREFIX}_{YYYYMMDD_HH}.csv",
    ),
    ("interval_seconds", "DRIVE_INTERVAL_SECONDS", kinds.whole(1, 86_400), "60", "time between runs"),
    ("grace_seconds", "DRIVE_GRACE_SECONDS", kinds.whole(0, 86_400), "600", "how long an hour takes late rows"),
    ("catchup_hours", "DRIVE_CATCHUP_HOURS", kinds.whole(0, 8784), "24", "hours that are made up for after an outage"),
    ("late_hours", "DRIVE_LATE_HOURS", kinds.whole(0, 8784), "6", "past hours that are looked at again every 15 min"),
    (
        "allow_shrink",
        "DRIVE_ALLOW_SHRINK",
        kinds.FLAG,
        "false",
        "let a file lose rows that the table no longer returns (TTL, deletion); else they are kept",
    ),
    (
        "escape_formulas",
        "CSV_ESCAPE_FORMULAS",
        kinds.FLAG,
        "false",
        "put ' before text that a spreadsheet would take for a formula (= + - @); else data stays as it is",
    ),
)

INBOX = _of(
    "inbox",
    (
        "config_file",
        "CSV_MONITOR_CONFIG",
        kinds.PATH,
        "",
        "JSON file with the keys of the CSV inbox",
        "config.json in the working directory, or the defaults in DATA_DIR",
    ),
    ("interval_seconds", "CSV_INBOX_INTERVAL_SECONDS", kinds.whole(1, 86_400), "60", "time between runs"),
)

DWH = _of(
    "dwh",
    (
        "database_url",
        "DWH_DATABASE_URL",
        kinds.WAREHOUSE_URL,
        "",
        "database of the seven tables, sqlite:/// or postgresql://",
        "SQLite in DATA_DIR",
    ),
    (
        "max_write_batch_bytes",
        "DWH_MAX_WRITE_BATCH_BYTES",
        kinds.whole(1, GIB),
        "10000000",
        "bytes of JSON in one INSERT; a larger row goes alone",
    ),
    ("max_rows_per_insert", "DWH_MAX_ROWS_PER_INSERT", kinds.whole(1, 1_000_000), "1000", "rows in one INSERT"),
)

ANALYTICS = _of(
    "analytics",
    (
        "refresh_seconds",
        "ANALYTICS_REFRESH_SECONDS",
        kinds.seconds(0.1, 86_400),
        "10",
        "time within which a change of the objects is to be seen; above some 200,000 objects it takes longer",
    ),
    ("timeout_seconds", "ANALYTICS_TIMEOUT_SECONDS", kinds.seconds(0.1, 3600), "30", "longest that one report may run"),
    (
        "memory_mb",
        "ANALYTICS_MEMORY_MB",
        kinds.whole(32, 65_536),
        "128",
        "memory of DuckDB, once for a directory and up to three times for a bucket; what needs more goes to DATA_DIR",
    ),
    ("reports_dir", "ANALYTICS_REPORTS_DIR", kinds.PATH, "", "folder of further reports, one .sql file each", "none"),
)


PARTS = (
    Part("Service", SERVICE),
    Part("Access", ACCESS),
    Part("Limits", LIMITS),
    Part("InfluxDB, the source of influx_to_s3", INFLUX),
    Part("Export, how influx_to_s3 cuts and names", EXPORT),
    Part("S3 or a compatible store: exports, /s3, /analytics", S3),
    Part("Set aside: rows that a run could not take", SET_ASIDE),
    Part("Checkpoints", CHECKPOINT),
    Part("Leases, for several replicas", LEASE),
    Part("DynamoDB, the source of dynamo_to_drive", DYNAMO),
    Part("Google Drive, the sink of dynamo_to_drive", DRIVE),
    Part("CSV inbox", INBOX),
    Part("Warehouse: /dwh", DWH),
    Part("Reports: /analytics", ANALYTICS),
    Part("AppMetrica", APPMETRICA),
    Part("Amplitude", AMPLITUDE),
    Part("Alerts and heartbeats", ALERT),
)
