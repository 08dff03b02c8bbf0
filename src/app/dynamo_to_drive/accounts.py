"""The ledger of one run: accounts for each item read for an hour, and for each item without an hour.

Invariant: items are counted where pages are read, and outcomes where the sink reports what it has or writes, so an item
lost in between shows up as a gap. Items of other hours belong to those hours' ledgers.
"""

import logging
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from hashlib import blake2b
from typing import Any

from app.core.ledger import Ledger, SetAside, Tally, ledger_of, sampled
from app.core.windows import Window
from app.dynamo_to_drive.rows import Item, cell, text_of, timestamp_text
from app.dynamo_to_drive.timestamps import NO_ATTRIBUTE
from app.object_store.set_aside import MAX_BYTES, NDJSON, SetAsideStore

UNIT = "items"
NAMED_ATTRIBUTES = 20
KNOWN_ITEMS = 1 << 18  # some 25 MB; a whole table may lack the attribute
WRITTEN, WOULD_WRITE = "written", "would be written"
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class HourAccount:
    """One hour: `counted` items in the table, `read` items (some of them twice), and what is `compared` with the file.

    `digest` is that of the file as it should be, `held_digest` that of the file that is there; `is_edited`: somebody
    else wrote that. `outcome`: what was done, WRITTEN, WOULD_WRITE or nothing.
    """

    counted: int = 0
    read: int = 0
    compared: Tally = field(default_factory=Tally)
    digest: str = ""
    held_digest: str = ""
    is_edited: bool = False
    outcome: str = ""

    @property
    def tally(self) -> Tally:
        """What became of the items; those of an hour that could not be written wait for the next run."""
        if self.outcome == WRITTEN:
            return replace(self.compared, counted=self.counted, read=self.read)
        if self.outcome == WOULD_WRITE:
            return Tally(self.counted, self.read, waiting=self.counted)
        there = self.counted if self.digest == self.held_digest else self.compared.already_there
        return Tally(self.counted, self.read, already_there=there, waiting=self.counted - there)


@dataclass(slots=True)
class _Reason:
    """Items set aside for one reason: all are counted, but only the text of the first ones is kept."""

    sample: str
    number: int = 0
    size_bytes: int = 0
    lines: list[bytes] = field(default_factory=list)


class Accounts:
    """The accounts of one run. Thread-safe.

    `attributes` and `text` are attribute names and one timestamp of items without an hour. `ahead` is the furthest
    timestamp more than a day ahead of `now`, `empty` the partition values without items; "" for none. `removed` has
    notes on file rows that were left out or removed by a person.
    """

    def __init__(self, attribute: str, now: datetime | None = None, known_items: int = KNOWN_ITEMS) -> None:
        self.attribute = attribute
        self._known_items = known_items
        self._ahead_at = now + timedelta(days=1) if now else None
        self.ahead = ""
        self.empty = ""
        self.removed: list[str] = []
        self.attributes: set[str] = set()
        self.text = ""
        self._hours: dict[Window, HourAccount] = {}
        self._reasons: dict[str, _Reason] = {}
        self._known: set[bytes] = set()
        self._lock = threading.Lock()

    def placed(self, at: datetime, text: str) -> None:
        """Check a timestamp that was read. One far ahead of now may be in another unit or format, and would silently
        wait for its hour.
        """
        if self._ahead_at is not None and at > self._ahead_at:
            with self._lock:
                self._ahead_at, self.ahead = at, text

    def note(self, hour: Window, **told: Any) -> None:
        """Set fields of an hour's account."""
        with self._lock:
            self._hours[hour] = replace(self.of(hour), **told)

    def of(self, hour: Window) -> HourAccount:
        """The account of an hour."""
        return self._hours.get(hour, HourAccount())

    def unplaced(self, item: Item, reason: str) -> None:
        """Set aside an item without an hour: it lacks the attribute, or its timestamp is unusable for `reason`. Repeats
        within a run count once, those of the first `known_items`; of later ones each reading counts.
        """
        reason = reason if self.attribute in item else NO_ATTRIBUTE
        line = text_of(item) + b"\n"
        known = blake2b(line, digest_size=16).digest()
        value = item.get(self.attribute)
        with self._lock:
            if known in self._known:
                return
            if len(self._known) < self._known_items:
                self._known.add(known)
            if len(self.attributes) < NAMED_ATTRIBUTES:
                self.attributes |= item.keys()
            self.text = self.text or timestamp_text(item, self.attribute) or ""
            if reason not in self._reasons:
                shown = f"{self.attribute} = {cell(value)!r}" if value else f"attributes {', '.join(sorted(item))}"
                self._reasons[reason] = _Reason(sampled(shown))
            told = self._reasons[reason]
            told.number += 1
            if told.size_bytes < MAX_BYTES:
                told.lines.append(line)
                told.size_bytes += len(line)
        log.debug("an item is set aside: %s, %d characters, %d attributes", reason, len(cell(value)), len(item))

    @property
    def set_aside(self) -> int:
        """The number of items without an hour."""
        return sum(told.number for told in self._reasons.values())

    @property
    def sample(self) -> str:
        """An example of an unreadable timestamp, else of an item without one."""
        found = sorted(self._reasons.items(), key=lambda each: each[0] == NO_ATTRIBUTE)
        return found[0][1].sample if found else ""

    @property
    def all_lack_the_attribute(self) -> bool:
        """True if every item set aside lacks the timestamp attribute."""
        return set(self._reasons) == {NO_ATTRIBUTE}

    def closed(self, partition: str, store: SetAsideStore | None) -> Ledger:
        """Store the items set aside in `store` (None: do not store them) and return the ledger."""
        entries = [self._entry(reason, partition, store) for reason in sorted(self._reasons)]
        total = sum((hour.tally for hour in self._hours.values()), Tally(self.set_aside, self.set_aside))
        return ledger_of(total, *entries, unit=UNIT).of_partition(partition)

    def _entry(self, reason: str, partition: str, store: SetAsideStore | None) -> SetAside:
        told = self._reasons[reason]
        if store is None:
            return SetAside(reason, told.number, 0, told.sample)
        kept = store.keep(
            partition,
            b"".join(sorted(told.lines)),  # threads add them in any order; the same items must give the same bytes
            content_type=NDJSON,
            reason=reason,
            number=told.number,
            sample=told.sample,
        )
        if kept.new:
            log.warning(
                "%s: %d items set aside: %s, for example %s; kept in %s",
                *(partition, kept.new, reason, told.sample, kept.key or "no object"),
            )
        return kept.entry

    def notes(self) -> Iterator[str]:
        """Notes on timestamps far ahead of now, on rows removed from files, and on partition values without items."""
        if self.ahead:
            found = f"{self.attribute} {self.ahead} is in the future: such an item is exported when its hour comes"
            yield f"{found}; if that date is wrong, set DYNAMODB_TIMESTAMP_UNIT or DYNAMODB_TIMESTAMP_ATTRIBUTE"
        yield from self.removed
        if self.empty:
            yield f"no item has {self.empty}: check DYNAMODB_PARTITION_VALUES"
