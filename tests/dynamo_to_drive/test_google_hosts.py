"""Which hosts the Google client asks: those that the settings and the credentials name, and no other."""

import json
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from app.config.environment import load_settings
from app.dynamo_to_drive.credentials import credentials
from simulators.google_oauth import Tokens

HOST = "http://127.0.0.1:9"


@dataclass
class Answered:
    """A response as google-auth takes it from its transport."""

    data: bytes
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Transport:
    """Signs everybody in, and remembers what was asked, by whatever thread."""

    urls: list[str] = field(default_factory=list)

    def __call__(self, url: str, **asked: Any) -> Answered:
        self.urls.append(url)
        return Answered(json.dumps({"access_token": f"t{len(self.urls)}", "expires_in": 3599}).encode())

    def __deepcopy__(self, memo: Any) -> "Transport":
        return self


@pytest.mark.parametrize("kind", ["service_account", "user"])
def test_a_sign_in_asks_the_token_endpoint_of_the_credentials_once_and_nothing_else(tmp_path: Path, kind: str) -> None:
    document = getattr(Tokens(), kind)(HOST)
    transport, before = Transport(), set(threading.enumerate())
    settings = load_settings({"GOOGLE_CREDENTIALS_JSON": json.dumps(document)}, None)
    found = credentials(settings.drive, tmp_path / "token.json")
    headers: dict[str, str] = {}
    for _ in range(2):
        found.before_request(transport, "GET", f"{HOST}/drive/v3/files", headers)
    for thread in set(threading.enumerate()) - before:
        thread.join(10)
    assert transport.urls == [f"{HOST}/token"]
    assert headers["authorization"] == "Bearer t1"
