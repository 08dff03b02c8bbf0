"""Summaries in the state database: facts about each version of each object, so that none is read twice.

Invariants: facts belong to a version (key and ETag) and never change, so any process may write them and all may use
them; which versions are current is not stored here, each process knows it from its own listing. Removed facts are
noticed by the count of sweeps.

Facts of past days are packed: for each device and day, only the sum of all versions is kept, and which versions they
are. A version may be both packed and unpacked, when its object was rewritten unchanged: the pack counts.
"""

import json
import re
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, field, fields
from functools import cached_property
from hashlib import blake2b
from itertools import compress, groupby, starmap
from typing import Any

from app.db.database import Repository, Row, Session, storable

NO_DAY = -(1 << 30)  # for rows without a timestamp
SOME = 500
PACKED_AT_ONCE = 5000  # versions, in a transaction of under a second
DIGEST = re.compile(r'"[0-9a-f]{32}"')  # the form of an ETag in most stores

Version = bytes
"""One version of one object, see `version_of`."""

Pair = tuple[str, int]
"""A device, as JSON text, and a day, counted from 1970-01-01."""


@dataclass(frozen=True, slots=True)
class DaySummary:
    """Aggregates of the rows of one device and one UTC day in one version; timestamps in microseconds since 1970.

    `latest` holds the values of the newest reading, None when no row has a timestamp.
    """

    device: str
    day: int
    rows: int
    min_us: int | None
    max_us: int | None
    voltage_sum: float | None
    voltage_count: int
    temperature_max: float | None
    soc_sum: float | None
    soc_count: int
    latest: tuple[Any, ...] | None


@dataclass(frozen=True, slots=True)
class ObjectFacts:
    """The facts about one version. `columns`: name -> type. `fault`: without parts, why the object is left out; with
    parts, what in it was not understood; "" when all is well.
    """

    key: str
    etag: str
    size_bytes: int
    rows: int = 0
    columns: Mapping[str, str] = field(default_factory=dict)
    fault: str = ""
    parts: Sequence[DaySummary] = ()

    @property
    def version(self) -> Version:
        """See `version_of`."""
        return version_of(self.key, self.etag)


@dataclass(frozen=True, slots=True)
class KnownObject:
    """Stored facts, without their parts."""

    key: str
    size_bytes: int
    rows: int
    fault: str
    columns: str


@dataclass(frozen=True, slots=True)
class VersionToRead:
    """A version that a query has to read. `columns`: name -> type as JSON, one string shared by equal schemas."""

    version: Version
    key: str
    etag: str
    size_bytes: int
    columns: str = "{}"


PART_FIELDS = tuple(each.name for each in fields(DaySummary))[:-1]
"""All fields except `latest`, in the order of the class and of the query."""


@dataclass(frozen=True)
class DayPack:
    """Versions whose rows are all of one device and day, and the sum of all of them.

    `keys`, `etags`, `sizes` (in bytes) and `schemas` (ids of their columns) are in the same order.
    """

    part: DaySummary
    keys: Sequence[str]
    etags: Sequence[str]
    sizes: Sequence[int]
    schemas: Sequence[str]

    @property
    def pair(self) -> Pair:
        """The device and day of all its rows."""
        return self.part.device, self.part.day

    @cached_property
    def versions(self) -> Sequence[Version]:
        """The ids of the versions, in the same order."""
        return [version_of(key, etag) for key, etag in zip(self.keys, self.etags, strict=True)]

    @property
    def row(self) -> Row:
        """The row to store."""
        digests = all(DIGEST.fullmatch(etag) for etag in self.etags)
        device, day, *numbers = astuple(self.part)
        etags = [] if digests else self.etags
        text = json.dumps([numbers, self.keys, etags, self.sizes, self.schemas], separators=(",", ":"))
        return {
            "device": device,
            "day": day,
            "etags": bytes.fromhex("".join(etag[1:-1] for etag in self.etags)) if digests else b"",
            "packed": zlib.compress(text.encode(), 9),
        }


def unpacked(device: str, day: int, digests: bytes, packed: bytes) -> DayPack:
    """The pack in a stored row."""
    (*numbers, latest), keys, etags, sizes, schemas = _loaded(zlib.decompress(packed))
    found = digests.hex()
    etags = etags or [f'"{found[start : start + 32]}"' for start in range(0, len(found), 32)]
    part = DaySummary(*(device, day, *numbers, None if latest is None else tuple(latest)))
    return DayPack(part, keys, etags, sizes, schemas)


Merged = Callable[[Iterable[DaySummary]], Mapping[Pair, DaySummary]]
"""Adds up parts into one per pair."""


def version_of(key: str, etag: str) -> Version:
    """A 16-byte id of one version of one object: small in memory, and unique."""
    return blake2b(f"{key}\n{etag}".encode(), digest_size=16).digest()


