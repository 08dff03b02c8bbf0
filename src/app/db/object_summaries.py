"""Summaries in the state database: what is known of each version of each object, so that none is read twice.

Invariants: facts belong to a version (key and ETag) and never change, so any process may write them and all may use
them; which versions are current is not kept here, every process knows that from its own listing. Facts that are gone
are noticed by the count of sweeps.
"""

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from hashlib import blake2b
from typing import Any

from app.db.database import NamedQueries, Row, Session, storable
from app.db.packed_days import PackedDays, PackedObject, folder_of, version_of

NO_DAY = -(1 << 30)  # of rows without an instant
SOME = 500
DAYS = 100  # unpacked in one transaction

Version = bytes
"""One version of one object, see `version_of`."""

Pair = tuple[str, int]
"""A device, as JSON text, and a day, counted from 1970-01-01."""


@dataclass(frozen=True, slots=True)
class DaySummary:
    """Aggregates of the rows of one device and one UTC day in one version; instants in microseconds since 1970.

    `latest` holds the values of the newest reading, None when no row has an instant.
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
class Facts:
    """What was found in one version. `columns`: name -> type. `fault` says why it is left out, and then there are no
    parts; beside parts, what of it is not understood; "" when all is well.
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
    """Facts as they are kept, without their parts."""

    key: str
    size_bytes: int
    rows: int
    fault: str
    columns: str


@dataclass(frozen=True, slots=True)
class VersionToRead:
    """A version that a query has to read. `columns`: name -> type as JSON, one text for all that have the same."""

    version: Version
    key: str
    etag: str
    size_bytes: int
    columns: str = "{}"


PART_FIELDS = tuple(each.name for each in fields(DaySummary))[:-1]
"""All but `latest`, in the order of the class and of the query."""


