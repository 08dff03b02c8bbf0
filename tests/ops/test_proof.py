"""Verification and healing as people start them, over HTTP and by command; pauses and counters outlive a process."""

import json
import shlex
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from app import cli, main
from app.core.errors import Rejected
from app.core.verify import ComparedWindow, PartitionWindow, Verdict
from app.core.windows import Window
from app.ops.commands import verify
from app.ops.service import BuiltService
from app.ops.verification import VerificationResult
from daemon import TESTS, Daemon, Daemons
from daemon_jobs import shelf
from given_settings import loaded
from shell import Shell

pytestmark = pytest.mark.slow

SPAN_HOURS = 24


def span() -> dict[str, str]:
    """Whole hours that have ended by now: what is written after this call holds them all, also when an hour begins."""
    end = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
    return {"from": (end - timedelta(hours=SPAN_HOURS)).isoformat(), "to": end.isoformat()}


def verified(daemon: Daemon, within: dict[str, str]) -> Any:
    assert daemon.post("/ops/jobs/shelf/verify", within).status == 202
    return daemon.until(
        lambda: next(
            (each for each in daemon.get("/ops/verifications").json["verifications"] if each["ended_at"]), None
        )
    )


def test_a_lost_window_is_found_named_and_mended_over_http(daemons: Daemons, tmp_path: Path) -> None:
    within, folder = span(), tmp_path / "data" / "shelf"
    daemon = daemons.start("shelf")
    daemon.until(lambda: daemon.job("shelf")["runs_total"])
    (line,) = daemon.get("/ops/gaps?job=shelf&hours=24").json["partitions"]
    assert {cell["state"] for cell in line["cells"]} == {"equal"}
    end = datetime.fromisoformat(within["to"])
    gone, changed = (folder / f"{end - timedelta(hours=back):%H}.txt" for back in (6, 7))
    gone.unlink()
    changed.write_text(changed.read_text()[:-3])
    found = verified(daemon, within)
    assert {window["sign"] for window in found["windows"]} == {"-", "*"}
    assert found["counts"]["-"] == found["counts"]["*"] == 1
    (line,) = daemon.get("/ops/gaps?job=shelf&hours=24").json["partitions"]
    assert [cell["state"] for cell in line["cells"]].count("missing") == 1
    lost = next(window for window in found["windows"] if window["sign"] == "-")
    part = {"from": lost["start"], "to": lost["end"], "partition": lost["partition"]}
    assert daemon.post("/ops/jobs/shelf/heal", part).status == 202
    daemon.until(gone.exists)
    daemon.until(lambda: daemon.job("shelf")["state"] == "waiting")
    (line,) = daemon.get("/ops/gaps?job=shelf&hours=24").json["partitions"]
    assert {cell["state"] for cell in line["cells"]} == {"equal"}
    (told,) = daemon.get("/ops/verifications").json["verifications"]
    assert ([window["sign"] for window in told["windows"]], set(told["counts"])) == (["*"], {"=", "*"})
    again = verified(daemon, within)
    assert (set(again["counts"]), again["equal"]) == ({"=", "*"}, False)


def test_what_cannot_be_verified_is_refused(daemons: Daemons) -> None:
    daemon = daemons.start("shelf")
    for path, body, status in (
        ("/ops/jobs/failing/verify", span(), 400),
        ("/ops/jobs/sleeping/verify", span(), 409),
        ("/ops/jobs/nobody/heal", span(), 404),
        ("/ops/jobs/shelf/verify", {"from": "2020-01-01T00:00:00Z", "to": "2026-01-01T00:00:00Z"}, 422),
        ("/ops/jobs/shelf/heal", {**span(), "partition": "x" * 301}, 422),
        ("/ops/jobs/shelf/heal", {**span(), "partition": "shelf"}, 400),
    ):
        assert daemon.post(path, body).status == status, path
    years = {"from": "2020-01-01T00:00:00Z", "to": "2026-01-01T00:00:00Z", "partition": "it's one"}
    hint = daemon.post("/ops/jobs/shelf/heal", years).json["error"]["hint"]
    given = vars(cli.parser().parse_args(shlex.split(hint.split("`")[1])[3:]))
    assert (given["job"], given["start"].year, given["partition"], given["heal"]) == ("shelf", 2020, "it's one", True)
    assert daemon.get("/ops/gaps?job=failing").status == 400
    assert daemon.get("/ops/gaps?job=shelf&to=0001-01-01T00:00:00%2B01:00").status == 422


@pytest.mark.slow
def test_the_command_signs_each_window_and_ends_with_0_only_when_all_are_equal(tmp_path: Path) -> None:
    shell, given = Shell(tmp_path), span()
    command = ("verify", "shelf", "--from", given["from"], "--to", given["to"])
    shell.run("shelf", "run", "shelf")
    fine = shell.run("shelf", *command)
    assert (fine.returncode, fine.stderr) == (0, "")
    assert "windows: 2" in fine.stdout
    assert fine.stdout.count("\n") == 1
    lost = sorted((tmp_path / "data" / "shelf").iterdir())[5]
    lost.unlink()
    found = shell.run("shelf", *command)
    assert found.returncode == 1
    assert found.stdout.splitlines()[0].startswith("- shelf <b>one</b> ")
    document = json.loads(shell.run("shelf", *command, "--json").stdout)
    assert (document["equal"], document["counts"]["-"], len(document["windows"])) == (False, 1, 1)
    healed = shell.run("shelf", *command, "--heal", "--json")
    assert healed.returncode == 0, healed.stderr
    assert json.loads(healed.stdout)["healed"] == 1
    assert lost.exists()
    assert shell.run("shelf", "verify", "failing", "--from", "2026-01-01", "--to", "2026-01-02").returncode == 1