class SqlSummaries(Repository):
    """The facts of all versions. Raises what `Session` raises."""

    def known(self, versions: Collection[Version]) -> Mapping[Version, KnownObject]:
        """The facts of those of `versions` that are known and not packed."""
        with self._queries.database.transaction(read_only=True) as session:
            return dict(
                _known(row) for ids in _id_lists(versions) for row in session.stream(self._queries["facts"], ids=ids)
            )

    def save(self, many: Sequence[ObjectFacts]) -> None:
        """Add facts. Idempotent, also against other processes."""
        with self._queries.database.transaction() as session:
            self.add_to(session, many)

    def add_to(self, session: Session, many: Sequence[ObjectFacts]) -> None:
        """As `save`, in the caller's transaction."""
        schemas = [storable(json.dumps(dict(facts.columns), ensure_ascii=True)) for facts in many]
        ids = {each: blake2b(each.encode(), digest_size=16).hexdigest() for each in schemas}
        session.run_many(
            self._queries["save_schema"], [{"schema_id": id_, "columns": each} for each, id_ in ids.items()]
        )
        # Parts first: a reader that sees a version then sees all its parts, in whatever order commits become visible.
        session.run_many(self._queries["save_part"], [row for facts in many for row in _part_rows(facts)])
        objects = [
            {
                "object_id": facts.version.hex(),
                "key": facts.key,
                "etag": facts.etag,
                "size_bytes": facts.size_bytes,
                "rows": facts.rows,
                "schema_id": ids[schema],
                "fault": storable(facts.fault),
            }
            for facts, schema in zip(many, schemas, strict=True)
        ]
        session.run_many(self._queries["save_object"], objects)

    def every(self) -> Iterator[tuple[Version, KnownObject]]:
        """All known versions that are not packed."""
        with self._queries.database.transaction(read_only=True) as session:
            yield from map(_known, session.stream(self._queries["all_facts"]))

    def schemas(self) -> Mapping[str, str]:
        """Columns with their types as JSON, by the schema id used in packs."""
        return {row["schema_id"]: row["columns"] for row in self._queries.rows("schemas")}

    def packs(self, pairs: Collection[Pair] | None = None) -> Iterator[DayPack]:
        """The packs of these pairs, or all. To get all facts, read packs last: facts packed meanwhile are then seen
        twice, not missed.
        """
        with self._queries.database.transaction(read_only=True) as session:
            query, of = ("all_packs", {}) if pairs is None else ("packs_of_pairs", {"pairs": json.dumps(list(pairs))})
            for row in session.stream(self._queries[query], **of):
                yield unpacked(*row)

    def pack(
        self,
        before_day: int,
        is_current: Callable[[Sequence[Version]], Sequence[bool]],
        merged: Merged,
    ) -> int:
        """Pack some versions without fault whose rows are all of one pair, of a day before `before_day`; returns how
        many. `is_current` says which may be packed, `merged` adds up parts.
        """
        with self._queries.database.transaction() as session:
            session.run(self._queries["count_sweep"], removed=0)  # one process at a time
            of = {"no_day": NO_DAY, "before_day": before_day, "at_once": PACKED_AT_ONCE}
            found = {bytes.fromhex(row[0]): row for row in session.stream(self._queries["packable"], **of)}
            rows = {version: found[version] for version in compress(found, is_current(list(found)))}
            pairs = json.dumps([*{tuple(row[1:3]) for row in rows.values()}])
            held = {}
            for pack in starmap(unpacked, session.stream(self._queries["packs_of_pairs"], pairs=pairs)):
                held[pack.pair] = pack
                if not all(is_current(pack.versions)):  # the pack is about to be removed
                    rows = {version: row for version, row in rows.items() if tuple(row[1:3]) != pack.pair}
            made = [
                _packed(held.get(pair), list(some), merged)
                for pair, some in groupby(rows.values(), key=lambda row: tuple(row[1:3]))
            ]
            session.run_many(self._queries["save_pack"], [pack.row for pack in made])
            self._remove(session, rows)
        return len(rows)

    def pairs(self, versions: Collection[Version]) -> set[Pair]:
        """Device and day of every part of these versions that is not packed."""
        with self._queries.database.transaction(read_only=True) as session:
            return {
                (row["device"], row["day"])
                for ids in _id_lists(versions)
                for row in session.rows(self._queries["pairs_of_objects"], ids=ids)
            }

    def all_pairs(self) -> set[Pair]:
        """Device and day of every part that is not packed."""
        with self._queries.database.transaction(read_only=True) as session:
            return {(device, day) for device, day in session.stream(self._queries["all_pairs"])}

    def parts(self, pairs: Collection[Pair]) -> Sequence[tuple[Version, DaySummary]]:
        """Version and part of all unpacked parts of these pairs, including versions that are not current."""
        with self._queries.database.transaction(read_only=True) as session:
            rows = session.stream(self._queries["parts_of_pairs"], pairs=json.dumps(list(pairs)))
            return [(bytes.fromhex(row[0]), _part(row)) for row in rows]

    def keys(self, device: str | None, first_day: int | None, last_day: int | None) -> Sequence[VersionToRead]:
        """All versions that have rows of this device in these days, by key."""
        of = {"device": device, "first_day": first_day, "last_day": last_day}
        schemas = self.schemas()
        with self._queries.database.transaction(read_only=True) as session:
            found = {
                version: VersionToRead(bytes.fromhex(version), key, etag, size_bytes, schemas.get(schema_id, "{}"))
                for version, key, etag, size_bytes, schema_id in session.stream(self._queries["keys"], **of)
            }
            for pack in starmap(unpacked, session.stream(self._queries["packs_of_span"], **of)):
                objects = zip(pack.versions, pack.keys, pack.etags, pack.sizes, pack.schemas, strict=True)
                for packed, key, etag, size_bytes, schema_id in objects:
                    columns = schemas.get(schema_id, "{}")
                    found[packed.hex()] = VersionToRead(packed, key, etag, size_bytes, columns)
        return sorted(found.values(), key=lambda each: each.key)

    def versions(self) -> Iterator[Version]:
        """Every known version; one may appear twice."""
        with self._queries.database.transaction(read_only=True) as session:
            for row in session.stream(self._queries["object_ids"]):
                yield bytes.fromhex(row[0])
        for pack in self.packs():
            yield from pack.versions

    def is_asked(self) -> bool:
        """Whether /analytics was ever requested."""
        return bool(self._queries.rows("is_asked")[0]["asked"])

    def note_asked(self) -> None:
        """Record that /analytics was requested. Idempotent."""
        self._queries.run("note_asked")

    def forget_unasked(self, day: int) -> None:
        """Remove versions with rows of days before `day`, unless /analytics was ever requested. Idempotent."""
        if not self.is_asked():
            with self._queries.database.transaction() as session:
                session.run(self._queries["count_sweep"], removed=1)
                session.run(self._queries["forget_old_objects"], day=day)
                session.run(self._queries["forget_old_parts"], day=day)

    def sweeps(self) -> int:
        """How often versions were removed, by any process."""
        return int(self._queries.rows("sweeps")[0]["sweeps"])

    def forget(self, versions: Collection[Version], packs: Collection[Pair] = ()) -> int:
        """Remove the facts of these versions that are not packed, and these packs; returns the number of sweeps
        afterwards. Idempotent.
        """
        with self._queries.database.transaction() as session:
            session.run(self._queries["count_sweep"], removed=1)
            self._remove(session, versions)
            session.run_many(self._queries["forget_pack"], [{"device": device, "day": day} for device, day in packs])
            return int(session.rows(self._queries["sweeps"])[0]["sweeps"])

    def _remove(self, session: Session, versions: Collection[Version]) -> None:
        for ids in _id_lists(versions):
            session.run(self._queries["forget_objects"], ids=ids)
            session.run(self._queries["forget_parts"], ids=ids)


