"""/amplitude and /appmetrica on a real daemon: documented URLs and names, errors, a wait that survives a restart."""

import csv
import io
import signal
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, closing
from datetime import UTC, datetime
from typing import Any

import httpx
import pytest

from app.appmetrica.routes import AT_ONCE
from daemon import Daemons
from simulators.amplitude import AmplitudeFault, AmplitudeSimulator, generated
from simulators.appmetrica import AppMetricaFault, AppMetricaSimulator
from simulators.appmetrica import generated as received

WEEK = "/amplitude/export?start=20240201&end=20240207&source=web"
WANTED = {"resource": "events", "date_since": "2026-02-01", "date_until": "2026-02-01"}


class Product:
    """A daemon with both services; their jobs do not run by themselves."""

    def __init__(self, daemons: Daemons, web: AmplitudeSimulator, mobile: AppMetricaSimulator) -> None:
        self.daemons, self.web, self.mobile = daemons, web, mobile
        self.restart()

    def restart(self) -> None:
        environ = {**self.web.environment("web"), **self.mobile.environment()}
        self.daemon = self.daemons.start("idle_jobs", wait=True, key="", PYTHONFAULTHANDLER="1", **environ)
        self.client = httpx.Client(base_url=self.daemon.url, timeout=30)

    def get(self, path: str, **params: Any) -> httpx.Response:
        try:
            return self.client.get(path, params=params or None)
        except httpx.ReadTimeout:  # has happened once under load: the stacks of all threads would tell why
            self.daemon.process.send_signal(signal.SIGABRT)
            self.daemon.process.wait(10)
            pytest.fail(f"{path} got no answer:\n{self.daemon.log}")


@pytest.fixture(scope="module")
def product(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Product]:
    with ExitStack() as stack:
        web, mobile = stack.enter_context(AmplitudeSimulator()), stack.enter_context(AppMetricaSimulator())
        web.state.made = generated(5)
        mobile.state.rows = received(mobile.state.application_id, 4)
        daemons = stack.enter_context(closing(Daemons(tmp_path_factory.mktemp("product"))))
        made = Product(daemons, web, mobile)
        yield made
        made.client.close()


def lines(answer: httpx.Response) -> dict[str, int]:
    with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
        assert archive.testzip() is None
        return {name: len(archive.read(name).splitlines()) for name in archive.namelist()}


