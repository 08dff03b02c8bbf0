"""The ledger of one run of hours: each item that was read for an hour, and each that has no hour, is accounted for.

Invariant: what was counted is tallied where pages are read, what became of it where the sink tells what it holds or
takes, so that an item that gets lost between them leaves a gap. Items of other hours belong to those hours' ledgers.
"""

import logging
import threading
from dataclasses import dataclass, field
from hashlib import blake2b

from app.core.ledger import Ledger, SetAside, Tally, ledger_of, sampled
from app.core.window import Window
from app.dynamo_to_drive.decode import Item, cell, text_of, timed
from app.dynamo_to_drive.hour_file import Landed
from app.dynamo_to_drive.timestamps import NO_ATTRIBUTE
from app.stores.set_aside import MAX_BYTES, NDJSON, SetAsideStore

UNIT = "items"
NAMED_ATTRIBUTES = 20
log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Hour:
    """What is known of one hour's items. `only_held`: rows of the file that the table no longer returns."""

    counted: int = 0
    read: int = 0
    only_held: int = 0
    held: int = 0
    landed: Landed | None = None
    waiting: int | None = None

    @property
    def tally(self) -> Tally:
        landed = self.landed or Landed(already_there=self.held)
        if self.waiting is not None:
            return Tally(self.counted, self.read, waiting=self.waiting - self.only_held)
        there = landed.already_there - self.only_held
        return Tally(self.counted, self.read, landed.new, there, landed.corrected)


@dataclass(slots=True)
class _Reason:
    """Items that were set aside for one reason: all are counted, the text of the first ones is held."""

    sample: str
    number: int = 0
    size_bytes: int = 0
    lines: list[bytes] = field(default_factory=list)


class Accounts:
    """The accounts of one run. Safe from any thread. `attributes` and `text` are what unplaced items show: names, and
    one timestamp.
    """

    def __init__(self, attribute: str) -> None:
        self.attribute = attribute
        self.attributes: set[str] = set()
        self.text = ""
        self._hours: dict[Window, _Hour] = {}
        self._reasons: dict[str, _Reason] = {}
        self._known: set[bytes] = set()
        self._unplaced = 0
        self._lock = threading.Lock()

    def read(self, hour: Window, items: int, repeated: int) -> None:
        """An hour was read: so many items, of which some came twice. Replaces what an earlier reading of it said."""
        with self._lock:
            account = self._of(hour)
            account.counted, account.read, account.only_held = items - repeated, items, 0

    def only_held(self, hour: Window, rows: int) -> None:
        """So many rows of the hour's file are no items any more."""
        with self._lock:
            self._of(hour).only_held = rows

    def held(self, hour: Window, rows: int) -> None:
        """The sink has so many rows of the hour."""
        with self._lock:
            self._of(hour).held = rows

    def landed(self, hour: Window, landed: Landed) -> None:
        """The hour's file was put into its place."""
        with self._lock:
            self._of(hour).landed = landed

    def waits(self, hour: Window, rows: int) -> None:
        """A dry run would write so many rows."""
        with self._lock:
            self._of(hour).waiting = rows

    def _of(self, hour: Window) -> _Hour:
        return self._hours.setdefault(hour, _Hour())

    def unplaced(self, item: Item, reason: str) -> None:
        """An item without an hour: it lacks the attribute, or has the timestamp that `reason` tells of. One that was
        met before in this run counts once.
        """
        reason = reason if self.attribute in item else NO_ATTRIBUTE
        line = text_of(item) + b"\n"
        known = blake2b(line, digest_size=16).digest()
        value = item.get(self.attribute)
        with self._lock:
            if known in self._known:
                return
            self._known.add(known)
            self._unplaced += 1
            if len(self.attributes) < NAMED_ATTRIBUTES:
                self.attributes |= item.keys()
            self.text = self.text or timed(item, self.attribute) or ""
            told = self._reasons.setdefault(reason, _Reason(self._sample(item)))
            told.number += 1
            if told.size_bytes < MAX_BYTES:
                told.lines.append(line)
                told.size_bytes += len(line)
        log.debug("an item is set aside: %s, %d characters, %d attributes", reason, len(cell(value)), len(item))

    def _sample(self, item: Item) -> str:
        if self.attribute in item:
            return sampled(f"{self.attribute} = {cell(item[self.attribute])!r}")
        return sampled(f"attributes {', '.join(sorted(item))}")

    @property
    def set_aside(self) -> int:
        """How many items have no hour."""
        with self._lock:
            return self._unplaced

    @property
    def sample(self) -> str:
        """One timestamp that cannot be read, else one item without any."""
        with self._lock:
            found = sorted(self._reasons.items(), key=lambda each: each[0] == NO_ATTRIBUTE)
        return found[0][1].sample if found else ""

    @property
    def all_lack_the_attribute(self) -> bool:
        """True when this is what is wrong with every item that was set aside."""
        with self._lock:
            return set(self._reasons) == {NO_ATTRIBUTE}

    def closed(self, partition: str, store: SetAsideStore | None) -> Ledger:
        """The ledger, after the texts of what was set aside are kept in `store`; None = they are not."""
        entries = [self._entry(reason, partition, store) for reason in sorted(self._reasons)]
        total = sum((hour.tally for hour in self._hours.values()), Tally(self._unplaced, self._unplaced))
        return ledger_of(total, *entries, unit=UNIT).of_partition(partition)

    def _entry(self, reason: str, partition: str, store: SetAsideStore | None) -> SetAside:
        told = self._reasons[reason]
        if store is None:
            return SetAside(reason, told.number, 0, told.sample)
        kept = store.keep(
            partition,
            b"".join(sorted(told.lines)),  # threads bring them in any order, and the same shall look the same
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
