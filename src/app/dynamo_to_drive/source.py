"""DynamoDB as a source: one table, one partition, one hour at a time; with `stores.s3` the home of boto3.

Invariants: every page is followed until LastEvaluatedKey is absent, also an empty one; signing and retries are
botocore's, only the items are decoded here; no exception of the SDK leaves this module (`dynamo_errors`).
"""

import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from app.core.errors import Permanent
from app.core.ports import UNCOUNTED, Count
from app.core.runs import Stop
from app.core.window import Window
from app.dynamo_to_drive.decode import Taken, cell, items_of, take_items
from app.dynamo_to_drive.dynamo_errors import member, translated
from app.dynamo_to_drive.hour_file import HourFile, HourWriter, Shape, lines_of, read_file
from app.dynamo_to_drive.plan import SEGMENTS, Plan, Wanted, advice, plan_of
from app.dynamo_to_drive.rows import Pages
from app.dynamo_to_drive.timestamps import hour_numbers, hour_prefix, number_before, reader_of, separator_of

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

    @property
    def where(self) -> str:
        """The service, for messages."""
        return self.endpoint_url or f"DynamoDB in {self.region}"


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
            answer = self.call("describe_table", TableName=self.target.wanted.table)
            described = member(answer, "Table", self.target.where)
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

    def look(self, plan: Plan) -> None:
        """One row at most, by the way that the plan reads: tells whether these keys may."""
        if plan.scans:
            self.call("scan", TableName=self.target.wanted.table, Limit=1)
        else:
            self._newest(plan)

    def _newest(self, plan: Plan) -> str:
        for value in plan.hash_values:
            condition = {"hash": value}
            found = self.call("query", **self._asked(plan, condition), Limit=1, ScanIndexForward=False)
            for item in items_of(member(found, "Items", self.target.where)):
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
            yield member(page, "Items", self.target.where)
            if "LastEvaluatedKey" not in page:
                return
            asked = {**asked, "ExclusiveStartKey": page["LastEvaluatedKey"]}

    def call(self, method: str, **asked: Any) -> Any:
        """One request. Raises Transient or Permanent."""
        if method != "describe_table":
            asked["ReturnConsumedCapacity"] = "TOTAL"
        with translated(self.target.wanted.table, self.target.where):
            answer = getattr(self._made(), method)(**asked)
        with self._lock:
            self.units += (answer.get("ConsumedCapacity") or {}).get("CapacityUnits", 0.0)
        return answer

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
    table.look(plan)
    if plan.scans:
        return f"may describe and scan; {plan.size_bytes} bytes for each hour"
    return f"may describe and query; {f'index {plan.index}' if plan.index else 'the table'}"


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
