"""DynamoDB as a source: one table, one partition, one hour at a time.

Invariant: every item read becomes a row of an hour or is passed to `Accounts` with the reason.
"""

import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from contextvars import copy_context
from dataclasses import replace
from datetime import datetime
from decimal import Decimal
from itertools import chain
from typing import Any, TypeVar

from app.core.errors import Permanent
from app.core.ledger import sampled
from app.core.pipeline import UNCOUNTED, Count, Shrink
from app.core.runs import Stop
from app.core.windows import EPOCH, HOUR_SECONDS, Window, floor_to, window_at
from app.dynamo_to_drive.accounts import Accounts
from app.dynamo_to_drive.hour_file import FileShape, HourFile, HourWriter, lines_in, read_file
from app.dynamo_to_drive.rows import Item, PageReader, cell, timestamp_text
from app.dynamo_to_drive.table import AROUND, BASE64, FIRSTS, SEGMENTS, AccessPath, DynamoTable
from app.dynamo_to_drive.timestamps import (
    EVERY_TRAIT,
    UNREADABLE,
    HourTexts,
    TextTrait,
    TimestampReader,
    TimestampReading,
    is_found,
)

SOME_HOUR = window_at(EPOCH, 3600)  # any hour: `ping` only checks whether timestamps are readable
NAMED = 20
ATTRIBUTE_HINT = "set DYNAMODB_TIMESTAMP_ATTRIBUTE to the attribute that says when a row was measured"
WRITING_HINT = "write ISO 8601 or epoch numbers, or " + ATTRIBUTE_HINT
log = logging.getLogger(__name__)

A = TypeVar("A")
B = TypeVar("B")


