"""Settings that guard something: keys, passwords, who may reach the service, and that no secret is ever shown."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel

from app.config import NEW_KEY
from app.config.environment import describe, secrets_of
from app.config.rules import VARIABLES, locked, loopback, network_file_system, warnings
from app.core.errors import BadSettings
from given_settings import DIGEST, INFLUX, faults, loaded, secret


def every_value(node: object) -> Iterator[object]:
    if isinstance(node, BaseModel):
        for _, value in node:
            yield from every_value(value)
    else:
        yield node


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


def test_user_and_password_in_a_url_are_refused_and_not_shown() -> None:
    (fault,) = faults({**INFLUX, "INFLUXDB_URL": "http://canary-user:canary/p@ss@host:8086?token=canary"})
    assert "canary" not in fault
    for login in ("canary-user:canary", "canary-user", ":canary"):
        (fault,) = faults({**INFLUX, "INFLUXDB_URL": f"http://{login}@host:8086"})
        assert "canary" not in fault
        assert "must not contain a user or password" in fault


@pytest.mark.parametrize(
    ("variables", "own_server", "is_locked"),
    [
        ({}, True, False),
        ({"HOST": "localhost"}, True, False),
        ({"HOST": "0.0.0.0"}, True, True),  # noqa: S104 - what is locked
        ({"HOST": "example.org", "ALLOW_ANONYMOUS": "true"}, True, False),
        ({"HOST": "::", "API_KEYS": f"ci:admin:{DIGEST}"}, True, False),
        ({}, False, True),
        ({"ALLOW_ANONYMOUS": "true"}, False, False),
        ({"API_KEYS": f"ci:admin:{DIGEST}"}, False, False),
    ],
)
def test_what_others_may_reach_is_locked_without_keys_and_the_warning_says_how_to_unlock_it(
    variables: dict[str, str],
    own_server: bool,  # noqa: FBT001
    is_locked: bool,  # noqa: FBT001
) -> None:
    settings = loaded(variables)
    assert locked(settings, own_server=own_server) == is_locked
    told = [line for line in warnings(settings, {}, own_server=own_server) if "is locked: " in line]
    assert len(told) == is_locked
    assert all(NEW_KEY in line and "ALLOW_ANONYMOUS=true" in line for line in told)


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


def test_a_password_that_is_not_utf_8_is_sent_as_the_bytes_that_were_set() -> None:
    parts = {"CHECKPOINT_DB_HOST": "h", "CHECKPOINT_DB_NAME": "n", "CHECKPOINT_DB_USER": "u"}
    settings = loaded(parts, CHECKPOINT_DB_PASSWORD="a\udcffb")
    assert secret(settings.checkpoint.url) == "postgresql://u:a%FFb@h:5432/n"
    assert faults(parts, CHECKPOINT_DB_PASSWORD="a\udcffb", CHECKPOINT_DATABASE_URL="x", PORT="x")


@pytest.mark.parametrize("scheme", ["postgres", "postgresql", "postgresql+psycopg2"])
def test_the_spellings_of_a_postgresql_url_mean_the_same(scheme: str) -> None:
    settings = loaded(CHECKPOINT_DATABASE_URL=f"{scheme}://u:p@h/n", DWH_DATABASE_URL=f"{scheme}://u:p@h/n")
    assert secret(settings.checkpoint.url) == secret(settings.dwh.database_url) == "postgresql://u:p@h/n"


@pytest.mark.parametrize(
    "text",
    [
        "mysql://h/n",
        "postgresql://h",
        "postgresql://h/",
        "postgresql://h:0/n",
        "postgresql://u:can/ary@h/n",
        "canary",
        "sqlite://",
    ],
)
def test_a_database_url_that_cannot_work_is_refused_unseen(text: str) -> None:
    found = faults(CHECKPOINT_DATABASE_URL=text, DWH_DATABASE_URL=text)
    assert [fault.partition(":")[0] for fault in found] == ["CHECKPOINT_DATABASE_URL=***", "DWH_DATABASE_URL=***"]
    assert not any("canary" in fault or "can/ary" in fault for fault in found)


def test_google_credentials_come_as_json_or_base64_and_the_file_beats_them() -> None:
    assert secret(loaded(GOOGLE_CREDENTIALS_JSON='{"type": "x"}').drive.credentials_json) == '{"type": "x"}'
    assert secret(loaded(GOOGLE_CREDENTIALS_JSON="eyJ0eXBlIjogIngifQ==").drive.credentials_json) == '{"type": "x"}'
    assert loaded(GOOGLE_CREDENTIALS_JSON="{}", GOOGLE_CREDENTIALS_FILE="/k").drive.credentials_json is None
    for text in ("[canary]", "{canary", "WzFd", "e2NhbmFyeQ=="):  # the last two say [1] and {canary
        assert faults(GOOGLE_CREDENTIALS_JSON=text)[0].startswith("GOOGLE_CREDENTIALS_JSON=***: allowed: ")


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
    names = [variable.names[0] for variable in VARIABLES if variable.allowed.secret]
    return {name: special.get(name, f"canary-{name.lower()}") for name in names}


def complete() -> dict[str, str]:
    """Every secret set, and what the rules then ask for."""
    names = {"CHECKPOINT_DB_USER": "u", "CHECKPOINT_DB_NAME": "n", "CHECKPOINT_DB_HOST": "h"}
    return {**canaries(), **names, "INFLUXDB_USERNAME": "u", "APPMETRICA_APPLICATION_ID": "7"}


def test_no_secret_is_seen_in_settings_their_groups_or_their_description() -> None:
    settings = loaded(complete())
    texts = [repr(settings), str(settings), repr(describe(settings)), repr(list(every_value(settings)))]
    texts += [f"{group}" for _, group in settings]
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


def test_of_a_key_file_only_what_may_be_part_of_a_key_is_hidden_in_logs() -> None:
    text = '{"type": "service_account", "auth_uri": "https://accounts.example/o/oauth2", "k": "a-long-line-of-the-key"}'
    assert set(secrets_of(loaded(GOOGLE_CREDENTIALS_JSON=text))) == {text, "a-long-line-of-the-key"}


@pytest.mark.parametrize("text", ["{not json", "{" * 100_000, "{}", '{"a": [1, null]}'])
def test_a_password_may_begin_like_a_key_file(text: str) -> None:
    assert secrets_of(loaded(INFLUXDB_USERNAME="u", INFLUXDB_PASSWORD=text)) == (text,)


def test_off_railway_there_is_nothing_to_warn_of() -> None:
    assert warnings(loaded(), {}) == []


def test_on_railway_a_data_folder_off_the_volume_and_a_missing_draining_time_are_warned_of() -> None:
    settings = loaded(HOST="0.0.0.0", API_KEYS=f"ci:admin:{DIGEST}", DATA_DIR="/tmp/x")  # noqa: S104, S108 - as on Railway
    railway = {"RAILWAY_ENVIRONMENT_NAME": "production", "RAILWAY_VOLUME_MOUNT_PATH": "/data"}
    folder, draining = warnings(settings, railway)
    assert "DATA_DIR=/tmp/x" in folder
    assert "/data" in folder
    assert "RAILWAY_DEPLOYMENT_DRAINING_SECONDS=unset" in draining
    service = settings.service.model_copy(update={"data_dir": Path("/data/hw")})
    good = settings.model_copy(update={"service": service})
    assert warnings(good, {**railway, "RAILWAY_DEPLOYMENT_DRAINING_SECONDS": "30"}) == []
    for seconds in ("10", "25", "soon"):
        assert len(warnings(good, {**railway, "RAILWAY_DEPLOYMENT_DRAINING_SECONDS": seconds})) == 1
    assert warnings(good, {**railway, "RAILWAY_DEPLOYMENT_DRAINING_SECONDS": "26"}) == []


def test_on_railway_a_loopback_host_is_warned_of() -> None:
    assert any("HOST=127.0.0.1" in line for line in warnings(loaded(), {"RAILWAY_ENVIRONMENT_NAME": "production"}))


def test_anonymous_access_to_a_public_host_is_warned_of() -> None:
    settings = loaded(HOST="0.0.0.0", ALLOW_ANONYMOUS="true")  # noqa: S104 - the very thing that is warned of
    assert warnings(settings, {})[0].startswith("ALLOW_ANONYMOUS=true")
    with_keys = loaded(HOST="0.0.0.0", ALLOW_ANONYMOUS="true", API_KEYS=f"ci:admin:{DIGEST}")  # noqa: S104 - keys rule
    assert warnings(with_keys, {}) == []
    assert warnings(loaded(ALLOW_ANONYMOUS="true"), {}) == []
    assert "reaches this server" in warnings(loaded(ALLOW_ANONYMOUS="true"), {}, own_server=False)[0]


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/srv/data/x", "nfs4"),
        ("/srv/my disk", "cifs"),
        ("/srv/local/x", ""),
        ("/home/me", ""),
        ("/mnt/h", "fuse.sshfs"),
    ],
)
def test_a_network_file_system_is_told_by_the_nearest_mount(path: str, kind: str) -> None:
    mounts = (
        "overlay / overlay rw 0 0\nh:/d /srv nfs4 rw 0 0\n/dev/sda1 /srv/local ext4 rw 0 0\n"
        "//h/d /srv/my\\040disk cifs rw 0 0\nme@h:/ /mnt/h fuse.sshfs rw 0 0\n"
    )
    assert network_file_system(Path(path), mounts) == kind


@pytest.mark.parametrize(("hours", "days", "number"), [("168", "7", 1), ("167", "7", 0), ("240", "0", 0)])
def test_a_reconcile_that_has_nothing_to_compare_is_warned_of(hours: str, days: str, number: int) -> None:
    source = {"INFLUXDB_URL": "http://influx:8086", "INFLUXDB_API": "influxql", "INFLUXDB_DATABASE": "telemetry"}
    told = warnings(loaded(source, LOOKBACK_HOURS=hours, RECONCILE_DAYS=days), {})
    assert len([line for line in told if line.startswith("RECONCILE_DAYS")]) == number


def test_each_heartbeat_url_is_a_secret_of_its_own() -> None:
    urls = ["https://hc.example.org/one", "https://hc.example.org/two?x=1"]
    found = secrets_of(loaded(HEARTBEAT_URLS=f"influx_to_s3={urls[0]},csv_inbox={urls[1]}"))
    assert set(urls) < set(found)


def test_pairs_are_shown_as_they_are_written() -> None:
    shown = describe(loaded(ALERT_GRACE_BY_JOB="influx_to_s3=300", EXPORT_COLUMN_TYPES="count=float,state=text"))
    assert shown["alert.grace_by_job"] == "influx_to_s3=300"
    assert shown["export.column_types"] == "count=double,state=text"
