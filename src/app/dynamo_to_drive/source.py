"""DynamoDB as a source: one table, one partition, one hour at a time; and the translation of its errors."""

import logging
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from contextvars import copy_context
from dataclasses import replace
from datetime import datetime
from decimal import Decimal
from functools import cache
from itertools import chain
from typing import Any, NamedTuple, TypeVar

from app.config.settings import DynamoSettings
from app.core.errors import AppError, Permanent, Transient
from app.core.ledger import sampled
from app.core.network import CA_HINT, SharedClient, is_untrusted
from app.core.pipeline import UNCOUNTED, Count, Shrink
from app.core.runs import Stop
from app.core.windows import EPOCH, HOUR_SECONDS, Window, floor_to, window_at
from app.dynamo_to_drive.access_path import SEGMENTS, AccessPath, index_advice, plan_of
from app.dynamo_to_drive.accounts import Accounts
from app.dynamo_to_drive.hour_file import FileShape, HourFile, HourWriter, lines_in, read_file
from app.dynamo_to_drive.rows import Item, PageReader, Taken, cell, items_of, take_items, timestamp_text
from app.dynamo_to_drive.timestamps import (
    EVERY_TRAIT,
    UNREADABLE,
    HourTexts,
    KeyRange,
    TextTrait,
    TimestampReader,
    TimestampReading,
    is_found,
    number_ranges,
    text_ranges,
)

# Errors of DynamoDB and the SDK, translated to ours with a hint for a person or a retry.
#
# Invariant: the error code decides, never the message. The codes are in section 7 of contracts/dynamodb.md.

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
SLOW_HINT = "raise the table's read capacity, which is used up, or DRIVE_INTERVAL_SECONDS; the next run catches up"
AGAIN_HINT = "no action needed: the next run goes on"
FOREIGN_HINT = "check that DYNAMODB_ENDPOINT_URL is DynamoDB, and that no proxy answers; it is retried"
TEXT_LIMIT = 300


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
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except ClientError as error:
        raise _answered(table, error) from error
    except BotoCoreError as error:
        raise _failed(table, where, error) from error


def _answered(table: str, error: Any) -> AppError:
    said, status = (
        error.response.get("Error") or {},
        error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0),
    )
    code = str(said.get("Code") or status)
    text = f"table {table!r}: {code}: {str(said.get('Message') or '')[:TEXT_LIMIT]}"
    if code in THROTTLED:
        return Transient(text, SLOW_HINT)
    if status >= 500:  # noqa: PLR2004 - HTTP's own border
        return Transient(text, AGAIN_HINT)
    return Permanent(text, HINTS.get(code, "check the table, the region and the keys"))


def _failed(table: str, where: str, error: Exception) -> AppError:
    from botocore import exceptions as sdk

    text = f"table {table!r}: {str(error)[:TEXT_LIMIT]}"
    if is_untrusted(error):
        return Permanent(text, CA_HINT)
    if isinstance(error, sdk.NoCredentialsError | sdk.PartialCredentialsError):
        return Permanent(text, "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give this machine a role")
    if isinstance(error, sdk.ParamValidationError):
        return Permanent(text, "check DYNAMODB_TABLE_NAME and DYNAMODB_PARTITION_VALUES")
    return Transient(text, f"check that {where} can be reached (AWS_REGION, DYNAMODB_ENDPOINT_URL); it is retried")


# The source itself. Only this module and `object_store.s3` use boto3.
#
# Invariants: pages are followed until there is no LastEvaluatedKey, even past empty pages; botocore signs and retries,
# only the items are decoded here; no SDK exception leaves this module; every item read becomes a row of an hour or is
# passed to `Accounts` with the reason.

LOOKED_ITEMS = 1000
ATTEMPTS, CONNECT_SECONDS, READ_SECONDS = 5, 5, 20
SOME_HOUR = window_at(EPOCH, 3600)  # any hour: `ping` only checks whether timestamps are readable
NAMED = 20
ATTRIBUTE_HINT = "set DYNAMODB_TIMESTAMP_ATTRIBUTE to the attribute that says when a row was measured"
WRITING_HINT = "write ISO 8601 or epoch numbers, or " + ATTRIBUTE_HINT
log = logging.getLogger(__name__)

