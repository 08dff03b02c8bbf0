"""The commands as a person calls them: what they print, and their exit codes."""

import hashlib
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from app.cli import COMMANDS, FIRST, JOBS, UsageError, parsed
from app.config import NEW_KEY
from app.db.state import open_state
from app.main import build
from app.ops import commands
from daemon import free_port
from daemon_jobs import quick_jobs
from given_settings import loaded
from shell import Shell

pytestmark = pytest.mark.slow


def test_wrong_settings_end_with_78_and_one_line_each(shell: Shell) -> None:
    done = shell.run("", "serve", PORT="eighty", EXPORT_WINDOW_SECONDS="7")
    assert done.returncode == 78
    lines = done.stderr.splitlines()
    assert len(lines) == 2
    assert "PORT='eighty'" in done.stderr
    assert "EXPORT_WINDOW_SECONDS='7'" in done.stderr


def test_a_data_dir_that_cannot_be_written_is_named(shell: Shell) -> None:
    (shell.folder / "file").write_text("")
    done = shell.run("", "serve", DATA_DIR=str(shell.folder / "file"))
    assert done.returncode == 78
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"DATA_DIR='{shell.folder}/file': ")


def test_settings_are_judged_before_anything_heavy_is_imported(shell: Shell) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "app", "serve"],
        env=shell.environ(PORT="eighty"),
        cwd=shell.folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 78
    for heavy in ("fastapi", "uvicorn", "pyarrow", "boto3", "psycopg"):
        assert f" {heavy}\n" not in done.stderr


def test_every_example_of_the_help_can_be_called_and_every_job_is_listed(tmp_path: Path) -> None:
    for example in (*FIRST, *(line for command in COMMANDS for line in command.examples)):
        parsed(example.split())
    assert f"python -m app {next(line for line in FIRST if line.startswith('keys'))}" == NEW_KEY
    service = build(loaded(DATA_DIR=str(tmp_path), S3_BUCKET="bucket"))
    service.state.close()
    assert list(JOBS) == [job.name for job in service.pipelines.jobs]


