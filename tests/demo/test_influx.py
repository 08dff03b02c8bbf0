"""The simulator over HTTP: statuses, faults, the record of queries, and the real client reading it."""

import gzip
import json
import threading
import time

import pytest
import urllib3

from influx import ANNOTATIONS, NOON_NS, SECOND_NS, post, post_flux
from simulators.influx import Cut, EmptyTable, ErrorTable, ForceGzip, InfluxSimulator, Refuse, Stall

QUERY = (
    'from(bucket: "telemetry") |> range(start: 2026-02-07T12:00:00Z, stop: 2026-02-07T13:00:00Z) '
    '|> pivot(rowKey: ["_time"], columnKey: ["_field"], valueColumn: "_value")'
)
SHORT = QUERY.partition("|> pivot")[0] + "|> limit(n: 1)"
ERROR = (
    "\r\n#datatype,string,string\r\n#group,true,true\r\n#default,,\r\n,error,reference\r\n,engine: unexpected EOF,\r\n"
)


@pytest.fixture
def filled(influx: InfluxSimulator) -> InfluxSimulator:
    """Ten points of one device, five seconds apart."""
    influx.write("\n".join(f"m,device_id=D1 f={row},g=0.5 {NOON_NS + row * 5 * SECOND_NS}" for row in range(10)))
    return influx


def rows(data: bytes) -> int:
    return data.count(b"\r\n,,0,")


def test_an_answer_is_chunked_csv_with_the_version_of_the_server(filled: InfluxSimulator) -> None:
    got = post_flux(filled, QUERY)
    assert got.headers["Content-Type"] == "text/csv; charset=utf-8"
    assert got.headers["Transfer-Encoding"] == "chunked"
    assert got.headers["X-Influxdb-Version"].startswith("v2.")
    assert rows(got.data) == 10


def test_bare_flux_is_answered_without_annotations(filled: InfluxSimulator) -> None:
    got = post(filled, QUERY.encode(), {"Content-Type": "application/vnd.flux"})
    assert got.data.startswith(b",result,table,")
    assert b"\r\n,_result,0," in got.data


def test_an_unknown_annotation_or_another_delimiter_is_refused(filled: InfluxSimulator) -> None:
    for got in (post_flux(filled, QUERY, annotations=("colour",)), post_flux(filled, QUERY, delimiter="ab")):
        assert got.status == 400
        assert got.json()["message"].startswith("failed to decode request body: ")


@pytest.mark.parametrize("body", [b"not json", b"[]", b"{}", b'{"query": "x", "type": "sql"}'])
def test_a_body_that_is_no_query_is_refused(influx: InfluxSimulator, body: bytes) -> None:
    got = post(influx, body, {"Content-Type": "application/json"})
    assert (got.status, got.headers["X-Platform-Error-Code"]) == (400, "invalid")


def test_tokens_are_taken_as_token_or_bearer_and_refused_otherwise(filled: InfluxSimulator) -> None:
    body = json.dumps({"query": QUERY}).encode()
    kind = {"Content-Type": "application/json"}
    assert post(filled, body, {**kind, "Authorization": f"Bearer {filled.token}"}).status == 200
    got = post(filled, body, {**kind, "Authorization": "Token wrong"})
    assert (got.status, got.headers["X-Platform-Error-Code"]) == (401, "unauthorized")
    assert got.data == b'{"code":"unauthorized","message":"unauthorized access"}'


def test_a_wrong_organisation_is_a_fault_of_the_request(filled: InfluxSimulator) -> None:
    got = post(filled, json.dumps({"query": QUERY}).encode(), {"Content-Type": "application/json"}, org="nobody")
    assert got.status == 400
    assert got.json()["message"] == "failed to decode request body: organization not found"


@pytest.mark.parametrize(
    ("status", "code"),
    [(400, "invalid"), (404, "not found"), (429, "too many requests"), (500, "internal error"), (503, "unavailable")],
)
def test_every_status_has_its_code_and_body(filled: InfluxSimulator, status: int, code: str) -> None:
    filled.faults.add(Refuse(status, "queue length exceeded", retry_after_seconds=7))
    got = post_flux(filled, QUERY)
    assert (got.status, got.headers["X-Platform-Error-Code"], got.headers["Retry-After"]) == (status, code, "7")
    assert got.headers["Content-Type"] == "application/json; charset=utf-8"
    assert got.json() == {"code": code, "message": "queue length exceeded"}
    assert post_flux(filled, QUERY).status == 200