class WantedItems(HourTexts):
    """Selects the items of one hour. Not thread-safe.

    `elsewhere` are timestamps of other hours that begin like this one but have a UTC offset.
    """

    def __init__(self, times: TimestampReader, hour: Window, accounts: Accounts) -> None:
        super().__init__(times, hour)
        self.traits = set[TextTrait]()
        self.unreadable = 0
        self.elsewhere = set[str]()
        self._accounts = accounts

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
        is_inside, reading = self.place(text)
        self.traits |= reading.traits
        if reading.at is not None and not is_inside:
            self._accounts.placed(reading.at, text)
        if not is_inside and TextTrait.OFFSET in reading.traits and text.startswith(self.beginnings):
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
        self._newest: tuple[str, bool] | None = None
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
            if plan.scans:
                hour, wanted, items = self._filled(plan, window, self._table.scans())
                is_readable = not items
            else:
                hour, wanted, items = self._queried(plan, window)
                _, is_readable = self._looked(plan)
            if items == wanted.unreadable and not is_readable:
                hour.close()
                raise describe_unreadable(self._accounts, self._table.times)
        except Permanent:
            self._plan = None
            self._table.close()
            raise
        return hour

    def _planned(self) -> AccessPath:
        """The access path of this run."""
        self._plan = self._plan or self._table.plan()
        return self._plan

    def _looked(self, plan: AccessPath) -> tuple[str, bool]:
        """What `look` returns, once a run; it looks at the first items once an hour."""
        if self._newest is None:
            firsts = FIRSTS, floor_to(self._now, HOUR_SECONDS)
            self._newest = self.look(plan, firsts=firsts not in self._table.looked)
            self._table.looked.add(firsts)
        return self._newest

    def _queried(self, plan: AccessPath, window: Window) -> tuple[HourFile, WantedItems, int]:
        """Query the hour with the traits seen so far; with every trait if it is the run's first, still open, empty or
        read again, or if an item shows a new trait.
        """
        newest, _ = self._looked(plan)
        is_text, traits, around = plan.timestamp_type == "S", self._table.traits, (AROUND, window.start)
        is_new = is_text and around not in self._table.looked
        if is_new and (not self._asked or window in self._asked or window.end > self._now):
            traits = EVERY_TRAIT
        self._asked.add(window)
        hour, wanted, items = self._filled(plan, window, self._table.queries(plan, window, traits, newest))
        if is_text and traits != EVERY_TRAIT and (wanted.traits - traits or (is_new and not hour.rows)):
            hour.close()
            traits = EVERY_TRAIT
            hour, wanted, items = self._filled(plan, window, self._table.queries(plan, window, traits))
        if traits == EVERY_TRAIT:
            self._table.looked.add(around)
        self._table.note(wanted.traits)
        return hour, wanted, items

    def look(self, plan: AccessPath, *, firsts: bool = True) -> tuple[str, bool]:
        """Check the newest items of each partition value, and report unreadable ones to `Accounts`.

        Returns the largest readable number ("" for text), and whether a timestamp is readable or there are no items.
        `firsts` also checks the first items: texts that sort before all others are in no hour's range; so does a value
        whose newest items all are unreadable. Raises Permanent if no item has these partition values although the table
        has items.
        """
        is_text, times = plan.timestamp_type == "S", self._table.times

        def is_readable(item: Item) -> bool:
            return is_found(times, timestamp_text(item, self._accounts.attribute) or "", is_text=is_text)

        def ends(value: str) -> tuple[Sequence[Item], Sequence[Item]]:
            last = self._table.end(plan, value, is_readable)
            looks = last and (firsts or not is_readable(last[-1]))
            return last, self._table.end(plan, value, is_readable, is_first=True) if looks else ()

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
        has_readable = not newest or any(items and is_readable(items[-1]) for pair in found for items in pair)
        return "" if is_text else max(texts, key=Decimal, default=""), has_readable

    def _refuse_other_values(self, plan: AccessPath) -> None:
        """Raises Permanent if the table has items, but none with these partition values."""
        try:
            items = self._table.some()
        except Permanent as error:  # credentials that may only query suffice for everything else
            log.info("cannot tell whether table %s is empty: %s", self._table.given.table_name, error)
            return
        if not items:
            return
        form = BASE64 if plan.hash_type == "B" else ""
        values = sorted({f"{form}{cell(item[plan.hash_name])}" for item in items if plan.hash_name in item})
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
        wanted = WantedItems(self._table.times, window, self._accounts)
        pages = PageReader(self._accounts.attribute, plan.left_out, wanted)
        with closing(HourWriter(self._shape())) as writer:

            def follow(asked: Mapping[str, Any]) -> None:
                for taken in self._table.pages(method, asked, self._stop):
                    with turn:
                        for rows in pages.read(taken):
                            writer.add(pages.columns, rows)

            _together(follow, list(requests))
            hour = replace(writer.finish(), window=window, elsewhere=frozenset(wanted.elsewhere))
        self._note(hour, counted=pages.rows - hour.repeated, read=pages.rows)
        return hour, wanted, pages.items

    def read_each(self, counted: Sequence[tuple[str, Window, Count]]) -> Iterator[HourFile]:
        """Hour by hour: nothing is cheaper than a Query of one hour."""
        return (self.read(partition, window, count, None) for partition, window, count in counted)

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
        plan, span = self._planned(), self._span
        for found in chain.from_iterable(held):
            is_constant = plan.left_out in found and found[plan.left_out] == plan.constant
            row = {name: text for name, text in found.items() if name != plan.left_out} if is_constant else found
            text = row.get(self._accounts.attribute, "")
            at = self._table.times.read(text).at
            # An earlier version put rows into this hour because it ignored the UTC offset. Such a row goes only if the
            # table still has it and this run updates its correct hour: otherwise dropping it could lose it.
            if at is None:
                unread.append(text)
            elif text not in batch.elsewhere or span is None or not span.start <= at < span.end:
                yield row
        if unread:
            self._left_out(batch, unread, "have no timestamp")

    def _left_out(self, batch: HourFile, texts: Sequence[str], why: str) -> None:
        told = f"{batch.window}: {len(texts)} rows of the file {why}, such as {texts[0][:80]!r}"
        log.warning("%s: they are left out; edited files have earlier revisions", told)
        self._accounts.removed.append(told)

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
        wanted, items = WantedItems(times, SOME_HOUR, accounts), table.some()
        for item in items:
            wanted.takes(item)
        is_readable = len(items) > wanted.unreadable or not items
        way = f"may describe and scan; {plan.size_bytes} bytes for each hour"
    else:
        _, is_readable = DynamoSource(table, "", Stop(), accounts=accounts, now=now).look(plan)
        way = f"may describe and query; {f'index {plan.index}' if plan.index else 'the table'}"
    if not is_readable:
        raise describe_unreadable(accounts, times)
    if accounts.set_aside:
        way = f"{way}; {accounts.set_aside} timestamps cannot be read: {accounts.sample}"
    return "; ".join((way, *accounts.notes()))
