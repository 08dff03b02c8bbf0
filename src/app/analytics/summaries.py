"""The summaries: which versions of objects are there now, and what they add up to by device and day."""

import json
import logging
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from itertools import compress, islice
from pathlib import Path
from shutil import copyfileobj
from tempfile import TemporaryDirectory
from threading import Lock
from types import MappingProxyType
from typing import Any, BinaryIO
from uuid import uuid4

from app.analytics.columns import File, file_column, file_of, format_of, lost_values, relation, schemas, suffix_of
from app.analytics.engine import Engine, TooLarge, UnreadableObject, Wrong, literal, written
from app.analytics.reports import LATEST, merged
from app.core.errors import AppError, Conflict, Permanent, Rejected, Transient
from app.db.object_summaries import (
    NO_DAY,
    PART_FIELDS,
    DaySummary,
    Facts,
    KnownObject,
    Pair,
    SqlSummaries,
    Version,
    VersionToRead,
)
from app.db.packed_days import folder_of, version_of
from app.object_store.deltas import unfolded
from app.object_store.port import ObjectInfo, ObjectStore

# A set of versions in little memory: 16 bytes each, sorted, one after another.
#
# Invariants: a version is in the set or not, to the last bit; a reader in another thread sees the set before a
# change or after it.

SIZE = 16
LOOSE = 16_384
SHARE = 8


