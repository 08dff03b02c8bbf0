"""What a server, a network or another program does wrong: what may pass, what is for a person, what asks for less."""

import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import urllib3

from app.core.errors import AppError, Permanent, Transient
from app.core.windows import Window
from app.influx_to_s3.reader import InfluxConnection, QueryTooLarge, Reader, error_of_status
from exporter import NOON
from influx_readers import HOUR, LINES, Make, counted, flux, influxql, influxql_without_credentials, rows
from influxdb1 import InfluxDB1
from influxql_server import InfluxQlServer, recorded
from simulators.influx import Cut, EmptyTable, ErrorTable, Fault, ForceGzip, InfluxSimulator, Refuse, Stall


@pytest.fixture(params=["flux", "influxql"], name="make")
def make_over_lines(request: pytest.FixtureRequest, influx: InfluxSimulator) -> Iterator[Make]:
    """A reader of either language: faults are those of the simulator, points none but `LINES`."""
    if request.param == "flux":
        yield lambda **more: flux(influx, **more)
        return
    with InfluxQlServer(influx, recorded()) as server:
        yield lambda **more: influxql(influx, **{"url": server.url, **more})


@pytest.mark.parametrize("question", ["ping", "rows", "counts", "devices"])
def test_a_wrong_token_is_for_a_person_and_named_by_its_variable(make: Make, question: str) -> None:
    reader = make(token="wrong-canary")
    questions: Mapping[str, Callable[[], object]] = {
        "ping": reader.ping,
        "rows": lambda: rows(reader),
        "counts": lambda: list(reader.counts(None, HOUR, 60)),
        "devices": lambda: reader.devices(NOON),
    }
    with pytest.raises(Permanent, match="401") as caught:
        questions[question]()
    assert "INFLUXDB_TOKEN" in caught.value.hint
    assert "wrong-canary" not in str(caught.value)


def test_a_missing_bucket_and_a_wrong_organisation_are_named(influx: InfluxSimulator) -> None:
    with pytest.raises(Permanent, match='could not find bucket "nope"') as caught:
        flux(influx, bucket="nope").ping()
    assert "INFLUXDB_BUCKET='nope'" in caught.value.hint
    with pytest.raises(Permanent, match="organization not found") as caught:
        flux(influx, org="nope").ping()
    assert "INFLUXDB_ORG='nope'" in caught.value.hint


NO_DATABASE = b'{"results":[{"statement_id":0,"error":"database not found: nope"}]}\n'


def test_a_missing_database_is_named() -> None:
    with answering(plain_answer(NO_DATABASE)) as url:
        reader = influxql_without_credentials(url, "nope")
        with pytest.raises(Permanent, match="database not found: nope") as caught:
            reader.ping()
        assert "INFLUXDB_DATABASE='nope'" in caught.value.hint


def test_a_missing_database_is_told_by_a_real_influxdb_1_in_these_words(influxdb1: InfluxDB1) -> None:
    assert influxdb1.ask(q="SHOW FIELD KEYS", db="nope", chunked="true") == NO_DATABASE


PASSING = [
    Refuse(429, "too many requests", retry_after_seconds=3),
    Refuse(400, "queue length exceeded", code="invalid"),
    Refuse(408, "deadline exceeded"),
    Refuse(499, "client went away", code="x"),
    Refuse(500),
    Refuse(502, html=True),
    Refuse(503, "unavailable"),
    Refuse(504, html=True),
]


@pytest.mark.parametrize("fault", PASSING, ids=str)
def test_what_may_pass_is_transient(influx: InfluxSimulator, reader: Reader, fault: Refuse) -> None:
    influx.write(LINES)
    influx.faults.add(fault)
    with pytest.raises(Transient) as caught:
        rows(reader)
    assert caught.value.retry_after_seconds == fault.retry_after_seconds
    assert rows(reader)


@pytest.mark.parametrize("status", [400, 403, 404, 405, 413, 422, 501])
def test_other_refusals_are_for_a_person(influx: InfluxSimulator, reader: Reader, status: int) -> None:
    influx.faults.add(Refuse(status, "no"))
    with pytest.raises(Permanent, match=f"answers {status}: no") as caught:
        reader.ping()
    assert "INFLUXDB_" in caught.value.hint