def _id_lists(versions: Collection[Version]) -> Iterator[str]:
    """JSON arrays of at most SOME ids."""
    ids = [version.hex() for version in versions]
    for start in range(0, len(ids), SOME):
        yield json.dumps(ids[start : start + SOME])


def _known(row: Sequence[Any]) -> tuple[Version, KnownObject]:
    version, key, size_bytes, rows, fault, columns = row
    return bytes.fromhex(version), KnownObject(key, size_bytes, rows, fault, columns or "{}")


def _part(row: Sequence[Any]) -> DaySummary:
    return DaySummary(*(*row[1:11], None if row[11] is None else tuple(_loaded(row[11]))))


def _packed(held: DayPack | None, rows: Sequence[Sequence[Any]], merged: Merged) -> DayPack:
    """The pack that adds rows of `packable`, all of one pair, to `held`."""
    known = set(zip(held.keys, held.etags, strict=True)) if held else set()
    objects = [*zip(held.keys, held.etags, held.sizes, held.schemas, strict=True)] if held else []
    parts = [held.part] if held else []
    for row in rows:
        if (row[12], row[13]) not in known:
            objects.append(tuple(row[12:]))
            parts.append(_part(row))
    (part,) = merged(parts).values()
    return DayPack(part, *zip(*objects, strict=True))


def _loaded(text: str | bytes) -> Any:
    import msgspec  # a year of objects has a million of these: json would take a third of the total time

    try:
        return msgspec.json.decode(text)
    except msgspec.DecodeError:
        return json.loads(text)  # NaN, which older versions wrote, and infinite sums


def _part_rows(facts: ObjectFacts) -> Iterator[Row]:
    for place, part in enumerate(facts.parts):
        yield {
            **{name: getattr(part, name) for name in PART_FIELDS},
            "object_id": facts.version.hex(),
            "place": place,
            "latest": None if part.latest is None else json.dumps(part.latest),
        }