@pytest.mark.parametrize(
    ("words", "message", "hint"),
    [
        ("stauts", "unknown command 'stauts'", "did you mean status? commands: serve, run"),
        ("nonsense", "unknown command 'nonsense'", "commands: serve, run"),
        ("run", "python -m app run: the following arguments are required: JOB", "see `python -m app run --help`"),
        ("runs --limit ten", "argument --limit: 'ten' is not a whole number", "see `python -m app runs --help`"),
        ("runs --limit 0", "argument --limit: '0' is not a whole number from 1", "see `python -m app runs --help`"),
        ("runs --limit -1", "argument --limit: '-1' is not a whole number from 1", "see `python -m app runs --help`"),
        ("backfill a --from today --to 2026-02-01", "'today' is not an ISO 8601 date or timestamp, such as 2", "see `"),
        ("backfill a --from 2026-02-02 --to 2026-02-01", "must be earlier than --to", "exchange them"),
        ("backfill a --from 2026-02-01 --to 2026-02-02 --allow-shrink", "works only with --replace", "add --replace"),
        ("keys old x", "invalid choice: 'old'", "see `python -m app keys --help`"),
    ],
)
def test_wrong_usage_names_what_was_meant(words: str, message: str, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        parsed(words.split())
    assert message in caught.value.message
    assert caught.value.hint.startswith(hint)


def test_errors_are_documents_too_when_json_was_asked_for(shell: Shell) -> None:
    for jobs, words, code, message in (
        ("", ("stauts",), 2, "unknown command 'stauts'"),
        ("quick_jobs", ("run", "quik"), 1, "no job is named 'quik'"),
        ("", ("check",), 78, "PORT='eighty': allowed: a whole number from 1 to 65535"),
    ):
        done = shell.run(jobs, *words, "--json", **({"PORT": "eighty"} if code == 78 else {}))
        assert done.returncode == code
        error = json.loads(done.stdout)["error"]
        assert error["message"] == message
        assert error["hint"].startswith("did you mean quick? " if "quik" in words else "")
        assert error["hint"]
        assert message in done.stderr
        assert error.get("faults", [message]) == [message]


def test_run_repeats_while_there_is_more_and_says_the_sum(shell: Shell) -> None:
    done = shell.run("quick_jobs", "run", "more")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "more ok: 3 rows, 0 bytes, 0 windows, 0 late rows\n"


def test_on_a_terminal_that_does_not_know_its_size_progress_is_a_bar(shell: Shell) -> None:
    (shell.folder / "data").mkdir()
    ours, theirs = pty.openpty()
    environ = shell.environ()
    with subprocess.Popen(
        shell.command("quick_jobs", "run", "quick"),
        env=environ,
        cwd=shell.folder,
        stdout=subprocess.DEVNULL,
        stderr=theirs,
    ):
        os.close(theirs)
        said = b""
        with suppress(OSError):  # how the end of a terminal shows
            while piece := os.read(ours, 4096):
                said += piece
        os.close(ours)
    assert b"quick:" in said
    assert b"/4 [" in said


def test_the_ledger_of_a_run_is_one_line_for_people_and_a_field_for_programs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sample = r"m <b>voltage</b>=1 \x1b[31m5 password=hunter2 \ud800"
    reason = f"2 no device tag, 2 of them new, for example {sample}"
    said = f"18 values counted: 12 new, 4 already there, 2 set aside ({reason})"
    with closing((service := build(loaded(DATA_DIR=str(tmp_path)), quick_jobs)).state):

        def printed(call: Callable[..., int], code: int, **given: Any) -> str:
            assert call(service, job="counting", **given) == code
            return capsys.readouterr().out

        out = printed(commands.run, 1, dry_run=False, as_json=False)  # something was newly set aside
        assert out.splitlines() == ["counting partial: 12 rows, 0 bytes, 0 windows, 0 late rows", said]
        assert said in printed(commands.runs, 0, limit=9, as_json=False)
        document = json.loads(printed(commands.run, 1, dry_run=False, as_json=True))
        (recorded, *_) = json.loads(printed(commands.runs, 0, limit=9, as_json=True))["runs"]
    for found in (document, recorded):
        assert found["ledger_text"] == said
        assert {name: found["ledger"][name] for name in ("counted", "new", "set_aside", "closes")} == {
            "counted": 18,
            "new": 12,
            "set_aside": 2,
            "closes": True,
        }
        assert found["ledger"]["reasons"] == [{"reason": "no device tag", "number": 2, "new": 2, "sample": sample}]


@pytest.mark.parametrize(
    ("job", "line"),
    [
        ("failing", "failing: bucket 'b' does not exist (create it, or set S3_BUCKET)\n"),
        ("sleeping", "error: job sleeping is off (set INFLUXDB_URL)\n"),
    ],
)
def test_what_failed_is_one_line_on_stderr_and_exit_code_1(shell: Shell, job: str, line: str) -> None:
    done = shell.run("quick_jobs", "run", job)
    assert (done.returncode, done.stderr) == (1, line)


def test_a_partition_that_failed_is_one_line_on_stderr_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with closing((service := build(loaded(DATA_DIR=str(tmp_path)), quick_jobs)).state):
        assert commands.run(service, job="partial", dry_run=False, as_json=False) == 1
    assert capsys.readouterr().err == "partial: dev-1: cut stream (look at the source)\n"


@pytest.mark.slow
def test_a_dry_run_leaves_no_record(shell: Shell) -> None:
    done = shell.run("quick_jobs", "run", "quick", "--dry-run")
    assert done.stdout == "quick ok: would write 40 rows, 400 bytes, 4 windows, 0 late rows\n"
    assert "quick" not in shell.run("quick_jobs", "runs").stdout


@pytest.mark.slow
def test_backfill_takes_instants_in_utc_and_refuses_an_empty_span(shell: Shell) -> None:
    done = shell.run("quick_jobs", "backfill", "quick", "--from", "2026-02-01", "--to", "2026-02-01T02:00:00+01:00")
    assert done.stdout.startswith("quick ok: 3600 rows")
    assert shell.run("quick_jobs", "backfill", "quick", "--from", "2026-02-02", "--to", "2026-02-01").returncode == 2
    assert shell.run("quick_jobs", "backfill", "quick", "--from", "soon", "--to", "2026-02-01").returncode == 2
    future = shell.run("quick_jobs", "backfill", "quick", "--from", "2026-02-01", "--to", "2999-01-01")
    assert (future.returncode, "lies in the future" in future.stderr) == (1, True)
    span = ("--from", "2026-02-01", "--to", "2026-02-02")
    assert shell.run("quick_jobs", "backfill", "quick", *span, "--allow-shrink").returncode == 2
    refused = shell.run("quick_jobs", "backfill", "quick", *span, "--replace")
    assert (refused.returncode, "cannot replace" in refused.stderr) == (1, True)
    assert shell.run("quick_jobs", "backfill", "more", "--from", "2026-02-01", "--to", "2026-02-02").returncode == 1
    assert "quick  ok" in shell.run("quick_jobs", "runs").stdout.replace("   ", "  ")


def test_a_lease_of_a_killed_process_that_a_clock_gave_out_that_was_ahead_is_watched_and_taken_over(
    shell: Shell, tmp_path: Path
) -> None:
    with closing(open_state("", tmp_path / "data")) as state:
        assert state.leases.acquire("quick", "killed", 1.0)
        with state.database.transaction() as session:
            session.run("UPDATE leases SET expires_at = :at", at=datetime.now(UTC) + timedelta(days=40))
    done = shell.run("quick_jobs", "run", "quick")
    assert done.returncode == 0
    assert "the clock was set back" in done.stderr


def test_a_job_that_another_process_holds_ends_with_75(shell: Shell, tmp_path: Path) -> None:
    state = open_state("", tmp_path / "data")
    assert state.leases.acquire("quick", "somebody", 60)
    state.close()
    done = shell.run("quick_jobs", "run", "quick")
    assert done.returncode == 75
    promised = re.search(r"try again when it is done, or in (\d+) s if it was killed", done.stderr)
    assert promised
    assert 40 < int(promised[1]) <= 60, "the time that its lease has left"


def test_a_signal_stops_a_command_at_its_next_safe_point(shell: Shell, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    process = subprocess.Popen(
        shell.command("long_job", "run", "long"),
        env=shell.environ(),
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        while not (tmp_path / "data" / "trace.log").exists():
            time.sleep(0.02)
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=20)[1]
    assert process.returncode == 1
    assert "long: stopped" in said


@pytest.mark.slow
def test_check_shows_settings_without_secrets_and_tries_every_system(shell: Shell) -> None:
    fine = shell.run("quick_jobs", "check")
    assert fine.returncode == 0
    for text in ("state: checkpoints", "CHECKPOINT_DATABASE_URL ok", "may list, read, write", "set INFLUXDB_URL"):
        assert text in re.sub(" +", " ", fine.stdout)
    assert not re.search(r"^PORT +8080$", fine.stdout, re.MULTILINE)
    assert re.search(r"^PORT +8080$", shell.run("quick_jobs", "check", "--settings").stdout, re.MULTILINE)
    away = shell.run("quick_jobs", "check", CHECKPOINT_DATABASE_URL=f"postgresql://u:canary@127.0.0.1:{free_port()}/d")
    assert away.returncode == 1
    assert "FAILED" in away.stdout
    assert "canary" not in away.stdout + away.stderr


@pytest.mark.slow
def test_check_says_which_env_file_it_read_and_names_what_is_misspelt(shell: Shell) -> None:
    without = json.loads(shell.run("quick_jobs", "check", "--json").stdout)
    assert (without["env_file"], without["wiring"]["warnings"]) == (None, [])
    (shell.folder / ".env").write_text("DYNAMODB_TABLE=canary\nSERVICE_NAME=mine\nOTHER=canary\n")
    text = shell.run("quick_jobs", "check", S3_BUKET="canary").stdout
    path = str(shell.folder / ".env")
    assert path in text
    found = json.loads(shell.run("quick_jobs", "check", "--json", S3_BUKET="canary").stdout)
    assert (found["env_file"], found["values"]["service.name"]) == (path, "mine")
    assert [line.split()[0] for line in found["wiring"]["warnings"]] == ["DYNAMODB_TABLE", "S3_BUKET"]
    assert all(f"warning: {line}" in text for line in found["wiring"]["warnings"])
    assert (found["wiring"]["unread"], "does not read: OTHER" in text) == (["OTHER"], True)
    assert "canary" not in f"{text} {found}"


def test_a_new_key_is_shown_once_with_the_line_that_knows_only_its_hash(shell: Shell) -> None:
    done = shell.run("", "keys", "new", "grafana", "--scopes", "ops:read", "analytics:read")
    assert done.returncode == 0
    secret = done.stdout.splitlines()[0].split()[-1]
    line = done.stdout.splitlines()[1].split()[-1]
    assert secret.startswith("hw_grafana_")
    assert line.endswith(hashlib.sha256(secret.encode()).hexdigest())
    assert secret not in line
    assert shell.run("", "keys", "new", "Bad Name", "--scopes", "read").returncode == 1
    assert shell.run("", "nonsense").returncode == 2
