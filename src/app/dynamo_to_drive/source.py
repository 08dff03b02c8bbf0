"""DynamoDB as a source: one table, one partition, one hour at a time; with `stores.s3` the home of boto3.

Invariants: every page is followed until LastEvaluatedKey is absent, also an empty one; signing and retries are
botocore's, only the items are decoded here; no exception of the SDK leaves this module.
"""

import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from app.core.errors import AppError, Permanent, Transient
from app.core.ports import UNCOUNTED, Count
from app.core.runs import Stop
from app.core.window import Window
from app.dynamo_to_drive.decode import Taken, cell, items_of, take_items
from app.dynamo_to_drive.hour_file import HourFile, HourWriter, Shape, lines_of, read_file
from app.dynamo_to_drive.plan import SEGMENTS, Plan, Wanted, advice, plan_of
from app.dynamo_to_drive.rows import Pages
from app.dynamo_to_drive.timestamps import hour_numbers, hour_prefix, number_before, reader_of, separator_of

KEYS_HINT = "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
CLOCK_HINT = f"{KEYS_HINT}, and this machine's clock (NTP)"
HINTS: Mapping[str, str] = {
    "ResourceNotFoundException": "check DYNAMODB_TABLE_NAME and AWS_REGION, and that the index still exists",
    "AccessDeniedException": "allow dynamodb:DescribeTable, Query and Scan on the table and its indexes",
    "UnrecognizedClientException": KEYS_HINT,
    "MissingAuthenticationTokenException": KEYS_HINT,
    "IncompleteSignatureException": KEYS_HINT,
    "InvalidSignatureException": CLOCK_HINT,
    "ExpiredTokenException": "the temporary credentials ended: renew AWS_SESSION_TOKEN",
    "ValidationException": "check DYNAMODB_TIMESTAMP_ATTRIBUTE, DYNAMODB_TIMESTAMP_UNIT and DYNAMODB_PARTITION_VALUES",
}
THROTTLED = frozenset(
    {"ProvisionedThroughputExceededException", "ThrottlingException", "RequestLimitExceeded", "LimitExceededException"}
)
SLOW_HINT = "the table's read capacity is used up: raise it, or DRIVE_INTERVAL_SECONDS; the next run catches up"
AGAIN_HINT = "nothing to do: the next run goes on"
FOREIGN_HINT = "check that DYNAMODB_ENDPOINT_URL is DynamoDB, and that no proxy answers; it is tried again"
TEXT_LIMIT = 300
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Target:
    """Which table, where. Without keys the SDK's own chain is asked: environment, profile, role."""

    wanted: Wanted
    unit: str
    region: str
    endpoint_url: str = ""
    access_key_id: str = ""
    secret_access_key: str = field(default="", repr=False)
    session_token: str = field(default="", repr=False)
    escape: bool = False
    attempts: int = 5
    connect_timeout_seconds: float = 5
    read_timeout_seconds: float = 20


