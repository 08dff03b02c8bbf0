"""The routes behind the pages, over HTTP: the verdict and its problems, one run with its log, what is put away."""

import re
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest

from app.core.runs import Outcome, Run
from app.db.state import open_state
from daemon import Daemon, Daemons


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    folder = tmp_path_factory.mktemp("pages")
    started = Daemons(folder)
    found = started.start("quick_jobs", LOG_FILE=str(folder / "app.log"), LOG_FORMAT="json")
    names = ("failing", "partial", "counting", "breaking", "quick")
    found.until(lambda: all((found.job(name)["last_run"] or {}).get("ended_at") for name in names))
    yield found
    started.close()


def summary(daemon: Daemon) -> Any:
    reply = daemon.get("/ops/summary?tz=Europe/Berlin")
    assert reply.status == 200
    return reply.json


def problem(found: Any, job: str) -> Any:
    return next((each for each in found["problems"] if each["job"] == job), None)


def runs_ended(daemon: Daemon, job: str) -> Any:
    return [run for run in daemon.get(f"/ops/runs?job={job}").json["runs"] if run["ended_at"]]


def test_the_verdict_names_three_faults_the_worst_first_and_each_has_its_next_step(daemon: Daemon) -> None:
    found = summary(daemon)
    assert found["verdict"]["state"] == "bad"
    assert found["verdict"]["title"] == f"{found['problems_total']} problems"
    texts = [part["text"] for part in found["verdict"]["parts"]]
    assert texts == ["breaking failed once", "failing failed once", "partial failed once", "1 more"]
    assert [part["href"] for part in found["verdict"]["parts"][:1]] == ["#p-breaking"]
    failing = problem(found, "failing")
    assert (failing["title"], failing["message"]) == ("failing: failed once", "bucket 'b' does not exist")
    assert failing["next"] == "create it, or set S3_BUCKET"
    assert {action["kind"] for action in failing["actions"]} == {"open", "run"}
    assert problem(found, "partial")["title"] == "partial, dev-1: failed once"
    aside = problem(found, "counting")
    assert (aside["kind"], aside["mark"], aside["count"]) == ("set_aside", "warn", 2)
    assert "for example m <b>voltage</b>=1" in aside["message"]


def test_each_pipeline_says_how_it_stands_and_what_switches_it_on(daemon: Daemon) -> None:
    jobs = {job["name"]: job for job in summary(daemon)["jobs"]}
    assert (jobs["failing"]["mark"], jobs["failing"]["words"]) == ("bad", "Failed once")
    assert jobs["sleeping"]["off"] == {
        "text": "set INFLUXDB_URL",
        "variables": ["INFLUXDB_URL"],
        "guide": "guides/sleeping",
    }
    assert jobs["counting"]["words"] == "2 values set aside"
    assert len(jobs["quick"]["strip"]) == len(jobs["quick"]["new_rows"]["by_hour"]) == 24
    assert jobs["failing"]["new_rows"]["failed_hours"] == [23]
    daemon.post("/ops/jobs/quick/pause")
    quick = next(job for job in summary(daemon)["jobs"] if job["name"] == "quick")
    assert (quick["paused_by"], quick["words"]) in {("anonymous", "Paused"), ("anonymous", "Running")}
    assert summary(daemon)["verdict"]["more"] == "quick is paused." or quick["words"] == "Running"
    daemon.post("/ops/jobs/quick/resume")


def test_what_was_set_aside_can_be_put_away_and_what_failed_cannot(daemon: Daemon) -> None:
    found = summary(daemon)
    kept = problem(found, "failing")
    refused = daemon.post(f"/ops/problems/{kept['id']}/dismiss")
    assert (refused.status, refused.json["error"]["hint"]) == (409, kept["next"])
    assert daemon.post("/ops/problems/nobody/dismiss").status == 404
    gone = problem(found, "counting")
    assert daemon.post(f"/ops/problems/{gone['id']}/dismiss").json == {"id": gone["id"], "dismissed": True}
    assert problem(summary(daemon), "counting") is None
    daemon.post("/ops/jobs/counting/run")
    assert daemon.until(lambda: problem(summary(daemon), "counting")), "it happened again"


def test_runs_come_by_job_outcome_and_page_and_one_of_them_with_its_neighbours_and_its_log(daemon: Daemon) -> None:
    found = daemon.get("/ops/runs?outcome=failed&limit=1").json
    (run,) = found["runs"]
    assert (run["outcome"], found["count"]) == ("failed", 1)
    assert found["total"] == found["with_news"] >= 2
    (earlier,) = daemon.get(f"/ops/runs?outcome=failed&limit=1&before={found['before']}").json["runs"]
    assert datetime.fromisoformat(earlier["started_at"]) < datetime.fromisoformat(run["started_at"])
    assert daemon.get("/ops/runs?outcome=wrong").status == 422
    assert daemon.get("/ops/runs?from=2026-01-01T00:00:00Z&to=2026-01-02T00:00:00Z").json["runs"] == []
    breaking = daemon.job("breaking")["last_run"]["run_id"]
    detail = daemon.get(f"/ops/runs/{breaking}").json
    assert (detail["job"], detail["seen_in_runs"], detail["previous"]) == ("breaking", 1, None)
    log = daemon.get(f"/ops/runs/{breaking}/log").json
    assert [line["level"] for line in log["lines"]] == ["error"]
    assert "unforeseen <b>markup" in log["lines"][0]["message"]
    assert "RuntimeError" in log["lines"][0]["exception"]
    quick = daemon.until(lambda: daemon.get("/ops/runs?job=quick&outcome=ok").json["runs"])[-1]["run_id"]
    assert [line["level"] for line in daemon.get(f"/ops/runs/{quick}/log?level=warn").json["lines"]] == []
    for path in ("/ops/runs/nobody", "/ops/runs/nobody/log"):
        assert daemon.get(path).status == 404


