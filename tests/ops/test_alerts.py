"""Who is told what and when: decisions first, then the thread against a server that notes what it is asked."""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from copy import copy
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from app.core.errors import Permanent
from app.core.pipeline import MISSING, Commit, Record
from app.core.runs import Job, Outcome, Report, Run
from app.core.windows import Window
from app.db.leases import SqlClocks
from app.db.state import SqlAlerts, State, open_state
from app.ops.alerts import Alerts, Heartbeats, is_stale, post
from given_settings import loaded

NOW = datetime(2026, 2, 7, 12, tzinfo=UTC)


def run(number: int, outcome: Outcome, job: str = "export") -> Run:
    at = NOW + timedelta(minutes=number)
    error = "bucket is gone" if outcome is not Outcome.OK else ""
    return Run(f"r{number}", job, at, at, outcome, Report(rows=3), error, "create it" if error else "")


def test_a_job_is_stale_after_interval_and_grace_and_a_fresh_process_gets_its_grace() -> None:
    day, hour = 86_400.0, 3600.0

    def stale(last_hours: float | None, up_hours: float) -> bool:
        return is_stale(None if last_hours is None else last_hours * hour, up_hours * hour, (day, hour))

    assert not stale(24.5, 100)
    assert stale(25.5, 100)
    assert not stale(50, 0.5)
    assert stale(50, 1.5)
    assert not stale(None, 24.5)
    assert stale(None, 25.5)


def test_a_last_run_that_lies_ahead_of_now_keeps_no_job_from_being_stale() -> None:
    assert not is_stale(-40 * 86_400.0, 900.0, (60.0, 900.0))
    assert is_stale(-40 * 86_400.0, 961.0, (60.0, 900.0))
    assert not is_stale(-5.0, 10_000.0, (60.0, 900.0)), "clocks of two machines differ by some seconds"


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

    @property
    def hooks(self) -> list[Any]:
        """The bodies that the webhook was sent."""
        return [body for _, path, body in list(self.seen) if path.startswith("/hook")]

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


class FollowedClock(SqlClocks):
    """The state's clock, which is the one that all follow, and the jobs whose records lie ahead of it."""

    def __init__(self, clock: list[datetime], ahead: dict[str, float]) -> None:
        self._clock, self._ahead = clock, ahead

    def now(self) -> datetime:
        return self._clock[0]

    def ahead_seconds(self) -> Mapping[str, float]:
        return dict(self._ahead)


class Process:
    """The alerts of one process over the state that all share, and a clock that all follow."""

    def __init__(
        self,
        listener: Listener,
        state: State,
        time: tuple[list[datetime], list[float]],
        ahead: dict[str, float],
        told: SqlAlerts | None = None,
        **rules: Any,
    ) -> None:
        self.listener = listener
        jobs = [Job(name, 60, lambda _: Report()) for name in ("export", "inbox")]
        clock, elapsed = time
        mine = copy(state)
        mine.alerts, mine.clocks = told or state.alerts, FollowedClock(clock, ahead)
        self.alerts = Alerts(
            loaded(SERVICE_NAME="water", ALERT_WEBHOOK_URL=f"{listener.url}/hook?token=s", **rules),
            jobs,
            mine,
            lambda: clock[0],
            lambda: elapsed[0],
        )
        self.alerts.start()

    def end(self, *runs: Run) -> None:
        for each in runs:
            self.alerts.ended(each)

    def settle(self) -> None:
        """Until all before this was told: the first sentinel wakes the thread, which then looks; the second says so."""
        for _ in range(2):
            job = f"sentinel {uuid4()}"
            self.end(run(0, Outcome.FAILED, job))
            until(lambda job=job: any(body["job"] == job for body in self.listener.hooks))  # type: ignore[misc]

    def close(self) -> None:
        self.alerts.close()


