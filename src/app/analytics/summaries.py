"""The summaries: which versions of objects are there now, and what they add up to by device and day."""

import json
import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from itertools import compress
from threading import Lock
from types import MappingProxyType

from app.analytics.engine import Engine
from app.analytics.object_facts import OTHER, aggregated
from app.analytics.reports import merged
from app.analytics.version_set import VersionSet, beyond, in_order, is_among
from app.core.errors import Permanent, Rejected, Transient
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

# Invariants: a version is read once in its life, by whichever process meets it first, but for versions that are known
# together, as one sum of a day that is over: when one of them comes or goes, the others are read once more. What is
# answered is the state of one whole listing, never half of one; a listing that fails changes nothing. The cost of a new
# object is that of its own days.

PAIRS = 500
ROUNDS = 3
KEPT = timedelta(hours=1)
LOOKED = timedelta(hours=2)  # the export writes some versions that are replaced before a listing shows them
ASKED = 16_384  # objects whose properties are remembered
LOOSE_DAYS = 3  # most late rows come within them
PACKING_SECONDS = 5.0  # of one refresh
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ListingView:
    """What one whole listing showed; `versions`: those that queries read. `number` grows with each change, `as_of` with
    each listing, that of a day in `changes` when an object with rows of it comes or goes.
    """

    number: int
    as_of: datetime
    versions: VersionSet
    days: Mapping[Pair, DaySummary]
    objects: int
    rows: int
    size_bytes: int
    columns: Mapping[str, Mapping[str, int]]
    faults: Sequence[tuple[str, str]]
    changes: Mapping[int, int]


