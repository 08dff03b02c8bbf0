"""How a table is read: against moto, an independent DynamoDB; and what is decided from DescribeTable."""

import json
from collections.abc import Iterator
from contextlib import closing
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import boto3
import pytest
from moto.server import ThreadedMotoServer
from pydantic import SecretStr

from app.config.settings import DynamoSettings
from app.core.errors import Permanent, Transient
from app.core.pipeline import UNCOUNTED
from app.core.runs import Stop
from app.core.windows import Window
from app.dynamo_to_drive.accounts import Accounts
from app.dynamo_to_drive.rows import items_of
from app.dynamo_to_drive.source import DynamoSource
from app.dynamo_to_drive.table import AccessPath, DynamoTable, plan_of
from fault_proxy import FaultProxy, answer, lose_answer
from shipping import START, shipping

KEYS = {"aws_access_key_id": "a", "aws_secret_access_key": "b", "region_name": "us-east-1"}
HOUR = Window(START, START + timedelta(hours=1))


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    server = ThreadedMotoServer(port=0)
    server.start()
    yield server.get_host_and_port()[1]
    server.stop()


def make_table(port: int, name: str, key: tuple[str, ...], types: str, **more: Any) -> Any:
    client = boto3.client("dynamodb", endpoint_url=f"http://127.0.0.1:{port}", **KEYS)
    client.create_table(
        TableName=name,
        KeySchema=[
            {"AttributeName": each, "KeyType": kind} for each, kind in zip(key, ("HASH", "RANGE"), strict=False)
        ],
        AttributeDefinitions=[
            {"AttributeName": each, "AttributeType": letter}
            for each, letter in zip((*key, *more.pop("others", ())), types, strict=True)
        ],
        BillingMode="PAY_PER_REQUEST",
        **more,
    )
    return client


def described(table: str, timestamp: str, values: tuple[str, ...], scan_max_bytes: int) -> DynamoSettings:
    return DynamoSettings.model_validate(
        {
            "DYNAMODB_TABLE_NAME": table,
            "DYNAMODB_TIMESTAMP_ATTRIBUTE": timestamp,
            "DYNAMODB_PARTITION_VALUES": ",".join(values),
            "DYNAMODB_SCAN_MAX_BYTES": str(scan_max_bytes),
        }
    )


def at(port: int, wanted: DynamoSettings, unit: str) -> DynamoSettings:
    keys = {"access_key_id": SecretStr("a"), "secret_access_key": SecretStr("b")}
    return wanted.model_copy(update={"timestamp_unit": unit, "endpoint_url": f"http://127.0.0.1:{port}", **keys})


def text_of(port: int, wanted: DynamoSettings, unit: str = "s") -> str:
    table = DynamoTable(at(port, wanted, unit))
    try:
        source = DynamoSource(table, "p", Stop(), accounts=Accounts(wanted.timestamp_attribute), now=HOUR.end)
        hour = source.read("p", HOUR, UNCOUNTED, None)
        with hour.file:
            return hour.file.read().decode()
    finally:
        table.close()


def test_a_query_of_the_key_reads_every_page_of_the_hour_and_no_more(port: int) -> None:
    client = make_table(port, "paged", ("static_partition", "datetime_utc"), "SS")
    for number in range(5):
        for hour in ("11", "12", "13"):
            at = f"2026-02-07T{hour}:00:0{number}Z"
            row = {"static_partition": {"S": "data"}, "datetime_utc": {"S": at}, "note": {"S": "x" * 300_000}}
            client.put_item(TableName="paged", Item=row)
    client.close()
    lines = text_of(port, described("paged", "datetime_utc", (), 0)).splitlines()
    assert [line[:20] for line in lines[1:]] == [f"2026-02-07T12:00:0{number}Z" for number in range(5)]


