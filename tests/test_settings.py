"""Where settings come from: the env files of the documents, the environment, and which of several names wins."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from app.config import settings as settings_module
from app.config.environment import describe, load_settings
from app.config.rules import VARIABLES, warnings
from app.config.settings import Settings
from app.core.errors import BadSettings
from given_settings import faults, from_file, loaded, secret
from shell import Shell

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


def test_unknown_variables_are_ignored() -> None:
    assert loaded(HEADWATER_NO_SUCH_THING="x", PATH="/bin").service.port == 8080


def test_each_field_of_each_group_has_exactly_one_variable() -> None:
    declared = [variable.goes_to for variable in VARIABLES]
    assert len(declared) == len(set(declared))
    names = [f"{group}.{field}" for group, held in loaded() for field, _ in held]
    composed = {f"checkpoint.{part}" for part in ("host", "port", "database", "user", "password")}
    assert set(declared) == {*names, *composed}


def test_the_first_name_wins_wherever_each_of_them_is_set(tmp_path: Path) -> None:
    assert from_file(tmp_path, "S3_BUCKET=first\n", {"S3_BUCKET_NAME": "second"}).s3.bucket == "first"
    assert from_file(tmp_path, "S3_BUCKET_NAME=second\n", {"S3_BUCKET": "first"}).s3.bucket == "first"
    assert from_file(tmp_path, "S3_BUCKET_NAME=second\n", {"S3_BUCKET": ""}).s3.bucket == "second"


def test_tags_to_ignore_can_be_none_which_is_not_the_default(tmp_path: Path) -> None:
    assert loaded().influx.ignored_tags == ("schema_version", "enrichment_status")
    assert loaded(INFLUXDB_IGNORED_TAGS="").influx.ignored_tags == ()
    assert from_file(tmp_path, "INFLUXDB_IGNORED_TAGS=\n").influx.ignored_tags == ()
    assert from_file(tmp_path, "INFLUXDB_IGNORED_TAGS=a\n", {"INFLUXDB_IGNORED_TAGS": ""}).influx.ignored_tags == ()


def test_the_rules_between_variables_are_applied_beside_values_that_cannot_be_read() -> None:
    found = faults(PORT="x", LEASE_TTL_SECONDS="10", EXPORT_FORMAT="xml")
    assert [fault.partition("=")[0] for fault in found] == ["PORT", "EXPORT_FORMAT", "LEASE_HEARTBEAT_SECONDS"]


def test_no_rule_compares_a_value_that_could_not_be_read() -> None:
    assert len(faults(PORT="x", HEALTH_PORT="8080")) == 1
    assert len(faults(LEASE_TTL_SECONDS="1", LEASE_HEARTBEAT_SECONDS="x")) == 1
    assert len(faults(LOOKBACK_HOURS="x", LOG_LEVEL="x", LOGGING_LEVEL="y")) == 2


def test_the_settings_of_document_002_are_read_on_first_use_and_print_no_secret(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("S3_ACCESS_KEY_ID=canary-1\nS3_SECRET_ACCESS_KEY=canary-2\nDEBUG=true\n")
    program = "import app.config.settings as m; print('settings' in vars(m)); from app.config.settings import settings"
    done = subprocess.run(
        [sys.executable, "-c", f"{program}; print(settings); print(settings.service.debug, settings is m.settings)"],
        env={"PATH": os.environ["PATH"], "SERVICE_NAME": "from-environ"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    first, printed, used = done.stdout.splitlines()
    assert (first, used) == ("False", "True True")
    assert "name='from-environ'" in printed
    assert "access_key_id=SecretStr('**********')" in printed
    assert "canary" not in done.stdout + done.stderr


def test_the_module_has_no_other_names() -> None:
    misspelt = "setings"
    with pytest.raises(AttributeError, match=f"no attribute '{misspelt}'"):
        getattr(settings_module, misspelt)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("INFLUX_URL", "INFLUXDB_URL"),
        ("S3_BUKET", "S3_BUCKET"),
        ("DYNAMODB_TABLE", "DYNAMODB_TABLE_NAME"),
        ("EXPORT_INTERVAL", "EXPORT_INTERVAL_SECONDS"),
        ("INFLUXDB_USER", "INFLUXDB_USERNAME"),
        ("LOGLEVEL", "LOG_LEVEL"),
        ("API_KEY", "API_KEYS"),
        ("s3_bucket", "S3_BUCKET"),
        ("Port", "PORT"),
    ],
)
def test_a_name_that_is_nearly_right_is_warned_of_with_the_right_one(name: str, meant: str) -> None:
    line = f"{name} is not a variable of Headwater and is ignored: did you mean {meant}?"
    assert warnings(loaded({name: "canary"}), {name: "canary"}) == [line]
    assert warnings(loaded(), {}, {name: "canary"}) == [line]


@pytest.mark.parametrize(
    "environ",
    [
        {"PATH": "/bin", "HOME": "/root", "HOSTNAME": "c0ffee", "LANG": "C.UTF-8", "PYTHON_VERSION": "3.11.7"},
        {"AWS_ENDPOINT_URL": "http://h", "AWS_DEFAULT_REGION": "eu-west-1", "AWS_PROFILE": "x", "PGHOST": "db"},
        {"DATABASE_URL": "postgresql://h/n", "OTEL_SERVICE_NAME": "x", "XDG_DATA_DIRS": "/usr/share"},
        {"INFLUXDB_SERVICE_HOST": "10.0.0.1", "INFLUXDB_SERVICE_PORT": "8086", "INFLUXDB_PORT": "tcp://10.0.0.1:8086"},
        {"INFLUXDB_PORT_8086_TCP": "tcp://10.0.0.1:8086", "INFLUXDB_PORT_8086_TCP_ADDR": "10.0.0.1"},
    ],
)
def test_what_other_programs_and_platforms_set_is_not_warned_of(environ: dict[str, str]) -> None:
    assert warnings(loaded(environ), environ) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "text", [DOCUMENT_000, DOCUMENT_001, DOCUMENT_002, DOCUMENT_004], ids=["000", "001", "002", "004"]
)
def test_check_explains_every_system_of_the_env_file_of_a_document(shell: Shell, text: str) -> None:
    (shell.folder / ".env").write_text(text)
    # No proxy listens there, so nothing outside this machine is asked.
    done = shell.run("", "check", "--json", HTTPS_PROXY="http://127.0.0.1:9")
    document = json.loads(done.stdout)
    assert (done.returncode, document["env_file"]) == (1, str(shell.folder / ".env"))
    assert all(each["hint"] for each in document["live"] if not each["ok"])
    assert {each["variable"] for each in document["live"]} >= {
        name for name in ("DYNAMODB_TABLE_NAME", "INFLUXDB_URL", "APPMETRICA_APPLICATION_ID") if f"{name}=" in text
    }
    assert (document["wiring"]["warnings"], document["wiring"]["unread"]) == ([], [])
