"""Settings: what is accepted, what is refused and how, and that no secret is ever shown."""

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from textwrap import dedent
from types import MappingProxyType

import pytest
from pydantic import SecretStr

from app.core.errors import BadSettings
from app.settings import Settings, describe, load_settings, loopback, secrets_of, warnings
from app.settings.variables import PARTS

DOCUMENT_000 = """\
# AWS Configuration
AWS_ACCESS_KEY_ID=your_aws_access_key_id
AWS_SECRET_ACCESS_KEY=your_aws_secret_access_key
AWS_REGION=us-east-1
DYNAMODB_TABLE_NAME=your_table_name

# Google Drive Configuration
GOOGLE_CREDENTIALS_FILE=path/to/your/credentials.json
GOOGLE_DRIVE_FOLDER_ID=your_google_drive_folder_id

# CSV Configuration
CSV_NAME_PREFIX=locness_data

# Railway Configuration (optional)
PORT=8080
"""
DOCUMENT_001 = """\
# Service
SERVICE_NAME=data-export-service
LOG_LEVEL=INFO
PORT=8080

# InfluxDB (Source)
INFLUXDB_URL=http://localhost:8086
INFLUXDB_TOKEN=your-token
INFLUXDB_ORG=energy-platform
INFLUXDB_BUCKET=telemetry

# PostgreSQL (Checkpoint Storage)
CHECKPOINT_DB_HOST=localhost
CHECKPOINT_DB_PORT=5432
CHECKPOINT_DB_NAME=energy_platform
CHECKPOINT_DB_USER=postgres
CHECKPOINT_DB_PASSWORD=secret

# S3 (Destination)
S3_BUCKET=energy-platform-datasets
S3_PREFIX=telemetry
S3_REGION=us-east-1
AWS_ACCESS_KEY_ID=your-key
AWS_SECRET_ACCESS_KEY=your-secret

# Export Configuration
EXPORT_INTERVAL_SECONDS=60
EXPORT_BATCH_SIZE=1000
EXPORT_FORMAT=parquet
DEVICE_IDS=D1
LOOKBACK_HOURS=1
"""
DOCUMENT_002 = """\
TITLE="DWH Helper"
VERSION="1.0.0"
DESCRIPTION="Product analytics data ingestion and DWH integration"
DEBUG=false
DWH_DATABASE_URL="sqlite:///./dwh.db"
DWH_MAX_WRITE_BATCH_BYTES=10000000        # 10MB batch limit
DWH_MAX_ROWS_PER_INSERT=1000              # Max rows per INSERT statement
APPMETRICA_BASE_URL="https://api.appmetrica.yandex.net"
APPMETRICA_API_KEY="your-api-key"
APPMETRICA_APPLICATION_ID=123456789
APPMETRICA_POLL_INTERVAL_SECONDS=5
APPMETRICA_POLL_TIMEOUT_SECONDS=300
S3_ACCESS_KEY_ID="your-access-key"
S3_SECRET_ACCESS_KEY="your-secret-key"
S3_REGION="us-east-1"
S3_ENDPOINT_URL="https://s3.amazonaws.com"    # Leave empty for AWS, or use custom URL
S3_BUCKET_NAME="your-bucket-name"
LOGGING_LEVEL=INFO
AMPLITUDE_WEB_SECRET_KEY="your-web-secret-key"
AMPLITUDE_WEB_CLIENT_ID="your-web-client-id"
AMPLITUDE_MOBILE_SECRET_KEY="your-mobile-secret-key"
AMPLITUDE_MOBILE_CLIENT_ID="your-mobile-client-id"
"""
DOCUMENT_004 = """\
S3_BUCKET=your-telemetry-bucket
S3_PREFIX=telemetry/
AWS_REGION=us-east-1

# For local dev with explicit credentials
AWS_ACCESS_KEY_ID=your-access-key
AWS_SECRET_ACCESS_KEY=your-secret-key
"""
INFLUX = MappingProxyType(
    {
        "INFLUXDB_URL": "http://localhost:8086",
        "INFLUXDB_TOKEN": "token",
        "INFLUXDB_ORG": "org",
        "INFLUXDB_BUCKET": "bucket",
    }
)
DIGEST = "a" * 64