def test_the_pages_of_runs_miss_none_of_those_that_began_in_one_millisecond(daemon: Daemon) -> None:
    at = datetime(2026, 2, 7, 12, 0, 0, 123_400, UTC)
    with closing(open_state("", daemon.log_path.parent / "data")) as state:
        for number in range(3):
            began_at = at + timedelta(microseconds=number)
            state.runs.save(Run(f"tie-{number}", "quick", began_at, at + timedelta(seconds=1), Outcome.STOPPED))
    seen, before = [], ""
    while before is not None:
        page = daemon.get(f"/ops/runs?outcome=stopped&limit=1{before}").json
        seen += [run["run_id"] for run in page["runs"]]
        before = page["before"] and f"&before={page['before']}"
    assert seen == ["tie-2", "tie-1", "tie-0"]


def test_a_run_says_who_started_it_and_where_that_lies_which_it_set_aside(daemon: Daemon) -> None:
    before = len(runs_ended(daemon, "counting"))
    daemon.post("/ops/jobs/counting/run")
    asked = daemon.until(lambda: (ended := runs_ended(daemon, "counting"))[before:] and ended[0])
    of = f"/ops/runs/{asked['run_id']}"
    found = daemon.get(of).json
    assert (found["started_by"], found["requests"], found["ledger_text"][:17]) == ("anonymous", {}, "18 values counted")
    first = daemon.get(f"/ops/runs/{daemon.job('failing')['last_run']['run_id']}").json
    assert (first["started_by"], first["ledger_text"]) == ("schedule", ""), "it kept no ledger"
    files = daemon.get(f"{of}/set-aside").json["files"]
    assert [(each["name"], each["needs"]) for each in files] == [("m v.lp", "ops:run"), ("D1/x.txt", "s3:read")]
    assert files[1]["href"] == "s3/download?key=telemetry%2F_set_aside%2FD1%2Fx.txt"
    answer = daemon.get(f"/{files[0]['href']}")
    assert (answer.status, answer.text) == (200, "m v=1\n")
    for path in (f"{of}/set-aside/file?name=..%2fstate.db", "/ops/runs/nobody/set-aside"):
        assert daemon.get(path).status == 404
    assert daemon.get(f"/ops/runs/{first['run_id']}/set-aside").json == {"files": [], "total": 0}


def test_a_script_is_sent_compressed_to_who_takes_that(daemon: Daemon) -> None:
    sizes = {}
    for coding in ("gzip", "identity", "gzip;q=0"):
        with httpx.stream("GET", f"{daemon.url}/assets/map.js", headers={"Accept-Encoding": coding}) as answer:
            sizes[coding] = len(b"".join(answer.iter_raw())), answer.headers.get("content-encoding")
            assert answer.headers["vary"] == "Accept-Encoding"
    assert sizes["gzip"][1] == "gzip"
    assert sizes["identity"] == sizes["gzip;q=0"] > (2 * sizes["gzip"][0], None)


def test_a_span_a_zone_and_a_job_that_there_are_not_are_refused_with_what_to_send(daemon: Daemon) -> None:
    for path, hint in (
        ("/ops/map?job=quick", "jobs that have one: "),
        ("/ops/map?job=quick&span=5d", "spans: 24h, 7d, 30d, 365d"),
        ("/ops/map?job=quick&tz=Europe/Nowhere", "IANA name"),
        ("/ops/summary?tz=../etc", "IANA name"),
        ("/ops/map?job=quick&from=2026-02-02T00:00:00Z&to=2026-02-01T00:00:00Z", "earlier timestamp"),
        ("/ops/map?job=quick&from=2026-02-01T00:00:00Z", "send both or neither"),
        ("/ops/map/windows?job=quick&partition=a&from=2026-02-01T00:00:00Z&to=2026-02-09T00:00:00Z", "2 days or less"),
    ):
        refused = daemon.get(path)
        assert refused.status in (400, 422), path
        assert hint in refused.json["error"]["hint"], path


@pytest.mark.parametrize(
    "address",
    [
        "/ops/runs?before=0001-01-01T00:00:00%2B14:00",
        "/ops/runs?from=9999-12-31T23:59:59-14:00",
        "/ops/gaps?job=quick&to=0001-01-01T00:00:00%2B14:00",
        "/ops/map?job=quick&tz=Asia/Tokyo&from=9999-12-31T00:00:00Z&to=9999-12-31T12:00:00Z",
        "/ops/map?job=quick&tz=America/Lima&from=0001-01-01T00:00:00Z&to=0001-01-01T12:00:00Z",
        "/ops/map/windows?job=quick&partition=p&from=9999-12-31T00:00:00Z&to=9999-12-31T12:00:00Z",
    ],
)
def test_instants_at_either_end_of_time_are_refused(daemon: Daemon, address: str) -> None:
    assert daemon.get(address).status == 422


def test_guides_are_served_by_name_and_nothing_else_is(daemon: Daemon) -> None:
    assert daemon.get("/guides/influx_to_s3").text.startswith("# ")
    links = re.findall(r"href=\"(guides/\w+)\"", daemon.get("/").text)
    assert links == ["guides/README"]
    assert daemon.get("/guides/README").status == 200
    for name in ("nothing", "..%2fREADME", "%2e%2e"):
        assert daemon.get(f"/guides/{name}").status == 404, name