def test_every_read_unit_that_the_table_reports_is_counted(port: int) -> None:
    client = make_table(port, "charged", ("device", "at"), "SS")
    for second in range(3):
        item = {"device": {"S": "d1"}, "at": {"S": f"2026-02-07T12:00:0{second}Z"}, "note": {"S": "x" * 300_000}}
        client.put_item(TableName="charged", Item=item)
    spent = list[float]()
    target = at(port, described("charged", "at", ("d1",), 0), "s")
    with closing(DynamoTable(target, spent.append)) as table:
        page = partial(client.query, TableName="charged", ReturnConsumedCapacity="TOTAL")
        asked = {"KeyConditionExpression": "device = :d", "ExpressionAttributeValues": {":d": {"S": "d1"}}}
        table.call("query", TableName="charged", **asked)
        reported = page(**asked)["ConsumedCapacity"]["CapacityUnits"]
    client.close()
    assert spent == [reported]
    assert reported > 0


def test_a_numeric_sort_key_includes_the_start_and_not_the_end_of_the_hour(port: int) -> None:
    client = make_table(port, "numbers", ("device", "at"), "SN")
    first = int(START.timestamp()) * 1000
    for at in (first - 1, first, first + 3_599_999, first + 3_600_000):
        client.put_item(TableName="numbers", Item={"device": {"S": "d1"}, "at": {"N": str(at)}})
    client.close()
    text = text_of(port, described("numbers", "at", ("d1",), 0), "ms")
    assert text == f"at\r\n{first}\r\n{first + 3_599_999}\r\n"


def test_an_index_with_everything_is_queried_for_each_partition_value(port: int) -> None:
    index = {
        "IndexName": "by_time",
        "KeySchema": [{"AttributeName": "d", "KeyType": "HASH"}, {"AttributeName": "at", "KeyType": "RANGE"}],
        "Projection": {"ProjectionType": "ALL"},
    }
    client = make_table(port, "indexed", ("id",), "SSS", others=("d", "at"), GlobalSecondaryIndexes=[index])
    for number, device in enumerate(("b", "a", "c")):
        at = {"S": "2026-02-07 12:00:00.5+00:00"}
        client.put_item(TableName="indexed", Item={"id": {"S": str(number)}, "d": {"S": device}, "at": at})
    client.close()
    text = text_of(port, described("indexed", "at", ("a", "b"), 0))
    assert text == "at,d,id\r\n2026-02-07 12:00:00.5+00:00,b,0\r\n2026-02-07 12:00:00.5+00:00,a,1\r\n"


def test_a_scan_finds_text_and_numbers_in_order(port: int) -> None:
    client = make_table(port, "scanned", ("id",), "S")
    for number in range(40):
        at = {"S": f"2026-02-07T12:00:{39 - number:02d}Z"}
        client.put_item(TableName="scanned", Item={"id": {"S": str(number)}, "at": at})
    client.close()
    lines = text_of(port, described("scanned", "at", (), 1 << 30)).splitlines()
    assert lines[0] == "at,id"
    assert lines[1:] == sorted(lines[1:])
    assert len(lines) == 41


def test_a_table_above_the_limit_is_not_scanned() -> None:
    table = {
        "KeySchema": [{"AttributeName": "id", "KeyType": "HASH"}],
        "AttributeDefinitions": [{"AttributeName": "id", "AttributeType": "S"}],
        "TableSizeBytes": 2,
    }
    with pytest.raises(Permanent, match="can only be scanned"):
        plan_of(table, described("t", "at", (), 1))


def test_a_missing_table_is_one_clear_line(port: int) -> None:
    with pytest.raises(Permanent) as refused:
        text_of(port, described("missing", "at", (), 0))
    assert "DYNAMODB_TABLE_NAME" in refused.value.hint


def test_throttling_and_lost_answers_are_waited_for_and_an_outage_is_transient(port: int) -> None:
    client = make_table(port, "faulty", ("static_partition", "datetime_utc"), "SS")
    row = {"static_partition": {"S": "data"}, "datetime_utc": {"S": "2026-02-07T12:00:00Z"}}
    client.put_item(TableName="faulty", Item=row)
    client.close()
    slow = b'{"__type":"com.amazonaws.dynamodb.v20120810#ThrottlingException","message":"slow down"}'
    with FaultProxy("127.0.0.1", port) as proxy:
        proxy.add(answer(400, slow))
        proxy.add(lose_answer())
        assert len(text_of(proxy.port, described("faulty", "datetime_utc", (), 0)).splitlines()) == 2
        proxy.add(answer(500), times=50)
        with pytest.raises(Transient):
            text_of(proxy.port, described("faulty", "datetime_utc", (), 0))


