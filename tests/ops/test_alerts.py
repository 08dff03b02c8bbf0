"""Who is told what and when: decisions first, then the thread against a server that notes what it is asked."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from app.core.errors import Permanent
from app.core.runs import Job, LeaseTerms, Outcome, Report, Run
from app.ops.alerts import Alerts, Rules, Watched, is_stale, post, turn_of
from app.stores.state import State, open_state

NOW = datetime(2026, 2, 7, 12, tzinfo=UTC)


def run(number: int, outcome: Outcome, job: str = "export") -> Run:
    at = NOW + timedelta(minutes=number)
    error = "bucket is gone" if outcome is not Outcome.OK else ""
    return Run(f"r{number}", job, at, at, outcome, Report(rows=3), error, "create it" if error else "")


@pytest.mark.parametrize(
    ("before", "now", "turn"),
    [
        (None, Outcome.FAILED, "failed"),
        (Outcome.OK, Outcome.FAILED, "failed"),
        (Outcome.OK, Outcome.PARTIAL, "failed"),
        (Outcome.FAILED, Outcome.FAILED, ""),
        (Outcome.PARTIAL, Outcome.FAILED, ""),
        (Outcome.FAILED, Outcome.OK, "recovered"),
        (Outcome.FAILED, Outcome.STOPPED, ""),
        (Outcome.OK, Outcome.OK, ""),
        (None, Outcome.OK, ""),
    ],
)
def test_a_turn_for_the_worse_or_the_better_is_told_and_its_repetition_is_not(
    before: Outcome | None, now: Outcome, turn: str
) -> None:
    assert turn_of(run(2, now), run(1, before) if before else None) == turn


def test_a_job_is_stale_after_interval_and_grace_and_a_fresh_process_gets_its_grace() -> None:
    day, hour = 86_400.0, 3600.0

    def stale(last_hours: float | None, up_hours: float) -> bool:
        last_at = None if last_hours is None else NOW - timedelta(hours=last_hours)
        return is_stale(last_at, NOW - timedelta(hours=up_hours), (day, hour), NOW)

    assert not stale(24.5, 100)
    assert stale(25.5, 100)
    assert not stale(50, 0.5)
    assert stale(50, 1.5)
    assert not stale(None, 24.5)
    assert stale(None, 25.5)


class Listener:
    """An HTTP server that keeps what it was sent and answers as it is told."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str, Any]] = []
        self.status = 200
        outer = self

        class Answer(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                outer.seen.append((self.command, self.path, json.loads(body) if body else None))
                self.send_response(outer.status)
                self.send_header("Location", f"{outer.url}/elsewhere")
                self.send_header("Content-Length", "0")
                self.end_headers()

            do_GET = do_POST  # noqa: N815 - the name that http.server calls

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - http.server's own signature
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def listener() -> Iterator[Listener]:
    with closing(Listener()) as made:
        yield made


@pytest.fixture
def state(tmp_path: Path) -> Iterator[State]:
    with closing(open_state("", tmp_path)) as made:
        yield made


def until(holds: Callable[[], Any], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_failure_recovery_and_heartbeats_reach_their_addresses_in_order(listener: Listener, state: State) -> None:
    rules = Rules("water", f"{listener.url}/hook?token=s", {"export": f"{listener.url}/beat"})
    jobs = [Job("export", 60, lambda _: Report()), Job("other", 60, lambda _: Report(), off="set X")]
    watched = Watched(jobs, state.pauses.paused, state.runs, state.leases, LeaseTerms("me"), lambda: NOW)
    with closing(Alerts(rules, watched)) as alerts:
        alerts.start()
        outcomes = (Outcome.OK, Outcome.FAILED, Outcome.FAILED, Outcome.STOPPED, Outcome.OK, Outcome.OK)
        for number, outcome in enumerate(outcomes):
            state.runs.save(run(number, outcome))
            alerts.ended(run(number, outcome), None)
        until(lambda: len(listener.seen) >= 5)
    assert [(method, path) for method, path, _ in listener.seen] == [
        ("GET", "/beat"),
        ("POST", "/hook?token=s"),
        ("GET", "/beat"),
        ("POST", "/hook?token=s"),
        ("GET", "/beat"),
    ]
    failed, recovered = (body for _, path, body in listener.seen if path.startswith("/hook"))
    assert failed["event"] == "failed"
    assert (failed["job"], failed["message"], failed["hint"]) == ("export", "bucket is gone", "create it")
    assert "water: export failed: bucket is gone Next: create it" in failed["text"]
    assert (recovered["event"], recovered["run_id"]) == ("recovered", "r4")


def test_a_redirect_is_not_followed_and_an_error_names_no_more_than_the_host(listener: Listener) -> None:
    listener.status = 302
    with pytest.raises(Permanent, match="answers 302") as caught:
        post(f"{listener.url}/secret-path", {"a": 1})
    assert "secret-path" not in str(caught.value)
    assert [path for _, path, _ in listener.seen] == ["/secret-path"]


@pytest.mark.slow
def test_silence_is_told_once_by_one_of_two_processes_and_so_is_its_end(listener: Listener, state: State) -> None:
    clock = [NOW]
    jobs = [Job("export", 60, lambda _: Report()), Job("paused", 60, lambda _: Report())]
    state.pauses.pause("paused", NOW, "me")
    rules = Rules("water", f"{listener.url}/hook", grace_by_job={"export": 30.0})
    both = [
        Alerts(
            rules,
            Watched(jobs, state.pauses.paused, state.runs, state.leases, LeaseTerms(owner), lambda: clock[0]),
        )
        for owner in ("one", "two")
    ]
    state.runs.save(run(0, Outcome.OK))
    for alerts in both:
        alerts.start()
    clock[0] = NOW + timedelta(seconds=100)
    until(lambda: all("export" in alerts.stale for alerts in both))
    until(lambda: len(listener.seen) >= 1)
    state.runs.save(run(10, Outcome.OK))
    clock[0] = NOW + timedelta(seconds=120)
    until(lambda: not any(alerts.stale for alerts in both))
    until(lambda: len(listener.seen) >= 2)
    for alerts in both:
        alerts.close()
    assert [(body["event"], body["job"]) for _, _, body in listener.seen] == [
        ("stale", "export"),
        ("recovered", "export"),
    ]