def test_a_proxy_answers_with_its_own_page(filled: InfluxSimulator) -> None:
    filled.faults.add(Refuse(502, "Bad Gateway", html=True))
    got = post_flux(filled, QUERY)
    assert (got.status, got.headers["Content-Type"]) == (502, "text/html")


def test_unknown_paths_and_methods_are_refused(influx: InfluxSimulator) -> None:
    with urllib3.PoolManager(retries=False) as pool:
        assert pool.request("GET", f"{influx.url}/nothing").status == 404
        assert pool.request("DELETE", f"{influx.url}/api/v2/query").status == 405


def test_probes_need_no_token_and_tell_when_the_server_starts(influx: InfluxSimulator) -> None:
    with urllib3.PoolManager(retries=False) as pool:

        def status(path: str) -> int:
            return pool.request("GET", influx.url + path).status

        assert [status(path) for path in ("/ping", "/health", "/ready")] == [204, 200, 200]
        assert pool.request("HEAD", f"{influx.url}/ping").status == 204
        influx.starting = True
        assert [status(path) for path in ("/ping", "/health", "/ready")] == [204, 503, 503]
        assert post_flux(influx, QUERY).json() == {"status": "starting"}


def test_an_error_table_stands_behind_the_rows_sent(filled: InfluxSimulator) -> None:
    whole = post_flux(filled, QUERY).data.decode()
    filled.faults.add(ErrorTable(after_rows=3))
    got = post_flux(filled, QUERY)
    third = whole.index("12:00:15Z")
    assert got.status == 200
    assert got.data.decode() == whole[: whole.rindex("\r\n", 0, third) + 2] + ERROR


def test_an_error_table_behind_all_rows_replaces_the_end(filled: InfluxSimulator) -> None:
    whole = post_flux(filled, QUERY).data.decode()
    filled.faults.add(ErrorTable(after_rows=99))
    assert post_flux(filled, QUERY).data.decode() == whole.removesuffix("\r\n") + ERROR


def test_a_cut_answer_has_no_last_chunk(filled: InfluxSimulator) -> None:
    filled.faults.add(Cut(after_rows=4))
    with pytest.raises(urllib3.exceptions.ProtocolError):
        post_flux(filled, QUERY)
    assert (filled.queries[-1].rows, filled.queries[-1].whole) == (4, False)


def test_a_hidden_cut_looks_like_a_whole_answer(filled: InfluxSimulator) -> None:
    filled.faults.add(Cut(after_rows=4, hidden=True, mid_row=False))
    filled.faults.add(Cut(after_rows=4, hidden=True))
    got = post_flux(filled, QUERY)
    assert got.headers["Connection"] == "close"
    assert "Transfer-Encoding" not in got.headers
    assert "Content-Length" not in got.headers
    assert rows(got.data) == 4
    assert got.data.endswith(b"\r\n")
    assert not got.data.endswith(b"\r\n\r\n")
    assert not post_flux(filled, QUERY).data.endswith(b"\r\n")


def test_a_stall_is_before_the_status_or_between_rows(filled: InfluxSimulator) -> None:
    for stall in (Stall(0.3), Stall(0.3, after_rows=5)):
        filled.faults.add(stall)
        began = time.monotonic()
        assert rows(post_flux(filled, QUERY).data) == 10
        assert time.monotonic() - began >= 0.3


def test_closing_ends_a_stall(filled: InfluxSimulator) -> None:
    filled.faults.add(Stall(60, after_rows=5))

    def read() -> None:
        with pytest.raises(urllib3.exceptions.HTTPError):
            post_flux(filled, QUERY)

    thread = threading.Thread(target=read)
    thread.start()
    while len(filled.faults):
        time.sleep(0.01)
    filled.close()
    thread.join(5)
    assert not thread.is_alive()


def test_an_empty_table_may_come_first(filled: InfluxSimulator) -> None:
    filled.faults.add(EmptyTable((("device_id", "D9"),)))
    text = post_flux(filled, QUERY).data.decode()
    assert "#default,_result,0,D9,\r\n,result,table,device_id,_value\r\n\r\n" in text
    assert text.count("\r\n,,1,2026") == 10


def test_a_fault_waits_for_a_query_that_it_is_meant_for(filled: InfluxSimulator) -> None:
    filled.faults.add(Refuse(500), times=2, when=lambda text: "pivot" in text)
    assert post_flux(filled, SHORT).status == 200
    assert [post_flux(filled, QUERY).status for _ in range(3)] == [500, 500, 200]


