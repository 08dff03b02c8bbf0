"""Both query languages on the simulator, InfluxQL on a real InfluxDB 1.x too: equal rows, bound values, and faults."""

import random
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from app.core.errors import AppError, Permanent, Transient
from app.core.ports import Count
from app.core.retry import RetryPolicy
from app.core.window import Window
from app.demo.faults import Cut, EmptyTable, ErrorTable, Fault, ForceGzip, Refuse, Stall
from app.demo.influx import InfluxSimulator
from app.influx_to_s3.connection import Connection, Server
from app.influx_to_s3.flux import FluxReader, FluxTarget, literal, time_literal
from app.influx_to_s3.influxql import InfluxQlReader, InfluxQlTarget, identifier, text_literal
from app.influx_to_s3.reader import QueryTooLarge, Reader, Refusal, refusal
from app.influx_to_s3.rows import ordered
from app.influx_to_s3.source import InfluxSource, Patience, Reading, totals
from app.influx_to_s3.spool import Spool
from exporter import NOON, ns
from influxdb1 import InfluxDB1

HOUR = Window(NOON, NOON + timedelta(hours=1))
WEEKS = Window(NOON - timedelta(days=10), NOON + timedelta(days=10))
BASE = ns(NOON)
S = 10**9
M = "device_telemetry"
Make = Callable[..., Reader]


def flux(
    influx: InfluxSimulator, *, org: str = "", bucket: str = "", measurement: str = M, **server: Any
) -> FluxReader:
    given = {"url": influx.url, "token": influx.token, "timeout_seconds": 10.0, **server}
    return FluxReader(Connection(Server(**given)), FluxTarget(org or influx.org, bucket or influx.bucket, measurement))


def influxql(influx: InfluxSimulator, *, database: str = "", measurement: str = M, **server: Any) -> InfluxQlReader:
    given = {"url": influx.url, "token": influx.token, "timeout_seconds": 10.0, **server}
    return InfluxQlReader(Connection(Server(**given)), InfluxQlTarget(database or influx.bucket, "", measurement))


def influxql_without_credentials(url: str, database: str) -> InfluxQlReader:
    return InfluxQlReader(Connection(Server(url)), InfluxQlTarget(database, "", M))


