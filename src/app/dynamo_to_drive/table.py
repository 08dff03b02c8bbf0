"""A DynamoDB table: the cheapest way to read one hour of it, its requests, and the translation of the SDK's errors.

Only this module and `object_store.s3_client` use boto3. Invariants: a plan never misses rows, so an index is used only
if it is active, complete and projects all attributes, and a scan is the last resort, is logged, and has a size limit;
pages are followed until there is no LastEvaluatedKey, even past empty pages; botocore signs and retries, only the items
are decoded elsewhere; no SDK exception leaves this module, and the error code decides, never the message. Source:
contracts/dynamodb.md, sections 2 to 7.
"""

import logging
import threading
from base64 import b64decode, b64encode
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cache
from typing import Any

from app.config.settings import DynamoSettings
from app.core.errors import Permanent, Transient
from app.core.network import CA_HINT, SharedClient, is_untrusted
from app.core.runs import Stop
from app.core.windows import Window
from app.dynamo_to_drive.rows import Item, Taken, items_of, take_items
from app.dynamo_to_drive.timestamps import KeyRange, TextTrait, TimestampReader, number_ranges, text_ranges

STATIC, BASE64 = "static_partition", "base64:"
STATIC_VALUES = ("data",)
UNIT_BYTES = 4096
SEGMENTS = 4
KEYS_HINT = "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
CLOCK_HINT = f"{KEYS_HINT}, and this machine's clock (NTP)"
HINTS: Mapping[str, str] = {
    "ResourceNotFoundException": "check DYNAMODB_TABLE_NAME and AWS_REGION, and that the index still exists",
    "AccessDeniedException": "allow dynamodb:DescribeTable, Query and Scan on the table and its indexes",
    "UnrecognizedClientException": KEYS_HINT,
    "MissingAuthenticationTokenException": KEYS_HINT,
    "IncompleteSignatureException": KEYS_HINT,
    "InvalidSignatureException": CLOCK_HINT,
    "ExpiredTokenException": "the temporary credentials expired: renew AWS_SESSION_TOKEN",
    "ValidationException": "check DYNAMODB_TIMESTAMP_ATTRIBUTE, DYNAMODB_TIMESTAMP_UNIT and DYNAMODB_PARTITION_VALUES",
}
THROTTLED = frozenset(
    {"ProvisionedThroughputExceededException", "ThrottlingException", "RequestLimitExceeded", "LimitExceededException"}
)
SLOW_HINT = "raise the table's read capacity, which is used up, or DRIVE_INTERVAL_SECONDS; the next run catches up"
AGAIN_HINT = "no action needed: the next run continues"
FOREIGN_HINT = "check that DYNAMODB_ENDPOINT_URL is DynamoDB, and that no proxy answers; it is retried"
TEXT_LIMIT = 300
LOOKED_ITEMS = 1000
ATTEMPTS, CONNECT_SECONDS, READ_SECONDS = 5, 5, 20
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class AccessPath:
    """How to read the table. `hash_name` "" = scan. Types are DynamoDB's letters; `key` has the primary key attributes.

    `left_out` is the attribute with the same value in all rows, which gets no column; "" if there is none.
    """

    key: tuple[str, ...]
    hash_name: str = ""
    hash_type: str = "S"
    hash_values: tuple[str, ...] = ()
    timestamp_type: str = "S"
    index: str = ""
    consistent: bool = True
    left_out: str = ""
    size_bytes: int = 0

    @property
    def constant(self) -> str:
        """The cell text of the attribute `left_out`."""
        value = self.hash_values[0]
        return b64encode(_key_bytes(value)).decode() if self.hash_type == "B" else value

    @property
    def scans(self) -> bool:
        """True if each read costs a scan of the whole table."""
        return not self.hash_name


