"""The real process: probes, stop, jobs over HTTP, limits."""

import json
import re
import signal
import socket
import statistics
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from app.core.runs import Outcome, Run
from app.db.state import open_state
from daemon import Daemon, Daemons, free_port


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """One daemon for the tests that only look."""
    started = Daemons(tmp_path_factory.mktemp("shared"))
    yield started.start("quick_jobs", MAX_BODY_BYTES="2000")
    started.close()


def trace(tmp_path: Path) -> list[str]:
    path = tmp_path / "data" / "trace.log"
    return path.read_text().splitlines() if path.exists() else []


def test_health_has_exactly_the_documented_shape(shared: Daemon) -> None:
    reply = shared.get("/health")
    assert reply.status == 200
    assert set(reply.json) == {"status", "version", "timestamp"}
    assert reply.json["status"] == "healthy"
    at = datetime.strptime(reply.json["timestamp"], "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)
    assert abs(datetime.now(UTC) - at) < timedelta(seconds=10)
    assert reply.headers["X-Content-Type-Options"] == "nosniff"
    assert reply.headers["Cache-Control"] == "no-store"


def test_with_no_configuration_the_service_is_ready_small_and_has_its_pages(daemons: Daemons) -> None:
    daemon = daemons.start()
    assert daemon.until(lambda: (reply := daemon.get("/ready")).status == 200 and reply.json) == {
        "ready": True,
        "checks": {
            "worker_running": True,
            "checkpoint_store_connected": True,
            "s3_accessible": True,
            "dwh_connected": True,
        },
    }
    for path in ("/", "/docs", "/redoc", "/openapi.json", "/runs", "/run", "/assets/overview.js", "/assets/pages.css"):
        assert daemon.get(path).status == 200, path
    pages = daemon.get("/").text + daemon.get("/docs").text + daemon.get("/redoc").text
    assert not re.search(r'(?:src|href)="(?:https?:)?//', pages), "a page asks another server"
    policy = daemon.get("/").headers["Content-Security-Policy"]
    assert "default-src 'self'" in policy
    assert "frame-ancestors 'none'" in policy
    assert daemon.rss_mib < 80
    loaded = Path(f"/proc/{daemon.process.pid}/maps").read_text()
    assert not [name for name in ("numpy", "pyarrow", "duckdb", "pandas") if f"/{name}" in loaded]


@pytest.mark.slow
def test_a_misspelt_variable_is_in_the_log_of_the_start_wherever_it_stands(daemons: Daemons, tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("INFLUX_URL=http://canary\n")
    daemon = daemons.start(S3_BUKET="canary")
    daemon.until(lambda: "S3_BUKET" in daemon.log and "INFLUX_URL" in daemon.log)
    assert "did you mean INFLUXDB_URL?" in daemon.log
    assert "did you mean S3_BUCKET?" in daemon.log
    assert "canary" not in daemon.log


@pytest.mark.slow
def test_with_postgresql_away_the_process_is_healthy_and_not_ready(daemons: Daemons) -> None:
    daemon = daemons.start("quick_jobs", CHECKPOINT_DATABASE_URL=f"postgresql://u:canary@127.0.0.1:{free_port()}/d")
    daemon.until(lambda: daemon.get("/ready").json["checks"]["s3_accessible"])
    reply = daemon.get("/ready")
    assert reply.status == 503
    assert reply.json["ready"] is False
    assert reply.json["checks"]["checkpoint_store_connected"] is False
    assert daemon.get("/health").status == 200
    jobs = daemon.get("/ops/jobs")
    assert jobs.status == 503
    assert set(jobs.json["error"]) == {"message", "hint"}
    assert "canary" not in daemon.log + jobs.text


def test_a_port_that_is_taken_is_one_line_before_any_job_runs(daemons: Daemons, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        daemon = daemons.start("quick_jobs", wait=False, PORT=str(port), HEALTH_PORT=str(free_port()))
        assert daemon.process.wait(30) == 3
    assert trace(tmp_path) == []
    line = json.loads(daemon.log.splitlines()[-1])["message"]
    assert line == f"PORT='{port}': another program listens there; set PORT to another port, or serve --port"


@pytest.mark.slow
def test_a_stop_signal_ends_a_long_job_at_its_next_safe_point(daemons: Daemons, tmp_path: Path) -> None:
    daemon = daemons.start("long_job")
    daemon.until(lambda: trace(tmp_path))
    began = time.monotonic()
    assert daemon.terminate() in (143, -signal.SIGTERM)
    assert time.monotonic() - began < 10
    assert [line.split()[0] for line in trace(tmp_path)] == ["begin", "end"]
    state = open_state("", tmp_path / "data")
    (run,) = state.runs.recent("long", 5)
    state.close()
    assert run.outcome is Outcome.STOPPED
    assert "Traceback" not in daemon.log


@pytest.mark.slow
def test_a_job_and_a_request_that_hear_no_stop_do_not_hold_up_the_exit(daemons: Daemons, tmp_path: Path) -> None:
    daemon = daemons.start("stuck_job", SHUTDOWN_GRACE_SECONDS="12")
    daemon.until(lambda: trace(tmp_path))
    head = b"POST /ops/session HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", daemon.port), timeout=30) as raw:
        raw.sendall(head + b'Content-Length: 100\r\n\r\n{"key')
        began = time.monotonic()
        assert daemon.terminate() in (143, -signal.SIGTERM)
        assert time.monotonic() - began < 12
    assert "left behind" in daemon.log


@pytest.mark.slow
def test_while_it_stops_it_still_answers_and_says_that_it_is_not_ready(daemons: Daemons, tmp_path: Path) -> None:
    daemon = daemons.start("stuck_job", SHUTDOWN_GRACE_SECONDS="20")
    daemon.until(lambda: trace(tmp_path) and daemon.get("/ready").status == 200)
    daemon.process.send_signal(signal.SIGTERM)
    daemon.until(lambda: daemon.get("/ready").status == 503)
    assert daemon.get("/health").status == 200
    refused = daemon.post("/ops/jobs/stuck/run")
    assert refused.status == 503
    assert int(refused.headers["Retry-After"]) > 0
    daemon.kill()


def test_a_signal_before_the_server_listens_ends_the_process(daemons: Daemons) -> None:
    daemon = daemons.start(wait=False)
    time.sleep(0.15)
    assert daemon.terminate() in (143, -signal.SIGTERM)
    assert "Traceback" not in daemon.log


@pytest.mark.slow
def test_health_answers_quickly_while_a_job_computes(daemons: Daemons, tmp_path: Path) -> None:
    daemon = daemons.start("busy_job")
    daemon.until(lambda: trace(tmp_path))
    daemon.get("/ops/runs")
    times = []
    for _ in range(30):
        began = time.perf_counter()
        assert daemon.get("/health").status == 200
        times.append(time.perf_counter() - began)
    assert statistics.median(times) < 0.2


@pytest.mark.slow
def test_jobs_are_run_paused_resumed_and_filled_over_http(daemons: Daemons) -> None:
    daemon = daemons.start("quick_jobs")
    daemon.until(lambda: daemon.job("failing")["last_run"] and daemon.job("failing")["state"] == "waiting")
    before = daemon.get("/ops/runs?job=failing").json["count"]
    assert daemon.post("/ops/jobs/failing/run").status == 202
    daemon.until(lambda: daemon.get("/ops/runs?job=failing").json["count"] == before + 1)
    failed = daemon.until(lambda: (run := daemon.job("failing")["last_run"])["outcome"] == "failed" and run)
    assert failed["error"] == "bucket 'b' does not exist"
    assert failed["hint"] == "create it, or set S3_BUCKET"

    assert daemon.post("/ops/jobs/quick/pause").json["job"] == "quick"
    daemon.until(lambda: daemon.job("quick")["state"] == "paused")
    assert daemon.job("quick")["next_run_at"] is None
    span = {"from": "2026-02-01T00:00:00Z", "to": "2026-02-01T01:00:00+00:00"}
    assert daemon.post("/ops/jobs/quick/backfill", span).status == 202
    daemon.until(lambda: any(run["rows"] == 3600 for run in daemon.get("/ops/runs?job=quick").json["runs"]))
    daemon.post("/ops/jobs/quick/resume")
    daemon.until(lambda: daemon.job("quick")["state"] in ("running", "waiting"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/ops/jobs/nobody/run", None, 404),
        ("/ops/jobs/sleeping/run", None, 409),
        ("/ops/jobs/failing/backfill", {"from": "2026-02-01T00:00:00Z", "to": "2026-02-02T00:00:00Z"}, 400),
        ("/ops/jobs/quick/backfill", {"from": "2026-02-02T00:00:00Z", "to": "2026-02-01T00:00:00Z"}, 422),
        ("/ops/jobs/quick/backfill", {"from": "2026-02-01T00:00:00", "to": "2026-02-02T00:00:00Z"}, 422),
        ("/ops/jobs/quick/backfill", {"from": "2999-01-01T00:00:00Z", "to": "2999-01-02T00:00:00Z"}, 422),
        ("/ops/jobs/quick/backfill", {"from": "2026-02-01T00:00:00Z", "to": "9999-12-31T23:59:59Z"}, 422),
        ("/ops/jobs/quick/backfill", {"from": 1e400, "to": "x"}, 422),
        ("/ops/jobs/quick/backfill", None, 422),
        ("/nowhere", None, 404),
        ("/ops/jobs", None, 405),
    ],
)
def test_every_refusal_has_the_one_shape(shared: Daemon, path: str, body: object, status: int) -> None:
    reply = shared.post(path, body)
    assert reply.status == status
    assert set(reply.json) == {"error"}
    assert {"message", "hint"} <= set(reply.json["error"]) <= {"message", "hint", "field"}
    assert reply.json["error"]["hint"]


def test_head_is_answered_wherever_get_is_with_the_same_headers_and_no_body(shared: Daemon) -> None:
    for path in ("/ops/jobs", "/metrics", "/openapi.json", "/dwh/events-part", "/s3/objects", "/analytics"):
        got, looked = shared.get(path), shared.call("HEAD", path)
        assert (looked.status, looked.text) == (200, ""), path
        assert looked.headers["Content-Type"] == got.headers["Content-Type"]
        assert "HEAD" in shared.call("PATCH", path).headers["Allow"]


def test_metrics_count_runs_and_name_the_build(shared: Daemon) -> None:
    shared.until(lambda: 'headwater_runs_total{job="more",outcome="ok"} 3' in shared.get("/metrics").text)
    text = shared.get("/metrics").text
    assert "headwater_build_info{version=" in text
    assert 'headwater_check{check="checkpoint_store_connected"} 1' in text


def test_the_ledger_of_a_run_is_in_its_record_the_log_and_the_metrics(shared: Daemon) -> None:
    shared.until(lambda: (shared.job("counting")["last_run"] or {}).get("ended_at"))
    runs = shared.get("/ops/runs?job=counting").json
    schema = shared.get("/openapi.json").json["paths"]["/ops/runs"]["get"]["responses"]["200"]
    described = schema["content"]["application/json"]["schema"]["properties"]["runs"]["items"]["properties"]
    run = runs["runs"][0]
    assert set(run) == set(described)
    assert set(run["ledger"]) == set(described["ledger"]["properties"])
    assert set(run["ledger"]["reasons"][0]) == set(described["ledger"]["properties"]["reasons"]["items"]["properties"])
    assert (run["outcome"], run["ledger"]["set_aside"]) == ("partial", 2)
    (line,) = [found for found in map(json.loads, shared.log.splitlines()) if found.get("counted") is not None]
    assert (line["job"], line["counted"], line["new"], line["already_there"]) == ("counting", 18, 12, 4)
    assert (line["corrected"], line["set_aside"], line["waiting"], line["ledger_closes"]) == (0, 2, 0, True)
    assert "hunter2" not in shared.log, "a sample is redacted"
    text = shared.get("/metrics").text
    for sample in (
        'headwater_ledger_total{job="counting",entry="new"} 12',
        'headwater_ledger_total{job="counting",entry="corrected"} 0',
        'headwater_ledger_total{job="counting",entry="set_aside"} 2',
        'headwater_set_aside_total{job="counting",reason="no device tag"} 2',
        'headwater_waiting{job="counting"} 0',
        'headwater_set_aside{job="counting"} 2',
        'headwater_ledger_gap{job="counting"} 0',
    ):
        assert f"{sample}\n" in text
    assert 'headwater_ledger_gap{job="failing"}' not in text, "it failed before it could count"


@pytest.mark.slow
def test_partitions_tell_how_far_they_are_and_a_killed_daemon_goes_on(daemons: Daemons) -> None:
    daemon = daemons.start("lagging_job")
    found = daemon.until(lambda: daemon.get("/ops/partitions").json["partitions"])
    assert {each["partition"] for each in found} == {"dev-1", "<img src=x onerror=alert(1)>"}
    assert {each["lag_seconds"] for each in found} == {None}
    assert all(each["cursor_at"].endswith("Z") for each in found)
    daemon.kill()
    again = daemons.start("lagging_job", LEASE_TTL_SECONDS="2", LEASE_HEARTBEAT_SECONDS="1")
    assert again.get("/ops/partitions?limit=1").json["total"] == 2
    assert again.get("/ops/partitions?limit=0").status == 422


def test_an_unforeseen_failure_is_recorded_without_markup_or_trace_in_the_answer(shared: Daemon) -> None:
    run = shared.until(lambda: (shared.job("breaking")["last_run"] or {}).get("ended_at") and shared.job("breaking"))
    assert run["last_run"]["error"] == "RuntimeError: unforeseen <b>markup</b>"
    assert "Traceback" not in json.dumps(run)
    assert "Traceback" in shared.log


@pytest.mark.slow
def test_without_keys_a_page_of_another_site_can_neither_read_nor_act(shared: Daemon) -> None:
    assert shared.post("/ops/jobs/quick/run", headers={"Sec-Fetch-Site": "cross-site"}).status == 403
    assert shared.get("/ops/jobs", {"Host": "rebound.example"}).status == 403
    assert shared.get("/health", {"Host": "healthcheck.railway.app"}).status == 200
    assert shared.get("/ops/jobs", {"Host": f"localhost:{shared.port}"}).status == 200


@pytest.mark.slow
def test_a_body_over_the_limit_is_refused_whatever_its_length_says(shared: Daemon) -> None:
    reply = shared.post("/ops/session", {"key": "x" * 3000})
    assert reply.status == 413
    assert "2000" in reply.json["error"]["message"]
    head = b"POST /ops/session HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", shared.port), timeout=10) as raw:
        raw.sendall(head + b"Transfer-Encoding: chunked\r\n\r\n")
        for _ in range(4):
            raw.sendall(b"400\r\n" + b"x" * 1024 + b"\r\n")
        assert raw.recv(4096).startswith(b"HTTP/1.1 413 ")


