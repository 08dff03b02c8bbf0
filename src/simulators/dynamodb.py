"""In-process DynamoDB simulator for the demo: tables with keys, Query, Scan, BatchWriteItem.

Invariants: it speaks the JSON 1.0 protocol of contracts/dynamodb.md to the unmodified SDK; page size is counted before
the filter; it refuses what it does not understand.
"""

import json
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from threading import Lock
from typing import Any

from simulators.http_server import Answer, Request, Simulator

COMPARISON = re.compile(r"\s*(#\w+)\s*(?:(<=|>=|=|<|>)\s*(:\w+)|BETWEEN\s+(:\w+)\s+AND\s+(:\w+))\s*(?:AND\b(?=\s*#)|$)")
Item = dict[str, dict[str, Any]]
Holds = Callable[[Item], bool]


class NotUnderstood(Exception):
    """The expression is not supported."""


def condition(text: str, request: Mapping[str, Any]) -> Holds:
    """The predicate of comparisons joined by AND. Raises NotUnderstood, and KeyError for an unknown placeholder."""
    names, values = request.get("ExpressionAttributeNames", {}), request.get("ExpressionAttributeValues", {})
    tests: list[tuple[str, str, Mapping[str, Any]]] = []
    at = 0
    while at < len(text) or not tests:
        found = COMPARISON.match(text, at)
        if found is None:
            raise NotUnderstood(text[at:])
        name, operator, value, low, high = found.groups()
        bounds = [(operator, value)] if operator else [(">=", low), ("<=", high)]
        tests += [(names[name], sign, values[bound]) for sign, bound in bounds]
        at = found.end()
    return lambda item: all(_compare(sign, item.get(name), value) for name, sign, value in tests)


COMPARED: Mapping[str, Callable[[Any, Any], bool]] = {
    "=": lambda one, other: bool(one == other),
    "<": lambda one, other: bool(one < other),
    "<=": lambda one, other: bool(one <= other),
    ">": lambda one, other: bool(one > other),
    ">=": lambda one, other: bool(one >= other),
}


def sortable(value: Mapping[str, Any]) -> Any:
    """The sort key of a key's value: numbers by size, text by its bytes."""
    if "N" in value:
        return Decimal(value["N"])
    return str(value.get("S", value.get("B", ""))).encode()


def _compare(operator: str, value: Mapping[str, Any] | None, other: Mapping[str, Any]) -> bool:
    """Values of different types are never equal, and neither sorts before the other."""
    if value is None or value.keys() != other.keys():
        return False
    return COMPARED[operator](sortable(value), sortable(other))


PAGE_BYTES = 1 << 20
UNIT_BYTES = 4096
EQUAL = re.compile(r"(#\w+)\s*=\s*:")
NAME = re.compile(r"#\w+")
MISSING = "ResourceNotFoundException"
INVALID = "ValidationException"


class DynamoError(Exception):
    """An error of the protocol: code and message."""


@dataclass(slots=True)
class DynamoTable:
    """Items by key. `key` and `types` are the names of the key attributes, hash key first, and their type letters."""

    name: str
    key: tuple[str, ...]
    types: tuple[str, ...]
    items: dict[tuple[Any, ...], Item] = field(default_factory=dict)
    size_bytes: int = 0

    def put(self, item: Item) -> None:
        """Insert or replace. Raises DynamoError when the key is missing or has another type."""
        for name, letter in zip(self.key, self.types, strict=True):
            if letter not in item.get(name, {}):
                raise DynamoError(
                    INVALID, f"One or more parameter values were invalid: Missing the key {name} in the item"
                )
        key = tuple(sortable(item[name]) for name in self.key)
        self.size_bytes += _size(item) - (_size(self.items[key]) if key in self.items else 0)
        self.items[key] = item

    def description(self) -> dict[str, Any]:
        """The answer of DescribeTable."""
        kinds = ("HASH", "RANGE")
        schema = [{"AttributeName": name, "KeyType": kind} for name, kind in zip(self.key, kinds, strict=False)]
        types = zip(self.key, self.types, strict=True)
        return {
            "TableName": self.name,
            "TableStatus": "ACTIVE",
            "KeySchema": schema,
            "AttributeDefinitions": [{"AttributeName": name, "AttributeType": letter} for name, letter in types],
            "ItemCount": len(self.items),
            "TableSizeBytes": self.size_bytes,
            "BillingModeSummary": {"BillingMode": "PAY_PER_REQUEST"},
        }


