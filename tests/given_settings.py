"""Settings from the variables that a test gives, and the faults that are found in them."""

from collections.abc import Mapping
from pathlib import Path
from textwrap import dedent
from types import MappingProxyType

import pytest
from pydantic import SecretStr

from app.config.environment import load_settings
from app.config.settings import Settings
from app.core.errors import BadSettings

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
