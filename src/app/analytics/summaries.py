"""The summaries: which object versions exist now, and their totals by device and day."""

import json
import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import compress
from threading import Lock
from types import MappingProxyType
from typing import Any

from app.analytics.engine import Engine
from app.analytics.object_facts import OTHER, aggregated
from app.analytics.reports import merged
from app.core.errors import Permanent, Rejected, Transient
from app.core.windows import instant_text
from app.db.object_summaries import (
    DayPack,
    DaySummary,
    KnownObject,
    Pair,
    SqlSummaries,
    Version,
    VersionToRead,
    version_of,
)
from app.object_store.deltas import unfolded_deltas
from app.object_store.port import ObjectInfo, ObjectStore

# Invariants: each version is read once, by whichever process sees it first. The exception is a pack, one sum over all
# versions of a past day: when one of them is added or removed, the others are re-read. Answers reflect one whole
# listing, never part of one; a failed listing changes nothing. A new object costs only the work for its own days.

SIZE = 16  # bytes of a version
PAIRS = 500
ROUNDS = 3
KEPT = timedelta(hours=1)
LOOKED = timedelta(hours=2)  # some versions that the export writes are replaced before a listing shows them
ASKED = 16_384  # cache size: objects whose properties are kept
LOOSE_DAYS = 3  # most late rows arrive within this time
PACKING_SECONDS = 5.0  # per refresh
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ListingView:
    """The result of one whole listing; `versions`: those that queries read. `number` increases with each change,
    `as_of` (ISO 8601) with each listing, and a day's number in `changes` when an object with rows of that day is added
    or removed.
    """

    number: int
    as_of: str
    versions: bytes
    days: Mapping[Pair, DaySummary]
    objects: int
    rows: int
    size_bytes: int
    columns: Mapping[str, Mapping[str, int]]
    faults: Sequence[tuple[str, str]]
    changes: Mapping[int, int]


@dataclass(slots=True)
class _State:
    """State of the refreshing thread; may hold part of a listing. `batches`: digest -> versions, for each batch of the
    last whole listing; `moved`: an object was added or removed since the last view; `touched`: pairs whose sum is out
    of date; `leaving`, `leaving_packs`: what to forget, and when; `looked_at`: when the stored facts were last compared
    with `current`; `sweeps`: None until the stored facts are loaded.

    `is_stale`: this state differs from the stored facts and must be reloaded.
    """

    current: bytes = b""
    batches: Mapping[bytes, bytes] = field(default_factory=dict)
    days: dict[Pair, DaySummary] = field(default_factory=dict)
    touched: set[Pair] = field(default_factory=set)
    faults: dict[Version, tuple[str, str]] = field(default_factory=dict)
    schemas: Counter[str] = field(default_factory=Counter)
    leaving: deque[tuple[datetime, Version]] = field(default_factory=deque)
    leaving_packs: deque[tuple[datetime, Pair]] = field(default_factory=deque)
    changes: Counter[int] = field(default_factory=Counter)
    rows: int = 0
    size_bytes: int = 0
    moved: bool = True
    is_stale: bool = False
    number: int = 0
    sweeps: int | None = None
    looked_at: datetime = EPOCH