def plan_of(table: Mapping[str, Any], wanted: DynamoSettings) -> AccessPath:
    """The cheapest complete access path. Raises Permanent if only a scan is left and the table exceeds the limit."""
    types = {each["AttributeName"]: each["AttributeType"] for each in table["AttributeDefinitions"]}
    key = tuple(each["AttributeName"] for each in table["KeySchema"])
    size_bytes = int(table.get("TableSizeBytes") or 0)
    for index, hash_name, consistent in _ways(table, wanted.timestamp_attribute):
        values = tuple(wanted.partition_values) or (STATIC_VALUES if hash_name == STATIC else ())
        if values and types[wanted.timestamp_attribute] in "SN":
            return AccessPath(
                key=key,
                hash_name=hash_name,
                hash_type=types[hash_name],
                hash_values=tuple(dict.fromkeys(values)),
                timestamp_type=types[wanted.timestamp_attribute],
                index=index,
                consistent=consistent,
                left_out=hash_name if len(values) == 1 else "",
                size_bytes=size_bytes,
            )
    if size_bytes > wanted.scan_max_bytes:
        raise Permanent(
            f"table {wanted.table_name} can only be scanned, and its {size_bytes} bytes are above "
            f"{wanted.scan_max_bytes}",
            index_advice(table, wanted)
            + ", or raise DYNAMODB_SCAN_MAX_BYTES and pay for a whole scan per hour and run",
        )
    return AccessPath(key=key, size_bytes=size_bytes)


def _key_bytes(value: str) -> bytes:
    """A value of a binary partition key, which is set as text, or in base64 after BASE64. Raises Permanent."""
    if not value.startswith(BASE64):
        return value.encode()
    try:
        return b64decode(value.removeprefix(BASE64), validate=True)
    except ValueError as error:
        raise Permanent(f"{value}: invalid base64", "correct DYNAMODB_PARTITION_VALUES") from error


def index_advice(table: Mapping[str, Any], wanted: DynamoSettings) -> str:
    """A hint on how to make this table queryable instead of scanning it."""
    timestamp = wanted.timestamp_attribute
    for _, hash_name, _ in _ways(table, timestamp):
        return f"set DYNAMODB_PARTITION_VALUES to the values of {hash_name!r}"
    return f"add an index with sort key {timestamp!r} and projection ALL, or set DYNAMODB_TIMESTAMP_ATTRIBUTE"


def _ways(table: Mapping[str, Any], timestamp: str) -> Iterator[tuple[str, str, bool]]:
    """The table ("") and the complete indexes that sort by the timestamp, consistent ones first.

    Yields the index name, its partition key attribute, and whether reads are consistent.
    """
    local, remote = (table.get(f"{kind}SecondaryIndexes") or () for kind in ("Local", "Global"))
    ready = [each for each in remote if each.get("IndexStatus", "ACTIVE") == "ACTIVE" and not each.get("Backfilling")]
    whole = [each for each in (*local, *ready) if each["Projection"]["ProjectionType"] == "ALL"]
    for described in (table, *whole):
        names: dict[str, list[str]] = {"HASH": [], "RANGE": []}
        for each in described["KeySchema"]:
            names[each["KeyType"]].append(each["AttributeName"])
        if len(names["HASH"]) == 1 and names["RANGE"][:1] == [timestamp]:
            yield described.get("IndexName", ""), names["HASH"][0], described not in ready


AROUND, FIRSTS = "around", "firsts"