def loaded(environ: Mapping[str, str] | None = None, **variables: str) -> Settings:
    return load_settings({**(environ or {}), **variables}, None)


def from_file(tmp_path: Path, text: str, environ: Mapping[str, str] | None = None) -> Settings:
    dotenv = tmp_path / ".env"
    dotenv.write_text(dedent(text), encoding="utf-8")
    return load_settings(environ or {}, dotenv)


def faults(environ: Mapping[str, str] | None = None, **variables: str) -> tuple[str, ...]:
    with pytest.raises(BadSettings) as caught:
        loaded(environ, **variables)
    return caught.value.faults


def secret(value: SecretStr | None) -> str:
    assert value is not None
    return value.get_secret_value()


def every_value(node: object) -> Iterator[object]:
    if is_dataclass(node):
        for field in fields(node):
            yield from every_value(getattr(node, field.name))
    else:
        yield node


def test_with_nothing_set_everything_runs_on_this_machine() -> None:
    settings = loaded()
    assert (settings.service.host, settings.service.port) == ("127.0.0.1", 8080)
    assert settings.service.data_dir == Path("data")
    assert settings.service.log_file == Path("data/app.log")
    assert (settings.s3.bucket, settings.s3.prefix, settings.s3.region) == ("", "telemetry", "us-east-1")
    assert settings.influx.url == ""
    assert secret(settings.checkpoint.url) == ""
    assert settings.export.device_ids == ()
    assert settings.export.grace_seconds == 3600
    assert settings.service.version


def test_the_env_file_of_document_000_starts_the_product(tmp_path: Path) -> None:
    settings = from_file(tmp_path, DOCUMENT_000)
    assert settings.dynamo.table_name == "your_table_name"
    assert secret(settings.dynamo.access_key_id) == "your_aws_access_key_id"
    assert settings.drive.credentials_file == Path("path/to/your/credentials.json")
    assert settings.drive.folder_id == "your_google_drive_folder_id"
    assert settings.drive.csv_name_prefix == "locness_data"


def test_the_env_file_of_document_001_starts_the_product(tmp_path: Path) -> None:
    settings = from_file(tmp_path, DOCUMENT_001)
    assert settings.service.name == "data-export-service"
    assert settings.influx.url == "http://localhost:8086"
    assert secret(settings.influx.token) == "your-token"
    assert (settings.influx.org, settings.influx.bucket) == ("energy-platform", "telemetry")
    assert secret(settings.checkpoint.url) == "postgresql://postgres:secret@localhost:5432/energy_platform"
    assert (settings.s3.bucket, settings.s3.prefix) == ("energy-platform-datasets", "telemetry")
    assert secret(settings.s3.secret_access_key) == "your-secret"
    assert settings.export.batch_size == 1000
    assert settings.export.device_ids == ("D1",)


def check_document_002(settings: Settings) -> None:
    assert (settings.service.title, settings.service.version) == ("DWH Helper", "1.0.0")
    assert settings.service.description == "Product analytics data ingestion and DWH integration"
    assert secret(settings.dwh.database_url) == "sqlite:///./dwh.db"
    assert (settings.dwh.max_write_batch_bytes, settings.dwh.max_rows_per_insert) == (10_000_000, 1000)
    assert settings.appmetrica.base_url == "https://api.appmetrica.yandex.net"
    assert secret(settings.appmetrica.api_key) == "your-api-key"
    assert settings.appmetrica.application_id == 123456789
    assert settings.s3.bucket == "your-bucket-name"
    assert secret(settings.s3.access_key_id) == "your-access-key"
    assert secret(settings.amplitude.mobile_secret_key) == "your-mobile-secret-key"


def test_the_env_file_of_document_002_starts_the_product(tmp_path: Path) -> None:
    check_document_002(from_file(tmp_path, DOCUMENT_002))


def test_the_env_file_of_document_002_also_works_as_docker_hands_it_on_with_quotes_and_comments() -> None:
    lines = (line.partition("=") for line in DOCUMENT_002.splitlines())
    check_document_002(loaded({name: value for name, _, value in lines}))