PAGE = "<!DOCTYPE html>\n<html><head><title>Sign\nin</title></head><body>" + "x" * 5000
TOKEN, LOGIN = {"token": "t"}, {"username": "u", "password": "p"}


@pytest.mark.parametrize(
    ("answer", "server", "hint", "message"),
    [
        ("404 1.6.7 404 page not found\n", TOKEN, "set INFLUXDB_API=influxql: InfluxDB 1.6.7", "404 page not found"),
        ('403 v1.8.10 {"error": "Flux is disabled"}', TOKEN, "set INFLUXDB_API=influxql", "Flux is disabled"),
        ("401 v2.7 no", LOGIN, "set INFLUXDB_USERNAME and INFLUXDB_PASSWORD", "no"),
        ("401 v2.7 no", TOKEN, "set INFLUXDB_TOKEN to credentials", "no"),
        (f"502 - {PAGE}", TOKEN, "no action needed", "an HTML page, Sign in"),
        (f"404 - {PAGE}", TOKEN, "set INFLUXDB_URL to an InfluxDB", "an HTML page, Sign in"),
    ],
)
def test_the_hint_follows_from_what_the_server_says(
    answer: str, server: dict[str, Any], hint: str, message: str
) -> None:
    status, version, body = answer.split(" ", 2)
    head = f"X-Influxdb-Version: {version}\r\nContent-Length: {len(body)}\r\nConnection: close"
    with answering(f"HTTP/1.1 {status} No\r\n{head}\r\n\r\n{body}".encode()) as url:
        connection = InfluxConnection(url, **server)
        with pytest.raises(AppError) as caught, connection.ask("/api/v2/query", b"{}", {}, "INFLUXDB_BUCKET"):
            pass
    assert caught.value.hint.startswith(hint)
    assert caught.value.message.endswith(message)
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    "message",
    ["memory allocation limit reached: limit 10 bytes", "resource exhausted: x", "max-select-series limit exceeded: 2"],
)
def test_a_refusal_about_memory_asks_for_less(influx: InfluxSimulator, reader: Reader, message: str) -> None:
    influx.faults.add(Refuse(400, message))
    with pytest.raises(QueryTooLarge):
        rows(reader)


def test_a_retry_after_that_is_a_date_is_no_number() -> None:
    error = error_of_status("http://x", 429, "slow", where="", retry_after="Wed, 21 Oct 2026 07:28:00 GMT")
    assert isinstance(error, Transient)
    assert error.retry_after_seconds is None


def test_a_password_beyond_latin_1_is_sent_as_utf_8() -> None:
    with InfluxSimulator(token="pässwörd € 密") as influx, InfluxQlServer(influx, recorded()) as server:
        assert rows(influxql(influx, url=server.url, token="", username="jörg", password=influx.token))
        with pytest.raises(Permanent, match="401"):
            influxql(influx, url=server.url, token="", username="jörg", password="pässwörd").ping()


@pytest.mark.parametrize("message", ["max-concurrent-queries limit exceeded(1, 1)", "timeout", "engine: closed"])
def test_a_failed_statement_that_may_pass_is_transient(message: str) -> None:
    body = json.dumps({"results": [{"statement_id": 0, "error": message}]}).encode()
    with answering(plain_answer(body)) as url:
        reader = influxql_without_credentials(url, "db")
        with pytest.raises(Transient, match=re.escape(message)):
            list(reader.counts(None, HOUR, 60))


def test_fewer_results_than_statements_are_no_answer() -> None:
    with answering(plain_answer(b'{"results":[]}')) as url:
        reader = influxql_without_credentials(url, "db")
        with pytest.raises(Transient, match="more was announced"):
            list(reader.counts(None, HOUR, 60))


PLAIN_ROWS = (
    b"#datatype,string,long,dateTime:RFC3339,string,string,double,string\r\n"
    b"#group,false,false,false,true,true,false,false\r\n"
    b"#default,_result,,,,,,\r\n"
    b",result,table,_time,device_id,result,voltage,table\r\n"
    b",,0,2026-02-07T12:00:00Z,D1,success,230.5,t\r\n\r\n"
)