class DynamoTable:
    """The table, with a client created on first use, and what is known about it. Thread-safe.

    `traits` are the timestamp traits seen so far. `looked`: where this process has looked for others, AROUND an hour or
    at the FIRSTS during one; only what was read to its end counts. `spend` receives the read units of each response.
    `escape`: cells are escaped against spreadsheet formulas.
    """

    def __init__(
        self, given: DynamoSettings, spend: Callable[[float], None] = lambda _: None, *, escape: bool = False
    ) -> None:
        self.given, self.escape = given, escape
        self.times = TimestampReader(given.timestamp_unit)
        self.where = given.endpoint_url or f"DynamoDB in {given.region}"  # the service, for messages
        self._spend = spend
        self.traits: frozenset[TextTrait] = frozenset()
        self._lock = threading.Lock()
        self._client = SharedClient(lambda: _make_client(given))
        self._told: AccessPath | None = None
        self.looked = set[tuple[str, datetime]]()

    def plan(self) -> AccessPath:
        """The current access path: an index may have been added or dropped, or the table replaced. Raises Permanent for
        a table that cannot be read.
        """
        described = require_member(self.call("describe_table", TableName=self.given.table_name), "Table", self.where)
        plan = plan_of(described, self.given)
        way = replace(plan, size_bytes=0)
        if way == self._told:
            return plan
        self._told = way
        if plan.scans:
            units = -(-plan.size_bytes // UNIT_BYTES)  # of a consistent scan; the size may be six hours old
            log.warning(
                "table %s is SCANNED: each hour and run reads all %d bytes, about %d read units; to query instead, %s",
                *(self.given.table_name, plan.size_bytes, units, index_advice(described, self.given)),
            )
        else:
            where, number = f"index {plan.index}" if plan.index else "its key", len(plan.hash_values)
            log.info("table %s is queried on %s, %d partition values", self.given.table_name, where, number)
        return plan

    def close(self) -> None:
        """Close idle connections. The table can be used again, with the credentials valid by then."""
        self._client.close()

    def note(self, traits: Iterable[TextTrait]) -> None:
        """From now on, query hours for these traits too."""
        with self._lock:
            found = frozenset(traits) - self.traits
            self.traits |= found
        for trait in found:
            log.info("table %s: timestamps have %s", self.given.table_name, trait.value)

    def end(
        self, plan: AccessPath, value: str, is_readable: Callable[[Item], bool], *, is_first: bool = False
    ) -> Sequence[Item]:
        """The last (or first) items of a partition value, up to a readable one, at most LOOKED_ITEMS."""
        for limit in (1, LOOKED_ITEMS):
            answer = self.call("query", **self._asked(plan, value), Limit=limit, ScanIndexForward=is_first)
            items = items_of(require_member(answer, "Items", self.where))
            first = next((number for number, item in enumerate(items, 1) if is_readable(item)), 0)
            if first or not items:
                return items[:first]
        return items

    def some(self) -> Sequence[Item]:
        """Some items of the table, whatever their keys; none if the table is empty."""
        for taken in self.pages("scan", {"TableName": self.given.table_name, "Limit": LOOKED_ITEMS}, Stop()):
            if items := items_of(taken):
                return items
        return ()

    def scans(self) -> Iterator[Mapping[str, Any]]:
        """The scan requests that cover the table. A filter would cost as much, and would drop unknown formats."""
        for segment in range(SEGMENTS):
            whole = {"TableName": self.given.table_name, "ConsistentRead": True}
            yield {**whole, "Segment": segment, "TotalSegments": SEGMENTS}

    def queries(
        self, plan: AccessPath, hour: Window, traits: Collection[TextTrait], newest: str = ""
    ) -> Iterator[Mapping[str, Any]]:
        """The query requests that cover the hour. `newest` is the largest number of a numeric sort key."""
        is_number = plan.timestamp_type == "N"
        ranges = list(
            number_ranges(hour, self.given.timestamp_unit, newest) if is_number else text_ranges(hour, traits)
        )
        for value in plan.hash_values:
            for each in ranges:
                yield self._asked(plan, value, each)

    def _asked(self, plan: AccessPath, value: str, between: KeyRange | None = None) -> dict[str, Any]:
        names: dict[str, str] = {"#p": plan.hash_name}
        values: dict[str, Any] = {":hash": {plan.hash_type: _key_bytes(value) if plan.hash_type == "B" else value}}
        if between is not None:
            names["#t"] = self.given.timestamp_attribute
            values |= {f":{name}": {plan.timestamp_type: text} for name, text in between._asdict().items()}
        return {
            "TableName": self.given.table_name,
            **({"IndexName": plan.index} if plan.index else {}),
            "KeyConditionExpression": "#p = :hash AND #t BETWEEN :low AND :high" if between else "#p = :hash",
            "ExpressionAttributeNames": names,
            "ExpressionAttributeValues": values,
            "ConsistentRead": plan.consistent,
        }

    def pages(self, method: str, asked: Mapping[str, Any], stop: Stop) -> Iterator[Taken]:
        """The items of every page of a query or scan. An empty LastEvaluatedKey counts as none."""
        while True:
            stop.check()
            page = self.call(method, **asked)
            yield require_member(page, "Items", self.where)
            if not page.get("LastEvaluatedKey"):
                return
            asked = {**asked, "ExclusiveStartKey": page["LastEvaluatedKey"]}

    def call(self, method: str, **asked: Any) -> Any:
        """One request. Raises Transient or Permanent."""
        if method != "describe_table":
            asked["ReturnConsumedCapacity"] = "TOTAL"
        with translate_sdk_errors(self.given.table_name, self.where):
            answer = getattr(self._client(), method)(**asked)
        self._spend((answer.get("ConsumedCapacity") or {}).get("CapacityUnits", 0.0))
        return answer


@cache
def _models() -> Any:
    """botocore's service models, loaded once: they are most of a client's cost, and each refusal needs a new client."""
    from botocore.loaders import create_loader

    return create_loader()


def _make_client(given: DynamoSettings) -> Any:
    import boto3
    from botocore.config import Config
    from botocore.session import get_session

    # If unset, the SDK's own credential chain applies.
    secrets = (given.access_key_id, given.secret_access_key, given.session_token)
    key_id, secret, token = (each.get_secret_value() or None if each else None for each in secrets)
    config = Config(
        retries={"mode": "standard", "total_max_attempts": ATTEMPTS},
        connect_timeout=CONNECT_SECONDS,
        read_timeout=READ_SECONDS,
        max_pool_connections=SEGMENTS,
    )
    session = get_session()
    session.register_component("data_loader", _models())
    client = boto3.session.Session(key_id, secret, token, botocore_session=session).client(
        "dynamodb", region_name=given.region, endpoint_url=given.endpoint_url or None, config=config
    )
    for name in ("Query", "Scan"):
        client.meta.events.register(f"before-parse.dynamodb.{name}", take_items)
    return client


def require_member(answer: Mapping[str, Any], name: str, where: str) -> Any:
    """A required member of a response. Raises Transient if it is missing: the response is then not DynamoDB's, and
    reading it as empty would lose rows.
    """
    if name not in answer:
        raise Transient(f"the answer of {where} holds no {name}", FOREIGN_HINT)
    return answer[name]


@contextmanager
def translate_sdk_errors(table: str, where: str) -> Iterator[None]:
    """Translate SDK exceptions to ours. `where` names the service as configured."""
    from botocore import exceptions as sdk

    try:
        yield
    except sdk.ClientError as error:
        told = error.response.get("Error") or {}
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        code = str(told.get("Code") or status)
        text = f"table {table!r}: {code}: {str(told.get('Message') or '')[:TEXT_LIMIT]}"
        if code in THROTTLED:
            raise Transient(text, SLOW_HINT) from error
        if status >= 500:  # noqa: PLR2004 - HTTP's own border
            raise Transient(text, AGAIN_HINT) from error
        raise Permanent(text, HINTS.get(code, "check the table, the region and the keys")) from error
    except sdk.BotoCoreError as error:
        text = f"table {table!r}: {str(error)[:TEXT_LIMIT]}"
        if is_untrusted(error):
            raise Permanent(text, CA_HINT) from error
        if isinstance(error, sdk.NoCredentialsError | sdk.PartialCredentialsError):
            hint = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give this machine a role"
            raise Permanent(text, hint) from error
        if isinstance(error, sdk.ParamValidationError):
            raise Permanent(text, "check DYNAMODB_TABLE_NAME and DYNAMODB_PARTITION_VALUES") from error
        hint = f"check that {where} can be reached (AWS_REGION, DYNAMODB_ENDPOINT_URL); it is retried"
        raise Transient(text, hint) from error