def test_the_env_file_of_document_004_starts_the_product(tmp_path: Path) -> None:
    settings = from_file(tmp_path, DOCUMENT_004)
    assert (settings.s3.bucket, settings.s3.prefix) == ("your-telemetry-bucket", "telemetry")
    assert secret(settings.s3.access_key_id) == "your-access-key"


def test_the_variable_of_document_003_names_the_inbox_configuration() -> None:
    assert loaded(CSV_MONITOR_CONFIG="/path/to/my_config.json").inbox.config_file == Path("/path/to/my_config.json")


def test_all_env_files_together_start_the_product(tmp_path: Path) -> None:
    text = DOCUMENT_000 + DOCUMENT_001 + DOCUMENT_002 + DOCUMENT_004
    assert from_file(tmp_path, text).s3.bucket == "your-telemetry-bucket"


def test_the_environment_beats_the_env_file(tmp_path: Path) -> None:
    assert from_file(tmp_path, "PORT=1111\n", {"PORT": "2222"}).service.port == 2222


def test_an_env_file_that_is_not_there_is_none(tmp_path: Path) -> None:
    assert load_settings({}, tmp_path / ".env").service.port == 8080


def test_an_env_file_with_a_byte_order_mark_and_exports_is_read(tmp_path: Path) -> None:
    assert from_file(tmp_path, "\ufeffexport PORT='1111'\n").service.port == 1111


def test_a_dollar_in_the_env_file_is_a_dollar(tmp_path: Path) -> None:
    settings = from_file(tmp_path, 'INFLUXDB_PASSWORD="a${HOME}b"\nINFLUXDB_USERNAME=u\n')
    assert secret(settings.influx.password) == "a${HOME}b"


def test_a_broken_line_of_the_env_file_is_a_fault_with_its_number(tmp_path: Path) -> None:
    with pytest.raises(BadSettings) as caught:
        from_file(tmp_path, "PORT=1111\nthis is 'canary\n")
    assert "line 2" in caught.value.faults[0]
    assert "canary" not in str(caught.value)


def test_an_env_file_that_is_not_text_is_a_fault(tmp_path: Path) -> None:
    (tmp_path / ".env").write_bytes(b"\xff\xfe")
    with pytest.raises(BadSettings, match="UTF-8"):
        load_settings({}, tmp_path / ".env")


def test_empty_means_unset() -> None:
    settings = loaded(S3_BUCKET="", S3_BUCKET_NAME="second", PORT="", S3_PREFIX='""', DEVICE_IDS=" ")
    assert (settings.s3.bucket, settings.s3.prefix, settings.service.port) == ("second", "telemetry", 8080)


@pytest.mark.parametrize(
    ("first", "second", "field"),
    [
        ("S3_BUCKET", "S3_BUCKET_NAME", "s3.bucket"),
        ("S3_REGION", "AWS_REGION", "s3.region"),
    ],
)
def test_the_first_name_that_is_set_wins(first: str, second: str, field: str) -> None:
    assert describe(loaded({first: "one", second: "two"}))[field] == "one"
    assert describe(loaded({second: "two"}))[field] == "two"


def test_log_level_beats_logging_level_and_debug_beats_both() -> None:
    assert loaded(LOG_LEVEL="error", LOGGING_LEVEL="DEBUG").service.log_level == "ERROR"
    assert loaded(LOGGING_LEVEL="warn").service.log_level == "WARNING"
    assert loaded(LOG_LEVEL="ERROR", DEBUG="true").service.log_level == "DEBUG"


def test_the_s3_pair_of_keys_beats_the_aws_pair_and_its_session_token() -> None:
    aws = {"AWS_ACCESS_KEY_ID": "aws-id", "AWS_SECRET_ACCESS_KEY": "aws-key", "AWS_SESSION_TOKEN": "aws-token"}
    both = loaded(aws, S3_ACCESS_KEY_ID="s3-id", S3_SECRET_ACCESS_KEY="s3-key")
    assert (secret(both.s3.access_key_id), secret(both.s3.secret_access_key)) == ("s3-id", "s3-key")
    assert both.s3.session_token is None
    assert secret(both.dynamo.access_key_id) == "aws-id"
    assert secret(loaded(aws).s3.session_token) == "aws-token"


