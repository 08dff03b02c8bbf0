"""`setup` asks, tries, and writes `.env`, which keeps what it holds."""

import subprocess
import sys

import pytest

from app.cli import SETUPS
from app.config.environment import load_settings, read_dotenv
from app.ops.setup import PIPELINES, merged, quoted
from shell import Shell
from simulators.influx import InfluxSimulator

pytestmark = pytest.mark.slow


def answered(shell: Shell, *words: str, answers: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "app", "setup", *words],
        env=shell.environ(),
        cwd=shell.folder,
        input=answers,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_what_is_needed_is_asked_for_and_tried_and_written_beside_what_is_there(shell: Shell) -> None:
    dotenv = shell.folder / ".env"
    dotenv.write_text("# mine\nSERVICE_NAME=mine\nINFLUXDB_ORG=old  # theirs\n")
    with InfluxSimulator() as influx:
        lines = ["nonsense", influx.url, "", influx.token, influx.org, influx.bucket, "", ""]
        done = answered(shell, "influx_to_s3", answers="\n".join(lines) + "\n")
        assert done.returncode == 0, done.stderr
        assert "INFLUXDB_URL='nonsense': allowed: http://host" in done.stderr
        assert "ok: InfluxDB: " in done.stderr
        assert f"delivers to {shell.folder}/data/objects/telemetry/" in done.stderr
        assert influx.token not in done.stderr + done.stdout
        text = dotenv.read_text()
        assert text.startswith(f"# mine\nSERVICE_NAME=mine\nINFLUXDB_ORG={influx.org}\n\n# influx_to_s3\n")
        assert dotenv.stat().st_mode & 0o777 == 0o600
        wrong = answered(shell, "influx_to_s3", answers="\n\nwrong\n\n\n\n\n")
    assert wrong.returncode == 1
    assert "FAILED: InfluxDB: " in wrong.stderr
    assert dotenv.read_text() == text, "what does not work is not written"
    assert load_settings({}, dotenv).influx.url == influx.url, "the written .env is read"
    ended = answered(shell, "appmetrica", answers="")
    assert (ended.returncode, "the input ended" in ended.stderr) == (78, True)


def test_a_value_is_read_as_it_was_written(shell: Shell) -> None:
    values = {"A": "plain", "B": "two words", "C": "it's #1 \\ $HOME", "D": '"x"'}
    (shell.folder / ".env").write_text(merged("", values, "x"))
    assert read_dotenv(shell.folder / ".env")[0] == values
    assert quoted("postgresql://u:p@h:1/n") == "postgresql://u:p@h:1/n"
    assert tuple(PIPELINES) == SETUPS
