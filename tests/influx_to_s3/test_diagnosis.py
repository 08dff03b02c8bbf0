"""A token, bucket or organisation that is wrong: `check` says what the token has and what was probably meant."""

import subprocess
import sys

import pytest

from app.config.environment import load_settings
from app.core.errors import Permanent
from app.influx_to_s3.diagnosis import check_access
from influx_readers import flux
from simulators.influx import InfluxSimulator

LOADED_BY_THE_DAEMON = """
import sys
import app.main, app.cli, app.influx_to_s3.job, app.influx_to_s3.flux, app.influx_to_s3.influxql
print([name for name in ("influxdb_client", "reactivex") if name in sys.modules])
"""


def told(influx: InfluxSimulator, **wrong: str) -> Permanent:
    """What `check` says of settings of which some are wrong."""
    given = {"bucket": influx.bucket, "org": influx.org, "token": influx.token, **wrong}
    environ = {f"INFLUXDB_{name.upper()}": text for name, text in {**given, "url": influx.url}.items()}
    settings = load_settings(environ, None)
    with pytest.raises(Permanent) as caught:
        check_access(flux(influx, **given).ping, settings.influx)
    return caught.value


@pytest.mark.parametrize(
    ("wrong", "hint"),
    [
        ({"bucket": "telemtry"}, "set INFLUXDB_BUCKET=telemetry"),
        ({"bucket": "something_else"}, "set INFLUXDB_BUCKET=telemetry"),  # the only one that the token may read
        ({"org": "dmeo"}, "set INFLUXDB_ORG=demo"),
        ({"org": "acme", "bucket": "Telemetry"}, "set INFLUXDB_ORG=demo, INFLUXDB_BUCKET=telemetry"),
    ],
    ids=["a slip", "another bucket", "the organisation", "both"],
)
def test_a_refusal_names_what_the_token_has_and_what_was_probably_meant(
    influx: InfluxSimulator, wrong: dict[str, str], hint: str
) -> None:
    error = told(influx, **wrong)
    assert "not found" in error.message or "could not find" in error.message
    assert "organisations demo; buckets telemetry (of demo); rights read buckets telemetry" in error.message
    assert error.hint == hint


def test_a_token_that_may_not_look_at_tokens_is_told_without_its_rights(influx: InfluxSimulator) -> None:
    influx.shows_rights = False
    assert told(influx, bucket="telemtry").message.endswith("buckets telemetry (of demo)")


def test_a_token_that_the_server_does_not_know_has_nothing_to_name(influx: InfluxSimulator) -> None:
    error = told(influx, token="wrong")
    assert "answers 401" in error.message
    assert "This token has" not in error.message


def test_the_daemon_does_not_load_the_client() -> None:
    done = subprocess.run([sys.executable, "-c", LOADED_BY_THE_DAEMON], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