class Versions:
    """One thread changes it, any thread reads."""

    def __init__(self) -> None:
        # One attribute: a reader never meets the sorted ones of one state beside the loose ones of another.
        self._held: tuple[bytes, set[Version]] = (b"", set())

    def __len__(self) -> int:
        packed, loose = self._held
        return len(packed) // SIZE + len(loose)

    def copy(self) -> "Versions":
        """The set as it is now, which stays so. What is sorted is held once for both."""
        packed, loose = self._held
        made = Versions()
        made._held = (packed, set(loose))
        return made

    def among(self, versions: Sequence[Version]) -> Sequence[bool]:
        """For each of them whether it is in the set."""
        packed, loose = self._held
        found: list[bool] = _among(b"".join(versions), packed).tolist() if packed else [False] * len(versions)
        return [one or version in loose for one, version in zip(found, versions, strict=True)] if loose else found

    def add(self, version: Version) -> None:
        """One that is not in the set."""
        packed, loose = self._held
        loose.add(version)
        if len(loose) >= max(LOOSE, len(packed) // SIZE // SHARE):
            self._held = (_sorted(packed + b"".join(loose)), set())

    def beyond(self, packed: bytes) -> Sequence[Version]:
        """All that are not in `packed`, versions one after another in any order."""
        here = self._held[0] + b"".join(self._held[1])
        if not here:
            return []
        gone: bytes = _array(here)[~_among(here, _sorted(packed))].tobytes()
        return [gone[start : start + SIZE] for start in range(0, len(gone), SIZE)]

    def drop(self, versions: Sequence[Version]) -> None:
        """Take these out."""
        packed, loose = self._held
        is_gone = _among(packed, _sorted(b"".join(versions)))
        self._held = (_array(packed)[~is_gone].tobytes(), loose.difference(versions))


def _array(packed: bytes) -> Any:
    import numpy as np

    return np.frombuffer(packed, f"S{SIZE}")  # compared byte by byte; all have the same length


def _sorted(packed: bytes) -> bytes:
    import numpy as np

    found: bytes = np.sort(_array(packed)).tobytes()
    return found


def _among(wanted: bytes, held: bytes) -> Any:
    """A mask over `wanted`; `held` is sorted."""
    import numpy as np

    array, looked = _array(held), _array(wanted)
    if not len(array):
        return np.zeros(len(looked), bool)
    places = np.searchsorted(array, looked)
    places[places == len(array)] = 0
    return array[places] == looked


# Facts of many objects at once: each is fetched in the version that was listed, and DuckDB aggregates them together.
#
# Invariants: facts belong to the version that they were read from; memory and disk stay bounded however large an
# object is; an object that cannot be read is a fact too, and hinders no other.

AT_ONCE = 16  # as many connections as the store keeps
GROUP_OBJECTS = 64
GROUP_BYTES = 64 << 20
PIECE_BYTES = 1 << 20
ATTEMPTS = 3
MAGIC = b"PAR1"
OTHER = "is neither Parquet nor CSV, and is left out"
NOTE_CHARACTERS = 300


@dataclass(frozen=True, slots=True)
class Group:
    """What was found. `unread` could not be fetched or held in memory, which is not the object's fault: it is tried
    again later.
    """

    read: Sequence[Facts]
    unread: Sequence[Facts] = ()


@dataclass(frozen=True, slots=True)
class FetchedObject:
    """One object. Without a local copy, `refused` says why the store did not return it; without both, it is neither
    Parquet nor CSV.
    """

    facts: Facts
    file: Path | None = None
    refused: AppError | None = None


def aggregated(store: ObjectStore, engine: Engine, infos: Sequence[ObjectInfo]) -> Iterator[Group]:
    """Facts of these objects, group by group, the next one fetched meanwhile. Objects that are gone are left out; those
    that were replaced since have the version that is there now. Raises Transient when the store fails.
    """
    if not infos:
        return
    with (
        TemporaryDirectory(dir=engine.folder, prefix="copies-") as folder,
        ThreadPoolExecutor(AT_ONCE, thread_name_prefix="analytics-fetch") as pool,
    ):
        waiting: list[Any] | None = None
        for group in _groups(infos):
            ahead = [pool.submit(_fetch, store, Path(folder), info) for info in group]
            if waiting is not None:
                yield _facts(engine, waiting)
            waiting = ahead
        if waiting is not None:
            yield _facts(engine, waiting)


def _groups(infos: Sequence[ObjectInfo]) -> Iterator[Sequence[ObjectInfo]]:
    group: list[ObjectInfo] = []
    size_bytes = 0
    for info in infos:
        if group and (len(group) == GROUP_OBJECTS or size_bytes + info.size_bytes > GROUP_BYTES):
            yield group
            group, size_bytes = [], 0
        group.append(info)
        size_bytes += info.size_bytes
    if group:
        yield group


def _fetch(store: ObjectStore, folder: Path, info: ObjectInfo) -> FetchedObject | None:
    """A local copy of the version that was listed, or of the one that is there now; None for an object that is gone."""
    wanted: ObjectInfo | None = info
    for _ in range(ATTEMPTS):
        if wanted is None:
            return None
        facts = Facts(wanted.key, wanted.etag, wanted.size_bytes)
        try:
            with store.open(wanted.key, wanted.etag) as body:
                if body is None:
                    return None
                start = body.read(len(MAGIC))
                if not format_of(wanted.key) and start != MAGIC:
                    return FetchedObject(Facts(wanted.key, wanted.etag, size_bytes=0, fault=OTHER))
                return FetchedObject(facts, _copy(body, start, folder / f"{uuid4().hex}{suffix_of(wanted.key)}"))
        except Conflict:
            wanted = store.head(wanted.key)
        except (Permanent, Rejected) as error:
            return FetchedObject(replace(facts, fault=error.message), refused=error)
    raise Transient(f"{info.key} is replaced faster than it can be read", "no action needed, it is retried")


def _copy(body: BinaryIO, start: bytes, file: Path) -> Path:
    """What was read already and the rest, in a new file."""
    with ExitStack() as undo:
        undo.callback(file.unlink, missing_ok=True)
        with written(), file.open("xb") as copy:
            copy.write(start)
            copyfileobj(body, copy, PIECE_BYTES)
        undo.pop_all()
    return file


def _facts(engine: Engine, futures: Sequence[Any]) -> Group:
    fetched: list[FetchedObject] = [one for future in futures if (one := future.result()) is not None]
    refused = [one for one in fetched if one.refused]
    if refused and len(refused) == len(fetched) and isinstance(refused[0].refused, Permanent):
        raise refused[0].refused
    copies = [one for one in fetched if one.file]
    others = [one.facts for one in fetched if not one.refused and not one.file]
    found = _read(engine, copies)
    group = Group([*found.read, *others], [*found.unread, *(one.facts for one in refused)])
    for one in copies:
        Path(str(one.file)).unlink()
    return group


def _read(engine: Engine, copies: Sequence[FetchedObject]) -> Group:
    """All in one query; one by one when that fails, to find which cannot be read. One that needs more memory than there
    is now is tried again later, when no report runs.
    """
    if not copies:
        return Group([])
    try:
        return Group(_together(engine, copies))
    except (UnreadableObject, Wrong) as error:
        if len(copies) == 1:
            return Group([_faulty(copies[0], error)])
    except TooLarge as error:
        if len(copies) == 1:
            return Group([], [_faulty(copies[0], error)])
    groups = [_read(engine, [one]) for one in copies]
    return Group(
        [facts for group in groups for facts in group.read], [facts for group in groups for facts in group.unread]
    )


def _faulty(one: FetchedObject, error: AppError) -> Facts:
    """With the object's key in place of the copy's name."""
    return replace(one.facts, fault=error.message.replace(str(one.file), one.facts.key))


def _together(engine: Engine, copies: Sequence[FetchedObject]) -> Sequence[Facts]:
    columns = schemas(engine, [(str(one.file), one.facts.key) for one in copies])
    files = [file_of(str(one.file), one.facts.key, json.dumps(columns[str(one.file)])) for one in copies]
    usable = [file for file in files if not file.reading.problem]
    parts: dict[str, list[DaySummary]] = {}
    notes = {file.name: list(file.reading.notes) for file in usable}
    if usable:
        for name, device, day, *numbers, latest in engine.rows(_aggregates(engine.folder, usable)):
            values = (json.dumps(device), NO_DAY if day is None else day, *numbers)
            newest = latest and (latest["at"], *(latest[each] for each in LATEST[1:-1]), latest["nanos"])
            part = DaySummary(**dict(zip(PART_FIELDS, values, strict=True)), latest=newest)
            parts.setdefault(name, []).append(part)
        if lost := lost_values(engine.folder, usable):
            for name, column, count, example in engine.rows(lost):
                notes[name].append(
                    f"{count} values of {column} are not understood and count as null, such as {example!r}"
                )
    return [
        Facts(
            one.facts.key,
            one.facts.etag,
            one.facts.size_bytes,
            rows=sum(part.rows for part in parts.get(file.name, ())),
            columns=columns[file.name],
            fault=file.reading.problem or "; ".join(notes[file.name])[:NOTE_CHARACTERS],
            parts=sorted(parts.get(file.name, ()), key=lambda part: (part.device, part.day)),
        )
        for one, file in zip(copies, files, strict=True)
    ]


def _aggregates(folder: Path, files: Sequence[File]) -> str:
    name = file_column(files)
    instant = "'at': epoch_us(timestamp), 'nanos': coalesce(timestamp_nanos, 0)"
    values = ", ".join(f'{literal(each)}: "{each}"' for each in LATEST[1:-1])
    return f"""
        SELECT
            {name}, device_id, CAST(timestamp AS DATE) - DATE '1970-01-01' AS day, count(*),
            epoch_us(min(timestamp)), epoch_us(max(timestamp)),
            fsum(voltage), count(voltage), max(temperature), fsum(soc), count(soc),
            max({{{instant}, {values}}}) FILTER (timestamp IS NOT NULL)
        FROM {relation(folder, files, file_name=name)}
        GROUP BY {name}, device_id, day
    """  # noqa: S608 - names of columns, and files of our own


# Invariants: a version is read once in its life, by whichever process meets it first; what is answered is the state
# of one whole listing, never half of one; a listing that fails changes nothing. The cost of a new object is that of
# its own days.

SOME = 2000
PAIRS = 500
KEPT = timedelta(hours=1)
LOOKED = timedelta(hours=2)  # the export writes some versions that are replaced before a listing shows them
ASKED = 16_384  # objects whose properties are remembered
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class View:
    """What one whole listing showed; `versions`: those that queries read. `number` grows with each change, `as_of` with
    each listing, that of a day in `changes` when an object with rows of it comes or goes.
    """

    number: int
    as_of: datetime
    versions: Versions
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
    to date yet; `is_listed`: there was a whole listing, before whose end pairs are not asked for version by version;
    `looked_at`: when all that is known was last compared with `current`.
    """

    current: Versions = field(default_factory=Versions)
    batches: Mapping[bytes, bytes] = field(default_factory=dict)
    days: dict[Pair, DaySummary] = field(default_factory=dict)
    touched: set[Pair] = field(default_factory=set)
    faults: dict[Version, tuple[str, str]] = field(default_factory=dict)
    schemas: Counter[str] = field(default_factory=Counter)
    leaving: deque[tuple[datetime, Version]] = field(default_factory=deque)
    changes: Counter[int] = field(default_factory=Counter)
    rows: int = 0
    size_bytes: int = 0
    moved: bool = False
    is_listed: bool = False
    number: int = 0
    sweeps: int | None = None
    looked_at: datetime = datetime(1970, 1, 1, tzinfo=UTC)


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
        self._asked: dict[tuple[str, str, datetime], ObjectInfo] = {}

    @property
    def view(self) -> View | None:
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

    def refresh(self) -> View:
        """List, learn what is new, drop what is gone, and recompute the sums of both. Raises what the stores raise."""
        with self._lock:
            if self._view is None:
                self._facts.note_asked()
            for _ in range(2):
                as_of = self._clock()
                unread = self._list(as_of)
                self._add_up()
                if self._all_kept():
                    return self._publish(as_of, unread)
            raise Transient("another process keeps removing the summaries", "look for a second Headwater on this state")

    def _list(self, as_of: datetime) -> Sequence[tuple[str, str]]:
        """Bring `current` up to the store; what could not be fetched. A batch that the last listing had, with every
        version of it known, is not even read.
        """
        state = self._state
        unread: list[tuple[str, str]] = []
        seen: dict[bytes, bytes] = {}
        others: list[bytes] = []
        for batch in self._store.batches(self._folder, len(state.current) or self._facts.count()):
            packed = state.batches.get(batch.digest)
            if packed is None:
                packed, is_known = self._look(batch.infos(), unread)
                if not batch.digest or not is_known:
                    others.append(packed)
                    continue
            seen[batch.digest] = packed
        if others or state.moved or not seen or seen.keys() != state.batches.keys():
            self._drop(state.current.beyond(b"".join([*seen.values(), *others])), as_of)
        state.batches = seen
        if not state.is_listed:
            state.touched |= self._facts.all_pairs()
            state.is_listed = True
        return unread

    def _look(self, infos: Sequence[ObjectInfo], unread: list[tuple[str, str]]) -> tuple[bytes, bool]:
        """The versions that count, and whether these are all of the batch: what is new is learnt, what cannot be
        fetched is added to `unread`, and deltas whose rows another object holds do not count.
        """
        left = unfolded((info for info in infos if self._is_ours(info.key)), self._head)
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
        folders = {folder_of(info.key) for info in infos.values()}
        known = self._facts.known(infos, folders)
        if state.is_listed:
            state.touched |= self._facts.pairs(known, folders)
        for version, one in known.items():
            self._take(version, one)
        taken = set(known)
        for group in aggregated(self._store, self._engine, [infos[version] for version in infos.keys() - taken]):
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
        state = self._state
        state.moved = True
        state.rows += known.rows
        state.size_bytes += known.size_bytes
        state.schemas[known.columns] += 1
        if known.fault:
            state.faults[version] = (known.key, known.fault)
        state.current.add(version)

    def _drop(self, versions: Sequence[Version], as_of: datetime) -> None:
        """Count out what is no longer current."""
        if not versions:
            return
        state = self._state
        known = self._facts.known(versions)
        state.touched |= self._facts.pairs(versions)
        state.moved = True
        state.current.drop(versions)
        for version in versions:
            state.faults.pop(version, None)
            state.leaving.append((as_of + KEPT, version))
            if version in known:
                state.rows -= known[version].rows
                state.size_bytes -= known[version].size_bytes
                state.schemas[known[version].columns] -= 1

    def _add_up(self) -> None:
        state = self._state
        touched = sorted(state.touched)
        state.changes.update(day for _, day in touched)
        for start in range(0, len(touched), PAIRS):
            pairs = touched[start : start + PAIRS]
            kept = self._facts.parts(pairs)
            is_current = state.current.among([version for version, _ in kept])
            found = merged(part for _, part in compress(kept, is_current))
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
        later, leaving = now + KEPT, {version for _, version in state.leaving}
        kept = 0
        versions = self._facts.versions()
        while some := list(islice(versions, SOME)):
            is_current = state.current.among(some)
            kept += sum(is_current)
            gone = (version for version, one in zip(some, is_current, strict=True) if not one)
            state.leaving += [(later, version) for version in gone if version not in leaving]
        state.sweeps, state.looked_at = sweeps, now
        if kept < len(state.current):
            again = _State(number=state.number, changes=state.changes, leaving=state.leaving)
            self._state = replace(again, sweeps=sweeps, looked_at=now, moved=True)
        return kept == len(state.current)

    def _publish(self, as_of: datetime, unread: Sequence[tuple[str, str]]) -> View:
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
            view = View(state.number, as_of, versions, days, *sums, columns, faults, dict(state.changes))
        self._view = view
        state.moved = False
        return view

    def _forget(self, now: datetime) -> None:
        """Remove facts of versions that left a while ago: another process may still have been working with them."""
        state = self._state
        due = []
        while state.leaving and state.leaving[0][0] <= now:
            due.append(state.leaving.popleft()[1])
        gone = [version for version, one in zip(due, state.current.among(due), strict=True) if not one]
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