@pytest.mark.slow
def test_a_pause_survives_a_restart_and_a_command_pauses_a_running_daemon(daemons: Daemons, tmp_path: Path) -> None:
    daemon, shell = daemons.start("quick_jobs", LEASE_TTL_SECONDS="2", LEASE_HEARTBEAT_SECONDS="1"), Shell(tmp_path)
    daemon.until(lambda: daemon.job("quick")["runs_total"])
    assert daemon.post("/ops/jobs/quick/pause").status == 202
    daemon.kill()
    again = daemons.start("quick_jobs", LEASE_TTL_SECONDS="2", LEASE_HEARTBEAT_SECONDS="1")
    again.until(lambda: again.job("quick")["state"] == "paused")
    ended = again.job("quick")["runs_total"]
    assert json.loads(shell.run("quick_jobs", "resume", "quick", "--json").stdout) == {"job": "quick", "paused": False}
    again.until(lambda: again.job("quick")["runs_total"] > ended)
    assert shell.run("quick_jobs", "pause", "quick").returncode == 0
    again.until(lambda: again.job("quick")["state"] == "paused")
    states = {
        each["name"]: each["state"] for each in json.loads(shell.run("quick_jobs", "status", "--json").stdout)["jobs"]
    }
    assert (states["quick"], states["sleeping"]) == ("paused", "off")
    assert shell.run("quick_jobs", "pause", "nobody").returncode == 1


@pytest.mark.slow
def test_counters_do_not_start_anew_with_the_process(daemons: Daemons) -> None:
    daemon = daemons.start("daily_job")
    line = 'headwater_rows_total{job="daily"} 40'
    daemon.until(lambda: line in daemon.get("/metrics").text)
    daemon.terminate()
    again = daemons.start("daily_job")
    again.until(lambda: line in again.get("/metrics").text)
    assert 'headwater_runs_total{job="daily",outcome="ok"} 1' in again.get("/metrics").text


AWAY = {
    "DYNAMODB_TABLE_NAME": "cycles",
    "DYNAMODB_ENDPOINT_URL": "http://127.0.0.1:9",
    "AMPLITUDE_WEB_CLIENT_ID": "key",
    "AMPLITUDE_WEB_SECRET_KEY": "secret",
    "AMPLITUDE_BASE_URL": "http://127.0.0.1:9",
    "APPMETRICA_API_KEY": "token",
    "APPMETRICA_APPLICATION_ID": "1234567",
    "APPMETRICA_BASE_URL": "http://127.0.0.1:9",
}
LAST_DAY = Window(datetime.now(UTC) - timedelta(days=1), datetime.now(UTC))


def compared(service: BuiltService, job: str, span: Window, **options: Any) -> int:
    given = {"partition": None, "heal": False, "every": False, "as_json": False, **options}
    return verify(service, job=job, start=span.start, end=span.end, **given)


@pytest.mark.parametrize(
    ("job", "typo", "known"),
    [("dynamo_to_drive", "cycle", "cycles"), ("amplitude", "wbe", "web"), ("appmetrica", "events", "1234567:events")],
)
def test_a_partition_that_is_not_known_is_refused_with_those_that_are(
    tmp_path: Path, job: str, typo: str, known: str
) -> None:
    service = main.build(loaded(AWAY, DATA_DIR=str(tmp_path)))
    for healing in (False, True):
        with pytest.raises(Rejected, match=f"no partition is named '{typo}'") as caught:
            compared(service, job, LAST_DAY, partition=typo, heal=healing)
        assert known in caught.value.hint
    assert not service.state.runs.recent(job, 1)
    service.state.close()


def test_nothing_compared_is_not_equal_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    later = Window(LAST_DAY.end + timedelta(days=1), LAST_DAY.end + timedelta(days=2))
    service = main.build(loaded(DATA_DIR=str(tmp_path)), shelf)
    assert compared(service, "shelf", later) == 0
    assert capsys.readouterr().out.startswith("shelf: nothing was compared: ")
    assert compared(service, "shelf", later, as_json=True) == 0
    assert json.loads(capsys.readouterr().out)["equal"] is None


def test_a_result_over_http_is_equal_only_when_something_was_compared() -> None:
    begun = VerificationResult("shelf", LAST_DAY, LAST_DAY.end)
    slot = PartitionWindow("one", LAST_DAY)
    same, lost = (begun.with_verdict(ComparedWindow(slot, sign)) for sign in (Verdict.EQUAL, Verdict.MISSING))
    assert [replace(each, ended_at=LAST_DAY.end).equal for each in (begun, same, lost)] == [None, True, False]
    assert [begun.equal, same.equal, replace(same, ended_at=LAST_DAY.end, error="broke off").equal] == [None] * 3


COMMANDS = (
    ("run", "quick"),
    ("run", "failing"),
    ("run", "quick", "--dry-run"),
    ("backfill", "quick", "--from", "2026-02-01", "--to", "2026-02-02"),
    ("runs",),
    ("status",),
    ("check",),
    ("keys", "new", "me", "--scopes", "read"),
)


@pytest.mark.slow
def test_with_json_every_command_prints_one_document_and_nothing_else(tmp_path: Path) -> None:
    shell = Shell(tmp_path)
    (tmp_path / "data").mkdir()
    going = [
        subprocess.Popen(
            [sys.executable, str(TESTS / "daemon_jobs.py"), "quick_jobs", *command, "--json"],
            env=shell.environ(),
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            text=True,
        )
        for command in COMMANDS
    ]
    for command, process in zip(COMMANDS, going, strict=True):
        document = json.loads(process.communicate(timeout=60)[0])
        assert isinstance(document, dict), command