def test_keys_of_two_families_are_not_mixed() -> None:
    found = faults(S3_ACCESS_KEY_ID="s3-id", AWS_ACCESS_KEY_ID="aws-id", AWS_SECRET_ACCESS_KEY="aws-key")
    assert found == (
        "S3_SECRET_ACCESS_KEY='': needed because S3_ACCESS_KEY_ID is set; set it, or remove S3_ACCESS_KEY_ID",
    )


def test_every_fault_is_found_in_one_go() -> None:
    found = faults(
        PORT="0",
        EXPORT_FORMAT="xml",
        EXPORT_WINDOW_SECONDS="7000",
        INFLUXDB_URL="ftp://x",
        LOG_LEVEL="loud",
        DEBUG="maybe",
        DWH_MAX_ROWS_PER_INSERT="1e3",
    )
    names = [fault.partition("=")[0] for fault in found]
    assert {"PORT", "EXPORT_FORMAT", "EXPORT_WINDOW_SECONDS", "INFLUXDB_URL", "LOG_LEVEL", "DEBUG"} <= set(names)
    assert {"DWH_MAX_ROWS_PER_INSERT", "INFLUXDB_TOKEN", "INFLUXDB_ORG", "INFLUXDB_BUCKET"} <= set(names)


def test_a_fault_says_variable_value_and_what_is_allowed() -> None:
    assert faults(EXPORT_FORMAT="xml") == ("EXPORT_FORMAT='xml': allowed: one of parquet, csv",)
    assert faults(LOGGING_LEVEL="loud")[0].startswith("LOGGING_LEVEL='loud': allowed: one of DEBUG, INFO")


@pytest.mark.parametrize("seconds", ["59", "7000", "86401", "0", "-60", "x"])
def test_a_window_that_does_not_divide_a_day_is_refused(seconds: str) -> None:
    assert faults(EXPORT_WINDOW_SECONDS=seconds)[0].startswith(f"EXPORT_WINDOW_SECONDS='{seconds}'")


@pytest.mark.parametrize("seconds", ["60", "90", "3600", "86400"])
def test_a_window_that_divides_a_day_is_taken(seconds: str) -> None:
    assert loaded(EXPORT_WINDOW_SECONDS=seconds).export.window_seconds == int(seconds)


def test_grace_follows_the_lookback_unless_it_is_set_and_may_be_zero() -> None:
    assert loaded(LOOKBACK_HOURS="5").export.grace_seconds == 18_000
    assert loaded(LOOKBACK_HOURS="5", EXPORT_GRACE_SECONDS="0").export.grace_seconds == 0


@pytest.mark.parametrize("text", ["%Y/%m/%d", "%Y-%m-%d", "%Y%m%d", "y=%Y/doy=%j", "%d.%m.%Y"])
def test_a_date_format_that_names_each_day_is_taken(text: str) -> None:
    assert loaded(EXPORT_DATE_FORMAT=text).export.date_format == text


@pytest.mark.parametrize(
    "text",
    [
        "%Y-%m",
        "%m-%d",
        "%y/%m/%d",
        "%Y/%b/%d",
        "%Y//%m/%d",
        "%Y/../%m/%d",
        "/%Y/%m/%d",
        "%Y/%m/%d/",
        "%Y %m %d",
        "%Y%m%d%",
        "%Y/%m/%d/%H",
        "%%Y/%m/%d",
        "%Y\n%m%d",
        "2026",
    ],
)
def test_a_date_format_that_is_not_one_safe_name_for_each_day_is_refused(text: str) -> None:
    (fault,) = faults(EXPORT_DATE_FORMAT=text)
    assert fault.startswith(f"EXPORT_DATE_FORMAT={text!r}: allowed: %Y with")


@pytest.mark.parametrize(
    ("text", "at"),
    [
        ("2026-02-07", datetime(2026, 2, 7, tzinfo=UTC)),
        ("2026-02-07T01:02:03Z", datetime(2026, 2, 7, 1, 2, 3, tzinfo=UTC)),
        ("2026-02-07T01:00:00+02:00", datetime(2026, 2, 6, 23, tzinfo=UTC)),
        ("2026-02-07 01:00", datetime(2026, 2, 7, 1, tzinfo=UTC)),
    ],
)
def test_the_start_of_the_export_is_an_instant_in_utc(text: str, at: datetime) -> None:
    assert loaded(EXPORT_START=text).export.start == at


