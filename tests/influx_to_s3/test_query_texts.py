"""Every text that the readers can send, over hostile names: Flux by InfluxData's own checker, InfluxQL by a server."""

import json
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from app.core.windows import Window
from app.influx_to_s3.flux import FluxReader
from app.influx_to_s3.influxql import InfluxQlReader, identifier
from app.influx_to_s3.reader import InfluxConnection, Reader, ServerAnswer
from exporter import NOON
from influx_readers import values
from influxdb1 import InfluxDB1
from needs import needs, needs_node_package

Check = Callable[[str], bool]
DAY = Window(NOON, NOON + timedelta(days=1, microseconds=5))
EVER = Window(datetime(1, 1, 1, tzinfo=UTC), datetime(9999, 1, 1, tzinfo=UTC))
NASTY = st.text(st.sampled_from("a\"'\\${}\n\r\t\0 ,;=|>-/*.:é😀\u2028\x7f"), max_size=8)
WORDS = st.sampled_from(["if", "exists", "and", "r", "_", "device_id", "_time", "true", "null", "import", "9x", "${x}"])
NAMES = NASTY | WORDS | st.text(max_size=5)
NAMED = NAMES.filter(bool)
WRITABLE = NAMED.map(lambda text: text.replace("\0", "0").replace("\r", "r"))
POLICIES = st.text(st.sampled_from("a\"' $é,;=*:-"), min_size=1, max_size=5)  # others are no valid name to a server


class Recording(InfluxConnection):
    """Answers every question with nothing and keeps its Flux text."""

    def __init__(self) -> None:
        super().__init__("http://127.0.0.1:9")
        self.texts: list[str] = []

    @contextmanager
    def ask(self, path: str, body: bytes | None, headers: Mapping[str, str], where: str) -> Iterator[ServerAnswer]:
        assert path
        assert where
        assert body is None or headers
        if body is not None:
            self.texts.append(json.loads(body)["query"])
        yield ServerAnswer(iter([b"{}" if body is None else b"\r\n"]), framed=True)


@pytest.fixture(scope="module")
def is_valid_flux() -> Iterator[Check]:
    """Asks the checker, which runs as long as the tests of this file."""
    node, package = needs("node"), needs_node_package("@influxdata/flux-lsp-node")
    script = Path(__file__).with_name("flux_checker.cjs")
    with subprocess.Popen(
        [node, script, package], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8"
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        stdin, stdout = process.stdin, process.stdout

        def check(text: str) -> bool:
            stdin.write(f"{json.dumps(text)}\n")
            stdin.flush()
            return {"true\n": True, "false\n": False}[stdout.readline()]

        yield check
        stdin.close()


def ask_everything(reader: Reader, device: str, field: str) -> None:
    reader.ping()
    reader.devices(NOON)
    reader.devices(EVER.start)
    for one in (None, "", device):
        list(reader.counts(one, DAY, 3600))
    for one in ("", device):
        list(reader.sums(one, DAY, 3600, [field, device]))
        values(reader.rows(one, DAY))
        values(reader.empty_texts(one, DAY, field))
    list(reader.outside(EVER))
    reader.inventory()


@given(bucket=NAMES, measurement=NAMES, tag=NAMED, device=NAMED, field=NAMED)
@example(bucket="b", measurement="m", tag="device_id", device="D1", field="v")
@example(bucket="$\\", measurement='$"', tag="$\\", device='$"', field="$\n")
@settings(max_examples=30, deadline=None)
def test_every_flux_text_passes_the_check_of_influxdata(
    is_valid_flux: Check, *, bucket: str, measurement: str, tag: str, device: str, field: str
) -> None:
    connection = Recording()
    reader = FluxReader(connection, org="o", bucket=bucket, measurement=measurement, device_tag=tag)
    ask_everything(reader, device, field)
    assert len(connection.texts) >= 18
    for text in connection.texts:
        assert is_valid_flux(text), text


def test_the_check_tells_wrong_texts(is_valid_flux: Check) -> None:
    for text in ('from(bucket: "b") |> nothing()', 'from(bucket: "b"', "from(bucket: 1) |> range(start: -1m)"):
        assert not is_valid_flux(text)


@given(measurement=NAMED, tag=WRITABLE, device=NAMED, policy=POLICIES)
@example(measurement="m", tag="device_id", device="D1", policy="autogen")
@settings(max_examples=15, deadline=None)
def test_every_influxql_text_is_understood_by_a_real_influxdb_1(
    influxdb1: InfluxDB1, measurement: str, tag: str, device: str, policy: str
) -> None:
    database = influxdb1.new_database()
    connection = InfluxConnection(influxdb1.url)
    if policy != "autogen":
        influxdb1.query(f'CREATE RETENTION POLICY {identifier(policy)} ON "{database}" DURATION INF REPLICATION 1')
    for retention_policy in ("", policy):
        reader = InfluxQlReader(
            connection, database=database, retention_policy=retention_policy, measurement=measurement, device_tag=tag
        )
        ask_everything(reader, device, "field")
        assert reader.inventory().has_points is False


@pytest.mark.parametrize("field", ["a b", 'a"b', "a\\b", "é", "a\rb", "a\0b", "::float", "*", "$x", ";", "\x7f"])
def test_every_field_can_be_asked_of_a_real_influxdb_1(influxdb1: InfluxDB1, field: str) -> None:
    database = influxdb1.new_database()
    name = field.replace(" ", "\\ ")
    influxdb1.write(database, f"m,device_id=D1 {name}=1.5 {int(NOON.timestamp()) * 10**9}")
    reader = InfluxQlReader(InfluxConnection(influxdb1.url), database=database, retention_policy="", measurement="m")
    assert [(one[2], one[3]) for one in values(reader.rows("D1", DAY))] == [(field, "1.5")]
    ask_everything(reader, "D1", field)