class Table:
    """The table behind a client that is made on first use, and what was found out about it. Safe from any thread."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.units = 0.0
        self._lock = threading.Lock()
        self._client: Any = None
        self._plan: Plan | None = None
        self._separator = ""

    def plan(self) -> Plan:
        """How it is read, found once. Raises Permanent for a table that cannot be read."""
        if self._plan is None:
            described = self._member(self.call("describe_table", TableName=self.target.wanted.table), "Table")
            self._plan = plan_of(described, self.target.wanted)
            _say(self._plan, described, self.target.wanted)
        return self._plan

    def forget(self) -> None:
        """Find out anew next time: an index may have come or gone."""
        self._plan, self._separator = None, ""

    def close(self) -> None:
        """End idle connections. The table may be used again afterwards."""
        with self._lock:
            client, self._client = self._client, None
        if client is not None:
            client.close()

    def separator(self, plan: Plan) -> str:
        """What stands between date and time in the newest row; T while there is none."""
        if not self._separator:
            newest = self._newest(plan)
            if not newest:
                return "T"
            self._separator = separator_of(newest)
        return self._separator

    def _newest(self, plan: Plan) -> str:
        for value in plan.hash_values:
            condition = {"hash": value}
            found = self.call("query", **self._asked(plan, condition), Limit=1, ScanIndexForward=False)
            for item in items_of(self._member(found, "Items")):
                return cell(item[self.target.wanted.timestamp])
        return ""

    def hour_queries(self, plan: Plan, hour: Window) -> Iterator[dict[str, Any]]:
        """The requests whose pages together are the hour."""
        if plan.scans:
            for segment in range(SEGMENTS):
                yield {**_filter(self.target, hour), "Segment": segment, "TotalSegments": SEGMENTS}
            return
        bounds: dict[str, str] = {}
        if plan.timestamp_type == "N":
            bounds["low"], bounds["high"] = hour_numbers(hour, self.target.unit)
        else:
            bounds["prefix"] = hour_prefix(hour, self.separator(plan))
        for value in plan.hash_values:
            yield self._asked(plan, {"hash": value, **bounds})

    def _asked(self, plan: Plan, bounds: Mapping[str, str]) -> dict[str, Any]:
        conditions = ["#p = :hash"]
        if "prefix" in bounds:
            conditions.append("begins_with(#t, :prefix)")
        if "low" in bounds:
            conditions.append("#t BETWEEN :low AND :high")
        names = {"#p": plan.hash_name}
        if len(conditions) > 1:
            names["#t"] = self.target.wanted.timestamp
        types = {"hash": plan.hash_type, "prefix": "S", "low": "N", "high": "N"}
        return {
            "TableName": self.target.wanted.table,
            **({"IndexName": plan.index} if plan.index else {}),
            "KeyConditionExpression": " AND ".join(conditions),
            "ExpressionAttributeNames": names,
            "ExpressionAttributeValues": {f":{name}": {types[name]: value} for name, value in bounds.items()},
            "ConsistentRead": plan.consistent,
        }

    def pages(self, method: str, asked: dict[str, Any], stop: Stop) -> Iterator[Taken]:
        """The items of every page of a query or scan, to the end."""
        while True:
            stop.check()
            page = self.call(method, **asked)
            yield self._member(page, "Items")
            if "LastEvaluatedKey" not in page:
                return
            asked = {**asked, "ExclusiveStartKey": page["LastEvaluatedKey"]}

    def call(self, method: str, **asked: Any) -> Any:
        """One request. Raises Transient or Permanent."""
        if method != "describe_table":
            asked["ReturnConsumedCapacity"] = "TOTAL"
        with _translated(self.target):
            answer = getattr(self._made(), method)(**asked)
        with self._lock:
            self.units += (answer.get("ConsumedCapacity") or {}).get("CapacityUnits", 0.0)
        return answer

    def _member(self, answer: Mapping[str, Any], name: str) -> Any:
        """What an answer must have. Without it, it is that of something else: taken as empty, it would cost rows."""
        if name not in answer:
            where = self.target.endpoint_url or f"DynamoDB in {self.target.region}"
            raise Transient(f"the answer of {where} holds no {name}", FOREIGN_HINT)
        return answer[name]

    def _made(self) -> Any:
        with self._lock:
            if self._client is None:
                self._client = _make_client(self.target)
            return self._client


class DynamoSource:
    """`app.core.ports.Source` over a table. `partition` is the one name under which checkpoints are kept."""

    def __init__(self, table: Table, partition: str, stop: Stop) -> None:
        self._table = table
        self._partition = partition
        self._stop = stop

    def partitions(self, since: datetime) -> Sequence[str]:  # noqa: ARG002 - the port's word
        """The one."""
        return [self._partition]

    def counts(self, partition: str | None, windows: Sequence[Window]) -> Mapping[tuple[str, datetime], Count]:
        """UNCOUNTED: a count costs what reading costs, and an overwritten row would not move it."""
        return {(partition or self._partition, window.start): UNCOUNTED for window in windows}

    def read(self, partition: str, window: Window, count: Count, kept: HourFile | None) -> HourFile:  # noqa: ARG002
        """The file of the hour. A table that changed its indexes is looked at anew before the next try."""
        try:
            return self._read(window)
        except Permanent:
            self._table.forget()
            raise

    def _read(self, window: Window) -> HourFile:
        plan, writer = self._table.plan(), self._writer()
        try:
            self._fill(writer, plan, window)
            return writer.finish()
        finally:
            writer.close()

    def _fill(self, writer: HourWriter, plan: Plan, window: Window) -> None:
        """Every page of every request, several requests at once; the order of pages does not matter."""
        method, turn = "scan" if plan.scans else "query", threading.Lock()
        pages = Pages(self._table.target.wanted.timestamp, plan.left_out, self._keeps(plan, window))

        def follow(asked: dict[str, Any]) -> None:
            for taken in self._table.pages(method, asked, self._stop):
                with turn:
                    rows = pages.read(taken)
                    writer.add(pages.columns, rows)

        queries = list(self._table.hour_queries(plan, window))
        if len(queries) == 1:
            follow(queries[0])
            return
        with ThreadPoolExecutor(SEGMENTS, thread_name_prefix="dynamo") as pool:
            for done in [pool.submit(follow, asked) for asked in queries]:
                done.result()

    def _keeps(self, plan: Plan, window: Window) -> Callable[[str], bool] | None:
        """Refuses the row at the upper end, which BETWEEN includes; text was asked for by prefix and is exact."""
        if not plan.scans and plan.timestamp_type == "S":
            return None
        return number_before(hour_numbers(window, self._table.target.unit)[1])

    def read_each(self, partition: str, counted: Sequence[tuple[Window, Count]]) -> Iterator[HourFile]:
        """Hour by hour: a Query of one hour is the cheapest question there is."""
        return (self.read(partition, window, count, None) for window, count in counted)

    def union(self, batch: HourFile, held: Iterable[Mapping[str, str]]) -> HourFile:
        """The rows of both; where both have a key, the table's row."""
        writer = self._writer()
        try:
            writer.add_rows(held)
            writer.add_rows(read_file(lines_of(batch), escaped=self._table.target.escape))
            return writer.finish()
        finally:
            writer.close()

    def missing(self, batch: HourFile, held: Iterable[Mapping[str, str]]) -> HourFile:
        """The rows of the batch whose timestamp and key the held ones lack."""
        shape, writer = self._shape(), self._writer()
        names = (shape.timestamp, *shape.key)

        def identity(row: Mapping[str, str]) -> tuple[str, ...]:
            return tuple(row.get(name, "") for name in names)

        try:
            known = set(map(identity, held))
            rows = read_file(lines_of(batch), escaped=shape.escape)
            writer.add_rows(row for row in rows if identity(row) not in known)
            return writer.finish()
        finally:
            writer.close()

    def _writer(self) -> HourWriter:
        return HourWriter(self._shape())

    def _shape(self) -> Shape:
        plan, target = self._table.plan(), self._table.target
        key = tuple(name for name in plan.key if name not in (target.wanted.timestamp, plan.left_out))
        return Shape(target.wanted.timestamp, key, reader_of(target.unit), target.escape)