def test_a_start_that_is_no_instant_is_refused() -> None:
    assert faults(EXPORT_START="yesterday")[0].startswith("EXPORT_START='yesterday': allowed: an ISO 8601")


def test_a_star_anywhere_in_the_devices_means_discovery() -> None:
    assert loaded(DEVICE_IDS="*").export.device_ids == ()
    assert loaded(DEVICE_IDS="D1,*").export.device_ids == ()
    assert loaded(DEVICE_IDS=" D2, D1 ,,D2").export.device_ids == ("D2", "D1")


def test_a_device_that_can_never_be_a_key_does_not_stop_the_start() -> None:
    assert loaded(DEVICE_IDS="D1,../../x").export.device_ids == ("D1", "../../x")


@pytest.mark.parametrize("text", ["telemetry", "telemetry/", "/telemetry/"])
def test_a_prefix_is_the_same_with_and_without_slashes_around_it(text: str) -> None:
    assert loaded(S3_PREFIX=text).s3.prefix == "telemetry"


@pytest.mark.parametrize("text", ["a/../b", "a//b", "..", "/", "a/./b", "x" * 600])
def test_a_prefix_that_stores_would_rewrite_is_refused(text: str) -> None:
    assert faults(S3_PREFIX=text)[0].startswith("S3_PREFIX=")


def test_the_prefixes_that_confine_the_routes_end_with_a_slash() -> None:
    assert loaded(S3_ALLOWED_PREFIXES="uploads, shared/x/").s3.allowed_prefixes == ("uploads/", "shared/x/")


@pytest.mark.parametrize("text", ["s3://bucket", "a/b", "ab", "bucket/", "a..b", "-ab", "arn:aws:s3:::b", "x" * 64])
def test_a_bucket_that_is_not_a_bare_name_is_refused(text: str) -> None:
    assert "without s3://" in faults(S3_BUCKET=text)[0]


def test_the_global_endpoint_of_aws_means_aws() -> None:
    assert loaded(S3_ENDPOINT_URL="https://s3.amazonaws.com/").s3.endpoint_url == ""
    assert loaded(S3_ENDPOINT_URL="http://localhost:9000/").s3.endpoint_url == "http://localhost:9000"


@pytest.mark.parametrize(
    "text", ["localhost:8086", "ftp://h", "http://", "http://h:99999", "http://h:x", "http://a b", "http://[x"]
)
def test_a_url_that_is_not_http_is_refused(text: str) -> None:
    found = faults({**INFLUX, "INFLUXDB_URL": text})
    assert found == (f"INFLUXDB_URL={text!r}: allowed: http://host[:port] or https://host[:port]",)


def test_user_and_password_in_a_url_are_refused_and_not_shown() -> None:
    (fault,) = faults({**INFLUX, "INFLUXDB_URL": "http://canary-user:canary/p@ss@host:8086?token=canary"})
    assert "canary" not in fault
    (fault,) = faults({**INFLUX, "INFLUXDB_URL": "http://canary-user:canary@host:8086"})
    assert "canary" not in fault
    assert "do not belong into a URL" in fault


@pytest.mark.parametrize("port", ["0", "65536", "-1", "http", "80.5"])
def test_a_port_out_of_range_is_refused(port: str) -> None:
    assert faults(PORT=port) == (f"PORT='{port}': allowed: a whole number from 1 to 65535",)


def test_a_public_host_without_keys_is_refused_and_says_how_to_fix_it() -> None:
    (fault,) = faults(HOST="0.0.0.0")  # noqa: S104 - the very thing that must be refused
    assert fault.startswith("HOST='0.0.0.0': ")
    assert "python -m app keys new" in fault
    assert "ALLOW_ANONYMOUS=true" in fault


