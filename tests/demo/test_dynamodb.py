"""The simulated DynamoDB, sentence by sentence of contracts/dynamodb.md, through the real SDK."""

from collections.abc import Iterator
from contextlib import closing
from typing import Any

import boto3
import pytest
from botocore.config import Config
from botocore.exceptions import ClientError

from simulators.dynamodb import DynamoSimulator, DynamoTable

NAMES = {"#p": "pk", "#t": "at"}
UNIT = 4096


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    tables = [DynamoTable(name, ("pk", "at"), ("S", "N")) for name in ("t", "large")]
    with DynamoSimulator(tables) as dynamo:
        for number in range(10):
            kind = "odd" if number % 2 else "even"
            row = {"pk": {"S": "a"}, "at": {"N": str(number)}, "kind": {"S": kind}}
            dynamo.put("t", [row, {**row, "pk": {"S": "b"}}])
            dynamo.put("large", [{**row, "body": {"S": "x" * 300_000}}])
        keys = {"aws_access_key_id": dynamo.access_key_id, "aws_secret_access_key": "x"}
        config = Config(retries={"total_max_attempts": 1})
        with closing(
            boto3.client("dynamodb", region_name="us-east-1", endpoint_url=dynamo.url, config=config, **keys)
        ) as made:
            yield made


def query(client: Any, condition: str, values: dict[str, str], **more: Any) -> Any:
    given = {name: {"S" if name == ":p" else "N": value} for name, value in values.items()}
    more = {"TableName": "t", "ExpressionAttributeNames": NAMES, **more}
    given |= more.pop("others", {})
    used = {name: each for name, each in more["ExpressionAttributeNames"].items() if name in condition + str(more)}
    more["ExpressionAttributeNames"] = used
    return client.query(KeyConditionExpression=condition, ExpressionAttributeValues=given, **more)


def ats(page: Any) -> list[int]:
    return [int(item["at"]["N"]) for item in page["Items"]]


def test_a_query_reads_one_partition_by_number_in_order_and_between_has_both_ends(client: Any) -> None:
    between = {":p": "a", ":low": "2", ":high": "4"}
    assert ats(query(client, "#p = :p AND #t BETWEEN :low AND :high", between)) == [2, 3, 4]
    assert ats(query(client, "#p = :p AND #t >= :low", {":p": "a", ":low": "8"})) == [8, 9]
    assert ats(query(client, "#p = :p", {":p": "b"}, ScanIndexForward=False, Limit=3)) == [9, 8, 7]
    assert query(client, "#p = :p", {":p": "nobody"})["Items"] == []


def test_a_limit_counts_what_was_read_and_the_key_of_a_full_page_may_lead_to_an_empty_one(client: Any) -> None:
    first = query(client, "#p = :p", {":p": "a"}, Limit=10)
    assert (len(first["Items"]), first["LastEvaluatedKey"]) == (10, {"pk": {"S": "a"}, "at": {"N": "9"}})
    last = query(client, "#p = :p", {":p": "a"}, Limit=10, ExclusiveStartKey=first["LastEvaluatedKey"])
    assert (last["Items"], "LastEvaluatedKey" in last) == ([], False)


def test_a_filter_comes_after_the_page_and_saves_neither_reads_nor_pages(client: Any) -> None:
    names, others = {**NAMES, "#k": "kind"}, {":k": {"S": "odd"}}
    asked = {"ExpressionAttributeNames": names, "others": others, "ReturnConsumedCapacity": "TOTAL"}
    page = query(client, "#p = :p", {":p": "a"}, FilterExpression="#k = :k", Limit=1, **asked)
    assert (page["Items"], page["Count"], page["ScannedCount"]) == ([], 0, 1)
    assert "LastEvaluatedKey" in page
    whole = query(client, "#p = :p", {":p": "a"}, FilterExpression="#k = :k", **asked)
    assert (ats(whole), whole["ScannedCount"]) == ([1, 3, 5, 7, 9], 10)
    assert whole["ConsumedCapacity"]["CapacityUnits"] == 0.5
    assert "ConsumedCapacity" not in query(client, "#p = :p", {":p": "a"})


def test_a_page_ends_at_one_megabyte_and_costs_its_bytes_in_units_of_four_kilobytes(client: Any) -> None:
    seen: list[int] = []
    more: dict[str, Any] = {}
    pages = 0
    while True:
        asked = {"TableName": "large", "ReturnConsumedCapacity": "TOTAL", "ConsistentRead": True, **more}
        page = query(client, "#p = :p", {":p": "a"}, **asked)
        pages += 1
        read_bytes = 300_000 * len(page["Items"])
        assert read_bytes < (1 << 20) + 300_000
        assert abs(page["ConsumedCapacity"]["CapacityUnits"] - read_bytes / UNIT) < 2
        seen += ats(page)
        if "LastEvaluatedKey" not in page:
            break
        more = {"ExclusiveStartKey": page["LastEvaluatedKey"]}
    assert (seen, pages) == (list(range(10)), 3)


def test_the_segments_of_a_scan_are_all_of_the_table_once(client: Any) -> None:
    found = [
        (item["pk"]["S"], item["at"]["N"])
        for segment in range(3)
        for page in client.get_paginator("scan").paginate(TableName="t", Segment=segment, TotalSegments=3, Limit=2)
        for item in page["Items"]
    ]
    assert sorted(found) == sorted((key, str(number)) for key in "ab" for number in range(10))


@pytest.mark.parametrize(
    ("asked", "code"),
    [
        ({"TableName": "missing"}, "ResourceNotFoundException"),
        ({"IndexName": "missing"}, "ValidationException"),
        ({"KeyConditionExpression": "#t = :p"}, "ValidationException"),
        ({"FilterExpression": "#t = :p"}, "ValidationException"),
        ({"KeyConditionExpression": "#p = :p AND contains(#t, :p)"}, "ValidationException"),
        ({"KeyConditionExpression": "#p = :undefined"}, "ValidationException"),
    ],
)
def test_what_the_service_refuses_is_refused(client: Any, asked: dict[str, str], code: str) -> None:
    good = {
        "TableName": "t",
        "KeyConditionExpression": "#p = :p",
        "ExpressionAttributeNames": NAMES,
        "ExpressionAttributeValues": {":p": {"S": "a"}},
    }
    with pytest.raises(ClientError) as refused:
        client.query(**{**good, **asked})
    assert refused.value.response["Error"]["Code"] == code
