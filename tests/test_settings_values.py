"""What each variable may hold: what is taken, what is refused, and that a fault says what is allowed."""

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

import pytest

from given_settings import INFLUX, faults, loaded


@pytest.mark.parametrize("text", ["GLACIER", "deep_archive", "COLD", "REDUCED_REDUNDANCY"])
def test_a_storage_class_whose_objects_cannot_be_read_at_once_is_refused(text: str) -> None:
    assert loaded(S3_STORAGE_CLASS="standard_ia").s3.storage_class == "STANDARD_IA"
    fault = faults(S3_STORAGE_CLASS=text)[0]
    assert fault.startswith("S3_STORAGE_CLASS=")
    assert "GLACIER_IR" in fault


def test_a_kms_key_needs_encryption_by_kms() -> None:
    kms = loaded(S3_SSE="AWS:KMS", S3_SSE_KMS_KEY_ID="key-1").s3
    assert (kms.sse, kms.sse_kms_key_id, loaded(S3_SSE="AES256").s3.sse) == ("aws:kms", "key-1", "aes256")
    for fault in (faults(S3_SSE_KMS_KEY_ID="key-1")[0], faults(S3_SSE_KMS_KEY_ID="key-1", S3_SSE="AES256")[0]):
        assert "S3_SSE_KMS_KEY_ID needs aws:kms" in fault
    assert faults(S3_SSE="none")[0].startswith("S3_SSE=")


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


@pytest.mark.parametrize("text", ["http://h?q=canary", "http://h#canary", "http://h/p?canary#canary"])
def test_a_query_or_a_fragment_of_a_base_url_is_refused(text: str) -> None:
    (fault,) = faults({**INFLUX, "INFLUXDB_URL": text})
    assert "end the URL before ? or #" in fault


def test_the_lowest_port_of_a_url_is_1() -> None:
    assert loaded({**INFLUX, "INFLUXDB_URL": "http://h:1"}).influx.url == "http://h:1"
    assert faults({**INFLUX, "INFLUXDB_URL": "http://h:0"})
    assert loaded(CHECKPOINT_DATABASE_URL="postgresql://h:1/n").checkpoint.url.get_secret_value().endswith(":1/n")


@pytest.mark.parametrize("port", ["0", "65536", "-1", "http", "80.5"])
def test_a_port_out_of_range_is_refused(port: str) -> None:
    assert faults(PORT=port) == (f"PORT='{port}': allowed: a whole number from 1 to 65535",)


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


@pytest.mark.parametrize("text", ["Mars/Phobos", "Europe", "x" * 300, "../../etc/passwd", "a\0b"])
def test_a_time_zone_that_does_not_exist_is_refused(text: str) -> None:
    (fault,) = faults(APPMETRICA_TIMEZONE=text)
    assert fault.startswith("APPMETRICA_TIMEZONE=")


def test_seconds_of_a_job_that_are_no_number_are_refused_in_words() -> None:
    assert faults(ALERT_GRACE_BY_JOB="csv_inbox=x") == (
        "ALERT_GRACE_BY_JOB='csv_inbox=x': allowed: job=seconds, comma-separated",
    )


def test_bytes_that_are_no_text_are_a_fault_and_no_crash() -> None:
    assert "\\udcff" in faults(S3_PREFIX="a\udcffb")[0]