A = TypeVar("A")
B = TypeVar("B")


class DynamoTable:
    """The table, with a client created on first use, and what is known about it. Thread-safe.

    `traits` are the timestamp traits seen so far. `spend` receives the read units of each response. `escape`: cells are
    escaped against spreadsheet formulas.
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
        self._looked = set[datetime]()
        self._first_at: datetime | None = None

    def plan(self) -> AccessPath:
        """The current access path: an index may have been added or dropped, or the table replaced. Raises Permanent for
        a table that cannot be read.
        """
        described = require_member(self.call("describe_table", TableName=self.given.table_name), "Table", self.where)
        plan = plan_of(described, self.given)
        if plan.way == self._told:
            return plan
        self._told = plan.way
        if plan.scans:
            log.warning(
                "table %s is SCANNED: each hour and run reads all %d bytes, about %d read units; to query instead, %s",
                *(self.given.table_name, plan.size_bytes, plan.scan_units, index_advice(described, self.given)),
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

    def looks_around(self, hour: Window) -> bool:
        """True the first time for an hour: then it is queried with every trait, even ones never seen."""
        with self._lock:
            is_new = hour.start not in self._looked
            self._looked.add(hour.start)
        return is_new

    def looks_at_first(self, now: datetime) -> bool:
        """True once an hour: then the first items are checked as well."""
        hour_at = floor_to(now, HOUR_SECONDS)
        with self._lock:
            is_new, self._first_at = hour_at != self._first_at, hour_at
        return is_new

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
        names, values = {"#p": plan.hash_name}, {":hash": {plan.hash_type: value}}
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


class NewestItems(NamedTuple):
    """What the newest items of the partition values show. `number` is the largest readable number, or "".

    `is_readable`: at least one timestamp is readable, or there are no items.
    """

    number: str
    is_readable: bool


class WantedItems:
    """Selects the items of one hour. Not thread-safe.

    `elsewhere` are timestamps of other hours that begin like this one but have a UTC offset.
    """

    def __init__(self, hour: HourTexts, accounts: Accounts) -> None:
        self.traits = set[TextTrait]()
        self.unreadable = 0
        self.elsewhere = set[str]()
        self._hour = hour
        self._accounts = accounts

    def has_all(self, texts: Sequence[str]) -> bool:
        """True if all of these timestamps are certainly wanted. False means unknown."""
        return self._hour.has_all(texts)

    def has(self, text: str) -> bool | None:
        """Whether a timestamp is wanted; None if it is unreadable."""
        is_inside, reading = self._placed(text)
        return is_inside if reading.at is not None else None

    def takes(self, item: Item) -> bool:
        """Whether an item is wanted. Reports items with an unreadable timestamp to `Accounts`."""
        text = timestamp_text(item, self._accounts.attribute)
        is_inside, reading = (False, TimestampReading(None)) if text is None else self._placed(text)
        if reading.at is None:
            self.unreadable += 1
            self._accounts.unplaced(item, reading.reason or UNREADABLE)
        return is_inside

    def _placed(self, text: str) -> tuple[bool, TimestampReading]:
        is_inside, reading = self._hour.place(text)
        self.traits |= reading.traits
        if reading.at is not None and not is_inside:
            self._accounts.placed(reading.at, text)
        if not is_inside and TextTrait.OFFSET in reading.traits and text.startswith(self._hour.beginnings):
            self.elsewhere.add(text)
        return is_inside, reading


class DynamoSource:
    """`app.core.pipeline.Source` over a table, for one run that began at `now`.

    `partition` is the single name for checkpoints; `accounts` records every item read. `span` covers all hours that the
    run updates.
    """

    def __init__(
        self,
        table: DynamoTable,
        partition: str,
        stop: Stop,
        *,
        accounts: Accounts,
        now: datetime,
        span: Window | None = None,
    ) -> None:
        self._table = table
        self._partition = partition
        self._stop = stop
        self._accounts = accounts
        self._now = now
        self._span = span
        self._plan: AccessPath | None = None
        self._newest: NewestItems | None = None
        self._asked = set[Window]()

    def partitions(self, since: datetime) -> Sequence[str]:  # noqa: ARG002 - the port's word
        """The single partition."""
        return [self._partition]

    def counts(self, partition: str | None, windows: Sequence[Window]) -> Mapping[tuple[str, datetime], Count]:
        """UNCOUNTED: a count costs as much as reading, and would not change for an overwritten row."""
        return {(partition or self._partition, window.start): UNCOUNTED for window in windows}

    def read(self, partition: str, window: Window, count: Count, kept: HourFile | None) -> HourFile:  # noqa: ARG002
        """The file of the hour. After a Permanent error, the table and the credentials are re-read next time.

        Raises Permanent if none of the items read has a readable timestamp.
        """
        try:
            plan = self._planned()
            return self._read_scan(plan, window) if plan.scans else self._read_query(plan, window)
        except Permanent:
            self._plan = None
            self._table.close()
            raise

    def _planned(self) -> AccessPath:
        """The access path of this run."""
        self._plan = self._plan or self._table.plan()
        return self._plan

    def _read_scan(self, plan: AccessPath, window: Window) -> HourFile:
        hour, wanted, items = self._filled(plan, window, self._table.scans())
        if items and items == wanted.unreadable:
            hour.close()
            raise describe_unreadable(self._accounts, self._table.times)
        return hour

    def _read_query(self, plan: AccessPath, window: Window) -> HourFile:
        """Query the hour with the traits seen so far; with every trait if it is the run's first, still open, empty or
        read again, or if an item shows a new trait.
        """
        newest = self._newest = self._newest or self.look(plan, firsts=self._table.looks_at_first(self._now))
        is_text, traits = plan.timestamp_type == "S", self._table.traits
        is_doubtful = not self._asked or window in self._asked or window.end > self._now
        self._asked.add(window)
        if is_text and is_doubtful and self._table.looks_around(window):
            traits = EVERY_TRAIT
        hour, wanted, items = self._filled(plan, window, self._table.queries(plan, window, traits, newest.number))
        if is_text and (wanted.traits - traits or (not hour.rows and self._table.looks_around(window))):
            hour.close()
            hour, wanted, items = self._filled(plan, window, self._table.queries(plan, window, EVERY_TRAIT))
        self._table.note(wanted.traits)
        if items == wanted.unreadable and not newest.is_readable:
            hour.close()
            raise describe_unreadable(self._accounts, self._table.times)
        return hour

    def look(self, plan: AccessPath, *, firsts: bool = True) -> NewestItems:
        """Check the newest items of each partition value, and report unreadable ones to `Accounts`.

        `firsts` also checks the first items: texts that sort before all others are in no hour's range. Raises Permanent
        if no item has these partition values although the table has items.
        """
        is_text, times = plan.timestamp_type == "S", self._table.times

        def is_readable(item: Item) -> bool:
            return is_found(times, timestamp_text(item, self._accounts.attribute) or "", is_text=is_text)

        def ends(value: str) -> tuple[Sequence[Item], Sequence[Item]]:
            last = self._table.end(plan, value, is_readable)
            return last, self._table.end(plan, value, is_readable, is_first=True) if last and firsts else ()

        found = _together(ends, plan.hash_values)
        newest, texts = [item for last, _ in found for item in last], []
        if not newest:
            self._refuse_other_values(plan)
        empty = [value for value, (last, _) in zip(plan.hash_values, found, strict=True) if not last]
        self._accounts.empty = f"{plan.hash_name} {' or '.join(map(repr, empty[:NAMED]))}" if newest and empty else ""
        for item in (*newest, *(item for _, first in found for item in first if not is_readable(item))):
            text = timestamp_text(item, self._accounts.attribute) or ""
            reading = times.read(text)
            if reading.at is None or not is_readable(item):
                self._accounts.unplaced(item, reading.reason or UNREADABLE)
                continue
            texts.append(text)
            self._table.note(reading.traits)
            self._accounts.placed(reading.at, text)
        return NewestItems("" if is_text else max(texts, key=Decimal, default=""), bool(texts) or not newest)

    def _refuse_other_values(self, plan: AccessPath) -> None:
        """Raises Permanent if the table has items, but none with these partition values."""
        try:
            items = self._table.some()
        except Permanent as error:  # credentials that may only query suffice for everything else
            log.info("cannot tell whether table %s is empty: %s", self._table.given.table_name, error)
            return
        if not items:
            return
        values = sorted({cell(item[plan.hash_name]) for item in items if plan.hash_name in item})
        names = sorted(set().union(*items))
        seen = f"values seen: {', '.join(values[:NAMED])}" if values else f"attributes seen: {', '.join(names[:NAMED])}"
        raise Permanent(
            f"no item has {plan.hash_name} {' or '.join(map(repr, plan.hash_values[:NAMED]))}; {sampled(seen)}",
            f"set DYNAMODB_PARTITION_VALUES to the values of {plan.hash_name!r}, or {ATTRIBUTE_HINT}",
        )

    def _filled(
        self, plan: AccessPath, window: Window, requests: Iterable[Mapping[str, Any]]
    ) -> tuple[HourFile, WantedItems, int]:
        """Read all pages of all requests, several requests in parallel; the order of pages does not matter.

        Returns the file of the hour, the selection, and the number of items on all pages.
        """
        method, turn = "scan" if plan.scans else "query", threading.Lock()
        wanted = WantedItems(HourTexts(self._table.times, window), self._accounts)
        pages = PageReader(self._accounts.attribute, plan.left_out, wanted)
        with closing(HourWriter(self._shape())) as writer:

            def follow(asked: Mapping[str, Any]) -> None:
                for taken in self._table.pages(method, asked, self._stop):
                    with turn:
                        rows = pages.read(taken)
                        writer.add(pages.columns, rows)

            _together(follow, list(requests))
            hour = replace(writer.finish(), window=window, elsewhere=frozenset(wanted.elsewhere))
        self._note(hour, counted=pages.rows - hour.repeated, read=pages.rows)
        return hour, wanted, pages.items

    def read_each(self, partition: str, counted: Sequence[tuple[Window, Count]]) -> Iterator[HourFile]:
        """Hour by hour: nothing is cheaper than a Query of one hour."""
        return (self.read(partition, window, count, None) for window, count in counted)

    def union(self, batch: HourFile, held: Sequence[Iterable[Mapping[str, str]]], shrink: Shrink | None) -> HourFile:
        """The rows of both; the table's row wins if both have a key."""
        with closing(HourWriter(self._shape())) as writer:
            writer.add_rows(self._kept(batch, held), held=True)
            writer.add_rows(read_file(lines_in(batch.file), escaped=self._table.escape))
            is_edited = batch.window is not None and self._accounts.of(batch.window).is_edited
            united = replace(writer.finish(is_edited=is_edited, shrink=shrink), window=batch.window)
        if writer.rewritten:
            self._left_out(batch, writer.rewritten, "are in the table with their timestamp in another form")
        self._note(united)
        return united

    def _note(self, hour: HourFile, **told: int) -> None:
        if hour.window is not None:
            self._accounts.note(hour.window, compared=hour.compared, digest=hour.digest, **told)

    def _kept(self, batch: HourFile, held: Sequence[Iterable[Mapping[str, str]]]) -> Iterator[Mapping[str, str]]:
        """The file's rows to keep. A row with an unreadable timestamp was truncated or typed by a person, since the
        table's unreadable items are set aside; it is left out, and the run's notes report it. The attribute that gets
        no column had one while the table was read in another way.
        """
        unread: list[str] = []
        plan = self._planned()
        for found in chain.from_iterable(held):
            is_constant = plan.left_out in found and found[plan.left_out] == plan.hash_values[0]
            row = {name: text for name, text in found.items() if name != plan.left_out} if is_constant else found
            text = row.get(self._accounts.attribute, "")
            if self._table.times.read(text).at is None:
                unread.append(text)
            elif not self._is_misplaced(batch, row):
                yield row
        if unread:
            self._left_out(batch, unread, "have no timestamp")

    def _left_out(self, batch: HourFile, texts: Sequence[str], why: str) -> None:
        told = f"{batch.window}: {len(texts)} rows of the file {why}, such as {texts[0][:80]!r}"
        log.warning("%s: they are left out; edited files have earlier revisions", told)
        self._accounts.removed.append(told)

    def _is_misplaced(self, batch: HourFile, row: Mapping[str, str]) -> bool:
        """True for a row that an earlier version put into this hour because it ignored the UTC offset.

        Only if the table still has the row and this run updates its correct hour: otherwise dropping it could lose it.
        """
        text = row.get(self._accounts.attribute, "")
        if self._span is None or text not in batch.elsewhere:
            return False
        at = self._table.times.read(text).at
        return at is not None and self._span.start <= at < self._span.end

    def _shape(self) -> FileShape:
        plan, table, timestamp = self._planned(), self._table, self._accounts.attribute
        key = tuple(name for name in plan.key if name != timestamp)
        return FileShape(timestamp, key, table.times, table.escape, plan.left_out)


