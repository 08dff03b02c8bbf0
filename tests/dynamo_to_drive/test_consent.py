"""`python -m app google`: the sign-in of an installed app, with a real redirect to the process that waits for it."""

import json
import os
import re
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from urllib.parse import parse_qs, urlencode, urlsplit

import pytest

from daemon import KEPT
from shipping import START, shipping
from simulators.drive import DriveSimulator

HOUR_12 = "locness_data_20260207_12.csv"


@contextmanager
def asking(drive: DriveSimulator, folder: Path) -> Iterator[tuple["subprocess.Popen[str]", str]]:
    """The command while it waits for a user, and the address that it prints for them."""
    secrets = folder / "client.json"
    secrets.write_text(json.dumps(drive.state.tokens.installed(drive.url)))
    base = {name: os.environ[name] for name in KEPT if name in os.environ}
    # The simulator has no certificate, which OAuth asks for.
    environ = {"OAUTHLIB_INSECURE_TRANSPORT": "1", "LOG_FILE": "off", "GOOGLE_CREDENTIALS_FILE": str(secrets)}
    with subprocess.Popen(
        [sys.executable, "-m", "app", "google", "--no-browser", "--json"],
        env={**base, **environ, "DATA_DIR": str(folder)},
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stderr is not None
            lines = (re.search(r"http://\S+/auth\S+", line) for line in process.stderr)
            yield process, next(found.group() for found in lines if found)
        finally:
            process.kill()


@pytest.mark.slow
def test_a_consent_is_kept_for_its_owner_only_and_opens_drive(tmp_path: Path) -> None:
    with shipping(tmp_path) as ship:
        ship.token = ship.drive.state.tokens.installed(ship.drive.url)
        with asking(ship.drive, tmp_path) as (process, address):
            with urllib.request.urlopen(address, timeout=20) as answer:  # noqa: S310 - loopback
                assert b"completed" in answer.read()
            said, told = process.communicate(timeout=30)
            assert process.returncode == 0, told
        kept = tmp_path / "google_token.json"
        assert json.loads(said) == {"token_file": str(kept)}, "the address is no part of the document"
        assert kept.stat().st_mode & 0o777 == 0o600
        assert not any(
            secret in said + told
            for secret in (ship.drive.state.tokens.client["client_secret"], "ya29.", "1//", "?code=")
        )
        ship.put_rows(START, 5)
        ship.now = START + timedelta(minutes=5)
        ship.run()
        assert len(ship.text(HOUR_12).splitlines()) == 6


@pytest.mark.parametrize(
    "said",
    [
        {"error": "access_denied"},
        pytest.param({"code": "made up"}, marks=pytest.mark.slow),
        pytest.param({"code": "x", "state": "of another"}, marks=pytest.mark.slow),
    ],
)
def test_a_consent_that_is_not_given_is_one_line_with_the_next_step_and_keeps_nothing(
    tmp_path: Path, said: dict[str, str]
) -> None:
    with DriveSimulator() as drive, asking(drive, tmp_path) as (process, address):
        asked = {name: values[0] for name, values in parse_qs(urlsplit(address).query).items()}
        back = f"{asked['redirect_uri']}?{urlencode({'state': asked['state'], **said})}"
        urllib.request.urlopen(back, timeout=20).close()  # noqa: S310 - loopback
        printed, told = process.communicate(timeout=30)
    assert process.returncode == 1
    assert json.loads(printed)["error"]["hint"] in told
    assert "Traceback" not in told
    assert "python -m app google" in told
    assert not (tmp_path / "google_token.json").exists()