class Processes:
    """Starts processes on one state; `told` is what people read."""

    def __init__(self, listener: Listener, state: State) -> None:
        self.listener, self.state = listener, state
        self.clock = [NOW]
        self.elapsed = [0.0]
        self.ahead: dict[str, float] = {}
        self.started: list[Process] = []

    def start(self, **rules: Any) -> Process:
        self.started.append(Process(self.listener, self.state, (self.clock, self.elapsed), self.ahead, **rules))
        return self.started[-1]

    def pass_by(self, seconds: float) -> None:
        """Time passes, and every process has looked once more."""
        self.clock[0] += timedelta(seconds=seconds)
        self.elapsed[0] += seconds
        for each in self.started:
            each.settle()

    @property
    def told(self) -> list[tuple[str, str]]:
        told = [(body["event"], body["job"]) for body in self.listener.hooks]
        return [each for each in told if not each[1].startswith("sentinel")]

    def close(self) -> None:
        for each in self.started:
            each.close()


@pytest.fixture
def processes(listener: Listener, state: State) -> Iterator[Processes]:
    with closing(Processes(listener, state)) as made:
        yield made


def test_a_turn_for_the_worse_or_the_better_is_told_and_its_repetition_is_not(processes: Processes) -> None:
    ok, partial, failed, stopped = Outcome.OK, Outcome.PARTIAL, Outcome.FAILED, Outcome.STOPPED
    cases = {
        (failed,): ["failed"],
        (ok, failed): ["failed"],
        (ok, partial, failed): ["failed"],
        (failed, partial, ok): ["failed", "recovered"],
        (failed, failed, stopped, ok, ok): ["failed", "recovered"],
        (failed, ok, partial, ok): ["failed", "recovered"] * 2,
        (ok, stopped, ok): [],
    }
    process = processes.start()
    for place, outcomes in enumerate(cases):
        process.end(*(run(number, outcome, f"job {place}") for number, outcome in enumerate(outcomes)))
    process.settle()
    told = [[event for event, job in processes.told if job == f"job {place}"] for place in range(len(cases))]
    assert told == list(cases.values())


def test_what_is_told_says_what_to_do_and_heartbeats_are_called(processes: Processes) -> None:
    beat = f"{processes.listener.url}/beat"
    process = processes.start(HEARTBEAT_URLS=f"export={beat}")
    process.end(run(1, Outcome.FAILED), run(2, Outcome.OK))
    process.settle()
    until(lambda: ("GET", "/beat", None) in processes.listener.seen)
    failed, recovered = (body for body in processes.listener.hooks if body["job"] == "export")
    assert (failed["event"], failed["message"], failed["hint"]) == ("failed", "bucket is gone", "create it")
    assert "water: export failed: bucket is gone Next: create it" in failed["text"]
    assert (recovered["event"], recovered["run_id"]) == ("recovered", "r2")