def _together(work: Callable[[A], B], given: Sequence[A]) -> list[B]:
    """The results of `work` for each value, computed in parallel."""
    if len(given) == 1:
        return [work(given[0])]
    with ThreadPoolExecutor(SEGMENTS, thread_name_prefix="dynamo") as pool:
        contexts = [copy_context() for _ in given]
        return list(pool.map(lambda context, each: context.run(work, each), contexts, given))


def describe_unreadable(accounts: Accounts, times: TimestampReader) -> Permanent:
    """The error if no item has a readable timestamp."""
    number, attribute = accounts.set_aside, accounts.attribute
    if accounts.all_lack_the_attribute:
        names = ", ".join(sorted(accounts.attributes)[:NAMED])
        return Permanent(f"{number} items read, none has {attribute}; attributes seen: {names}", ATTRIBUTE_HINT)
    if unit := times.other_unit(accounts.text):
        return Permanent(
            f"{number} items read, none in the unit {times.unit} of DYNAMODB_TIMESTAMP_UNIT: "
            f"{attribute} {accounts.text} is in the unit {unit}",
            f"set DYNAMODB_TIMESTAMP_UNIT to {unit}, or unset it: then each number tells its unit",
        )
    return Permanent(
        f"{number} items read, none has a {attribute} that can be read, for example {accounts.sample}", WRITING_HINT
    )


def ping(table: DynamoTable, now: datetime) -> str:
    """Describe how the table is read, for `check`. Raises Transient or Permanent."""
    plan, times = table.plan(), table.times
    accounts = Accounts(table.given.timestamp_attribute, now)
    if plan.scans:
        wanted, items = WantedItems(HourTexts(times, SOME_HOUR), accounts), table.some()
        for item in items:
            wanted.takes(item)
        is_readable = len(items) > wanted.unreadable or not items
        way = f"may describe and scan; {plan.size_bytes} bytes for each hour"
    else:
        is_readable = DynamoSource(table, "", Stop(), accounts=accounts, now=now).look(plan).is_readable
        way = f"may describe and query; {f'index {plan.index}' if plan.index else 'the table'}"
    if not is_readable:
        raise describe_unreadable(accounts, times)
    if accounts.set_aside:
        way = f"{way}; {accounts.set_aside} timestamps cannot be read: {accounts.sample}"
    return "; ".join((way, *accounts.notes()))


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