class DynamoSimulator(Simulator):
    """Some tables under one access key."""

    def __init__(self, tables: Sequence[DynamoTable]) -> None:
        super().__init__()
        self.access_key_id = "demo"
        self.secret_access_key = "demo-secret"  # noqa: S105 - a simulator on loopback; signatures are not checked
        self.read_units = 0.0
        self.refuses_to_go_on = ""  # error code for every page after the first
        self._tables: dict[str, DynamoTable] = {}
        self._lock = Lock()
        for table in tables:
            self.make(table)
        self._operations: Mapping[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
            "DescribeTable": lambda asked: {"Table": self._table(asked).description()},
            "BatchWriteItem": self._write_batch,
            "Query": self._query,
            "Scan": self._scan,
        }

    def make(self, table: DynamoTable) -> None:
        """Create a table, replacing any of the same name."""
        with self._lock:
            self._tables[table.name] = table

    def put(self, table: str, items: Sequence[Item]) -> None:
        """Write items without HTTP."""
        with self._lock:
            for item in items:
                self._tables[table].put(item)

    def respond(self, request: Request) -> Answer:
        """The answer to any operation."""
        operation = request.headers.get("x-amz-target", "").rpartition(".")[2]
        try:
            if f"Credential={self.access_key_id}/" not in request.headers.get("authorization", ""):
                return _refusal("UnrecognizedClientException", "The security token included in the request is invalid.")
            if operation not in self._operations:
                return _refusal("UnknownOperationException", operation)
            with self._lock:
                return _answer(200, self._operations[operation](json.loads(request.body)))
        except DynamoError as refused:
            return _refusal(*refused.args)
        except (NotUnderstood, KeyError) as error:
            return _refusal(INVALID, f"not understood: {error}")

    def _table(self, asked: Mapping[str, Any]) -> DynamoTable:
        table = self._tables.get(asked["TableName"])
        if table is None:
            raise DynamoError(MISSING, f"Requested resource not found: Table: {asked['TableName']} not found")
        return table

    def _write_batch(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        for name, requests in asked["RequestItems"].items():
            for request in requests:
                self._table({"TableName": name}).put(request["PutRequest"]["Item"])
        return {"UnprocessedItems": {}}

    def _query(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        if "IndexName" in asked:
            raise DynamoError(INVALID, f"The table does not have the specified index: {asked['IndexName']}")
        table, names = self._table(asked), asked.get("ExpressionAttributeNames", {})
        if table.key[0] not in (names[each] for each in EQUAL.findall(asked["KeyConditionExpression"])):
            raise DynamoError(INVALID, f"Query condition missed key schema element: {table.key[0]}")
        for name in NAME.findall(asked.get("FilterExpression", "")):
            if names[name] in table.key:
                raise DynamoError(
                    INVALID, f"Filter Expression can only contain non-primary key attributes: {names[name]}"
                )
        holds = condition(asked["KeyConditionExpression"], asked)
        found = [(key, item) for key, item in table.items.items() if holds(item)]
        found.sort(key=lambda each: each[0], reverse=not asked.get("ScanIndexForward", True))
        return self._page(table, asked, found)

    def _scan(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        table, segments = self._table(asked), asked.get("TotalSegments", 1)
        found = sorted(table.items.items(), key=lambda each: _scattered(each[0]))
        mine = [each for each in found if _scattered(each[0]) % segments == asked.get("Segment", 0)]
        return self._page(table, asked, mine)

    def _page(
        self, table: DynamoTable, asked: Mapping[str, Any], found: Sequence[tuple[tuple[Any, ...], Item]]
    ) -> dict[str, Any]:
        """Items from the start key on, up to the page size; the filter is applied afterwards."""
        start = asked.get("ExclusiveStartKey")
        if start is not None and self.refuses_to_go_on:
            raise DynamoError(self.refuses_to_go_on, "slow down")
        if start is not None:
            after = tuple(sortable(start[name]) for name in table.key)
            found = found[next((at for at, (key, _) in enumerate(found, 1) if key == after), len(found)) :]
        read, size_bytes, limit, full = 0, 0, asked.get("Limit"), False
        while read < len(found) and not full:
            size_bytes += _size(found[read][1])
            read += 1
            full = read == limit or size_bytes >= PAGE_BYTES
        holds = condition(asked["FilterExpression"], asked) if "FilterExpression" in asked else None
        items = [item for _, item in found[:read] if holds is None or holds(item)]
        units = max(1, -(-size_bytes // UNIT_BYTES)) * (1.0 if asked.get("ConsistentRead") else 0.5)
        self.read_units += units
        page: dict[str, Any] = {"Items": items, "Count": len(items), "ScannedCount": read}
        if asked.get("ReturnConsumedCapacity", "NONE") != "NONE":
            page["ConsumedCapacity"] = {"TableName": table.name, "CapacityUnits": units}
        if full:  # whether more follows is unknown at this point: the next page may be empty
            page["LastEvaluatedKey"] = {name: found[read - 1][1][name] for name in table.key}
        return page


def _scattered(key: tuple[Any, ...]) -> int:
    """A pseudo-random order, as a scan has."""
    return zlib.crc32(repr(key).encode())


def _size(item: Item) -> int:
    return sum(len(name) + len(str(next(iter(value.values())))) for name, value in item.items())


def _refusal(code: str, message: str) -> Answer:
    return _answer(400, {"__type": f"com.amazonaws.dynamodb.v20120810#{code}", "message": message})


def _answer(status: int, document: Mapping[str, Any]) -> Answer:
    body = json.dumps(document).encode()
    return Answer(status, {"Content-Type": "application/x-amz-json-1.0", "x-amz-crc32": str(zlib.crc32(body))}, body)
