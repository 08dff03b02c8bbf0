"""The smaller parts: metrics text, progress, readiness, throttle."""

import threading
import time
from dataclasses import astuple
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from app.core.errors import Permanent, Transient
from app.core.runs import Job, LeaseTerms, Report, RunServices, Stop
from app.db.state import open_state
from app.ops.connection_checks import Probes, Readiness, try_all
from app.ops.json_views import ServiceCalls
from app.ops.logs import log_run
from app.ops.metrics import PARTITIONS, MetricSeries, exposition, lag_series
from app.ops.page_data import log_lines
from app.ops.pages import filled, job_rows
from app.ops.routes import overview
from app.ops.scheduler import STALLED_SECONDS, JobView, ProgressCounts, ProgressTally, Scheduler
from app.ops.service import shutdown_budget
from app.ops.setup import merged
from app.web.auth import SignInThrottle

NOW = datetime(2026, 2, 7, 12, tzinfo=UTC)


def test_label_values_are_escaped_as_the_format_wants() -> None:
    text = exposition([MetricSeries("x", "gauge", "About.", [({"a": 'q"\\\n'}, 1.5)])])
    assert text == '# HELP x About.\n# TYPE x gauge\nx{a="q\\"\\\\\\n"} 1.5\n'


def test_only_the_partitions_that_lag_most_are_shown_singly() -> None:
    lags = [("job", f"dev-{n}", float(n)) for n in range(1000)]
    single, most, number = lag_series(lags)
    assert len(single.samples) == PARTITIONS
    assert single.samples[0] == ({"job": "job", "partition": "dev-999"}, 999.0)
    assert most.samples == [({"job": "job"}, 999.0)]
    assert number.samples == [({"job": "job"}, 1000.0)]


def test_a_row_says_how_many_calls_a_service_has_had() -> None:
    views = [
        JobView(Job(name, 3600, lambda _: Report()), "waiting", None, 0, NOW, can_backfill=False)
        for name in ("pull", "other")
    ]
    ops: Any = SimpleNamespace(
        scheduler=SimpleNamespace(views=lambda: views),
        state=SimpleNamespace(runs=SimpleNamespace(totals=list, recent=lambda *_: [])),
        pipelines=SimpleNamespace(calls={"pull": lambda: ServiceCalls(1234, 5000, 99_999)}),
        alerts=SimpleNamespace(stale=(), ahead_seconds={}),
        clock=lambda: NOW,
    )
    shown = overview(ops)
    assert shown["jobs"][0]["calls"] == {"today": 1234, "a_day": 5000}
    text = job_rows(shown)
    assert text.count("Calls: 1,234 of 5,000 today") == 1
    assert text.count("2026-02-07 12:00:00Z") == 2
    assert text.count('<span class="mark off" aria-hidden="true"></span> <strong>No run yet</strong>') == 2
    ops.alerts.stale = {"pull"}
    assert '<span class="mark late" aria-hidden="true"></span> <strong>Late</strong>' in job_rows(overview(ops))


def test_a_tally_adds_up_from_many_threads() -> None:
    seen: list[ProgressCounts] = []
    tally = ProgressTally(seen.append)

    def work() -> None:
        for _ in range(500):
            tally.advance(done=1, rows=2)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert tally.counts == ProgressCounts(done=2000, rows=4000)
    assert [each.done for each in seen] == list(range(1, 2001))


def test_a_check_that_hangs_makes_only_its_own_answer_fail() -> None:
    release = threading.Event()

    def hangs() -> str:
        release.wait(10)
        return ""

    def fails() -> str:
        raise Transient("database away", "start it")

    readiness = Readiness({"hangs": hangs, "fails": fails, "fine": lambda: "a note"})
    readiness.start()
    deadline = time.monotonic() + 5
    while not readiness.findings()["fine"].ok and time.monotonic() < deadline:
        time.sleep(0.01)
    found = readiness.findings()
    readiness.close()
    release.set()
    assert (found["fine"].ok, found["fine"].note) == (True, "a note")
    assert not found["hangs"].ok
    assert (found["fails"].error, found["fails"].hint) == ("database away", "start it")


def test_ten_failed_sign_ins_a_minute_are_let_pass_and_other_addresses_are_not_affected() -> None:
    throttle = SignInThrottle()
    assert [throttle.failed("a", NOW) for _ in range(10)] == [None] * 10
    assert throttle.failed("a", NOW + timedelta(seconds=15)) == 45.0
    assert throttle.failed("b", NOW) is None
    assert throttle.failed("a", NOW + timedelta(seconds=61)) is None


def test_the_rights_that_are_missing_are_named_with_those_that_are_there() -> None:
    def refused() -> None:
        raise Permanent("AccessDenied", "allow s3:ListBucket")

    assert try_all([("read", lambda: None), ("write", lambda: None)]) == "may read, write"
    with pytest.raises(Permanent, match="may read; may not list, delete: AccessDenied") as caught:
        try_all([("read", lambda: None), ("list", refused), ("delete", refused)])
    assert caught.value.hint == "allow s3:ListBucket"


@pytest.mark.parametrize("grace_seconds", [1, 2, 25, 3600])
def test_a_stop_in_which_every_step_takes_all_of_its_time_ends_within_the_grace(grace_seconds: int) -> None:
    assert sum(astuple(shutdown_budget(grace_seconds))) <= grace_seconds * 7 / 8


def test_health_turns_bad_when_timers_stop_firing(tmp_path: Path) -> None:
    state = open_state("", tmp_path)
    services = RunServices(lambda: NOW, state.leases, state.runs, LeaseTerms("me"), log_run)
    scheduler = Scheduler([], services, Stop(), {}, state.pauses)
    probes = Probes("1", scheduler, Readiness({}), lambda: NOW)
    assert probes.health().status == 200
    scheduler._ticked_at -= STALLED_SECONDS + 1  # noqa: SLF001 - half a minute without a tick
    assert (probes.health().status, probes.health().body["status"]) == (503, "unhealthy")
    state.close()


def test_a_line_of_the_log_that_a_full_disk_tore_hides_no_other(tmp_path: Path) -> None:
    whole = '{"time": "2026-02-07T12:00:00.000Z", "level": "info", "message": "said", "run_id": "r1"}'
    torn = [whole[:-9] + whole, whole[:-1], f"{whole} of another program"]
    (tmp_path / "app.log").write_text("\n".join([whole, *torn, whole]))
    assert [line["message"] for line in log_lines(tmp_path / "app.log", 0, "r1", 0)] == ["said", "said"]


def test_data_that_looks_like_a_place_of_the_page_is_shown_as_it_is() -> None:
    assert (
        filled("<b>{jobs}</b>{off}{other}", jobs="lost {off}", off="none {jobs}")
        == "<b>lost {off}</b>none {jobs}{other}"
    )


def test_the_answer_of_setup_replaces_a_variable_that_is_set_twice_or_over_several_lines() -> None:
    text = "# mine\nTOKEN=old\n\nKEY='one\ntwo'  # theirs\nexport TOKEN=later\n#KEY=example"
    assert merged(text, {"TOKEN": "new", "KEY": "k"}, "p") == "# mine\nTOKEN=new\n\nKEY=k\n#KEY=example\n"
    assert merged("A=1", {"B": "two words"}, "p") == "A=1\n\n# p\nB='two words'\n"
