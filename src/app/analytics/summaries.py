"""The summaries: which versions of objects are there now, and what they add up to by device and day.

Invariants: a version is read once in its life, by whichever process meets it first; what is answered is the state of
one whole listing, never half of one; a listing that fails changes nothing. The cost of a new object is that of its own
days.
"""

import json
import logging
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from threading import Lock
from types import MappingProxyType

from app.analytics.aggregate import aggregated
from app.analytics.engine import Engine
from app.analytics.totals import merged
from app.core.errors import Transient
from app.stores.objects import ObjectInfo, ObjectStore
from app.stores.summaries import Known, Pair, Part, Source, SqlSummaries, version_of

CHUNK = 2000
PAIRS = 500
ROUNDS = 250  # small numbers are shared objects, so that a mark costs no memory
KEPT = timedelta(hours=1)
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class View:
    """What one whole listing showed; `versions`: those that queries read. `number` grows with each change, `as_of` with
    each listing.
    """

    number: int
    as_of: datetime
    versions: Collection[int]
    days: Mapping[Pair, Part]
    objects: int
    rows: int
    size_bytes: int
    columns: Mapping[str, Mapping[str, int]]
    faults: Sequence[tuple[str, str]]


@dataclass(slots=True)
class _State:
    """What the refreshing thread holds, half of a listing at times. `touched`: pairs whose sum is not up to date yet;
    `moved`: something came or went since the last view.
    """

    current: dict[int, int] = field(default_factory=dict)
    days: dict[Pair, Part] = field(default_factory=dict)
    touched: set[Pair] = field(default_factory=set)
    faults: dict[int, tuple[str, str]] = field(default_factory=dict)
    schemas: Counter[str] = field(default_factory=Counter)
    leaving: deque[tuple[datetime, int]] = field(default_factory=deque)
    rows: int = 0
    size_bytes: int = 0
    turn: int = 0
    moved: bool = False
    number: int = 0
    sweeps: int | None = None


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
        self._view: View | None = None

    @property
    def view(self) -> View | None:
        """The last whole listing; None before the first."""
        return self._view

    @property
    def instants(self) -> frozenset[str]:
        """The types that the column `timestamp` has in the objects."""
        return frozenset(self._view.columns.get("timestamp", ())) if self._view else frozenset()

    def sources(self, device: str | None, since: datetime | None, until: datetime | None) -> Sequence[Source]:
        """What a query over this device and span has to read, all of one view; None = not limited."""
        view = self._view
        if view is None:
            return []
        first, last = (None if at is None else (at - datetime(1970, 1, 1)).days for at in (since, until))  # noqa: DTZ001 - naive UTC as everywhere in queries
        found = self._facts.keys(None if device is None else json.dumps(device), first, last)
        return [source for source in found if source.version in view.versions]

    def holds(self, sources: Sequence[Source]) -> bool:
        """Whether the last view has all of them."""
        view = self._view
        return view is not None and all(source.version in view.versions for source in sources)

    def refresh(self) -> View:
        """List, learn what is new, drop what is gone, add up anew what that touched. Raises what the stores raise."""
        with self._lock:
            for _ in range(2):
                as_of = self._clock()
                unread = self._list(as_of)
                self._add_up()
                if self._all_kept():
                    return self._publish(as_of, unread)
            raise Transient("what is known of objects is removed by others all the time", "look for a second Headwater")

    def _listed(self) -> Iterator[ObjectInfo]:
        """Parquet objects below the prefix; names that begin with `_` or `.` are other programs' own."""
        for info in self._store.list(self._folder):
            names = info.key.removeprefix(self._folder).split("/")
            if names[-1].lower().endswith(".parquet") and not any(name.startswith(("_", ".")) for name in names):
                yield info

    def _list(self, as_of: datetime) -> Sequence[tuple[str, str]]:
        """Bring `current` up to the store; what could not be fetched."""
        state = self._state
        state.turn = (state.turn + 1) % ROUNDS
        unread: list[tuple[str, str]] = []
        waiting: list[ObjectInfo] = []
        for info in self._listed():
            version = version_of(info.key, info.etag)
            if version in state.current:
                state.current[version] = state.turn
                continue
            waiting.append(info)
            if len(waiting) == CHUNK:
                unread += self._learn(waiting)
                waiting = []
        unread += self._learn(waiting)
        self._drop([version for version, turn in state.current.items() if turn != state.turn], as_of)
        return unread

    def _learn(self, infos: Sequence[ObjectInfo]) -> Sequence[tuple[str, str]]:
        if not infos:
            return []
        by_version = {version_of(info.key, info.etag): info for info in infos}
        known = self._facts.known(by_version)
        self._state.touched |= self._facts.pairs(known)
        for version, one in known.items():
            self._take(version, one)
        unread: list[tuple[str, str]] = []
        fresh = [info for version, info in by_version.items() if version not in known]
        for group in aggregated(self._store, self._engine, fresh):
            self._facts.save(group.read)
            for facts in group.read:
                columns = json.dumps(dict(facts.columns))
                self._state.touched |= {(part.device, part.day) for part in facts.parts}
                self._take(facts.version, Known(facts.key, facts.size_bytes, facts.rows, facts.fault, columns))
            unread += [(facts.key, facts.fault) for facts in group.unread]
        return unread

    def _take(self, version: int, known: Known) -> None:
        state = self._state
        if version not in state.current:
            state.moved = True
            state.rows += known.rows
            state.size_bytes += known.size_bytes
            state.schemas[known.columns] += 1
            if known.fault:
                state.faults[version] = (known.key, known.fault)
        state.current[version] = state.turn

    def _drop(self, versions: Collection[int], as_of: datetime) -> None:
        if not versions:
            return
        state = self._state
        known = self._facts.known(versions)
        state.touched |= self._facts.pairs(versions)
        state.moved = True
        for version in versions:
            del state.current[version]
            state.faults.pop(version, None)
            state.leaving.append((as_of + KEPT, version))
            if version in known:
                state.rows -= known[version].rows
                state.size_bytes -= known[version].size_bytes
                state.schemas[known[version].columns] -= 1

    def _add_up(self) -> None:
        state = self._state
        touched = sorted(state.touched)
        for start in range(0, len(touched), PAIRS):
            pairs = touched[start : start + PAIRS]
            parts = (part for version, part in self._facts.parts(pairs) if version in state.current)
            found = merged(parts)
            for pair in pairs:
                state.days.pop(pair, None)
            state.days.update(found)
            state.touched.difference_update(pairs)

    def _all_kept(self) -> bool:
        """Whether the facts of every current version are still kept: another process may have removed some in between,
        and what was added up lacks them then. If not, everything is learnt again.
        """
        state = self._state
        sweeps = self._facts.sweeps()
        if state.sweeps == sweeps:
            return True
        missing = set(state.current)
        later = self._clock() + KEPT
        for version in self._facts.versions():
            if version in missing:
                missing.discard(version)
            else:
                state.leaving.append((later, version))
        state.sweeps = sweeps
        if missing:
            self._state = _State(number=state.number, sweeps=sweeps, leaving=state.leaving, moved=True)
        return not missing

    def _publish(self, as_of: datetime, unread: Sequence[tuple[str, str]]) -> View:
        """Show what was found, in one step; where nothing has changed, all but the times is the last view's."""
        state = self._state
        self._forget(as_of)
        held = self._view
        faults = sorted([*state.faults.values(), *unread])
        if held and not state.moved:
            state.number += faults != held.faults
            view = replace(held, number=state.number, as_of=as_of, faults=faults)
        else:
            state.number += 1
            days = MappingProxyType(dict(state.days))
            versions, columns = frozenset(state.current), _columns(state.schemas)
            sums = (len(versions), state.rows, state.size_bytes)
            view = View(state.number, as_of, versions, days, *sums, columns, faults)
        self._view = view
        state.moved = False
        return view

    def _forget(self, now: datetime) -> None:
        """Remove facts of versions that left a while ago: another process may still have been working with them."""
        state = self._state
        due = []
        while state.leaving and state.leaving[0][0] <= now:
            due.append(state.leaving.popleft()[1])
        gone = [version for version in due if version not in state.current]
        if gone and self._facts.forget(gone) == (state.sweeps or 0) + 1:
            state.sweeps = (state.sweeps or 0) + 1  # else somebody else did so too, which is looked at next time


def _columns(schemas: Counter[str]) -> Mapping[str, Mapping[str, int]]:
    """Column -> type -> in how many objects."""
    found: dict[str, dict[str, int]] = {}
    for columns, count in schemas.items():
        for name, kind in json.loads(columns).items() if count > 0 else ():
            types = found.setdefault(name, {})
            types[kind] = types.get(kind, 0) + count
    return found