def test_a_server_that_renames_nothing_is_read_by_plain_names_and_the_group_key(influx: InfluxSimulator) -> None:
    with answering(plain_answer(PLAIN_ROWS)) as url:
        expected = [(0, {"result": "success"}, {"voltage": "230.5", "table": "t"})]
        assert rows(flux(influx, url=url)) == expected


def test_an_answer_without_the_columns_that_were_asked_for_is_an_error_of_ours(influx: InfluxSimulator) -> None:
    body = b"#datatype,string,long,double\r\n#group,false,false,false\r\n#default,_result,,\r\n"
    with answering(plain_answer(body + b",result,table,x\r\n,,0,1\r\n\r\n")) as url:
        reader = flux(influx, url=url)
        for question in (lambda: rows(reader), lambda: list(reader.counts("D1", HOUR, 60))):
            with pytest.raises(Permanent, match="lacks the column _"):
                question()
        assert list(reader.devices(NOON)) == []


@pytest.mark.parametrize("status", [401, 403, 404, 405, 501])
def test_where_nobody_may_look_at_buckets_a_shard_group_is_taken_for_a_day(status: int) -> None:
    with InfluxSimulator() as influx, answering_gets_with(influx, status) as url:
        influx.write(LINES)
        reader = flux(influx, url=url)
        assert rows(reader) == rows(flux(influx))
        week = Window(NOON - timedelta(days=3), NOON + timedelta(days=4))
        assert sum(counted(reader, None, week).values()) > 0
        assert len([one for one in influx.queries if "aggregateWindow" in one.text]) == 8


def test_a_server_that_fails_when_it_is_asked_for_shard_groups_is_asked_again() -> None:
    with InfluxSimulator() as influx, answering_gets_with(influx, 503) as url, pytest.raises(Transient, match="503"):
        rows(flux(influx, url=url))


def test_a_cut_is_blamed_on_a_proxy_only_where_the_answer_has_no_frame() -> None:
    whole = PLAIN_ROWS[:-2]
    with answering(b"HTTP/1.0 200 OK\r\nContent-Type: text/csv\r\n\r\n" + whole) as url, InfluxSimulator() as influx:
        with pytest.raises(Transient, match="cut on the way") as caught:
            rows(flux(influx, url=url))
        assert "proxy" in caught.value.hint
    bad = PLAIN_ROWS.replace(b"230.5", b"volts")
    with answering(plain_answer(bad)) as url, InfluxSimulator() as influx:
        with pytest.raises(Transient, match="does not fit its header") as caught:
            rows(flux(influx, url=url))
        assert "proxy" not in caught.value.hint


def test_a_server_that_still_starts_is_transient(influx: InfluxSimulator, reader: Reader) -> None:
    influx.starting = True
    with pytest.raises(Transient, match="503"):
        reader.ping()


def test_a_server_that_is_away_is_transient(make: Make) -> None:
    with pytest.raises(Transient, match="cannot connect to"):
        make(url="http://127.0.0.1:9").ping()


def test_an_address_that_is_none_is_for_a_person(make: Make) -> None:
    with pytest.raises(Permanent, match="INFLUXDB_URL"):
        make(url="http://[::1").ping()


@pytest.mark.parametrize("after", [0, 1, 15, 10_000])
def test_an_error_inside_the_answer_is_an_error(influx: InfluxSimulator, reader: Reader, after: int) -> None:
    influx.write(LINES)
    influx.faults.add(ErrorTable(after))
    with pytest.raises(Transient, match="engine: unexpected EOF"):
        rows(reader)


def test_an_error_about_memory_inside_the_answer_asks_for_less(influx: InfluxSimulator, reader: Reader) -> None:
    influx.write(LINES)
    influx.faults.add(ErrorTable(5, "memory allocation limit reached"))
    with pytest.raises(QueryTooLarge):
        rows(reader)


@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("mid_row", [False, True])
@pytest.mark.parametrize("after", [0, 7, 33])
def test_a_cut_answer_is_transient_also_when_the_cut_is_hidden(
    influx: InfluxSimulator,
    reader: Reader,
    after: int,
    mid_row: bool,  # noqa: FBT001 - a parameter of the test
    hidden: bool,  # noqa: FBT001 - a parameter of the test
) -> None:
    influx.write(LINES)
    cut = Cut(after, hidden=hidden, mid_row=mid_row)
    questions: tuple[Callable[[], object], ...] = (
        lambda: rows(reader),
        lambda: list(reader.counts(None, HOUR, 60)),
    )
    for question in questions:
        whole = question()
        influx.faults.add(cut)
        try:
            assert question() == whole  # a cut behind all that matters takes nothing away
            assert (hidden, after) == (True, 33)
        except Transient:
            assert question() == whole