class Summaries:
    """Keeps the summaries of all objects below `prefix`, which has no trailing slash. Thread-safe."""

    def __init__(
        self, store: ObjectStore, facts: SqlSummaries, engine: Engine, prefix: str, clock: Callable[[], datetime]
    ) -> None:
        self._store = store
        self._facts = facts
        self._engine = engine
        self._folder = f"{prefix}/" if prefix else ""
        self._clock = clock
        self._lock = Lock()
        self._state = _State()
        self.view: ListingView | None = None
        """The last whole listing; None before the first."""
        self._asked: dict[tuple[str, str, datetime], ObjectInfo] = {}
        self._schemas: Mapping[str, str] = {}
        self._packed_day = 0  # the last day on which everything was packed

    def sources(self, device: str | None, since: datetime | None, until: datetime | None) -> Sequence[VersionToRead]:
        """What a query over this device and span must read, from a single view; None = no limit."""
        epoch = datetime(1970, 1, 1)  # noqa: DTZ001 - naive UTC, as in all queries
        last = None if until is None else (until - epoch - timedelta(microseconds=1)).days
        return self.sources_of_days(device, None if since is None else (since - epoch).days, last)

    def sources_of_days(self, device: str | None, first: int | None, last: int | None) -> Sequence[VersionToRead]:
        """As `sources`, for whole days, counted from 1970-01-01."""
        if (view := self.view) is None:
            return []
        found = self._facts.keys(None if device is None else json.dumps(device), first, last)
        return list(compress(found, among([source.version for source in found], view.versions)))

    def holds(self, sources: Sequence[VersionToRead]) -> bool:
        """Whether the last view contains all of these versions."""
        view = self.view
        return view is not None and all(among([source.version for source in sources], view.versions))

    def refresh(self) -> ListingView:
        """List the objects, read new versions, drop deleted ones, and update the sums. Raises what the stores raise."""
        with self._lock:
            if self.view is None:
                self._facts.note_asked()
            for _ in range(ROUNDS):
                as_of = self._clock()
                if self._state.sweeps is None:
                    self._load(as_of)
                unread = self._list(as_of)
                self._add_up()
                if not self._state.is_stale and self._all_kept():
                    view = self._publish(as_of, unread)
                    self._pack(as_of)
                    return view
                self._state.sweeps = None
            raise Transient("another process keeps removing the summaries", "look for a second Headwater on this state")

    def _load(self, as_of: datetime) -> None:
        """Load all stored facts as current; the listing that follows drops versions that no longer exist."""
        held, sweeps = self._state, self._facts.sweeps()
        state = self._state = _State(number=held.number, changes=held.changes, leaving=held.leaving)
        self._schemas = self._facts.schemas()
        state.touched |= self._facts.all_pairs()
        self._take(self._facts.every())
        packed: list[Version] = []
        for pack in self._facts.packs():
            is_twice = among(pack.versions, state.current)
            if any(is_twice):
                for version, known in self._facts.known(list(compress(pack.versions, is_twice))).items():
                    self._count(known, -1)
                    state.faults.pop(version, None)
            packed += (one for one, twice in zip(pack.versions, is_twice, strict=True) if not twice)
            self._count_pack(pack, 1)
            state.days[pack.pair] = pack.part
            state.changes[pack.part.day] += 1
        state.current = united(state.current, packed)
        state.sweeps, state.looked_at = sweeps, as_of

    def _list(self, as_of: datetime) -> Sequence[tuple[str, str]]:
        """Update `current` from the store; returns what could not be fetched. A batch that is unchanged since the last
        listing, with all its versions known, is not parsed at all.
        """
        state = self._state
        unread: list[tuple[str, str]] = []
        seen: dict[bytes, bytes] = {}
        others: list[bytes] = []
        for batch in self._store.batches(self._folder, len(state.current) // SIZE):
            packed = state.batches.get(batch.digest)
            if packed is None:
                packed, is_known = self._look(batch.infos(), unread)
                if not batch.digest or not is_known:
                    others.append(packed)
                    continue
            seen[batch.digest] = packed
        is_same = not others and not state.moved and seen and seen.keys() == state.batches.keys()
        state.batches = seen
        if not is_same:
            self._drop(beyond(state.current, b"".join([*seen.values(), *others])), as_of, unread)
        return unread

    def _look(self, infos: Sequence[ObjectInfo], unread: list[tuple[str, str]]) -> tuple[bytes, bool]:
        """The versions that count, and whether they are the whole batch. New versions are read; those that cannot be
        fetched are added to `unread`; deltas whose rows another object already contains do not count.
        """
        left = unfolded_deltas((info for info in infos if self._is_ours(info.key)), self._head)
        by_version = {version_of(info.key, info.etag): info for info in left.infos}
        versions = list(by_version)
        here = set(compress(versions, among(versions, self._state.current)))
        fresh = {version: info for version, info in by_version.items() if version not in here}
        if fresh:
            here |= self._learn(fresh, unread)
        return b"".join(here), left.is_whole and here >= by_version.keys()

    def _head(self, one: ObjectInfo | str) -> ObjectInfo | None:
        """Properties of an object that may have deltas next to it, cached. None if access is denied, or if the object
        is in another batch and was replaced after the listing.
        """
        listed = None if isinstance(one, str) else (one.key, one.etag, one.modified_at)
        if listed is not None and listed in self._asked:
            return self._asked[listed]
        try:
            found = self._store.head(one if isinstance(one, str) else one.key)
        except (Permanent, Rejected) as error:
            log.warning("%s", error)
            return None
        if found is None or listed is None:
            return found if found and any(among([version_of(found.key, found.etag)], self._state.current)) else None
        if found.etag == listed[1]:
            if len(self._asked) >= ASKED:
                self._asked.clear()
            self._asked[listed] = found
        return found

    def _is_ours(self, key: str) -> bool:
        """False for folder markers and for other programs' private names, which begin with `_` or `.`."""
        path = f"/{key.removeprefix(self._folder)}"
        return "/_" not in path and "/." not in path and path[-1] != "/"

    def _learn(self, infos: Mapping[Version, ObjectInfo], unread: list[tuple[str, str]]) -> set[Version]:
        """Read versions and return those added: the given ones, or newer ones that have replaced them."""
        state = self._state
        known = self._facts.known(infos)
        state.touched |= self._facts.pairs(known)
        self._take(known.items())
        taken = set(known)
        left = [pair for _, pair in state.leaving_packs]
        if left and any(not infos.keys().isdisjoint(pack.versions) for pack in self._facts.packs(left)):
            state.is_stale = True  # deleted versions are back
        wanted = [] if state.is_stale else [infos[version] for version in infos.keys() - taken]

        def read() -> Iterator[tuple[Version, KnownObject]]:
            for group in aggregated(self._store, self._engine, wanted):
                self._facts.save(group.read)
                for facts in group.read:
                    state.touched |= {(part.device, part.day) for part in facts.parts}
                    taken.add(facts.version)
                    if not any(among([facts.version], state.current)):
                        columns = json.dumps(dict(facts.columns))
                        yield facts.version, KnownObject(facts.key, facts.size_bytes, facts.rows, facts.fault, columns)
                unread.extend((facts.key, facts.fault) for facts in group.unread)

        self._take(read())
        return taken

    def _take(self, added: Iterable[tuple[Version, KnownObject]]) -> None:
        """Add versions to the current ones, also those that come before an error."""
        state, versions = self._state, list[Version]()
        try:
            for version, known in added:
                self._count(known, 1)
                if known.fault:
                    state.faults[version] = (known.key, known.fault)
                versions.append(version)
        finally:
            state.current = united(state.current, versions)

    def _count(self, known: KnownObject, sign: int) -> None:
        state = self._state
        state.moved = True
        state.rows += sign * known.rows
        state.size_bytes += sign * known.size_bytes
        state.schemas[known.columns] += sign

    def _count_pack(self, pack: DayPack, sign: int) -> None:
        for schema_id, count in Counter(pack.schemas).items():
            if schema_id not in self._schemas:
                self._schemas = self._facts.schemas()
            self._state.schemas[self._schemas[schema_id]] += sign * count
        self._state.rows += sign * pack.part.rows
        self._state.size_bytes += sign * sum(pack.sizes)

    def _drop(self, versions: Sequence[Version], as_of: datetime, unread: list[tuple[str, str]]) -> None:
        """Subtract versions that are no longer current. A pack that also has other versions does not know their
        separate sum, so it is broken up, and those versions are re-read.
        """
        if not versions:
            return
        state = self._state
        gone = set(versions)
        known = self._facts.known(versions)
        pairs = self._facts.pairs(known)
        some = self._facts.packs(pairs if len(known) == len(gone) else None)
        packs = [pack for pack in some if not gone.isdisjoint(pack.versions)]
        if packs:
            self._schemas = self._facts.schemas()
        # No store is called from here on until everything is subtracted, so that no failure leaves it half done.
        state.touched |= pairs | {pack.pair for pack in packs}
        state.current = without(state.current, versions)
        state.moved = True
        packed = {version for pack in packs for version in pack.versions}
        for version, one in known.items():
            if version not in packed:
                state.faults.pop(version, None)
                self._count(one, -1)
        for pack in packs:
            self._count_pack(pack, -1)
        state.leaving += [(as_of + KEPT, version) for version in versions]
        state.is_stale |= bool(gone - known.keys() - packed)  # another process has removed their facts
        broken = [pack for pack in packs if not gone.issuperset(pack.versions)]
        state.leaving_packs += [(as_of + KEPT, pack.pair) for pack in packs if gone.issuperset(pack.versions)]
        if broken:
            self._break_up(broken, gone, as_of, unread)

    def _break_up(
        self, packs: Sequence[DayPack], gone: Collection[Version], as_of: datetime, unread: list[tuple[str, str]]
    ) -> None:
        state = self._state
        left = {
            version: ObjectInfo(key, size_bytes, etag, as_of)
            for pack in packs
            for version, key, size_bytes, etag in zip(pack.versions, pack.keys, pack.sizes, pack.etags, strict=True)
            if version not in gone
        }
        state.current = without(state.current, list(left))
        # Their batches are parsed next time, whether or not they can be read now.
        again = united(b"", list(left))
        state.batches = {digest: held for digest, held in state.batches.items() if not is_among(held, again).any()}
        self._swept(self._facts.forget((), [pack.pair for pack in packs]))
        self._learn(left, unread)

    def _add_up(self) -> None:
        state = self._state
        touched = sorted(state.touched)
        state.changes.update(day for _, day in touched)
        for start in range(0, len(touched), PAIRS):
            pairs = touched[start : start + PAIRS]
            kept = self._facts.parts(pairs)
            is_current = among([version for version, _ in kept], state.current)
            packs = [pack for pack in self._facts.packs(pairs) if all(among(pack.versions, state.current))]
            packed = {version for pack in packs for version in pack.versions}
            loose = (part for version, part in compress(kept, is_current) if version not in packed)
            found = merged([*(pack.part for pack in packs), *loose])
            for pair in pairs:
                state.days.pop(pair, None)
            state.days.update(found)
            state.touched.difference_update(pairs)

    def _all_kept(self) -> bool:
        """Whether the facts of every current version are still stored. Another process may have removed some meanwhile,
        so that the sums lack them; then everything is reloaded.
        """
        state = self._state
        sweeps, now = self._facts.sweeps(), self._clock()
        if state.sweeps == sweeps and now < state.looked_at + LOOKED:
            return True
        known = b"".join(self._facts.versions())
        leaving = {version for _, version in state.leaving}
        gone = beyond(known, state.current)
        state.leaving += [(now + KEPT, version) for version in gone if version not in leaving]
        state.sweeps, state.looked_at = sweeps, now
        return not beyond(state.current, known)

    def _publish(self, as_of: datetime, unread: Sequence[tuple[str, str]]) -> ListingView:
        """Publish the new view atomically. If no object has changed, it reuses the data of the last view."""
        state = self._state
        self._forget(as_of)
        held = self.view
        faults = sorted([*state.faults.values(), *unread], key=lambda each: (each[1] == OTHER, each))
        if held and not state.moved:
            state.number += faults != held.faults
            view = replace(held, number=state.number, as_of=str(instant_text(as_of)), faults=faults)
        else:
            state.number += 1
            days = MappingProxyType(dict(state.days))
            columns = _columns(state.schemas)
            others = sum(fault == OTHER for _, fault in state.faults.values())
            sums = (len(state.current) // SIZE - others, state.rows, state.size_bytes)
            at = str(instant_text(as_of))
            view = ListingView(state.number, at, state.current, days, *sums, columns, faults, dict(state.changes))
        self.view = view
        state.moved = False
        return view

    def _forget(self, now: datetime) -> None:
        """Remove facts of versions that left a while ago; not at once, since another process may still use them."""
        state = self._state
        due, packs = [], []
        while state.leaving and state.leaving[0][0] <= now:
            due.append(state.leaving.popleft()[1])
        while state.leaving_packs and state.leaving_packs[0][0] <= now:
            packs.append(state.leaving_packs.popleft()[1])
        gone = [version for version, one in zip(due, among(due, state.current), strict=True) if not one]
        left = [pack.pair for pack in self._facts.packs(packs) if not any(among(pack.versions, state.current))]
        if gone or left:
            self._swept(self._facts.forget(gone, left))

    def _swept(self, sweeps: int) -> None:
        """Record our own removal. If another process removed something too, the next refresh checks for it."""
        state = self._state
        if sweeps == (state.sweeps or 0) + 1:
            state.sweeps = sweeps

    def _pack(self, now: datetime) -> None:
        """Pack past days: once a day, for a limited time per refresh until there is nothing left to pack."""
        day = (now - EPOCH).days
        until = time.monotonic() + PACKING_SECONDS
        while self._packed_day < day and time.monotonic() < until:
            if not self._facts.pack(day - LOOSE_DAYS, partial(among, held=self._state.current), merged):
                self._packed_day = day


def _columns(schemas: Counter[str]) -> Mapping[str, Mapping[str, int]]:
    """Column -> type -> number of objects."""
    found: dict[str, dict[str, int]] = {}
    for columns, count in schemas.items():
        for name, kind in json.loads(columns).items() if count > 0 else ():
            types = found.setdefault(name, {})
            types[kind] = types.get(kind, 0) + count
    return found


# Sets of versions as bytes: 16 for each version, sorted and concatenated.
#
# Invariants: membership is exact, compared on all bits; a set never changes, so any thread may read it.


def among(versions: Sequence[Version], held: bytes) -> Sequence[bool]:
    """For each version, whether it is in the set."""
    found: list[bool] = is_among(b"".join(versions), held).tolist()
    return found


def united(held: bytes, versions: Sequence[Version]) -> bytes:
    """The set plus versions that are not in it."""
    import numpy as np

    array, added = _array(held), np.sort(_array(b"".join(versions)))
    made: bytes = np.insert(array, np.searchsorted(array, added), added).tobytes()
    return made


def without(held: bytes, versions: Sequence[Version]) -> bytes:
    """The set without these versions."""
    kept: bytes = _array(held)[~is_among(held, _in_order(b"".join(versions)))].tobytes()
    return kept


def beyond(wanted: bytes, held: bytes) -> Sequence[Version]:
    """Versions of `wanted` that are not in `held`; both are concatenated in any order."""
    gone: bytes = _array(wanted)[~is_among(wanted, _in_order(held))].tobytes()
    return [gone[start : start + SIZE] for start in range(0, len(gone), SIZE)]


def is_among(wanted: bytes, held: bytes) -> Any:
    """A boolean mask over `wanted`, versions in any order: which of them are in the set `held`."""
    import numpy as np

    array, looked = _array(held), _array(wanted)
    if not len(array):
        return np.zeros(len(looked), bool)
    places = np.searchsorted(array, looked)
    places[places == len(array)] = 0
    return array[places] == looked


def _array(packed: bytes) -> Any:
    import numpy as np

    return np.frombuffer(packed, f"S{SIZE}")  # compared byte by byte; all have the same length


def _in_order(packed: bytes) -> bytes:
    import numpy as np

    found: bytes = np.sort(_array(packed)).tobytes()
    return found