@pytest.mark.slow
def test_half_a_head_and_half_a_body_are_closed_within_fifteen_seconds(shared: Daemon) -> None:
    head = b"POST /ops/session HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    endings: dict[str, tuple[float, bytes]] = {}

    def send(name: str, text: bytes) -> None:
        began = time.monotonic()
        answer = b""
        with socket.create_connection(("127.0.0.1", shared.port), timeout=30) as raw:
            raw.sendall(text)
            while chunk := raw.recv(4096):
                answer += chunk
        endings[name] = (time.monotonic() - began, answer)

    texts = {"nothing": b"", "head": head[:-5], "body": head + b'Content-Length: 100\r\n\r\n{"key'}
    threads = [threading.Thread(target=send, args=each) for each in texts.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {name: seconds for name, (seconds, _) in endings.items() if seconds > 25} == {}
    assert endings["body"][1].startswith(b"HTTP/1.1 408 ")


@pytest.mark.slow
def test_an_overdue_daily_job_runs_after_a_restart_and_a_fresh_one_waits(daemons: Daemons, tmp_path: Path) -> None:
    state = open_state("", tmp_path / "data")
    old = datetime.now(UTC) - timedelta(hours=30)
    state.runs.save(Run("old", "daily", old, old, Outcome.OK))
    state.close()
    daemons.start("daily_job").until(lambda: len(trace(tmp_path)) == 2)
    again = daemons.start("daily_job")
    tomorrow = datetime.now(UTC) + timedelta(hours=20)
    again.until(lambda: datetime.fromisoformat(again.job("daily")["next_run_at"]) > tomorrow)
    assert len(trace(tmp_path)) == 2


@pytest.mark.slow
@pytest.mark.parametrize("dialect", ["sqlite", "postgres"])
def test_two_daemons_on_one_state_never_run_a_job_at_once(
    daemons: Daemons, tmp_path: Path, dialect: str, request: pytest.FixtureRequest
) -> None:
    url = request.getfixturevalue("postgres_server").new_database() if dialect == "postgres" else ""
    pair = [daemons.start("quick_jobs", CHECKPOINT_DATABASE_URL=url) for _ in range(2)]
    for _ in range(20):
        for daemon in pair:
            daemon.post("/ops/jobs/quick/run")
    pair[0].until(lambda: sum(line.startswith("end quick") for line in trace(tmp_path)) >= 4)
    lines = [line.split()[0] for line in trace(tmp_path) if " quick " in line]
    assert lines == [("begin", "end")[place % 2] for place in range(len(lines))]