@dataclass(slots=True)
class _State:
    """What the refreshing thread holds, at times half of a listing. `batches`: the versions of each batch of the last
    whole listing, by digest; `moved`: an object came or went since the last view; `touched`: pairs whose sum is not up
    to date yet; `leaving`, `leaving_packs`: what is to be forgotten, and when; `looked_at`: when all that is known was
    last compared with `current`; `sweeps`: None until what is known was loaded.

    `is_stale`: what is known is not what is held here, which has to be loaded anew.
    """

    current: VersionSet = field(default_factory=VersionSet)
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
    """`prefix` without a slash at its end. All methods may be called from any thread."""

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
        self._view: ListingView | None = None
        self._asked: dict[tuple[str, str, datetime], ObjectInfo] = {}
        self._schemas: Mapping[str, str] = {}
        self._packed_day = 0  # that on which there was nothing more to pack

    @property
    def view(self) -> ListingView | None:
        """The last whole listing; None before the first."""
        return self._view

    def sources(self, device: str | None, since: datetime | None, until: datetime | None) -> Sequence[VersionToRead]:
        """What a query over this device and span has to read, all of one view; None = not limited."""
        epoch = datetime(1970, 1, 1)  # noqa: DTZ001 - naive UTC as everywhere in queries
        last = None if until is None else (until - epoch - timedelta(microseconds=1)).days
        return self.sources_of_days(device, None if since is None else (since - epoch).days, last)

    def sources_of_days(self, device: str | None, first: int | None, last: int | None) -> Sequence[VersionToRead]:
        """As `sources`, for whole days that count from 1970-01-01."""
        if (view := self._view) is None:
            return []
        found = self._facts.keys(None if device is None else json.dumps(device), first, last)
        return list(compress(found, view.versions.among([source.version for source in found])))

    def holds(self, sources: Sequence[VersionToRead]) -> bool:
        """Whether the last view has all of them."""
        view = self._view
        return view is not None and all(view.versions.among([source.version for source in sources]))

    def refresh(self) -> ListingView:
        """List, learn what is new, drop what is gone, and recompute the sums of both. Raises what the stores raise."""
        with self._lock:
            if self._view is None:
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
        """Take all that is known for current: the listing that follows drops what is not."""
        held, sweeps = self._state, self._facts.sweeps()
        state = self._state = _State(number=held.number, changes=held.changes, leaving=held.leaving)
        self._schemas = self._facts.schemas()
        state.touched |= self._facts.all_pairs()
        for version, known in self._facts.every():
            self._take(version, known)
        packed: list[bytes] = []
        for pack in self._facts.packs():
            is_twice = state.current.among(pack.versions)
            if any(is_twice):
                for version, known in self._facts.known(list(compress(pack.versions, is_twice))).items():
                    self._count(known, -1)
                    state.faults.pop(version, None)
            packed.append(b"".join(one for one, twice in zip(pack.versions, is_twice, strict=True) if not twice))
            self._count_pack(pack, 1)
            state.days[pack.pair] = pack.part
            state.changes[pack.part.day] += 1
        state.current.extend(b"".join(packed))
        state.sweeps, state.looked_at = sweeps, as_of

    def _list(self, as_of: datetime) -> Sequence[tuple[str, str]]:
        """Bring `current` up to the store; what could not be fetched. A batch that the last listing had, with every
        version of it known, is not even read.
        """
        state = self._state
        unread: list[tuple[str, str]] = []
        seen: dict[bytes, bytes] = {}
        others: list[bytes] = []
        for batch in self._store.batches(self._folder, len(state.current)):
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
            self._drop(state.current.beyond(b"".join([*seen.values(), *others])), as_of, unread)
        return unread

    def _look(self, infos: Sequence[ObjectInfo], unread: list[tuple[str, str]]) -> tuple[bytes, bool]:
        """The versions that count, and whether these are all of the batch: what is new is learnt, what cannot be
        fetched is added to `unread`, and deltas whose rows another object holds do not count.
        """
        left = unfolded_deltas((info for info in infos if self._is_ours(info.key)), self._head)
        by_version = {version_of(info.key, info.etag): info for info in left.infos}
        versions = list(by_version)
        here = set(compress(versions, self._state.current.among(versions)))
        fresh = {version: info for version, info in by_version.items() if version not in here}
        if fresh:
            here |= self._learn(fresh, unread)
        return b"".join(here), left.is_whole and here >= by_version.keys()

    def _head(self, one: ObjectInfo | str) -> ObjectInfo | None:
        """An object that may have deltas beside it, asked once. One that may not be looked at says nothing, nor does
        one of another batch that was replaced since it was listed.
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
            return found if found and any(self._state.current.among([version_of(found.key, found.etag)])) else None
        if found.etag == listed[1]:
            if len(self._asked) >= ASKED:
                self._asked.clear()
            self._asked[listed] = found
        return found

    def _is_ours(self, key: str) -> bool:
        """All but markers of folders, and what is other programs' own: names that begin with `_` or `.`."""
        path = f"/{key.removeprefix(self._folder)}"
        return "/_" not in path and "/." not in path and path[-1] != "/"

    def _learn(self, infos: Mapping[Version, ObjectInfo], unread: list[tuple[str, str]]) -> set[Version]:
        """The versions that were taken: those given, or newer ones that had taken their place."""
        state = self._state
        known = self._facts.known(infos)
        state.touched |= self._facts.pairs(known)
        for version, one in known.items():
            self._take(version, one)
        taken = set(known)
        left = [pair for _, pair in state.leaving_packs]
        if left and any(not infos.keys().isdisjoint(pack.versions) for pack in self._facts.packs(left)):
            state.is_stale = True  # they are back
        wanted = [] if state.is_stale else [infos[version] for version in infos.keys() - taken]
        for group in aggregated(self._store, self._engine, wanted):
            self._facts.save(group.read)
            for facts in group.read:
                state.touched |= {(part.device, part.day) for part in facts.parts}
                taken.add(facts.version)
                if not any(state.current.among([facts.version])):
                    columns = json.dumps(dict(facts.columns))
                    self._take(
                        facts.version, KnownObject(facts.key, facts.size_bytes, facts.rows, facts.fault, columns)
                    )
            unread += [(facts.key, facts.fault) for facts in group.unread]
        return taken

    def _take(self, version: Version, known: KnownObject) -> None:
        self._count(known, 1)
        if known.fault:
            self._state.faults[version] = (known.key, known.fault)
        self._state.current.add(version)

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
        """Count out what is no longer current. A pack that has other versions too cannot tell their sum, so that it is
        broken up, and they are learnt again.
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
        # Nothing is asked from here on until all is counted out, so that no failure leaves half of it.
        state.touched |= pairs | {pack.pair for pack in packs}
        state.current.drop(versions)
        state.moved = True
        packed = {version for pack in packs for version in pack.versions}
        for version, one in known.items():
            if version not in packed:
                state.faults.pop(version, None)
                self._count(one, -1)
        for pack in packs:
            self._count_pack(pack, -1)
        state.leaving += [(as_of + KEPT, version) for version in versions]
        state.is_stale |= bool(gone - known.keys() - packed)  # another process has forgotten them
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
        again = in_order(b"".join(left))
        state.current.drop(list(left))
        # Their batches are looked at next time, whether they can be read now or not.
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
            is_current = state.current.among([version for version, _ in kept])
            packs = [pack for pack in self._facts.packs(pairs) if all(state.current.among(pack.versions))]
            packed = {version for pack in packs for version in pack.versions}
            loose = (part for version, part in compress(kept, is_current) if version not in packed)
            found = merged([*(pack.part for pack in packs), *loose])
            for pair in pairs:
                state.days.pop(pair, None)
            state.days.update(found)
            state.touched.difference_update(pairs)

    def _all_kept(self) -> bool:
        """Whether the facts of every current version are still kept: another process may have removed some in between,
        and what was added up lacks them then. If not, everything is learnt again.
        """
        state = self._state
        sweeps, now = self._facts.sweeps(), self._clock()
        if state.sweeps == sweeps and now < state.looked_at + LOOKED:
            return True
        known = b"".join(self._facts.versions())
        leaving = {version for _, version in state.leaving}
        gone = beyond(known, state.current.joined)
        state.leaving += [(now + KEPT, version) for version in gone if version not in leaving]
        state.sweeps, state.looked_at = sweeps, now
        return not state.current.beyond(known)

    def _publish(self, as_of: datetime, unread: Sequence[tuple[str, str]]) -> ListingView:
        """Show what was found, in one step; where nothing has changed, all but the times is the last view's."""
        state = self._state
        self._forget(as_of)
        held = self._view
        faults = sorted([*state.faults.values(), *unread], key=lambda each: (each[1] == OTHER, each))
        if held and not state.moved:
            state.number += faults != held.faults
            view = replace(held, number=state.number, as_of=as_of, faults=faults)
        else:
            state.number += 1
            days = MappingProxyType(dict(state.days))
            versions, columns = state.current.copy(), _columns(state.schemas)
            others = sum(fault == OTHER for _, fault in state.faults.values())
            sums = (len(versions) - others, state.rows, state.size_bytes)
            view = ListingView(state.number, as_of, versions, days, *sums, columns, faults, dict(state.changes))
        self._view = view
        state.moved = False
        return view

    def _forget(self, now: datetime) -> None:
        """Remove facts of versions that left a while ago: another process may still have been working with them."""
        state = self._state
        due, packs = [], []
        while state.leaving and state.leaving[0][0] <= now:
            due.append(state.leaving.popleft()[1])
        while state.leaving_packs and state.leaving_packs[0][0] <= now:
            packs.append(state.leaving_packs.popleft()[1])
        gone = [version for version, one in zip(due, state.current.among(due), strict=True) if not one]
        left = [pack.pair for pack in self._facts.packs(packs) if not any(state.current.among(pack.versions))]
        if gone or left:
            self._swept(self._facts.forget(gone, left))

    def _swept(self, sweeps: int) -> None:
        """After a removal of our own; when somebody else removed something too, that is looked at next time."""
        state = self._state
        if sweeps == (state.sweeps or 0) + 1:
            state.sweeps = sweeps

    def _pack(self, now: datetime) -> None:
        """Once a day, and for a while with each refresh until there is nothing more to pack."""
        day = (now - EPOCH).days
        until = time.monotonic() + PACKING_SECONDS
        while self._packed_day < day and time.monotonic() < until:
            if not self._facts.pack(day - LOOSE_DAYS, self._state.current.among, merged):
                self._packed_day = day


def _columns(schemas: Counter[str]) -> Mapping[str, Mapping[str, int]]:
    """Column -> type -> in how many objects."""
    found: dict[str, dict[str, int]] = {}
    for columns, count in schemas.items():
        for name, kind in json.loads(columns).items() if count > 0 else ():
            types = found.setdefault(name, {})
            types[kind] = types.get(kind, 0) + count
    return found