@pytest.mark.parametrize("after", [None, 5])
def test_a_stall_is_transient_within_the_timeout(influx: InfluxSimulator, make: Make, after: int | None) -> None:
    influx.write(LINES)
    influx.faults.add(Stall(20, after))
    started = time.monotonic()
    with pytest.raises(Transient):
        rows(make(timeout_seconds=0.3))
    assert time.monotonic() - started < 15


@pytest.mark.parametrize("fault", [ForceGzip(), EmptyTable((("device_id", "D1"), ("location", "a,b")))], ids=str)
def test_compression_and_empty_tables_change_nothing(influx: InfluxSimulator, reader: Reader, fault: Fault) -> None:
    influx.write(LINES)
    expected = rows(reader)
    influx.faults.add(fault)
    assert rows(reader) == expected


def plain_answer(body: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)


@contextmanager
def answering_gets_with(influx: InfluxSimulator, status: int) -> Iterator[str]:
    """A server that refuses each GET and hands each POST on to the simulator; its address."""

    class Front(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(status)

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            with urllib3.PoolManager(retries=False, timeout=10) as pool:
                answer = pool.request("POST", influx.url + self.path, body=body, headers=dict(self.headers))
            self.send_response(answer.status)
            self.send_header("Content-Length", str(len(answer.data)))
            self.end_headers()
            self.wfile.write(answer.data)

        def log_message(self, *_: object) -> None:
            """Nobody reads it."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Front) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


def is_whole(request: bytes) -> bool:
    """True when the headers are there and, but for a GET, something behind them."""
    return b"\r\n\r\n" in request and (request.startswith(b"GET") or not request.endswith(b"\r\n\r\n"))


@contextmanager
def answering(answer: bytes) -> Iterator[str]:
    """A server that says the same to everybody and closes the connection; its address."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            with suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    with connection:
                        request = connection.recv(65_536)
                        while not is_whole(request):
                            request += connection.recv(65_536)
                        connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.getsockname()[1]}"
        finally:
            server.shutdown(socket.SHUT_RDWR)
            thread.join()


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.0 200 OK\r\nContent-Type: text/csv\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Type: text/csv\r\nConnection: close\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 200",
        b"",
    ],
)
def test_an_answer_of_nothing_at_all_is_no_answer(make: Make, answer: bytes) -> None:
    with answering(answer) as url:
        reader = make(url=url)
        with pytest.raises(Transient):
            list(reader.counts(None, HOUR, 60))


@pytest.mark.parametrize(
    "body",
    [
        b"<html>Sign in</html>",
        b"{}",
        b"null",
        b"[1]",
        b"\xff\xfe",
        b'{"results":null}',
        b'{"results":{"series":[]}}',
        b'{"results":[1]}',
    ],
)
def test_another_program_at_the_address_gives_an_error_of_ours(make: Make, body: bytes) -> None:
    head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(body) + 1}\r\n\r\n".encode()
    with answering(head + body + b"\n") as url:
        reader = make(url=url)
        for question in (
            lambda: list(reader.counts(None, HOUR, 60)),
            lambda: rows(reader),
            reader.inventory,
        ):
            with pytest.raises(AppError):
                question()


def test_a_web_page_instead_of_an_answer_is_named() -> None:
    with answering(plain_answer(b"<html>\n<head><title>Sign in</title></head></html>\n")) as url:
        reader = influxql_without_credentials(url, "db")
        with pytest.raises(Transient, match="<html>") as told:
            list(reader.counts(None, HOUR, 60))
        assert "login page" in told.value.hint


def test_a_series_without_values_holds_nothing() -> None:
    body = b'{"results":[{"statement_id":0,"series":[{"name":"m","columns":["fieldKey","fieldType"]}]}]}\n'
    with answering(plain_answer(body)) as url:
        reader = influxql_without_credentials(url, "db")
        assert list(reader.devices(NOON)) == []
        assert list(reader.rows("D1", HOUR)) == []