class SqlSummaries:
    """The facts of all versions, in tables of their own or packed by day. Raises what `Session` raises."""

    def __init__(self, queries: NamedQueries) -> None:
        self._queries = queries
        self._packed = PackedDays(queries)

    def known(
        self, versions: Collection[Version], folders: Collection[str] | None = None
    ) -> Mapping[Version, KnownObject]:
        """Those of `versions` that are known. `folders`: where their objects lie; None where that cannot be told, and
        then the days that hold any of them are unpacked.
        """
        found: dict[Version, KnownObject] = {}
        with self._queries.database.transaction(read_only=True) as session:
            for ids in _id_lists(versions):
                for version, key, size_bytes, rows, fault, columns in session.stream(self._queries["facts"], ids=ids):
                    found[bytes.fromhex(version)] = KnownObject(key, size_bytes, rows, fault, columns or "{}")
            missing = set(versions) - found.keys()
            if folders is not None and missing:
                schemas = self._schemas(session)
                for one in self._in_folders(session, folders, missing):
                    columns = schemas.get(one.schema_id, "{}")
                    found[one.version] = KnownObject(one.key, one.size_bytes, one.part[0], "", columns)
        if folders is None and missing and self._unpack(missing):
            return self.known(versions, ())
        return found

    def _schemas(self, session: Session) -> Mapping[str, str]:
        return {row["schema_id"]: row["columns"] for row in session.rows(self._queries["schemas"])}

    def _in_folders(
        self, session: Session, folders: Collection[str], versions: Collection[Version]
    ) -> Iterator[PackedObject]:
        for day in self._packed.in_folders(session, folders):
            yield from (one for one in day.objects() if one.version in versions)

    def _unpack(self, versions: Collection[Version]) -> bool:
        """Whether any day held some of these. They are looked for without a lock: a year of days takes seconds."""
        with self._queries.database.transaction(read_only=True) as session:
            days = self._packed.holding(session, versions)
        for start in range(0, len(days), DAYS):
            with self._queries.database.transaction() as session:
                self._packed.unpack(session, days[start : start + DAYS])
        return bool(days)

    def save(self, many: Sequence[Facts]) -> None:
        """Add what was found. Idempotent, also against other processes."""
        with self._queries.database.transaction() as session:
            self.add_to(session, many)

    def add_to(self, session: Session, many: Sequence[Facts]) -> None:
        """As `save`, in a transaction of somebody else's."""
        schemas = [storable(json.dumps(dict(facts.columns), ensure_ascii=True)) for facts in many]
        ids = {each: blake2b(each.encode(), digest_size=16).hexdigest() for each in schemas}
        session.run_many(
            self._queries["save_schema"], [{"schema_id": id_, "columns": each} for each, id_ in ids.items()]
        )
        # Parts first: whoever sees a version sees them all, in whatever order the database shows its commits.
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
        # Last, so that what another process packed in between is seen: nothing may be in both places.
        self._packed.unpack(session, self._packed.in_folders(session, {folder_of(facts.key) for facts in many}))

    def pack(self, pipeline: str, partition: str, day: int) -> None:
        """Keep what is known of the objects of a partition's days before `day` in one row a day. Idempotent."""
        with self._queries.database.transaction() as session:
            self._packed.pack(session, pipeline, partition, day)

    def pairs(self, versions: Collection[Version], folders: Collection[str] = ()) -> set[Pair]:
        """Device and day of every part of these versions; `folders`: see `known`."""
        with self._queries.database.transaction(read_only=True) as session:
            found = {
                (row["device"], row["day"])
                for ids in _id_lists(versions)
                for row in session.rows(self._queries["pairs_of_objects"], ids=ids)
            }
            days = self._packed.in_folders(session, folders)
            return found | {
                (day.device, day.day) for day in days if any(one.version in versions for one in day.objects())
            }

    def all_pairs(self) -> set[Pair]:
        """Device and day of every part of every version."""
        with self._queries.database.transaction(read_only=True) as session:
            found = {(device, day) for device, day in session.stream(self._queries["all_pairs"])}
            return found | {(day.device, day.day) for day in self._packed.between(session)}

    def parts(self, pairs: Collection[Pair]) -> Sequence[tuple[Version, DaySummary]]:
        """Version and part of all parts of these pairs; versions that are no longer current are among them."""
        with self._queries.database.transaction(read_only=True) as session:
            rows = session.stream(self._queries["parts_of_pairs"], pairs=json.dumps(list(pairs)))
            found = [(bytes.fromhex(row[0]), _part(row[1:])) for row in rows]
            return found + [
                (one.version, _part((day.device, day.day, *one.part)))
                for day in self._packed.of_pairs(session, pairs)
                for one in day.objects()
            ]

    def keys(self, device: str | None, first_day: int | None, last_day: int | None) -> Sequence[VersionToRead]:
        """All that have rows of this device in these days, by key."""
        with self._queries.database.transaction(read_only=True) as session:
            schemas = self._schemas(session)
            rows = session.stream(self._queries["keys"], device=device, first_day=first_day, last_day=last_day)
            found = [
                VersionToRead(bytes.fromhex(version), key, etag, size_bytes, schemas.get(schema_id, "{}"))
                for version, key, etag, size_bytes, schema_id in rows
            ]
            packed = [
                VersionToRead(one.version, one.key, one.etag, one.size_bytes, schemas.get(one.schema_id, "{}"))
                for day in self._packed.between(session, device, first_day, last_day)
                for one in day.objects()
            ]
        return sorted(found + packed, key=lambda one: (one.key, one.etag))

    def count(self) -> int:
        """How many versions are known."""
        return int(self._queries.rows("count_objects")[0]["objects"])

    def versions(self) -> Iterator[Version]:
        """Every version that is known."""
        with self._queries.database.transaction(read_only=True) as session:
            for row in session.stream(self._queries["object_ids"]):
                yield bytes.fromhex(row[0])
            for day in self._packed.between(session):
                yield from (one.version for one in day.objects())

    def is_asked(self) -> bool:
        """Whether anybody ever asked /analytics."""
        return bool(self._queries.rows("is_asked")[0]["asked"])

    def note_asked(self) -> None:
        """Somebody asks. Idempotent."""
        self._queries.run("note_asked")

    def forget_unasked(self, day: int) -> None:
        """Remove versions with rows of days before `day`, unless somebody ever asked. Idempotent."""
        if not self.is_asked():
            with self._queries.database.transaction() as session:
                session.run(self._queries["count_sweep"])
                session.run(self._queries["forget_old_objects"], day=day)
                session.run(self._queries["forget_old_parts"], day=day)

    def sweeps(self) -> int:
        """How often versions were forgotten, by anybody."""
        return int(self._queries.rows("sweeps")[0]["sweeps"])

    def forget(self, versions: Collection[Version]) -> int:
        """Remove what is known of these versions; the number of sweeps then. Idempotent."""
        self.known(versions)  # where they were packed again meanwhile, they are unpacked
        with self._queries.database.transaction() as session:
            session.run(self._queries["count_sweep"])
            for ids in _id_lists(versions):
                session.run(self._queries["forget_objects"], ids=ids)
                session.run(self._queries["forget_parts"], ids=ids)
            return int(session.rows(self._queries["sweeps"])[0]["sweeps"])


def _id_lists(versions: Collection[Version]) -> Iterator[str]:
    """JSON arrays of at most SOME ids."""
    ids = [version.hex() for version in versions]
    for start in range(0, len(ids), SOME):
        yield json.dumps(ids[start : start + SOME])


def _part(row: Sequence[Any]) -> DaySummary:
    return DaySummary(*(*row[:10], None if row[10] is None else _latest(row[10])))


def _latest(text: str) -> tuple[Any, ...]:
    import msgspec  # a year of objects has a million of these: json would take a third of the time of all else

    try:
        return msgspec.json.decode(text, type=tuple[Any, ...])
    except msgspec.DecodeError:
        return tuple(json.loads(text))  # NaN, as older versions wrote it


def _part_rows(facts: Facts) -> Iterator[Row]:
    for place, part in enumerate(facts.parts):
        yield {
            **{name: getattr(part, name) for name in PART_FIELDS},
            "object_id": facts.version.hex(),
            "place": place,
            "latest": None if part.latest is None else json.dumps(part.latest),
        }