class Waits:
    """Pauses that take no time."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def pause(self, seconds: float) -> None:
        self.seconds.append(seconds)


@pytest.fixture(params=[flux, influxql])
def make(request: pytest.FixtureRequest, influx: InfluxSimulator) -> Make:
    """A reader of either language; settings as keywords."""
    return lambda **more: request.param(influx, **more)


@pytest.fixture
def reader(make: Make) -> Reader:
    return make()


def rows(reader: Reader, device: str = "D1", span: Window = HOUR) -> list[dict[str, Any]]:
    """All rows in order, without what is null; `timestamp` in nanoseconds after noon."""
    tables = list(reader.rows(device, span))
    if not tables:
        return []
    table = ordered(tables)
    plain = table.set_column(0, "timestamp", table.column(0).cast(pa.int64()))
    return [
        {name: value - BASE if name == "timestamp" else value for name, value in row.items() if value is not None}
        for row in plain.to_pylist()
    ]


def digest(reader: Reader, device: str, span: Window, folder: Path) -> str:
    spool = Spool(device, folder, 10**6)
    tables = list(reader.rows(device, span))
    if tables:
        spool.append(ordered(tables))
    return spool.finish({}).digest


LINES = "\n".join(
    [
        *(
            f'{M},device_id=D1,device_type=pump,location=Plant\\ A voltage={200 + n}.5,current={n}i,note="n{n}",'
            f"on={str(n % 2 == 0).lower()},soc={n / 7} {BASE + n * 60 * S + n}"
            for n in range(30)
        ),
        f"{M},device_id=D1,device_type=pump,location=B,firmware=1.2 power=7 {BASE + 60 * S + 1}",
        f"{M},device_id=D1 temperature=21,hour=99,device_type_x=1 {BASE + 7}",
        f'{M},device_id=D1 note="a,\\"b\\" c é 😀 #x\nnew line",power_factor=2 {BASE + 123_456_789}',
        f"{M},device_id=D1 big=9007199254740993i,tiny=0.0000001,huge=1e300 {BASE + 11}",
        f'{M},device_id=D1 note="" {BASE + 13}',
        f'{M},device_id=D1 note="",voltage=1 {BASE + 14}',
        f"{M},device_id=D1 voltage=1 {BASE - 1}",
        f"{M},device_id=D1 voltage=2 {BASE + 3600 * S}",
        f"{M},device_id=D2 voltage=3 {BASE}",
        f"{M},location=A voltage=4 {BASE}",
        f"other,device_id=D1 voltage=5 {BASE}",
    ]
)


def test_the_window_holds_its_start_and_not_its_end_and_nanoseconds_survive(
    influx: InfluxSimulator, reader: Reader
) -> None:
    influx.write(LINES)
    found = [row["timestamp"] for row in rows(reader)]
    assert found[:6] == [0, 7, 11, *found[3:6]]
    assert 123_456_789 in found
    assert 60 * S + 1 in found
    assert all(0 <= at < 3600 * S for at in found)


def test_both_languages_and_a_real_influxdb_1_give_equal_rows(
    influx: InfluxSimulator, influxdb1: InfluxDB1, tmp_path: Path
) -> None:
    influx.write(LINES)
    database = influxdb1.new_database()
    influxdb1.write(database, LINES)
    real = influxql_without_credentials(influxdb1.url, database)
    expected = rows(flux(influx))
    assert len(expected) >= 34
    assert rows(influxql(influx)) == expected
    assert rows(real) == expected
    readers: list[Reader] = [flux(influx), influxql(influx), real]
    assert len({digest(each, "D1", HOUR, tmp_path) for each in readers}) == 1
    assert [each.devices(NOON - timedelta(days=1)) for each in readers] == [["D1", "D2"]] * 3
    assert [each.measurements() for each in readers] == [[M, "other"]] * 3
    for device in (None, "D1"):
        first, *others = (totals(each.counts(device, HOUR, 3600)) for each in readers)
        assert others == [first, first]
        assert first["D1", NOON].points >= 31


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(n, marks=pytest.mark.slow) for n in range(2, 20))])
def test_random_points_are_equal_through_every_reader(
    influx: InfluxSimulator, influxdb1: InfluxDB1, tmp_path: Path, seed: int
) -> None:
    draw = random.Random(seed)  # noqa: S311 - points are no secret
    kinds: dict[str, Callable[[], str]] = {
        "voltage": lambda: f"{draw.choice((draw.uniform(-1e6, 1e6), 5e-324, 1e22, 0.1))!r}",
        "power": lambda: f"{draw.randrange(-(2**62), 2**62)}i",
        "current": lambda: draw.choice(("true", "false")),
        "temperature": lambda: draw.choice(('"21.5"', '"warm"', '""')),
        "note": lambda: draw.choice(('"a"', '"ü, \\"x\\""', '"line\nline"', '"  "')),
        "count": lambda: f"{draw.randrange(10)}i",
        "location_x": lambda: "1.5",
        "hour": lambda: f"{draw.randrange(10)}i",
    }
    lines = []
    for _ in range(300):
        tags = "".join(
            f",{tag}={draw.choice('ab')}" for tag in ("device_type", "firmware", "location") if draw.random() < 0.5
        )
        fields = ",".join(f"{name}={value()}" for name, value in kinds.items() if draw.random() < 0.4) or "count=1i"
        lines.append(
            f"{M},device_id=D{draw.randrange(3)}{tags} {fields} {BASE + draw.randrange(200) * S + draw.randrange(3)}"
        )
    text = "\n".join(lines)
    influx.write(text)
    database = influxdb1.new_database()
    influxdb1.write(database, text)
    readers: list[Reader] = [
        flux(influx),
        influxql(influx),
        influxql_without_credentials(influxdb1.url, database),
    ]
    for device in ("D0", "D1", "D2"):
        first, *others = (rows(each, device) for each in readers)
        assert first
        assert others == [first, first]
        assert len({digest(each, device, HOUR, tmp_path) for each in readers}) == 1
    first_counts, *other_counts = (totals(each.counts(None, HOUR, 600)) for each in readers)
    assert other_counts == [first_counts, first_counts]


def test_a_field_that_changes_its_type_from_one_week_to_the_next_is_read_whole(
    influx: InfluxSimulator, influxdb1: InfluxDB1, tmp_path: Path
) -> None:
    """Over Flux the server refuses to mix them, so that the span is halved until a part has one type."""
    lines = "\n".join(
        [
            f"{M},device_id=D1 voltage=1i,extra=1i,mixed=1i {BASE - 9 * 86_400 * S}",
            f'{M},device_id=D1 voltage=2.5,extra=2.5,mixed="x" {BASE}',
        ]
    )
    influx.write(lines)
    database = influxdb1.new_database()
    influxdb1.write(database, lines)
    readers: tuple[Reader, ...] = (flux(influx), influxql_without_credentials(influxdb1.url, database))
    expected = [
        {"timestamp": -9 * 86_400 * S, "voltage": 1.0, "extra": 1.0, "mixed": "1"},
        {"timestamp": 0, "voltage": 2.5, "extra": 2.5, "mixed": "x"},
    ]
    assert rows(readers[1], span=WEEKS) == expected
    with pytest.raises(QueryTooLarge, match="schema collision"):
        rows(readers[0], span=WEEKS)
    reading = Reading(M, (), 1000, tmp_path)
    sources = [InfluxSource(each, reading, Patience(RetryPolicy(), Waits(), lambda: 0.0)) for each in readers]
    batches = [each.read("D1", WEEKS, Count(6, 2), None) for each in sources]
    assert len({batch.digest for batch in batches}) == 1
    assert [batch.rows for batch in batches] == [2, 2]


def test_fields_named_like_tags_stand_beside_them_in_both_languages(influx: InfluxSimulator) -> None:
    influx.write(f'{M},device_id=D1,device_type=pump location="field",hour=3i {BASE}')
    expected = [{"timestamp": 0, "device_type": "pump", "location_field": "field", "hour_field": 3}]
    assert rows(flux(influx)) == expected
    assert rows(influxql(influx)) == expected


def test_a_real_influxdb_1_keeps_a_field_beside_a_tag_of_its_name(influxdb1: InfluxDB1) -> None:
    database = influxdb1.new_database()
    influxdb1.write(database, f'{M},device_id=D1,location=tag location="field",hour=7 {BASE}')
    real = influxql_without_credentials(influxdb1.url, database)
    assert rows(real) == [{"timestamp": 0, "location": "tag", "location_field": "field", "hour_field": 7.0}]


HOSTILE = [
    'D"1',
    "D\\",
    "D'1",
    "${x}",
    '") |> drop(columns: ["x"])',
    "' OR 1=1 --",
    "a\nb",
    "é€😀",
    "\\${",
    "a\tb",
    "$",
    "\\n",
]


@pytest.mark.parametrize("device", HOSTILE)
def test_hostile_values_are_bound(influx: InfluxSimulator, make: Make, device: str) -> None:
    for name in (device, "D1"):
        for measurement in (M, device):
            influx.points.extend((measurement, (("device_id", name),)), [BASE], {"voltage": [float(len(name))]})
    for measurement in (M, device):
        reader = make(measurement=measurement)
        assert rows(reader, device) == [{"timestamp": 0, "voltage": float(len(device))}]
        assert {one.device for one in reader.counts(device, HOUR, 3600)} == {device}
        assert sorted(reader.devices(NOON)) == sorted([device, "D1"])


@pytest.mark.parametrize("device", ['D"1', "D'1", "${x}", '")|>x', "'OR\\ 1\\=1", "é€😀", "D\\\\x", "D\\x"])
def test_hostile_ids_are_bound_on_a_real_influxdb_1(influxdb1: InfluxDB1, device: str) -> None:
    database = influxdb1.new_database()
    influxdb1.write(database, f"{M},device_id={device},z=1 voltage=1 {BASE}\n{M},device_id=other voltage=2 {BASE}")
    reader = influxql_without_credentials(influxdb1.url, database)
    [name] = [found for found in reader.devices(NOON) if found != "other"]
    assert rows(reader, name) == [{"timestamp": 0, "voltage": 1.0}]
    assert {one.device for one in reader.counts(name, HOUR, 3600)} == {name}


def test_literals_escape_what_would_end_or_fill_them() -> None:
    assert literal('a"\\${x}\n\r\t\0') == '"a\\"\\\\\\${x}\\n\\r\\t\\x00"'
    assert text_literal("a'\\\n") == "'a\\'\\\\\\n'"
    assert identifier('a"\\\n') == '"a\\"\\\\\\n"'
    assert time_literal(NOON) == "2026-02-07T12:00:00Z"
    assert time_literal(NOON + timedelta(microseconds=120)) == "2026-02-07T12:00:00.00012Z"
    assert time_literal(datetime(2026, 10, 10, 10, 10, 10, tzinfo=UTC)) == "2026-10-10T10:10:10Z"


def test_a_device_without_points_and_a_measurement_without_fields_give_nothing(
    influx: InfluxSimulator, make: Make
) -> None:
    assert rows(make()) == []
    influx.write(LINES)
    assert rows(make(), "nobody") == []
    assert rows(make(measurement="none")) == []
    assert list(make(measurement="none").counts(None, HOUR, 60)) == []
    assert list(make(measurement="none").devices(NOON)) == []


def test_ping_says_what_answered(influx: InfluxSimulator, influxdb1: InfluxDB1) -> None:
    assert flux(influx).ping() == f"may read bucket telemetry at {influx.url} by Flux"
    assert influxql(influx).ping() == f"may read database telemetry at {influx.url} by InfluxQL"
    database = influxdb1.new_database()
    ping = influxql_without_credentials(influxdb1.url, database).ping()
    assert ping == f"may read database {database} at {influxdb1.url} by InfluxQL"


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


def test_a_missing_database_is_named_by_the_simulator_and_by_a_real_influxdb_1(
    influx: InfluxSimulator, influxdb1: InfluxDB1
) -> None:
    for reader in (influxql(influx, database="nope"), influxql_without_credentials(influxdb1.url, "nope")):
        with pytest.raises(Permanent, match="database not found: nope") as caught:
            reader.ping()
        assert "INFLUXDB_DATABASE='nope'" in caught.value.hint


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


@pytest.mark.parametrize("status", [400, 403, 404, 405, 413, 422])
def test_other_refusals_are_for_a_person(influx: InfluxSimulator, reader: Reader, status: int) -> None:
    influx.faults.add(Refuse(status, "no"))
    with pytest.raises(Permanent, match=f"answers {status}: no") as caught:
        reader.ping()
    assert "INFLUXDB_" in caught.value.hint


@pytest.mark.parametrize("message", ["memory allocation limit reached: limit 10 bytes", "resource exhausted: x"])
def test_a_refusal_about_memory_asks_for_less(influx: InfluxSimulator, reader: Reader, message: str) -> None:
    influx.faults.add(Refuse(400, message))
    with pytest.raises(QueryTooLarge):
        rows(reader)


def test_a_retry_after_that_is_a_date_is_no_number() -> None:
    error = refusal(Refusal("http://x", 429, "slow", "Wed, 21 Oct 2026 07:28:00 GMT", ""))
    assert isinstance(error, Transient)
    assert error.retry_after_seconds is None


def test_a_server_that_still_starts_is_transient(influx: InfluxSimulator, reader: Reader) -> None:
    influx.starting = True
    with pytest.raises(Transient, match="503"):
        reader.ping()


def test_a_server_that_is_away_is_transient(make: Make) -> None:
    with pytest.raises(Transient, match="cannot be reached"):
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
    assert time.monotonic() - started < 3


@pytest.mark.parametrize("fault", [ForceGzip(), EmptyTable((("device_id", "D1"), ("location", "a,b")))], ids=str)
def test_compression_and_empty_tables_change_nothing(influx: InfluxSimulator, reader: Reader, fault: Fault) -> None:
    influx.write(LINES)
    expected = rows(reader)
    influx.faults.add(fault)
    assert rows(reader) == expected


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
                        while b"\r\n\r\n" not in request or request.endswith(b"\r\n\r\n"):
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
    [b"<html>Sign in</html>", b"{}", b"null", b"[1]", b"\xff\xfe"],
)
def test_another_program_at_the_address_gives_an_error_of_ours(make: Make, body: bytes) -> None:
    head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(body) + 1}\r\n\r\n".encode()
    with answering(head + body + b"\n") as url:
        reader = make(url=url)
        for question in (
            lambda: list(reader.counts(None, HOUR, 60)),
            lambda: rows(reader),
            reader.measurements,
        ):
            with pytest.raises(AppError):
                question()


@pytest.fixture
def waits() -> Waits:
    return Waits()


@pytest.fixture
def source(reader: Reader, waits: Waits, tmp_path: Path) -> InfluxSource:
    reading = Reading(M, (), 1000, tmp_path / "spool")
    return InfluxSource(reader, reading, Patience(RetryPolicy(), waits, lambda: 0.5))


def test_what_may_pass_is_tried_again_and_a_server_that_asks_for_time_gets_it(
    influx: InfluxSimulator, source: InfluxSource, waits: Waits
) -> None:
    influx.write(LINES)
    influx.faults.add(Refuse(429, "slow", retry_after_seconds=3))
    influx.faults.add(Refuse(400, "queue length exceeded"))
    influx.faults.add(Cut(3))
    batch = source.read("D1", HOUR, Count(1, 1), None)
    assert batch.rows >= 34
    assert waits.seconds == [3.0, 0.2, 0.4]


def test_what_does_not_pass_is_given_up_after_a_few_attempts(
    influx: InfluxSimulator, source: InfluxSource, waits: Waits
) -> None:
    influx.write(LINES)
    influx.faults.add(ErrorTable(3), times=100)
    with pytest.raises(Transient, match="unexpected EOF"):
        source.read("D1", HOUR, Count(1, 1), None)
    assert len(waits.seconds) == 3
    assert len(influx.faults) == 96


def test_a_window_that_the_server_finds_too_large_is_halved_until_it_fits(
    influx: InfluxSimulator, source: InfluxSource, waits: Waits
) -> None:
    influx.write(LINES)
    whole = source.read("D1", HOUR, Count(1, 1), None)
    for end in ("13:00:00Z", "12:30:00Z", "2026-02-07T13:00:00Z"):
        influx.faults.add(Refuse(400, "memory allocation limit reached"), when=lambda text: "COUNT" not in text)
        assert end
    halved = source.read("D1", HOUR, Count(1, 1), None)
    assert len(influx.faults) == 0
    assert (halved.rows, halved.digest) == (whole.rows, whole.digest)
    assert waits.seconds == []


def test_a_server_that_finds_everything_too_large_is_for_a_person(
    influx: InfluxSimulator, source: InfluxSource
) -> None:
    influx.write(LINES)
    influx.faults.add(Refuse(400, "memory allocation limit reached"), times=1000)
    with pytest.raises(QueryTooLarge):
        source.read("D1", HOUR, Count(1, 1), None)


def test_fewer_rows_than_were_counted_are_an_error(influx: InfluxSimulator, source: InfluxSource) -> None:
    influx.write(LINES)
    counted = source.counts("D1", [HOUR])["D1", NOON]
    assert source.read("D1", HOUR, counted, None).rows >= counted.points
    with pytest.raises(Transient, match="had counted"):
        source.read("D1", HOUR, Count(1000, 100), None)


def test_a_surge_between_counting_and_reading_is_read_in_parts(influx: InfluxSimulator, tmp_path: Path) -> None:
    number = 66_000
    times = [BASE + n * 5 * 10**7 for n in range(number)]
    influx.points.extend((M, (("device_id", "D1"),)), times, {"voltage": [1.0] * number})
    reading = Reading(M, (), 1000, tmp_path)
    batch = InfluxSource(flux(influx), reading, Patience(RetryPolicy(), Waits(), lambda: 0.0)).read(
        "D1", HOUR, Count(10, 10), None
    )
    batch.close()
    assert batch.rows == number
    assert len(influx.queries) == 3
    assert list(tmp_path.iterdir()) == []


def test_a_series_without_values_holds_nothing() -> None:
    body = b'{"results":[{"statement_id":0,"series":[{"name":"m","columns":["fieldKey","fieldType"]}]}]}\n'
    with answering(
        f"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
    ) as url:
        reader = influxql_without_credentials(url, "db")
        assert list(reader.measurements()) == []
        assert list(reader.rows("D1", HOUR)) == []