def test_the_documented_call_gives_the_documented_name(product: Product) -> None:
    answer = product.get(WEEK)
    assert answer.status_code == 200
    assert answer.headers["content-disposition"] == 'attachment; filename="2024_week_5.zip"'
    hours = [datetime(2024, 2, day, hour, tzinfo=UTC) for day in range(1, 8) for hour in range(24)]
    events = dict.fromkeys(("2024_week_5", "2024_week_6"), 0)
    for at in hours:
        events[f"2024_week_{at.isocalendar()[1]}"] += 5 * bool(int(at.timestamp()) // 3600 % 5)
    assert lines(answer) == {f"{week}.ndjson": count for week, count in events.items()}


def test_a_range_over_new_year_without_events_has_an_empty_file_for_each_week(product: Product) -> None:
    product.web.state.made, made = (lambda _source, _hour: ()), product.web.state.made
    answer = product.get("/amplitude/export", start="20261221", end="20270110", source="web")
    product.web.state.made = made
    assert lines(answer) == {"2026_week_52.ndjson": 0, "2026_week_53.ndjson": 0, "2027_week_1.ndjson": 0}
    assert "2026_week_52.zip" in answer.headers["content-disposition"]


@pytest.mark.parametrize(
    ("params", "status"),
    [
        ({"start": "20240230", "end": "20240301", "source": "web"}, 422),
        ({"start": "2024-02-1", "end": "20240301", "source": "web"}, 422),
        ({"start": "20240302", "end": "20240301", "source": "web"}, 422),
        ({"start": "20230101", "end": "20240301", "source": "web"}, 422),
        ({"start": "99991231", "end": "99991231", "source": "web"}, 422),
        ({"start": "21071231", "end": "21080101", "source": "web"}, 422),
        ({"start": "00010101", "end": "00010101", "source": "web"}, 422),
        ({"start": "19800106", "end": "19800107", "source": "web"}, 422),
        ({"start": "20240301", "end": "20240301", "source": "tv"}, 422),
        ({"start": "20240301", "end": "20240301", "source": "mobile"}, 409),
    ],
)
def test_a_wrong_range_or_source_is_refused(product: Product, params: dict[str, str], status: int) -> None:
    answer = product.get("/amplitude/export", **params)
    assert (answer.status_code, set(answer.json())) == (status, {"error"})


@pytest.mark.parametrize(
    ("path", "field"),
    [
        ("/amplitude/export?start=20240201&end=20240207&source=web&sources=app", "sources"),
        ("/amplitude/export?start=20240201&end=20240207&source=web&end=20240208", "end"),
        ("/appmetrica/ping?verbose=1", "verbose"),
        ("/appmetrica/fetch-export?export_id=1&export_id=2", "export_id"),
        ("/appmetrica/fetch-export?export_id=1&poll_timout=5", "poll_timout"),
    ],
)
def test_a_parameter_that_is_not_known_or_comes_twice_is_refused(product: Product, path: str, field: str) -> None:
    answer = product.get(path)
    assert (answer.status_code, answer.json()["error"]["field"]) == (422, field)


def test_what_goes_wrong_before_the_first_byte_is_an_answer(product: Product) -> None:
    product.web.add_fault(AmplitudeFault(403))
    answer = product.get(WEEK)
    assert answer.status_code == 502
    assert "AMPLITUDE_BASE_URL" in answer.json()["error"]["hint"]


def test_what_goes_wrong_later_ends_the_connection_instead_of_the_file(product: Product) -> None:
    product.web.state.made, made = generated(400), product.web.state.made
    product.web.add_fault(AmplitudeFault())
    product.web.add_fault(AmplitudeFault(403))
    with pytest.raises(httpx.RemoteProtocolError):
        product.get(WEEK)
    product.web.state.made = made
    assert product.get(WEEK).status_code == 200, "the place is free again"


def test_callers_who_go_away_give_their_places_back(product: Product) -> None:
    for _ in range(4):
        with httpx.stream("GET", product.daemon.url + WEEK) as answer:
            next(answer.iter_raw(10))
    product.daemon.until(lambda: product.get(WEEK).status_code == 200)


def test_callers_who_go_away_before_the_first_byte_give_their_places_back(product: Product) -> None:
    product.mobile.state.questions = 1000
    number = ask(product, {**WANTED, "fields": ["event_name"]})
    path = f"/appmetrica/fetch-export?export_id={number}&poll_interval=3600&poll_timeout=86400"
    for _ in range(AT_ONCE):
        with pytest.raises(httpx.ReadTimeout):
            httpx.get(product.daemon.url + path, timeout=0.3)
    free = {"export_id": number, "poll_timeout": 0}
    product.daemon.until(lambda: product.get("/appmetrica/fetch-export", **free).status_code == 202)
    product.mobile.state.questions = 2
    product.mobile.state.asked.clear()


def test_ping_says_whether_the_service_answers(product: Product) -> None:
    told = product.get("/appmetrica/ping").json()
    assert {name: told[name] for name in ("module", "status")} == {"module": "appmetrica", "status": "ok"}
    assert told["calls_today"] >= 1
    lines = [
        line.rsplit(" ", 1) for line in product.get("/metrics").text.splitlines() if line.startswith("headwater_calls")
    ]
    counted = {name.partition("{")[0]: float(value) for name, value in lines}
    assert counted == {
        "headwater_calls_total": told["calls_today"],
        "headwater_calls_today": told["calls_today"],
        "headwater_calls_limit": told["calls_a_day"],
    }
    product.mobile.add_fault(AppMetricaFault(401, b"no"))
    told = product.get("/appmetrica/ping").json()
    assert told["status"] == "error"
    assert "APPMETRICA_API_KEY" in told["hint"]


@pytest.mark.slow
def test_an_export_is_waited_for_over_a_restart(product: Product) -> None:
    product.mobile.state.questions = 4
    number = product.client.post("/appmetrica/exports", json=WANTED).json()["export_id"]
    assert product.client.post("/appmetrica/exports", json=WANTED).json()["export_id"] == number
    answer = product.get("/appmetrica/fetch-export", export_id=number, poll_timeout=0)
    assert (answer.status_code, answer.json()["status"]) == (202, "waiting")
    answer = product.get("/appmetrica/fetch-export", export_id=number, poll_interval=1, poll_timeout=1)
    assert (answer.status_code, answer.json()["progress"]) == (202, 50)
    product.daemon.kill()
    product.client.close()
    product.restart()
    answer = product.get("/appmetrica/fetch-export", export_id=number, poll_interval=1, poll_timeout=20)
    assert answer.status_code == 200
    rows = list(csv.DictReader(io.StringIO(answer.text, newline="")))
    assert len(rows[0]) == 32
    assert max(int(row["appmetrica_device_id"]) for row in rows) > 2**63
    assert any("\n" in row["event_json"] for row in rows)
    urls = {url for url, status in product.mobile.state.asked if status == 202}
    assert len(urls) == 1


def test_parts_come_as_one_file_with_one_header(product: Product) -> None:
    product.mobile.state.questions = 0
    wanted = {**WANTED, "fields": ["event_name", "event_timestamp"]}
    whole = product.get("/appmetrica/fetch-export", export_id=ask(product, wanted)).text
    product.mobile.state.least_parts = 3
    parts = product.get("/appmetrica/fetch-export", export_id=ask(product, wanted)).text
    product.mobile.state.least_parts = 1
    assert sorted(whole.splitlines()) == sorted(parts.splitlines())
    assert parts.startswith("event_name,event_timestamp\n")


def ask(product: Product, wanted: dict[str, Any]) -> int:
    answer = product.client.post("/appmetrica/exports", json=wanted)
    assert answer.status_code == 201, answer.text
    return int(answer.json()["export_id"])


def test_what_the_service_refuses_is_said_in_its_words(product: Product) -> None:
    product.mobile.state.unknown = frozenset({"event_nam"})
    number = ask(product, {**WANTED, "fields": ["event_nam"]})
    answer = product.get("/appmetrica/fetch-export", export_id=number)
    product.mobile.state.unknown = frozenset()
    assert answer.status_code == 502
    assert "Unknown field: event_nam" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("wanted", "field"),
    [
        ({**WANTED, "resource": "secrets"}, "body.resource"),
        ({**WANTED, "date_since": "2026-02-30"}, "body.date_since"),
        ({**WANTED, "date_since": "2026-02-03"}, "body.date_since"),
        ({**WANTED, "date_since": "0001-01-01"}, "body.date_since"),
        ({**WANTED, "date_until": "9999-12-31"}, "body.date_until"),
        ({**WANTED, "fields": ["a&b=c"]}, "body.fields"),
        ({**WANTED, "more": 1}, "body.more"),
    ],
)
def test_a_wrong_wish_is_refused_by_field(product: Product, wanted: dict[str, Any], field: str) -> None:
    answer = product.client.post("/appmetrica/exports", json=wanted)
    assert (answer.status_code, answer.json()["error"]["field"]) == (422, field)


def test_an_unknown_number_is_not_found(product: Product) -> None:
    assert product.get("/appmetrica/fetch-export", export_id=4711).status_code == 404


def test_nothing_is_configured_says_what_to_set(daemons: Daemons) -> None:
    daemon = daemons.start("", wait=True, key="")
    assert daemon.get("/appmetrica/ping").json["status"] == "unconfigured"
    assert daemon.get("/appmetrica/fetch-export?export_id=1").status == 409
    assert daemon.get(WEEK).status == 409
    assert daemon.job("amplitude")["off"].startswith("set AMPLITUDE_WEB_CLIENT_ID")
    assert daemon.job("appmetrica")["off"].startswith("set APPMETRICA_API_KEY")