@pytest.mark.parametrize("body", [b"{}", b"<html>a proxy</html>", b'{"Items":5,"Count":0}'])
def test_an_answer_of_something_else_is_not_an_empty_hour(port: int, body: bytes) -> None:
    with FaultProxy("127.0.0.1", port) as proxy:
        proxy.add(answer(200, body), times=5)
        with pytest.raises(Transient) as refused:
            text_of(proxy.port, described("any", "at", (), 0))
    assert "DYNAMODB_ENDPOINT_URL" in refused.value.hint


def test_an_empty_key_to_go_on_from_ends_a_listing_and_an_empty_page_with_a_key_does_not(port: int) -> None:
    def page(last: dict[str, Any], *at: str) -> bytes:
        items = [{"id": {"S": each}} for each in at]
        return json.dumps({"Items": items, "Count": len(at), "ScannedCount": 1, "LastEvaluatedKey": last}).encode()

    with FaultProxy("127.0.0.1", port) as proxy:
        table = DynamoTable(at(proxy.port, described("any", "at", (), 0), "s"))
        for body in (page({"id": {"S": "0"}}), page({"id": {"S": "1"}}, "1"), page({}, "2")):
            proxy.add(answer(200, body))
        found = [items_of(taken) for taken in table.pages("scan", {"TableName": "any"}, Stop())]
        table.close()
    assert [[item["id"].S for item in each] for each in found] == [[], ["1"], ["2"]]


def test_wrong_keys_are_one_clear_line_and_the_cursor_stays(tmp_path: Path) -> None:
    with shipping(tmp_path) as ship:
        ship.extra["AWS_ACCESS_KEY_ID"] = "wrong"
        with pytest.raises(Permanent) as refused:
            ship.run()
        assert "AWS_ACCESS_KEY_ID" in refused.value.hint
        cursors = ship.checkpoints.cursors("dynamo_to_drive")
        del ship.extra["AWS_ACCESS_KEY_ID"]
        ship.run()
        assert ship.checkpoints.cursors("dynamo_to_drive").keys() == cursors.keys()
        assert ship.checkpoints.errors == {}


def test_six_new_rows_among_twenty_thousand_cost_a_page_for_each_writing_and_a_look_around_once_an_hour(
    tmp_path: Path,
) -> None:
    with shipping(tmp_path) as ship:
        ship.put_rows(START - timedelta(hours=30), 20_000)
        ship.put_rows(START, 6)
        ship.now = START + timedelta(minutes=30)
        ship.extra["DRIVE_CATCHUP_HOURS"] = "0"
        ship.run()
        looked = ship.dynamo.read_units
        assert looked <= 20  # nothing is in the fourteen hours around
        ship.put_rows(START + timedelta(minutes=1), 6)
        ship.run()
        assert ship.dynamo.read_units - looked <= 4  # the newest row; T, blank, numbers
        assert len(ship.text("locness_data_20260207_12.csv").splitlines()) == 13


@pytest.mark.parametrize(
    ("index", "scans"),
    [
        ({}, False),
        ({"IndexStatus": "CREATING"}, True),
        ({"Backfilling": True}, True),
        ({"Projection": {"ProjectionType": "KEYS_ONLY"}}, True),
        ({"KeySchema": [{"AttributeName": "at", "KeyType": "HASH"}]}, True),
    ],
)
def test_only_an_active_complete_index_on_the_timestamp_serves(index: dict[str, Any], scans: bool) -> None:  # noqa: FBT001
    schema = [{"AttributeName": "d", "KeyType": "HASH"}, {"AttributeName": "at", "KeyType": "RANGE"}]
    one = {"IndexName": "i", "KeySchema": schema, "IndexStatus": "ACTIVE", "Projection": {"ProjectionType": "ALL"}}
    table = {
        "KeySchema": [{"AttributeName": "id", "KeyType": "HASH"}],
        "AttributeDefinitions": [{"AttributeName": name, "AttributeType": "S"} for name in ("id", "d", "at")],
        "GlobalSecondaryIndexes": [{**one, **index}],
    }
    plan: AccessPath = plan_of(table, described("t", "at", ("x",), 1))
    assert plan.scans is scans
    assert plan.consistent is scans