@pytest.fixture
def deaf() -> Iterator[str]:
    """The address of a server that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}/"


def test_an_alert_that_nobody_took_is_sent_with_the_next_failure_and_one_that_was_taken_is_not(
    processes: Processes,
) -> None:
    process = processes.start()
    processes.listener.status = 400
    process.end(run(1, Outcome.FAILED))
    until(lambda: processes.told)
    until(lambda: not processes.state.alerts.told())
    process.end(run(1, Outcome.FAILED), run(2, Outcome.OK))
    until(process.alerts._ended.empty)  # noqa: SLF001 - the first of them was dealt with
    processes.listener.status = 200
    processes.pass_by(60)
    assert processes.told == [("failed", "export")], "nobody knows of a failure, so nobody is told of a recovery"
    process.end(run(3, Outcome.FAILED), run(4, Outcome.FAILED), run(5, Outcome.OK))
    process.settle()
    assert processes.told[1:] == [("failed", "export"), ("recovered", "export")]


def test_a_dead_heartbeat_delays_no_alert(processes: Processes, deaf: str) -> None:
    process = processes.start(HEARTBEAT_URLS=f"inbox={deaf}")
    process.end(*(run(number, Outcome.OK, "inbox") for number in range(3)), run(3, Outcome.FAILED))
    process.settle()
    assert processes.told == [("failed", "export")]


def test_who_ends_a_run_calls_no_address_itself(processes: Processes, monkeypatch: pytest.MonkeyPatch) -> None:
    callers: list[str] = []
    monkeypatch.setattr("app.ops.alerts.post", lambda *_: callers.append(threading.current_thread().name))
    process = processes.start(HEARTBEAT_URLS="export=http://127.0.0.1:1/")
    process.end(run(0, Outcome.OK))
    until(lambda: callers)
    assert callers == ["heartbeats"]


def test_a_heartbeat_is_tried_once_and_a_dead_one_does_not_silence_the_others(listener: Listener, deaf: str) -> None:
    listener.status = 503
    urls = {"dead": deaf, "busy": f"{listener.url}/busy", "live": f"{listener.url}/live"}
    with closing(Heartbeats(urls, seconds=0.2)) as heartbeats:
        for job in ("dead", "busy", "live", "nobody"):
            heartbeats.beat(job)
        heartbeats.start()
        until(lambda: len(listener.seen) == 2)
        heartbeats.beat("live")
        until(lambda: len(listener.seen) == 3)
    assert [path for _, path, _ in listener.seen] == ["/busy", "/live", "/live"]


def test_a_redirect_is_not_followed_and_an_error_names_no_more_than_the_host(listener: Listener) -> None:
    listener.status = 302
    with pytest.raises(Permanent, match="answers 302") as caught:
        post(f"{listener.url}/secret-path", {"a": 1})
    assert "secret-path" not in str(caught.value)
    assert [path for _, path, _ in listener.seen] == ["/secret-path"]


def test_neither_a_pause_nor_a_restart_ends_a_silence_or_tells_it_again(processes: Processes, state: State) -> None:
    processes.start(ALERT_GRACE_SECONDS="30.0")
    state.runs.save(run(0, Outcome.OK, "inbox"))
    state.runs.save(run(0, Outcome.OK))
    state.pauses.pause("inbox", NOW, "me")
    processes.pass_by(100)
    assert processes.told == [("stale", "export")]
    state.pauses.pause("export", NOW, "me")
    processes.pass_by(100)
    state.pauses.resume("export")
    processes.pass_by(100)
    processes.start(ALERT_GRACE_SECONDS="30.0")
    processes.pass_by(100)
    assert all("export" in each.alerts.stale for each in processes.started)
    assert processes.told == [("stale", "export")]


def test_a_recovery_is_told_once_whether_a_run_or_a_look_ends_it(processes: Processes, state: State) -> None:
    first, second = (processes.start(ALERT_GRACE_SECONDS="30.0") for _ in range(2))
    for job in ("export", "inbox"):
        state.runs.save(run(1, Outcome.FAILED, job))
        first.end(run(1, Outcome.FAILED, job))
    processes.pass_by(200)
    began = [("failed", "export"), ("failed", "inbox"), ("stale", "export"), ("stale", "inbox")]
    assert sorted(processes.told) == began
    for job in ("export", "inbox"):
        state.runs.save(run(6, Outcome.OK, job))
    second.end(run(6, Outcome.OK))
    processes.pass_by(200)
    first.end(run(6, Outcome.OK, "inbox"))
    processes.pass_by(1)
    assert sorted(processes.told) == sorted([*began, ("recovered", "export"), ("recovered", "inbox")])


class Slow(SqlAlerts):
    """What was told, for one who looks and then finds that another has ended all of it meanwhile."""

    def __init__(self, state: State) -> None:
        self._state = state

    def begin(self, job: str, event: str, at: datetime) -> bool:
        return self._state.alerts.begin(job, event, at)

    def end(self, job: str, before: datetime, event: str | None = None) -> bool:
        return self._state.alerts.end(job, before, event)

    def told(self) -> Mapping[tuple[str, str], datetime]:
        found = self._state.alerts.told()
        for job, event in found:
            assert self._state.alerts.end(job, NOW + timedelta(days=1), event)
        return found


def test_who_did_not_end_an_alert_tells_no_recovery(processes: Processes, state: State) -> None:
    process = processes.start(told=Slow(state))
    state.runs.save(run(1, Outcome.FAILED))
    process.end(run(1, Outcome.FAILED))
    until(lambda: ("export", "failed") in state.alerts.told())
    state.runs.save(run(2, Outcome.OK))
    processes.pass_by(200)
    assert not state.alerts.told().keys() & {("export", "failed")}
    assert processes.told == [("failed", "export")]


def test_a_partial_run_ends_a_silence_without_a_word_of_recovery(processes: Processes, state: State) -> None:
    process = processes.start(ALERT_GRACE_SECONDS="30.0")
    processes.pass_by(100)
    for number, outcome in ((2, Outcome.PARTIAL), (4, Outcome.OK)):
        state.runs.save(run(number, outcome))
        process.end(run(number, outcome))
        processes.pass_by(100)
        if outcome is Outcome.PARTIAL:
            assert ("export", "stale") not in state.alerts.told()
    assert [event for event, job in processes.told if job == "export"] == ["stale", "failed", "recovered"]


def test_a_job_whose_records_lie_ahead_is_told_once_and_again_only_after_it_was_in_order(
    processes: Processes, state: State
) -> None:
    process = processes.start()
    processes.ahead["export"] = 40 * 86_400.0
    processes.pass_by(20)
    processes.pass_by(20)
    state.runs.save(run(1, Outcome.OK))
    process.end(run(1, Outcome.OK))
    processes.pass_by(100)
    assert processes.told == [("clock_ahead", "export")], "also not when a run goes well while a cursor is still ahead"
    (body,) = (body for body in processes.listener.hooks if body["job"] == "export")
    assert "3,456,000 s ahead of now" in body["message"]
    assert process.alerts.ahead_seconds == {"export": 40 * 86_400.0}
    processes.ahead.clear()
    processes.pass_by(20)
    assert ("export", "clock_ahead") not in state.alerts.told()
    processes.ahead["export"] = 3600.0
    processes.pass_by(20)
    assert processes.told == [("clock_ahead", "export")] * 2


def test_objects_that_vanished_are_told_once_and_no_good_run_ends_that(processes: Processes, state: State) -> None:
    process = processes.start()
    window = Window(NOW - timedelta(hours=2), NOW - timedelta(hours=1))
    record = Record(window, 0, "k", "v", "d", 1, 1, 1, None, None, closed=True)
    lease = state.leases.acquire("export", "me", 30)
    assert lease is not None
    state.checkpoints.commit("export", "d1", Commit([record]), lease)
    state.checkpoints.mark("export", "d1", [(record, MISSING)])
    processes.pass_by(20)
    state.runs.save(run(1, Outcome.OK))
    process.end(run(1, Outcome.OK))
    processes.pass_by(100)
    assert processes.told == [("objects_missing", "export")]
    (body,) = (body for body in processes.listener.hooks if body["job"] == "export")
    assert body["message"] == "1 objects missing at the destination"
    assert "EXPORT_HEAL" in body["hint"]
    state.checkpoints.mark("export", "d1", [(record, "")])
    processes.pass_by(20)
    processes.pass_by(20)
    assert processes.told == [("objects_missing", "export"), ("recovered", "export")]


def test_what_was_told_while_the_clock_was_ahead_is_over_with_the_next_good_run(
    processes: Processes, state: State
) -> None:
    processes.start()
    state.runs.save(run(-60, Outcome.OK))
    failed = run(40 * 1440, Outcome.FAILED)
    state.runs.save(failed)
    processes.started[0].end(failed)
    processes.pass_by(20)
    assert processes.told == [("failed", "export")], "the good run before it ends nothing"
    state.runs.save(run(1, Outcome.OK))
    processes.pass_by(100)
    assert processes.told == [("failed", "export"), ("recovered", "export")]


def test_a_good_run_that_was_recorded_ahead_of_now_ends_nothing(processes: Processes, state: State) -> None:
    processes.start()
    state.runs.save(run(40 * 1440, Outcome.OK))
    processes.started[0].end(run(0, Outcome.FAILED))
    processes.pass_by(100)
    assert processes.told == [("failed", "export")]


def test_a_clock_that_is_set_right_makes_no_job_stale_before_it_had_time_to_run(
    processes: Processes, state: State
) -> None:
    process = processes.start(ALERT_GRACE_SECONDS="300.0")
    processes.pass_by(1000)
    state.runs.save(run(16, Outcome.OK))
    processes.clock[0] += timedelta(days=20_000)
    processes.pass_by(100)
    assert not process.alerts.stale
    processes.pass_by(310)
    assert "export" in process.alerts.stale