def ping(table: Table) -> str:
    """How the table is read, for `check`. Raises Transient or Permanent."""
    table.forget()
    plan = table.plan()
    if plan.scans:
        return f"scan of {plan.size_bytes} bytes for each hour"
    return f"query on {f'index {plan.index}' if plan.index else 'the table'}"


def _filter(target: Target, hour: Window) -> dict[str, Any]:
    """A scan's filter: text of either separator, or numbers, since nothing says what the attribute is."""
    low, high = hour_numbers(hour, target.unit)
    return {
        "TableName": target.wanted.table,
        "FilterExpression": "begins_with(#t, :t) OR begins_with(#t, :space) OR #t BETWEEN :low AND :high",
        "ExpressionAttributeNames": {"#t": target.wanted.timestamp},
        "ExpressionAttributeValues": {
            ":t": {"S": hour_prefix(hour, "T")},
            ":space": {"S": hour_prefix(hour, " ")},
            ":low": {"N": low},
            ":high": {"N": high},
        },
        "ConsistentRead": True,
    }


def _say(plan: Plan, described: Mapping[str, Any], wanted: Wanted) -> None:
    if plan.scans:
        log.warning(
            "table %s is SCANNED: each hour and run reads all %d bytes, about %d read units; to query instead, %s",
            wanted.table,
            plan.size_bytes,
            plan.scan_units,
            advice(described, wanted),
        )
    else:
        where = f"index {plan.index}" if plan.index else "its key"
        log.info("table %s is queried on %s, %d partition values", wanted.table, where, len(plan.hash_values))


def _make_client(target: Target) -> Any:
    import boto3
    from botocore.config import Config

    keys = {
        "aws_access_key_id": target.access_key_id or None,
        "aws_secret_access_key": target.secret_access_key or None,
        "aws_session_token": target.session_token or None,
    }
    config = Config(
        retries={"mode": "standard", "total_max_attempts": target.attempts},
        connect_timeout=target.connect_timeout_seconds,
        read_timeout=target.read_timeout_seconds,
        max_pool_connections=SEGMENTS,
    )
    client = boto3.session.Session(**keys).client(
        "dynamodb", region_name=target.region, endpoint_url=target.endpoint_url or None, config=config
    )
    for name in ("Query", "Scan"):
        client.meta.events.register(f"before-parse.dynamodb.{name}", take_items)
    return client


@contextmanager
def _translated(target: Target) -> Iterator[None]:
    """What the SDK raises, as what the caller should do about it."""
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except ClientError as error:
        raise _answered(target, error) from error
    except BotoCoreError as error:
        raise _failed(target, error) from error


def _answered(target: Target, error: Any) -> AppError:
    said, status = (
        error.response.get("Error") or {},
        error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0),
    )
    code = str(said.get("Code") or status)
    text = f"table {target.wanted.table!r}: {code}: {str(said.get('Message') or '')[:TEXT_LIMIT]}"
    if code in THROTTLED:
        return Transient(text, SLOW_HINT)
    if status >= 500:  # noqa: PLR2004 - HTTP's own border
        return Transient(text, AGAIN_HINT)
    return Permanent(text, HINTS.get(code, "check the table, the region and the keys"))


def _failed(target: Target, error: Exception) -> AppError:
    from botocore import exceptions as sdk

    text = f"table {target.wanted.table!r}: {str(error)[:TEXT_LIMIT]}"
    if isinstance(error, sdk.NoCredentialsError | sdk.PartialCredentialsError):
        return Permanent(text, "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give this machine a role")
    if isinstance(error, sdk.ParamValidationError):
        return Permanent(text, "check DYNAMODB_TABLE_NAME and DYNAMODB_PARTITION_VALUES")
    where = target.endpoint_url or f"DynamoDB in {target.region}"
    return Transient(text, f"check that {where} can be reached (AWS_REGION, DYNAMODB_ENDPOINT_URL); it is tried again")