def test_a_public_host_starts_with_a_key_or_when_anonymous_access_was_said() -> None:
    assert loaded(HOST="::", API_KEYS=f"ci:admin:{DIGEST}").service.host == "::"
    assert loaded(HOST="example.org", ALLOW_ANONYMOUS="true").service.host == "example.org"


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "[::1]", "localhost", "LOCALHOST.", "127.9.9.9"])
def test_loopback_needs_no_keys(host: str) -> None:
    assert loopback(host)
    assert loopback(loaded(HOST=host.rstrip(".")).service.host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.org", "", "localhost.example.org"])  # noqa: S104 - not loopback
def test_whatever_others_can_reach_is_not_loopback(host: str) -> None:
    assert not loopback(host)


def test_a_broken_key_line_is_a_fault_that_does_not_quote_it() -> None:
    (fault,) = faults(HOST="0.0.0.0", API_KEYS=f"ok:read:{DIGEST},hw_canary")  # noqa: S104 - named with the keys
    assert fault.startswith("API_KEYS=***: entry 2: ")
    assert "canary" not in fault


@pytest.mark.parametrize(
    ("given", "missing"),
    [
        ({"INFLUXDB_URL": "http://h", "INFLUXDB_ORG": "o", "INFLUXDB_BUCKET": "b"}, "INFLUXDB_TOKEN"),
        ({"INFLUXDB_URL": "http://h", "INFLUXDB_TOKEN": "t", "INFLUXDB_BUCKET": "b"}, "INFLUXDB_ORG"),
        ({"INFLUXDB_URL": "http://h", "INFLUXDB_API": "influxql"}, "INFLUXDB_DATABASE"),
        ({"INFLUXDB_PASSWORD": "p"}, "INFLUXDB_USERNAME"),
        ({"S3_SECRET_ACCESS_KEY": "k"}, "S3_ACCESS_KEY_ID"),
        ({"AWS_ACCESS_KEY_ID": "k"}, "AWS_SECRET_ACCESS_KEY"),
        ({"CHECKPOINT_DB_HOST": "h"}, "CHECKPOINT_DB_NAME"),
        ({"CHECKPOINT_DB_NAME": "n"}, "CHECKPOINT_DB_HOST"),
        ({"CHECKPOINT_DB_HOST": "h", "CHECKPOINT_DB_NAME": "n", "CHECKPOINT_DB_PASSWORD": "p"}, "CHECKPOINT_DB_USER"),
        ({"GOOGLE_DRIVE_FOLDER_ID": "f"}, "GOOGLE_CREDENTIALS_FILE"),
        ({"APPMETRICA_API_KEY": "k"}, "APPMETRICA_APPLICATION_ID"),
        ({"AMPLITUDE_WEB_CLIENT_ID": "k"}, "AMPLITUDE_WEB_SECRET_KEY"),
        ({"AMPLITUDE_MOBILE_SECRET_KEY": "k"}, "AMPLITUDE_MOBILE_CLIENT_ID"),
    ],
)
def test_half_a_configuration_names_what_is_missing(given: Mapping[str, str], missing: str) -> None:
    (fault,) = faults(given)
    assert fault.startswith(f"{missing}='': needed because ")


def test_influxql_reads_the_bucket_where_no_database_is_named_and_needs_no_token() -> None:
    settings = loaded(INFLUXDB_URL="http://h", INFLUXDB_API="INFLUXQL", INFLUXDB_BUCKET="b")
    assert (settings.influx.api, settings.influx.database) == ("influxql", "b")


def test_the_checkpoint_variables_become_one_url_with_each_part_encoded() -> None:
    settings = loaded(
        CHECKPOINT_DB_HOST="::1",
        CHECKPOINT_DB_NAME="a/b",
        CHECKPOINT_DB_USER="me@x",
        CHECKPOINT_DB_PASSWORD="p:/@?# %",
        CHECKPOINT_DATABASE_URL="postgresql://other/x",
    )
    assert secret(settings.checkpoint.url) == "postgresql://me%40x:p%3A%2F%40%3F%23%20%25@[::1]:5432/a%2Fb"


@pytest.mark.parametrize(
    ("host", "url"),
    [("my_db", "postgresql://my_db:5432/n"), ("/run/postgresql", "postgresql://%2Frun%2Fpostgresql:5432/n")],
)
def test_a_container_name_and_a_socket_folder_are_hosts_of_a_database(host: str, url: str) -> None:
    assert secret(loaded(CHECKPOINT_DB_HOST=host, CHECKPOINT_DB_NAME="n").checkpoint.url) == url


@pytest.mark.parametrize("scheme", ["postgres", "postgresql", "postgresql+psycopg2"])
def test_the_spellings_of_a_postgresql_url_mean_the_same(scheme: str) -> None:
    settings = loaded(CHECKPOINT_DATABASE_URL=f"{scheme}://u:p@h/n", DWH_DATABASE_URL=f"{scheme}://u:p@h/n")
    assert secret(settings.checkpoint.url) == secret(settings.dwh.database_url) == "postgresql://u:p@h/n"


@pytest.mark.parametrize("text", ["mysql://h/n", "postgresql://h", "postgresql://u:can/ary@h/n", "canary", "sqlite://"])
def test_a_database_url_that_cannot_work_is_refused_unseen(text: str) -> None:
    found = faults(CHECKPOINT_DATABASE_URL=text, DWH_DATABASE_URL=text)
    assert [fault.partition(":")[0] for fault in found] == ["CHECKPOINT_DATABASE_URL=***", "DWH_DATABASE_URL=***"]
    assert not any("canary" in fault or "can/ary" in fault for fault in found)


def test_google_credentials_come_as_json_or_base64_and_the_file_beats_them() -> None:
    assert secret(loaded(GOOGLE_CREDENTIALS_JSON='{"type": "x"}').drive.credentials_json) == '{"type": "x"}'
    assert secret(loaded(GOOGLE_CREDENTIALS_JSON="eyJ0eXBlIjogIngifQ==").drive.credentials_json) == '{"type": "x"}'
    assert loaded(GOOGLE_CREDENTIALS_JSON="{}", GOOGLE_CREDENTIALS_FILE="/k").drive.credentials_json is None
    assert faults(GOOGLE_CREDENTIALS_JSON="[canary]")[0].startswith("GOOGLE_CREDENTIALS_JSON=***: allowed: ")


def test_a_heartbeat_that_may_not_be_lost_once_is_refused() -> None:
    assert faults(LEASE_HEARTBEAT_SECONDS="16")[0].startswith("LEASE_HEARTBEAT_SECONDS='16': allowed: at most half")


def test_a_log_file_can_be_chosen_or_switched_off() -> None:
    assert loaded(LOG_FILE="off").service.log_file is None
    assert loaded(LOG_FILE="/var/log/x.log").service.log_file == Path("/var/log/x.log")
    assert loaded(DATA_DIR="/srv/hw").service.log_file == Path("/srv/hw/app.log")


@pytest.mark.parametrize("text", ["a/b", "..", "a\tb", "x" * 300])
def test_a_file_prefix_that_is_no_part_of_a_name_is_refused(text: str) -> None:
    assert faults(CSV_NAME_PREFIX=text)[0].startswith("CSV_NAME_PREFIX=")


def test_origins_are_origins() -> None:
    assert loaded(CORS_ORIGINS="https://a.org, *").access.cors_origins == ("https://a.org", "*")
    assert faults(CORS_ORIGINS="https://a.org/path")[0].startswith("CORS_ORIGINS=")


@pytest.mark.parametrize("text", ["nan", "inf", "-1", "0"])
def test_a_time_that_is_no_time_is_refused(text: str) -> None:
    assert faults(LEASE_TTL_SECONDS=text)[0].startswith(f"LEASE_TTL_SECONDS='{text}'")


def test_unknown_variables_are_ignored() -> None:
    assert loaded(HEADWATER_NO_SUCH_THING="x", PATH="/bin").service.port == 8080


def test_bytes_that_are_no_text_are_a_fault_and_no_crash() -> None:
    assert "\\udcff" in faults(S3_PREFIX="a\udcffb")[0]


def test_each_field_of_each_group_has_exactly_one_variable() -> None:
    declared = [variable.goes_to for part in PARTS for variable in part.variables]
    assert len(declared) == len(set(declared))
    settings = loaded()
    names = [
        f"{group.name}.{field.name}" for group in fields(settings) for field in fields(getattr(settings, group.name))
    ]
    composed = {f"checkpoint.{part}" for part in ("host", "port", "database", "user", "password")}
    assert set(declared) == {*names, *composed}


def canaries() -> dict[str, str]:
    key_file = '{"private_key": "-----BEGIN\\ncanary-private-key-line\\n", "client_secret": "canary-client-secret"}'
    special = {
        "API_KEYS": f"ci:admin:{'cafe' * 16}",
        "GOOGLE_CREDENTIALS_JSON": key_file,
        "CHECKPOINT_DATABASE_URL": "postgresql://u:canary%2Fdb@h/n",
        "DWH_DATABASE_URL": "postgresql://u:canary%2Fdwh@h/n",
        "ALERT_WEBHOOK_URL": "https://hooks.example/canary?token=canary",
        "HEARTBEAT_URLS": "csv_inbox=https://beats.example/canary,influx_to_s3=https://beats.example/canary-2",
    }
    names = [variable.names[0] for part in PARTS for variable in part.variables if variable.kind.secret]
    return {name: special.get(name, f"canary-{name.lower()}") for name in names}


def complete() -> dict[str, str]:
    """Every secret set, and what the rules then ask for."""
    names = {"CHECKPOINT_DB_USER": "u", "CHECKPOINT_DB_NAME": "n", "CHECKPOINT_DB_HOST": "h"}
    return {**canaries(), **names, "INFLUXDB_USERNAME": "u", "APPMETRICA_APPLICATION_ID": "7"}


def test_no_secret_is_seen_in_settings_their_groups_or_their_description() -> None:
    settings = loaded(complete())
    texts = [repr(settings), str(settings), repr(describe(settings)), repr(list(every_value(settings)))]
    texts += [f"{getattr(settings, group.name)}" for group in fields(settings)]
    assert not any("canary" in text or "cafe" in text.lower() for text in texts)
    assert describe(settings)["s3.secret_access_key"] == "***"
    assert describe(settings)["access.api_keys"] == "ci"


def test_no_secret_is_seen_in_faults_or_in_the_error_itself() -> None:
    broken = {name: f"{text}\x07" for name, text in complete().items()} | {"PORT": "x"}
    with pytest.raises(BadSettings) as caught:
        loaded(broken)
    error = caught.value
    assert len(error.faults) >= len(canaries())
    assert "canary" not in f"{error!r} {error} {error.faults} {error.__cause__!r} {error.__context__!r}"


def test_the_secrets_for_the_log_filter_are_all_of_them_with_the_parts_that_travel_alone() -> None:
    found = secrets_of(loaded(complete()))
    assert {"canary-influxdb_token", "canary-s3_secret_access_key", "canary-checkpoint_db_password"} <= set(found)
    assert {"canary/dwh", "canary%2Fdwh", "canary-private-key-line", "canary-client-secret"} <= set(found)
    assert list(found) == sorted(found, key=len, reverse=True)


def test_off_railway_there_is_nothing_to_warn_of() -> None:
    assert warnings(loaded(), {}) == []


def test_on_railway_a_data_folder_off_the_volume_and_a_missing_draining_time_are_warned_of() -> None:
    settings = loaded(HOST="0.0.0.0", API_KEYS=f"ci:admin:{DIGEST}", DATA_DIR="/tmp/x")  # noqa: S104, S108 - as on Railway
    railway = {"RAILWAY_ENVIRONMENT_NAME": "production", "RAILWAY_VOLUME_MOUNT_PATH": "/data"}
    folder, draining = warnings(settings, railway)
    assert "DATA_DIR=/tmp/x" in folder
    assert "/data" in folder
    assert "RAILWAY_DEPLOYMENT_DRAINING_SECONDS=unset" in draining
    good = replace(settings, service=replace(settings.service, data_dir=Path("/data/hw")))
    assert warnings(good, {**railway, "RAILWAY_DEPLOYMENT_DRAINING_SECONDS": "30"}) == []
    assert len(warnings(good, {**railway, "RAILWAY_DEPLOYMENT_DRAINING_SECONDS": "10"})) == 1


def test_on_railway_a_loopback_host_is_warned_of() -> None:
    assert any("HOST=127.0.0.1" in line for line in warnings(loaded(), {"RAILWAY_ENVIRONMENT_NAME": "production"}))


def test_anonymous_access_to_a_public_host_is_warned_of() -> None:
    settings = loaded(HOST="0.0.0.0", ALLOW_ANONYMOUS="true")  # noqa: S104 - the very thing that is warned of
    assert warnings(settings, {})[0].startswith("ALLOW_ANONYMOUS=true")
