"""InfluxQL in tests: what a real InfluxDB 1.x answers, behind a port that asks for the token and plays faults.

The answers are asked for at once where `influxd` is installed, or were recorded from it: those about `LINES`, so that
the reader and what it makes of faults are tested on every machine. `python tests/influxql_server.py` records them anew.
"""

import base64
import json
import tempfile
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path

import pytest

from app.influx_to_s3.reader import Reader
from app.influx_to_s3.set_aside import line
from exporter import Exporter
from influx_readers import HOUR, LINES, Make, flux, influxql
from influxdb1 import InfluxDB1, running_influxdb1
from simulators.http_server import Answer, Piece, Request, Simulator
from simulators.influx import InfluxSimulator, answer_with

RECORDED = Path(__file__).parent / "influx_to_s3" / "influxql_answers.json"
JSON = {"Content-Type": "application/json"}
Ask = Callable[[Mapping[str, str]], bytes]


class InfluxQlServer(Simulator):
    """`/query` for a simulator that speaks Flux only: its token, its faults, and what `ask` answers."""

    def __init__(self, influx: InfluxSimulator, ask: Ask) -> None:
        super().__init__()
        self._influx = influx
        self._ask = ask

    def respond(self, request: Request) -> Answer:
        """The answer of `ask` to a query that may be asked, document by document."""
        if request.path != "/query":
            return Answer(404)
        if self._influx.starting:
            return Answer(503, JSON, b'{"error":"starting"}')
        if not self._is_allowed(request.headers.get("authorization", "")):
            return Answer(401, JSON, b'{"error":"authorization failed"}\n')
        form = dict(urllib.parse.parse_qsl(request.body.decode()))
        fault = self._influx.faults.take(form["q"])
        return answer_with(
            fault, documents(self._ask(form)), headers=JSON, error=_failed, wait=self.wait, record=lambda *_: None
        )

    def _is_allowed(self, authorization: str) -> bool:
        """The token, or anybody's name with the token as the password."""
        kind, _, given = authorization.partition(" ")
        if kind == "Basic":
            given = base64.b64decode(given).decode().partition(":")[2]
        return given == self._influx.token


def documents(body: bytes) -> Iterator[Piece]:
    """The documents of a chunked answer, which stand on a line each, with the number of their rows."""
    for text in body.splitlines(keepends=True):
        series = (one for result in json.loads(text)["results"] for one in result.get("series", ()))
        yield Piece(text, sum(len(one["values"]) for one in series))


def _failed(message: str) -> bytes:
    """How a server says behind rows already sent that the statement failed."""
    return json.dumps({"results": [{"statement_id": 0, "error": message}]}).encode() + b"\n"


def copied_to(influxdb1: InfluxDB1, influx: InfluxSimulator) -> Ask:
    """Answers of a real server about the points that the simulator has at that time."""
    database = influxdb1.new_database(f"WITH SHARD DURATION {influx.points.shard_ns // 10**9}s")

    def ask(form: Mapping[str, str]) -> bytes:
        influxdb1.write(database, "\n".join(lines_of(influx)))
        text = form["q"].replace(f'ON "{influx.bucket}"', f'ON "{database}"')
        return influxdb1.ask(**{**form, "q": text, "db": database})

    return ask


def lines_of(influx: InfluxSimulator) -> Iterator[str]:
    """All points of a simulator as line protocol."""
    for series in influx.points.series():
        window = influx.points.window(series, -(2**63), 2**63 - 1)
        for at, time_ns in enumerate(window.times):
            fields = {name: cells[at] for (name, _), cells in window.cells.items() if cells[at] is not None}
            yield line(series.measurement, dict(series.tags), fields, time_ns)


def recorded() -> Ask:
    """Answers of a real server about `LINES`, as it gave them once."""
    answers: Mapping[str, str] = json.loads(RECORDED.read_text(encoding="utf-8"))
    return lambda form: answers[form["q"]].encode()


def record(influxdb1: InfluxDB1) -> Mapping[str, str]:
    """What a real server answers to each question that the reader has about `LINES`, by the text of the query."""
    answers: dict[str, str] = {}
    with InfluxSimulator() as influx:
        influx.write(LINES)
        ask = copied_to(influxdb1, influx)

        def asked(form: Mapping[str, str]) -> bytes:
            body = ask(form)
            answers[form["q"]] = body.decode()
            return body

        with InfluxQlServer(influx, asked) as server:
            reader = influxql(influx, url=server.url)
            reader.ping()
            reader.inventory()
            reader.devices(HOUR.start)
            reader.devices(HOUR.start - timedelta(days=1))
            for device, every_seconds in ((None, 60), (None, 3600), ("D1", 3600)):
                list(reader.counts(device, HOUR, every_seconds))
            list(reader.rows("D1", HOUR))
    return answers


@pytest.fixture(params=["flux", "influxql"])
def make(request: pytest.FixtureRequest, influx: InfluxSimulator) -> Iterator[Make]:
    """A reader of either language over the points of the simulator; settings as keywords."""
    if request.param == "flux":
        yield lambda **more: flux(influx, **more)
        return
    with InfluxQlServer(influx, copied_to(request.getfixturevalue("influxdb1"), influx)) as server:
        yield lambda **more: influxql(influx, **{"url": server.url, **more})


@pytest.fixture
def reader(make: Make) -> Reader:
    return make()


@pytest.fixture(params=["flux", "influxql"])
def exporter_of_either(request: pytest.FixtureRequest, exporter: Exporter) -> Iterator[Exporter]:
    """An exporter that reads its source by either language."""
    if request.param == "flux":
        yield exporter
        return
    with InfluxQlServer(exporter.influx, copied_to(request.getfixturevalue("influxdb1"), exporter.influx)) as server:
        exporter.url = server.url
        exporter.environ |= {"INFLUXDB_API": "influxql", "INFLUXDB_DATABASE": exporter.influx.bucket}
        yield exporter


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder, running_influxdb1(Path(folder)) as running:
        RECORDED.write_text(json.dumps(record(running), ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