def test_long_answers_are_compressed_when_asked_and_all_when_forced(filled: InfluxSimulator) -> None:
    filled.write("\n".join(f"m,device_id=D1 f={row},g=0.5 {NOON_NS + row * SECOND_NS}" for row in range(100)))
    body = json.dumps({"query": QUERY, "dialect": {"annotations": list(ANNOTATIONS)}}).encode()
    kind = {"Content-Type": "application/json"}
    plain = post(filled, body, kind)
    packed = post(filled, body, {**kind, "Accept-Encoding": "gzip"})
    assert "Content-Encoding" not in plain.headers
    assert packed.headers["Content-Encoding"] == "gzip"
    assert packed.data == plain.data
    assert filled.queries[-1].sent_bytes < len(plain.data) / 2
    filled.faults.add(ForceGzip())
    assert post(filled, json.dumps({"query": SHORT}).encode(), kind).headers["Content-Encoding"] == "gzip"
    short = post(filled, json.dumps({"query": SHORT}).encode(), {**kind, "Accept-Encoding": "gzip"})
    assert "Content-Encoding" not in short.headers


def test_every_query_is_on_record_with_its_rows_and_bytes(filled: InfluxSimulator) -> None:
    got = post_flux(filled, QUERY)
    (query,) = filled.queries
    assert (query.path, query.text, query.status, query.rows) == ("/api/v2/query", QUERY, 200, 10)
    assert query.sent_bytes == len(got.data)
    assert filled.rows_sent == 10
    filled.forget_queries()
    assert filled.queries == ()


def test_points_are_written_over_http(influx: InfluxSimulator) -> None:
    def write(body: bytes, **headers: str) -> urllib3.BaseHTTPResponse:
        url = f"{influx.url}/api/v2/write?org={influx.org}&bucket={influx.bucket}&precision=s"
        with urllib3.PoolManager(retries=False) as pool:
            return pool.request("POST", url, body=body, headers={"Authorization": f"Token {influx.token}", **headers})

    assert write(b"m f=1 5").status == 204
    assert write(gzip.compress(b"m f=2 6"), **{"Content-Encoding": "gzip"}).status == 204
    got = write(b"m f=3 7\nm f=")
    assert (got.status, got.json()["message"]) == (400, "unable to parse 'm f=': missing field value")
    got = write(b"m f=4 8\nm f=5i 9")
    assert (got.status, got.headers["X-Platform-Error-Code"]) == (422, "unprocessable entity")
    assert got.json()["message"].endswith("is type integer, already exists as type float dropped=1")
    assert list(influx.points.window(influx.points.series()[0], 0, NOON_NS).times) == [
        at * SECOND_NS for at in (5, 6, 8)
    ]


def test_a_restarted_simulator_has_its_points_and_its_port(filled: InfluxSimulator) -> None:
    url = filled.url
    filled.close()
    with pytest.raises(urllib3.exceptions.HTTPError), urllib3.PoolManager(retries=False) as pool:
        pool.request("GET", f"{url}/ping")
    assert filled.start().url == url
    assert rows(post_flux(filled, QUERY).data) == 10


def test_many_readers_and_writers_at_once_see_whole_points(influx: InfluxSimulator) -> None:
    def write(number: int) -> None:
        for row in range(200):
            influx.write(f"m,device_id=D{number} f={row},g={row} {NOON_NS + row}")

    writers = [threading.Thread(target=write, args=(number,)) for number in range(3)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        for line in post_flux(influx, QUERY).data.decode().split("\r\n"):
            cells = line.split(",")
            if line.startswith(",,") and len(cells) == 9:
                assert cells[-1] == cells[-2]
    for writer in writers:
        writer.join()
    assert (
        rows(post_flux(influx, QUERY.replace("|> pivot", '|> filter(fn: (r) => r.device_id == "D0") |> pivot')).data)
        == 200
    )


def test_a_million_rows_are_read_a_window_at_a_time(influx: InfluxSimulator) -> None:
    times = range(NOON_NS, NOON_NS + 100_000 * 5 * SECOND_NS, 5 * SECOND_NS)
    values = [0.5] * len(times)
    for number in range(10):
        influx.points.extend(("m", (("device_id", f"D{number}"),)), times, dict.fromkeys("abcd", values))
    assert len(influx.points) == 1_000_000
    began = time.process_time()  # the simulator runs in this process
    got = post_flux(influx, QUERY.replace("|> pivot", '|> filter(fn: (r) => r.device_id == "D7") |> pivot'))
    assert rows(got.data) == 720
    assert time.process_time() - began < 2
